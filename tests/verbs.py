"""
The verbs as tables: what every noun has, called well, and what the holder of a lease writes with it, each in the form
that needs the least.
"""

import inspect
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any, cast

from runtime_repo import Lease, LeaseLostError, NewAttempt, NotFoundError, RuntimeRepository, RuntimeTransaction
from runtime_repo.repository import Stores

Repo = RuntimeRepository | RuntimeTransaction
Write = Callable[[Repo, Lease, datetime], Awaitable[object]]

MINUTE = timedelta(minutes=1)

ENDS: dict[str, Write] = {
    "complete": lambda repo, lease, now: repo.attempts.complete(lease, "done", now=now),
    "complete_many": lambda repo, lease, now: repo.attempts.complete_many([(lease, "done")], now=now),
    "fail": lambda repo, lease, now: repo.attempts.fail(lease, "boom", now=now),
    "fail, retry": lambda repo, lease, now: repo.attempts.fail(lease, "boom", retry_in=MINUTE, now=now),
    "release": lambda repo, lease, now: repo.leases.release(lease, now=now),
    "release, delay": lambda repo, lease, now: repo.leases.release(lease, delay=MINUTE, now=now),
}
"""What ends the lease."""

BEATS: dict[str, Write] = {
    "heartbeat": lambda repo, lease, now: repo.leases.heartbeat(lease, ttl=2 * MINUTE, now=now),
    "heartbeat_many": lambda repo, lease, now: repo.leases.heartbeat_many([lease], ttl=2 * MINUTE, now=now),
}
"""What keeps it."""

WRITES: dict[str, Write] = {"start": lambda repo, lease, now: repo.attempts.start(lease, now=now)} | ENDS | BEATS


CALLS: dict[str, Write] = {
    "attempts.enqueue": lambda repo, _, now: repo.attempts.enqueue("run", now=now),
    "attempts.enqueue_many": lambda repo, _, now: repo.attempts.enqueue_many([NewAttempt("run")], now=now),
    "attempts.get": lambda repo, lease, _: repo.attempts.get(lease.attempt_id),
    "attempts.find": lambda repo, lease, _: repo.attempts.find(lease.attempt_id),
    "attempts.list": lambda repo, *_: repo.attempts.list(),
    "attempts.list_dispatchable": lambda repo, _, now: repo.attempts.list_dispatchable(now=now),
    "attempts.wait": lambda repo, _, now: repo.attempts.wait(timeout=timedelta(0), now=now),
    "attempts.stats": lambda repo, _, now: repo.attempts.stats(now=now),
    "attempts.depth": lambda repo, _, now: repo.attempts.depth(now=now),
    "attempts.start": WRITES["start"],
    "attempts.complete": WRITES["complete"],
    "attempts.complete_many": WRITES["complete_many"],
    "attempts.fail": WRITES["fail"],
    "attempts.cancel": lambda repo, lease, now: repo.attempts.cancel(lease.attempt_id, now=now),
    "attempts.retry": lambda repo, *_: repo.attempts.retry("failed"),
    "attempts.retry_many": lambda repo, _, now: repo.attempts.retry_many(actor="ops", now=now),
    "attempts.cancel_many": lambda repo, _, now: repo.attempts.cancel_many(actor="ops", queue="default", now=now),
    "attempts.prune": lambda repo, _, now: repo.attempts.prune(older_than=timedelta(0), now=now),
    "attempts.reindex": lambda repo, *_: repo.attempts.reindex(),
    "attempts.vacuum": lambda repo, *_: repo.attempts.vacuum(),
    "leases.claim": lambda repo, _, now: repo.leases.claim("worker", now=now),
    "leases.claim_attempt": lambda repo, _, now: repo.leases.claim_attempt("failed", "worker", now=now),
    "leases.heartbeat": WRITES["heartbeat"],
    "leases.heartbeat_many": WRITES["heartbeat_many"],
    "leases.hold": lambda repo, lease, _: held(repo, lease),
    "leases.release": WRITES["release"],
    "leases.list": lambda repo, *_: repo.leases.list(),
    "leases.requeue_expired": lambda repo, lease, _: repo.leases.requeue_expired(now=lease.expires_at),
    "jobs.upsert": lambda repo, _, now: repo.jobs.upsert("thread", "fine", now=now),
    "jobs.get": lambda repo, *_: repo.jobs.get("thread"),
    "jobs.find": lambda repo, *_: repo.jobs.find("thread"),
    "jobs.list": lambda repo, *_: repo.jobs.list(),
    "interrupts.create": lambda repo, _, now: repo.interrupts.create("thread", "run", "a", "?", now=now),
    "interrupts.get": lambda repo, *_: repo.interrupts.get("asked"),
    "interrupts.find": lambda repo, *_: repo.interrupts.find("asked"),
    "interrupts.list": lambda repo, *_: repo.interrupts.list(),
    "interrupts.resume": lambda repo, _, now: repo.interrupts.resume("asked", "yes", now=now),
    "interrupts.cancel": lambda repo, *_: repo.interrupts.cancel("asked"),
    "step_reports.record": lambda repo, lease, now: repo.step_reports.record(lease, "pay", "done", "t", now=now),
    "step_reports.list": lambda repo, lease, _: repo.step_reports.list(lease.attempt_id),
    "api_keys.put": lambda repo, _, now: repo.api_keys.put("new", "secret", now=now),
    "api_keys.get": lambda repo, *_: repo.api_keys.get("key"),
    "api_keys.find": lambda repo, *_: repo.api_keys.find("key"),
    "api_keys.authenticate": lambda repo, *_: repo.api_keys.authenticate("key", "secret"),
    "api_keys.set_active": lambda repo, _, now: repo.api_keys.set_active("key", active=False, now=now),
    "api_keys.any": lambda repo, *_: repo.api_keys.any(),
    "api_keys.list": lambda repo, *_: repo.api_keys.list(),
    "audit.append": lambda repo, _, now: repo.audit.append(
        actor_type="user", action="do", resource_type="x", result="ok", request_id="r", now=now
    ),
    "audit.list": lambda repo, *_: repo.audit.list(),
    "control.quiesce": lambda repo, _, now: repo.control.quiesce(timeout=timedelta(0), now=now),
    "control.pause": lambda repo, _, now: repo.control.pause("mail", now=now),
    "control.resume": lambda repo, *_: repo.control.resume(),
    "control.state": lambda repo, *_: repo.control.state(),
}
"""Every verb of every noun, on what `prepare` has made; a test proves that none is missing."""


