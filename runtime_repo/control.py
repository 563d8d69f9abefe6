"""Control: the operator's switches, which every claim looks at: the store is quiesced, a queue is paused."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from runtime_repo.database import Gate, Row
from runtime_repo.errors import (
    ConfigurationError,
    ConflictError,
    LeaseHolder,
    LockHolder,
    NotQuietError,
    RefusedError,
    shown,
)
from runtime_repo.leases import Leases
from runtime_repo.rows import UNREADABLE, lock_holder_from_row, unreadable
from runtime_repo.values import (
    check_id,
    from_json,
    from_ms,
    instant_ms,
    json_text,
    maybe_version,
    plain,
    skipped,
    span_ms,
    written,
)

__all__ = ["Control", "ControlState", "QuiesceProgress", "Stop", "control_state"]

DEFAULT_TIMEOUT = timedelta(minutes=1)

_QUIESCE = "quiesce"
_PAUSE = "pause:"
_OLDEST = "oldest"

_EVERYBODY = ""
"""The name of no queue: whoever waits for any is told."""

_POLL_FIRST = 0.02
_POLL_LAST = 0.5
"""Seconds between two looks at what is still held."""

_SWEEP = 1000
"""How many leases that have run out are taken at a look."""


@dataclass(frozen=True, slots=True)
class Stop:
    """What an operator has stopped, since when and why."""

    since: datetime
    reason: str | None = None
    queue: str | None = None
    """None is the whole store."""


@dataclass(frozen=True, slots=True)
class ControlState:
    """What the operator's switches say."""

    quiesced: Stop | None
    """None where the store is open."""
    paused: tuple[Stop, ...] = ()
    """Each queue that is paused, by name."""
    oldest: int | None = None
    """
    The oldest release, by the version that it supports, which can run beside the schema that is there; None where only
    the releases can that know it.
    """

    @property
    def is_quiesced(self) -> bool:
        """Whether nobody can claim anything."""
        return self.quiesced is not None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return cast(dict[str, Any], plain(self))


@dataclass(frozen=True, slots=True)
class QuiesceProgress:
    """What a ``quiesce`` still waits for."""

    waited: float
    """Seconds since its beginning."""
    claims: tuple[LockHolder, ...]
    """Transactions that had begun before and may still claim; then nobody knows yet what is held."""
    holders: tuple[LeaseHolder, ...] = ()
    """Who holds leases, the one with the most first."""

    @property
    def leases(self) -> int:
        """How many are held."""
        return sum(holder.leases for holder in self.holders)


Progress = Callable[[QuiesceProgress], object]


