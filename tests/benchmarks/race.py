"""Contenders that take turns in one run, and the line of the table that comes of it."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from .shared import turns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from runtime_repo.database import Backend

    from .contenders import Ours, Store

    Turn = Callable[[], Awaitable[float]]
    Clear = Callable[[], Awaitable[None]]


T = TypeVar("T")


@dataclass(frozen=True)
class Limit:
    """What a ratio must reach, or must not exceed."""

    value: float
    at_most: bool = False

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:.2f}"

    def headroom(self, ratio: float) -> float:
        """How many times the ratio keeps the limit: 1 is just so, less is missed."""
        if self.at_most:
            return self.value / ratio if ratio else math.inf
        return ratio / self.value


@dataclass(frozen=True)
class Line:
    """One comparison. A *flaw* misses the limit whatever the ratio is."""

    work: str
    backend: Backend
    against: str
    ours: str
    theirs: str
    ratio: float
    limit: Limit | None
    runs: int
    flaw: str = ""

    @property
    def missed(self) -> bool:
        return bool(self.flaw) or (self.limit is not None and self.limit.headroom(self.ratio) < 1)

    def cells(self) -> list[str]:
        return [
            self.work,
            self.backend,
            self.against,
            self.ours,
            self.theirs,
            f"{self.ratio:.2f}",
            "" if self.limit is None else str(self.limit),
            str(self.runs),
            f"MISSED {self.flaw}".strip() if self.missed else "" if self.limit is None else "ok",
        ]


HEAD = ("work", "backend", "against", "ours", "theirs", "ratio", "limit", "runs", "result")


async def race(contenders: Mapping[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Let everybody have so many turns, back and forth, and return the figures; the first round is for the caches."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number, name in enumerate(turns(list(contenders), rounds + 1)):
        figure = await contenders[name]()
        if number >= len(contenders):
            figures[name].append(figure)
    return figures


def working(store: Store, count: int, size: int) -> Turn:
    """How many are claimed and completed in a second, *size* at a time, out of what was stored before."""

    async def turn() -> float:
        await store.fill(count)
        return await _rate(count, lambda: store.work(count, size))

    return turn


def writing(store: Store, count: int, size: int, wal: Callable[[], Awaitable[int]]) -> Turn:
    """How many bytes the server writes ahead for each that is claimed and completed, *size* at a time."""

    async def turn() -> float:
        await store.fill(count)
        before = await wal()
        await store.work(count, size)
        return (await wal() - before) / count

    return turn


def sharing(store: Ours, tasks: int, each: int) -> Turn:
    """How many are claimed and completed in a second, one by one, by so many tasks of one process."""

    async def turn() -> float:
        await store.fill(tasks * each)
        return await _rate(tasks * each, lambda: store.work_in_tasks(tasks * each, tasks))

    return turn


def enqueuing(enqueue: Callable[[Sequence[T]], Awaitable[None]], rows: Sequence[T], clear: Clear) -> Turn:
    """How many are stored in a second by one call, given in the form that it takes."""

    async def turn() -> float:
        rate = await _rate(len(rows), lambda: enqueue(rows))
        await clear()
        return rate

    return turn


async def _rate(count: int, work: Callable[[], Awaitable[None]]) -> float:
    gc.collect()  # nobody pays for what another has left
    start = time.perf_counter()
    await work()
    return count / (time.perf_counter() - start)
