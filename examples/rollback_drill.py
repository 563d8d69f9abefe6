"""
The rollback drill: an upgrade is taken back, as an operator would in the night when it has to be.

    python examples/rollback_drill.py                                         # a SQLite file, made for it
    python examples/rollback_drill.py --database postgresql://... --schema drill --attempts 1000000

A store of version 1 with workers of the previous release at it is backed up, upgraded, worked on, and restored; then
the previous release boots again and finds every attempt of before. Each step is printed with its time. The place must
be empty, and is left empty, unless --keep is given.
"""

import asyncio
import contextlib
import sqlite3
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from runtime_repo import NewAttempt, RuntimeRepoError, RuntimeRepository, SchemaTooNewError, repository_from_url
from runtime_repo.database import Database
from runtime_repo.postgres import PostgresDatabase, Target
from runtime_repo.schema import Policy, ensure_schema, load_migrations
from runtime_repo.sqlite import SqliteDatabase

WORKERS = 2
NEW = 10
"""How many attempts the new release brings, of which it completes half."""

Rows = set[tuple[Any, ...]]

LAY = """
insert into runtime_attempts (attempt_id, run_id, attempt_no, status, retry_at_ms)
with recursive numbers (n) as (select 1 union all select n + 1 from numbers where n < {count})
select 'attempt-' || n, 'run-' || (n / 10), 1, case when n % 10 < 4 then 'queued' else 'completed' end, null
  from numbers
"""
TAKE = """
update runtime_attempts set status = 'running'
 where status = 'queued' and attempt_id = (select attempt_id from runtime_attempts where status = 'queued' limit 1)
returning attempt_id
"""
LEASE = "insert into runtime_leases values ($1, $2, $3, 4102444800000, 0, 1)"
FINISH = "update runtime_attempts set status = 'completed' where attempt_id = $1"
RELEASE = "delete from runtime_leases where attempt_id = $1"
ALL = "select attempt_id, run_id, attempt_no, status, retry_at_ms from runtime_attempts"


@dataclass(frozen=True)
class Place:
    """Where the drill takes place."""

    url: str
    schema: str

    @property
    def path(self) -> Path | None:
        """The file; None on PostgreSQL."""
        return Path(self.url.removeprefix("sqlite:///")) if self.url.startswith("sqlite:///") else None

    def new_release(self) -> RuntimeRepository:
        """A repository of the release that is being deployed."""
        return repository_from_url(self.url, **({} if self.path else {"schema": self.schema}))

    @contextlib.asynccontextmanager
    async def sql(self) -> AsyncIterator["Sql"]:
        """A connection of the driver's own."""
        if self.path:
            with contextlib.closing(sqlite3.connect(self.path, isolation_level=None, timeout=10)) as file:
                yield Sql(file)
            return
        connection = await asyncpg.connect(self.url, server_settings={"search_path": self.schema})
        try:
            yield Sql(connection)
        finally:
            await connection.close()


class Sql:
    """Statements that both databases understand."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def run(self, statement: str, *args: object) -> Sequence[tuple[Any, ...]]:
        if isinstance(self._connection, sqlite3.Connection):
            return self._connection.execute(statement.replace("$", "?"), args).fetchall()
        return [tuple(row) for row in await self._connection.fetch(statement, *args)]


class PreviousRelease:
    """
    What this package was when version 1 was its newest: it boots by the same rules, with the migration that it shipped,
    and its workers know no more than the tables of that version.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._stopping = asyncio.Event()
        self._workers: list[asyncio.Task[int]] = []

    async def boot(self) -> None:
        """
        Serve version 1.

        Raises:
            SchemaTooNewError: A newer release has migrated it.
        """
        place = self.place
        database: Database
        if place.path:
            database = SqliteDatabase(place.path, writes=True, backup=True, lock_timeout=10)
        else:
            database = PostgresDatabase(Target(place.url, {}), schema=place.schema, startup_timeout=10)
        try:
            await ensure_schema(database, load_migrations(database.backend)[:1], Policy())
        finally:
            await database.close()

    def start(self) -> None:
        """Let workers work."""
        self._stopping.clear()
        self._workers = [asyncio.create_task(self._work(f"old-{number}")) for number in range(WORKERS)]

    async def stop(self) -> int:
        """Let them finish what they have begun; return how many attempts they have completed."""
        self._stopping.set()
        return sum(await asyncio.gather(*self._workers))

    async def _work(self, name: str) -> int:
        done = 0
        async with self.place.sql() as sql:
            while not self._stopping.is_set():
                for (attempt_id,) in await sql.run(TAKE):
                    await sql.run(LEASE, f"lease-{name}-{done}", attempt_id, name)
                    await asyncio.sleep(0.001)  # the work
                    await sql.run(FINISH, attempt_id)
                    await sql.run(RELEASE, attempt_id)
                    done += 1
                await asyncio.sleep(0)
        return done


