"""What a warm boot costs a PostgreSQL server, and how little it asks for: read in the server's own log."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from runtime_repo import MigrationError, SchemaError
from runtime_repo.catalog import LEDGER
from runtime_repo.schema import load_migrations
from tests.faults.conftest import POSTGRES_ONLY, lab_on
from tests.lab import NOTHING, PostgresLab
from tests.postgres_server import PostgresServer
from tests.versions import NEWEST

SERVER = {"log_statement": "all", "log_connections": "on"}
ENTRY = re.compile(r"^\S+ \S+ \S+ \[\d+\] (?P<application>\S*) LOG:  (?P<kind>execute|statement)[^:]*: ", re.MULTILINE)
NEXT = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:", re.MULTILINE)
READER = ("reader", "secret")


@pytest.fixture(scope="module", params=POSTGRES_ONLY)
def server(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    """A server of this file's own that logs every statement, and has a role that may only read."""
    request.getfixturevalue("postgres_server")
    with PostgresServer(settings=SERVER) as server:
        yield server


@pytest.fixture
async def lab(server: PostgresServer, request: pytest.FixtureRequest) -> AsyncIterator[PostgresLab]:
    """A runtime schema of the test's own on it."""
    name = re.sub(r"\W", "_", request.node.name)[-50:].strip("_").lower()
    async with lab_on(server, name) as lab:
        yield lab


async def reader_of(lab: PostgresLab, server: PostgresServer) -> PostgresLab:
    """The same database for a role with USAGE and SELECT and nothing else."""
    name, password = READER
    schema = lab.place.schema
    if not await lab.admin.fetchval("select 1 from pg_roles where rolname = $1", name):
        await lab.run_outside(f"create role {name} login password '{password}'")
    if await lab.content() != NOTHING:
        await lab.execute(f"grant usage on schema {schema} to {name}")
        await lab.execute(f"grant select on all tables in schema {schema} to {name}")
    reader = PostgresLab(lab.place.where, schema, lab.admin, [])
    reader.place = replace(lab.place, where=server.url(name, password))
    return reader


def statements(log: Path, application: str, start: int) -> list[str]:
    """What *application* ran since the log was *start* bytes long: one entry each, whichever protocol it came by."""
    text = log.read_bytes()[start:].decode()
    found = []
    for entry in ENTRY.finditer(text):
        if entry["application"] == application:
            end = NEXT.search(text, entry.end())
            found.append(re.sub(r"--[^\n]*", "", text[entry.end() : end.start() if end else None]).strip().lower())
    return found


@pytest.mark.parametrize("migrate", [True, False], ids=["normal", "verify-only"])
@pytest.mark.parametrize("role", ["owner", "reader"])
async def test_a_warm_boot_is_one_connection_and_two_round_trips(
    lab: PostgresLab, server: PostgresServer, role: str, *, migrate: bool
) -> None:
    """
    The catalog's text, and the ledger: no lock, no transaction, no write, nothing that a role which may only read could
    not do.
    """
    await lab.lay(NEWEST)
    booted = await reader_of(lab, server) if role == "reader" else lab
    start = server.log.stat().st_size
    async with booted.repository(migrate=migrate) as repository:
        looks = statements(server.log, lab.place.schema, start)
        assert repository.boot_report.applied == ()
    catalog, ledger = looks
    # A statement that names the ledger runs what a view under that name says, so the first one only asks what it is.
    assert re.match(r"copy \(\s*select", catalog)
    assert ledger.startswith(f'copy "{lab.place.schema}"."{LEDGER}"(')
    for text in looks:
        assert text.endswith(("to stdout", "to stdout (format 'csv')"))
        assert not re.search(r"pg_(try_)?advisory|\block\b|\b(insert|update|delete|create|alter|for share)\b", text)
    opened = re.findall("connection authorized: .*", server.log.read_bytes()[start:].decode())
    assert [f"application_name={lab.place.schema}" in line for line in opened] == [True]
    # Closing says goodbye and runs nothing.
    assert statements(server.log, lab.place.schema, start) == looks


