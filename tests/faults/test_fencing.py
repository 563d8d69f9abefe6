"""
Writes that wait for each other: who was first is right, nobody deadlocks, and what was lost meanwhile is refused.

What waits on SQLite waits for the whole file, so a rival cannot interleave with half a verb; the same facts hold.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from runtime_repo import (
    AttemptStatus,
    ConflictError,
    Lease,
    LeaseLostError,
    NewAttempt,
    NotFoundError,
    RuntimeRepository,
)
from tests.faults.conftest import eventually, still_waits
from tests.faults.test_cancellation import BOTH_WAYS, FAR, CancelledAt
from tests.lab import Lab, PostgresLab, on_postgres
from tests.verbs import BEATS, ENDS, MINUTE, WRITES, Write, refusal

NOW = datetime(2030, 1, 1, tzinfo=UTC)
ENDING: dict[str, Write] = ENDS | {
    "cancel": lambda repo, lease, now: repo.attempts.cancel(lease.attempt_id, now=now),
    "requeue_expired": lambda repo, lease, _: repo.leases.requeue_expired(now=lease.expires_at),
}
"""Whatever ends a lease, whoever does it."""


@pytest.fixture
async def repo(lab: Lab) -> AsyncIterator[RuntimeRepository]:
    """Somebody."""
    async with lab.repository() as repository:
        yield repository


@pytest.fixture
async def rival(lab: Lab) -> AsyncIterator[RuntimeRepository]:
    """Somebody else."""
    async with lab.repository() as repository:
        yield repository


async def leased(repo: RuntimeRepository, count: int = 1) -> Sequence[Lease]:
    """So many leases, in the order of their attempts' ids."""
    ids = await repo.attempts.enqueue_many([NewAttempt("run") for _ in range(count)], now=NOW)
    leases = await repo.leases.claim("worker", limit=count, ttl=MINUTE, now=NOW)
    assert [lease.attempt_id for lease in leases] == ids
    return leases


async def waits(lab: Lab, task: "asyncio.Task[Any]") -> None:
    """*task* waits for somebody else's lock; on PostgreSQL the server says so."""
    if isinstance(lab, PostgresLab):
        schema = lab.place.schema
        query = (
            "select count(*) from pg_stat_activity where application_name = $1 and wait_event_type = 'Lock' "
            "and state = 'active'"
        )
        await eventually(lambda: lab.admin.fetchval(query, schema))
        assert not task.done()
    else:
        await still_waits(task)


@asynccontextmanager
async def locked(lab: PostgresLab, attempt_id: str) -> AsyncIterator[None]:
    """Somebody writes this attempt's row meanwhile."""
    async with lab.session() as session, session.transaction():
        await session.execute(f"select from {lab.table('attempts')} where attempt_id = '{attempt_id}' for update")
        yield


async def free(lab: PostgresLab, noun: str) -> set[str]:
    """The attempts whose row in this table nobody has locked."""
    rows = await lab.admin.fetch(f"select attempt_id from {lab.table(noun)} for update skip locked")
    return {row["attempt_id"] for row in rows}


# --- too late ---


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
async def test_a_stale_write_that_waits_behind_a_requeue_and_a_new_claim_is_refused(
    lab: Lab, repo: RuntimeRepository, rival: RuntimeRepository, write: Write
) -> None:
    """It was asked for in time, but when it comes to its turn the attempt is another's, in the same commit."""
    (stale,) = await leased(repo)
    async with rival.transaction() as transaction:
        await transaction.leases.requeue_expired(now=stale.expires_at)
        current = await transaction.leases.claim_attempt(stale.attempt_id, "rival", now=stale.expires_at)
        assert current is not None
        late = asyncio.ensure_future(refusal(write(repo, stale, NOW)))
        await waits(lab, late)
    lost = await late
    if lost is not None:
        assert isinstance(lost, LeaseLostError)
        assert (lost.token, lost.current, lost.worker_id) == (1, 2, "rival")
    assert await repo.attempts.get(stale.attempt_id) == current.attempt
    assert await repo.leases.list() == [current]


