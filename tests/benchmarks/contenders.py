"""
Who works: this library, and the bare drivers with the library's own statements.

A bare driver prepares the text of the same named queries on one connection, sends it the same arguments and reads the
rows that it needs. It checks nothing, makes no records, and its ids are numbers; so it bounds what a library over these
statements can reach, at the same durability. Both sides work on the same tables. The peers live in `queue_peers.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sqlite3
from typing import TYPE_CHECKING, Any, Protocol

import asyncpg

from runtime_repo import NewAttempt, PostgresRuntimeRepository, SqliteRuntimeRepository
from runtime_repo.queries import bounded, load_queries
from runtime_repo.sqlite.database import _TOKENS as SQLITE_TOKENS
from runtime_repo.sqlite.database import PREPARED
from runtime_repo.values import Columns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from asyncpg.prepared_stmt import PreparedStatement

    from runtime_repo import RuntimeRepository
    from runtime_repo.database import Row

TTL_MS = 30_000
QUEUE = "default"
QUEUES = json.dumps([QUEUE])
RUN = "run-1"
WORKER = "worker-1"
_PER_FILL = 1000
_WORN = 20_000


class Store(Protocol):
    """Whoever keeps work and hands it out."""

    async def fill(self, count: int) -> None:
        """Store so many units of work, in whichever way is quickest."""

    async def work(self, count: int, size: int) -> None:
        """Claim and complete so many, *size* at a time."""


class Stepper(Store, Protocol):
    """Whoever may have rivals for what it is to work on."""

    async def step(self, size: int) -> int:
        """Claim and complete up to so many, and say how many they were."""


class Several:
    """As many workers at once, each with a connection of its own."""

    def __init__(self, workers: Sequence[Stepper]) -> None:
        self._workers = workers

    async def fill(self, count: int) -> None:
        await self._workers[0].fill(count)

    async def work(self, count: int, size: int) -> None:
        left = count

        async def working(worker: Stepper) -> None:
            nonlocal left
            while left > 0:
                done = await worker.step(size)
                left -= done

        await asyncio.gather(*(working(worker) for worker in self._workers))
        assert left == 0


class Ours:
    """
    The library's verbs, as in its README: one claim, then one `complete_many`, or one `complete` of a single one, and a
    vacuum after 20,000 claims.
    """

    def __init__(self, repo: RuntimeRepository) -> None:
        self.repo = repo
        self._claimed = 0

    async def enqueue(self, attempts: Sequence[NewAttempt]) -> None:
        await self.repo.attempts.enqueue_many(attempts)

    async def fill(self, count: int) -> None:
        for start in range(0, count, _PER_FILL):
            await self.enqueue([NewAttempt(RUN, payload={"n": n}) for n in range(start, min(start + _PER_FILL, count))])

    async def work(self, count: int, size: int) -> None:
        for _ in range(count // size):
            assert await self.step(size) == size

    async def step(self, size: int) -> int:
        leases = await self.repo.leases.claim(WORKER, limit=size)
        if size == 1 and leases:
            await self.repo.attempts.complete(leases[0])
        else:
            await self.repo.attempts.complete_many([(lease, None) for lease in leases])
        self._claimed += len(leases)
        if self._claimed >= _WORN:
            self._claimed = 0
            await self.repo.attempts.vacuum()
        return len(leases)

    async def work_in_tasks(self, count: int, tasks: int) -> None:
        """Claim and complete so many one by one, in so many tasks at once."""
        await asyncio.gather(*(self.work(count // tasks, 1) for _ in range(tasks)))


class Bare:
    """The same statements, without the library."""

    def __init__(self, ours: Ours) -> None:
        self._ours = ours
        self._numbers = itertools.count()

    async def fill(self, count: int) -> None:
        await self._ours.fill(count)

    def new_id(self) -> str:
        """A number, as long as the library's ids are."""
        return f"{next(self._numbers):036}"

    async def fetch(self, query: str, *args: Any) -> Sequence[Row]:
        raise NotImplementedError

    async def work(self, count: int, size: int) -> None:
        for _ in range(count // size):
            rows = await self.fetch(bounded("leases.claim", size), QUEUES, WORKER, TTL_MS, self.new_id(), None, size)
            assert len(rows) == size
            if size == 1:
                (row,) = rows
                done = row["attempt_id"], row["lease_version"], None, None, row["lease_id"]
                await self.fetch("attempts.complete", *done)
            else:
                given = Columns(
                    attempt_id=[row["attempt_id"] for row in rows],
                    token=[str(row["lease_version"]) for row in rows],
                    lease_id=[row["lease_id"] for row in rows],
                    result_json=[None] * len(rows),
                )
                await self.fetch("attempts.complete_many", given, None)


class PostgresBare(Bare):
    """Prepared statements on one connection of asyncpg's."""

    def __init__(self, ours: Ours, connection: asyncpg.Connection, tokens: Mapping[str, str]) -> None:
        super().__init__(ours)
        self.connection = connection
        self.tokens = tokens
        self.queries = load_queries("postgres", **tokens)
        self._bulk = _BULK.replace("{schema}", tokens["schema"]).replace("{now_ms}", tokens["now_ms"])
        self._prepared: dict[str, PreparedStatement] = {}

    async def fetch(self, query: str, *args: Any) -> Sequence[Row]:
        statement = self._prepared.get(query)
        if statement is None:
            text = self._bulk if query == "bulk" else self.queries[query]
            statement = self._prepared[query] = await self.connection.prepare(text)
        return await statement.fetch(*args)

    async def enqueue(self, payloads: Sequence[Any]) -> None:
        """The same rows by `unnest`: what is left to do is to make ids, to write JSON and to build the arrays."""
        count = len(payloads)
        await self.fetch(
            "bulk",
            [self.new_id() for _ in range(count)],
            [RUN] * count,
            [None] * count,
            [QUEUE] * count,
            [0] * count,
            [json.dumps(payload) for payload in payloads],
            [10] * count,
        )


_BULK = """
with stored as (
    insert into {schema}.runtime_attempts
           (attempt_id, run_id, attempt_no, status, retry_at_ms,
            queue, priority, payload_json, max_attempts, enqueued_at_ms)
    select attempt_id, run_id, 1, 'queued', retry_at_ms, queue, priority, payload_json, max_attempts, {now_ms}
      from unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::int[], $6::text[], $7::int[])
           as given (attempt_id, run_id, retry_at_ms, queue, priority, payload_json, max_attempts)
    returning attempt_id, queue, priority, enqueued_at_ms, retry_at_ms
)
insert into {schema}.runtime_queue (attempt_id, queue, priority, enqueued_at_ms, retry_at_ms)
select attempt_id, queue, priority, enqueued_at_ms, retry_at_ms from stored
"""


class SqliteBare(Bare):
    """The standard library's `sqlite3` in one thread; several statements of a query in one transaction."""

    def __init__(self, ours: Ours, connection: sqlite3.Connection) -> None:
        super().__init__(ours)
        self.connection = connection
        self.tokens = SQLITE_TOKENS

    async def fetch(self, query: str, *args: Any) -> Sequence[Row]:
        prepared = PREPARED[query]
        if prepared.is_single:
            return prepared.run(self.connection, args)
        self.connection.execute("begin immediate")
        rows = prepared.run(self.connection, args)
        self.connection.execute("commit")
        return rows


@contextlib.asynccontextmanager
async def on_postgres(url: str, schema: str = "runtime") -> AsyncIterator[tuple[Ours, PostgresBare]]:
    """Both contenders on the same tables, with one connection each."""
    async with PostgresRuntimeRepository(url, schema=schema, max_size=1) as repo:
        connection = await asyncpg.connect(url)
        try:
            ours = Ours(repo)
            yield ours, PostgresBare(ours, connection, repo._postgres.tokens)
        finally:
            await connection.close()


@contextlib.asynccontextmanager
async def on_sqlite(path: Path) -> AsyncIterator[tuple[Ours, SqliteBare]]:
    """Both contenders on the same file; SQLite's own durability on both sides, as the library leaves it."""
    async with SqliteRuntimeRepository(path) as repo:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            ours = Ours(repo)
            yield ours, SqliteBare(ours, connection)
