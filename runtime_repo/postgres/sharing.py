"""Single calls of one process's tasks that meet in the same turn of the event loop share one statement."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from runtime_repo.errors import RuntimeRepoError

__all__ = ["Shared"]

T = TypeVar("T")
A = TypeVar("A")

_MOST = 1000
"""How many calls share one statement; who comes later asks alone."""

_PATIENCE = 0.5
"""Seconds after which whoever has had no answer asks alone, on a connection of his own."""


class Shared(Generic[A, T]):
    """
    Calls that may be made for several callers at once.

    Each has a result and an error of its own: whoever finds none in what was done for all asks alone, as does everybody
    where that failed or takes too long, so that nobody's trouble is another's. A call must be safe to repeat.

    Args:
        alone: Makes one call.
        together: Makes several, and returns the result of each; None is for whoever has to ask alone.
    """

    def __init__(
        self, alone: Callable[[A], Awaitable[T]], together: Callable[[Sequence[A]], Awaitable[Sequence[T | None]]]
    ) -> None:
        self._alone = alone
        self._together = together
        self._gathered: list[_Call[A, T]] | None = None
        self._asking: set[asyncio.Task[None]] = set()

    async def ask(self, args: A) -> T:
        """Make a call, and with it those that meet it."""
        call: _Call[A, T] = _Call(args)
        if self._gathered is None:
            self._gathered = [call]
            try:
                # All who come before this task's next turn.
                await asyncio.sleep(0)
            finally:
                calls, self._gathered = self._gathered[:_MOST], None
                if len(calls) > 1:
                    self._begin(calls)
        else:
            self._gathered.append(call)
            await asyncio.sleep(0)
        if call.is_shared:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE):
                    await call.is_over.wait()
        return await self._alone(args) if call.result is None else call.result

    async def close(self, within: float) -> None:
        """Leave no task: whoever waits for one asks alone."""
        self.abandon()
        if self._asking:
            await asyncio.wait(self._asking, timeout=within)

    def abandon(self) -> None:
        """Let go without waiting."""
        for task in self._asking:
            task.cancel()

    def _begin(self, calls: Sequence["_Call[A, T]"]) -> None:
        for call in calls:
            call.is_shared = True
        task = asyncio.create_task(self._ask_for(calls), name="runtime_repo sharing")
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask_for(self, calls: Sequence["_Call[A, T]"]) -> None:
        try:
            with contextlib.suppress(RuntimeRepoError):
                for call, result in zip(calls, await self._together([call.args for call in calls]), strict=True):
                    call.result = result
        finally:
            for call in calls:
                call.is_over.set()


class _Call(Generic[A, T]):
    """What one caller wants, and what became of it."""

    def __init__(self, args: A) -> None:
        self.args = args
        self.result: T | None = None
        self.is_shared = False
        self.is_over = asyncio.Event()
