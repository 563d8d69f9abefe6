"""A call that was cancelled or timed out may have happened: whatever writes can be repeated."""

from datetime import timedelta

import pytest

from runtime_repo import Lease, NewAttempt, RuntimeRepository
from tests.contract.conftest import Clock
from tests.verbs import BEATS, MINUTE, WRITES, Write

HOUR = timedelta(hours=1)

SAME = object()
"""The second answer is the first one's equal."""

REPEATED: dict[str, tuple[Write, object]] = {name: (write, SAME) for name, write in WRITES.items()} | {
    "enqueue": (lambda repo, _, now: repo.attempts.enqueue("run", attempt_id="new", payload=[1], now=now), SAME),
    "enqueue, stored": (lambda repo, _, now: repo.attempts.enqueue("run", attempt_id="failed", now=now), SAME),
    "enqueue_many": (
        lambda repo, _, now: repo.attempts.enqueue_many([NewAttempt("run", "new"), NewAttempt("run", "a")], now=now),
        SAME,
    ),
    "cancel": (lambda repo, _, now: repo.attempts.cancel("ready", now=now), SAME),
    "cancel, leased": (lambda repo, lease, now: repo.attempts.cancel(lease.attempt_id, now=now), SAME),
    "retry": (lambda repo, *_: repo.attempts.retry("failed"), SAME),
    "retry_many": (lambda repo, _, now: repo.attempts.retry_many(actor="ann", now=now), 0),
    "cancel_many": (lambda repo, _, now: repo.attempts.cancel_many(actor="ann", queue="default", now=now), 0),
    "prune": (lambda repo, _, now: repo.attempts.prune(older_than=MINUTE, now=now), 0),
    "reindex": (lambda repo, *_: repo.attempts.reindex(), 0),
    "vacuum": (lambda repo, *_: repo.attempts.vacuum(), SAME),
    "claim": (lambda repo, _, now: repo.leases.claim("rival", limit=9, ttl=HOUR, now=now), []),
    "claim_attempt": (lambda repo, _, now: repo.leases.claim_attempt("ready", "rival", ttl=HOUR, now=now), None),
    "requeue_expired": (lambda repo, _, now: repo.leases.requeue_expired(now=now), []),
}
"""Each write, and what it answers the second time. What takes has taken all there was."""

READS = {"get", "find", "list", "list_dispatchable", "stats", "depth", "wait", "hold"}


async def prepared(repo: RuntimeRepository, clock: Clock) -> Lease:
    """A lease, and for every verb something to write."""
    ids = ("a", "failed", "old", "expired")
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ids], now=clock.now)
    held = {
        lease.attempt_id: lease for lease in await repo.leases.claim("worker", limit=4, ttl=2 * HOUR, now=clock.now)
    }
    await repo.attempts.fail(held["failed"], "boom", now=clock.now + HOUR)
    await repo.attempts.complete(held["old"], now=clock.now)
    await repo.leases.heartbeat(held["expired"], ttl=MINUTE, now=clock.now)
    await repo.attempts.enqueue("run", attempt_id="ready", now=clock.now)
    clock.advance(HOUR)
    return held["a"]


async def everything(repo: RuntimeRepository) -> object:
    """All that is stored."""
    return await repo.attempts.list(), await repo.leases.list()


@pytest.mark.parametrize("verb", REPEATED)
async def test_to_do_it_twice_is_to_do_it_once(repo: RuntimeRepository, clock: Clock, verb: str) -> None:
    """Also later: the second call changes nothing, and answers as the first or that there is nothing left to do."""
    write, again = REPEATED[verb]
    lease = await prepared(repo, clock)
    before = await everything(repo)
    first = await write(repo, lease, clock.now)
    after = await everything(repo)
    assert after != before or verb in ("enqueue, stored", "reindex", "vacuum")
    # A later heartbeat is another one.
    second = await write(repo, lease, clock.now if verb in BEATS else clock.advance(timedelta(seconds=1)))
    assert second == (first if again is SAME else again)
    assert await everything(repo) == after


def test_every_verb_that_writes_is_here(repo: RuntimeRepository) -> None:
    """A new one is not forgotten."""
    verbs = {name for noun in (repo.attempts, repo.leases) for name in vars(type(noun)) if not name.startswith("_")}
    assert {verb.split(",")[0] for verb in REPEATED} == verbs - READS
