"""Leases: who owns an attempt, and for how long."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from runtime_repo import AttemptStatus, ConfigurationError, LeaseLostError, RuntimeRepository
from tests.contract.conftest import Clock, Factory

MINUTE = timedelta(minutes=1)


async def test_claims_go_by_priority_then_age(repo: RuntimeRepository, clock: Clock) -> None:
    """The highest priority first; among equals the oldest."""
    for name, priority in (("old", 0), ("new", 0), ("urgent", 5), ("idle", -1)):
        await repo.attempts.enqueue("run", attempt_id=name, priority=priority, now=clock.advance(MINUTE))
    leases = await repo.leases.claim("worker", limit=3, now=clock.now)
    assert [lease.attempt_id for lease in leases] == ["urgent", "old", "new"]
    (last,) = await repo.leases.claim("worker", limit=3, now=clock.now)
    assert last.attempt_id == "idle"
    assert await repo.leases.claim("worker", limit=3, now=clock.now) == []


async def test_a_claim_gives_everything_a_worker_needs(repo: RuntimeRepository, clock: Clock) -> None:
    """The lease carries the attempt, its payload and its token."""
    await repo.attempts.enqueue("run", attempt_id="a", payload={"x": 1}, now=clock.now)
    (lease,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.advance(MINUTE))
    assert (lease.attempt_id, lease.worker_id, lease.version) == ("a", "worker", 1)
    assert (lease.claimed_at, lease.heartbeat_at, lease.expires_at) == (clock.now, clock.now, clock.now + MINUTE)
    assert (lease.attempt.payload, lease.attempt.status) == ({"x": 1}, AttemptStatus.LEASED)
    assert lease.attempt == await repo.attempts.get("a")


async def test_a_claim_takes_from_its_queue_only(repo: RuntimeRepository) -> None:
    """Queues are apart."""
    await repo.attempts.enqueue("run", attempt_id="m", queue="mail")
    assert await repo.leases.claim("worker") == []
    (lease,) = await repo.leases.claim("worker", queue="mail")
    assert lease.attempt_id == "m"


async def test_a_delayed_attempt_is_claimed_when_its_time_has_come(repo: RuntimeRepository, clock: Clock) -> None:
    """``not_before`` is kept to the millisecond, and the very claim that promotes it takes it."""
    await repo.attempts.enqueue("run", attempt_id="a", not_before=clock.now + MINUTE, now=clock.now)
    assert await repo.leases.claim("worker", now=clock.now + MINUTE - timedelta(milliseconds=1)) == []
    (lease,) = await repo.leases.claim("worker", now=clock.now + MINUTE)
    assert (lease.attempt_id, lease.attempt.retry_at) == ("a", None)


async def test_a_claim_fills_up_with_promoted_attempts(repo: RuntimeRepository, clock: Clock) -> None:
    """One call returns what was ready and what became due, up to its limit."""
    for number in range(3):
        await repo.attempts.enqueue("run", attempt_id=f"ready{number}", now=clock.now)
        await repo.attempts.enqueue("run", attempt_id=f"due{number}", not_before=clock.now, now=clock.now)
    leases = await repo.leases.claim("worker", limit=5, now=clock.now)
    assert len({lease.attempt_id for lease in leases}) == 5


async def test_rivals_never_own_the_same_attempt(repo: RuntimeRepository) -> None:
    """Twenty claims at once share thirty attempts without overlap and without loss."""
    for number in range(30):
        await repo.attempts.enqueue("run", attempt_id=f"a{number:02}")
    claimed: list[str] = []
    while len(claimed) < 30:
        rounds = await asyncio.gather(*(repo.leases.claim(f"w{n}", limit=2) for n in range(20)))
        claimed += [lease.attempt_id for leases in rounds for lease in leases]
    assert sorted(claimed) == [f"a{number:02}" for number in range(30)]


async def test_the_token_grows_with_every_claim(repo: RuntimeRepository, clock: Clock) -> None:
    """Also when the same worker claims again: its old lease is as stale as a stranger's."""
    await repo.attempts.enqueue("run", now=clock.now)
    (first,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
    await repo.leases.requeue_expired(now=clock.advance(MINUTE))
    (second,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
    assert (first.version, second.version) == (1, 2)
    with pytest.raises(LeaseLostError):
        await repo.attempts.complete(first)
    with pytest.raises(LeaseLostError):
        await repo.leases.heartbeat(first, now=clock.now)
    await repo.leases.heartbeat(second, now=clock.now)


async def test_a_heartbeat_keeps_the_lease(repo: RuntimeRepository, clock: Clock) -> None:
    """A worker that beats in time is never requeued, and its token stays the same."""
    await repo.attempts.enqueue("run", now=clock.now)
    (lease,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
    for _ in range(5):
        kept = await repo.leases.heartbeat(lease, ttl=MINUTE, now=clock.advance(MINUTE / 2))
        assert (kept.version, kept.heartbeat_at, kept.expires_at) == (lease.version, clock.now, clock.now + MINUTE)
        assert await repo.leases.requeue_expired(now=clock.now + MINUTE / 2) == []
    await repo.attempts.complete(lease)


async def test_a_heartbeat_on_an_expired_lease_is_refused(repo: RuntimeRepository, clock: Clock) -> None:
    """A lease holds while now is before its expiry, and not at it."""
    await repo.attempts.enqueue("run", now=clock.now)
    (lease,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
    with pytest.raises(LeaseLostError):
        await repo.leases.heartbeat(lease, now=clock.now + MINUTE)


async def test_a_heartbeat_after_completion_is_refused(repo: RuntimeRepository) -> None:
    """The error says what became of the attempt."""
    await repo.attempts.enqueue("run")
    (lease,) = await repo.leases.claim("worker")
    await repo.attempts.complete(lease)
    with pytest.raises(LeaseLostError) as caught:
        await repo.leases.heartbeat(lease)
    assert caught.value.status == "completed"


async def test_an_expired_lease_is_requeued_and_the_try_is_counted(repo: RuntimeRepository, clock: Clock) -> None:
    """The attempt of a silent worker is ready for others, with the reason."""
    await repo.attempts.enqueue("run", attempt_id="a", now=clock.now)
    await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
    assert await repo.leases.requeue_expired(now=clock.now + MINUTE - timedelta(milliseconds=1)) == []
    (requeued,) = await repo.leases.requeue_expired(now=clock.advance(MINUTE))
    assert (requeued.status, requeued.attempt_no, requeued.lease_version) == (AttemptStatus.QUEUED, 2, 1)
    assert requeued.error == "the lease of worker worker expired"
    assert await repo.leases.requeue_expired(now=clock.now) == []


async def test_an_attempt_that_kills_its_workers_fails_in_the_end(repo: RuntimeRepository, clock: Clock) -> None:
    """After ``max_attempts`` lost leases it is final, with the reason."""
    await repo.attempts.enqueue("run", attempt_id="a", max_attempts=2, now=clock.now)
    for _ in range(2):
        await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
        (lost,) = await repo.leases.requeue_expired(now=clock.advance(MINUTE))
    assert (lost.status, lost.attempt_no, lost.finished_at) == (AttemptStatus.FAILED, 2, clock.now)
    assert "expired" in (lost.error or "")
    assert await repo.leases.claim("worker", now=clock.now) == []


async def test_requeueing_is_bounded(repo: RuntimeRepository, clock: Clock) -> None:
    """At most *limit* at once; repeated, it reaches every one."""
    for _ in range(5):
        await repo.attempts.enqueue("run", now=clock.now)
    await repo.leases.claim("worker", limit=5, ttl=MINUTE, now=clock.now)
    clock.advance(MINUTE)
    assert [len(await repo.leases.requeue_expired(limit=2, now=clock.now)) for _ in range(4)] == [2, 2, 1, 0]


async def test_a_cancelled_claim_owns_nothing(repo: RuntimeRepository) -> None:
    """At whichever turn of the event loop the caller is cancelled, the attempt is ready again and no try is counted."""
    await repo.attempts.enqueue("run", attempt_id="a")
    turns = 0
    while True:
        claim = asyncio.create_task(repo.leases.claim("worker"))
        for _ in range(turns):
            await asyncio.sleep(0)
        if claim.done():
            break
        claim.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claim
        attempt = await repo.attempts.get("a")
        assert (attempt.status, attempt.attempt_no) == (AttemptStatus.QUEUED, 1)
        turns += 1 + turns // 4
    assert [lease.attempt_id for lease in await claim] == ["a"]


async def test_a_claim_that_had_happened_when_it_was_cancelled_is_given_back(
    repo: RuntimeRepository, factory: Factory
) -> None:
    """The database committed, the caller was cancelled before it knew: nobody owns the attempt."""

    async def until_claimed(before: int) -> bool:
        async with factory() as other:
            for _ in range(50):
                if (await other.attempts.get("a")).lease_version > before:
                    return True
        return False

    attempt = await repo.attempts.enqueue("run", attempt_id="a")
    for turns in range(2, 40):
        claim = asyncio.create_task(repo.leases.claim("worker"))
        for _ in range(turns):
            await asyncio.sleep(0)
        # This loop stands still meanwhile, so the claim's answer waits unread.
        with ThreadPoolExecutor() as threads:
            claimed = threads.submit(asyncio.run, until_claimed(attempt.lease_version)).result()
        claim.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claim
        attempt = await repo.attempts.get("a")
        assert (attempt.status, attempt.attempt_no) == (AttemptStatus.QUEUED, 1)
        if claimed:
            break
    assert claimed
    (lease,) = await repo.leases.claim("other")
    assert lease.version == attempt.lease_version + 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"limit": 0}, "limit"),
        ({"ttl": timedelta(0)}, "ttl"),
        ({"ttl": -MINUTE}, "ttl"),
        ({"worker_id": ""}, "worker_id"),
        ({"queue": "a\0"}, "queue"),
    ],
)
async def test_bad_input_is_refused(repo: RuntimeRepository, arguments: dict[str, Any], word: str) -> None:
    """The error names the argument, and nothing is claimed."""
    await repo.attempts.enqueue("run", attempt_id="a")
    with pytest.raises(ConfigurationError, match=word):
        await repo.leases.claim(**({"worker_id": "worker"} | arguments))
    assert (await repo.attempts.get("a")).lease_version == 0
