"""SQLite: a thread that does not come back, a file that goes away, and one writer for whom many wait."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from runtime_repo import (
    DatabaseUnavailableError,
    Lease,
    RuntimeRepository,
    SqliteRuntimeRepository,
)
from runtime_repo.database import Gate
from runtime_repo.leases import Leases
from runtime_repo.schema import load_migrations
from runtime_repo.sqlite import SqliteDatabase
from runtime_repo.sqlite import connection as connection_module
from runtime_repo.sqlite import database as database_module
from tests.lab import SqliteLab
from tests.versions import NEWEST

HANG = 2.6
"""Seconds for which the system does not give the thread back: longer than a clean-up waits for it."""

BOUND = 2.3
"""Seconds after which a caller has been let go at the latest: not when the thread comes back."""

LIMIT = 0.2
"""Seconds of a time limit that is to pass."""

SPIN = "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n"
"""A statement that ends only if it is interrupted."""

GONE = "was deleted|was replaced"


@pytest.fixture
def lab(tmp_path: Path) -> SqliteLab:
    """A file of the test's own."""
    return SqliteLab(tmp_path / "runtime.db")


@contextlib.asynccontextmanager
async def in_time(seconds: float = BOUND) -> AsyncIterator[None]:
    """Prove that the block ends soon."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


async def hinder(repo: RuntimeRepository, body: str) -> None:
    """Let each new attempt whose run is 'slow' run *body* first, on this connection only."""
    async with repo.transaction() as transaction:
        await transaction.connection.create_function("hang", 0, lambda: time.sleep(HANG))
        await transaction.connection.execute(
            "create temp trigger hinder before insert on main.runtime_attempts when new.run_id = 'slow' "
            f"begin select ({body}); end"
        )


HINDRANCES = pytest.mark.parametrize("body", [SPIN, "select hang()"], ids=["runs", "hangs"])


@HINDRANCES
async def test_a_verb_has_a_time_limit(lab: SqliteLab, body: str) -> None:
    """What does not end is an outage; afterwards nothing of it is stored, no lock is left, and the next verb works."""
    async with lab.nothing_left(), SqliteRuntimeRepository(lab.path, verb_timeout=LIMIT) as repo:
        await hinder(repo, body)
        async with in_time(LIMIT + BOUND):
            with pytest.raises(DatabaseUnavailableError, match=rf"no answer within {LIMIT} s \(verb_timeout\)"):
                await repo.attempts.enqueue("slow", attempt_id="a")
        if body == SPIN:
            await lab.execute("begin immediate")  # at once: the statement was interrupted
        else:
            with pytest.raises(DatabaseUnavailableError, match="verb_timeout"):
                await repo.attempts.enqueue("fast", attempt_id="b")
        await until_it_works(repo)
        # What had not begun when its time was over never does.
        assert await repo.attempts.find("b") is None
        # A statement that the system held up, and nobody could interrupt, may have been in time.
        assert await repo.attempts.find("a") is None or body != SPIN
        await lab.execute("begin immediate")


def lock(lab: SqliteLab) -> None:
    """Prove that the file can be locked within sqlite3's own five seconds."""
    with lab.connection() as other:
        other.execute("begin immediate")


async def until_it_works(repo: RuntimeRepository) -> None:
    """A thread that hung has come back when verbs succeed again."""
    async with asyncio.timeout(2 * HANG):
        while True:
            with contextlib.suppress(DatabaseUnavailableError):
                await repo.attempts.find("a")
                return


@HINDRANCES
@pytest.mark.parametrize("within", ["a verb", "a transaction", "the application's own statement"])
async def test_whoever_gives_up_is_let_go(lab: SqliteLab, body: str, within: str) -> None:
    """A caller that is cancelled or times out hears of it soon whatever the thread does, and leaves no lock behind."""
    async with lab.nothing_left(), SqliteRuntimeRepository(lab.path, verb_timeout=None) as repo:
        await hinder(repo, body)

        async def work() -> None:
            if within == "a verb":
                await repo.attempts.enqueue("slow", attempt_id="a")
            else:
                async with repo.transaction() as transaction:
                    await transaction.attempts.enqueue("fast", attempt_id="b")
                    if within == "a transaction":
                        await transaction.attempts.enqueue("slow", attempt_id="a")
                    await transaction.connection.execute(body)

        async with in_time():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(LIMIT):
                    await work()
        await asyncio.to_thread(lock, lab)  # as soon as the thread has come back, without anybody's doing
        assert await repo.attempts.find("b") is None
        await repo.attempts.enqueue("fast", attempt_id="b")


