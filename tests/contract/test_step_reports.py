"""Step reports: each stored once, by whoever holds the attempt."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from runtime_repo import (
    Lease,
    LeaseLostError,
    NotFoundError,
    PayloadMismatchError,
    RuntimeRepository,
    RuntimeTransaction,
    StepReport,
)
from tests.contract.conftest import Clock, Factory

MINUTE = timedelta(minutes=1)


async def claimed(repo: RuntimeRepository, attempt_id: str = "a", **options: Any) -> Lease:
    """A lease on an attempt, which is enqueued if it is not there."""
    await repo.attempts.enqueue("run", attempt_id=attempt_id)
    lease = await repo.leases.claim_attempt(attempt_id, "worker", **options)
    assert lease is not None
    return lease


async def taken_by_another(repo: RuntimeRepository | RuntimeTransaction, lease: Lease) -> Lease:
    """Take the attempt from whoever holds it, as if its worker had fallen silent."""
    await repo.leases.requeue_expired(now=lease.expires_at)
    rival = await repo.leases.claim_attempt(lease.attempt_id, "rival")
    assert rival is not None
    return rival


async def has_to_wait(call: "asyncio.Task[Any]", transaction: RuntimeTransaction) -> None:
    """Go on when the call waits for the transaction. PostgreSQL says when that is, on SQLite the call gets time."""
    if hasattr(transaction.connection, "fetchval"):
        query = "select exists (select 1 from pg_stat_activity where pg_backend_pid() = any (pg_blocking_pids(pid)))"
        async with asyncio.timeout(10):
            while not await transaction.connection.fetchval(query):
                assert not call.done(), call
    else:
        await asyncio.wait([call], timeout=0.2)
        assert not call.done(), call


async def test_a_report_is_stored_as_it_was_made(repo: RuntimeRepository, clock: Clock) -> None:
    """What comes back is what went in, with the worker and the token under which it was reported."""
    lease = await claimed(repo)
    payload = {"rows": [1, 2.5, None], "name": "ü\0"}
    report = await repo.step_reports.record(lease, "download", "done", "t1", payload, now=clock.now)
    assert report == StepReport(
        report.report_id, "a", "download", "done", "t1", payload, "worker", lease.version, clock.now
    )
    assert not report.is_duplicate
    assert await repo.step_reports.list("a") == [report]
    assert (await repo.step_reports.record(lease, "download", "done", "t2")).payload is None


async def test_the_same_report_again_is_a_duplicate(repo: RuntimeRepository, clock: Clock) -> None:
    """A repeated call stores nothing, and says so; equal JSON is the same payload in whatever order."""
    lease = await claimed(repo)
    first = await repo.step_reports.record(lease, "x", "done", "t", {"a": 1, "b": (2,)}, now=clock.now)
    again = await repo.step_reports.record(lease, "x", "done", "t", {"b": [2], "a": 1}, now=clock.advance(MINUTE))
    assert (again, again.is_duplicate) == (first, True)
    assert await repo.step_reports.list("a") == [first]
    # Numbers as keys are stored as text, in another order.
    for _ in range(2):
        await repo.step_reports.record(lease, "x", "done", "numbers", {2: "x", 10: "y"})


async def test_a_dedupe_token_is_the_attempts_own(repo: RuntimeRepository) -> None:
    """Another attempt may use the same one for something else."""
    for name in ("a", "b"):
        report = await repo.step_reports.record(await claimed(repo, name), "x", "done", "t", name)
        assert not report.is_duplicate
        assert await repo.step_reports.list(name) == [report]


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"action_id": "other"}, ("action_id",)),
        ({"status": "other"}, ("status",)),
        ({"payload": {"n": 2}}, ("payload",)),
        ({"payload": None}, ("payload",)),
        ({"payload": {"n": True}}, ("payload",)),
        ({"payload": 0, "action_id": "other", "status": "other"}, ("action_id", "status", "payload")),
    ],
)
async def test_the_same_token_with_other_content_is_refused(
    repo: RuntimeRepository, change: dict[str, Any], differing: tuple[str, ...]
) -> None:
    """Two different reports under one token are a mistake; what is stored stays, also after the attempt has ended."""
    lease = await claimed(repo)
    given: dict[str, Any] = {"action_id": "x", "status": "done", "dedupe_token": "t", "payload": {"n": 1}}
    stored = await repo.step_reports.record(lease, **given)
    for _ in range(2):
        with pytest.raises(PayloadMismatchError, match="'t'") as refused:
            await repo.step_reports.record(lease, **(given | change))
        assert (refused.value.what, refused.value.differing) == ("step report", differing)
        assert await repo.step_reports.list("a") == [stored]
        await repo.attempts.complete(lease)


async def test_a_report_is_accepted_as_long_as_a_result_would_be(repo: RuntimeRepository, clock: Clock) -> None:
    """A lease that has merely run out does not throw a report away."""
    lease = await claimed(repo, ttl=MINUTE, now=clock.now)
    await repo.attempts.start(lease)
    report = await repo.step_reports.record(lease, "x", "done", "t", now=clock.advance(60 * MINUTE))
    assert report.created_at == clock.now


@pytest.mark.parametrize("ending", ["complete", "fail", "release", "cancel", "requeue", "reclaim"])
async def test_whoever_lost_the_lease_reports_nothing_new_but_may_repeat(repo: RuntimeRepository, ending: str) -> None:
    """However the lease ended: a new report is refused, and one that was stored under it is returned as a duplicate."""
    lease = await claimed(repo)
    before = await repo.step_reports.record(lease, "x", "done", "before", 1)
    match ending:
        case "complete":
            await repo.attempts.complete(lease)
        case "fail":
            await repo.attempts.fail(lease, "boom")
        case "release":
            await repo.leases.release(lease)
        case "cancel":
            await repo.attempts.cancel("a")
        case "requeue":
            await repo.leases.requeue_expired(now=lease.expires_at)
        case "reclaim":
            await taken_by_another(repo, lease)
    with pytest.raises(LeaseLostError) as lost:
        await repo.step_reports.record(lease, "x", "done", "after", 1)
    assert (lost.value.token, lost.value.status) == (lease.version, (await repo.attempts.get("a")).status)
    again = await repo.step_reports.record(lease, "x", "done", "before", 1)
    assert (again, again.is_duplicate) == (before, True)
    assert await repo.step_reports.list("a") == [before]


async def test_a_later_try_finds_what_an_earlier_one_did(repo: RuntimeRepository) -> None:
    """The holder gets the earlier report as a duplicate; the stale worker gets none of the holder's."""
    stale = await claimed(repo)
    first = await repo.step_reports.record(stale, "x", "done", "first")
    current = await taken_by_another(repo, stale)
    again = await repo.step_reports.record(current, "x", "done", "first")
    assert (again, again.is_duplicate, again.worker_id) == (first, True, "worker")
    second = await repo.step_reports.record(current, "x", "done", "second")
    for content in ("done", "other"):
        with pytest.raises(LeaseLostError) as lost:
            await repo.step_reports.record(stale, "x", content, "second")
        assert (lost.value.current, lost.value.worker_id) == (current.version, "rival")
    assert await repo.step_reports.list("a") == [first, second]


