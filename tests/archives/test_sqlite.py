"""What is SQLite's alone: one file, whoever has it open, and whatever state it is in."""

import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime_repo import (
    ArchiveError,
    ConfigurationError,
    DatabaseUnavailableError,
    RemainsError,
    SqliteRuntimeRepository,
    StoreInUseError,
    UnportableRowsError,
)
from runtime_repo.archive import claim
from tests.archives.store import FIRST, everything, fill, names
from tests.lab import NOTHING, Lab, SqliteLab, on_sqlite

pytestmark = on_sqlite

OPEN = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("select count(*) from runtime_attempts").fetchone()
print("open", flush=True)
for line in sys.stdin:
    print(connection.execute(line).fetchall(), flush=True)
"""


class Other:
    """Another process that has the file open."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.pid = process.pid
        self._process = process

    def ask(self, statement: str) -> str:
        """What its connection, which was opened before, answers."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(statement + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Other]:
    """Have it open in another process."""
    command = [sys.executable, "-c", OPEN, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "open\n"
        yield Other(process)


def quiet(path: Path) -> None:
    """Let no lease be active."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("update runtime_leases set lease_expires_at_ms = 0")
        connection.commit()


async def test_a_file_that_another_process_has_open_is_not_replaced(lab: SqliteLab, tmp_path: Path) -> None:
    """Unless told: it says which process; that one goes on in the restored file, since it is still the same."""
    await fill(lab)
    quiet(lab.path)
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.execute("delete from runtime_jobs")
    before, inode = await lab.content(), lab.path.stat().st_ino
    with opened(lab.path) as other:
        with pytest.raises(StoreInUseError, match=rf"process {other.pid} has .*runtime\.db open.*force=True"):
            await lab.repository().restore(tmp_path / "a.archive")
        assert await lab.content() == before
        report = await lab.repository().restore(tmp_path / "a.archive", force=True)
        assert len(report.overridden) == 1
        assert other.ask("select status from runtime_jobs") == r"[('\\N',)]"
        other.ask("insert into runtime_jobs values ('other', 'x', 1, 1)")
    assert lab.path.stat().st_ino == inode
    assert len(await lab.all("runtime_jobs")) == 2


async def test_what_is_kept_is_a_file_of_its_owners_alone(lab: SqliteLab, tmp_path: Path) -> None:
    """Whoever looks at it makes no file beside it."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    lab.path.chmod(0o644)
    before = await everything(lab)
    report = await lab.repository().restore(tmp_path / "a.archive", force=True)
    kept = SqliteLab(Path(report.kept or ""))
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(lab.path.stat().st_mode) == 0o644
    with contextlib.closing(sqlite3.connect(kept.path)) as connection:
        assert connection.execute("pragma journal_mode").fetchone() == ("delete",)
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    assert await everything(kept) == before
    assert set(names(lab.path.parent)) - {"runtime.db-wal", "runtime.db-shm"} == {"runtime.db", kept.path.name}


@pytest.mark.parametrize("page_size", [512, 16384])
async def test_a_file_with_pages_of_another_size_is_replaced_in_place(
    lab: SqliteLab, tmp_path: Path, page_size: int
) -> None:
    """As is one that is not in WAL, such as an earlier program's."""
    with lab.connection() as connection:
        connection.execute(f"pragma page_size = {page_size}")
        connection.execute("vacuum")
    await lab.lay_version_1()
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.execute("delete from runtime_jobs")
    inode = lab.path.stat().st_ino
    report = await lab.repository().restore(tmp_path / "a.archive", force=True)
    assert lab.path.stat().st_ino == inode
    assert report.kept
    assert await lab.rows("pragma page_size") == [{"page_size": page_size}]
    assert len(await lab.all("runtime_jobs")) == 2
    assert await lab.rows("pragma integrity_check") == [{"integrity_check": "ok"}]
    assert await SqliteLab(Path(report.kept)).all("runtime_jobs") == []


