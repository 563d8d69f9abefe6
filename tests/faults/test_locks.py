"""Boots that wait: for how long, for whom, and what they do not stand in the way of meanwhile."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from runtime_repo import LockHolder, MigrationError, PostgresRuntimeRepository, SchemaLockTimeoutError
from runtime_repo.queries import fill
from runtime_repo.schema import load_migrations
from tests.faults.conftest import closing, eventually, still_waits
from tests.lab import NOTHING, Lab, PostgresLab, on_postgres, on_sqlite
from tests.versions import NEWEST


@asynccontextmanager
async def reading(lab: PostgresLab) -> AsyncIterator[asyncpg.Connection]:
    """Somebody else's open transaction that has read the attempts, as any dump or report does."""
    async with lab.session() as session, session.transaction():
        await session.execute(f"select from {lab.table('attempts')}")
        yield session


async def described(session: asyncpg.Connection, admin: asyncpg.Connection) -> tuple[object, ...]:
    """What the server knows of *session*."""
    row = await admin.fetchrow(
        "select pid, usename, application_name, host(client_addr) from pg_stat_activity where pid = $1",
        session.get_server_pid(),
    )
    assert row is not None
    return tuple(row)


async def refused(lab: Lab, lock_timeout: float) -> SchemaLockTimeoutError:
    """Boot in vain."""
    before = await lab.content()
    async with lab.nothing_left():
        with pytest.raises(SchemaLockTimeoutError, match="lock_timeout") as caught:
            await lab.repository(lock_timeout=lock_timeout)
    assert await lab.content() == before
    return caught.value


@pytest.mark.parametrize("version", [0, 1], ids=["fresh", "upgrade"])
@pytest.mark.parametrize("lock_timeout", [0, 0.3])
async def test_waiting_for_the_migration_lock_is_bounded(lab: Lab, lock_timeout: float, version: int) -> None:
    """Zero means one try; the error says how long it waited and who is in the way, where that can be known."""
    await lab.lay(version)
    async with lab.held() as holder:
        started = time.monotonic()
        error = await refused(lab, lock_timeout)
        assert time.monotonic() - started < lock_timeout + 2
    assert lock_timeout <= error.waited < lock_timeout + 1
    assert (error.holder and error.holder.pid) == holder
    async with lab.repository(lock_timeout=0) as repository:
        assert repository.boot_report.from_version == version


@on_sqlite
async def test_a_writer_of_sqlite_cannot_be_named(lab: Lab) -> None:
    """No process can be asked who holds the file."""
    await lab.lay(1)
    async with lab.held():
        error = await refused(lab, 0.1)
    assert error.holder is None
    assert "an unknown process" in str(error)


@on_postgres
@pytest.mark.parametrize("what", ["migration lock", "table"])
async def test_the_error_names_who_is_in_the_way(lab: PostgresLab, what: str) -> None:
    """Process id, user, application, address and the age of its transaction: enough to find and end it."""
    await lab.lay(1)
    async with lab.session() as session, session.transaction():
        statement = {
            "migration lock": f"select pg_advisory_xact_lock({0x72756E74}, {lab.lock_key})",
            "table": f"select from {lab.table('attempts')}",
        }[what]
        began = time.monotonic()
        await session.execute(statement)
        holder = (await refused(lab, 0.3)).holder
        assert isinstance(holder, LockHolder)
        named = (holder.pid, holder.user, holder.application_name, holder.client_address)
        assert named == await described(session, lab.admin)
        assert holder.transaction_age is not None
        assert 0.3 <= holder.transaction_age <= time.monotonic() - began + 1
        assert all(str(part) in str(holder) for part in (holder.pid, holder.user, "holder"))


