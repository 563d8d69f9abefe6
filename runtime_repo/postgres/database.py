"""
One runtime schema of a PostgreSQL database behind the port.

Every statement names the runtime schema, and settings are SET LOCAL only: nothing here depends on the state of a
session, so it runs behind a transaction-pooling pgbouncer (with ``statement_cache_size=0``).
"""

import asyncio
import contextlib
import json
import random
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg

from runtime_repo.catalog import Catalog, Look
from runtime_repo.database import Backend, Busy, Queries, Row, Watch
from runtime_repo.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    LockHolder,
    MigrationError,
    RepositoryClosedError,
    RuntimeRepoError,
)
from runtime_repo.postgres.boot import BootTransaction, Looks, begin
from runtime_repo.postgres.connections import (
    CLOSE_TIMEOUT,
    DRIVER_ERRORS,
    Target,
    bare,
    closed,
    is_transient,
    released,
    rolled_back,
)
from runtime_repo.postgres.notifications import Hear, Listener, Teller
from runtime_repo.queries import load_queries
from runtime_repo.repository import Unique, check_seconds
from runtime_repo.shielding import finish

if TYPE_CHECKING:
    from runtime_repo.postgres.connections import Connection, Lent, Pool

__all__ = ["PostgresDatabase"]

_LOCK_CLASS = 0x72756E74
"""The first of the advisory lock's two integers; it must never change, or two releases would not exclude each other."""

_REST = 0.4
"""Seconds between two such tries, whoever makes them."""

_LISTEN_CHECK = 30.0
"""Seconds after which a connection that listens is asked whether it still does."""

_REMEDIES = {
    "28000": "check the user and the server's pg_hba.conf",
    "28P01": "check the user and the password",
    "3D000": "create the database, or name another one",
    "42501": "grant the role what it lacks, or boot once under a role that has it",
    "25006": "the server is a standby or the session is read-only: migrate on the primary, in a session that may write",
    "53300": "free some connections, or raise the server's max_connections",
    "57P03": "the server was starting or stopping: wait for it, or raise startup_timeout",
}


class PostgresDatabase(Unique):
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
            "now_ms": "(extract(epoch from pg_catalog.statement_timestamp()) * 1000::numeric)::bigint",
        }
        self.queries = load_queries("postgres", **self.tokens)
        self._looks = Looks(schema, self.tokens, self.queries)
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
        self._target.check_loop()
        deadline = asyncio.get_running_loop().time() + self._startup_timeout
        pause = 0.05
        failure: RuntimeRepoError | None = None
        while error := await self._try_to_connect(deadline):
            again = error.__cause__ is not None and is_transient(error.__cause__)
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
        except (TypeError, ValueError, ArithmeticError, AttributeError, *DRIVER_ERRORS) as error:
            # asyncpg's ClientConfigurationError is a ValueError, too.
            if not isinstance(error, (asyncpg.PostgresError, OSError)) and type(error) is not asyncpg.InterfaceError:
                # asyncpg's own words may repeat a part of the DSN.
                return ConfigurationError(
                    f"asyncpg cannot use the DSN or the pool options for {self._target}: check their spelling "
                    "(its message is not repeated here, since it may hold a password)"
                )
            failure = self._unavailable(error)
            failure.__cause__ = bare(error)
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
        await self._teller.close(CLOSE_TIMEOUT)
        pool, self._pool = self._pool, None
        own, self._own = self._own, None
        self._has_booted = False
        if pool is not None:
            self._hand_back(pool)
        if own is not None:
            # The pool, if it is ours, has not been opened.
            await (closed(own) if self._target.pool is None else released(self._target.pool, own))
        elif pool is not None and pool is not self._target.pool:
            await closed(pool)

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

    def inherited(self) -> None:
        self._target.inherited()

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
        except DRIVER_ERRORS as error:
            raise self._unavailable(error) from bare(error)

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
            await finish(released(pool, connection))
            raise
        # To hand it to the pool and have it back costs a tenth of a quick statement. So the pool has to wait until the
        # event loop's next turn: whoever goes on at once takes it from here, unless others want one.
        if self._target.can_reuse and self._spare is None and not self._waiting:
            self._spare = connection
            asyncio.get_running_loop().call_soon(self._hand_back, pool)
        else:
            await released(pool, connection)

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
            self._handing_back = asyncio.ensure_future(released(pool, spare))

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

    async def heartbeats(self) -> Queries:
        return self

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
        await closed(connection)
        if self._target.pool is not None:
            await released(self._target.pool, connection)

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
            await finish(rolled_back(connection, rollback))
            raise

    async def look(self, shipped: Sequence[Catalog]) -> Look:
        if not self._has_booted and (self._own is None or self._own.is_closed()):
            await self.close()
            await self._connect()
        async with self._acquired() as connection:
            try:
                with self.translated():
                    return await self._looks.look(connection, shipped)
            except DatabaseUnavailableError as error:
                # Somebody is changing our tables: one is locked, or an index went away while it was described ("cache
                # lookup failed", an internal error).
                if isinstance(error.__cause__, (asyncpg.LockNotAvailableError, asyncpg.InternalServerError)):
                    raise Busy from error.__cause__
                raise

    @contextlib.asynccontextmanager
    async def lock(self) -> AsyncIterator[BootTransaction]:
        async with self._acquired() as connection:
            # In a transaction of its own, for most who try at once fail, and need not begin or roll back for that.
            with self.translated():
                await self._try_lock(connection)
            try:
                with self.translated():
                    await self._try_lock(connection, begin(connection.get_server_version().major))
                yield BootTransaction(self._looks, connection, self.translated)
                with self.translated():
                    await connection.execute("commit")
            except BaseException as error:
                await finish(rolled_back(connection))
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
                await self._try_lock(connection, begin(connection.get_server_version().major))
            await asyncio.sleep(_REST)
        finally:
            await finish(rolled_back(connection))

    async def inspect(self, shipped: Sequence[Catalog]) -> Look:
        if self._has_booted:
            return await self.look(shipped)
        apart = PostgresDatabase(self._target, schema=self._schema, startup_timeout=self._startup_timeout, listen=False)
        try:
            return await apart.look(shipped)
        finally:
            await apart.close()

    async def lock_holder(self) -> LockHolder | None:
        rows = await self.fetch("schema.lock_holder", _LOCK_CLASS, self._lock_key, self._schema)
        if not rows:
            return None
        row = rows[0]
        return LockHolder(
            row["pid"], row["application_name"], row["client_address"], row["transaction_age"], row["user_name"]
        )

    async def ready(self) -> None:
        self._has_booted = True
        if self._target.pool is not None and self._own is not None:
            own, self._own = self._own, None
            await released(self._target.pool, own)
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
