"""How rows leave a PostgreSQL database for an archive, and enter one from it."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import asyncpg

from runtime_repo.archive import (
    Contents,
    Counter,
    Grant,
    Loaded,
    Manifest,
    Raised,
    Reader,
    Tally,
    Terms,
    Writer,
    contents,
    in_thread,
)
from runtime_repo.catalog import LEDGER, Catalog, Look
from runtime_repo.database import Busy, Row
from runtime_repo.errors import (
    ArchiveError,
    DatabaseUnavailableError,
    ForeignSchemaError,
    RefusedError,
    SchemaLockTimeoutError,
    StoreInUseError,
    UnsuitableDatabaseError,
)
from runtime_repo.postgres.boot import BootTransaction, begin
from runtime_repo.postgres.target import NO_LIMIT
from runtime_repo.schema import Migration
from runtime_repo.shielding import finish, settle

if TYPE_CHECKING:
    from runtime_repo.postgres.database import PostgresDatabase
    from runtime_repo.postgres.target import Connection

__all__ = ["export", "kept_prefix", "load"]

_PIECE = 1 << 20
"""Bytes that are handed to a thread in one go."""

_GLANCE = 1.0
"""Seconds after which a table that others have locked is in use."""

_NO_CLASS = 0
"""Of advisory locks: none, for the one that counts is our own."""

_SNAPSHOT = "isolation level repeatable read read only"
"""Its snapshot is that of the first statement that reads, which comes when all tables are locked: of a table that was
rewritten after it, it would show nothing."""


async def export(
    database: "PostgresDatabase", writer: Writer, migrations: Sequence[Migration], terms: Terms
) -> Manifest:
    """Write every row of one snapshot; our tables are locked against nothing but being rewritten or dropped."""
    async with database._connections.apart() as connection:
        patience = _Patience(terms.patience)
        while True:
            try:
                found, grants = await _exported(database, connection, writer, migrations, terms)
            except Busy as busy:
                if patience.is_exhausted:
                    holder = await database.lock_holder(apart=True)
                    raise SchemaLockTimeoutError(patience.waited, holder) from busy.__cause__
                await patience.wait()
            else:
                break
    return await in_thread(writer.stop, writer.finish, found, "postgres", grants)


async def _exported(
    database: "PostgresDatabase",
    connection: "Connection",
    writer: Writer,
    migrations: Sequence[Migration],
    terms: Terms,
) -> tuple[Contents, Sequence[Grant]]:
    shipped = [migration.catalog for migration in migrations]
    with _busy(), database._connections.unlimited(connection):
        look = await database._looks.look(connection, shipped)
    tables = ", ".join(map(database.named, contents(look, migrations).columns))
    try:
        with _busy(), database._connections.unlimited(connection):
            # Without what a policy would hide in silence.
            start = f"{begin(connection.get_server_version().major, _SNAPSHOT)} set local row_security = off;"
            await connection.execute(f"{start} lock table {tables} in access share mode", timeout=NO_LIMIT)
        with _busy():
            # Whatever it was before the tables were locked.
            look = await _look_closely(database, connection, shipped)
        found = contents(look, migrations)
        if ", ".join(map(database.named, found.columns)) != tables:
            raise Busy
        if terms.is_move and not terms.force and (reasons := await _holders(database, connection)):
            raise StoreInUseError(reasons)
        automatic = {
            name: column
            for name, table in migrations[found.version - 1].catalog.tables.items()
            for column, line in table.columns.items()
            if line.endswith(" auto")
        }
        for table, columns in found.columns.items():
            await in_thread(writer.stop, writer.begin, table, columns)
            await _copied_out(database, connection, table, columns, writer.write, writer.stop)
            # Read after the snapshot was taken, so that no number of it lies behind.
            counter = await _counter(database, connection, table, automatic[table]) if table in automatic else None
            await in_thread(writer.stop, writer.end, counter)
        return found, await _grants(database, connection, list(found.columns))
    finally:
        await finish(database._connections.roll_back(connection))


async def load(database: "PostgresDatabase", reader: Reader, migrations: Sequence[Migration], terms: Terms) -> Loaded:
    """In one transaction under boot's lock, in which what is there is kept in another schema."""
    async with database._connections.apart() as connection, _locked(database, connection, terms):
        loading = _Loading(database, connection, reader, migrations, terms)
        loaded = await loading.all()
        with database._connections.unlimited(connection):
            await connection.execute("commit", timeout=NO_LIMIT)
    return loaded


