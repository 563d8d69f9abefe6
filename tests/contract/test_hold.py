"""Holding a lease: kept while the block runs, and the block ends when the lease does."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

import anyio
import pytest

from runtime_repo import (
    AttemptStatus,
    ConfigurationError,
    DatabaseUnavailableError,
    Lease,
    LeaseLostError,
    RuntimeRepository,
)
from runtime_repo.leases import Leases
from tests.contract.conftest import Factory, eventually

TTL = timedelta(seconds=0.5)
OFTEN = timedelta(milliseconds=5)
LONG = timedelta(minutes=1)


async def claimed(repo: RuntimeRepository, ttl: timedelta = LONG) -> Lease:
    """A lease on an attempt of its own."""
    attempt = await repo.attempts.enqueue("run")
    lease = await repo.leases.claim_attempt(attempt.attempt_id, "worker", ttl=ttl)
    assert lease is not None
    return lease


async def for_ever() -> None:
    """Work that never ends by itself."""
    await asyncio.Event().wait()


async def renewed(repo: RuntimeRepository, lease: Lease) -> None:
    """Wait until the lease, the only one, has been renewed after the instant at which it was to expire."""
    deadline = time.monotonic() + 10
    while (await repo.leases.list())[0].heartbeat_at < lease.expires_at:
        assert time.monotonic() < deadline


async def left_alone(tasks: "set[asyncio.Task[object]]") -> None:
    """Wait until only these tasks are left; asyncpg takes a moment to give back a connection that was cancelled."""
    if rest := asyncio.all_tasks() - tasks:
        _, pending = await asyncio.wait(rest, timeout=10)
        assert not pending


async def test_a_lease_is_kept_beyond_its_length(factory: Factory) -> None:
    """By the database's clock the block outlives the first ttl, and nobody can requeue the attempt."""
    async with asyncio.timeout(20), factory() as repo, factory() as other:
        lease = await claimed(repo, TTL)
        async with repo.leases.hold(lease, ttl=TTL):
            while (await other.leases.list())[0].heartbeat_at < lease.expires_at:
                assert await other.leases.requeue_expired() == []
        await repo.attempts.complete(lease)


async def test_a_lease_that_was_taken_for_less_is_renewed_in_time(repo: RuntimeRepository) -> None:
    """Claimed for half a second, and held with heartbeats ten seconds apart: the first comes before its end."""
    lease = await claimed(repo, TTL)
    async with asyncio.timeout(20), repo.leases.hold(lease):
        while (await repo.leases.list())[0].heartbeat_at == lease.heartbeat_at:
            pass
        await asyncio.sleep(TTL.total_seconds())
    await repo.attempts.complete(lease)


@pytest.mark.parametrize("read", [False, True])
async def test_the_block_ends_when_the_lease_is_lost(factory: Factory, read: bool) -> None:  # noqa: FBT001
    """At the next heartbeat, with the reason; also of a lease that was read and not claimed here."""
    async with asyncio.timeout(20), factory() as repo, factory() as other:
        lease = await claimed(repo)
        if read:
            (lease,) = await repo.leases.list()
        reached = False
        with pytest.raises(LeaseLostError) as lost:  # noqa: PT012 - the whole block is cancelled
            async with repo.leases.hold(lease, ttl=LONG, every=OFTEN):
                await other.attempts.cancel(lease.attempt_id)
                reached = True
                await for_ever()
        assert reached
        assert (lost.value.status, lost.value.worker_id) == ("cancelled", None)


async def test_transactions_of_the_same_process_end_no_lease(repo: RuntimeRepository) -> None:
    """
    However many there are, one after the other, and although each lasts for more than half of the ttl.

    On SQLite a heartbeat waits for the one that is open: what it then proves counts from its turn, not from its call.
    """
    ttl = timedelta(seconds=1.2)
    lease = await claimed(repo, ttl)

    async def occupy() -> None:
        async with repo.transaction() as transaction:
            await transaction.attempts.find(lease.attempt_id)
            await asyncio.sleep(0.8 * ttl.total_seconds())

    async with asyncio.timeout(20), repo.leases.hold(lease, ttl=ttl):
        await asyncio.gather(*(asyncio.create_task(occupy()) for _ in range(3)))
    await repo.attempts.complete(lease)


async def test_a_lease_that_is_lost_already_is_not_held(repo: RuntimeRepository) -> None:
    """One that was read is proved before the block begins."""
    lease = await claimed(repo)
    (read,) = await repo.leases.list()
    await repo.leases.release(lease)
    with pytest.raises(LeaseLostError):
        async with repo.leases.hold(read):
            pytest.fail("the block began")


