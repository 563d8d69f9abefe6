"""A lease that is lost can write nothing, however it was lost, and its holder learns what became of the attempt."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import timedelta

import asyncpg
import pytest

from runtime_repo import Lease, LeaseLostError, NotFoundError, RuntimeRepository, fencing
from runtime_repo.outages import Outages
from tests.contract.conftest import Clock, Factory, execute, runtime_schema
from tests.verbs import ENDS, MINUTE, WRITES, Write, refusal


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


async def cancelled_behind_its_claim(repo: RuntimeRepository, lease: Lease) -> None:
    """A cancel that waited for the claim to commit did not see the claim's lease, which is there still."""
    await cancelled(repo, lease)
    await execute(
        repo,
        "insert into {schema}.runtime_leases (lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, "
        f"version, claimed_at_ms) values ('{lease.lease_id}', 'a', 'worker', 4000000000000, 0, 1, 0)",
    )


async def forgotten(repo: RuntimeRepository, lease: Lease) -> Lease:
    """A backup that was taken before the claim is restored, and the same token is given out again."""
    await execute(repo, "delete from {schema}.runtime_leases")
    await execute(
        repo,
        "update {schema}.runtime_attempts set status = 'queued', lease_version = 0, lease_id = null, worker_id = null",
    )
    await repo.attempts.reindex()
    rival = await repo.leases.claim_attempt(lease.attempt_id, "rival", ttl=MINUTE, now=lease.claimed_at)
    assert rival is not None
    assert (rival.version, rival.attempt.attempt_no) == (lease.version, lease.attempt.attempt_no)
    return rival


async def taken_in_another_history(repo: RuntimeRepository, lease: Lease) -> None:
    """And whoever was given it works."""
    await forgotten(repo, lease)


async def completed_in_another_history(repo: RuntimeRepository, lease: Lease) -> None:
    """And whoever was given it is done."""
    await repo.attempts.complete(await forgotten(repo, lease), "done", now=lease.claimed_at)


async def failed_in_another_history(repo: RuntimeRepository, lease: Lease) -> None:
    """And whoever was given it has failed."""
    await repo.attempts.fail(await forgotten(repo, lease), "boom", now=lease.claimed_at)


async def released_in_another_history(repo: RuntimeRepository, lease: Lease) -> None:
    """And whoever was given it has given it back."""
    await repo.leases.release(await forgotten(repo, lease), now=lease.claimed_at)


Loss = Callable[[RuntimeRepository, Lease], Awaitable[None]]

