"""The worker: what it claims it finishes, or gives back; whatever the handler, the signals and the rivals do."""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import AsyncMock

import pytest

from runtime_repo import (
    Attempt,
    AttemptStatus,
    ConfigurationError,
    DatabaseUnavailableError,
    Lease,
    NewAttempt,
    OverloadedError,
    PostgresRuntimeRepository,
    RefusedError,
    RepositoryClosedError,
    RetryPolicy,
    RuntimeRepository,
    SqliteRuntimeRepository,
    UnreadableRowError,
    Worker,
    fencing,
)
from runtime_repo.attempts import Attempts
from runtime_repo.leases import Leases
from tests.contract.conftest import Clock, Factory, eventually

SHORT = timedelta(seconds=0.3)
AT_ONCE = RetryPolicy(base=timedelta(0))


async def for_ever(_lease: Lease) -> None:
    """A handler that does not end by itself."""
    await asyncio.get_running_loop().create_future()


@contextlib.asynccontextmanager
async def running(*workers: Worker) -> AsyncIterator["list[asyncio.Task[None]]"]:
    """The workers at work, and told to stop at the end."""
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    try:
        yield tasks
    finally:
        for worker in workers:
            worker.stop()
        done = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in done:
        if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome


async def until(repo: RuntimeRepository, attempt_id: str, status: AttemptStatus) -> Attempt:
    """The attempt, as soon as it has come to *status*."""
    async with asyncio.timeout(20):
        while True:
            attempt = await repo.attempts.get(attempt_id)
            if attempt.status is status:
                return attempt
            await asyncio.sleep(0.01)


async def test_what_is_enqueued_is_done(factory: Factory) -> None:
    """Each attempt once, whoever of three workers gets it; also what comes while they wait."""
    times = Counter[str]()

    async def handle(lease: Lease) -> int:
        times[lease.attempt_id] += 1
        return int(lease.attempt.payload) ** 2

    async with factory() as repo, factory() as other:
        ids = await repo.attempts.enqueue_many(NewAttempt("run", payload=number) for number in range(60))
        workers = [Worker(where, handle, concurrency=4, signals=()) for where in (repo, repo, other)]
        async with running(*workers):
            await other.attempts.enqueue("run", attempt_id="late", payload=60)
            await until(repo, "late", AttemptStatus.COMPLETED)
            for attempt_id in ids:
                await until(repo, attempt_id, AttemptStatus.COMPLETED)
        assert times == Counter([*ids, "late"])
        assert [(await repo.attempts.get(attempt_id)).result for attempt_id in ids] == [n**2 for n in range(60)]
        assert await repo.leases.list() == []


async def test_as_many_at_a_time_as_it_has_room_for(repo: RuntimeRepository) -> None:
    """Three of four run together, and the fourth when one of them has ended."""
    begun: list[str] = []
    full, one_more, end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handle(lease: Lease) -> None:
        begun.append(lease.attempt_id)
        if len(begun) == 3:
            full.set()
            await one_more.wait()
        else:
            await end.wait()

    ids = await repo.attempts.enqueue_many(NewAttempt("run") for _ in range(4))
    async with asyncio.timeout(20), running(Worker(repo, handle, concurrency=3, signals=())):
        await full.wait()
        assert sorted(begun) == ids[:3]
        one_more.set()
        await until(repo, ids[3], AttemptStatus.RUNNING)
        end.set()
        for attempt_id in ids:
            await until(repo, attempt_id, AttemptStatus.COMPLETED)


async def test_a_failure_is_recorded_and_tried_again(repo: RuntimeRepository) -> None:
    """By the policy, and for good when that has no more tries."""

    async def handle(lease: Lease) -> str:
        if lease.attempt.attempt_no < lease.attempt.payload:
            raise ValueError("not yet")
        return "done"

    policy = RetryPolicy(base=timedelta(0), max_attempts=3)
    await repo.attempts.enqueue("run", attempt_id="a", payload=3)
    await repo.attempts.enqueue("run", attempt_id="b", payload=4)
    async with running(Worker(repo, handle, retry=policy, signals=())):
        done = await until(repo, "a", AttemptStatus.COMPLETED)
        failed = await until(repo, "b", AttemptStatus.FAILED)
    assert (done.attempt_no, done.result, done.error) == (3, "done", None)
    assert (failed.attempt_no, failed.error) == (3, "ValueError: not yet")


