"""
What archives cost: ``python -m tests.benchmarks.archive`` prints one table, and exits with 1 if a limit is missed.

A store with a million attempts, of which 39 % wait, a hundred thousand step reports and as many audit entries is backed
up, restored and moved. Each line compares with the bare tool at the same rows, in turns: COPY to files; laying the
tables, COPY from files and the keys and indexes by hand; a driver's rows from one database into the other's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import shutil
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import asyncpg

from runtime_repo import move
from runtime_repo.queries import load_queries
from runtime_repo.schema import load_migrations
from tests.place import Place

from .shared import circumstances, own_database, postgres_server, table, turns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HEAD = ("what", "against", "ours", "theirs", "ratio", "limit", "result")
BACKUP, RESTORE, MOVE = "backup", "restore", "move"
LIMITS = {
    f"{BACKUP}, PostgreSQL": 1.5,
    f"{RESTORE}, PostgreSQL": 1.5,
    f"{MOVE} to SQLite": 2.0,
    f"{MOVE} to PostgreSQL": 2.0,
}
CATALOG = load_migrations("postgres")[-1].catalog

FILL = """
insert into {schema}.runtime_attempts (attempt_id, run_id, attempt_no, status, queue, priority, payload_json,
                                       enqueued_at_ms, lease_version, finished_at_ms, result_json)
select 'attempt-' || lpad(n::text, 8, '0'), 'run-' || n / 10, 1,
       case when n % 100 < 39 then 'queued' else 'completed' end, 'default', n % 3,
       '{"number": ' || n || ', "to": "somebody@example.com"}', 1700000000000 + n, n % 3,
       case when n % 100 < 39 then null else 1700000001000 + n end,
       case when n % 100 < 39 then null else '{"sent": true}' end
  from generate_series(1, {count}) as n;
insert into {schema}.runtime_queue (attempt_id, queue, priority, enqueued_at_ms, retry_at_ms)
select attempt_id, queue, priority, enqueued_at_ms, null from {schema}.runtime_attempts where status = 'queued';
insert into {schema}.runtime_finished (finished_at_ms, attempt_id, status)
select finished_at_ms, attempt_id, status from {schema}.runtime_attempts where status = 'completed';
insert into {schema}.runtime_step_reports (worker_id, attempt_id, action_id, status, dedupe_token, created_at_ms)
select 'worker', 'attempt-' || lpad(n::text, 8, '0'), 'send', 'ok', 'once', 1700000000000
  from generate_series(1, {count} / 10) as n;
insert into {schema}.runtime_audit_logs (actor_type, action, resource_type, result, request_id, created_at_ms)
select 'user', 'send', 'mail', 'ok', 'request-' || n, 1700000000000 from generate_series(1, {count} / 10) as n;
analyze;
"""


class Stage:
    """One store on PostgreSQL, and room for copies of it."""

    def __init__(self, url: str, folder: Path, connection: asyncpg.Connection) -> None:
        self.source = Place("postgres", url, "bench")
        self.folder = folder
        self.connection = connection
        self._numbers = itertools.count()

    def fresh(self, backend: str) -> Place:
        """An empty place."""
        name = f"bench_{next(self._numbers)}"
        if backend == "postgres":
            return Place("postgres", self.source.where, name)
        return Place("sqlite", str(self.folder / name))

    async def gone(self, *places: Place) -> None:
        for place in places:
            if place.backend == "postgres":
                await self.connection.execute(f"drop schema if exists {place.schema} cascade")
            else:
                Path(place.where).unlink(missing_ok=True)  # noqa: ASYNC240

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.copy"

    async def copy_out(self) -> None:
        """By hand: each table into a file."""
        for name, found in CATALOG.tables.items():
            await self.connection.copy_from_table(
                name, schema_name=self.source.schema, columns=list(found.columns), output=self.file(name)
            )

    async def copy_in(self, target: Place) -> None:
        """By hand: lay the tables, copy the files into them in one transaction, make keys and indexes."""
        async with target.repository():
            pass
        queries = load_queries("postgres", schema=target.schema, now_ms="0::bigint")
        names = list(CATALOG.tables)
        async with self.connection.transaction():
            again = []
            for row in await self.connection.fetch(queries["archive.constraints"], target.schema, names):
                on = f"alter table {target.schema}.{row['table_name']}"
                await self.connection.execute(f"{on} drop constraint {row['name']}")
                again.append(f"{on} add constraint {row['name']} {row['definition']}")
            for row in await self.connection.fetch(queries["archive.indexes"], target.schema, names):
                await self.connection.execute(f"drop index {target.schema}.{row['name']}")
                again.append(row["definition"])
            for name, found in CATALOG.tables.items():
                # In a transaction of its own the table is new, as it is for a restore.
                await self.connection.execute(f"truncate {target.schema}.{name}")
                await self.connection.copy_to_table(
                    name,
                    schema_name=target.schema,
                    columns=list(found.columns),
                    source=self.file(name),
                    freeze=True,
                )
            for statement in again:
                await self.connection.execute(statement)

    async def into_sqlite(self, target: Place) -> None:
        """By hand: the rows of a cursor into a new file, in one transaction, with its indexes at the end."""
        async with target.repository():
            pass
        with contextlib.closing(sqlite3.connect(target.where, isolation_level=None)) as file:
            queries = load_queries("sqlite", schema="main", now_ms="0")
            file.execute("begin")
            indexes = file.execute(queries["archive.indexes"]).fetchall()
            for name, _ in indexes:
                file.execute(f"drop index {name}")
            async with self.connection.transaction():
                for name, found in CATALOG.tables.items():
                    columns = ", ".join(found.columns)
                    file.execute(f"delete from {name}")
                    insert = f"insert into {name} ({columns}) values ({', '.join('?' for _ in found.columns)})"
                    cursor = await self.connection.cursor(f"select {columns} from {self.source.schema}.{name}")
                    while rows := await cursor.fetch(10_000):
                        file.executemany(insert, rows)
            for _, sql in indexes:
                file.execute(sql)
            file.execute("commit")

    async def out_of_sqlite(self, source: Place, target: Place) -> None:
        """By hand: rows of SQLite's as records into new tables."""
        async with target.repository():
            pass
        queries = load_queries("postgres", schema=target.schema, now_ms="0::bigint")
        with contextlib.closing(sqlite3.connect(source.where)) as file:
            async with self.connection.transaction():
                again = []
                for row in await self.connection.fetch(queries["archive.indexes"], target.schema, list(CATALOG.tables)):
                    await self.connection.execute(f"drop index {target.schema}.{row['name']}")
                    again.append(row["definition"])
                for name, found in CATALOG.tables.items():
                    columns = list(found.columns)
                    await self.connection.execute(f"truncate {target.schema}.{name}")
                    rows = file.execute(f"select {', '.join(columns)} from {name}")
                    await self.connection.copy_records_to_table(
                        name, schema_name=target.schema, columns=columns, records=rows
                    )
                for statement in again:
                    await self.connection.execute(statement)


