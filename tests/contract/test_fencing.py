"""A lease that is lost can write nothing, however it was lost, and its holder learns what became of the attempt."""

from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest

from runtime_repo import Lease, LeaseLostError, NotFoundError, RuntimeRepository
from tests.contract.conftest import Clock
from tests.verbs import MINUTE, WRITES, Write, refusal


async def requeued(repo: RuntimeRepository, lease: Lease) -> None:
    """It expired."""
    await repo.leases.requeue_expired(now=lease.expires_at)


async def failed(repo: RuntimeRepository, lease: Lease) -> None:
    """It expired, as the one before it did, and there is no try left."""
    await requeued(repo, lease)
    await repo.leases.claim_attempt(lease.attempt_id, "rival", ttl=MINUTE, now=lease.expires_at)
    await repo.leases.requeue_expired(now=lease.expires_at + MINUTE)


async def taken(repo: RuntimeRepository, lease: Lease) -> None:
    """It expired, and another worker has begun."""
    await requeued(repo, lease)
    rival = await repo.leases.claim_attempt(lease.attempt_id, "rival", now=lease.expires_at)
    assert rival is not None
    await repo.attempts.start(rival, now=lease.expires_at)


async def claimed_again(repo: RuntimeRepository, lease: Lease) -> None:
    """It expired, and its own worker has claimed the attempt once more."""
    await requeued(repo, lease)
    await repo.leases.claim(lease.worker_id, now=lease.expires_at)


async def cancelled(repo: RuntimeRepository, lease: Lease) -> None:
    """Somebody does not want the attempt any more."""
    await repo.attempts.cancel(lease.attempt_id, now=lease.claimed_at)


Loss = Callable[[RuntimeRepository, Lease], Awaitable[None]]

LOSSES: dict[str, tuple[Loss, str, int, str | None]] = {
    "requeued": (requeued, "queued", 1, None),
    "failed": (failed, "failed", 2, None),
    "taken": (taken, "running", 2, "rival"),
    "claimed again": (claimed_again, "leased", 2, "worker"),
    "cancelled": (cancelled, "cancelled", 1, None),
}


async def leased(repo: RuntimeRepository, clock: Clock) -> Lease:
    """An attempt of two tries, the first of which has begun."""
    await repo.attempts.enqueue("run", attempt_id="a", max_attempts=2, now=clock.now)
    (lease,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
    return lease


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("loss", LOSSES)
async def test_a_lost_lease_writes_nothing(repo: RuntimeRepository, clock: Clock, loss: str, write: Write) -> None:
    """Not even within its time, and as often as it is tried; the error says under which token who holds it now."""
    lose, status, current, worker_id = LOSSES[loss]
    lease = await leased(repo, clock)
    await lose(repo, lease)
    before = await repo.attempts.get("a"), await repo.leases.list()
    for now in (clock.now, lease.expires_at + timedelta(hours=1)):
        lost = await refusal(write(repo, lease, now))
        if lost is not None:
            assert isinstance(lost, LeaseLostError)
            assert (lost.attempt_id, lost.token, lost.current) == ("a", 1, current)
            assert (lost.status, lost.worker_id) == (status, worker_id)
        assert (await repo.attempts.get("a"), await repo.leases.list()) == before


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
async def test_what_was_pruned_is_not_found(repo: RuntimeRepository, clock: Clock, write: Write) -> None:
    """A holder that comes back after all that time finds no attempt, and makes none."""
    lease = await leased(repo, clock)
    await repo.attempts.cancel("a", now=clock.now)
    await repo.attempts.prune(older_than=timedelta(0), now=clock.now)
    missing = await refusal(write(repo, lease, clock.now))
    assert missing is None or isinstance(missing, NotFoundError)
    assert (await repo.attempts.list(), await repo.leases.list()) == ([], [])
