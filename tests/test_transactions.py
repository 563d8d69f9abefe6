"""What transactions can do on one of the databases only."""

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import asyncpg
import pytest

from runtime_repo import (
    ConfigurationError,
    DatabaseUnavailableError,
    NewAttempt,
    PayloadMismatchError,
    PostgresRuntimeRepository,
    SqliteRuntimeRepository,
)


async def test_sqlite_lets_the_other_tasks_wait(tmp_path: Path) -> None:
    """In turn, each after the other, however many begin at once; also in two repositories on one file."""
    async with SqliteRuntimeRepository(tmp_path / "x.db") as one, SqliteRuntimeRepository(tmp_path / "x.db") as two:

        async def add(repo: SqliteRuntimeRepository, number: int) -> None:
            async with repo.transaction() as transaction:
                before = len(await transaction.attempts.list())
                await asyncio.sleep(0)
                await transaction.attempts.enqueue("run", attempt_id=f"{number:02}")
                assert len(await transaction.attempts.list()) == before + 1

        await asyncio.gather(
            *(add(repo, 2 * number + half) for number in range(8) for half, repo in ((0, one), (1, two)))
        )
        assert len(await one.attempts.list()) == 16


async def test_sqlite_waits_for_readers_to_commit(tmp_path: Path) -> None:
    """A file that others keep from its switch to WAL serves all the same: whoever reads it only holds up a commit."""
    path = tmp_path / "x.db"
    async with SqliteRuntimeRepository(path):
        pass
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("pragma journal_mode = delete").fetchone()
        reader.execute("begin")
        reader.execute("select count(*) from runtime_attempts").fetchone()
        async with SqliteRuntimeRepository(path) as repo:
            asyncio.get_running_loop().call_later(0.3, reader.execute, "commit")
            async with repo.transaction() as transaction:
                await transaction.attempts.enqueue("run")
            assert len(await repo.attempts.list()) == 1
        reader.execute("begin")
        reader.execute("select count(*) from runtime_attempts").fetchone()
        async with SqliteRuntimeRepository(path, lock_timeout=0.1) as repo:
            with pytest.raises(DatabaseUnavailableError, match=r"more than 0\.1 s"):
                async with repo.transaction() as transaction:
                    await transaction.attempts.enqueue("run")
            reader.execute("commit")
            assert len(await repo.attempts.list()) == 1


async def test_postgres_takes_part_in_a_transaction_of_the_application(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """Committed and rolled back with it, on the application's own connection; a part that fails is undone alone."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as repo:
        for commits in (False, True):
            outer = postgres.transaction()
            await outer.start()
            await postgres.execute(f'create table "{postgres_schema}".orders (name text)')
            async with repo.transaction(postgres) as transaction:
                assert transaction.connection is postgres
                await transaction.attempts.enqueue("run", attempt_id="a", payload=1)
            with pytest.raises(PayloadMismatchError):  # noqa: PT012 - the whole block fails
                async with repo.transaction(postgres) as transaction:
                    await transaction.attempts.enqueue("run", attempt_id="b")
                    await transaction.attempts.enqueue_many([NewAttempt("run", "a", payload=2)])
            assert await repo.attempts.find("a") is None
            await (outer.commit() if commits else outer.rollback())
            stored = [attempt.attempt_id for attempt in await repo.attempts.list()]
            assert stored == (["a"] if commits else [])
            there = await postgres.fetchval("select to_regclass($1) is not null", f'"{postgres_schema}".orders')
            assert there is commits


async def test_postgres_refuses_the_repository_in_a_transaction_of_the_application(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """It would wait for the locks of that transaction, which only this task can end."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as repo, postgres.transaction():
        async with repo.transaction(postgres) as transaction:
            with pytest.raises(ConfigurationError, match="nouns of the transaction"):
                await repo.attempts.list()
            with pytest.raises(ConfigurationError, match="nouns of the transaction"):
                async with repo.transaction(postgres):
                    pytest.fail("it began")
            await transaction.attempts.enqueue("run")
        assert await repo.attempts.list() == []


async def test_postgres_refuses_a_connection_without_a_transaction(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """Each verb would commit on its own, which nobody who names a connection wants."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as repo:
        pool = await asyncpg.create_pool(postgres_url, min_size=1, max_size=1)
        async with pool, pool.acquire() as given_back:
            pass
        for connection in (postgres, given_back):
            with pytest.raises(ConfigurationError, match="no transaction is open"):
                async with repo.transaction(connection):
                    pytest.fail("it began")


async def test_postgres_loses_no_error_to_a_connection_that_cannot_be_given_back(
    postgres_url: str, postgres_schema: str
) -> None:
    """A task of the block's still uses the connection when the block fails: it is dropped, and nothing is committed."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema, max_size=1) as repo:
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the whole block fails
            async with repo.transaction() as transaction:
                await transaction.attempts.enqueue("run")
                left = asyncio.ensure_future(transaction.connection.execute("select pg_sleep(60)"))
                await asyncio.sleep(0)
                raise ZeroDivisionError
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
            await left
        assert await repo.attempts.list() == []