async def test_a_stale_report_that_waits_behind_a_requeue_and_a_claim_is_refused(factory: Factory) -> None:
    """What it waited for is looked at again: the attempt is another's by then, although it was not when it asked."""
    async with factory() as repo, factory() as other:
        stale = await claimed(repo)
        async with other.transaction() as transaction:
            current = await taken_by_another(transaction, stale)
            late = asyncio.create_task(repo.step_reports.record(stale, "x", "done", "t"))
            await has_to_wait(late, transaction)
        with pytest.raises(LeaseLostError) as lost:
            await late
        assert (lost.value.token, lost.value.current) == (stale.version, current.version)
        assert await repo.step_reports.list("a") == []


async def test_a_report_that_waits_behind_a_transaction_that_fails_is_stored(factory: Factory) -> None:
    """The requeue did not happen, so the lease was never lost."""
    async with factory() as repo, factory() as other:
        lease = await claimed(repo)
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the whole block fails
            async with other.transaction() as transaction:
                await taken_by_another(transaction, lease)
                late = asyncio.create_task(repo.step_reports.record(lease, "x", "done", "t"))
                await has_to_wait(late, transaction)
                raise ZeroDivisionError
        assert [await late] == await repo.step_reports.list("a")


async def test_reports_commit_in_the_order_of_their_numbers(factory: Factory) -> None:
    """Whoever has read a page misses none: a later report of the attempt waits for one that is not committed yet."""
    async with factory() as repo, factory() as other:
        lease = await claimed(repo)
        async with other.transaction() as transaction:
            first = await transaction.step_reports.record(lease, "x", "done", "first")
            second = asyncio.create_task(repo.step_reports.record(lease, "x", "done", "second"))
            await has_to_wait(second, transaction)
        assert [first, await second] == await repo.step_reports.list("a")
        assert first.report_id < second.result().report_id