async def test_a_worker_of_another_role_than_the_owner_boots_in_three_round_trips(
    lab: PostgresLab, server: PostgresServer
) -> None:
    """As the README's roles are: the third statement asks who the owner is, who is reported."""
    owner = f"{lab.place.schema[-40:]}_owner"
    await lab.lay(NEWEST)
    worker = await reader_of(lab, server)
    tables = load_migrations("postgres")[-1].catalog.tables
    changes = [f"schema {lab.place.schema}", *(f"table {lab.place.schema}.{table}" for table in tables)]
    await lab.execute(f"create role {owner};" + "".join(f"alter {change} owner to {owner};" for change in changes))
    try:
        start = server.log.stat().st_size
        async with worker.repository() as repository:
            catalog, around, ledger = statements(server.log, lab.place.schema, start)
        assert [told.object for told in repository.boot_report.tolerated] == [f"schema {lab.place.schema}"]
        assert owner in str(repository.boot_report.tolerated[0].found)
    finally:
        await lab.execute(f"reassign owned by {owner} to postgres; drop owned by {owner}; drop role {owner}")
    assert (catalog[:4], around[:4], ledger[:4]) == ("copy", "with", "copy")


async def test_the_log_shows_what_a_cold_boot_does(lab: PostgresLab, server: PostgresServer) -> None:
    """The test above can see a lock, a transaction and a write."""
    start = server.log.stat().st_size
    async with lab.repository():
        log = "\n".join(statements(server.log, lab.place.schema, start))
    assert all(word in log for word in ("pg_try_advisory_xact_lock", "begin", "create table", "insert into", "commit"))


async def test_a_reader_is_served(lab: PostgresLab, server: PostgresServer) -> None:
    """Reading verbs work under a role that may only read."""
    await lab.lay(NEWEST)
    async with (await reader_of(lab, server)).repository() as repository:
        assert (await repository.attempts.get("a")).run_id == "run"
        assert await repository.attempts.find("nobody") is None


@pytest.mark.parametrize("version", [0, 1], ids=["fresh", "upgrade"])
async def test_a_reader_cannot_migrate(lab: PostgresLab, server: PostgresServer, version: int) -> None:
    """The error says what to grant; nothing was changed and the lock is free."""
    await lab.lay(version)
    reader = await reader_of(lab, server)
    before = await lab.content()
    async with lab.nothing_left():
        with pytest.raises(MigrationError, match="grant the role what it lacks") as caught:
            await reader.repository()
    assert caught.value.version == version + 1
    assert isinstance(caught.value.__cause__, asyncpg.InsufficientPrivilegeError)
    assert await lab.content() == before
    assert await lab.migration_locks() == 0


async def test_a_hot_standby_serves_what_is_current_and_refuses_what_is_pending(server: PostgresServer) -> None:
    """A standby cannot be migrated: the error says to migrate on the primary."""
    async with AsyncExitStack() as stack:
        current, pending, nothing = [
            await stack.enter_async_context(lab_on(server, f"standby_{n}")) for n in ("current", "pending", "nothing")
        ]
        await current.lay(NEWEST)
        await pending.lay(1)
        standby = server.standby()
        stack.callback(standby.stop)

        async def there(lab: PostgresLab) -> PostgresLab:
            return await stack.enter_async_context(lab_on(standby, lab.place.schema))

        for migrate in (True, False):
            async with (await there(current)).repository(migrate=migrate) as repository:
                assert (await repository.attempts.get("a")).run_id == "run"
        for lab in (await there(pending), await there(nothing)):
            before = await lab.content()
            async with lab.nothing_left():
                with pytest.raises(SchemaError, match="migrate on the primary"):
                    await lab.repository()
                with pytest.raises(SchemaError, match="migrate=False"):
                    await lab.repository(migrate=False)
            assert await lab.content() == before
