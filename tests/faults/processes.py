"""What another process needs: the words for where a repository is kept, and something to do there."""

import asyncio
import contextlib
import multiprocessing
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

from runtime_repo import LeaseLostError, RuntimeRepoError, SchemaReport
from tests.place import Moment, Place

# Its children are forked from a process that has imported everything and has no threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

TTL = timedelta(minutes=1)
"""How long rivals lease; who ends their leases passes a later time."""

_gate: Barrier
"""Reaches a pool's process only as that starts."""


def meet_at(gate: Barrier) -> None:
    """Let this process wait at *gate* before each of its boots."""
    global _gate
    _gate = gate


def boot_together(place: Place) -> SchemaReport:
    """Boot, in the same instant as the other processes."""
    _gate.wait(60)
    return asyncio.run(_boot(place))


async def _boot(place: Place) -> SchemaReport:
    async with place.repository() as repository:
        return repository.boot_report


def race(place: Place, gate: Connection, answers: Connection) -> None:
    """
    Say that it is ready, and boot when *gate* ends, as all that hold its other end; then answer with the versions that
    were applied, or with the error.

    Unlike a barrier a pipe does not care who is killed at it.
    """
    answers.send(None)
    with contextlib.suppress(EOFError):
        gate.recv()
    try:
        report = asyncio.run(_boot(place))
    except RuntimeRepoError as error:
        answers.send(f"{type(error).__name__}: {error}")
    else:
        answers.send([migration.version for migration in report.applied])


def stall_for_ever(place: Place, moment: Moment, answers: Connection) -> None:
    """Boot up to *moment*, say so, and never go on."""

    async def stall() -> None:
        answers.send(moment)
        await asyncio.Event().wait()

    asyncio.run(place.boot_stalling(moment, stall))


def compete(place: Place, number: int, rounds: int) -> list[int | None]:
    """Claim the only attempt in the same instant as the other processes, again and again. Return the tokens won."""
    return asyncio.run(_compete(place, number, rounds))


async def _compete(place: Place, number: int, rounds: int) -> list[int | None]:
    won: list[int | None] = []
    async with place.repository() as repo:
        for turn in range(rounds):
            _gate.wait(60)
            if number % 2:
                lease = await repo.leases.claim_attempt("a", f"worker {number}")
            else:
                lease = next(iter(await repo.leases.claim(f"worker {number}", limit=1 + number % 3)), None)
            _gate.wait(60)
            if lease is not None:
                # Whoever has won makes it ready again, in one way or another.
                match turn % 3:
                    case 0:
                        await repo.leases.release(lease)
                    case 1:
                        await repo.attempts.fail(lease, "boom", retry_in=timedelta(0))
                    case 2:
                        await repo.leases.requeue_expired(now=lease.expires_at)
            won.append(None if lease is None else lease.version)
    return won


def work(place: Place, worker_id: str, stalls_after: int | None, answers: Connection) -> None:
    """
    Complete whatever can be claimed until there is nothing left, and report each attempt whose result was accepted.

    With *stalls_after*, report so many, say so and never go on.
    """
    asyncio.run(_work(place, worker_id, stalls_after, answers))


async def _work(place: Place, worker_id: str, stalls_after: int | None, answers: Connection) -> None:
    accepted = 0
    async with place.repository() as repo:
        while (leases := await repo.leases.claim(worker_id, limit=7, ttl=TTL)) or await repo.attempts.stats():
            for lease in leases:
                if accepted == stalls_after:
                    answers.send(None)
                    await asyncio.Event().wait()
                with contextlib.suppress(LeaseLostError):
                    await repo.attempts.complete(lease, [worker_id, lease.version])
                    answers.send((lease.attempt_id, [worker_id, lease.version]))
                    accepted += 1
            if not leases:
                await asyncio.sleep(0.05)