@contextlib.asynccontextmanager
async def _locked(database: "PostgresDatabase", connection: "Connection", terms: Terms) -> AsyncIterator[None]:
    """Under boot's lock, in a transaction that the block has to commit."""
    patience = _Patience(terms.patience)
    while True:
        try:
            await database._try_lock(connection)
            await database._try_lock(connection, begin(connection.get_server_version().major))
            break
        except Busy as busy:
            await finish(database._connections.roll_back(connection))
            if patience.is_exhausted:
                holder = await database.lock_holder(apart=True)
                raise SchemaLockTimeoutError(patience.waited, holder) from busy.__cause__
            await patience.wait()
        except BaseException:
            await finish(database._connections.roll_back(connection))
            raise
    try:
        yield
    except BaseException:
        await finish(database._connections.roll_back(connection))
        raise


class _Loading:
    """An archive's way into the runtime schema, in a transaction that is open."""

    def __init__(
        self,
        database: "PostgresDatabase",
        connection: "Connection",
        reader: Reader,
        migrations: Sequence[Migration],
        terms: Terms,
    ) -> None:
        self._database = database
        self._connection = connection
        self._reader = reader
        self._migrations = migrations
        self._terms = terms
        self._rows = reader if terms.is_move else Raised(reader)
        self._boot = BootTransaction(
            database._looks, connection, lambda: database._connections.unlimited(connection), database._startup_timeout
        )
        self._tables = list(migrations[-1].catalog.tables)
        self._overridden: list[str] = []
        self._not_granted: list[str] = []

    async def all(self) -> Loaded:
        look = await self._look()
        existing = await self._existing(look)
        if existing and self._terms.is_move:
            await self._recognize(existing)
            return Loaded()
        kept: str | None = None
        grants = [grant for grant in self._reader.manifest.grants if grant.kind != "schema" or not look.namespace]
        if look.namespace:
            # What hangs on the schema has stayed.
            grants = [grant for grant in grants if grant.kind in ("table", "column")]
        if existing:
            await self._take(list(existing))
            grants = [
                grant
                for grant in await _grants(self._database, self._connection, list(existing))
                if grant.kind in ("table", "column")
            ]
            kept = await self._put_aside(list(existing))
        elif look.names:
            raise ForeignSchemaError(sorted(look.names))
        await self._lay(look)
        again = await self._without_indexes()
        for table in self._tables:
            await self._copy_in(table)
        for table in self._tables:
            await self._prove(table)
        for statement in again:
            await self._run(statement)
        await self._count_on()
        await self._run("analyze " + ", ".join(map(self._database.named, self._tables)))
        for owner in {existing[LEDGER]} if LEDGER in existing else ():
            await self._give_to(owner)
        for grant in grants:
            await self._grant(grant)
        return Loaded(
            kept,
            self._rows.requeued if isinstance(self._rows, Raised) else 0,
            tuple(self._overridden),
            tuple(self._not_granted),
        )

    async def _look(self) -> Look:
        try:
            with _busy():
                return await self._look_suitable()
        except Busy:
            raise StoreInUseError(["somebody changes our tables just now: try again"]) from None

    async def _look_suitable(self) -> Look:
        look, _ = await _around(self._database, self._connection)
        problems = [*look.problems, *map(str, look.reservations)]
        if problems:
            raise UnsuitableDatabaseError(problems)
        return look

    async def _existing(self, look: Look) -> dict[str, str]:
        """The tables of ours that are there, and whose they are."""
        if not look.namespace:
            return {}
        newest = list(self._database.shipped()[-1].catalog.tables)
        rows = await self._fetch("archive.tables", self._database._schema, newest, LEDGER)
        found = {row["name"]: row["owner"] for row in rows}
        if not found:
            return {}
        if LEDGER not in found and not self._terms.is_move:
            self._object([f"there are tables with our names and no ledger: {', '.join(sorted(found))}: move them away"])
            return found
        [newer] = await self._fetch("archive.is_newer", self._database.shipped()[-1].version)
        if newer["it_is"]:
            # Nobody here knows how many tables a newer release has.
            rows = await self._fetch("archive.tables", self._database._schema, newest, "runtime_")
            found = {row["name"]: row["owner"] for row in rows}
        return found

    async def _recognize(self, found: Iterable[str]) -> None:
        """
        Let a move pass that has been done already, such as one that was killed before it could say so.

        Raises:
            StoreInUseError: What is there is something else.
        """
        try:
            if not set(self._tables) <= set(found):
                raise ArchiveError(str(self._reader.path), "there are other tables")
            for table in self._tables:
                await self._prove(table)
        except (ArchiveError, RefusedError):
            reason = f"the target is not empty, it has {', '.join(sorted(found))}: name another place"
            raise StoreInUseError([reason]) from None

    async def _take(self, tables: Sequence[str]) -> None:
        """
        Have the tables that are there to ourselves until the end.

        Whoever waits for one of them meanwhile goes on in the restored one.
        """
        patience = _Patience(self._terms.patience if self._terms.force else _GLANCE)
        names = ", ".join(map(self._database.named, tables))
        while not await self._try_to_take(names):
            if patience.is_exhausted:
                key = (self._database._lock_key, self._database._schema)
                rows = await self._fetch("schema.lock_holder", _NO_CLASS, *key)
                who = ", ".join(f"process {row['pid']} (application {row['application_name']!r})" for row in rows)
                raise StoreInUseError(
                    [
                        f"our tables are locked by {who or 'an unknown process'}: end it, or pass force=True to wait "
                        "for it as long as lock_timeout"
                    ]
                )
            await patience.wait()
        if "runtime_leases" in tables:
            self._object(await _holders(self._database, self._connection))
        dependents = await self._fetch("archive.dependents", self._database._schema, list(tables))
        self._object(
            [
                f"{row['what']} would go on using the tables that are replaced: drop it, and create it again afterwards"
                for row in dependents
            ]
        )

    async def _try_to_take(self, names: str) -> bool:
        """One short try, behind which nobody has to queue for long."""
        try:
            with _busy():
                await self._run(f"savepoint taking; lock table {names} in access exclusive mode")
        except Busy:
            await self._run("rollback to savepoint taking")
            return False
        return True

    def _object(self, reasons: Sequence[str]) -> None:
        if reasons and not self._terms.force:
            raise StoreInUseError([*reasons[:-1], f"{reasons[-1]}; or pass force=True"])
        self._overridden += reasons

    async def _put_aside(self, tables: Sequence[str]) -> str:
        """Move what is there into a schema that keeps it; return its name."""
        kept = self._terms.keep_in
        [able] = await self._fetch("archive.abilities", kept and _quoted(kept))
        if kept is None:
            if not able["creates_schemas"]:
                raise RefusedError(
                    f"PostgreSQL {self._database._target}: this role may not create a schema to keep what is replaced: "
                    "let an administrator create one that the role may create tables in, and pass its name as keep_in"
                )
            kept = f"{kept_prefix(self._database._schema)}{datetime.now(UTC):%Y%m%d_%H%M%S_%f}"
            await self._run(f"create schema {_quoted(kept)}")
        elif not able["creates_there"]:
            raise RefusedError(
                f"PostgreSQL {self._database._target}: what is replaced cannot be kept in {kept!r}: create that "
                "schema, and let this role create tables in it"
            )
        for table in tables:
            await self._run(f"alter table {self._database.named(table)} set schema {_quoted(kept)}")
        return kept

    async def _lay(self, look: Look) -> None:
        if not look.namespace:
            await self._boot.execute("schema.create_namespace")
        await self._boot.execute("schema.create_ledger")
        for migration in self._migrations:
            await self._boot.script(migration.sql)

    async def _without_indexes(self) -> list[str]:
        """Drop the keys and indexes of what was laid; return what makes them again, at once and not row by row."""
        again = []
        for row in await self._fetch("archive.constraints", self._database._schema, self._tables):
            table, name = self._database.named(row["table_name"]), _quoted(row["name"])
            await self._run(f"alter table {table} drop constraint {name}")
            again.append(f"alter table {table} add constraint {name} {row['definition']}")
        for row in await self._fetch("archive.indexes", self._database._schema, self._tables):
            await self._run(f"drop index {self._database.named(row['name'])}")
            again.append(row["definition"])
        return again

    async def _copy_in(self, table: str) -> None:
        member = self._reader.manifest.tables[table]
        # Rows that a migration has laid itself, should one ever.
        await self._run(f"truncate {self._database.named(table)}")
        pieces = _pieces(self._rows, self._reader.stop, table)
        try:
            # What the archive is damaged by is an error of ours, and none of the server's.
            with self._database._connections.unlimited(self._connection):
                await self._connection.copy_to_table(
                    table,
                    source=pieces,
                    columns=list(member.columns),
                    schema_name=self._database._schema,
                    freeze=True,
                    timeout=NO_LIMIT,
                )
        finally:
            await pieces.aclose()

    async def _prove(self, table: str) -> None:
        """See that what is stored is what the archive holds."""
        member = self._reader.manifest.tables[table]
        tally = Tally()
        await _copied_out(self._database, self._connection, table, member.columns, tally.feed, lambda: None)
        if (tally.rows, tally.row_hash) != self._rows.proof(table):
            reason = f"the rows of {table} that the server has stored are not those of it: everything was rolled back"
            raise ArchiveError(str(self._reader.path), f"{reason}; look for a trigger, and check the server's disk")

    async def _count_on(self) -> None:
        for table, member in self._reader.manifest.tables.items():
            if member.counter is not None and member.counter.last > 0:
                name = self._database.named(table)
                await self._fetch("archive.count_on", name, member.counter.column, member.counter.last)

    async def _give_to(self, owner: str) -> None:
        """Let the tables belong to whom those belonged to that they replace."""
        [[user]] = await self._connection.fetch("select current_user::pg_catalog.text", timeout=NO_LIMIT)
        if user != owner:
            statements = [
                f"alter table {self._database.named(table)} owner to {_quoted(owner)}" for table in self._tables
            ]
            await self._try(f"ownership by {owner}", *statements)

    async def _grant(self, grant: Grant) -> None:
        to = f"to {_quoted(grant.grantee) if grant.grantee else 'public'}"
        to += " with grant option" if grant.is_grantable else ""
        schema = self._database.tokens["schema"]
        if not grant.privilege.replace(" ", "").isalpha():
            self._not_granted.append(f"{grant}: it is no privilege")
            return
        if grant.kind == "schema":
            statement = f"grant {grant.privilege} on schema {schema} {to}"
        elif grant.kind == "default":
            objects = grant.name if grant.name in ("tables", "sequences", "functions", "types") else "tables"
            role = f"for role {_quoted(grant.owner)} in schema {schema}"
            statement = f"alter default privileges {role} grant {grant.privilege} on {objects} {to}"
        else:
            column = f" ({_quoted(grant.column)})" if grant.kind == "column" else ""
            statement = f"grant {grant.privilege}{column} on table {self._database.named(grant.name)} {to}"
        await self._try(str(grant), statement)

    async def _try(self, what: str, *statements: str) -> None:
        """Do what may fail alone, such as for a role that is gone, and remember if it has."""
        await self._run("savepoint trying")
        try:
            for statement in statements:
                await self._run(statement)
        except RefusedError as error:
            await self._run("rollback to savepoint trying")
            self._not_granted.append(f"{what}: {error}")
        await self._run("release savepoint trying")

    async def _run(self, statement: str) -> None:
        with self._database._connections.unlimited(self._connection):
            await self._connection.execute(statement, timeout=NO_LIMIT)

    async def _fetch(self, query: str, *args: object) -> Sequence[Row]:
        return await self._boot.fetch(query, *args)


