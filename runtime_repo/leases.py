"""Leases: a worker's time-limited ownership of an attempt, judged by the database's clock."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime, timedelta
from typing import cast

from runtime_repo import fencing
from runtime_repo.database import Gate, Heartbeats, Row, together
from runtime_repo.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    OutdatedReleaseError,
    OverloadedError,
    RefusedError,
    RuntimeRepoError,
    UnreadableRowError,
    shown,
)
from runtime_repo.fencing import check_lease, ended_by, holding, lost, repeated
from runtime_repo.keeping import MIN_PATIENCE, Keeper, proved_until
from runtime_repo.mending import look_through, mend
from runtime_repo.outages import Outages
from runtime_repo.queries import bounded
from runtime_repo.records import (
    DEFAULT_QUEUE,
    Attempt,
    AttemptStatus,
    Lease,
    attempt_from_row,
    lease_from_row,
)
from runtime_repo.rows import Page, page, readable
from runtime_repo.shielding import finish
from runtime_repo.values import (
    check_after,
    check_batch,
    check_count,
    check_id,
    check_iterable,
    check_key,
    from_ms,
    instant_ms,
    maybe_version,
    new_id,
    queues_json,
    skipped,
    span_ms,
    storable,
)

__all__ = ["DEFAULT_TTL", "Leases"]

_log = logging.getLogger("runtime_repo")

DEFAULT_TTL = timedelta(seconds=30)
MAX_CLAIM = 10_000

_LAST_TOKEN = 2**63 - 1
"""There is none after it, so it is never given out: it would be given out again."""

_MOST_REFUSED = 10_000
"""Of how many attempts it is remembered that the sweep was refused, and said so."""

_GIVE_BACK = 0.8
"""Seconds for which a cancelled claim is given back, while its caller waits to hear of the cancellation."""


class Leases:
    """
    The verbs on leases.

    *now* is for tests: it stands in for the database's clock, which judges everything otherwise.
    """

    def __init__(self, queries: Gate) -> None:
        self._queries = queries
        # The attempts of which it was logged that the sweep is refused.
        self._refused: set[str] = set()
        # Behind which attempt the sweep looks on for those that are not found as what they are.
        self._looked_through: object = None

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
        cannot be read, since another program wrote it, is logged and parked: it has failed, with the reason as its
        error.

        A caller that is cancelled owns nothing: what was claimed is given back before the cancellation goes on.

        While the store is quiesced, or a queue paused (``control``), nothing of it is eligible.

        Args:
            worker_id: Who takes them, for people to read in a list or an error: a worker's own name, any text. It need
                not be unique, for ownership is told by the lease.
            limit: How many at most.
            queues: From which, by name; one or several.
            ttl: How long the leases hold unless they are renewed by ``heartbeat`` or ``hold``. When it has passed, by
                the database's clock, a sweep gives the attempt to another worker, and the try counts as lost.
        """
        check_id("worker_id", worker_id)
        given = (
            queues_json(queues),
            worker_id,
            span_ms("ttl", ttl, positive=True),
            claim_id := new_id(),
            at := instant_ms("now", now),
            check_count("limit", limit, most=MAX_CLAIM),
        )
        return await self._claim(bounded("leases.claim", limit), given, claim_id, at)

    async def claim_attempt(
        self, attempt_id: str, worker_id: str, *, ttl: timedelta = DEFAULT_TTL, now: datetime | None = None
    ) -> Lease | None:
        """
        Take this very attempt, or nothing: None when it is held, final, not due yet, or missing, and while the store is
        quiesced or its queue paused.

        A caller that is cancelled owns nothing, as with ``claim``.

        Raises:
            UnreadableRowError: It cannot be read; it is parked as by ``claim``.
            OutdatedReleaseError: As by ``claim``.
        """
        given = (
            check_key("attempt_id", attempt_id),
            check_id("worker_id", worker_id),
            span_ms("ttl", ttl, positive=True),
            lease_id := new_id(),
            at := instant_ms("now", now),
        )
        leases = await self._claim("leases.claim_attempt", given, lease_id, at)
        if leases.unreadable:
            raise leases.unreadable[0]
        return leases[0] if leases else None

    async def _claim(self, query: str, given: Sequence[object], claim_id: str, at: int | None) -> Page[Lease]:
        """What was claimed. What cannot be read would come first again, and end every worker."""
        asked_at = time.monotonic()
        leases: Page[Lease] = Page()
        try:
            for row in await self._queries.fetch(query, *given):
                try:
                    leases.append(_below_the_last(lease_from_row(row, asked_at=asked_at)))
                except UnreadableRowError as error:
                    leases.unreadable += (error,)
                    await self._park(row, error, at)
        except (asyncio.CancelledError, OverloadedError):
            await finish(self._give_back(claim_id), within=_GIVE_BACK)
            raise
        except RefusedError as error:
            # A column that it names may be gone.
            await self._check_release(error)
            raise
        if not leases and not leases.unreadable:
            await self._check_release()
        return leases

    async def _check_release(self, cause: RefusedError | None = None) -> None:
        """
        See whether nothing was claimed since this release may not.

        Raises:
            OutdatedReleaseError: So it is.
        """
        try:
            rows = await self._queries.fetch("control.outdated")
        except RuntimeRepoError as error:
            _log.debug("whether this release is outdated is not known: %s", error)
            return
        if rows:
            found = rows[0]["found"]
            oldest = maybe_version(rows[0]["oldest"]) or found
            raise OutdatedReleaseError(found, rows[0]["supported"], oldest) from cause

    async def _park(self, row: Row, error: UnreadableRowError, now: object) -> None:
        """Let an operator find what cannot be read among what has failed."""
        _log.error("a claimed attempt is parked as failed: %s", error)
        given = row["lease_id"], storable(str(error)), now, row["attempt_id"]
        try:
            await together(self._queries, lambda queries: queries.fetch("leases.park", *given))
        except RuntimeRepoError as failure:
            _log.error("an attempt could not be parked, its lease will expire: %s", failure)

    async def _give_back(self, claim_id: str) -> None:
        """Give back what a cancelled caller may have claimed: a lease of this id, or all whose ids begin with it."""
        try:
            rows = await self._queries.fetch("leases.give_back", claim_id)
            self._queries.tell({row["queue"] for row in rows})
        except RuntimeRepoError as error:
            # Whoever claims again hears of the outage, too.
            _log.debug("a cancelled claim could not be given back, its leases will expire: %s", error)

    async def heartbeat(self, lease: Lease, *, ttl: timedelta = DEFAULT_TTL, now: datetime | None = None) -> Lease:
        """
        Prove that the worker is alive and keep its lease for another *ttl*. May be repeated.

        The lease is renewed only while it is still this worker's and has not expired. Otherwise someone else may
        already be running the attempt: stop working and discard what you have. The token does not change.

        Raises:
            LeaseLostError: The lease expired, or the attempt was finished, requeued or claimed by another worker.
        """
        check_lease(lease)
        at = instant_ms("now", now)
        rows, asked_at = await self._ask(
            "leases.heartbeat",
            lease.lease_id,
            lease.version,
            span_ms("ttl", ttl, positive=True),
            at,
            lease.attempt_id,
        )
        if not rows:
            raise await lost(self._queries, lease, at)
        return _renewed(lease, rows[0], asked_at)

    async def heartbeat_many(
        self, leases: Iterable[Lease], *, ttl: timedelta = DEFAULT_TTL, now: datetime | None = None
    ) -> Sequence[Lease | None]:
        """
        Keep many leases in one statement; the answers are in the order given, None for one that is lost.

        As ``heartbeat`` for each, but a lost lease is an answer, not an error. At most 10,000 at once.

        Raises:
            RefusedError: A lease still holds, and the database kept its row from us. The others are kept.
        """
        kept = [check_lease(lease) for lease in check_iterable("leases", leases, "of Lease")]
        check_batch("leases", len(kept))
        given = [{"lease_id": lease.lease_id, "attempt_id": lease.attempt_id, "token": lease.version} for lease in kept]
        length = span_ms("ttl", ttl, positive=True)
        asked_at = time.monotonic()
        at = instant_ms("now", now)
        rows = await self._queries.fetch("leases.heartbeat_many", json.dumps(given), length, at) if given else ()
        renewed = {row["lease_id"]: row for row in rows}
        await self._check_lost([lease for lease in kept if lease.lease_id not in renewed], at)
        return [
            _renewed(lease, renewed[lease.lease_id], asked_at) if lease.lease_id in renewed else None for lease in kept
        ]

    async def _check_lost(self, leases: Sequence[Lease], now_ms: int | None) -> None:
        """
        Find out whether they are lost, as they could not be renewed.

        Raises:
            RefusedError: One is not.
        """
        if not leases:
            return
        ids = json.dumps(sorted({lease.attempt_id for lease in leases}))
        held = await self._queries.fetch("leases.held_many", ids, now_ms)
        tokens = {(row["attempt_id"], row["lease_version"], row["lease_id"]) for row in held}
        for lease in leases:
            if (lease.attempt_id, lease.version, lease.lease_id) in tokens:
                raise skipped(f"lease {lease.lease_id!r}")

    async def _ask(self, query: str, *args: object) -> tuple[Sequence[Row], float]:
        """Run a query, and say when it was sent at the earliest."""
        asked_at = time.monotonic()
        return await self._queries.fetch(query, *args), asked_at

    @contextlib.asynccontextmanager
    async def hold(
        self, lease: Lease, *, ttl: timedelta = DEFAULT_TTL, every: timedelta | None = None
    ) -> AsyncIterator[None]:
        """
        Keep the lease while the block runs, by a heartbeat in the background *every* so often (a third of *ttl*); the
        first comes earlier where the lease was taken for less.

        The block is cancelled as soon as the lease is lost, and also when it can no longer be proved: when *ttl* has
        passed since the last heartbeat that succeeded was **sent**, by this process's clock, because the database did
        not answer; whatever the connection does then. So nobody else's try begins while the block still runs, provided
        that it yields to the event loop. A heartbeat is waited for no longer than a sixth of *ttl*, then the next one
        is tried, each with more patience.

        A block that ends the lease itself, by complete, fail or release, goes on undisturbed. When the block has ended
        no heartbeat is under way any more, or half a second has not been enough for its end and it was cancelled.

        Raises:
            LeaseLostError: The lease was lost, or can no longer be proved; the block was cancelled.
        """
        check_lease(lease)
        length = span_ms("ttl", ttl, positive=True) / 1000
        pause = length / 3 if every is None else span_ms("every", every, positive=True) / 1000
        if pause >= length:
            raise ConfigurationError(f"every is {shown(every)}: expected less than the ttl, {shown(ttl)}")
        await self._reserve(length)
        until = proved_until(lease)
        if until is None or until <= time.monotonic():
            # It was read, or comes from another process, or was claimed long ago.
            lease = await self._renew(lease, ttl)
        with holding(lease.lease_id, Outages(f"the hold of attempt {lease.attempt_id!r}", ttl=length)) as held:
            keeper = Keeper(
                lease,
                held,
                renew=lambda lease: self._renew(lease, ttl),
                was_ended=self._ended_by_its_holder,
                ttl=length,
                every=pause,
            )
            async with keeper.keeping():
                yield

    async def _reserve(self, ttl: float) -> None:
        """
        Get ready to renew leases of *ttl* seconds. What can have no heartbeats is refused at once; what is only away
        may be back when one is due.

        Raises:
            ConfigurationError: The pool that was given can have no connection for them, or this is a transaction.
        """
        with contextlib.suppress(TimeoutError, DatabaseUnavailableError):
            async with asyncio.timeout(max(ttl / 6, MIN_PATIENCE)):
                await self._queries.heartbeats()

    async def _renew(self, lease: Lease, ttl: timedelta) -> Lease:
        """One heartbeat, which does not wait behind the work. It proves the lease from when it was sent."""
        return await _Renewals(await self._queries.heartbeats()).heartbeat(lease, ttl=ttl)

    async def _ended_by_its_holder(self, lease: Lease) -> bool:
        """Whether what ended the lease was complete, fail or release under this very token."""
        beats = await self._queries.heartbeats()
        rows = await beats.fetch("attempts.find", lease.attempt_id)
        return bool(rows) and ended_by(lease, attempt_from_row(rows[0])) is not None

    async def release(self, lease: Lease, *, delay: timedelta | None = None, now: datetime | None = None) -> Attempt:
        """
        Give the attempt back unfinished, ready at once or after *delay*: the try does not count.

        Repeating the call with the same lease returns the attempt, unless it was claimed or cancelled since.

        Raises:
            LeaseLostError: The attempt is no longer this lease's to give back.
        """
        check_lease(lease)
        rows = await self._queries.fetch(
            "leases.release",
            lease.attempt_id,
            lease.version,
            None if delay is None else span_ms("delay", delay),
            instant_ms("now", now),
            lease.lease_id,
        )
        attempt = attempt_from_row(rows[0]) if rows else await repeated(self._queries, lease, "release")
        self._queries.after_commit(lambda: fencing.ended([lease.lease_id]))
        self._queries.tell([attempt.queue])
        return attempt

    async def list(self, *, worker_id: str | None = None, after: str = "", limit: int = 100) -> Page[Lease]:
        """
        Return one page of the leases, of one worker or of all, ordered by id; expired ones are among them. All that are
        held are read for each page.

        Pass the last id of a page as *after* to get the next; a page shorter than *limit* is the last. What cannot be
        read is left out, and told in the page's ``unreadable``.
        """
        query, given = "leases.list", tuple[str, ...]()
        if worker_id is not None:
            query, given = "leases.list_by_worker", (check_id("worker_id", worker_id),)
        return await page(
            lambda after, limit: self._queries.fetch(query, *given, after, limit),
            lease_from_row,
            after=check_after(after),
            limit=check_count("limit", limit),
            place=lambda row: row["lease_id"],
        )

    async def requeue_expired(
        self, *, limit: int = 100, grace: timedelta = timedelta(0), now: datetime | None = None
    ) -> Page[Attempt]:
        """
        Take attempts from workers that fell silent, and make them ready for others.

        Returns the attempts whose lease had expired more than *grace* ago, at most *limit*: each is ``queued`` with
        the lost try counted or, after try number ``max_attempts``, ``failed``. Repeat it until it returns fewer than
        *limit*. One that cannot be read is requeued as well, and told in the page's ``unreadable``; a lease whose
        attempt is gone is deleted. So are the attempts that another program left under a lease whose end is no time or
        lies a thousand years ahead, and those that it left held without a lease, of which each call looks through the
        next thousand attempts, and finds again what a status that was changed by hand has hidden (see
        ``attempts.reindex``).

        Where the database refuses one, the others are taken all the same, and that one is logged, once. Within a
        ``transaction()`` it is an error, as where all are refused.

        Raises:
            RefusedError: Nothing could be taken for that.
        """
        given = check_count("limit", limit), instant_ms("now", now), span_ms("grace", grace)
        try:
            rows = await self._queries.fetch("leases.requeue_expired", *given, None)
        except RefusedError as error:
            if self._queries.is_within:
                raise
            rows = await self._sweep_one_by_one(given, error)
        else:
            self._refused.clear()
        attempts = readable([*rows, *await self._sweep_the_stranded(given, len(rows))], attempt_from_row)
        self._queries.tell({attempt.queue for attempt in attempts if attempt.status is AttemptStatus.QUEUED})
        return attempts

    async def _sweep_the_stranded(self, given: tuple[int, int | None, int], swept: int) -> Sequence[Row]:
        """Look through the next attempts for what is held under no lease, or not found as what it is."""
        limit, now_ms, grace = given
        rows: list[Row] = []
        if swept >= limit:
            return rows
        seen = await look_through(self._queries, "attempts.look_through", self._looked_through)
        await mend(self._queries, "attempts.mend", seen)
        for attempt_id in seen.stranded[: limit - swept]:
            rows += await self._queries.fetch("leases.requeue_expired", 1, now_ms, grace, attempt_id)
        # Those that were too many are seen again.
        if len(seen.stranded) <= limit - swept:
            self._looked_through = seen.last
        return rows

    async def _sweep_one_by_one(self, given: tuple[int, int | None, int], refusal: RefusedError) -> Sequence[Row]:
        """
        What can be swept beside what the database refuses, of which each is logged once.

        Raises:
            RefusedError: All of it is refused.
        """
        limit, now_ms, grace = given
        # So many more, as those that were refused come first again.
        found = await self._queries.fetch("leases.list_silent", limit + len(self._refused), now_ms, grace)
        swept: list[Row] = []
        for attempt_id in dict.fromkeys(row["attempt_id"] for row in found):
            if len(swept) >= limit:
                break
            try:
                swept += await self._queries.fetch("leases.requeue_expired", 1, now_ms, grace, attempt_id)
            except RefusedError as error:
                if attempt_id not in self._refused and len(self._refused) < _MOST_REFUSED:
                    self._refused.add(attempt_id)
                    _log.error("attempt %r cannot be taken from a worker that fell silent: %s", attempt_id, error)
        if found and not swept:
            raise refusal
        return swept


class _Renewals(Leases):
    """The verbs, for what knows better when it has sent something: after it has waited for its turn."""

    def __init__(self, beats: Heartbeats) -> None:
        super().__init__(cast("Gate", beats))
        self._beats = beats

    async def _ask(self, query: str, *args: object) -> tuple[Sequence[Row], float]:
        return await self._beats.ask(query, *args)


def _below_the_last(lease: Lease) -> Lease:
    """Let a lease through, unless its token is the one that cannot be given out."""
    if lease.version >= _LAST_TOKEN:
        raise UnreadableRowError("runtime_attempts", lease.attempt_id, "its lease_version is the last that there is")
    return lease


def _renewed(lease: Lease, row: Row, asked_at: float) -> Lease:
    return dataclasses.replace(
        lease,
        heartbeat_at=from_ms(row["heartbeat_at_ms"]),
        expires_at=from_ms(row["lease_expires_at_ms"]),
        asked_at=asked_at,
    )
