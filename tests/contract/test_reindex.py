"""What another program does to attempts' rows: the narrow tables by which they are found are put right again."""

from datetime import timedelta
from typing import Any

import pytest

from runtime_repo import AttemptStatus, NewAttempt, RuntimeRepository, mending
from tests.contract.conftest import Clock, execute, runtime_schema
from tests.verbs import MINUTE


async def listed(repo: RuntimeRepository, noun: str) -> list[str]:
    """Whose rows are in one of the narrow tables."""
    query = f"select attempt_id from {runtime_schema(repo)}.runtime_{noun} order by attempt_id"
    async with repo.transaction() as transaction:
        fetch = getattr(transaction.connection, "fetch", None) or transaction.connection.execute_fetchall
        return [row[0] for row in await fetch(query)]


async def claimed(repo: RuntimeRepository, clock: Clock) -> list[str]:
    """What a claim gets."""
    return [lease.attempt_id for lease in await repo.leases.claim("worker", limit=9, ttl=MINUTE, now=clock.now)]


async def update(repo: RuntimeRepository, assignments: str, name: str = "a") -> None:
    """Write an attempt's row by hand."""
    await execute(repo, f"update {{schema}}.runtime_attempts set {assignments} where attempt_id = '{name}'")


async def completed(repo: RuntimeRepository, clock: Clock, *names: str) -> None:
    """Attempts that are done."""
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in names], now=clock.now)
    leases = await repo.leases.claim("worker", limit=len(names), now=clock.now)
    await repo.attempts.complete_many([(lease, None) for lease in leases], now=clock.now)


async def test_a_status_that_is_changed_by_hand_is_found_again(repo: RuntimeRepository, clock: Clock) -> None:
    """What is queued can be claimed, once, and is completed and pruned as ever."""
    await completed(repo, clock, "a", "b")
    await update(repo, "status = 'queued', finished_at_ms = null")
    assert await claimed(repo, clock) == []
    assert await repo.attempts.reindex() == 1
    assert await repo.attempts.reindex() == 0
    [lease] = await repo.leases.claim("worker", now=clock.now)
    assert (lease.attempt_id, lease.version) == ("a", 2)
    await repo.attempts.complete(lease, now=clock.advance(MINUTE))
    assert await repo.attempts.prune(older_than=MINUTE, now=clock.now) == 1
    assert [attempt.attempt_id for attempt in await repo.attempts.list()] == ["a"]
    assert await listed(repo, "finished") == ["a"]
    assert await repo.attempts.prune(older_than=timedelta(0), now=clock.now) == 1


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_what_is_ended_by_hand_is_claimed_by_nobody(repo: RuntimeRepository, clock: Clock, status: str) -> None:
    """A claim takes away what is said to wait and does not; afterwards it is listed, and pruned, as what it is."""
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ("a", "b")], now=clock.now)
    await update(repo, f"status = '{status}'")
    assert await claimed(repo, clock) == ["b"]
    assert await listed(repo, "queue") == []
    assert await repo.attempts.reindex() == 1
    assert [attempt.attempt_id for attempt in await repo.attempts.list(status=AttemptStatus(status))] == ["a"]
    assert (await repo.attempts.get("a")).finished_at is not None
    assert await repo.attempts.prune(older_than=timedelta(0)) == 1


async def test_what_does_not_wait_is_taken_away(repo: RuntimeRepository, clock: Clock) -> None:
    """Also where no claim comes past it: nobody is woken for it, and it is not counted."""
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ("a", "b", "c")], now=clock.now)
    await update(repo, "status = 'cancelled', finished_at_ms = 1")
    await execute(repo, "delete from {schema}.runtime_attempts where attempt_id = 'b'")
    await repo.attempts.reindex()
    assert await listed(repo, "queue") == ["c"]
    assert [stats.ready for stats in await repo.attempts.stats()] == [1]


async def test_what_is_claimed_by_is_what_the_row_says(repo: RuntimeRepository, clock: Clock) -> None:
    """Another queue, priority or time."""
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ("a", "b", "c", "d")], now=clock.now)
    await update(repo, "queue = 'other'", "a")
    await update(repo, "priority = 1", "c")
    await update(repo, f"retry_at_ms = {int((clock.now + MINUTE).timestamp() * 1000)}", "d")
    assert await repo.attempts.reindex() == 3
    assert await claimed(repo, clock) == ["c", "b"]
    assert [lease.attempt_id for lease in await repo.leases.claim("worker", queues="other", now=clock.now)] == ["a"]
    clock.advance(MINUTE)
    assert await claimed(repo, clock) == ["d"]


async def test_all_is_rebuilt_from_the_rows(
    repo: RuntimeRepository, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, step by step; what is held stays its holder's."""
    monkeypatch.setattr(mending, "STEP", 7)
    names = [f"a{number:02}" for number in range(40)]
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in names], now=clock.now)
    leases = await repo.leases.claim("worker", limit=20, ttl=MINUTE, now=clock.now)
    await repo.attempts.complete_many([(lease, None) for lease in leases[:9]], now=clock.now)
    await repo.attempts.fail(leases[9], "boom", now=clock.now)
    await repo.attempts.fail(leases[10], "boom", retry_in=MINUTE, now=clock.now)
    before = [await listed(repo, noun) for noun in ("queue", "leases", "finished")]
    assert [len(found) for found in before] == [21, 9, 10]
    for noun in ("queue", "finished"):
        await execute(repo, f"delete from {{schema}}.runtime_{noun}")
    assert await repo.attempts.reindex() == 31
    assert [await listed(repo, noun) for noun in ("queue", "leases", "finished")] == before
    assert [attempt.attempt_id for attempt in await repo.attempts.list(status=AttemptStatus.FAILED)] == ["a09"]
    assert await repo.attempts.complete_many([(lease, None) for lease in leases[11:]], now=clock.now) == [True] * 9


async def test_the_sweep_comes_past_everything(
    repo: RuntimeRepository, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks through so many attempts each time, and begins anew after the last."""
    monkeypatch.setattr(mending, "STEP", 3)
    names = [f"a{number}" for number in range(8)]
    await completed(repo, clock, *names)
    for _ in range(2):
        await update(repo, "status = 'queued', finished_at_ms = null", "a7")
        got: list[Any] = []
        for _ in range(4):
            assert await repo.leases.requeue_expired(now=clock.now) == []
            got += await claimed(repo, clock)
        assert got == ["a7"]