def kept_prefix(schema: str) -> str:
    """How the names of schemas begin that keep what was replaced; the rest, the time, fits behind it."""
    return schema.encode()[:32].decode(errors="ignore") + "_before_"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


async def _around(database: "PostgresDatabase", connection: "Connection") -> tuple[Look, bool]:
    shipped = [migration.catalog for migration in database.shipped()]
    with database._connections.unlimited(connection):
        return await database._looks.look_around(connection, shipped)


async def _look_closely(database: "PostgresDatabase", connection: "Connection", shipped: Sequence[Catalog]) -> Look:
    with database._connections.unlimited(connection):
        around, is_readable = await database._looks.look_around(connection, shipped)
        if around.problems or not around.names:
            return around
        return await database._looks.look_closely(connection, shipped, around, is_readable=is_readable)


async def _holders(database: "PostgresDatabase", connection: "Connection") -> list[str]:
    with database._connections.unlimited(connection):
        rows = await connection.fetch(database.queries["archive.holders"], timeout=NO_LIMIT)
    return [
        f"worker {row['worker_id']!r} holds {row['number']} active leases: stop it and wait for them to end"
        for row in rows
    ]


async def _grants(database: "PostgresDatabase", connection: "Connection", tables: list[str]) -> list[Grant]:
    with database._connections.unlimited(connection):
        text = database.queries["archive.grants"]
        rows = await connection.fetch(text, database._schema, tables, timeout=NO_LIMIT)
    return [
        Grant(
            row["privilege"], row["grantee"], row["kind"], row["name"], row["part"], row["owner"], row["is_grantable"]
        )
        for row in rows
    ]


