"""
A *lab* is a database of the test's own: one way to prepare, boot and inspect it, to see what was left behind, and to
stand in a boot's way, whichever database it is.

What tests say in SQL goes through a bare driver connection, never through the library, and names no schema: on
PostgreSQL the runtime schema is the connection's search path. Where the two databases' words differ, a test gives both.
"""

import asyncio
import contextlib
import hashlib
import os
import sqlite3
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import asyncpg
import pytest

from runtime_repo import RuntimeRepository, SchemaError, SchemaOutOfDateError, SchemaReport
from runtime_repo.catalog import Look
from runtime_repo.database import Backend, Database
from runtime_repo.schema import Migration, Policy, ensure_schema, load_migrations
from tests.place import Place
from tests.schema.version_1 import VERSION_1

Error = TypeVar("Error", bound=SchemaError)
Row = dict[str, Any]

LEDGER = "runtime_schema_migrations"
ONE = (1, "baseline_runtime_tables")
TWO = (2, "resume_roles_and_dispatch")


@dataclass(frozen=True)
class Content:
    """What a transaction can roll back. Of PostgreSQL's rows it knows where they lie and who wrote them, too."""

    objects: tuple[str, ...] = ()
    rows: dict[str, list[str]] = field(default_factory=dict)


NOTHING = Content()


@dataclass(frozen=True)
class Snapshot:
    """Everything there is."""

    content: Content = NOTHING
    files: dict[str, str] = field(default_factory=dict)
    """SQLite's: the hash of every file in the folder but the one that is only shared memory."""
    journal_mode: str | None = None


@dataclass(frozen=True)
class Rebuild:
    """What SQLite cannot alter: create the table anew with one piece of its text replaced, copy, drop and rename."""

    table: str
    old: str
    new: str
    then: str = ""
    options: str = ""
    """What stands behind the table's closing bracket."""


@dataclass(frozen=True)
class Words:
    """One change, in each database's words. None: this database cannot be brought to it."""

    sqlite: str | Rebuild | None
    postgres: str | None


Change = str | Words


ATTEMPTS = [("a", "run", 0, "queued", None), ("b", "run", 3, "completed", None)]
"""What `Lab.lay` stores."""

# Written out: if it changed, two releases would no longer exclude each other.
LOCK_CLASS = 0x72756E74


