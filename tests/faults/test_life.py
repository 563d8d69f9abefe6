"""The life of a repository: constructed, awaited by one or many, and closed, with nothing left behind."""

import asyncio
import contextlib
import gc
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial, wraps
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import anyio
import asyncpg
import pytest
import trio

from runtime_repo import (
    ConfigurationError,
    DatabaseUnavailableError,
    ForeignSchemaError,
    MigrationError,
    PostgresRuntimeRepository,
    RepositoryClosedError,
    RuntimeRepository,
    SchemaReport,
    SqliteRuntimeRepository,
    repository_from_url,
)
from runtime_repo.postgres import PostgresDatabase
from tests.faults.conftest import closing, eventually
from tests.lab import NOTHING, Lab, PostgresLab, SqliteLab, on_postgres, on_sqlite
from tests.versions import NEWEST, RECORDED

Use = Callable[[RuntimeRepository], Awaitable[object]]


async def _awaited(repository: RuntimeRepository) -> None:
    await repository


async def _entered(repository: RuntimeRepository) -> None:
    async with repository:
        pass


async def _report(repository: RuntimeRepository) -> SchemaReport:
    return repository.boot_report


VERBS: dict[str, Use] = {
    "attempts.enqueue": lambda repository: repository.attempts.enqueue("run"),
    "attempts.find": lambda repository: repository.attempts.find("a"),
    "leases.claim": lambda repository: repository.leases.claim("worker"),
    "leases.requeue_expired": lambda repository: repository.leases.requeue_expired(),
}
BOOTS: dict[str, Use] = {
    "await": _awaited,
    "async with": _entered,
    "ensure_schema": lambda repository: repository.ensure_schema(),
}


class Gate:
    """A *before_migrate* that says when boot has come to it, and lets it pass when told."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self.opened.wait()


async def test_construction_does_no_io(lab: Lab) -> None:
    """A repository that was constructed and forgotten has opened nothing and has nothing to close."""
    async with lab.nothing_left():
        repository = lab.repository()
        assert await lab.connections() == []
        assert await lab.content() == NOTHING
        if isinstance(lab, SqliteLab):
            assert not lab.path.exists()
        del repository
        gc.collect()


async def test_await_and_async_with_may_be_repeated_and_mixed(lab: Lab) -> None:
    """Whoever awaits gets the same repository and the same report; the first exit closes it."""
    async with lab.nothing_left():
        repository = await lab.repository()
        report = repository.boot_report
        assert [migration.version for migration in report.applied] == RECORDED
        assert await repository is repository
        async with repository as entered:
            assert entered is repository
            assert repository.boot_report is report
            assert (await repository.ensure_schema()).applied == ()
        with pytest.raises(RepositoryClosedError):
            await repository


async def test_twenty_tasks_that_await_together_make_one_boot(lab: Lab) -> None:
    """One migration, one connection, one report."""
    calls = 0

    async def before_migrate() -> None:
        nonlocal calls
        calls += 1

    async with lab.nothing_left(), closing(lab.repository(before_migrate=before_migrate)) as repository:
        every = await asyncio.gather(*(BOOTS["await" if n % 2 else "ensure_schema"](repository) for n in range(20)))
        assert len(every) == 20
        assert calls == 1
        reports = {id(report) for report in every if report is not None}
        assert reports == {id(repository.boot_report)}
        # A file in WAL mode has three descriptors at most.
        assert 1 <= len(await lab.connections()) <= (1 if isinstance(lab, PostgresLab) else 3)


async def test_a_failed_boot_succeeds_when_its_cause_is_gone(lab: Lab) -> None:
    """The same object may be awaited again after any failure, and a failure leaves nothing."""
    await lab.execute(f"create table {lab.table('jobs')} (mine integer)")
    repository = lab.repository()
    before = await lab.content()
    async with lab.nothing_left():
        for boot in BOOTS.values():
            with pytest.raises(ForeignSchemaError):
                await boot(repository)
        assert await lab.content() == before
    await lab.execute(f"drop table {lab.table('jobs')}")
    async with lab.nothing_left(), repository:
        assert repository.boot_report.to_version == NEWEST


@on_sqlite
async def test_a_folder_may_be_created_after_a_failed_boot(lab: SqliteLab, tmp_path: Path) -> None:
    """The folder is the operator's to create; boot does not."""
    lab = SqliteLab(tmp_path / "later" / "runtime.db")
    repository = lab.repository()
    async with lab.nothing_left():
        with pytest.raises(DatabaseUnavailableError, match="create it first"):
            await repository
    assert not lab.path.parent.exists()
    lab.path.parent.mkdir()
    async with lab.nothing_left(), repository:
        assert repository.boot_report.to_version == NEWEST