async def cancelled_by_itself(_lease: Lease) -> None:
    """Something that the handler awaited was cancelled, but nobody cancelled the handler."""
    raise asyncio.CancelledError


async def not_json(_lease: Lease) -> object:
    """A result that cannot be stored."""
    return object()


async def cancelling_itself(_lease: Lease) -> None:
    """Somebody who knows the handler's task cancelled it, but not the worker."""
    task = asyncio.current_task()
    assert task
    task.cancel()
    await asyncio.sleep(0)


async def cancelling_itself_last(_lease: Lease) -> None:
    """The same, but the cancellation has not arrived yet when the handler has ended."""
    task = asyncio.current_task()
    assert task
    task.cancel()
    raise ValueError("ended before it was cancelled")


async def closing_itself(_lease: Lease) -> None:
    """What a generator of its own ends with when it is closed."""
    raise GeneratorExit


class UnusualError(BaseException):
    """An error that is no Exception."""


async def unusual(_lease: Lease) -> None:
    """As some libraries do, so that nobody catches it by mistake."""
    raise UnusualError


async def cancelled_among_others(_lease: Lease) -> None:
    """What some tasks of the handler's own ended with."""
    raise BaseExceptionGroup("two of three", [asyncio.CancelledError(), ValueError("no")])


async def without_words(_lease: Lease) -> None:
    """An error that cannot be shown."""

    class WordlessError(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    raise WordlessError


async def without_another_database(_lease: Lease) -> None:
    """An error of the store's, but not of this one."""
    raise DatabaseUnavailableError("the archive is away")


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (cancelled_by_itself, "CancelledError"),
        (cancelling_itself, "CancelledError"),
        (cancelling_itself_last, "before it was cancelled"),
        (closing_itself, "GeneratorExit"),
        (unusual, "UnusualError"),
        (lambda lease: lease, "returned Lease instead of an awaitable"),
        (cancelled_among_others, "two of three"),
        (without_words, "WordlessError"),
        (without_another_database, "archive"),
        (not_json, "JSON"),
    ],
)
async def test_what_cannot_be_a_result_is_a_failure(repo: RuntimeRepository, handler: Any, words: str) -> None:
    """Not a loop of releases, and not the end of the worker."""
    await repo.attempts.enqueue("run", attempt_id="a")
    async with running(Worker(repo, handler, retry=None, signals=())):
        failed = await until(repo, "a", AttemptStatus.FAILED)
        await repo.attempts.enqueue("run", attempt_id="b")
        await until(repo, "b", AttemptStatus.FAILED)
    assert words in str(failed.error)


async def test_a_result_survives_a_cancellation_that_came_too_late(repo: RuntimeRepository) -> None:
    """The handler had ended when somebody cancelled its task: that ends neither the report nor the worker."""

    async def handle(_lease: Lease) -> str:
        task = asyncio.current_task()
        assert task
        task.cancel()
        return "done"

    await repo.attempts.enqueue("run", attempt_id="a")
    async with running(Worker(repo, handle, signals=())):
        done = await until(repo, "a", AttemptStatus.COMPLETED)
    assert (done.result, done.lease_version) == ("done", 1)


