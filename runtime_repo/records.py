"""What the repository hands out: frozen records, their statuses, and how each is read from a row."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from runtime_repo.database import Row
from runtime_repo.errors import ConfigurationError, RuntimeRepoError
from runtime_repo.values import check_count, from_json, from_ms, maybe_from_ms, span_ms

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
    "QueueStats",
    "RetryPolicy",
    "StepReport",
    "api_key_from_row",
    "attempt_from_row",
    "audit_entry_from_row",
    "interrupt_from_row",
    "job_from_row",
    "lease_from_row",
    "stats_from_row",
    "step_report_from_row",
]

DEFAULT_QUEUE = "default"
DEFAULT_MAX_ATTEMPTS = 10


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
        retry_at=maybe_from_ms(row["retry_at_ms"]),
        started_at=maybe_from_ms(row["started_at_ms"]),
        finished_at=maybe_from_ms(row["finished_at_ms"]),
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
        resumed_at=maybe_from_ms(row["resumed_at_ms"]),
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


def step_report_from_row(row: Row, *, is_duplicate: bool = False) -> StepReport:
    """A step report from the columns that every statement on step reports returns."""
    return StepReport(
        report_id=row["report_id"],
        attempt_id=row["attempt_id"],
        action_id=row["action_id"],
        status=row["status"],
        dedupe_token=row["dedupe_token"],
        payload=from_json(row["payload_json"], f"step report {row['report_id']}"),
        worker_id=row["worker_id"],
        lease_version=row["lease_version"],
        created_at=from_ms(row["created_at_ms"]),
        is_duplicate=is_duplicate,
    )


def api_key_from_row(row: Row) -> ApiKey:
    """An API key from the columns that every statement on API keys returns."""
    try:
        status = ApiKeyStatus(row["status"])
    except ValueError:
        raise _unknown(ApiKeyStatus, f"API key {row['key_id']!r}", row["status"]) from None
    return ApiKey(
        key_id=row["key_id"],
        role=row["role"],
        status=status,
        created_at=from_ms(row["created_at_ms"]),
        updated_at=from_ms(row["updated_at_ms"]),
    )


def _unknown(kind: type[StrEnum], what: str, status: str) -> RuntimeRepoError:
    return RuntimeRepoError(
        f"{what} has the unknown status {status!r}; known are {', '.join(kind)}: "
        "a newer release or another program wrote it"
    )
