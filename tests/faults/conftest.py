"""
A *lab* is a database of the test's own, with what a test of faults asks about it: what stands in it, what was left
behind, and how to stand in a boot's way.
"""

import asyncio
import contextlib
import os
import sqlite3
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from runtime_repo import RuntimeRepository, SchemaOutOfDateError, SchemaReport
from runtime_repo.catalog import LEDGER
from runtime_repo.schema import Migration, Policy, ensure_schema, load_migrations
from tests.place import Place
from tests.postgres_server import PostgresServer

# Written out: if it changed, two releases would no longer exclude each other.
LOCK_CLASS = 0x72756E74

Snapshot = list[tuple[object, ...]]
"""Every object, column and row that matters, as the database itself lists them."""

ATTEMPTS = [("a", "run", 0, "queued", None), ("b", "run", 3, "completed", None)]


async def eventually(fact: Callable[[], Awaitable[object]], seconds: float = 10) -> None:
    """Wait until *fact* holds; what has been asked for takes a moment to be seen."""
    deadline = time.monotonic() + seconds
    while not await fact():
        assert time.monotonic() < deadline, f"it did not happen in {seconds} s"
        await asyncio.sleep(0.005)


async def still_waits(task: "asyncio.Task[Any]") -> None:
    """Give *task* some turns in which it could wrongly end."""
    done, _ = await asyncio.wait([task], timeout=0.15)
    assert not done, f"it did not wait: {task!r}"


@asynccontextmanager
async def closing(repository: RuntimeRepository) -> AsyncIterator[RuntimeRepository]:
    """Close it in the end without booting it first: a test that fails must not disturb those that follow."""
    try:
        yield repository
    finally:
        await repository.close()


class Lab(ABC):
    """A database of the test's own."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def repository(self, **options: Any) -> RuntimeRepository:
        """A repository on it that has not been awaited."""
        return self.place.repository(**options)

    async def apply(self, *migrations: Migration, lock_timeout: float = 5) -> SchemaReport:
        """Boot it as a release would that ships these migrations."""
        database = self.place.database()
        try:
            return await ensure_schema(database, migrations, Policy(lock_timeout=lock_timeout))
        finally:
            await database.close()

    async def lay(self, version: int) -> None:
        """Bring it to *version*, as an earlier release would have, with some rows; 0 leaves it empty."""
        if version:
            await self.apply(*load_migrations(self.place.backend)[:version])
            columns = "attempt_id, run_id, attempt_no, status, retry_at_ms"
            rows = ", ".join(f"({', '.join('null' if v is None else repr(v) for v in row)})" for row in ATTEMPTS)
            await self.execute(f"insert into {self.table('attempts')} ({columns}) values {rows}")

    async def version(self) -> int:
        """The version that it has been proved to have, by a boot that may only verify."""
        try:
            async with self.repository(migrate=False) as repository:
                return repository.boot_report.to_version
        except SchemaOutOfDateError as error:
            return error.found

    @asynccontextmanager
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

    async def wipe(self) -> None:
        """Drop what is ours, as an operator would before restoring a backup into it."""
        for table in [*load_migrations(self.place.backend)[-1].catalog.tables, LEDGER]:
            await self.execute(f"drop table if exists {self.place.schema}.{table}")

    def table(self, noun: str) -> str:
        """A table's full name."""
        return f"{self.place.schema}.runtime_{noun}"

    @abstractmethod
    def another(self) -> "Lab":
        """One more empty database beside this one."""

    @abstractmethod
    async def execute(self, sql: str) -> None:
        """Run the administrator's own SQL."""

    @abstractmethod
    async def snapshot(self) -> Snapshot:
        """What stands in it."""

    @abstractmethod
    async def connections(self) -> list[object]:
        """The connections of repositories on it."""

    @abstractmethod
    def held(self) -> AbstractAsyncContextManager[int | None]:
        """Hold the migration lock meanwhile; who holds it is known on PostgreSQL."""


class SqliteLab(Lab):
    """A SQLite file."""

    def __init__(self, folder: Path, number: int = 0) -> None:
        self.path = folder / f"runtime{number}.db"
        super().__init__(Place("sqlite", str(self.path)))

    def another(self) -> "SqliteLab":
        number = 0
        while (lab := SqliteLab(self.path.parent, number)).path.exists() or lab.path == self.path:
            number += 1
        return lab

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """An administrator's connection."""
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            yield connection

    async def execute(self, sql: str) -> None:
        with self.connection() as connection:
            connection.execute(sql)

    async def snapshot(self) -> Snapshot:
        if not self.path.exists():
            return []
        with self.connection() as connection:
            found: Snapshot = connection.execute("select type, name, sql from sqlite_schema order by 1, 2").fetchall()
            names = {name for _, name, _ in found}
            for table, columns in _KEPT.items():
                if table in names:
                    found += connection.execute(f"select {columns} from {table} order by 1").fetchall()
        return found

    async def connections(self) -> list[object]:
        return [place for place in _open_files() if place.startswith(str(self.path.parent))]

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        with self.connection() as connection:
            connection.execute("begin immediate")
            yield None
            connection.execute("rollback")

    def backups(self) -> list[str]:
        """The copies beside it, finished or not."""
        return sorted(path.name for path in self.path.parent.glob(f"{self.path.name}.v*"))


