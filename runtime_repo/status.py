"""
What is there: the whole of a store as an operator sees it, and what moves in its queues.

Both need no boot and write nothing. What can be told is told, of a schema at an earlier version, of one that boot
refuses, and where there is nothing; what could not be told is said.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, TypeVar, cast

from runtime_repo.catalog import CONTROL, LEDGER, LedgerRow, Look
from runtime_repo.control import ControlState, control_state
from runtime_repo.database import Backend, Database, Reader, Row
from runtime_repo.errors import DatabaseUnavailableError, LockHolder, RuntimeRepoError, UnreadableRowError
from runtime_repo.records import QueueStats, stats_from_row
from runtime_repo.rows import UNREADABLE, check_types, readable
from runtime_repo.schema import Migration, Policy, Refuse, SchemaStatus, decide, inspected, status_of
from runtime_repo.values import from_ms, plain, span_ms

__all__ = [
    "Activity",
    "QueueActivity",
    "RecordedMigration",
    "StoreStatus",
    "TableSize",
    "WorkerLeases",
    "activity_of_store",
    "status_of_store",
]

T = TypeVar("T")
R = TypeVar("R")

_MOST_WORKERS = 1000
_MOST_ENDED = 100_000


@dataclass(frozen=True)
class RecordedMigration:
    """A row of the ledger."""

    version: int
    name: str
    applied_at: datetime


@dataclass(frozen=True)
class WorkerLeases:
    """The leases of one worker."""

    worker_id: str
    leases: int
    expired: int
    """Those that have run out and that nobody has requeued yet."""
    first_expiry: datetime
    heartbeat_at: datetime
    """When it last renewed one of them."""


@dataclass(frozen=True)
class TableSize:
    """What a table of ours takes."""

    name: str
    size: int
    """Bytes, with its indexes."""
    rows: int | None
    """About how many, as it was last analyzed; None where it never was."""


@dataclass(frozen=True)
class StoreStatus:
    """
    A store as it is. What is None or empty was not there or could not be told; *unknown* says which.

    It was read piece by piece: what changes meanwhile may be seen in one piece and not in another.
    """

    backend: Backend
    place: str
    """Where it is, without a password."""
    server: str | None
    """As in ``PostgreSQL 18.1``; None where there is no file."""
    schema: SchemaStatus
    """What a boot would make of it, and every difference."""
    ledger: tuple[RecordedMigration, ...] = ()
    migrating: LockHolder | None = None
    """Who holds the migration lock; on SQLite nobody can know."""
    control: ControlState | None = None
    """What the operator has stopped."""
    queues: tuple[QueueStats, ...] = ()
    workers: tuple[WorkerLeases, ...] = ()
    """Who holds leases, those who hold the most first: a thousand of them at most."""
    failed: int | None = None
    """How many attempts have failed for good, and were not retried or pruned."""
    pending_interrupts: int | None = None
    size: int | None = None
    """The bytes of the whole database, on PostgreSQL with what others keep in it."""
    tables: tuple[TableSize, ...] = ()
    """Ours, the largest first; on SQLite none is known."""
    unknown: tuple[str, ...] = ()
    """What could not be told, and why."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON: instants in ISO 8601, spans in seconds."""
        return cast(dict[str, Any], plain(self))


@dataclass(frozen=True)
class QueueActivity:
    """What moves in one queue."""

    queue: str
    ready: int
    delayed: int
    leased: int
    oldest_age: timedelta | None
    """As in ``QueueStats``."""
    completed: int
    failed: int
    cancelled: int
    """How many ended so within the span that was asked for."""


