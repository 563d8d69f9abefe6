"""What cannot be meant is refused by every verb, in words that name the argument, before anything is written."""

import math
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from runtime_repo import (
    AttemptStatus,
    ConfigurationError,
    Lease,
    LeaseLostError,
    NewAttempt,
    RuntimeRepoError,
    RuntimeRepository,
)
from tests.contract.conftest import Clock
from tests.verbs import MINUTE, WRITES, Write

Call = Callable[[RuntimeRepository, Lease, Any], Awaitable[object]]

MILLISECOND = timedelta(milliseconds=1)
CYCLE: list[object] = []
CYCLE.append(CYCLE)

IDS = ["", "x" * 513, "a\0b", "\ud800", "a\udfff", 7, b"a"]
COUNTS = [0, -1, True, False, 2**31, 1.0, "1", math.nan]
NUMBERS = [True, 2**31, -(2**31) - 1, 1.0, "1"]
SPANS = [-timedelta(microseconds=1), -MINUTE, timedelta.min, timedelta.max, 366_001 * timedelta(days=1), 60, 60.0]
TTLS = [*SPANS, timedelta(0), timedelta(microseconds=999)]
INSTANTS = [
    datetime(2030, 1, 1),  # noqa: DTZ001 - what is refused
    # In UTC there is no such year.
    datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
    datetime.max.replace(tzinfo=timezone(-timedelta(hours=1))),
    1_893_456_000,
    "2030-01-01T00:00:00Z",
]
PAYLOADS = [
    object(),
    {1, 2},
    b"a",
    math.nan,
    [math.inf],
    {"a": -math.inf},
    {(1, 2): 3},
    {1: 2, "a": 3},
    CYCLE,
    "x" * 17_000_000,
]
STATUSES = ["", "done", 7]


def attempts(verb: str, **options: Any) -> Callable[[str], Call]:
    """A verb on attempts, with one argument to be given."""
    return lambda name: lambda repo, _, value: getattr(repo.attempts, verb)(**options | {name: value})


def leases(verb: str, **options: Any) -> Callable[[str], Call]:
    """A verb on leases, with one argument to be given."""
    return lambda name: lambda repo, _, value: getattr(repo.leases, verb)(**options | {name: value})


def held(noun: str, verb: str, **options: Any) -> Callable[[str], Call]:
    """A verb with a lease, with one argument to be given."""
    return lambda name: (
        lambda repo, lease, value: getattr(getattr(repo, noun), verb)(**{"lease": lease} | options | {name: value})
    )


def enqueue_many(name: str) -> Call:
    """One that is well and one that is not."""
    if name == "now":
        return lambda repo, _, value: repo.attempts.enqueue_many([NewAttempt("run", "x")], now=value)
    return lambda repo, _, value: repo.attempts.enqueue_many(
        [NewAttempt("run", "x"), NewAttempt(**{"run_id": "run", name: value})]
    )


def complete_many(name: str) -> Call:
    """The same lease with a result that is well, and with one that is not."""
    if name == "now":
        return lambda repo, lease, value: repo.attempts.complete_many([(lease, None)], now=value)
    return lambda repo, lease, value: repo.attempts.complete_many([(lease, None), (lease, value)])


def heartbeat_many(name: str) -> Call:
    """Of the one lease that there is."""
    return lambda repo, lease, value: repo.leases.heartbeat_many([lease], **{name: value})


