"""
What the repository hands out: frozen records, their statuses, and how each is read from a row.

A row can hold anything, for other programs write to the database as well. So a conversion raises one error for whatever
it cannot read, which names the row: ``UnreadableRowError``.
"""

import math
import operator
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, TypeVar

from runtime_repo.database import Row
from runtime_repo.errors import ConfigurationError, UnreadableRowError
from runtime_repo.values import check_count, from_json, from_ms, is_key, maybe_from_ms, span_ms

__all__ = [
    "ApiKey",
    "ApiKeyStatus",
    "Attempt",
    "AttemptStatus",
    "AuditEntry",
    "Interrupt",
    "InterruptStatus",
    "Job",
    "Lease",
    "NewAttempt",
    "Page",
    "QueueStats",
    "RetryPolicy",
    "StepReport",
    "api_key_from_row",
    "attempt_from_row",
    "audit_entry_from_row",
    "interrupt_from_row",
    "job_from_row",
    "lease_from_row",
    "page",
    "readable",
    "stats_from_row",
    "step_report_from_row",
]

DEFAULT_QUEUE = "default"
DEFAULT_MAX_ATTEMPTS = 10

T = TypeVar("T")
S = TypeVar("S", bound=StrEnum)

_MOST_UNREADABLE = 1000
"""How many errors a page keeps. It reads on past more of them, too."""

_LONGEST_AGE = timedelta.max // timedelta(milliseconds=1)


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


class Page(list[T], Generic[T]):
    """
    What a list returns, as a list.

    Attributes:
        unreadable: The errors of rows that belong here and cannot be read; an operator should correct or delete them.
    """

    __slots__ = ("unreadable",)

    def __init__(self, found: Iterable[T] = (), unreadable: Iterable[UnreadableRowError] = ()) -> None:
        super().__init__(found)
        self.unreadable = tuple(unreadable)


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
    lease_id: str | None = None
    """The id of the last lease given out; with the token it says whose the attempt is."""
    ended_by: str | None = None
    """
    The verb that took the attempt from its last holder or has decided on it since: complete, fail, release, cancel,
    retry, expire, give_back, or park for one that could not be read. None while it is held, and before the first claim.
    """
    headers: Any = None
    """What the application lets travel beside the payload, such as the context of a trace."""


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
    headers: Any = None


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
        if not isinstance(self.factor, (int, float)) or not 1 <= self.factor < math.inf:
            raise ConfigurationError(f"factor is {self.factor!r}: expected a number from 1 on")
        if not isinstance(self.jitter, (int, float)) or not 0 <= self.jitter <= 1:
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

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the last field: on another machine that clock tells another time.
        return type(self), tuple(getattr(self, part.name) for part in fields(self)[:-1])


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a worker reported of one step of an attempt, stored once for each dedupe token."""

    report_id: int
    """It grows with every report of the same attempt."""
    attempt_id: str
    action_id: str
    status: str
    """In the worker's own words."""
    dedupe_token: str
    payload: Any
    worker_id: str
    lease_version: int | None
    """The fencing token under which it was reported; None from version 1."""
    created_at: datetime
    is_duplicate: bool = field(default=False, compare=False)
    """Whether the ``record`` that returned it found it stored already."""