async def held(repo: Repo, lease: Lease) -> None:
    """Hold a lease for a moment."""
    async with repo.leases.hold(lease):
        pass


async def prepare(repo: Repo, now: datetime, *, ttl: timedelta = MINUTE) -> Lease:
    """Make something for every verb of `CALLS` to work on, none of it ready; return a lease."""
    await repo.attempts.enqueue_many([NewAttempt("run", "held"), NewAttempt("run", "failed")], now=now)
    leases = {lease.attempt_id: lease for lease in await repo.leases.claim("worker", limit=2, ttl=ttl, now=now)}
    await repo.attempts.fail(leases["failed"], "boom", now=now)
    await repo.jobs.upsert("thread", "fine", now=now)
    await repo.interrupts.create("thread", "run", "held", "?", interrupt_id="asked", now=now)
    await repo.api_keys.put("key", "secret", now=now)
    return leases["held"]


def verbs(repo: RuntimeRepository) -> dict[str, inspect.Signature]:
    """Every verb of every noun, as ``noun.verb``, with its arguments."""
    return {
        f"{name}.{verb}": inspect.signature(function)
        for name, noun in vars(repo).items()
        if type(noun) in map(type, vars(Stores(cast(Any, None))).values())
        for verb, function in vars(type(noun)).items()
        if not verb.startswith("_") and inspect.isfunction(function)
    }


async def refusal(write: Awaitable[object]) -> LeaseLostError | NotFoundError | None:
    """The error with which a lost lease is refused; None where many are answered at once and say no more."""
    try:
        answer = await write
    except (LeaseLostError, NotFoundError) as error:
        return error
    assert answer in ([False], [None]), f"it was not refused: {answer!r}"
    return None
