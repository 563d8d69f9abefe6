"""
What the store reaches: `python -m tests.benchmarks.store` prints one table, and exits with 1 if a limit is missed.

Every line compares two contenders that took turns in this run, in small rounds: the ratio is ours to theirs, of
medians, and every limit says in which direction. A bare driver does the same statements without the library
(`contenders.py`), the peers are other queues (`queue_peers.py`), and the rest compares the store with itself: by the
size of its tables, after many attempts, behind an old snapshot (`claims.py`), and while it waits (`waiting.py`). The
whole takes about eight minutes where nobody else wants the processors.

PostgreSQL is the server of ORIS_TEST_POSTGRES_URL (its role must be allowed to create databases), else a private one
that keeps its commits as in production, with the default settings of autovacuum. SQLite writes ahead, and waits for
the disk at each commit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import asyncpg

from runtime_repo import NewAttempt

from . import plot, queue_peers
from .claims import Scale, behind_a_snapshot, endurance, sizes_on_postgres, sizes_on_sqlite
from .contenders import RUN, Several, on_postgres, on_sqlite
from .race import HEAD, Limit, Line, enqueuing, race, sharing, working, writing
from .shared import circumstances, own_database, postgres_server, table
from .waiting import Patience, waiting_on_postgres, waiting_on_sqlite

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from runtime_repo.database import Backend

    from .contenders import Store

SERVER = {"shared_buffers": "512MB"}
"""As it comes, but with more than the tests' own memory."""

BATCH, SINGLY, ENQUEUE = "claim and complete by 100", "claim and complete singly", "enqueue_many of 10,000"
LIMITS: dict[tuple[str, Backend], Limit] = {
    (BATCH, "postgres"): Limit(0.8),
    (SINGLY, "postgres"): Limit(0.8),
    (ENQUEUE, "postgres"): Limit(0.7),
    (BATCH, "sqlite"): Limit(0.7),
    (SINGLY, "sqlite"): Limit(0.4),
}
TASKS = {8: Limit(2.5), 32: Limit(3.5)}
"""On SQLite so many tasks of one process must do so many times as much as one."""
PGQUEUER = {1: Limit(1.25), 10: Limit(1.25), 100: Limit(1.25), 1000: Limit(1.1)}
"""By how many are claimed and completed at a time."""
AT_ONCE = {4: Limit(1.25), 8: Limit(1.25)}
"""By how many workers claim and complete at once, so many each time:"""
EACH = 10
ENQUEUED = Limit(1.3)
PROCRASTINATE = Limit(10.0)
BATCHES = (2, 10, 100, 1000)
"""By how many at a time the peers on SQLite, which know no batches, must be passed."""
AHEAD = Limit(1.0)
LESS = Limit(1.0, at_most=True)


@dataclass(frozen=True)
class Effort:
    """How often everything is done, and with how much."""

    rounds: int
    enqueues: int
    peer_rounds: int
    by_hundred: int
    singles: int
    scale: Scale
    patience: Patience


FULL = Effort(
    rounds=40,
    enqueues=20,
    peer_rounds=15,
    by_hundred=500,
    singles=50,
    scale=Scale(large=1_000_000, due=10_000, claims=40, through=1_000_000, behind_snapshot=50_000),
    patience=Patience(seconds=20, wakings=50),
)
QUICK = Effort(
    rounds=10,
    enqueues=4,
    peer_rounds=3,
    by_hundred=500,
    singles=30,
    scale=Scale(large=20_000, due=2_000, claims=10, through=20_000, behind_snapshot=5_000),
    patience=Patience(seconds=3, wakings=8),
)
_LARGEST = 1000
_PAYLOADS = [{"n": number} for number in range(10_000)]


async def limits_on_postgres(url: str, effort: Effort) -> list[Line]:
    async with own_database(url, "limits") as own, on_postgres(own) as (ours, bare):

        async def clear() -> None:
            await bare.connection.execute("truncate runtime.runtime_attempts, runtime.runtime_queue")

        new = [NewAttempt(RUN, payload=payload) for payload in _PAYLOADS]
        given = [replace(attempt, attempt_id=f"{number:036}") for number, attempt in enumerate(new)]
        turns = {
            ENQUEUE: enqueuing(ours.enqueue, new, clear),
            f"{ENQUEUE}, ids given": enqueuing(ours.enqueue, given, clear),
            "bare": enqueuing(bare.enqueue, _PAYLOADS, clear),
        }
        figures = await race(turns, effort.enqueues)
        lines = [
            _line(work, "postgres", "bare driver", figures, LIMITS.get((work, "postgres")), work)
            for work in turns
            if work != "bare"
        ]
        return [*lines, *await _works(ours, bare, "postgres", effort)]


