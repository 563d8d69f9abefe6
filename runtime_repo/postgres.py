"""
PostgreSQL: the repository class, and the database it runs on. The only file that imports asyncpg.

Every statement names the runtime schema, and settings are SET LOCAL only: nothing here depends on the state of a
session, so it runs behind a transaction-pooling pgbouncer (with ``statement_cache_size=0``).
"""

import asyncio
import contextlib
import inspect
import json
import random
import re
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

import asyncpg

from runtime_repo.catalog import LEDGER, Catalog, Ledger, Look
from runtime_repo.catalog_postgres import fingerprint, ledger_from_lines, tables_from_rows
from runtime_repo.database import Backend, Busy, Row, Watch, finish
from runtime_repo.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    LockHolder,
    MigrationError,
    RepositoryClosedError,
    RuntimeRepoError,
)
from runtime_repo.notifications import Hear, Listener, Teller
from runtime_repo.queries import fill, load_queries
from runtime_repo.repository import RuntimeRepository, RuntimeTransaction, check_seconds

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Pool = asyncpg.Pool[asyncpg.Record]
    Lent = PoolConnectionProxy[asyncpg.Record]
    Connection = asyncpg.Connection[asyncpg.Record] | Lent

__all__ = ["PostgresRuntimeRepository"]

_LOCK_CLASS = 0x72756E74
"""The first of the advisory lock's two integers; it must never change, or two releases would not exclude each other."""

_LOCK_TIMEOUT = "100ms"
"""How long one try may queue live traffic behind it while it waits for a table."""

_DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)

_REST = 0.4
"""Seconds between two such tries, whoever makes them."""

_LISTEN_CHECK = 30.0
"""Seconds after which a connection that listens is asked whether it still does."""

_CLOSE_TIMEOUT = 5.0
"""Seconds for saying goodbye to the server, before the connections are dropped."""

_POOL_OPTIONS = set(inspect.signature(asyncpg.create_pool).parameters) - {"connection_class", "record_class"}
"""What a pool keeps for itself; it passes everything else to its connections."""

_REMEDIES = {
    "28000": "check the user and the server's pg_hba.conf",
    "28P01": "check the user and the password",
    "3D000": "create the database, or name another one",
    "42501": "grant the role what it lacks, or boot once under a role that has it",
    "25006": "the server is a standby or the session is read-only: migrate on the primary, in a session that may write",
    "53300": "free some connections, or raise the server's max_connections",
    "57P03": "the server was starting or stopping: wait for it, or raise startup_timeout",
}