async def _counter(database: "PostgresDatabase", connection: "Connection", table: str, column: str) -> Counter:
    name = database.named(table)
    with database._connections.unlimited(connection):
        rows = await connection.fetch(database.queries["archive.counter"], name, column, timeout=NO_LIMIT)
        # What the role may not know is at least the largest that is there.
        [largest] = await connection.fetch(
            f"select coalesce(max({column}), 0) as last from {name}",  # noqa: S608
            timeout=NO_LIMIT,
        )
    return Counter(column, max(largest["last"], *(row["last"] or 0 for row in rows), 0))


async def _copied_out(
    database: "PostgresDatabase",
    connection: "Connection",
    table: str,
    columns: Sequence[str],
    work: Callable[[bytes], None],
    stop: Callable[[], None],
) -> None:
    sink = _Sink(work, stop)
    try:
        with database._connections.unlimited(connection):
            # Of a table and not of a query: COPY has no plan then, by which a stranger's code could run.
            await connection.copy_from_table(
                table, columns=list(columns), schema_name=database._schema, output=sink.take, timeout=NO_LIMIT
            )
        await sink.end()
    except BaseException:
        await finish(sink.abandon())
        raise


class _Sink:
    """Has pieces worked on in a thread, one while the next is collected."""

    def __init__(self, work: Callable[[bytes], None], stop: Callable[[], None]) -> None:
        self._work = work
        self._stop = stop
        self._pieces = bytearray()
        self._running: asyncio.Future[None] | None = None

    async def take(self, piece: bytes) -> None:
        self._pieces += piece
        if len(self._pieces) >= _PIECE:
            await self._hand_over()

    async def end(self) -> None:
        await self._hand_over()
        await self._ended()

    async def abandon(self) -> None:
        self._stop()
        if self._running is not None:
            with contextlib.suppress(Exception):
                await settle(self._running)

    async def _hand_over(self) -> None:
        await self._ended()
        pieces, self._pieces = bytes(self._pieces), bytearray()
        self._running = asyncio.get_running_loop().run_in_executor(None, self._work, pieces)

    async def _ended(self) -> None:
        if self._running is not None:
            await asyncio.wait([self._running])
            running, self._running = self._running, None
            running.result()


