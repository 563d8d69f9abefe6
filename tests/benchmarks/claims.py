"""
What a claim costs by the size of the table, after many have gone through, and behind an old snapshot.

A claim is measured alone, in a transaction that is rolled back: no commit evens out what the sizes differ in, and the
next one finds the same rows. What it looks at is told by the database: on PostgreSQL the rows that every scan of the
plan returned or removed (EXPLAIN ANALYZE), with generic and custom plans, before and after ANALYZE. SQLite's scan
status is not compiled into the usual builds, so there the virtual machine's steps are counted, and the query plans
must be the same. With large tables no claim may look at more than with small ones.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg

from runtime_repo.queries import bounded
from runtime_repo.sqlite.database import PREPARED

from .contenders import QUEUE, TTL_MS, WORKER, on_postgres, on_sqlite
from .race import Limit, Line, race

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from runtime_repo import RuntimeRepository
    from runtime_repo.database import Backend

    from .contenders import Ours, PostgresBare, SqliteBare
    from .race import Turn

QUEUES = {"one queue": (QUEUE,), "four queues": (QUEUE, "mail", "reports", "images")}
SIZES = (1, 100)
SMALL = 1000
_STEP = 1000
_SNAPSHOT_CLAIM = 100

LATENCY = Limit(2.5, at_most=True)
ENDURANCE, EVEN = Limit(0.8), Limit(0.5)
RECOVERY = Limit(1.5, at_most=True)

# Both engines understand it. A third of everything has each priority; ids and ages go up together, as in life.
_FILL = """
with recursive series (n) as (select 1 union all select n + 1 from series where n < {count})
insert into {schema}.runtime_attempts
       (attempt_id, run_id, attempt_no,
        status, retry_at_ms, queue, priority,
        payload_json, max_attempts, enqueued_at_ms)
select '{queue}-{kind}-' || cast(10000000 + n as text), 'run-' || cast(n / 100 as text), 1,
       case when {retry_at} is null or n % 2 = 0 then 'queued' else 'retry_backoff' end, {retry_at}, '{queue}', n % 3,
       '{{"n":1}}', 10, {now_ms} - 86400000 + n / 10
  from series
"""
_LIST = """
insert into {schema}.runtime_queue (attempt_id, queue, priority, enqueued_at_ms, retry_at_ms)
select attempt_id, queue, priority, enqueued_at_ms, retry_at_ms
  from {schema}.runtime_attempts
 where attempt_id like '{queue}-{kind}-%'
