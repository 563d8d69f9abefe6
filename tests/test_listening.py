"""PostgreSQL's LISTEN: told rather than asked, over a connection of its own that may be lost."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence

import asyncpg
import pytest

from runtime_repo import PostgresRuntimeRepository
from runtime_repo.database import Row
from runtime_repo.postgres import notifications
from tests.contract.conftest import Clock
from tests.contract.test_wait import BRINGS, waiting

LISTENERS = "select pid from pg_stat_activity where query ilike 'listen%' and datname = current_database()"


@pytest.fixture
def clock() -> Clock:
    """A clock of the test's own."""
    return Clock()


@pytest.fixture(autouse=True)
def only_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits does not look by himself."""
    monkeypatch.setattr(notifications, "_POLL_LISTENING", 1000.0)
    monkeypatch.setattr(notifications, "_POLL_DEAF", 1000.0)
    monkeypatch.setattr(notifications, "_PAUSE_FIRST", 0.01)


async def listeners(admin: asyncpg.Connection, number: int, *, besides: int = 0) -> list[int]:
    """The backends that listen, besides one that is to go, as soon as there are so many."""
    while True:
        pids = [row["pid"] for row in await admin.fetch(LISTENERS)]
        if len(pids) == number and besides not in pids:
            return pids
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("schema", ["plain", 'it\'s "odd"', "é" * 31], ids=["plain", "odd", "long"])
async def test_one_connection_hears_for_all_who_wait(
    postgres_url: str, postgres: asyncpg.Connection, schema: str, postgres_schema: str
) -> None:
    """Two who wait for different queues, each of which is told only of its own; nobody looks by himself."""
    schema = postgres_schema if schema == "plain" else schema
    try:
        async with asyncio.timeout(15), PostgresRuntimeRepository(postgres_url, schema=schema) as repo:
            tasks = [await waiting(repo), await waiting(repo, "mail")]
            await listeners(postgres, 1)
            await repo.attempts.enqueue("run", queue="mail")
            assert await tasks[1]
            assert not tasks[0].done()
            await repo.attempts.enqueue("run")
            assert await tasks[0]
        async with asyncio.timeout(5):
            await listeners(postgres, 0)
    finally:
        await postgres.execute('drop schema if exists "' + schema.replace('"', '""') + '" cascade')


async def test_a_connection_that_is_lost_is_made_anew(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """And what came while nobody listened is found, for whoever waits looks when it is there."""
    async with asyncio.timeout(20), PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as repo:
        task = await waiting(repo)
        (pid,) = await listeners(postgres, 1)
        for _ in range(3):
            await postgres.fetch("select pg_terminate_backend($1)", pid)
            (pid,) = await listeners(postgres, 1, besides=pid)
        await repo.attempts.enqueue("run")
        assert await task


async def test_an_error_of_the_applications_own_does_not_end_the_listening(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as of an *init* that needs another service; it is tried again, and its words are not logged."""
    failures = 0

    async def init(_connection: asyncpg.Connection) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise ZeroDivisionError("the password is hunter2")

    repo = PostgresRuntimeRepository(postgres_url, schema=postgres_schema, init=init)
    async with asyncio.timeout(20), repo:
        task = await waiting(repo)
        (pid,) = await listeners(postgres, 1)
        failures = 2
        await postgres.fetch("select pg_terminate_backend($1)", pid)
        await listeners(postgres, 1, besides=pid)
        assert "not listening" in caplog.text
        assert "hunter2" not in caplog.text
        await repo.attempts.enqueue("run")
        assert await task


