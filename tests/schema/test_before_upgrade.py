"""What happens before an upgrade, under the lock: SQLite's backup, and the operator's own step."""

import asyncio
import contextlib
import resource
import shutil
import signal
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime_repo import MigrationError, RuntimeRepoError, SchemaDriftError, SchemaLockTimeoutError
from tests.lab import LEDGER, ONE, TWO, Lab, PostgresLab, SqliteLab, on_postgres, on_sqlite
from tests.privileges import unprivileged
from tests.schema.version_1 import TABLES
from tests.versions import HISTORY, NEWEST


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
@pytest.mark.parametrize(
    ("version", "backup"), [(0, True), (NEWEST, True), (1, False)], ids=["fresh", "current", "off"]
)
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
    assert sorted(len(report.applied) for report in reports) == [0, 0, 0, NEWEST - 1]
    assert await lab.recorded() == HISTORY


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

    assert (await lab.boot(before_migrate=step)).to_version == NEWEST


async def test_the_operators_step_does_not_run_when_nothing_is_pending_or_allowed(lab: Lab) -> None:
    """Neither on a current database nor before a refusal."""
    step = Step(lab)
    await lab.reach(NEWEST)
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


def copies(lab: SqliteLab) -> list[str]:
    """What stands beside the file of it, whole or not."""
    return sorted(path.name for path in lab.path.parent.glob(f"{lab.path.name}.v*"))


@on_sqlite
@pytest.mark.parametrize("way", ["it raises", "cancelled", "a reader", "a full disk"])
async def test_the_copy_of_a_boot_that_did_not_commit_goes_away(lab: SqliteLab, way: str) -> None:
    """Whichever way the boot ends; a service that restarts for ever would fill the disk."""
    await lab.reach(1)
    seen: list[list[str]] = []

    async def step() -> None:
        seen.append(copies(lab))
        if way == "it raises":
            raise KeyError(way)
        if way == "cancelled":
            await asyncio.Event().wait()

    before = await lab.snapshot()
    with contextlib.ExitStack() as stack:
        if way == "a reader":
            reader = stack.enter_context(contextlib.closing(sqlite3.connect(lab.path, isolation_level=None)))
            reader.execute("begin")
            reader.execute("select count(*) from runtime_jobs").fetchone()
        elif way == "a full disk":
            stack.enter_context(files_no_longer_than(lab.path.stat().st_size))
        with pytest.raises((KeyError, TimeoutError, RuntimeRepoError)) as caught:
            async with asyncio.timeout(0.3 if way == "cancelled" else 20):
                await lab.boot(before_migrate=step, lock_timeout=0.2)
    assert {"it raises": KeyError, "cancelled": TimeoutError}.get(way, RuntimeRepoError) in type(caught.value).__mro__
    [[copy]] = seen
    assert copy.endswith(".backup.pending")
    assert await lab.snapshot() == before
    assert len((await lab.boot()).applied) == NEWEST - 1
    assert len(copies(lab)) == 1


@on_sqlite
async def test_a_copy_is_the_database_that_the_upgrade_began_with(lab: SqliteLab) -> None:
    """A try that was in vain let others write: the copy is taken again, but the operator's step is not repeated."""
    await lab.reach(1)
    runs: list[None] = []
    reached = asyncio.Event()

    async def step() -> None:
        runs.append(None)
        reached.set()

    def connected() -> contextlib.closing[sqlite3.Connection]:
        return contextlib.closing(sqlite3.connect(lab.path, 10, isolation_level=None, check_same_thread=False))

    with connected() as reader, connected() as writer:
        reader.execute("begin")
        reader.execute("select count(*) from runtime_jobs").fetchone()
        boot = asyncio.ensure_future(lab.boot(before_migrate=step))
        await reached.wait()
        # The reader keeps the boot from its commit, so the writer gets in between two tries.
        await asyncio.to_thread(writer.execute, "begin immediate")
        assert copies(lab) == []
        reader.execute("commit")
        writer.execute("update runtime_jobs set status = 'written meanwhile'")
        writer.execute("commit")
    report = await boot
    assert report.backup is not None
    assert copies(lab) == [report.backup.name]
    assert {row["status"] for row in await SqliteLab(report.backup).all("runtime_jobs")} == {"written meanwhile"}
    assert len(runs) == 1


