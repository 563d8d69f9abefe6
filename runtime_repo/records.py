"""
What the repository hands out: frozen records, their statuses, and the conversions that every noun shares.

Instants are aware ``datetime`` in UTC, durations ``timedelta``; in the database both are milliseconds.
"""

import json
import math
import random
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Any, TypeVar

from runtime_repo.database import Row
from runtime_repo.errors import ConfigurationError, RuntimeRepoError

__all__ = [
    "Attempt",
    "AttemptStatus",
    "AuditEntry",
    "Interrupt",
    "InterruptStatus",
    "Job",
    "Lease",
    "NewAttempt",
    "QueueStats",
    "RetryPolicy",
    "attempt_from_row",
    "audit_entry_from_row",
    "check_choice",
    "check_count",
    "check_id",
    "from_json",
    "from_ms",
    "instant_ms",
    "interrupt_from_row",
    "job_from_row",
    "json_text",
    "lease_from_row",
    "new_id",
    "new_ids",
    "queue_names",
    "span_ms",
    "stats_from_row",
    "to_json",
]

MAX_ID_LENGTH = 512
MAX_SPAN_MS = 1000 * 366 * 86_400_000
MAX_PAYLOAD_BYTES = 16 * 1024 * 1024

DEFAULT_QUEUE = "default"
DEFAULT_MAX_ATTEMPTS = 10

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
# Made once: json.dumps makes one for each value, unless it is to write what it writes by default.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)

S = TypeVar("S", bound=StrEnum)


class AttemptStatus(StrEnum):
    """Where an attempt is in its life. The last three are final."""

    QUEUED = "queued"
    LEASED = "leased"
    RUNNING = "running"
    RETRY_BACKOFF = "retry_backoff"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing will happen to the attempt any more."""
        return self in (AttemptStatus.COMPLETED, AttemptStatus.FAILED, AttemptStatus.CANCELLED)


# To look it up costs a tenth of calling the enum.
_STATUSES: Mapping[str, AttemptStatus] = {status.value: status for status in AttemptStatus}


@dataclass(frozen=True, slots=True)
class Attempt:
    """A unit of work of a run, tried up to ``max_attempts`` times."""

    attempt_id: str
    run_id: str
    attempt_no: int
    """The 1-based number of the try that runs now or comes next."""
    status: AttemptStatus
    queue: str
    priority: int
    """Higher goes first."""
    payload: Any
    max_attempts: int
    lease_version: int
    """The last fencing token given out; 0 before the first claim."""
    worker_id: str | None
    """The last holder."""
    enqueued_at: datetime
    retry_at: datetime | None
    """When a delayed attempt becomes ready."""
    started_at: datetime | None
    finished_at: datetime | None
    result: Any
    error: str | None


@dataclass(frozen=True, slots=True)
class NewAttempt:
    """An attempt to be enqueued; what is left out is as in ``attempts.enqueue``."""

    run_id: str
    attempt_id: str | None = None
    queue: str = DEFAULT_QUEUE
    priority: int = 0
    payload: Any = None
    not_before: datetime | None = None
    max_attempts: int = DEFAULT_MAX_ATTEMPTS


@dataclass(frozen=True, slots=True)
class QueueStats:
    """How much there is to do in one queue."""

    queue: str
    ready: int
    """What a claim could take now; delayed ones whose time has come are among them."""
    delayed: int
    leased: int
    """What is leased or running."""
    oldest_age: timedelta | None
    """How long ago the oldest ready one was enqueued; None where none is ready."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """
    When to try a failed attempt again: exponential backoff with a cap and jitter.

    The first retry comes after *base*, each later one after *factor* times as long, never after more than *cap*. Of
    each delay a random part, at most the fraction *jitter*, is left out, so that what failed together does not come
    back together. After try number *max_attempts* there is no other; the attempt's own limit holds as well.

    Raises:
        ConfigurationError: A span is negative, *factor* is below 1, *jitter* is not between 0 and 1.
    """

    base: timedelta = timedelta(seconds=1)
    factor: float = 2.0
    cap: timedelta = timedelta(minutes=5)
    jitter: float = 0.5
    max_attempts: int | None = None

    def __post_init__(self) -> None:
        span_ms("base", self.base)
        span_ms("cap", self.cap)
        if not 1 <= self.factor < math.inf:
            raise ConfigurationError(f"factor is {self.factor!r}: expected a number from 1 on")
        if not 0 <= self.jitter <= 1:
            raise ConfigurationError(f"jitter is {self.jitter!r}: expected a fraction from 0 to 1")
        if self.max_attempts is not None:
            check_count("max_attempts", self.max_attempts)

    def delay(self, attempt_no: int) -> timedelta | None:
        """How long to wait after try number *attempt_no* has failed; None is not to try again."""
        if self.max_attempts is not None and attempt_no >= self.max_attempts:
            return None
        try:
            longest = min(self.base * self.factor ** (attempt_no - 1), self.cap)
        except OverflowError:
            longest = self.cap if self.base else self.base
        return longest * (1 - self.jitter * random.random())  # noqa: S311


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's time-limited ownership of an attempt; it holds while the database's clock is before ``expires_at``."""

    lease_id: str
    attempt_id: str
    worker_id: str
    version: int
    """The fencing token: it grows with every claim of the same attempt."""
    claimed_at: datetime
    heartbeat_at: datetime
    expires_at: datetime
    attempt: Attempt
    """The attempt as it was when it was claimed."""
    asked_at: float | None = field(default=None, compare=False, repr=False)
    """When this process asked for it or last renewed it, by its monotonic clock; ``leases.hold`` counts from there."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the application says of a thread: one row for each, with a status in the application's own words."""

    thread_id: str
    status: str
    created_at: datetime
    updated_at: datetime


