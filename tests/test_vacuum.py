"""The library vacuums what its claims leave behind on PostgreSQL: by a verb, and by a worker that has claimed much."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from runtime_repo import ConfigurationError, Lease, NewAttempt, PostgresRuntimeRepository, RuntimeRepository, Worker
from runtime_repo import worker as worker_module
from tests.contract.conftest import eventually
from tests.contract.test_worker import running

NARROW = ["runtime_leases", "runtime_queue"]


@pytest.fixture
async def store(postgres_url: str, postgres_schema: str) -> AsyncIterator[PostgresRuntimeRepository]:
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as store:
        yield store


async def vacuumed(postgres: asyncpg.Connection, schema: str) -> list[str]:
    """Which tables somebody has vacuumed."""
    await postgres.execute("select pg_stat_clear_snapshot()")
    rows = await postgres.fetch(
        "select relname from pg_stat_all_tables where schemaname = $1 and vacuum_count > 0 order by relname", schema
    )
    return [row["relname"] for row in rows]


async def test_the_narrow_tables_are_vacuumed(
    store: PostgresRuntimeRepository, postgres: asyncpg.Connection, postgres_schema: str
) -> None:
    """Those that every claim writes to, and no other."""
    await store.attempts.vacuum()
    assert await vacuumed(postgres, postgres_schema) == NARROW


async def test_who_may_not_vacuum_is_not_told(
    store: PostgresRuntimeRepository, postgres: asyncpg.Connection, postgres_schema: str
) -> None:
    """A worker's role owns nothing; PostgreSQL warns it and goes on."""
    role = f"{postgres_schema}_worker"
    await postgres.execute(f"create role {role}; grant usage on schema {postgres_schema} to {role}")
    await postgres.execute(f"grant select, insert, update, delete on all tables in schema {postgres_schema} to {role}")
    try:
        async with store.transaction() as transaction:
            await transaction.connection.execute(f"set role {role}")
        await store.attempts.vacuum()
        async with store.transaction() as transaction:
            assert await transaction.connection.fetchval("select current_user") == role
            await transaction.connection.execute("reset role")
        assert await vacuumed(postgres, postgres_schema) == []
    finally:
        await postgres.execute(f"drop owned by {role}; drop role {role}")


async def test_a_worker_vacuums_what_it_has_claimed(
    store: PostgresRuntimeRepository,
    postgres: asyncpg.Connection,
    postgres_schema: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After so many claims, not before."""

    async def work(_: Lease) -> None:
        pass

    monkeypatch.setattr(worker_module, "_WORN", 10)
    worker = Worker(store, work)
    async with running(worker):
        await store.attempts.enqueue_many([NewAttempt("run") for _ in range(9)])
        await eventually(lambda: worker._claimed == 9)
        assert not worker._is_worn.is_set()
        await store.attempts.enqueue("run")
        async with asyncio.timeout(10):
            while await vacuumed(postgres, postgres_schema) != NARROW:  # noqa: ASYNC110 - only the server knows
                await asyncio.sleep(0.01)


async def test_a_transaction_cannot_vacuum(store: RuntimeRepository) -> None:
    """PostgreSQL would refuse it, and spoil the transaction."""
    async with store.transaction() as transaction:
        with pytest.raises(ConfigurationError, match="outside of it"):
            await transaction.attempts.vacuum()
        await transaction.attempts.enqueue("run")
