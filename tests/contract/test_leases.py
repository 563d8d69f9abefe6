"""Leases: who owns an attempt, and for how long."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from runtime_repo import (
    AttemptStatus,
    LeaseLostError,
    NewAttempt,
    RuntimeRepoError,
    RuntimeRepository,
)
from tests.contract.conftest import Clock, Factory, execute

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


async def test_what_cannot_be_read_keeps_nobody_from_the_rest(
    repo: RuntimeRepository, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Its lease runs out and no worker ends by it; whoever wants just this one is told."""
    for name in ("a", "b", "c"):
        await repo.attempts.enqueue("run", attempt_id=name, now=clock.now)
    await execute(repo, "update {schema}.runtime_attempts set payload_json = '{oops' where attempt_id in ('a', 'c')")
    (lease,) = await repo.leases.claim("worker", limit=2, now=clock.now)
    assert lease.attempt_id == "b"
    assert "the row a of runtime_attempts cannot be read" in caplog.text
    with pytest.raises(RuntimeRepoError, match="no JSON"):
        await repo.leases.claim_attempt("c", "worker", now=clock.now)


async def test_a_claim_takes_from_its_queue_only(repo: RuntimeRepository) -> None:
    """Queues are apart."""
    await repo.attempts.enqueue("run", attempt_id="m", queue="mail")
    assert await repo.leases.claim("worker") == []
    (lease,) = await repo.leases.claim("worker", queues="mail")
    assert lease.attempt_id == "m"


async def test_a_delayed_attempt_is_claimed_when_its_time_has_come(repo: RuntimeRepository, clock: Clock) -> None:
    """``not_before`` is kept to the millisecond, and the very claim that promotes it takes it."""
    await repo.attempts.enqueue("run", attempt_id="a", not_before=clock.now + MINUTE, now=clock.now)
    assert await repo.leases.claim("worker", now=clock.now + MINUTE - timedelta(milliseconds=1)) == []
    (lease,) = await repo.leases.claim("worker", now=clock.now + MINUTE)
    assert (lease.attempt_id, lease.attempt.retry_at) == ("a", None)


async def test_what_is_due_competes_with_what_is_ready(repo: RuntimeRepository, clock: Clock) -> None:
    """One claim orders both by priority and age, and what it does not take of either can be taken by the next."""
    for name, priority, delayed in (("a", 1, False), ("b", 2, True), ("c", 0, False), ("d", 1, True), ("e", 3, False)):
        await repo.attempts.enqueue(
            "run", attempt_id=name, priority=priority, not_before=clock.now if delayed else None, now=clock.now
        )
    leases = await repo.leases.claim("worker", limit=3, now=clock.now)
    assert [lease.attempt_id for lease in leases] == ["e", "b", "a"]
    leases = await repo.leases.claim("worker", limit=3, now=clock.now)
    assert [lease.attempt_id for lease in leases] == ["d", "c"]


@pytest.mark.parametrize("queues", ["fast", ["fast", "empty"]], ids=["one", "several"])
async def test_a_backlog_of_another_queue_delays_nobody(
    repo: RuntimeRepository, clock: Clock, queues: str | list[str]
) -> None:
    """However much is due where no worker claims, what is due in a queue is claimed at its time."""
    slow = [NewAttempt("run", queue="slow", not_before=clock.now - MINUTE) for _ in range(50)]
    await repo.attempts.enqueue_many(slow, now=clock.now)
    await repo.attempts.enqueue("run", attempt_id="a", queue="fast", not_before=clock.now, now=clock.now)
    (lease,) = await repo.leases.claim("worker", queues=queues, now=clock.now)
    assert lease.attempt_id == "a"


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


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancelled_claim_owns_nothing(repo: RuntimeRepository, times: int) -> None:
    """
    At whichever turn of the event loop the caller is cancelled, also again while it gives back: the attempt is ready
    again and no try is counted.
    """
    await repo.attempts.enqueue("run", attempt_id="a")
    turns = 0
    while True:
        claim = asyncio.create_task(repo.leases.claim("worker"))
        for _ in range(turns):
            await asyncio.sleep(0)
        if claim.done():
            break
        for _ in range(times):
            claim.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await claim
        attempt = await repo.attempts.get("a")
        assert (attempt.status, attempt.attempt_no) == (AttemptStatus.QUEUED, 1)
        turns += 1 + turns // 16
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
    for turns in [*range(1, 10)] * 5:
        claim = asyncio.create_task(repo.leases.claim("worker"))
        for _ in range(turns):
            await asyncio.sleep(0)
        if claim.done():
            # The moment has passed: it is looked for again.
            attempt = await repo.leases.release(claim.result()[0])
            continue
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


