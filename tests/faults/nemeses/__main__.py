"""By hand, and for longer than the tests do: see `python -m tests.faults.nemeses --help`."""

import argparse
import asyncio
import json
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.nemeses import faults
from tests.faults.nemeses.judge import Verdict
from tests.faults.nemeses.play import play
from tests.faults.nemeses.stage import on_postgres, on_sqlite
from tests.postgres_server import PostgresServer


def main() -> int:
    """Run, print the judgement, and return how many promises were broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.nemeses", description=__doc__)
    parser.add_argument("--backend", choices=["postgres", "sqlite"], default="postgres")
    parser.add_argument(
        "--nemesis",
        nargs="+",
        default=["mixed"],
        choices=sorted({*faults.POSTGRES, *faults.SQLITE, "mixed"}),
        metavar="NAME",
        help=f"of {', '.join(faults.POSTGRES)}; on SQLite {', '.join(faults.SQLITE)} (full: as root); mixed is most",
    )
    parser.add_argument("--seconds", type=float, default=60, help="for how long faults are done")
    parser.add_argument("--quiet", type=float, default=6, help="seconds between two of them, at most")
    parser.add_argument("--ttl", type=float, default=2, help="seconds for which workers lease")
    parser.add_argument("--rate", type=float, default=15, help="calls that enqueue, a second")
    parser.add_argument("--seed", type=int, help="of the choice and the length of faults")
    parser.add_argument("--options", type=json.loads, default={}, help='of the repository, as JSON: {"max_size": 2}')
    parser.add_argument("--postgres", type=Path, help="the folder of initdb and postgres, if not the usual ones")
    parser.add_argument("--folder", type=Path, help="a new folder for histories and logs; else a temporary one")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="nemeses-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"histories and logs: {folder}", flush=True)  # noqa: T201
    verdict = asyncio.run(_run(given, folder))
    print(verdict)  # noqa: T201
    return bool(verdict.violations)


async def _run(given: argparse.Namespace, folder: Path) -> Verdict:
    names = [name for word in given.nemesis for name in (faults.MIXED[given.backend] if word == "mixed" else [word])]
    random = Random(given.seed)
    load: dict[str, Any] = {"ttl": given.ttl, "rate": given.rate, "options": given.options}
    spans = {"seconds": given.seconds, "quiet": given.quiet}
    async with AsyncExitStack() as stack:
        if given.backend == "sqlite":
            on_file = await stack.enter_async_context(on_sqlite(folder, random, small="full" in names, **load))
            return await play(on_file, {name: faults.SQLITE[name] for name in names}, **spans)
        server = stack.enter_context(PostgresServer(given.postgres, durable=True))
        on_server = await stack.enter_async_context(on_postgres(server, folder, random, **load))
        return await play(on_server, {name: faults.POSTGRES[name] for name in names}, **spans)


if __name__ == "__main__":
    sys.exit(main())
