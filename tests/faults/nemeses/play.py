"""One run from its beginning to its end: faults, recovery, the rest of the work, the stop, the judgement."""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from random import Random
from typing import TypeVar

from runtime_repo import Attempt, Lease
from tests.faults.nemeses.faults import Fault
from tests.faults.nemeses.history import Line, Reader
from tests.faults.nemeses.judge import (
    RECOVERY,
    STOP,
    Evidence,
    Fate,
    Injected,
    Run,
    Tables,
    Verdict,
    judge,
    not_recovered,
)
from tests.faults.nemeses.stage import TABLES, SqliteStage, Stage, until

S = TypeVar("S", bound=Stage)

_START = 30.0
_REST = 30.0
"""Seconds in which all that was enqueued has to be done once nothing more is."""

_CALM = 1.0
"""Seconds of load before the first fault, and at least so many after the last."""

_LOOK_EVERY = 0.2
_PAGE = 1000


async def play(stage: S, faults: Mapping[str, Fault[S]], *, seconds: float, quiet: float) -> Verdict:
    """
    Do each of *faults* at least once, in any order, and go on for so many seconds; at most *quiet* pass between two.

    Return what became of the promises. It ends within bounds of its own, whatever the product does.

    Raises:
        TimeoutError: The store did not even work before the first fault, or cannot be read after the last.
    """
    reader, lines = Reader(stage.folder), list[Line]()
    async with asyncio.timeout(_START):
        await _prepare(stage)
    async with stage.crowd():
        await _everybody_has_answered(stage, reader, lines)
        await asyncio.sleep(_CALM)
        injected = await _inject(stage, faults, seconds, quiet)
        stage.heal()
        healed = time.monotonic()
        await _everybody_has_recovered(stage, reader, lines, Run(injected, healed, healed, 0, ()))
        await stage.dismiss("rogue", "producer")
        loaded_until = time.monotonic()
        left = await _rest(stage)
        await stage.dismiss("worker", within=STOP + 1)
        fates = _fates(stage)
    lines += reader.lines()
    async with asyncio.timeout(_START):
        tables = await _tables(stage)
    run = Run(injected, healed, loaded_until, left, fates)
    return judge(Evidence(lines, run, tables), stage.folder)


async def _prepare(stage: Stage) -> None:
    """Boot, so that the processes do not all migrate, and make the application's own tables."""
    async with stage.repository() as repo, repo.transaction() as transaction:
        for table in TABLES:
            await transaction.connection.execute(table.format(schema=stage.place.schema))


async def _everybody_has_answered(stage: Stage, reader: Reader, lines: list[Line]) -> None:
    waiting = {actor.name for actor in stage.actors}

    def nobody_waits() -> bool:
        new = list(reader.lines())
        waiting.difference_update(line["p"] for line in new if line["k"] == "ok")
        lines.extend(new)
        return not waiting

    if not await until(nobody_waits, _START):
        logs = [(stage.folder / f"{name}.log").read_text(errors="replace")[-2000:] for name in sorted(waiting)]
        raise TimeoutError(f"{sorted(waiting)} have done nothing in {_START:g} s:\n" + "\n".join(logs))


async def _inject(stage: S, faults: Mapping[str, Fault[S]], seconds: float, quiet: float) -> list[Injected]:
    injected: list[Injected] = []
    end = time.monotonic() + seconds
    for name in _rounds(faults, stage.random):
        since = time.monotonic()
        words = await faults[name](stage)
        injected.append(Injected(name, words, since, time.monotonic()))
        if len(injected) >= len(faults) and time.monotonic() >= end:
            break
        await asyncio.sleep(stage.random.uniform(quiet / 2, quiet))
    return injected


def _rounds(names: Iterable[str], random: Random) -> Iterator[str]:
    """All of them in any order, then all of them in another, and so on."""
    while True:
        order = list(names)
        random.shuffle(order)
        yield from order


async def _everybody_has_recovered(stage: Stage, reader: Reader, lines: list[Line], run: Run) -> None:
    """Wait for it as long as they may take; whether they have is the judge's to say."""
    while time.monotonic() < run.healed + RECOVERY:
        await asyncio.sleep(_LOOK_EVERY)
        lines += reader.lines()
        alive = {actor.name for actor in stage.living()}
        if time.monotonic() > run.healed + _CALM and not not_recovered(lines, run) & alive:
            break


async def _rest(stage: Stage) -> int:
    """Let the workers do what is left; return how many attempts still are."""
    deadline = time.monotonic() + _REST
    async with asyncio.timeout(_REST + _START), stage.repository() as repo:
        while True:
            left = sum(queue.ready + queue.delayed + queue.leased for queue in await repo.attempts.stats())
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(_LOOK_EVERY)


def _fates(stage: Stage) -> list[Fate]:
    return [
        Fate(actor.name, actor.role, actor.process.exitcode, actor.asked_to_stop, actor.ended) for actor in stage.actors
    ]


async def _tables(stage: Stage) -> Tables:
    schema = stage.place.schema
    problems: list[str] = []
    async with stage.repository() as repo:
        if repo.boot_report.applied or repo.boot_report.tolerated:
            problems.append(f"it had to be mended: {repo.boot_report}")
        attempts: dict[str, Attempt] = {}
        while page := await repo.attempts.list(after=max(attempts, default=""), limit=_PAGE):
            attempts |= {attempt.attempt_id: attempt for attempt in page}
        leases: list[Lease] = []
        while found := await repo.leases.list(after=leases[-1].lease_id if leases else "", limit=_PAGE):
            leases += found
    orders = [row[0] for row in await stage.rows(f"select id from {schema}.orders")]
    effects = await stage.rows(f"select attempt_id, token from {schema}.effects where attempt_id is not null")
    if isinstance(stage, SqliteStage):
        problems += [row[0] for row in await stage.rows("pragma integrity_check") if row[0] != "ok"]
    return Tables(attempts, leases, orders, [(row[0], row[1]) for row in effects], problems)
