"""Moves between the two databases: everything as it was, or nothing."""

import re
from pathlib import Path

import pytest

from runtime_repo import (
    ArchiveError,
    ConfigurationError,
    DatabaseUnavailableError,
    RuntimeRepository,
    StoreInUseError,
    UnportableRowsError,
    move,
)
from tests.archives.store import FIRST, everything, fill, names
from tests.lab import IDS, NOTHING, Lab


async def test_a_store_is_moved_as_it_is(lab: Lab, target: Lab) -> None:
    """Every id, token, lease, ledger row and number; a worker that held a lease finishes what it held over there."""
    filled = await fill(lab)
    source = await lab.content()
    before = await everything(lab)
    report = await move(lab.repository(), target.repository(), force=True)
    assert report.rows == {name: len(rows) for name, rows in before.items()}
    assert await everything(target) == before
    assert await lab.content() == source
    async with target.repository(migrate=False) as repo:
        assert repo.boot_report.tolerated == ()
        assert (await repo.step_reports.record(filled.held, "step", "ok", "third")).report_id == 3
        await repo.attempts.complete(filled.held)


async def test_a_store_of_version_1_is_moved_as_one(lab: Lab, target: Lab) -> None:
    """A move migrates nothing."""
    await lab.lay_version_1()
    await move(lab.repository(), target.repository(), force=True)
    assert await everything(target, FIRST) == await everything(lab, FIRST)
    assert await target.recorded() == [(1, "baseline_runtime_tables")]
    assert (await target.boot()).from_version == 1


async def test_active_leases_refuse_a_move(lab: Lab, target: Lab) -> None:
    """Unless told: whoever holds them would go on where nothing is read any more."""
    await fill(lab)
    with pytest.raises(StoreInUseError, match="active leases"):
        await move(lab.repository(), target.repository())
    assert await target.content() == NOTHING


async def test_a_target_that_is_not_empty_is_refused(lab: Lab, target: Lab) -> None:
    """Whatever is forced, and nothing of it is touched."""
    await fill(lab)
    await target.lay(1)
    before = await target.content()
    with pytest.raises(StoreInUseError, match="not empty"):
        await move(lab.repository(), target.repository(), force=True)
    assert await target.content() == before


async def test_a_move_that_was_done_is_recognized(lab: Lab, target: Lab) -> None:
    """By the row hashes: whoever was killed before he heard of it repeats it. Anything else is another store."""
    await fill(lab)
    first = await move(lab.repository(), target.repository(), force=True)
    moved = await target.content()
    assert (await move(lab.repository(), target.repository(), force=True)).rows == first.rows
    assert await target.content() == moved
    await target.execute("update runtime_jobs set status = 'other'")
    with pytest.raises(StoreInUseError, match="not empty"):
        await move(lab.repository(), target.repository(), force=True)


async def test_a_move_leaves_no_copy_behind(lab: Lab, target: Lab, tmp_path: Path) -> None:
    """Neither where it was written meanwhile, nor after it was refused."""
    await fill(lab)
    folder = tmp_path / "folder"
    folder.mkdir()
    await move(lab.repository(), target.repository(), force=True, folder=folder)
    await lab.execute("delete from runtime_jobs")
    with pytest.raises(StoreInUseError):
        await move(lab.repository(), target.repository(), force=True, folder=folder)
    assert names(folder) == []


async def test_the_same_place_is_no_target(lab: Lab) -> None:
    """Nor is what is open."""
    repo: RuntimeRepository = lab.repository()
    with pytest.raises(ConfigurationError, match="another repository"):
        await move(repo, repo)
    async with lab.repository() as opened:
        with pytest.raises(ConfigurationError, match="close it"):
            await move(repo, opened)


@pytest.mark.parametrize("lab", [IDS["sqlite"]], indirect=True)
async def test_what_the_target_cannot_hold_is_listed_before_anything_is_written(lab: Lab, target: Lab) -> None:
    """By table, row and column; SQLite takes from other programs whatever they write."""
    await fill(lab)
    await lab.execute(
        """
        update runtime_jobs set status = cast(x'610062' as text);
        update runtime_attempts set priority = 3000000000 where attempt_id like '00007%';
        update runtime_attempts set result_json = x'ff' where attempt_id like '00008%';
        update runtime_attempts set error = cast(x'61ff' as text) where attempt_id like '00009%';
        update runtime_attempts set attempt_no = 1.5 where attempt_id like '00010%';
        update runtime_attempts set run_id = cast(x'eda080' as text) where attempt_id like '00011%';
        """
    )
    with pytest.raises(UnportableRowsError) as caught:
        await move(lab.repository(), target.repository(), force=True)
    # Which row it is stands between the two.
    assert [re.sub(", row '.*', ", " ", cell) for cell in caught.value.cells] == [
        "runtime_attempts priority: its number has more than the 32 bits that PostgreSQL has for it",
        "runtime_attempts result_json: it is blob, expected text",
        "runtime_attempts error: it is no text in UTF-8, such as a lone surrogate",
        "runtime_attempts attempt_no: it is real, expected integer",
        "runtime_attempts run_id: it is no text in UTF-8, such as a lone surrogate",
        "runtime_jobs status: it holds the character NUL",
    ]
    assert "'00008 " in str(caught.value)
    assert await target.content() == NOTHING


@pytest.mark.parametrize("lab", [IDS["sqlite"]], indirect=True)
async def test_an_archive_holds_larger_numbers_than_postgres(lab: Lab, tmp_path: Path) -> None:
    """A backup of SQLite's is for SQLite first: there they fit."""
    await fill(lab)
    await lab.execute("update runtime_attempts set priority = 3000000000 where attempt_id like '00007%'")
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.repository().restore(tmp_path / "a.archive", force=True)
    [row] = await lab.rows("select max(priority) as most from runtime_attempts")
    assert row["most"] == 3000000000


async def test_a_source_that_is_not_there_is_said(lab: Lab, target: Lab) -> None:
    """And nothing is made, neither there nor here."""
    with pytest.raises((DatabaseUnavailableError, ArchiveError), match=r"(unable to open|no store of ours)"):
        await move(lab.repository(), target.repository())
    assert await target.content() == await lab.content() == NOTHING
