"""Attempts: units of work that are enqueued, tried under a lease, and finished once."""

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from runtime_repo.database import Gate, Queries
from runtime_repo.errors import (
    ConfigurationError,
    InvalidTransitionError,
    LeaseLostError,
    NotFoundError,
)
from runtime_repo.fencing import ended
from runtime_repo.records import (
    DEFAULT_MAX_ATTEMPTS,
    DEFAULT_QUEUE,
    Attempt,
    AttemptStatus,
    Lease,
    NewAttempt,
    QueueStats,
    RetryPolicy,
    attempt_from_row,
    stats_from_row,
)
from runtime_repo.values import (
    as_read,
    check_after,
    check_choice,
    check_count,
    check_id,
    check_same,
    instant_ms,
    new_id,
    new_ids,
    queue_names,
    span_ms,
    storable,
    to_json,
)

__all__ = ["Attempts"]

MAX_BATCH_BYTES = 64 * 1024 * 1024

_IDENTITY = ("run_id", "queue", "payload_json")
"""What the same id must have in common, to be the same attempt."""


class Attempts:
    """
    The verbs on attempts. Every write is safe to repeat: a call that was cancelled or timed out may have happened.

    Payloads and results are JSON of at most 16 MiB, ids and names have 1 to 512 characters without NUL; whatever cannot
    be stored raises ``ConfigurationError`` before anything is written.

    *now* is for tests: it stands in for the database's clock, which judges everything otherwise.
    """

    def __init__(self, queries: Gate) -> None:
        self._queries = queries

    async def enqueue(
        self,
        run_id: str,
        *,
        attempt_id: str | None = None,
        queue: str = DEFAULT_QUEUE,
        priority: int = 0,
        payload: Any = None,
        not_before: datetime | None = None,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        now: datetime | None = None,
    ) -> Attempt:
        """
        Store a unit of work, once.

        Repeating the call with the same *attempt_id* returns the attempt that is stored, as it is by now. Without an
        id a time-ordered one is made, and every call is another attempt. The attempt can be claimed at once, or from
        *not_before* on.

        Raises:
            PayloadMismatchError: The id is stored already with another run, queue or payload.
        """
        new = NewAttempt(run_id, attempt_id, queue, priority, payload, not_before, max_attempts)
        given = _columns(new, new_id)
        rows = await self._queries.fetch("attempts.enqueue", *given.values(), instant_ms("now", now))
        self._queries.tell([queue])
        if rows:
            return attempt_from_row(rows[0])
        stored = await self.get(given["attempt_id"])
        _check_same(stored, given)
        return stored

    async def enqueue_many(self, attempts: Iterable[NewAttempt], *, now: datetime | None = None) -> Sequence[str]:
        """
        Store many units of work together, each once, and return their ids in the order given.

        As ``enqueue`` for each, in one transaction: all are stored, or none is. An id that is stored already, or was
        given before in the same call, is the same attempt. Where ids are made, the order given is the order of age.
        Ten thousand at once are fine; the payloads of one call may have 64 MiB of JSON together.

        Raises:
            PayloadMismatchError: An id is stored, or given twice, with another run, queue or payload.
        """
        ids = new_ids()
        given: dict[str, dict[str, Any]] = {}
        order = []
        all_new = True
        for new in attempts:
            if not isinstance(new, NewAttempt):
                raise ConfigurationError(f"an attempt is {new!r}: expected a NewAttempt")
            all_new = all_new and new.attempt_id is None
            columns = _columns(new, ids.__next__)
            order.append(columns["attempt_id"])
            before = given.setdefault(columns["attempt_id"], columns)
            if before is not columns:
                check_same("attempt", columns["attempt_id"], {name: before[name] for name in _IDENTITY}, columns)
        size = sum(len(columns["payload_json"] or "") for columns in given.values())
        if size > MAX_BATCH_BYTES:
            raise ConfigurationError(
                f"the payloads are {size} bytes of JSON together: expected at most {MAX_BATCH_BYTES}; use more calls"
            )
        if not given:
            return []
        arguments = (_array(given.values()), instant_ms("now", now))
        if all_new:
            await self._queries.fetch("attempts.enqueue_new", *arguments)
        else:
            async with self._queries.atomic() as queries:
                rows = await queries.fetch("attempts.enqueue_many", *arguments)
                known = given.keys() - {row["attempt_id"] for row in rows}
                for stored in await _find_many(queries, known):
                    _check_same(stored, given[stored.attempt_id])
        self._queries.tell({columns["queue"] for columns in given.values()})
        return order

    async def get(self, attempt_id: str) -> Attempt:
        """
        Return an attempt.

        Raises:
            NotFoundError: There is none with this id.
        """
        attempt = await self.find(attempt_id)
        if attempt is None:
            raise NotFoundError("attempt", attempt_id)
        return attempt

    async def find(self, attempt_id: str) -> Attempt | None:
        """Return an attempt, or None."""
        rows = await self._queries.fetch("attempts.find", check_id("attempt_id", attempt_id))
        return attempt_from_row(rows[0]) if rows else None

    async def list(
        self,
        *,
        run_id: str | None = None,
        status: AttemptStatus | None = None,
        queue: str | None = None,
        after: str = "",
        limit: int = 100,
    ) -> Sequence[Attempt]:
        """
        Return one page of the attempts of a run, a status or a queue, or of all, ordered by id.

        Pass the last id of a page as *after* to get the next; a page shorter than *limit* is the last. The order of
        text may differ between databases. A run and a status are looked up; a queue alone reads past what is of others.
        """
        page = (check_after(after), check_count("limit", limit))
        wanted = None if status is None else check_choice("status", AttemptStatus, status)
        of_queue = None if queue is None else check_id("queue", queue)
        if run_id is not None:
            rows = await self._queries.fetch(
                "attempts.list_by_run", check_id("run_id", run_id), *page, wanted, of_queue
            )
        elif wanted is not None:
            rows = await self._queries.fetch("attempts.list_by_status", wanted, *page, of_queue)
        else:
            rows = await self._queries.fetch("attempts.list_all", *page, of_queue)
        return [attempt_from_row(row) for row in rows]

    async def list_dispatchable(
        self, *, queue: str = DEFAULT_QUEUE, limit: int = 100, now: datetime | None = None
    ) -> Sequence[Attempt]:
        """
        Return what claims could take from a queue, in their order: the highest priority first, then the oldest.

        Of delayed attempts whose time has come and that no claim has promoted yet, the longest due are among them, at
        most *limit*. Nothing is locked, so by the time of a claim somebody else may have taken them.
        """
        rows = await self._queries.fetch(
            "attempts.list_dispatchable", check_id("queue", queue), check_count("limit", limit), instant_ms("now", now)
        )
        return [attempt_from_row(row) for row in rows]

    async def wait(
        self,
        queues: str | Sequence[str] = DEFAULT_QUEUE,
        timeout: timedelta | None = None,  # noqa: ASYNC109 - a duration like all others, and None is for ever
        *,
        now: datetime | None = None,
    ) -> bool:
        """
        Wait until something in one or several queues can be claimed: True at that, False after *timeout*.

        Nothing is reserved, so a rival may be faster. On PostgreSQL the server tells what comes (LISTEN), and every few
        seconds, or every second where nobody can listen, the queues are looked at all the same; on SQLite the file is
        looked at 30 times a second. Delayed attempts are known beforehand. A waiting caller holds no lock and no
        connection of the pool. *now* is the instant at which the wait begins.

        Raises:
            ConfigurationError: A queue's name or the time-out cannot be meant, or it is called within a transaction.
        """
        names = queue_names(queues)
        begun = time.monotonic()
        deadline = begun + (math.inf if timeout is None else span_ms("timeout", timeout) / 1000)
        begun_ms = instant_ms("now", now)
        async with self._queries.watch(names) as watch:
            while True:
                (row,) = await self._queries.fetch("attempts.next", json.dumps(names))
                now_ms = row["now_ms"] if begun_ms is None else begun_ms + (time.monotonic() - begun) * 1000
                due = math.inf if row["next_ms"] is None else (row["next_ms"] - now_ms) / 1000
                if due <= 0:
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                await watch.change(min(left, due))

    async def stats(self, *, now: datetime | None = None) -> Sequence[QueueStats]:
        """Return how much there is to do in each queue that has anything, by name. It reads all that is not final."""
        rows = await self._queries.fetch("attempts.stats", instant_ms("now", now))
        return [stats_from_row(row) for row in rows]

    async def start(self, lease: Lease, *, now: datetime | None = None) -> Attempt:
        """
        Say that work has begun: the attempt is ``running``. Repeating the call changes nothing.

        Raises:
            LeaseLostError: The attempt is no longer this lease's: do not begin.
        """
        rows = await self._queries.fetch("attempts.start", lease.attempt_id, lease.version, instant_ms("now", now))
        if not rows:
            raise await lost(self._queries, lease)
        return attempt_from_row(rows[0])

    async def complete(self, lease: Lease, result: Any = None, *, now: datetime | None = None) -> Attempt:
        """
        Finish the attempt with a result and end the lease.

        The result is accepted until the attempt is requeued, cancelled or claimed by someone else, even when the
        lease has run out meanwhile. Repeating the call with the same lease returns the completed attempt.

        Raises:
            LeaseLostError: The attempt is no longer this lease's to finish: discard the result.
        """
        rows = await self._queries.fetch(
            "attempts.complete", lease.attempt_id, lease.version, to_json("result", result), instant_ms("now", now)
        )
        if rows:
            self._queries.after_commit(partial(ended, [lease.lease_id]))
        return attempt_from_row(rows[0]) if rows else await repeated(self._queries, lease, "complete")

    async def complete_many(
        self, results: Iterable[tuple[Lease, Any]], *, now: datetime | None = None
    ) -> Sequence[bool]:
        """
        Finish many attempts in one statement, and say for each, in the order given, whether its lease held.

        As ``complete`` for each, but a lost lease is an answer, not an error: its result was discarded, and the others
        are finished all the same. Repeating the call gives the same answers.
        """
        pairs = list(results)
        given = {
            (lease.attempt_id, lease.version): {
                "attempt_id": lease.attempt_id,
                "token": lease.version,
                "result_json": to_json("result", result),
            }
            # Of a lease that is given twice the first result counts, as in two calls.
            for lease, result in reversed(pairs)
        }
        if not given:
            return []
        rows = await self._queries.fetch("attempts.complete_many", _array(given.values()), instant_ms("now", now))
        held = {(row["attempt_id"], row["lease_version"]) for row in rows}
        mine = [lease.lease_id for lease, _ in pairs if (lease.attempt_id, lease.version) in held]
        self._queries.after_commit(partial(ended, mine))
        rest = {attempt_id for attempt_id, _ in given.keys() - held}
        before = {
            (attempt.attempt_id, attempt.lease_version)
            for attempt in await _find_many(self._queries, rest)
            if attempt.status is AttemptStatus.COMPLETED
        }
        return [(lease.attempt_id, lease.version) in held | before for lease, _ in pairs]

    async def fail(
        self,
        lease: Lease,
        error: str,
        *,
        retry_in: timedelta | RetryPolicy | None = None,
        now: datetime | None = None,
    ) -> Attempt:
        """
        Record that this try failed, and end the lease.

        With *retry_in*, a delay or a policy that knows one for this try, the attempt becomes ready again after that
        delay, unless this was try number ``max_attempts``; without it the attempt has failed for good. Repeating the
        call with the same lease returns the attempt, unless it was claimed, cancelled or retried by hand since.

        Raises:
            LeaseLostError: The attempt is no longer this lease's to fail.
        """
        if not isinstance(error, str):
            raise ConfigurationError(f"error is {error!r}: expected text")
        delay = retry_in.delay(lease.attempt.attempt_no) if isinstance(retry_in, RetryPolicy) else retry_in
        rows = await self._queries.fetch(
            "attempts.fail",
            lease.attempt_id,
            lease.version,
            storable(error),
            None if delay is None else span_ms("retry_in", delay),
            instant_ms("now", now),
        )
        if rows:
            self._queries.after_commit(partial(ended, [lease.lease_id]))
            attempt = attempt_from_row(rows[0])
            if attempt.retry_at is not None:
                self._queries.tell([attempt.queue])
            return attempt
        return await repeated(self._queries, lease, "fail")

    async def cancel(self, attempt_id: str, *, now: datetime | None = None) -> Attempt:
        """
        End an attempt that is not final, also while somebody works on it. Repeating the call changes nothing.

        Its lease ends at once: the holder's next write raises ``LeaseLostError`` with the status cancelled.

        Raises:
            NotFoundError: There is none with this id.
            InvalidTransitionError: It has completed or failed already.
        """
        rows = await self._queries.fetch("attempts.cancel", check_id("attempt_id", attempt_id), instant_ms("now", now))
        attempt = attempt_from_row(rows[0]) if rows else await self.get(attempt_id)
        if attempt.status is not AttemptStatus.CANCELLED:
            raise InvalidTransitionError("attempt", attempt_id, status=attempt.status, verb="cancel")
        return attempt

    async def retry(self, attempt_id: str) -> Attempt:
        """
        Give a failed attempt one more try, by hand: it is ready at once, and keeps its number and its last error.

        Repeating the call changes nothing: an attempt that will be tried, or is being tried, is returned as it is.

        Raises:
            NotFoundError: There is none with this id.
            InvalidTransitionError: It has completed or was cancelled.
        """
        rows = await self._queries.fetch("attempts.retry", check_id("attempt_id", attempt_id))
        attempt = attempt_from_row(rows[0]) if rows else await self.get(attempt_id)
        if attempt.status.is_final:
            raise InvalidTransitionError("attempt", attempt_id, status=attempt.status, verb="retry")
        self._queries.tell([attempt.queue])
        return attempt

    async def prune(self, *, older_than: timedelta, limit: int = 1000, now: datetime | None = None) -> int:
        """
        Delete final attempts that ended more than *older_than* ago, the oldest first, and return how many.

        At most *limit* in one call, to keep its transaction short: repeat it until it returns fewer. An attempt's
        tokens are forgotten with it, and the same id enqueued again begins with the first: let *older_than* be longer
        than any worker may hold on to a lease that is lost.
        """
        rows = await self._queries.fetch(
            "attempts.prune",
            span_ms("older_than", older_than),
            check_count("limit", limit),
            instant_ms("now", now),
        )
        return len(rows)