LOSSES: dict[str, tuple[Loss, str, int, str | None]] = {
    "requeued": (requeued, "queued", 1, None),
    "failed": (failed, "failed", 2, None),
    "taken": (taken, "running", 2, "rival"),
    "claimed again": (claimed_again, "leased", 2, "worker"),
    "cancelled": (cancelled, "cancelled", 1, None),
    "cancelled behind its claim": (cancelled_behind_its_claim, "cancelled", 1, None),
    "taken in another history": (taken_in_another_history, "leased", 1, "rival"),
    "completed in another history": (completed_in_another_history, "completed", 1, None),
    "failed in another history": (failed_in_another_history, "failed", 1, None),
    "released in another history": (released_in_another_history, "queued", 1, None),
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


@pytest.mark.parametrize("status", ["leased", "completed"])
async def test_a_report_of_another_history_is_not_this_ones(repo: RuntimeRepository, clock: Clock, status: str) -> None:
    """It was stored under the same token, but not by this lease: whoever reported before the restore is refused."""
    lease = await leased(repo, clock)
    rival = await forgotten(repo, lease)
    await repo.step_reports.record(rival, "pay", "done", "t", now=clock.now)
    if status == "completed":
        await repo.attempts.complete(rival, now=clock.now)
    for token in ("t", "new"):
        with pytest.raises(LeaseLostError):
            await repo.step_reports.record(lease, "pay", "done", token, now=clock.now)
    assert (await repo.step_reports.record(rival, "pay", "done", "t", now=clock.now)).is_duplicate
    assert len(await repo.step_reports.list("a")) == 1


ENDINGS: dict[str, tuple[Write, str]] = {
    name: (write, name.split(",")[0].removesuffix("_many")) for name, write in ENDS.items()
} | {
    "cancel": (lambda repo, lease, now: repo.attempts.cancel(lease.attempt_id, now=now), "cancel"),
    "requeue_expired": (lambda repo, lease, _: repo.leases.requeue_expired(now=lease.expires_at), "expire"),
}


@pytest.mark.parametrize("verb", ENDINGS)
async def test_what_ended_a_lease_is_stored(repo: RuntimeRepository, clock: Clock, verb: str) -> None:
    """With the lease's id, for whoever asks afterwards; while it is held nothing has."""
    end, expected = ENDINGS[verb]
    lease = await leased(repo, clock)
    held = await repo.attempts.get("a")
    assert (held.lease_id, held.ended_by) == (lease.lease_id, None)
    await end(repo, lease, clock.now)
    ended = await repo.attempts.get("a")
    assert (ended.lease_id, ended.ended_by) == (lease.lease_id, expected)


@pytest.mark.parametrize("retry_in", [None, timedelta(0)])
async def test_a_failure_in_the_words_of_an_expired_lease_is_a_failure(
    repo: RuntimeRepository, clock: Clock, retry_in: timedelta | None
) -> None:
    """What a handler says is nobody's sign: repeated, it is answered as the first time."""
    lease = await leased(repo, clock)
    words = f"the lease of worker {lease.worker_id} expired"
    first = await repo.attempts.fail(lease, words, retry_in=retry_in, now=clock.now)
    assert await repo.attempts.fail(lease, words, retry_in=retry_in, now=clock.now) == first
    for other in (repo.leases.release(lease), repo.attempts.complete(lease)):
        with pytest.raises(LeaseLostError):
            await other


async def test_the_process_knows_which_leases_it_has_ended(repo: RuntimeRepository, clock: Clock) -> None:
    """As soon as that is committed, and not before: a transaction that is rolled back has ended none."""
    for name, end in ENDS.items():
        await repo.attempts.enqueue("run", attempt_id=name, now=clock.now)
        lease = await repo.leases.claim_attempt(name, "worker", now=clock.now)
        assert lease is not None
        with fencing.holding(lease.lease_id, Outages("a test")) as held:
            with contextlib.suppress(ZeroDivisionError):
                async with repo.transaction() as transaction:
                    await end(transaction, lease, clock.now)
                    raise ZeroDivisionError
            assert not held.ended, name
            await end(repo, lease, clock.now)
            assert held.ended, name


async def eventually(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait for what another connection has to come to."""
    while not await condition():  # noqa: ASYNC110 - only the server knows
        await asyncio.sleep(0.01)


async def test_a_cancel_behind_an_uncommitted_claim_is_noticed(
    postgres_factory: Factory, postgres: asyncpg.Connection
) -> None:
    """On PostgreSQL it waits, and does not see the claim's lease: the holder's next heartbeat is refused anyway."""
    async with postgres_factory() as repo:
        await repo.attempts.enqueue("run", attempt_id="a")
        async with repo.transaction() as transaction:
            (lease,) = await transaction.leases.claim("worker")
            cancelling = asyncio.create_task(repo.attempts.cancel("a"))
            query = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like $1"
            await eventually(lambda: postgres.fetchval(query, f"%{runtime_schema(repo)}%cancelled%"))
        assert (await cancelling).status == "cancelled"
        with pytest.raises(LeaseLostError) as lost:
            await repo.leases.heartbeat(lease)
        assert (lost.value.status, lost.value.worker_id) == ("cancelled", None)
        assert await repo.leases.heartbeat_many([lease]) == [None]
        await repo.leases.requeue_expired(now=lease.expires_at)
        assert await repo.leases.list() == []
