"""SIGKILL at any moment leaves the old or the new store, whole. ``python -m tests.archives.kills`` does many."""

from pathlib import Path

from tests.archives.kills import move_killed, restore_killed
from tests.lab import Lab

MOMENTS = 3


async def test_a_restore_that_is_killed_leaves_a_whole_store(lab: Lab, tmp_path: Path) -> None:
    """And the same call again succeeds."""
    judged = await restore_killed(lab, tmp_path / "a.archive", MOMENTS)
    assert judged.old + judged.new == MOMENTS
    assert judged.old, "the first moments are early"


async def test_a_move_that_is_killed_leaves_all_or_nothing(lab: Lab, target: Lab) -> None:
    """And the same call again succeeds, also where it had been done."""
    judged = await move_killed(lab, target, MOMENTS)
    assert judged.old + judged.new == MOMENTS
    assert judged.old, "the first moments are early"