@on_sqlite
async def test_kills_leave_one_copy_at_most(lab: SqliteLab) -> None:
    """What a boot that was killed has left is in the way of nobody, and goes away as soon as another takes a copy."""
    await lab.reach(1)
    program = (
        "import asyncio, sys\n"
        "from runtime_repo import SqliteRuntimeRepository\n"
        "async def step():\n"
        "    print('copied', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(SqliteRuntimeRepository(sys.argv[1], before_migrate=step).ensure_schema())\n"
    )
    for _ in range(3):
        killed = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, str(lab.path), stdout=asyncio.subprocess.PIPE
        )
        assert killed.stdout is not None
        assert await killed.stdout.readline() == b"copied\n"
        killed.kill()
        await killed.wait()
        assert [name.endswith(".pending") for name in copies(lab)] == [True]
    (lab.path.parent / f"{lab.path.name}.v1-mine.backup.partial").touch()
    report = await lab.boot()
    assert report.backup is not None
    assert copies(lab) == sorted([report.backup.name, f"{lab.path.name}.v1-mine.backup.partial"])


@on_sqlite
@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_kill_around_the_commit_leaves_the_copy_of_what_committed(lab: SqliteLab, moment: str) -> None:
    """Killed just before, no copy joins another; just after, the next boot gives the only copy its name."""
    await lab.reach(1)
    program = (
        "import asyncio, os, signal, sys\n"
        "from runtime_repo import SqliteRuntimeRepository\n"
        "from runtime_repo.sqlite.database import SqliteDatabase\n"
        "commit = SqliteDatabase._commit_boot\n"
        "def killed(database, connection):\n"
        "    if sys.argv[2] == 'after':\n"
        "        database._copy.keep = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        commit(database, connection)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "SqliteDatabase._commit_boot = killed\n"
        "asyncio.run(SqliteRuntimeRepository(sys.argv[1]).ensure_schema())\n"
    )
    for _ in range(2 if moment == "before" else 1):
        killed = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(lab.path), moment)
        assert await killed.wait() == -signal.SIGKILL
        assert [name.endswith(".pending") for name in copies(lab)] == [True]
    [left] = copies(lab)
    newer = lab.path.with_name(left.replace(".v1-", f".v{NEWEST}-"))
    newer.touch()  # the copy of a newer release, which is about to upgrade
    report = await lab.boot(backup=moment == "after")
    if moment == "before":
        # It was not needed, and might be older than what is upgraded now.
        assert (len(report.applied), copies(lab)) == (NEWEST - 1, [])
    else:
        assert report.applied == ()
        assert copies(lab) == [left.removesuffix(".pending"), newer.name]


@on_sqlite
async def test_the_copy_of_a_boot_that_committed_stays(lab: SqliteLab) -> None:
    """Also where its database was restored from it, is upgraded again, and that fails or succeeds."""
    await lab.reach(1)
    first = (await lab.boot()).backup
    assert first is not None
    content = first.read_bytes()
    for name in ("-wal", "-shm"):
        lab.path.with_name(lab.path.name + name).unlink(missing_ok=True)
    lab.path.write_bytes(content)
    with pytest.raises(KeyError):
        await lab.boot(before_migrate=Step(lab, KeyError("no")))
    assert copies(lab) == [first.name]
    second = (await lab.boot()).backup
    assert second is not None
    assert copies(lab) == sorted([first.name, second.name])
    assert first.read_bytes() == content


@on_sqlite
@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
async def test_a_copy_can_be_looked_at_and_leaves_nothing(lab: SqliteLab, journal_mode: str) -> None:
    """It is not in WAL, whatever its source is, so that a reader makes no files beside it."""
    await lab.reach(1)
    await lab.execute(f"pragma journal_mode = {journal_mode}")
    backup = (await lab.boot()).backup
    assert backup is not None
    with contextlib.closing(sqlite3.connect(f"{backup.as_uri()}?mode=ro", uri=True)) as copy:
        assert copy.execute("pragma journal_mode").fetchone() == ("delete",)
        assert copy.execute("select count(*) from runtime_jobs").fetchone() is not None
        assert copies(lab) == [backup.name]


@on_sqlite
async def test_a_copy_is_its_owners_alone_until_it_is_whole(lab: SqliteLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it has its source's permissions, also where those are wider."""
    await lab.reach(1)
    lab.path.chmod(0o644)
    before: list[int] = []
    copymode = shutil.copymode

    def watched(source: Path, target: Path) -> None:
        before.append(target.stat().st_mode & 0o777)
        copymode(source, target)

    monkeypatch.setattr(shutil, "copymode", watched)
    report = await lab.boot()
    assert before == [0o600]
    assert report.backup is not None
    assert report.backup.stat().st_mode & 0o777 == 0o644
