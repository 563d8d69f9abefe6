"""
What an operator does to many attempts at once: in batches that are short transactions, each with its entry of audit.

A batch looks at the next thousand of what waits, is held or has ended, writes those that fit, and says who had it done.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from runtime_repo.database import Gate, Queries, Row, Transaction, together
from runtime_repo.queries import bounded
from runtime_repo.records import AttemptStatus
from runtime_repo.values import check_choice, check_count, check_id, instant_ms, new_id, span_ms, to_json, written

__all__ = ["STEP", "Meant", "Order", "meant"]

STEP = 1000
"""How many a batch looks at."""

_BEFORE_ALL = -(2**63)


@dataclass(frozen=True, slots=True)
class Meant:
    """Which attempts are meant: those that fit all that is given."""

    status: AttemptStatus | None
    queue: str | None
    error: str | None
    age_ms: int | None
    now_ms: int | None

    @property
    def arguments(self) -> tuple[object, ...]:
        """From the second on, of every statement that asks what fits."""
        return (self.status, self.queue, self.error, self.age_ms, self.now_ms)

    @property
    def is_everything(self) -> bool:
        """Whether all fit."""
        return self.arguments[:-1] == (None,) * 4

    def as_dict(self) -> dict[str, Any]:
        """What was given, for the audit."""
        given = {"status": self.status, "queue": self.queue, "error": self.error, "older_than_ms": self.age_ms}
        return {name: value for name, value in given.items() if value is not None}


def meant(
    *,
    status: AttemptStatus | None = None,
    queue: str | None = None,
    error: str | None = None,
    older_than: timedelta | None = None,
    now: datetime | None = None,
) -> Meant:
    """
    The attempts that are meant, checked.

    Raises:
        ConfigurationError: An argument is invalid.
    """
    return Meant(
        None if status is None else check_choice("status", AttemptStatus, status),
        None if queue is None else check_id("queue", queue),
        None if error is None else check_id("error", error),
        None if older_than is None else span_ms("older_than", older_than),
        instant_ms("now", now),
    )


@dataclass
class Order:
    """
    What is to be done to those that are meant, and for whom.

    Attributes:
        verb: The verb's name, which the entries of audit bear.
        actor: Who wants it; None writes no entry.
        limit: How many at most; None is all.
        queues: Those of what was written.
    """

    queries: Gate
    verb: str
    meant: Meant
    actor: str | None
    limit: int | None
    done: int = 0
    queues: set[str] = field(default_factory=set)
    request_id: str = field(default_factory=new_id)

    def __post_init__(self) -> None:
        if self.actor is not None:
            check_id("actor", self.actor)
        if self.limit is not None:
            check_count("limit", self.limit)

    async def carry_out(self, sift: str, write: str) -> None:
        """Write all that one look after the other finds to fit."""

        async def do(statements: Transaction, place: str) -> tuple[Sequence[Row], Sequence[Row]]:
            seen = await statements.fetch(bounded(sift, STEP), place, *self.meant.arguments, STEP)
            ids = [row["attempt_id"] for row in self._first(seen)]
            rows = await statements.fetch(write, json.dumps(ids), *self.meant.arguments) if ids else ()
            self.queues.update(row["queue"] for row in rows)
            return seen, rows

        await self._in_batches(do, "", lambda row: row["attempt_id"])

    async def prune(self) -> None:
        """Delete what has ended long enough ago, the oldest first."""
        wanted = self.meant

        async def do(statements: Transaction, place: tuple[int, str]) -> tuple[Sequence[Row], Sequence[Row]]:
            sift = bounded("attempts.sift_old", STEP)
            seen = await statements.fetch(sift, place[1], *wanted.arguments, STEP, place[0])
            ends = [{name: row[name] for name in ("finished_at_ms", "attempt_id")} for row in self._first(seen)]
            if not ends:
                return seen, ()
            return seen, await statements.fetch("attempts.prune_many", wanted.age_ms, json.dumps(ends), wanted.now_ms)

        await self._in_batches(do, (_BEFORE_ALL, ""), lambda row: (row["finished_at_ms"], row["attempt_id"]))

    async def in_one(self, work: Callable[[Queries], Awaitable[Sequence[Row]]]) -> None:
        """Do *work*, which writes what its rows tell of, as one batch."""

        async def do(statements: Transaction) -> Sequence[Row]:
            rows = await work(statements)
            await self._audit(statements, len(rows))
            return rows

        self.done += len(await together(self.queries, do))

    def _first(self, seen: Sequence[Row]) -> Sequence[Row]:
        fitting = [row for row in seen if row["fits"]]
        return fitting if self.limit is None else fitting[: self.limit - self.done]

    async def _in_batches(
        self,
        do: Callable[[Transaction, Any], Awaitable[tuple[Sequence[Row], Sequence[Row]]]],
        place: Any,
        place_of: Callable[[Row], Any],
    ) -> None:
        async def batch(statements: Transaction) -> tuple[Sequence[Row], Sequence[Row]]:
            seen, rows = await do(statements, place)
            await self._audit(statements, len(rows))
            return seen, rows

        seen: Sequence[Row] = ()
        while not self.is_full:
            seen, rows = await together(self.queries, batch)
            self.done += len(rows)
            if len(seen) < STEP:
                return
            place = place_of(seen[-1])

    @property
    def is_full(self) -> bool:
        """Whether as many were written as are wanted."""
        return self.limit is not None and self.done >= self.limit

    async def _audit(self, statements: Queries, count: int) -> None:
        """Say who had how many written, where that is committed with it."""
        if self.actor is None or not count:
            return
        details: Mapping[str, Any] = self.meant.as_dict() | {"count": count}
        rows = await statements.fetch(
            "audit.append",
            "operator",
            self.actor,
            None,
            f"attempts.{self.verb}",
            "attempts",
            self.meant.queue,
            "ok",
            self.request_id,
            to_json("details", details),
            self.meant.now_ms,
        )
        written(rows, "the audit entry")
