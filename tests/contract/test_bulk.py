"""What an operator does to many attempts at once: those that fit and no others, in batches, told in the audit."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from runtime_repo import (
    AttemptStatus,
    ConfigurationError,
    LeaseLostError,
    NewAttempt,
    RuntimeRepoError,
    RuntimeRepository,
)
from runtime_repo import bulk as bulk_module
from tests.contract.conftest import Clock, execute

MINUTE = timedelta(minutes=1)


async def failed(repo: RuntimeRepository, clock: Clock, ids: dict[str, str], queue: str = "default") -> None:
    """Attempts of a queue that have failed, each with its error, one after the other."""
    await repo.attempts.enqueue_many([NewAttempt("run", key, queue) for key in ids], now=clock.now)
    for key, error in ids.items():
        lease = await repo.leases.claim_attempt(key, "worker", now=clock.now)
        assert lease is not None
        await repo.attempts.fail(lease, error, now=clock.advance(MINUTE))


async def statuses(repo: RuntimeRepository) -> dict[str, str]:
    return {attempt.attempt_id: str(attempt.status) for attempt in await repo.attempts.list()}


async def changed(repo: RuntimeRepository, before: dict[str, str]) -> set[str]:
    """The ids of the attempts that have another status by now, or are gone."""
    return {key for key, _ in before.items() - (await statuses(repo)).items()}


async def everything(repo: RuntimeRepository, clock: Clock) -> None:
    """Of every status some: in two queues, of several ages, with several errors."""
    await failed(repo, clock, {"a1": "disk full", "a2": "no route to host", "a3": "disk full"})
    await failed(repo, clock, {"b1": "disk full", "b2": "100 % of_it's gone"}, "other")
    await repo.attempts.enqueue_many(
        [NewAttempt("run", key, queue) for queue in ("default", "other") for key in (f"l-{queue}", f"r-{queue}")],
        now=clock.advance(MINUTE),
    )
    for lease in await repo.leases.claim("worker", queues=["default", "other"], limit=4, now=clock.now):
        if lease.attempt_id.startswith("r"):
            await repo.attempts.start(lease, now=clock.now)
    await repo.attempts.enqueue_many(
        [NewAttempt("run", f"{kind}-{queue}", queue) for queue in ("default", "other") for kind in "qtc"],
        now=clock.advance(MINUTE),
    )
    for queue in ("default", "other"):
        tried = await repo.leases.claim_attempt(f"t-{queue}", "worker", now=clock.now)
        done = await repo.leases.claim_attempt(f"c-{queue}", "worker", now=clock.now)
        assert tried is not None
        assert done is not None
        await repo.attempts.fail(tried, "flaky", retry_in=MINUTE, now=clock.now)
        await repo.attempts.complete(done, now=clock.now)


FITS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "retry all": ("retry_many", {}, {"a1", "a2", "a3", "b1", "b2"}),
    "retry a queue": ("retry_many", {"queue": "other"}, {"b1", "b2"}),
    "retry an error": ("retry_many", {"error": "disk"}, {"a1", "a3", "b1"}),
    "retry an error's own words": ("retry_many", {"error": "% of_it's"}, {"b2"}),
    "retry no pattern": ("retry_many", {"error": "disk%"}, set()),
    "retry an error in a queue": ("retry_many", {"error": "disk", "queue": "default"}, {"a1", "a3"}),
    "retry an age": ("retry_many", {"older_than": 6 * MINUTE}, {"a1"}),
    "retry so many": ("retry_many", {"limit": 2}, {"a1", "a2"}),
    "cancel a queue": ("cancel_many", {"queue": "other"}, {"l-other", "r-other", "q-other", "t-other"}),
    "cancel a status": ("cancel_many", {"status": "queued"}, {"q-default", "q-other"}),
    "cancel what backs off": ("cancel_many", {"status": "retry_backoff", "queue": "other"}, {"t-other"}),
    "cancel what runs": ("cancel_many", {"status": "running"}, {"r-default", "r-other"}),
    "cancel what is leased": ("cancel_many", {"status": AttemptStatus.LEASED}, {"l-default", "l-other"}),
    "cancel an error": ("cancel_many", {"error": "flaky"}, {"t-default", "t-other"}),
    "cancel an age": ("cancel_many", {"older_than": MINUTE}, {"l-default", "r-default", "l-other", "r-other"}),
    "cancel so many": ("cancel_many", {"older_than": timedelta(0), "limit": 3}, {"q-default", "q-other", "t-default"}),
    "prune a queue": ("prune", {"older_than": timedelta(0), "queue": "other"}, {"b1", "b2", "c-other"}),
    "prune a status": ("prune", {"older_than": timedelta(0), "status": "completed"}, {"c-default", "c-other"}),
    "prune an error": ("prune", {"older_than": timedelta(0), "error": "disk"}, {"a1", "a3", "b1"}),
    "prune an old error": ("prune", {"older_than": 5 * MINUTE, "error": "disk"}, {"a1"}),
    "prune so many": ("prune", {"older_than": timedelta(0), "status": "failed", "limit": 2}, {"a1", "a2"}),
    "prune all": (
        "prune",
        {"older_than": timedelta(0)},
        {"a1", "a2", "a3", "b1", "b2", "c-default", "c-other"},
    ),
}
"""A verb, what it is told, and which attempts that means."""


@pytest.mark.parametrize("case", FITS)
async def test_what_fits_is_written_and_nothing_else(repo: RuntimeRepository, clock: Clock, case: str) -> None:
    """By queue, status, words of the error and age, together; and the audit says who, what and how many."""
    verb, given, ids = FITS[case]
    await everything(repo, clock)
    before = await statuses(repo)
    count = await getattr(repo.attempts, verb)(**given, actor="ann", now=clock.now)
    assert (await changed(repo, before), count) == (ids, len(ids))
    assert await repo.attempts.reindex() == 0
    entries = await repo.audit.list()
    assert sum(entry.details["count"] for entry in entries) == len(ids)
    for entry in entries:
        assert (entry.actor_type, entry.actor_id, entry.action) == ("operator", "ann", f"attempts.{verb}")
        told = {name: value for name, value in given.items() if name in ("queue", "status", "error")}
        assert entry.details.items() >= told.items()
        assert entry.created_at == clock.now


async def test_what_is_retried_can_be_claimed_at_once(repo: RuntimeRepository, clock: Clock) -> None:
    """As by hand: ready, with its number and its last error."""
    await failed(repo, clock, {"a": "boom"})
    assert await repo.attempts.retry_many(actor="ann", now=clock.now) == 1
    [lease] = await repo.leases.claim("worker", now=clock.now)
    assert (lease.attempt.attempt_no, lease.attempt.error) == (1, "boom")
    assert await repo.attempts.retry_many(actor="ann", now=clock.now) == 0


async def test_whoever_waits_is_told_of_what_is_retried(repo: RuntimeRepository, clock: Clock) -> None:
    """At once, and not at the next poll."""
    await failed(repo, clock, {"a": "boom"})
    waiting = asyncio.create_task(repo.attempts.wait(timeout=MINUTE))
    await asyncio.sleep(0.1)
    await repo.attempts.retry_many(actor="ann")
    async with asyncio.timeout(5):
        assert await waiting


async def test_whoever_holds_what_is_cancelled_learns_it(repo: RuntimeRepository, clock: Clock) -> None:
    """Its lease has ended, and its next write is refused."""
    await repo.attempts.enqueue("run", now=clock.now)
    [lease] = await repo.leases.claim("worker", now=clock.now)
    assert await repo.attempts.cancel_many(actor="ann", queue="default", now=clock.now) == 1
    with pytest.raises(LeaseLostError) as caught:
        await repo.attempts.complete(lease, now=clock.now)
    assert caught.value.status == "cancelled"
    assert await repo.leases.list() == []


async def test_what_is_pruned_takes_its_reports_and_questions_with_it(repo: RuntimeRepository, clock: Clock) -> None:
    """As in a prune of all that is old."""
    await repo.attempts.enqueue("run", attempt_id="a", now=clock.now)
    [lease] = await repo.leases.claim("worker", now=clock.now)
    await repo.step_reports.record(lease, "pay", "done", "t", now=clock.now)
    await repo.interrupts.create("thread", "run", "a", "?", interrupt_id="i", now=clock.now)
    await repo.attempts.complete(lease, now=clock.now)
    assert await repo.attempts.prune(older_than=timedelta(0), queue="default", now=clock.now) == 1
    assert await repo.step_reports.list("a") == []
    assert await repo.interrupts.find("i") is None
    assert await repo.audit.list() == []


async def test_many_are_written_in_batches(
    repo: RuntimeRepository, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of so many at most, with an entry of its own; those of one call have their request in common."""
    monkeypatch.setattr(bulk_module, "STEP", 10)
    await repo.attempts.enqueue_many([NewAttempt("run", queue=f"q{n % 2}") for n in range(45)], now=clock.now)
    assert await repo.attempts.cancel_many(actor="ann", queue="q0", now=clock.now) == 23
    entries = await repo.audit.list()
    assert sum(entry.details["count"] for entry in entries) == 23
    assert [entry.details["count"] for entry in entries] == [3, 5, 5, 5, 5]
    assert len({entry.request_id for entry in entries}) == 1
    assert await repo.attempts.prune(older_than=timedelta(0), queue="q0", limit=20, actor="bob", now=clock.now) == 20
    assert len(await repo.attempts.list(queue="q0")) == 3
    assert sum(entry.details["count"] for entry in await repo.audit.list() if entry.actor_id == "bob") == 20


