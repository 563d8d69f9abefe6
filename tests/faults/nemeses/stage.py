"""
All of a run: a store, the processes that use it, and on PostgreSQL the server and the network before it.

Whatever a stage has started has ended, and whatever it has made is gone, when its block ends.
"""

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from random import Random
from typing import Any

import asyncpg

from runtime_repo import RuntimeRepository
from tests.faults.nemeses.network import Network
from tests.faults.nemeses.workload import Load, Role, run
from tests.faults.processes import PROCESSES
from tests.place import Place
from tests.postgres_server import PostgresServer

TABLES = (
    "create table {schema}.orders (id text primary key)",
    "create table {schema}.effects (attempt_id text, token bigint, process text)",
)
"""The application's own."""

_CROWD: Mapping[Role, int] = {"worker": 3, "rogue": 1, "producer": 1}
_LOOK_EVERY = 0.05
_START = 30.0
_KILL = 10.0


async def until(fact: Callable[[], bool], seconds: float) -> bool:
    """Wait for *fact* for so many seconds at most; return whether it has come."""
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_LOOK_EVERY)
    return True


@dataclass
class Actor:
    """A process of the workload."""

    role: Role
    name: str
    process: ForkServerProcess
    asked_to_stop: float | None = None
    ended: float | None = None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still lives."""
        if self.process.is_alive() and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def ask_to_stop(self) -> None:
        """SIGTERM; how long it takes to end is judged."""
        self.asked_to_stop = time.monotonic()
        self.signal(signal.SIGTERM)


@dataclass
class Stage(ABC):
    """What faults are done to."""

    folder: Path
    """Where histories and logs are written."""
    random: Random
    ttl: float
    rate: float = 10
    options: dict[str, Any] = field(default_factory=dict)
    """Of the processes' repositories."""
    actors: list[Actor] = field(default_factory=list)
    """All that ever were."""
    wanted: set[Role] = field(default_factory=set)
    """The roles in which who has ended is followed by another."""

    @property
    @abstractmethod
    def place(self) -> Place:
        """The store as the processes see it."""

    @property
    @abstractmethod
    def direct_place(self) -> Place:
        """The store without a network that misbehaves."""

    @abstractmethod
    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Run the judge's own SQL."""

    @abstractmethod
    def heal(self) -> None:
        """End whatever fault lasts."""

    def repository(self) -> RuntimeRepository:
        """The judge's own, which has not been awaited."""
        return self.direct_place.repository()

    def living(self, role: Role | None = None) -> list[Actor]:
        """Those that run and were not told to stop."""
        return [
            actor
            for actor in self.actors
            if role in (None, actor.role) and actor.asked_to_stop is None and actor.process.is_alive()
        ]

    async def some(self, role: Role | None = None) -> Actor:
        """
        One of those that run, at random.

        Raises:
            TimeoutError: There is none, and none is started.
        """
        if not await until(lambda: bool(self.living(role)), _START):
            raise TimeoutError(f"no {role or 'process'} runs")
        return self.random.choice(self.living(role))

    @asynccontextmanager
    async def crowd(self) -> AsyncIterator[None]:
        """Start the processes; who ends is followed by another, of another name, until the role is dismissed."""
        supervisor: asyncio.Task[None] | None = None
        try:
            for role, count in _CROWD.items():
                for number in range(count):
                    self._start(role, f"{role}{number}")
            self.wanted.update(_CROWD)
            supervisor = asyncio.create_task(self._supervise())
            yield
        finally:
            if supervisor is not None:
                supervisor.cancel()
                await asyncio.gather(supervisor, return_exceptions=True)
            for actor in self.actors:
                actor.process.kill()
            for actor in self.actors:
                await asyncio.to_thread(actor.process.join, 10)

    async def dismiss(self, *roles: Role, within: float | None = None) -> None:
        """End those of these roles, and let none follow: by SIGTERM, if there is a time *within* which they should."""
        self.wanted.difference_update(roles)
        leaving = [actor for actor in self.actors if actor.role in roles and actor.ended is None]
        for actor in leaving:
            if within is None:
                actor.process.kill()
            elif actor.asked_to_stop is None:
                actor.ask_to_stop()
        await until(lambda: all(actor.ended is not None for actor in leaving), _KILL if within is None else within)

    def _start(self, role: Role, name: str) -> None:
        load = Load(self.place, self.folder, self.ttl, self.rate, self.options)
        process = PROCESSES.Process(target=run, args=(role, name, load), name=name, daemon=True)
        process.start()
        self.actors.append(Actor(role, name, process))

    async def _supervise(self) -> None:
        generation = 0
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            for actor in [actor for actor in self.actors if actor.ended is None and not actor.process.is_alive()]:
                actor.ended = time.monotonic()
                if actor.role in self.wanted:
                    generation += 1
                    self._start(actor.role, f"{actor.name.split('.')[0]}.{generation}")


