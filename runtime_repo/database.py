"""
The port between what is written once and the two databases: small protocols, and what both sides need to speak.

A *query* is the name of a statement in ``queries/``; its text, its dialect and its tokens are the database's business.
Nothing here knows a driver. Nothing above here knows a dialect.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from runtime_repo.catalog import Catalog, Look
from runtime_repo.errors import DatabaseUnavailableError, LockHolder

if TYPE_CHECKING:
    from runtime_repo import archive
    from runtime_repo.doctor import Examined, Finding
    from runtime_repo.repairs import Repair
    from runtime_repo.schema import Migration

__all__ = [
    "Backend",
    "BootTransaction",
    "Busy",
    "Database",
    "Gate",
    "Heartbeats",
    "Lost",
    "Queries",
    "Reader",
    "Row",
    "Source",
    "Transaction",
    "Watch",
    "together",
]

T = TypeVar("T")

_TRIES = 5
"""How often a block is tried that the database gives up for a rival's sake."""

Backend = Literal["sqlite", "postgres"]


class Row(Protocol):
    """A row whose columns are read by name."""

    def __getitem__(self, column: str, /) -> Any: ...


class Queries(Protocol):
    """All that a noun needs."""

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        """
        Run a named query as one atomic step and return its rows.

        A cancelled query may have taken effect, but it has finished before the next one starts; unless it was shared
        with those of other tasks, as completions that meet are on PostgreSQL: it goes on for them.
        """
        ...

    def atomic(self) -> AbstractAsyncContextManager["Transaction"]:
        """
        Queries that take effect together, when the block ends, or not at all, when it raises or is cancelled.

        Within another such block this is a part of it, which can fail alone.
        """
        ...

    def tell(self, queues: Iterable[str]) -> None:
        """Let those who wait for *queues* look, as soon as what was done is committed. It fails silently."""
        ...


async def together(queries: Queries, work: Callable[["Transaction"], Awaitable[T]]) -> T:
    """
    Do *work* with queries that take effect together, again where the database gave all of it up for a rival's sake.

    Within another ``atomic()`` it is done once: only the whole could be begun again.
    """
    tries = 1
    while True:
        try:
            async with queries.atomic() as statements:
                return await work(statements)
        except DatabaseUnavailableError as error:
            if tries == _TRIES or not error.gave_way:
                raise
        await asyncio.sleep(random.uniform(0, 0.01) * 2**tries)  # noqa: S311
        tries += 1


class Source(Queries, Protocol):
    """What a noun queries that also waits."""

    async def glance(self, query: str, *args: object, within: float) -> Sequence[Row] | None:
        """
        As ``fetch``, of what only reads and must be answered within so many seconds; None where others of this process
        have kept the database to themselves for as long, and nothing was asked.

        Raises:
            TimeoutError: There was no answer.
        """
        ...

    def watch(self, queues: Collection[str]) -> AbstractAsyncContextManager["Watch"]:
        """Notice from now on when something of *queues* may have become claimable, whoever brought it."""
        ...

    async def vacuum(self) -> None:
        """
        Take away what claims and completions leave behind, outside of any transaction; SQLite leaves nothing.

        Raises:
            ConfigurationError: It is a transaction.
        """
        ...

    async def heartbeats(self) -> "Heartbeats":
        """
        What to renew leases by: it does not wait behind the work of this process, however many transactions are open.

        On PostgreSQL a connection of its own, kept for all of them. On SQLite, which has one writer, the next in turn:
        it waits for the transaction that is open and for no other.

        Raises:
            ConfigurationError: The pool that was given can have no connection for them.
        """
        ...


class Heartbeats(Queries, Protocol):
    """What renews leases, and knows when it has asked."""

    async def ask(self, query: str, *args: object) -> tuple[Sequence[Row], float]:
        """
        As ``fetch``; return also an instant by ``time.monotonic()``: the query was not sent before it.

        It lies behind the wait for others of this process, so that a lease is proved for as long as it can be.
        """
        ...


class Gate(Source, Protocol):
    """
    What a noun of the repository's, or of a transaction, queries.

    Attributes:
        is_within: Whether it is a transaction's, which what fails may have spoilt.
    """

    is_within: bool

    def after_commit(self, do: Callable[[], None]) -> None:
        """
        Call *do* as soon as what was done is committed: at once, or when the transaction's block has ended well.

        It is not called where that is rolled back, nor in a transaction of the application's own: its end is not seen.
        """
        ...


class Watch(Protocol):
    """What notices changes: sometimes in vain, and within a few seconds even where it was told of none."""

    async def change(self, within: float) -> None:
        """Return when something may have changed since the last poll, after *within* seconds at the latest."""
        ...


class Transaction(Queries, Protocol):
    """Queries in one transaction."""

    @property
    def connection(self) -> Any:
        """The driver's own connection, for statements of the application's."""
        ...


class BootTransaction(Protocol):
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

    async def ask(self, text: str) -> Sequence[Row]:
        """Run a migration's own query, with its tokens, and return its rows. No lock of a table stays behind."""
        ...

    async def look(self, shipped: Sequence[Catalog]) -> Look:
        """Read the ledger and the live catalog, as this transaction sees them."""
        ...


