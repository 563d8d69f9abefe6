"""
What the processes do with the store, and write down.

- A *worker* is the product's own `Worker`, over handlers of several kinds.
- A *rogue* claims by hand and then does what a bad worker does: it sleeps past its lease and completes late, twice, or
  not at all, releases, fails, cancels, and is cancelled itself.
- A *producer* enqueues, until it is acknowledged or gives up; also together with rows of its own.
"""

import asyncio
import contextlib
import contextvars
import functools
import itertools
import logging
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import asyncpg

from runtime_repo import (
    Attempt,
    DatabaseUnavailableError,
    Lease,
    LeaseLostError,
    NewAttempt,
    RetryPolicy,
    RuntimeRepoError,
    RuntimeRepository,
    Worker,
)
from runtime_repo.attempts import Attempts
from runtime_repo.leases import Leases
from tests.faults.nemeses.history import History
from tests.place import Place

Role = Literal["worker", "rogue", "producer"]

GRACE = 1.0
"""Seconds that a worker gives its handlers when it is told to stop."""

PATIENCE = (3.0, None)
"""Seconds after which the others give up a call, as some clients do; None is to leave it to the store."""

STEP = 0.05
"""Seconds between two steps of a handler: how exactly it is known when it ran."""

OVERSLEPT = 0.15
"""Seconds by which a process must have slept too long to say so: it did not run, and could not act."""

NO_BOOT = 3
"""The status of a process that ends because the database was not to be reached in time: it is started again."""

POISON_EVERY = 15.0
TRIES = 50
POISON_TRIES = 3

_ERRORS = (RuntimeRepoError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, sqlite3.Error)
"""What a client catches that goes on: our errors, those of its own statements, and its own patience's end."""

_within: contextvars.ContextVar[int | None] = contextvars.ContextVar("within", default=None)
"""The number of the transaction that is open: what is done in it is acknowledged when that is."""


@dataclass(frozen=True)
class Load:
    """What a process works on, and how."""

    place: Place
    folder: Path
    ttl: float
    """Seconds for which a worker leases."""
    rate: float
    """Calls that enqueue, a second."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the repository."""