NEW: dict[str, Sequence[Any]] = {
    "run_id": IDS,
    "attempt_id": IDS,
    "queue": IDS,
    "priority": NUMBERS,
    "payload": PAYLOADS,
    "not_before": INSTANTS,
    "max_attempts": COUNTS,
}
VERBS: dict[str, tuple[Callable[[str], Call], dict[str, Sequence[Any]]]] = {
    "attempts.enqueue": (attempts("enqueue", run_id="run"), NEW | {"now": INSTANTS}),
    "attempts.enqueue_many": (enqueue_many, NEW | {"now": INSTANTS}),
    "attempts.get": (attempts("get"), {"attempt_id": IDS}),
    "attempts.find": (attempts("find"), {"attempt_id": IDS}),
    "attempts.list": (
        attempts("list"),
        {"run_id": IDS, "status": STATUSES, "queue": IDS, "after": IDS[1:], "limit": COUNTS},
    ),
    "attempts.list_dispatchable": (attempts("list_dispatchable"), {"queue": IDS, "limit": COUNTS, "now": INSTANTS}),
    "attempts.wait": (attempts("wait"), {"queues": IDS[:-2], "timeout": SPANS, "now": INSTANTS}),
    "attempts.stats": (attempts("stats"), {"now": INSTANTS}),
    "attempts.start": (held("attempts", "start"), {"now": INSTANTS}),
    "attempts.complete": (held("attempts", "complete"), {"result": PAYLOADS, "now": INSTANTS}),
    "attempts.complete_many": (complete_many, {"result": PAYLOADS, "now": INSTANTS}),
    "attempts.fail": (held("attempts", "fail", error="boom"), {"retry_in": SPANS, "now": INSTANTS}),
    "attempts.cancel": (attempts("cancel", attempt_id="a"), {"attempt_id": IDS, "now": INSTANTS}),
    "attempts.retry": (attempts("retry"), {"attempt_id": IDS}),
    "attempts.prune": (
        attempts("prune", older_than=timedelta(0)),
        {"older_than": SPANS, "limit": COUNTS, "now": INSTANTS},
    ),
    "leases.claim": (
        leases("claim", worker_id="worker"),
        {
            "worker_id": IDS,
            "queues": [*IDS[:-2], [], ["default", ""], ["default", 7], ["a\0"]],
            "limit": [*COUNTS, 10_001],
            "ttl": TTLS,
            "now": INSTANTS,
        },
    ),
    "leases.claim_attempt": (
        leases("claim_attempt", attempt_id="ready", worker_id="worker"),
        {"attempt_id": IDS, "worker_id": IDS, "ttl": TTLS, "now": INSTANTS},
    ),
    "leases.heartbeat": (held("leases", "heartbeat"), {"ttl": TTLS, "now": INSTANTS}),
    "leases.heartbeat_many": (heartbeat_many, {"ttl": TTLS, "now": INSTANTS}),
    "leases.release": (held("leases", "release"), {"delay": SPANS, "now": INSTANTS}),
    "leases.list": (leases("list"), {"worker_id": IDS, "after": IDS[1:], "limit": COUNTS}),
    "leases.requeue_expired": (leases("requeue_expired"), {"limit": COUNTS, "grace": SPANS, "now": INSTANTS}),
}


@pytest.fixture
async def lease(repo: RuntimeRepository, clock: Clock) -> Lease:
    """One that has expired; beside it an attempt that is ready, one that is delayed and one that is over."""
    delayed = NewAttempt("run", "delayed", not_before=clock.now + MINUTE)
    await repo.attempts.enqueue_many([NewAttempt("run", "a"), NewAttempt("run", "over"), delayed], now=clock.now)
    await repo.attempts.cancel("over", now=clock.now)
    (lease,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
    await repo.attempts.enqueue("run", attempt_id="ready", now=clock.now)
    return lease


@pytest.mark.parametrize("verb", VERBS)
async def test_what_cannot_be_meant_is_refused(repo: RuntimeRepository, lease: Lease, verb: str) -> None:
    """Each argument with each wrong value: the error names the argument, and nothing is read or written."""
    call, arguments = VERBS[verb]
    before = await repo.attempts.list(), await repo.leases.list()
    for name, values in arguments.items():
        for value in values:
            with pytest.raises(ConfigurationError) as refused:
                await call(name)(repo, lease, value)
            assert str(refused.value).startswith(name), f"{name} = {value!r:.50}"
            assert len(str(refused.value)) < 400
    assert (await repo.attempts.list(), await repo.leases.list()) == before


def test_every_verb_with_an_argument_to_refuse_is_here(repo: RuntimeRepository) -> None:
    """A new one is not forgotten; ``hold`` has its own test."""
    verbs = {f"{noun}.{name}" for noun in ("attempts", "leases") for name in vars(type(getattr(repo, noun)))}
    assert VERBS.keys() == {verb for verb in verbs if "._" not in verb} - {"leases.hold"}


async def test_the_longest_and_the_last_that_can_be_meant_are_not_refused(repo: RuntimeRepository) -> None:
    """Ids of 512 characters, the first and the last millisecond that there are, spans of a thousand years."""
    first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC, microsecond=999_000)
    stored = await repo.attempts.enqueue(
        "ü" * 512, attempt_id="\N{SNOWMAN}" * 512, queue="q" * 512, priority=-(2**31), max_attempts=2**31 - 1,
        not_before=last - MINUTE, now=first,
    )  # fmt: skip
    assert (stored.enqueued_at, stored.retry_at) == (first, last - MINUTE)
    assert await repo.attempts.list_dispatchable(queue="q" * 512, limit=2**31 - 1) == []
    assert await repo.attempts.prune(older_than=366_000 * timedelta(days=1), limit=2**31 - 1) == 0
    (lease,) = await repo.leases.claim("w" * 512, queues="q" * 512, ttl=MILLISECOND, now=last - MINUTE)
    assert lease.attempt.priority == -(2**31)


