"""SQLite: verbs that wait at the same moment share one commit, and each succeeds, fails or is given up by itself."""

import asyncio
import contextlib
import os
import random
import resource
import signal
import sqlite3
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from runtime_repo import (
    AttemptStatus,
    DatabaseUnavailableError,
    NewAttempt,
    RefusedError,
    RepositoryClosedError,
    RuntimeRepository,
    SqliteRuntimeRepository,
)
from runtime_repo.queries import load_queries, split_statements
from runtime_repo.sqlite import SqliteDatabase
from runtime_repo.sqlite import database as database_module
from runtime_repo.sqlite import group as group_module
from runtime_repo.sqlite import turn as turn_module
from runtime_repo.sqlite.connection import Connection
from runtime_repo.sqlite.group import Group
from tests.faults.conftest import still_waits
from tests.faults.processes import PROCESSES
from tests.lab import SqliteLab
from tests.place import Place

T = TypeVar("T")

SQLITE = load_queries("sqlite", **database_module._TOKENS)

MANY = 10
"""Verbs that wait for one turn."""

SOON = 2.0
"""Seconds in which what waits for nobody has happened."""

SPIN = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"
"""A statement that ends only if it is interrupted."""


@pytest.fixture
def lab(tmp_path: Path) -> SqliteLab:
    """A file of the test's own."""
    return SqliteLab(tmp_path / "runtime.db")


async def in_one_turn(repo: RuntimeRepository, *verbs: Coroutine[Any, Any, T]) -> "list[asyncio.Task[T]]":
    """Let all of them wait for the same turn, in this order; it has come."""
    async with cast(SqliteDatabase, repo._database)._turn.mine():
        tasks = [asyncio.ensure_future(verb) for verb in verbs]
        await asyncio.sleep(0)
    return tasks


def enqueuing(repo: RuntimeRepository, count: int = MANY) -> "list[Coroutine[Any, Any, Any]]":
    """As many verbs, which store attempts with the ids 0, 1, ..."""
    return [repo.attempts.enqueue("run", attempt_id=str(number)) for number in range(count)]


async def traced(repo: RuntimeRepository) -> list[str]:
    """The statements that it executes from now on."""
    statements: list[str] = []
    async with repo.transaction() as transaction:
        await transaction.connection.set_trace_callback(statements.append)
    return statements


async def hinder(repo: RuntimeRepository, run: str, body: str) -> None:
    """Let every new attempt of *run* leave a mark and then do *body* first, on this connection only."""
    async with repo.transaction() as transaction:
        await transaction.connection.execute("create temp table marks (a)")
        await transaction.connection.execute(
            "create temp trigger hinder before insert on main.runtime_attempts "
            f"when new.run_id = '{run}' begin insert into marks values (1); select {body}; end"
        )


async def ids(repo: RuntimeRepository) -> set[str]:
    """What is stored."""
    return {attempt.attempt_id for attempt in await repo.attempts.list()}


def everything(count: int = MANY) -> set[str]:
    """The ids that ``enqueuing`` stores."""
    return {str(number) for number in range(count)}


async def test_verbs_that_wait_at_the_same_moment_share_one_commit(lab: SqliteLab) -> None:
    """And those that only read share a hop, without a transaction: of writes and reads, each kind has its own."""
    async with lab.nothing_left(), SqliteRuntimeRepository(lab.path) as repo:
        statements = await traced(repo)
        reads = [repo.attempts.find(str(number)) for number in range(MANY)]
        mixed = [verb for pair in zip(enqueuing(repo), reads, strict=True) for verb in pair]
        await asyncio.gather(*await in_one_turn(repo, *mixed))
        assert statements.count("begin immediate") == 1
        assert await ids(repo) == everything()


