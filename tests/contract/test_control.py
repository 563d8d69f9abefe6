"""Control: what an operator stops stands still, and goes on when it is resumed."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from runtime_repo import (
    AttemptStatus,
    ConfigurationError,
    ConflictError,
    ControlState,
    Lease,
    LeaseHolder,
    NewAttempt,
    NotQuietError,
    OutdatedReleaseError,
    QuiesceProgress,
    RuntimeRepository,
    Stop,
    UnreadableRowError,
    Worker,
)
from runtime_repo.leases import Leases
from runtime_repo.postgres import notifications
from tests.contract.conftest import Clock, Factory, eventually, execute
from tests.contract.test_worker import running, until
from tests.versions import NEWEST

MINUTE = timedelta(minutes=1)
NOTHING = timedelta(0)
LONG = timedelta(seconds=20)
SOON = timedelta(milliseconds=200)
OPEN = ControlState(None)
NEXT = f"insert into {{schema}}.runtime_schema_migrations values ({NEWEST + 1}, 'next', 5)"
OLDEST = "insert into {schema}.runtime_control values ('oldest', '%s', 5)"


async def claimable(repo: RuntimeRepository, queues: Sequence[str] = ("default",), **now: Any) -> list[str]:
    """What can be claimed: every way to it says the same."""
    listed = [attempt.attempt_id for queue in queues for attempt in await repo.attempts.list_dispatchable(queue=queue)]
    assert await repo.attempts.wait(queues, NOTHING, **now) == bool(listed)
    claimed = []
    for attempt in await repo.attempts.list(status=AttemptStatus.QUEUED):
        if attempt.queue in queues and (lease := await repo.leases.claim_attempt(attempt.attempt_id, "worker", **now)):
            await repo.leases.release(lease)
            claimed.append(attempt.attempt_id)
    leases = await repo.leases.claim("worker", limit=100, queues=queues, **now)
    for lease in leases:
        await repo.leases.release(lease)
    assert sorted(lease.attempt_id for lease in leases) == sorted(claimed) == sorted(listed)
    return sorted(listed)


async def test_nothing_is_claimed_while_the_store_is_quiesced(factory: Factory, clock: Clock) -> None:
    """In no process, from no queue and by no id; it outlives whoever has set it. What is enqueued waits."""
    async with factory() as repo, factory() as other:
        await repo.attempts.enqueue_many([NewAttempt("run", "a"), NewAttempt("run", "b", queue="mail")])
        assert await claimable(other, ["default", "mail"]) == ["a", "b"]
        state = await repo.control.quiesce("the upgrade", now=clock.now)
        assert state == await other.control.state() == ControlState(Stop(clock.now, "the upgrade"))
        await other.attempts.enqueue("run", attempt_id="c")
        assert await claimable(other, ["default", "mail"]) == await claimable(repo) == []
        assert len(await other.attempts.list(status=AttemptStatus.QUEUED)) == 3
    async with factory() as repo:
        assert await claimable(repo, ["default", "mail"]) == []
        assert (await repo.control.state()).is_quiesced
        assert await repo.control.resume() == OPEN
        assert await claimable(repo, ["default", "mail"]) == ["a", "b", "c"]


async def test_what_falls_due_is_not_claimed_either(repo: RuntimeRepository, clock: Clock) -> None:
    """Nor is it promoted: a claim that takes nothing changes nothing."""
    for queue in ("default", "mail"):
        await repo.attempts.enqueue("run", attempt_id=queue, queue=queue, not_before=clock.now + MINUTE, now=clock.now)
    later = clock.advance(2 * MINUTE)
    await repo.control.pause("mail")
    (lease,) = await repo.leases.claim("worker", limit=9, queues=["mail", "default"], now=later)
    assert lease.attempt_id == "default"
    assert (await repo.attempts.get("mail")).retry_at is not None
    await repo.control.resume("mail")
    (lease,) = await repo.leases.claim("worker", limit=9, queues=["mail", "default"], now=later)
    assert lease.attempt_id == "mail"


async def test_a_queue_is_paused_alone(repo: RuntimeRepository, clock: Clock) -> None:
    """Others go on, also in the same claim; the store and its queues are stopped and resumed independently."""
    both = ["default", "mail"]
    await repo.attempts.enqueue_many([NewAttempt("run", "a"), NewAttempt("run", "b", queue="mail", priority=1)])
    state = await repo.control.pause("mail", "the relay is down", now=clock.now)
    assert state == ControlState(None, (Stop(clock.now, "the relay is down", "mail"),))
    assert await claimable(repo, both) == ["a"]
    assert await claimable(repo, ["mail"]) == []
    assert [stop.queue for stop in (await repo.control.pause("letters")).paused] == ["letters", "mail"]
    await repo.control.quiesce()
    assert await claimable(repo, both) == []
    await repo.control.resume("letters")
    assert await claimable(repo, both) == []
    await repo.control.resume()
    assert await claimable(repo, both) == ["a"]
    assert await repo.control.resume("mail") == OPEN
    assert await claimable(repo, both) == ["a", "b"]


async def test_what_is_held_goes_on_and_is_waited_for(factory: Factory) -> None:
    """Heartbeats and reports are not stopped; whoever quiesces is told who holds what, until nothing is held."""
    seen: list[QuiesceProgress] = []
    async with asyncio.timeout(20), factory() as repo, factory() as other:
        await other.attempts.enqueue_many([NewAttempt("run", "a"), NewAttempt("run", "b"), NewAttempt("run", "c")])
        leases = [*await other.leases.claim("one", limit=2), *await other.leases.claim("two")]
        quiesce = asyncio.create_task(repo.control.quiesce(timeout=LONG, progress=seen.append))
        await eventually(lambda: seen)
        assert seen[0].leases == 3
        assert [(holder.worker_id, holder.leases, holder.attempt_id) for holder in seen[0].holders] == [
            ("one", 2, "a"),
            ("two", 1, "c"),
        ]
        assert await other.leases.claim("three") == []
        assert await other.leases.heartbeat_many(leases) != [None] * 3
        await other.attempts.start(leases[0])
        assert (await other.attempts.complete(leases[0])).status is AttemptStatus.COMPLETED
        await other.attempts.fail(leases[1], "no", retry_in=NOTHING)
        done, _ = await asyncio.wait([quiesce], timeout=0.2)
        assert not done
        await other.leases.release(leases[2])
        assert (await quiesce).is_quiesced
        assert [progress.leases for progress in seen[-1:]] == [1]
        assert [progress.waited for progress in seen] == sorted(progress.waited for progress in seen)
        assert await repo.leases.list() == []


async def test_who_waits_in_vain_hears_who_holds_what(repo: RuntimeRepository, clock: Clock) -> None:
    """Within its time; nobody claims all the same, and to call it again is to wait on."""
    await repo.attempts.enqueue_many([NewAttempt("run", "a"), NewAttempt("run", "b")])
    (lease,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
    for timeout in (NOTHING, SOON):
        with pytest.raises(NotQuietError, match="held: 1, by worker 'worker'") as caught:
            await repo.control.quiesce(timeout=timeout, now=clock.now)
        assert caught.value.holders == (LeaseHolder("worker", 1, "a", lease.expires_at),)
        assert caught.value.claims == ()
        assert timeout.total_seconds() <= caught.value.waited < 10
        assert await claimable(repo) == []
    await repo.attempts.complete(lease)
    assert await repo.control.quiesce(timeout=NOTHING) == await repo.control.state()


async def test_what_silent_workers_held_is_taken_from_them(repo: RuntimeRepository, clock: Clock) -> None:
    """Nobody else may be there to sweep; the lost try counts, and a late result is refused."""
    await repo.attempts.enqueue("run", attempt_id="a")
    (lease,) = await repo.leases.claim("worker", ttl=MINUTE, now=clock.now)
    await repo.control.quiesce(timeout=NOTHING, now=clock.advance(2 * MINUTE))
    assert await repo.leases.list() == []
    attempt = await repo.attempts.get("a")
    assert (attempt.status, attempt.attempt_no) == (AttemptStatus.QUEUED, 2)
    with pytest.raises(ConflictError):
        await repo.attempts.complete(lease)


@pytest.mark.parametrize("verb", ["quiesce", "pause"])
async def test_a_claim_that_had_begun_is_waited_for(factory: Factory, verb: str) -> None:
    """
    One that has not seen that it is stopped may still commit a lease: whoever stops it does not return before that, and
    then finds the lease.
    """
    async with asyncio.timeout(20), factory() as repo, factory() as other:
        await other.attempts.enqueue_many([NewAttempt("run", "a"), NewAttempt("run", "b")])
        async with other.transaction() as transaction:
            (lease,) = await transaction.leases.claim("worker")
            call = repo.control.quiesce(timeout=LONG) if verb == "quiesce" else repo.control.pause("default")
            task = asyncio.create_task(call)
            done, _ = await asyncio.wait([task], timeout=0.4)
            assert not done
        if verb == "quiesce":
            done, _ = await asyncio.wait([task], timeout=0.2)
            assert not done
            await other.attempts.complete(lease)
        await task
        assert await other.leases.claim("worker") == []


async def test_to_stop_it_twice_is_to_stop_it_once(repo: RuntimeRepository, clock: Clock) -> None:
    """When and why stay, unless another reason is given; to resume what goes on changes nothing."""
    start = clock.now
    for stop in (repo.control.quiesce, lambda *args, **now: repo.control.pause("mail", *args, **now)):
        first = await stop("one", now=start)
        assert await stop(now=clock.advance(MINUTE)) == first
        second = await stop("two", now=clock.advance(MINUTE))
        assert [stopped.reason for stopped in (second.quiesced, *second.paused) if stopped].count("two") > 0
        assert {stopped.since for stopped in (second.quiesced, *second.paused) if stopped} == {start}
    await repo.control.resume("mail")
    assert await repo.control.resume() == await repo.control.resume() == OPEN
    assert await repo.control.resume("nobody's") == OPEN


@pytest.mark.parametrize("queue", [None, "mail"])
async def test_who_waits_is_told_that_it_was_resumed(
    factory: Factory, monkeypatch: pytest.MonkeyPatch, queue: str | None
) -> None:
    """He need not look again by himself: on PostgreSQL he hears it, of the store whatever he waits for."""
    monkeypatch.setattr(notifications, "_POLL_LISTENING", 60.0)
    async with asyncio.timeout(20), factory() as repo, factory() as other:
        await other.attempts.enqueue("run", queue="mail")
        await (other.control.quiesce() if queue is None else other.control.pause(queue))
        task = asyncio.create_task(repo.attempts.wait("mail"))
        # So long it looks once a second at most, until it listens.
        done, _ = await asyncio.wait([task], timeout=1.5)
        assert not done
        await other.control.resume(queue)
        assert await task


async def test_who_quiesces_learns_that_it_was_resumed(factory: Factory) -> None:
    """Nothing is held at the end, but work goes on: that is no quiet store."""
    seen: list[QuiesceProgress] = []
    async with asyncio.timeout(20), factory() as repo, factory() as other:
        await other.attempts.enqueue("run")
        (lease,) = await other.leases.claim("worker")
        quiesce = asyncio.create_task(repo.control.quiesce(timeout=LONG, progress=seen.append))
        await eventually(lambda: seen)
        await other.control.resume()
        await other.attempts.complete(lease)
        with pytest.raises(ConflictError, match="resumed"):
            await quiesce


async def test_a_transaction_stops_nothing(repo: RuntimeRepository) -> None:
    """Nobody would see it, and what it waits for might wait for it; to resume is a part of it."""
    async with repo.transaction() as transaction:
        for stop in (transaction.control.quiesce(), transaction.control.pause("mail")):
            with pytest.raises(ConfigurationError, match="outside"):
                await stop
        assert await transaction.control.state() == OPEN
    await repo.control.quiesce()
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the whole block fails
        async with repo.transaction() as transaction:
            assert await transaction.control.resume() == OPEN
            raise ZeroDivisionError
    assert (await repo.control.state()).is_quiesced


async def test_a_switch_that_is_set_by_hand_counts(repo: RuntimeRepository) -> None:
    """Whatever it says; what bears another name is no affair of ours."""
    await repo.attempts.enqueue("run")
    for value in ("", "true", '{"reason": 7}', "[1]"):
        await execute(
            repo,
            "insert into {schema}.runtime_control values "
            f"('quiesce', '{value}', 5), ('pause:mail', '{value}', 5), ('oldest', '{value}', 5), ('theirs', '1', 5)",
        )
        since = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=5)
        assert await repo.control.state() == ControlState(Stop(since), (Stop(since, None, "mail"),))
        assert await repo.leases.claim("worker") == []
        await execute(repo, "delete from {schema}.runtime_control")
    await execute(repo, "insert into {schema}.runtime_control values ('quiesce', '1', 9000000000000000)")
    with pytest.raises(UnreadableRowError, match="runtime_control"):
        await repo.control.state()


async def test_a_state_is_plain_values(repo: RuntimeRepository, clock: Clock) -> None:
    """For a program that asks."""
    await repo.control.pause("mail", now=clock.now)
    state = await repo.control.quiesce("why", now=clock.now)
    assert json.loads(json.dumps(state.as_dict())) == {
        "quiesced": {"since": "2030-01-01T00:00:00+00:00", "reason": "why", "queue": None},
        "paused": [{"since": "2030-01-01T00:00:00+00:00", "reason": None, "queue": "mail"}],
        "oldest": None,
    }
    assert OPEN.as_dict() == {"quiesced": None, "paused": [], "oldest": None}


async def test_a_release_that_is_outdated_claims_nothing(repo: RuntimeRepository) -> None:
    """It learns why, by every claim, and finishes what it holds; nobody waits for what it may not claim."""
    await repo.attempts.enqueue_many([NewAttempt("run", "a"), NewAttempt("run", "b")])
    (lease,) = await repo.leases.claim("worker")
    await execute(repo, NEXT)
    for claim in (repo.leases.claim("worker"), repo.leases.claim_attempt("b", "worker")):
        with pytest.raises(OutdatedReleaseError) as caught:
            await claim
        assert (caught.value.found, caught.value.supported, caught.value.oldest) == (NEWEST + 1, NEWEST, NEWEST + 1)
    assert await repo.attempts.list_dispatchable() == []
    async with asyncio.timeout(10):
        assert await repo.attempts.wait("nothing is in it")
    assert (await repo.leases.heartbeat(lease)).version == lease.version
    assert (await repo.attempts.complete(lease)).status is AttemptStatus.COMPLETED


@pytest.mark.parametrize("oldest", [NEWEST, 1, NEWEST + 1, "null", "soon"])
async def test_a_release_runs_beside_a_newer_schema_that_lets_it(repo: RuntimeRepository, oldest: object) -> None:
    """As the newer release has said; anything else lets nobody."""
    await repo.attempts.enqueue("run", attempt_id="a")
    await execute(repo, NEXT)
    await execute(repo, OLDEST % oldest)
    if oldest in (NEWEST, 1):
        assert (await repo.control.state()).oldest == oldest
        assert await claimable(repo) == ["a"]
        assert await repo.leases.claim("worker", queues="empty") == []
    else:
        with pytest.raises(OutdatedReleaseError):
            await repo.leases.claim("worker")


async def test_a_claim_that_names_what_is_gone_says_why(repo: RuntimeRepository) -> None:
    """A newer release has renamed a column: that it is gone is not what there is to know."""
    await execute(repo, "alter table {schema}.runtime_queue rename column priority to precedence")
    await execute(repo, NEXT)
    with pytest.raises(OutdatedReleaseError, match=f"version {NEWEST + 1}"):
        await repo.leases.claim("worker")


def lines(caplog: pytest.LogCaptureFixture, worker: Worker) -> list[str]:
    """What was logged of a worker, from a warning on."""
    found = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [record.getMessage() for record in found if worker.worker_id in record.getMessage()]


async def test_a_worker_says_once_that_it_is_quiesced(
    factory: Factory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once that it goes on, with work or without; meanwhile it hardly asks, whatever is ready."""
    claims = Counter[str]()
    claim = Leases.claim

    async def counted(self: Leases, worker_id: str, **options: Any) -> Sequence[Lease]:
        claims[worker_id] += 1
        return await claim(self, worker_id, **options)

    monkeypatch.setattr(Leases, "claim", counted)

    async def handle(_lease: Lease) -> None:
        """There is nothing to it."""

    async with asyncio.timeout(40), factory() as repo, factory() as other:
        worker, idle = Worker(repo, handle, signals=()), Worker(repo, handle, queues="idle", signals=())
        async with running(worker, idle):
            await other.attempts.enqueue("run", attempt_id="first")
            await until(repo, "first", AttemptStatus.COMPLETED)
            await other.control.quiesce(timeout=LONG)
            await other.attempts.enqueue("run", attempt_id="a")
            await eventually(lambda: lines(caplog, worker))
            claims.clear()
            await asyncio.sleep(1)
            assert claims[worker.worker_id] <= 3
            await eventually(lambda: lines(caplog, idle))
            await other.control.resume()
            await until(repo, "a", AttemptStatus.COMPLETED)
            await eventually(lambda: len(lines(caplog, worker)) == len(lines(caplog, idle)) == 2)
    for one in (worker, idle):
        begun, ended = lines(caplog, one)
        assert "quiesced" in begun
        assert "resumed" in ended