async def test_a_claim_goes_across_the_queues_named(repo: RuntimeRepository, clock: Clock) -> None:
    """Priority, then age, whichever queue it is; a queue that is not named stays alone, and a repeated name is one."""
    for name, queue, priority in (("a", "x", 0), ("b", "y", 5), ("c", "x", 5), ("d", "y", 0), ("e", "z", 9)):
        await repo.attempts.enqueue("run", attempt_id=name, queue=queue, priority=priority, now=clock.advance(MINUTE))
    await repo.attempts.enqueue("run", attempt_id="due", queue="y", priority=7, not_before=clock.now, now=clock.now)
    claimed: list[str] = []
    for limit in (1, 2, 9):
        leases = await repo.leases.claim("worker", queues=["x", "y", "x"], limit=limit, now=clock.now)
        claimed += [lease.attempt_id for lease in leases]
        assert len(leases) <= limit
    assert sorted(claimed) == ["a", "b", "c", "d", "due"]
    assert [name for name in claimed if name != "due"] == ["b", "c", "a", "d"]


async def test_rivals_for_several_queues_share_what_is_there(factory: Factory) -> None:
    """Nobody gets what another got, and together they get all."""
    async with factory() as one, factory() as two:
        await one.attempts.enqueue_many([NewAttempt("run", queue=f"q{number % 4}") for number in range(200)])
        queues = [f"q{number}" for number in range(4)]
        taken: list[str] = []
        while len(taken) < 200:
            found = await asyncio.gather(
                *(repo.leases.claim("worker", queues=queues, limit=7) for repo in (one, two, one, two))
            )
            assert any(found)
            taken += [lease.attempt_id for leases in found for lease in leases]
        assert len(set(taken)) == 200


async def test_one_attempt_can_be_claimed_by_name(repo: RuntimeRepository, clock: Clock) -> None:
    """If it is ready or due, whatever its queue; otherwise the answer is None and nothing changes."""
    await repo.attempts.enqueue("run", attempt_id="a", queue="mail", not_before=clock.now + MINUTE, now=clock.now)
    assert await repo.leases.claim_attempt("a", "worker", now=clock.now) is None
    lease = await repo.leases.claim_attempt("a", "worker", ttl=MINUTE, now=clock.advance(MINUTE))
    assert lease is not None
    assert (lease.worker_id, lease.version, lease.expires_at) == ("worker", 1, clock.now + MINUTE)
    assert lease.attempt == await repo.attempts.get("a")
    assert lease.attempt.retry_at is None
    for name in ("a", "nobody"):
        assert await repo.leases.claim_attempt(name, "rival", now=clock.now) is None
    assert await repo.leases.list() == [lease]
    await repo.attempts.complete(lease)
    assert await repo.leases.claim_attempt("a", "rival", now=clock.now) is None


async def test_of_rivals_for_one_attempt_one_wins(factory: Factory) -> None:
    """By name or by queue: exactly one lease, round after round."""
    async with factory() as one, factory() as two:
        for number in range(20):
            await one.attempts.enqueue("run", attempt_id=f"a{number}")
            by_name = (repo.leases.claim_attempt(f"a{number}", "worker") for repo in (one, two, one, two))
            by_queue = (repo.leases.claim("worker") for repo in (one, two))
            named, queued = await asyncio.gather(asyncio.gather(*by_name), asyncio.gather(*by_queue))
            assert len([lease for lease in named if lease] + [lease for leases in queued for lease in leases]) == 1


