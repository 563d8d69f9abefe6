"""
What is done to a stage, by name. Each fault happens once, returns when it is over, and says what it was.

What is told to stop while a fault lasts must stop in time, too: those faults that silence the server tell one worker.
"""

import asyncio
import contextlib
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

from tests.faults.nemeses.network import Mode
from tests.faults.nemeses.stage import PostgresStage, SqliteStage, Stage, until

S = TypeVar("S")

Fault = Callable[[S], Awaitable[str]]
"""Does something to a stage of this kind."""

_CONNECTED = 10.0
"""Seconds in which somebody connects."""


async def none(_: Stage) -> str:
    """Nothing."""
    return "nothing"


async def kill(stage: Stage) -> str:
    """SIGKILL of a process."""
    actor = await stage.some()
    actor.signal(signal.SIGKILL)
    return actor.name


async def stop(stage: Stage) -> str:
    """SIGSTOP of a worker for longer than its leases, then SIGCONT."""
    actor = await stage.some("worker")
    actor.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(stage.ttl * stage.random.uniform(1.2, 2))
    finally:
        actor.signal(signal.SIGCONT)
    return actor.name


async def leave(stage: Stage) -> str:
    """SIGTERM of a worker."""
    actor = await stage.some("worker")
    actor.ask_to_stop()
    return actor.name


# -- PostgreSQL


async def terminate(stage: PostgresStage) -> str:
    """The server ends half of its connections."""
    ended = await stage.rows(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where backend_type = 'client backend' and pid <> pg_backend_pid() and random() < 0.5"
    )
    return f"{len(ended)} connections"


async def crash(stage: PostgresStage) -> str:
    """The server ends at once, without a checkpoint, and starts again a moment later."""
    await asyncio.to_thread(stage.server.crash)
    await asyncio.sleep(stage.random.uniform(0, stage.ttl))
    await asyncio.to_thread(stage.server.start)
    return "crashed"


async def pause(stage: PostgresStage) -> str:
    """All of the server's processes stand still for a while."""
    await stage.suspend()
    try:
        return await _silence(stage)
    finally:
        stage.resume()


async def stall(stage: PostgresStage) -> str:
    """The network holds back what is sent, and delivers it later."""
    async with _network(stage, "stall"):
        return await _silence(stage)


async def blackhole(stage: PostgresStage) -> str:
    """The network swallows what is sent. Later new connections work, and nothing is ever heard of the others."""
    async with _network(stage, "blackhole"):
        return await _silence(stage)


async def refuse(stage: PostgresStage) -> str:
    """All connections are reset, and so are new ones for a while."""
    async with _network(stage, "refuse"):
        await asyncio.sleep(stage.ttl * stage.random.uniform(0.5, 2))
    return "refused"


async def drop(stage: PostgresStage) -> str:
    """Half of the connections are reset."""
    return await _some_connections(stage.network.drop, 0.5)


async def halfclose(stage: PostgresStage) -> str:
    """Half of the connections are closed by the server's side, which hears nothing any more."""
    return await _some_connections(stage.network.half_close, 0.5)


async def silent(stage: PostgresStage) -> str:
    """Nothing is ever heard again of a third of the connections; new ones work."""
    return await _some_connections(stage.network.forget, 0.34)


async def _some_connections(do: Callable[[float], int], share: float) -> str:
    """Do it to this share of the connections, as soon as there are any: some faults leave none for a moment."""
    count = 0

    def done() -> bool:
        nonlocal count
        count = do(share)
        return count > 0

    await until(done, _CONNECTED)
    return f"{count} connections"


async def _silence(stage: PostgresStage) -> str:
    """Last longer than the leases; tell one of the workers to stop meanwhile."""
    actor = await stage.some("worker")
    actor.ask_to_stop()
    seconds = stage.ttl * stage.random.uniform(1.3, 2.5)
    await asyncio.sleep(seconds)
    return f"{seconds:.1f} s, and {actor.name} was told to stop"


@asynccontextmanager
async def _network(stage: PostgresStage, mode: Mode) -> AsyncIterator[None]:
    stage.network.become(mode)
    try:
        yield
    finally:
        stage.network.become("pass")


# -- SQLite

_HOLDER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
connection.execute("begin immediate")
connection.execute("insert into effects (process) values ('holder')")
print("held", flush=True)
time.sleep(0.3)
connection.execute("commit")
"""


async def stopwrite(stage: SqliteStage) -> str:
    """A process that has written stands still for longer than the leases last, and then commits or is killed."""
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _HOLDER, stage.place.where), stdout=subprocess.PIPE
    )
    end = stage.random.choice([signal.SIGCONT, signal.SIGKILL])
    try:
        assert holder.stdout is not None
        await asyncio.wait_for(holder.stdout.readline(), 60)
        holder.send_signal(signal.SIGSTOP)
        await asyncio.sleep(stage.ttl * stage.random.uniform(0.5, 2))
        holder.send_signal(end)
        await asyncio.wait_for(holder.wait(), 60)
    finally:
        if holder.returncode is None:
            holder.kill()
            await holder.wait()
    return end.name


async def reader(stage: SqliteStage) -> str:
    """A connection reads for a while: what is written meanwhile cannot be moved from the log into the file."""
    with contextlib.closing(sqlite3.connect(stage.place.where, isolation_level=None)) as connection:
        connection.execute("begin")
        connection.execute("select count(*) from runtime_attempts").fetchone()
        await asyncio.sleep(stage.ttl * stage.random.uniform(1, 2))
    return "read"


async def full(stage: SqliteStage) -> str:
    """The disk is full for a while."""
    filler = stage.disk / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)
        await asyncio.sleep(stage.ttl * stage.random.uniform(0.5, 2))
    finally:
        filler.unlink()
    return "full"


# -- all of them

ANY: Mapping[str, Fault[Stage]] = {"none": none, "kill": kill, "stop": stop, "leave": leave}
POSTGRES: Mapping[str, Fault[PostgresStage]] = {
    **ANY,
    "terminate": terminate,
    "crash": crash,
    "pause": pause,
    "stall": stall,
    "blackhole": blackhole,
    "refuse": refuse,
    "drop": drop,
    "halfclose": halfclose,
    "silent": silent,
}
SQLITE: Mapping[str, Fault[SqliteStage]] = {**ANY, "stopwrite": stopwrite, "reader": reader, "full": full}
MIXED = {
    "postgres": [name for name in POSTGRES if name != "none"],
    "sqlite": ["kill", "stop", "leave", "stopwrite", "reader"],
}
"""What *mixed* stands for; on SQLite all that needs no root."""
