"""What an application that watches is told, and that watching harms nobody."""

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from runtime_repo import (
    BootStep,
    Claimed,
    Completed,
    ConfigurationError,
    DatabaseUnavailableError,
    Event,
    Failed,
    Lease,
    LeaseLost,
    LeaseLostError,
    Migrated,
    NewAttempt,
    NotFoundError,
    OutageBegan,
    OutageEnded,
    PostgresRuntimeRepository,
    Statement,
    Swept,
    Worker,
)
from runtime_repo.observing import ObservedSource
from tests.contract.conftest import Clock, eventually
from tests.contract.test_worker import running
from tests.lab import Lab, on_postgres
from tests.versions import HISTORY

MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)


class Seen(list[Any]):
    """All that was told."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, *kinds: type[Event]) -> list[Any]:
        return [event for event in self if isinstance(event, kinds)]

    def taken(self, *kinds: type[Event]) -> list[Any]:
        """Those of some kinds, and no earlier ones next time."""
        found = self.of(*kinds)
        self.clear()
        return found


@pytest.fixture
def seen() -> Seen:
    return Seen()


async def test_a_boot_is_told_step_by_step(lab: Lab, seen: Seen) -> None:
    """And each migration when it is committed; of a current database that it was looked at and is served."""
    async with lab.repository(observe=seen):
        pass
    steps = [event.step for event in seen.of(BootStep)]
    assert [step for step in steps if step != "look"] == ["lock", "commit", "serve"]
    assert steps[0] == "look"
    assert [(event.version, event.name) for event in seen.of(Migrated)] == HISTORY
    assert all(event.seconds >= 0 for event in seen)
    seen.clear()
    async with lab.repository(observe=seen):
        pass
    assert [event.step for event in seen.of(BootStep, Migrated)] == ["look", "serve"]


async def test_a_boot_that_fails_says_where(lab: Lab, seen: Seen) -> None:
    """The step that it could not make, with the error."""
    async with lab.held():
        with pytest.raises(Exception, match="lock"):
            await lab.repository(observe=seen, lock_timeout=0.05)
    assert {event.step for event in seen.of(BootStep)} == {"look", "busy"}
    assert seen.of(Migrated) == []


async def test_every_statement_is_told_with_its_duration_and_error(lab: Lab, seen: Seen) -> None:
    """By its name, also what only reads, and what the database refused."""
    async with lab.repository(observe=seen) as repo:
        seen.clear()
        await repo.attempts.enqueue("run", attempt_id="a")
        await repo.attempts.find("a")
        await repo.attempts.wait(timeout=timedelta(0))
        assert [event.name for event in seen.of(Statement)][:3] == [
            "attempts.enqueue",
            "attempts.find",
            "attempts.next",
        ]
        assert all(0 < event.seconds < 60 and event.error is None for event in seen.of(Statement))
        await lab.execute(f"drop table {lab.table('jobs')}")
        seen.clear()
        with pytest.raises(Exception, match="runtime_jobs") as caught:
            await repo.jobs.find("thread")
        [event] = seen
        assert (event.name, event.error) == ("jobs.find", caught.value)


async def test_the_life_of_an_attempt_is_told(lab: Lab, seen: Seen, clock: Clock) -> None:
    """Claimed, failed, swept, lost, completed: with what an application knows it by."""
    async with lab.repository(observe=seen) as repo:
        headers = {"traceparent": "00-1-2-01"}
        await repo.attempts.enqueue("run", attempt_id="a", queue="mail", headers=headers, now=clock.now)
        seen.clear()
        assert await repo.leases.claim("w", now=clock.now) == []
        assert seen.taken(Claimed) == []
        [lease] = await repo.leases.claim("w", queues="mail", ttl=MINUTE, now=clock.now)
        [claimed] = seen.taken(Claimed)
        assert claimed[:3] == ("w", ("mail",), ("a",))
        await repo.attempts.fail(lease, "boom", retry_in=timedelta(0), now=clock.now)
        assert [event[:5] for event in seen.taken(Failed)] == [("a", "mail", headers, "boom", False)]
        again = await repo.leases.claim_attempt("a", "w", ttl=MINUTE, now=clock.now)
        assert again is not None
        assert [event[:3] for event in seen.taken(Claimed)] == [("w", ("mail",), ("a",))]
        await repo.leases.requeue_expired(now=clock.advance(2 * MINUTE))
        assert [event.attempt_ids for event in seen.taken(Swept)] == [("a",)]
        with pytest.raises(LeaseLostError):
            await repo.attempts.complete(again, now=clock.now)
        assert seen.taken(LeaseLost) == [LeaseLost("a", "queued", None)]
        [lease] = await repo.leases.claim("w", queues="mail", now=clock.now)
        await repo.attempts.complete(lease, now=clock.now)
        assert [event[:3] for event in seen.taken(Completed)] == [("a", "mail", headers)]
        await repo.attempts.enqueue_many([NewAttempt("run", "b"), NewAttempt("run", "c")], now=clock.now)
        leases = await repo.leases.claim("w", limit=2, now=clock.now)
        await repo.attempts.complete_many([(lease, None) for lease in leases], now=clock.now)
        assert sorted(event.attempt_id for event in seen.taken(Completed)) == ["b", "c"]
        await repo.attempts.prune(older_than=timedelta(0), now=clock.now)
        with pytest.raises(NotFoundError):
            await repo.attempts.complete(lease, now=clock.now)
        assert seen.taken(LeaseLost) == [LeaseLost("a", None, None)]


async def test_what_is_rolled_back_has_not_happened(lab: Lab, seen: Seen, clock: Clock) -> None:
    """A statement of a transaction is told at once, and what it did when that is committed."""
    async with lab.repository(observe=seen) as repo:
        await repo.attempts.enqueue("run", now=clock.now)
        seen.clear()
        for commits in (False, True):
            try:
                async with repo.transaction() as transaction:
                    [lease] = await transaction.leases.claim("w", now=clock.now)
                    await transaction.attempts.complete(lease, now=clock.now)
                    assert len(seen.of(Statement)) >= 2
                    assert seen.of(Claimed, Completed) == []
                    if not commits:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                pass
            assert [type(event) for event in seen.taken(Claimed, Completed)] == (
                [Claimed, Completed] if commits else []
            )


async def test_a_workers_outage_is_told(lab: Lab, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it begins and when it ends, once each."""
    async with lab.repository(observe=seen) as repo:

        async def away(*_: object, **__: object) -> list[Lease]:
            raise DatabaseUnavailableError("it is away")

        async def work(_: Lease) -> None:
            pass

        with monkeypatch.context() as patch:
            patch.setattr(repo.leases, "claim", away)
            async with running(Worker(repo, work, worker_id="w")):
                await eventually(lambda: seen.of(OutageBegan))
                await asyncio.sleep(0.05)
                patch.undo()
                await eventually(lambda: seen.of(OutageEnded))
    [began], [ended] = seen.of(OutageBegan), seen.of(OutageEnded)
    assert (began.who, began.doing, str(began.error)) == ("worker w", "claim", "it is away")
    assert (ended.who, ended.leases_lost) == ("worker w", 0)
    assert ended.seconds > 0


