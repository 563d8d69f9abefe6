"""The loop that everybody would otherwise write: claim, hold, handle, finish; over public verbs only."""

import asyncio
import contextlib
import functools
import inspect
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
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from runtime_repo.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    LeaseLostError,
    OutdatedReleaseError,
    OverloadedError,
    RefusedError,
    RepositoryClosedError,
    RuntimeRepoError,
    shown,
)
from runtime_repo.fencing import Holding, ended_by, holding
from runtime_repo.keeping import is_running
from runtime_repo.leases import DEFAULT_TTL
from runtime_repo.outages import Outages
from runtime_repo.records import DEFAULT_QUEUE, Lease
from runtime_repo.repository import RuntimeRepository, is_known_to_be_sync
from runtime_repo.retry import RetryPolicy
from runtime_repo.shielding import finish
from runtime_repo.values import check_count, check_id, queue_names, span_ms

__all__ = ["Handler", "Worker"]

Handler = Callable[[Lease], Awaitable[Any]]
"""Does the work of one attempt; what it returns becomes the result."""

T = TypeVar("T")

_log = logging.getLogger("runtime_repo")

_BATCH = 100
_PAUSE_FIRST = 0.01
_PAUSE_LAST = 1.0
_BLINK = 0.05
"""Seconds within which a wait that ends has not waited."""
_PATIENCE = 2.5
_MOST_PATIENCE = 5.0
"""
Seconds within which the database has to answer a call of the worker's own, and at most where it is known to be slow;
then another connection is tried.
"""
_WORN = 20_000
"""Claims after which what they have left behind slows the next ones on PostgreSQL."""
_ERROR_LENGTH = 4000
_UNSTORABLE = "the database refused to store how this try ended; the worker's log has more"

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
    database cannot be reached, or refuses, it keeps trying, and a result waits for it as long as the lease holds; its
    log has one line when that begins and one when it ends, and so it has when the store is quiesced. A result, or the
    words of an error, that the database refuses to store fails the attempt.

    When a newer release has migrated the database, and this one cannot run beside it, it claims nothing more, gives
    running handlers *grace* to end, and ``run`` raises.

    At SIGTERM or SIGINT, or ``stop()``, it claims nothing more and gives running handlers *grace* to end; those that
    have not ended by then are cancelled and their attempts released, the try not counted. It ends within 5 s of that,
    whatever the database does, provided that the handlers let themselves be cancelled. A second signal acts as if
    nobody had been listening. Cancelling ``run`` releases at once, and so does a handler that raises SystemExit or
    KeyboardInterrupt, which ``run`` then raises. Whatever else a handler raises is how that try ended.

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
        ConfigurationError: An argument is invalid.
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
        _check_handler(handler)
        if retry is not None and not isinstance(retry, RetryPolicy):
            raise ConfigurationError(f"retry is {shown(retry)}: expected a RetryPolicy, or None")
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
            raise ConfigurationError(f"signals is {shown(signals)}: expected some of signal.Signals") from None
        self._claiming = _Patience(min(_PATIENCE, ttl.total_seconds()))
        self._sweeping = _Patience(_PATIENCE)
        self._outages = Outages(f"worker {self.worker_id}", ttl=ttl.total_seconds(), observer=repo._observer)
        self._room = asyncio.Semaphore(self._concurrency)
        self._claimed = 0
        self._is_worn = asyncio.Event()
        self._told_to_stop = asyncio.Event()
        self._running: anyio.CancelScope | None = None
        self._searching: anyio.CancelScope | None = None
        self._failure: BaseException | None = None
        self._is_quiesced = False

    def stop(self) -> None:
        """Tell it to stop, from its own event loop: ``run`` returns when the handlers have ended. May be repeated."""
        self._told_to_stop.set()
        if self._searching is not None:
            self._searching.cancel()

    async def run(self) -> None:
        """
        Work until told to stop; return at once if that has happened before. A worker runs once.

        Raises:
            ConfigurationError: It has run before, a signal cannot be caught here, or the pool that the repository was
                given has no room for heartbeats.
            RepositoryClosedError: The repository was closed.
            OutdatedReleaseError: A newer release has migrated the database, and this one cannot run beside it.
        """
        if self._running is not None:
            raise ConfigurationError(
                f"worker {self.worker_id} has run before, and a worker runs once: construct another"
            )
        with self._stopped_by_signals():
            async with anyio.create_task_group() as handlers:
                self._running = handlers.cancel_scope
                if not self._told_to_stop.is_set():
                    handlers.start_soon(self._search, handlers)
                    await self._told_to_stop.wait()
                    with anyio.move_on_after(self._grace):
                        for _ in range(self._concurrency):
                            await self._room.acquire()
                    handlers.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure
        if not self._told_to_stop.is_set():
            raise asyncio.CancelledError(f"the tasks of worker {self.worker_id} were cancelled")

    async def _search(self, handlers: TaskGroup) -> None:
        """Claim and sweep, until told to stop, or until it is of no use."""
        with anyio.CancelScope() as self._searching:
            if self._told_to_stop.is_set():
                return
            async with anyio.create_task_group() as sweeping:
                sweeping.start_soon(self._sweep)
                sweeping.start_soon(self._vacuum)
                try:
                    await self._reserve()
                    await self._claim(handlers)
                except OutdatedReleaseError as error:
                    _log.error("worker %s stops: %s", self.worker_id, error)
                    self._failure = error
                except (ConfigurationError, RepositoryClosedError) as error:
                    self._failure = error
                self.stop()

    async def _reserve(self) -> None:
        """Find out whether leases can be kept at all, before any is taken."""
        try:
            await self._repo.leases._reserve(self._ttl.total_seconds())
        except (ConfigurationError, RepositoryClosedError):
            raise
        except Exception as error:  # noqa: BLE001 - as for a claim
            _log.debug("worker %s cannot prepare heartbeats yet: %s", self.worker_id, error)

    async def _claim(self, handlers: TaskGroup) -> None:
        """Claim as much as there is room for, again and again; wait where there is nothing."""
        pause = _PAUSE_FIRST
        while True:
            await self._room.acquire()
            began = time.monotonic()
            try:
                leases, wanted = await self._claim_once()
            except (ConfigurationError, RepositoryClosedError, OutdatedReleaseError):
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the next try may succeed
                self._outages.failed("claim", "claim", error, began=began)
            else:
                self._outages.succeeded("claim")
                self._claimed += len(leases)
                if self._claimed >= _WORN:
                    self._is_worn.set()
                for lease in leases:
                    handlers.start_soon(self._work, lease)
                if len(leases) == wanted or await self._has_waited() or leases:
                    pause = _PAUSE_FIRST
                    continue
            # What is said to be there cannot be claimed: a rival is just claiming it, or the database is away.
            await _rest(pause)
            pause = min(pause * 2, _PAUSE_LAST)

    async def _claim_once(self) -> tuple[Sequence[Lease], int]:
        """What was claimed, and how many there was room for, where there was room for one."""
        wanted = 1
        while wanted < _BATCH and not self._room.locked():
            await self._room.acquire()
            wanted += 1
        leases: Sequence[Lease] = ()
        claim = self._repo.leases.claim
        try:
            leases = await self._claiming.within(
                claim(self.worker_id, limit=wanted, queues=self._queues, ttl=self._ttl)
            )
        finally:
            for _ in range(wanted - len(leases)):
                self._room.release()
        return leases, wanted

    async def _has_waited(self) -> bool:
        """Whether there was anything to wait for: the next claim tells what is wrong where there was not."""
        began = time.monotonic()
        try:
            await self._repo.attempts._wait(self._queues, noticed=self._notice)
        except (ConfigurationError, RepositoryClosedError):
            raise
        except Exception as error:  # noqa: BLE001 - as for a claim
            _log.debug("worker %s cannot wait for work: %s", self.worker_id, error)
            return False
        return time.monotonic() - began > _BLINK

    def _notice(self, is_quiesced: bool) -> None:  # noqa: FBT001 - what is noticed
        """Say once when the store is quiesced, and once when it is no more."""
        if is_quiesced is not self._is_quiesced:
            self._is_quiesced = is_quiesced
            what = "claims nothing: the store is quiesced" if is_quiesced else "claims again: the store was resumed"
            _log.warning("worker %s %s", self.worker_id, what)

    async def _sweep(self) -> None:
        while True:
            began = time.monotonic()
            try:
                found = _BATCH
                while found == _BATCH:
                    page = await self._sweeping.within(self._repo.leases.requeue_expired(limit=_BATCH))
                    found = len(page) + len(page.unreadable)
            except (ConfigurationError, RepositoryClosedError):
                return  # A claim says so, too.
            except Exception as error:  # noqa: BLE001 - as for a claim
                self._outages.failed("sweep", "look for expired leases", error, began=began)
                await _rest(min(_PAUSE_LAST, self._sweep_every))
            else:
                self._outages.succeeded("sweep")
                # Of random length, so that many workers share the task instead of all doing it at once.
                await anyio.sleep(self._sweep_every * random.uniform(0.5, 1.5))  # noqa: S311

    async def _vacuum(self) -> None:
        """Take away what the claims have left behind, as often as that costs a tenth of the time at most."""
        while True:
            await self._is_worn.wait()
            self._claimed = 0
            self._is_worn.clear()
            began = time.monotonic()
            try:
                await self._repo.attempts.vacuum()
            except (ConfigurationError, RepositoryClosedError):
                return  # A claim says so, too.
            except Exception as error:  # noqa: BLE001 - it is for speed only
                _log.debug("worker %s cannot vacuum: %s", self.worker_id, error)
            await anyio.sleep(10 * (time.monotonic() - began))

    async def _work(self, lease: Lease) -> None:
        is_held = False
        with holding(lease.lease_id, self._outages) as held:
            try:
                async with self._repo.leases.hold(lease, ttl=self._ttl):
                    is_held = True
                    await self._handle(lease, held)
            except LeaseLostError as error:
                await self._discard(lease, held, error)
            except (asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
                # No cancellation goes on from here: to the task group it would be the end of the worker.
                if not held.ended:
                    await self._give_back(lease)
                if not isinstance(error, asyncio.CancelledError):
                    self._fall(error)
            except DatabaseUnavailableError as error:
                # Here as below its lease expires, and the attempt is made ready again.
                self._lost(error)
            except Exception as error:  # noqa: BLE001 - what befalls one attempt is not the end of the worker
                if isinstance(error, ConfigurationError) and not is_held:
                    # No lease can be kept, the next one neither.
                    self._failure = error
                    self.stop()
                    await self._give_back(lease)
                else:
                    _log.error("worker %s cannot report on attempt %r: %s", self.worker_id, lease.attempt_id, error)
            finally:
                self._room.release()

    async def _handle(self, lease: Lease, held: Holding) -> None:
        """Run the handler and report how it ended, unless it has done so itself."""
        attempts = self._repo.attempts
        try:
            await self._insist(lambda: attempts.start(lease))
            result, failure = await self._outcome(lease)
            if held.ended:
                if failure is not None:
                    _log.warning("attempt %r failed after it had ended its lease", lease.attempt_id, exc_info=failure)
                return
            if failure is None:
                await self._insist(lambda: attempts.complete(lease, result))
        except (ConfigurationError, RefusedError) as error:
            # To insist is no use: it will never be stored.
            failure = error
        if failure is not None:
            await self._fail(lease, failure)

    async def _outcome(self, lease: Lease) -> tuple[object, BaseException | None]:
        """What the handler returned, or how it failed; the end of the lease or of the worker is neither."""
        task = asyncio.current_task()
        result: object = None
        failure: BaseException | None = None
        try:
            result = await self._call(lease)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            if not is_running(task) or (isinstance(error, LeaseLostError) and error.attempt_id == lease.attempt_id):
                raise
            failure = error
        await self._pass_on_the_end()
        return result, failure

    async def _call(self, lease: Lease) -> object:
        answer: object = self._handler(lease)
        if not inspect.isawaitable(answer):
            raise TypeError(
                f"the handler returned {type(answer).__name__} instead of an awaitable: "
                "declare it with 'async def', so that it is a coroutine function"
            )
        return await answer

    async def _pass_on_the_end(self) -> None:
        """
        Let the end of the lease or of the worker through; any other cancellation was the handler's own affair.

        Only their scopes tell the two apart. The task's own count does not say who cancelled it, nor does that of the
        worker's task, which each of its own time-outs moves.
        """
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            while task.cancelling():
                task.uncancel()
            # It may not have been delivered yet. And the end of an event loop cancels all tasks in any order: the
            # worker's has heard of it by the next turn.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        await anyio.lowlevel.checkpoint_if_cancelled()

    async def _fail(self, lease: Lease, error: BaseException) -> None:
        _log.warning("attempt %r failed", lease.attempt_id, exc_info=error)
        # It may be one that cannot be shown.
        words = "".join(traceback.format_exception_only(error)).strip()[:_ERROR_LENGTH]
        fail = functools.partial(self._repo.attempts.fail, lease, retry_in=self._retry)
        try:
            await self._insist(lambda: fail(words))
        except RefusedError as refused:
            _log.debug("worker %s cannot store why attempt %r failed: %s", self.worker_id, lease.attempt_id, refused)
            await self._insist(lambda: fail(_UNSTORABLE))

    async def _insist(self, report: Callable[[], Awaitable[object]]) -> None:
        """Report, also when the database is away for a while: as long as the lease is held, whose end cancels this."""
        # The first try may go by a connection that is silent. What is left of the lease, should heartbeats go as badly,
        # has to be enough for its end, and for another.
        pause, patience = _PAUSE_FIRST, min(_PATIENCE, self._ttl.total_seconds() / 3)
        key = object()
        try:
            while True:
                began = time.monotonic()
                try:
                    await _within(patience, report())
                except (DatabaseUnavailableError, OverloadedError) as error:
                    self._outages.failed(key, "report", error, began=began)
                else:
                    self._outages.succeeded(key)
                    return
                await _rest(pause)
                pause = min(pause * 2, _PAUSE_LAST)
                # A large result may take its time, and so may the transactions of other handlers that are in front.
                patience *= 2
        finally:
            self._outages.given_up(key)

    async def _discard(self, lease: Lease, held: Holding, error: LeaseLostError) -> None:
        """The lease is gone; say so, unless its holder has ended it himself, or the outage says it all."""
        if error.current is None:
            self._lost(error)
        elif not held.ended and not await self._was_ended_by_handler(lease):
            _log.warning("worker %s discards what it did: %s", self.worker_id, error)

    def _lost(self, error: Exception) -> None:
        """The lease could not be renewed for its whole length."""
        self._outages.lost(error, began=time.monotonic() - self._ttl.total_seconds())

    async def _was_ended_by_handler(self, lease: Lease) -> bool:
        """Whether the handler ended its lease in a transaction of the application's own, whose end nobody told us."""
        with contextlib.suppress(RuntimeRepoError):
            attempt = await _within(_PATIENCE, self._repo.attempts.get(lease.attempt_id))
            return ended_by(lease, attempt) is not None
        return False

    async def _give_back(self, lease: Lease) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await finish(self._release(lease))

    async def _release(self, lease: Lease) -> None:
        began = time.monotonic()
        try:
            await self._repo.leases.release(lease)
        except LeaseLostError as error:
            _log.debug("worker %s need not release an attempt: %s", self.worker_id, error)
        except RuntimeRepoError as error:
            self._outages.failed(lease.lease_id, "release an attempt", error, began=began)
            self._outages.given_up(lease.lease_id)

    def _fall(self, error: BaseException) -> None:
        """End at once with *error*, and release what runs."""
        self._failure = error
        self.stop()
        if self._running is not None:
            self._running.cancel()

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


async def _within(seconds: float, call: Awaitable[T]) -> T:
    """What *call* answers; the database is away when that takes too long."""
    try:
        async with asyncio.timeout(seconds):
            return await call
    except TimeoutError as error:
        raise DatabaseUnavailableError(f"the database did not answer within {seconds:g} s") from error


class _Patience:
    """How long an answer to calls of one kind is waited for: longer after one that did not come, or came late."""

    def __init__(self, least: float) -> None:
        self._least = self._seconds = least

    async def within(self, call: Awaitable[T]) -> T:
        """As ``_within``."""
        began = time.monotonic()
        try:
            return await _within(self._seconds, call)
        finally:
            wanted = 2 * (time.monotonic() - began)
            self._seconds = max(self._least, min(wanted, 2 * self._least, _MOST_PATIENCE))


async def _rest(pause: float) -> None:
    await anyio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311


def _check_handler(handler: object) -> None:
    """Refuse what certainly is no coroutine function; of other callables it shows when they are called."""
    if not callable(handler) or is_known_to_be_sync(handler):
        raise ConfigurationError(
            f"handler is {shown(handler)}: expected a coroutine function, declared with 'async def'"
        )


def _unique_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