async def test_tasks_that_come_for_more_meet_again(lab: SqliteLab) -> None:
    """Whoever was answered together and calls the next verb at once is in one group again."""
    rounds = 20
    async with SqliteRuntimeRepository(lab.path) as repo:
        statements = await traced(repo)

        async def work() -> None:
            for _ in range(rounds):
                await repo.attempts.enqueue_many([NewAttempt("run")])

        await asyncio.gather(*(work() for _ in range(MANY)))
        assert statements.count("begin immediate") < rounds + 3


async def test_each_hears_only_when_it_is_committed(lab: SqliteLab) -> None:
    """In the very moment in which its caller goes on, another connection sees what it has done."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        with lab.connection() as other:

            async def enqueue(number: int) -> int:
                await repo.attempts.enqueue("run", attempt_id=str(number))
                found = other.execute("select 1 from runtime_attempts where attempt_id = ?", (str(number),))
                return len(found.fetchall())

            seen = await asyncio.gather(*await in_one_turn(repo, *(enqueue(number) for number in range(MANY))))
            assert seen == [1] * MANY


@pytest.mark.parametrize("how", ["abort", "fail", "rollback"])
async def test_one_that_fails_leaves_the_others_their_results(lab: SqliteLab, how: str) -> None:
    """Nothing of it is stored, and all of theirs, also where a trigger ends the transaction of them all."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        await hinder(repo, "bad", f"raise({how}, 'no')")
        good = enqueuing(repo)
        bad = [
            repo.attempts.enqueue_many([NewAttempt("good"), NewAttempt("bad")]),
            repo.attempts.enqueue("bad"),
        ]
        tasks = await in_one_turn(repo, *good[:5], *bad, *good[5:])
        results: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in (results.pop(5), results.pop(5))] == [RefusedError, RefusedError]
        assert [result.attempt_id for result in results] == [str(number) for number in range(MANY)]
        assert await ids(repo) == everything()
        async with repo.transaction() as transaction:
            assert list(await transaction.connection.execute_fetchall("select * from marks")) == []


async def test_text_that_is_none_is_read_leniently_in_a_group(lab: SqliteLab) -> None:
    """The part that came upon it is done again, and no other."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        await repo.attempts.enqueue("run", attempt_id="a")
        await lab.execute("update runtime_attempts set run_id = cast(x'ff41' as text)")
        results = await asyncio.gather(*await in_one_turn(repo, repo.attempts.cancel("a"), *enqueuing(repo)))
        assert results[0].run_id == "\N{REPLACEMENT CHARACTER}A"
        assert await ids(repo) == everything() | {"a"}


@contextlib.contextmanager
def no_larger_files(size: int) -> Iterator[None]:
    """What this process writes beyond so many bytes of a file fails, as on a bad disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_commit_that_fails_is_an_outage_for_each(lab: SqliteLab) -> None:
    """With an error of its own, and nothing is stored; afterwards all is well."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        statements = await traced(repo)
        with no_larger_files(4096):
            tasks = await in_one_turn(repo, *enqueuing(repo))
            errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert statements[-1] == "commit"  # what failed was that, and no statement
        assert all(isinstance(error, DatabaseUnavailableError) for error in errors), errors
        assert len({id(error) for error in errors}) == MANY
        assert await ids(repo) == set()
        await asyncio.gather(*await in_one_turn(repo, *enqueuing(repo)))
        assert await ids(repo) == everything()


async def test_a_commit_that_others_hold_up_is_tried_again(lab: SqliteLab) -> None:
    """In a file that is not in WAL a reader keeps everybody from committing, for as long as lock_timeout allows."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        database = cast(SqliteDatabase, repo._database)
        await database.hop(lambda connection: connection.execute("pragma journal_mode = delete").fetchall())
        with lab.connection() as other:
            other.execute("begin")
            other.execute("select * from runtime_attempts").fetchall()
            tasks = await in_one_turn(repo, *enqueuing(repo))
            await still_waits(tasks[0])
            assert not any(task.done() for task in tasks)
            other.execute("commit")
            await asyncio.gather(*tasks)
        assert await ids(repo) == everything()


