"""
One SQLite file behind the port.

Work is sent to the connection's thread as a *hop*: one function that normally opens and ends its own transaction, so
that a cancelled caller leaves no lock. A verb that finds the connection free has a hop to itself; those that wait for
it at the same moment share one, and its commit. Boot and ``atomic()`` keep a transaction open across hops; both roll
back in a shielded hop. Hops are done in their order: a caller that gives up, since the thread does not come back from
the system, leaves its rollback behind in the thread's queue, before whatever comes later.
"""

import asyncio
import contextlib
import os
import random
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import aiosqlite

from runtime_repo.archive import Loaded, Manifest, Reader, Terms, Writer, in_thread
from runtime_repo.catalog import Catalog, Look
from runtime_repo.database import Backend, Busy, Heartbeats, Row
from runtime_repo.doctor import Examined, Finding
from runtime_repo.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    LockHolder,
    RepositoryClosedError,
    RuntimeRepoError,
    shown,
)
from runtime_repo.queries import fill, load_queries, split_statements, uncommented
from runtime_repo.repairs import Repair
from runtime_repo.repository import Unique
from runtime_repo.schema import Migration
from runtime_repo.shielding import CLEAN_UP, finish, settle
from runtime_repo.sqlite.archive import Replacement, exporting, remains
from runtime_repo.sqlite.backup import Copy, backup_path, name_what_is_pending, remove_what_was_left
from runtime_repo.sqlite.connection import Connection, Hop
from runtime_repo.sqlite.doctor import examine
from runtime_repo.sqlite.fork import check_not_inherited, hold_inherited, is_idle, note
from runtime_repo.sqlite.group import Glance, Group, Part, Query
from runtime_repo.sqlite.limits import Limit, Limits
from runtime_repo.sqlite.look import inspecting, looking
from runtime_repo.sqlite.statements import Prepared
from runtime_repo.sqlite.translation import is_writable, translated
from runtime_repo.sqlite.turn import ALONE, Turn

__all__ = ["SqliteDatabase"]

T = TypeVar("T")

_TOKENS = {"schema": "main", "now_ms": "cast(round((julianday('now') - 2440587.5) * 86400000) as integer)"}

_BUSY_TIMEOUT = 0.05
"""Seconds that a hop may block its thread. Longer waits repeat the hop, so that a cancelled caller is heard."""

_POLL = 0.03
"""Seconds between two polls of a caller that waits, whether anybody has committed: 0.1 ms of the processor each."""

_LONGEST_QUIET = 5.0
"""Seconds after which it is taken for a change that there was none: some things fall due without a commit."""


_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
"""What no SQLite can read."""

_LAST_BREATH = 0.1
"""Seconds in which a thread that has done its last hop has certainly ended."""