async def timed(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


async def compared(
    ours: Callable[[], Awaitable[object]],
    theirs: Callable[[], Awaitable[object]],
    rounds: int,
    between: Callable[[], Awaitable[object]],
) -> tuple[float, float]:
    """The medians of both, who take turns."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for who in turns(["theirs", "ours"], rounds):
        times[who].append(await timed(ours() if who == "ours" else theirs()))
        await between()
    return median(times["ours"]), median(times["theirs"])


async def measured(url: str, count: int, rounds: int, folder: Path) -> list[tuple[str, str, float, float]]:
    lines = []
    connection = await asyncpg.connect(url)
    try:
        stage = Stage(url, folder, connection)
        async with stage.source.repository():
            pass
        await connection.execute(FILL.replace("{schema}", stage.source.schema).replace("{count}", str(count)))
        archive = folder / "archive"

        async def backed_up() -> None:
            archive.unlink(missing_ok=True)
            await stage.source.repository().backup(archive)

        async def nothing() -> None:
            pass

        ours, theirs = await compared(backed_up, stage.copy_out, rounds, nothing)
        lines.append((f"{BACKUP}, PostgreSQL", "COPY to files", ours, theirs))

        place = stage.fresh("postgres")

        async def tidied() -> None:
            await stage.gone(place)

        ours, theirs = await compared(
            lambda: place.repository().restore(archive), lambda: stage.copy_in(place), rounds, tidied
        )
        lines.append((f"{RESTORE}, PostgreSQL", "tables, COPY, keys and indexes by hand", ours, theirs))

        file = stage.fresh("sqlite")

        async def removed() -> None:
            await stage.gone(file)

        ours, theirs = await compared(
            lambda: move(stage.source.repository(), file.repository()), lambda: stage.into_sqlite(file), rounds, removed
        )
        lines.append((f"{MOVE} to SQLite", "a cursor's rows into a file by hand", ours, theirs))

        await move(stage.source.repository(), file.repository())
        ours, theirs = await compared(
            lambda: move(file.repository(), place.repository()),
            lambda: stage.out_of_sqlite(file, place),
            rounds,
            tidied,
        )
        lines.append((f"{MOVE} to PostgreSQL", "a cursor's rows as records by hand", ours, theirs))
    finally:
        await connection.close()
    return lines


async def run(count: int, rounds: int) -> bool:
    folder = Path(tempfile.mkdtemp(prefix="runtime-bench-"))
    try:
        with postgres_server() as server:
            async with own_database(server, "archive") as url:
                lines = await measured(url, count, rounds, folder)
                connection = await asyncpg.connect(url)
                version = await connection.fetchval("show server_version")
                await connection.close()
    finally:
        shutil.rmtree(folder)
    kept = True
    rows = []
    for what, against, ours, theirs in lines:
        ratio, limit = ours / theirs, LIMITS[what]
        kept &= ratio <= limit
        result = "kept" if ratio <= limit else "MISSED"
        rows.append((what, against, f"{ours:.2f} s", f"{theirs:.2f} s", f"{ratio:.2f}", f"{limit:.1f}", result))
    print(f"{count} attempts; {circumstances(version, ())}\n")
    print(table(HEAD, rows))
    return kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--attempts", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    sys.exit(0 if asyncio.run(run(given.attempts, given.rounds)) else 1)