class Lab(ABC):
    """This test's own database: there is nothing in it, and on PostgreSQL not even the runtime schema."""

    backend: ClassVar[Backend]
    now: ClassVar[str]
    milliseconds: ClassVar[str]
    """The type of a column that holds them."""
    driver_error: ClassVar[type[Exception]]
    spelling: ClassVar[dict[str, str]]

    def __init__(self, place: Place) -> None:
        self.place = place

    def repository(self, **options: Any) -> RuntimeRepository:
        """A repository on this database that nobody has awaited yet."""
        return self.place.repository(**options)

    def database(self) -> Database:
        """The same below the repository, for tests that ship migrations of their own."""
        return self.place.database(startup_timeout=5)

    @abstractmethod
    async def execute(self, sql: str) -> None:
        """Run statements as an administrator; PostgreSQL's runtime schema is created first if it is missing."""

    @abstractmethod
    async def rows(self, sql: str) -> list[Row]:
        """Read."""

    @abstractmethod
    async def content(self) -> Content:
        """What a transaction can roll back."""

    async def snapshot(self) -> Snapshot:
        """Everything there is."""
        return Snapshot(await self.content())

    @abstractmethod
    async def wipe(self) -> None:
        """Back to nothing."""

    async def drop_tables(self) -> None:
        """Drop what is ours, as an operator would before restoring a backup into it."""
        for table in [*self.migrations[-1].catalog.tables, LEDGER]:
            await self.execute(f"drop table if exists {self.place.schema}.{table}")

    def table(self, noun: str) -> str:
        """A table's full name."""
        return f"{self.place.schema}.runtime_{noun}"

    @abstractmethod
    def another(self) -> "Lab":
        """One more empty database beside this one."""

    @abstractmethod
    async def connections(self) -> list[object]:
        """The connections of repositories on it."""

    @abstractmethod
    def held(self) -> AbstractAsyncContextManager[int | None]:
        """Hold the migration lock meanwhile; who holds it is known on PostgreSQL."""

    async def version(self) -> int:
        """The version that it has been proved to have, by a boot that may only verify."""
        try:
            async with self.repository(migrate=False) as repository:
                return repository.boot_report.to_version
        except SchemaOutOfDateError as error:
            return error.found

    @contextlib.asynccontextmanager
    async def nothing_left(self) -> AsyncIterator[None]:
        """Prove that the block leaves no thread, task or connection."""
        threads, tasks, before = set(threading.enumerate()), asyncio.all_tasks(), await self.connections()
        yield

        async def left() -> list[object]:
            # asyncio's own threads resolve names, and stay with the loop.
            new = [thread for thread in set(threading.enumerate()) - threads if not thread.name.startswith("asyncio_")]
            connections = await self.connections()
            return [*new, *(asyncio.all_tasks() - tasks), *(connections if len(connections) > len(before) else ())]

        deadline = time.monotonic() + 10
        while rest := await left():
            assert time.monotonic() < deadline, f"left behind: {rest}"
            await asyncio.sleep(0.005)

    async def change(self, change: Change) -> None:
        """Make a change that may have words of its own on each database."""
        words = getattr(change, self.backend) if isinstance(change, Words) else change
        assert isinstance(words, str)
        await self.execute(words)

    @property
    def migrations(self) -> tuple[Migration, ...]:
        return load_migrations(self.backend)

    async def boot(self, **options: Any) -> SchemaReport:
        """Boot, close, and say what the boot reported."""
        async with self.repository(**options) as repository:
            return repository.boot_report

    async def ship(self, migrations: Sequence[Migration], policy: Policy | None = None) -> SchemaReport:
        """Boot a release that ships these migrations."""
        async with self.opened() as database:
            return await ensure_schema(database, migrations, policy or Policy())

    async def look(self) -> Look:
        """What boot sees."""
        async with self.opened() as database:
            return await database.open([migration.catalog for migration in self.migrations])

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Database]:
        database = self.database()
        try:
            yield database
        finally:
            await database.close()

    async def refused(self, error: type[Error], **options: Any) -> Error:
        """Boot, be refused with exactly this error, and find everything as it was."""
        before = await self.snapshot()
        with pytest.raises(error) as caught:
            await self.boot(**options)
        assert type(caught.value) is error
        assert await self.snapshot() == before
        return caught.value

    async def lay_version_1(self) -> None:
        """What an earlier program has left here: every table of version 1, with rows, and the ledger."""
        sql = VERSION_1
        for token, words in self.spelling.items():
            sql = sql.replace(token, words)
        await self.execute(sql)

    async def reach(self, version: int) -> None:
        """Be at version 0 (nothing), 1 (an earlier program's) or a later one (the same, upgraded)."""
        if version:
            await self.lay_version_1()
        if version > 1:
            await self.ship(self.migrations[:version])

    async def lay(self, version: int) -> None:
        """Be at *version* as an earlier release of ours has left it, with two attempts; 0 leaves it empty."""
        if version:
            await self.ship(self.migrations[:version])
            columns = "attempt_id, run_id, attempt_no, status, retry_at_ms"
            rows = ", ".join(f"({', '.join('null' if v is None else repr(v) for v in row)})" for row in ATTEMPTS)
            await self.execute(f"insert into {self.table('attempts')} ({columns}) values {rows}")

    async def record(self, *rows: tuple[int, str]) -> None:
        """Let the ledger say exactly this."""
        values = ", ".join(f"({version}, '{name}', 5)" for version, name in rows)
        await self.execute(f"delete from {LEDGER}; insert into {LEDGER} (version, name, applied_at_ms) values {values}")

    async def recorded(self) -> list[tuple[int, str]]:
        """What the ledger says, without the times."""
        return [(row["version"], row["name"]) for row in await self.all(LEDGER)]

    async def all(self, table: str) -> list[Row]:
        """Every row of a table, by its first column."""
        return await self.rows(f"select * from {table} order by 1")

    async def now_ms(self) -> int:
        """The database's clock."""
        [row] = await self.rows(f"select {self.now} as now_ms")
        return int(row["now_ms"])


