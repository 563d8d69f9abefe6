"""
What a boot costs: `python -m tests.benchmarks.boot` prints one table, and exits with 1 if a limit is missed.

Warm finds the schema current, cold an empty schema or no file, a storm is many processes that boot at once on an empty
database. Every line compares two contenders that took turns in this run: the ratio is ours to theirs, of medians. A
peer some of whose processes failed in a storm has no time to compare: its result is the number that failed.

PostgreSQL is the server of ORIS_TEST_POSTGRES_URL (its role must be allowed to create databases), else a private one
that keeps its commits as in production. Runs on systems that can fork.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Protocol

import asyncpg

from tests.place import Place

from .peers import DISTRIBUTIONS
from .shared import circumstances, own_database, postgres_server, table, turns
from .storm import LIFETIME, contender, timed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from runtime_repo.database import Backend

    from .drivers import Kind

HEAD = ("boot", "backend", "against", "ours", "theirs", "ratio", "limit", "runs", "result")
_ROOT = Path(__file__).resolve().parents[2]
_CALM_LOOKS = 250
# Superusers' reserve, the benchmark's own connection and the server's latecomers.
_SPARE_CONNECTIONS = 8

LIMITS: dict[tuple[Kind, Backend], float] = {
    ("warm", "postgres"): 1.45,
    ("warm", "sqlite"): 1.20,
    ("cold", "postgres"): 1.3,
    ("cold", "sqlite"): 1.5,
    ("storm", "postgres"): 1.3,
    ("storm", "sqlite"): 1.3,
}
# To be ahead is enough; LangGraph's savers keep fewer tables than we do, so they are shown and not judged.
PEER_LIMITS = {"alembic": 1.0, "alembic + lock": 1.0, "dbos": 1.0, "langgraph": None}


@dataclass(frozen=True)
class Effort:
    """How often everything is done, and how many processes make a storm."""

    warm: int
    cold: dict[Backend, int]
    storms: dict[Backend, int]
    processes: dict[Backend, int]
    peer_warm: int
    peer_cold: int
    peer_storms: int
    peer_processes: dict[Backend, int]


FULL = Effort(
    warm=300,
    cold={"postgres": 40, "sqlite": 80},
    storms={"postgres": 5, "sqlite": 11},
    processes={"postgres": 100, "sqlite": 32},
    peer_warm=40,
    peer_cold=9,
    peer_storms=3,
    peer_processes={"postgres": 20, "sqlite": 10},
)
QUICK = Effort(
    warm=40,
    cold={"postgres": 7, "sqlite": 11},
    storms={"postgres": 3, "sqlite": 5},
    processes={"postgres": 16, "sqlite": 8},
    peer_warm=7,
    peer_cold=3,
    peer_storms=1,
    peer_processes={"postgres": 6, "sqlite": 4},
)


@dataclass
class Runs:
    """What one contender did: a time for every boot or storm, and the processes that failed."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    processes: int = 0

    def __str__(self) -> str:
        if self.errors:
            return f"{len(self.errors)} of {self.processes} failed"
        return f"{median(self.seconds) * 1000:.2f} ms"


@dataclass(frozen=True)
class Line:
    """One comparison."""

    boot: str
    backend: Backend
    peer: str
    ours: Runs
    theirs: Runs
    limit: float | None

    @property
    def ratio(self) -> float | None:
        if self.ours.errors or self.theirs.errors:
            return None
        return median(self.ours.seconds) / median(self.theirs.seconds)

    @property
    def missed(self) -> bool:
        behind = self.ratio is not None and self.limit is not None and self.ratio > self.limit
        return behind or bool(self.ours.errors)

    def cells(self) -> list[str]:
        return [
            self.boot,
            self.backend,
            self.peer,
            str(self.ours),
            str(self.theirs),
            "" if self.ratio is None else f"{self.ratio:.2f}",
            "" if self.limit is None else f"{self.limit:.2f}",
            str(len(self.ours.seconds)),
            "MISSED" if self.missed else "" if self.limit is None else "ok",
        ]