async def test_a_worker_that_is_outdated_ends(factory: Factory, caplog: pytest.LogCaptureFixture) -> None:
    """It finishes what it has begun, claims nothing more, says why in one line, and so does ``run``."""
    begun, end = asyncio.Event(), asyncio.Event()

    async def handle(_lease: Lease) -> str:
        begun.set()
        await end.wait()
        return "done"

    async with asyncio.timeout(30), factory() as repo, factory() as other:
        worker, idle = Worker(repo, handle, signals=()), Worker(repo, handle, queues="idle", signals=())
        await repo.attempts.enqueue("run", attempt_id="a")
        tasks = [asyncio.create_task(each.run()) for each in (worker, idle)]
        await begun.wait()
        await execute(other, NEXT)
        await other.attempts.enqueue("run", attempt_id="b")
        with pytest.raises(OutdatedReleaseError):
            await tasks[1]
        await eventually(lambda: lines(caplog, worker))
        assert not tasks[0].done()
        end.set()
        with pytest.raises(OutdatedReleaseError, match=f"version {NEWEST + 1}"):
            await tasks[0]
        assert (await other.attempts.get("a")).result == "done"
        assert (await other.attempts.get("b")).status is AttemptStatus.QUEUED
    (line,) = lines(caplog, worker)
    assert f"worker {worker.worker_id} stops: a newer release has migrated" in line
