"""Backups: what is in an archive, who may take one, and that it is never half a one."""

import asyncio
import contextlib
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from runtime_repo import (
    ArchiveError,
    BackupReport,
    NewAttempt,
    SchemaDriftError,
    SchemaTooNewError,
    StoreInUseError,
    archive,
)
from tests.archives.store import FIRST, TABLES, changed, everything, fill, manifest, names
from tests.contract.conftest import eventually
from tests.lab import Lab
from tests.versions import NEWEST


async def test_an_archive_holds_every_row_as_copy_text(lab: Lab, tmp_path: Path) -> None:
    """One member for each table, whose numbers and hashes anybody can compute; nothing else lies beside it."""
    await fill(lab)
    path = tmp_path / "a.archive"
    report = await lab.repository().backup(path)

    assert names(tmp_path, "a.*") == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    told = manifest(path)
    assert (told["backend"], told["version"], told["format"]) == (lab.backend, NEWEST, 1)
    assert set(told["tables"]) == set(TABLES)
    rows = await everything(lab)
    with zipfile.ZipFile(path) as file:
        for table, member in told["tables"].items():
            text = file.read(f"{table}.copy")
            lines = text.split(b"\n")[:-1]
            assert member["sha256"] == hashlib.sha256(text).hexdigest()
            total = sum(int.from_bytes(hashlib.sha256(line).digest(), "big") for line in lines) % 2**256
            assert member["row_hash"] == f"{total:064x}"
            assert (member["rows"], member["size"]) == (len(rows[table]), len(text)) == (len(lines), len(text))
    assert isinstance(report, BackupReport)
    assert report.rows == {table: len(found) for table, found in rows.items()}
    assert (report.version, report.size, report.left_out) == (NEWEST, path.stat().st_size, ())
    assert json.loads(json.dumps(report.as_dict()))["path"] == str(path)


async def test_a_backup_never_overwrites(lab: Lab, tmp_path: Path) -> None:
    """Neither what is there when it begins, nor what has come while it was written."""
    await fill(lab)
    path = tmp_path / "a.archive"
    path.write_text("mine")
    with pytest.raises(ArchiveError, match="never overwrites"):
        await lab.repository().backup(path)
    assert path.read_text() == "mine"
    path.unlink()

    writer = archive.Writer(path)
    writer.open()
    with pytest.raises(ArchiveError, match="another backup is writing it"):
        await lab.repository().backup(path)
    for table, columns in {"runtime_jobs": ("thread_id",)}.items():
        writer.begin(table, columns)
        writer.write(b"a\n")
        writer.end()
    path.write_text("theirs")
    with pytest.raises(ArchiveError, match="never overwrites"):
        writer.finish(archive.Contents(1, (), {}, ()), "sqlite")
    writer.drop()
    assert path.read_text() == "theirs"
    assert names(tmp_path, "*.partial") == []


async def test_what_a_killed_backup_left_is_taken_over(lab: Lab, tmp_path: Path) -> None:
    """Its partial file belongs to nobody; what is written there is this backup's alone."""
    await fill(lab)
    path = tmp_path / "a.archive"
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"x" * 10_000_000)
    await lab.repository().backup(path)
    assert not partial.exists()
    assert manifest(path)["version"] == NEWEST


async def test_a_backup_needs_no_boot_and_migrates_nothing(lab: Lab, tmp_path: Path) -> None:
    """A store of version 1 is backed up before its upgrade, and stays what it is."""
    await lab.lay_version_1()
    before = await everything(lab, FIRST)
    report = await lab.repository().backup(tmp_path / "a.archive")
    assert report.version == 1
    assert set(report.rows) == set(FIRST)
    assert await everything(lab, FIRST) == before
    assert await lab.recorded() == [(1, "baseline_runtime_tables")]


