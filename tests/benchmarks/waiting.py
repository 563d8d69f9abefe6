"""
What a worker costs that has nothing to do, and how soon it begins when there is something.

PostgreSQL's statements are counted where they are sent, by asyncpg's own query logger on every connection; SQLite's
cost is this process's time on the processor while nothing else runs in it. Work is enqueued through another repository
object, with its own connection, and the time runs from the return of `enqueue`, which is after its commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from runtime_repo import PostgresRuntimeRepository, SqliteRuntimeRepository, Worker

from .contenders import RUN
from .race import Limit, Line

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from runtime_repo import Lease, RuntimeRepository
    from runtime_repo.database import Backend

STATEMENTS = Limit(1.0, at_most=True)
PROCESSOR = Limit(1.0, at_most=True)
WAKING = Limit(1.0, at_most=True)
_PROCESSOR = 0.02
_WAKING_MS = 50
_SETTLE = 1.0


@dataclass(frozen=True)
class Patience:
    """For how long an idle worker is watched, and how often one is woken."""

    seconds: float
    wakings: int


@dataclass
class _Handler:
    """Notes when each attempt began."""

    began: dict[str, float] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, lease: Lease) -> None:
        self.began[lease.attempt_id] = time.perf_counter()
        self.changed.set()

    async def of(self, attempt_id: str) -> float:
        while attempt_id not in self.began:
            self.changed.clear()
            await self.changed.wait()
        return self.began[attempt_id]


async def waiting_on_postgres(url: str, patience: Patience) -> list[Line]:
    sent = 0

    def count(_: Any) -> None:
        nonlocal sent
        sent += 1

    async def watched(connection: Any) -> None:
        connection.add_query_logger(count)

    async with (
        PostgresRuntimeRepository(url, init=watched) as repo,
        PostgresRuntimeRepository(url) as other,
        _working(repo) as handler,
    ):
        await asyncio.sleep(_SETTLE)
        before = sent
        await asyncio.sleep(patience.seconds)
        rate = (sent - before) / patience.seconds
        waking = await _waking("postgres", other, handler, patience)
    idle = Line("an idle worker's statements", "postgres", "one a second", f"{rate:.2f}/s", "1/s", rate, STATEMENTS, 1)
    return [idle, waking]


async def waiting_on_sqlite(path: Path, patience: Patience) -> list[Line]:
    async with (
        SqliteRuntimeRepository(path) as repo,
        SqliteRuntimeRepository(path) as other,
        _working(repo) as handler,
    ):
        await asyncio.sleep(_SETTLE)
        before = time.process_time()
        await asyncio.sleep(patience.seconds)
        share = (time.process_time() - before) / patience.seconds
        waking = await _waking("sqlite", other, handler, patience)
    idle = Line(
        "an idle worker's share of one core",
        "sqlite",
        f"{_PROCESSOR:.0%}",
        f"{share:.2%}",
        f"{_PROCESSOR:.0%}",
        share / _PROCESSOR,
        PROCESSOR,
        1,
    )
    return [idle, waking]


@contextlib.asynccontextmanager
async def _working(repo: RuntimeRepository) -> AsyncIterator[_Handler]:
    handler = _Handler()
    worker = Worker(repo, handler, signals=())
    running = asyncio.create_task(worker.run())
    try:
        yield handler
    finally:
        worker.stop()
        await running


async def _waking(backend: Backend, other: RuntimeRepository, handler: _Handler, patience: Patience) -> Line:
    waits = []
    for _ in range(patience.wakings):
        # Long enough for the worker to be idle, and never in step with its looks.
        await asyncio.sleep(random.uniform(0.1, 0.2))
        attempt = await other.attempts.enqueue(RUN)
        committed = time.perf_counter()
        waits.append(max(await handler.of(attempt.attempt_id) - committed, 0.0))
    ms = median(waits) * 1000
    return Line(
        "from commit to an idle worker's handler",
        backend,
        f"{_WAKING_MS} ms",
        f"{ms:.1f} ms",
        f"{_WAKING_MS} ms",
        ms / _WAKING_MS,
        WAKING,
        patience.wakings,
    )
