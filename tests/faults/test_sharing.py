"""PostgreSQL: completions that meet share one statement, and each succeeds, fails or is given up by itself."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg
import pytest

from runtime_repo import (
    Attempt,
    AttemptStatus,
    Lease,
    LeaseLostError,
    NewAttempt,
    PostgresRuntimeRepository,
    RefusedError,
)
from runtime_repo.database import Row
from runtime_repo.postgres import sharing
from tests.faults.test_silence import SOON, Make, Relay, make, relay, within

__all__ = ["make", "relay"]

MANY = 10
"""Completions that meet."""


@pytest.fixture
async def repo(postgres_url: str, postgres_schema: str) -> AsyncIterator[PostgresRuntimeRepository]:
    """A repository with as many connections as calls."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema, max_size=MANY) as repo:
        yield repo


async def held(repo: PostgresRuntimeRepository, count: int = MANY) -> list[Lease]:
    """Leases of attempts 0, 1, ..."""
    await repo.attempts.enqueue_many(NewAttempt("run", str(number)) for number in range(count))
    return sorted(await repo.leases.claim("worker", limit=count), key=lambda lease: lease.attempt_id)


async def completed(repo: PostgresRuntimeRepository, leases: Sequence[Lease]) -> list[Attempt | BaseException]:
    """Complete all at once, each with its id."""
    calls = (repo.attempts.complete(lease, lease.attempt_id) for lease in leases)
    return await asyncio.gather(*calls, return_exceptions=True)


def counted(repo: PostgresRuntimeRepository, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The queries that are made from now on."""
    queries: list[str] = []
    made = repo._postgres._verb

    async def verb(connection: Any, query: str, args: Sequence[object]) -> Sequence[Row]:
        if query.startswith("attempts."):
            queries.append(query)
        return await made(connection, query, args)

    monkeypatch.setattr(repo._postgres, "_verb", verb)
    return queries


def results(found: Sequence[Attempt | BaseException]) -> list[object]:
    """The result of each, or the kind of its error."""
    return [each.result if isinstance(each, Attempt) else type(each) for each in found]


async def test_completions_that_meet_share_a_statement(
    repo: PostgresRuntimeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its own result; one that comes alone, and one with a long result, has a statement of its own."""
    leases = await held(repo, MANY + 2)
    *leases, long, alone = leases
    queries = counted(repo, monkeypatch)
    both = await asyncio.gather(completed(repo, leases), repo.attempts.complete(long, "x" * 20_000))
    assert results(both[0]) == [lease.attempt_id for lease in leases]
    assert sorted(queries) == ["attempts.complete", "attempts.complete_shared"]
    assert (await repo.attempts.complete(alone, "last")).result == "last"
    assert queries[2:] == ["attempts.complete"]
    assert await repo.leases.list() == []
    assert {attempt.status for attempt in await repo.attempts.list()} == {AttemptStatus.COMPLETED}


async def test_each_that_has_lost_its_lease_hears_of_it_alone(repo: PostgresRuntimeRepository) -> None:
    """Cancelled, requeued, given twice, done before: the others' results are stored."""
    leases = await held(repo)
    await repo.attempts.cancel("1")
    await repo.leases.release(leases[2])
    await repo.attempts.complete(leases[3], "before")
    found = results(await completed(repo, [*leases, leases[4]]))
    assert found == ["0", LeaseLostError, LeaseLostError, "before", *"456789", "4"]


async def test_one_that_is_refused_refuses_no_other(
    repo: PostgresRuntimeRepository, postgres: asyncpg.Connection, postgres_schema: str
) -> None:
    """As where a trigger does not like it."""
    leases = await held(repo)
    await postgres.execute(
        f"create function {postgres_schema}.no() returns trigger language plpgsql as $$begin "
        "if new.attempt_id = '5' then raise 'no'; elsif new.attempt_id = '6' then return null; end if; "
        "return new; end$$; "
        f"create trigger no before update on {postgres_schema}.runtime_attempts "
        f"for each row execute function {postgres_schema}.no()"
    )
    assert results(await completed(repo, leases)) == [*"01234", RefusedError, RefusedError, *"789"]


async def test_whoever_waits_for_a_row_waits_alone(
    repo: PostgresRuntimeRepository, postgres_url: str, postgres_schema: str
) -> None:
    """The row of one attempt is locked by somebody's transaction."""
    leases = await held(repo)
    other = await asyncpg.connect(postgres_url)
    try:
        async with asyncio.timeout(20):
            async with other.transaction():
                await other.execute(f"select from {postgres_schema}.runtime_attempts where attempt_id = '0' for update")
                first, *others = [asyncio.ensure_future(repo.attempts.complete(lease)) for lease in leases]
                await asyncio.gather(*others)
                assert not first.done()
            await first
    finally:
        await other.close()


@pytest.mark.parametrize("which", [0, 3], ids=["who asks for all", "another"])
@pytest.mark.parametrize("turns", range(12))
async def test_whoever_is_cancelled_costs_the_others_nothing(
    repo: PostgresRuntimeRepository, which: int, turns: int
) -> None:
    """At any moment; what was cancelled may have happened, and can be repeated."""
    leases = await held(repo)
    tasks = [asyncio.ensure_future(repo.attempts.complete(lease, lease.attempt_id)) for lease in leases]
    for _ in range(turns):
        await asyncio.sleep(0 if turns < 6 else 0.0005)
    tasks[which].cancel()
    found = results(await asyncio.gather(*tasks, return_exceptions=True))
    assert found.pop(which) in (asyncio.CancelledError, str(which))
    assert found == [lease.attempt_id for lease in leases if lease is not leases[which]]
    assert (await repo.attempts.complete(leases[which], str(which))).result == str(which)


async def test_a_silent_connection_is_nobodys_trouble_for_long(
    relay: Relay, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has no answer soon asks alone, on another connection; closing does not wait for what was silent."""
    monkeypatch.setattr(sharing, "_PATIENCE", 0.2)
    repo = await make()
    leases = await held(repo)
    relay.cut()
    tasks = [asyncio.ensure_future(repo.attempts.complete(lease)) for lease in leases]
    # Another idle one may be as dead: whoever meets that waits by himself.
    with within(0.2 + SOON):
        while sum(task.done() for task in tasks) < MANY - 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert {task.result().status for task in tasks if task.done()} == {AttemptStatus.COMPLETED}
    with within(SOON):
        await repo.close()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [task for task in asyncio.all_tasks() if task.get_name() == "runtime_repo sharing"] == []