class SqliteLab(Lab):
    """A file in a folder of its own."""

    backend = "sqlite"
    milliseconds = "integer"
    now = "cast(round((julianday('now') - 2440587.5) * 86400000) as integer)"
    driver_error = sqlite3.Error
    spelling: ClassVar = {"{auto}": "INTEGER PRIMARY KEY AUTOINCREMENT", "{number}": "INTEGER"}

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(Place("sqlite", str(path)))

    def another(self) -> "SqliteLab":
        number = 0
        while (path := self.path.with_name(f"runtime{number}.db")).exists() or path == self.path:
            number += 1
        return SqliteLab(path)

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """An administrator's connection."""
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            yield connection

    async def connections(self) -> list[object]:
        return [place for place in _open_files() if place.startswith(str(self.path.parent))]

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        with self.connection() as connection:
            connection.execute("begin immediate")
            yield None
            connection.execute("rollback")

    def backups(self) -> list[str]:
        """The copies beside it, finished or not."""
        return sorted(path.name for path in self.path.parent.glob(f"{self.path.name}.v*"))

    @contextlib.contextmanager
    def _connected(self, path: Path | str | None = None) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(path or self.path, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("pragma synchronous = off")
            yield connection

    async def execute(self, sql: str) -> None:
        with self._connected() as connection:
            connection.executescript(sql)

    async def rows(self, sql: str) -> list[Row]:
        # Reading must not create the file.
        with self._connected(self.path if self.path.exists() else ":memory:") as connection:
            return [dict(row) for row in connection.execute(sql)]

    async def content(self) -> Content:
        if not self.path.exists():
            return NOTHING
        with self._connected() as connection:
            objects = [tuple(row) for row in connection.execute("select type, name, rootpage, sql from sqlite_schema")]
            rows = {
                str(name): [repr(tuple(row)) for row in connection.execute(f'select * from "{name}" order by 1')]
                for kind, name, _, _ in objects
                if kind == "table"
            }
        return Content(tuple(sorted(map(repr, objects))), rows)

    async def snapshot(self) -> Snapshot:
        files = {
            file.name: "" if file.name.endswith("-shm") else hashlib.sha256(file.read_bytes()).hexdigest()
            for file in self.path.parent.iterdir()
        }
        if not self.path.exists():
            return Snapshot(files=files)
        with self._connected() as connection:
            [mode] = connection.execute("pragma journal_mode").fetchone()
        return Snapshot(await self.content(), files, mode)

    async def wipe(self) -> None:
        for file in self.path.parent.iterdir():
            file.unlink()

    async def reach(self, version: int) -> None:
        """As above, and in SQLite's default journal mode, so that a switch to WAL would show."""
        await super().reach(version)
        if version:
            await self.execute("pragma journal_mode = delete")

    async def change(self, change: Change) -> None:
        if isinstance(change, Words) and isinstance(change.sqlite, Rebuild):
            self._rebuild(change.sqlite)
        else:
            await super().change(change)

    def _rebuild(self, rebuild: Rebuild) -> None:
        table = rebuild.table
        with self._connected() as connection:
            texts = "select sql from sqlite_schema where type = ? and tbl_name = ? and sql is not null"
            [[sql]] = connection.execute(texts, ("table", table)).fetchall()
            indexes = connection.execute(texts, ("index", table)).fetchall()
            assert rebuild.old in sql, sql
            connection.execute(
                f"{sql.replace(table, 'rebuilt', 1).replace(rebuild.old, rebuild.new)} {rebuild.options}"
            )
            connection.execute(f"insert into rebuilt select * from {table}")
            connection.execute(f"drop table {table}")
            connection.execute(f"alter table rebuilt rename to {table}")
            for [index] in indexes:
                connection.execute(index)
            connection.executescript(rebuild.then)


class PostgresLab(Lab):
    """A schema that only this test knows."""

    backend = "postgres"
    milliseconds = "bigint"
    now = "(extract(epoch from clock_timestamp()) * 1000)::bigint"
    driver_error = asyncpg.PostgresError
    spelling: ClassVar = {"{auto}": "BIGSERIAL PRIMARY KEY", "{number}": "INT8"}

    def __init__(
        self, url: str, schema: str, admin: asyncpg.Connection, labs: "list[PostgresLab] | None" = None
    ) -> None:
        self.admin = admin
        self._labs = [] if labs is None else labs
        self._labs.append(self)
        super().__init__(Place("postgres", url, schema))

    @property
    def lock_key(self) -> int:
        """The second integer of the migration lock; written out like the first."""
        return zlib.crc32(self.place.schema.encode()) - 2**31

    def another(self) -> "PostgresLab":
        schema = f"{self._labs[0].place.schema}_{len(self._labs)}"
        return PostgresLab(self.place.where, schema, self.admin, self._labs)

    async def connections(self) -> list[object]:
        rows = await self.admin.fetch(
            "select pid, state, query from pg_stat_activity where starts_with(application_name, $1)",
            self.place.schema,
        )
        return [tuple(row) for row in rows]

    async def migration_locks(self) -> int:
        """How many sessions hold the migration lock or wait for it."""
        count: int = await self.admin.fetchval(
            "select count(*) from pg_locks where locktype = 'advisory' and classid = $1 and objid::bigint = $2",
            LOCK_CLASS,
            self.lock_key & 0xFFFFFFFF,
        )
        return count

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[asyncpg.Connection]:
        """Somebody else's session, called 'holder'."""
        session = await asyncpg.connect(self.place.where, server_settings={"application_name": "holder"})
        try:
            yield session
        finally:
            await session.close()

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[int]:
        async with self.session() as session, session.transaction():
            await session.execute(f"select pg_advisory_xact_lock({LOCK_CLASS}, {self.lock_key})")
            yield session.get_server_pid()

    async def execute(self, sql: str) -> None:
        if not await self.admin.fetchval("select to_regnamespace($1) is not null", self.place.schema):
            await self.admin.execute(f"create schema {self.place.schema}")
        await self._enter()
        await self.admin.execute(sql)

    async def run_outside(self, sql: str) -> None:
        """Run what is about no runtime schema: databases and roles."""
        await self.admin.execute(sql)

    async def parameters(self, statement: str) -> list[str]:
        """The types of a statement's parameters."""
        return [kind.name for kind in (await self.admin.prepare(statement)).get_parameters()]

    async def rows(self, sql: str) -> list[Row]:
        await self._enter()
        return [dict(row) for row in await self.admin.fetch(sql)]

    async def _enter(self) -> None:
        """Several labs may share the connection."""
        await self.admin.execute(f"set search_path = {self.place.schema}")

    async def content(self) -> Content:
        await self._enter()
        objects = [row["line"] for row in await self.admin.fetch(_POSTGRES_OBJECTS, self.place.schema)]
        relations = await self.admin.fetch(
            "select relname from pg_class where relnamespace = to_regnamespace($1) and relkind in ('r', 'S', 'm')",
            self.place.schema,
        )
        everything = " union all ".join(
            f"""select '{name}', ctid::text, xmin::text, row(r.*)::text from "{name}" as r""" for [name] in relations
        )
        rows: dict[str, list[str]] = {name: [] for [name] in relations}
        for name, *row in await self.admin.fetch(f"{everything} order by 4") if relations else ():
            rows[name].append(str(row))
        return Content(tuple(objects), rows)

    async def wipe(self) -> None:
        await self.admin.execute(f"set client_min_messages = warning; drop schema {self.place.schema} cascade")


def _open_files() -> Iterator[str]:
    """The files that this process has open, where the system tells."""
    with contextlib.suppress(FileNotFoundError):
        for descriptor in os.scandir("/proc/self/fd"):
            # The one that lists them is gone by now.
            with contextlib.suppress(FileNotFoundError):
                yield str(Path(descriptor).readlink())


_POSTGRES_OBJECTS = """
with schema as (select to_regnamespace($1) as oid)
select format('schema %s', oid) as line
  from schema
 where oid is not null
union all
select format('%s %s %s %s', relkind, relname, c.oid, relfilenode)
  from pg_class as c join schema on relnamespace = schema.oid
union all
select format('column %s %s %s %s not null %s %s %s %s', attrelid::regclass, attnum, attname,
              format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated, pg_get_expr(adbin, adrelid))
  from pg_class as c
  join schema on relnamespace = schema.oid
  join pg_attribute on attrelid = c.oid
  left join pg_attrdef on adrelid = c.oid and adnum = attnum
 where attnum > 0
union all
select format('constraint %s %s', conname, pg_get_constraintdef(c.oid))
  from pg_constraint as c join schema on connamespace = schema.oid
union all
select format('index %s valid %s', pg_get_indexdef(indexrelid), indisvalid)
  from pg_index join pg_class as c on c.oid = indrelid join schema on relnamespace = schema.oid
union all
select format('trigger %s', pg_get_triggerdef(t.oid))
  from pg_trigger as t join pg_class as c on c.oid = tgrelid join schema on relnamespace = schema.oid
union all
select format('view %s', pg_get_viewdef(c.oid))
  from pg_class as c join schema on relnamespace = schema.oid
 where relkind in ('v', 'm')
union all
select format('type %s', typname)
  from pg_type join schema on typnamespace = schema.oid
union all
select format('function %s', proname)
  from pg_proc join schema on pronamespace = schema.oid
 order by 1
"""


IDS: dict[Backend, str] = {"sqlite": "schema_migration", "postgres": "postgres_schema_migration"}

on_sqlite = pytest.mark.parametrize("lab", [IDS["sqlite"]], indirect=True)
on_postgres = pytest.mark.parametrize("lab", [IDS["postgres"]], indirect=True)


def changes(table: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Run a test with each case of *table* on each database that the case has words for."""
    return pytest.mark.parametrize(
        ("lab", "case"),
        [
            pytest.param(lab, case, id=f"{lab}-{name}")
            for name, case in table.items()
            for backend, lab in IDS.items()
            if not isinstance(case.change, Words) or getattr(case.change, backend) is not None
        ],
        indirect=["lab"],
    )
