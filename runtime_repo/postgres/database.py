"""
One runtime schema of a PostgreSQL database behind the port.

Every statement names the runtime schema, and settings are SET LOCAL only: nothing here depends on the state of a
session, so it runs behind a transaction-pooling pgbouncer (with ``statement_cache_size=0``).
"""

import asyncio
import contextlib
import functools
import json
import logging
import random
import secrets
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from runtime_repo.archive import Loaded, Manifest, Reader, Terms, Writer
from runtime_repo.catalog import Catalog, Look
from runtime_repo.database import Backend, Busy, Lost, Row, Watch
from runtime_repo.doctor import Examined, Finding
from runtime_repo.errors import (
    DatabaseUnavailableError,
    LockHolder,
    MigrationError,
    RuntimeRepoError,
)
from runtime_repo.postgres.archive import export, kept_prefix, load
from runtime_repo.postgres.boot import BootTransaction, Looks, begin
from runtime_repo.postgres.connections import FAREWELL, GRACE, Connections
from runtime_repo.postgres.doctor import examine
from runtime_repo.postgres.dump import DumpReport, dump
from runtime_repo.postgres.heartbeats import Heartbeats
from runtime_repo.postgres.names import check_schema
from runtime_repo.postgres.notifications import Deaf, Hear, Listener, Teller
from runtime_repo.postgres.refusals import is_conflict, is_lost
from runtime_repo.postgres.sharing import Shared
from runtime_repo.postgres.target import NO_LIMIT, Target, terminated
from runtime_repo.queries import fill, load_queries, uncommented
from runtime_repo.repairs import Repair
from runtime_repo.repository import Unique, check_seconds
from runtime_repo.rows import lock_holder_from_row
from runtime_repo.schema import Migration, load_migrations
from runtime_repo.shielding import finish
from runtime_repo.values import Columns

if TYPE_CHECKING:
    from runtime_repo.postgres.target import Connection

__all__ = ["PostgresDatabase"]

_log = logging.getLogger("runtime_repo")

T = TypeVar("T")

_LOCK_CLASS = 0x72756E74
"""The first of the advisory lock's two integers; it must never change, or two releases would not exclude each other."""

_REST = 0.4
"""Seconds between two such tries, whoever makes them."""

_LISTEN_CHECK = 2.0
"""Seconds after which a connection that listens is asked whether it still does, and for which it may be silent then."""

_OWN_VOICE = 3.0
"""Seconds in which a connection that listens has to hear what this process tells it."""

_CLOSING = 2.0
"""Seconds for closing everything, before what is left is dropped."""

_LONG = 10_000
"""Characters of JSON that no other completion has to wait for."""

_READING = 1000
"""Milliseconds for which whoever only tells what there is waits for a table."""

_TRIES = 5
"""How often a verb is tried that the server gives up for another's sake."""