async def test_a_batch_is_committed_with_its_entry_or_not_at_all(repo: RuntimeRepository, clock: Clock) -> None:
    """Nothing is written of which the audit does not know."""
    await failed(repo, clock, {"a": "boom"})
    await execute(repo, "drop table {schema}.runtime_audit_logs")
    before = await statuses(repo)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: repo.attempts.retry_many(actor="ann"),
        lambda: repo.attempts.prune(older_than=timedelta(0), actor="ann", now=clock.now),
        lambda: repo.attempts.prune(older_than=timedelta(0), actor="ann", queue="default", now=clock.now),
    ]
    for call in calls:
        with pytest.raises(RuntimeRepoError, match="runtime_audit_logs"):
            await call()
        assert await changed(repo, before) == set()


async def test_in_a_transaction_all_batches_are_its_own(repo: RuntimeRepository, clock: Clock) -> None:
    """They are undone with it."""
    await failed(repo, clock, {"a": "boom"})
    before = await statuses(repo)
    with contextlib.suppress(ZeroDivisionError):
        async with repo.transaction() as transaction:
            assert await transaction.attempts.retry_many(actor="ann", now=clock.now) == 1
            raise ZeroDivisionError
    assert await changed(repo, before) == set()
    assert await repo.audit.list() == []