@pytest.mark.parametrize("beat", BEATS.values(), ids=BEATS)
@pytest.mark.parametrize("end", ENDING.values(), ids=ENDING)
async def test_a_heartbeat_in_flight_brings_nothing_back(
    lab: Lab, repo: RuntimeRepository, rival: RuntimeRepository, end: Write, beat: Write
) -> None:
    """The lease ends while the heartbeat is on its way: it is refused, and there is no lease afterwards."""
    (lease,) = await leased(repo)
    async with rival.transaction() as transaction:
        await end(transaction, lease, NOW)
        late = asyncio.ensure_future(refusal(beat(repo, lease, NOW)))
        await waits(lab, late)
    ended = await repo.attempts.get(lease.attempt_id)
    lost = await late
    if lost is not None:
        assert isinstance(lost, LeaseLostError)
        assert (lost.status, lost.worker_id) == (ended.status, None)
    assert await repo.attempts.get(lease.attempt_id) == ended
    assert await repo.leases.list() == []


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("beat", BEATS.values(), ids=BEATS)
async def test_an_end_that_waits_for_a_heartbeat_is_the_end(
    lab: Lab, repo: RuntimeRepository, rival: RuntimeRepository, end: Write, beat: Write
) -> None:
    """The other way round: the lease is renewed first, and gone all the same."""
    (lease,) = await leased(repo)
    async with rival.transaction() as transaction:
        await beat(transaction, lease, NOW)
        ending = asyncio.ensure_future(end(repo, lease, NOW))
        await waits(lab, ending)
    await ending
    assert (await repo.attempts.get(lease.attempt_id)).status is not AttemptStatus.LEASED
    assert await repo.leases.list() == []


async def test_a_lease_that_was_renewed_at_the_last_moment_is_not_taken(
    lab: Lab, repo: RuntimeRepository, rival: RuntimeRepository
) -> None:
    """Whoever requeues sees it expired, waits for the heartbeat, and looks again."""
    (lease,) = await leased(repo)
    async with rival.transaction() as transaction:
        renewed = await transaction.leases.heartbeat(lease, ttl=MINUTE, now=lease.expires_at - timedelta(seconds=1))
        requeue = asyncio.ensure_future(repo.leases.requeue_expired(now=lease.expires_at))
        await waits(lab, requeue)
    assert await requeue == []
    assert await repo.leases.list() == [renewed]
    assert await repo.attempts.get(lease.attempt_id) == lease.attempt


async def test_a_cancel_that_waits_for_a_requeue_leaves_nothing_to_claim(
    lab: Lab, repo: RuntimeRepository, rival: RuntimeRepository
) -> None:
    """It may not see that the attempt waits by now, and leave that behind: the next claim takes it away."""
    (lease,) = await leased(repo)
    async with rival.transaction() as transaction:
        await transaction.leases.requeue_expired(now=lease.expires_at)
        cancelling = asyncio.ensure_future(repo.attempts.cancel(lease.attempt_id, now=NOW))
        await waits(lab, cancelling)
    assert (await cancelling).status is AttemptStatus.CANCELLED
    for _ in range(2):
        assert await repo.leases.claim("rival", limit=2, now=NOW) == []
        assert not await repo.attempts.wait(timeout=timedelta(0))
    assert (await repo.attempts.get(lease.attempt_id)).status is AttemptStatus.CANCELLED
    assert await repo.leases.list() == []


# --- no deadlock ---

Many = Callable[[RuntimeRepository, Sequence[Lease]], Awaitable[object]]


async def settled(*writes: Awaitable[object]) -> None:
    """All have ended, well or too late."""
    for answer in await asyncio.gather(*writes, return_exceptions=True):
        if isinstance(answer, BaseException) and not isinstance(answer, (ConflictError, NotFoundError)):
            raise answer


def each(write: Callable[[RuntimeRepository, Lease], Awaitable[object]]) -> Many:
    """Each in a statement of its own, all at the same time."""
    return lambda repo, leases: settled(*(write(repo, lease) for lease in leases))


async def give_back(repo: RuntimeRepository, leases: Iterable[Lease]) -> None:
    """What a claim does when it is cancelled."""
    for claim_id in {lease.lease_id.rpartition("-")[0] for lease in leases}:
        await repo._database.fetch("leases.give_back", claim_id)


TOGETHER: dict[str, Many] = {
    "complete_many": lambda repo, leases: repo.attempts.complete_many([(lease, None) for lease in leases], now=NOW),
    "heartbeat_many": lambda repo, leases: repo.leases.heartbeat_many(leases, ttl=MINUTE, now=NOW),
    "give_back": give_back,
}
"""What locks several attempts and waits for each."""

ONE_BY_ONE: dict[str, Many] = {
    "complete": each(lambda repo, lease: repo.attempts.complete(lease, now=NOW)),
    "fail": each(lambda repo, lease: repo.attempts.fail(lease, "boom", retry_in=MINUTE, now=NOW)),
    "release": each(lambda repo, lease: repo.leases.release(lease, delay=MINUTE, now=NOW)),
    "cancel": each(lambda repo, lease: repo.attempts.cancel(lease.attempt_id, now=NOW)),
}

SKIPPING: dict[str, Many] = {
    "requeue_expired": lambda repo, leases: repo.leases.requeue_expired(now=leases[0].expires_at),
    "claim": lambda repo, leases: repo.leases.claim("rival", limit=len(leases), now=NOW),
    "prune": lambda repo, _: repo.attempts.prune(older_than=timedelta(0), now=NOW),
}
"""What takes whatever nobody else is writing."""

