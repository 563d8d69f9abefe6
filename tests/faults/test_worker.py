"""A worker while its database goes away or falls silent, and workers that are killed or told to stop."""

import asyncio
import gc
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import asyncpg
import pytest

from runtime_repo import (
    AttemptStatus,
    DatabaseUnavailableError,
    Lease,
    LeaseLostError,
    NewAttempt,
    PostgresRuntimeRepository,
    Worker,
)
from runtime_repo.postgres import PostgresDatabase
from runtime_repo.worker import _Patience
from tests.contract.conftest import eventually
from tests.contract.test_worker import running, until
from tests.faults import test_silence
from tests.faults.conftest import lab_on
from tests.faults.processes import PROCESSES
from tests.faults.test_silence import Make, Relay, two_hosts, within
from tests.lab import Lab, PostgresLab, on_postgres
from tests.place import Place
from tests.postgres_server import PostgresServer

# The fixtures.
relay, other, make = test_silence.relay, test_silence.other, test_silence.make

HELD = timedelta(seconds=60)
SHORT = timedelta(seconds=0.5)
OFTEN = timedelta(seconds=0.1)


async def test_a_worker_outlives_its_database(new_server: Callable[..., PostgresServer]) -> None:
    """A result waits for the server to come back, and what is enqueued then is done, without anybody's help."""
    begun, end = asyncio.Event(), asyncio.Event()

    async def handle(lease: Lease) -> str:
        begun.set()
        await end.wait()
        return lease.attempt_id

    server = new_server(durable=True)
    async with lab_on(server) as lab:
        place = lab.place
    async with asyncio.timeout(60), place.repository() as repo:
        await repo.attempts.enqueue("run", attempt_id="a")
        async with running(Worker(repo, handle, ttl=HELD, signals=())):
            await begun.wait()
            await asyncio.to_thread(server.crash)
            end.set()
            await asyncio.to_thread(server.start)
            async with place.repository() as other:
                assert (await until(other, "a", AttemptStatus.COMPLETED)).attempt_no == 1
                await other.attempts.enqueue("run", attempt_id="b")
                assert (await until(other, "b", AttemptStatus.COMPLETED)).result == "b"


async def work(_lease: Lease) -> None:
    """What is done at once."""


@on_postgres
async def test_a_worker_asks_less_and_less_often(lab: PostgresLab) -> None:
    """For a database that is away, also where each refusal takes its time."""
    refused = 0
    is_away = False

    async def connect(*args: Any, **options: Any) -> asyncpg.Connection:
        nonlocal refused
        if is_away:
            await asyncio.sleep(0.06)
            refused += 1
            raise ConnectionRefusedError
        return await asyncpg.connect(*args, **options)

    async with asyncio.timeout(60), lab.repository(connect=connect, listen=False) as repo:
        await repo.attempts.list()
        is_away = True
        await lab.admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where starts_with(application_name, $1)",
            lab.place.schema,
        )
        async with running(Worker(repo, work, signals=())):
            await asyncio.sleep(3)
        # The sweep's, and two of each claim; without longer and longer pauses there would be forty.
        assert 4 < refused < 24


def work_without_end(place: Place, begun: Connection) -> None:
    """A process that says when it has begun an attempt, and never ends it."""

    async def handle(lease: Lease) -> None:
        begun.send(lease.attempt_id)
        await asyncio.get_running_loop().create_future()

    async def work() -> None:
        async with place.repository() as repo:
            await Worker(repo, handle, ttl=SHORT, grace=OFTEN).run()

    asyncio.run(work())


@pytest.mark.parametrize("end", ["kill", "terminate"])
async def test_another_worker_takes_over(lab: Lab, end: str) -> None:
    """From one that is killed when its lease has run out, and the try counts; from one that is told to stop at once."""
    begun, tell_begun = PROCESSES.Pipe(duplex=False)
    async with asyncio.timeout(60), lab.repository() as repo:
        await repo.attempts.enqueue("run", attempt_id="a")
        process = PROCESSES.Process(target=work_without_end, args=(lab.place, tell_begun))
        process.start()
        try:
            assert await asyncio.to_thread(begun.recv) == "a"
            getattr(process, end)()
            await asyncio.to_thread(process.join, 30)
            assert process.exitcode == (-9 if end == "kill" else 0)
            assert (await repo.attempts.get("a")).status is (
                AttemptStatus.RUNNING if end == "kill" else AttemptStatus.QUEUED
            )

            async def handle(lease: Lease) -> int:
                return lease.attempt.attempt_no

            async with running(Worker(repo, handle, sweep_every=OFTEN, signals=())):
                done = await until(repo, "a", AttemptStatus.COMPLETED)
            assert done.result == (2 if end == "kill" else 1)
        finally:
            process.kill()
            process.join()


SECOND = timedelta(seconds=1)


async def test_a_block_ends_in_time_when_the_network_is_cut(relay: Relay, make: Make) -> None:
    """At most 0.3 s after its lease could last be proved, and ``hold`` returns soon after."""
    repo = await make()
    await repo.attempts.enqueue("run")
    (lease,) = await repo.leases.claim("worker", ttl=SECOND)
    assert lease.asked_at is not None
    cancelled_at = 0.0
    relay.fall_silent()
    with pytest.raises(LeaseLostError, match="unknown"):  # noqa: PT012 - the whole block is cancelled
        async with repo.leases.hold(lease, ttl=SECOND):
            try:
                await asyncio.sleep(30)
            finally:
                cancelled_at = time.monotonic()
    assert lease.asked_at + 1 <= cancelled_at < lease.asked_at + 1.3
    assert time.monotonic() < cancelled_at + 2


