"""Restores: what is in place afterwards, what is kept, who is refused, and that there is never half a store."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import pytest

from runtime_repo import (
    ArchiveError,
    AttemptStatus,
    ConfigurationError,
    Lease,
    LeaseLostError,
    NewAttempt,
    NotFoundError,
    RemainsError,
    RepositoryClosedError,
    RestoreReport,
    StoreInUseError,
    archive,
)
from tests.archives.store import FIRST, TABLES, everything, fill, names, row_hashes
from tests.contract.conftest import eventually
from tests.lab import NOTHING, Lab
from tests.versions import NEWEST

HELD = {"runtime_attempts", "runtime_queue", "runtime_leases"}
"""The tables that say who holds what, and which token comes next."""


async def test_a_restored_store_is_what_it_was(lab: Lab, tmp_path: Path) -> None:
    """Every row and every number, whatever was done since; this release boots it without a complaint."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    before = await everything(lab)
    async with lab.repository() as repo:
        await repo.jobs.upsert("thread", "else")
        await repo.attempts.enqueue("later", attempt_id="later")
        await repo.audit.append(actor_type="user", action="b", resource_type="r", result="ok", request_id="q")
    report = await lab.repository().restore(tmp_path / "a.archive", force=True)

    after = await everything(lab)
    assert {name: rows for name, rows in after.items() if name not in HELD} == {
        name: rows for name, rows in before.items() if name not in HELD
    }
    same = ("attempt_id", "run_id", "attempt_no", "payload_json", "headers_json", "result_json", "error", "priority")
    assert [[row[name] for name in same] for row in after["runtime_attempts"]] == [
        [row[name] for name in same] for row in before["runtime_attempts"]
    ]
    assert isinstance(report, RestoreReport)
    assert (report.version, report.requeued, report.rows) == (NEWEST, 1, {n: len(r) for n, r in before.items()})
    assert (await lab.boot(migrate=False)).tolerated == ()
    with pytest.raises(NotFoundError):
        async with lab.repository() as repo:
            await repo.attempts.get("later")


async def test_nobody_of_the_history_that_was_cut_off_can_finish_anything(lab: Lab, tmp_path: Path) -> None:
    """Neither whose lease is in the archive nor whose came later; what was held waits again, without a try lost."""
    filled = await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    async with lab.repository() as repo:
        [later] = await repo.leases.claim("later")
        retried = await repo.attempts.retry(filled.failed_by.attempt_id)
        again = await repo.leases.claim_attempt(retried.attempt_id, "later")
        assert again
    await lab.repository().restore(tmp_path / "a.archive", force=True)
    async with lab.repository() as repo:
        for lease in (filled.held, later, again):
            verbs: list[Callable[[Lease], Awaitable[object]]] = [
                repo.attempts.complete,
                lambda lease: repo.attempts.fail(lease, "late"),
                repo.leases.release,
                repo.leases.heartbeat,
                repo.attempts.start,
                lambda lease: repo.step_reports.record(lease, "late", "ok", "late"),
            ]
            for verb in verbs:
                with pytest.raises(LeaseLostError):
                    await verb(lease)
        held = await repo.attempts.get(filled.held.attempt_id)
        assert (held.status, held.attempt_no) == (AttemptStatus.QUEUED, filled.held.attempt.attempt_no)
        # Whatever is claimed from here on has a token that nobody has had.
        await repo.attempts.retry(filled.failed_by.attempt_id)
        for old in (filled.held, later, again):
            new = await repo.leases.claim_attempt(old.attempt_id, "new")
            assert new
            assert new.version > old.version + archive.TOKEN_STEP // 2
            with pytest.raises(LeaseLostError):
                await repo.attempts.complete(old)
            assert (await repo.attempts.complete(new)).status == AttemptStatus.COMPLETED
        # What had ended by then has ended: to say it once more is no error.
        assert await repo.attempts.complete(filled.done_by, {"said": "\n"}) == filled.done