async def test_two_transactions_that_report_and_finish_are_no_deadlock(factory: Factory) -> None:
    """The report takes the lock that finishing needs, so whoever comes second waits from the start."""
    async with factory() as one, factory() as two:
        for number in range(5):
            lease = await claimed(one, f"a{number}")

            async def finish(repo: RuntimeRepository, lease: Lease = lease) -> None:
                async with repo.transaction() as transaction:
                    await transaction.step_reports.record(lease, "x", "done", "t")
                    await transaction.attempts.complete(lease)

            await asyncio.gather(finish(one), finish(two))
            assert len(await one.step_reports.list(lease.attempt_id)) == 1


async def test_of_twenty_simultaneous_reports_one_is_stored(factory: Factory) -> None:
    """The others are its duplicates."""
    async with factory() as one, factory() as two:
        lease = await claimed(one)
        reports = await asyncio.gather(
            *(repo.step_reports.record(lease, "x", "done", "t", 1) for repo in (one, two) for _ in range(10))
        )
        assert len([report for report in reports if not report.is_duplicate]) == 1
        assert await two.step_reports.list("a") == [reports[0]]
        assert reports == 20 * reports[:1]


async def test_a_report_and_a_result_are_stored_together_or_not(repo: RuntimeRepository) -> None:
    """In one transaction, as every verb."""
    lease = await claimed(repo)
    with pytest.raises(PayloadMismatchError):  # noqa: PT012 - the whole block fails
        async with repo.transaction() as transaction:
            await transaction.step_reports.record(lease, "x", "done", "t", 1)
            await transaction.step_reports.record(lease, "x", "done", "t", 2)
    assert await repo.step_reports.list("a") == []
    async with repo.transaction() as transaction:
        await transaction.step_reports.record(lease, "x", "done", "t", 1)
        await transaction.attempts.complete(lease)
        assert (await transaction.step_reports.record(lease, "x", "done", "t", 1)).is_duplicate
    assert len(await repo.step_reports.list("a")) == 1


async def test_reports_are_listed_by_pages_in_the_order_of_creation(repo: RuntimeRepository, clock: Clock) -> None:
    """Every report of the attempt is on exactly one page; the order is that of storing, whatever a clock says."""
    leases = [await claimed(repo, name) for name in ("a", "b")]
    for number in range(7):
        for lease in leases:
            now = clock.now - number * MINUTE
            await repo.step_reports.record(lease, "x", "done", f"t{-number}", number, now=now)
    seen: list[StepReport] = []
    while page := await repo.step_reports.list("a", after=seen[-1].report_id if seen else 0, limit=3):
        assert len(page) <= 3
        seen += page
    assert [report.payload for report in seen] == list(range(7))
    assert await repo.step_reports.list("a", after=2**63 - 1) == []
    assert await repo.step_reports.list("nobody") == []


async def test_a_report_on_an_attempt_that_is_gone_is_refused(repo: RuntimeRepository) -> None:
    """It was pruned, and its reports with it: the same id enqueued again must not find its steps done."""
    lease = await claimed(repo)
    await repo.step_reports.record(lease, "x", "done", "t")
    done = await repo.attempts.complete(lease)
    assert done.finished_at is not None
    assert await repo.attempts.prune(older_than=MINUTE, now=done.finished_at + 2 * MINUTE) == 1
    for token in ("t", "new"):
        with pytest.raises(NotFoundError, match="attempt 'a'"):
            await repo.step_reports.record(lease, "x", "done", token)
    assert await repo.step_reports.list("a") == []
    again = await claimed(repo)
    assert not (await repo.step_reports.record(again, "x", "done", "t")).is_duplicate
