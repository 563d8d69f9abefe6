"""
What an application can watch: one callable, told by events of what the library does.

Events are told where the statements go by, so that no verb and no loop knows of it, and nothing is in the way where
nobody watches. What is done in a transaction is told when that is committed; of one of the application's own, whose end
nobody sees, only the statements are.
"""

import asyncio
import contextlib
import inspect
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from runtime_repo.database import Busy, Database, Heartbeats, Row, Source, Transaction, Watch
from runtime_repo.errors import ConfigurationError
from runtime_repo.schema import SchemaReport

__all__ = [
    "BootStep",
    "Claimed",
    "Completed",
    "Event",
    "Failed",
    "LeaseLost",
    "Migrated",
    "Observe",
    "ObservedSource",
    "ObservedTransaction",
    "Observer",
    "OutageBegan",
    "OutageEnded",
    "Statement",
    "Swept",
    "observed_boot",
]

T = TypeVar("T")

_log = logging.getLogger("runtime_repo")

_ASKED_EVERY = 1.0
"""Seconds between two questions whether an observer wants to be told."""


class BootStep(NamedTuple):
    """
    A boot has come further: ``look``, ``busy`` (somebody else has the lock), ``lock`` (it has), ``backup``, ``commit``,
    ``serve``. With an *error* it went no further.
    """

    step: str
    seconds: float
    error: BaseException | None = None


class Migrated(NamedTuple):
    """A migration was applied, and is committed."""

    version: int
    name: str
    seconds: float


class Statement(NamedTuple):
    """A named query was answered, or failed, or was cancelled."""

    name: str
    seconds: float
    error: BaseException | None = None


class Claimed(NamedTuple):
    """Leases were taken."""

    worker_id: str
    queues: Sequence[str]
    """Those of the attempts, each once."""
    attempt_ids: Sequence[str]
    seconds: float


class Completed(NamedTuple):
    """An attempt was completed."""

    attempt_id: str
    queue: str | None
    """None of one of many."""
    headers: Any
    seconds: float


class Failed(NamedTuple):
    """A try has failed."""

    attempt_id: str
    queue: str
    headers: Any
    error: str
    is_final: bool
    """Whether it is not tried again."""
    seconds: float


class LeaseLost(NamedTuple):
    """A write under a lease, or its heartbeat, was refused. What an outage costs, its end tells."""

    attempt_id: str
    status: str | None
    """The attempt's; None of one that is gone."""
    holder: str | None


class Swept(NamedTuple):
    """Leases that had run out were ended, and their attempts made ready or failed."""

    attempt_ids: Sequence[str]
    seconds: float


class OutageBegan(NamedTuple):
    """A worker cannot reach the database, or is refused, and tries again until it can."""

    who: str
    doing: str
    error: BaseException


class OutageEnded(NamedTuple):
    """It can again."""

    who: str
    seconds: float
    leases_lost: int


Event = BootStep | Migrated | Statement | Claimed | Completed | Failed | LeaseLost | Swept | OutageBegan | OutageEnded

Observe = Callable[[Event], object]
"""
Is told of each event, at once, in the task that it happened in, which waits for it: let it be quick, and call no verb.

What it raises is logged once and harms nobody. If it has a method ``is_active()``, that is asked once a second, and it
is told of nothing while the answer is False.
"""


class Observer:
    """Tells an application's callable."""

    def __init__(self, observe: Observe) -> None:
        if not callable(observe) or inspect.iscoroutinefunction(observe):
            raise ConfigurationError(
                f"observe is {observe!r}: expected a function of one argument, no coroutine function"
            )
        self._observe = observe
        self._is_active: Callable[[], object] | None = getattr(observe, "is_active", None)
        self._answer = True
        self._ask_at = -math.inf if self._is_active is not None else math.inf
        self._has_failed = False

    def wants(self) -> bool:
        """Whether it wants to be told at all."""
        if (now := time.monotonic()) >= self._ask_at and self._is_active is not None:
            self._ask_at = now + _ASKED_EVERY
            try:
                self._answer = bool(self._is_active())
            except Exception:  # noqa: BLE001 - as below
                self._failed()
        return self._answer

    def tell(self, event: Event) -> None:
        """Tell it, whatever it makes of that."""
        if self._answer:
            try:
                self._observe(event)
            except Exception:  # noqa: BLE001 - it is the application's
                self._failed()

    def _failed(self) -> None:
        if not self._has_failed:
            self._has_failed = True
            _log.exception("what observes the repository raised, and may again, which is not logged: mend it")

    def booted(self, report: SchemaReport) -> None:
        """Tell of what a boot has applied."""
        for applied in report.applied:
            self.tell(Migrated(applied.version, applied.name, applied.duration))


