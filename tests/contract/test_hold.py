"""Holding a lease: kept while the block runs, and the block ends when the lease does."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest

from runtime_repo import AttemptStatus, ConfigurationError, Lease, LeaseLostError, RuntimeRepository
from tests.contract.conftest import Factory

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
    [ZeroDivisionError(), SystemExit(3), KeyboardInterrupt(), BaseExceptionGroup("two", [SystemExit(3)])],
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