async def test_close_may_be_repeated_and_raced(lab: Lab) -> None:
    """Before boot, after it, twice, and by ten tasks at once."""
    async with lab.nothing_left():
        unused = lab.repository()
        await unused.close()
        repository = await lab.repository()
        await asyncio.gather(*(repository.close() for _ in range(10)))
        await repository.close()


@pytest.mark.parametrize("use", VERBS)
async def test_nothing_can_be_queried_before_boot(lab: Lab, use: str) -> None:
    """A verb does not boot, for whoever calls it may not expect a migration."""
    async with lab.nothing_left():
        with pytest.raises(RepositoryClosedError, match="await"):
            await VERBS[use](lab.repository())


async def test_there_is_no_report_before_boot(lab: Lab) -> None:
    """There is nothing to tell yet."""
    with pytest.raises(RepositoryClosedError, match="await"):
        _ = lab.repository().boot_report


async def test_nothing_can_be_queried_while_boot_is_under_way(lab: Lab) -> None:
    """The schema is not the one that the verbs are written for."""
    gate = Gate()
    async with lab.nothing_left(), closing(lab.repository(before_migrate=gate)) as repository:
        boot = asyncio.ensure_future(BOOTS["await"](repository))
        await gate.reached.wait()
        found = asyncio.ensure_future(VERBS["attempts.find"](repository))
        await asyncio.wait([found], timeout=2)
        refused = found.done() and isinstance(found.exception(), RepositoryClosedError)
        gate.opened.set()
        await asyncio.wait([boot, found])
        assert refused, f"it was not refused: {found!r}"


@pytest.mark.parametrize("booted", [False, True], ids=["never awaited", "booted"])
@pytest.mark.parametrize("use", [*VERBS, *BOOTS])
async def test_closed_is_closed_for_good(lab: Lab, use: str, booted: bool) -> None:  # noqa: FBT001
    """After close() every use is refused and nothing is opened again."""
    async with lab.nothing_left(), closing(lab.repository()) as repository:
        if booted:
            await repository
        await repository.close()
        with pytest.raises(RepositoryClosedError):
            await (VERBS | BOOTS)[use](repository)
        assert await lab.connections() == []


async def test_close_gives_up_a_boot_under_way(lab: Lab) -> None:
    """Its awaiters learn that it was closed; the database stays as it was and the lock is free."""
    await lab.lay(1)
    before = await lab.content()
    gate = Gate()
    async with lab.nothing_left(), closing(lab.repository(before_migrate=gate)) as repository:
        boots = [asyncio.ensure_future(boot(repository)) for boot in BOOTS.values()]
        await gate.reached.wait()
        await repository.close()
        errors = await asyncio.gather(*boots, return_exceptions=True)
    assert [type(error) for error in errors] == [RepositoryClosedError] * len(BOOTS)
    assert await lab.content() == before
    async with lab.repository(lock_timeout=0) as successor:
        assert successor.boot_report.from_version == 1


def forget(repositories: list[RuntimeRepository]) -> None:
    """Let go of the last references."""
    repositories.clear()
    gc.collect()


async def test_a_forgotten_close_is_warned_of_and_cleaned_up(lab: Lab) -> None:
    """Garbage collection says who was forgotten and leaves no thread or connection."""
    async with lab.nothing_left():
        repositories = [await lab.repository()]
        with pytest.warns(ResourceWarning, match="never closed.*async with"):
            forget(repositories)


