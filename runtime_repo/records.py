"""What two nouns share: attempts, leases and their statuses, frozen, and how each is read from a row."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, ParamSpec, TypeVar, cast

from runtime_repo.database import Row
from runtime_repo.errors import UnreadableRowError
from runtime_repo.rows import UNREADABLE, check_types, unknown_status, unreadable
from runtime_repo.values import from_json, from_ms, is_key

__all__ = [
    "DEFAULT_MAX_ATTEMPTS",
    "DEFAULT_QUEUE",
    "Attempt",
    "AttemptStatus",
    "Lease",
    "NewAttempt",
    "QueueStats",
    "attempt_from_row",
    "lease_from_row",
    "stats_from_row",
]

DEFAULT_QUEUE = "default"
DEFAULT_MAX_ATTEMPTS = 10

T = TypeVar("T")
P = ParamSpec("P")

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


def _quickly(kind: Callable[P, T]) -> Callable[P, T]:
    """
    Make records of *kind*, a frozen dataclass with slots, of all its fields in their order, in a fifth of the time.

    What is frozen sets each field by a call. So a record is made as one of a kind that is equal, only not frozen, and
    which it then leaves.
    """
    draft = make_dataclass("_Draft", [(part.name, Any) for part in fields(cast(Any, kind))], slots=True)

    def make(*values: P.args, **_: P.kwargs) -> T:
        made: Any = draft(*values)
        made.__class__ = kind
        return cast(T, made)

    return make


_attempt, _lease = _quickly(Attempt), _quickly(Lease)


_ATTEMPT = operator.itemgetter(
    "attempt_id",
    "run_id",
    "attempt_no",
    "status",
    "queue",
    "priority",
    "payload_json",
    "max_attempts",
    "lease_version",
    "worker_id",
    "enqueued_at_ms",
    "retry_at_ms",
    "started_at_ms",
    "finished_at_ms",
    "result_json",
    "error",
    "lease_id",
    "ended_by",
    "headers_json",
)
"""All columns at once, for every row: in the order of the record's fields."""


def attempt_from_row(row: Row) -> Attempt:
    """An attempt from the columns that every statement on attempts returns."""
    try:
        (
            attempt_id,
            run_id,
            attempt_no,
            text,
            queue,
            priority,
            payload_json,
            max_attempts,
            lease_version,
            worker_id,
            enqueued_at_ms,
            retry_at_ms,
            started_at_ms,
            finished_at_ms,
            result_json,
            error,
            lease_id,
            ended_by,
            headers_json,
        ) = _ATTEMPT(row)
        status = _STATUSES.get(text)
        if status is None:
            raise unknown_status(AttemptStatus, text)
        # As check_types, whose call costs as much as the check.
        "".join((attempt_id, run_id, queue))
        _ = attempt_no | priority | max_attempts | lease_version
        # In the order of its fields: by their names it takes a tenth longer.
        return _attempt(
            attempt_id,
            run_id,
            attempt_no,
            status,
            queue,
            priority,
            None if payload_json is None else from_json(payload_json),
            max_attempts,
            lease_version,
            worker_id,
            from_ms(enqueued_at_ms),
            None if retry_at_ms is None else from_ms(retry_at_ms),
            None if started_at_ms is None else from_ms(started_at_ms),
            None if finished_at_ms is None else from_ms(finished_at_ms),
            None if result_json is None else from_json(result_json),
            error,
            lease_id,
            ended_by,
            None if headers_json is None else from_json(headers_json),
        )
    except UNREADABLE as failure:
        raise unreadable("runtime_attempts", row["attempt_id"], failure) from None


_LEASE = operator.itemgetter("lease_id", "worker_id", "claimed_at_ms", "heartbeat_at_ms", "lease_expires_at_ms")


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
        lease_id, worker_id, claimed_at_ms, heartbeat_at_ms, lease_expires_at_ms = _LEASE(row)
        "".join((lease_id, worker_id))
        return _lease(
            lease_id,
            attempt.attempt_id,
            worker_id,
            attempt.lease_version,
            from_ms(claimed_at_ms),
            from_ms(heartbeat_at_ms),
            from_ms(lease_expires_at_ms),
            attempt,
            asked_at,
        )
    except UNREADABLE as error:
        raise unreadable("runtime_leases", row["lease_id"], error) from None


def stats_from_row(row: Row) -> QueueStats:
    """One queue's numbers."""
    try:
        queue, ready, delayed, leased, age = (
            row[column] for column in ("queue", "ready", "delayed", "leased", "oldest_age_ms")
        )
        check_types((queue,), ready | delayed | leased)
        # Where its time makes no sense it is as old as can be said.
        oldest = None if age is None else timedelta(milliseconds=min(max(age, 0), _LONGEST_AGE))
        return QueueStats(queue, ready, delayed, leased, oldest)
    except UNREADABLE as error:
        raise unreadable("runtime_attempts", f"of queue {row['queue']!r}", error) from None