class PostgresRuntimeRepository(RuntimeRepository):
    """
    The store on PostgreSQL 14 and newer: any number of machines.

    Construction does no I/O. ``await`` it, or enter it with ``async with``: either brings the runtime schema to what
    this release knows before anything can be queried. Any number of workers may do so at once, also under a role that
    may only read when nothing is pending, and behind a transaction-pooling pgbouncer (with ``statement_cache_size=0``).

    Args:
        dsn: ``postgresql://user:password@host:port/database``, as asyncpg reads it, or an asyncpg pool that is open:
            it is used and never closed.
        schema: The namespace that holds the ledger and every table. Two of them in one database are independent.
        migrate: False is verify-only: nothing is written, and pending migrations refuse the boot.
        on_drift: ``"warn"`` serves although the structure has drifted, and logs every difference.
        before_migrate: A coroutine function that runs once, under the lock, before the first migration is applied:
            the place for a backup.
        lock_timeout: Seconds to wait for another process's migration, or for the locks of live traffic.
        startup_timeout: Seconds for connecting. A server that refuses connections, is starting or is full, and a name
            that does not resolve yet, are tried again until then; a wrong password or a missing database fail at once.
        listen: Whether ``attempts.wait`` and ``Worker`` are told of new work by the server, on one connection of their
            own from the first wait on (of a pool that is given, one of its connections, if it may have more than one).
            False looks once a second instead: behind a transaction-pooling pgbouncer nobody can listen.
        pool_options: Passed to ``asyncpg.create_pool``. ``min_size`` is 0 unless given.

    Raises:
        ConfigurationError: An argument cannot be meant.
    """

    def __init__(
        self,
        dsn: "str | Pool",
        *,
        schema: str = "runtime",
        migrate: bool = True,
        on_drift: Literal["refuse", "warn"] = "refuse",
        before_migrate: Callable[[], Awaitable[object]] | None = None,
        lock_timeout: float = 60.0,
        startup_timeout: float = 30.0,
        listen: bool = True,
        **pool_options: Any,
    ) -> None:
        try:
            target = Target(dsn, pool_options)
        finally:
            # From here on no frame of ours holds a password that a traceback with locals could show.
            dsn, pool_options = "", {}
        self._postgres = PostgresDatabase(target, schema=schema, startup_timeout=startup_timeout, listen=listen)
        super().__init__(
            self._postgres,
            migrate=migrate,
            on_drift=on_drift,
            before_migrate=before_migrate,
            lock_timeout=lock_timeout,
        )

    @contextlib.asynccontextmanager
    async def transaction(self, connection: "Connection | None" = None) -> AsyncIterator[RuntimeTransaction]:
        """
        Let several verbs, and the application's own statements, take effect together.

        With a *connection* of the application's own to the same database, on which a transaction is open, they are a
        part of that transaction: they are committed or rolled back with it, and when the block raises they alone are
        undone (a savepoint). Otherwise as in ``RuntimeRepository.transaction``.

        Raises:
            ConfigurationError: No transaction is open on *connection*.
            RepositoryClosedError: The repository is not open.
            DatabaseUnavailableError: The database cannot be reached, or does not commit.
        """
        if connection is not None and not _is_in_transaction(connection):
            raise ConfigurationError(
                "no transaction is open on the connection: begin one first (async with connection.transaction()), "
                "or leave the connection out"
            )
        part = None if connection is None else self._postgres.part_of_theirs(connection)
        async with self._transaction(part) as transaction:
            yield transaction


class Target:
    """Where to connect, and how; its repr shows no secret."""

    def __init__(self, dsn: "str | Pool", options: dict[str, Any]) -> None:
        self.pool = dsn if isinstance(dsn, asyncpg.Pool) else None
        self._dsn = dsn if isinstance(dsn, str) else ""
        self._connect = options.get("connect") or asyncpg.connect
        self._init = options.get("init")
        self._setup = options.get("setup")
        self._is_tuned = bool(options)
        self.can_reuse = not isinstance(dsn, asyncpg.Pool) and not options.keys() & {"setup", "reset"}
        """Whether a connection may be used again before the pool has it back: it is ours, and calls nobody at that."""
        # What we leave behind is no session state, so a connection needs no round trip to be reset.
        self._options: dict[str, Any] = {"min_size": 0, "reset": _nothing_to_reset} | options | {"init": None}
        self._shown = "an existing pool"
        if self.pool is None:
            self._shown = _shown(dsn) if isinstance(dsn, str) else ""
            problem = None if self._shown else "it is no postgresql:// URL that can be parsed"
        else:
            problem = "an existing pool has its options already" if options else None
        dsn, options = "", {}
        if problem:
            raise ConfigurationError(
                f"the DSN cannot be used: {problem}; expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with "
                "special characters percent-encoded (it is not repeated here, since it may hold a password)"
            )

    def __repr__(self) -> str:
        return self._shown

    @property
    def is_eager(self) -> bool:
        """Whether the pool shall have connections before somebody wants one."""
        return bool(self._options["min_size"] or self._options.get("init_size"))

    def new_pool(self, connect: Callable[..., Awaitable["Connection"]]) -> "Pool":
        """A pool, not yet open, that connects by *connect*."""
        return asyncpg.create_pool(self._dsn, **self._options | {"connect": connect})

    async def lend(self) -> "Connection":
        """A connection as a pool lends it: a plain one, which costs less than to make and close a pool for it."""
        if self.pool is not None:
            await self.pool
            return await self.pool.acquire()
        if self._is_tuned:
            asyncpg.create_pool(self._dsn, **self._options)  # not to be used: it refuses sizes that cannot be meant
        options = {name: value for name, value in self._options.items() if name not in _POOL_OPTIONS}
        return await self.connect(self._dsn, setup=self._setup, **options)

    async def connect(self, *args: Any, setup: Callable[..., Any] | None = None, **options: Any) -> "Connection":
        """Connect as asyncpg's pools do, for the pool or instead of it."""
        connection: Connection = await self._connect(*args, **options)
        try:
            for prepare in (self._init, setup):
                if prepare is not None:
                    await prepare(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection


def _shown(dsn: str) -> str:
    """The DSN without what may be secret: the password, and the query, where asyncpg takes one too."""
    try:
        dsn.encode()
        parts = urlsplit(dsn)
        _, _, hosts = parts.netloc.rpartition("@")
        user = parts.username
    except ValueError:
        return ""
    if parts.scheme not in ("postgresql", "postgres") or "\0" in dsn:
        return ""
    if "@" in parts.path + parts.query + parts.fragment or not all(map(_HOST.fullmatch, hosts.split(","))):
        # A character of the password that should have been encoded cuts it wrongly: its rest may be anywhere.
        return f"{parts.scheme}://..."
    return f"{parts.scheme}://{f'{user}@' if user else ''}{hosts}{parts.path}"


def _check_schema(schema: str) -> None:
    try:
        size = len(schema.encode())
    except (AttributeError, UnicodeEncodeError):
        size = 0
    if not 0 < size <= 63 or "\0" in schema or schema.startswith("pg_"):
        raise ConfigurationError(
            f"the runtime schema's name is {schema!r}, {size} bytes: expected 1 to 63 bytes of UTF-8 (PostgreSQL would "
            "cut a longer one silently, and two names would share a schema), without NUL, not beginning with 'pg_'"
        )


_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:,]*)(:\d*)?")


