"""What happens before an upgrade, under the lock: SQLite's backup, and the operator's own step."""

import asyncio
import contextlib
import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime_repo import MigrationError, RuntimeRepoError, SchemaDriftError, SchemaLockTimeoutError
from tests.privileges import unprivileged
from tests.schema.lab import LEDGER, ONE, TWO, Lab, PostgresLab, SqliteLab, on_postgres, on_sqlite
from tests.schema.version_1 import TABLES


@on_sqlite
async def test_an_upgrade_leaves_a_whole_copy_of_version_1_beside_the_file(lab: SqliteLab) -> None:
    """The report says where it is, it can be opened as it is, and it has every row and the original's permissions."""
    await lab.reach(1)
    lab.path.chmod(0o640)
    before = {table: await lab.all(table) for table in (LEDGER, *TABLES)}
    report = await lab.boot()
    assert report.backup is not None
    assert report.backup.parent == lab.path.parent
    assert report.backup.stat().st_mode & 0o777 == 0o640
    assert {file.name for file in lab.path.parent.iterdir()} == {lab.path.name, report.backup.name}
    copy = SqliteLab(report.backup)
    assert await copy.rows("pragma integrity_check") == [{"integrity_check": "ok"}]
    assert {table: await copy.all(table) for table in (LEDGER, *TABLES)} == before


@on_sqlite
async def test_the_backup_restores_version_1(lab: SqliteLab, tmp_path: Path) -> None:
    """Rollback is operational: the copy in the file's place is the database that it was, and upgrades again."""
    await lab.reach(1)
    report = await lab.boot()
    assert report.backup is not None
    restored = SqliteLab(tmp_path / "restored.db")
    restored.path.write_bytes(report.backup.read_bytes())
    assert await restored.recorded() == [ONE]
    assert (await restored.boot()).from_version == 1


@on_sqlite
@pytest.mark.parametrize(("version", "backup"), [(0, True), (2, True), (1, False)], ids=["fresh", "current", "off"])
async def test_no_backup_is_taken_of_what_is_not_upgraded(lab: SqliteLab, version: int, *, backup: bool) -> None:
    """Nothing is copied when there is nothing to lose, nothing to do, or the operator said so."""
    await lab.reach(version)
    assert (await lab.boot(backup=backup)).backup is None
    assert [file.name for file in lab.path.parent.iterdir()] == [lab.path.name]


@on_sqlite
async def test_one_backup_is_taken_however_many_boot(lab: SqliteLab) -> None:
    """Only the boot that migrates takes it, and only that boot reports it."""
    await lab.reach(1)
    reports = await asyncio.gather(*(lab.boot() for _ in range(4)))
    [backup] = lab.path.parent.glob("*.backup")
    assert [report.backup for report in reports if report.applied] == [backup]
    assert [report.backup for report in reports if not report.applied] == [None] * 3


@contextlib.contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """A disk that is full, as far as this process can tell: a longer file cannot be written."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder in which nobody can create a file, not even root."""
    folder.chmod(0o555)
    try:
        with unprivileged():
            yield
    finally:
        folder.chmod(0o777)


@on_sqlite
@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
async def test_no_upgrade_without_its_backup_on_a_full_disk(lab: SqliteLab, journal_mode: str) -> None:
    """A copy that cannot be finished is removed with all that belongs to it, and the upgrade is refused untouched."""
    await lab.reach(1)
    await lab.execute(f"pragma journal_mode = {journal_mode}")
    size = lab.path.stat().st_size
    await lab.execute(f"update runtime_jobs set status = printf('%.{4 * size}c', 'x')")
    with files_no_longer_than(2 * size):
        error = await lab.refused(MigrationError)
    assert (error.version, error.name) == TWO
    assert "backup" in str(error)