class Venue(Protocol):
    """Somewhere with room for any number of boots that do not see each other."""

    backend: Backend

    async def new(self) -> Place:
        """Return a place where nobody has been."""

    async def clear(self, place: Place) -> None:
        """Remove all that was left there."""

    async def calm(self) -> None:
        """Wait until the last storm is over for the database, too."""


class PostgresVenue:
    """A database; every place is a schema."""

    backend: Backend = "postgres"

    def __init__(self, url: str, connection: asyncpg.Connection) -> None:
        self._url = url
        self._connection = connection
        self._numbers = itertools.count(1)

    async def new(self) -> Place:
        return Place(self.backend, self._url, f"bench_{next(self._numbers)}")

    async def clear(self, place: Place) -> None:
        await self._connection.execute(f'drop schema if exists "{place.schema}" cascade')

    async def calm(self) -> None:
        others = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        for _ in range(_CALM_LOOKS):
            if not await self._connection.fetchval(others):
                break
            await asyncio.sleep(0.02)


class SqliteVenue:
    """A folder; every place is a file in a folder of its own."""

    backend: Backend = "sqlite"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def new(self) -> Place:
        return Place(self.backend, str(Path(tempfile.mkdtemp(dir=self._folder), "bench.db")), "main")

    async def clear(self, place: Place) -> None:
        shutil.rmtree(Path(place.where).parent)

    async def calm(self) -> None:
        """Nothing outlives the processes."""


async def warm(venue: Venue, names: Sequence[str], rounds: int) -> dict[str, Runs]:
    """Boot again and again where the schema is current, the contenders in turns."""
    places = {name: await venue.new() for name in names}
    boots = {}
    for name, place in places.items():
        # The bare driver reads what we have laid.
        await timed(contender("ours" if name == "bare" else name, "cold", place))
        boots[name] = contender(name, "warm", place)
        await timed(boots[name])
    runs = {name: Runs() for name in names}
    for name in turns(names, rounds):
        runs[name].seconds.append(await timed(boots[name]))
    for place in places.values():
        await venue.clear(place)
    return runs


async def cold(venue: Venue, names: Sequence[str], rounds: int) -> dict[str, Runs]:
    """Boot where nothing is, the contenders in turns."""
    runs = {name: Runs() for name in names}
    for count, name in enumerate(turns(names, rounds + 1)):
        place = await venue.new()
        seconds = await timed(contender(name, "cold", place))
        # The first round is for the caches.
        if count >= len(names):
            runs[name].seconds.append(seconds)
        await venue.clear(place)
    return runs


async def storm(venue: Venue, names: Sequence[str], rounds: int, processes: int) -> dict[str, Runs]:
    """Let many processes boot at once where nothing is, the contenders in turns."""
    runs = {name: Runs() for name in names}
    for name in turns(names, rounds):
        place = await venue.new()
        seconds, errors = await _one_storm(name, place, processes)
        runs[name].seconds.append(seconds)
        runs[name].errors += errors
        runs[name].processes += processes
        await venue.calm()
        await venue.clear(place)
    return runs


async def _one_storm(name: str, place: Place, processes: int) -> tuple[float, list[str]]:
    request = {"name": name, "count": processes, "place": vars(place)}
    runner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.benchmarks.storm"),
        cwd=_ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(2 * LIFETIME):
            out, words = await runner.communicate(json.dumps(request).encode())
    finally:
        if runner.returncode is None:
            # The runner leads its own group, so this ends its children as well, and nobody else.
            os.killpg(runner.pid, signal.SIGKILL)
            await runner.wait()
    if runner.returncode != 0:
        raise RuntimeError(f"The storm of {name} did not take place:\n{words.decode(errors='replace')}")
    result = json.loads(out)
    return result["seconds"], result["errors"]