async def _nothing_to_reset(_connection: "Connection") -> None:
    pass


class PostgresDatabase:
    """One runtime schema of a PostgreSQL database behind the port."""

    backend: Backend = "postgres"

    def __init__(self, target: Target, *, schema: str, startup_timeout: float, listen: bool = True) -> None:
        self._target = target
        self._schema = schema
        _check_schema(schema)
        check_seconds("startup_timeout", startup_timeout, positive=True)
        self._startup_timeout = startup_timeout
        self.tokens = {
            "schema": '"' + schema.replace('"', '""') + '"',
            "now_ms": "(extract(epoch from statement_timestamp()) * 1000)::bigint",
        }
        self.queries = load_queries("postgres", **self.tokens)
        # A hash that is the same in every release, process and machine, as a signed integer.
        number = zlib.crc32(schema.encode())
        self._lock_key = number - 2**31
        # The name of a schema may be too long for one.
        self._channel = f"runtime_repo_{number:08x}"
        self._pool: Pool | None = None
        # Boot's own connection. The first verb makes the pool, which takes it over.
        self._own: Connection | None = None
        self._has_booted = False
        # The pool's connection that was used last, until the event loop's next turn.
        self._spare: Lent | None = None
        self._handing_back: asyncio.Future[None] | None = None
        self._waiting = 0
        has_room = target.pool is None or target.pool.get_max_size() > 1
        self._teller = Teller(self._tell_now)
        self._listener = Listener(self._listening if listen and has_room else None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._target!r}, schema={self._schema!r})"

    async def _connect(self) -> None:
        """Connect, trying again while the server may come up."""
        deadline = asyncio.get_running_loop().time() + self._startup_timeout
        pause = 0.05
        failure: RuntimeRepoError | None = None
        while error := await self._try_to_connect(deadline):
            again = error.__cause__ is not None and _is_transient(error.__cause__)
            if not again or asyncio.get_running_loop().time() + pause >= deadline:
                # A try that the deadline cut short says less than the one before it.
                raise failure if failure and isinstance(error.__cause__, TimeoutError) else error
            failure = error
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311
            pause = min(pause * 2, 1.0)

    async def _try_to_connect(self, deadline: float) -> RuntimeRepoError | None:
        """Try once. An error is returned, not raised, so that asyncpg's own frames and words stay behind."""
        try:
            async with asyncio.timeout_at(deadline):
                self._own = await self._target.lend()
        except (TypeError, ValueError, ArithmeticError, AttributeError, *_DRIVER_ERRORS) as error:
            # asyncpg's ClientConfigurationError is a ValueError, too.
            if not isinstance(error, (asyncpg.PostgresError, OSError)) and type(error) is not asyncpg.InterfaceError:
                # asyncpg's own words may repeat a part of the DSN.
                return ConfigurationError(
                    f"asyncpg cannot use the DSN or the pool options for {self._target}: check their spelling "
                    "(its message is not repeated here, since it may hold a password)"
                )
            failure = self._unavailable(error)
            failure.__cause__ = _bare(error)
            return failure
        return None

    async def _take_over(self, *args: Any, **options: Any) -> "Connection":
        """Connect for the pool: its first connection is boot's, if that still lives."""
        own, self._own = self._own, None
        return own if own is not None and not own.is_closed() else await self._target.connect(*args, **options)

    async def close(self) -> None:
        await finish(self._close())

    async def _close(self) -> None:
        await self._listener.close()
        await self._teller.close(_CLOSE_TIMEOUT)
        pool, self._pool = self._pool, None
        own, self._own = self._own, None
        self._has_booted = False
        if pool is not None:
            self._hand_back(pool)
        if own is not None:
            # The pool, if it is ours, has not been opened.
            await (_closed(own) if self._target.pool is None else _released(self._target.pool, own))
        elif pool is not None and pool is not self._target.pool:
            await _closed(pool)

    def abandon(self) -> None:
        with contextlib.suppress(Exception):
            self._listener.abandon()
        pool, self._pool = self._pool, None
        own, self._own = self._own, None
        for opened in (own, pool):
            if opened is not None and opened is not self._target.pool:
                # The event loop may be closed by now; its end has closed the sockets then.
                with contextlib.suppress(Exception):
                    opened.terminate()

    async def _open_pool(self) -> "Pool":
        if not self._has_booted:
            raise RepositoryClosedError(f"{self!r} is not open: await the repository first, and not after close()")
        if self._pool is None:
            self._pool = self._target.pool or self._target.new_pool(self._take_over)
        return await self._pool

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Let no driver's exception out but as a cause, without its frames: a verb may have had to connect anew."""
        try:
            yield
        except _DRIVER_ERRORS as error:
            raise self._unavailable(error) from _bare(error)

    @contextlib.asynccontextmanager
    async def _acquired(self) -> AsyncIterator["Connection"]:
        """A connection: boot's own until it has ended, then one of the pool's."""
        if self._own is not None and not self._has_booted:
            yield self._own
            return
        with self.translated():
            pool = await self._open_pool()
            connection = self._taken_spare() or await self._waited_for(pool)
        try:
            yield connection
        except BaseException:
            # It is back when the server is done with it, whoever does not want to wait for that.
            await finish(_released(pool, connection))
            raise
        # To hand it to the pool and have it back costs a tenth of a quick statement. So the pool has to wait until the
        # event loop's next turn: whoever goes on at once takes it from here, unless others want one.
        if self._target.can_reuse and self._spare is None and not self._waiting:
            self._spare = connection
            asyncio.get_running_loop().call_soon(self._hand_back, pool)
        else:
            await _released(pool, connection)

    def _taken_spare(self) -> "Lent | None":
        spare, self._spare = self._spare, None
        return spare

    async def _waited_for(self, pool: "Pool") -> "Lent":
        self._waiting += 1
        try:
            return await pool.acquire()
        finally:
            self._waiting -= 1

    def _hand_back(self, pool: "Pool") -> None:
        if (spare := self._taken_spare()) is not None:
            self._handing_back = asyncio.ensure_future(_released(pool, spare))

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        async with self._acquired() as connection:
            with self.translated():
                return await connection.fetch(self.queries[query], *args)

    @contextlib.asynccontextmanager
    async def atomic(self) -> AsyncIterator["_Statements"]:
        untold: set[str] = set()
        async with (
            self._acquired() as connection,
            self._together(connection, "begin isolation level read committed", "commit", "rollback"),
        ):
            yield _Statements(self, connection, untold)
        self.tell(untold)

    @contextlib.asynccontextmanager
    async def part(self, connection: "Connection", untold: set[str]) -> AsyncIterator["_Statements"]:
        """Statements that take effect with a transaction that is open already, or fail alone."""
        begin, commit = "savepoint runtime_repo", "release savepoint runtime_repo"
        async with self._together(connection, begin, commit, f"rollback to savepoint runtime_repo; {commit}"):
            yield _Statements(self, connection, untold)

    @contextlib.asynccontextmanager
    async def part_of_theirs(self, connection: "Connection") -> AsyncIterator["_Statements"]:
        """As above, in a transaction of the application's: when it commits, which we do not see, it tells by itself."""
        untold: set[str] = set()
        async with self.part(connection, untold) as statements:
            yield statements
            if untold:
                await statements.fetch("schema.tell", self._channel, json.dumps(list(untold)))

    def tell(self, queues: Iterable[str]) -> None:
        self._teller.tell(queues)

    async def _tell_now(self, queues: Iterable[str]) -> None:
        await self.fetch("schema.tell_now", self._channel, json.dumps(list(queues)))

    def watch(self, queues: Collection[str]) -> contextlib.AbstractAsyncContextManager[Watch]:
        return self._listener.watch(queues)

    @contextlib.asynccontextmanager
    async def _listening(self, hear: Hear) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
        """A connection of its own that listens, and what returns when it is lost."""
        over = asyncio.Event()
        with self.translated():
            async with asyncio.timeout(self._startup_timeout):
                connection = await self._target.lend()
        try:
            with self.translated():
                connection.add_termination_listener(lambda *_: over.set())
                await connection.add_listener(self._channel, lambda *words: hear(words[3]))

            async def lost() -> None:
                with self.translated():
                    while not over.is_set():
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(_LISTEN_CHECK):
                                await over.wait()
                                return
                        # A network that is cut says nothing.
                        async with asyncio.timeout(_LISTEN_CHECK):
                            await connection.execute(f"listen {self._channel}")

            yield lost
        finally:
            await finish(self._hung_up(connection))

    async def _hung_up(self, connection: "Connection") -> None:
        await _closed(connection)
        if self._target.pool is not None:
            await _released(self._target.pool, connection)

    @contextlib.asynccontextmanager
    async def _together(self, connection: "Connection", begin: str, commit: str, rollback: str) -> AsyncIterator[None]:
        # asyncpg's own transaction() is left corrupt by a BEGIN that is cancelled, and can't send its ROLLBACK in a
        # scope of anyio's that was cancelled.
        try:
            with self.translated():
                await connection.execute(begin)
            yield
            with self.translated():
                answer = await connection.execute(commit)
            if answer == "ROLLBACK":
                # That is no error to PostgreSQL.
                raise DatabaseUnavailableError(
                    f"PostgreSQL {self._target}: the transaction was rolled back, since a statement had failed: "
                    "let the error leave the block, or run what may fail within connection.transaction()"
                )
        except BaseException:
            await finish(_rolled_back(connection, rollback))
            raise

    async def look(self, shipped: Sequence[Catalog]) -> Look:
        if not self._has_booted and (self._own is None or self._own.is_closed()):
            await self.close()
            await self._connect()
        async with self._acquired() as connection:
            try:
                with self.translated():
                    return await self._glance_or_look(connection, shipped)
            except DatabaseUnavailableError as error:
                # Somebody is changing our tables: one is locked, or an index went away while it was described ("cache
                # lookup failed", an internal error).
                if isinstance(error.__cause__, (asyncpg.LockNotAvailableError, asyncpg.InternalServerError)):
                    raise Busy from error.__cause__
                raise

    async def _glance_or_look(self, connection: "Connection", shipped: Sequence[Catalog]) -> Look:
        with contextlib.suppress(asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
            if look := await self.recognize(connection, shipped):
                return look
        # The catalog is unknown, or the ledger is missing or not ours, and then not even parsed.
        if look := await self.find_nothing(connection, shipped):
            return look
        # Several statements must see one state, or a migration that commits between them would look like drift.
        try:
            await connection.execute(
                f"begin isolation level repeatable read read only; set local lock_timeout = '{_LOCK_TIMEOUT}'"
            )
            return await self.look_closely(connection, shipped)
        finally:
            await finish(_rolled_back(connection))

    async def recognize(self, connection: "Connection", shipped: Sequence[Catalog]) -> Look | None:
        """The look, in one statement, if the catalog's text is that of a version shipped. It names the ledger."""
        ledger, text = await self._glance(connection, shipped)
        return next((Look(ledger, catalog) for catalog in shipped if catalog.fingerprint == text), None)

    async def find_nothing(self, connection: "Connection", shipped: Sequence[Catalog]) -> Look | None:
        """The look, in one cheap statement, if nothing bears one of our names."""
        names = self._qualified([LEDGER, *shipped[-1].tables])
        (row,) = await connection.fetch(self.queries["schema.taken"], self.tokens["schema"], names)
        return None if row["taken"] else Look(None, Catalog(), namespace=row["namespace"])

    async def look_closely(self, connection: "Connection", shipped: Sequence[Catalog]) -> Look:
        """
        The catalog first, then the ledger if there is one: naming a missing one would abort the transaction.

        Raises:
            Busy: An index went away while it was read, for PostgreSQL describes one as it is now, not as the snapshot
                has it: somebody is migrating.
        """
        names = [LEDGER, *shipped[-1].tables]
        rows = await connection.fetch(self.queries["schema.catalog"], self._schema, names)
        tables = tables_from_rows([row for row in rows if row["relname"] is not None])
        if tables is None:
            raise Busy
        catalog = Catalog(tables)
        if not catalog.has_ledger:
            return Look(None, catalog, namespace=bool(rows))
        ledger, text = await self._glance(connection, shipped)
        return Look(ledger, Catalog(tables, text))

    async def _glance(self, connection: "Connection", shipped: Sequence[Catalog]) -> tuple[Ledger | None, str]:
        (row,) = await connection.fetch(self.queries["schema.look"], self._qualified(sorted(shipped[-1].tables)))
        return ledger_from_lines(row["ledger"]), fingerprint(row, self._schema)

    def _qualified(self, names: Iterable[str]) -> list[str]:
        return [f"{self.tokens['schema']}.{name}" for name in names]

    @contextlib.asynccontextmanager
    async def lock(self) -> AsyncIterator["_BootTransaction"]:
        async with self._acquired() as connection:
            # In a transaction of its own, for most who try at once fail, and need not begin or roll back for that.
            with self.translated():
                await self._try_lock(connection)
            try:
                with self.translated():
                    await self._try_lock(connection, _begin(connection.get_server_version().major))
                yield _BootTransaction(self, connection)
                with self.translated():
                    await connection.execute("commit")
            except BaseException as error:
                await finish(_rolled_back(connection))
                if isinstance(error, (MigrationError, DatabaseUnavailableError)) and isinstance(
                    error.__cause__, (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)
                ):
                    await self._rest(connection)
                    raise Busy from error.__cause__
                raise

    async def _try_lock(self, connection: "Connection", begin: str = "") -> None:
        """Try once, in one round trip: what is executed without arguments answers with its number of rows."""
        query = f"select where pg_try_advisory_xact_lock({_LOCK_CLASS}, {self._lock_key})"
        if await connection.execute(f"{begin} {query}") != "SELECT 1":
            raise Busy

    async def _rest(self, connection: "Connection") -> None:
        """
        Keep the lock for a moment without wanting any table.

        Each try may hold up live traffic, and the next of four hundred booters would begin one at once: so all of
        them rest. Should one of them be quicker than this, it rests after its own try.
        """
        try:
            with self.translated(), contextlib.suppress(Busy):
                await self._try_lock(connection, _begin(connection.get_server_version().major))
            await asyncio.sleep(_REST)
        finally:
            await finish(_rolled_back(connection))

    async def lock_holder(self) -> LockHolder | None:
        rows = await self.fetch("schema.lock_holder", _LOCK_CLASS, self._lock_key, self._schema)
        if not rows:
            return None
        row = rows[0]
        return LockHolder(row["pid"], row["application_name"], row["client_address"], row["transaction_age"])

    async def ready(self) -> None:
        self._has_booted = True
        if self._target.pool is not None and self._own is not None:
            own, self._own = self._own, None
            await _released(self._target.pool, own)
        elif self._target.is_eager:
            with self.translated():
                await self._open_pool()

    async def take_backup(self, from_version: int) -> Path | None:  # noqa: ARG002
        return None

    def _unavailable(self, error: BaseException) -> DatabaseUnavailableError:
        code = getattr(error, "sqlstate", None)
        # Of an OSError's arguments the first is its number.
        words = " ".join(str(getattr(error, "strerror", None) or (error.args[0] if error.args else "")).split())
        if isinstance(error, TimeoutError):
            words = words or "no answer in time"
        reachable = isinstance(error, asyncpg.PostgresError) and not isinstance(error, asyncpg.PostgresConnectionError)
        usual = "mend what the server names" if reachable else "check that the server runs and can be reached from here"
        remedy = _REMEDIES.get(str(code), usual)
        return DatabaseUnavailableError(f"PostgreSQL {self._target}: {words or type(error).__name__}: {remedy}")


class _Statements:
    """Queries on one connection, in a transaction whose end is another's business."""

    def __init__(self, database: PostgresDatabase, connection: "Connection", untold: set[str]) -> None:
        self._database = database
        self._untold = untold
        self.connection = connection

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        with self._database.translated():
            return await self.connection.fetch(self._database.queries[query], *args)

    def atomic(self) -> contextlib.AbstractAsyncContextManager["_Statements"]:
        return self._database.part(self.connection, self._untold)

    def tell(self, queues: Iterable[str]) -> None:
        self._untold.update(queues)


class _BootTransaction:
    """What boot does under the advisory lock, which ends with this transaction."""

    def __init__(self, database: PostgresDatabase, connection: "Connection") -> None:
        self._database = database
        self._connection = connection
        self._has_recorded = False

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        with self._database.translated():
            rows = await self._connection.fetch(self._database.queries[query], *args)
        self._has_recorded |= query == "schema.record"
        return rows

    async def execute(self, query: str) -> None:
        # Not prepared: one round trip instead of two.
        with self._database.translated():
            await self._connection.execute(self._database.queries[query])

    async def script(self, text: str) -> None:
        with self._database.translated():
            await self._connection.execute(fill(text, self._database.tokens))

    async def look(self, shipped: Sequence[Catalog]) -> Look:
        with self._database.translated():
            # A ledger that took a row is there, and may be named without risk to the transaction.
            first = self._database.recognize if self._has_recorded else self._database.find_nothing
            return await first(self._connection, shipped) or await self._database.look_closely(
                self._connection, shipped
            )


def _begin(server: int) -> str:
    """
    Begin as boot needs it, whatever the role's settings are: a fresh snapshot for each statement, no waiting behind
    live traffic, and no end to an index build or a backup by the clock.
    """
    unlimited = ["statement_timeout", "idle_in_transaction_session_timeout"]
    if server >= 17:
        unlimited.append("transaction_timeout")
    settings = "".join(f"set local {name} = 0;" for name in unlimited)
    return f"begin isolation level read committed; set local lock_timeout = '{_LOCK_TIMEOUT}'; {settings}"


def _is_in_transaction(connection: "Connection") -> bool:
    # One that was given back to its pool does not even answer.
    with contextlib.suppress(asyncpg.InterfaceError):
        return connection.is_in_transaction()
    return False


async def _closed(opened: "Pool | Connection") -> None:
    """Say goodbye to the server; drop what is open when it does not answer."""
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT):
            await opened.close()
    except (TimeoutError, *_DRIVER_ERRORS):
        opened.terminate()


async def _released(pool: "Pool", connection: "Connection") -> None:
    # One that cannot be reset is dropped by its pool.
    with contextlib.suppress(*_DRIVER_ERRORS):
        await pool.release(cast("Lent", connection))


async def _rolled_back(connection: "Connection", rollback: str = "rollback") -> None:
    # A connection that is gone has rolled back already.
    with contextlib.suppress(*_DRIVER_ERRORS):
        await connection.execute(rollback)


def _is_transient(error: BaseException) -> bool:
    """Whether the server may accept the very same connection a moment later."""
    if isinstance(error, asyncpg.PostgresConnectionError):
        return not isinstance(error, asyncpg.ProtocolViolationError)
    return isinstance(
        error,
        (
            asyncpg.CannotConnectNowError,
            asyncpg.TooManyConnectionsError,
            asyncpg.exceptions.TargetServerAttributeNotMatched,
            OSError,
        ),
    ) and not isinstance(error, ssl.SSLError)


def _bare(error: BaseException) -> BaseException:
    """The error without the frames behind it: asyncpg's hold the password in their locals."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
