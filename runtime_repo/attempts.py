"""Attempts: units of work that are enqueued, tried under a lease, and finished once."""

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from operator import itemgetter
from typing import Any

from runtime_repo import fencing
from runtime_repo.bulk import Meant, Order, meant
from runtime_repo.database import Gate, Queries, Row, together
from runtime_repo.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    InvalidTransitionError,
    NotFoundError,
    shown,
)
from runtime_repo.fencing import check_lease, refused, repeated
from runtime_repo.mending import look_through, mend
from runtime_repo.queries import bounded
from runtime_repo.records import (
    DEFAULT_MAX_ATTEMPTS,
    DEFAULT_QUEUE,
    Attempt,
    AttemptStatus,
    Lease,
    NewAttempt,
    QueueStats,
    attempt_from_row,
    stats_from_row,
)
from runtime_repo.retry import RetryPolicy
from runtime_repo.rows import Page, page, readable
from runtime_repo.values import (
    Columns,
    as_read,
    canonical,
    check_after,
    check_batch,
    check_choice,
    check_count,
    check_id,
    check_iterable,
    check_key,
    check_same,
    instant_ms,
    is_key,
    new_id,
    new_ids,
    queue_names,
    skipped,
    span_ms,
    storable,
    to_json,
    written,
)

__all__ = ["Attempts"]

MAX_ERROR_LENGTH = 1024 * 1024

_DEEPEST = 100_000
"""How far the depth of a queue is counted."""

_LONGEST_POLL = 3.0
"""Seconds that one poll of ``wait`` may take, before it is known that the database has fallen silent."""

_Token = tuple[str, int, str]
"""What a lease is known by: its attempt, its fencing token and its id."""

_token: Callable[[Row], _Token] = itemgetter("attempt_id", "lease_version", "lease_id")
"""Which lease an attempt was given out under last."""

_LISTS = {
    AttemptStatus.QUEUED: "attempts.list_waiting",
    AttemptStatus.RETRY_BACKOFF: "attempts.list_waiting",
    AttemptStatus.LEASED: "attempts.list_held",
    AttemptStatus.RUNNING: "attempts.list_held",
    AttemptStatus.FAILED: "attempts.list_ended",
    AttemptStatus.CANCELLED: "attempts.list_ended",
    AttemptStatus.COMPLETED: "attempts.list_completed",
}
"""Where the attempts of a status are found."""

_IDENTITY = ("run_id", "queue", "payload_json")
"""What the same id must have in common, to be the same attempt."""