async def repeated(queries: Queries, lease: Lease, verb: str) -> Attempt:
    """The attempt, if *verb* has already ended this lease; otherwise the lease is lost."""
    rows = await queries.fetch("attempts.find", lease.attempt_id)
    attempt = attempt_from_row(rows[0]) if rows else None
    if attempt is not None and ended_by(lease, attempt) == verb:
        return attempt
    raise await lost(queries, lease)


def ended_by(lease: Lease, attempt: Attempt) -> str | None:
    """
    Which of its holder's verbs ended *lease*, to judge by what became of the attempt; None if it was taken away.

    A failed try counts and a released one does not; that of a lease that expired counts, too, but says so.
    """
    if attempt.lease_version != lease.version:
        return None
    match attempt.status:
        case AttemptStatus.COMPLETED:
            return "complete"
        case AttemptStatus.QUEUED if attempt.attempt_no == lease.attempt.attempt_no:
            # With another error it has failed for good since, and was retried by hand.
            return "release" if attempt.error == lease.attempt.error else None
        case AttemptStatus.QUEUED | AttemptStatus.RETRY_BACKOFF | AttemptStatus.FAILED:
            return "fail" if attempt.error != f"the lease of worker {lease.worker_id} expired" else None
    return None


def _columns(new: NewAttempt, make_id: Callable[[], str]) -> dict[str, Any]:
    """What is stored of a new attempt, checked, in the order in which a single one is given to its statement."""
    return {
        "attempt_id": make_id() if new.attempt_id is None else check_id("attempt_id", new.attempt_id),
        "run_id": check_id("run_id", new.run_id),
        "retry_at_ms": instant_ms("not_before", new.not_before),
        "queue": check_id("queue", new.queue),
        "priority": check_count("priority", new.priority, least=-(2**31)),
        "payload_json": to_json("payload", new.payload),
        "max_attempts": check_count("max_attempts", new.max_attempts),
    }


def _check_same(stored: Attempt, given: dict[str, Any]) -> None:
    """Refuse an id that is stored with other content."""
    payload = given["payload_json"]
    found = {
        "run_id": stored.run_id,
        "queue": stored.queue,
        "payload_json": to_json("payload", stored.payload),
    }
    check_same("attempt", stored.attempt_id, found, given | {"payload_json": payload and as_read(payload)})


def _array(records: Iterable[Mapping[str, Any]]) -> str:
    return json.dumps(list(records))


async def _find_many(queries: Queries, ids: Collection[str]) -> Sequence[Attempt]:
    rows = await queries.fetch("attempts.find_many", json.dumps(sorted(ids))) if ids else ()
    return [attempt_from_row(row) for row in rows]


async def lost(queries: Queries, lease: Lease) -> LeaseLostError | NotFoundError:
    """The error that says why *lease* can no longer be acted on."""
    rows = await queries.fetch("leases.holder", lease.attempt_id)
    if not rows:
        return NotFoundError("attempt", lease.attempt_id)
    return LeaseLostError(
        lease.attempt_id,
        token=lease.version,
        current=rows[0]["lease_version"],
        status=rows[0]["status"],
        worker_id=rows[0]["worker_id"],
    )
