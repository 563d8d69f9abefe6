"""
One SQLite file behind the port.

Work is sent to the connection's thread as a *hop*: one function that normally opens and ends its own transaction, so
that a cancelled caller leaves no lock. Boot and ``atomic()`` keep one open across hops; both roll back in a shielded
hop.
"""

import asyncio
import contextlib
import os
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import aiosqlite

from runtime_repo.catalog import Catalog, Look
from runtime_repo.database import Backend, Busy, Queries, Row
from runtime_repo.errors import ConfigurationError, DatabaseUnavailableError, LockHolder, RepositoryClosedError
from runtime_repo.queries import fill, load_queries, split_statements
from runtime_repo.shielding import finish
from runtime_repo.sqlite.backup import back_up
from runtime_repo.sqlite.connection import Connection, Hop
from runtime_repo.sqlite.fork import check_not_inherited, hold_inherited, is_idle, note
from runtime_repo.sqlite.look import looking

__all__ = ["SqliteDatabase"]

T = TypeVar("T")

_TOKENS = {"schema": "main", "now_ms": "cast(round((julianday('now') - 2440587.5) * 86400000) as integer)"}

_BUSY_TIMEOUT = 0.05
"""Seconds that a hop may block its thread. Longer waits repeat the hop, so that a cancelled caller is heard."""

_LOOK = 0.03
"""Seconds between two looks of a caller that waits, whether anybody has committed: 0.1 ms of the processor each."""