@dataclass(frozen=True)
class Activity:
    """What moves in a store."""

    place: str
    """Where it is, without a password."""
    at: datetime
    """By the database's clock."""
    span: timedelta
    """How long back ended attempts were counted."""
    queues: tuple[QueueActivity, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON: instants in ISO 8601, spans in seconds."""
        return cast(dict[str, Any], plain(self))


async def status_of_store(database: Database, migrations: Sequence[Migration], policy: Policy) -> StoreStatus:
    """
    All that can be told of the store in *database*.

    Raises:
        DatabaseUnavailableError: The database cannot be read.
        SchemaLockTimeoutError: It was locked for longer than ``lock_timeout``.
    """
    look = await inspected(database, migrations, policy)
    schema = status_of(look, migrations, policy)
    pieces = _Pieces()
    try:
        async with database.reading() as reader:
            told = await _told(pieces, reader, look, schema)
        told["migrating"] = await database.lock_holder(apart=True, migrating=True)
    except DatabaseUnavailableError:
        if look.ledger is not None or look.catalog.tables:
            raise
        told = {"server": None}  # where there is no file there is nothing to open
    ledger = pieces.read("the ledger", look.ledger or (), _recorded)
    unknown = tuple(pieces.unknown)
    return StoreStatus(database.backend, database.place, schema=schema, ledger=ledger, unknown=unknown, **told)


async def _told(pieces: "_Pieces", reader: Reader, look: Look, schema: SchemaStatus) -> dict[str, Any]:
    """What is asked for, piece by piece."""
    told: dict[str, Any] = {
        "server": await pieces.one(reader, "the server", "status.server", lambda row: str(row["server"])),
        "size": await pieces.one(reader, "the size", "status.size", lambda row: int(row["bytes"])),
    }
    tables = {name for name, table in look.catalog.tables.items() if table.kind == "table"}
    if tables:
        names = json.dumps(sorted({LEDGER, *tables}))
        told["tables"] = await pieces.all(reader, "the tables' sizes", "status.tables", _size, names)
    if look.ledger is None or look.problems or (look.reservations and schema.refusal):
        # Nothing of a stranger's is read: a view, or an expression, would run its author's code.
        if tables or look.catalog.tables:
            pieces.unknown.append("what the tables hold: the schema is refused, so nothing of it is read")
        return told
    if CONTROL in tables:
        told["control"] = await pieces.whole(reader, "the control", "control.list", control_state)
    if "runtime_queue" in tables:
        told["queues"] = await pieces.all(reader, "the queues", "attempts.stats", stats_from_row, None)
    elif "runtime_attempts" in tables:
        found = await pieces.all(reader, "the queues", "status.queues_without_names", stats_from_row)
        told["queues"] = tuple(queue for queue in found if queue.ready or queue.delayed or queue.leased)
    if "runtime_leases" in tables:
        told["workers"] = await pieces.all(reader, "the leases", "status.workers", _worker, _MOST_WORKERS)
    if {"runtime_finished", "runtime_interrupts"} <= tables:
        counts = await pieces.one(reader, "the counts", "status.counts", lambda row: row)
        if counts is not None:
            told |= {"failed": counts["failed"], "pending_interrupts": counts["pending_interrupts"]}
    return told


async def activity_of_store(
    database: Database, migrations: Sequence[Migration], policy: Policy, over: timedelta
) -> Activity:
    """
    What moves in the queues of the store in *database*, where its schema is this release's.

    Raises:
        SchemaError: It is not; the subclass says why.
        DatabaseUnavailableError: The database cannot be read.
    """
    span = span_ms("over", over, positive=True)
    verify_only = replace(policy, migrate=False)
    decision = decide(await inspected(database, migrations, verify_only), migrations, verify_only)
    if isinstance(decision, Refuse):
        raise decision.error
    async with database.reading() as reader:
        [now] = await reader.fetch("status.now")
        stats = readable(await reader.fetch("attempts.stats", None), stats_from_row)
        ended = {row["queue"]: row for row in await reader.fetch("status.ended_lately", span, _MOST_ENDED)}
    waiting = {queue.queue: queue for queue in stats}
    return Activity(
        database.place,
        from_ms(now["now_ms"]),
        timedelta(milliseconds=span),
        tuple(_moves(name, waiting.get(name), ended.get(name)) for name in sorted(waiting.keys() | ended.keys())),
    )


def _moves(name: str, waiting: QueueStats | None, ended: Row | None) -> QueueActivity:
    waiting = waiting or QueueStats(name, 0, 0, 0, None)
    counts = (0, 0, 0) if ended is None else (ended["completed"], ended["failed"], ended["cancelled"])
    return QueueActivity(name, waiting.ready, waiting.delayed, waiting.leased, waiting.oldest_age, *counts)


class _Pieces:
    """
    Answers to one question after the other, each by itself.

    Attributes:
        unknown: What has no answer, and why.
    """

    def __init__(self) -> None:
        self.unknown: list[str] = []

    async def whole(
        self, reader: Reader, what: str, query: str, read: Callable[[Sequence[Row]], T], *args: object
    ) -> T | None:
        """What all rows of a query say; None where it has no answer."""
        try:
            return read(await reader.fetch(query, *args))
        except RuntimeRepoError as error:
            self.unknown.append(f"{what}: {error}")
            return None

    async def all(
        self, reader: Reader, what: str, query: str, read: Callable[[Row], T], *args: object
    ) -> tuple[T, ...]:
        """What each of them says, as far as it can be read."""
        return await self.whole(reader, what, query, lambda rows: self.read(what, rows, read), *args) or ()

    async def one(self, reader: Reader, what: str, query: str, read: Callable[[Row], T], *args: object) -> T | None:
        """What the only one says."""
        found = await self.all(reader, what, query, read, *args)
        return found[0] if found else None

    def read(self, what: str, rows: Iterable[R], read: Callable[[R], T]) -> tuple[T, ...]:
        """What can be read of *rows*."""
        found = []
        for row in rows:
            try:
                found.append(read(row))
            except (*UNREADABLE, UnreadableRowError) as error:
                self.unknown.append(f"one of {what}: {error}")
        return tuple(found)


def _recorded(row: LedgerRow) -> RecordedMigration:
    return RecordedMigration(row.version, row.name, from_ms(row.applied_at_ms))


def _worker(row: Row) -> WorkerLeases:
    check_types((row["worker_id"],), row["leases"])
    first, heartbeat = from_ms(row["first_expiry_ms"]), from_ms(row["heartbeat_ms"])
    return WorkerLeases(row["worker_id"], row["leases"], row["expired"], first, heartbeat)


def _size(row: Row) -> TableSize:
    return TableSize(row["name"], row["bytes"], row["row_count"])