class InterruptStatus(StrEnum):
    """Where an interrupt is in its life. The last two are final."""

    PENDING = "pending"
    RESUMED = "resumed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Interrupt:
    """A question that an attempt left behind, and its answer."""

    interrupt_id: str
    thread_id: str
    run_id: str
    attempt_id: str
    """The attempt that asked."""
    value: Any
    """What is asked."""
    status: InterruptStatus
    """Whether there is an answer; None is one, too."""
    created_at: datetime
    resume_payload: Any
    """The answer."""
    resume_payload_hash: str | None
    """The SHA-256 of the answer's canonical JSON, in hexadecimal; None where there is no answer, or none is known."""
    resumed_at: datetime | None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what to what, and how it went, in the application's own words."""

    audit_id: int
    actor_type: str
    actor_id: str | None
    actor_role: str | None
    action: str
    resource_type: str
    resource_id: str | None
    result: str
    request_id: str
    details: Any
    created_at: datetime


def attempt_from_row(row: Row) -> Attempt:
    """An attempt from the columns that every statement on attempts returns."""
    try:
        status = _STATUSES[row["status"]]
    except KeyError:
        raise _unknown(AttemptStatus, f"attempt {row['attempt_id']!r}", row["status"]) from None
    return Attempt(
        attempt_id=row["attempt_id"],
        run_id=row["run_id"],
        attempt_no=row["attempt_no"],
        status=status,
        queue=row["queue"],
        priority=row["priority"],
        payload=from_json(row["payload_json"]),
        max_attempts=row["max_attempts"],
        lease_version=row["lease_version"],
        worker_id=row["worker_id"],
        enqueued_at=from_ms(row["enqueued_at_ms"]),
        retry_at=_maybe_from_ms(row["retry_at_ms"]),
        started_at=_maybe_from_ms(row["started_at_ms"]),
        finished_at=_maybe_from_ms(row["finished_at_ms"]),
        result=from_json(row["result_json"]),
        error=row["error"],
    )


def lease_from_row(row: Row, *, asked_at: float | None = None) -> Lease:
    """A lease, with its attempt, from one joined row."""
    return Lease(
        lease_id=row["lease_id"],
        attempt_id=row["attempt_id"],
        worker_id=row["worker_id"],
        version=row["lease_version"],
        claimed_at=from_ms(row["claimed_at_ms"]),
        heartbeat_at=from_ms(row["heartbeat_at_ms"]),
        expires_at=from_ms(row["lease_expires_at_ms"]),
        attempt=attempt_from_row(row),
        asked_at=asked_at,
    )


def stats_from_row(row: Row) -> QueueStats:
    """One queue's numbers."""
    age = row["oldest_age_ms"]
    return QueueStats(
        row["queue"],
        row["ready"],
        row["delayed"],
        row["leased"],
        None if age is None else timedelta(milliseconds=max(age, 0)),
    )


def job_from_row(row: Row) -> Job:
    """A job from the columns that every statement on jobs returns."""
    return Job(row["thread_id"], row["status"], from_ms(row["created_at_ms"]), from_ms(row["updated_at_ms"]))


def interrupt_from_row(row: Row) -> Interrupt:
    """An interrupt from the columns that every statement on interrupts returns."""
    what = f"interrupt {row['interrupt_id']!r}"
    try:
        status = InterruptStatus(row["status"])
    except ValueError:
        raise _unknown(InterruptStatus, what, row["status"]) from None
    return Interrupt(
        interrupt_id=row["interrupt_id"],
        thread_id=row["thread_id"],
        run_id=row["run_id"],
        attempt_id=row["attempt_id"],
        value=from_json(row["value_json"], what),
        status=status,
        created_at=from_ms(row["created_at_ms"]),
        resume_payload=from_json(row["resume_payload_json"], what),
        resume_payload_hash=row["resume_payload_hash"],
        resumed_at=_maybe_from_ms(row["resumed_at_ms"]),
    )


