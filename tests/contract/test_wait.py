"""Waiting for work: whoever brings it, and however, the one who waits learns it."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from runtime_repo import (
    ConfigurationError,
    DatabaseUnavailableError,
    Lease,
    NewAttempt,
    PostgresRuntimeRepository,
    RepositoryClosedError,
    RuntimeRepository,
    SqliteRuntimeRepository,
    attempts,
)
from tests.contract.conftest import Clock, Factory, runtime_schema
from tests.verbs import CALLS, prepare, verbs

NOTHING = timedelta(0)
LONG = timedelta(seconds=20)
SOON = timedelta(milliseconds=100)


async def waiting(repo: RuntimeRepository, queues: str | list[str] = "default") -> "asyncio.Task[bool]":
    """A task that has looked, found nothing and waits."""
    assert not await repo.attempts.wait(queues, NOTHING)
    task = asyncio.create_task(repo.attempts.wait(queues, LONG))
    done, _ = await asyncio.wait([task], timeout=0.2)
    assert not done
    return task


async def test_what_is_ready_is_not_waited_for(repo: RuntimeRepository) -> None:
    """Also in the second of several queues; what another queue has is nobody's business here."""
    assert not await repo.attempts.wait(timeout=NOTHING)
    await repo.attempts.enqueue("run", queue="mail")
    assert await repo.attempts.wait("mail")
    assert await repo.attempts.wait(["default", "mail"])
    assert not await repo.attempts.wait(["default", "letters"], NOTHING)


async def test_what_is_delayed_is_waited_for_until_its_time(repo: RuntimeRepository, clock: Clock) -> None:
    """Without a hint from anybody, for the database knows when."""
    await repo.attempts.enqueue("run", not_before=clock.now + LONG, now=clock.now)
    assert not await repo.attempts.wait(timeout=NOTHING, now=clock.now + LONG - timedelta(seconds=5))
    assert await repo.attempts.wait(now=clock.now + LONG)
    async with asyncio.timeout(10):
        # The rest of the wait is real: a tenth of a second.
        assert await repo.attempts.wait(timeout=LONG, now=clock.now + LONG - SOON)


async def held(repo: RuntimeRepository, clock: Clock) -> Lease:
    """A lease on the only attempt there is."""
    await repo.attempts.enqueue("run", attempt_id="a", now=clock.now)
    (lease,) = await repo.leases.claim("worker", ttl=SOON, now=clock.now)
    return lease


async def failed(repo: RuntimeRepository, clock: Clock) -> Lease:
    """A lease that has ended with a failure for good."""
    lease = await held(repo, clock)
    await repo.attempts.fail(lease, "no")
    return lease


async def quiesced(repo: RuntimeRepository, clock: Clock) -> Lease:
    """Something is ready, and nobody may claim it; a lease on something else that has ended."""
    lease = await failed(repo, clock)
    await repo.attempts.enqueue("run")
    await repo.control.quiesce()
    return lease


async def paused(repo: RuntimeRepository, clock: Clock) -> Lease:
    """As above, of one queue."""
    lease = await failed(repo, clock)
    await repo.attempts.enqueue("run", queue="mail")
    await repo.control.pause("mail")
    return lease


Verb = Callable[[RuntimeRepository, Any], Awaitable[object]]
BRINGS: dict[str, tuple[Callable[[RuntimeRepository, Clock], Awaitable[Lease]] | None, Verb]] = {
    "attempts.enqueue": (None, lambda repo, _: repo.attempts.enqueue("run")),
    "attempts.enqueue, delayed": (
        None,
        lambda repo, _: repo.attempts.enqueue("run", not_before=datetime.now(UTC) + SOON),
    ),
    "attempts.enqueue_many": (
        None,
        lambda repo, _: repo.attempts.enqueue_many([NewAttempt("run") for _ in range(100)]),
    ),
    "attempts.fail, with a retry": (held, lambda repo, lease: repo.attempts.fail(lease, "no", retry_in=SOON)),
    "leases.release": (held, lambda repo, lease: repo.leases.release(lease)),
    "leases.release, later": (held, lambda repo, lease: repo.leases.release(lease, delay=SOON)),
    "leases.requeue_expired": (held, lambda repo, lease: repo.leases.requeue_expired(now=lease.expires_at)),
    "attempts.retry": (failed, lambda repo, lease: repo.attempts.retry(lease.attempt_id)),
    "attempts.retry_many": (failed, lambda repo, _: repo.attempts.retry_many(actor="ann")),
    "control.resume": (quiesced, lambda repo, _: repo.control.resume()),
}


@pytest.mark.parametrize("name", BRINGS)
async def test_whoever_brings_work_wakes_those_who_wait(factory: Factory, clock: Clock, name: str) -> None:
    """In another process as in this one, by whatever verb: nobody looks away from it until the timeout."""
    before, verb = BRINGS[name]
    async with asyncio.timeout(15), factory() as repo, factory() as other:
        given = await before(other, clock) if before else None
        tasks = [await waiting(repo), await waiting(repo, ["mail", "default"]), await waiting(other)]
        await verb(other, given)
        assert await asyncio.gather(*tasks) == [True, True, True]


