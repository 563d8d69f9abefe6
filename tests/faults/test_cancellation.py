"""A boot that is cancelled at any moment, by asyncio or by anyio, has either not happened or is complete."""

import asyncio
import contextvars
import random
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

import anyio
import pytest

from runtime_repo import RuntimeRepository
from tests.faults.conftest import closing
from tests.faults.test_life import Gate
from tests.lab import Lab, PostgresLab, SqliteLab
from tests.versions import NEWEST

FAR = 1_000
"""More moments than any boot has."""

Work = Callable[[], Awaitable[object]]


class Moments:
    """
    Counts the moments of some work and of the library's own tasks: each time one of them suspends or ends. Acts at the
    *n*-th.

    Whatever a task waits for at such a moment, its end included, is something that a cancellation can hit.
    """

    def __init__(self, n: int) -> None:
        self._left = n
        self.act: Callable[[], object] = bool

    async def run(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run *work* to its end, in a task whose moments count, as do those of the tasks that it creates."""
        loop = asyncio.get_running_loop()
        loop.set_task_factory(self._task)  # type: ignore[arg-type]
        try:
            task = loop.create_task(work)
            self.act = task.cancel
            await asyncio.wait([task])
        finally:
            loop.set_task_factory(None)
        if not task.cancelled():
            task.result()
        return task

    @property
    def acted(self) -> bool:
        """Whether there were so many moments."""
        return self._left < 0

    def passed(self) -> None:
        """One more moment."""
        if self._left == 0:
            self.act()
        self._left -= 1

    def _task(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> "asyncio.Task[Any]":
        return asyncio.Task(_Watched(work, self), loop=loop, name=name, context=context)


class _Watched(Coroutine[Any, Any, Any]):
    """A coroutine whose every step is followed by a moment."""

    def __init__(self, work: Coroutine[Any, Any, Any], moments: Moments) -> None:
        self._work = work
        self._moments = moments

    def send(self, value: Any) -> Any:
        try:
            return self._work.send(value)
        finally:
            self._moments.passed()

    def throw(self, *error: Any) -> Any:
        try:
            return self._work.throw(*error)
        finally:
            self._moments.passed()

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise NotImplementedError


async def _native(work: Work, n: int) -> bool:
    """Cancel *work*'s task at the *n*-th moment, if it has so many. Return whether it had."""

    async def run() -> None:
        await work()

    moments = Moments(n)
    await moments.run(run())
    return moments.acted


async def _scoped(work: Work, n: int) -> bool:
    """The same by anyio, whose cancellation comes again at every await until the scope is left."""
    moments = Moments(n)

    async def run() -> None:
        with anyio.CancelScope() as scope:
            moments.act = scope.cancel
            await work()

    await moments.run(run())
    return moments.acted


BOTH_WAYS = pytest.mark.parametrize("cancelled_at", [_native, _scoped], ids=["task.cancel", "anyio scope"])
# Of the second way every third moment, another third at each run: both meet the same awaits.
MOMENTS = {_native: 1, _scoped: 3}
CancelledAt = Callable[[Work, int], Coroutine[Any, Any, bool]]
# Of the second way every third moment, another third at each run: both meet the same awaits.
STRIDES: dict[CancelledAt, int] = {_native: 1, _scoped: 3}


async def a_turn() -> None:
    """Something for a *before_migrate* to wait for."""
    await asyncio.sleep(0)


@pytest.mark.parametrize("version", [0, 1], ids=["fresh", "upgrade"])
@BOTH_WAYS
async def test_boot_may_be_cancelled_at_every_await(lab: Lab, cancelled_at: CancelledAt, version: int) -> None:
    """Nothing is half-migrated, the lock is free at once, and no thread, task, connection or half a backup is left."""
    # Several connections to open are several to close.
    options = {"min_size": 2} if isinstance(lab, PostgresLab) else {}
    outcomes: list[int] = []
    stride = STRIDES[cancelled_at]
    for n in range(random.randrange(stride), FAR, stride):
        lab = lab.another()
        await lab.lay(version)
        before = await lab.content()
        repository = lab.repository(before_migrate=a_turn, **options)

        async def live(repository: RuntimeRepository = repository) -> None:
            async with repository:
                pass

        async with lab.nothing_left():
            cancelled = await cancelled_at(live, n)
        untouched = await lab.content() == before
        if isinstance(lab, SqliteLab):
            # The copy is there if, and only if, the upgrade is.
            assert [name.endswith(".backup") for name in lab.backups()] == [True] * (0 if untouched else version)
        async with lab.repository(lock_timeout=0) as successor:
            report = successor.boot_report
        assert (report.from_version, report.waited) == (version if untouched else NEWEST, 0.0), f"moment {n}"
        outcomes.append(report.from_version)
        if not cancelled:
            break
    # Both are met: cancelled early the boot has not happened, cancelled late it is complete.
    assert len(outcomes) * stride > 10
    assert set(outcomes) == {version, NEWEST}
    assert outcomes == sorted(outcomes)


@BOTH_WAYS
async def test_ensure_schema_of_an_open_repository_may_be_cancelled_at_every_await(
    lab: Lab, cancelled_at: CancelledAt
) -> None:
    """The repository stays open and usable, and keeps no lock: its connection is not closed to hide one."""
    async with lab.nothing_left(), lab.repository(before_migrate=a_turn) as repository:
        outcomes = []
        for n in range(FAR):
            await lab.drop_tables()
            cancelled = await cancelled_at(repository.ensure_schema, n)
            async with lab.repository(lock_timeout=0) as successor:
                outcomes.append(successor.boot_report.from_version)
                assert successor.boot_report.waited == 0.0, f"moment {n}"
            assert (await repository.ensure_schema()).from_version == NEWEST
            assert (await repository.attempts.enqueue("run", attempt_id="a")).run_id == "run"
            if not cancelled:
                break
    assert len(outcomes) > 5
    # How many moments there are varies: a connection is back in its pool a turn sooner or later.
    assert set(outcomes) == {0, NEWEST}
    assert (outcomes[0], outcomes[-1]) == (0, NEWEST)


async def test_a_cancelled_awaiter_does_not_spoil_the_others(lab: Lab) -> None:
    """Whoever gives up waiting gives up only for itself, the first that came included."""
    gate = Gate()
    async with lab.nothing_left(), closing(lab.repository(before_migrate=gate)) as repository:
        awaiters = [asyncio.ensure_future(repository.ensure_schema()) for _ in range(20)]
        await gate.reached.wait()
        for awaiter in awaiters[::2]:
            awaiter.cancel()
        await asyncio.wait(awaiters[::2])
        gate.opened.set()
        reports = await asyncio.gather(*awaiters[1::2])
        assert all(report is repository.boot_report for report in reports)
        assert all(awaiter.cancelled() for awaiter in awaiters[::2])


async def test_the_last_awaiter_cancelled_takes_the_boot_with_it(lab: Lab) -> None:
    """When nobody waits any more the boot is given up; the same object boots when it is awaited again."""
    await lab.lay(1)
    before = await lab.content()
    gate = Gate()
    repository = lab.repository(before_migrate=gate)
    async with lab.nothing_left():
        awaiters = [asyncio.ensure_future(repository.ensure_schema()) for _ in range(5)]
        await gate.reached.wait()
        for awaiter in awaiters:
            awaiter.cancel()
        await asyncio.wait(awaiters)
        assert all(awaiter.cancelled() for awaiter in awaiters)
    assert await lab.content() == before
    gate.opened.set()
    async with lab.nothing_left(), repository:
        assert repository.boot_report.from_version == 1


async def test_who_awaits_while_a_boot_is_given_up_gets_a_new_one(lab: Lab) -> None:
    """The newcomer neither inherits the cancellation nor waits for ever."""
    gate = Gate()
    async with lab.nothing_left(), closing(lab.repository(before_migrate=gate)) as repository:
        first = asyncio.ensure_future(repository.ensure_schema())
        await gate.reached.wait()
        first.cancel()
        await asyncio.sleep(0)
        gate.opened.set()
        async with repository:
            assert repository.boot_report.to_version == NEWEST
        assert first.cancelled()


@pytest.mark.parametrize("how", ["cancel the scope", "fail beside it", "move on"])
async def test_a_task_group_that_ends_leaves_nothing_of_its_boots(lab: Lab, how: str) -> None:
    """Structured concurrency: what is started inside is gone outside, also while the lock is someone else's."""
    await lab.lay(1)
    before = await lab.content()

    async def boot() -> None:
        async with lab.repository():
            pytest.fail("the lock is held, so it cannot have booted")

    async def fail() -> None:
        raise KeyError(how)

    async with lab.nothing_left(), lab.held():
        if how == "move on":
            with anyio.move_on_after(0.1) as scope:
                await boot()
            assert scope.cancelled_caught
        else:
            try:
                async with anyio.create_task_group() as group:
                    for _ in range(5):
                        group.start_soon(boot)
                    await anyio.sleep(0.1)
                    if how == "cancel the scope":
                        group.cancel_scope.cancel()
                    else:
                        group.start_soon(fail)
            except* KeyError:
                pass
    assert await lab.content() == before
    if isinstance(lab, PostgresLab):
        assert await lab.migration_locks() == 0


async def test_a_verb_that_is_cancelled_leaves_the_repository_usable(lab: Lab) -> None:
    """The connection is no part of what was cancelled."""
    async with lab.nothing_left(), lab.repository() as repository:
        await repository.attempts.enqueue("run", attempt_id="a")
        for turns in range(12):
            verb = asyncio.ensure_future(repository.attempts.find("a"))
            for _ in range(turns):
                await asyncio.sleep(0)
            verb.cancel()
            await asyncio.wait([verb])
        assert (await repository.attempts.get("a")).run_id == "run"