class Attempts:
    """
    The verbs on attempts. Every write is safe to repeat: a call that was cancelled or timed out may have happened.

    Payloads and results are JSON of at most 16 MiB and 100 levels, ids and names have 1 to 512 characters without
    NUL and at most 1,024 bytes of UTF-8, an attempt's own id 1,536; whatever cannot be stored raises
    ``ConfigurationError`` before anything is written.

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
        headers: Any = None,
        now: datetime | None = None,
    ) -> Attempt:
        """
        Store a unit of work, once.

        Repeating the call with the same *attempt_id* returns the attempt that is stored, as it is by now.

        Args:
            run_id: What the work belongs to, in the application's own terms: any number of attempts may be of one run,
                and ``list`` finds them by it.
            attempt_id: Makes the call safe to repeat. Without one a time-ordered id is made, and every call is another
                attempt.
            queue: Which workers may take it: those that claim from a queue of this name, which need not be made.
            priority: Higher goes first, within a queue and across the queues of one claim; of equal ones the oldest.
            payload: Any JSON, for whoever does the work.
            not_before: When it can be claimed; at once without one.
            max_attempts: How often it is tried. A try that failed and is to be repeated, and one whose lease ran out,
                count; one that was released does not.
            headers: JSON that travels beside the payload, such as the context of a trace; no part of what makes it the
                same attempt, so that of a repeated call those of the first one stay.

        Raises:
            PayloadMismatchError: The id is stored already with another run, queue or payload.
        """
        new = NewAttempt(run_id, attempt_id, queue, priority, payload, not_before, max_attempts, headers)
        given = _columns(new, new_id)
        rows = await self._queries.fetch(
            "attempts.enqueue",
            given["attempt_id"],
            given["run_id"],
            given["retry_at_ms"],
            given["queue"],
            given["priority"],
            given["payload_json"],
            given["max_attempts"],
            given["headers_json"],
            instant_ms("now", now),
        )
        self._queries.tell([queue])
        if rows:
            return attempt_from_row(rows[0])
        stored = attempt_from_row(written(await self._stored(given["attempt_id"]), f"attempt {given['attempt_id']!r}"))
        _check_same(stored, given)
        return stored

    async def enqueue_many(self, attempts: Iterable[NewAttempt], *, now: datetime | None = None) -> Sequence[str]:
        """
        Store many units of work together, each once, and return their ids in the order given.

        As ``enqueue`` for each, in one transaction: all are stored, or none is. An id that is stored already, or was
        given before in the same call, is the same attempt. Where ids are made, the order given is the order of age.
        Ten thousand at once are fine; the payloads and headers of one call may have 64 MiB of JSON together.

        Raises:
            PayloadMismatchError: An id is stored, or given twice, with another run, queue or payload.
        """
        ids = new_ids()
        given: dict[str, dict[str, Any]] = {}
        order = []
        all_new = True
        for new in check_iterable("attempts", attempts, "of NewAttempt"):
            if not isinstance(new, NewAttempt):
                raise ConfigurationError(f"an attempt is {shown(new)}: expected a NewAttempt")
            all_new = all_new and new.attempt_id is None
            columns = _columns(new, ids.__next__)
            order.append(columns["attempt_id"])
            before = given.setdefault(columns["attempt_id"], columns)
            if before is not columns:
                check_same("attempt", columns["attempt_id"], {name: before[name] for name in _IDENTITY}, columns)
        size = sum(
            len(columns["payload_json"] or "") + len(columns["headers_json"] or "") for columns in given.values()
        )
        check_batch("payloads", 0, size)
        if not given:
            return []
        arguments = (_array(given.values()), instant_ms("now", now))
        if all_new:
            await self._queries.fetch("attempts.enqueue_new", *arguments, len(given))
        else:
            await together(self._queries, partial(_enqueue_many, given, arguments))
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
        rows = await self._queries.fetch("attempts.find", check_key("attempt_id", attempt_id))
        return attempt_from_row(rows[0]) if rows else None

    async def _stored(self, attempt_id: str) -> Sequence[Row]:
        """What an answer to a repeated call is made from: it waits for the standbys, as the first call did."""
        return await self._queries.fetch("attempts.stored", check_key("attempt_id", attempt_id))

    async def list(
        self,
        *,
        run_id: str | None = None,
        status: AttemptStatus | None = None,
        queue: str | None = None,
        after: str = "",
        limit: int = 100,
    ) -> Page[Attempt]:
        """
        Return one page of the attempts of a run, a status or a queue, or of all, ordered by id.

        Pass the last id of a page as *after* to get the next; a page shorter than *limit* is the last. The order of
        text may differ between databases. A run is looked up, and so is a status, but for *completed*: that reads past
        what is not, and a queue past what is of others.
        What cannot be read is left out, and told in the page's ``unreadable``.
        """
        wanted = None if status is None else check_choice("status", AttemptStatus, status)
        of_queue = None if queue is None else check_id("queue", queue)
        query, which, rest = "attempts.list_all", tuple[str, ...](), tuple[str | None, ...]((of_queue,))
        if run_id is not None:
            query, which, rest = "attempts.list_by_run", (check_id("run_id", run_id),), (wanted, of_queue)
        elif wanted is not None:
            query, which = _LISTS[wanted], (wanted,)
        return await page(
            lambda after, limit: self._queries.fetch(query, *which, after, limit, *rest),
            attempt_from_row,
            after=check_after(after),
            limit=check_count("limit", limit),
            place=lambda row: row["attempt_id"],
        )

    async def list_dispatchable(
        self, *, queue: str = DEFAULT_QUEUE, limit: int = 100, now: datetime | None = None
    ) -> Page[Attempt]:
        """
        Return what claims could take from a queue, in their order: the highest priority first, then the oldest.

        Of delayed attempts whose time has come and that no claim has promoted yet, the longest due are among them, at
        most *limit*. Nothing is locked, so by the time of a claim somebody else may have taken them. While the store is
        quiesced or the queue paused claims could take nothing; ``list`` shows what waits.
        """
        of_queue, at = check_id("queue", queue), instant_ms("now", now)
        return await page(
            lambda _, limit: self._queries.fetch(bounded("attempts.list_dispatchable", limit), of_queue, limit, at),
            attempt_from_row,
            after=None,
            limit=check_count("limit", limit),
            place=lambda _: None,
        )

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
        seconds, or every second where nobody can listen, the queues are polled all the same; on SQLite the file is
        polled 30 times a second. Delayed attempts are known beforehand. A waiting caller holds no lock and no
        connection of the pool. While transactions of this process's hold all that there are, it waits for
        them, which may take 3 s beyond *timeout*. While the store is quiesced nothing can be claimed, nor of a queue
        that is paused: whoever waits is told of the end of it. *now* is the instant at which the wait begins.

        Raises:
            ConfigurationError: A queue's name or the time-out is invalid, or it is called within a transaction.
        """
        return await self._wait(queues, timeout, now=now)

    async def _wait(
        self,
        queues: str | Sequence[str],
        timeout: timedelta | None = None,  # noqa: ASYNC109 - as above
        *,
        now: datetime | None = None,
        noticed: Callable[[bool], None] | None = None,
    ) -> bool:
        """As ``wait``; at each poll it is *noticed* whether the store is quiesced."""
        names = queue_names(queues)
        begun = time.monotonic()
        deadline = begun + (math.inf if timeout is None else span_ms("timeout", timeout) / 1000)
        begun_ms = instant_ms("now", now)
        async with self._queries.watch(names) as watch:
            while True:
                row = await self._poll(names)
                if row is None:
                    # All connections are in transactions of this process's: nothing is known, and nothing is wrong.
                    if time.monotonic() >= deadline:
                        return False
                    continue
                if noticed is not None:
                    noticed(bool(row["is_quiesced"]))
                now_ms = row["now_ms"] if begun_ms is None else begun_ms + (time.monotonic() - begun) * 1000
                # What is no number is no time, and never comes.
                next_ms = row["next_ms"] if isinstance(row["next_ms"], (int, float)) else math.inf
                due = (next_ms - now_ms) / 1000
                if due <= 0:
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                await watch.change(min(left, due))

    async def _poll(self, queues: Sequence[str]) -> Row | None:
        """
        When something can be claimed; None if there was nothing to ask with for so long.

        Raises:
            DatabaseUnavailableError: Nobody answers, which a wait must notice.
        """
        try:
            rows = await self._queries.glance("attempts.next", json.dumps(queues), within=_LONGEST_POLL)
        except TimeoutError:
            raise DatabaseUnavailableError(
                f"the database gave no answer within {_LONGEST_POLL} s: check that it runs and can be reached from here"
            ) from None
        return None if rows is None else written(rows, "the look at the queues")

    async def stats(self, *, now: datetime | None = None) -> Page[QueueStats]:
        """Return how much there is to do in each queue that has anything, by name. It reads all that is not final."""
        return readable(await self._queries.fetch("attempts.stats", instant_ms("now", now)), stats_from_row)

    async def depth(self, queue: str = DEFAULT_QUEUE, *, most: int = 10_000, now: datetime | None = None) -> int:
        """
        Return how much of a queue could be claimed now: a metric, or what to scale workers by.

        It counts no further than *most*, which is 100,000 at most, and reads no more than that of the queue's index,
        however much there is besides.
        """
        of_queue, limit = check_id("queue", queue), check_count("most", most, most=_DEEPEST)
        rows = await self._queries.fetch("attempts.depth", of_queue, limit, instant_ms("now", now))
        row = written(rows, "the depth of the queue")
        return min(int(row["ready"] + row["due"]), limit)

    async def start(self, lease: Lease, *, now: datetime | None = None) -> Attempt:
        """
        Say that work has begun: the attempt is ``running``. Repeating the call changes nothing.

        Raises:
            LeaseLostError: The attempt is no longer this lease's: do not begin.
        """
        check_lease(lease)
        rows = await self._queries.fetch(
            "attempts.start", lease.attempt_id, lease.version, lease.lease_id, instant_ms("now", now)
        )
        if not rows:
            raise await refused(self._queries, lease)
        return attempt_from_row(rows[0])

    async def complete(self, lease: Lease, result: Any = None, *, now: datetime | None = None) -> Attempt:
        """
        Finish the attempt with a result and end the lease.

        The result is accepted until the attempt is requeued, cancelled or claimed by someone else, even when the
        lease has run out meanwhile. Repeating the call with the same lease returns the completed attempt.

        Raises:
            LeaseLostError: The attempt is no longer this lease's to finish: discard the result.
        """
        check_lease(lease)
        rows = await self._queries.fetch(
            "attempts.complete",
            lease.attempt_id,
            lease.version,
            to_json("result", result),
            instant_ms("now", now),
            lease.lease_id,
        )
        attempt = attempt_from_row(rows[0]) if rows else await repeated(self._queries, lease, "complete")
        self._queries.after_commit(lambda: fencing.ended([lease.lease_id]))
        return attempt

    async def complete_many(
        self, results: Iterable[tuple[Lease, Any]], *, now: datetime | None = None
    ) -> Sequence[bool]:
        """
        Finish many attempts in one statement, and say for each, in the order given, whether its lease held.

        As ``complete`` for each, but a lost lease is an answer, not an error: its result was discarded, and the others
        are finished all the same. Repeating the call gives the same answers. At most 10,000 at once, whose results may
        have 64 MiB of JSON together.
        """
        keys: list[_Token] = []
        given: dict[_Token, str | None] = {}
        size = 0
        for lease, result in _pairs(results):
            check_lease(lease)
            key = lease.attempt_id, lease.version, lease.lease_id
            keys.append(key)
            text = None
            if result is not None:
                text = to_json("result", result)
                size += len(text or "")
            # Of a lease that is given twice the first result counts, as in two calls.
            given.setdefault(key, text)
        check_batch("results", len(keys), size)
        if not given:
            return []
        attempt_ids, tokens, lease_ids = zip(*given, strict=True)
        columns = Columns(
            attempt_id=attempt_ids, token=[*map(str, tokens)], lease_id=lease_ids, result_json=[*given.values()]
        )
        rows = await self._queries.fetch("attempts.complete_many", columns, instant_ms("now", now))
        if len(rows) == 1 and rows[0]["attempt_id"] is None:
            self._queries.after_commit(lambda: fencing.ended(lease_ids))
            return [True] * len(keys)
        held = {_token(row) for row in rows}
        rest = given.keys() - held
        gone = {attempt_id for attempt_id, _, _ in rest}
        for row in await _stored_many(self._queries, gone):
            gone.discard(row["attempt_id"])
            if row["ended_by"] == "complete":
                held.add(_token(row))
            elif _token(row) in rest and row["status"] in (AttemptStatus.LEASED, AttemptStatus.RUNNING):
                raise skipped(f"attempt {row['attempt_id']!r}")
        # What may be read but not locked is not gone.
        if gone and (hidden := await self._queries.fetch("attempts.seen_many", json.dumps(sorted(gone)))):
            raise skipped(f"attempt {hidden[0]['attempt_id']!r}")
        self._queries.after_commit(lambda: fencing.ended(lease_id for _, _, lease_id in held & given.keys()))
        return [key in held for key in keys]

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
        delay, unless this was try number ``max_attempts``; without it the attempt has failed for good. What the
        database cannot store of *error* is replaced, and what is beyond its first million characters is cut, so that
        a failure can always be recorded. Repeating the call with the same lease returns the attempt, unless it was
        claimed, cancelled or retried by hand since.

        Raises:
            LeaseLostError: The attempt is no longer this lease's to fail.
        """
        check_lease(lease)
        if not isinstance(error, str):
            raise ConfigurationError(f"error is {shown(error)}: expected text")
        delay = retry_in.delay(lease.attempt.attempt_no) if isinstance(retry_in, RetryPolicy) else retry_in
        rows = await self._queries.fetch(
            "attempts.fail",
            lease.attempt_id,
            lease.version,
            storable(error if len(error) <= MAX_ERROR_LENGTH else f"{error[:MAX_ERROR_LENGTH]} [...]"),
            None if delay is None else span_ms("retry_in", delay),
            instant_ms("now", now),
            lease.lease_id,
        )
        attempt = attempt_from_row(rows[0]) if rows else await repeated(self._queries, lease, "fail")
        self._queries.after_commit(lambda: fencing.ended([lease.lease_id]))
        if attempt.retry_at is not None:
            self._queries.tell([attempt.queue])
        return attempt

    async def cancel(self, attempt_id: str, *, now: datetime | None = None) -> Attempt:
        """
        End an attempt that is not final, also while somebody works on it. Repeating the call changes nothing.

        Its lease ends at once: the holder's next write raises ``LeaseLostError`` with the status cancelled.

        Raises:
            NotFoundError: There is none with this id.
            InvalidTransitionError: It has completed or failed already.
        """
        rows = await self._queries.fetch("attempts.cancel", check_key("attempt_id", attempt_id), instant_ms("now", now))
        attempt = await self._as_it_is(attempt_id, rows)
        if not (rows or attempt.status.is_final):
            raise skipped(f"attempt {attempt_id!r}")
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
        rows = await self._queries.fetch("attempts.retry", check_key("attempt_id", attempt_id))
        attempt = await self._as_it_is(attempt_id, rows)
        if not rows and attempt.status is AttemptStatus.FAILED:
            raise skipped(f"attempt {attempt_id!r}")
        if attempt.status.is_final:
            raise InvalidTransitionError("attempt", attempt_id, status=attempt.status, verb="retry")
        self._queries.tell([attempt.queue])
        return attempt

    async def _as_it_is(self, attempt_id: str, rows: Sequence[Row]) -> Attempt:
        """The attempt that was changed, or the one that need not be."""
        rows = rows or await self._stored(attempt_id)
        if not rows:
            await self.get(attempt_id)
            raise skipped(f"attempt {attempt_id!r}")
        return attempt_from_row(rows[0])

    async def retry_many(
        self,
        *,
        actor: str,
        queue: str | None = None,
        error: str | None = None,
        older_than: timedelta | None = None,
        limit: int | None = None,
        now: datetime | None = None,
    ) -> int:
        """
        Give all failed attempts that fit one more try, by hand, and return how many: as ``retry`` for each.

        It is done in batches of at most a thousand, each a transaction of its own, with an entry of audit: a call that
        was cancelled or failed has been carried out in part, and can be repeated for the rest.

        Args:
            actor: Who wants it, for the audit.
            queue: Only those of this queue.
            error: Only those whose last error has these words in it, as they are written.
            older_than: Only those that failed more than that ago.
            limit: How many at most; all without one.
        """
        order = Order(
            self._queries,
            "retry_many",
            meant(status=AttemptStatus.FAILED, queue=queue, error=error, older_than=older_than, now=now),
            check_id("actor", actor),
            limit,
        )
        try:
            await order.carry_out("attempts.sift_ended", "attempts.retry_many")
        finally:
            self._queries.tell(order.queues)
        return order.done

    async def cancel_many(
        self,
        *,
        actor: str,
        status: AttemptStatus | None = None,
        queue: str | None = None,
        error: str | None = None,
        older_than: timedelta | None = None,
        limit: int | None = None,
        now: datetime | None = None,
    ) -> int:
        """
        End all attempts that fit and are not final, and return how many: as ``cancel`` for each, in batches as
        ``retry_many``.

        What is enqueued meanwhile may be among them or not: pause the queue before, or stop whoever enqueues.

        Args:
            actor: Who wants it, for the audit.
            status: Only those of this status, which is not final; otherwise also those that somebody works on.
            queue: Only those of this queue.
            error: Only those whose last error has these words in it, as they are written.
            older_than: Only those that were enqueued more than that ago.
            limit: How many at most; all without one.

        Raises:
            ConfigurationError: Nothing says which, or the status is a final one.
        """
        wanted = meant(status=status, queue=queue, error=error, older_than=older_than, now=now)
        if wanted.is_everything:
            raise ConfigurationError(
                "nothing says which attempts to cancel: give a status, a queue, an error or an age, such as "
                "older_than=timedelta(0) for all"
            )
        if wanted.status is not None and wanted.status.is_final:
            raise ConfigurationError(f"status is {wanted.status!r}: expected one that is not final")
        order = Order(self._queries, "cancel_many", wanted, check_id("actor", actor), limit)
        if wanted.status in (None, AttemptStatus.QUEUED, AttemptStatus.RETRY_BACKOFF):
            await order.carry_out("attempts.sift_waiting", "attempts.cancel_many")
        if wanted.status in (None, AttemptStatus.LEASED, AttemptStatus.RUNNING):
            await order.carry_out("attempts.sift_held", "attempts.cancel_many")
        return order.done

    async def prune(
        self,
        *,
        older_than: timedelta,
        status: AttemptStatus | None = None,
        queue: str | None = None,
        error: str | None = None,
        actor: str | None = None,
        limit: int = 1000,
        now: datetime | None = None,
    ) -> int:
        """
        Delete final attempts that ended more than *older_than* ago, the oldest first, and return how many.

        At most *limit* in one call, to keep its transaction short: repeat it until it returns fewer. An attempt's
        step reports and its interrupts go with it, a question that is still pending, too: answer or copy it before.
        Its tokens are forgotten, and the same id enqueued again begins with the first: let *older_than* be longer
        than any worker may hold on to a lease that is lost.

        Args:
            status: Only those of this status. It reads past the others, as for the next two, in batches as
                ``retry_many``.
            queue: Only those of this queue.
            error: Only those whose error has these words in it, as they are written.
            actor: Who wants it, for the audit, which has no entry without one.

        Raises:
            ConfigurationError: The status is not final.
        """
        wanted = meant(status=status, queue=queue, error=error, older_than=older_than, now=now)
        if wanted.status is not None and not wanted.status.is_final:
            raise ConfigurationError(f"status is {wanted.status!r}: expected a final one")
        order = Order(self._queries, "prune", wanted, actor, check_count("limit", limit))
        if (status, queue, error) != (None, None, None):
            await order.prune()
        elif actor is None:
            return len(await self._prune(self._queries, wanted, limit))
        else:
            await order.in_one(lambda statements: self._prune(statements, wanted, limit))
        return order.done

    async def _prune(self, queries: Queries, wanted: Meant, limit: int) -> Sequence[Row]:
        return await queries.fetch(bounded("attempts.prune", limit), wanted.age_ms, limit, wanted.now_ms)

    async def vacuum(self) -> None:
        """
        On PostgreSQL take away the dead rows that claims and completions have left behind; on SQLite there are none.

        The next claims read past them until that is done, and autovacuum comes once a minute at most. A Worker does it
        for what it has claimed itself; a loop of your own should after some 20,000 claims. It takes no lock that a verb
        waits for, skips a table that somebody else is vacuuming, and does nothing, silently, under a role that neither
        owns the tables nor has MAINTAIN on them (PostgreSQL 17; https://www.postgresql.org/docs/current/sql-vacuum.html).

        Raises:
            ConfigurationError: It is called within a transaction.
        """
        await self._queries.vacuum()

    async def reindex(self) -> int:
        """
        Let every attempt be found as what its row says that it is, and return how many were not.

        What waits, what is held and what has ended stands in tables of its own, which the verbs keep in step. After
        another program has changed attempts' rows, such as a status by hand, nothing finds them until this is called,
        or until a Worker's sweep comes past them, which looks through a thousand at a time. It may be called at any
        time and is done in small steps: others go on meanwhile. Of what is held under no lease the sweep takes care,
        ``leases.requeue_expired``.
        """
        mended = 0
        for look, put_right in (
            ("attempts.look_through", "attempts.mend"),
            ("attempts.look_through_queue", "attempts.unqueue"),
        ):
            seen = await look_through(self._queries, look, None)
            while seen.last is not None:
                mended += await mend(self._queries, put_right, seen)
                seen = await look_through(self._queries, look, seen.last)
        return mended


def _columns(new: NewAttempt, make_id: Callable[[], str]) -> dict[str, Any]:
    """What is stored of a new attempt, checked."""
    if new.attempt_id is not None and not is_key(check_key("attempt_id", new.attempt_id)):
        raise ConfigurationError(
            f"attempt_id is {shown(new.attempt_id)}: expected none with U+FFFD, which stands for what could not be read"
        )
    return {
        "attempt_id": make_id() if new.attempt_id is None else new.attempt_id,
        "run_id": check_id("run_id", new.run_id),
        "retry_at_ms": instant_ms("not_before", new.not_before),
        "queue": check_id("queue", new.queue),
        "priority": check_count("priority", new.priority, least=-(2**31)),
        "payload_json": to_json("payload", new.payload),
        "max_attempts": check_count("max_attempts", new.max_attempts),
        "headers_json": to_json("headers", new.headers),
    }


async def _enqueue_many(given: Mapping[str, dict[str, Any]], arguments: Sequence[object], queries: Queries) -> None:
    """Store all that is *given*, or what of it is not stored as it is given."""
    rows = await queries.fetch("attempts.enqueue_many", *arguments)
    known = given.keys() - {row["attempt_id"] for row in rows}
    for row in await _stored_many(queries, known):
        stored = attempt_from_row(row)
        _check_same(stored, given[stored.attempt_id])
        known.remove(stored.attempt_id)
    if known:
        raise skipped(f"attempt {min(known)!r}")


def _check_same(stored: Attempt, given: dict[str, Any]) -> None:
    """Refuse an id that is stored with other content."""
    payload = given["payload_json"]
    found = {
        "run_id": stored.run_id,
        "queue": stored.queue,
        "payload_json": None if stored.payload is None else canonical(stored.payload),
    }
    check_same("attempt", stored.attempt_id, found, given | {"payload_json": payload and as_read(payload)})


def _array(records: Iterable[Mapping[str, Any]]) -> str:
    return json.dumps(list(records))


def _pairs(results: Iterable[tuple[Lease, Any]]) -> Sequence[tuple[Lease, Any]]:
    """What is given to complete many, if it is that."""
    try:
        return [(lease, result) for lease, result in results]
    except (TypeError, ValueError):
        raise ConfigurationError("results is not what is expected: pairs of a lease and its result") from None


async def _stored_many(queries: Queries, ids: Collection[str]) -> Sequence[Row]:
    return await queries.fetch("attempts.stored_many", json.dumps(sorted(ids))) if ids else ()