@contextlib.contextmanager
def step(what: str) -> Iterator[list[str]]:
    """Print what was done, what the block says of it, and its time."""
    said: list[str] = []
    began = time.perf_counter()
    yield said
    print(f"{time.perf_counter() - began:7.2f} s  {what}{': ' if said else ''}{', '.join(said)}", flush=True)


async def drill(place: Place, count: int, archive: Path) -> str | None:
    """Do it; return where the upgraded store is kept."""
    old = PreviousRelease(place)
    with step("the previous release lays its store") as said:
        await old.boot()
        async with place.sql() as sql:
            await sql.run(LAY.format(count=count))
        said.append(f"{count} attempts")
    with step("its workers work, and are stopped") as said:
        old.start()
        await asyncio.sleep(0.2)
        said.append(f"{await old.stop()} attempts completed")
    before = await everything(place)

    with step("backup") as said:
        backup = await place.new_release().backup(archive)
        said += [f"version {backup.version}", f"{sum(backup.rows.values())} rows", f"{backup.size} bytes"]
    with step("upgrade, and new work") as said:
        async with place.new_release() as repo:
            said += [f"migration {done.version} in {done.duration:.2f} s" for done in repo.boot_report.applied]
            await repo.attempts.enqueue_many([NewAttempt("new", queue="new") for _ in range(NEW)])
            for lease in await repo.leases.claim("new", queues="new", limit=NEW // 2):
                await repo.attempts.complete(lease)
            said.append(f"{NEW} attempts enqueued and {NEW // 2} completed")
    with step("the previous release does not boot any more") as said:
        try:
            await old.boot()
        except SchemaTooNewError as error:
            said.append(f"version {error.found} is too new")
        else:
            raise SystemExit("it did: the drill has failed")

    with step("restore") as said:
        report = await place.new_release().restore(archive)
        said += [f"version {report.version}", f"what it replaces is kept in {report.kept}"]
    with step("the previous release boots"):
        await old.boot()
    with step("every attempt is compared") as said:
        if (after := await everything(place)) != before:
            raise SystemExit(f"{len(before - after)} attempts are not what they were: the drill has failed")
        said.append(f"all {len(after)} attempts of before are there, and no other")
    with step("its workers work again") as said:
        old.start()
        await asyncio.sleep(0.2)
        said.append(f"{await old.stop()} attempts completed")
    return report.kept


async def everything(place: Place) -> Rows:
    """Every attempt, as the previous release sees it."""
    async with place.sql() as sql:
        return set(await sql.run(ALL))


async def clean_up(place: Place, kept: str | None, archive: Path) -> None:
    """Leave the place as it was: empty."""
    for path in [archive, *(place.path.parent.glob(f"{place.path.name}*") if place.path else ())]:
        path.unlink(missing_ok=True)
    if place.path:
        return
    connection = await asyncpg.connect(place.url)
    try:
        await connection.execute("set client_min_messages = warning")
        for schema in filter(None, [place.schema, kept]):
            await connection.execute(f'drop schema if exists "{schema}" cascade')
    finally:
        await connection.close()


async def main(args: Namespace) -> None:
    place = Place(args.database, args.schema)
    archive = Path(args.archive)
    status = await place.new_release().inspect()
    if status.found or status.refusal or (place.path and place.path.exists()):
        raise SystemExit(f"rollback_drill.py: the place is not empty: {status.refusal or args.database}; name another")
    began = time.perf_counter()
    kept = await drill(place, args.attempts, archive)
    print(f"{time.perf_counter() - began:7.2f} s  in all")
    if not args.keep:
        await clean_up(place, kept, archive)


def parse_arguments() -> Namespace:
    parser = ArgumentParser(description="Rehearse the way back from an upgrade, in a place of its own.")
    parser.add_argument("--database", default="sqlite:///drill.db", help="sqlite:///PATH or postgresql://...")
    parser.add_argument("--schema", default="drill", help="the runtime schema, on PostgreSQL")
    parser.add_argument("--attempts", type=int, default=10_000)
    parser.add_argument("--archive", default="drill.archive", help="where the backup is written")
    parser.add_argument("--keep", action="store_true", help="leave everything as it is in the end")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        asyncio.run(main(parse_arguments()))
    except (RuntimeRepoError, OSError) as error:
        sys.exit(f"rollback_drill.py: {error}")