async def test_a_store_that_is_open_is_backed_up(lab: Lab, tmp_path: Path) -> None:
    """By the repository that serves it, while it serves it."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run")
        report = await repo.backup(tmp_path / "a.archive")
        assert report.rows["runtime_attempts"] == 1
        assert (await repo.attempts.stats())[0].ready == 1


async def test_what_is_no_store_of_ours_is_refused(lab: Lab, tmp_path: Path) -> None:
    """Nothing, a newer release's, one that has lost a column; no file is left."""
    await lab.execute("create table theirs (a integer)")
    with pytest.raises(ArchiveError, match="no store of ours"):
        await lab.repository().backup(tmp_path / "x.archive")
    await lab.execute("drop table theirs")
    await lab.lay(2)
    await lab.execute("alter table runtime_audit_logs drop column details_json")
    with pytest.raises(SchemaDriftError, match="details_json"):
        await lab.repository().backup(tmp_path / "x.archive")
    await lab.record((1, "baseline_runtime_tables"), (2, "resume_roles_and_dispatch"), (3, "later"))
    with pytest.raises(SchemaTooNewError):
        await lab.repository().backup(tmp_path / "x.archive")
    assert names(tmp_path, "x.*") == []


async def test_what_is_not_ours_is_named_and_left_out(lab: Lab, tmp_path: Path) -> None:
    """Nothing is lost silently: the report and the manifest say what the archive does not contain."""
    await fill(lab)
    await lab.execute(
        "alter table runtime_jobs add column note text; create index mine on runtime_jobs (updated_at_ms)"
    )
    report = await lab.repository().backup(tmp_path / "a.archive")
    assert [line.partition(" is extra")[0] for line in report.left_out] == [
        "column runtime_jobs.note",
        "index mine on runtime_jobs",
    ]
    assert manifest(tmp_path / "a.archive")["left_out"] == list(report.left_out)


@contextlib.contextmanager
def writing(lab: Lab, folder: Path, name: str) -> Iterator[Callable[[], int]]:
    """Another process that writes; yields how many of its writes are known to be committed."""
    said = folder / f"{name}.said"
    command = [sys.executable, "-m", "tests.archives.writer", json.dumps(asdict(lab.place)), name]
    path = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with said.open("wb") as file, subprocess.Popen(command, stdout=file, env=path) as process:
        try:
            yield lambda: said.read_bytes().count(b"\n")
        finally:
            process.kill()


async def test_a_backup_is_one_instant_under_traffic(lab: Lab, tmp_path: Path) -> None:
    """Of each of four processes it holds a prefix: all it committed before it began, nothing begun after it ended."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many([NewAttempt("ballast", payload="x" * 500) for _ in range(3000)])
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(writing(lab, tmp_path, f"writer{number}")) for number in range(4)]
        await eventually(lambda: min(written() for written in writers) >= 5)
        before = [written() for written in writers]
        await lab.repository().backup(tmp_path / "a.archive")
        after = [written() + 1 for written in writers]  # one may just be committed
        await eventually(lambda: min(written() for written in writers) > max(before))
    with zipfile.ZipFile(tmp_path / "a.archive") as file:
        lines = file.read("runtime_attempts.copy").decode().splitlines()
    for number in range(4):
        found = sorted(line.split("\t")[0] for line in lines if line.startswith(f"writer{number} "))
        assert found == [f"writer{number} {write:06d}" for write in range(len(found))]
        assert before[number] <= len(found) <= after[number]


async def test_a_backup_holds_up_nobody(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halfway through, however long that takes, others enqueue, claim, complete and boot; none of it is in it."""
    await fill(lab)
    halfway, go_on = threading.Event(), threading.Event()
    write = archive.Writer.write

    def slow(self: archive.Writer, piece: bytes) -> None:
        halfway.set()
        assert go_on.wait(30)
        write(self, piece)

    monkeypatch.setattr(archive.Writer, "write", slow)
    task = asyncio.create_task(lab.repository().backup(tmp_path / "a.archive"))
    await eventually(halfway.is_set)
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run", attempt_id="meanwhile", priority=100)
        [lease] = await repo.leases.claim("worker")
        await repo.attempts.complete(lease)
    go_on.set()
    assert (await task).rows["runtime_attempts"] == 30


