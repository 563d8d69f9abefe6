"""Many processes that want the same attempts, and processes that die with them."""

import asyncio
import math
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import cast

from runtime_repo import AttemptStatus, NewAttempt
from tests.faults.processes import PROCESSES, TTL, compete, meet_at, work
from tests.lab import Lab

CROWD = 24
ROUNDS = 100
ATTEMPTS = 500
QUIET = 0.5
"""Seconds without a result after which whoever is left waits for the leases of the dead."""


async def test_of_rivals_for_one_attempt_exactly_one_wins_each_round(lab: Lab) -> None:
    """By name or by queue, whichever way it became ready; and each winner's token is greater than all before."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run", attempt_id="a", max_attempts=ROUNDS)
    gate = PROCESSES.Barrier(CROWD)
    with ProcessPoolExecutor(CROWD, mp_context=PROCESSES, initializer=meet_at, initargs=(gate,)) as pool:
        rivals = [pool.submit(compete, lab.place, number, ROUNDS) for number in range(CROWD)]
        won = [rival.result(timeout=120) for rival in rivals]
    rounds = [[token for token in tokens if token is not None] for tokens in zip(*won, strict=True)]
    assert rounds == [[number] for number in range(1, ROUNDS + 1)]


async def test_whoever_dies_each_attempt_is_completed_once(lab: Lab) -> None:
    """
    Half of the workers are killed, idle with leases in hand or in the midst of a write. At each death everybody's lease
    is taken away, so that those who live must not finish what is another's by now.
    """
    reports: dict[str, list[str | int]] = {}
    rivals: dict[Connection, ForkServerProcess] = {}
    reports_left: dict[Connection, float] = {}
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many([NewAttempt("run", f"a{number:03}") for number in range(ATTEMPTS)])

        async def take_away() -> None:
            await repo.leases.requeue_expired(limit=ATTEMPTS, now=datetime.now(UTC) + TTL)

        for number in range(CROWD):
            stalls_after = number if number % 4 == 0 else None
            here, there = PROCESSES.Pipe(duplex=False)
            rivals[here] = PROCESSES.Process(
                target=work, args=(lab.place, str(number), stalls_after, there), daemon=True
            )
            rivals[here].start()
            there.close()
            reports_left[here] = number if number % 4 == 2 else math.inf
        mortal = {str(number) for number in range(0, CROWD, 2)}
        try:
            while rivals:
                found = await asyncio.to_thread(wait, list(rivals), QUIET)
                for here in cast(list[Connection], found):
                    try:
                        report = here.recv()
                    except EOFError:
                        rivals.pop(here).join(30)
                        await take_away()
                        continue
                    if report is not None:
                        attempt_id, result = report
                        assert attempt_id not in reports, "it was completed twice"
                        reports[attempt_id] = result
                        reports_left[here] -= 1
                    if report is None or not reports_left[here]:
                        rivals[here].kill()
                if not found:
                    await take_away()
        finally:
            for rival in rivals.values():
                rival.kill()
        completed = await repo.attempts.list(status=AttemptStatus.COMPLETED, limit=ATTEMPTS + 1)
        assert len(completed) == ATTEMPTS
        assert await repo.leases.list() == []
    assert any(attempt.attempt_no > 1 for attempt in completed)
    for attempt in completed:
        assert attempt.result[1] == attempt.lease_version
        # Who was killed may have completed it without a chance to report.
        assert reports.get(attempt.attempt_id, attempt.result) == attempt.result
        assert attempt.attempt_id in reports or attempt.result[0] in mortal