async def test_a_store_of_version_1_is_restored_as_one(lab: Lab, tmp_path: Path) -> None:
    """The way back from an upgrade: the earlier release finds every row; only its leases' tokens have gone on."""
    await lab.lay_version_1()
    before = await everything(lab, FIRST)
    await lab.repository().backup(tmp_path / "a.archive")
    async with lab.repository() as repo:
        await repo.attempts.enqueue("lost")
    report = await lab.repository().restore(tmp_path / "a.archive", force=True)
    after = await everything(lab, FIRST)
    assert report.version == 1
    assert {name: rows for name, rows in after.items() if name != "runtime_leases"} == {
        name: rows for name, rows in before.items() if name != "runtime_leases"
    }
    for was, row in zip(before["runtime_leases"], after["runtime_leases"], strict=True):
        assert row["version"] == was["version"] + archive.TOKEN_STEP
        assert row["lease_expires_at_ms"] == was["heartbeat_at_ms"] < was["lease_expires_at_ms"]
        assert row["lease_id"] == was["lease_id"]
    assert await lab.recorded() == [(1, "baseline_runtime_tables")]
    # And forward again: tokens go on from there.
    assert (await lab.boot()).from_version == 1
    [row] = await lab.rows("select lease_version from runtime_attempts where attempt_id = 'leased'")
    assert row["lease_version"] == 7 + archive.TOKEN_STEP


async def test_numbers_go_on_where_they_were(lab: Lab, tmp_path: Path) -> None:
    """Also after the rows that had the last ones were deleted: no id of a report is given out twice."""
    await fill(lab)
    [last] = await lab.rows("select max(report_id) as last from runtime_step_reports")
    await lab.execute("delete from runtime_step_reports")
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.repository().restore(tmp_path / "a.archive", force=True)
    async with lab.repository() as repo:
        [lease] = await repo.leases.claim("worker")
        report = await repo.step_reports.record(lease, "step", "ok", "token")
    assert report.report_id == last["last"] + 1


async def test_what_was_there_is_kept(lab: Lab, tmp_path: Path) -> None:
    """Whole, under a name that the report tells, and every restore keeps another."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    async with lab.repository() as repo:
        await repo.attempts.enqueue("later", attempt_id="later")
    kept = []
    for _ in range(2):
        report = await lab.repository().restore(tmp_path / "a.archive", force=True)
        assert report.kept
        kept.append(report.kept)
    assert len(set(kept)) == 2
    assert await _kept(lab, kept[0], "select attempt_id from runtime_attempts where run_id = 'later'") == ["later"]
    assert await _kept(lab, kept[1], "select attempt_id from runtime_attempts where run_id = 'later'") == []


async def _kept(lab: Lab, where: str, statement: str) -> list[object]:
    if lab.backend == "sqlite":
        import sqlite3

        with sqlite3.connect(f"file:{where}?immutable=1", uri=True) as connection:
            found = [row[0] for row in connection.execute(statement)]
        connection.close()
        return found
    rows = await lab.rows(statement.replace("from ", f"from {where}."))
    await lab.execute("select 1")
    return [next(iter(row.values())) for row in rows]


async def test_an_archive_is_restored_where_nothing_is(lab: Lab, tmp_path: Path) -> None:
    """Another place, or the same one after it was lost; nothing is kept, since nothing was there."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    before = await everything(lab)
    await lab.wipe()
    report = await lab.repository().restore(tmp_path / "a.archive")
    assert report.kept is None
    after = await everything(lab)
    assert {name: rows for name, rows in after.items() if name not in HELD} == {
        name: rows for name, rows in before.items() if name not in HELD
    }
    assert (await lab.boot(migrate=False)).tolerated == ()


async def test_an_archive_of_either_database_is_restored_to_the_other(
    sqlite_lab: Lab, postgres_lab: Lab, tmp_path: Path
) -> None:
    """And back, with every odd character: the row hashes are the same from then on, since nothing is held any more."""
    await fill(sqlite_lab)
    first, second, third = (tmp_path / f"{number}.archive" for number in range(3))
    await sqlite_lab.repository().backup(tmp_path / "raw.archive")
    await postgres_lab.repository().restore(tmp_path / "raw.archive")
    await postgres_lab.repository().backup(first)
    await sqlite_lab.repository().restore(first, force=True)
    await sqlite_lab.repository().backup(second)
    await postgres_lab.repository().restore(second)
    await postgres_lab.repository().backup(third)
    for one, two in ((first, second), (second, third)):
        was, now = row_hashes(one), row_hashes(two)
        assert {name for name in was if was[name] != now[name]} == {"runtime_attempts"}, "the tokens alone"
    raw = row_hashes(tmp_path / "raw.archive")
    assert {name for name in raw if raw[name] != row_hashes(third)[name]} == HELD
    assert await everything(sqlite_lab, ("runtime_jobs", "runtime_interrupts")) == await everything(
        postgres_lab, ("runtime_jobs", "runtime_interrupts")
    )


