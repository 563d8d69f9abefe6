"""Many processes that boot at once, and processes and servers that die while they migrate."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import get_args

import pytest

from runtime_repo import DatabaseUnavailableError, SchemaLockTimeoutError, SchemaReport
from tests.faults.conftest import lab_on
from tests.faults.processes import PROCESSES, boot_together, meet_at, stall_for_ever
from tests.lab import Lab, PostgresLab, SqliteLab, on_postgres
from tests.place import Moment, Place
from tests.postgres_server import PostgresServer
from tests.versions import HISTORY, NEWEST

CROWD = 24
ROUNDS = {"sqlite": 20, "postgres": 2}
"""SQLite's races are for a file that does not exist yet; those that were found showed once in a thousand boots."""

MOMENTS = get_args(Moment)
VERSIONS = pytest.mark.parametrize("version", [0, 1], ids=["fresh", "upgrade"])


@pytest.fixture(scope="module")
def crowd() -> Iterator[Callable[[Place], list[SchemaReport]]]:
    """Boots one place by as many processes at once; their errors are raised here."""
    gate = PROCESSES.Barrier(CROWD)
    with ProcessPoolExecutor(CROWD, mp_context=PROCESSES, initializer=meet_at, initargs=(gate,)) as pool:
        yield lambda place: list(pool.map(boot_together, [place] * CROWD, timeout=120))


@VERSIONS
async def test_of_processes_that_boot_at_once_exactly_one_migrates(
    lab: Lab, crowd: Callable[[Place], list[SchemaReport]], version: int
) -> None:
    """None fails, all serve the same version, and the ledger has one row for each migration."""
    for _ in range(ROUNDS[lab.place.backend]):
        lab = lab.another()
        await lab.lay(version)
        reports = crowd(lab.place)
        pending = tuple(range(version + 1, NEWEST + 1))
        applied = Counter(tuple(migration.version for migration in report.applied) for report in reports)
        assert applied == {pending: 1, (): CROWD - 1}
        assert {report.to_version for report in reports} == {NEWEST}
        assert {report.from_version for report in reports} <= {version, NEWEST}
        assert await lab.recorded() == HISTORY
        assert await lab.version() == NEWEST
        if isinstance(lab, SqliteLab):
            assert len(lab.backups()) == version
            assert [report.backup is not None for report in reports].count(True) == version
        else:
            assert await lab.connections() == []


@VERSIONS
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_booter_that_is_killed_leaves_the_database_as_it_was(lab: Lab, moment: Moment, version: int) -> None:
    """Its lock dies with it, whatever it had applied is gone, and the next boot succeeds at once."""
    await lab.lay(version)
    before = await lab.content()
    here, there = PROCESSES.Pipe()
    victim = PROCESSES.Process(target=stall_for_ever, args=(lab.place, moment, there), daemon=True)
    victim.start()
    try:
        assert here.poll(30), "the victim did not come so far"
        assert here.recv() == moment
        with pytest.raises(SchemaLockTimeoutError):
            await asyncio.wait_for(lab.repository(lock_timeout=0).ensure_schema(), 10)
    finally:
        victim.kill()
        victim.join(30)
        here.close()
        there.close()
    # Its lock on the tables ends when the server notices its death.
    assert await asyncio.wait_for(lab.content(), 5) == before
    async with lab.repository(lock_timeout=0) as successor:
        assert successor.boot_report.from_version == version
    assert await lab.version() == NEWEST


@on_postgres
async def test_a_hundred_repositories_of_one_process_boot_at_once(lab: PostgresLab) -> None:
    """No error, and exactly one of them migrates an empty database."""

    async def boot() -> int:
        async with lab.repository(max_size=1) as repository:
            return len(repository.boot_report.applied)

    async with lab.nothing_left():
        applied = await asyncio.gather(*(boot() for _ in range(100)))
    assert sorted(applied) == [0] * 99 + [NEWEST]
    assert await lab.migration_locks() == 0


@VERSIONS
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_server_that_crashes_leaves_nothing_half_migrated(
    new_server: Callable[..., PostgresServer], moment: Moment, version: int
) -> None:
    """The boot fails in our words; after recovery the database is as it was and boots."""
    server = new_server(durable=True)
    async with lab_on(server) as lab:
        await lab.lay(version)
        before = await lab.content()

    async def crash() -> None:
        await asyncio.to_thread(server.crash)

    with pytest.raises(DatabaseUnavailableError):
        await lab.place.boot_stalling(moment, crash, startup_timeout=1)
    await asyncio.to_thread(server.start)
    async with lab_on(server) as lab, lab.nothing_left():
        assert await lab.content() == before
        async with lab.repository(lock_timeout=0) as repository:
            assert repository.boot_report.from_version == version
