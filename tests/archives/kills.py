"""
Restores and moves that are killed at many moments, each in a process of its own.

``python -m tests.archives.kills`` does forty of each on both databases; the test does a few.
"""

import argparse
import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import asyncpg

from runtime_repo import move
from tests.archives.store import TABLES, everything, fill
from tests.lab import Lab, PostgresLab, Row, SqliteLab
from tests.place import Place

Content = dict[str, list[Row]]

WHOLE = 30.0
"""Seconds in which any of them has ended."""


@dataclass
class Judged:
    """How many found the old content afterwards, the new, or were done before they were killed."""

    old: int = 0
    new: int = 0


async def restore_killed(lab: Lab, archive: Path, moments: int) -> Judged:
    """Each leaves the old or the new store, whole, and the same again succeeds."""
    await fill(lab, 300)
    await lab.repository().backup(archive)
    await lab.repository().restore(archive, force=True)
    new = await everything(lab)
    took = _run(["restore", _place(lab), str(archive)])
    judged = Judged()
    for moment in range(moments):
        async with lab.repository() as repo:
            await repo.attempts.enqueue("later", attempt_id=f"later {moment}")
        old = await everything(lab)
        _run(["restore", _place(lab), str(archive)], kill_after=took * (moment + 0.5) / moments)
        await _let_go(lab)
        found = await everything(lab)
        assert found in (old, new), f"half a store after moment {moment}"
        judged.old += found == old
        judged.new += found == new
        assert (await lab.repository().restore(archive, force=True)).version
        assert await everything(lab) == new
    return judged


async def move_killed(lab: Lab, target: Lab, moments: int) -> Judged:
    """Each leaves nothing or everything; the same again succeeds, and the source is never touched."""
    await fill(lab, 300)
    before = await everything(lab)
    took = _run(["move", _place(lab), _place(target)])
    judged = Judged()
    for moment in range(moments):
        await target.wipe()
        _run(["move", _place(lab), _place(target)], kill_after=took * (moment + 0.5) / moments)
        await _let_go(target)
        is_there = bool((await target.look()).ledger)
        if is_there:
            assert await everything(target) == before, f"half a store after moment {moment}"
        judged.new += is_there
        judged.old += not is_there
        await move(lab.repository(), target.repository(), force=True)
        assert await everything(target) == before == await everything(lab)
    return judged


def _place(lab: Lab) -> str:
    return json.dumps(asdict(lab.place))


async def _let_go(lab: Lab) -> None:
    """Let the server notice that its client is dead; on SQLite the system has by now."""
    deadline = time.monotonic() + WHOLE
    while lab.backend == "postgres" and await lab.connections():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def _run(arguments: list[str], kill_after: float | None = None) -> float:
    """Do it in a process; return for how long it was at work."""
    command = [sys.executable, "-m", "tests.archives.kills", "--child", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        try:
            assert process.stdin
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            began = time.monotonic()
            process.stdin.write("go\n")
            process.stdin.flush()
            if kill_after is None:
                assert process.stdout.readline() == "done\n"
                return time.monotonic() - began
            time.sleep(kill_after)
        finally:
            process.send_signal(signal.SIGKILL)
        return kill_after or 0.0


async def _child(verb: str, first: str, second: str) -> None:
    place = Place(**json.loads(first))
    print("ready", flush=True)  # noqa: T201
    sys.stdin.readline()
    if verb == "restore":
        await place.repository().restore(second, force=True)
    else:
        await move(place.repository(), Place(**json.loads(second)).repository(), force=True)
    print("done", flush=True)  # noqa: T201


async def _all(moments: int, url: str) -> None:
    folder = Path(tempfile.mkdtemp())
    admin = await asyncpg.connect(url)
    name = f"rr_test_{secrets.token_hex(6)}"
    await admin.execute("set client_min_messages = warning")

    def labs(number: int) -> tuple[Lab, Lab]:
        (folder / str(number)).mkdir()
        return SqliteLab(folder / str(number) / "runtime.db"), PostgresLab(url, f"{name}_{number}", admin)

    try:
        for number, kind in enumerate(("sqlite", "postgres")):
            lab, other = labs(number) if kind == "sqlite" else labs(number)[::-1]
            print(kind, "restore", await restore_killed(lab, folder / f"{kind}.archive", moments), flush=True)  # noqa: T201
            lab, other = labs(number + 2) if kind == "sqlite" else labs(number + 2)[::-1]
            print(kind, "move", await move_killed(lab, other, moments), flush=True)  # noqa: T201
    finally:
        for [schema] in await admin.fetch("select nspname from pg_namespace where starts_with(nspname, $1)", name):
            await admin.execute(f"drop schema {schema} cascade")
        await admin.close()
        shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        asyncio.run(_child(*sys.argv[2:]))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--moments", type=int, default=40)
        parser.add_argument("--url", default=os.environ.get("ORIS_TEST_POSTGRES_URL"))
        given = parser.parse_args()
        assert len(TABLES) > 1
        asyncio.run(_all(given.moments, given.url))