async def test_another_process_that_writes_is_waited_for(lab: SqliteLab) -> None:
    """Which is an outage for each when lock_timeout has passed."""
    async with SqliteRuntimeRepository(lab.path, lock_timeout=0.3) as repo:
        with lab.connection() as other:
            other.execute("begin immediate")
            tasks = await in_one_turn(repo, *enqueuing(repo))
            await still_waits(tasks[0])
            other.execute("rollback")
            await asyncio.gather(*tasks)
            other.execute("begin immediate")
            tasks = await in_one_turn(repo, *enqueuing(repo, 2))
            errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert all("locked by another process" in str(error) for error in errors)


async def test_who_gives_up_before_its_turn_has_done_nothing(lab: SqliteLab) -> None:
    """And those who wait on are served."""
    async with lab.nothing_left(), SqliteRuntimeRepository(lab.path) as repo:
        async with repo.transaction():
            tasks = [asyncio.ensure_future(verb) for verb in enqueuing(repo)]
            await asyncio.sleep(0)
            tasks[3].cancel()
            await asyncio.wait([tasks[3]])
        await asyncio.gather(*tasks[:3], *tasks[4:])
        assert await ids(repo) == everything() - {"3"}


@pytest.mark.parametrize("how", ["cancelled", "verb_timeout"])
async def test_who_gives_up_while_it_runs_costs_the_others_nothing(lab: SqliteLab, how: str) -> None:
    """It is let go at once and interrupted, which ends the transaction of all: they are done again."""
    limit = 0.5 if how == "verb_timeout" else None
    async with lab.nothing_left(), SqliteRuntimeRepository(lab.path, verb_timeout=limit) as repo:
        await hinder(repo, "slow", f"({SPIN})")
        good = enqueuing(repo)
        if how == "cancelled":
            tasks = await in_one_turn(repo, *good[:5], repo.attempts.enqueue("slow"), *good[5:])
            await still_waits(tasks[0])
            # What has been done is not committed while another part runs, and its caller need not wait for that.
            for task in (tasks[0], tasks[5]):
                started = time.monotonic()
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
                assert time.monotonic() - started < SOON
            async with asyncio.timeout(10 * SOON):
                await asyncio.gather(*tasks[1:5], *tasks[6:])
            assert await ids(repo) == everything() - {"0"}
        else:
            (slow,) = await in_one_turn(repo, repo.attempts.enqueue("slow"))
            await asyncio.sleep(0.3)
            tasks = [asyncio.ensure_future(verb) for verb in good]
            with pytest.raises(DatabaseUnavailableError, match="verb_timeout"):
                await slow
            await asyncio.gather(*tasks)
            assert await ids(repo) == everything()


async def test_whoever_is_cancelled_at_any_moment_owns_nothing(lab: SqliteLab) -> None:
    """A claim that is given up in line, in its group or behind the commit leaves no lease; all others are kept."""
    chance = random.Random(7)
    rounds = 15
    async with lab.nothing_left(), SqliteRuntimeRepository(lab.path) as repo:
        await repo.attempts.enqueue_many([NewAttempt("run")] * (MANY * rounds))
        owned: list[str] = []
        cancelled = 0

        async def work() -> None:
            nonlocal cancelled
            for _ in range(rounds):
                claiming = asyncio.ensure_future(repo.leases.claim("worker"))
                await asyncio.wait([claiming], timeout=chance.uniform(0, 0.008))
                claiming.cancel()
                try:
                    owned.extend(lease.lease_id for lease in await claiming)
                except asyncio.CancelledError:
                    cancelled += 1

        await asyncio.gather(*(work() for _ in range(MANY)))
        assert {lease.lease_id for lease in await repo.leases.list(limit=1000)} == set(owned)
        assert owned
        assert cancelled
        await lab.execute("begin immediate")


