"""Attempts: enqueued once, finished once."""

import asyncio
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from runtime_repo import (
    AttemptStatus,
    InvalidTransitionError,
    Lease,
    LeaseLostError,
    NewAttempt,
    NotFoundError,
    PayloadMismatchError,
    QueueStats,
    RetryPolicy,
    RuntimeRepository,
)
from tests.contract.conftest import Clock, Factory

MINUTE = timedelta(minutes=1)


async def test_an_attempt_is_stored_as_it_was_enqueued(repo: RuntimeRepository, clock: Clock) -> None:
    """What comes back is what went in, before anything happened to it."""
    payload = {"path": "ü/\N{SNOWMAN}", "numbers": [1, 2.5, None], "nested": {"b": True}}
    stored = await repo.attempts.enqueue(
        "run", attempt_id="a", queue="mail", priority=-3, payload=payload, max_attempts=2, now=clock.now
    )
    assert stored == await repo.attempts.get("a")
    assert (stored.run_id, stored.queue, stored.priority, stored.payload) == ("run", "mail", -3, payload)
    assert (stored.status, stored.attempt_no, stored.max_attempts) == (AttemptStatus.QUEUED, 1, 2)
    assert (stored.enqueued_at, stored.finished_at, stored.worker_id) == (clock.now, None, None)


async def test_the_same_id_again_is_the_same_attempt(repo: RuntimeRepository) -> None:
    """A repeated enqueue changes nothing, even after the attempt has moved on."""
    first = await repo.attempts.enqueue("run", attempt_id="a", payload={"x": 1, "y": 2})
    assert await repo.attempts.enqueue("run", attempt_id="a", payload={"y": 2, "x": 1}) == first
    (lease,) = await repo.leases.claim("worker")
    await repo.attempts.complete(lease, "done")
    again = await repo.attempts.enqueue("run", attempt_id="a", payload={"x": 1, "y": 2})
    assert (again.status, again.result) == (AttemptStatus.COMPLETED, "done")


async def test_numbers_as_keys_are_the_same_payload_again(repo: RuntimeRepository) -> None:
    """They are stored as text, in another order: the very same call must not be a conflict."""
    for payload in ({2: "x", 10: "y"}, {2: "x", 10: "y"}, {"10": "y", "2": "x"}):
        await repo.attempts.enqueue("run", attempt_id="a", payload=payload)
        await repo.attempts.enqueue_many([NewAttempt("run", attempt_id="b", payload=payload)])
    assert (await repo.attempts.get("a")).payload == (await repo.attempts.get("b")).payload == {"2": "x", "10": "y"}


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"run_id": "other"}, ("run_id",)),
        ({"queue": "other"}, ("queue",)),
        ({"payload": {"x": 2}}, ("payload",)),
        ({"payload": None, "queue": "other"}, ("queue", "payload")),
    ],
)
async def test_the_same_id_with_other_content_is_refused(
    repo: RuntimeRepository, change: dict[str, Any], differing: tuple[str, ...]
) -> None:
    """Two different pieces of work under one id are a mistake that must not be lost."""
    stored = await repo.attempts.enqueue("run", attempt_id="a", queue="q", payload={"x": 1})
    with pytest.raises(PayloadMismatchError) as caught:
        await repo.attempts.enqueue(
            **({"run_id": "run", "attempt_id": "a", "queue": "q", "payload": {"x": 1}} | change)
        )
    assert caught.value.differing == differing
    assert await repo.attempts.get("a") == stored


async def test_twenty_tasks_enqueue_one_id_once(repo: RuntimeRepository) -> None:
    """Simultaneous enqueues of one id agree on one attempt."""
    attempts = await asyncio.gather(*(repo.attempts.enqueue("run", attempt_id="a", payload=1) for _ in range(20)))
    assert len(set(map(repr, attempts))) == 1
    assert len(await repo.attempts.list(run_id="run")) == 1


async def test_a_generated_id_is_ordered_by_time(repo: RuntimeRepository) -> None:
    """Ids that are made here sort in the order of creation, to the millisecond."""
    first = await repo.attempts.enqueue("run")
    while (second := await repo.attempts.enqueue("run")).attempt_id[:13] == first.attempt_id[:13]:
        pass
    assert first.attempt_id < second.attempt_id


