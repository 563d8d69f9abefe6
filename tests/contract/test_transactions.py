"""Transactions: several verbs, and the application's own statements, take effect together or not at all."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable
from datetime import timedelta

import anyio
import asyncpg
import pytest

from runtime_repo import (
    ConfigurationError,
    DatabaseUnavailableError,
    LeaseLostError,
    NewAttempt,
    PayloadMismatchError,
    RepositoryClosedError,
    RuntimeRepository,
    RuntimeTransaction,
)
from tests.contract.conftest import Factory, execute, runtime_schema


async def ids(repo: RuntimeRepository | RuntimeTransaction) -> list[str]:
    """What is stored."""
    return [attempt.attempt_id for attempt in await repo.attempts.list()]


async def test_verbs_commit_together(factory: Factory) -> None:
    """They see each other's writes at once; everybody else sees them when the block has ended."""
    async with factory() as repo, factory() as other:
        async with repo.transaction() as transaction:
            await transaction.attempts.enqueue("run", attempt_id="a")
            (lease,) = await transaction.leases.claim("worker")
            await transaction.attempts.complete(lease, "done")
            await transaction.attempts.enqueue("run", attempt_id="b")
            assert await ids(transaction) == ["a", "b"]
            assert await ids(other) == []
        assert await ids(other) == ["a", "b"]
        assert (await other.attempts.get("a")).result == "done"


async def test_verbs_fail_together(repo: RuntimeRepository) -> None:
    """An error of whoever's undoes all, and comes out as it is."""
    await repo.attempts.enqueue("run", attempt_id="kept")
    (lease,) = await repo.leases.claim("worker")
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the whole block fails
        async with repo.transaction() as transaction:
            await transaction.attempts.complete(lease)
            await transaction.attempts.enqueue("run", attempt_id="a")
            raise ZeroDivisionError
    assert await ids(repo) == ["kept"]
    assert await repo.leases.list() == [lease]
    await repo.leases.release(lease)
    with pytest.raises(LeaseLostError):  # noqa: PT012
        async with repo.transaction() as transaction:
            await transaction.attempts.enqueue("run", attempt_id="a")
            await transaction.attempts.complete(lease)
    assert await ids(repo) == ["kept"]


async def test_the_applications_own_statements_are_part_of_it(repo: RuntimeRepository) -> None:
    """An order and its attempt are stored both, or neither; an error of the application's SQL is the driver's."""
    orders = f"{runtime_schema(repo)}.orders"
    await execute(repo, f"create table {orders} (name text primary key)")

    async def order(name: str) -> None:
        async with repo.transaction() as transaction:
            await transaction.attempts.enqueue("run", queue="orders")
            await transaction.connection.execute(f"insert into {orders} (name) values ('{name}')")

    await order("first")
    with pytest.raises((sqlite3.IntegrityError, asyncpg.UniqueViolationError)):
        await order("first")
    assert len(await repo.attempts.list(queue="orders")) == 1


async def test_what_is_not_committed_is_an_error(repo: RuntimeRepository) -> None:
    """
    A statement that failed, and whose error the application caught: where the rest is lost by that, it is told.

    PostgreSQL rolls all of it back, and answers COMMIT as if nothing were wrong; SQLite keeps the rest.
    """
    orders = f"{runtime_schema(repo)}.orders"
    await execute(repo, f"create table {orders} (name text primary key)")
    await execute(repo, f"insert into {orders} (name) values ('first')")
    told = False
    try:
        async with repo.transaction() as transaction:
            await transaction.attempts.enqueue("run", attempt_id="a")
            with contextlib.suppress(sqlite3.IntegrityError, asyncpg.UniqueViolationError):
                await transaction.connection.execute(f"insert into {orders} (name) values ('first')")
    except DatabaseUnavailableError as error:
        told = "rolled back" in str(error)
    assert await ids(repo) == ([] if told else ["a"])
    await repo.attempts.enqueue("run", attempt_id="b")