@pytest.mark.parametrize("damage", ["header", "words", "empty", "absent"])
async def test_a_damaged_file_is_replaced_by_its_name(lab: SqliteLab, tmp_path: Path, damage: str) -> None:
    """And kept; so is a log without its file, which must not be taken for the new one's."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    before = await everything(lab)
    if damage == "header":
        lab.path.write_bytes(os.urandom(100) + lab.path.read_bytes()[100:])
    elif damage == "absent":
        lab.path.rename(lab.path.with_name("elsewhere"))
        lab.path.with_name("runtime.db-wal").write_bytes(b"a log")
    else:
        lab.path.write_text("words" * 1000 if damage == "words" else "")
    broken = lab.path.read_bytes() if lab.path.exists() else b""
    report = await lab.repository().restore(tmp_path / "a.archive")
    if broken:
        assert SqliteLab(Path(report.kept or "")).path.read_bytes() == broken
    else:
        assert report.kept is None
    if damage == "absent":
        [log] = names(lab.path.parent, "runtime.db.before-*-wal")
        assert lab.path.with_name(log).read_bytes() == b"a log"
    assert (await lab.boot(migrate=False)).tolerated == ()
    assert len((await everything(lab))["runtime_attempts"]) == len(before["runtime_attempts"])


async def test_what_else_is_in_the_file_refuses_a_restore(lab: SqliteLab, tmp_path: Path) -> None:
    """It would be replaced with it: unless told, nothing happens, and then it is kept with the rest."""
    await fill(lab)
    quiet(lab.path)
    await lab.execute("create table theirs (a); insert into theirs values (5)")
    await lab.repository().backup(tmp_path / "a.archive")
    with pytest.raises(StoreInUseError, match="theirs"):
        await lab.repository().restore(tmp_path / "a.archive")
    report = await lab.repository().restore(tmp_path / "a.archive", force=True)
    assert await SqliteLab(Path(report.kept or "")).rows("select a from theirs") == [{"a": 5}]


async def test_what_a_killed_restore_left_is_no_store_and_not_in_its_way(lab: SqliteLab, tmp_path: Path) -> None:
    """A boot beside it refuses; the same call again takes it over; one that is at work is left alone."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.wipe()
    left = lab.path.with_name("runtime.db.restoring")
    left.write_bytes(b"half")
    lab.path.with_name("runtime.db.before-20260101T000000000000Z.partial").write_bytes(b"half")
    with pytest.raises(RemainsError, match=r"runtime\.db\.restoring"):
        await lab.boot()
    assert not lab.path.exists()
    lab.path.touch()
    with pytest.raises(RemainsError):
        await lab.boot()
    lab.path.unlink()
    file = claim(left)
    with pytest.raises(StoreInUseError, match="another restore"):
        await lab.repository().restore(tmp_path / "a.archive")
    os.close(file)
    await lab.repository().restore(tmp_path / "a.archive")
    assert names(lab.path.parent, "runtime.db*") == ["runtime.db"]
    assert len(await lab.all("runtime_attempts")) == 30


async def test_a_boot_that_has_found_a_store_does_not_look_for_remains(lab: SqliteLab, tmp_path: Path) -> None:
    """What was kept may stay for as long as anybody likes."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.repository().restore(tmp_path / "a.archive", force=True)
    assert (await lab.boot()).applied == ()
    assert (await lab.repository().inspect()).refusal is None


async def test_a_database_in_memory_can_be_backed_up_but_not_replaced(lab: SqliteLab, tmp_path: Path) -> None:
    """It is there only as long as its repository is open."""
    async with SqliteRuntimeRepository(":memory:") as repo:
        await repo.attempts.enqueue("run")
        assert (await repo.backup(tmp_path / "a.archive")).rows["runtime_attempts"] == 1
    assert await lab.content() == NOTHING
    with pytest.raises(ConfigurationError, match="memory"):
        await SqliteRuntimeRepository(":memory:").restore(tmp_path / "a.archive")


async def test_what_copy_text_cannot_tell_is_listed(lab: SqliteLab, tmp_path: Path) -> None:
    """By table, row and column, the first twenty; nothing is written."""
    await fill(lab)
    await lab.execute("update runtime_attempts set payload_json = x'00'")
    with pytest.raises(UnportableRowsError) as caught:
        await lab.repository().backup(tmp_path / "a.archive")
    assert len(caught.value.cells) == 20
    assert caught.value.cells[1].startswith("runtime_attempts, row '00001 ")
    assert names(tmp_path, "a.*") == []


async def test_a_backup_of_what_is_not_there_makes_nothing(lab: Lab, tmp_path: Path) -> None:
    """No file, neither here nor there."""
    with pytest.raises(Exception, match="unable to open"):
        await lab.repository().backup(tmp_path / "a.archive")
    assert await lab.content() == NOTHING
    assert names(tmp_path, "a.*") == []


async def test_a_folder_that_cannot_be_written_is_said(lab: SqliteLab, tmp_path: Path) -> None:
    """Before anything is done."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    other = SqliteRuntimeRepository(tmp_path / "missing" / "runtime.db")
    with pytest.raises(ArchiveError, match="cannot be written"):
        await other.restore(tmp_path / "a.archive")


async def test_the_copy_of_a_boot_is_restored(lab: SqliteLab) -> None:
    """As an archive is: tokens go on, what was there is kept; the copy itself stays as it was."""
    await lab.lay_version_1()
    report = await lab.boot()
    copy = SqliteLab(report.backup or lab.path)
    before, content = copy.path.read_bytes(), await everything(copy, FIRST)
    quiet(lab.path)
    restored = await lab.repository().restore(copy.path)
    assert (restored.path, restored.version) == (copy.path, 1)
    assert restored.kept
    assert copy.path.read_bytes() == before
    with pytest.raises(ConfigurationError, match="the database itself"):
        await lab.repository().restore(lab.path)
    after = await everything(lab, FIRST)
    assert {name for name in FIRST if after[name] != content[name]} == {"runtime_leases"}


async def test_where_the_system_does_not_tell_sqlite_does(
    lab: SqliteLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has the file open; on some systems there is no list of locks."""
    await fill(lab)
    quiet(lab.path)
    await lab.repository().backup(tmp_path / "a.archive")
    monkeypatch.setattr("runtime_repo.sqlite.archive._LOCKS", tmp_path / "missing")
    before = await lab.content()
    with opened(lab.path), pytest.raises(DatabaseUnavailableError, match="locked by another process"):
        await lab.repository(lock_timeout=0.2).restore(tmp_path / "a.archive")
    assert await lab.content() == before
    await lab.repository().restore(tmp_path / "a.archive")
