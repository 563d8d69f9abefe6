"""
What a fork does to an open repository: the child has it in its memory, and nothing of it is the child's.

Each test runs in a process of its own, whose child says what it found by its exit status.
"""

import asyncio
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.faults.conftest import eventually
from tests.lab import Lab, PostgresLab, SqliteLab, on_postgres, on_sqlite

HEAD = """
import asyncio, gc, os, sys
from runtime_repo import *
from tests.place import Place

place = {place!r}
loop = asyncio.new_event_loop()
run = loop.run_until_complete

async def awaited(repo):
    return await repo

async def use(repo, name):
    async with asyncio.timeout(10):
        await repo.attempts.enqueue("run", attempt_id=name)

def in_child(work):
    'Fork, run *work* in the child, and wait for its end without the event loop.'
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        if exits:
            sys.exit()  # out of everything, with all destructors
        os._exit(0)
    return pid

def ended(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def refused(make):
    async def main():
        try:
            async with asyncio.timeout(10):
                await make()
        except ConfigurationError as error:
            assert "before the process was forked" in str(error), error
        else:
            raise AssertionError("not refused")
    asyncio.run(main())

exits = False
repo = run(awaited(place.repository()))
run(use(repo, "before"))
"""


async def run(lab: Lab, program: str) -> bytes:
    """Run it to its end, and return what it printed."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", HEAD.format(place=lab.place) + program]
    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(*command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        async with asyncio.timeout(30):
            printed, words = await process.communicate()
    except TimeoutError:
        process.kill()
        _, words = await process.communicate()
        pytest.fail(f"it hangs: {words.decode()}")
    assert process.returncode == 0, words.decode()
    assert b"Traceback" not in words, words.decode()
    return printed


async def ids(lab: Lab) -> list[str]:
    async with lab.repository() as repository:
        return [attempt.attempt_id for attempt in await repository.attempts.list()]


@pytest.mark.parametrize("exits", [False, True], ids=["_exit", "exit"])
async def test_a_child_is_refused_what_it_inherits_and_disturbs_nothing(lab: Lab, exits: bool) -> None:  # noqa: FBT001
    """Verbs, looks and awaiting are refused in words; to close it, forget it or end harms nothing of the parent's."""
    program = f"""
exits = {exits}
transaction = repo.transaction()
opened = run(transaction.__aenter__())
run(opened.attempts.enqueue("run", attempt_id="open"))
# More than SQLite's cache: a part of the transaction is in the log, and in the index that parent and child share.
many = [NewAttempt("run", f"many-{{n:02}}", payload="x" * 200_000) for n in range(30)]
run(opened.attempts.enqueue_many(many))

def child():
    global repo, transaction, opened
    for make in (
        lambda: repo.attempts.list(),
        lambda: opened.attempts.list(),
        lambda: repo.transaction().__aenter__(),
        lambda: repo.ensure_schema(),
        lambda: repo.inspect(),
        lambda: repo.plan(),
        lambda: repo.status(),
        lambda: awaited(repo),
    ):
        refused(make)
    asyncio.run(repo.close())
    refused(lambda: repo.attempts.list())
    del repo, transaction, opened, make
    gc.collect()

ended(in_child(child))
run(asyncio.sleep(0.1))
found = run(opened.attempts.list(run_id="run", limit=100))
assert len(found) == 32, len(found)
run(transaction.__aexit__(None, None, None))
run(use(repo, "after"))
run(repo.close())
loop.close()
"""
    await run(lab, program)
    assert [name for name in await ids(lab) if "many" not in name] == ["after", "before", "open"]
    if isinstance(lab, SqliteLab):
        with lab.connection() as connection:
            assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("way", ["leaves", "raises", "exits"])
async def test_a_child_cannot_end_the_transaction_in_which_it_was_forked(lab: Lab, way: str) -> None:
    """Leaving the block is refused in words, what it raises gets through, and the parent's goes on."""
    program = f"""
way = {way!r}

async def main():
    async with repo.transaction() as transaction:
        await transaction.attempts.enqueue("run", attempt_id="in")
        pid = os.fork()
        if pid == 0:
            if way == "raises":
                raise ZeroDivisionError
            if way == "exits":
                sys.exit(5)
            return
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 5, code
        await transaction.attempts.enqueue("run", attempt_id="on")

try:
    run(main())
except ConfigurationError as error:
    assert way == "leaves" and "before the process was forked" in str(error), error
    os._exit(5)
except ZeroDivisionError:
    assert way == "raises"
    os._exit(5)
run(use(repo, "after"))
run(repo.close())
loop.close()
"""
    await run(lab, program)
    assert await ids(lab) == ["after", "before", "in", "on"]