def audit_entry_from_row(row: Row) -> AuditEntry:
    """An audit entry from the columns that every statement on audit entries returns."""
    return AuditEntry(
        audit_id=row["audit_id"],
        actor_type=row["actor_type"],
        actor_id=row["actor_id"],
        actor_role=row["actor_role"],
        action=row["action"],
        resource_type=row["resource_type"],
        resource_id=row["resource_id"],
        result=row["result"],
        request_id=row["request_id"],
        details=from_json(row["details_json"], f"audit entry {row['audit_id']}"),
        created_at=from_ms(row["created_at_ms"]),
    )


def _unknown(kind: type[StrEnum], what: str, status: str) -> RuntimeRepoError:
    return RuntimeRepoError(
        f"{what} has the unknown status {status!r}; known are {', '.join(kind)}: "
        "a newer release or another program wrote it"
    )


@lru_cache(maxsize=128)  # what one statement wrote has one time, and is read together
def from_ms(value: int) -> datetime:
    """The instant that a ``_ms`` column holds."""
    return _EPOCH + timedelta(milliseconds=value)


def _maybe_from_ms(value: int | None) -> datetime | None:
    return None if value is None else from_ms(value)


def instant_ms(name: str, value: datetime | None) -> int | None:
    """An aware instant in milliseconds since the epoch; None stays None."""
    if value is None:
        return None
    if value.tzinfo is None:
        raise ConfigurationError(f"{name} is {value!r}, without a time zone: pass an aware datetime, such as UTC")
    return (value - _EPOCH) // timedelta(milliseconds=1)


def span_ms(name: str, value: timedelta, *, positive: bool = False) -> int:
    """A duration in milliseconds; never negative, and not zero where it must be positive."""
    milliseconds = value // timedelta(milliseconds=1)
    if not (1 if positive else 0) <= milliseconds <= MAX_SPAN_MS:
        raise ConfigurationError(
            f"{name} is {value!r}: expected {'at least a millisecond' if positive else '0 or more'}, at most 1000 years"
        )
    return milliseconds


def check_id(name: str, value: str) -> str:
    """An id or a name that both databases can store."""
    if not isinstance(value, str) or not value or len(value) > MAX_ID_LENGTH or not is_text(value):
        shown = repr(value) if not isinstance(value, str) or len(value) <= 80 else f"{len(value)} characters long"
        raise ConfigurationError(f"{name} is {shown}: expected 1 to {MAX_ID_LENGTH} characters without NUL")
    return value


def queue_names(queues: str | Sequence[str]) -> Sequence[str]:
    """The queues that are named, each once."""
    names = list(dict.fromkeys([queues] if isinstance(queues, str) else queues))
    if not names:
        raise ConfigurationError("queues is empty: expected the name of a queue, or several")
    return [check_id("queues", name) for name in names]


def is_text(value: str) -> bool:
    """Whether both databases can store it: neither takes a lone surrogate, PostgreSQL takes no NUL."""
    return _NO_TEXT.search(value) is None


def check_count(name: str, value: int, *, least: int = 1, most: int = 2**31 - 1) -> int:
    """A number of things that both databases can store as an integer."""
    if not isinstance(value, int) or not least <= value <= most:
        raise ConfigurationError(f"{name} is {value!r}: expected a whole number from {least} to {most}")
    return value


def check_choice(name: str, kind: type[S], value: str) -> S:
    """One of the members of an enumeration."""
    try:
        return kind(value)
    except ValueError:
        raise ConfigurationError(f"{name} is {value!r}: expected one of {', '.join(kind)}") from None


def to_json(name: str, value: Any) -> str | None:
    """Canonical JSON, so that equal values are equal text; None is stored as NULL."""
    return None if value is None else json_text(name, value)


def json_text(name: str, value: Any) -> str:
    """Canonical JSON also of None, where that is a value like any other."""
    try:
        text = _CANONICAL.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{name} cannot be stored as JSON: {error}") from None
    if len(text) > MAX_PAYLOAD_BYTES:
        raise ConfigurationError(
            f"{name} is {len(text)} bytes of JSON: expected at most {MAX_PAYLOAD_BYTES}; store it elsewhere "
            "and pass a reference"
        )
    return text


def from_json(text: str | None, what: str = "a row") -> Any:
    """The value of a ``_json`` column; *what* it is of is for the error."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RuntimeRepoError(f"{what} holds what is no JSON ({error}): another program wrote it") from None


def new_id() -> str:
    """A unique id whose text order is the order of creation, to the millisecond (the layout of UUID version 7)."""
    return next(new_ids())


def new_ids() -> Iterator[str]:
    """Unique ids, each of which comes after the one before it in the order of text."""
    head = time.time_ns() // 1_000_000
    start = f"{head >> 16:08x}-{head & 0xFFFF:04x}-7"
    # The uppermost random bit is left clear, so that counting on does not overflow.
    tail = secrets.randbits(73)
    while True:
        yield f"{start}{tail >> 62:03x}-{0x8000 | tail >> 48 & 0x3FFF:04x}-{tail & 0xFFFF_FFFF_FFFF:012x}"
        tail += 1 + random.getrandbits(16)