@pytest.mark.parametrize("end", ["stop", "cancel"])
async def test_a_worker_stops_although_the_network_is_cut(relay: Relay, make: Make, end: str) -> None:
    """Within its grace and 5 s, with handlers that are at work in transactions of their own."""
    begun = asyncio.Semaphore(0)

    async def handle(lease: Lease) -> None:
        async with repo.transaction() as transaction:
            await transaction.jobs.upsert(lease.attempt_id, "running")
            begun.release()
            await asyncio.sleep(60)

    repo = await make(max_size=6)
    await repo.attempts.enqueue_many(NewAttempt("run") for _ in range(3))
    worker = Worker(repo, handle, grace=SECOND / 2, signals=())
    task = asyncio.create_task(worker.run())
    async with asyncio.timeout(10):
        for _ in range(3):
            await begun.acquire()
    relay.fall_silent()
    with within(5.5 if end == "stop" else 5):
        worker.stop() if end == "stop" else task.cancel()
        done, _ = await asyncio.wait([task], timeout=10)
        assert done


async def test_a_worker_works_again_when_new_connections_do(
    relay: Relay, make: Make, postgres_url: str, postgres_schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Within 10 s, however long the old ones stay silent; and of all that it tells when it begins and when it ends."""
    lost = asyncio.Semaphore(0)

    async def handle(lease: Lease) -> None:
        if lease.attempt.payload == "long":
            try:
                await asyncio.sleep(60)
            finally:
                lost.release()

    repo = await make()
    worker = Worker(repo, handle, ttl=2 * SECOND, sweep_every=SECOND, signals=())
    async with asyncio.timeout(30), PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as direct:
        await direct.attempts.enqueue_many(NewAttempt("run", payload="long", max_attempts=1) for _ in range(4))
        task = asyncio.create_task(worker.run())
        while {attempt.status for attempt in await direct.attempts.list()} != {AttemptStatus.RUNNING}:
            pass
        relay.fall_silent()
        for _ in range(4):
            await lost.acquire()
        relay.work()
        with within(10):
            await direct.attempts.enqueue("run", attempt_id="late")
            while (attempt := await direct.attempts.get("late")).status is not AttemptStatus.COMPLETED:
                assert attempt.attempt_no == 1
        # Its sweep may be waiting still for an answer over a dead connection.
        await eventually(lambda: "can go on" in caplog.text)
        worker.stop()
        await task
    begin, end = (record.getMessage() for record in caplog.records if worker.worker_id in record.getMessage())
    assert "tries again until it can" in begin
    assert "leases that it could not keep: 4" in end


async def test_reports_outlive_connections_that_fall_silent_together(
    relay: Relay, make: Make, postgres_url: str, postgres_schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten at once, in the time of their leases, heartbeats or not; nor does asyncio find anything that was left."""
    ready, end = asyncio.Semaphore(0), asyncio.Event()

    async def handle(_lease: Lease) -> None:
        ready.release()
        await end.wait()

    # One for each of them.
    repo = await make(min_size=10)
    ttl = 6 * SECOND
    worker = Worker(repo, handle, ttl=ttl, signals=())
    async with asyncio.timeout(30), PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as direct:
        await direct.attempts.enqueue_many(NewAttempt("run") for _ in range(10))
        task = asyncio.create_task(worker.run())
        for _ in range(10):
            await ready.acquire()
        await asyncio.sleep(2.1)  # a heartbeat of each
        relay.fall_silent()
        end.set()
        with within(ttl.total_seconds()):
            await asyncio.sleep(0.4)
            relay.work()
            while len(found := await direct.attempts.list(status=AttemptStatus.COMPLETED)) < 10:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert {attempt.attempt_no for attempt in found} == {1}
        worker.stop()
        await task
    await repo.close()
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_an_idle_worker_goes_over_to_the_second_host(
    relay: Relay, other: Relay, postgres_url: str, postgres_schema: str
) -> None:
    """Within 7 s of the silence of the first, although it claims nothing and sweeps nothing meanwhile."""
    async with (
        asyncio.timeout(30),
        PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as direct,
        two_hosts(relay, other, postgres_schema) as repo,
        running(Worker(repo, work, sweep_every=60 * SECOND, signals=())),
    ):
        assert isinstance(repo._database, PostgresDatabase)
        while not repo._database._listener.is_listening:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        # The queue was looked at again since.
        await asyncio.sleep(0.1)
        relay.fall_silent()
        with within(7):
            await direct.attempts.enqueue("run", attempt_id="a")
            await until(direct, "a", AttemptStatus.COMPLETED)


async def test_a_slow_database_is_waited_for_longer() -> None:
    """Once it has not answered in time, or only just; a quick answer takes that back."""
    patience = _Patience(0.1)

    async def answered(after: float) -> str:
        return await patience.within(asyncio.sleep(after, "answer"))

    with pytest.raises(DatabaseUnavailableError):
        await answered(0.15)
    for _ in range(3):
        assert await answered(0.15) == "answer"
    assert await answered(0) == "answer"
    with pytest.raises(DatabaseUnavailableError):
        await answered(0.15)