async def test_the_block_ends_when_the_lease_cannot_be_proved(factory: Factory) -> None:
    """
    Somebody blocks the database for longer than the ttl: the block is cancelled before the lease can be another's.

    The blocker is a transaction that has written the lease, which every heartbeat has to wait for.
    """
    async with asyncio.timeout(20), factory() as repo, factory() as other:
        lease = await claimed(repo, TTL)
        before = time.monotonic()
        async with other.transaction() as blocker:
            await blocker.leases.heartbeat(lease, ttl=TTL)
            with pytest.raises(LeaseLostError, match="can no longer be proved"):
                async with repo.leases.hold(lease, ttl=TTL, every=OFTEN):
                    await for_ever()
            assert lease.asked_at is not None
            # Not before it had to, and counted from when the claim was sent, not from when it was answered.
            assert lease.asked_at + TTL.total_seconds() <= time.monotonic() < before + TTL.total_seconds() + 0.25


async def failed_and_promoted(repo: RuntimeRepository, lease: Lease) -> None:
    """Try it again at once; a claim makes it ready and takes another."""
    await repo.attempts.fail(lease, "no", retry_in=timedelta(0))
    await repo.attempts.enqueue("run", priority=1)
    (other,) = await repo.leases.claim("other")
    await repo.attempts.complete(other)


ENDS: dict[str, tuple[Callable[[RuntimeRepository, Lease], Awaitable[object]], AttemptStatus]] = {
    "complete": (lambda repo, lease: repo.attempts.complete(lease, "done"), AttemptStatus.COMPLETED),
    "fail": (lambda repo, lease: repo.attempts.fail(lease, "no"), AttemptStatus.FAILED),
    "retry": (lambda repo, lease: repo.attempts.fail(lease, "no", retry_in=LONG), AttemptStatus.RETRY_BACKOFF),
    "retry at once": (failed_and_promoted, AttemptStatus.QUEUED),
    "release": (lambda repo, lease: repo.leases.release(lease), AttemptStatus.QUEUED),
}


