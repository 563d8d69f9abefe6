"""
The peers of the store, each driven through its public interface in the quickest way that keeps its commits.

- PgQueuer: the layer that its own worker uses, `Queries.dequeue` and then `Queries.log_jobs` of the whole batch, on one
  connection of asyncpg's, with its tables as it installs them by default (logged). Its worker does the same and makes a
  task for each job besides; it is measured as well, in its mode that drains the queue, with a handler that does
  nothing. Its best setting is the best of these at several batch sizes.
- Procrastinate: `JobManager.fetch_job` and `finish_job` on a pool of one connection, as its worker does for each job;
  it has no batches. Its worker is measured as well, with ten jobs at a time on a pool of ten connections.
- litequeue: `pop` and `done`, which have no batches either. It sets `synchronous = normal`, which loses the last
  commits with the power; here it is put back to SQLite's default, as all others have it.
- huey: the storage of its `SqliteHuey`: `dequeue`, then `put_data` of the result, with `fsync` on. No message is
  unpickled and no task is looked up, so its own consumer is slower.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import uuid
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

import asyncpg

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

DISTRIBUTIONS = ("pgqueuer", "procrastinate", "litequeue", "huey")

_STALE = timedelta(seconds=30)
_NAME = "job"
_PROCRASTINATE_JOBS = 10


class PgQueuer:
    """Its query layer."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        queries = import_module("pgqueuer.queries")
        self.connection = connection
        self.queries = queries.Queries.from_asyncpg_connection(connection)
        self._entrypoints = {_NAME: queries.EntrypointExecutionParameter(concurrency_limit=0)}
        self._worker = uuid.uuid4()

    async def fill(self, count: int) -> None:
        await self.queries.enqueue([_NAME] * count, [b'{"n":1}'] * count, [0] * count)

    async def enqueue(self, payloads: Sequence[bytes]) -> None:
        await self.queries.enqueue([_NAME] * len(payloads), list(payloads), [0] * len(payloads))

    async def clear(self) -> None:
        await self.connection.execute("truncate pgqueuer, pgqueuer_log")

    async def work(self, count: int, size: int) -> None:
        for _ in range(count // size):
            assert await self.step(size) == size

    async def step(self, size: int) -> int:
        jobs = await self.queries.dequeue(size, self._entrypoints, self._worker, None, _STALE)
        if jobs:
            await self.queries.log_jobs([(job, "successful", None) for job in jobs])
        return len(jobs)


class PgQueuerWorker(PgQueuer):
    """Its worker, on a connection of its own; it works until nothing is left."""

    async def work(self, count: int, size: int) -> None:
        module = import_module("pgqueuer")
        worker = module.QueueManager(self.queries)
        done = itertools.count()

        @worker.entrypoint(_NAME)  # type: ignore[untyped-decorator]
        async def job(_job: Any) -> None:
            next(done)

        mode = import_module("pgqueuer.types").QueueExecutionMode.drain
        await worker.run(batch_size=size, mode=mode, log_aggregation_interval=timedelta(0))
        assert next(done) >= count


@contextlib.asynccontextmanager
async def pgqueuer(url: str) -> AsyncIterator[tuple[PgQueuer, PgQueuerWorker]]:
    logging.getLogger("pgqueuer").setLevel(logging.ERROR)
    connection = await asyncpg.connect(url)
    try:
        layer = PgQueuer(connection)
        await layer.queries.install()
        yield layer, PgQueuerWorker(connection)
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def pgqueuers(url: str, count: int) -> AsyncIterator[list[PgQueuer]]:
    """So many of its query layers more, each with a connection of its own."""
    connections = [await asyncpg.connect(url) for _ in range(count)]
    try:
        yield [PgQueuer(connection) for connection in connections]
    finally:
        for connection in connections:
            await connection.close()


class Procrastinate:
    """Its query layer."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._jobs = import_module("procrastinate.jobs")

    async def fill(self, count: int) -> None:
        job = self._app.tasks[_NAME].configure(queue="default").job
        jobs = [job.evolve(task_kwargs={"n": n}) for n in range(count)]
        await self._app.job_manager.batch_defer_jobs_async(jobs)

    async def work(self, count: int, size: int) -> None:
        assert size == 1
        manager = self._app.job_manager
        worker = await manager.register_worker()
        for _ in range(count):
            job = await manager.fetch_job(None, worker)
            assert job is not None
            await manager.finish_job(job, self._jobs.Status.SUCCEEDED, delete_job=False)
        await manager.unregister_worker(worker)


class ProcrastinateWorker(Procrastinate):
    """Its worker, with several jobs at a time; it works until nothing is left."""

    async def work(self, count: int, size: int) -> None:  # noqa: ARG002
        await self._app.run_worker_async(
            wait=False, concurrency=_PROCRASTINATE_JOBS, listen_notify=False, install_signal_handlers=False
        )


@contextlib.asynccontextmanager
async def procrastinate(url: str) -> AsyncIterator[tuple[Procrastinate, ProcrastinateWorker]]:
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    module = import_module("procrastinate")

    def app(size: int) -> Any:
        made = module.App(connector=module.PsycopgConnector(conninfo=url, min_size=size, max_size=size))

        @made.task(name=_NAME)  # type: ignore[untyped-decorator]
        async def job(n: int) -> None:
            pass

        return made

    single, many = app(1), app(_PROCRASTINATE_JOBS)
    async with single.open_async(), many.open_async():
        await single.schema_manager.apply_schema_async()
        yield Procrastinate(single), ProcrastinateWorker(many)


class LiteQueue:
    """Its queue."""

    def __init__(self, path: Path) -> None:
        self.queue = import_module("litequeue").LiteQueue(path)
        self.queue.conn.execute("pragma synchronous = full")

    async def fill(self, count: int) -> None:
        self.queue.conn.execute("begin immediate")
        for _ in range(count):
            self.queue.put('{"n":1}')
        self.queue.conn.execute("commit")

    async def work(self, count: int, size: int) -> None:
        assert size == 1
        for _ in range(count):
            self.queue.done(self.queue.pop().message_id)


class Huey:
    """The storage of its `SqliteHuey`."""

    def __init__(self, path: Path) -> None:
        self.storage = import_module("huey").SqliteHuey(filename=str(path), fsync=True).storage
        self._keys = itertools.count()

    async def fill(self, count: int) -> None:
        with self.storage.db(commit=True) as cursor:
            rows = [(self.storage.name, b'{"n":1}', 0)] * count
            cursor.executemany("insert into task (queue, data, priority) values (?, ?, ?)", rows)

    async def work(self, count: int, size: int) -> None:
        assert size == 1
        for _ in range(count):
            assert self.storage.dequeue() is not None
            self.storage.put_data(str(next(self._keys)), b"null", is_result=True)


@contextlib.contextmanager
def sqlite_peers(folder: Path) -> Iterator[tuple[LiteQueue, Huey]]:
    litequeue, huey = LiteQueue(folder / "litequeue.db"), Huey(folder / "huey.db")
    try:
        yield litequeue, huey
    finally:
        litequeue.queue.close()
        huey.storage.close()