"""
_KINDS = {"ready": "null", "delayed": "{now_ms} + 86400000 + n", "due": "{now_ms} - 3600000 + n / 10"}


class Look(NamedTuple):
    """What a claim looked at."""

    seen: int
    what: str
    plan: tuple[str, ...] = ()


class Tables:
    """One size of the tables on one backend, and the library that claims from them."""

    backend: Backend

    def __init__(self, ours: Ours, tokens: Mapping[str, str]) -> None:
        self._repo = ours.repo
        self._tokens = tokens

    @property
    def schema(self) -> str:
        return self._tokens["schema"]

    async def fill(self, kind: str, count: int, queues: Sequence[str]) -> None:
        """Store so many of a kind, in equal parts for the queues."""
        retry_at = _KINDS[kind].format(**self._tokens)
        for queue in queues:
            given = {"count": count // len(queues), "kind": kind, "queue": queue, "retry_at": retry_at}
            await self.execute(_FILL.format(**given, **self._tokens))
            await self.execute(_LIST.format(**given, **self._tokens))

    async def execute(self, statement: str) -> None:
        raise NotImplementedError

    async def looks(self, queues: Sequence[str], size: int) -> list[Look]:
        """What such a claim looks at, as the database tells it."""
        raise NotImplementedError

    def claiming(self, queues: Sequence[str], size: int) -> Turn:
        """How many seconds a claim takes."""

        async def turn() -> float:
            return await _seconds_of_a_claim(self._repo, queues, size)

        return turn


class PostgresTables(Tables):
    backend: Backend = "postgres"

    def __init__(self, ours: Ours, bare: PostgresBare) -> None:
        super().__init__(ours, bare.tokens)
        self._bare = bare

    async def execute(self, statement: str) -> None:
        await self._bare.connection.execute(statement)

    async def looks(self, queues: Sequence[str], size: int) -> list[Look]:
        return [await self._look(queues, size, mode) for mode in ("force_generic_plan", "force_custom_plan")]

    async def _look(self, queues: Sequence[str], size: int, mode: str) -> Look:
        query, *arguments = _claim(queues, size)
        given = ", ".join("null" if value is None else f"'{value}'" for value in arguments)
        connection = self._bare.connection
        await connection.execute(f"set plan_cache_mode = {mode}; prepare measured as {self._bare.queries[query]}")
        transaction = connection.transaction()
        await transaction.start()
        try:
            plan = await connection.fetchval(f"explain (analyze, buffers, format json) execute measured ({given})")
        finally:
            await transaction.rollback()
            await connection.execute("deallocate measured; reset plan_cache_mode")
        return Look(sum(_rows_of(node) for node in _nodes(json.loads(plan)[0]["Plan"])), "rows")


class SqliteTables(Tables):
    backend: Backend = "sqlite"

    def __init__(self, ours: Ours, bare: SqliteBare) -> None:
        super().__init__(ours, bare.tokens)
        self._bare = bare

    async def execute(self, statement: str) -> None:
        self._bare.connection.execute(statement)

    async def looks(self, queues: Sequence[str], size: int) -> list[Look]:
        query, *arguments = _claim(queues, size)
        prepared = PREPARED[query]
        connection = self._bare.connection
        steps = 0
        plan: list[str] = []

        def step() -> None:
            nonlocal steps
            steps += 1

        connection.execute("begin immediate")
        try:
            # All before the first one runs: to explain one would change what the next is told by changes().
            for statement in prepared.statements:
                given = [None] * statement.text.count("?")
                plan += [row["detail"] for row in connection.execute(f"explain query plan {statement.text}", given)]
            connection.set_progress_handler(step, 1)
            prepared.run(connection, arguments)
        finally:
            connection.set_progress_handler(None, 1)
            connection.rollback()
        return [Look(steps, "steps", tuple(plan))]


def _claim(queues: Sequence[str], size: int) -> tuple[Any, ...]:
    """The named query of a claim, and its arguments."""
    return bounded("leases.claim", size), json.dumps(queues), WORKER, TTL_MS, "claim", None, size


def _nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from _nodes(part)


def _rows_of(node: Mapping[str, Any]) -> int:
    """The rows that a scan of a table looked at."""
    if not node["Node Type"].endswith("Scan") or "Relation Name" not in node:
        return 0
    removed = sum(count for name, count in node.items() if name.startswith("Rows Removed by"))
    return round(float(node["Actual Rows"] + removed) * int(node["Actual Loops"]))


class _Undo(Exception):  # noqa: N818 - it is no error: it ends a transaction
    pass


async def _seconds_of_a_claim(repo: RuntimeRepository, queues: Sequence[str], size: int) -> float:
    took = 0.0
    with contextlib.suppress(_Undo):
        async with repo.transaction() as transaction:
            start = time.perf_counter()
            leases = await transaction.leases.claim(WORKER, limit=size, queues=queues)
            took = time.perf_counter() - start
            assert len(leases) == size
            raise _Undo
    return took


@dataclass(frozen=True)
class Scale:
    """How large is large, and how often is measured."""

    large: int
    due: int
    claims: int
    through: int
    behind_snapshot: int


async def sizes_on_postgres(url: str, scale: Scale) -> list[Line]:
    """Each table is a runtime schema of its own."""

    @contextlib.asynccontextmanager
    async def opened(name: str) -> AsyncIterator[Tables]:
        async with on_postgres(url, name) as contenders:
            yield PostgresTables(*contenders)

    return await _by_size(opened, scale)


async def sizes_on_sqlite(folder: Path, scale: Scale) -> list[Line]:
    """Each table is a file of its own."""

    @contextlib.asynccontextmanager
    async def opened(name: str) -> AsyncIterator[Tables]:
        async with on_sqlite(folder / f"{name}.db") as contenders:
            yield SqliteTables(*contenders)

    return await _by_size(opened, scale)


async def _by_size(opened: Callable[[str], AbstractAsyncContextManager[Tables]], scale: Scale) -> list[Line]:
    lines = []
    for name, queues in QUEUES.items():
        async with opened(f"small {name}") as small, opened(f"large {name}") as large:
            for tables, count in ((small, SMALL), (large, scale.large)):
                await tables.fill("ready", count, queues)
                await tables.fill("delayed", count, queues)
            lines += await _claims(small, large, name, scale, "")
            for tables in (small, large):
                await tables.fill("due", scale.due, queues)
            lines += await _claims(small, large, name, scale, f", {scale.due:,} due")
    return lines


async def _claims(small: Tables, large: Tables, name: str, scale: Scale, backlog: str) -> list[Line]:
    """Claim from both in turns, after having looked at how it is done."""
    queues = QUEUES[name]
    looks: dict[tuple[str, int], list[Look]] = {}
    for _ in ("with the statistics of before", "with those of now"):
        for which, tables in (("small", small), ("large", large)):
            for size in SIZES:
                looks.setdefault((which, size), []).extend(await tables.looks(queues, size))
            await tables.execute("analyze")
    lines = []
    for size in SIZES:
        turns = {"large": large.claiming(queues, size), "small": small.claiming(queues, size)}
        figures = await race(turns, scale.claims)
        ours, theirs = (f"{median(figures[which]) * 1000:.2f} ms, {_shown(looks[which, size])}" for which in turns)
        flaw = _flaw(looks["small", size], looks["large", size])
        lines.append(
            Line(
                f"claim {size} of {name}{backlog}",
                large.backend,
                "small tables",
                ours,
                theirs,
                median(figures["large"]) / median(figures["small"]),
                LATENCY,
                scale.claims,
                flaw,
            )
        )
    return lines


def _flaw(small: Sequence[Look], large: Sequence[Look]) -> str:
    if len({look.plan for look in (*small, *large)}) > 1:
        return "more than one plan"
    # How rows are sorted takes SQLite a few steps more or less.
    grows = max(look.seen for look in large) > 1.01 * max(look.seen for look in small)
    return "looks at more" if grows else ""


def _shown(looks: Sequence[Look]) -> str:
    counts = sorted({look.seen for look in looks})
    return f"{' or '.join(f'{count:,}' for count in counts)} {looks[0].what}"


async def endurance(backend: Backend, old: Ours, new: Ours, scale: Scale) -> list[Line]:
    """
    Let the last tenth of many attempts through an old store, in turns with the first tenth through a new one; and see
    how much slower the slowest step of all was than the usual one.
    """
    rounds = max(scale.through // _STEP // 10, scale.claims)
    await old.fill(_STEP)
    steps = [await _pass_through(old) for _ in range(scale.through // _STEP - rounds)]
    await new.fill(_STEP)
    figures = await race({"old": partial(_pass_through, old), "new": partial(_pass_through, new)}, rounds)
    steps += figures["old"]
    last, first, slowest, usual = median(figures["old"]), median(figures["new"]), min(steps), median(steps)
    work = f"enqueue, claim, complete: the last of {scale.through:,}"
    even = f"enqueue, claim, complete {scale.through:,}: the slowest {_STEP:,}"
    return [
        Line(work, backend, "the first", f"{last:,.0f}/s", f"{first:,.0f}/s", last / first, ENDURANCE, rounds),
        Line(even, backend, "the median", f"{slowest:,.0f}/s", f"{usual:,.0f}/s", slowest / usual, EVEN, len(steps)),
    ]


async def behind_a_snapshot(url: str, scale: Scale) -> list[Line]:
    """
    Hold a snapshot open while attempts go through, and see what a claim costs meanwhile and afterwards.

    Every claim takes turns with one from tables where nothing happens, and is measured by that: between before and
    afterwards the machine may have become slower.
    """
    async with on_postgres(url, "busy") as busy, on_postgres(url, "calm") as calm:
        tables = {"busy": PostgresTables(*busy), "calm": PostgresTables(*calm)}
        turns = {name: each.claiming((QUEUE,), _SNAPSHOT_CLAIM) for name, each in tables.items()}

        async def cost() -> tuple[float, str]:
            figures = await race(turns, scale.claims)
            took, calm_took = median(figures["busy"]), median(figures["calm"])
            return took / calm_took, f"{took * 1000:.2f} ms, calm {calm_took * 1000:.2f} ms"

        for ours, _ in (busy, calm):
            await ours.fill(_STEP)
            for _ in range(scale.behind_snapshot // _STEP):
                await _pass_through(ours)
        await _vacuum(*tables.values())
        before, before_shown = await cost()
        other = await asyncpg.connect(url)
        try:
            async with other.transaction(isolation="repeatable_read"):
                await other.fetchval("select count(*) from busy.runtime_leases")
                for _ in range(scale.behind_snapshot // _STEP):
                    await _pass_through(busy[0])
                during, during_shown = await cost()
        finally:
            await other.close()
        await _vacuum(tables["busy"])
        after, after_shown = await cost()
    work = f"claim {_SNAPSHOT_CLAIM}, {scale.behind_snapshot:,} behind a snapshot"
    runs = scale.claims
    return [
        Line(work, "postgres", "before", during_shown, before_shown, during / before, None, runs),
        Line(f"{work}, then vacuum", "postgres", "before", after_shown, before_shown, after / before, RECOVERY, runs),
    ]


async def _pass_through(ours: Ours) -> float:
    """How many are enqueued, claimed and completed in a second."""
    start = time.perf_counter()
    await ours.fill(_STEP)
    await ours.work(_STEP, 100)
    return _STEP / (time.perf_counter() - start)


async def _vacuum(*tables: PostgresTables) -> None:
    for each in tables:
        for name in ("runtime_attempts", "runtime_queue", "runtime_leases", "runtime_finished"):
            await each.execute(f"vacuum {each.schema}.{name}")