@on_postgres
async def test_what_a_role_may_not_see_of_the_holder_is_unknown(lab: PostgresLab) -> None:
    """Another user's address and times are hidden from it, and are not said to be none; the user is named."""
    role = f"{lab.place.schema}_blind"
    await lab.run_outside(f"create role {role} login password 'secret'")
    try:
        async with lab.held() as pid:
            url = urlsplit(lab.place.where)
            blind = urlunsplit(url._replace(netloc=f"{role}:secret@{url.netloc.rpartition('@')[2]}"))
            with pytest.raises(SchemaLockTimeoutError) as caught:
                await PostgresRuntimeRepository(blind, schema=lab.place.schema, lock_timeout=0)
        holder = caught.value.holder
        assert holder is not None
        assert (holder.pid, holder.client_address, holder.transaction_age) == (pid, None, None)
        assert holder.user == await lab.admin.fetchval("select current_user")
        assert "client unknown, in a transaction of unknown age" in str(holder)
    finally:
        await lab.run_outside(f"drop role {role}")


@on_postgres
async def test_a_holder_on_a_unix_socket_is_local(lab: PostgresLab) -> None:
    """That, and not an address that is missing."""
    folder = await lab.admin.fetchval("show unix_socket_directories")
    port = await lab.admin.fetchval("show port")
    if not folder:
        pytest.skip("the server listens on no Unix socket")
    url = urlsplit(lab.place.where)
    session = await asyncpg.connect(lab.place.where, host=folder.split(",")[0], port=int(port), password=url.password)
    try:
        async with session.transaction():
            await session.execute(f"select pg_advisory_xact_lock({0x72756E74}, {lab.lock_key})")
            holder = (await refused(lab, 0)).holder
            assert holder is not None
            assert (holder.pid, holder.client_address) == (session.get_server_pid(), "local")
    finally:
        await session.close()


@on_postgres
async def test_another_databases_lock_is_not_in_the_way(lab: PostgresLab) -> None:
    """The advisory key is the same in every schema's namesake elsewhere, and so is not named as the holder."""
    name = f"{lab.place.schema}_db"
    await lab.run_outside(f"create database {name}")
    try:
        elsewhere = await asyncpg.connect(lab.place.where, database=name)
        try:
            async with elsewhere.transaction():
                await elsewhere.execute(f"select pg_advisory_xact_lock({0x72756E74}, {lab.lock_key})")
                async with lab.held() as pid:
                    holder = (await refused(lab, 0)).holder
                    assert holder is not None
                    assert holder.pid == pid
                async with lab.repository(lock_timeout=0) as repository:
                    assert repository.boot_report.to_version == NEWEST
        finally:
            await elsewhere.close()
    finally:
        await lab.run_outside(f"drop database {name} with (force)")


async def test_a_boot_that_waited_succeeds_and_says_how_long(lab: Lab) -> None:
    """The lock's end is noticed soon; who did not wait says zero."""
    await lab.lay(1)
    async with lab.nothing_left(), closing(lab.repository()) as repository:
        async with lab.held():
            boot = asyncio.ensure_future(repository.ensure_schema())
            await still_waits(boot)
            await still_waits(boot)  # the first look may take as long as one
        report = await asyncio.wait_for(boot, 5)
        assert (report.from_version, len(report.applied)) == (1, NEWEST - 1)
        assert 0.1 < report.waited < 5
        assert (await repository.ensure_schema()).waited == 0


@on_postgres
async def test_who_waits_looks_between_its_tries(lab: PostgresLab) -> None:
    """A loser of many does not queue for the lock once there is nothing left to apply."""
    await lab.lay(1)
    pending = load_migrations("postgres")[1:]
    async with lab.nothing_left(), closing(lab.repository()) as repository, lab.held():
        boot = asyncio.ensure_future(repository.ensure_schema())
        await still_waits(boot)
        async with lab.admin.transaction():
            for migration in pending:
                await lab.execute(fill(migration.sql, {"schema": lab.place.schema, "now_ms": "0"}))
                row = f"({migration.version}, '{migration.name}', 0)"
                await lab.execute(f"insert into {lab.table('schema_migrations')} values {row}")
        report = await asyncio.wait_for(boot, 5)
    assert (report.from_version, report.to_version, report.applied) == (1, NEWEST, ())