async def _pieces(rows: Reader | Raised, stop: Callable[[], None], table: str) -> AsyncGenerator[bytes, None]:
    """A table's text, the next piece of which is read while one is sent."""
    pieces = rows.pieces(table)
    loop = asyncio.get_running_loop()

    def read() -> "asyncio.Future[bytes]":
        return loop.run_in_executor(None, next, pieces, b"")

    reading = read()
    try:
        while True:
            await asyncio.wait([reading])
            piece = reading.result()
            if not piece:
                return
            reading = read()
            yield piece
    finally:
        if not reading.done():
            stop()
            with contextlib.suppress(Exception):
                await settle(reading)
        # Unless its thread hangs.
        with contextlib.suppress(ValueError):
            pieces.close()


class _Patience:
    """A bounded wait in short steps for what others hold."""

    def __init__(self, seconds: float) -> None:
        self._began = time.monotonic()
        self._seconds = seconds

    @property
    def waited(self) -> float:
        return time.monotonic() - self._began

    @property
    def is_exhausted(self) -> bool:
        return self.waited >= self._seconds

    async def wait(self) -> None:
        await asyncio.sleep(random.uniform(0.05, 0.2))  # noqa: S311


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    try:
        yield
    except DatabaseUnavailableError as error:
        cause = error.__cause__
        if isinstance(
            cause, (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError, asyncpg.InternalServerError)
        ):
            raise Busy from cause
        raise
