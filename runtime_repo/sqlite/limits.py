"""A time limit for each of very many short waits."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import cast

__all__ = ["Limit", "Limits"]


class Limits:
    """
    Limits of one length, which share a timer: ``asyncio.timeout`` costs 4 % of a quick verb.

    Args:
        seconds: How long each is; None is without end.
        error: What to raise in whoever's has passed.
    """

    def __init__(self, seconds: float | None, error: Callable[[], Exception]) -> None:
        self.seconds = seconds
        self.error = error
        self._ends: dict[Limit, float] = {}
        """Those that run, the first to end first."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, limit: "Limit", loop: asyncio.AbstractEventLoop) -> None:
        if self.seconds is not None:
            self._ends[limit] = end = loop.time() + self.seconds
            if self._timer is None:
                self._timer = loop.call_at(end, self._pass, loop)

    def end(self, limit: "Limit") -> None:
        self._ends.pop(limit, None)

    def close(self) -> None:
        """Forget the timer; whoever comes later has another."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pass(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for limit, end in list(self._ends.items()):
            if end > now:
                self._timer = loop.call_at(end, self._pass, loop)
                return
            del self._ends[limit]
            limit.expire()


class Limit:
    """``with Limit(limits)``: the block is cancelled when its time has passed, and the error of *limits* raised."""

    __slots__ = ("_before", "_expired", "_limits", "_task")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._expired = False

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        self._task = cast("asyncio.Task[object]", asyncio.current_task(loop))
        self._before = self._task.cancelling()
        self._limits.begin(self, loop)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._limits.end(self)
        # Whoever else cancelled it as well is to be heard.
        if self._expired and self._task.uncancel() <= self._before and kind is asyncio.CancelledError:
            raise self._limits.error() from None

    def expire(self) -> None:
        self._expired = True
        self._task.cancel()