async def test_an_observer_that_raises_harms_nobody(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once, and asked again."""
    asked = 0

    def fails(_: Event) -> None:
        nonlocal asked
        asked += 1
        raise ZeroDivisionError("of the application's")

    with caplog.at_level(logging.ERROR, "runtime_repo"):
        async with lab.repository(observe=fails) as repo:
            await repo.attempts.enqueue("run")
            async with repo.transaction() as transaction:
                [lease] = await transaction.leases.claim("w")
            await repo.attempts.complete(lease)
    assert asked > 5
    [record] = caplog.records
    assert record.exc_info is not None
    assert "what observes the repository raised" in record.message


async def test_an_observer_that_wants_nothing_is_told_nothing(lab: Lab) -> None:
    """It is asked once a second at most."""

    class Idle(Seen):
        asked = 0

        def is_active(self) -> bool:
            self.asked += 1
            return False

    idle = Idle()
    async with lab.repository(observe=idle) as repo:
        for _ in range(20):
            await repo.attempts.enqueue("run")
    assert idle == []
    assert 1 <= idle.asked < 20


async def test_where_nobody_watches_nothing_is_in_the_way(lab: Lab) -> None:
    """The nouns ask the database itself."""
    repository = lab.repository()
    assert repository._gate._queries is repository._database
    watched = lab.repository(observe=print)
    assert isinstance(watched._gate._queries, ObservedSource)


async def _coroutine(_: Event) -> None:
    pass


@pytest.mark.parametrize("wrong", [7, "print", _coroutine])
def test_what_cannot_watch_is_refused(lab: Lab, wrong: Callable[..., object]) -> None:
    """A coroutine function would never be awaited."""
    with pytest.raises(ConfigurationError, match="observe is"):
        lab.repository(observe=wrong)


@on_postgres
async def test_in_a_transaction_of_the_applications_statements_are_told(lab: Lab, seen: Seen) -> None:
    """Whether it commits nobody sees, so nothing is said to have happened."""
    repository = lab.repository(observe=seen)
    assert isinstance(repository, PostgresRuntimeRepository)
    connection = await asyncpg.connect(lab.place.where)
    try:
        async with repository as repo, connection.transaction(), repo.transaction(connection) as transaction:
            await transaction.attempts.enqueue("run")
            [lease] = await transaction.leases.claim("w")
            await transaction.attempts.complete(lease)
    finally:
        await connection.close()
    names = [event.name for event in seen.of(Statement)]
    assert {"attempts.enqueue", "leases.claim 1", "attempts.complete"} <= set(names)
    assert seen.of(Claimed, Completed) == []