class SqliteDatabase(Unique):
    """
    One SQLite file behind the port.

    *verb_timeout* is how many seconds a query may take, the wait for its turn and for other processes' locks included,
    and so may a look, and the beginning and the end of ``atomic()``. Nothing else of a boot is limited.
    """

    backend: Backend = "sqlite"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        writes: bool,
        backup: bool,
        lock_timeout: float,
        verb_timeout: float | None = None,
    ) -> None:
        self._path: Path | None = None
        name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if not isinstance(name, str) or not name or name.startswith("file:") or "\0" in name or not _is_encodable(name):
            raise ConfigurationError(
                f"the path of a SQLite database is {shown(path)}: expected a file's path or ':memory:'"
            )
        self._path = None if name == ":memory:" else Path(name).absolute()
        self._writes = writes
        self._backup = backup
        self._lock_timeout = lock_timeout
        self._limits = Limits(verb_timeout, self._silent)
        self._connection: aiosqlite.Connection | None = None
        self._turn = Turn(self._begin_together)
        self._groups: set[asyncio.Task[None]] = set()
        self._copy: Copy | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._path or ':memory:')!r})"

    @property
    def place(self) -> str:
        return str(self._path or ":memory:")

    def text(self, query: str) -> str:
        return uncommented(load_queries("sqlite", **_TOKENS)[query])

    def filled(self, text: str) -> str:
        return fill(text, _TOKENS)

    async def close(self) -> None:
        self._limits.close()
        connection, self._connection = self._connection, None
        if connection is not None:
            await _closed(connection)

    def abandon(self) -> None:
        self._limits.close()
        connection, self._connection = self._connection, None
        if connection is not None:
            _abandon(connection)

    def inherited(self) -> None:
        if self._path is not None:
            own = None if self._connection is None else self._connection._connection
            hold_inherited(self._path, was_idle=isinstance(own, Connection) and is_idle(own))

    def fetch(self, query: str, *args: object) -> Coroutine[Any, Any, Sequence[Row]]:
        return self._do(Part(Query(PREPARED[query], args)))

    async def glance(self, query: str, *args: object, within: float) -> Sequence[Row] | None:
        was_asked = False

        def asked() -> None:
            nonlocal was_asked
            was_asked = True
            limit.reschedule(asyncio.get_running_loop().time() + within)

        try:
            async with asyncio.timeout(within) as limit:
                return await self._do(Part(Query(PREPARED[query], args), when_called=asked))
        except TimeoutError:
            if was_asked:
                raise
            return None

    async def ask_in_a_hurry(self, query: str, *args: object) -> tuple[Sequence[Row], float]:
        """As ``fetch``, before all others that wait for their turn; and when that had come."""
        part: Part[Sequence[Row]] = Part(Query(PREPARED[query], args), hurries=True)
        return await self._do(part), part.asked_at

    async def _do(self, part: "Part[T]") -> T:
        """Do what a caller wants, in its turn."""
        with Limit(self._limits):
            return await self._in_turn(part)

    async def _in_turn(self, part: "Part[T]") -> T:
        """As above, however long it takes, but for locks: as ``_patiently``, without a coroutine for each step."""
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + self._lock_timeout
        while True:
            turn = self._turn
            try:
                if (answer := turn.ask(part, loop)) is not None:
                    try:
                        found = await answer
                    except asyncio.CancelledError:
                        turn.left(part)
                        part.give_up()
                        raise
                    if found is not ALONE:
                        return cast(T, found)
                try:
                    return cast(T, await self.hop(part.what.alone))
                finally:
                    turn.give()
            except Busy as busy:
                if time.monotonic() >= deadline:
                    raise self._locked() from busy.__cause__
            await asyncio.sleep(random.uniform(0.001, 0.005 if part.hurries else 0.02))  # noqa: S311

    def _begin_together(self, parts: "Sequence[Part[Any]]") -> None:
        """Have the turn's *parts* done, in a task that none of their callers can cancel."""
        task = asyncio.get_running_loop().create_task(self._do_together(parts))
        self._groups.add(task)
        task.add_done_callback(self._groups.discard)

    async def _do_together(self, parts: "Sequence[Part[Any]]") -> None:
        turn = self._turn
        try:
            await self.hop(Group(parts).do)
        except asyncio.CancelledError:
            # The event loop ends.
            for part in parts:
                part.give_up()
                part.answer.cancel()
            turn.give()
            raise
        except (Busy, RuntimeRepoError):
            # Nothing was begun, such as where it was closed: each hears for itself what is wrong.
            for part in parts:
                part.undo()
        for part in parts:
            if part.is_done:
                self._answer(part)
        turn.put_back([part for part in parts if not part.answer.done()])
        turn.give_soon()

    def _answer(self, part: "Part[Any]") -> None:
        # What it failed with leads back to it, and to what the driver has open.
        cause, part.error = part.error, None
        if part.answer.done():
            return
        if cause is None:
            part.answer.set_result(part.rows)
            return
        error = translated(cause, self._path)
        if error is not cause:
            error.__cause__ = cause
        part.answer.set_exception(error)

    @contextlib.asynccontextmanager
    async def atomic(self) -> AsyncIterator["_Transaction"]:
        with Limit(self._limits):
            await self._begun(self._begin)
        try:
            yield _Transaction(self)
            with Limit(self._limits):
                await self._commit()
        except BaseException:
            await finish(self._roll_back())
            raise
        finally:
            self._turn.give()

    async def _begin(self) -> None:
        try:
            await self.hop(_begin)
        except asyncio.CancelledError:
            # It may succeed behind the caller's back.
            await finish(self._roll_back())
            raise

    async def _commit(self) -> None:
        """Commit. In a file that is not in WAL whoever reads holds that up, and the transaction stays open."""
        deadline = time.monotonic() + self._lock_timeout
        while True:
            try:
                await self.hop(self._committing)
            except Busy as busy:
                if time.monotonic() >= deadline:
                    raise self._locked() from busy.__cause__
            else:
                return
            await asyncio.sleep(random.uniform(0.001, 0.02))  # noqa: S311

    def _committing(self, connection: Connection) -> None:
        self.require_transaction(connection)
        connection.prove()
        connection.execute("commit")

    def require_transaction(self, connection: Connection) -> None:
        """SQLite ends a transaction by itself when the disk is full, for one, and would commit what follows at once."""
        if not connection.in_transaction:
            raise DatabaseUnavailableError(
                f"SQLite database {str(self._path or ':memory:')!r}: the transaction is over, since a statement of it "
                "failed or was interrupted and SQLite rolled it back, or ended it itself: begin it again"
            )

    async def _roll_back(self) -> None:
        """End whatever transaction is open. What stands in the way of that does not take the cause's place."""
        if self._connection is not None:
            with contextlib.suppress(Busy, RuntimeRepoError, ValueError):
                await self._connection.interrupt()  # what still runs is undone with the rest
                await self.hop(lambda connection: connection.roll_back(), must=True)

    @contextlib.asynccontextmanager
    async def part(self) -> AsyncIterator["_Transaction"]:
        """Transaction that take effect with the transaction that is open, or fail alone."""
        await self.step("savepoint runtime_repo")
        try:
            yield _Transaction(self)
        except BaseException:
            with contextlib.suppress(Busy, RuntimeRepoError):
                await finish(self.hop(_roll_back_part, must=True))
            raise
        await self.step("release savepoint runtime_repo")

    async def step(self, statement: str) -> None:
        """Do *statement* in the transaction that is open."""

        def work(connection: Connection) -> None:
            self.require_transaction(connection)
            connection.execute(statement)

        await self.within(self.hop(work))

    async def within(self, work: Awaitable[T]) -> T:
        """A statement of a transaction, which waits for nobody's turn."""
        try:
            with Limit(self._limits):
                return await work
        except Busy as busy:
            raise DatabaseUnavailableError(
                f"SQLite database {str(self._path or ':memory:')!r}: {busy.__cause__}: another process, or a statement "
                "of this transaction that was not read to its end, stands in the way: begin the transaction again"
            ) from busy.__cause__

    async def _alone(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do *work* in its turn, without others."""
        with Limit(self._limits):
            result = await self._begun(work)
            self._turn.give()
            return result

    async def _begun(self, work: Callable[[], Awaitable[T]]) -> T:
        """Have the connection to oneself, from the moment at which *work* is not told that the file is locked."""

        async def begin() -> T:
            await self._turn.take()
            try:
                return await work()
            except BaseException:
                self._turn.give()
                raise

        return await self._patiently(begin)

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do *work*, and again while it is told that the file is locked, for as long as is allowed."""
        deadline = time.monotonic() + self._lock_timeout
        while True:
            try:
                return await work()
            except Busy as busy:
                if time.monotonic() >= deadline:
                    raise self._locked() from busy.__cause__
            await asyncio.sleep(random.uniform(0.001, 0.02))  # noqa: S311

    async def run(self, query: str, args: Sequence[object]) -> Sequence[Row]:
        """Run a named query in the transaction that is open."""
        what = Query(PREPARED[query], args)

        def work(connection: Connection) -> Sequence[Row]:
            self.require_transaction(connection)
            return what.within(connection)

        return await self.hop(work)

    @contextlib.asynccontextmanager
    async def watch(self, queues: Collection[str]) -> AsyncIterator["_Watch"]:  # noqa: ARG002 - any commit is a hint
        # What is not known at once is taken to have changed.
        yield _Watch(self, await self.stamp(within=_POLL))

    async def vacuum(self) -> None:
        """What is deleted leaves room in its page, and no dead row."""

    async def heartbeats(self) -> Heartbeats:
        return _Heartbeats(self)

    def tell(self, queues: Iterable[str]) -> None:
        """Nobody needs to be told: who waits polls whether anybody has committed."""

    async def stamp(self, *, within: float) -> tuple[int, int] | None:
        """
        What changes with every commit: other connections' are counted by SQLite, our own by the driver.

        None if the turn has not come within so many seconds: while a transaction of this process is open, nobody else
        commits anything.
        """
        try:
            async with asyncio.timeout(within):
                return await self._in_turn(Part(Glance(_stamp)))
        except TimeoutError:
            return None

    @property
    def connection(self) -> aiosqlite.Connection:
        if self._connection is None:
            raise RepositoryClosedError(f"{self!r} is not open: await the repository first, and not after close()")
        return self._connection

    async def hop(
        self,
        work: Callable[[Connection], T] | Hop,
        connection: aiosqlite.Connection | None = None,
        *,
        must: bool = False,
    ) -> T:
        """
        Do *work* on the connection's thread.

        A caller that is cancelled is let go at once, and what it asked for is given up, unless it *must* be done.
        """
        hop = work if isinstance(work, Hop) else Hop(work)
        try:
            result = await (connection or self.connection).execute_fetchall("a hop", cast(Iterable[Any], hop))
        except asyncio.CancelledError:
            if not must:
                hop.give_up()
            raise
        except Exception as error:
            # No driver's exception gets out but as a cause.
            if (ours := translated(error, self._path)) is error:
                raise
            raise ours from error
        return cast(T, result)

    async def open(self, shipped: Sequence[Catalog]) -> Look:
        if self._connection is None:
            self._limits.close()  # another event loop's, perhaps
        with Limit(self._limits):
            if self._connection is not None:
                async with self._turn.mine():
                    return self._with_remains(await self.look_now(shipped))
            first = Hop(looking(PREPARED, shipped))
            try:
                await self._open(first)
            except DatabaseUnavailableError:
                if self._path is None:
                    raise
                # What is absent is fresh, and a verify-only boot must not create it.
                absent = self._with_remains(Look(None, Catalog()))
                if _is_absent(self._path) and (not self._writes or absent.remains):
                    return absent
                # Whatever else is wrong is wrong again, unless another process has just created the file.
                await self._open(first, create=self._writes)
            return self._with_remains(cast(Look, first.fetchall()))

    async def _open(self, first: Hop, *, create: bool = False) -> None:
        self._turn = Turn(self._begin_together)
        self._connection = await self._connect(first, create=create)

    async def _connect(self, first: Hop, *, create: bool = False) -> aiosqlite.Connection:
        """Connect, and run *first* in the same hop."""
        if self._path is not None:
            check_not_inherited(self._path)
        connection = aiosqlite.connect(
            ":memory:" if self._path is None else f"{self._path.as_uri()}?mode=rw",
            uri=self._path is not None,
            factory=partial(Connection, first=first, path=self._path, create=create),
            isolation_level=None,
            timeout=_BUSY_TIMEOUT,
            check_same_thread=False,  # aiosqlite sees to that; see _forsaken
        )
        # A connection that was forgotten unclosed must not keep the process from exiting; there is no public switch.
        connection._thread.daemon = True
        try:
            await connection
            note(cast(Connection, connection._conn))
            return connection
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                first.give_up()
            await finish(_forsaken(connection._thread, first))
            if not isinstance(error, Exception) or (ours := translated(error, self._path)) is error:
                raise
            raise ours from error

    async def look_now(self, shipped: Sequence[Catalog]) -> Look:
        """Look on the connection that is open, which is one's own at the moment."""
        look = looking(PREPARED, shipped)

        def work(connection: Connection) -> Look:
            connection.prove(now=True)
            return look(connection)

        return await self.hop(work)

    @contextlib.asynccontextmanager
    async def lock(self) -> AsyncIterator["_BootTransaction"]:
        try:
            async with asyncio.timeout(self._lock_timeout):
                await self._turn.take()
        except TimeoutError:
            raise Busy from None
        commit: Hop | None = None
        try:
            await self._try_to_begin()
            yield _BootTransaction(self)
            # Once it was asked for it is done: to interrupt a COMMIT would save nothing.
            commit = Hop(self._commit_boot)
            await self.hop(commit, must=True)
        except BaseException as error:
            try:
                # Also after a cancelled BEGIN: it may succeed behind the caller's back and keep the lock.
                await finish(self._roll_back())
            finally:
                # Nobody knows yet how a COMMIT ends that the thread has not come back from.
                if self._copy is not None and (commit is None or commit.failed):
                    self._copy.drop()
                if not isinstance(error, Busy):
                    self._copy = None
            raise
        else:
            self._copy = None
        finally:
            self._turn.give()

    def _commit_boot(self, connection: Connection) -> None:
        connection.execute("commit")
        if self._copy is not None:
            self._copy.keep()

    async def _try_to_begin(self) -> None:
        try:
            await self.hop(_begin_boot)
        except DatabaseUnavailableError as error:
            code = getattr(error.__cause__, "sqlite_errorcode", 0)
            if code & 0xFF != sqlite3.SQLITE_READONLY or self._path is None or not is_writable(self._path):
                raise
            # SQLite (3.40) has been seen to tell one of many processes that turn a new file to WAL at the same moment
            # that the file is read-only. It is not: connect anew and look again.
            await self._reconnect()
            raise Busy from error.__cause__

    async def _reconnect(self) -> None:
        """Put a new connection in the place of the one that is one's own at the moment: others notice nothing."""
        old = self.connection
        new = await self._connect(Hop(_nothing))
        if self._connection is old:
            self._connection = new
        else:
            old = new  # closed meanwhile
        await _closed(old)

    async def inspect(self, shipped: Sequence[Catalog]) -> Look:
        with Limit(self._limits):
            if self._path is not None:
                return await self._inspect_apart(self._path, shipped)
            if self._connection is None:
                return Look(None, Catalog())
            return await self._alone(partial(self.look_now, shipped))

    async def _inspect_apart(self, path: Path, shipped: Sequence[Catalog]) -> Look:
        """Look on a connection for this alone, which makes no file and waits for no transaction of this process."""
        deadline = time.monotonic() + self._lock_timeout
        while True:
            first = Hop(inspecting(PREPARED, shipped))
            try:
                connection = await self._connect(first)
            except Busy as busy:
                if time.monotonic() >= deadline:
                    raise self._locked() from busy.__cause__
            except DatabaseUnavailableError:
                self._prove()
                # What a boot would make is fresh.
                if _is_absent(path) and (not self._writes or path.parent.is_dir()):
                    return self._with_remains(Look(None, Catalog()))
                raise
            else:
                await _closed(connection)
                self._prove()
                return self._with_remains(cast(Look, first.fetchall()))
            await asyncio.sleep(random.uniform(0.001, 0.02))  # noqa: S311

    def _prove(self) -> None:
        """See that what is open, if anything is, is still the file in its place."""
        own = None if self._connection is None else self._connection._connection
        if isinstance(own, Connection):
            own.prove(now=True)

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator["_Reader | SqliteDatabase"]:
        if self._path is None:
            yield self  # nobody else has what is in memory
            return
        with Limit(self._limits):
            connection = await self._patiently(lambda: self._connect(Hop(_nothing)))
        try:
            yield _Reader(self, connection)
        finally:
            await _closed(connection)

    async def ask(self, text: str) -> Sequence[Row]:
        """What is asked of a database in memory, in its turn."""
        return await self._do(Part(Query(Prepared(self.filled(text)), ())))

    async def read(self, prepared: Prepared, args: Sequence[object], connection: aiosqlite.Connection) -> Any:
        """Run a query on a connection of one's own, and again while the file is locked."""
        with Limit(self._limits):
            return await self._patiently(lambda: self.hop(Query(prepared, args).alone, connection))

    async def examine(self, examined: Examined) -> tuple[Sequence[Finding], Sequence[Repair]]:
        async with self.reading() as reader:
            return await examine(reader, self._path, examined)

    def script(self, statements: Sequence[str]) -> str:
        # A table that others refer to can be made anew only so.
        before = ["pragma foreign_keys = off;", "pragma legacy_alter_table = on;", "begin immediate;"]
        return "\n".join([*before, *statements, "commit;", "pragma legacy_alter_table = off;"]) + "\n"

    async def lock_holder(self, *, apart: bool = False, migrating: bool = False) -> LockHolder | None:  # noqa: ARG002
        return None  # nobody can know

    async def serve(self, version: int) -> None:
        if self._writes and self._path is not None:
            name_what_is_pending(self._path, version)
        # A connection that has read a database in WAL mode has its log beside it.
        if self._writes and self._path is not None and not os.path.exists(f"{self._path}-wal"):  # noqa: ASYNC240, PTH110
            # While others hold the file in its old mode it works all the same; a later boot will switch.
            with contextlib.suppress(Busy), Limit(self._limits):
                async with self._turn.mine():
                    await self.hop(_switch_to_wal)

    async def take_backup(self, from_version: int) -> Path | None:
        if self._path is None:
            return None
        if not self._backup:
            remove_what_was_left(self._path)
            return None
        self._copy = Copy(self._path, from_version)
        await self._take_copy(self._copy)
        return self._copy.target

    def backup_name(self, from_version: int) -> str | None:
        return str(backup_path(self._path, from_version, "<time>")) if self._backup and self._path is not None else None

    async def take_backup_again(self) -> None:
        """Where a try at the same boot was in vain, and the copy went with it: others may have written since."""
        if self._copy is not None and not self._copy.is_taken:
            await self._take_copy(self._copy)

    def _with_remains(self, look: Look) -> Look:
        """Where there is nothing, and only there, with what a restore has kept or left beside it."""
        if self._path is None or not look.is_empty:
            return look
        return replace(look, remains=tuple(remains(self._path)))

    def check_another(self, path: object) -> None:
        """
        See that *path* is another file: to open this one outside of SQLite would drop the locks of this process.

        Raises:
            ConfigurationError: It is this one.
        """
        is_it = False
        with contextlib.suppress(OSError, TypeError, ValueError):
            is_it = self._path is not None and os.path.samefile(cast(Path, path), self._path)  # noqa: PTH121
        if is_it:
            raise ConfigurationError(f"{self._path} is the database itself: name an archive, or a copy of it")

    async def export(self, writer: Writer, migrations: Sequence[Migration], terms: Terms, target: Backend) -> Manifest:
        work = exporting(PREPARED, writer, migrations, terms, target)
        if self._path is None:
            return await self._alone(partial(self.hop, work))
        return await self._apart(work, writer.stop, terms.patience)

    async def load(self, reader: Reader, migrations: Sequence[Migration], terms: Terms) -> Loaded:
        if self._path is None:
            raise ConfigurationError("a database in memory is gone when its repository is closed: name a file's path")
        check_not_inherited(self._path)
        new = Replacement(self._path, PREPARED, _TOKENS, reader, migrations, terms)
        try:
            await in_thread(new.stop, new.begin)
            return await self._load(new, terms)
        finally:
            await finish(in_thread(new.stop, new.end))

    async def _load(self, new: Replacement, terms: Terms) -> Loaded:
        page_size: int | None = None
        if not _is_absent(new.path):
            try:
                page_size = await self._apart(new.look, new.stop, terms.patience)
            except DatabaseUnavailableError as error:
                if getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
                    raise
        if new.is_there:
            return Loaded()
        await in_thread(new.stop, new.build, page_size)
        if page_size is None:
            kept = await in_thread(new.stop, new.into_place)
        else:
            kept = await self._apart(new.into_live, new.stop, terms.patience)
        return Loaded(None if kept is None else str(kept), new.requeued, tuple(new.overridden))

    async def _apart(self, work: Callable[[Connection], T], stop: Callable[[], None], patience: float) -> T:
        """
        Do *work*, which may take its time, on a connection for this alone.

        Whoever is cancelled tells it to *stop*, and waits for its end, for a while.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                connection = await self._connect(Hop(_nothing))
                hop = Hop(work)
                running: asyncio.Future[T] = asyncio.ensure_future(self.hop(hop, connection, must=True))
                try:
                    await asyncio.wait([running])
                    return running.result()
                except asyncio.CancelledError:
                    stop()
                    hop.give_up()
                    with contextlib.suppress(Exception):
                        await settle(running)
                    raise
                finally:
                    await finish(_closed(connection))
            except Busy as busy:
                if time.monotonic() >= deadline:
                    raise self._locked() from busy.__cause__
            await asyncio.sleep(random.uniform(0.001, 0.02))  # noqa: S311

    async def _take_copy(self, copy: Copy) -> None:
        try:
            # A second connection: from the one that holds the write transaction the backup would hang.
            reader = await self._connect(Hop(_nothing))
            try:
                await copy.take(lambda work: self.hop(work, reader))
            except asyncio.CancelledError:
                reader.stop()  # that was waited for long enough
                raise
            except BaseException:
                await _closed(reader)
                raise
            await _closed(reader)
        except (Busy, RuntimeRepoError) as error:
            cause = error.__cause__ or error
            raise DatabaseUnavailableError(
                f"the backup {copy.target} could not be written ({cause}): free some space or grant the folder, "
                "or boot with backup=False after taking one yourself"
            ) from cause

    def _locked(self) -> DatabaseUnavailableError:
        return DatabaseUnavailableError(
            f"{self._path} is locked by another process for more than {self._lock_timeout} s: "
            "end that process's transaction, or raise lock_timeout"
        )

    def _silent(self) -> DatabaseUnavailableError:
        return DatabaseUnavailableError(
            f"SQLite database {str(self._path or ':memory:')!r}: no answer within {self._limits.seconds:g} s "
            "(verb_timeout): a transaction of this process or of another is open for so long, or the disk hangs: "
            "keep transactions short, check the disk, or raise verb_timeout"
        )


class _Reader:
    """Statements on a connection of its own."""

    def __init__(self, database: SqliteDatabase, connection: aiosqlite.Connection) -> None:
        self._database = database
        self._connection = connection

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        rows: Sequence[Row] = await self._database.read(PREPARED[query], args, self._connection)
        return rows

    async def ask(self, text: str) -> Sequence[Row]:
        rows: Sequence[Row] = await self._database.read(Prepared(self._database.filled(text)), (), self._connection)
        return rows


class _Heartbeats:
    """Queries that are the next in turn."""

    def __init__(self, database: SqliteDatabase) -> None:
        self.ask = database.ask_in_a_hurry
        self.atomic = database.atomic
        self.tell = database.tell

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        rows, _ = await self.ask(query, *args)
        return rows


class _Watch:
    """Looks whether anybody has committed: SQLite tells no other process."""

    def __init__(self, database: SqliteDatabase, stamp: tuple[int, int] | None) -> None:
        self._database = database
        self._stamp = stamp

    async def change(self, within: float) -> None:
        # Of random length, so that those who wait do not all poll at once.
        deadline = time.monotonic() + min(within, _LONGEST_QUIET * random.uniform(0.9, 1.3))  # noqa: S311
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _POLL))
            stamp = await self._database.stamp(within=max(deadline - time.monotonic(), 0.001))
            if stamp not in (None, self._stamp):
                self._stamp = stamp
                return


class _Transaction:
    """Queries in the transaction that is open."""

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database

    @property
    def connection(self) -> aiosqlite.Connection:
        return self._database.connection

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        return await self._database.within(self._database.run(query, args))

    def atomic(self) -> contextlib.AbstractAsyncContextManager["_Transaction"]:
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
        await self._database.take_backup_again()
        await self._database.run(query, ())

    async def script(self, text: str) -> None:
        statements = tuple(split_statements(fill(text, _TOKENS)))

        def work(connection: Connection) -> None:
            for statement in statements:
                connection.execute(statement)

        await self._database.take_backup_again()
        await self._database.hop(work)

    async def ask(self, text: str) -> Sequence[Row]:
        query = fill(text, _TOKENS)
        rows: Sequence[Row] = await self._database.hop(lambda connection: connection.execute(query).fetchall())
        return rows

    async def look(self, shipped: Sequence[Catalog]) -> Look:
        return await self._database.look_now(shipped)


class _Prepared(dict[str, Prepared]):
    """Every query, made ready when it is first asked for; the same for every file."""

    def __missing__(self, query: str) -> Prepared:
        prepared = self[query] = Prepared(load_queries("sqlite", **_TOKENS)[query])
        return prepared


PREPARED = _Prepared()


def _nothing(connection: Connection) -> None:
    pass


def _begin(connection: Connection) -> None:
    if connection.in_transaction:
        connection.roll_back()  # what nobody could end when it was to end
    connection.prove()
    connection.execute("begin immediate")


def _begin_boot(connection: Connection) -> None:
    # A new file first: in WAL its many readers do not keep the one writer from committing. An old one stays as it is
    # until its upgrade has succeeded.
    if connection.execute("pragma main.page_count").fetchone()[0] == 0:
        _switch_to_wal(connection)
    _begin(connection)


def _stamp(connection: Connection) -> tuple[int, int]:
    connection.prove()
    return connection.execute("pragma main.data_version").fetchone()[0], connection.total_changes


def _roll_back_part(connection: Connection) -> None:
    if connection.in_transaction:
        connection.roll_back_to("runtime_repo")


def _switch_to_wal(connection: Connection) -> None:
    # Write-ahead logging, or what a database without a file has instead.
    if connection.execute("pragma main.journal_mode").fetchone()[0] not in ("wal", "memory"):
        connection.execute("pragma main.journal_mode = wal").fetchone()


async def _closed(connection: aiosqlite.Connection) -> None:
    """Close it in one hop, its thread's last, and see the thread off. One that hangs is left to end by itself."""
    thread = connection._thread
    if not thread.is_alive():
        return  # the application has closed it
    last = cast("asyncio.Future[Any]", connection.stop())
    timer = asyncio.get_running_loop().call_later(CLEAN_UP, _let_go, last)
    try:
        hangs = await last is _HANGS
    except asyncio.CancelledError:
        await finish(_gone(thread))
        raise
    except sqlite3.Error:
        return
    finally:
        timer.cancel()
    if not hangs:
        # It has nothing more to do.
        thread.join(_LAST_BREATH)


def _abandon(connection: aiosqlite.Connection) -> None:
    """Close it without waiting for that, and without telling an event loop, which may have ended by then."""
    if sys.is_finalizing():
        connection.stop()  # no thread runs any more, nor would one begin
        return
    # Only where there is no event loop has the driver nobody to tell.
    stopping = threading.Thread(target=connection.stop, daemon=True)
    try:
        stopping.start()
    except RuntimeError:
        connection.stop()  # the interpreter is about to end, and begins no thread any more
    else:
        stopping.join()


_HANGS = object()


def _let_go(last: "asyncio.Future[Any]") -> None:
    if not last.done():
        last.set_result(_HANGS)


async def _gone(thread: threading.Thread) -> None:
    while thread.is_alive():  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.001)


async def _forsaken(thread: threading.Thread, first: Hop) -> None:
    """
    See off the thread of a connection that failed or was cancelled, and close what aiosqlite has lost sight of.

    One that hangs closes it by itself.
    """
    await _gone(thread)
    if first.connection is not None:
        first.connection.close()


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