async def test_active_leases_refuse_a_restore(lab: Lab, tmp_path: Path) -> None:
    """With who holds them; those that have run out hold nothing."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    before = await everything(lab)
    with pytest.raises(StoreInUseError, match=r"'worker\\t1' holds 1 active leases.*force=True"):
        await lab.repository().restore(tmp_path / "a.archive")
    assert await everything(lab) == before
    await lab.execute("update runtime_leases set lease_expires_at_ms = 5")
    assert (await lab.repository().restore(tmp_path / "a.archive")).overridden == ()


async def test_a_repository_that_is_open_is_not_replaced(lab: Lab, tmp_path: Path) -> None:
    """It has connections to what would be replaced; a closed one has none any more."""
    async with lab.repository() as repo:
        await repo.backup(tmp_path / "a.archive")
        with pytest.raises(ConfigurationError, match="close it"):
            await repo.restore(tmp_path / "a.archive", force=True)
    with pytest.raises(RepositoryClosedError):
        await repo.restore(tmp_path / "a.archive")
    with pytest.raises(RepositoryClosedError):
        await repo.backup(tmp_path / "b.archive")


async def test_a_boot_does_not_put_an_empty_store_beside_what_was_kept(lab: Lab, tmp_path: Path) -> None:
    """Somebody has lost something: it says what is there and what to do, and creates nothing. So does a look."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    report = await lab.repository().restore(tmp_path / "a.archive", force=True)
    if lab.backend == "sqlite":
        lab.path.unlink()  # type: ignore[attr-defined]
    else:
        await lab.wipe()
    with pytest.raises(RemainsError, match="repeat the restore") as caught:
        await lab.boot()
    assert len(caught.value.remains) == 1
    assert (report.kept or "?") in caught.value.remains[0]
    assert await lab.content() == NOTHING
    assert "beside it stands" in ((await lab.repository().inspect()).refusal or "")
    # As it says.
    await lab.repository().restore(tmp_path / "a.archive")
    assert (await lab.boot()).from_version == NEWEST


async def test_a_cancelled_restore_changes_nothing(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no connection, thread, lock or file, and the same call again succeeds."""
    await fill(lab)
    path = tmp_path / "a.archive"
    await lab.repository().backup(path)
    before = await everything(lab)
    began, go_on = threading.Event(), threading.Event()
    feed = archive.Tally.feed

    def slow(self: archive.Tally, piece: bytes) -> None:
        began.set()
        go_on.wait(0.1)
        feed(self, piece)

    with monkeypatch.context() as patched:
        patched.setattr(archive.Tally, "feed", slow)
        async with lab.nothing_left():
            task = asyncio.create_task(lab.repository().restore(path, force=True))
            await eventually(began.is_set)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    assert await everything(lab) == before
    if lab.backend == "sqlite":
        assert names(Path(lab.place.where).parent, "*restoring*") == []
    assert (await lab.repository().restore(path, force=True)).version == NEWEST


async def test_what_the_database_did_not_store_as_it_was_is_rolled_back(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are read back and their hash is compared before anything is committed."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    before = await everything(lab)
    pieces = archive.Reader.pieces

    def other(self: archive.Reader, table: str) -> object:
        for piece in pieces(self, table):
            yield piece.replace(b"thread", b"threat")

    monkeypatch.setattr(archive.Reader, "pieces", other)
    with pytest.raises(ArchiveError, match="stored are not those of it"):
        await lab.repository().restore(tmp_path / "a.archive", force=True)
    assert await everything(lab) == before


async def test_many_rows_in_many_pieces(lab: Lab, tmp_path: Path) -> None:
    """Rows that are longer than what is hashed or sent in one go, and that end at none of its borders."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many(
            [NewAttempt("run", attempt_id=f"{n}", payload="\\\n" * (n * 997 % 3000)) for n in range(200)]
        )
        await repo.attempts.enqueue("run", attempt_id="long", payload="x\t" * 1_000_000)
    before = await everything(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.repository().restore(tmp_path / "a.archive")
    after = await everything(lab)
    for rows in (before, after):
        for row in rows["runtime_attempts"]:
            row["lease_version"] = None
    assert after == before
    assert set(after) == set(TABLES)


async def test_a_restored_store_finds_everything_as_before(lab: Lab, tmp_path: Path) -> None:
    """Claims, lists and statistics: nothing is left to be reindexed."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.repository().restore(tmp_path / "a.archive", force=True)
    async with lab.repository() as repo:
        assert await repo.attempts.reindex() == 0
        leases = await repo.leases.claim("new", limit=100, ttl=timedelta(minutes=1))
        assert len(leases) == 28