class PostgresLab(Lab):
    """A runtime schema of a PostgreSQL database."""

    def __init__(self, url: str, schema: str, admin: asyncpg.Connection, labs: list["PostgresLab"]) -> None:
        self.admin = admin
        self._labs = labs
        labs.append(self)
        super().__init__(Place("postgres", url, schema))

    @property
    def lock_key(self) -> int:
        """The second integer of the migration lock; written out like the first."""
        return zlib.crc32(self.place.schema.encode()) - 2**31

    def another(self) -> "PostgresLab":
        schema = f"{self._labs[0].place.schema}_{len(self._labs)}"
        return PostgresLab(self.place.where, schema, self.admin, self._labs)

    async def execute(self, sql: str) -> None:
        await self.admin.execute(sql)

    async def snapshot(self) -> Snapshot:
        schema = self.place.schema
        found: Snapshot = [tuple(row) for row in await self.admin.fetch(_OBJECTS, schema)]
        for table, columns in _KEPT.items():
            if await self.admin.fetchval("select to_regclass($1)", f"{schema}.{table}"):
                rows = await self.admin.fetch(f"select {columns} from {schema}.{table} order by 1")
                found += [tuple(row) for row in rows]
        return found

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

    @asynccontextmanager
    async def session(self) -> AsyncIterator[asyncpg.Connection]:
        """Somebody else's session, called 'holder'."""
        session = await asyncpg.connect(self.place.where, server_settings={"application_name": "holder"})
        try:
            yield session
        finally:
            await session.close()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[int]:
        async with self.session() as session, session.transaction():
            await session.execute(f"select pg_advisory_xact_lock({LOCK_CLASS}, {self.lock_key})")
            yield session.get_server_pid()


def _open_files() -> Iterator[str]:
    """The files that this process has open, where the system tells."""
    with contextlib.suppress(FileNotFoundError):
        for descriptor in os.scandir("/proc/self/fd"):
            # The one that lists them is gone by now.
            with contextlib.suppress(FileNotFoundError):
                yield str(Path(descriptor).readlink())


_KEPT = {LEDGER: "version, name", "runtime_attempts": "attempt_id, run_id, attempt_no, status"}

_OBJECTS = """
select n.nspname, c.relname, c.relkind::text, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull
  from pg_namespace n
  left join pg_class c on c.relnamespace = n.oid
  left join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
 where n.nspname = $1
 order by c.relname, a.attnum
"""


@pytest.fixture
def sqlite_lab(tmp_path: Path) -> Lab:
    """A file of the test's own."""
    return SqliteLab(tmp_path)


@pytest.fixture
async def postgres_lab(postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection) -> AsyncIterator[Lab]:
    """A runtime schema of the test's own."""
    labs: list[PostgresLab] = []
    lab = PostgresLab(postgres_url, postgres_schema, postgres, labs)
    yield lab
    await postgres.execute("set client_min_messages = warning")
    for other in labs[1:]:
        await postgres.execute(f"drop schema if exists {other.place.schema} cascade")


BACKENDS = [pytest.param("sqlite", id="schema_migration"), pytest.param("postgres", id="postgres_schema_migration")]

on_sqlite = pytest.mark.parametrize("lab", BACKENDS[:1], indirect=True)
"""Only where the fact is SQLite's."""

on_postgres = pytest.mark.parametrize("lab", BACKENDS[1:], indirect=True)
"""Only where the fact is PostgreSQL's."""


@pytest.fixture(params=BACKENDS)
def lab(request: pytest.FixtureRequest) -> Lab:
    """An empty database of the test's own, once for each backend."""
    lab: Lab = request.getfixturevalue(f"{request.param}_lab")
    return lab


POSTGRES_ONLY = [pytest.param(None, id="postgres_schema_migration")]
"""For a fixture with a server of the tests' own."""


@pytest.fixture(params=POSTGRES_ONLY)
def new_server(request: pytest.FixtureRequest) -> Iterator[Callable[..., PostgresServer]]:
    """Starts servers of the test's own, for what the shared one cannot bear. Fails or skips as the shared one does."""
    request.getfixturevalue("postgres_server")
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(PostgresServer(**options))


@asynccontextmanager
async def lab_on(server: PostgresServer, schema: str = "runtime") -> AsyncIterator[PostgresLab]:
    """A lab on a server of the test's own."""
    admin = await asyncpg.connect(server.url())
    try:
        yield PostgresLab(server.url(), schema, admin, [])
    finally:
        await admin.close()


def in_ci() -> bool:
    """Whether what is missing here must not go unnoticed."""
    return os.environ.get("CI", "").lower() in {"true", "1"}