async def test_a_cancelled_backup_leaves_nothing(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a file nor a connection, a thread that writes or a lock."""
    await fill(lab)
    began, go_on = threading.Event(), threading.Event()
    write = archive.Writer.write

    def slow(self: archive.Writer, piece: bytes) -> None:
        began.set()
        go_on.wait(0.3)
        write(self, piece)

    monkeypatch.setattr(archive.Writer, "write", slow)
    async with lab.nothing_left():
        task = asyncio.create_task(lab.repository().backup(tmp_path / "x.archive"))
        await eventually(began.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert names(tmp_path, "x.*") == []


async def test_a_file_that_cannot_be_written_is_said(lab: Lab, tmp_path: Path) -> None:
    """A folder that is not there."""
    await fill(lab)
    with pytest.raises(ArchiveError, match=r"cannot be written .*No such file"):
        await lab.repository().backup(tmp_path / "missing" / "x.archive")


async def test_an_archive_that_is_not_what_was_written_is_never_put_in_place(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read back from the file before it gets its name."""
    await fill(lab)
    sync = os.fsync

    def spoil(file: int) -> None:
        sync(file)
        os.pwrite(file, b"\0" * 40, 60)

    monkeypatch.setattr("runtime_repo.archive.os.fsync", spoil)
    with pytest.raises(ArchiveError):
        await lab.repository().backup(tmp_path / "x.archive")
    assert names(tmp_path, "x.*") == []


def damages(path: Path) -> Iterator[Path]:
    """Archives that are not what was written, each in another way."""
    bad = path.with_name("bad.archive")
    data, told = path.read_bytes(), manifest(path)
    with zipfile.ZipFile(path) as file:
        jobs = file.read("runtime_jobs.copy")
        where = file.getinfo("runtime_attempts.copy").header_offset + 90
    yield bad  # none at all
    bad.write_text("no archive")
    yield bad
    bad.write_bytes(data[:-100])
    yield bad
    bad.write_bytes(data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])
    yield bad
    yield changed(path, bad, runtime_jobs=None)
    yield changed(path, bad, runtime_more=b"")
    yield changed(path, bad, runtime_jobs=jobs + jobs.replace(b"thread", b"other"))
    yield changed(path, bad, manifest=None)
    yield changed(path, bad, manifest=json.dumps(told | {"format": 99}).encode())
    yield changed(path, bad, manifest=b'{"format": 1, "tables": []}')
    del told["tables"]["runtime_jobs"]["columns"][0]
    yield changed(path, bad, manifest=json.dumps(told).encode())
    told = manifest(path)
    told["tables"]["runtime_jobs"]["row_hash"] = "0" * 64
    yield changed(path, bad, manifest=json.dumps(told).encode())
    # Whoever wrote it knew the form, and not the rows.
    told = manifest(path)
    told["tables"]["runtime_attempts"]["sha256"] = hashlib.sha256(b"a\tb\n").hexdigest()
    yield changed(path, bad, manifest=json.dumps(told).encode(), runtime_attempts=b"a\tb\n")


async def test_a_damaged_archive_is_refused_and_changes_nothing(lab: Lab, tmp_path: Path) -> None:
    """Whatever is wrong with it, it is said in words of ours, and what is stored stays."""
    await fill(lab)
    path = tmp_path / "a.archive"
    await lab.repository().backup(path)
    before = await everything(lab)
    for bad in damages(path):
        with pytest.raises(ArchiveError):
            await lab.repository().restore(bad, force=True)
    assert await everything(lab) == before
    # What was refused leaves nothing that would stand in the way of the right one.
    assert (await lab.repository().restore(path, force=True)).version == NEWEST


async def test_an_archive_of_a_newer_release_is_refused(lab: Lab, tmp_path: Path) -> None:
    """By the version that it names."""
    await fill(lab)
    path = tmp_path / "a.archive"
    await lab.repository().backup(path)
    told = manifest(path)
    told["version"] = 3
    told["ledger"].append({"version": 3, "name": "later", "applied_at_ms": 1})
    with pytest.raises(SchemaTooNewError):
        await lab.repository().restore(changed(path, tmp_path / "b", manifest=json.dumps(told).encode()))


async def test_active_leases_do_not_keep_a_backup(lab: Lab, tmp_path: Path) -> None:
    """Only what replaces a store or moves it needs it quiet."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    with pytest.raises(StoreInUseError, match="active leases"):
        await lab.repository().restore(tmp_path / "a.archive")