@pytest.mark.parametrize("end", ENDS)
async def test_a_block_that_ends_its_own_lease_goes_on(repo: RuntimeRepository, end: str) -> None:
    """However many heartbeats are in flight: to find the lease gone is then no loss, and nothing brings it back."""
    verb, status = ENDS[end]
    tasks = asyncio.all_tasks()
    async with asyncio.timeout(30):
        for _ in range(10):
            lease = await claimed(repo)
            async with repo.leases.hold(lease, ttl=LONG, every=timedelta(milliseconds=1)):
                await verb(repo, lease)
                for _ in range(10):
                    assert await repo.leases.list() == []
            assert (await repo.attempts.get(lease.attempt_id)).status is status
            if status is AttemptStatus.QUEUED:
                await repo.attempts.cancel(lease.attempt_id)
            await left_alone(tasks)


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        BaseExceptionGroup("two", [SystemExit(3)]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_of_the_block_comes_out_as_it_is(repo: RuntimeRepository, error: BaseException) -> None:
    """In no exception group that it had not; the lease is still the holder's."""
    lease = await claimed(repo)
    with pytest.raises(type(error)) as raised:
        async with repo.leases.hold(lease):
            raise error
    assert raised.value is error
    await repo.attempts.fail(lease, "no")


async def test_a_cancelled_block_is_cancelled(repo: RuntimeRepository) -> None:
    """The caller's cancellation goes through, and no heartbeat stays behind."""
    lease = await claimed(repo)
    tasks = asyncio.all_tasks()
    reached = asyncio.Event()

    async def block() -> None:
        async with repo.leases.hold(lease, every=OFTEN):
            reached.set()
            await for_ever()

    task = asyncio.ensure_future(block())
    await reached.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await left_alone(tasks)
    await repo.attempts.complete(lease)


async def test_a_heartbeat_must_be_more_frequent_than_the_lease_is_long(repo: RuntimeRepository) -> None:
    """Otherwise the lease would run out in between."""
    lease = await claimed(repo)
    for every in (TTL, LONG, timedelta(0)):
        with pytest.raises(ConfigurationError, match="every"):
            async with repo.leases.hold(lease, ttl=TTL, every=every):
                pytest.fail("the block began")


def unanswered(monkeypatch: pytest.MonkeyPatch, clean_up: float = 1.5) -> list[float]:
    """From now on no heartbeat is answered, and each takes its time to end when cancelled: when they were sent."""
    sent: list[float] = []

    async def heartbeat(*_arguments: object, **_options: object) -> None:
        sent.append(time.monotonic())
        try:
            await for_ever()
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(clean_up)

    monkeypatch.setattr(Leases, "heartbeat", heartbeat)
    return sent


async def test_no_call_that_hangs_keeps_the_block(repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cancelled when the proof runs out, whatever its heartbeats do; and nobody waits for long until they end."""
    lease = await claimed(repo, TTL)
    assert lease.asked_at is not None
    unanswered(monkeypatch)
    cancelled_at = 0.0
    with pytest.raises(LeaseLostError, match="unknown") as lost:  # noqa: PT012 - the whole block is cancelled
        async with repo.leases.hold(lease, ttl=TTL):
            try:
                await for_ever()
            finally:
                cancelled_at = time.monotonic()
    left_at = time.monotonic()
    proved_until = lease.asked_at + TTL.total_seconds()
    assert proved_until <= cancelled_at < proved_until + 0.3
    assert left_at < cancelled_at + 1
    assert (lost.value.current, lost.value.status, lost.value.worker_id) == (None, None, None)


async def test_one_silent_call_does_not_eat_the_whole_ttl(
    repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is tried beside it, before the first has ended, and it may succeed."""
    lease = await claimed(repo, 2 * TTL)
    with monkeypatch.context() as silent:
        sent = unanswered(silent)
        async with asyncio.timeout(10), repo.leases.hold(lease, ttl=2 * TTL):
            await eventually(lambda: sent)
            silent.undo()
            await renewed(repo, lease)
        assert len(sent) == 1
    await repo.attempts.complete(lease)


async def test_an_outage_is_told_once(
    repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When it begins, and when it ends; however many heartbeats fail in it."""
    lease = await claimed(repo)
    with monkeypatch.context() as away:
        tries = 0

        async def heartbeat(*_arguments: object, **_options: object) -> None:
            nonlocal tries
            tries += 1
            raise DatabaseUnavailableError("the database is away")

        away.setattr(Leases, "heartbeat", heartbeat)
        async with asyncio.timeout(10), repo.leases.hold(lease, ttl=LONG, every=OFTEN):
            await eventually(lambda: tries > 10)
            assert len(caplog.records) == 1
            away.undo()
            await eventually(lambda: len(caplog.records) == 2)
    begin, end = (record.getMessage() for record in caplog.records)
    assert "cannot renew a lease" in begin
    assert "the database is away" in begin
    assert "can go on" in end


async def test_a_block_that_has_ended_its_lease_needs_no_database(
    repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on beyond the lease's time, also while a heartbeat hangs that was sent before; nothing is asked for."""
    lease = await claimed(repo, TTL)
    sent = unanswered(monkeypatch)
    async with asyncio.timeout(10), repo.leases.hold(lease, ttl=TTL, every=OFTEN):
        await eventually(lambda: sent)
        async with repo.transaction() as transaction:
            await transaction.leases.release(lease)
        before = len(sent)
        await asyncio.sleep(1.2 * TTL.total_seconds())
    assert len(sent) == before


async def test_what_is_rolled_back_has_ended_nothing(repo: RuntimeRepository) -> None:
    """A transaction that completed the attempt and failed: the lease is kept as before, beyond its time."""
    lease = await claimed(repo, TTL)
    async with asyncio.timeout(10), repo.leases.hold(lease, ttl=TTL):
        with contextlib.suppress(ZeroDivisionError):
            async with repo.transaction() as transaction:
                await transaction.attempts.complete(lease)
                raise ZeroDivisionError
        await renewed(repo, lease)
    await repo.attempts.complete(lease)


async def test_a_block_whose_lease_went_on_to_another_is_not_disturbed(factory: Factory) -> None:
    """It released it, and a rival claimed it at once: the row says nothing of the release any more, but we know."""
    async with asyncio.timeout(10), factory() as repo, factory() as other:
        lease = await claimed(repo)
        async with repo.leases.hold(lease, every=OFTEN):
            await repo.leases.release(lease)
            assert await other.leases.claim_attempt(lease.attempt_id, "rival")
            await asyncio.sleep(0.1)


async def test_a_lease_may_be_held_twice(repo: RuntimeRepository) -> None:
    """Such as by a worker and by its handler: when the inner block has ended the outer one still knows."""
    lease = await claimed(repo, TTL)
    async with asyncio.timeout(10), repo.leases.hold(lease, ttl=TTL, every=OFTEN):
        async with repo.leases.hold(lease, ttl=TTL, every=OFTEN):
            pass
        await repo.leases.release(lease)
        assert await repo.leases.claim_attempt(lease.attempt_id, "rival")
        await asyncio.sleep(1.2 * TTL.total_seconds())


async def test_a_transaction_holds_no_lease(repo: RuntimeRepository) -> None:
    """Its heartbeats would be seen by nobody until it ends: refused before the block begins."""
    lease = await claimed(repo)
    async with repo.transaction() as transaction:
        with pytest.raises(ConfigurationError, match="hold"):
            async with transaction.leases.hold(lease):
                pytest.fail("the block began")


async def test_a_coroutine_that_is_closed_awaits_nothing(repo: RuntimeRepository) -> None:
    """As by the end of an event loop that has not waited for it; to await then is an error."""
    lease = await claimed(repo)
    reached = asyncio.Event()

    async def block() -> None:
        async with repo.leases.hold(lease):
            reached.set()
            await for_ever()

    coroutine = block()
    task = asyncio.ensure_future(coroutine)
    await reached.wait()
    coroutine.close()
    task.cancel()
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await task
    await repo.attempts.complete(lease)