class ApiKeyStatus(StrEnum):
    """Whether an API key authenticates."""

    ACTIVE = "active"
    INACTIVE = "inactive"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What may be known of an API key: neither its secret nor the hash of it."""

    key_id: str
    role: str
    status: ApiKeyStatus
    created_at: datetime
    updated_at: datetime


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
        status = _STATUSES.get(row["status"])
        if status is None:
            raise _unknown(AttemptStatus, row["status"])
        attempt_id, run_id, queue = row["attempt_id"], row["run_id"], row["queue"]
        attempt_no, priority, max_attempts = row["attempt_no"], row["priority"], row["max_attempts"]
        lease_version = row["lease_version"]
        # As _check_types, whose call costs as much as the check.
        "".join((attempt_id, run_id, queue))
        _ = attempt_no | priority | max_attempts | lease_version
        # In the order of its fields: by their names it takes a tenth longer, for every row.
        return Attempt(
            attempt_id,
            run_id,
            attempt_no,
            status,
            queue,
            priority,
            from_json(row["payload_json"]),
            max_attempts,
            lease_version,
            row["worker_id"],
            from_ms(row["enqueued_at_ms"]),
            maybe_from_ms(row["retry_at_ms"]),
            maybe_from_ms(row["started_at_ms"]),
            maybe_from_ms(row["finished_at_ms"]),
            from_json(row["result_json"]),
            row["error"],
            row["lease_id"],
            row["ended_by"],
            from_json(row["headers_json"]),
        )
    except _UNREADABLE as error:
        raise _unreadable("runtime_attempts", row["attempt_id"], error) from None


def lease_from_row(row: Row, *, asked_at: float | None = None) -> Lease:
    """A lease, with its attempt, from one joined row: one under which each verb can find the attempt again."""
    attempt = attempt_from_row(row)
    if not is_key(attempt.attempt_id):
        raise UnreadableRowError("runtime_attempts", repr(attempt.attempt_id), "its id is no text to be asked for")
    if attempt.lease_version < 0:
        raise UnreadableRowError(
            "runtime_attempts", attempt.attempt_id, f"its token is {attempt.lease_version}, below 0"
        )
    try:
        lease_id, worker_id = row["lease_id"], row["worker_id"]
        "".join((lease_id, worker_id))
        return Lease(
            lease_id,
            attempt.attempt_id,
            worker_id,
            attempt.lease_version,
            from_ms(row["claimed_at_ms"]),
            from_ms(row["heartbeat_at_ms"]),
            from_ms(row["lease_expires_at_ms"]),
            attempt,
            asked_at,
        )
    except _UNREADABLE as error:
        raise _unreadable("runtime_leases", row["lease_id"], error) from None


def stats_from_row(row: Row) -> QueueStats:
    """One queue's numbers."""
    try:
        queue, ready, delayed, leased, age = (
            row[column] for column in ("queue", "ready", "delayed", "leased", "oldest_age_ms")
        )
        _check_types((queue,), ready | delayed | leased)
        # Where its time makes no sense it is as old as can be said.
        oldest = None if age is None else timedelta(milliseconds=min(max(age, 0), _LONGEST_AGE))
        return QueueStats(queue, ready, delayed, leased, oldest)
    except _UNREADABLE as error:
        raise _unreadable("runtime_attempts", f"of queue {row['queue']!r}", error) from None


def job_from_row(row: Row) -> Job:
    """A job from the columns that every statement on jobs returns."""
    try:
        thread_id, status = row["thread_id"], row["status"]
        _check_types((thread_id, status), 0)
        return Job(thread_id, status, from_ms(row["created_at_ms"]), from_ms(row["updated_at_ms"]))
    except _UNREADABLE as error:
        raise _unreadable("runtime_jobs", row["thread_id"], error) from None


def interrupt_from_row(row: Row) -> Interrupt:
    """An interrupt from the columns that every statement on interrupts returns."""
    try:
        interrupt_id, thread_id, run_id = row["interrupt_id"], row["thread_id"], row["run_id"]
        _check_types((interrupt_id, thread_id, run_id), 0)
        return Interrupt(
            interrupt_id=interrupt_id,
            thread_id=thread_id,
            run_id=run_id,
            attempt_id=row["attempt_id"],
            value=from_json(row["value_json"]),
            status=_known(InterruptStatus, row["status"]),
            created_at=from_ms(row["created_at_ms"]),
            resume_payload=from_json(row["resume_payload_json"]),
            resume_payload_hash=row["resume_payload_hash"],
            resumed_at=maybe_from_ms(row["resumed_at_ms"]),
        )
    except _UNREADABLE as error:
        raise _unreadable("runtime_interrupts", row["interrupt_id"], error) from None


def audit_entry_from_row(row: Row) -> AuditEntry:
    """An audit entry from the columns that every statement on audit entries returns."""
    try:
        actor_type, action, resource_type = row["actor_type"], row["action"], row["resource_type"]
        result, request_id = row["result"], row["request_id"]
        _check_types((actor_type, action, resource_type, result, request_id), row["audit_id"])
        return AuditEntry(
            audit_id=row["audit_id"],
            actor_type=actor_type,
            actor_id=row["actor_id"],
            actor_role=row["actor_role"],
            action=action,
            resource_type=resource_type,
            resource_id=row["resource_id"],
            result=result,
            request_id=request_id,
            details=from_json(row["details_json"]),
            created_at=from_ms(row["created_at_ms"]),
        )
    except _UNREADABLE as error:
        raise _unreadable("runtime_audit_logs", row["audit_id"], error) from None


