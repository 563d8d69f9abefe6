"""The loop that everybody would otherwise write: claim, hold, handle, finish; over public verbs only."""

import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import socket
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from runtime_repo.errors import ConfigurationError, DatabaseUnavailableError, LeaseLostError, RuntimeRepoError
from runtime_repo.leases import DEFAULT_TTL
from runtime_repo.records import DEFAULT_QUEUE, Lease, RetryPolicy
from runtime_repo.repository import RuntimeRepository
from runtime_repo.shielding import finish
from runtime_repo.values import check_count, check_id, queue_names, span_ms

__all__ = ["Handler", "Worker"]

Handler = Callable[[Lease], Awaitable[Any]]
"""Does the work of one attempt; what it returns becomes the result."""

_log = logging.getLogger("runtime_repo")

_BATCH = 100
_PAUSE_FIRST = 0.01
_PAUSE_LAST = 1.0
_BLINK = 0.05
"""Seconds within which a wait that ends has not waited."""
_ERROR_LENGTH = 4000

_stops: dict[tuple[asyncio.AbstractEventLoop, signal.Signals], tuple[Any, list[Callable[[], None]]]] = {}
"""
Of each signal that workers wait for, what handled it before and whom it stops: an event loop has one handler for it.
"""


class Worker:
    """
    Works on attempts until it is told to stop.

    It claims as many as it has room for, holds each lease while *handler* runs, and finishes by the outcome: what the
    handler returns completes the attempt, an exception fails it, to be tried again as *retry* says. A handler whose
    lease is lost is cancelled, and so is what it would have reported. A handler may end its lease itself, such as by
    ``complete`` in a transaction of its own; what it returns is not needed then. The handler may be run more than once
    for an attempt, for a worker can die between the work and the report: make its effects safe to repeat.

    It also makes ready again, every *sweep_every*, what silent workers held, so no other process has to. While the
    database cannot be reached it keeps trying, and a result waits for it as long as the lease holds.

    At SIGTERM or SIGINT, or ``stop()``, it claims nothing more and gives running handlers *grace* to end; those that
    have not ended by then are cancelled and their attempts released, the try not counted. A second signal acts as if
    nobody had been listening. Cancelling ``run`` releases at once.

    Args:
        repo: An open repository.
        handler: A coroutine function that is given the lease; ``lease.attempt`` has the payload.
        worker_id: Who the holder is, for people; unique to this process when it is left out.
        queues: What to claim from, the highest priority first, then the oldest, across all of them.
        concurrency: How many handlers run at a time.
        ttl: For how long a lease is taken; it is kept by heartbeats, so this is how soon others take over when this
            process dies.
        retry: When a failed attempt is tried again; None is never.
        grace: How long handlers may go on after the worker was told to stop.
        sweep_every: How often to look for expired leases, on average.
        signals: Which signals stop it. Pass ``()`` where the application sees to signals itself; only the main thread
            can.

    Raises:
        ConfigurationError: An argument cannot be meant.
    """

    def __init__(
        self,
        repo: RuntimeRepository,
        handler: Handler,
        *,
        worker_id: str | None = None,
        queues: str | Sequence[str] = DEFAULT_QUEUE,
        concurrency: int = 10,
        ttl: timedelta = DEFAULT_TTL,
        retry: RetryPolicy | None = RetryPolicy(),  # noqa: B008 - frozen
        grace: timedelta = timedelta(seconds=30),
        sweep_every: timedelta = timedelta(seconds=10),
        signals: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
    ) -> None:
        if not callable(handler):
            raise ConfigurationError(f"handler is {handler!r}: expected a coroutine function")
        if retry is not None and not isinstance(retry, RetryPolicy):
            raise ConfigurationError(f"retry is {retry!r}: expected a RetryPolicy, or None")
        self._repo = repo
        self._handler = handler
        self.worker_id = _unique_id() if worker_id is None else check_id("worker_id", worker_id)
        self._queues = queue_names(queues)
        self._concurrency = check_count("concurrency", concurrency)
        span_ms("ttl", ttl, positive=True)
        self._ttl = ttl
        self._retry = retry
        self._grace = span_ms("grace", grace) / 1000
        self._sweep_every = span_ms("sweep_every", sweep_every, positive=True) / 1000
        try:
            self._signals = tuple(map(signal.Signals, signals))
        except (TypeError, ValueError):
            raise ConfigurationError(f"signals is {signals!r}: expected some of signal.Signals") from None
        self._room = asyncio.Semaphore(self._concurrency)
        self._task: asyncio.Task[Any] | None = None
        self._claiming: anyio.CancelScope | None = None
        self._stopped = False

    def stop(self) -> None:
        """Tell it to stop, from its own event loop: ``run`` returns when the handlers have ended. May be repeated."""
        self._stopped = True
        if self._claiming is not None:
            self._claiming.cancel()

    async def run(self) -> None:
        """
        Work until told to stop; return at once if that has happened before. A worker runs once.

        Raises:
            ConfigurationError: It has run before, or a signal cannot be caught here.
            RepositoryClosedError: The repository was closed.
        """
        if self._claiming is not None:
            raise ConfigurationError(
                f"worker {self.worker_id} has run before, and a worker runs once: construct another"
            )
        failure: RuntimeRepoError | None = None
        self._task = asyncio.current_task()
        with self._stopped_by_signals():
            async with anyio.create_task_group() as handlers:
                with anyio.CancelScope() as self._claiming:
                    if self._stopped:
                        return
                    async with anyio.create_task_group() as sweeping:
                        sweeping.start_soon(self._sweep)
                        try:
                            await self._claim(handlers)
                        except RuntimeRepoError as error:
                            failure = error
                        sweeping.cancel_scope.cancel()
                with anyio.move_on_after(self._grace):
                    for _ in range(self._concurrency):
                        await self._room.acquire()
                handlers.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _claim(self, handlers: TaskGroup) -> None:
        """Claim as much as there is room for, again and again; wait where there is nothing."""
        pause = _PAUSE_FIRST
        while True:
            leases, wanted = await self._claim_once()
            for lease in leases:
                handlers.start_soon(self._work, lease)
            if len(leases) == wanted:
                continue
            has_waited = False
            began = time.monotonic()
            with contextlib.suppress(DatabaseUnavailableError):
                await self._repo.attempts.wait(self._queues)
                has_waited = time.monotonic() - began > _BLINK
            if leases or has_waited:
                pause = _PAUSE_FIRST
                continue
            # What is said to be there cannot be claimed: a rival is just claiming it, or the database is away.
            await anyio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311
            pause = min(pause * 2, _PAUSE_LAST)

    async def _claim_once(self) -> tuple[Sequence[Lease], int]:
        """What was claimed, and how many there was room for."""
        await self._room.acquire()
        wanted = 1
        while wanted < _BATCH and not self._room.locked():
            await self._room.acquire()
            wanted += 1
        leases: Sequence[Lease] = ()
        try:
            leases = await self._repo.leases.claim(self.worker_id, limit=wanted, queues=self._queues, ttl=self._ttl)
        except DatabaseUnavailableError as error:
            _log.warning("worker %s cannot claim and tries again: %s", self.worker_id, error)
        finally:
            for _ in range(wanted - len(leases)):
                self._room.release()
        return leases, wanted

    async def _sweep(self) -> None:
        while True:
            try:
                while len(await self._repo.leases.requeue_expired(limit=_BATCH)) == _BATCH:
                    pass
            except RuntimeRepoError as error:
                _log.warning("worker %s cannot look for expired leases: %s", self.worker_id, error)
            # Of random length, so that many workers share the task instead of all doing it at once.
            await anyio.sleep(self._sweep_every * random.uniform(0.5, 1.5))  # noqa: S311

    async def _work(self, lease: Lease) -> None:
        try:
            async with self._repo.leases.hold(lease, ttl=self._ttl):
                await self._handle(lease)
        except LeaseLostError as error:
            _log.warning("worker %s discards what it did: %s", self.worker_id, error)
        except Exception as error:  # noqa: BLE001 - what befalls one attempt is not the end of the worker
            # Its lease expires, and the attempt is made ready again.
            _log.error("worker %s cannot report on attempt %r: %s", self.worker_id, lease.attempt_id, error)
        except asyncio.CancelledError:
            await finish(self._give_back(lease))
            raise
        finally:
            self._room.release()

    async def _handle(self, lease: Lease) -> None:
        """Run the handler and report how it ended."""
        attempts = self._repo.attempts
        await self._insist(lambda: attempts.start(lease))
        try:
            result = await self._handler(lease)
        except (Exception, asyncio.CancelledError, BaseExceptionGroup) as error:
            if isinstance(error, LeaseLostError) and error.attempt_id == lease.attempt_id:
                raise
            # The end of the lease or of the worker goes through; any other cancellation is how this try ended.
            await anyio.lowlevel.checkpoint_if_cancelled()
            if self._task is not None and self._task.cancelling():
                # With all tasks of the event loop, so that it comes to this one first.
                raise asyncio.CancelledError from error
            _forget_cancellation()
            await self._fail(lease, error)
            return
        try:
            await self._insist(lambda: attempts.complete(lease, result))
        except ConfigurationError as error:
            await self._fail(lease, error)

    async def _fail(self, lease: Lease, error: BaseException) -> None:
        _log.warning("attempt %r failed", lease.attempt_id, exc_info=error)
        # It may be one that cannot be shown.
        words = "".join(traceback.format_exception_only(error)).strip()[:_ERROR_LENGTH]
        await self._insist(lambda: self._repo.attempts.fail(lease, words, retry_in=self._retry))

    async def _insist(self, report: Callable[[], Awaitable[object]]) -> None:
        """Report, also when the database is away for a while; no longer than the lease is taken for."""
        deadline = time.monotonic() + self._ttl.total_seconds()
        pause = _PAUSE_FIRST
        while True:
            try:
                await report()
            except DatabaseUnavailableError as error:
                if time.monotonic() + pause > deadline:
                    raise
                _log.warning("worker %s cannot report and tries again: %s", self.worker_id, error)
            else:
                return
            await anyio.sleep(pause)
            pause = min(pause * 2, _PAUSE_LAST)

    async def _give_back(self, lease: Lease) -> None:
        try:
            await self._repo.leases.release(lease)
        except RuntimeRepoError as error:
            _log.warning("worker %s could not release attempt %r: %s", self.worker_id, lease.attempt_id, error)

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:

            def stop() -> None:
                _log.info("worker %s stops", self.worker_id)
                self.stop()
                stack.close()

            for number in self._signals:
                stack.enter_context(_caught(number, stop))
            yield