# --- a status that this release does not know ---


async def set_status(repo: RuntimeRepository, status: str) -> None:
    """Whatever another program might write."""
    schema = getattr(repo._database, "tokens", {"schema": "main"})["schema"]
    async with repo.transaction() as transaction:
        await transaction.connection.execute(
            f"update {schema}.runtime_attempts set status = '{status}' where attempt_id = 'a'"
        )


MEETING: dict[str, Write] = WRITES | {
    "cancel": lambda repo, lease, now: repo.attempts.cancel(lease.attempt_id, now=now),
    "retry": lambda repo, lease, _: repo.attempts.retry(lease.attempt_id),
    "enqueue": lambda repo, lease, now: repo.attempts.enqueue("run", attempt_id=lease.attempt_id, now=now),
    "enqueue_many": lambda repo, lease, _: repo.attempts.enqueue_many(
        [NewAttempt("run", "x"), NewAttempt("run", lease.attempt_id)]
    ),
    "get": lambda repo, lease, _: repo.attempts.get(lease.attempt_id),
    "find": lambda repo, lease, _: repo.attempts.find(lease.attempt_id),
}
del MEETING["complete_many"], MEETING["heartbeat_many"]


@pytest.mark.parametrize("verb", MEETING)
async def test_an_unknown_status_is_an_error_that_names_it(
    repo: RuntimeRepository, lease: Lease, clock: Clock, verb: str
) -> None:
    """Whoever meets it is told, and leaves the attempt and its lease as they are."""
    before = await repo.attempts.list(), await repo.leases.list()
    await set_status(repo, "suspended")
    with pytest.raises(RuntimeRepoError, match="suspended") as met:
        await MEETING[verb](repo, lease, clock.now)
    assert not isinstance(met.value, LeaseLostError) or verb in ("start", "heartbeat")
    await set_status(repo, AttemptStatus.LEASED)
    assert (await repo.attempts.list(), await repo.leases.list()) == before


async def test_an_unknown_status_stands_in_nobodys_way(repo: RuntimeRepository, lease: Lease, clock: Clock) -> None:
    """What goes by status passes it by: nobody claims it, and it is not pruned."""
    await set_status(repo, "suspended")
    (other,) = await repo.leases.claim("worker", limit=9, now=clock.now)
    assert other.attempt_id == "ready"
    assert await repo.leases.claim_attempt("a", "worker", now=clock.now) is None
    assert await repo.attempts.prune(older_than=timedelta(0), now=clock.now) == 1
    assert [stats.queue for stats in await repo.attempts.stats(now=clock.now)] == ["default"]
    assert await repo.attempts.complete_many([(lease, None)]) == [False]
    assert await repo.leases.heartbeat_many([lease], ttl=MINUTE, now=clock.now) == [None]
    for page in (await repo.attempts.list(), await repo.leases.list()):
        assert [(error.table, error.key) for error in page.unreadable] == [("runtime_attempts", "a")]
        assert "unknown status 'suspended'" in str(page.unreadable[0])
        assert page
    await set_status(repo, AttemptStatus.LEASED)
    assert [lease.attempt_id for lease in await repo.leases.list(worker_id="worker")]