NARROW = ("attempts", "queue", "leases", "finished")

PAIRS = list(itertools.combinations_with_replacement((TOGETHER | ONE_BY_ONE | SKIPPING).items(), 2))


@on_postgres
@pytest.mark.parametrize("verb", [*TOGETHER, *ONE_BY_ONE])
async def test_an_attempt_is_locked_before_its_lease(lab: PostgresLab, repo: RuntimeRepository, verb: str) -> None:
    """While somebody writes the attempt the verb waits for it, and keeps nobody from the lease."""
    leases = await leased(repo)
    async with locked(lab, leases[0].attempt_id):
        write = asyncio.ensure_future((TOGETHER | ONE_BY_ONE)[verb](repo, leases))
        await waits(lab, write)
        assert await free(lab, "leases") == {leases[0].attempt_id}
    await write


@on_postgres
@pytest.mark.parametrize("verb", TOGETHER)
async def test_attempts_are_locked_in_the_order_of_their_ids(
    lab: PostgresLab, repo: RuntimeRepository, verb: str
) -> None:
    """In whichever order they are given: what comes after the one that is waited for is still free."""
    leases = await leased(repo, 3)
    first, second, third = [lease.attempt_id for lease in leases]
    for given in (leases, leases[::-1]):
        async with locked(lab, second):
            write = asyncio.ensure_future(TOGETHER[verb](repo, given))
            await waits(lab, write)
            assert await free(lab, "attempts") == {third}
            write.cancel()
            await asyncio.wait([write])
        assert await free(lab, "attempts") == {first, second, third}


@on_postgres
async def test_what_is_being_written_is_not_waited_for(lab: PostgresLab, repo: RuntimeRepository) -> None:
    """Requeueing and pruning pass it by, and take the rest; they find it the next time."""
    one, two = await leased(repo, 2)
    async with asyncio.timeout(10):
        async with locked(lab, one.attempt_id):
            assert [a.attempt_id for a in await repo.leases.requeue_expired(now=one.expires_at)] == [two.attempt_id]
            assert [lease.attempt_id for lease in await repo.leases.list()] == [one.attempt_id]
        assert [a.attempt_id for a in await repo.leases.requeue_expired(now=one.expires_at)] == [one.attempt_id]
        for lease in (one, two):
            await repo.attempts.cancel(lease.attempt_id, now=NOW)
        async with locked(lab, one.attempt_id):
            assert await repo.attempts.prune(older_than=timedelta(0), now=NOW) == 1
        assert await repo.attempts.prune(older_than=timedelta(0), now=NOW) == 1


@on_postgres
@pytest.mark.parametrize(("one", "two"), PAIRS, ids=[f"{one[0]}-{two[0]}" for one, two in PAIRS])
async def test_no_two_verbs_deadlock(
    lab: Lab, repo: RuntimeRepository, rival: RuntimeRepository, one: tuple[str, Many], two: tuple[str, Many]
) -> None:
    """Both on the same attempts in opposite orders, at the same moment: one of them may be too late, none fails."""
    for _ in range(5):
        leases = await leased(repo, 8)
        await settled(one[1](repo, leases), two[1](rival, leases[::-1]))
        await lab.execute(f"truncate {', '.join(lab.table(name) for name in NARROW)}")


# --- a claim that is cancelled ---

Claim = Callable[[RuntimeRepository], Awaitable[Sequence[Lease]]]


async def by_name(repo: RuntimeRepository) -> Sequence[Lease]:
    """This very attempt."""
    lease = await repo.leases.claim_attempt("a", "worker")
    return [lease] if lease else []


CLAIMS: dict[str, Claim] = {
    "from one queue": lambda repo: repo.leases.claim("worker"),
    "from several": lambda repo: repo.leases.claim("worker", queues=["default", "mail"], limit=2),
    "by name": by_name,
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
@BOTH_WAYS
async def test_a_claim_may_be_cancelled_at_every_await(lab: Lab, cancelled_at: CancelledAt, claim: Claim) -> None:
    """Whoever did not get the leases does not have them: the attempt is ready again and no try is counted."""
    async with lab.nothing_left(), lab.repository() as repo:
        attempt = await repo.attempts.enqueue("run", attempt_id="a")
        for n in range(FAR):
            got: list[Lease] = []

            async def work(got: list[Lease] = got) -> None:
                got += await claim(repo)

            cancelled = await cancelled_at(work, n)
            assert await repo.leases.list() == got
            for lease in got:
                await repo.leases.release(lease)
            after = await repo.attempts.get("a")
            assert (after.status, after.attempt_no, after.retry_at) == (AttemptStatus.QUEUED, 1, None)
            assert attempt.lease_version <= after.lease_version <= attempt.lease_version + 1
            attempt = after
            if not cancelled:
                break
        assert got
        assert n > 1