class Reader(Protocol):
    """Reads, one statement after the other, each as a transaction of its own that may not write."""

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        """
        Run a named query that writes nothing and return its rows.

        Raises:
            DatabaseUnavailableError: What it reads is locked by somebody else, or there was no answer in time.
            RefusedError: It is not there, or this role may not read it.
        """
        ...

    async def ask(self, text: str) -> Sequence[Row]:
        """As above, a migration's own query, with its tokens. On PostgreSQL it takes its time."""
        ...


class Database(Source, Protocol):
    """One database, which is opened by boot and then serves many tasks."""

    @property
    def backend(self) -> Backend: ...

    @property
    def place(self) -> str:
        """Where it is, without a password."""
        ...

    def text(self, query: str) -> str:
        """The text of a named query, without comments."""
        ...

    def filled(self, text: str) -> str:
        """The text of a migration, as this database is told it."""
        ...

    async def close(self) -> None:
        """Leave no connection, thread or task behind, also when the caller is cancelled. May be repeated."""
        ...

    def abandon(self) -> None:
        """Let go of everything without waiting: for an owner that was forgotten unclosed, or that cannot wait."""
        ...

    def inherited(self) -> None:
        """This process is the child of a fork: see to it that what is open, and kept, does the parent no harm."""
        ...

    async def open(self, shipped: Sequence[Catalog]) -> Look:
        """
        Connect, if that has not been done, and read the ledger and the live catalog: one read-only statement, no lock.

        Raises:
            Busy: SQLite's file is locked at this instant.
            Lost: The connection went away meanwhile.
            DatabaseUnavailableError: It cannot be reached, opened or read.
        """
        ...

    async def inspect(self, shipped: Sequence[Catalog]) -> Look:
        """
        As ``open``, but without getting ready to serve: on what is open, or on a connection for this alone.

        Nothing is created or written, and no file is made, whatever the boot may do.

        Raises:
            DatabaseUnavailableError: It cannot be reached, opened or read.
        """
        ...

    def reading(self) -> AbstractAsyncContextManager[Reader]:
        """
        What reads as ``inspect`` looks: it needs no boot, makes nothing, and stands beside whatever is open.

        Raises:
            DatabaseUnavailableError: It cannot be reached or opened.
        """
        ...

    async def examine(self, examined: "Examined") -> tuple[Sequence["Finding"], Sequence["Repair"]]:
        """What a doctor finds around our tables, and what mends their drift. Nothing is written."""
        ...

    def script(self, statements: Sequence[str]) -> str:
        """What mends drift, as one script that does all of it or nothing."""
        ...

    def lock(self) -> AbstractAsyncContextManager[BootTransaction]:
        """
        One short try at the migration lock: a transaction that commits at the end of the block.

        Raises:
            Busy: Somebody holds the lock, or a table that the block needed. Everything was rolled back.
            Lost: The connection went away meanwhile. Everything was rolled back.
        """
        ...

    async def lock_holder(self, *, apart: bool = False, migrating: bool = False) -> LockHolder | None:
        """
        Who holds what a try could not get; None where that can't be known. *apart* is beside a boot; of who is
        *migrating*, whoever holds the migration lock itself.
        """
        ...

    def backup_name(self, from_version: int) -> str | None:
        """What ``take_backup`` would call its copy, with ``<time>`` in the place of the time; None if it takes none."""
        ...

    async def take_backup(self, from_version: int) -> Path | None:
        """Back up an existing database before its upgrade, under the lock; None where that is the operator's work."""
        ...

    async def serve(self, version: int) -> None:
        """The schema is right, and at *version*: make ready to serve."""
        ...

    async def export(
        self, writer: "archive.Writer", migrations: Sequence["Migration"], terms: "archive.Terms", target: Backend
    ) -> "archive.Manifest":
        """
        Write all rows of one instant into an archive, on a connection for this alone, and finish that.

        Raises:
            UnportableRowsError: Not every row can be held by an archive and the *target*.
            StoreInUseError: It is for a move, and leases are active.
            SchemaError: What is stored cannot be read for what it is, or others kept tables locked.
            ArchiveError: It cannot be written, or there is nothing of ours.
            DatabaseUnavailableError: It cannot be reached, opened or read.
        """
        ...

    async def load(
        self, reader: "archive.Reader", migrations: Sequence["Migration"], terms: "archive.Terms"
    ) -> "archive.Loaded":
        """
        Put an archive's content, to which *migrations* lead, in the place of what is there, as one step.

        Raises:
            StoreInUseError: Somebody uses what is there; or there is something, where nothing may be.
            SchemaError: The database cannot hold a store of ours.
            ArchiveError: The archive is not what was written.
            DatabaseUnavailableError: It cannot be reached, opened, read or written.
        """
        ...


class Lost(Exception):  # noqa: N818 - as Busy
    """
    The connection was lost, or the server fell silent, during a look or under the lock; everything was rolled back.

    Its cause is the error of ours that says so. The whole try may be repeated on another connection.
    """


class Busy(Exception):  # noqa: N818 - an answer between the port and boot; it never leaves the package
    """Somebody else holds what this try needed."""