@pytest.mark.parametrize("lock_timeout", [0, 0.3])
@pytest.mark.parametrize("version", [0, 1], ids=["fresh", "upgrade"])
async def test_waiting_for_a_migration_that_has_changed_its_tables_is_bounded(
    lab: Lab, lock_timeout: float, version: int
) -> None:
    """Not even the look waits for the tables that the winner has locked until its commit."""
    await lab.lay(version)
    errors: list[object] = []

    async def stall() -> None:
        boot = asyncio.ensure_future(lab.repository(lock_timeout=lock_timeout).ensure_schema())
        done, _ = await asyncio.wait([boot], timeout=5)
        boot.cancel()
        await asyncio.wait([boot])
        errors.append(boot.exception() if done else "it was still waiting after 5 s")

    async with lab.nothing_left():
        assert (await lab.place.boot_stalling("applied", stall)).to_version == NEWEST
    (error,) = errors
    assert isinstance(error, SchemaLockTimeoutError), error


async def test_who_finds_the_winner_done_has_nothing_to_do(lab: Lab) -> None:
    """A loser does not take the lock after the winner; it looks, and serves."""
    await lab.lay(1)
    blocked, opened = asyncio.Event(), asyncio.Event()

    async def stall() -> None:
        blocked.set()
        await opened.wait()

    async with lab.nothing_left(), closing(lab.repository()) as loser:
        winner = asyncio.ensure_future(lab.place.boot_stalling("applied", stall))
        await blocked.wait()
        boot = asyncio.ensure_future(loser.ensure_schema())
        await still_waits(boot)
        opened.set()
        assert len((await winner).applied) == NEWEST - 1
        report = await asyncio.wait_for(boot, 5)
        assert (report.to_version, report.applied) == (NEWEST, ())
        assert report.waited > 0


@on_postgres
async def test_a_boot_that_waits_for_a_table_does_not_queue_live_traffic(lab: PostgresLab) -> None:
    """
    ALTER TABLE waits behind a reader, and every later reader behind it: boot waits in short tries only, and gives the
    migration lock back between them.
    """
    await lab.lay(1)
    async with lab.nothing_left(), closing(lab.repository()) as repository:
        async with lab.session() as traffic:
            await traffic.execute("set lock_timeout = '1s'")
            async with reading(lab):
                boot = asyncio.ensure_future(repository.ensure_schema())
                tries: set[str] = set()
                free = slowest = 0.0
                deadline = time.monotonic() + 30
                while len(tries) < 4 or not free:
                    assert time.monotonic() < deadline, f"boot was seen waiting only in {tries}"
                    waiting = await lab.admin.fetch(
                        "select virtualtransaction from pg_locks where not granted and relation = $1::regclass",
                        lab.table("attempts"),
                    )
                    tries.update(row[0] for row in waiting)
                    began = time.monotonic()
                    await traffic.execute(f"select from {lab.table('attempts')}")
                    slowest = max(slowest, time.monotonic() - began)
                    free += not await lab.migration_locks()
                assert not boot.done()
            report = await asyncio.wait_for(boot, 10)
        assert report.waited > 0
        assert len(report.applied) == NEWEST - 1
        assert slowest < 0.6, "one short try is 0.1 s"


@on_postgres
async def test_waiting_boots_do_not_stall_an_index_build_elsewhere(lab: PostgresLab) -> None:
    """CREATE INDEX CONCURRENTLY waits for every older snapshot, and deadlocks with one that waits for a lock."""
    await lab.lay(1)
    table = f"{lab.place.schema}.elsewhere"
    await lab.execute(f"create table {table} as select generate_series(1, 1000) as n")
    async with lab.nothing_left(), AsyncExitStack() as stack:
        repositories = [lab.repository(max_size=1) for _ in range(8)]
        for repository in repositories:
            await stack.enter_async_context(closing(repository))
        async with lab.held():
            boots = [asyncio.ensure_future(repository.ensure_schema()) for repository in repositories]

            async def all_wait() -> bool:
                return len(await lab.connections()) == len(boots)

            await eventually(all_wait)
            async with lab.session() as builder:
                await builder.execute("set statement_timeout = '5s'")
                for number in range(5):
                    await builder.execute(f"create index concurrently i{number} on {table} (n)")
            assert not any(boot.done() for boot in boots)
        reports = await asyncio.wait_for(asyncio.gather(*boots), 20)
        assert sorted(len(report.applied) for report in reports) == [0] * 7 + [NEWEST - 1]


