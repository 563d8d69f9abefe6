"""What is invalid is refused by every verb, in words that name the argument, before anything is written."""

import inspect
import math
import random
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from functools import partial
from typing import Any, cast

import pytest

from runtime_repo import (
    AttemptStatus,
    ConfigurationError,
    Lease,
    LeaseLostError,
    NewAttempt,
    RetryPolicy,
    RuntimeRepoError,
    RuntimeRepository,
    values,
)
from tests.contract.conftest import Clock
from tests.verbs import MINUTE, WRITES, Write, verbs

Call = Callable[[RuntimeRepository, Lease, Any], Awaitable[object]]

MILLISECOND = timedelta(milliseconds=1)
CYCLE: list[object] = []
CYCLE.append(CYCLE)

IDS: list[Any] = ["", "x" * 513, "a\0b", "\ud800", "a\udfff", 7, b"a"]
QUEUES = [*IDS[:-2], None, [], ["default", ""], ["default", 7], ["a\0"], [["default"]]]
AFTER = [*IDS[1:], None]
COUNTS = [0, -1, True, False, 2**31, 1.0, "1", math.nan]
NUMBERS = [True, 2**31, -(2**31) - 1, 1.0, "1"]
SPANS = [-timedelta(microseconds=1), -MINUTE, timedelta.min, timedelta.max, 366_001 * timedelta(days=1), 60, 60.0]
TTLS = [*SPANS, timedelta(0), timedelta(microseconds=999)]
INSTANTS = [
    datetime(2030, 1, 1),  # noqa: DTZ001 - what is refused
    # In UTC there is no such year.
    datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
    datetime.max.replace(tzinfo=timezone(-timedelta(hours=1))),
    date(2030, 1, 1),
    1_893_456_000,
    1.5,
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
NUMBERED = [2**63, "7", 1.0, True]
SECRETS = ["", "hush" * 257, "hush\0", "hush\ud800", b"hush", None]


def on(noun: str, verb: str, **options: Any) -> Callable[[str], Call]:
    """A verb, with one argument to be given."""
    return lambda name: lambda repo, _, value: getattr(getattr(repo, noun), verb)(**options | {name: value})


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


def each(*names: str, wrong: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Several arguments of one kind."""
    return dict.fromkeys(names, wrong)


NEW: dict[str, Sequence[Any]] = {
    "run_id": IDS,
    "attempt_id": IDS,
    "queue": IDS,
    "priority": NUMBERS,
    "payload": PAYLOADS,
    "headers": PAYLOADS,
    "not_before": INSTANTS,
    "max_attempts": COUNTS,
}
MEANT: dict[str, Sequence[Any]] = {"queue": IDS, "error": IDS, "limit": COUNTS, "now": INSTANTS}
VERBS: dict[str, tuple[Callable[[str], Call], Mapping[str, Sequence[Any]]]] = {
    "attempts.enqueue": (on("attempts", "enqueue", run_id="run"), NEW | {"now": INSTANTS}),
    "attempts.enqueue_many": (enqueue_many, NEW | {"now": INSTANTS}),
    "attempts.get": (on("attempts", "get"), {"attempt_id": IDS}),
    "attempts.find": (on("attempts", "find"), {"attempt_id": IDS}),
    "attempts.list": (
        on("attempts", "list"),
        {"run_id": IDS, "status": STATUSES, "queue": IDS, "after": AFTER, "limit": COUNTS},
    ),
    "attempts.list_dispatchable": (
        on("attempts", "list_dispatchable"),
        {"queue": IDS, "limit": COUNTS, "now": INSTANTS},
    ),
    "attempts.wait": (on("attempts", "wait"), {"queues": QUEUES, "timeout": SPANS, "now": INSTANTS}),
    "attempts.stats": (on("attempts", "stats"), {"now": INSTANTS}),
    "attempts.depth": (on("attempts", "depth"), {"queue": IDS, "most": [*COUNTS, 100_001], "now": INSTANTS}),
    "attempts.start": (held("attempts", "start"), {"now": INSTANTS}),
    "attempts.complete": (held("attempts", "complete"), {"result": PAYLOADS, "now": INSTANTS}),
    "attempts.complete_many": (complete_many, {"result": PAYLOADS, "now": INSTANTS}),
    "attempts.fail": (
        held("attempts", "fail", error="boom"),
        {"error": [7, None, b"a", ValueError("boom")], "retry_in": SPANS, "now": INSTANTS},
    ),
    "attempts.cancel": (on("attempts", "cancel", attempt_id="a"), {"attempt_id": IDS, "now": INSTANTS}),
    "attempts.retry": (on("attempts", "retry"), {"attempt_id": IDS}),
    "attempts.prune": (
        on("attempts", "prune", older_than=timedelta(0)),
        {"older_than": SPANS, "actor": IDS} | MEANT | {"status": [*STATUSES, "queued"]},
    ),
    "attempts.retry_many": (
        on("attempts", "retry_many", actor="ann"),
        {"actor": [*IDS, None], "older_than": SPANS} | MEANT,
    ),
    "attempts.cancel_many": (
        on("attempts", "cancel_many", actor="ann", older_than=timedelta(0)),
        {"actor": [*IDS, None], "older_than": SPANS} | MEANT | {"status": [*STATUSES, "failed"]},
    ),
    "leases.claim": (
        on("leases", "claim", worker_id="worker"),
        {
            "worker_id": IDS,
            "queues": QUEUES,
            "limit": [*COUNTS, 10_001],
            "ttl": TTLS,
            "now": INSTANTS,
        },
    ),
    "leases.claim_attempt": (
        on("leases", "claim_attempt", attempt_id="ready", worker_id="worker"),
        {"attempt_id": IDS, "worker_id": IDS, "ttl": TTLS, "now": INSTANTS},
    ),
    "leases.heartbeat": (held("leases", "heartbeat"), {"ttl": TTLS, "now": INSTANTS}),
    "leases.heartbeat_many": (heartbeat_many, {"ttl": TTLS, "now": INSTANTS}),
    "leases.release": (held("leases", "release"), {"delay": SPANS, "now": INSTANTS}),
    "leases.list": (on("leases", "list"), {"worker_id": IDS, "after": AFTER, "limit": COUNTS}),
    "leases.requeue_expired": (on("leases", "requeue_expired"), {"limit": COUNTS, "grace": SPANS, "now": INSTANTS}),
    "jobs.upsert": (
        on("jobs", "upsert", thread_id="thread", status="fine"),
        {"thread_id": IDS, "status": [*IDS, None], "now": INSTANTS},
    ),
    "jobs.get": (on("jobs", "get"), {"thread_id": IDS}),
    "jobs.find": (on("jobs", "find"), {"thread_id": IDS}),
    "jobs.list": (on("jobs", "list"), {"status": IDS, "after": AFTER, "limit": COUNTS}),
    "interrupts.create": (
        on("interrupts", "create", thread_id="thread", run_id="run", attempt_id="a", value="?"),
        dict.fromkeys(("thread_id", "run_id", "attempt_id", "interrupt_id"), IDS)
        | {"value": PAYLOADS, "now": INSTANTS},
    ),
    "interrupts.get": (on("interrupts", "get"), {"interrupt_id": IDS}),
    "interrupts.find": (on("interrupts", "find"), {"interrupt_id": IDS}),
    "interrupts.list": (
        on("interrupts", "list"),
        {"thread_id": IDS, "status": STATUSES, "after": AFTER, "limit": COUNTS},
    ),
    "interrupts.resume": (
        on("interrupts", "resume", interrupt_id="asked", payload="yes"),
        {"interrupt_id": IDS, "payload": PAYLOADS, "now": INSTANTS},
    ),
    "interrupts.cancel": (on("interrupts", "cancel"), {"interrupt_id": IDS}),
    "step_reports.record": (
        held("step_reports", "record", action_id="pay", status="done", dedupe_token="t"),  # noqa: S106 - no password
        dict.fromkeys(("action_id", "status", "dedupe_token"), IDS) | {"payload": PAYLOADS, "now": INSTANTS},
    ),
    "step_reports.list": (
        on("step_reports", "list", attempt_id="a"),
        {"attempt_id": IDS, "after": [-1, *NUMBERED], "limit": COUNTS},
    ),
    "api_keys.put": (
        on("api_keys", "put", key_id="k", secret="hush"),  # noqa: S106
        {"key_id": [*IDS, None], "secret": SECRETS, "role": IDS, "now": INSTANTS},
    ),
    "api_keys.get": (on("api_keys", "get"), {"key_id": [*IDS, None]}),
    "api_keys.find": (on("api_keys", "find"), {"key_id": [*IDS, None]}),
    "api_keys.set_active": (
        on("api_keys", "set_active", key_id="key", active=False),
        {"key_id": [*IDS, None], "active": ["false", 0, None], "now": INSTANTS},
    ),
    "api_keys.list": (on("api_keys", "list"), {"after": AFTER, "limit": COUNTS}),
    "audit.append": (
        on("audit", "append", actor_type="user", action="do", resource_type="x", result="ok", request_id="r"),
        each("actor_type", "action", "resource_type", "result", "request_id", wrong=[*IDS, None])
        | dict.fromkeys(("actor_id", "actor_role", "resource_id"), IDS)
        | {"details": PAYLOADS, "now": INSTANTS},
    ),
    "audit.list": (
        on("audit", "list"),
        {
            "request_id": IDS,
            "action": IDS,
            "since": INSTANTS,
            "until": INSTANTS,
            "after": [0, *NUMBERED],
            "limit": COUNTS,
        },
    ),
    "control.quiesce": (
        on("control", "quiesce"),
        {"reason": IDS, "timeout": SPANS, "progress": [7, "print"], "now": INSTANTS},
    ),
    "control.pause": (
        on("control", "pause", queue="mail"),
        {"queue": [*IDS, None], "reason": IDS, "timeout": SPANS, "now": INSTANTS},
    ),
    "control.resume": (on("control", "resume"), {"queue": IDS}),
}
NEVER_REFUSED = {
    "leases.hold": "it is a block; its arguments are tested with it",
    "api_keys.authenticate": "what no key can be is a stranger's mistake, not the caller's",
    "attempts.reindex": "it has no argument",
    "attempts.vacuum": "it has no argument",
    "api_keys.any": "it has no argument",
    "control.state": "it has no argument",
}
ELSEWHERE = {"lease", "leases", "attempts", "results"}
"""The arguments that have tests of their own below."""


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
async def test_what_is_invalid_is_refused(repo: RuntimeRepository, lease: Lease, verb: str) -> None:
    """Each argument with each wrong value: the error names the argument, and nothing is read or written."""
    call, arguments = VERBS[verb]
    before = await everything(repo)
    for name, wrong in arguments.items():
        for value in wrong:
            with pytest.raises(ConfigurationError) as refused:
                await call(name)(repo, lease, value)
            assert str(refused.value).startswith(name), f"{name} = {value!r:.50}"
            assert len(str(refused.value)) < 400
    assert await everything(repo) == before


async def everything(repo: RuntimeRepository) -> object:
    """All that is stored."""
    nouns = (repo.attempts, repo.leases, repo.jobs, repo.interrupts, repo.api_keys, repo.audit)
    return [await noun.list() for noun in nouns], await repo.step_reports.list("a"), await repo.control.state()


def test_every_verb_and_every_argument_is_here(repo: RuntimeRepository) -> None:
    """Of every noun: a new one is not forgotten."""
    known = verbs(repo)
    assert VERBS.keys() == known.keys() - NEVER_REFUSED.keys()
    for verb, (_, arguments) in VERBS.items():
        assert {*known[verb].parameters} - {"self"} - ELSEWHERE <= arguments.keys(), verb


async def test_the_longest_and_the_last_that_are_valid_are_not_refused(repo: RuntimeRepository) -> None:
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


def but(lease: Lease, **changes: Any) -> Lease:
    """The lease with other values."""
    return replace(lease, **changes)


LEASES: dict[str, Callable[[Lease], Any]] = {
    "nothing": lambda _: None,
    "an id": lambda lease: lease.lease_id,
    "an attempt": lambda lease: lease.attempt,
    "a version beyond all": lambda lease: but(lease, version=2**63),
    "a negative version": lambda lease: but(lease, version=-1),
    "a version as text": lambda lease: but(lease, version="1"),
    "a fraction": lambda lease: but(lease, version=1.5),
    "a truth": lambda lease: but(lease, version=True),
    "no lease id": lambda lease: but(lease, lease_id=None),
    "no attempt id": lambda lease: but(lease, attempt_id=7),
    "NUL": lambda lease: but(lease, attempt_id="a\0"),
    "half a pair": lambda lease: but(lease, lease_id="\ud800"),
    "no worker": lambda lease: but(lease, worker_id=None),
    "no attempt": lambda lease: but(lease, attempt=None),
    "no moment": lambda lease: but(lease, asked_at=float("nan")),
}


@pytest.mark.parametrize("wrong", LEASES)
async def test_what_is_no_lease_is_refused(repo: RuntimeRepository, lease: Lease, clock: Clock, wrong: str) -> None:
    """By every verb that takes one, alone or among others, before anything is written."""
    before = await repo.attempts.list(), await repo.leases.list()
    given = LEASES[wrong](lease)
    verbs: dict[str, Write] = WRITES | {
        "record": lambda repo, lease, now: repo.step_reports.record(lease, "pay", "done", "t", now=now),
        "fail by a policy": lambda repo, lease, now: repo.attempts.fail(lease, "boom", retry_in=RetryPolicy(), now=now),
        "complete another, too": lambda repo, other, now: repo.attempts.complete_many(
            [(lease, 1), (other, 1)], now=now
        ),
        "keep another, too": lambda repo, other, now: repo.leases.heartbeat_many([lease, other], now=now),
    }
    for verb in verbs.values():
        with pytest.raises(ConfigurationError, match=r"^lease is"):
            await verb(repo, given, clock.now)
    assert (await repo.attempts.list(), await repo.leases.list()) == before


class Unshowable:
    """What raises when it is to be shown."""

    def __repr__(self) -> str:
        raise RuntimeError


def deep(levels: int) -> list[Any]:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", [deep(100_000), [10**5000], 10**5000, Unshowable(), "x" * 1_000_000, b"x" * 1_000_000], ids=range(6)
)
async def test_a_value_that_cannot_be_shown_is_refused_as_any_other(repo: RuntimeRepository, value: Any) -> None:
    """In a message that can be read, and a stranger's key is not let in."""
    for verb in (
        lambda: repo.attempts.get(value),
        lambda: repo.attempts.enqueue("run", priority=value),
        lambda: repo.attempts.list(limit=value),
        lambda: repo.attempts.complete(value),
        lambda: repo.leases.claim("worker", ttl=value),
        lambda: repo.leases.claim("worker", queues=["default", value]),
        lambda: repo.interrupts.list(status=value),
        lambda: repo.audit.list(since=value),
    ):
        with pytest.raises(ConfigurationError) as refused:
            await verb()
        assert len(str(refused.value)) < 1000
    assert await repo.api_keys.authenticate(value, "secret") is None


@pytest.mark.parametrize("several", [None, 7, [None], [7], ["run"], ["ab", None]])
async def test_what_is_no_list_is_refused(repo: RuntimeRepository, several: Any) -> None:
    """By name."""
    for verb, name in (
        (repo.attempts.enqueue_many, "attempts?"),
        (repo.attempts.complete_many, "results|lease"),
        (repo.leases.heartbeat_many, "leases?"),
    ):
        with pytest.raises(ConfigurationError, match=rf"^(an )?({name}) is"):
            await verb(several)


async def test_one_call_has_a_limit(
    repo: RuntimeRepository, lease: Lease, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of things, and of bytes together; what is refused is refused as a whole."""
    with pytest.raises(ConfigurationError, match="leases are 10001: expected at most 10000"):
        await repo.leases.heartbeat_many([lease] * 10_001)
    with pytest.raises(ConfigurationError, match="results are 10001: expected at most 10000"):
        await repo.attempts.complete_many([(lease, 1)] * 10_001)
    monkeypatch.setattr(values, "MAX_BATCH_BYTES", 1000)
    other = replace(lease, attempt_id="other")
    for verb in (
        repo.attempts.complete_many([(lease, "x" * 600), (other, "x" * 600)], now=clock.now),
        repo.attempts.enqueue_many([NewAttempt("run", payload="x" * 600) for _ in range(2)], now=clock.now),
    ):
        with pytest.raises(ConfigurationError, match="are 1204 bytes of JSON together: expected at most 1000"):
            await verb
    assert (await repo.attempts.get(lease.attempt_id)).status == "leased"


async def test_a_long_error_is_cut(repo: RuntimeRepository, lease: Lease) -> None:
    """A failure can always be recorded."""
    failed = await repo.attempts.fail(lease, "x" * 5_000_000)
    assert failed.error is not None
    assert failed.error.endswith("x [...]")
    assert len(failed.error) < 1_100_000


def nested(levels: int) -> Any:
    """A value that nests so deep."""
    value: Any = "[[[[{{{{"
    for level in range(levels):
        value = [value, "]"] if level % 2 else {"[": value}
    return value


async def test_nesting_has_a_limit(repo: RuntimeRepository, lease: Lease) -> None:
    """The same for all JSON, whatever stack the caller has left; brackets in text and side by side do not count."""
    for deep in (nested(101), nested(500), nested(50_000)):
        for call in (
            repo.attempts.enqueue("run", payload=deep),
            repo.attempts.enqueue_many([NewAttempt("run", payload=deep)]),
            repo.attempts.complete(lease, deep),
            repo.attempts.complete_many([(lease, deep)]),
            repo.step_reports.record(lease, "pay", "done", "t", deep),
            repo.interrupts.create("t", "run", "a", deep),
            repo.audit.append(
                actor_type="user", action="do", resource_type="x", result="ok", request_id="r", details=deep
            ),
        ):
            with pytest.raises(ConfigurationError, match=r"nests more than 100 levels deep|cannot be stored"):
                await call
    for name, value in (("deep", nested(100)), ("wide", [{"a": [1, '\\"[']} for _ in range(500)])):
        await at_the_bottom(partial(repo.attempts.enqueue, "run", attempt_id=name, payload=value))
        assert (await at_the_bottom(partial(repo.attempts.get, name))).payload == value


async def at_the_bottom(call: Callable[[], Awaitable[Any]], frames: int | None = None) -> Any:
    """The answer to a call from far down the stack."""
    if frames is None:
        # Under a tracer, such as coverage's, every call takes twice of it.
        frames = (sys.getrecursionlimit() - len(inspect.stack(0)) - 150) // (1 if sys.gettrace() is None else 2)
    return await (at_the_bottom(call, frames - 1) if frames else call())


async def test_what_has_the_longest_ids_is_stored(repo: RuntimeRepository) -> None:
    """Random ones, since PostgreSQL compresses others: no index refuses them. In bytes, the same on both databases."""

    def name(size: int) -> str:
        return "".join(chr(random.randrange(0x4E00, 0x9FFF)) for _ in range(size // 3))

    key = name(1536)
    await repo.attempts.enqueue(name(1024), attempt_id=key, queue=(queue := name(1024)))
    (lease,) = await repo.leases.claim(name(1024), queues=queue)
    await repo.step_reports.record(lease, name(1024), name(1024), name(1024))
    await repo.interrupts.create(name(1024), name(1024), key, 1, interrupt_id=name(1536))
    await repo.jobs.upsert(name(1024), name(1024))
    await repo.audit.append(
        actor_type=name(1024), action=name(1024), resource_type="x", result=name(1024), request_id=name(1024)
    )
    await repo.attempts.complete(lease)
    for refused in (
        repo.attempts.enqueue(name(1027)),
        repo.attempts.enqueue("run", attempt_id=name(1539)),
        repo.attempts.enqueue("run", queue=name(1027)),
        repo.step_reports.record(lease, "pay", "done", name(1027)),
        repo.interrupts.create("t", "run", "a", 1, interrupt_id=name(1539)),
        repo.jobs.upsert("t", name(1027)),
    ):
        with pytest.raises(ConfigurationError, match="characters"):
            await refused


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


ODD_LEASES: list[Callable[[Lease], Lease]] = [
    lambda lease: replace(lease, asked_at=cast(Any, "x")),
    lambda lease: replace(lease, expires_at=cast(Any, None)),
    lambda lease: replace(lease, heartbeat_at=cast(Any, 5)),
    lambda lease: replace(lease, claimed_at=lease.claimed_at.replace(tzinfo=None)),
    lambda lease: replace(lease, attempt=cast(Any, None)),
    lambda lease: replace(lease, attempt=replace(lease.attempt, attempt_no=cast(Any, "x"))),
]


@pytest.mark.parametrize("odd", ODD_LEASES)
async def test_a_lease_that_nobody_gave_out_is_refused(
    repo: RuntimeRepository, lease: Lease, odd: Callable[[Lease], Lease]
) -> None:
    """By every verb alike, whatever of it the verb reads."""
    verbs: list[Callable[[Lease], Awaitable[object]]] = [
        repo.attempts.start,
        repo.attempts.complete,
        lambda lease: repo.attempts.fail(lease, "boom", retry_in=RetryPolicy()),
        repo.leases.release,
        repo.leases.heartbeat,
        lambda lease: repo.leases.heartbeat_many([lease]),
        lambda lease: repo.leases.hold(lease).__aenter__(),
    ]
    for verb in verbs:
        with pytest.raises(ConfigurationError):
            await verb(odd(lease))
