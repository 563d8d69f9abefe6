"""``runtime-repo top``: queues, rates and the oldest age, live."""

import asyncio
import contextlib
import signal
import time
from collections import deque
from collections.abc import Coroutine, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group
from rich.live import Live
from rich.text import Text

from runtime_repo.cli.shared import YES, Call, on_database, seconds
from runtime_repo.cli.text import number, rate, said, span, table

if TYPE_CHECKING:
    from datetime import datetime

    from rich.console import RenderableType

    from runtime_repo.repository import RuntimeRepository
    from runtime_repo.status import Activity, QueueActivity

__all__ = ["command"]

_PAUSE = 4
"""How many times as long as a look takes is waited for the next one: what waits is counted, however much it is."""


@on_database("top", "runtime-repo top runtime.db", "runtime-repo top postgresql://app@db.example/app --once --json")
@click.option("--once", is_flag=True, help="Show it once and end.")
@seconds("--interval", "Seconds between two looks.", default=2.0, least=0.1, most=3600)
@seconds("--over", "Seconds over which rates are averaged.", default=10.0, least=1, most=3600)
async def command(call: Call, *, once: bool, interval: float, over: float) -> int:
    """
    Show what moves in each queue, until Ctrl-C: what waits, what is held, how much comes and ends a second, how old
    the oldest is.

    It reads only: what waits and is held, and what has ended lately; of a large store less often than the interval
    says, so that looking is no load. --json is one look. Where the database goes away meanwhile, it is asked again.

    Exit codes: 0 it was shown, also when Ctrl-C ended it; 1 the schema is not this release's; 2 it could not be told.
    """
    repository = call.place.repository(migrate=False)
    try:
        looks = _Looks(repository, timedelta(seconds=over))
        if once or call.is_json:
            only = await looks.look()
            call.answer(only.as_dict(), lambda console: console.print(looks.shown(only)))
        else:
            await _until_interrupted(_go_on(call, looks, interval))
    finally:
        await repository.close()
    return YES


async def _until_interrupted(work: Coroutine[Any, Any, None]) -> None:
    """Do *work* until Ctrl-C, which is its end and no failure."""
    task = asyncio.ensure_future(work)
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Where there are no signals of the event loop's, as on Windows, Ctrl-C is an interruption like any other.
    with contextlib.suppress(NotImplementedError):
        loop.add_signal_handler(signal.SIGINT, interrupted.set)
    waiting = asyncio.ensure_future(interrupted.wait())
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _go_on(call: Call, looks: "_Looks", interval: float) -> None:
    """Show one look after the other: in one place on a terminal, otherwise one below the other."""
    from runtime_repo.errors import DatabaseUnavailableError

    console = call.console
    seen = looks.shown(await looks.look(), console.height)
    shown = seen
    live = Live(shown, console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext()
    with live:
        while True:
            if isinstance(live, Live):
                live.update(shown, refresh=True)
            else:
                console.print(shown)
            await asyncio.sleep(max(interval, _PAUSE * looks.took))
            try:
                shown = seen = looks.shown(await looks.look(), console.height)
            except DatabaseUnavailableError as error:
                shown = Group(seen, said(str(error), style="red"))


class _Looks:
    """Looks at what moves, and what comes: as many as have ended, and as there are more now than before."""

    def __init__(self, repository: "RuntimeRepository", over: timedelta) -> None:
        self._repository = repository
        self._over = over
        self.took = 0.0
        """Seconds that the last look took."""
        self._before: deque[tuple[datetime, Mapping[str, int]]] = deque()

    async def look(self) -> "Activity":
        began = time.monotonic()
        activity = await self._repository.activity(over=self._over)
        self.took = time.monotonic() - began
        return activity

    def shown(self, activity: "Activity", height: int = 10_000) -> "RenderableType":
        since, depths = self._since(activity)
        seconds = activity.span.total_seconds()
        made = table("queue", "ready", "delayed", "leased", "oldest", "in/s", "done/s", "failed/s", align="lrrrrrrr")
        queues = sorted(activity.queues, key=lambda queue: (-queue.ready - queue.leased, queue.queue))
        most = max(height - 7, 1)
        for queue in queues[:most]:
            ended = (queue.completed + queue.failed + queue.cancelled) / seconds
            came = None if not since else max((_depth(queue) - depths.get(queue.queue, 0)) / since + ended, 0)
            made.add_row(
                said(queue.queue),
                number(queue.ready),
                number(queue.delayed),
                number(queue.leased),
                span(queue.oldest_age),
                rate(came),
                rate(queue.completed / seconds),
                said(rate(queue.failed / seconds), style="red" if queue.failed else ""),
            )
        if len(queues) > most:
            made.add_row(f"and {len(queues) - most:,} more", *[""] * 7, style="dim")
        ready, leased = sum(queue.ready for queue in queues), sum(queue.leased for queue in queues)
        head = said(activity.place, style="bold")
        total = said(f"{activity.at:%H:%M:%S} UTC, {number(ready)} ready, {number(leased)} leased", style="dim")
        return Group(head, total, Text(), made if queues else said("nothing waits, is held or has ended lately"))

    def _since(self, activity: "Activity") -> tuple[float, Mapping[str, int]]:
        """How many seconds ago, over the span at most, there was how much in each queue."""
        self._before.append((activity.at, {queue.queue: _depth(queue) for queue in activity.queues}))
        while len(self._before) > 2 and self._before[1][0] <= activity.at - activity.span:
            self._before.popleft()
        at, depths = self._before[0]
        return (activity.at - at).total_seconds(), depths


def _depth(queue: "QueueActivity") -> int:
    return queue.ready + queue.delayed + queue.leased
