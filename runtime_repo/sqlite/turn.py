"""Whose turn it is on the one connection, and who shares one."""

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, cast

__all__ = ["ALONE", "Turn", "Waiting"]

ALONE = object()
"""The answer to whoever has the turn to itself, and must give it back."""

MOST = 100
"""How many may share a turn."""


class Waiting:
    """
    Somebody who waits for a turn.

    Attributes:
        answer: What it waits for; done as well where it waits no more.
        asked_at: When the turn came, by ``time.monotonic()``.
        hurries: Whether it comes before all others.
        is_alone: Whether it wants the turn to itself.
        kind: It may share a turn with others of the same kind.
        number: Its place among all that came.
    """

    __slots__ = ("answer", "asked_at", "hurries", "is_alone", "kind", "number")

    answer: "asyncio.Future[Any]"

    def __init__(self, kind: int = 0, *, hurries: bool = False) -> None:
        self.asked_at = 0.0
        self.hurries = hurries
        self.is_alone = not kind
        self.kind = kind
        self.number = 0

    def called(self) -> None:
        """The turn has come."""
        self.asked_at = time.monotonic()


class Turn:
    """
    One after the other in the order in which they came, but whoever is in a hurry before all others that wait.

    Those who may share a turn have it together with the first of them: all of its kind that wait by then, as many as
    are allowed. So whoever wants it alone waits for those who came before, and for what these took along; and those who
    share it wait for whoever wanted it alone before they came.

    Args:
        together: Begins what several do in one turn, and has to give it back when they have done it.
    """

    def __init__(self, together: Callable[[Sequence[Any]], None]) -> None:
        self.taken = False
        self._together = together
        self._numbers = itertools.count()
        self._hurried = _Lines()
        self._others = _Lines()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def take(self) -> None:
        """Wait for it; whoever has it must give it back."""
        waiting = Waiting()
        answer = self.ask(waiting, asyncio.get_running_loop())
        if answer is not None:
            try:
                await answer
            except asyncio.CancelledError:
                self.left(waiting)
                raise

    def ask(self, waiting: Waiting, loop: asyncio.AbstractEventLoop) -> "asyncio.Future[Any] | None":
        """
        Ask for one; None where it has come at once, and must be given back.

        Otherwise what is returned is to be waited for: it will be ``ALONE``, as above, or the answer to what was done
        together with others. Whoever is cancelled meanwhile has ``left``.
        """
        if not self.taken:
            self.taken = True
            waiting.called()
            return None
        self._loop = loop
        waiting.answer = loop.create_future()
        waiting.number = next(self._numbers)
        (self._hurried if waiting.hurries else self._others).append(waiting)
        return waiting.answer

    def left(self, waiting: Waiting) -> None:
        """It was cancelled while it waited."""
        if waiting.answer.cancelled():
            (self._hurried if waiting.hurries else self._others).remove(waiting)
        elif not waiting.answer.exception() and waiting.answer.result() is ALONE:
            self.give()  # it came in the very moment

    def put_back(self, waiting: Sequence[Waiting]) -> None:
        """Let some wait on where they were: they were called, and not served."""
        for one in reversed(waiting):
            (self._hurried if one.hurries else self._others).put_back(one)

    def give(self) -> None:
        """Give it to the next in line."""
        if self._hurried or self._others:
            self.give_soon()
        else:
            self.taken = False

    def give_soon(self) -> None:
        """Give it to the next in line when those that were answered just now have been able to come for more."""
        cast(asyncio.AbstractEventLoop, self._loop).call_soon(self._call)

    def _call(self) -> None:
        found = self._hurried.next() or self._others.next()
        for waiting in found:
            waiting.called()
        if len(found) > 1:
            self._together(found)
        elif found:
            found[0].answer.set_result(ALONE)
        else:
            self.taken = False

    @contextlib.asynccontextmanager
    async def mine(self) -> AsyncIterator[None]:
        """Have it for the length of the block."""
        await self.take()
        try:
            yield
        finally:
            self.give()


class _Lines:
    """A line for each kind."""

    def __init__(self) -> None:
        self._lines: dict[int, deque[Waiting]] = {}

    def __bool__(self) -> bool:
        return any(self._lines.values())

    def append(self, waiting: Waiting) -> None:
        self._lines.setdefault(waiting.kind, deque()).append(waiting)

    def put_back(self, waiting: Waiting) -> None:
        self._lines[waiting.kind].appendleft(waiting)

    def remove(self, waiting: Waiting) -> None:
        with contextlib.suppress(ValueError):
            self._lines[waiting.kind].remove(waiting)

    def next(self) -> list[Waiting]:
        """Take out whoever has waited for the longest, and those who may share its turn."""
        for line in self._lines.values():
            while line and line[0].answer.done():
                line.popleft()
        if not self:
            return []
        line = min(filter(None, self._lines.values()), key=lambda line: line[0].number)
        found = [line.popleft()]
        while line and len(found) < MOST and not (found[0].is_alone or line[0].is_alone):
            waiting = line.popleft()
            if not waiting.answer.done():
                found.append(waiting)
        return found