async def test_a_transaction_that_is_cancelled_while_it_begins_leaves_no_lock(lab: SqliteLab) -> None:
    """BEGIN waits in the thread for another process's lock, and succeeds behind the back of whoever gave up."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        with lab.connection() as other:
            other.execute("pragma busy_timeout = 1000")
            for turn in range(10):
                other.execute("begin immediate")
                beginning = asyncio.ensure_future(repo.transaction().__aenter__())
                await asyncio.sleep(turn / 400)
                beginning.cancel()
                await asyncio.sleep(0)
                other.execute("rollback")
                await asyncio.wait([beginning])
                assert beginning.cancelled()
                other.execute("begin immediate")
                other.execute("rollback")


async def test_a_statement_of_the_applications_does_not_outlive_its_transaction(lab: SqliteLab) -> None:
    """It is interrupted when the block is cancelled, so that the others get their turn."""
    async with SqliteRuntimeRepository(lab.path) as repo, in_time():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(LIMIT), repo.transaction() as transaction:
                await transaction.connection.execute(SPIN)
        await repo.attempts.enqueue("run")


async def test_a_transaction_that_sqlite_has_ended_takes_nothing_more(lab: SqliteLab) -> None:
    """An interrupted write ends it; what the application does after catching that would be committed at once."""
    async with SqliteRuntimeRepository(lab.path, verb_timeout=LIMIT) as repo:
        await hinder(repo, SPIN)
        with pytest.raises(DatabaseUnavailableError, match="the transaction is over"):  # noqa: PT012 - at its end
            async with repo.transaction() as transaction:
                await transaction.attempts.enqueue("fast", attempt_id="a")
                with pytest.raises(DatabaseUnavailableError, match="verb_timeout"):
                    await transaction.attempts.enqueue("slow", attempt_id="b")
                with pytest.raises(DatabaseUnavailableError, match="the transaction is over"):
                    await transaction.attempts.enqueue("fast", attempt_id="c")
        assert await repo.attempts.list() == []


async def test_the_wait_for_a_turn_has_a_limit(lab: SqliteLab) -> None:
    """A transaction that another task keeps open, or another process, ends nobody's patience later than that."""
    async with SqliteRuntimeRepository(lab.path, verb_timeout=LIMIT) as repo:
        opened, done = asyncio.Event(), asyncio.Event()

        async def sit() -> None:
            async with repo.transaction():
                opened.set()
                await done.wait()

        sitting = asyncio.ensure_future(sit())
        await opened.wait()
        for verb in (repo.attempts.list, repo.ensure_schema):
            async with in_time(LIMIT + BOUND):
                with pytest.raises(DatabaseUnavailableError, match="verb_timeout"):
                    await verb()
        done.set()
        await sitting
        with lab.connection() as other:
            other.execute("begin immediate")
            async with in_time(LIMIT + BOUND):
                with pytest.raises(DatabaseUnavailableError, match="verb_timeout"):
                    await repo.attempts.enqueue("run")
        await repo.attempts.enqueue("run")


async def test_a_repository_whose_thread_hangs_is_closed(lab: SqliteLab) -> None:
    """The thread is left to itself, and closes the file when it comes back."""
    async with lab.nothing_left():
        repo = await SqliteRuntimeRepository(lab.path, verb_timeout=None)
        await hinder(repo, "select hang()")
        verb = asyncio.ensure_future(repo.attempts.enqueue("slow"))
        await asyncio.wait([verb], timeout=LIMIT)
        async with in_time():
            await repo.close()
        verb.cancel()
        await asyncio.wait([verb])


