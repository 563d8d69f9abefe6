"""
What attempts and leases promise, said once more without a database: two dictionaries and the verbs on them.

One caller, and the time is always given. The verbs have the names, answers and errors of the library's; where its
contract leaves a choice, the model is told what was chosen and refuses what is not permitted.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from runtime_repo import (
    Attempt,
    AttemptStatus,
    InvalidTransitionError,
    Lease,
    LeaseLostError,
    NewAttempt,
    NotFoundError,
    PayloadMismatchError,
    QueueStats,
    RetryPolicy,
)

T = TypeVar("T")

QUEUED, LEASED, RUNNING, RETRY_BACKOFF, COMPLETED, FAILED, CANCELLED = AttemptStatus
HELD = (LEASED, RUNNING)


class Model:
    """The contract for a single caller."""

    def __init__(self) -> None:
        self.attempts: dict[str, Attempt] = {}
        self.leases: dict[str, Lease] = {}
        """By the attempt that is held; at most one for each."""

    # --- attempts ---

    def enqueue(self, run_id: str, *, now: datetime, **options: Any) -> Attempt:
        """Store it, unless it is stored."""
        new = NewAttempt(run_id, **options)
        self.enqueue_many([new], now=now)
        return self.get(new.attempt_id or "")

    def enqueue_many(self, attempts: Sequence[NewAttempt], *, now: datetime, blamed: str | None = None) -> list[str]:
        """Store all or none. Of several that are stored with other content any may be *blamed*."""
        given: dict[str, NewAttempt] = {}
        for new in attempts:
            _check_same(given.setdefault(new.attempt_id or "", new), new)
        for name in sorted(given.keys() & self.attempts.keys(), key=lambda name: name != blamed):
            _check_same(self.attempts[name], given[name])
        for name in given.keys() - self.attempts.keys():
            self.attempts[name] = _stored(given[name], now)
        return [new.attempt_id or "" for new in attempts]

    def get(self, attempt_id: str) -> Attempt:
        """It, or an error."""
        if attempt_id not in self.attempts:
            raise NotFoundError("attempt", attempt_id)
        return self.attempts[attempt_id]

    def find(self, attempt_id: str) -> Attempt | None:
        """It, or nothing."""
        return self.attempts.get(attempt_id)

    def list(
        self,
        *,
        run_id: str | None = None,
        status: AttemptStatus | None = None,
        queue: str | None = None,
        after: str = "",
        limit: int = 100,
    ) -> list[Attempt]:
        """Each filter holds, in the order of ids."""
        wanted = [
            attempt
            for name, attempt in sorted(self.attempts.items())
            if name > after
            and run_id in (None, attempt.run_id)
            and status in (None, attempt.status)
            and queue in (None, attempt.queue)
        ]
        return wanted[:limit]

    def list_dispatchable(self, *, queue: str, limit: int, now: datetime) -> Sequence[Attempt]:
        """What is ready, and of what is due the *limit* longest due, in the order of claims."""
        return sorted([*self._ready(queue), *self._due(queue, now)[:limit]], key=_dispatch_order)[:limit]

    def stats(self, *, now: datetime) -> Sequence[QueueStats]:
        """Each queue that has anything to do; what is due counts as ready."""
        found = []
        for queue in sorted({attempt.queue for attempt in self.attempts.values() if not attempt.status.is_final}):
            ready = [*self._ready(queue), *self._due(queue, now)]
            there = [attempt for attempt in self.attempts.values() if attempt.queue == queue]
            delayed = sum(attempt.retry_at is not None for attempt in there) - len(self._due(queue, now))
            held = sum(attempt.status in HELD for attempt in there)
            oldest = min((attempt.enqueued_at for attempt in ready), default=None)
            age = None if oldest is None else now - oldest
            found.append(QueueStats(queue, len(ready), delayed, held, age))
        return found

    def start(self, lease: Lease, *, now: datetime) -> Attempt:
        """It runs, from the first time that somebody said so in this try."""
        attempt = self._held(lease)
        return self._change(attempt, status=RUNNING, started_at=now if attempt.status is LEASED else attempt.started_at)

    def complete(self, lease: Lease, result: Any = None, *, now: datetime) -> Attempt:
        """Its end, with a result; the same lease again is answered alike."""
        if self._repeats(lease, "complete"):
            return self.get(lease.attempt_id)
        attempt = self._held(lease)
        return self._end(attempt, "complete", status=COMPLETED, result=result, error=None, finished_at=now)

    def complete_many(self, results: Iterable[tuple[Lease, Any]], *, now: datetime) -> Sequence[bool]:
        """One after the other."""
        return [_or_none(partial(self.complete, lease, result, now=now)) is not None for lease, result in results]

    def fail(self, lease: Lease, error: str, *, retry_in: timedelta | RetryPolicy | None, now: datetime) -> Attempt:
        """The end of this try; another one comes after a delay, if it is wanted and there is one left."""
        if self._repeats(lease, "fail"):
            return self.get(lease.attempt_id)
        attempt = self._held(lease)
        delay = retry_in.delay(attempt.attempt_no) if isinstance(retry_in, RetryPolicy) else retry_in
        if delay is None or attempt.attempt_no >= attempt.max_attempts:
            return self._end(attempt, "fail", status=FAILED, error=error, finished_at=now)
        number = attempt.attempt_no + 1
        return self._end(attempt, "fail", status=RETRY_BACKOFF, error=error, attempt_no=number, retry_at=now + delay)

    def cancel(self, attempt_id: str, *, now: datetime) -> Attempt:
        """The end of whatever is not final."""
        attempt = self.get(attempt_id)
        if attempt.status in (COMPLETED, FAILED):
            raise InvalidTransitionError("attempt", attempt_id, status=attempt.status, verb="cancel")
        if attempt.status is CANCELLED:
            return attempt
        return self._end(attempt, "cancel", status=CANCELLED, retry_at=None, finished_at=now)

    def retry(self, attempt_id: str) -> Attempt:
        """A failed one is ready again; what is not final is as wanted."""
        attempt = self.get(attempt_id)
        if attempt.status in (COMPLETED, CANCELLED):
            raise InvalidTransitionError("attempt", attempt_id, status=attempt.status, verb="retry")
        return attempt if attempt.status is not FAILED else self._end(attempt, "retry", status=QUEUED, finished_at=None)

    def prune(self, *, older_than: timedelta, limit: int, now: datetime) -> int:
        """The oldest final ones are gone."""
        ended = [(at, name) for name, attempt in self.attempts.items() if (at := attempt.finished_at) is not None]
        pruned = [name for at, name in sorted(ended) if at <= now - older_than][:limit]
        for name in pruned:
            del self.attempts[name]
        return len(pruned)

    # --- leases ---

    def claim(
        self,
        worker_id: str,
        *,
        limit: int,
        queues: str | Sequence[str],
        ttl: timedelta,
        now: datetime,
        lease_ids: Mapping[str, str],
    ) -> Sequence[Lease]:
        """The first of what is ready and of what is longest due; what is left of the latter is ready now."""
        candidates = []
        for queue in {queues} if isinstance(queues, str) else set(queues):
            due = [self._change(attempt, status=QUEUED, retry_at=None) for attempt in self._due(queue, now)[:limit]]
            candidates += [attempt for attempt in self._ready(queue) if attempt not in due] + due
        chosen = sorted(candidates, key=_dispatch_order)[:limit]
        return [self._lease(attempt, worker_id, ttl, now, lease_ids) for attempt in chosen]

    def claim_attempt(
        self, attempt_id: str, worker_id: str, *, ttl: timedelta, now: datetime, lease_ids: Mapping[str, str]
    ) -> Lease | None:
        """This one, if it is ready or due."""
        attempt = self.attempts.get(attempt_id)
        if attempt is None or attempt not in [*self._ready(attempt.queue), *self._due(attempt.queue, now)]:
            return None
        return self._lease(attempt, worker_id, ttl, now, lease_ids)

    def heartbeat(self, lease: Lease, *, ttl: timedelta, now: datetime) -> Lease:
        """Another *ttl* from now, for a lease that is not over."""
        stored = self.leases.get(lease.attempt_id)
        if stored is None or stored.lease_id != lease.lease_id or stored.expires_at <= now:
            raise self._lost(lease)
        self.leases[lease.attempt_id] = replace(stored, heartbeat_at=now, expires_at=now + ttl)
        return replace(lease, heartbeat_at=now, expires_at=now + ttl)

    def heartbeat_many(self, leases: Iterable[Lease], *, ttl: timedelta, now: datetime) -> Sequence[Lease | None]:
        """One after the other."""
        return [_or_none(partial(self.heartbeat, lease, ttl=ttl, now=now)) for lease in leases]

    def release(self, lease: Lease, *, delay: timedelta | None, now: datetime) -> Attempt:
        """Ready at once or later, the try not counted."""
        if self._repeats(lease, "release"):
            return self.get(lease.attempt_id)
        return self._end(self._held(lease), "release", status=QUEUED, retry_at=None if delay is None else now + delay)

    def requeue_expired(
        self, *, limit: int, grace: timedelta, now: datetime, taken: Sequence[str]
    ) -> Sequence[Attempt]:
        """The longest expired are ready, the try counted, or failed; which of those that expired together, is free."""
        expired = {name: lease.expires_at for name, lease in self.leases.items() if lease.expires_at <= now - grace}
        assert sorted(expired[name] for name in set(taken)) == sorted(expired.values())[:limit]
        return [self._requeue(self.attempts[name], now) for name in taken]

    def list_leases(self, *, worker_id: str | None = None, after: str = "", limit: int = 100) -> Sequence[Lease]:
        """Each with its attempt as it is now, in the order of the leases' ids."""
        leases = [replace(lease, attempt=self.attempts[name]) for name, lease in self.leases.items()]
        wanted = [lease for lease in leases if lease.lease_id > after and worker_id in (None, lease.worker_id)]
        return sorted(wanted, key=lambda lease: lease.lease_id)[:limit]

    # --- what they have in common ---

    def _ready(self, queue: str) -> Sequence[Attempt]:
        of_queue = (attempt for attempt in self.attempts.values() if attempt.queue == queue)
        return [attempt for attempt in of_queue if attempt.status is QUEUED and attempt.retry_at is None]

    def _due(self, queue: str, now: datetime) -> Sequence[Attempt]:
        """The longest due first. Whatever has a time is queued or in backoff."""
        times = [(at, name) for name, a in self.attempts.items() if a.queue == queue and (at := a.retry_at) is not None]
        return [self.attempts[name] for at, name in sorted(times) if at <= now]

    def _change(self, attempt: Attempt, **changes: Any) -> Attempt:
        self.attempts[attempt.attempt_id] = replace(attempt, **changes)
        return self.attempts[attempt.attempt_id]

    def _lease(
        self, attempt: Attempt, worker_id: str, ttl: timedelta, now: datetime, lease_ids: Mapping[str, str]
    ) -> Lease:
        name, token = attempt.attempt_id, attempt.lease_version + 1
        lease_id = lease_ids.get(name, "none")
        held = self._change(
            attempt,
            status=LEASED,
            retry_at=None,
            lease_version=token,
            worker_id=worker_id,
            lease_id=lease_id,
            ended_by=None,
        )
        assert name not in self.leases
        self.leases[name] = Lease(lease_id, name, worker_id, token, now, now, now + ttl, held)
        return self.leases[name]

    def _end(self, attempt: Attempt, verb: str, **changes: Any) -> Attempt:
        self.leases.pop(attempt.attempt_id, None)
        return self._change(attempt, ended_by=verb, **changes)

    def _requeue(self, attempt: Attempt, now: datetime) -> Attempt:
        error = f"the lease of worker {attempt.worker_id} expired"
        if attempt.attempt_no >= attempt.max_attempts:
            return self._end(attempt, "expire", status=FAILED, error=error, finished_at=now)
        return self._end(attempt, "expire", status=QUEUED, error=error, attempt_no=attempt.attempt_no + 1)

    def _repeats(self, lease: Lease, verb: str) -> bool:
        attempt = self.get(lease.attempt_id)
        return (attempt.lease_version, attempt.lease_id, attempt.ended_by) == (lease.version, lease.lease_id, verb)

    def _held(self, lease: Lease) -> Attempt:
        attempt = self.get(lease.attempt_id)
        if (attempt.lease_version, attempt.lease_id) != (lease.version, lease.lease_id) or attempt.status not in HELD:
            raise self._lost(lease)
        return attempt

    def _lost(self, lease: Lease) -> LeaseLostError:
        attempt, holder = self.get(lease.attempt_id), self.leases.get(lease.attempt_id)
        return LeaseLostError(
            attempt.attempt_id,
            token=lease.version,
            current=attempt.lease_version,
            status=attempt.status,
            worker_id=None if holder is None else holder.worker_id,
        )


def _stored(new: NewAttempt, now: datetime) -> Attempt:
    return Attempt(
        attempt_id=new.attempt_id or "",
        run_id=new.run_id,
        attempt_no=1,
        status=QUEUED,
        queue=new.queue,
        priority=new.priority,
        payload=new.payload,
        max_attempts=new.max_attempts,
        lease_version=0,
        worker_id=None,
        enqueued_at=now,
        retry_at=new.not_before,
        started_at=None,
        finished_at=None,
        result=None,
        error=None,
    )


def _check_same(stored: Attempt | NewAttempt, new: NewAttempt) -> None:
    names = ("run_id", "queue", "payload")
    if differing := [name for name in names if getattr(stored, name) != getattr(new, name)]:
        raise PayloadMismatchError("attempt", new.attempt_id or "", differing)


def _or_none(verb: Callable[[], T]) -> T | None:
    """Where many are given, a lost lease is an answer."""
    try:
        return verb()
    except (LeaseLostError, NotFoundError):
        return None


def _dispatch_order(attempt: Attempt) -> tuple[int, datetime, str]:
    return -attempt.priority, attempt.enqueued_at, attempt.attempt_id