async def limits_on_sqlite(folder: Path, effort: Effort) -> list[Line]:
    async with on_sqlite(folder / "limits.db") as (ours, bare):
        return await _works(ours, bare, "sqlite", effort)


async def tasks_on_sqlite(folder: Path, effort: Effort) -> list[Line]:
    async with on_sqlite(folder / "tasks.db") as (ours, _):
        turns = {_tasks(tasks): sharing(ours, tasks, effort.singles) for tasks in (1, *TASKS)}
        figures = await race(turns, effort.peer_rounds)
    return [
        _line(_tasks(tasks), "sqlite", "one task", figures, limit, _tasks(tasks), _tasks(1))
        for tasks, limit in TASKS.items()
    ]


def _tasks(tasks: int) -> str:
    return f"{SINGLY}, {tasks} tasks"


async def _works(ours: Store, bare: Store, backend: Backend, effort: Effort) -> list[Line]:
    await ours.fill(effort.by_hundred)
    lines = []
    for work, count, size in ((BATCH, effort.by_hundred, 100), (SINGLY, effort.singles, 1)):
        turns = {name: working(who, count, size) for name, who in (("ours", ours), ("bare", bare))}
        figures = await race(turns, effort.rounds)
        lines.append(_line(work, backend, "bare driver", figures, LIMITS[work, backend]))
    return lines


async def peers_on_postgres(url: str, effort: Effort) -> list[Line]:
    async with own_database(url, "ours") as own, on_postgres(own) as (ours, _):
        async with own_database(url, "pgqueuer") as theirs, queue_peers.pgqueuer(theirs) as (layer, worker):
            turns = {
                f"{name} by {size}": working(who, min(_LARGEST, effort.singles * size), size)
                for name, who in (("ours", ours), ("PgQueuer", layer), ("PgQueuer's worker", worker))
                for size in PGQUEUER
            }
            figures = await race(turns, effort.peer_rounds)
        lines = [
            _line(
                f"claim and complete by {size}",
                "postgres",
                peer,
                figures,
                limit,
                f"ours by {size}",
                f"{peer} by {size}",
            )
            for size, limit in PGQUEUER.items()
            for peer in ("PgQueuer", "PgQueuer's worker")
        ]
        lines += await pgqueuer_on_postgres(url, effort)
        async with own_database(url, "procrastinate") as theirs, queue_peers.procrastinate(theirs) as (layer, worker):
            turns = {"ours": working(ours, _LARGEST, 100)}
            for name, who in (("Procrastinate", layer), ("Procrastinate's worker", worker)):
                turns[name] = working(who, effort.singles, 1)
            figures = await race(turns, effort.peer_rounds)
        return [
            *lines,
            *(_line(BATCH, "postgres", peer, figures, PROCRASTINATE, "ours", peer) for peer in turns if peer != "ours"),
        ]


