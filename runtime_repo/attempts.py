"""Attempts: units of work that are enqueued, tried under a lease, and finished once."""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from runtime_repo.database import Queries
from runtime_repo.errors import LeaseLostError, NotFoundError, PayloadMismatchError
from runtime_repo.records import (
    Attempt,
    AttemptStatus,
    Lease,
    attempt_from_row,
    check_count,
    check_id,
    instant_ms,
    new_id,
    span_ms,
    to_json,
)

__all__ = ["Attempts"]

DEFAULT_QUEUE = "default"
DEFAULT_MAX_ATTEMPTS = 10

_INT_RANGE = 2**31


class Attempts:
    """
    The verbs on attempts. Every write is safe to repeat: a call that was cancelled or timed out may have happened.

    *now* is for tests: it stands in for the database's clock, which judges everything otherwise.
    """

    def __init__(self, queries: Queries) -> None:
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
        given = {
            "run_id": check_id("run_id", run_id),
            "queue": check_id("queue", queue),
            "payload": to_json("payload", payload),
        }
        key = new_id() if attempt_id is None else check_id("attempt_id", attempt_id)
        rows = await self._queries.fetch(
            "attempts.enqueue",
            key,
            run_id,
            instant_ms("not_before", not_before),
            queue,
            check_count("priority", priority, least=-_INT_RANGE),
            given["payload"],
            check_count("max_attempts", max_attempts),
            instant_ms("now", now),
        )
        if rows:
            return attempt_from_row(rows[0])
        stored = await self.get(key)
        found = {"run_id": stored.run_id, "queue": stored.queue, "payload": to_json("payload", stored.payload)}
        if differing := [name for name, value in given.items() if found[name] != value]:
            raise PayloadMismatchError("attempt", key, differing)
        return stored

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

    async def list(self, *, run_id: str, after: str = "", limit: int = 100) -> Sequence[Attempt]:
        """
        Return one page of a run's attempts, ordered by id.

        Pass the last id of a page as *after* to get the next; a page shorter than *limit* is the last. The order of
        text may differ between databases.
        """
        rows = await self._queries.fetch(
            "attempts.list_by_run",
            check_id("run_id", run_id),
            after and check_id("after", after),
            check_count("limit", limit),
        )
        return [attempt_from_row(row) for row in rows]

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
        return attempt_from_row(rows[0]) if rows else await self._done_before(lease, AttemptStatus.COMPLETED)

    async def fail(
        self, lease: Lease, error: str, *, retry_in: timedelta | None = None, now: datetime | None = None
    ) -> Attempt:
        """
        Record that this try failed, and end the lease.

        With *retry_in* the attempt becomes ready again after that delay, unless this was try number
        ``max_attempts``; without it the attempt has failed for good. Repeating the call with the same lease returns
        the attempt, unless its next try has been claimed.

        Raises:
            LeaseLostError: The attempt is no longer this lease's to fail.
        """
        rows = await self._queries.fetch(
            "attempts.fail",
            lease.attempt_id,
            lease.version,
            re.sub("[\0\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", error),
            None if retry_in is None else span_ms("retry_in", retry_in),
            instant_ms("now", now),
        )
        if rows:
            return attempt_from_row(rows[0])
        return await self._done_before(lease, AttemptStatus.FAILED, AttemptStatus.RETRY_BACKOFF)

    async def _done_before(self, lease: Lease, *outcomes: AttemptStatus) -> Attempt:
        """The attempt, if this lease has already brought it to one of *outcomes*; otherwise the lease is lost."""
        attempt = await self.get(lease.attempt_id)
        if attempt.lease_version == lease.version and attempt.status in outcomes:
            return attempt
        raise await lost(self._queries, lease)


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
