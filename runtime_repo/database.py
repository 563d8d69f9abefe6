"""
The port between what is written once and the two databases: two small protocols, and what both sides need to speak.

A *query* is the name of a statement in ``queries/``; its text, its dialect and its tokens are the database's business.
Nothing here knows a driver. Nothing above here knows a dialect.
"""

import asyncio
import contextlib
from collections.abc import Collection, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import anyio

from runtime_repo.catalog import Catalog, Look
from runtime_repo.errors import LockHolder

__all__ = [
    "Backend",
    "Busy",
    "Database",
    "Queries",
    "Row",
    "Source",
    "Statements",
    "Transaction",
    "Watch",
    "finish",
    "settle",
]

Backend = Literal["sqlite", "postgres"]

T = TypeVar("T")


class Row(Protocol):
    """A row whose columns are read by name."""

    def __getitem__(self, column: str, /) -> Any: ...


class Queries(Protocol):
    """All that a noun needs."""

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        """
        Run a named query as one atomic step and return its rows.

        A caller that is cancelled does not know whether it has happened. But it is over: nothing of it happens any more
        once a later query has begun.
        """
        ...

    def atomic(self) -> AbstractAsyncContextManager["Statements"]:
        """
        Queries that take effect together, when the block ends, or not at all, when it raises or is cancelled.

        Within another such block this is a part of it, which can fail alone.
        """
        ...

    def tell(self, queues: Iterable[str]) -> None:
        """Let those who wait for *queues* look, as soon as what was done is committed. It fails silently."""
        ...


class Source(Queries, Protocol):
    """What a noun queries that also waits."""

    def watch(self, queues: Collection[str]) -> AbstractAsyncContextManager["Watch"]:
        """Notice from now on when something of *queues* may have become claimable, whoever brought it."""
        ...


class Watch(Protocol):
    """What notices changes: sometimes in vain, and within a few seconds even where it was told of none."""

    async def change(self, within: float) -> None:
        """Return when something may have changed since the last look, after *within* seconds at the latest."""
        ...


class Statements(Queries, Protocol):
    """Queries in one transaction."""

    @property
    def connection(self) -> Any:
        """The driver's own connection, for statements of the application's."""
        ...


class Transaction(Protocol):
    """What boot does under the lock, committed together."""

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        """Run a named query and return its rows."""
        ...

    async def execute(self, query: str) -> None:
        """Run a named query that takes no arguments and answers nothing."""
        ...

    async def script(self, text: str) -> None:
        """Run the statements of a migration, in order."""
        ...

    async def look(self, shipped: Sequence[Catalog]) -> Look:
        """Read the ledger and the live catalog, as this transaction sees them."""
        ...


class Database(Source, Protocol):
    """One database, which connects at its first look and then serves many tasks."""

    @property
    def backend(self) -> Backend: ...

    async def close(self) -> None:
        """Leave no connection, thread or task behind, also when the caller is cancelled. May be repeated."""
        ...

    def abandon(self) -> None:
        """Let go of everything without waiting: for an owner that was forgotten unclosed."""
        ...

    async def look(self, shipped: Sequence[Catalog]) -> Look:
        """
        Connect, if that has not been done, and read the ledger and the live catalog: one read-only statement, no lock.

        Raises:
            Busy: SQLite's file is locked at this instant.
            DatabaseUnavailableError: It cannot be reached, opened or read.
        """
        ...

    def lock(self) -> AbstractAsyncContextManager[Transaction]:
        """
        One short try at the migration lock: a transaction that commits at the end of the block.

        Raises:
            Busy: Somebody holds the lock, or a table that the block needed. Everything was rolled back.
        """
        ...

    async def lock_holder(self) -> LockHolder | None:
        """Who holds what a try could not get; None where that can't be known."""
        ...

    async def take_backup(self, from_version: int) -> Path | None:
        """Back up an existing database before its upgrade, under the lock; None where that is the operator's work."""
        ...

    async def ready(self) -> None:
        """The schema is right: make ready to serve."""
        ...


class Busy(Exception):  # noqa: N818 - an answer between the port and boot; it never leaves the package
    """Somebody else holds what this try needed."""


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """
    Run *work* to its end whatever happens to the caller, then let a cancellation through.

    A shielded cancel scope stops anyio's cancellation but not a native ``task.cancel()``, and a native shield stops
    only that: work that must finish is owned by a task of its own, under both.
    """
    return await settle(asyncio.ensure_future(work))


async def settle(future: "asyncio.Future[T]") -> T:
    """Wait for *future* whatever happens to the caller, then let a cancellation through."""
    try:
        await asyncio.wait([future])
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
        if not future.cancelled():
            future.exception()
        raise
    return future.result()