class SqliteDatabase:
    """One SQLite file behind the port."""

    backend: Backend = "sqlite"

    def __init__(self, path: str | os.PathLike[str], *, writes: bool, backup: bool, lock_timeout: float) -> None:
        self._path: Path | None = None
        name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if not isinstance(name, str) or not name or name.startswith("file:") or "\0" in name or not _is_encodable(name):
            raise ConfigurationError(f"the path of a SQLite database is {path!r}: expected a file's path or ':memory:'")
        self._path = None if name == ":memory:" else Path(name).absolute()
        self._writes = writes
        self._backup = backup
        self._lock_timeout = lock_timeout
        self._queries = _queries()
        self._connection: aiosqlite.Connection | None = None
        self._turn = asyncio.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._path or ':memory:')!r})"

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await _closed(connection)

    def abandon(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.stop()

    def inherited(self) -> None:
        if self._path is not None:
            own = None if self._connection is None else self._connection._connection
            hold_inherited(self._path, was_idle=isinstance(own, Connection) and is_idle(own))

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        async with self._in_turn(lambda: self.run(query, args)) as rows:
            return rows

    @contextlib.asynccontextmanager
    async def atomic(self) -> AsyncIterator["_Statements"]:
        async with self._in_turn(self._begin):
            try:
                yield _Statements(self)
                await self._commit()
            except BaseException as error:
                await finish(self._roll_back())
                if isinstance(error, Busy):
                    raise self._locked() from error.__cause__
                raise

    async def _begin(self) -> None:
        try:
            await self.hop(lambda connection: connection.execute("begin immediate"))
        except asyncio.CancelledError:
            # It may succeed behind the caller's back.
            await finish(self._roll_back())
            raise

    async def _commit(self) -> None:
        """Commit. In a file that is not in WAL whoever reads holds that up, and the transaction stays open."""
        deadline = time.monotonic() + self._lock_timeout
        while True:
            try:
                await self.hop(lambda connection: connection.execute("commit"))
            except Busy:
                if time.monotonic() >= deadline:
                    raise
            else:
                return
            await asyncio.sleep(random.uniform(0.001, 0.02))  # noqa: S311

    async def _roll_back(self) -> None:
        if self._connection is not None:
            await self.hop(lambda connection: connection.rollback())

    @contextlib.asynccontextmanager
    async def part(self) -> AsyncIterator["_Statements"]:
        """Statements that take effect with the transaction that is open, or fail alone."""
        await self.hop(lambda connection: connection.execute("savepoint runtime_repo"))
        try:
            yield _Statements(self)
        except BaseException:
            await finish(self.hop(_roll_back_part))
            raise
        await self.hop(lambda connection: connection.execute("release savepoint runtime_repo"))

    @contextlib.asynccontextmanager
    async def _in_turn(self, work: Callable[[], Awaitable[T]]) -> AsyncIterator[T]:
        """Have the connection to oneself, from the moment at which *work* is not told that the file is locked."""
        deadline = time.monotonic() + self._lock_timeout
        while True:
            async with self._turn:
                try:
                    result = await work()
                except Busy as busy:
                    if time.monotonic() >= deadline:
                        raise self._locked() from busy.__cause__
                else:
                    yield result
                    return
            await asyncio.sleep(random.uniform(0.001, 0.02))  # noqa: S311

    async def run(self, query: str, args: Sequence[object]) -> Sequence[Row]:
        statements = self._queries[query]
        parameters = {str(number): value for number, value in enumerate(args, 1)}

        def work(connection: Connection) -> Sequence[Row]:
            # A single statement is a transaction of its own; several need one, unless boot has opened it.
            own = len(statements) > 1 and not connection.in_transaction
            if own:
                connection.execute("begin immediate")
            try:
                rows: Sequence[Row] = ()
                for statement in statements:
                    cursor = connection.execute(statement, parameters)
                    if cursor.description is not None:
                        rows = cursor.fetchall()
                if own:
                    connection.execute("commit")
            except BaseException:
                if own:
                    connection.rollback()
                raise
            return rows

        return await self.hop(work)

    @contextlib.asynccontextmanager
    async def watch(self, queues: Collection[str]) -> AsyncIterator["_Watch"]:  # noqa: ARG002 - any commit is a hint
        yield _Watch(self, await self.stamp())

    async def heartbeats(self) -> Queries:
        return self

    def tell(self, queues: Iterable[str]) -> None:
        """Nobody needs to be told: who waits looks whether anybody has committed."""

    async def stamp(self) -> tuple[int, int]:
        """What changes with every commit: other connections' are counted by SQLite, our own by the driver."""
        async with self._in_turn(lambda: self.hop(_stamp)) as stamp:
            return stamp

    @property
    def connection(self) -> aiosqlite.Connection:
        if self._connection is None:
            raise RepositoryClosedError(f"{self!r} is not open: await the repository first, and not after close()")
        return self._connection

    async def hop(self, work: Callable[[Connection], T], connection: aiosqlite.Connection | None = None) -> T:
        with self._translated():
            result = await (connection or self.connection).execute_fetchall("a hop", cast(Iterable[Any], Hop(work)))
        return cast(T, result)

    async def look(self, shipped: Sequence[Catalog]) -> Look:
        if self._connection is not None:
            async with self._turn:
                return await self.hop(looking(self._queries, shipped))
        first = Hop(looking(self._queries, shipped))
        try:
            await self._open("rw", first)
        except DatabaseUnavailableError:
            if self._path is None:
                raise
            # What is absent is fresh, and a verify-only boot must not create it.
            if not self._writes and _is_absent(self._path):
                return Look(None, Catalog())
            # Whatever else is wrong is wrong again, unless another process has just created the file.
            await self._open("rwc" if self._writes else "rw", first)
        return cast(Look, first.fetchall())

    async def _open(self, mode: str, first: Hop) -> None:
        self._turn = asyncio.Lock()
        self._connection = await self._connect(mode, first)

    async def _connect(self, mode: str, first: Hop) -> aiosqlite.Connection:
        """Connect, and run *first* in the same hop."""
        if self._path is not None:
            check_not_inherited(self._path)
        connection = aiosqlite.connect(
            ":memory:" if self._path is None else f"{self._path.as_uri()}?mode={mode}",
            uri=self._path is not None,
            factory=partial(Connection, first=first),
            isolation_level=None,
            timeout=_BUSY_TIMEOUT,
            check_same_thread=False,  # aiosqlite sees to that; see _forsaken
        )
        # A connection that was forgotten unclosed must not keep the process from exiting; there is no public switch.
        connection._thread.daemon = True
        try:
            with self._translated():
                await connection
            note(cast(Connection, connection._conn))
            return connection
        except BaseException:
            await finish(_forsaken(connection, first))
            raise

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Let no driver's exception out but as a cause."""
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise Busy from error
            raise self._unavailable(error) from error

    async def look_now(self, shipped: Sequence[Catalog]) -> Look:
        """Look from within a transaction, whose owner has the connection to itself."""
        return await self.hop(looking(self._queries, shipped))

    @contextlib.asynccontextmanager
    async def lock(self) -> AsyncIterator["_BootTransaction"]:
        async with self._turn:
            try:
                await self._try_to_begin()
                yield _BootTransaction(self)
                await self.hop(lambda connection: connection.execute("commit"))
            except BaseException:
                # Also after a cancelled BEGIN: it may succeed behind the caller's back and keep the lock.
                await finish(self._roll_back())
                raise

    async def _try_to_begin(self) -> None:
        try:
            await self.hop(_begin)
        except DatabaseUnavailableError as error:
            code = getattr(error.__cause__, "sqlite_errorcode", 0)
            if code & 0xFF != sqlite3.SQLITE_READONLY or self._path is None or not _is_writable(self._path):
                raise
            # SQLite (3.40) has been seen to tell one of many processes that turn a new file to WAL at the same moment
            # that the file is read-only. It is not: connect anew and look again.
            await self.close()
            raise Busy from error.__cause__

    async def inspect(self, shipped: Sequence[Catalog]) -> Look:
        return await self.look(shipped)

    async def lock_holder(self) -> LockHolder | None:
        return None

    async def ready(self) -> None:
        # A connection that has read a database in WAL mode has its log beside it.
        if self._writes and self._path is not None and not os.path.exists(f"{self._path}-wal"):  # noqa: ASYNC240, PTH110
            # While others hold the file in its old mode it works all the same; a later boot will switch.
            with contextlib.suppress(Busy):
                async with self._turn:
                    await self.hop(_switch_to_wal)

    async def take_backup(self, from_version: int) -> Path | None:
        if not self._backup or self._path is None:
            return None
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
        target = self._path.with_name(f"{self._path.name}.v{from_version}-{moment}.backup")
        try:
            # A second connection: from the one that holds the write transaction the backup would hang.
            reader = await self._connect("rw", Hop(lambda _: None))
            try:
                await back_up(self._path, target, lambda work: self.hop(work, reader))
            finally:
                await _closed(reader)
        except (sqlite3.Error, OSError, DatabaseUnavailableError) as error:
            cause = error.__cause__ or error
            raise DatabaseUnavailableError(
                f"the backup {target} could not be written ({cause}): free some space or grant the folder, "
                "or boot with backup=False after taking one yourself"
            ) from cause
        return target

    def _locked(self) -> DatabaseUnavailableError:
        return DatabaseUnavailableError(
            f"{self._path} is locked by another process for more than {self._lock_timeout} s: "
            "end that process's transaction, or raise lock_timeout"
        )

    def _unavailable(self, error: sqlite3.Error) -> DatabaseUnavailableError:
        path = self._path
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if path is None:
            reason = "check its statements"
        elif os.path.isdir(path):  # noqa: PTH112 - pathlib's raises where it may not look
            reason = "it is a folder: name a file in it"
        elif not os.path.isdir(path.parent):  # noqa: PTH112
            reason = f"the folder {str(path.parent)!r} does not exist: create it first"
        elif code == sqlite3.SQLITE_NOTADB:
            reason = "the file is no SQLite database: name another path, or move the file away"
        elif code == sqlite3.SQLITE_CORRUPT:
            reason = "the file is damaged or truncated: restore a backup"
        elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            reason = (
                "this process may not write the file or its folder (WAL needs both): grant it, or name another path"
            )
        elif code == sqlite3.SQLITE_FULL:
            reason = "the disk is full: free some space"
        else:
            reason = "check the file, its disk and its permissions"
        return DatabaseUnavailableError(f"SQLite database {str(path or ':memory:')!r}: {error}: {reason}")


class _Watch:
    """Looks whether anybody has committed: SQLite tells no other process."""

    def __init__(self, database: SqliteDatabase, stamp: tuple[int, int]) -> None:
        self._database = database
        self._stamp = stamp

    async def change(self, within: float) -> None:
        deadline = time.monotonic() + within
        stamp = self._stamp
        while stamp == self._stamp and (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _LOOK))
            stamp = await self._database.stamp()
        self._stamp = stamp