@on_sqlite
async def test_no_upgrade_without_its_backup_under_a_path_that_is_too_long(tmp_path: Path, lab: SqliteLab) -> None:
    """The backup's name is longer than the database's, and may be too long."""
    folder = tmp_path / "long"
    folder.mkdir()
    lab = SqliteLab(folder / ("r" * 240))
    await lab.reach(1)
    error = await lab.refused(MigrationError)
    assert (error.version, error.name) == TWO
    assert isinstance(error.__cause__, OSError)


@on_sqlite
async def test_no_upgrade_without_its_backup_in_a_folder_that_is_read_only(lab: SqliteLab, open_folder: Path) -> None:
    """Nothing can be written beside the file, so nothing is written into it."""
    lab = SqliteLab(open_folder / "runtime.db")
    await lab.reach(1)
    lab.path.chmod(0o666)
    before = await lab.snapshot()
    with read_only(open_folder), pytest.raises(RuntimeRepoError, match="folder"):
        await lab.boot()
    assert await lab.snapshot() == before


class Step:
    """The operator's own step before a migration: counts its runs and looks at what it finds."""

    def __init__(self, lab: Lab, error: Exception | None = None) -> None:
        self.found: list[object] = []
        self._lab = lab
        self._error = error

    async def __call__(self) -> None:
        self.found.append(((await self._lab.snapshot()).content, await self._lab.recorded()))
        if self._error is not None:
            raise self._error


async def test_the_operators_step_runs_once_before_anything_is_applied(lab: Lab) -> None:
    """It finds version 1 as it was, although several boot at once, and then the upgrade goes on."""
    await lab.reach(1)
    before = (await lab.snapshot()).content
    step = Step(lab)
    reports = await asyncio.gather(*(lab.boot(before_migrate=step) for _ in range(4)))
    assert step.found == [(before, [ONE])]
    assert sorted(len(report.applied) for report in reports) == [0, 0, 0, 1]
    assert await lab.recorded() == [ONE, TWO]


@on_postgres
async def test_the_operators_step_is_not_repeated_while_a_boot_waits_for_a_table(lab: PostgresLab) -> None:
    """The migration gives way to live traffic in short tries, but a backup that takes an hour is taken once."""
    await lab.reach(1)
    before = await lab.snapshot()
    step = Step(lab)
    await lab.execute("begin; lock table runtime_attempts in access share mode")
    with pytest.raises(SchemaLockTimeoutError):
        await lab.boot(before_migrate=step, lock_timeout=0.5)
    await lab.execute("rollback")
    assert len(step.found) == 1
    assert await lab.snapshot() == before


@on_postgres
async def test_the_operators_step_may_change_our_tables(lab: PostgresLab) -> None:
    """Boot holds no lock on a table meanwhile: the step can do what needs the table for itself."""
    await lab.reach(1)

    async def step() -> None:
        await lab.execute("set lock_timeout = '1s'; cluster runtime_attempts using attempts_pk")

    assert (await lab.boot(before_migrate=step)).to_version == 2


async def test_the_operators_step_does_not_run_when_nothing_is_pending_or_allowed(lab: Lab) -> None:
    """Neither on a current database nor before a refusal."""
    step = Step(lab)
    await lab.reach(2)
    await lab.boot(before_migrate=step)
    await lab.execute("drop index idx_runtime_jobs_status")
    await lab.refused(SchemaDriftError, before_migrate=step)
    assert step.found == []


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError("no disk"), TimeoutError("too slow"), sqlite3.OperationalError("not yours")]
)
async def test_an_exception_of_the_operators_step_comes_out_as_it_is(lab: Lab, error: Exception) -> None:
    """The database is untouched, and the next boot upgrades it."""
    await lab.reach(1)
    before = await lab.snapshot()
    with pytest.raises(type(error)) as caught:
        await lab.boot(before_migrate=Step(lab, error), **({"backup": False} if isinstance(lab, SqliteLab) else {}))
    assert caught.value is error
    assert await lab.snapshot() == before
    assert (await lab.boot()).from_version == 1