class _Asks(Protocol):
    async def fetch(self, query: str, *args: object) -> Sequence[Row]: ...


class _Statements:
    """Statements that are told of, and what they say of attempts as soon as that is committed."""

    def __init__(self, inner: _Asks, observer: Observer) -> None:
        self._asks = inner
        self._observer = observer

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        if not self._observer.wants():
            return await self._asks.fetch(query, *args)
        rows, seconds = await self._timed(query, self._asks.fetch(query, *args))
        if query.partition(" ")[0] in _TELLING:
            self._committed(_meaning(query, args, rows, seconds))
        return rows

    async def _timed(self, query: str, answer: Awaitable[T]) -> tuple[T, float]:
        """The answer to a query, and how long that took."""
        began = time.perf_counter()
        try:
            rows = await answer
        except BaseException as error:
            self._observer.tell(Statement(query, time.perf_counter() - began, error))
            raise
        seconds = time.perf_counter() - began
        self._observer.tell(Statement(query, seconds))
        return rows, seconds

    def _committed(self, events: Iterable[Event]) -> None:
        for event in events:
            self._observer.tell(event)


class ObservedSource(_Statements):
    """What the nouns of a repository query, observed."""

    def __init__(self, inner: Source, observer: Observer) -> None:
        super().__init__(inner, observer)
        self._inner = inner

    async def glance(self, query: str, *args: object, within: float) -> Sequence[Row] | None:
        if not self._observer.wants():
            return await self._inner.glance(query, *args, within=within)
        rows, _ = await self._timed(query, self._inner.glance(query, *args, within=within))
        return rows

    @contextlib.asynccontextmanager
    async def atomic(self) -> AsyncIterator[Transaction]:
        pending: list[Event] = []
        async with self._inner.atomic() as transaction:
            yield ObservedTransaction(transaction, self._observer, pending)
        self._committed(pending)

    def tell(self, queues: Iterable[str]) -> None:
        self._inner.tell(queues)

    def watch(self, queues: Collection[str]) -> AbstractAsyncContextManager[Watch]:
        return self._inner.watch(queues)

    async def vacuum(self) -> None:
        await self._timed("attempts.vacuum", self._inner.vacuum())

    async def heartbeats(self) -> Heartbeats:
        return _ObservedHeartbeats(await self._inner.heartbeats(), self._observer)


class ObservedTransaction(_Statements):
    """Queries in one transaction, observed."""

    def __init__(self, inner: Transaction, observer: Observer, pending: list[Event]) -> None:
        super().__init__(inner, observer)
        self._inner = inner
        self._pending = pending

    @property
    def connection(self) -> Any:
        return self._inner.connection

    @contextlib.asynccontextmanager
    async def atomic(self) -> AsyncIterator[Transaction]:
        pending: list[Event] = []
        async with self._inner.atomic() as part:
            yield ObservedTransaction(part, self._observer, pending)
        self._pending += pending

    def tell(self, queues: Iterable[str]) -> None:
        self._inner.tell(queues)

    def _committed(self, events: Iterable[Event]) -> None:
        self._pending += events


class _ObservedHeartbeats(_Statements):
    def __init__(self, inner: Heartbeats, observer: Observer) -> None:
        super().__init__(inner, observer)
        self._inner = inner

    async def ask(self, query: str, *args: object) -> tuple[Sequence[Row], float]:
        if not self._observer.wants():
            return await self._inner.ask(query, *args)
        answer, _ = await self._timed(query, self._inner.ask(query, *args))
        return answer

    def atomic(self) -> AbstractAsyncContextManager[Transaction]:
        return self._inner.atomic()

    def tell(self, queues: Iterable[str]) -> None:
        self._inner.tell(queues)