async def test_a_cancelled_report_is_not_the_end_of_the_worker(
    repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody cancels the handler's task while its result is being stored: at worst it is tried again."""
    complete = Attempts.complete
    cancelled: list[Lease] = []

    async def cancelled_once(self: Attempts, lease: Lease, result: Any = None) -> Attempt:
        if not cancelled:
            cancelled.append(lease)
            task = asyncio.current_task()
            assert task
            task.cancel()
        return await complete(self, lease, result)

    monkeypatch.setattr(Attempts, "complete", cancelled_once)
    await repo.attempts.enqueue("run", attempt_id="a")
    async with running(Worker(repo, returning, signals=())):
        await until(repo, "a", AttemptStatus.COMPLETED)


async def returning(lease: Lease) -> str:
    """Work that is done at once."""
    return lease.attempt_id


async def test_a_failure_in_the_instant_of_a_time_out_is_a_failure(
    repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The worker's own wait times out in the very turn of the event loop in which the handler raises.

    A time-out cancels its task for a moment. Who takes that for the end of the worker ends with it, without a word.
    """
    waiting: list[asyncio.Timeout] = []
    wait = Attempts._wait

    async def wait_with_a_time_out(self: Attempts, *arguments: Any, **options: Any) -> bool:
        try:
            async with asyncio.timeout(None) as timeout:
                waiting.append(timeout)
                return await wait(self, *arguments, **options)
        except TimeoutError:
            return False
        finally:
            waiting.clear()

    async def handle(lease: Lease) -> None:
        if lease.attempt.attempt_no == 1:
            while not waiting:  # noqa: ASYNC110 - the time-out must not end before
                await asyncio.sleep(0)
            turn = asyncio.get_running_loop().create_future()
            # So that this task has its turn after the worker's was cancelled, and before that knows.
            asyncio.get_running_loop().call_soon(turn.set_result, None)
            waiting[-1].reschedule(0)
            await turn
            raise ValueError("at the same instant")

    monkeypatch.setattr(Attempts, "_wait", wait_with_a_time_out)
    await repo.attempts.enqueue("run", attempt_id="a")
    async with running(Worker(repo, handle, retry=AT_ONCE, signals=())) as (task,):
        assert (await until(repo, "a", AttemptStatus.COMPLETED)).attempt_no == 2
        assert not task.done()


async def test_a_worker_does_not_end_by_itself(repo: RuntimeRepository) -> None:
    """Handlers that fail, retries that fall due while it waits: a second of it, and it is still at work."""
    policy = RetryPolicy(base=timedelta(milliseconds=3), cap=timedelta(milliseconds=10))
    tries = 0

    async def handle(_lease: Lease) -> None:
        nonlocal tries
        tries += 1
        await asyncio.sleep(0.002)
        raise ValueError("always")

    logging.getLogger("runtime_repo").setLevel(logging.ERROR)
    try:
        await repo.attempts.enqueue_many(NewAttempt("run", max_attempts=10_000) for _ in range(5))
        async with running(Worker(repo, handle, retry=policy)) as (task,):
            await asyncio.wait([task], timeout=1)
            assert not task.done()
    finally:
        logging.getLogger("runtime_repo").setLevel(logging.NOTSET)
    assert tries > 20


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
async def test_what_ends_the_program_ends_the_worker(repo: RuntimeRepository, error: BaseException) -> None:
    """After what it holds was given back, the handler's own attempt among it; and it comes out as it is."""

    async def handle(lease: Lease) -> None:
        if lease.attempt_id == "a":
            await for_ever(lease)
        await until(repo, "a", AttemptStatus.RUNNING)
        raise error

    await repo.attempts.enqueue_many([NewAttempt("run", "a"), NewAttempt("run", "b")])
    with pytest.raises(type(error)) as raised:
        # In this task: asyncio ends the event loop where another one raises this.
        await Worker(repo, handle, signals=()).run()
    assert raised.value is error
    for attempt_id in "ab":
        attempt = await repo.attempts.get(attempt_id)
        assert (attempt.status, attempt.attempt_no) == (AttemptStatus.QUEUED, 1)


async def test_stopping_lets_handlers_end(repo: RuntimeRepository) -> None:
    """What runs is finished, what waits stays where it is."""
    begun, end = asyncio.Event(), asyncio.Event()

    async def handle(_lease: Lease) -> str:
        begun.set()
        await end.wait()
        return "done"

    await repo.attempts.enqueue("run", attempt_id="a", priority=1)
    await repo.attempts.enqueue("run", attempt_id="b")
    async with asyncio.timeout(20):
        worker = Worker(repo, handle, concurrency=1, signals=())
        task = asyncio.create_task(worker.run())
        await begun.wait()
        worker.stop()
        worker.stop()
        done, _ = await asyncio.wait([task], timeout=0.1)
        assert not done
        end.set()
        await task
    assert (await repo.attempts.get("a")).result == "done"
    assert (await repo.attempts.get("b")).status is AttemptStatus.QUEUED


@pytest.mark.parametrize("how", ["grace", "cancel"])
async def test_what_does_not_end_is_released(repo: RuntimeRepository, how: str) -> None:
    """When the grace is over, or at once when the worker is cancelled: ready for others, the try not counted."""
    await repo.attempts.enqueue("run", attempt_id="a")
    async with asyncio.timeout(20):
        worker = Worker(repo, for_ever, grace=timedelta(milliseconds=50), signals=())
        task = asyncio.create_task(worker.run())
        await until(repo, "a", AttemptStatus.RUNNING)
        if how == "grace":
            worker.stop()
            await task
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    attempt = await repo.attempts.get("a")
    assert (attempt.status, attempt.attempt_no) == (AttemptStatus.QUEUED, 1)
    assert await repo.leases.list() == []


async def test_the_end_of_the_event_loop_is_no_failure(repo: RuntimeRepository) -> None:
    """``asyncio.run`` cancels all tasks that are left at once, the handlers' before the worker has cancelled them."""
    await repo.attempts.enqueue("run", attempt_id="a")
    before = asyncio.all_tasks()
    async with asyncio.timeout(20):
        asyncio.create_task(Worker(repo, for_ever, retry=None, signals=()).run())  # noqa: RUF006 - as one is forgotten
        await until(repo, "a", AttemptStatus.RUNNING)
        left = asyncio.all_tasks() - before
        for task in left:
            task.cancel()
        await asyncio.wait(left)
    attempt = await repo.attempts.get("a")
    assert (attempt.status, attempt.attempt_no) == (AttemptStatus.QUEUED, 1)


async def test_a_worker_whose_tasks_are_cancelled_says_so(repo: RuntimeRepository) -> None:
    """Who waits for it must not take that for an end that it was told to come to."""
    before = asyncio.all_tasks()
    run = asyncio.create_task(Worker(repo, for_ever, signals=()).run())
    await asyncio.wait([run], timeout=0.1)
    for task in asyncio.all_tasks() - before - {run}:
        task.cancel()
    await asyncio.wait([run], timeout=10)
    assert run.cancelled()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_it(repo: RuntimeRepository, number: signal.Signals) -> None:
    """And afterwards it is handled as before, so that a second one is not lost."""
    before = signal.getsignal(number)
    await repo.attempts.enqueue("run", attempt_id="a")
    async with asyncio.timeout(20):
        task = asyncio.create_task(Worker(repo, for_ever, grace=timedelta(0)).run())
        await until(repo, "a", AttemptStatus.RUNNING)
        assert signal.getsignal(number) is not before
        os.kill(os.getpid(), number)
        await task
    assert signal.getsignal(number) is before
    assert (await repo.attempts.get("a")).status is AttemptStatus.QUEUED


async def test_a_signal_stops_all_that_run(repo: RuntimeRepository) -> None:
    """However many workers a process has, and when one of them has ended before."""
    before = signal.getsignal(signal.SIGTERM)
    async with asyncio.timeout(20):
        for ended in (0, 1, 2):
            workers = [Worker(repo, for_ever, queues=queue) for queue in ("a", "b", "c")]
            tasks = [asyncio.create_task(worker.run()) for worker in workers]
            await asyncio.sleep(0)
            workers[ended].stop()
            await tasks[ended]
            assert signal.getsignal(signal.SIGTERM) is not before
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.gather(*tasks)
            assert signal.getsignal(signal.SIGTERM) is before


async def test_a_handler_that_lost_its_lease_is_cancelled(factory: Factory) -> None:
    """What it would have reported is discarded, and the worker goes on."""
    cancelled = asyncio.Event()

    async def handle(lease: Lease) -> str:
        if lease.attempt_id == "a":
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                cancelled.set()
        return "done"

    async with factory() as repo, factory() as other:
        await repo.attempts.enqueue("run", attempt_id="a")
        async with running(Worker(repo, handle, concurrency=1, ttl=SHORT, signals=())):
            await until(other, "a", AttemptStatus.RUNNING)
            await other.attempts.cancel("a")
            async with asyncio.timeout(20):
                await cancelled.wait()
            await other.attempts.enqueue("run", attempt_id="b")
            await until(other, "b", AttemptStatus.COMPLETED)
        assert (await other.attempts.get("a")).status is AttemptStatus.CANCELLED


async def test_it_takes_over_from_the_dead(repo: RuntimeRepository, clock: Clock) -> None:
    """What somebody claimed long ago and never finished is tried again, without anybody else's help."""
    long_ago = clock.now - timedelta(days=36500)
    await repo.attempts.enqueue("run", attempt_id="a", now=long_ago)
    await repo.leases.claim("dead", now=long_ago)

    async def handle(lease: Lease) -> int:
        return lease.attempt.attempt_no

    async with running(Worker(repo, handle, signals=())):
        assert (await until(repo, "a", AttemptStatus.COMPLETED)).result == 2


async def test_a_handler_may_finish_by_itself(repo: RuntimeRepository) -> None:
    """Together with what else it writes; what it returns is not needed then."""

    async def handle(lease: Lease) -> str:
        async with repo.transaction() as transaction:
            await transaction.attempts.enqueue("run", attempt_id="next", queue="later")
            await transaction.attempts.complete(lease, "mine")
        return "ignored"

    await repo.attempts.enqueue("run", attempt_id="a")
    async with running(Worker(repo, handle, signals=())):
        assert (await until(repo, "a", AttemptStatus.COMPLETED)).result == "mine"
    assert (await repo.attempts.get("next")).status is AttemptStatus.QUEUED


async def released(repo: RuntimeRepository, lease: Lease) -> None:
    """By a verb."""
    await repo.leases.release(lease, delay=timedelta(minutes=1))


async def failed(repo: RuntimeRepository, lease: Lease) -> None:
    """By a verb."""
    await repo.attempts.fail(lease, "no")


async def completed(repo: RuntimeRepository, lease: Lease) -> None:
    """By a verb for many."""
    await repo.attempts.complete_many([(lease, "mine")])


async def released_together(repo: RuntimeRepository, lease: Lease) -> None:
    """In a transaction."""
    async with repo.transaction() as transaction:
        await released(transaction, lease)  # type: ignore[arg-type]


async def failed_unnoticed(repo: RuntimeRepository, lease: Lease) -> None:
    """By another process, as far as this one knows: only the attempt's row tells who did it."""
    await repo.attempts.fail(lease, "no")
    fencing._held[lease.lease_id].ended = False


@pytest.mark.parametrize(
    ("end", "claimed_again"),
    [
        (released, False),
        (released, True),
        (failed, False),
        (completed, False),
        (released_together, False),
        (released_together, True),
        (failed_unnoticed, False),
    ],
)
async def test_a_handler_that_ends_its_lease_is_not_complained_of(
    repo: RuntimeRepository,
    caplog: pytest.LogCaptureFixture,
    end: Callable[[RuntimeRepository, Lease], Awaitable[None]],
    claimed_again: bool,  # noqa: FBT001
) -> None:
    """Nothing was lost, and nothing is to be discarded; also when somebody else has claimed the attempt meanwhile."""
    left = asyncio.Event()

    async def handle(lease: Lease) -> str:
        await end(repo, lease)
        if claimed_again:
            now = datetime.now(UTC) + timedelta(hours=1)
            await repo.leases.claim_attempt(lease.attempt_id, "rival", now=now)
        await asyncio.sleep(SHORT.total_seconds() / 2)
        left.set()
        return "ignored"

    await repo.attempts.enqueue("run", attempt_id="a")
    worker = Worker(repo, handle, ttl=SHORT, sweep_every=timedelta(hours=1), signals=())
    async with asyncio.timeout(10), running(worker):
        await left.wait()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert (await repo.attempts.get("a")).result == ("mine" if end is completed else None)


def unavailable() -> Exception:
    """As long as the network is away."""
    return DatabaseUnavailableError("the database is away")


def no_privilege() -> Exception:
    """Until somebody grants it."""
    return RefusedError("permission denied for table runtime_leases: grant it")


def unreadable() -> Exception:
    """Until somebody mends the row."""
    return UnreadableRowError("runtime_attempts", "'a'", "it holds microseconds")


def overloaded() -> Exception:
    """For a moment."""
    return OverloadedError("too many wait: try again later")


@pytest.mark.parametrize("error", [unavailable, no_privilege, unreadable, overloaded, ZeroDivisionError])
async def test_what_goes_wrong_is_tried_again_and_told_once(
    repo: RuntimeRepository,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Callable[[], Exception],
) -> None:
    """Claims and sweeps fail for a while: one line when that begins and one when it ends, and then it works again."""
    tries = Counter[str]()

    async def refused(_self: Leases, worker_id: str = "sweep", **_options: Any) -> Any:
        tries["sweep" if worker_id == "sweep" else "claim"] += 1
        raise error()

    await repo.attempts.enqueue("run", attempt_id="a")
    with monkeypatch.context() as away:
        away.setattr(Leases, "claim", refused)
        away.setattr(Leases, "requeue_expired", refused)
        async with running(Worker(repo, returning, sweep_every=timedelta(milliseconds=5), signals=())) as (task,):
            await eventually(lambda: min(tries["claim"], tries["sweep"]) > 5)
            assert not task.done()
            assert len(caplog.records) == 1
            away.undo()
            await until(repo, "a", AttemptStatus.COMPLETED)
            await eventually(lambda: len(caplog.records) > 1)
    begin, end = (record.getMessage() for record in caplog.records)
    assert str(error()) in begin
    assert "can go on" in end


async def refused_at_once() -> None:
    """An error from a database that is away."""
    raise unavailable()


async def unanswered() -> None:
    """A connection that is silent."""
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize(("away", "lines"), [(refused_at_once, 2), (unanswered, 0)])
async def test_a_result_waits_as_long_as_the_lease_is_kept(
    repo: RuntimeRepository,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    away: Callable[[], Awaitable[None]],
    lines: int,
) -> None:
    """For longer than one ttl; and a single call without an answer, while heartbeats have theirs, is no outage."""
    complete, ttl = Attempts.complete, 2 * SHORT
    began: list[float] = []

    async def late(self: Attempts, lease: Lease, result: Any = None) -> Attempt:
        began.append(time.monotonic())
        if began[-1] < began[0] + 2 * ttl.total_seconds():
            await away()
        return await complete(self, lease, result)

    monkeypatch.setattr(Attempts, "complete", late)
    await repo.attempts.enqueue("run", attempt_id="a")
    async with running(Worker(repo, returning, ttl=ttl, signals=())):
        done = await until(repo, "a", AttemptStatus.COMPLETED)
        await eventually(lambda: len(caplog.records) == lines)
    assert (done.lease_version, len(began) > 1) == (1, True)
    assert len(caplog.records) == lines


@pytest.fixture
def narrow(factory: Factory, request: pytest.FixtureRequest) -> Factory:
    """Repositories with one connection for all work, on both databases."""
    if isinstance(factory(), SqliteRuntimeRepository):
        return factory
    url, schema = (request.getfixturevalue(name) for name in ("postgres_url", "postgres_schema"))
    return lambda: PostgresRuntimeRepository(url, schema=schema, max_size=1)


async def test_handlers_that_wait_for_each_other_are_no_outage(
    narrow: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    """Their transactions take the only connection, in turn, for longer than a lease: nothing is lost, nothing told."""
    ttl = timedelta(seconds=1.2)

    async def handle(_lease: Lease) -> None:
        async with repo.transaction():
            await asyncio.sleep(ttl.total_seconds() / 3)

    async with narrow() as repo, narrow() as other:
        ids = await other.attempts.enqueue_many(NewAttempt("run") for _ in range(6))
        async with running(Worker(repo, handle, ttl=ttl, sweep_every=ttl, signals=())):
            attempts = [await until(other, attempt_id, AttemptStatus.COMPLETED) for attempt_id in ids]
    assert {attempt.lease_version for attempt in attempts} == {1}
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_what_is_never_stored_fails_the_attempt(
    repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, instead of insisting for as long as the lease holds; also where the error's words are refused."""
    complete, fail = Attempts.complete, Attempts.fail

    async def refuse_a_result(self: Attempts, lease: Lease, result: Any = None) -> Attempt:
        if result == "poison":
            raise RefusedError("the trigger no_poison: not this")
        return await complete(self, lease, result)

    async def refuse_words(self: Attempts, lease: Lease, error: str, **options: Any) -> Attempt:
        if "poison" in error:
            raise RefusedError("the trigger no_poison: not this")
        return await fail(self, lease, error, **options)

    async def handle(lease: Lease) -> str:
        if lease.attempt_id == "words":
            raise ValueError("poison")
        return "poison"

    monkeypatch.setattr(Attempts, "complete", refuse_a_result)
    monkeypatch.setattr(Attempts, "fail", refuse_words)
    await repo.attempts.enqueue_many([NewAttempt("run", "result"), NewAttempt("run", "words")])
    async with asyncio.timeout(10), running(Worker(repo, handle, retry=None, signals=())):
        result = await until(repo, "result", AttemptStatus.FAILED)
        words = await until(repo, "words", AttemptStatus.FAILED)
    for attempt in (result, words):
        assert attempt.lease_version == 1
        assert "refused to store" in str(attempt.error)
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) == 2


async def test_where_nothing_can_be_stored_the_lease_is_let_go(
    repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a word in the log; it expires, so that the try counts, and the worker goes on."""

    async def refuse(*_arguments: Any, **_options: Any) -> None:
        raise RefusedError("permission denied for table runtime_attempts: grant it")

    monkeypatch.setattr(Attempts, "complete", refuse)
    monkeypatch.setattr(Attempts, "fail", refuse)
    await repo.attempts.enqueue("run", attempt_id="a")
    worker = Worker(repo, returning, ttl=SHORT, sweep_every=SHORT, signals=())
    async with asyncio.timeout(10), running(worker) as (task,):
        while (attempt := await repo.attempts.get("a")).attempt_no < 3:
            assert attempt.error in (None, f"the lease of worker {worker.worker_id} expired")
        assert not task.done()
    assert any("cannot report on attempt 'a'" in record.getMessage() for record in caplog.records)


async def test_a_repository_that_is_closed_ends_it(factory: Factory) -> None:
    """With the reason; there is nothing to try again."""
    async with asyncio.timeout(20):
        repo = await factory()
        task = asyncio.create_task(Worker(repo, for_ever, signals=()).run())
        await asyncio.wait([task], timeout=0.1)
        await repo.close()
        with pytest.raises(RepositoryClosedError):
            await task


def too_small(monkeypatch: pytest.MonkeyPatch, repo: RuntimeRepository, *, after: int) -> None:
    """No connection for heartbeats, as in a pool of one; so many times there is one before."""
    heartbeats, asked = repo._gate.heartbeats, 0

    async def refused() -> Any:
        nonlocal asked
        asked += 1
        if asked > after:
            raise ConfigurationError("the pool that was given is too small")
        return await heartbeats()

    monkeypatch.setattr(repo._gate, "heartbeats", refused)


async def test_where_no_lease_can_be_kept_none_is_taken(
    repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends at once with the reason, before an attempt's tries are spent."""
    too_small(monkeypatch, repo, after=0)
    await repo.attempts.enqueue("run", attempt_id="a")
    async with asyncio.timeout(10):
        with pytest.raises(ConfigurationError, match="too small"):
            await Worker(repo, for_ever, signals=()).run()
    assert (await repo.attempts.get("a")).lease_version == 0


async def test_who_can_keep_no_lease_any_more_ends(repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives back what it has just claimed, the try not counted."""
    too_small(monkeypatch, repo, after=1)
    await repo.attempts.enqueue("run", attempt_id="a")
    async with asyncio.timeout(10):
        with pytest.raises(ConfigurationError, match="too small"):
            await Worker(repo, for_ever, signals=()).run()
    attempt = await repo.attempts.get("a")
    assert (attempt.status, attempt.attempt_no, attempt.lease_version) == (AttemptStatus.QUEUED, 1, 1)


async def test_an_outage_at_the_beginning_is_no_reason_to_end(
    repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heartbeats need nothing until there is a lease, and by then the database may be back."""
    heartbeats, asked = repo._gate.heartbeats, 0

    async def refused_once() -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise RefusedError("not yet")
        return await heartbeats()

    monkeypatch.setattr(repo._gate, "heartbeats", refused_once)
    await repo.attempts.enqueue("run", attempt_id="a")
    async with asyncio.timeout(10), running(Worker(repo, returning, signals=())):
        await until(repo, "a", AttemptStatus.COMPLETED)
    assert asked > 1


async def test_who_was_stopped_before_does_nothing(repo: RuntimeRepository) -> None:
    """A signal may come before the work has begun."""
    await repo.attempts.enqueue("run", attempt_id="a")
    worker = Worker(repo, for_ever)
    worker.stop()
    async with asyncio.timeout(5):
        await worker.run()
    assert (await repo.attempts.get("a")).lease_version == 0


async def test_it_runs_once(repo: RuntimeRepository) -> None:
    """Twice at once ``stop`` would reach one of them only, and later it would wait for ever for room."""
    worker = Worker(repo, for_ever, signals=())
    async with asyncio.timeout(10):
        async with running(worker):
            await asyncio.sleep(0)
            with pytest.raises(ConfigurationError, match="runs once"):
                await worker.run()
        with pytest.raises(ConfigurationError, match="runs once"):
            await worker.run()


async def test_each_has_a_name_of_its_own(repo: RuntimeRepository) -> None:
    """Unless it is given one."""
    first, second = Worker(repo, for_ever), Worker(repo, for_ever)
    assert first.worker_id != second.worker_id
    assert Worker(repo, for_ever, worker_id="me").worker_id == "me"


@pytest.mark.parametrize(
    "arguments",
    [
        {"worker_id": ""},
        {"queues": []},
        {"concurrency": 0},
        {"ttl": timedelta(0)},
        {"grace": timedelta(seconds=-1)},
        {"sweep_every": timedelta(0)},
        {"retry": timedelta(seconds=1)},
        {"signals": ["SIGTERM"]},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
async def test_bad_input_is_refused(repo: RuntimeRepository, arguments: dict[str, Any]) -> None:
    """When it is constructed, not when the first attempt comes."""
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        Worker(repo, for_ever, **arguments)


def plain(_lease: Lease) -> None:
    """Not a coroutine function: it would block the event loop, and its result cannot be awaited."""


async def yielding(_lease: Lease) -> AsyncIterator[None]:
    """An asynchronous generator: what it returns cannot be awaited either."""
    yield


class Handles:
    """What can be a handler in one way or another."""

    async def method(self, lease: Lease) -> None:
        """One."""

    async def __call__(self, lease: Lease) -> None:
        """Another."""

    def plain(self, lease: Lease) -> None:
        """None."""


class HandlesPlainly:
    """What is called, and is no coroutine function."""

    def __call__(self, lease: Lease) -> None:
        """None."""


@functools.wraps(for_ever)
def decorated(lease: Lease) -> Awaitable[None]:
    """A decorator's plain function around a coroutine function."""
    return for_ever(lease)


@pytest.mark.parametrize(
    "handler",
    [
        *(None, "work", plain, yielding, Handles().plain, functools.partial(plain)),
        *(HandlesPlainly(), HandlesPlainly, Handles),
    ],
)
async def test_a_handler_is_a_coroutine_function(repo: RuntimeRepository, handler: Any) -> None:
    """What certainly is none is refused at once, not when the first attempt comes."""
    with pytest.raises(ConfigurationError, match="async def"):
        Worker(repo, handler)


@pytest.mark.parametrize(
    "handler",
    [Handles(), Handles().method, functools.partial(for_ever), lambda lease: for_ever(lease), decorated, AsyncMock()],
)
async def test_what_may_be_a_coroutine_function_is_taken(repo: RuntimeRepository, handler: Any) -> None:
    """However it is wrapped."""
    Worker(repo, handler)


async def test_signals_are_for_the_main_thread(repo: RuntimeRepository) -> None:
    """Elsewhere it says what to do."""

    def elsewhere() -> None:
        with pytest.raises(ConfigurationError, match="signals="):
            asyncio.run(Worker(repo, for_ever).run())

    await asyncio.to_thread(elsewhere)