@on_postgres
@pytest.mark.parametrize("table", ["attempts", "schema_migrations"])
async def test_a_warm_boot_does_not_wait_for_ever_for_a_locked_table(lab: PostgresLab, table: str) -> None:
    """
    PostgreSQL's own catalog functions wait for a table that is locked exclusively, and so does whatever names one
    before it can set a limit: that has an end too.
    """
    async with lab.repository() as repository:
        assert repository.boot_report.to_version == NEWEST
    async with lab.session() as session, session.transaction(), closing(lab.repository(lock_timeout=0.3)) as repository:
        await session.execute(f"lock table {lab.table(table)} in access exclusive mode")
        boot = asyncio.ensure_future(repository.ensure_schema())
        done, _ = await asyncio.wait([boot], timeout=5)
        assert done, "it was still waiting after 5 s"
        error = boot.exception()
        assert isinstance(error, SchemaLockTimeoutError)
        assert error.holder is not None
        assert error.holder.pid == session.get_server_pid()


@on_postgres
@pytest.mark.parametrize("is_open", [True, False], ids=["open", "not open"])
@pytest.mark.parametrize("table", ["attempts", "schema_migrations"])
async def test_an_inspection_is_as_patient_as_a_boot(lab: PostgresLab, table: str, *, is_open: bool) -> None:
    """A locked table is waited for, but not for longer than lock_timeout; the error says who has it."""
    async with lab.repository() as repository:
        assert repository.boot_report.to_version == NEWEST
    async with closing(lab.repository(lock_timeout=0.3)) as repository:
        if is_open:
            await repository
        async with lab.session() as session, session.transaction():
            await session.execute(f"lock table {lab.table(table)} in access exclusive mode")
            with pytest.raises(SchemaLockTimeoutError) as caught:
                await asyncio.wait_for(repository.inspect(), 5)
            assert caught.value.holder is not None
            assert caught.value.holder.pid == session.get_server_pid()
        assert (await repository.inspect()).refusal is None


@on_postgres
async def test_a_holder_without_a_transaction_has_none(lab: PostgresLab) -> None:
    """A session that keeps an advisory lock between its transactions: since when it is there is all that is known."""
    await lab.lay(1)
    async with lab.session() as session:
        await session.execute(f"select pg_advisory_lock({0x72756E74}, {lab.lock_key})")
        holder = (await refused(lab, 0)).holder
        assert holder is not None
        assert (holder.pid, holder.transaction_age) == (session.get_server_pid(), None)
        assert holder.session_age is not None
        assert f"in no transaction, connected for {holder.session_age:.1f} s" in str(holder)
        await session.execute("select pg_advisory_unlock_all()")


@on_postgres
async def test_two_runtime_schemas_migrate_independently(lab: PostgresLab) -> None:
    """While one migrates, the other boots at once."""
    other = lab.another()

    async def boot_the_other() -> None:
        async with other.repository(lock_timeout=0) as repository:
            assert repository.boot_report.to_version == NEWEST
            assert await lab.content() == NOTHING

    assert (await lab.place.boot_stalling("applied", boot_the_other)).to_version == NEWEST


@on_postgres
async def test_the_migration_lock_is_gone_after_boot_and_after_failure(lab: PostgresLab) -> None:
    """It belongs to the transaction: there is nothing to unlock, also while the repository stays open."""
    broken = replace(load_migrations("postgres")[1], sql="create table {schema}.t (n integer); select 1 / 0;")
    await lab.lay(1)
    before = await lab.content()
    with pytest.raises(MigrationError) as caught:
        await lab.ship([load_migrations("postgres")[0], broken])
    assert isinstance(caught.value.__cause__, asyncpg.DivisionByZeroError)
    assert await lab.migration_locks() == 0
    assert await lab.content() == before
    async with lab.repository() as repository:
        assert repository.boot_report.to_version == NEWEST
        assert await lab.migration_locks() == 0