async def test_an_unknown_attempt_is_not_found(repo: RuntimeRepository) -> None:
    """``get`` raises, ``find`` returns None."""
    assert await repo.attempts.find("nobody") is None
    with pytest.raises(NotFoundError, match="nobody"):
        await repo.attempts.get("nobody")


async def test_a_runs_attempts_are_listed_by_pages(repo: RuntimeRepository) -> None:
    """Every attempt of the run appears on exactly one page."""
    for number in range(7):
        await repo.attempts.enqueue("run", attempt_id=f"a{number}")
        await repo.attempts.enqueue("other", attempt_id=f"b{number}")
    seen: list[str] = []
    while page := await repo.attempts.list(run_id="run", after=seen[-1] if seen else "", limit=3):
        assert len(page) <= 3
        seen += [attempt.attempt_id for attempt in page]
    assert seen == [f"a{number}" for number in range(7)]


async def test_completing_ends_the_attempt_and_its_lease(repo: RuntimeRepository, clock: Clock) -> None:
    """A completed attempt has its result and time, and nobody can requeue it."""
    await repo.attempts.enqueue("run", attempt_id="a")
    (lease,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.now + MINUTE)
    done = await repo.attempts.complete(lease, {"sum": 3}, now=clock.advance(2 * MINUTE))
    assert (done.status, done.result, done.finished_at) == (AttemptStatus.COMPLETED, {"sum": 3}, clock.now)
    assert await repo.leases.requeue_expired(now=clock.advance(60 * MINUTE)) == []
    assert await repo.attempts.get("a") == done


async def test_completing_again_returns_the_completed_attempt(repo: RuntimeRepository) -> None:
    """A worker that does not know whether its call arrived may repeat it; the first result stays."""
    await repo.attempts.enqueue("run")
    (lease,) = await repo.leases.claim("worker")
    first = await repo.attempts.complete(lease, "first")
    assert await repo.attempts.complete(lease, "second") == first


