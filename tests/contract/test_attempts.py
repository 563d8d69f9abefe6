"""Attempts: enqueued once, finished once."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from runtime_repo import (
    AttemptStatus,
    ConfigurationError,
    LeaseLostError,
    NotFoundError,
    PayloadMismatchError,
    RuntimeRepository,
)
from tests.contract.conftest import Clock

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
    while (second := await repo.attempts.enqueue("run")).enqueued_at == first.enqueued_at:
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


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"run_id": ""}, "run_id"),
        ({"run_id": "x" * 513}, "513 characters"),
        ({"attempt_id": "a\0b"}, "attempt_id"),
        ({"queue": ""}, "queue"),
        ({"priority": 2**31}, "priority"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"payload": {1, 2}}, "payload"),
        ({"payload": float("nan")}, "payload"),
        ({"payload": "x" * 17_000_000}, "reference"),
    ],
)
async def test_bad_input_is_refused_before_anything_is_written(
    repo: RuntimeRepository, arguments: dict[str, Any], word: str
) -> None:
    """The error names the argument, and nothing is stored."""
    with pytest.raises(ConfigurationError, match=word):
        await repo.attempts.enqueue(**({"run_id": "run"} | arguments))
    assert await repo.attempts.list(run_id="run") == []


async def test_a_naive_datetime_is_refused(repo: RuntimeRepository, clock: Clock) -> None:
    """A time without a zone means something else on every machine."""
    with pytest.raises(ConfigurationError, match="time zone"):
        await repo.attempts.enqueue("run", not_before=clock.now.replace(tzinfo=None))
