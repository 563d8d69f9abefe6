"""Leases: a worker's time-limited ownership of an attempt, judged by the database's clock."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime, timedelta
from typing import cast

import anyio

from runtime_repo.attempts import ended_by, lost, repeated
from runtime_repo.database import Gate, Row
from runtime_repo.errors import ConfigurationError, DatabaseUnavailableError, LeaseLostError, RuntimeRepoError
from runtime_repo.records import DEFAULT_QUEUE, Attempt, AttemptStatus, Lease, attempt_from_row, lease_from_row
from runtime_repo.shielding import finish
from runtime_repo.values import (
    check_after,
    check_count,
    check_id,
    from_ms,
    instant_ms,
    new_id,
    new_ids,
    queue_names,
    span_ms,
)

__all__ = ["DEFAULT_TTL", "Leases"]

_log = logging.getLogger("runtime_repo")

DEFAULT_TTL = timedelta(seconds=30)
MAX_CLAIM = 10_000


class Leases:
    """
    The verbs on leases.

    *now* is for tests: it stands in for the database's clock, which judges everything otherwise.
    """

    def __init__(self, queries: Gate) -> None:
        self._queries = queries

    async def claim(
        self,
        worker_id: str,
        *,
        limit: int = 1,
        queues: str | Sequence[str] = DEFAULT_QUEUE,
        ttl: timedelta = DEFAULT_TTL,
        now: datetime | None = None,
    ) -> Sequence[Lease]:
        """
        Take up to *limit* attempts, at most 10,000, of one or several queues that are ready: the highest priority
        first, then the oldest, across the queues named.

        Eligible is an attempt that is queued, and one whose ``retry_at`` has come; of the latter the longest due, in
        each queue at most *limit*, so that a backlog of them does not make a claim slow. Rows that a rival is claiming
        at this instant are skipped, so an empty answer does not prove that the queues are empty: look again. One that
        cannot be read, since another program wrote it, is logged and left to expire: its tries count like others.

        A caller that is cancelled owns nothing: what was claimed is given back before the cancellation goes on.
        """
        check_id("worker_id", worker_id)
        names = queue_names(queues)
        query, wanted = "leases.claim", names[0]
        if len(names) > 1:
            query, wanted = "leases.claim_from_several", json.dumps(names)
        length = span_ms("ttl", ttl, positive=True)
        ids = json.dumps(list(itertools.islice(new_ids(), check_count("limit", limit, most=MAX_CLAIM))))
        given = (wanted, worker_id, length, ids, instant_ms("now", now))
        asked_at = time.monotonic()
        leases = []
        for row in await self._claim(query, given, ids):
            try:
                leases.append(lease_from_row(row, asked_at=asked_at))
            except RuntimeRepoError as error:
                # Raised, it would keep those that were claimed with it from being worked on, and end every worker.
                _log.error("attempt %r was claimed and cannot be read: %s", row["attempt_id"], error)
        return leases

    async def claim_attempt(
        self, attempt_id: str, worker_id: str, *, ttl: timedelta = DEFAULT_TTL, now: datetime | None = None
    ) -> Lease | None:
        """
        Take this very attempt, or nothing: None when it is held, final, not due yet, or missing.

        A caller that is cancelled owns nothing, as with ``claim``.
        """
        lease_id = new_id()
        given = (
            check_id("attempt_id", attempt_id),
            check_id("worker_id", worker_id),
            span_ms("ttl", ttl, positive=True),
            lease_id,
            instant_ms("now", now),
        )
        asked_at = time.monotonic()
        rows = await self._claim("leases.claim_attempt", given, json.dumps([lease_id]))
        return lease_from_row(rows[0], asked_at=asked_at) if rows else None

    async def _claim(self, query: str, given: Sequence[object], ids: str) -> Sequence[Row]:
        """What was claimed under the lease *ids*."""
        try:
            return await self._queries.fetch(query, *given)
        except asyncio.CancelledError:
            await finish(self._give_back(ids), within=0.8)
            raise

    async def _give_back(self, ids: str) -> None:
        """Give back what a cancelled caller may have claimed."""
        try:
            rows = await self._queries.fetch("leases.give_back", ids)
            self._queries.tell({row["queue"] for row in rows})
        except RuntimeRepoError as error:
            _log.warning("a cancelled claim could not be given back, its leases will expire: %s", error)

    async def heartbeat(self, lease: Lease, *, ttl: timedelta = DEFAULT_TTL, now: datetime | None = None) -> Lease:
        """
        Prove that the worker is alive and keep its lease for another *ttl*. May be repeated.

        The lease is renewed only while it is still this worker's and has not expired. Otherwise someone else may
        already be running the attempt: stop working and discard what you have. The token does not change.

        Raises:
            LeaseLostError: The lease expired, or the attempt was finished, requeued or claimed by another worker.
        """
        asked_at = time.monotonic()
        rows = await self._queries.fetch(
            "leases.heartbeat",
            lease.lease_id,
            lease.version,
            span_ms("ttl", ttl, positive=True),
            instant_ms("now", now),
        )
        if not rows:
            raise await lost(self._queries, lease)
        return _renewed(lease, rows[0], asked_at)

    async def heartbeat_many(
        self, leases: Iterable[Lease], *, ttl: timedelta = DEFAULT_TTL, now: datetime | None = None
    ) -> Sequence[Lease | None]:
        """
        Keep many leases in one statement; the answers are in the order given, None for one that is lost.

        As ``heartbeat`` for each, but a lost lease is an answer, not an error.
        """
        kept = list(leases)
        given = [{"lease_id": lease.lease_id, "attempt_id": lease.attempt_id, "token": lease.version} for lease in kept]
        length = span_ms("ttl", ttl, positive=True)
        asked_at = time.monotonic()
        at = instant_ms("now", now)
        rows = await self._queries.fetch("leases.heartbeat_many", json.dumps(given), length, at) if given else ()
        renewed = {row["lease_id"]: row for row in rows}
        return [
            _renewed(lease, renewed[lease.lease_id], asked_at) if lease.lease_id in renewed else None for lease in kept
        ]

    @contextlib.asynccontextmanager
    async def hold(
        self, lease: Lease, *, ttl: timedelta = DEFAULT_TTL, every: timedelta | None = None
    ) -> AsyncIterator[None]:
        """
        Keep the lease while the block runs, by a heartbeat in the background *every* so often (a third of *ttl*).

        The block is cancelled as soon as the lease is lost, and also when it can no longer be proved: when *ttl* has
        passed since the last heartbeat that succeeded was **sent**, by this process's clock, because the database did
        not answer. So nobody else's try begins while the block still runs, provided that it yields to the event loop.
        A block that ends the lease itself, by complete, fail or release, goes on undisturbed. When the block has ended
        no heartbeat is under way any more.

        Raises:
            LeaseLostError: The lease was lost; the block was cancelled.
        """
        length = span_ms("ttl", ttl, positive=True) / 1000
        pause = length / 3 if every is None else span_ms("every", every, positive=True) / 1000
        if pause >= length:
            raise ConfigurationError(f"every is {every!r}: expected less than the ttl, {ttl!r}")
        proved_until = _proved_until(lease)
        if proved_until is None or proved_until <= time.monotonic():
            # It was read, or comes from another process, or was claimed long ago.
            lease = await self.heartbeat(lease, ttl=ttl)
        ended: RuntimeRepoError | None = None
        failure: BaseException | None = None

        async def keep(block: anyio.CancelScope) -> None:
            nonlocal ended
            try:
                await self._keep(lease, ttl, pause)
            except RuntimeRepoError as error:
                ended = error
                block.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(keep, group.cancel_scope)
            try:
                yield
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # noqa: BLE001 - raised below, outside of any exception group
                failure = error
            finally:
                group.cancel_scope.cancel()
        if ended is not None:
            raise ended from failure
        if failure is not None:
            raise failure

    async def _keep(self, lease: Lease, ttl: timedelta, pause: float) -> None:
        """Renew the lease again and again, until its own holder has ended it."""
        until = cast(float, _proved_until(lease))
        wake_at = cast(float, lease.asked_at) + pause
        while True:
            await anyio.sleep(max(min(wake_at, until) - time.monotonic(), 0))
            try:
                with anyio.fail_after(max(until - time.monotonic(), 0)):
                    lease = await self.heartbeat(lease, ttl=ttl)
            except TimeoutError:
                raise LeaseLostError(
                    lease.attempt_id, token=lease.version, current=None, status=None, worker_id=None
                ) from None
            except LeaseLostError:
                with anyio.move_on_after(max(until - time.monotonic(), 0)):
                    if await self._ended_by_its_holder(lease):
                        return
                raise
            except DatabaseUnavailableError as error:
                _log.warning("a heartbeat failed and is tried again: %s", error)
                wake_at = time.monotonic() + pause / 10
            else:
                until = cast(float, _proved_until(lease))
                wake_at = cast(float, lease.asked_at) + pause

    async def _ended_by_its_holder(self, lease: Lease) -> bool:
        """Whether what ended the lease was complete, fail or release under this very token."""
        rows = await self._queries.fetch("attempts.find", lease.attempt_id)
        return bool(rows) and ended_by(lease, attempt_from_row(rows[0])) is not None

    async def release(self, lease: Lease, *, delay: timedelta | None = None, now: datetime | None = None) -> Attempt:
        """
        Give the attempt back unfinished, ready at once or after *delay*: the try does not count.

        Repeating the call with the same lease returns the attempt, unless it was claimed or cancelled since.

        Raises:
            LeaseLostError: The attempt is no longer this lease's to give back.
        """
        rows = await self._queries.fetch(
            "leases.release",
            lease.attempt_id,
            lease.version,
            None if delay is None else span_ms("delay", delay),
            instant_ms("now", now),
        )
        attempt = attempt_from_row(rows[0]) if rows else await repeated(self._queries, lease, "release")
        self._queries.tell([attempt.queue])
        return attempt

    async def list(self, *, worker_id: str | None = None, after: str = "", limit: int = 100) -> Sequence[Lease]:
        """
        Return one page of the leases, of one worker or of all, ordered by id; expired ones are among them.

        Pass the last id of a page as *after* to get the next; a page shorter than *limit* is the last.
        """
        page = (check_after(after), check_count("limit", limit))
        if worker_id is None:
            rows = await self._queries.fetch("leases.list", *page)
        else:
            rows = await self._queries.fetch("leases.list_by_worker", check_id("worker_id", worker_id), *page)
        return [lease_from_row(row) for row in rows]

    async def requeue_expired(
        self, *, limit: int = 100, grace: timedelta = timedelta(0), now: datetime | None = None
    ) -> Sequence[Attempt]:
        """
        Take attempts from workers that fell silent, and make them ready for others.

        Returns the attempts whose lease had expired more than *grace* ago, at most *limit*: each is ``queued`` with
        the lost try counted or, after try number ``max_attempts``, ``failed``. Repeat it until it returns fewer than
        *limit*.
        """
        rows = await self._queries.fetch(
            "leases.requeue_expired",
            check_count("limit", limit),
            instant_ms("now", now),
            span_ms("grace", grace),
        )
        attempts = [attempt_from_row(row) for row in rows]
        self._queries.tell({attempt.queue for attempt in attempts if attempt.status is AttemptStatus.QUEUED})
        return attempts


def _proved_until(lease: Lease) -> float | None:
    """Until when, by this process's monotonic clock, the lease is certainly nobody else's."""
    return None if lease.asked_at is None else lease.asked_at + (lease.expires_at - lease.heartbeat_at).total_seconds()


def _renewed(lease: Lease, row: Row, asked_at: float) -> Lease:
    return dataclasses.replace(
        lease,
        heartbeat_at=from_ms(row["heartbeat_at_ms"]),
        expires_at=from_ms(row["lease_expires_at_ms"]),
        asked_at=asked_at,
    )