async def test_a_child_may_open_one_of_its_own(lab: Lab) -> None:
    """One on the same database loses nothing that it commits, however the parent ends meanwhile."""
    program = """
from multiprocessing import Pipe
ours, theirs = Pipe()

def child():
    async def main():
        async with place.repository() as own:
            await use(own, "child-1")
            theirs.send("opened")
            theirs.recv()
            await use(own, "child-2")
            async with place.repository() as another:
                await use(another, "child-3")
            await use(own, "child-4")
    asyncio.run(main())

pid = in_child(child)
ours.recv()
run(use(repo, "parent"))
run(repo.close())
ours.send("closed")
ended(pid)
loop.close()
"""
    await run(lab, program)
    assert await ids(lab) == ["before", "child-1", "child-2", "child-3", "child-4", "parent"]


async def test_one_that_was_not_awaited_may_be_opened_by_parent_and_child(lab: Lab) -> None:
    """As where a server is loaded before it forks its workers."""
    program = """
run(repo.close())
fresh = place.repository()

def child():
    async def main():
        async with fresh:
            await use(fresh, "child")
    asyncio.run(main())

pid = in_child(child)
run(awaited(fresh))
run(use(fresh, "parent"))
ended(pid)
run(use(fresh, "after"))
run(fresh.close())
loop.close()
"""
    await run(lab, program)
    assert await ids(lab) == ["after", "before", "child", "parent"]


async def test_forks_at_any_moment_disturb_no_verb(lab: Lab) -> None:
    """Out of a running event loop, in the midst of the verbs of other tasks; a grandchild, too."""
    program = """
async def work(name, done):
    number = 0
    while not done.is_set():
        await use(repo, f"{name}-{number}")
        number += 1
    return number

def fork():
    pid = os.fork()
    if pid == 0:
        asyncio.events._set_running_loop(None)
        refused(lambda: repo.attempts.list())
        if os.fork() == 0:
            refused(lambda: repo.attempts.list())
            os._exit(0)
        ended(-1)
        os._exit(0)
    return pid

async def main():
    done = asyncio.Event()
    tasks = [asyncio.create_task(work(name, done)) for name in "abc"]
    for _ in range(10):
        await asyncio.sleep(0.01)
        ended(fork())
    done.set()
    assert sum([await task for task in tasks]) > 10

run(main())
run(repo.close())
loop.close()
"""
    await run(lab, program)


@on_sqlite
async def test_a_file_is_refused_to_a_child_that_was_forked_in_a_transaction(lab: Lab) -> None:
    """SQLite in the child would believe the lock of that transaction to be its own process's, for ever."""
    program = """
transaction = repo.transaction()
opened = run(transaction.__aenter__())

def child():
    try:
        asyncio.run(awaited(place.repository()))
    except ConfigurationError as error:
        assert "do not cross a fork" in str(error), error
    else:
        raise AssertionError("not refused")

ended(in_child(child))
run(transaction.__aexit__(None, None, None))
run(repo.close())
loop.close()
"""
    await run(lab, program)


@on_postgres
async def test_the_server_sees_that_the_parent_has_ended_although_a_child_lives(lab: PostgresLab) -> None:
    """What the parent had begun is rolled back at once, and holds no lock until the last of its children ends."""
    program = """
transaction = repo.transaction()
opened = run(transaction.__aenter__())
run(opened.attempts.enqueue("run", attempt_id="open"))

def child():
    import time
    print(os.getpid(), flush=True)
    os.close(1)
    os.close(2)
    time.sleep(20)

in_child(child)
import time
time.sleep(0.2)
os._exit(0)
"""
    child = int(await run(lab, program))
    try:
        await eventually(partial(_is_gone, lab))
    finally:
        os.kill(child, signal.SIGKILL)


async def _is_gone(lab: PostgresLab) -> bool:
    return not await lab.connections()


@on_postgres
async def test_a_child_that_goes_on_with_the_loop_takes_nothing_of_what_is_being_connected(lab: PostgresLab) -> None:
    """In whichever step of it the parent forks: what the child would read or write there would crash the driver."""
    program = """
run(repo.close())

def child():
    os.close(2)
    loop.run_until_complete(asyncio.sleep(0.1))

for steps in range(12):
    fresh = place.repository()
    boot = loop.create_task(awaited(fresh))
    for _ in range(steps):
        run(asyncio.sleep(0 if steps < 6 else 0.0005))
    pid = in_child(child)
    run(boot)
    run(use(fresh, f"after-{steps:02}"))
    ended(pid)
    run(fresh.close())
loop.close()
"""
    await run(lab, program)
    assert len(await ids(lab)) == 1 + 12