async def test_a_late_result_is_accepted_until_someone_else_owns_the_attempt(
    repo: RuntimeRepository, clock: Clock
) -> None:
    """An expired lease alone does not throw work away."""
    await repo.attempts.enqueue("run", now=clock.now)
    (lease,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
    done = await repo.attempts.complete(lease, "late", now=clock.advance(60 * MINUTE))
    assert done.result == "late"


async def test_failing_for_good_records_the_error(repo: RuntimeRepository, clock: Clock) -> None:
    """Without a retry the attempt is final, and failing again changes nothing."""
    await repo.attempts.enqueue("run", now=clock.now)
    (lease,) = await repo.leases.claim("worker", now=clock.now)
    failed = await repo.attempts.fail(lease, "boom\0", now=clock.now)
    assert (failed.status, failed.error, failed.finished_at) == (AttemptStatus.FAILED, "boom\ufffd", clock.now)
    assert failed.attempt_no == 1
    assert await repo.attempts.fail(lease, "again") == failed
    with pytest.raises(LeaseLostError):
        await repo.attempts.complete(lease)


async def test_failing_with_a_retry_makes_it_ready_after_the_delay(repo: RuntimeRepository, clock: Clock) -> None:
    """The next try is claimed when its time has come, not before, and is counted."""
    await repo.attempts.enqueue("run", now=clock.now)
    (lease,) = await repo.leases.claim("worker", now=clock.now)
    backoff = await repo.attempts.fail(lease, "boom", retry_in=MINUTE, now=clock.now)
    assert (backoff.status, backoff.attempt_no) == (AttemptStatus.RETRY_BACKOFF, 2)
    assert backoff.retry_at == clock.now + MINUTE
    assert await repo.attempts.fail(lease, "boom", retry_in=MINUTE) == backoff

    assert await repo.leases.claim("worker", now=clock.now + MINUTE - timedelta(milliseconds=1)) == []
    (again,) = await repo.leases.claim("worker", now=clock.advance(MINUTE))
    assert (again.attempt.attempt_no, again.version) == (2, 2)


async def test_failing_again_after_a_promotion_returns_the_attempt(repo: RuntimeRepository, clock: Clock) -> None:
    """A claim that took another attempt has made it ready: its next try is not claimed, so the call is a repetition."""
    await repo.attempts.enqueue("run", attempt_id="a", now=clock.now)
    (lease,) = await repo.leases.claim("worker", now=clock.now)
    await repo.attempts.fail(lease, "boom", retry_in=timedelta(0), now=clock.now)
    await repo.attempts.enqueue("run", attempt_id="urgent", priority=1, now=clock.now)
    await repo.leases.claim("other", now=clock.now)
    promoted = await repo.attempts.get("a")
    assert (promoted.status, promoted.attempt_no) == (AttemptStatus.QUEUED, 2)
    assert await repo.attempts.fail(lease, "boom", retry_in=timedelta(0), now=clock.now) == promoted
    with pytest.raises(LeaseLostError):
        await repo.leases.release(lease, now=clock.now)
    (again,) = await repo.leases.claim("other", now=clock.now)
    assert again.attempt_id == "a"
    with pytest.raises(LeaseLostError):
        await repo.attempts.fail(lease, "boom", retry_in=timedelta(0), now=clock.now)


@pytest.mark.parametrize("max_attempts", [1, 2])
async def test_what_was_taken_away_can_be_neither_failed_nor_released(
    repo: RuntimeRepository, clock: Clock, max_attempts: int
) -> None:
    """An expired lease has counted the try and said so: what its holder says afterwards is too late, no repetition."""
    await repo.attempts.enqueue("run", attempt_id="a", max_attempts=max_attempts, now=clock.now)
    (lease,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
    (taken,) = await repo.leases.requeue_expired(now=clock.advance(MINUTE))
    for late in (
        repo.attempts.fail(lease, "boom"),
        repo.attempts.fail(lease, "boom", retry_in=MINUTE),
        repo.leases.release(lease),
    ):
        with pytest.raises(LeaseLostError) as lost:
            await late
        assert lost.value.status == taken.status
    assert await repo.attempts.get("a") == taken


async def test_what_was_retried_by_hand_was_not_released(repo: RuntimeRepository) -> None:
    """The try was counted as a failure and its error is kept."""
    await repo.attempts.enqueue("run", attempt_id="a")
    (lease,) = await repo.leases.claim("worker")
    await repo.attempts.fail(lease, "boom")
    again = await repo.attempts.retry("a")
    for late in (repo.leases.release(lease), repo.attempts.fail(lease, "boom")):
        with pytest.raises(LeaseLostError):
            await late
    assert await repo.attempts.get("a") == again


async def test_the_last_try_fails_for_good(repo: RuntimeRepository, clock: Clock) -> None:
    """``max_attempts`` is how often it is tried, whatever the worker asks for."""
    await repo.attempts.enqueue("run", max_attempts=2, now=clock.now)
    (first,) = await repo.leases.claim("worker", now=clock.now)
    await repo.attempts.fail(first, "boom", retry_in=timedelta(0), now=clock.now)
    (second,) = await repo.leases.claim("worker", now=clock.now)
    failed = await repo.attempts.fail(second, "boom", retry_in=timedelta(0), now=clock.now)
    assert (failed.status, failed.attempt_no, failed.retry_at) == (AttemptStatus.FAILED, 2, None)


async def test_a_stale_worker_cannot_finish(repo: RuntimeRepository, clock: Clock) -> None:
    """Whoever lost the lease has lost the right to finish, and learns who has it now."""
    await repo.attempts.enqueue("run", attempt_id="a", now=clock.now)
    (stale,) = await repo.leases.claim("worker-a", ttl=MINUTE, now=clock.now)
    await repo.leases.requeue_expired(now=clock.advance(2 * MINUTE))
    with pytest.raises(LeaseLostError) as caught:
        await repo.attempts.complete(stale, "stale")
    assert (caught.value.status, caught.value.worker_id) == ("queued", None)

    (current,) = await repo.leases.claim("worker-b", ttl=MINUTE, now=clock.now)
    for finish in (repo.attempts.complete(stale, "stale"), repo.attempts.fail(stale, "stale")):
        with pytest.raises(LeaseLostError) as caught:
            await finish
        assert (caught.value.token, caught.value.current, caught.value.worker_id) == (1, 2, "worker-b")
    assert (await repo.attempts.complete(current, "current")).result == "current"
    with pytest.raises(LeaseLostError):
        await repo.attempts.complete(stale, "stale")


async def test_many_are_enqueued_together_in_the_order_of_age(repo: RuntimeRepository, clock: Clock) -> None:
    """Ten thousand in one call; claims take them in the order given, and each is stored as given."""
    ids = await repo.attempts.enqueue_many(
        (NewAttempt("run", payload={"n": number}, priority=number // 5000) for number in range(10_000)), now=clock.now
    )
    assert len(set(ids)) == 10_000
    leases = await repo.leases.claim("worker", limit=3, now=clock.now)
    assert [lease.attempt_id for lease in leases] == ids[5000:5003]
    assert [lease.attempt.payload for lease in leases] == [{"n": number} for number in range(5000, 5003)]
    later = NewAttempt("run", "a", "mail", -1, "ü\0", clock.now + MINUTE, 3)
    assert await repo.attempts.enqueue_many([later], now=clock.now) == ["a"]
    stored = await repo.attempts.get("a")
    assert (stored.queue, stored.priority, stored.payload, stored.max_attempts) == ("mail", -1, "ü\0", 3)
    assert (stored.enqueued_at, stored.retry_at) == (clock.now, clock.now + MINUTE)


async def test_enqueue_many_can_be_repeated(repo: RuntimeRepository) -> None:
    """What is stored already stays as it is by now, and the rest is added; a repeated id is one attempt."""
    first = [NewAttempt("run", "a", payload=1), NewAttempt("run", "b")]
    await repo.attempts.enqueue_many(first)
    (lease,) = await repo.leases.claim("worker")
    done = await repo.attempts.complete(lease, "done")
    assert await repo.attempts.enqueue_many([*first, NewAttempt("run", "c"), first[0]]) == ["a", "b", "c", "a"]
    assert await repo.attempts.get("a") == done
    assert [attempt.attempt_id for attempt in await repo.attempts.list(run_id="run")] == ["a", "b", "c"]
    assert await repo.attempts.enqueue_many([]) == []


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (NewAttempt("other", "a", payload=1), "run_id"),
        (NewAttempt("run", "a", "mail", payload=1), "queue"),
        (NewAttempt("run", "a", payload=2), "payload"),
    ],
)
async def test_all_are_enqueued_or_none(repo: RuntimeRepository, other: NewAttempt, differing: str) -> None:
    """An id that is stored, or given before in the call, with other content leaves the database as it was."""
    same = NewAttempt("run", "a", payload=1)
    with pytest.raises(PayloadMismatchError) as refused:
        await repo.attempts.enqueue_many([NewAttempt("run", "x"), same, other])
    assert refused.value.differing == (differing,)
    assert await repo.attempts.list() == []
    stored = await repo.attempts.enqueue("run", attempt_id="a", payload=1)
    with pytest.raises(PayloadMismatchError) as refused:
        await repo.attempts.enqueue_many([NewAttempt("run", "x"), other, NewAttempt("run", "y")])
    assert refused.value.differing == (differing,)
    assert await repo.attempts.list() == [stored]


async def test_rivals_that_enqueue_the_same_in_opposite_order_both_succeed(factory: Factory) -> None:
    """Locks are taken in one order: nobody is a deadlock's victim, and each id is stored once."""
    new = [NewAttempt("run", f"a{number:03}") for number in range(200)]
    async with factory() as one, factory() as two:
        for _ in range(5):
            await asyncio.gather(one.attempts.enqueue_many(new), two.attempts.enqueue_many(new[::-1]))
        assert len(await one.attempts.list(limit=1000)) == 200


async def test_attempts_are_listed_by_run_status_and_queue(repo: RuntimeRepository) -> None:
    """Each filter, and any of them together; pages follow each other by the last id."""
    for number in range(6):
        await repo.attempts.enqueue(f"run{number % 2}", attempt_id=f"a{number}", queue=f"q{number % 3}")
    leases = await repo.leases.claim("worker", queues=["q0", "q1"], limit=2)
    await repo.attempts.complete_many([(lease, None) for lease in leases])

    async def ids(**filters: Any) -> list[str]:
        return [attempt.attempt_id for attempt in await repo.attempts.list(**filters)]

    assert await ids() == ["a0", "a1", "a2", "a3", "a4", "a5"]
    assert await ids(after="a1", limit=3) == ["a2", "a3", "a4"]
    assert await ids(run_id="run0") == ["a0", "a2", "a4"]
    assert await ids(queue="q1") == ["a1", "a4"]
    assert await ids(status=AttemptStatus.COMPLETED) == ["a0", "a1"]
    assert await ids(status=AttemptStatus.QUEUED, after="a2", limit=2) == ["a3", "a4"]
    assert await ids(status=AttemptStatus.QUEUED, queue="q0") == ["a3"]
    assert await ids(run_id="run1", status=AttemptStatus.QUEUED) == ["a3", "a5"]
    assert await ids(run_id="run1", status=AttemptStatus.QUEUED, queue="q2") == ["a5"]


async def test_what_can_be_dispatched_is_listed_in_the_order_of_claims(repo: RuntimeRepository, clock: Clock) -> None:
    """Priority, then age; what is due is among it, what is not due, held or elsewhere is not."""
    start = clock.now
    for name, priority, delay in (("old", 0, None), ("urgent", 9, None), ("due", 5, 1), ("later", 9, 5)):
        not_before = None if delay is None else start + delay * MINUTE
        await repo.attempts.enqueue(
            "run", attempt_id=name, priority=priority, not_before=not_before, now=clock.advance(timedelta(seconds=1))
        )
    await repo.attempts.enqueue("run", attempt_id="elsewhere", queue="mail", now=start)
    await repo.attempts.enqueue("run", attempt_id="held", now=start)
    assert await repo.leases.claim_attempt("held", "worker", now=start)
    listed = [a.attempt_id for a in await repo.attempts.list_dispatchable(now=start + 2 * MINUTE)]
    assert listed == ["urgent", "due", "old"]
    assert [a.attempt_id for a in await repo.attempts.list_dispatchable(limit=1, now=start)] == ["urgent"]
    claimed = await repo.leases.claim("worker", limit=9, now=start + 2 * MINUTE)
    assert {lease.attempt_id for lease in claimed} == set(listed)


async def test_stats_count_each_queue(repo: RuntimeRepository, clock: Clock) -> None:
    """Ready, delayed and leased; what is due counts as ready, what is final not at all."""
    start = clock.now
    await repo.attempts.enqueue_many([NewAttempt("run", f"a{number}") for number in range(4)], now=start)
    await repo.attempts.enqueue("run", attempt_id="z", queue="mail", not_before=start + MINUTE, now=start)
    one, _ = await repo.leases.claim("worker", limit=2, now=start)
    await repo.attempts.complete(one, now=start)
    assert await repo.attempts.stats(now=start + timedelta(seconds=30)) == [
        QueueStats("default", ready=2, delayed=0, leased=1, oldest_age=timedelta(seconds=30)),
        QueueStats("mail", ready=0, delayed=1, leased=0, oldest_age=None),
    ]
    assert (await repo.attempts.stats(now=start + MINUTE))[1] == QueueStats("mail", 1, 0, 0, MINUTE)


async def test_work_begins_once(repo: RuntimeRepository, clock: Clock) -> None:
    """The first start of a try is remembered; the next try has its own, and a lost lease none."""
    await repo.attempts.enqueue("run", attempt_id="a", now=clock.now)
    (lease,) = await repo.leases.claim("worker", now=clock.now)
    started = await repo.attempts.start(lease, now=clock.now)
    assert (started.status, started.started_at) == (AttemptStatus.RUNNING, clock.now)
    assert await repo.attempts.start(lease, now=clock.now + MINUTE) == started
    await repo.attempts.fail(lease, "no", retry_in=timedelta(0), now=clock.now)
    with pytest.raises(LeaseLostError):
        await repo.attempts.start(lease)
    (again,) = await repo.leases.claim("worker", now=clock.advance(MINUTE))
    assert (await repo.attempts.start(again, now=clock.now)).started_at == clock.now


async def test_many_are_completed_and_each_lease_is_answered(repo: RuntimeRepository, clock: Clock) -> None:
    """The held ones are finished with their results; a lost one is an answer, and changes nothing."""
    await repo.attempts.enqueue_many([NewAttempt("run", f"a{number}") for number in range(4)], now=clock.now)
    a0, a1, a2, a3 = await repo.leases.claim("worker", limit=4, ttl=MINUTE, now=clock.now)
    await repo.leases.release(a1)
    (second,) = await repo.leases.claim("rival", now=clock.now)
    await repo.attempts.cancel("a2")
    results: list[tuple[Lease, Any]] = [(a3, {"n": 3}), (a1, "stale"), (a2, "late"), (a0, None), (a3, "twice")]
    for _ in range(2):
        assert await repo.attempts.complete_many(results, now=clock.now) == [True, False, False, True, True]
        assert await repo.leases.list() == [second]
    assert (await repo.attempts.get("a3")).result == {"n": 3}
    assert (await repo.attempts.get("a0")).status is AttemptStatus.COMPLETED
    assert (await repo.attempts.get("a1")).status is AttemptStatus.LEASED
    assert (await repo.attempts.get("a2")).result is None
    assert await repo.attempts.complete_many([]) == []


async def test_of_two_leases_on_one_attempt_the_current_one_holds(repo: RuntimeRepository) -> None:
    """One call may be given both, in either order: the stale one's result is not the one that counts."""
    for number in range(2):
        await repo.attempts.enqueue("run")
        (stale,) = await repo.leases.claim("worker")
        await repo.leases.release(stale)
        (current,) = await repo.leases.claim("worker")
        pairs = [(stale, "stale"), (current, "current")][:: 1 - 2 * number]
        for _ in range(2):
            assert await repo.attempts.complete_many(pairs) == [lease is current for lease, _ in pairs]
        assert (await repo.attempts.get(current.attempt_id)).result == "current"


async def test_a_policy_says_when_to_try_again(repo: RuntimeRepository, clock: Clock) -> None:
    """Each failure waits longer, until the policy gives up before the attempt's own limit."""
    policy = RetryPolicy(base=MINUTE, factor=3, jitter=0, max_attempts=3)
    await repo.attempts.enqueue("run", attempt_id="a", now=clock.now)
    for delay in (MINUTE, 3 * MINUTE):
        (lease,) = await repo.leases.claim("worker", now=clock.now)
        failed = await repo.attempts.fail(lease, "no", retry_in=policy, now=clock.now)
        assert (failed.status, failed.retry_at) == (AttemptStatus.RETRY_BACKOFF, clock.now + delay)
        clock.advance(delay)
    (lease,) = await repo.leases.claim("worker", now=clock.now)
    failed = await repo.attempts.fail(lease, "no", retry_in=policy, now=clock.now)
    assert (failed.status, failed.attempt_no) == (AttemptStatus.FAILED, 3)


@pytest.mark.parametrize("held", [False, True])
async def test_a_cancelled_attempt_is_over(repo: RuntimeRepository, clock: Clock, held: bool) -> None:  # noqa: FBT001
    """Nobody can claim it; who holds it learns at its next write that it was cancelled."""
    await repo.attempts.enqueue("run", attempt_id="a", now=clock.now)
    lease = await repo.leases.claim_attempt("a", "worker") if held else None
    cancelled = await repo.attempts.cancel("a", now=clock.now)
    assert (cancelled.status, cancelled.finished_at) == (AttemptStatus.CANCELLED, clock.now)
    assert await repo.attempts.cancel("a", now=clock.advance(MINUTE)) == cancelled
    assert (await repo.leases.list(), await repo.leases.claim("worker")) == ([], [])
    for write in (repo.leases.heartbeat, repo.attempts.start, repo.attempts.complete, repo.leases.release):
        if lease is not None:
            with pytest.raises(LeaseLostError) as lost:
                await write(lease)
            assert (lost.value.status, lost.value.worker_id) == ("cancelled", None)
    assert await repo.attempts.get("a") == cancelled


async def test_what_is_final_is_neither_cancelled_nor_tried_again(repo: RuntimeRepository) -> None:
    """Only a failed one can be tried again; each refusal names the status."""
    await repo.attempts.enqueue("run", attempt_id="a")
    (lease,) = await repo.leases.claim("worker")
    done = await repo.attempts.complete(lease)
    for verb in (repo.attempts.cancel, repo.attempts.retry):
        with pytest.raises(InvalidTransitionError, match="completed"):
            await verb("a")
        with pytest.raises(NotFoundError):
            await verb("nobody")
    assert await repo.attempts.get("a") == done
    await repo.attempts.enqueue("run", attempt_id="b")
    await repo.attempts.cancel("b")
    with pytest.raises(InvalidTransitionError, match="cancelled"):
        await repo.attempts.retry("b")


async def test_a_failed_attempt_gets_one_more_try_by_hand(repo: RuntimeRepository) -> None:
    """Also when its tries were used up; to ask twice is to ask once, and the same token can't finish the new try."""
    await repo.attempts.enqueue("run", attempt_id="a", max_attempts=1)
    (lease,) = await repo.leases.claim("worker")
    await repo.attempts.fail(lease, "no", retry_in=MINUTE)
    with pytest.raises(InvalidTransitionError, match="failed"):
        await repo.attempts.cancel("a")
    again = await repo.attempts.retry("a")
    assert (again.status, again.attempt_no, again.error, again.finished_at) == (AttemptStatus.QUEUED, 1, "no", None)
    assert await repo.attempts.retry("a") == again
    with pytest.raises(LeaseLostError):
        await repo.attempts.complete(lease)
    (lease,) = await repo.leases.claim("worker")
    assert (await repo.attempts.retry("a")).status is AttemptStatus.LEASED
    assert (await repo.attempts.fail(lease, "no", retry_in=MINUTE)).status is AttemptStatus.FAILED


async def test_what_ended_long_ago_is_pruned_in_batches(repo: RuntimeRepository, clock: Clock) -> None:
    """The oldest first, at most so many; what is newer or not final stays."""
    for number in range(5):
        await repo.attempts.enqueue("run", attempt_id=f"a{number}", now=clock.now)
        await repo.attempts.cancel(f"a{number}", now=clock.advance(MINUTE))
    await repo.attempts.enqueue("run", attempt_id="live", now=clock.now)
    prune = partial(repo.attempts.prune, older_than=2 * MINUTE, now=clock.now)
    assert [await prune(limit=2), await prune(limit=2), await prune(limit=2)] == [2, 1, 0]
    assert [a.attempt_id for a in await repo.attempts.list()] == ["a3", "a4", "live"]


async def test_what_was_said_and_asked_in_an_attempt_goes_with_it(repo: RuntimeRepository, clock: Clock) -> None:
    """Its reports and its questions, a pending one too; those of others stay, and the id begins anew."""
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ("a", "b", "c")], now=clock.now)
    for lease in await repo.leases.claim("worker", limit=3, now=clock.now):
        name = lease.attempt_id
        await repo.step_reports.record(lease, "pay", "done", "t")
        await repo.interrupts.create("thread", "run", name, "why?", interrupt_id=f"{name}1")
        await repo.interrupts.create("thread", "run", name, "how?", interrupt_id=f"{name}2")
        await repo.interrupts.resume(f"{name}1", "so")
        if name != "c":
            await repo.attempts.complete(lease, now=clock.now - MINUTE if name == "a" else clock.now)
    assert await repo.attempts.prune(older_than=timedelta(0), limit=1, now=clock.now) == 1
    assert [attempt.attempt_id for attempt in await repo.attempts.list()] == ["b", "c"]
    assert [interrupt.interrupt_id for interrupt in await repo.interrupts.list()] == ["b1", "b2", "c1", "c2"]
    assert [len(await repo.step_reports.list(name)) for name in ("a", "b", "c")] == [0, 1, 1]
    await repo.attempts.enqueue("run", attempt_id="a")
    lease = await repo.leases.claim_attempt("a", "worker")  # type: ignore[assignment]
    assert not (await repo.step_reports.record(lease, "pay", "done", "t")).is_duplicate


async def test_headers_travel_beside_the_payload(repo: RuntimeRepository) -> None:
    """They are stored with the attempt and handed out with it, and are no part of what makes it the same."""
    headers = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "n": [1, None]}
    attempt = await repo.attempts.enqueue("run", attempt_id="a", payload=1, headers=headers)
    assert attempt.headers == headers
    again = await repo.attempts.enqueue("run", attempt_id="a", payload=1, headers="others")
    assert again == attempt
    await repo.attempts.enqueue_many(
        [NewAttempt("run", "a", payload=1), NewAttempt("run", "b", headers=headers), NewAttempt("run", "c")]
    )
    assert [found.headers for found in await repo.attempts.list()] == [headers, headers, None]
    assert {lease.attempt_id: lease.attempt.headers for lease in await repo.leases.claim("worker", limit=3)} == {
        "a": headers,
        "b": headers,
        "c": None,
    }
    [new] = await repo.attempts.enqueue_many([NewAttempt("run", headers={"made": "id"})])
    assert (await repo.attempts.get(new)).headers == {"made": "id"}