def _meaning(query: str, args: Sequence[object], rows: Sequence[Row], seconds: float) -> Iterator[Event]:
    """What a statement's answer says of attempts."""
    name, _, _ = query.partition(" ")
    if name == "leases.holder":
        row = rows[0] if rows else {"status": None, "worker_id": None}
        yield LeaseLost(str(args[0]), row["status"], row["worker_id"])
    elif rows and (read := _READ.get(name)) is not None:
        yield from read(rows, seconds)
    elif rows and name == "attempts.complete_many":
        yield from _completed_many(args[0], rows, seconds)


def _claimed(rows: Sequence[Row], seconds: float) -> Iterator[Event]:
    queues = tuple(dict.fromkeys(row["queue"] for row in rows))
    yield Claimed(rows[0]["worker_id"], queues, tuple(row["attempt_id"] for row in rows), seconds)


def _completed(rows: Sequence[Row], seconds: float) -> Iterator[Event]:
    for row in rows:
        yield Completed(row["attempt_id"], row["queue"], _headers(row), seconds)


def _completed_many(given: Any, rows: Sequence[Row], seconds: float) -> Iterator[Event]:
    """One row without an id says that all were, whose ids are the first of the columns given."""
    ids = [row["attempt_id"] for row in rows] if rows[0]["attempt_id"] is not None else given[: len(given) // 4]
    for attempt_id in ids:
        yield Completed(attempt_id, None, None, seconds)


def _failed(rows: Sequence[Row], seconds: float) -> Iterator[Event]:
    for row in rows:
        is_final = row["status"] == "failed"
        yield Failed(row["attempt_id"], row["queue"], _headers(row), row["error"], is_final, seconds)


def _swept(rows: Sequence[Row], seconds: float) -> Iterator[Event]:
    yield Swept(tuple(row["attempt_id"] for row in rows), seconds)


_READ: Mapping[str, Callable[[Sequence[Row], float], Iterator[Event]]] = {
    "leases.claim": _claimed,
    "leases.claim_attempt": _claimed,
    "attempts.complete": _completed,
    "attempts.fail": _failed,
    "leases.requeue_expired": _swept,
}


_TELLING = _READ.keys() | {"leases.holder", "attempts.complete_many"}
"""The queries whose answers say something of attempts."""


def _headers(row: Row) -> Any:
    with contextlib.suppress(ValueError, TypeError):
        return None if row["headers_json"] is None else json.loads(row["headers_json"])
    return None


@dataclass(frozen=True)
class _Booting:
    """A database whose boot is told of step by step."""

    _inner: Database
    _observer: Observer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def open(self, *args: Any) -> Any:
        return await self._step("look", self._inner.open(*args))

    async def serve(self, *args: Any) -> Any:
        return await self._step("serve", self._inner.serve(*args))

    async def take_backup(self, *args: Any) -> Any:
        return await self._step("backup", self._inner.take_backup(*args))

    @contextlib.asynccontextmanager
    async def lock(self) -> AsyncIterator[Any]:
        began = time.perf_counter()
        is_locked = False
        try:
            async with self._inner.lock() as transaction:
                is_locked = True
                self._observer.tell(BootStep("lock", time.perf_counter() - began))
                yield transaction
                began = time.perf_counter()
            self._observer.tell(BootStep("commit", time.perf_counter() - began))
        except Busy:
            self._observer.tell(BootStep("busy", time.perf_counter() - began))
            raise
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if not is_locked:
                self._observer.tell(BootStep("lock", time.perf_counter() - began, error))
            raise

    async def _step(self, step: str, work: Any) -> Any:
        began = time.perf_counter()
        try:
            answer = await work
        except Exception as error:
            self._observer.tell(BootStep(step, time.perf_counter() - began, error))
            raise
        self._observer.tell(BootStep(step, time.perf_counter() - began))
        return answer


def observed_boot(database: Database, observer: Observer | None) -> Database:
    """*database*, whose boot is told of if somebody wants to know."""
    if observer is None or not observer.wants():
        return database
    return cast(Database, _Booting(database, observer))