async def against_bare(venue: Venue, effort: Effort, room: int) -> list[Line]:
    pair = ("ours", "bare")
    backend = venue.backend
    processes = min(effort.processes[backend], room)
    done: dict[Kind, dict[str, Runs]] = {"warm": await warm(venue, pair, effort.warm)}
    done["cold"] = await cold(venue, pair, effort.cold[backend])
    done["storm"] = await storm(venue, pair, effort.storms[backend], processes)
    return [
        Line(_label(kind, processes), backend, "bare driver", runs["ours"], runs["bare"], LIMITS[kind, backend])
        for kind, runs in done.items()
    ]


async def against_peers(venue: Venue, effort: Effort, room: int) -> list[Line]:
    backend = venue.backend
    processes = min(effort.peer_processes[backend], room // 3)
    names = ("ours", "alembic", "dbos", "langgraph")
    # The lock is PostgreSQL's, and matters only where there is somebody to wait for.
    stormers = (*names, "alembic + lock") if backend == "postgres" else names
    done: dict[Kind, dict[str, Runs]] = {"warm": await warm(venue, names, effort.peer_warm)}
    done["cold"] = await cold(venue, names, effort.peer_cold)
    done["storm"] = await storm(venue, stormers, effort.peer_storms, processes)
    return [
        Line(_label(kind, processes), backend, name, runs["ours"], theirs, PEER_LIMITS[name])
        for kind, runs in done.items()
        for name, theirs in runs.items()
        if name != "ours"
    ]


def _label(kind: Kind, processes: int) -> str:
    return f"storm of {processes}" if kind == "storm" else kind


@contextlib.asynccontextmanager
async def postgres_venue(url: str, purpose: str) -> AsyncIterator[PostgresVenue]:
    async with own_database(url, purpose) as own:
        connection = await asyncpg.connect(own)
        try:
            yield PostgresVenue(own, connection)
        finally:
            await connection.close()


@contextlib.contextmanager
def sqlite_venue() -> Iterator[SqliteVenue]:
    with tempfile.TemporaryDirectory(prefix="runtime-bench-") as folder:
        yield SqliteVenue(Path(folder))


async def measure(url: str, effort: Effort, *, peers: bool) -> list[Line]:
    admin = await asyncpg.connect(url)
    try:
        room = int(await admin.fetchval("show max_connections")) - _SPARE_CONNECTIONS
        server = await admin.fetchval("show server_version")
    finally:
        await admin.close()
    print(circumstances(server, DISTRIBUTIONS if peers else ()), end="\n\n", flush=True)
    lines = []
    # The bare drivers first: the peers' modules make this process a larger one.
    for part in (against_bare, against_peers) if peers else (against_bare,):
        async with postgres_venue(url, part.__name__) as venue:
            lines += await part(venue, effort, room)
        with sqlite_venue() as files:
            lines += await part(files, effort, sys.maxsize)
    return lines


def _first_errors(lines: Sequence[Line]) -> list[str]:
    return [
        f"{line.boot} on {line.backend}, {name}: {' '.join(runs.errors[0].split())}"
        for line in lines
        for name, runs in (("ours", line.ours), (line.peer, line.theirs))
        if runs.errors
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.boot", description="Measure what a boot costs.")
    parser.add_argument("--quick", action="store_true", help="a smoke run of less than a minute")
    parser.add_argument("--no-peers", action="store_true", help="compare with the bare drivers only")
    arguments = parser.parse_args()
    try:
        with postgres_server() as url:
            lines = asyncio.run(measure(url, QUICK if arguments.quick else FULL, peers=not arguments.no_peers))
    except PackageNotFoundError as missing:
        print(f"{missing.name} is missing: install the extra `bench`, or use --no-peers.", file=sys.stderr)
        return 2
    print(table(HEAD, [line.cells() for line in lines]))
    print("", *_first_errors(lines), sep="\n")
    return int(any(line.missed for line in lines))


if __name__ == "__main__":
    sys.exit(main())