@pytest.mark.parametrize("verb", ["retry_many", "cancel_many"])
async def test_two_operators_at_once_write_each_attempt_once(repo: RuntimeRepository, clock: Clock, verb: str) -> None:
    """Together they have written all, whoever wrote which."""
    keys = {f"a{n}": "boom" for n in range(30)}
    await failed(repo, clock, keys)
    if verb == "cancel_many":
        await repo.attempts.retry_many(actor="first", now=clock.now)
    call = getattr(repo.attempts, verb)
    counts = await asyncio.gather(*(call(actor=f"op{n}", queue="default", now=clock.now) for n in range(4)))
    assert sum(counts) == 30
    told = [entry.details["count"] for entry in await repo.audit.list() if entry.actor_id != "first"]
    assert sum(told) == 30


@pytest.mark.parametrize(
    ("verb", "given", "what"),
    [
        ("cancel_many", {}, "nothing says which"),
        ("cancel_many", {"status": "failed"}, "not final"),
        ("cancel_many", {"status": "lost"}, "status is 'lost'"),
        ("prune", {"older_than": timedelta(0), "status": "queued"}, "a final one"),
        ("prune", {"older_than": timedelta(0), "status": "failed", "limit": 0}, "limit"),
        ("retry_many", {"limit": 0}, "limit"),
        ("retry_many", {"queue": ""}, "queue"),
        ("retry_many", {"error": ""}, "error"),
        ("retry_many", {"error": "nul \0"}, "error"),
        ("retry_many", {"older_than": 5}, "older_than"),
        ("retry_many", {"actor": ""}, "actor"),
        ("retry_many", {"actor": None}, "actor"),
    ],
)
async def test_what_cannot_be_meant_is_refused(
    repo: RuntimeRepository, clock: Clock, verb: str, given: dict[str, Any], what: str
) -> None:
    """Before anything is written: all attempts that are not final are cancelled only if that is said."""
    await failed(repo, clock, {"a": "boom"})
    await repo.attempts.enqueue("run", now=clock.now)
    before = await statuses(repo)
    with pytest.raises(ConfigurationError, match=what):
        await getattr(repo.attempts, verb)(**{"actor": "ann", **given})
    assert await changed(repo, before) == set()


MEANT: dict[str, tuple[object, ...]] = {
    "another queue": (None, "other", None, None),
    "another error": (None, None, "no route", None),
    "another age": (None, None, None, 60_000),
    "another status": ("cancelled", None, None, None),
}
"""What an attempt has come to be since it was found to fit, in the order of the statements' arguments."""


@pytest.mark.parametrize("meant", MEANT.values(), ids=MEANT)
async def test_what_fits_no_more_when_it_is_locked_is_left(
    repo: RuntimeRepository, clock: Clock, meant: tuple[object, ...]
) -> None:
    """Between the look and the write others go on: so each asks again."""
    await failed(repo, clock, {"a": "disk full"})
    await repo.attempts.enqueue("run", attempt_id="b", now=clock.now)
    before = await statuses(repo)
    now_ms = int(clock.now.timestamp() * 1000)
    queries = repo.attempts._queries
    assert not await queries.fetch("attempts.retry_many", '["a", "b"]', *meant, now_ms)
    assert not await queries.fetch("attempts.cancel_many", '["a", "b"]', *meant, now_ms)
    # Of one that has ended again the older end is told.
    ended = '[{"finished_at_ms": 5, "attempt_id": "a"}]'
    assert not await queries.fetch("attempts.prune_many", 0, ended, now_ms)
    assert await statuses(repo) == before
    assert await repo.attempts.reindex() == 0