async def test_a_part_that_fails_alone_can_be_caught(repo: RuntimeRepository) -> None:
    """Many that were refused leave nothing behind, and what was done before and after them stays."""
    async with repo.transaction() as transaction:
        await transaction.attempts.enqueue("run", attempt_id="a", payload=1)
        with pytest.raises(PayloadMismatchError):
            await transaction.attempts.enqueue_many([NewAttempt("run", "x"), NewAttempt("run", "a", payload=2)])
        await transaction.attempts.enqueue_many([NewAttempt("run", "b"), NewAttempt("run", "c")])
    assert await ids(repo) == ["a", "b", "c"]


async def test_tasks_of_the_block_take_turns(repo: RuntimeRepository) -> None:
    """What is refused undoes itself alone, and nothing that another task does at the same time."""
    await repo.attempts.enqueue("run", attempt_id="taken", payload=1)
    async with repo.transaction() as transaction:
        enqueue, enqueue_many = transaction.attempts.enqueue, transaction.attempts.enqueue_many
        refused, *_ = await asyncio.gather(
            enqueue_many([NewAttempt("run", "x"), NewAttempt("run", "taken", payload=2)]),
            enqueue_many([NewAttempt("run", "a")]),
            *(enqueue("run", attempt_id=name) for name in "bcdef"),
            return_exceptions=True,
        )
        assert isinstance(refused, PayloadMismatchError)
    assert await ids(repo) == ["a", "b", "c", "d", "e", "f", "taken"]