@pytest.mark.parametrize("kind", ["listen=False", "a pool of two"])
async def test_who_may_not_listen_polls(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """For pgbouncer, and where the pool that was given has no connection to spare: one is for heartbeats."""
    monkeypatch.setattr(notifications, "_POLL_DEAF", 0.05)
    async with asyncio.timeout(20), asyncpg.create_pool(postgres_url, min_size=2, max_size=2) as pool:
        repo = (
            PostgresRuntimeRepository(postgres_url, schema=postgres_schema, listen=False)
            if kind == "listen=False"
            else PostgresRuntimeRepository(pool, schema=postgres_schema)
        )
        async with repo:
            task = await waiting(repo)
            assert await postgres.fetch(LISTENERS) == []
            await repo.attempts.enqueue("run")
            assert await task


async def test_a_pool_that_was_given_gets_its_connection_back(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """Who listens borrows one; afterwards the pool has all of them, and lends them without a listener."""
    async with asyncio.timeout(20), asyncpg.create_pool(postgres_url, min_size=3, max_size=3) as pool:
        async with PostgresRuntimeRepository(pool, schema=postgres_schema) as repo:
            task = await waiting(repo)
            await listeners(postgres, 1)
            await repo.attempts.enqueue("run")
            assert await task
        await listeners(postgres, 0)
        async with pool.acquire() as one, pool.acquire() as two, pool.acquire() as three:
            assert [await each.fetchval("select 1") for each in (one, two, three)] == [1, 1, 1]


async def test_a_connection_that_hangs_is_noticed(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is cut tells nobody: the connection is asked now and then, and one that is silent is replaced."""
    monkeypatch.setattr("runtime_repo.postgres.database._LISTEN_CHECK", 0.1)
    silent = False
    execute: Callable[..., Awaitable[str]] = asyncpg.Connection.execute

    async def cut(connection: asyncpg.Connection, query: str, *args: object, **options: object) -> str:
        if silent and query.startswith("listen"):
            await asyncio.get_running_loop().create_future()
        return await execute(connection, query, *args, **options)

    monkeypatch.setattr(asyncpg.Connection, "execute", cut)
    async with asyncio.timeout(20), PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as repo:
        task = await waiting(repo)
        (pid,) = await listeners(postgres, 1)
        silent = True
        await listeners(postgres, 1, besides=pid)
        silent = False
        await repo.attempts.enqueue("run")
        assert await task


@pytest.mark.parametrize("name", BRINGS)
async def test_every_verb_that_brings_work_tells(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection, clock: Clock, name: str
) -> None:
    """Nobody who waits looks by himself here, so each of them was told."""
    before, verb = BRINGS[name]
    repo = PostgresRuntimeRepository(postgres_url, schema=postgres_schema)
    other = PostgresRuntimeRepository(postgres_url, schema=postgres_schema)
    async with asyncio.timeout(15), repo, other:
        given = await before(other, clock) if before else None
        task = await waiting(repo)
        await listeners(postgres, 1)
        await verb(other, given)
        assert await task


@pytest.mark.parametrize("whose", ["ours", "theirs"])
async def test_a_transaction_tells_at_its_commit(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection, whose: str
) -> None:
    """Its own, or one of the application's that the repository does not see commit; not before."""
    async with asyncio.timeout(15), PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as repo:
        task = await waiting(repo)
        await listeners(postgres, 1)
        async with contextlib.AsyncExitStack() as stack:
            theirs = None
            if whose == "theirs":
                theirs = await asyncpg.connect(postgres_url)
                stack.push_async_callback(theirs.close)
                await stack.enter_async_context(theirs.transaction())
            async with repo.transaction(theirs) as transaction:
                await transaction.attempts.enqueue("run")
                done, _ = await asyncio.wait([task], timeout=0.1)
                assert not done
        assert await task


async def test_closing_tells_what_is_untold(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """A process that enqueues and ends at once has told."""
    repo = PostgresRuntimeRepository(postgres_url, schema=postgres_schema)
    async with asyncio.timeout(15), repo:
        task = await waiting(repo)
        await listeners(postgres, 1)
        async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as other:
            await other.attempts.enqueue("run")
        assert await task


async def test_hints_that_find_nothing_cost_a_process_few_polls(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """Any login can send them. Those that find work are not held up, however many have found nothing before."""
    looks = 0
    async with asyncio.timeout(20), PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as repo:
        glance = repo._database.glance

        async def counted(query: str, *args: object, within: float) -> Sequence[Row] | None:
            nonlocal looks
            looks += query == "attempts.next"
            return await glance(query, *args, within=within)

        repo._database.glance = counted  # type: ignore[method-assign]
        tasks = [await waiting(repo, "mail") for _ in range(10)]
        await listeners(postgres, 1)
        await asyncio.sleep(1.1)
        looks = 0
        ends = time.monotonic() + 1.5
        while time.monotonic() < ends:
            await postgres.execute(f"notify {repo._postgres._channel}, 'mail'")
            await asyncio.sleep(0.002)
        assert 8 <= looks <= 16
        await asyncio.sleep(1.1)
        began = time.monotonic()
        await repo.attempts.enqueue("run", queue="mail")
        assert await asyncio.gather(*tasks) == [True] * 10
        assert time.monotonic() - began < 0.9