class PostgresDatabase(Unique):
    """One runtime schema of a PostgreSQL database behind the port."""

    backend: Backend = "postgres"

    def __init__(
        self,
        target: Target,
        *,
        schema: str,
        startup_timeout: float,
        verb_timeout: float | None = 30.0,
        listen: bool = True,
    ) -> None:
        self._target = target
        self._schema = schema
        check_schema(schema)
        check_seconds("startup_timeout", startup_timeout, positive=True)
        self._startup_timeout = startup_timeout
        if verb_timeout is not None:
            check_seconds("verb_timeout", verb_timeout, positive=True)
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
        self._connections = Connections(target, startup_timeout, verb_timeout, self._verb)
        # Whether the session's default isolation level would give a verb another meaning; None is not known.
        self._is_isolated: bool | None = None
        self._completions = Shared(functools.partial(self._fetch, "attempts.complete"), self._complete)
        self._teller = Teller(self._tell_now)
        # Of a pool that was given one is for heartbeats, and one has to be left for the verbs.
        has_room = target.pool is None or target.pool.get_max_size() > 2
        self._listener = Listener(self._listening if listen and has_room else None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._target!r}, schema={self._schema!r})"

    @property
    def place(self) -> str:
        return f"{self._target!r}, schema {self._schema}"

    def text(self, query: str) -> str:
        return uncommented(self.queries[query])

    def filled(self, text: str) -> str:
        return fill(text, self.tokens)

    async def close(self) -> None:
        await finish(self._close(), within=_CLOSING)

    async def _close(self) -> None:
        told, *_ = await asyncio.gather(
            self._teller.close(FAREWELL),
            self._listener.close(),
            self._completions.close(FAREWELL),
            self._connections.quieten(),
        )
        if not told:
            self._connections.drop()
            await self._teller.close(FAREWELL)
        await self._connections.close()

    def abandon(self) -> None:
        with contextlib.suppress(Exception):
            self._listener.abandon()
            self._completions.abandon()
        self._connections.abandon()

    def inherited(self) -> None:
        self._connections.inherited()

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        # With another's clock, or a long result, it is a statement of its own.
        if query == "attempts.complete" and args[3] is None and len(str(args[2])) < _LONG:
            return await self._completions.ask(args)
        return await self._fetch(query, args)

    async def _fetch(self, query: str, args: Sequence[object]) -> Sequence[Row]:
        async with self._connections.acquired() as connection:
            return await self._verb(connection, query, args)

    async def _complete(self, calls: Sequence[Sequence[object]]) -> Sequence[Sequence[Row] | None]:
        """Complete for each of several, in one statement."""
        attempt_ids: Any
        attempt_ids, tokens, results, _, lease_ids = zip(*calls, strict=True)
        given = Columns(attempt_id=attempt_ids, token=[*map(str, tokens)], lease_id=lease_ids, result_json=results)
        rows = await self._fetch("attempts.complete_shared", (given, None))
        done = {row["attempt_id"]: [row] for row in rows}
        # Of two for the same attempt one has to learn that it was the second.
        return [done.pop(attempt_id, None) for attempt_id in attempt_ids]

    async def glance(self, query: str, *args: object, within: float) -> Sequence[Row] | None:
        was_asked = False
        try:
            async with asyncio.timeout(within) as limit:
                while True:
                    given_up: Callable[[], bool] = bool  # it was not, as long as nothing was asked
                    try:
                        async with self._connections.acquired() as connection:
                            if not was_asked:
                                was_asked = True
                                limit.reschedule(asyncio.get_running_loop().time() + within)
                            with self._connections.glancing(connection) as given_up:
                                return await self._verb(connection, query, args)
                    except DatabaseUnavailableError:
                        if not given_up():
                            raise
        except TimeoutError:
            if was_asked or not self._connections.is_exhausted:
                raise
            return None

    async def _verb(self, connection: "Connection", query: str, args: Sequence[object]) -> Sequence[Row]:
        """One statement as a transaction of its own, again where the server gave it up for another's sake."""
        tries = 1
        while True:
            try:
                return await self._try_verb(connection, self.queries[query], args)
            except DatabaseUnavailableError as error:
                # Whoever called is in no transaction, and a verb is safe to repeat.
                if tries == _TRIES or not is_conflict(error.__cause__):
                    raise
            if self._is_isolated is None:
                await self._ask_for_isolation(connection)
            await asyncio.sleep(random.uniform(0, 0.01) * 2**tries)  # noqa: S311
            tries += 1

    async def _try_verb(self, connection: "Connection", text: str, args: Sequence[object]) -> Sequence[Row]:
        """Under READ COMMITTED, which is every session's default where nobody has changed it."""
        if not self._is_isolated:
            return await self._connections.answer(connection, connection.fetch, text, *args)
        async with self._together(connection, "begin isolation level read committed", "commit", "rollback"):
            return await self._connections.answer(connection, connection.fetch, text, *args)

    async def _ask_for_isolation(self, connection: "Connection") -> None:
        """
        Learn, after the first conflict, whether the role or the database has another default isolation level.

        Under it a verb fails where it should wait for a rival and go on, and does nothing else otherwise: to ask each
        connection beforehand would cost a round trip.
        """
        with contextlib.suppress(RuntimeRepoError):
            level = await self._connections.answer(
                connection, connection.fetchval, "show default_transaction_isolation"
            )
            self._is_isolated = level != "read committed"

    @contextlib.asynccontextmanager
    async def atomic(self) -> AsyncIterator["_Transaction"]:
        untold: set[str] = set()
        try:
            async with (
                self._connections.acquired() as connection,
                self._together(connection, "begin isolation level read committed", "commit", "rollback"),
            ):
                yield _Transaction(self, self._connections, connection, untold)
        except DatabaseUnavailableError as error:
            error.gave_way = is_conflict(error.__cause__)
            raise
        self.tell(untold)

    @contextlib.asynccontextmanager
    async def part(self, connection: "Connection", untold: set[str]) -> AsyncIterator["_Transaction"]:
        """Transaction that take effect with a transaction that is open already, or fail alone."""
        begin, commit = "savepoint runtime_repo", "release savepoint runtime_repo"
        async with self._together(connection, begin, commit, f"rollback to savepoint runtime_repo; {commit}"):
            yield _Transaction(self, self._connections, connection, untold)

    @contextlib.asynccontextmanager
    async def part_of_theirs(self, connection: "Connection") -> AsyncIterator["_Transaction"]:
        """As above, in a transaction of the application's: when it commits, which we do not see, it tells by itself."""
        untold: set[str] = set()
        async with self.part(connection, untold) as statements:
            yield statements
            if untold:
                await statements.fetch("schema.tell", self._channel, json.dumps(list(untold)))

    async def vacuum(self) -> None:
        async with self._connections.acquired() as connection:
            await self._connections.answer(connection, connection.execute, self.queries["attempts.vacuum"])

    async def heartbeats(self) -> Heartbeats:
        await self._connections.heartbeats.reserve()
        return self._connections.heartbeats

    def tell(self, queues: Iterable[str]) -> None:
        self._teller.tell(queues)

    async def _tell_now(self, queues: Iterable[str]) -> None:
        await self.fetch("schema.tell_now", self._channel, json.dumps(list(queues)))

    def watch(self, queues: Collection[str]) -> contextlib.AbstractAsyncContextManager[Watch]:
        return self._listener.watch(queues)

    @contextlib.asynccontextmanager
    async def _listening(self, hear: Hear) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
        """
        A connection of its own that listens, and what returns when it is lost.

        Raises:
            Deaf: It does not hear what this process tells it.
        """
        over = asyncio.Event()
        heard = asyncio.Event()
        # No queue's name is as long.
        marker = secrets.token_hex(1000)

        def told(*words: Any) -> None:
            if words[3] == marker:
                heard.set()
            else:
                hear(words[3])

        def lost_it(_connection: "Connection") -> None:
            over.set()
            heard.set()

        async with self._connections.hearing() as connection:
            connection.add_termination_listener(lost_it)
            await self._connections.answer(connection, connection.add_listener, self._channel, told)
            await self._tell_now([marker])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_OWN_VOICE):
                    await heard.wait()
            if not heard.is_set():
                raise Deaf(
                    f"PostgreSQL {self._target}: a connection that listens does not hear what this process tells it: "
                    "pass listen=False where a transaction-pooling pgbouncer is in between, as there nobody can listen"
                )

            async def lost() -> None:
                while not over.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_LISTEN_CHECK):
                            await over.wait()
                            return
                    # A network that is cut says nothing.
                    try:
                        async with self._connections.in_time(_LISTEN_CHECK, "the check of a connection that listens"):
                            with self._connections.translated():
                                await connection.execute(f"listen {self._channel}", timeout=NO_LIMIT)
                    except DatabaseUnavailableError as error:
                        if isinstance(error.__cause__, TimeoutError):
                            self._connections.fell_silent()
                        raise

            yield lost

    @contextlib.asynccontextmanager
    async def _together(self, connection: "Connection", begin: str, commit: str, rollback: str) -> AsyncIterator[None]:
        # asyncpg's own transaction() is left corrupt by a BEGIN that is cancelled, and can't send its ROLLBACK in a
        # scope of anyio's that was cancelled.
        try:
            await self._connections.answer(connection, connection.execute, begin)
            yield
            answer = await self._connections.answer(connection, connection.execute, commit)
            if answer == "ROLLBACK":
                # That is no error to PostgreSQL.
                raise DatabaseUnavailableError(
                    f"PostgreSQL {self._target}: the transaction was rolled back, since a statement had failed: "
                    "let the error leave the block, or run what may fail within connection.transaction()"
                )
        except BaseException:
            await finish(self._connections.roll_back(connection, rollback))
            raise

    async def open(self, shipped: Sequence[Catalog]) -> Look:
        if not self._connections.is_open:
            until = self._connections.boot_until
            await self.close()
            self._connections.boot_until = until
            await self._connections.open()
        async with self._connections.acquired() as connection:
            look = await self._looked(connection, shipped)
        self._connections.boot_until = None
        return look

    async def _looked(self, connection: "Connection", shipped: Sequence[Catalog]) -> Look:
        """The look, in bounded time."""
        # Half, so that there is time for another try on another connection.
        seconds = max(self._connections.seconds_left / 2, GRACE)
        try:
            async with self._connections.in_time(seconds, "a half of what was left of startup_timeout"):
                with self._connections.translated():
                    return await self._with_remains(connection, await self._looks.look(connection, shipped))
        except DatabaseUnavailableError as error:
            _check_busy(error)
            if is_lost(error.__cause__):
                terminated(connection)
                if not self._connections.is_late:
                    raise Lost from error
                self._connections.boot_until = None
            raise

    @contextlib.asynccontextmanager
    async def lock(self) -> AsyncIterator[BootTransaction]:
        async with self._connections.acquired() as connection:
            try:
                # In a transaction of its own, for most who try at once fail, and need not begin or roll back for that.
                await self._try_lock(connection)
                await self._try_lock(connection, begin(connection.get_server_version().major))
                yield BootTransaction(
                    self._looks,
                    connection,
                    functools.partial(self._connections.unlimited, connection),
                    self._startup_timeout,
                )
                with self._connections.unlimited(connection):
                    await connection.execute("commit", timeout=NO_LIMIT)
            except BaseException as error:
                await finish(self._connections.roll_back(connection))
                if isinstance(error, (MigrationError, DatabaseUnavailableError)):
                    if isinstance(error.__cause__, (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)):
                        await self._rest(connection)
                        raise Busy from error.__cause__
                    if is_lost(error.__cause__):
                        terminated(connection)
                        raise Lost from error
                raise

    async def _try_lock(self, connection: "Connection", begin: str = "") -> None:
        """Try once, in one round trip: what is executed without arguments answers with its number of rows."""
        key = f"{_LOCK_CLASS}, '{self._lock_key}'::pg_catalog.int4"
        query = f"select where pg_catalog.pg_try_advisory_xact_lock({key})"
        async with self._connections.in_time(self._startup_timeout, "startup_timeout"):
            with self._connections.translated():
                answer = await connection.execute(f"{begin} {query}", timeout=NO_LIMIT)
        if answer != "SELECT 1":
            raise Busy

    async def _rest(self, connection: "Connection") -> None:
        """
        Keep the lock for a moment without wanting any table.

        Each try may hold up live traffic, and the next of four hundred booters would begin one at once: so all of
        them rest. Should one of them be quicker than this, it rests after its own try.
        """
        try:
            with contextlib.suppress(Busy):
                await self._try_lock(connection, begin(connection.get_server_version().major))
            await asyncio.sleep(_REST)
        finally:
            await finish(self._connections.roll_back(connection))

    async def inspect(self, shipped: Sequence[Catalog]) -> Look:
        try:
            async with (
                self._connections.apart() as connection,
                self._connections.in_time(self._startup_timeout, "startup_timeout"),
            ):
                with self._connections.translated():
                    look = await self._looks.look(connection, shipped)
                    if look.is_newer(shipped):
                        rows = await connection.fetch(self.queries["control.oldest"], timeout=NO_LIMIT)
                        look = replace(look, oldest=rows[0]["value_json"] if rows else None)
                    return await self._with_remains(connection, look)
        except DatabaseUnavailableError as error:
            _check_busy(error)
            raise

    def read_only(self, connection: "Connection") -> contextlib.AbstractAsyncContextManager[None]:
        """A transaction that writes nothing, and that gives up where it would wait for a table."""
        begin = f"begin isolation level read committed read only; set local lock_timeout = '{_READING}ms'"
        return self._together(connection, begin, "commit", "rollback")

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator["_Reader"]:
        async with self._connections.apart() as connection:
            yield _Reader(self, self._connections, connection)

    async def examine(self, examined: Examined) -> tuple[Sequence[Finding], Sequence[Repair]]:
        async with self.reading() as reader, self.reading() as another:
            return await examine(reader, another, self._schema, self.tokens["schema"], examined)

    def script(self, statements: Sequence[str]) -> str:
        return "\n".join(["begin;", *statements, "commit;"]) + "\n"

    async def lock_holder(self, *, apart: bool = False, migrating: bool = False) -> LockHolder | None:
        async with self._connections.apart() if apart else self._connections.acquired() as connection:
            text = self.queries["schema.lock_holder"]
            # Without the schema no other lock is looked for than the advisory one.
            schema = None if migrating else self._schema
            rows = await self._connections.answer(
                connection, connection.fetch, text, _LOCK_CLASS, self._lock_key, schema
            )
        return lock_holder_from_row(rows[0]) if rows else None

    async def serve(self, version: int) -> None:  # noqa: ARG002 - the operator's backups are no affair of ours
        await self._connections.serve()

    async def take_backup(self, from_version: int) -> Path | None:  # noqa: ARG002
        return None

    def backup_name(self, from_version: int) -> str | None:  # noqa: ARG002
        return None

    async def _with_remains(self, connection: "Connection", look: Look) -> Look:
        """Where there is nothing, and only there, with what a restore has kept beside it."""
        if not look.is_empty:
            return look
        text = self.queries["archive.remains"]
        rows = await connection.fetch(text, kept_prefix(self._schema), timeout=NO_LIMIT)
        return replace(look, remains=tuple(f"schema {row['name']}" for row in rows))

    async def export(self, writer: Writer, migrations: Sequence[Migration], terms: Terms, target: Backend) -> Manifest:  # noqa: ARG002 - whatever is here fits anywhere
        return await export(self, writer, migrations, terms)

    async def load(self, reader: Reader, migrations: Sequence[Migration], terms: Terms) -> Loaded:
        return await load(self, reader, migrations, terms)

    async def dump(self, path: Path, *, program: str, patience: float) -> DumpReport:
        async with self._connections.apart() as connection:
            return await dump(connection, self._schema, path, program=program, patience=patience)

    def named(self, name: str) -> str:
        """The qualified name of something in the runtime schema."""
        return f'{self.tokens["schema"]}."{name}"'

    def shipped(self) -> Sequence[Migration]:
        return load_migrations(self.backend)