USES: dict[str, Callable[[RuntimeRepository], Awaitable[object]]] = {
    "list": lambda repo: repo.attempts.list(),
    "enqueue_many": lambda repo: repo.attempts.enqueue_many([NewAttempt("run")]),
    "claim": lambda repo: repo.leases.claim("worker"),
    "wait": lambda repo: repo.attempts.wait(timeout=timedelta(seconds=5)),
    "transaction": lambda repo: repo.transaction().__aenter__(),
    "ensure_schema": lambda repo: repo.ensure_schema(),
    "inspect": lambda repo: repo.inspect(),
    "plan": lambda repo: repo.plan(),
    "status": lambda repo: repo.status(),
    "activity": lambda repo: repo.activity(),
    "doctor": lambda repo: repo.doctor(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
async def test_a_task_is_refused_the_repository_in_its_own_transaction(
    repo: RuntimeRepository, use: Callable[[RuntimeRepository], Awaitable[object]]
) -> None:
    """Who takes the one for the other would write outside of it, and wait for what only its own end brings."""
    async with asyncio.timeout(5), repo.transaction() as transaction:
        with pytest.raises(ConfigurationError, match="nouns of the transaction"):
            await use(repo)
        await transaction.attempts.enqueue("run", attempt_id="a")
    assert await ids(repo) == ["a"]


async def test_it_is_refused_until_the_block_has_ended_and_to_no_other_task(repo: RuntimeRepository) -> None:
    """Also when the block fails; a task that it starts is another, and may wait for it."""
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the whole block fails
        async with repo.transaction() as transaction:
            child = asyncio.create_task(repo.attempts.enqueue("run", attempt_id="child"))
            await transaction.attempts.enqueue("run", attempt_id="a")
            raise ZeroDivisionError
    await child
    assert await ids(repo) == ["child"]


async def test_as_many_as_the_pool_has_connections_may_mistake_it_at_once(repo: RuntimeRepository) -> None:
    """Each is refused, and everybody else goes on."""

    async def place(number: int) -> None:
        async with repo.transaction() as transaction:
            await transaction.attempts.enqueue("run", attempt_id=f"{number:02}")
            await repo.attempts.enqueue("run")

    async with asyncio.timeout(10):
        failed = await asyncio.gather(*(place(number) for number in range(10)), return_exceptions=True)
        assert [type(error) for error in failed] == [ConfigurationError] * 10
        assert await ids(repo) == []


async def test_its_nouns_end_with_it(repo: RuntimeRepository) -> None:
    """What the block yielded can't write outside of any transaction."""
    async with repo.transaction() as transaction:
        pass
    with pytest.raises(RepositoryClosedError, match="transaction has ended"):
        await transaction.attempts.enqueue("run")
    with pytest.raises(RepositoryClosedError, match="transaction has ended"):
        await transaction.attempts.enqueue_many([NewAttempt("run")])


async def test_only_an_open_repository_begins_one(factory: Factory) -> None:
    """Neither before it was awaited nor after it was closed."""
    repo = factory()
    for _ in range(2):
        with pytest.raises(RepositoryClosedError):
            async with repo.transaction():
                pytest.fail("it began")
        async with factory() as other:
            await other.attempts.list()
        await repo.close()


@pytest.mark.parametrize("by", ["task", "scope"])
async def test_a_cancelled_block_leaves_nothing(repo: RuntimeRepository, by: str) -> None:
    """No write, no lock, no open transaction: the next one begins at once. asyncio's way, and anyio's."""
    reached = asyncio.Event()

    async def block() -> None:
        async with repo.transaction() as transaction:
            await transaction.attempts.enqueue("run", attempt_id="a")
            reached.set()
            await asyncio.Event().wait()

    if by == "task":
        task = asyncio.ensure_future(block())
        await reached.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(block)
            await reached.wait()
            group.cancel_scope.cancel()
    async with asyncio.timeout(5), repo.transaction() as transaction:
        assert await ids(transaction) == []
        await transaction.attempts.enqueue("run", attempt_id="b")
    assert await ids(repo) == ["b"]


async def test_cancelled_at_every_await_it_is_done_or_not(factory: Factory) -> None:
    """Wherever the cancellation strikes, both writes are there or none, and the repository goes on."""

    async def block(repo: RuntimeRepository, name: str) -> None:
        async with repo.transaction() as transaction:
            await transaction.attempts.enqueue("run", attempt_id=f"{name}-1")
            await transaction.attempts.enqueue_many([NewAttempt("run", f"{name}-2")])

    async with factory() as repo:
        turns = 0
        finished = False
        while not finished:
            task = asyncio.ensure_future(block(repo, f"{turns:03}"))
            for _ in range(turns):
                await asyncio.sleep(0)
            finished = task.done()
            task.cancel()
            await asyncio.wait([task])
            turns += 1
            assert turns < 2000
        stored = [attempt.attempt_id for attempt in await repo.attempts.list(limit=10_000)]
    names = [name.split("-")[0] for name in stored]
    assert all(names.count(name) == 2 for name in names)
    assert f"{turns - 1:03}" in names


async def test_other_tasks_verbs_are_not_part_of_it(repo: RuntimeRepository) -> None:
    """What another task writes meanwhile stays when the block fails."""
    began, over = asyncio.Event(), asyncio.Event()

    async def rival() -> None:
        await began.wait()
        await repo.attempts.enqueue("run", attempt_id="rival")
        over.set()

    async def block() -> None:
        async with repo.transaction() as transaction:
            await transaction.attempts.enqueue("run", attempt_id="a")
            began.set()
            for _ in range(20):
                await transaction.attempts.list()
            raise ZeroDivisionError

    failed, _ = await asyncio.gather(block(), rival(), return_exceptions=True)
    assert isinstance(failed, ZeroDivisionError)
    assert over.is_set()
    assert await ids(repo) == ["rival"]


async def test_a_task_is_refused_to_hold_a_lease_in_its_own_transaction(repo: RuntimeRepository) -> None:
    """Its heartbeats would wait for the block, or the block for them."""
    await repo.attempts.enqueue("run", attempt_id="a")
    (lease,) = await repo.leases.claim("worker")
    async with repo.transaction():
        with pytest.raises(ConfigurationError, match="nouns of the transaction"):
            async with repo.leases.hold(lease):
                pytest.fail("it was held")
    async with repo.leases.hold(lease), repo.transaction() as transaction:
        await transaction.attempts.complete(lease)