class _Statements:
    """Queries in the transaction that is open."""

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database

    @property
    def connection(self) -> aiosqlite.Connection:
        return self._database.connection

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        return await self._database.run(query, args)

    def atomic(self) -> contextlib.AbstractAsyncContextManager["_Statements"]:
        return self._database.part()

    def tell(self, queues: Iterable[str]) -> None:
        self._database.tell(queues)


class _BootTransaction:
    """What boot does between BEGIN IMMEDIATE and COMMIT, a hop at a time."""

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        return await self._database.run(query, args)

    async def execute(self, query: str) -> None:
        await self._database.run(query, ())

    async def script(self, text: str) -> None:
        statements = tuple(split_statements(fill(text, _TOKENS)))

        def work(connection: Connection) -> None:
            for statement in statements:
                connection.execute(statement)

        await self._database.hop(work)

    async def ask(self, text: str) -> Sequence[Row]:
        query = fill(text, _TOKENS)
        rows: Sequence[Row] = await self._database.hop(lambda connection: connection.execute(query).fetchall())
        return rows

    async def look(self, shipped: Sequence[Catalog]) -> Look:
        return await self._database.look_now(shipped)


@cache
def _queries() -> dict[str, tuple[str, ...]]:
    """Every query as its statements; the same for every file."""
    return {query: tuple(split_statements(text)) for query, text in load_queries("sqlite", **_TOKENS).items()}