@pytest.mark.parametrize("how", ["verb_timeout", "cancelled"])
async def test_a_boot_whose_file_hangs_ends(lab: SqliteLab, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's file system that is away: boot fails, or can be cancelled, and leaves nothing once that is back."""
    known = connection_module._known

    def hang(path: Path | None) -> tuple[int, int] | None:
        time.sleep(HANG)
        return known(path)

    async with lab.nothing_left():
        monkeypatch.setattr(connection_module, "_known", hang)
        async with in_time(LIMIT + BOUND):
            if how == "cancelled":
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(LIMIT):
                        await SqliteRuntimeRepository(lab.path, verb_timeout=None)
            else:
                with pytest.raises(DatabaseUnavailableError, match="verb_timeout"):
                    await SqliteRuntimeRepository(lab.path, verb_timeout=LIMIT)


@pytest.mark.parametrize("held_up_by", ["a transaction", "another process"])
async def test_a_heartbeat_waits_for_one_transaction_only(lab: SqliteLab, held_up_by: str) -> None:
    """However many are queued, whoever renews a lease is the next in turn after the one that is open."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        lease = await leased(repo)
        heartbeats = Leases(cast(Gate, await repo._gate.heartbeats()))
        ended = 0

        async def occupy() -> None:
            nonlocal ended
            async with repo.transaction() as transaction:
                await transaction.attempts.enqueue("run")
                await asyncio.sleep(0.03)
            ended += 1

        with lab.connection() as other:
            if held_up_by == "another process":
                other.execute("begin immediate")
            queued = [asyncio.ensure_future(occupy()) for _ in range(20)]
            await asyncio.sleep(0.1)
            before = ended
            beat = asyncio.ensure_future(heartbeats.heartbeat(lease))
            await asyncio.sleep(0.05)
            if held_up_by == "another process":
                other.execute("rollback")
            assert (await beat).version == lease.version
            # The one that was open, and perhaps one that ended within the heartbeat's own way to its task.
            assert ended - before <= 2
        await asyncio.gather(*queued)
        assert ended == len(queued)


async def leased(repo: RuntimeRepository) -> Lease:
    """A lease on the only attempt there is."""
    await repo.attempts.enqueue("run")
    (lease,) = await repo.leases.claim("worker")
    return lease


async def test_whoever_waits_looks_now_and_then(lab: SqliteLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although nobody has committed: what has become due needs no commit, and a hint may be lost."""
    monkeypatch.setattr(database_module, "_LONGEST_QUIET", 0.05)
    async with SqliteRuntimeRepository(lab.path) as repo, repo._gate.watch(["default"]) as watch, in_time():
        await watch.change(60)


@pytest.mark.parametrize("what", ["deleted", "replaced"])
async def test_a_file_that_goes_away_is_noticed(lab: SqliteLab, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever went on would have its writes acknowledged and lost: by ensure_schema at once, by verbs soon."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        await repo.attempts.enqueue("run")
        away = lab.path.with_name("away")
        lab.path.rename(away)
        if what == "replaced":
            lab.path.write_bytes(away.read_bytes())
        for _ in range(2):
            with pytest.raises(DatabaseUnavailableError, match=f"was {what}.*construct another"):
                await repo.ensure_schema()
        monkeypatch.setattr(connection_module, "_PROVED_FOR", 0.0)
        for verb in (lambda: repo.attempts.enqueue("run"), repo.attempts.list, lambda: repo.leases.claim("worker")):
            with pytest.raises(DatabaseUnavailableError, match=GONE):
                await verb()
        with pytest.raises(DatabaseUnavailableError, match=GONE):
            async with repo.transaction():
                pytest.fail("it began")
        away.rename(lab.path)
        assert len(await repo.attempts.list()) == 1


async def test_a_transaction_whose_file_goes_away_is_not_committed(
    lab: SqliteLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To be told is better than a commit into a file that nobody will read."""
    monkeypatch.setattr(connection_module, "_PROVED_FOR", 0.0)
    async with SqliteRuntimeRepository(lab.path) as repo:
        with pytest.raises(DatabaseUnavailableError, match=GONE):  # noqa: PT012 - at its end
            async with repo.transaction() as transaction:
                await transaction.attempts.enqueue("run")
                os.rename(lab.path, lab.path.with_name("away"))  # noqa: PTH104


def test_a_file_is_looked_after_every_few_seconds() -> None:
    """What the tests above do not wait for."""
    assert 0 < connection_module._PROVED_FOR <= 3
    assert 3 <= database_module._LONGEST_QUIET <= 6


async def test_a_database_in_memory_cannot_go_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no file."""
    monkeypatch.setattr(connection_module, "_PROVED_FOR", 0.0)
    async with SqliteRuntimeRepository(":memory:") as repo:
        await repo.attempts.enqueue("run")
        assert (await repo.ensure_schema()).to_version == NEWEST


async def test_a_connection_is_replaced_without_anybody_noticing(lab: SqliteLab) -> None:
    """Boot may have to connect anew while the verbs of other tasks wait for their turn."""
    async with lab.nothing_left(), SqliteRuntimeRepository(lab.path) as repo:
        database = cast(SqliteDatabase, repo._database)
        verbs = [asyncio.ensure_future(repo.attempts.enqueue("run")) for _ in range(20)]
        async with database._turn.mine():
            await database._reconnect()
        await asyncio.gather(*verbs)


async def inspected(database: SqliteDatabase) -> tuple[int | None, int]:
    """How many migrations are recorded, and how many tables there are."""
    look = await database.inspect([migration.catalog for migration in load_migrations("sqlite")])
    return None if look.ledger is None else len(look.ledger), len(look.catalog.tables)


def port(path: Path | str, **options: Any) -> SqliteDatabase:
    """The port on the file, not open."""
    return SqliteDatabase(path, **{"writes": True, "backup": False, "lock_timeout": 5, **options})


async def test_an_inspection_makes_no_file(lab: SqliteLab) -> None:
    """What is absent, or in memory and not open, holds nothing."""
    async with lab.nothing_left():
        assert await inspected(port(lab.path)) == (None, 0)
        assert await inspected(port(":memory:")) == (None, 0)
        assert list(lab.path.parent.iterdir()) == []


async def test_an_inspection_leaves_the_file_as_it_is(lab: SqliteLab) -> None:
    """It neither migrates nor switches to WAL, and leaves nothing open, whatever the boot would do."""
    await lab.lay(1)
    await lab.execute("pragma journal_mode = delete")
    before = lab.path.read_bytes()
    async with lab.nothing_left():
        assert (await inspected(port(lab.path)))[0] == 1
    assert lab.path.read_bytes() == before
    assert [path.name for path in lab.path.parent.iterdir()] == [lab.path.name]


async def test_an_inspection_may_be_made_at_any_time(lab: SqliteLab) -> None:
    """While a boot is under way it sees what stands so far, and disturbs nothing, and so it does afterwards."""
    await lab.lay(1)
    found = []

    async def step() -> None:
        found.append((await inspected(cast(SqliteDatabase, repo._database)))[0])

    repo = SqliteRuntimeRepository(lab.path, before_migrate=step)
    async with lab.nothing_left(), repo:
        assert found == [1]
        assert repo.boot_report.to_version == NEWEST
        assert (await inspected(cast(SqliteDatabase, repo._database)))[0] == NEWEST


async def test_an_inspection_waits_for_no_transaction_of_another_task(lab: SqliteLab) -> None:
    """A health check answers while one is open, also where nothing else gets its turn."""
    async with lab.nothing_left(), SqliteRuntimeRepository(lab.path, verb_timeout=LIMIT) as repo:
        async with repo.transaction() as transaction:
            await transaction.attempts.enqueue("run")
            status = await asyncio.create_task(repo.inspect())
        assert (status.found, status.refusal) == (NEWEST, None)


@pytest.mark.parametrize("what", ["deleted", "replaced"])
async def test_an_inspection_notices_that_the_open_file_went_away(lab: SqliteLab, what: str) -> None:
    """What it would look at is not what the verbs use."""
    async with SqliteRuntimeRepository(lab.path) as repo:
        away = lab.path.with_name("away")
        lab.path.rename(away)
        if what == "replaced":
            lab.path.write_bytes(away.read_bytes())
        with pytest.raises(DatabaseUnavailableError, match=f"was {what}"):
            await repo.inspect()


async def test_an_inspection_says_what_the_boot_would_where_the_folder_is_missing(lab: SqliteLab) -> None:
    """A file that is absent is made, a folder is not; who makes nothing finds nothing."""
    missing = lab.path.parent / "missing" / "runtime.db"
    async with lab.nothing_left():
        for act in (SqliteRuntimeRepository(missing).inspect, SqliteRuntimeRepository(missing).ensure_schema):
            with pytest.raises(DatabaseUnavailableError, match=r"the folder .* does not exist: create it first"):
                await act()
        for act in (SqliteRuntimeRepository(lab.path).inspect, SqliteRuntimeRepository(missing, migrate=False).inspect):
            assert (await act()).found == 0


async def test_an_inspection_of_a_locked_file_is_bounded(lab: SqliteLab) -> None:
    """Whoever holds it exclusively is waited for no longer than lock_timeout."""
    await lab.lay(NEWEST)
    await lab.execute("pragma journal_mode = delete")
    async with lab.nothing_left():
        with lab.connection() as other:
            other.execute("begin exclusive")
            with pytest.raises(DatabaseUnavailableError, match="locked"):
                await inspected(port(lab.path, lock_timeout=0.1))
    assert (await inspected(port(lab.path)))[0] == NEWEST


async def test_a_file_that_is_none_cannot_be_inspected(lab: SqliteLab) -> None:
    """Our error says so, as at boot."""
    lab.path.write_bytes(b"no database" * 100)
    async with lab.nothing_left():
        with pytest.raises(DatabaseUnavailableError, match="no SQLite database"):
            await inspected(port(lab.path))
