"""Leases: a worker's time-limited ownership of an attempt, judged by the database's clock."""

import asyncio
import dataclasses
import json
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from runtime_repo.attempts import DEFAULT_QUEUE, lost
from runtime_repo.database import Queries, Row, finish
from runtime_repo.errors import RuntimeRepoError
from runtime_repo.records import (
    Attempt,
    Lease,
    attempt_from_row,
    check_count,
    check_id,
    from_ms,
    instant_ms,
    lease_from_row,
    new_id,
    span_ms,
)

__all__ = ["DEFAULT_TTL", "Leases"]

_log = logging.getLogger("runtime_repo")

DEFAULT_TTL = timedelta(seconds=30)


class Leases:
    """
    The verbs on leases.

    *now* is for tests: it stands in for the database's clock, which judges everything otherwise.
    """

    def __init__(self, queries: Queries) -> None:
        self._queries = queries

    async def claim(
        self,
        worker_id: str,
        *,
        limit: int = 1,
        queue: str = DEFAULT_QUEUE,
        ttl: timedelta = DEFAULT_TTL,
        now: datetime | None = None,
    ) -> Sequence[Lease]:
        """
        Take up to *limit* attempts of a queue that are ready: the highest priority first, then the oldest.

        Eligible is an attempt that is queued, and one whose ``retry_at`` has come. Rows that a rival is claiming at
        this instant are skipped, so an empty answer does not prove that the queue is empty: look again.

        A caller that is cancelled owns nothing: what was claimed is given back before the cancellation goes on.
        """
        check_id("worker_id", worker_id)
        check_id("queue", queue)
        length = span_ms("ttl", ttl, positive=True)
        at = instant_ms("now", now)
        leases: list[Lease] = []
        promoted = 1
        while promoted and len(leases) < check_count("limit", limit):
            ids = json.dumps([new_id() for _ in range(limit - len(leases))])
            claim = asyncio.ensure_future(self._claim(queue, worker_id, length, ids, at))
            try:
                await asyncio.wait([claim])
            except asyncio.CancelledError:
                await finish(self._undo(claim, ids, leases))
                raise
            rows = claim.result()
            promoted = rows[0]["promoted"] if rows else 0
            leases += [lease_from_row(row) for row in rows if row["lease_id"] is not None]
        return leases

    async def _claim(self, *args: object) -> Sequence[Row]:
        return await self._queries.fetch("leases.claim", *args)

    async def _undo(self, claim: "asyncio.Task[Sequence[Row]]", ids: str, before: Sequence[Lease]) -> None:
        """Give back what a cancelled caller claimed. The claim is over first, so that nothing commits behind this."""
        claim.cancel()
        await asyncio.wait([claim])
        if not claim.cancelled():
            claim.exception()
        ids = json.dumps([*json.loads(ids), *(lease.lease_id for lease in before)])
        try:
            await self._queries.fetch("leases.give_back", ids)
        except RuntimeRepoError as error:
            _log.warning("a cancelled claim could not be given back, its leases will expire: %s", error)

    async def heartbeat(self, lease: Lease, *, ttl: timedelta = DEFAULT_TTL, now: datetime | None = None) -> Lease:
        """
        Prove that the worker is alive and keep its lease for another *ttl*.

        The lease is renewed only while it is still this worker's and has not expired. Otherwise someone else may
        already be running the attempt: stop working and discard what you have. The token does not change.

        Raises:
            LeaseLostError: The lease expired, or the attempt was finished, requeued or claimed by another worker.
        """
        rows = await self._queries.fetch(
            "leases.heartbeat",
            lease.lease_id,
            lease.version,
            span_ms("ttl", ttl, positive=True),
            instant_ms("now", now),
        )
        if not rows:
            raise await lost(self._queries, lease)
        return dataclasses.replace(
            lease,
            heartbeat_at=from_ms(rows[0]["heartbeat_at_ms"]),
            expires_at=from_ms(rows[0]["lease_expires_at_ms"]),
        )

    async def requeue_expired(self, *, limit: int = 100, now: datetime | None = None) -> Sequence[Attempt]:
        """
        Take attempts from workers that fell silent, and make them ready for others.

        Returns the attempts whose lease had expired, at most *limit*: each is ``queued`` with the lost try counted or,
        after try number ``max_attempts``, ``failed``. Repeat it until it returns fewer than *limit*.
        """
        rows = await self._queries.fetch("leases.requeue_expired", check_count("limit", limit), instant_ms("now", now))
        return [attempt_from_row(row) for row in rows]
