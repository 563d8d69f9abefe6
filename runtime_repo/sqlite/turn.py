"""Whose turn it is on the one connection."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

__all__ = ["Turn"]


class Turn:
    """One after the other in the order in which they came, but whoever is in a hurry before all others that wait."""

    def __init__(self) -> None:
        self.taken = False
        self._hurried: deque[asyncio.Future[None]] = deque()
        self._others: deque[asyncio.Future[None]] = deque()

    async def take(self, *, hurry: bool = False) -> None:
        """Wait for it; whoever has it must give it back."""
        if not self.taken:
            self.taken = True
            return
        line = self._hurried if hurry else self._others
        called = asyncio.get_running_loop().create_future()
        line.append(called)
        try:
            await called
        except asyncio.CancelledError:
            if called.done() and not called.cancelled():
                self.give()  # it came in the very moment
            else:
                with contextlib.suppress(ValueError):
                    line.remove(called)
            raise

    def give(self) -> None:
        """Give it to the next in line."""
        for line in (self._hurried, self._others):
            while line:
                called = line.popleft()
                if not called.done():
                    called.set_result(None)
                    return
        self.taken = False

    @contextlib.asynccontextmanager
    async def mine(self) -> AsyncIterator[None]:
        """Have it for the length of the block."""
        await self.take()
        try:
            yield
        finally:
            self.give()