@dataclass
class PostgresStage(Stage):
    """On a PostgreSQL of the run's own, through a network of its own."""

    server: PostgresServer = field(kw_only=True)
    network: Network = field(kw_only=True)
    _suspended: list[int] = field(default_factory=list)

    @property
    def place(self) -> Place:
        direct = self.direct_place
        where = direct.where.replace(f":{self.server.port}/", f":{self.network.port}/")
        return Place(direct.backend, where, direct.schema)

    @property
    def direct_place(self) -> Place:
        return Place("postgres", self.server.url(), "runtime")

    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(self.server.socket_url(), timeout=10)
        try:
            return [tuple(row) for row in await connection.fetch(sql, timeout=10)]
        finally:
            await connection.close(timeout=2)

    async def suspend(self) -> None:
        """SIGSTOP all of the server's processes, as if its machine stood still: the kernel still takes connections."""
        connection = await asyncpg.connect(self.server.socket_url(), timeout=10)
        try:
            # The first one before the others are asked for: no more of them begin then.
            self._stop(self.server.pid)
            for (pid,) in await connection.fetch("select pid from pg_stat_activity", timeout=10):
                self._stop(pid)
        finally:
            connection.terminate()

    def _stop(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            self._suspended.append(pid)

    def resume(self) -> None:
        """Let them go on."""
        while self._suspended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._suspended.pop(), signal.SIGCONT)

    def heal(self) -> None:
        self.network.become("pass")
        self.resume()


@asynccontextmanager
async def on_postgres(
    server: PostgresServer, folder: Path, random: Random, **kwargs: Any
) -> AsyncIterator[PostgresStage]:
    """A stage on a server that has been started and is the run's own."""
    async with Network(server.port, random) as network:
        stage = PostgresStage(folder, random, server=server, network=network, **kwargs)
        try:
            yield stage
        finally:
            stage.heal()


@dataclass
class SqliteStage(Stage):
    """On a file."""

    @property
    def place(self) -> Place:
        return self.direct_place

    @property
    def direct_place(self) -> Place:
        return Place("sqlite", str(self.disk / "runtime.db"))

    @property
    def disk(self) -> Path:
        """The folder of the file."""
        return self.folder / "disk"

    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        def fetch() -> list[tuple[Any, ...]]:
            with contextlib.closing(sqlite3.connect(self.place.where, timeout=10)) as connection:
                rows = connection.execute(sql).fetchall()
                connection.commit()
                return rows

        return await asyncio.to_thread(fetch)

    def heal(self) -> None:
        """Nothing lasts beyond its fault."""


@asynccontextmanager
async def on_sqlite(folder: Path, random: Random, *, small: bool = False, **kwargs: Any) -> AsyncIterator[SqliteStage]:
    """A stage on a new file; on a disk of its own that can be filled if *small*, which only root can have."""
    stage = SqliteStage(folder, random, **kwargs)
    stage.disk.mkdir()
    with _small_disk(stage.disk) if small else contextlib.nullcontext():
        yield stage


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