class Control:
    """
    The verbs of an operator who wants work to stand still for a while.

    A switch stays set until it is cleared, whatever is restarted meanwhile. What is held goes on: heartbeats, reports
    and sweeps are not stopped, nor is what brings work. Workers find nothing to claim, and wait.

    *now* is for tests: it stands in for the database's clock.
    """

    def __init__(self, queries: Gate, leases: Leases) -> None:
        self._queries = queries
        self._leases = leases

    async def quiesce(
        self,
        reason: str | None = None,
        *,
        timeout: timedelta = DEFAULT_TIMEOUT,  # noqa: ASYNC109 - a duration like all others
        progress: Progress | None = None,
        now: datetime | None = None,
    ) -> ControlState:
        """
        Let nobody claim anything any more, and wait until nothing is held. May be repeated, to wait on.

        When it returns, no claim that had begun can still take a lease, and there is none: what workers held they have
        finished or given back, and what silent ones held was made ready again, the try counted. It stays so until
        ``resume``. If it raises or is cancelled, nobody claims all the same.

        On PostgreSQL a claim within a transaction of the application's own at REPEATABLE READ or SERIALIZABLE sees
        what that transaction saw first: end those before.

        Args:
            reason: Why, for whoever reads ``state``; what is given already stays where it is left out.
            timeout: How long to wait. With none at all it still looks once.
            progress: Is called with what is still waited for, first at once and then at every look, twice a second at
                most when it takes long.

        Raises:
            NotQuietError: Something is still held; it says by whom.
            ConflictError: Somebody resumed it meanwhile.
            ConfigurationError: An argument is invalid, or it is called within a transaction.
        """
        wait = _Wait(timeout, progress)
        at = instant_ms("now", now)
        row = await self._set(_QUIESCE, reason, at)
        await self._outwait(wait)
        while holders := await self._holders(now):
            await wait.on((), holders)
        stays = await self._queries.fetch("control.list")
        if not any((found["name"], found["updated_at_ms"]) == (_QUIESCE, row["updated_at_ms"]) for found in stays):
            raise ConflictError("somebody resumed the store while it was quiesced: agree, and quiesce it again")
        return control_state(stays)

    async def pause(
        self,
        queue: str,
        reason: str | None = None,
        *,
        timeout: timedelta = DEFAULT_TIMEOUT,  # noqa: ASYNC109 - as above
        now: datetime | None = None,
    ) -> ControlState:
        """
        Let nobody claim from *queue* any more; what is held of it goes on. May be repeated.

        When it returns, no claim that had begun can still take a lease, which *timeout* is for. If it raises or is
        cancelled, nobody claims from it all the same.

        Raises:
            NotQuietError: A transaction that had begun before may still claim; it says whose.
            ConfigurationError: An argument is invalid, or it is called within a transaction.
        """
        wait = _Wait(timeout)
        name = _PAUSE + check_id("queue", queue)
        await self._set(name, reason, instant_ms("now", now))
        await self._outwait(wait)
        return await self.state()

    async def resume(self, queue: str | None = None) -> ControlState:
        """
        Let everybody claim again who waits: from *queue*, or where none is named from all that are not paused.

        A queue that is paused stays so when the store is resumed, and the other way round. May be repeated.
        """
        name = _QUIESCE if queue is None else _PAUSE + check_id("queue", queue)
        cleared = await self._queries.fetch("control.clear", name)
        self._queries.tell([_EVERYBODY if queue is None else queue])
        rows = await self._queries.fetch("control.list")
        if not cleared and any(row["name"] == name for row in rows):
            raise skipped(f"the switch {name!r}")
        return control_state(rows)

    async def state(self) -> ControlState:
        """
        Return what is set.

        Raises:
            UnreadableRowError: The time of a switch cannot be read, which another program has written.
        """
        return control_state(await self._queries.fetch("control.list"))

    async def _set(self, name: str, reason: str | None, at: int | None) -> Row:
        said = None if reason is None else json_text("reason", {"reason": check_id("reason", reason)})
        if self._queries.is_within:
            raise ConfigurationError(
                "a transaction cannot stop claims and wait for those that have begun, for nobody sees what it has set "
                "before it ends: do it outside of it"
            )
        row = written(await self._queries.fetch("control.set", name, said, at), f"the switch {name!r}")
        # Whoever waits says in its log why it goes on waiting.
        self._queries.tell([_EVERYBODY])
        return row

    async def _outwait(self, wait: "_Wait") -> None:
        """Wait for every transaction that had begun, and so may not have seen what is set."""
        rows = await self._queries.fetch("control.claiming", None)
        while rows:
            await wait.on([lock_holder_from_row(row) for row in rows])
            rows = await self._queries.fetch("control.claiming", json.dumps([row["id"] for row in rows]))

    async def _holders(self, now: datetime | None) -> Sequence[LeaseHolder]:
        """Who holds leases that have not run out."""
        if rows := await self._queries.fetch("control.holders"):
            # What the database refuses is seen among what is held.
            with contextlib.suppress(RefusedError):
                await self._leases.requeue_expired(limit=_SWEEP, now=now)
            rows = await self._queries.fetch("control.holders")
        return [_lease_holder(row) for row in rows]


class _Wait:
    """A bounded wait that tells how it goes."""

    def __init__(self, timeout: timedelta, progress: Progress | None = None) -> None:
        self._seconds = span_ms("timeout", timeout) / 1000
        if progress is not None and not callable(progress):
            raise ConfigurationError(f"progress is {shown(progress)}: expected a function of one argument")
        self._progress = progress
        self._began = time.monotonic()
        self._pause = _POLL_FIRST

    async def on(self, claims: Sequence[LockHolder], holders: Sequence[LeaseHolder] = ()) -> None:
        """
        Wait for a moment, longer each time.

        Raises:
            NotQuietError: There is no time left.
        """
        waited = time.monotonic() - self._began
        if self._progress is not None:
            self._progress(QuiesceProgress(waited, tuple(claims), tuple(holders)))
        left = self._seconds - waited
        if left <= 0:
            raise NotQuietError(waited, claims, holders)
        await asyncio.sleep(min(left, self._pause))
        self._pause = min(self._pause * 2, _POLL_LAST)


def control_state(rows: Sequence[Row]) -> ControlState:
    """What the switches say."""
    quiesced: Stop | None = None
    paused: list[Stop] = []
    oldest: int | None = None
    for row in rows:
        name = row["name"]
        if name == _QUIESCE:
            quiesced = _stop(row)
        elif name == _OLDEST:
            oldest = maybe_version(row["value_json"])
        elif isinstance(name, str) and name.startswith(_PAUSE):
            paused.append(_stop(row, name.removeprefix(_PAUSE)))
    return ControlState(quiesced, tuple(sorted(paused, key=lambda stop: stop.queue or "")), oldest)


def _stop(row: Row, queue: str | None = None) -> Stop:
    value = _value(row)
    reason = value.get("reason") if isinstance(value, dict) else None
    try:
        return Stop(from_ms(row["updated_at_ms"]), reason if isinstance(reason, str) else None, queue)
    except UNREADABLE as error:
        raise unreadable("runtime_control", row["name"], error) from None


def _value(row: Row) -> Any:
    """What a switch says: that it is set counts, and whoever sets one by hand may say anything."""
    try:
        return from_json(row["value_json"])
    except UNREADABLE:
        return None


def _lease_holder(row: Row) -> LeaseHolder:
    expires_at: datetime | None = None
    with contextlib.suppress(*UNREADABLE):
        expires_at = from_ms(row["expires_at_ms"])
    return LeaseHolder(str(row["worker_id"]), row["leases"], str(row["attempt_id"]), expires_at)