async def test_many_leases_are_kept_at_once(repo: RuntimeRepository, clock: Clock) -> None:
    """Each in its place: renewed, or None where it has expired or is another's by now."""
    await repo.attempts.enqueue_many([NewAttempt("run", f"a{number}") for number in range(3)], now=clock.now)
    short, lost, kept = [
        (await repo.leases.claim("worker", ttl=ttl, now=clock.now))[0] for ttl in (MINUTE, 9 * MINUTE, 9 * MINUTE)
    ]
    await repo.leases.release(lost)
    rival = await repo.leases.claim_attempt(lost.attempt_id, "rival", ttl=9 * MINUTE, now=clock.now)
    later = clock.advance(MINUTE)
    renewed = await repo.leases.heartbeat_many([kept, short, lost, kept], ttl=20 * MINUTE, now=later)
    assert renewed[0] is not None
    assert renewed == [renewed[0], None, None, renewed[0]]
    assert (renewed[0].heartbeat_at, renewed[0].expires_at) == (later, later + 20 * MINUTE)
    stored = {lease.lease_id: lease.expires_at for lease in await repo.leases.list()}
    assert rival is not None
    assert stored == {
        kept.lease_id: later + 20 * MINUTE,
        short.lease_id: short.expires_at,
        rival.lease_id: rival.expires_at,
    }
    assert await repo.leases.heartbeat_many([]) == []


async def test_heartbeats_of_many_and_requeues_do_not_wait_for_each_other_in_a_circle(factory: Factory) -> None:
    """Opposite orders and expired leases at the same moment: nobody is a deadlock's victim."""
    async with factory() as one, factory() as two:
        await one.attempts.enqueue_many([NewAttempt("run") for _ in range(100)])
        leases = await one.leases.claim("worker", limit=100, ttl=10 * MINUTE)
        for _ in range(5):
            await asyncio.gather(
                one.leases.heartbeat_many(leases),
                two.leases.heartbeat_many(leases[::-1]),
                one.leases.requeue_expired(now=leases[0].expires_at + MINUTE, limit=5),
                two.attempts.complete_many([(lease, None) for lease in leases[-5:]]),
            )


@pytest.mark.parametrize("delay", [None, MINUTE])
async def test_what_is_released_was_not_tried(repo: RuntimeRepository, clock: Clock, delay: timedelta | None) -> None:
    """Ready at once or after the delay, the try not counted; to repeat it changes nothing, and the token is spent."""
    await repo.attempts.enqueue("run", attempt_id="a", max_attempts=1, now=clock.now)
    (lease,) = await repo.leases.claim("worker", now=clock.now)
    released = await repo.leases.release(lease, delay=delay, now=clock.now)
    assert (released.status, released.attempt_no) == (AttemptStatus.QUEUED, 1)
    assert released.retry_at == (None if delay is None else clock.now + delay)
    assert await repo.leases.release(lease, delay=delay, now=clock.now) == released
    assert await repo.leases.list() == []
    with pytest.raises(LeaseLostError):
        await repo.attempts.complete(lease)
    if delay is not None:
        assert await repo.leases.claim("worker", now=clock.now) == []
    (again,) = await repo.leases.claim("worker", now=clock.now + (delay or timedelta(0)))
    assert (again.version, again.attempt.attempt_no) == (2, 1)
    with pytest.raises(LeaseLostError):
        await repo.leases.release(lease)
    assert await repo.leases.list() == [again]


async def test_leases_are_listed_by_worker(repo: RuntimeRepository) -> None:
    """All of them, or one worker's, in pages; each with its attempt."""
    await repo.attempts.enqueue_many([NewAttempt("run") for _ in range(5)])
    mine = await repo.leases.claim("me", limit=3)
    others = await repo.leases.claim("other", limit=2)
    everything = await repo.leases.list()
    assert sorted(everything, key=lambda lease: lease.lease_id) == sorted(
        [*mine, *others], key=lambda lease: lease.lease_id
    )
    first = await repo.leases.list(worker_id="me", limit=2)
    rest = await repo.leases.list(worker_id="me", limit=2, after=first[-1].lease_id)
    assert {lease.lease_id for lease in [*first, *rest]} == {lease.lease_id for lease in mine}
    assert len(rest) == 1


async def test_a_grace_spares_leases_that_have_just_expired(repo: RuntimeRepository, clock: Clock) -> None:
    """Only what expired longer ago than that is taken from its worker."""
    await repo.attempts.enqueue("run", attempt_id="a", now=clock.now)
    (lease,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
    moment = lease.expires_at + MINUTE
    early = moment - timedelta(milliseconds=1)
    assert await repo.leases.requeue_expired(grace=MINUTE, now=early) == []
    (attempt,) = await repo.leases.requeue_expired(grace=MINUTE, now=moment)
    assert (attempt.attempt_id, attempt.status, attempt.attempt_no) == ("a", AttemptStatus.QUEUED, 2)