def step_report_from_row(row: Row, *, is_duplicate: bool = False) -> StepReport:
    """A step report from the columns that every statement on step reports returns."""
    try:
        attempt_id, action_id, status = row["attempt_id"], row["action_id"], row["status"]
        dedupe_token, worker_id, version = row["dedupe_token"], row["worker_id"], row["lease_version"]
        _check_types((attempt_id, action_id, status, dedupe_token, worker_id), row["report_id"] | (version or 0))
        return StepReport(
            report_id=row["report_id"],
            attempt_id=attempt_id,
            action_id=action_id,
            status=status,
            dedupe_token=dedupe_token,
            payload=from_json(row["payload_json"]),
            worker_id=worker_id,
            lease_version=version,
            created_at=from_ms(row["created_at_ms"]),
            is_duplicate=is_duplicate,
        )
    except _UNREADABLE as error:
        raise _unreadable("runtime_step_reports", row["report_id"], error) from None


def api_key_from_row(row: Row) -> ApiKey:
    """An API key from the columns that every statement on API keys returns."""
    try:
        key_id, role = row["key_id"], row["role"]
        _check_types((key_id, role), 0)
        return ApiKey(
            key_id=key_id,
            role=role,
            status=_known(ApiKeyStatus, row["status"]),
            created_at=from_ms(row["created_at_ms"]),
            updated_at=from_ms(row["updated_at_ms"]),
        )
    except _UNREADABLE as error:
        raise _unreadable("runtime_api_keys", row["key_id"], error) from None


def readable(rows: Iterable[Row], read: Callable[[Row], T]) -> Page[T]:
    """What can be read of *rows*, and the errors of the others."""
    found: Page[T] = Page()
    errors = []
    for row in rows:
        try:
            found.append(read(row))
        except UnreadableRowError as error:
            errors.append(error)
    found.unreadable = tuple(errors)
    return found


async def page(
    fetch: Callable[[Any, int], Awaitable[Sequence[Row]]],
    read: Callable[[Row], T],
    *,
    after: Any,
    limit: int,
    place: Callable[[Row], Any],
) -> Page[T]:
    """
    *limit* records, or all that are left, from *fetch*: it returns so many rows after a place, in the order of places.

    It goes on past rows that cannot be read, so that a page shorter than *limit* is the last.
    """
    found: list[T] = []
    errors: dict[str, UnreadableRowError] = {}
    wanted = limit
    while True:
        rows = await fetch(after, wanted)
        here, kept = after, len(found)
        for row in rows:
            try:
                found.append(read(row))
            except UnreadableRowError as error:
                if len(errors) < _MOST_UNREADABLE:
                    errors[error.key] = error
            else:
                if len(found) == limit:
                    break
            if _is_place(place(row)):
                here, kept = place(row), len(found)
        if len(found) == limit or len(rows) < wanted:
            return Page(found, errors.values())
        # No step may be so small that there is no end to it; where no key tells the place, it is made from here anew.
        wanted = max(wanted, 100) if here != after else 2 * wanted
        after = here
        del found[kept:]


_UNREADABLE = (TypeError, ValueError, ArithmeticError, RuntimeError)
"""What a conversion meets: a value of another type, of no known word, out of range, or that nests too deep."""


def _check_types(texts: tuple[str, ...], number: int) -> None:
    """Raise a TypeError unless all are text and a number. Each check is one call, for this is done for every row."""
    "".join(texts)
    operator.index(number)


def _is_place(key: Any) -> bool:
    """Whether a page may begin after a key: not where it is NULL or was no UTF-8, which is read as something else."""
    return key is not None and not (isinstance(key, str) and "\N{REPLACEMENT CHARACTER}" in key)


def _known(kind: type[S], status: str) -> S:
    try:
        return kind(status)
    except ValueError:
        raise _unknown(kind, status) from None


def _unknown(kind: type[StrEnum], status: object) -> ValueError:
    return ValueError(f"it has the unknown status {status!r}; known are {', '.join(kind)}")


def _unreadable(table: str, key: object, error: Exception) -> UnreadableRowError:
    reason = str(error)
    if not isinstance(error, ValueError):
        # Python's own words.
        reason = f"a value is of another type or out of range ({reason})"
    return UnreadableRowError(table, "NULL" if key is None else str(key), reason)