async def test_a_forgotten_close_is_cleaned_up_where_warnings_are_errors(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that no destructor can raise does not stop the cleaning."""
    unraisable: list[object] = []
    async with AsyncExitStack() as stack, lab.nothing_left():
        repositories = [await lab.repository()]
        # If that fails, it must not disturb the tests that follow.
        stack.callback(repositories[0]._database.abandon)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "unraisablehook", lambda error: unraisable.append(error.exc_type))
            forget(repositories)
    assert unraisable == [ResourceWarning]


@pytest.mark.parametrize("kept", ["local", "global"])
async def test_a_forgotten_close_does_not_keep_the_process_alive(lab: Lab, kept: str) -> None:
    """The process ends by itself, with a warning, also when a module still refers to the repository."""
    program = f"""
import asyncio
from tests.place import Place

async def main():
    {"global repository" if kept == "global" else ""}
    repository = await {lab.place!r}.repository()
    print(repository.boot_report.to_version)

asyncio.run(main())
"""
    command = [sys.executable, "-W", "always::ResourceWarning", "-c", program]
    root = Path(__file__).parents[2]
    async with lab.nothing_left():
        process = await asyncio.create_subprocess_exec(
            *command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        output, words = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, output.split()) == (0, [b"%d" % NEWEST]), words.decode()
    assert b"Traceback" not in words, words.decode()
    assert b"Exception ignored" not in words, words.decode()
    assert b"was never closed" in words


@on_postgres
@pytest.mark.parametrize("max_size", [1, 10])
async def test_an_existing_pool_is_used_and_not_closed(lab: PostgresLab, max_size: int) -> None:
    """Its owner goes on with it; one connection is enough for boot, migration and verbs."""
    pool = await asyncpg.create_pool(lab.place.where, min_size=0, max_size=max_size)
    async with pool:
        for applied in (NEWEST, 0):
            async with PostgresRuntimeRepository(pool, schema=lab.place.schema) as repository:
                assert len(repository.boot_report.applied) == applied
                await asyncio.gather(*(repository.attempts.enqueue("run") for _ in range(5)))
        assert await pool.fetchval(f"select count(*) from {lab.table('attempts')}") == 10


@on_postgres
async def test_who_never_pauses_does_not_keep_the_only_connection(lab: PostgresLab) -> None:
    """A task whose verbs follow each other at once shares the pool with those who wait for it."""
    async with lab.repository(max_size=1) as repository, asyncio.timeout(20):

        async def never_pause() -> None:
            while True:
                await repository.attempts.find("a")

        busy = asyncio.create_task(never_pause())
        for _ in range(10):
            await repository.attempts.find("b")
            await asyncio.sleep(0.001)
        busy.cancel()
        with pytest.raises(asyncio.CancelledError):
            await busy


@on_postgres
async def test_pool_options_pass_through(lab: PostgresLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """What asyncpg's pool understands can be given."""
    create, connect = Mock(wraps=asyncpg.create_pool), Mock(wraps=asyncpg.connect)
    monkeypatch.setattr(asyncpg, "create_pool", create)
    monkeypatch.setattr(asyncpg, "connect", connect)
    settings = {"application_name": f"{lab.place.schema}-pool"}
    options = {"statement_cache_size": 0, "max_size": 2, "server_settings": settings}
    async with lab.nothing_left(), lab.repository(**options) as repository:
        await asyncio.gather(*(repository.attempts.find("a") for _ in range(10)))
        assert len(await lab.connections()) == 2
    assert options.items() <= create.call_args.kwargs.items()
    del options["max_size"]
    assert len(connect.call_args_list) == 2
    assert all(options.items() <= call.kwargs.items() for call in connect.call_args_list)


@on_postgres
async def test_the_pool_takes_over_the_connection_of_the_boot(lab: PostgresLab) -> None:
    """The first verb pays for no second connection; when the server has ended it meanwhile, it connects anew."""
    for ended in (False, True):
        async with lab.nothing_left(), lab.repository() as repository:
            pid = await _only_pid(lab)
            if ended:
                await lab.admin.execute("select pg_terminate_backend($1, 10000)", pid)
                await eventually(lambda: _is_noticed(repository))
            await repository.attempts.find("a")
            assert (await _only_pid(lab) == pid) is not ended


async def _only_pid(lab: PostgresLab) -> int:
    (connection,) = await lab.connections()
    return int(cast(tuple[int, str, str], connection)[0])


async def _is_noticed(repository: RuntimeRepository) -> bool:
    database = cast(PostgresDatabase, repository._database)
    return database._connections._own is None or database._connections._own.is_closed()


@on_postgres
async def test_what_prepares_a_pools_connections_prepares_the_boot_too(lab: PostgresLab) -> None:
    """``init`` runs once for each connection and ``setup`` each time before it is used: a role may be set there."""
    calls: list[str] = []

    async def init(connection: asyncpg.Connection) -> None:
        calls.append("init")
        await connection.execute("set default_transaction_read_only = on")

    async def setup(_connection: object) -> None:
        calls.append("setup")

    async with lab.nothing_left():
        with pytest.raises(MigrationError, match="read-only"):
            await lab.repository(init=init, setup=setup)
        assert calls == ["init", "setup"]
        await lab.lay(NEWEST)
        calls.clear()
        async with lab.repository(init=init, setup=setup) as repository:
            await repository.attempts.find("a")
            await repository.attempts.find("a")
            with pytest.raises(DatabaseUnavailableError, match="read-only"):
                await repository.attempts.enqueue("run")
    assert calls == ["init", "setup", *["setup"] * 3]


@on_postgres
async def test_connections_that_are_wanted_from_the_start_are_opened_by_the_boot(lab: PostgresLab) -> None:
    """``min_size`` means what it means to asyncpg."""
    async with lab.nothing_left(), lab.repository(min_size=3, max_size=3):
        assert len(await lab.connections()) == 3


@on_postgres
async def test_pool_sizes_that_are_invalid_are_refused_by_the_boot(lab: PostgresLab) -> None:
    """Not by the first verb, an hour later."""
    wrong: list[dict[str, Any]] = [{"max_size": 0}, {"min_size": 3, "max_size": 2}, {"max_queries": 0}, {"bogus": 1}]
    for options in wrong:
        async with lab.nothing_left():
            with pytest.raises(ConfigurationError, match="pool options"):
                await lab.repository(**options)
    assert await lab.content() == NOTHING


@pytest.mark.parametrize("boot", BOOTS.values(), ids=BOOTS)
async def test_trio_is_refused_in_words(lab: Lab, boot: Use) -> None:
    """The drivers need asyncio; the error says so and nothing was opened."""
    async with lab.nothing_left():
        with pytest.raises(ConfigurationError, match="asyncio"):
            await asyncio.to_thread(trio.run, boot, lab.repository())
    assert await lab.content() == NOTHING


async def test_anyio_runs_it_on_asyncio(lab: Lab) -> None:
    """In a task group, in a loop of its own."""

    async def main() -> None:
        async with lab.repository() as repository, anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(repository.attempts.enqueue, "run")
        async with lab.repository() as repository:
            assert len(await repository.leases.claim("worker", limit=9)) == 5

    async with lab.nothing_left():
        await asyncio.to_thread(anyio.run, main)


def in_another_loop(use: Use, repository: RuntimeRepository) -> Awaitable[object]:
    """Use it in a loop of another thread."""

    async def main() -> object:
        return await use(repository)

    return asyncio.to_thread(asyncio.run, main())


ALL_USES: dict[str, Use] = {
    **VERBS,
    **BOOTS,
    "transaction": lambda repository: repository.transaction().__aenter__(),
    "attempts.wait": lambda repository: repository.attempts.wait(timeout=timedelta(seconds=1)),
    "inspect": lambda repository: repository.inspect(),
    "can_run": lambda repository: repository.can_run(),
    "plan": lambda repository: repository.plan(),
    "status": lambda repository: repository.status(),
    "activity": lambda repository: repository.activity(),
    "doctor": lambda repository: repository.doctor(),
    "close": lambda repository: repository.close(),
}


async def test_another_event_loop_is_refused_and_the_right_one_not_disturbed(lab: Lab) -> None:
    """Whatever is tried there, beside what is done here, nothing of it closes, breaks or delays anything."""
    async with lab.nothing_left(), lab.repository() as repository, asyncio.timeout(20):
        busy = True

        async def work() -> int:
            done = 0
            while busy:
                await repository.attempts.enqueue("run")
                done += 1
            return done

        working = asyncio.create_task(work())
        for use in ALL_USES.values():
            with pytest.raises(ConfigurationError, match="another event loop"):
                await in_another_loop(use, repository)
        busy = False
        done = await working
        assert len(await repository.attempts.list(limit=10_000)) == done > 0


async def test_a_transactions_nouns_are_refused_to_another_event_loop(lab: Lab) -> None:
    """They speak on the connection of this one."""
    async with lab.repository() as repository:
        async with repository.transaction() as transaction:

            async def enqueue(_: object) -> object:
                return await transaction.attempts.enqueue("run")

            with pytest.raises(ConfigurationError, match="another event loop"):
                await in_another_loop(enqueue, repository)
            await transaction.attempts.enqueue("run", attempt_id="a")
        assert [attempt.attempt_id for attempt in await repository.attempts.list()] == ["a"]


async def test_a_boot_under_way_is_refused_to_another_event_loop(lab: Lab) -> None:
    """It belongs to the loop that began it, which goes on with it."""
    gate = Gate()
    async with lab.nothing_left(), closing(lab.repository(before_migrate=gate)) as repository:
        boot = asyncio.ensure_future(BOOTS["await"](repository))
        await gate.reached.wait()
        for use in (*BOOTS.values(), ALL_USES["close"], ALL_USES["inspect"]):
            with pytest.raises(ConfigurationError, match="another event loop"):
                await in_another_loop(use, repository)
        gate.opened.set()
        await boot
        await repository.attempts.enqueue("run")


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
async def test_a_loop_that_has_ended_is_named(lab: Lab) -> None:
    """As after two asyncio.run(): whoever opens in one what it uses in the other. Closing then lets go of the rest."""
    async with lab.nothing_left():
        repository = lab.repository()
        await in_another_loop(BOOTS["await"], repository)
        for use in ALL_USES.values():
            with pytest.raises(ConfigurationError, match="has ended"):
                await use(repository)
        with pytest.raises(RepositoryClosedError):
            await repository
        # What a closed loop cannot close is closed by being collected.
        del repository
        gc.collect()


@on_sqlite
async def test_what_a_loop_left_open_is_closed_without_a_word(lab: SqliteLab) -> None:
    """The driver's thread has no event loop to tell: the first has ended, and the second soon does."""
    program = (
        "import asyncio, sys\n"
        "from runtime_repo import ConfigurationError, SqliteRuntimeRepository\n"
        "repository = SqliteRuntimeRepository(sys.argv[1])\n"
        "async def opened():\n"
        "    await repository\n"
        "asyncio.run(opened())\n"
        "thread = repository._database._connection._thread\n"
        "async def main():\n"
        "    try:\n"
        "        await repository.close()\n"
        "    except ConfigurationError:\n"
        "        pass\n"
        "asyncio.run(main())\n"
        "thread.join(10)\n"
        "assert not thread.is_alive()\n"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, str(lab.path)], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


async def test_what_failed_or_was_not_awaited_may_be_opened_in_another_loop(lab: Lab) -> None:
    """Nothing of it belongs to the loop that is gone."""
    fail = True

    async def before_migrate() -> None:
        if fail:
            raise ZeroDivisionError

    async with lab.nothing_left():
        repository = lab.repository(before_migrate=before_migrate)
        with pytest.raises(ZeroDivisionError):
            await in_another_loop(BOOTS["await"], repository)
        await in_another_loop(ALL_USES["inspect"], repository)
        fail = False
        async with repository:
            await repository.attempts.enqueue("run")


async def test_what_is_forgotten_in_another_thread_is_let_go_of_in_its_loop(lab: Lab) -> None:
    """Transports and loops are not safe for threads."""
    async with lab.nothing_left():
        repositories = [await lab.repository()]
        loop, seen = asyncio.get_running_loop(), set[int]()
        call_soon = loop.call_soon

        def noting(*args: Any, **options: Any) -> asyncio.Handle:
            seen.add(threading.get_ident())
            return call_soon(*args, **options)

        loop.call_soon = noting  # type: ignore[method-assign, assignment]
        try:
            with pytest.warns(ResourceWarning, match="never closed"):
                await asyncio.to_thread(forget, repositories)
        finally:
            del loop.call_soon
        assert seen <= {threading.get_ident()}


@on_postgres
async def test_a_pool_of_another_event_loop_is_refused(lab: PostgresLab) -> None:
    """Its connections would answer there."""
    pool = await asyncpg.create_pool(lab.place.where, min_size=1, max_size=2)
    async with pool:
        repository = PostgresRuntimeRepository(pool, schema=lab.place.schema)
        with pytest.raises(ConfigurationError, match="belongs to another event loop"):
            await in_another_loop(BOOTS["await"], repository)
        async with repository:
            await repository.attempts.enqueue("run")


@pytest.mark.parametrize("option", ["migrate", "backup", "listen"])
@pytest.mark.parametrize("value", ["false", "no", 1, 0, None], ids=repr)
def test_what_must_be_true_or_false_is_nothing_else(option: str, value: object) -> None:
    """As it comes from the environment, "false" would be taken for true."""
    made: dict[str, Callable[..., RuntimeRepository]] = {
        "sqlite:///x.db": lambda **options: SqliteRuntimeRepository("x.db", **options),
        "postgresql://h/db": lambda **options: PostgresRuntimeRepository("postgresql://h/db", **options),
    }
    absent = {"backup": "postgresql://h/db", "listen": "sqlite:///x.db"}.get(option)
    for url, make in made.items():
        if url != absent:
            for attempt in (make, partial(repository_from_url, url)):
                with pytest.raises(ConfigurationError, match=f"{option} is {value!r}: expected True or False"):
                    attempt(**{option: value})


@pytest.mark.parametrize(
    "url", ["sqlite:///x.db?mode=ro", "sqlite:///x.db?", "sqlite:///x.db#a", "sqlite:////x.db?a=b"]
)
def test_a_sqlite_url_has_no_options(url: str) -> None:
    """Whoever writes mode=ro would otherwise get a writable file of that name."""
    with pytest.raises(ConfigurationError, match="a path has no options: give them as arguments"):
        repository_from_url(url)


def test_a_sqlite_url_is_taken_as_it_is() -> None:
    """Nothing is decoded."""
    assert "/a b%3F%20.db'" in repr(repository_from_url("sqlite:////a b%3F%20.db"))


@pytest.mark.parametrize("value", [True, 10**400, -1, float("nan"), "1"], ids=["bool", "huge", "less", "nan", "text"])
def test_a_time_out_is_a_number_of_seconds(lab: Lab, value: Any) -> None:
    """Also one that no clock could reach is refused, and not by the first that waits."""
    with pytest.raises(ConfigurationError, match="expected a number of seconds"):
        lab.repository(lock_timeout=value)


async def take_a_backup(_where: str = "") -> None:
    """A coroutine function."""


class Backup:
    """Both kinds of method."""

    async def take(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def __call__(self) -> None:
        pass


def decorated() -> Any:
    """A function that can be told to be a coroutine function."""

    @wraps(take_a_backup)
    def outer() -> object:
        return take_a_backup()

    return outer


SYNC: dict[str, Any] = {
    "function": time.sleep,
    "method": Backup().forget,
    "object": Backup(),
    "class": Backup,
    "partial": partial(print, "x"),
    "coroutine": "not callable",
}


@pytest.mark.parametrize("value", SYNC.values(), ids=SYNC)
def test_before_migrate_is_a_coroutine_function(lab: Lab, value: Any) -> None:
    """What can be told to be none is refused before anything is opened."""
    with pytest.raises(ConfigurationError, match=r"before_migrate is .*expected a coroutine function"):
        lab.repository(before_migrate=value)


async def test_before_migrate_may_be_dressed(lab: Lab) -> None:
    """A partial, a lambda, a method, a decorated one and an object that is called."""
    gate = Gate()
    gate.opened.set()
    dressed: list[Any] = [partial(take_a_backup, "x"), lambda: take_a_backup("x"), Backup().take, decorated(), gate]
    for before_migrate in dressed:
        another = lab.another()
        async with another.repository(before_migrate=before_migrate) as repository:
            assert repository.boot_report.to_version == NEWEST


async def test_a_before_migrate_that_returns_nothing_to_await_is_refused_by_the_boot(lab: Lab) -> None:
    """Of a lambda it cannot be told before; nothing is migrated."""
    async with lab.nothing_left():
        before = await lab.content()
        with pytest.raises(ConfigurationError, match="before_migrate returned NoneType, nothing to await"):
            await lab.repository(before_migrate=lambda: None)
    assert await lab.content() == before


async def test_inspect_writes_nothing_and_needs_no_boot(lab: Lab) -> None:
    """On an absent, an old, a current and a drifted store; afterwards the repository can still be awaited."""
    for version in (0, *RECORDED):
        another = lab.another()
        await another.lay(version)
        before = await another.content()
        async with another.nothing_left():
            repository = another.repository()
            for _ in range(2):
                status = await repository.inspect()
            assert (status.found, status.supported, len(status.pending)) == (version, NEWEST, NEWEST - version)
            assert (status.refusal, status.differences) == (None, ())
            assert json.loads(json.dumps(status.as_dict()))["found"] == version
            assert "not awaited yet" in repr(repository)
            refusal = (await another.repository(migrate=False).inspect()).refusal
            assert (refusal is None) == (version == NEWEST)
        assert await another.content() == before
        if isinstance(another, SqliteLab) and not version:
            assert not another.path.exists()
    async with repository:
        await another.execute(f"drop table {another.table('jobs')}")
        status = await repository.inspect()
        assert "jobs" in str(status.refusal)
        assert any("jobs" in difference.object for difference in status.differences)
    with pytest.raises(RepositoryClosedError):
        await repository.inspect()


async def test_inspect_sees_that_the_tables_of_an_open_repository_are_gone(lab: Lab) -> None:
    """And puts none in their place."""
    async with lab.repository() as repository:
        await lab.drop_tables()
        before = await lab.content()
        status = await repository.inspect()
        assert (status.found, len(status.pending), status.refusal) == (0, NEWEST, None)
        assert await lab.content() == before


@pytest.mark.parametrize("way", ["close", "cancel"])
async def test_a_boot_that_does_not_heed_its_cancellation_is_left_behind(lab: Lab, way: str) -> None:
    """Whoever gives it up waits two seconds at most; its transaction is over, and another boot does not wait for it."""
    let_go = asyncio.Event()

    async def stubborn() -> None:
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()

    async with lab.nothing_left():
        repository = lab.repository(before_migrate=stubborn)
        boots = [asyncio.ensure_future(boot(repository)) for boot in list(BOOTS.values())[: 3 if way == "close" else 1]]
        await asyncio.wait(boots, timeout=0.3)
        began = time.monotonic()
        if way == "close":
            await asyncio.gather(*(repository.close() for _ in range(3)))
        else:
            boots[0].cancel()
        await asyncio.wait(boots)
        assert time.monotonic() - began < 4
        async with lab.repository(lock_timeout=1) as successor:
            assert len(successor.boot_report.applied) == NEWEST
        if way == "cancel":
            async with repository:
                let_go.set()
                await asyncio.sleep(0.1)
                await repository.attempts.enqueue("run")
        let_go.set()
        await asyncio.gather(*boots, return_exceptions=True)


@on_postgres
@pytest.mark.parametrize("way", ["close", "cancel"])
async def test_a_boot_on_a_silent_server_is_given_up(lab: PostgresLab, way: str) -> None:  # noqa: ARG001
    """A server that accepts and says nothing holds up nobody who does not want to wait any more."""
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    repository = PostgresRuntimeRepository(f"postgresql://me@127.0.0.1:{port}/db")
    boot = asyncio.ensure_future(BOOTS["await"](repository))
    await asyncio.wait([boot], timeout=0.2)
    async with asyncio.timeout(2.5):
        if way == "close":
            await repository.close()
        boot.cancel()
        await asyncio.wait([boot])
    silent.close()


async def test_a_repository_whose_boot_failed_needs_no_close(lab: Lab) -> None:
    """A failure has closed what it opened: to forget the object then is no mistake."""
    await lab.lay(1)
    async with lab.nothing_left():
        with pytest.raises(RuntimeError, match="not today"):
            await lab.repository(before_migrate=_not_today)
        gc.collect()


async def _not_today() -> None:
    raise RuntimeError("not today")