async def pgqueuer_on_postgres(url: str, effort: Effort) -> list[Line]:
    """What else is compared with it: many at once, on both sides."""
    most = max(AT_ONCE)
    async with contextlib.AsyncExitStack() as stack:
        own, theirs = [await stack.enter_async_context(own_database(url, name)) for name in ("many", "manyqueuer")]
        ours, bare = await stack.enter_async_context(on_postgres(own))
        rivals = [await stack.enter_async_context(on_postgres(own)) for _ in range(most - 1)]
        layer, _ = await stack.enter_async_context(queue_peers.pgqueuer(theirs))
        layers = [layer, *await stack.enter_async_context(queue_peers.pgqueuers(theirs, most - 1))]
        workers = [ours, *(rival for rival, _ in rivals)]

        async def clear() -> None:
            await bare.connection.execute("truncate runtime.runtime_attempts, runtime.runtime_queue")

        async def wal() -> int:
            written: int = await bare.connection.fetchval("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
            return int(written)

        given = [NewAttempt(RUN, payload=payload) for payload in _PAYLOADS]
        bytes_ = [json.dumps(payload).encode() for payload in _PAYLOADS]
        turns = {
            "enqueue": enqueuing(ours.enqueue, given, clear),
            "theirs": enqueuing(layer.enqueue, bytes_, layer.clear),
        }
        figures = await race(turns, effort.enqueues)
        lines = [_line(ENQUEUE, "postgres", "PgQueuer", figures, ENQUEUED, "enqueue", "theirs")]
        for number, limit in AT_ONCE.items():
            turns = {
                name: working(Several(who[:number]), effort.by_hundred, EACH)
                for name, who in (("ours", workers), ("PgQueuer", layers))
            }
            figures = await race(turns, effort.peer_rounds)
            work = f"claim and complete by {EACH}, {number} workers"
            lines.append(_line(work, "postgres", "PgQueuer", figures, limit, "ours", "PgQueuer"))
        turns = {name: writing(who, effort.by_hundred, 100, wal) for name, who in (("ours", ours), ("PgQueuer", layer))}
        figures = await race(turns, effort.peer_rounds)
    written, theirs_ = median(figures["ours"]), median(figures["PgQueuer"])
    shown, theirs_shown = f"{written:,.0f} bytes", f"{theirs_:,.0f} bytes"
    runs = effort.peer_rounds
    return [
        *lines,
        Line(f"{BATCH}: WAL of each", "postgres", "PgQueuer", shown, theirs_shown, written / theirs_, LESS, runs),
    ]


async def peers_on_sqlite(folder: Path, effort: Effort) -> list[Line]:
    async with on_sqlite(folder / "ours.db") as (ours, _):
        with queue_peers.sqlite_peers(folder) as (litequeue, huey):
            turns = {SINGLY: working(ours, effort.singles, 1)}
            turns |= {
                f"claim and complete by {size}": working(ours, max(effort.singles, size), size) for size in BATCHES
            }
            turns |= {_tasks(tasks): sharing(ours, tasks, effort.singles) for tasks in TASKS}
            works = list(turns)
            turns["litequeue"] = working(litequeue, effort.singles, 1)
            turns["huey"] = working(huey, effort.singles, 1)
            figures = await race(turns, effort.peer_rounds)
    return [
        _line(work, "sqlite", peer, figures, None if work == SINGLY else AHEAD, work, peer)
        for work in works
        for peer in ("litequeue", "huey")
    ]


def _line(
    work: str,
    backend: Backend,
    against: str,
    figures: Mapping[str, Sequence[float]],
    limit: Limit | None,
    ours: str = "ours",
    theirs: str = "bare",
) -> Line:
    ours_, theirs_ = median(figures[ours]), median(figures[theirs])
    runs = len(figures[ours])
    return Line(work, backend, against, f"{ours_:,.0f}/s", f"{theirs_:,.0f}/s", ours_ / theirs_, limit, runs)


async def measure(url: str, effort: Effort, *, peers: bool) -> list[Line]:
    admin = await asyncpg.connect(url)
    try:
        server = await admin.fetchval("show server_version")
    finally:
        await admin.close()
    print(circumstances(server, queue_peers.DISTRIBUTIONS if peers else ()), end="\n\n", flush=True)
    gc.freeze()
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="runtime-bench-") as name:
        folder = Path(name)
        lines += await limits_on_postgres(url, effort)
        lines += await limits_on_sqlite(folder, effort)
        lines += await tasks_on_sqlite(folder, effort)
        async with own_database(url, "sizes") as own:
            lines += await sizes_on_postgres(own, effort.scale)
        lines += await sizes_on_sqlite(folder, effort.scale)
        async with (
            own_database(url, "endurance") as own,
            on_postgres(own, "old") as old,
            on_postgres(own, "new") as new,
        ):
            lines += await endurance("postgres", old[0], new[0], effort.scale)
        async with on_sqlite(folder / "old.db") as old_, on_sqlite(folder / "new.db") as new_:
            lines += await endurance("sqlite", old_[0], new_[0], effort.scale)
        async with own_database(url, "snapshot") as own:
            lines += await behind_a_snapshot(own, effort.scale)
        async with own_database(url, "waiting") as own:
            lines += await waiting_on_postgres(own, effort.patience)
        lines += await waiting_on_sqlite(folder / "waiting.db", effort.patience)
        # The peers last: their modules make this process a larger one.
        if peers:
            lines += await peers_on_postgres(url, effort)
            lines += await peers_on_sqlite(folder, effort)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.store", description="Measure the store.")
    parser.add_argument("--quick", action="store_true", help="a smoke run of less than a minute")
    parser.add_argument("--no-peers", action="store_true", help="leave out the other queues")
    parser.add_argument("--through", type=int, metavar="N", help="how many attempts go through to test endurance")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the result as an SVG as well")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    if arguments.through is not None:
        effort = replace(effort, scale=replace(effort.scale, through=arguments.through))
    try:
        with postgres_server(**SERVER) as url:
            lines = asyncio.run(measure(url, effort, peers=not arguments.no_peers))
    except PackageNotFoundError as missing:
        print(f"{missing.name} is missing: install the extra `bench`, or use --no-peers.", file=sys.stderr)
        return 2
    print(table(HEAD, [line.cells() for line in lines]))
    if arguments.plot is not None:
        arguments.plot.write_text(plot.drawn(lines), encoding="utf-8")
    return int(any(line.missed for line in lines))


if __name__ == "__main__":
    sys.exit(main())
