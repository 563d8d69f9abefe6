"""Real processes under real faults keep every promise: short runs of what `python -m tests.faults.nemeses` does."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.faults.nemeses.faults import POSTGRES, SQLITE
from tests.faults.nemeses.judge import Verdict
from tests.faults.nemeses.play import play
from tests.faults.nemeses.stage import on_postgres, on_sqlite
from tests.postgres_server import PostgresServer

TTL = 1.2
QUIET = 0.8
BOUND = 120
"""Seconds after which a run is given up that takes a third of them."""

SILENCE = ["blackhole", "silent", "stall", "pause"]
"""The server answers nothing, and nobody is told that it will not."""

LOSS = ["kill", "stop", "leave", "terminate", "crash", "drop", "refuse", "halfclose"]
"""Something ends, and it can be known."""


@pytest.mark.parametrize("names", [SILENCE, LOSS], ids=["silence", "loss"])
async def test_promises_are_kept_on_postgres(
    new_server: Callable[..., PostgresServer], tmp_path: Path, names: list[str]
) -> None:
    """Whatever happens to the processes, the network or the server."""
    server = new_server(durable=True)
    async with asyncio.timeout(BOUND), on_postgres(server, tmp_path, Random(), ttl=TTL) as stage:
        check(await play(stage, {name: POSTGRES[name] for name in names}, seconds=0, quiet=QUIET), names)


async def test_promises_are_kept_on_sqlite(tmp_path: Path) -> None:
    """Whatever happens to the processes, and whoever else holds the file."""
    names = ["kill", "stop", "leave", "stopwrite", "reader"]
    async with asyncio.timeout(BOUND), on_sqlite(tmp_path, Random(), ttl=TTL) as stage:
        check(await play(stage, {name: SQLITE[name] for name in names}, seconds=0, quiet=QUIET), names)


def check(verdict: Verdict, names: list[str]) -> None:
    """Fail with everything that shows what was broken; a run in which nothing happened proves nothing."""
    assert not verdict.violations, str(verdict)
    assert {fault.name for fault in verdict.evidence.run.faults} == set(names)
    assert len(list(verdict.evidence.acknowledged("complete"))) > 20, str(verdict)
    assert any(line["error"] == "LeaseLostError" for line in verdict.evidence.of_kind("error")), str(verdict)