def _begin(connection: Connection) -> None:
    # A new file first: in WAL its many readers do not keep the one writer from committing. An old one stays as it is
    # until its upgrade has succeeded.
    if connection.execute("pragma main.page_count").fetchone()[0] == 0:
        _switch_to_wal(connection)
    connection.execute("begin immediate")


def _stamp(connection: Connection) -> tuple[int, int]:
    return connection.execute("pragma main.data_version").fetchone()[0], connection.total_changes


def _roll_back_part(connection: Connection) -> None:
    connection.execute("rollback to savepoint runtime_repo")
    connection.execute("release savepoint runtime_repo")


def _switch_to_wal(connection: Connection) -> None:
    # Write-ahead logging, or what a database without a file has instead.
    if connection.execute("pragma main.journal_mode").fetchone()[0] not in ("wal", "memory"):
        connection.execute("pragma main.journal_mode = wal").fetchone()


async def _closed(connection: aiosqlite.Connection) -> None:
    """Close it in one hop, its thread's last, and see the thread off."""
    try:
        await cast("asyncio.Future[Any]", connection.stop())
    except asyncio.CancelledError:
        await finish(asyncio.to_thread(connection._thread.join))
        raise
    connection._thread.join()


async def _forsaken(connection: aiosqlite.Connection, first: Hop) -> None:
    """See off the thread of a connection that failed or was cancelled, and close what aiosqlite has lost sight of."""
    await asyncio.to_thread(connection._thread.join)
    if first.connection is not None:
        first.connection.close()


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _is_absent(path: Path) -> bool:
    """Whether there is certainly no such file: one that may not be looked for may be there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False
