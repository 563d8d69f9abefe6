"""
NOTIFY and LISTEN on PostgreSQL: who brings work tells, and one connection hears it for all who wait.

A notification is a hint and never the only way to learn: whoever waits polls by itself now and then, more often
while nothing is heard. So a connection that is lost, a process that dies before it tells, or a server that lets nobody
listen costs time and nothing else. It is sent when the work is committed, not with it: PostgreSQL lets only one
transaction that notifies commit at a time, and would not flush several of them together.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any

from runtime_repo.errors import RuntimeRepoError

__all__ = ["Deaf", "Hear", "Listener", "Teller", "Watch"]

_log = logging.getLogger("runtime_repo")

Hear = Callable[[str], None]
"""Is given the name of a queue."""

_POLL_LISTENING = 5.0
_POLL_DEAF = 1.0
"""Seconds after which whoever waits polls, hint or not."""

_PAUSE_FIRST = 0.1
_PAUSE_LAST = 15.0
"""Seconds between two tries to listen."""

_GAP = 0.005
"""Seconds in which what is to be told is gathered, after something was told."""

_VAIN_POLLS = 8
"""How many polls of one process may have found nothing within any second, after hints."""


class Deaf(Exception):  # noqa: N818 - between the listener and its database; it never leaves the package
    """What is told does not arrive, and never will: something in between gives each statement another session."""


class Listener:
    """
    Hears for all who wait on one runtime schema, from the first of them on until it is closed.

    Args:
        listen: Enters a connection that listens, given what is to be called for each hint; yields a coroutine function
            that returns, or raises, when the connection is lost. Raises Deaf where it is no use to try again. None is
            never to listen.
    """

    def __init__(
        self, listen: Callable[[Hear], AbstractAsyncContextManager[Callable[[], Coroutine[Any, Any, None]]]] | None
    ) -> None:
        self._listen = listen
        self._waiting: set[Watch] = set()
        self._task: asyncio.Task[None] | None = None
        self.is_listening = False
        # Any login to the database can send hints, as many as it likes.
        self._polls = asyncio.Semaphore(_VAIN_POLLS)

    @contextlib.asynccontextmanager
    async def watch(self, queues: Collection[str]) -> AsyncIterator["Watch"]:
        """Hear of *queues* from now on, as soon as there is a connection that listens."""
        if self._task is None and self._listen is not None:
            self._task = asyncio.create_task(self._run(self._listen), name="runtime_repo listener")
        watch = Watch(self, queues)
        self._waiting.add(watch)
        try:
            yield watch
        finally:
            self._waiting.discard(watch)
            # Whoever does not poll again has found something, or has gone.
            if watch.polls_at_hint:
                self._polls.release()

    async def may_poll(self) -> None:
        """Wait until one more poll after a hint is allowed: those that find work are, as many as there are."""
        await self._polls.acquire()

    def polled_in_vain(self) -> None:
        """Count a poll that was allowed and found nothing, for a second."""
        asyncio.get_running_loop().call_later(1.0, self._polls.release)

    async def close(self) -> None:
        """Leave no connection and no task. May be repeated."""
        task, self._task = self._task, None
        self._wake()
        for _ in self._waiting:
            # Nobody waits any more until he may poll: he learns that it is closed.
            self._polls.release()
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def abandon(self) -> None:
        """Let go without waiting."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    def _hear(self, queue: str) -> None:
        for watch in self._waiting:
            # What has no name concerns all queues.
            if not queue or queue in watch.queues:
                watch.hint.set()

    def _wake(self) -> None:
        for watch in self._waiting:
            watch.hint.set()

    async def _run(self, listen: Callable[[Hear], AbstractAsyncContextManager[Any]]) -> None:
        pause = _PAUSE_FIRST
        is_down = False
        while True:
            try:
                async with listen(self._hear) as lost:
                    self.is_listening = True
                    pause = _PAUSE_FIRST
                    if is_down:
                        _log.info("listening again")
                        is_down = False
                    # What was told before is not heard any more.
                    self._wake()
                    await lost()
            except Deaf as error:
                _log.warning("waiting workers poll once a second: %s", error)
                return
            except Exception as error:  # noqa: BLE001 - also what the application's own connect or init raises
                # Once for each outage, however often it is tried.
                level = logging.DEBUG if is_down else logging.WARNING
                _log.log(level, "not listening, waiting workers poll once a second instead: %s", _words(error))
                is_down = True
            finally:
                self.is_listening = False
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311
            pause = min(pause * 2, _PAUSE_LAST)


class Watch:
    """One that waits."""

    def __init__(self, listener: Listener, queues: Collection[str]) -> None:
        self._listener = listener
        self.queues = frozenset(queues)
        self.hint = asyncio.Event()
        self.polls_at_hint = False

    async def change(self, within: float) -> None:
        """Return at a hint, and without one when it is time to poll, after *within* seconds at most."""
        if self.polls_at_hint:
            self.polls_at_hint = False
            self._listener.polled_in_vain()
        poll_after = _POLL_LISTENING if self._listener.is_listening else _POLL_DEAF
        # Of random length, so that those who wait do not all poll at once.
        patience = min(within, poll_after * random.uniform(0.9, 1.3))  # noqa: S311
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self.hint.wait()
                await self._listener.may_poll()
                self.polls_at_hint = True
        self.hint.clear()


class Teller:
    """
    Sends one notification at a time, and nobody waits for it; queues that arrive during a send are merged into
    the next.

    Args:
        send: Tells of some queues.
    """

    def __init__(self, send: Callable[[Iterable[str]], Awaitable[None]]) -> None:
        self._send = send
        self._untold: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def tell(self, queues: Iterable[str]) -> None:
        """Tell of *queues* soon."""
        self._untold.update(queues)
        if self._untold and self._task is None:
            self._task = asyncio.create_task(self._run(), name="runtime_repo teller")

    async def close(self, within: float) -> bool:
        """Tell what is untold, in so many seconds at most, and leave no task. Return whether there was time enough."""
        task = self._task
        if task is None:
            return True
        try:
            _, late = await asyncio.wait([task], timeout=within)
        finally:
            task.cancel()
        return not late

    async def _run(self) -> None:
        try:
            while self._untold:
                queues, self._untold = self._untold, set()
                await self._send(queues)
                await asyncio.sleep(_GAP)
        except Exception as error:  # noqa: BLE001 - as above
            _log.debug("nobody was told of new work: %s", _words(error))
        finally:
            self._task = None


def _words(error: Exception) -> str:
    """What may be logged of an error: the words of one that is not ours may hold a password."""
    return str(error) if isinstance(error, RuntimeRepoError) else type(error).__name__
