"""
How a lease is kept while a block runs: heartbeats beside it, and its end when they can no longer prove the lease.

The block's end hangs on a timer alone, which every heartbeat that succeeds sets anew. No call that is under way, and no
clean-up of one, can hold it up.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar, cast

import anyio

from runtime_repo.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    LeaseLostError,
    NotFoundError,
    RepositoryClosedError,
)
from runtime_repo.fencing import Holding
from runtime_repo.records import Lease
from runtime_repo.shielding import leave, settle

__all__ = ["MIN_PATIENCE", "Keeper", "is_running", "proved_until"]

T = TypeVar("T")

MIN_PATIENCE = 0.3
"""Seconds that a heartbeat is waited for at least, before the next one is tried."""

_WHY = 1.0
"""Seconds that may pass until it is known why a lease is gone."""

_GOODBYE = 0.5
"""Seconds that heartbeats under way have to end in, when the block has ended."""


def proved_until(lease: Lease) -> float | None:
    """Until when, by this process's monotonic clock, the lease is certainly nobody else's."""
    return None if lease.asked_at is None else lease.asked_at + (lease.expires_at - lease.heartbeat_at).total_seconds()


def is_running(task: "asyncio.Task[Any] | None") -> bool:
    """
    Whether this code runs in *task*.

    A GeneratorExit comes from somebody who closes the coroutine if it does not: then nothing may be awaited any more.
    """
    try:
        return asyncio.current_task() is task
    except RuntimeError:
        return False


class Keeper:
    """
    Keeps a lease that is proved for now.

    Args:
        lease: The lease.
        held: What is known of it.
        renew: Sends one heartbeat.
        was_ended: Whether the lease was ended by its holder, as the database knows it.
        ttl: For how many seconds a heartbeat proves the lease.
        every: Seconds between two heartbeats.
    """

    def __init__(
        self,
        lease: Lease,
        held: Holding,
        *,
        renew: Callable[[Lease], Coroutine[Any, Any, Lease]],
        was_ended: Callable[[Lease], Coroutine[Any, Any, bool]],
        ttl: float,
        every: float,
    ) -> None:
        self._lease = lease
        self._held = held
        self._renew = renew
        self._was_ended = was_ended
        self._ttl = ttl
        self._every = every
        self._block = anyio.CancelScope()
        self._reason: Exception | None = None
        self._calls: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def keeping(self) -> AsyncIterator[None]:
        """Keep the lease while the block runs, and cancel the block when that does not succeed."""
        task = asyncio.current_task()
        failure: BaseException | None = None
        self._prove(self._lease)
        beating = self._started(self._beat())
        self._held.when_ended.append(self._let_go)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._block)
                try:
                    yield
                except asyncio.CancelledError:
                    raise
                except BaseException as error:  # noqa: BLE001 - raised below, after the heartbeats have ended
                    failure = error
                    if not is_running(task):
                        # A scope is left in its own task only.
                        stack.pop_all()
        finally:
            self._held.when_ended.remove(self._let_go)
            self._held.outages.given_up(self)
            if failure is None or is_running(task):
                await self._hush(beating)
            else:
                # The event loop may be closed by now.
                with contextlib.suppress(RuntimeError):
                    self._block.deadline = float("inf")
                    beating.cancel()
        if self._block.cancel_called and self._reason is None:
            self._reason = _unproved(self._lease)
        if self._reason is not None:
            raise self._reason from failure
        if failure is not None:
            raise failure

    def _prove(self, lease: Lease) -> None:
        self._lease = lease
        self._until = cast(float, proved_until(lease))
        if not self._held.ended:
            # The event loop has a clock of its own.
            self._block.deadline = asyncio.get_running_loop().time() + (self._until - time.monotonic())

    def _let_go(self) -> None:
        """The holder has ended the lease: the block goes on without it."""
        self._block.deadline = float("inf")

    def _end(self, reason: Exception) -> None:
        self._reason = reason
        self._block.cancel()

    async def _beat(self) -> None:
        """Renew the lease again and again, until it has ended one way or the other."""
        # The lease may have been taken for less than heartbeats prove it for.
        left = self._until - time.monotonic()
        every = min(self._every, left / 3)
        wake_at = min(cast(float, self._lease.asked_at) + self._every, self._until - left / 3)
        patience = max(min(self._ttl, left) / 6, MIN_PATIENCE)
        while True:
            await asyncio.sleep(max(wake_at - time.monotonic(), 0))
            began = time.monotonic()
            left = self._until - began
            if left <= 0 or self._held.ended:
                return
            try:
                lease = await self._answer(self._renew(self._lease), min(patience, left))
            except (LeaseLostError, NotFoundError) as error:
                if not await self._was_ended_by_holder():
                    self._end(error)
                return
            except (ConfigurationError, RepositoryClosedError) as error:
                self._end(error)
                return
            except Exception as error:  # noqa: BLE001 - the lease is proved still, and a later heartbeat may succeed
                self._held.outages.failed(self, "renew a lease", error, began=began)
                # At once where it was waited for: a turn that comes now must find somebody in line for it.
                wake_at = began + every / 10
                # The connection may be silent, or the database only slow.
                patience *= 2
            else:
                self._held.outages.succeeded(self)
                self._prove(lease)
                every = self._every
                wake_at = cast(float, lease.asked_at) + every
                patience = max(self._ttl / 6, MIN_PATIENCE)

    async def _was_ended_by_holder(self) -> bool:
        """Whether what ended the lease was complete, fail or release under this very lease."""
        if not self._held.ended:
            with contextlib.suppress(Exception):
                if await self._answer(self._was_ended(self._lease), _WHY):
                    self._let_go()
                    return True
        return self._held.ended

    async def _answer(self, call: Coroutine[Any, Any, T], within: float) -> T:
        """What *call* answers; after so many seconds it is cancelled, and nobody waits for that."""
        task = self._started(call)
        done, _ = await asyncio.wait([task], timeout=within)
        if not done or task.cancelled():
            leave(task)
            late = f"the database did not answer a heartbeat within {within:.1f} s"
            raise DatabaseUnavailableError(late) from TimeoutError()
        return task.result()

    def _started(self, call: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return task

    async def _hush(self, beating: "asyncio.Task[None]") -> None:
        """
        Send no heartbeat any more.

        One that is under way may end where all is well, for the connection would not survive its cancellation.
        """
        beating.cancel()
        if self._block.cancel_called:
            for call in self._calls:
                call.cancel()
        with contextlib.suppress(TimeoutError):
            await settle(asyncio.gather(*self._calls, return_exceptions=True), within=_GOODBYE)


def _unproved(lease: Lease) -> LeaseLostError:
    return LeaseLostError(lease.attempt_id, token=lease.version, current=None, status=None, worker_id=None)