def run(role: Role, name: str, load: Load) -> None:
    """Be this process, until it is stopped or killed; it dies with the process that started it."""
    log = os.open(load.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(format="%(relativeCreated)d %(levelname)s %(name)s %(message).300s", level=logging.INFO)
    asyncio.run(_run(role, History(load.folder, name), load))


async def _run(role: Role, history: History, load: Load) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    asyncio.get_running_loop().add_reader(parent.sentinel, os._exit, 1)
    record_verbs(history)
    history.write("born", role=role)
    watching = asyncio.create_task(_watch_sleep(history))
    try:
        repo = load.place.repository(**load.options)
        try:
            await repo
        except DatabaseUnavailableError:
            logging.getLogger().exception("no boot")
            sys.exit(NO_BOOT)
        async with repo:
            history.write("open")
            await _ROLES[role](history, repo, load)
    finally:
        watching.cancel()
    history.write("ended")


async def _watch_sleep(history: History) -> None:
    while True:
        until = time.monotonic() + STEP
        await asyncio.sleep(STEP)
        if time.monotonic() > until + OVERSLEPT:
            history.write("overslept", since=round(until, 4))


# -- what is written down


def record_verbs(history: History) -> None:
    """Wrap the verbs of this process, so that what `Worker` and `hold` call is written down as well."""

    def wrap(
        noun: type, name: str, asked: Callable[..., dict[str, Any]], told: Callable[[Any], dict[str, Any]]
    ) -> None:
        verb = getattr(noun, name)

        @functools.wraps(verb)
        async def recorded(store: object, *args: Any, **kwargs: Any) -> Any:
            with _recorded(history, name, asked(*args, **kwargs)) as (_, answer):
                found = await verb(store, *args, **kwargs)
                answer.update(told(found))
            return found

        setattr(noun, name, recorded)

    def of_lease(lease: Lease, *args: Any, **kwargs: Any) -> dict[str, Any]:
        known: dict[str, Any] = {"a": lease.attempt_id, "token": lease.version, "lease": lease.lease_id}
        if args:
            known["value"] = args[0]
        if "ttl" in kwargs:
            known["ttl"] = kwargs["ttl"].total_seconds()
        return known

    def of_attempt(attempt: Attempt) -> dict[str, Any]:
        return {"status": attempt.status}

    wrap(
        Leases,
        "claim",
        lambda _, **kwargs: {"ttl": kwargs["ttl"].total_seconds()},
        lambda leases: {"got": [[lease.attempt_id, lease.version, lease.lease_id] for lease in leases]},
    )
    wrap(
        Leases,
        "requeue_expired",
        lambda **_: {},
        lambda attempts: {"got": [[attempt.attempt_id, attempt.lease_version] for attempt in attempts]},
    )
    wrap(Leases, "heartbeat", of_lease, lambda _: {})
    wrap(Leases, "release", of_lease, of_attempt)
    wrap(Attempts, "start", of_lease, of_attempt)
    wrap(Attempts, "complete", of_lease, of_attempt)
    wrap(Attempts, "fail", of_lease, of_attempt)
    wrap(Attempts, "cancel", lambda attempt_id, **_: {"a": attempt_id}, of_attempt)
    wrap(Attempts, "enqueue", lambda _, **kwargs: {"a": kwargs["attempt_id"]}, of_attempt)
    wrap(Attempts, "enqueue_many", lambda new: {"ids": [attempt.attempt_id for attempt in new]}, lambda _: {})


@contextlib.contextmanager
def _recorded(history: History, verb: str, asked: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Write down that *verb* is called, and how that ended; yield the call's number, and the answer to be filled in."""
    number = history.ask(verb, **asked, **({} if _within.get() is None else {"within": _within.get()}))
    answer: dict[str, Any] = {}
    try:
        yield number, answer
    except asyncio.CancelledError:
        history.write("cancelled", n=number, f=verb)
        raise
    except BaseException as error:
        history.write("error", n=number, f=verb, error=type(error).__name__, words=str(error)[:300])
        raise
    history.write("ok", n=number, f=verb, **answer)


@contextlib.contextmanager
def _transaction(history: History, name: str, **asked: Any) -> Iterator[None]:
    """A verb of the application's own, whose parts are acknowledged when it is."""
    with _recorded(history, name, asked) as (number, _):
        before = _within.set(number)
        try:
            yield
        finally:
            _within.reset(before)


@contextlib.asynccontextmanager
async def _patience(history: History, *choice: float | None) -> AsyncIterator[None]:
    """Give the block up after one of so many seconds, and write down when it has let go; None is never."""
    seconds = random.choice(choice)
    begun = time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            yield
    finally:
        if seconds is not None:
            history.write("patience", allowed=seconds, took=round(time.monotonic() - begun, 4))


# -- who they are


async def _worker(history: History, repo: RuntimeRepository, load: Load) -> None:
    async def handle(lease: Lease) -> Any:
        kind, attempt_id, token = lease.attempt.payload["kind"], lease.attempt_id, lease.version
        history.write("begin", a=attempt_id, token=token, kind=kind)
        if kind == "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        result = _result(history, lease)
        try:
            for _ in range(int(load.ttl * 2 / STEP) if kind == "long" else 3):
                history.write("step", a=attempt_id, token=token)
                await asyncio.sleep(STEP * random.uniform(0.5, 1.5))
            if kind == "fail" and random.random() < 0.6:
                raise ValueError("the handler's own")
            if kind == "transaction":
                await _finish_in_transaction(history, repo, load, lease, result)
        finally:
            history.write("end", a=attempt_id, token=token)
        return result

    await Worker(
        repo,
        handle,
        worker_id=history.process,
        concurrency=4,
        ttl=timedelta(seconds=load.ttl),
        retry=RetryPolicy(base=timedelta(seconds=0.2), cap=timedelta(seconds=1)),
        grace=timedelta(seconds=GRACE),
        sweep_every=timedelta(seconds=1),
    ).run()


def _result(history: History, lease: Lease) -> dict[str, Any]:
    return {"by": history.process, "token": lease.version, "nonce": random.getrandbits(48)}


async def _finish_in_transaction(
    history: History, repo: RuntimeRepository, load: Load, lease: Lease, result: dict[str, Any]
) -> None:
    """The end of the attempt, a row of the application's, and the next attempt: all or none."""
    attempt_id, token = lease.attempt_id, lease.version
    with _transaction(history, "finish", a=attempt_id, token=token):
        async with repo.transaction() as transaction:
            await transaction.attempts.complete(lease, result)
            await transaction.connection.execute(
                f"insert into {load.place.schema}.effects values ('{attempt_id}', {token}, '{history.process}')"
            )
            await transaction.attempts.enqueue("child", attempt_id=f"{attempt_id}+child", payload={"kind": "short"})


async def _rogue(history: History, repo: RuntimeRepository, load: Load) -> None:
    ttl = timedelta(seconds=load.ttl / 2)
    kept: list[tuple[float, Lease]] = []

    async def end(lease: Lease) -> None:
        result = _result(history, lease)
        if lease.attempt.payload["kind"] == "transaction":
            await _finish_in_transaction(history, repo, load, lease, result)
            return
        match random.randrange(8):
            case 0:
                await repo.leases.release(lease)
            case 1:
                await repo.attempts.fail(lease, "rogue", retry_in=timedelta(seconds=0.5))
            case 2:
                await repo.attempts.cancel(lease.attempt_id)
            case 3 | 4 | 5:
                kept.append((time.monotonic() + load.ttl / 2, lease))
            case _:
                await repo.attempts.complete(lease, result)
                await repo.attempts.complete(lease, result)

    async def end_late(lease: Lease) -> None:
        match random.randrange(6):
            case 0:
                await repo.leases.heartbeat(lease, ttl=ttl)
            case 1:
                await repo.attempts.start(lease)
            case 2:
                await repo.attempts.fail(lease, "late", retry_in=timedelta(0))
            case _:
                await repo.attempts.complete(lease, _result(history, lease))

    while True:
        try:
            with contextlib.suppress(TimeoutError):
                async with _patience(history, random.uniform(0, 0.3)):
                    await repo.attempts.wait()
            # Some rounds are cut short somewhere: what was cancelled may have happened.
            async with _patience(history, *PATIENCE, random.uniform(0, 0.02)):
                claimed = await repo.leases.claim(history.process, limit=3, ttl=ttl)
            for lease in claimed:
                async with _patience(history, *PATIENCE):
                    await end(lease)
            async with _patience(history, *PATIENCE):
                await repo.leases.requeue_expired()
            late = [lease for kept_until, lease in kept if kept_until < time.monotonic()]
            kept = [(kept_until, lease) for kept_until, lease in kept if lease not in late]
            for lease in late:
                # By now others have begun with it.
                await asyncio.sleep(random.uniform(0, STEP))
                with contextlib.suppress(LeaseLostError):
                    async with _patience(history, *PATIENCE, random.uniform(0, 0.02)):
                        await end_late(lease)
        except _ERRORS:
            await asyncio.sleep(0.2)


async def _producer(history: History, repo: RuntimeRepository, load: Load) -> None:
    last_poison = time.monotonic() - POISON_EVERY / 2

    async def enqueue(ids: str, kind: str, way: int) -> None:
        payload, tries = {"kind": kind}, POISON_TRIES if kind == "poison" else TRIES
        if way == 1:
            await repo.attempts.enqueue_many(
                [NewAttempt("run", f"{ids}.{n}", payload=payload, max_attempts=tries) for n in range(4)]
            )
        elif way == 2:
            # An order and its attempt, together.
            with _transaction(history, "order", a=ids):
                async with repo.transaction() as transaction:
                    await transaction.connection.execute(
                        f"insert into {load.place.schema}.orders values ('{ids}') on conflict (id) do nothing"
                    )
                    await transaction.attempts.enqueue("run", attempt_id=ids, payload=payload, max_attempts=tries)
        else:
            await repo.attempts.enqueue("run", attempt_id=ids, payload=payload, max_attempts=tries)

    for number in itertools.count():
        kind = random.choices(["short", "long", "fail", "transaction"], [12, 1, 3, 4])[0]
        way = random.randrange(4)
        if time.monotonic() - last_poison > POISON_EVERY:
            last_poison, kind, way = time.monotonic(), "poison", 0
        # Some are given up after one try: what was never acknowledged may be there or not, but whole.
        gives_up = random.random() < 0.5
        while True:
            try:
                async with _patience(history, *PATIENCE):
                    await enqueue(f"{history.process}-{number}", kind, way)
                break
            except _ERRORS:
                await asyncio.sleep(0.2)
            if gives_up:
                break
        await asyncio.sleep(random.uniform(0, 2) / load.rate)


_ROLES: dict[Role, Callable[[History, RuntimeRepository, Load], Awaitable[None]]] = {
    "worker": _worker,
    "rogue": _rogue,
    "producer": _producer,
}
