"""Single calls of one process's tasks that meet in the same turn of the event loop share one statement."""

import asyncio
import copy
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from runtime_repo.errors import DatabaseUnavailableError, RuntimeRepoError

__all__ = ["Shared"]

T = TypeVar("T")
A = TypeVar("A")

_MOST = 1000
"""How many calls share one statement; who comes later asks alone."""


class Shared(Generic[A, T]):
    """
    Calls that may be made for several callers at once.

    Each has a result and an error of its own: whoever finds none in what was done for all asks alone, as does everybody
    where that was refused, or where the one who asked for all of them was cancelled. So a call must be safe to repeat.
    Only an outage is everybody's, and has taken the time that each of them had.

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

    async def ask(self, args: A) -> T:
        """Make a call, and those that meet it with it."""
        call: _Call[A, T] = _Call(args)
        if self._gathered is None:
            await self._lead(call)
        else:
            self._gathered.append(call)
            await call.is_over.wait()
        if call.error is not None:
            raise call.error
        return await self._alone(args) if call.result is None else call.result

    async def _lead(self, first: "_Call[A, T]") -> None:
        """Ask for all who come before this task's next turn."""
        calls = self._gathered = [first]
        try:
            try:
                await asyncio.sleep(0)
            finally:
                self._gathered = None
            if len(calls) > 1:
                await self._ask_for(calls[:_MOST])
        finally:
            for call in calls:
                call.is_over.set()

    async def _ask_for(self, calls: Sequence["_Call[A, T]"]) -> None:
        try:
            results = await self._together([call.args for call in calls])
        except DatabaseUnavailableError as error:
            for call in calls:
                call.error = copy.copy(error)
                call.error.__cause__ = error.__cause__
        except RuntimeRepoError:
            return
        else:
            for call, result in zip(calls, results, strict=True):
                call.result = result


class _Call(Generic[A, T]):
    """What one caller wants, and what became of it."""

    def __init__(self, args: A) -> None:
        self.args = args
        self.result: T | None = None
        self.error: DatabaseUnavailableError | None = None
        self.is_over = asyncio.Event()