@contextlib.contextmanager
def _caught(number: signal.Signals, stop: Callable[[], None]) -> Iterator[None]:
    """Call *stop* at a signal, as all those that wait for it; the last who leaves restores what was before."""
    loop = asyncio.get_running_loop()
    _, stops = _stops.get((loop, number)) or _catch(loop, number)
    stops.append(stop)
    try:
        yield
    finally:
        stops.remove(stop)
        if not stops:
            before, _ = _stops.pop((loop, number))
            loop.remove_signal_handler(number)
            signal.signal(number, before or signal.SIG_DFL)


def _catch(loop: asyncio.AbstractEventLoop, number: signal.Signals) -> tuple[Any, list[Callable[[], None]]]:
    before, stops = signal.getsignal(number), list[Callable[[], None]]()

    def stop_all() -> None:
        for stop in tuple(stops):
            stop()

    try:
        loop.add_signal_handler(number, stop_all)
    except (NotImplementedError, RuntimeError, ValueError):
        raise ConfigurationError(
            f"{number.name} cannot be caught here: only the main thread can, and not on every system; "
            "pass signals=() and call stop()"
        ) from None
    return _stops.setdefault((loop, number), (before, stops))


def _forget_cancellation() -> None:
    task = asyncio.current_task()
    while task is not None and task.cancelling():
        task.uncancel()


def _unique_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
