"""Many processes that boot at once while some of them, their connections or their server die, at any instant."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

import pytest

from tests.faults.conftest import lab_on
from tests.faults.processes import PROCESSES, race
from tests.lab import Lab, PostgresLab, on_postgres
from tests.place import Place
from tests.postgres_server import PostgresServer
from tests.versions import HISTORY, RECORDED

CROWD = 8
ROUNDS = 4
BOOT = 0.05
"""Seconds that a race takes about: death comes within them."""

PENDING = {version: RECORDED[version:] for version in (0, 1)}
VERSIONS = pytest.mark.parametrize("version", PENDING, ids=["fresh", "upgrade"])


@asynccontextmanager
async def racing(place: Place) -> AsyncIterator[dict[Connection, ForkServerProcess]]:
    """Let a crowd of processes boot *place* in the same instant, which is when the block begins."""
    gate, opener = PROCESSES.Pipe(duplex=False)
    crowd: dict[Connection, ForkServerProcess] = {}
    try:
        for _ in range(CROWD):
            here, there = PROCESSES.Pipe(duplex=False)
            crowd[here] = PROCESSES.Process(target=race, args=(place, gate, there), daemon=True)
            crowd[here].start()
            there.close()
        for here in crowd:
            assert await asyncio.to_thread(here.poll, 60), "it did not come to the start in 60 s"
            here.recv()
        opener.close()
        yield crowd
    finally:
        opener.close()
        gate.close()
        for here, process in crowd.items():
            process.kill()
            process.join(10)
            here.close()


async def answers(crowd: dict[Connection, ForkServerProcess]) -> list[list[int]]:
    """What each of them has applied, if it lived to tell; that one fails because of another's death is an error."""
    found = []
    for here in crowd:
        assert await asyncio.to_thread(here.poll, 60), "it was still booting after 60 s"
        try:
            answer = here.recv()
        except EOFError:
            continue
        assert isinstance(answer, list), answer
        found.append(answer)
    return found


async def check(lab: Lab, version: int, applied: list[list[int]]) -> None:
    """All that was pending was applied once: by one who tells of it, or by one who did not live or hear to tell."""
    assert [found for found in applied if found] in ([], [PENDING[version]])
    async with lab.repository(lock_timeout=0) as repository:
        assert repository.boot_report.applied == ()
    assert await lab.recorded() == HISTORY


@VERSIONS
async def test_whoever_is_killed_the_others_boot(lab: Lab, version: int) -> None:
    """Half of them die, each at an instant of its own; the rest does not notice."""
    for _ in range(ROUNDS):
        lab = lab.another()
        await lab.lay(version)
        async with racing(lab.place) as crowd:
            for process in random.sample(list(crowd.values()), CROWD // 2):
                await asyncio.sleep(random.uniform(0, BOOT / 2))
                process.kill()
            applied = await answers(crowd)
        assert len(applied) >= CROWD // 2
        await check(lab, version, applied)


@on_postgres
@VERSIONS
async def test_whosever_connection_is_ended_everybody_boots(lab: PostgresLab, version: int) -> None:
    """Lost while it connects, looks, waits or migrates: it tries again."""
    for _ in range(ROUNDS):
        lab = lab.another()
        await lab.lay(version)
        async with racing(lab.place) as crowd:
            for _ in range(3):
                await asyncio.sleep(random.uniform(0, BOOT / 2))
                await lab.admin.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1",
                    lab.place.schema,
                )
            applied = await answers(crowd)
        assert len(applied) == CROWD
        await check(lab, version, applied)


@VERSIONS
async def test_whenever_the_server_crashes_everybody_boots(
    new_server: Callable[..., PostgresServer], version: int
) -> None:
    """It comes back a moment later, with all of the migrations or with none."""
    server = new_server(durable=True)

    for number in range(2):
        async with lab_on(server, f"round_{number}") as lab:
            await lab.lay(version)
        async with racing(lab.place) as crowd:
            await asyncio.sleep(random.uniform(0, BOOT))
            await asyncio.to_thread(server.crash)
            await asyncio.to_thread(server.start)
            applied = await answers(crowd)
        async with lab_on(server, f"round_{number}") as lab:
            assert len(applied) == CROWD
            await check(lab, version, applied)
