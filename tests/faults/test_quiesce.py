"""What claims that have begun may do while somebody quiesces: they are waited for, and nobody else waits."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import asyncpg
import pytest

from runtime_repo import NewAttempt, NotQuietError, PostgresRuntimeRepository, QuiesceProgress, RuntimeRepository
from tests.contract.conftest import eventually
from tests.lab import Lab

LONG = timedelta(seconds=20)
SOON = timedelta(milliseconds=300)


@pytest.fixture
async def repo(postgres_url: str, postgres_schema: str) -> AsyncIterator[PostgresRuntimeRepository]:
    """A store with two attempts that are ready."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as repository:
        await repository.attempts.enqueue_many([NewAttempt("run", "a"), NewAttempt("run", "b")])
        yield repository


async def test_a_claim_in_mid_statement_is_waited_for(
    repo: PostgresRuntimeRepository, postgres: asyncpg.Connection, postgres_schema: str
) -> None:
    """It has chosen its attempt by what was there before the switch, and waits for a row: it still takes a lease."""
    seen: list[QuiesceProgress] = []
    async with asyncio.timeout(20):
        held = postgres.transaction()
        await held.start()
        await postgres.execute(f"select from {postgres_schema}.runtime_attempts where attempt_id = 'a' for update")
        claim = asyncio.create_task(repo.leases.claim("worker"))
        done, _ = await asyncio.wait([claim], timeout=0.3)
        assert not done
        quiesce = asyncio.create_task(repo.control.quiesce(timeout=LONG, progress=seen.append))
        await eventually(lambda: seen)
        assert len(seen[0].claims) == 1
        assert seen[0].holders == ()
        await held.rollback()
        (lease,) = await claim
        await eventually(lambda: seen[-1].leases)
        await repo.attempts.complete(lease)
        await quiesce
    assert await repo.leases.list() == []


WAITING = """
select count(*)
  from pg_locks
 where not granted
   and relation = to_regclass($1)
"""


async def test_nobody_else_waits_for_that(
    repo: PostgresRuntimeRepository, postgres: asyncpg.Connection, postgres_schema: str
) -> None:
    """No lock of a table is asked for, behind which everybody's writes would queue, and which a vacuum would refuse."""
    attempts = f"{postgres_schema}.runtime_attempts"
    async with asyncio.timeout(20):
        (lease,) = await repo.leases.claim("worker")
        async with postgres.transaction():
            await postgres.execute(f"update {attempts} set error = 'x' where attempt_id = 'b'")
            quiesce = asyncio.create_task(repo.control.quiesce(timeout=LONG))
            for _ in range(20):
                await repo.attempts.enqueue("run")
                assert await postgres.fetchval(WAITING, attempts) == 0
                await asyncio.sleep(0.02)
            assert not quiesce.done()
        await repo.attempts.complete(lease)
        await quiesce


@pytest.mark.parametrize("verb", ["quiesce", "pause"])
async def test_who_stands_in_the_way_is_named(
    repo: PostgresRuntimeRepository, postgres: asyncpg.Connection, postgres_schema: str, verb: str
) -> None:
    """By his process; and one that only reads, or has begun later, does not."""
    async with postgres.transaction():
        await postgres.execute(f"select count(*) from {postgres_schema}.runtime_attempts")
        await repo.control.quiesce(timeout=SOON)
        await repo.control.resume()
    async with postgres.transaction():
        await postgres.execute(f"delete from {postgres_schema}.runtime_attempts where attempt_id = 'b'")
        with pytest.raises(NotQuietError, match="may still claim") as caught:
            await (repo.control.quiesce(timeout=SOON) if verb == "quiesce" else repo.control.pause("q", timeout=SOON))
    (claim,) = caught.value.claims
    assert claim.pid == postgres.get_server_pid()
    assert claim.client_address
    assert caught.value.holders == ()


async def test_among_rivals_nothing_is_held_once_it_is_quiet(lab: Lab) -> None:
    """However many claim at that very moment, in processes of their own as it were: nobody's lease comes afterwards."""
    async with asyncio.timeout(60), lab.repository() as operator, lab.repository() as one, lab.repository() as two:
        await operator.attempts.enqueue_many([NewAttempt("run") for _ in range(5000)])
        claimed = 0

        async def work(repo: RuntimeRepository, number: int) -> None:
            nonlocal claimed
            while True:
                leases = await repo.leases.claim(f"worker {number}", limit=1 + number % 3)
                claimed += len(leases)
                for lease in leases:
                    await repo.attempts.complete(lease)

        workers = [asyncio.create_task(work((one, two)[number % 2], number)) for number in range(8)]
        try:
            for _ in range(12):
                before = claimed
                while claimed == before:  # noqa: ASYNC110 - eight set it
                    await asyncio.sleep(0.001)
                await operator.control.quiesce(timeout=LONG)
                quiet = claimed
                assert await operator.leases.list() == []
                await asyncio.sleep(0.03)
                assert await operator.leases.list() == []
                assert claimed == quiet
                await operator.control.resume()
        finally:
            for worker in workers:
                worker.cancel()
            ends = await asyncio.gather(*workers, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