async def test_a_group_is_closed_with_its_repository(lab: SqliteLab) -> None:
    """What has begun is done and answered, and what has not hears that it is closed."""
    async with lab.nothing_left():
        repo = await SqliteRuntimeRepository(lab.path)
        tasks = await in_one_turn(repo, *enqueuing(repo))
        await asyncio.sleep(0)
        await repo.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        done = [result for result in results if not isinstance(result, RepositoryClosedError)]
        assert len(done) in (0, MANY)
        async with SqliteRuntimeRepository(lab.path) as again:
            assert await ids(again) == (everything() if done else set())


async def test_a_group_takes_so_many_and_no_longer(lab: SqliteLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is no place or no time for comes next: nobody waits long for the commit of what was done for it."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        statements = await traced(repo)
        monkeypatch.setattr(turn_module, "MOST", 4)
        await asyncio.gather(*await in_one_turn(repo, *enqueuing(repo)))
        assert statements.count("begin immediate") == 3  # by 4, 4 and 2
        del statements[:]
        monkeypatch.setattr(group_module, "_LONGEST", 0.0)
        tasks = await in_one_turn(repo, *(repo.attempts.cancel(str(number)) for number in range(4)))
        answered: list[int] = []
        for number, task in enumerate(tasks):
            task.add_done_callback(lambda _, number=number: answered.append(number))  # type: ignore[misc]
        await asyncio.gather(*tasks)
        assert statements.count("begin immediate") == 4
        assert answered == [0, 1, 2, 3]


def test_a_group_is_short() -> None:
    """What the test above does not wait for."""
    assert 10 <= turn_module.MOST <= 1000
    assert 0 < group_module._LONGEST <= 0.05


async def test_verbs_do_not_starve_a_transaction(lab: SqliteLab) -> None:
    """It waits for those that came before it, however many come after."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        done = 0
        ended = False

        async def stream() -> None:
            nonlocal done
            while not ended:
                await repo.attempts.enqueue("run")
                done += 1

        streams = [asyncio.ensure_future(stream()) for _ in range(MANY)]
        for _ in range(10):
            await asyncio.sleep(0.01)
            before = done
            async with asyncio.timeout(SOON), repo.transaction():
                # Of each stream the verb that was under way, and perhaps one that was taken along.
                assert done - before <= 2 * MANY
        ended = True
        await asyncio.gather(*streams)


async def test_transactions_do_not_starve_a_verb(lab: SqliteLab) -> None:
    """It waits for those that were there before it, and for none that comes after."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        done = 0
        ended = False

        async def stream() -> None:
            nonlocal done
            while not ended:
                async with repo.transaction() as transaction:
                    await transaction.attempts.find("a")
                done += 1

        streams = [asyncio.ensure_future(stream()) for _ in range(MANY)]
        for verb in (repo.attempts.list, lambda: repo.attempts.enqueue("run")):
            for _ in range(5):
                await asyncio.sleep(0.01)
                before = done
                async with asyncio.timeout(SOON):
                    await verb()
                assert done - before <= MANY + 1
        ended = True
        await asyncio.gather(*streams)


async def test_those_who_only_read_need_no_lock(lab: SqliteLab) -> None:
    """They are answered while another process writes, and do not even try to get it."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        statements = await traced(repo)
        with lab.connection() as other:
            other.execute("begin immediate")
            verbs = [repo.attempts.list(), repo.leases.list(), repo.attempts.stats(), repo.jobs.list()]
            async with asyncio.timeout(SOON):
                await asyncio.gather(*await in_one_turn(repo, *verbs))
        assert "begin immediate" not in statements


async def test_a_query_is_known_to_read_if_it_does(lab: SqliteLab) -> None:
    """SQLite's own plan says so: what would write in a group of readers would not be committed with the others."""
    async with SqliteRuntimeRepository(lab.path):
        pass
    parameters = {str(number): None for number in range(1, 20)}
    found = set()
    with lab.connection() as connection:
        for query, text in SQLITE.items():
            statements = list(split_statements(text))
            if query != "schema.create_ledger":
                programs = [connection.execute(f"explain {one}", parameters).fetchall() for one in statements]
                writes = any(step[1] == "Transaction" and step[3] for program in programs for step in program)
                if not writes and len(statements) == 1:
                    found.add(query)
    assert {query for query in SQLITE if database_module.PREPARED[query].reads} == found
    assert len(found) > 20


async def test_a_savepoint_costs_only_a_group_in_which_one_fails(lab: SqliteLab) -> None:
    """Then all is begun anew, and each has its own; hardly any fails."""
    async with lab.nothing_left(), SqliteRuntimeRepository(lab.path) as repo:
        await hinder(repo, "bad", "raise(abort, 'no')")
        statements = await traced(repo)
        await asyncio.gather(*await in_one_turn(repo, *enqueuing(repo)))
        assert "savepoint query" not in statements
        assert statements.count("begin immediate") == 1
        verbs = [repo.attempts.enqueue("run", attempt_id="good"), repo.attempts.enqueue("bad", attempt_id="bad")]
        good, bad = await asyncio.gather(*await in_one_turn(repo, *verbs), return_exceptions=True)
        assert isinstance(bad, RefusedError)
        assert not isinstance(good, BaseException)
        assert statements.count("savepoint query") == 2
        assert await ids(repo) == everything() | {"good"}


async def test_what_comes_upon_no_text_is_done_once(lab: SqliteLab) -> None:
    """The driver must be asked again for text that is no UTF-8: what was done until then is undone before."""
    async with lab.nothing_left(), SqliteRuntimeRepository(lab.path) as repo:
        for name in ("a", "b", "c"):
            await repo.attempts.enqueue("run", attempt_id=name)
        with lab.connection() as connection:
            connection.execute("update runtime_attempts set payload_json = cast(x'ff' as text) where attempt_id = 'a'")
            connection.commit()
        claims = await asyncio.gather(*await in_one_turn(repo, *(repo.leases.claim(f"w{n}") for n in range(2))))
        assert [[lease.attempt_id for lease in leases] for leases in claims] == [[], ["b"]]
        rest = await repo.attempts.get("c")
        assert (rest.status, rest.lease_version) == (AttemptStatus.QUEUED, 0)


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_process_that_is_killed_at_the_commit_has_done_all_or_nothing(lab: SqliteLab, moment: str) -> None:
    """Before it nothing is stored; after it all is, although nobody heard of it, and to repeat each verb is safe."""
    async with lab.repository():
        pass
    process = PROCESSES.Process(target=be_killed, args=(lab.place, moment))
    process.start()
    await asyncio.to_thread(process.join, 20)
    assert process.exitcode == -signal.SIGKILL
    async with SqliteRuntimeRepository(lab.path) as repo:
        assert await ids(repo) == (everything() if moment == "after" else set())
        await asyncio.gather(*enqueuing(repo))
        assert await ids(repo) == everything()


def be_killed(place: Place, moment: str) -> None:
    """Have many verbs in one turn, and be killed by SIGKILL before or after their commit."""
    do = Group.do

    def dying(self: Group, connection: Connection) -> None:
        if moment == "before":
            connection.set_trace_callback(lambda text: die() if text == "commit" else None)
        do(self, connection)
        die()

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    async def work() -> None:
        async with place.repository() as repo:
            await asyncio.gather(*await in_one_turn(repo, *enqueuing(repo)))

    Group.do = dying  # type: ignore[method-assign]
    asyncio.run(work())


def test_an_interruption_of_one_statement_ends_the_transaction(tmp_path: Path) -> None:
    """The fact of SQLite's behind all this: where that changes, a group may be done with less."""
    with contextlib.closing(sqlite3.connect(tmp_path / "x.db", isolation_level=None)) as connection:
        connection.execute("create table t (a)")
        connection.execute("begin immediate")
        connection.execute("savepoint s")
        connection.set_progress_handler(lambda: 1, 1000)
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            connection.execute(f"insert into t {SPIN}")
        assert not connection.in_transaction