class _Transaction:
    """Queries on one connection, in a transaction whose end is another's business."""

    def __init__(
        self, database: PostgresDatabase, connections: Connections, connection: "Connection", untold: set[str]
    ) -> None:
        self._database = database
        self._connections = connections
        self._untold = untold
        self.connection = connection

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        text = self._database.queries[query]
        return await self._connections.answer(self.connection, self.connection.fetch, text, *args)

    def atomic(self) -> contextlib.AbstractAsyncContextManager["_Transaction"]:
        return self._database.part(self.connection, self._untold)

    def tell(self, queues: Iterable[str]) -> None:
        self._untold.update(queues)


class _Reader:
    """Statements on one connection, each in a transaction that may not write and waits for no table."""

    def __init__(self, database: PostgresDatabase, connections: Connections, connection: "Connection") -> None:
        self._database = database
        self._connections = connections
        self._connection = connection

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        text = self._database.queries[query]
        async with self._database.read_only(self._connection):
            return await self._connections.answer(self._connection, self._connection.fetch, text, *args)

    async def ask(self, text: str) -> Sequence[Row]:
        async with self._database.read_only(self._connection):
            with self._connections.unlimited(self._connection):
                rows: Sequence[Row] = await self._connection.fetch(self._database.filled(text), timeout=NO_LIMIT)
            return rows


def _check_busy(error: DatabaseUnavailableError) -> None:
    """
    Raise Busy for what a look meets while somebody changes our tables.

    One is locked, or an index went away while it was described ("cache lookup failed", an internal error).
    """
    if isinstance(error.__cause__, (asyncpg.LockNotAvailableError, asyncpg.InternalServerError)):
        raise Busy from error.__cause__