async def test_a_queue_that_is_resumed_wakes_those_who_wait_for_it(factory: Factory, clock: Clock) -> None:
    """In another process as in this one; who waits for others only waits on."""
    async with asyncio.timeout(15), factory() as repo, factory() as other:
        await paused(other, clock)
        tasks = [await waiting(repo, "mail"), await waiting(repo, ["default", "mail"]), await waiting(other, "mail")]
        idle = await waiting(repo)
        await other.control.resume("mail")
        assert await asyncio.gather(*tasks) == [True, True, True]
        assert not idle.done()
        idle.cancel()


async def test_no_other_verb_brings_work(repo: RuntimeRepository, clock: Clock) -> None:
    """Of any noun: what makes something ready is in the table above, and wakes whoever waits."""
    outside = {"attempts.wait", "attempts.vacuum", "leases.hold", "control.quiesce", "control.pause"}
    for name in CALLS.keys() - BRINGS.keys() - outside:
        with contextlib.suppress(ZeroDivisionError):
            async with repo.transaction() as transaction:
                lease = await prepare(transaction, clock.now)
                await CALLS[name](transaction, lease, clock.now)
                assert await transaction.attempts.list_dispatchable(now=clock.now) == [], name
                raise ZeroDivisionError


def test_every_verb_is_called(repo: RuntimeRepository) -> None:
    """Of every noun: a new one is not forgotten, here and wherever all are called."""
    assert CALLS.keys() == verbs(repo).keys()
    assert {name.split(",")[0] for name in BRINGS} <= CALLS.keys()


async def test_what_is_taken_back_wakes_nobody(factory: Factory) -> None:
    """A transaction that is rolled back has brought nothing; one that is committed has, at its commit."""
    async with asyncio.timeout(15), factory() as repo, factory() as other:
        task = await waiting(repo)
        with contextlib.suppress(ZeroDivisionError):
            async with other.transaction() as transaction:
                await transaction.attempts.enqueue("run")
                raise ZeroDivisionError
        done, _ = await asyncio.wait([task], timeout=0.2)
        assert not done
        async with other.transaction() as transaction:
            await transaction.attempts.enqueue("run")
        assert await task


async def test_a_transaction_does_not_wait(repo: RuntimeRepository) -> None:
    """It would wait for what it cannot see."""
    async with repo.transaction() as transaction:
        with pytest.raises(ConfigurationError, match="outside"):
            await transaction.attempts.wait(timeout=NOTHING)


async def test_who_waits_learns_that_the_repository_is_closed(factory: Factory) -> None:
    """At once, not when it would have looked again."""
    async with asyncio.timeout(2):
        repo = await factory()
        task = await waiting(repo)
        await repo.close()
        with pytest.raises(RepositoryClosedError):
            await task


async def test_a_cancelled_wait_is_over(factory: Factory) -> None:
    """And closing leaves no task of it behind."""
    tasks = asyncio.all_tasks()
    async with asyncio.timeout(10), factory() as repo:
        task = await waiting(repo)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await repo.attempts.enqueue("run")
        assert await repo.attempts.wait(timeout=LONG)
    assert asyncio.all_tasks() == tasks


@pytest.mark.parametrize(
    "arguments",
    [{"queues": ""}, {"queues": []}, {"queues": ["a", "\0"]}, {"timeout": -SOON}],
    ids=["no name", "no queue", "nul", "negative"],
)
async def test_bad_input_is_refused(repo: RuntimeRepository, arguments: dict[str, Any]) -> None:
    """Before anything is asked."""
    with pytest.raises(ConfigurationError):
        await repo.attempts.wait(**arguments)


async def test_a_look_that_nobody_answers_is_noticed(
    postgres_factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait without a time-out is not for ever when the server falls silent, and goes on when it speaks again."""
    monkeypatch.setattr(attempts, "_LONGEST_POLL", 0.2)
    async with postgres_factory() as repo:
        async with repo.transaction() as transaction:
            await transaction.connection.execute(f"lock table {runtime_schema(repo)}.runtime_queue")
            with pytest.raises(DatabaseUnavailableError, match="no answer within"):
                async with asyncio.timeout(10):
                    await asyncio.create_task(repo.attempts.wait())
        assert not await repo.attempts.wait(timeout=NOTHING)


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
async def test_a_transaction_of_ones_own_is_no_silence(
    backend: str, postgres_url: str, postgres_schema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Whoever waits while it holds the only connection, be it for longer than a verb may take, waits on: to the end of the
    time-out or of that.
    """
    monkeypatch.setattr(attempts, "_LONGEST_POLL", 0.1)
    repository: RuntimeRepository = SqliteRuntimeRepository(tmp_path / "runtime.db", verb_timeout=1)
    if backend == "postgres":
        repository = PostgresRuntimeRepository(postgres_url, schema=postgres_schema, max_size=1, verb_timeout=1)
    async with repository as repo:
        before = await waiting(repo)
        async with repo.transaction() as transaction:
            started = time.monotonic()
            assert not await asyncio.create_task(repo.attempts.wait(timeout=SOON))
            assert time.monotonic() - started < 0.7
            task = asyncio.create_task(repo.attempts.wait(timeout=LONG))
            await asyncio.sleep(1.2)
            assert not task.done()
            assert not before.done()
            await transaction.attempts.enqueue("run")
        assert await task
        assert await before
