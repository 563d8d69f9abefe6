"""SQLite: whatever is invalid or cannot be opened or read is refused in one line, and nothing is left behind."""

import contextlib
import os
import resource
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime_repo import (
    ConfigurationError,
    DatabaseUnavailableError,
    MigrationError,
    RefusedError,
    RepositoryClosedError,
    RuntimeRepoError,
    SchemaHistoryError,
    SchemaOutOfDateError,
    SqliteRuntimeRepository,
)
from runtime_repo.schema import Policy, ensure_schema, load_migrations
from runtime_repo.sqlite import SqliteDatabase
from tests.privileges import unprivileged
from tests.versions import NEWEST

PAGE = 4096


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything under *folder*: files with their bytes, folders with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def our_threads() -> set[threading.Thread]:
    """The threads of this process but for those of the event loop's own pool, which ends with the loop."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


async def refused(path: Path, kind: type[RuntimeRepoError] = DatabaseUnavailableError, **options: Any) -> str:
    """Boot, be refused with exactly *kind* in one line, and leave no thread; return the line."""
    threads = our_threads()
    with pytest.raises(RuntimeRepoError) as caught:
        await SqliteRuntimeRepository(path, **options)
    assert type(caught.value) is kind
    assert our_threads() <= threads
    (line,) = str(caught.value).splitlines()
    return line


async def boots(path: str | os.PathLike[str], **options: Any) -> tuple[int, int]:
    """Boot, store something, close; return the versions before and after."""
    async with SqliteRuntimeRepository(path, **options) as repo:
        await repo.attempts.enqueue("run", attempt_id="a")
        assert (await repo.attempts.get("a")).run_id == "run"
        return repo.boot_report.from_version, repo.boot_report.to_version


async def make(path: Path, *, version: int = NEWEST, wal: bool = True) -> Path:
    """A database at *version*, closed."""
    database = SqliteDatabase(path, writes=True, backup=False, lock_timeout=5)
    await ensure_schema(database, load_migrations("sqlite")[:version], Policy())
    await database.close()
    if not wal:
        connection = sqlite3.connect(path)
        connection.execute("pragma journal_mode = delete")
        connection.close()
    return path


def close_to_writers(path: Path, folder: Path, file_mode: int) -> None:
    """Nobody but root may write in the folder, and the file has this mode."""
    path.chmod(file_mode)
    folder.chmod(0o555)


async def test_a_path_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """The file is created, its folder is not; the error names the folder."""
    assert "does not exist: create it first" in await refused(tmp_path / "no" / "x.db")
    assert contents(tmp_path) == {}


async def test_a_folder_is_no_database(tmp_path: Path) -> None:
    """A folder's path is refused as what it is."""
    assert "it is a folder: name a file in it" in await refused(tmp_path)
    assert contents(tmp_path) == {}


async def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    """A file where a folder should be is a missing folder."""
    (tmp_path / "file").write_text("mine")
    assert "create it first" in await refused(tmp_path / "file" / "x.db")
    assert contents(tmp_path) == {"file": b"mine"}


async def test_a_name_that_the_file_system_refuses_is_refused(tmp_path: Path) -> None:
    """A name of 300 bytes is too long for every common file system; nothing but our own error says so."""
    assert "x" * 300 in await refused(tmp_path / ("x" * 300))
    assert contents(tmp_path) == {}


async def test_a_line_break_in_the_path_stays_out_of_the_message(tmp_path: Path) -> None:
    """The message is one line, whatever the path is."""
    await refused(tmp_path / "new\nline" / "x.db")


@pytest.mark.parametrize("migrate", [True, False])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda _: b"abc", "no SQLite database", id="three-bytes"),
        pytest.param(lambda _: b"hello, world\n" * 1000, "no SQLite database", id="a-text"),
        pytest.param(lambda _: b"\0" * PAGE, "no SQLite database", id="zeros"),
        pytest.param(lambda whole: whole[:100], "damaged or truncated: restore a backup", id="header-only"),
        pytest.param(lambda whole: whole[: 2 * PAGE + 100], "damaged or truncated: restore a backup", id="truncated"),
        pytest.param(
            lambda whole: whole[:100] + b"\xff" * (PAGE - 100) + whole[PAGE:],
            "damaged or truncated: restore a backup",
            id="first-page-corrupted",
        ),
        pytest.param(
            lambda whole: whole[:PAGE] + b"\xff" * PAGE + whole[2 * PAGE :],
            "damaged or truncated: restore a backup",
            id="second-page-corrupted",
        ),
    ],
)
async def test_a_file_that_is_no_whole_database_is_refused_and_left_as_it_is(
    tmp_path: Path, damage: Callable[[bytes], bytes], words: str, *, migrate: bool
) -> None:
    """Whatever is wrong with the file, its bytes stay, and nothing appears beside it."""
    path = await make(tmp_path / "x.db")
    path.write_bytes(damage(path.read_bytes()))
    before = contents(tmp_path)
    assert words in await refused(path, migrate=migrate)
    assert contents(tmp_path) == before


async def test_an_empty_file_is_fresh(tmp_path: Path) -> None:
    """A 0-byte file is what SQLite itself makes of a new database: it is migrated, and there is nothing to back up."""
    (tmp_path / "x.db").touch()
    assert await boots(tmp_path / "x.db") == (0, NEWEST)
    assert contents(tmp_path).keys() == {"x.db"}


async def test_verify_only_leaves_an_empty_file_empty(tmp_path: Path) -> None:
    """A boot that may not migrate writes nothing, also not into a fresh database."""
    (tmp_path / "x.db").touch()
    await refused(tmp_path / "x.db", SchemaOutOfDateError, migrate=False)
    assert contents(tmp_path) == {"x.db": b""}


@pytest.mark.parametrize("wal", [True, False])
@pytest.mark.parametrize("file_mode", [0o444, 0o000])
async def test_a_file_that_may_not_be_written_is_not_upgraded(open_folder: Path, file_mode: int, *, wal: bool) -> None:
    """
    Pending migrations on a read-only or unreadable file are refused; the file stays, and no backup is left behind.

    A reader of a WAL database makes its -wal and -shm, and cannot remove them where it may not write the database.
    """
    path = await make(open_folder / "x.db", version=1, wal=wal)
    before = contents(open_folder)
    path.chmod(file_mode)
    with unprivileged():
        line = await refused(path, MigrationError if file_mode else DatabaseUnavailableError)
    assert "may not write the file or its folder" in line
    after = contents(open_folder)
    if wal and file_mode:
        after = {name: data for name, data in after.items() if not name.endswith(("-wal", "-shm"))}
    assert after == before


@pytest.mark.parametrize("migrate", [True, False])
@pytest.mark.parametrize("file_mode", [0o666, 0o444])
async def test_a_wal_database_in_an_unwritable_folder_is_refused(
    open_folder: Path, file_mode: int, *, migrate: bool
) -> None:
    """WAL needs to create files beside the database even to read it; the error says so."""
    path = await make(open_folder / "x.db")
    before = contents(open_folder)
    close_to_writers(path, open_folder, file_mode)
    with unprivileged():
        assert "or its folder (WAL needs both)" in await refused(path, migrate=migrate)
    assert contents(open_folder) == before


async def test_a_read_only_file_without_wal_is_served_to_a_verify_only_boot(open_folder: Path) -> None:
    """Whoever may not write can still prove that the schema is right."""
    path = await make(open_folder / "x.db", wal=False)
    before = contents(open_folder)
    close_to_writers(path, open_folder, 0o444)
    with unprivileged():
        async with SqliteRuntimeRepository(path, migrate=False) as repo:
            assert repo.boot_report.from_version == NEWEST
            with pytest.raises(DatabaseUnavailableError, match="may not write"):
                await repo.attempts.enqueue("run")
    assert contents(open_folder) == before


@pytest.mark.parametrize("folder_mode", [0o555, 0o000])
async def test_a_file_cannot_be_created_in_a_folder_that_is_closed(open_folder: Path, folder_mode: int) -> None:
    """Neither in a read-only folder, nor in one that may not even be looked into."""
    folder = open_folder / "closed"
    folder.mkdir()
    folder.chmod(folder_mode)
    with unprivileged():
        assert "may not write the file or its folder" in await refused(folder / "x.db")
    assert contents(folder) == {}


async def test_verify_only_cannot_tell_what_a_closed_folder_holds(open_folder: Path) -> None:
    """A file that may not be looked for is not taken for a fresh database."""
    folder = open_folder / "closed"
    folder.mkdir()
    await make(folder / "x.db")
    folder.chmod(0o000)
    with unprivileged():
        await refused(folder / "x.db", migrate=False)


async def test_a_memory_database_is_private_and_has_no_backup() -> None:
    """``:memory:`` is fresh every time, also for two that are open at once."""
    async with SqliteRuntimeRepository(":memory:") as one, SqliteRuntimeRepository(":memory:") as other:
        await one.attempts.enqueue("run", attempt_id="a")
        assert await other.attempts.find("a") is None
        assert (one.boot_report.from_version, one.boot_report.to_version, one.boot_report.backup) == (0, NEWEST, None)


@pytest.mark.parametrize(
    "path", ["", "file:x.db", "file::memory:", "file:///x.db?mode=ro", b"x.db", "a\0b", "\ud800.db", None, 3]
)
async def test_a_path_that_cannot_be_meant_is_refused_at_construction(
    tmp_path: Path, path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error shows the path and says what is expected; nothing is opened."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="expected a file's path or ':memory:'") as caught:
        SqliteRuntimeRepository(path)  # type: ignore[arg-type]
    (line,) = str(caught.value).splitlines()
    assert ascii(path) in line or repr(path) in line
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "name",
    [
        *("a?b.db", "x.db?mode=ro&cache=shared", "a#b", "100%", "a%20b", "a b", " ", "ünï\N{SNOWMAN}.db"),
        *('it\'s "quoted".db', "new\nline.db", "back\\slash", ":memory:", "file:x.db", "\udcff.db"),
    ],
)
async def test_an_odd_name_makes_exactly_that_file(tmp_path: Path, name: str) -> None:
    """No character of a path is read as SQL or as part of a URI."""
    assert await boots(tmp_path / name) == (0, NEWEST)
    assert await boots(str(tmp_path / name)) == (NEWEST, NEWEST)
    assert contents(tmp_path).keys() == {name}


async def test_an_odd_name_gets_its_backup_beside_it(tmp_path: Path) -> None:
    """The backup's name is the file's own and more."""
    path = await make(tmp_path / "a b?c%20#.db", version=1)
    async with SqliteRuntimeRepository(path) as repo:
        backup = repo.boot_report.backup
    assert backup is not None
    assert backup.parent == tmp_path
    assert backup.name.startswith(f"{path.name}.v1-")


async def test_a_relative_path_means_the_folder_of_its_construction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changing the working directory before the boot does not change which file is meant."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    repo = SqliteRuntimeRepository("x.db")
    monkeypatch.chdir(tmp_path / "elsewhere")
    async with repo:
        pass
    assert contents(tmp_path).keys() == {"elsewhere", "x.db"}


@pytest.mark.parametrize("option", ["lock_timeout", "on_drift"])
@pytest.mark.parametrize("value", [-1, -0.001, float("nan"), float("inf"), "5", None, "Refuse"])
async def test_an_option_that_cannot_be_meant_is_refused_at_construction(
    tmp_path: Path, option: str, value: object
) -> None:
    """The error names the option and its value, and no file appears."""
    with pytest.raises(ConfigurationError) as caught:
        SqliteRuntimeRepository(tmp_path / "x.db", **{option: value})  # type: ignore[arg-type]
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{option} is {value!r}: expected ")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "5"])
async def test_a_time_limit_that_cannot_be_meant_is_refused_at_construction(tmp_path: Path, value: object) -> None:
    """None is no limit; zero would let no verb succeed."""
    with pytest.raises(ConfigurationError, match=r"^verb_timeout is .*: expected a number of seconds, more than 0$"):
        SqliteRuntimeRepository(tmp_path / "x.db", verb_timeout=value)  # type: ignore[arg-type]
    assert await boots(tmp_path / "x.db", verb_timeout=None) == (0, NEWEST)


async def test_a_closed_repository_stays_closed(tmp_path: Path) -> None:
    """After ``close()`` nothing opens the file again, not even ``ensure_schema()``."""
    threads = our_threads()
    async with SqliteRuntimeRepository(tmp_path / "x.db") as repo:
        pass
    for verb in (repo.ensure_schema, repo._ready, lambda: repo.attempts.find("a")):
        with pytest.raises(RepositoryClosedError):
            await verb()
    assert our_threads() <= threads


async def test_a_full_disk_rolls_the_migration_back(tmp_path: Path) -> None:
    """A disk that fills up during an upgrade fails it as a whole; the next boot finds version 1 again."""
    path = await make(tmp_path / "x.db", version=1)
    *earlier, newest = load_migrations("sqlite")
    full = replace(newest, sql="pragma {schema}.max_page_count = 1;\n" + newest.sql)
    database = SqliteDatabase(path, writes=True, backup=False, lock_timeout=5)
    with pytest.raises(MigrationError, match="the disk is full: free some space") as caught:
        await ensure_schema(database, (*earlier, full), Policy())
    await database.close()
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert await boots(path, backup=False) == (1, NEWEST)


@contextlib.contextmanager
def open_to_all() -> Iterator[None]:
    """A process that asks for files which everybody may read and write."""
    old = os.umask(0)
    try:
        yield
    finally:
        os.umask(old)


def modes(folder: Path) -> dict[str, int]:
    """The files in *folder*, each with its permissions."""
    return {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}


async def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    """It holds the hashes of keys; what SQLite makes beside it has its mode, and a file that is there keeps its own."""
    with open_to_all():
        async with SqliteRuntimeRepository(tmp_path / "x.db") as repo:
            await repo.attempts.enqueue("run")
            assert modes(tmp_path) == dict.fromkeys(("x.db", "x.db-wal", "x.db-shm"), 0o600)
        (tmp_path / "x.db").chmod(0o640)
        async with SqliteRuntimeRepository(tmp_path / "x.db") as repo:
            await repo.attempts.enqueue("run")
            assert set(modes(tmp_path).values()) == {0o640}


async def test_a_link_to_a_file_that_is_absent_makes_the_file(tmp_path: Path) -> None:
    """As SQLite itself would."""
    (tmp_path / "data").mkdir()
    (tmp_path / "x.db").symlink_to(tmp_path / "data" / "x.db")
    assert await boots(tmp_path / "x.db") == (0, NEWEST)
    assert (tmp_path / "data" / "x.db").stat().st_mode & 0o777 == 0o600


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """A process that has as many files open as its system lets it have."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as held:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, old[1]))
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, old)
        with contextlib.suppress(OSError):
            while True:
                held.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield


async def test_a_process_with_too_many_files_open_is_told(tmp_path: Path) -> None:
    """EMFILE is no matter of permissions."""
    path = await make(tmp_path / "x.db")
    with no_more_files():
        line = await refused(path)
    assert "too many files open" in line
    assert await boots(path) == (NEWEST, NEWEST)


async def test_a_process_that_can_start_no_thread_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection has a thread; without one it is out of reach."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        line = await refused(tmp_path / "x.db")
    assert "can't start new thread: raise the limit" in line
    assert await boots(tmp_path / "x.db") == (0, NEWEST)


async def own(repo: SqliteRuntimeRepository, *statements: str) -> None:
    """The application's own statements, on the repository's connection."""
    async with repo.transaction() as transaction:
        for statement in statements:
            await transaction.connection.execute(statement)


TRIGGER = "create temp trigger t before insert on main.runtime_attempts begin select {}; end"

REFUSALS = {
    "a trigger": (TRIGGER.format("raise(abort, 'not on Sundays')"), "not on Sundays: a trigger forbids it"),
    "a trigger's mistake": (TRIGGER.format("json('{')"), "malformed JSON"),
    "a constraint": ("create unique index u on runtime_attempts (run_id)", "UNIQUE constraint failed"),
    "a column": ("alter table runtime_attempts rename column run_id to run", "run_id.* ensure_schema"),
    "a table": ("drop table runtime_attempts", "no such table.* ensure_schema"),
}


@pytest.mark.parametrize("what", REFUSALS)
async def test_what_sqlite_refuses_is_no_outage(tmp_path: Path, what: str) -> None:
    """SQLite's words and a remedy; nothing is stored, and to insist would be of no use."""
    statement, words = REFUSALS[what]
    async with SqliteRuntimeRepository(tmp_path / "x.db") as repo:
        await repo.attempts.enqueue("same")
        await own(repo, statement)
        with pytest.raises(RefusedError, match=words) as caught:
            await repo.attempts.enqueue("same", payload="a secret")
        assert len(str(caught.value).splitlines()) == 1
        assert "secret" not in str(caught.value)
        assert isinstance(caught.value.__cause__, sqlite3.Error)


async def test_what_is_too_big_is_refused(tmp_path: Path) -> None:
    """A limit of the connection's own, as SQLite has one for all."""
    async with SqliteRuntimeRepository(tmp_path / "x.db") as repo:
        async with repo.transaction() as transaction:
            transaction.connection._conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
        with pytest.raises(RefusedError, match=r"too big: .*a reference"):
            await repo.attempts.enqueue("run", payload="x" * 100_001)
        await repo.attempts.enqueue("run")


async def test_what_an_authorizer_forbids_is_refused(tmp_path: Path) -> None:
    """The application may have set one on the connection."""
    async with SqliteRuntimeRepository(tmp_path / "x.db") as repo:
        async with repo.transaction() as transaction:
            await transaction.connection.set_authorizer(
                lambda action, *_: sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_INSERT else sqlite3.SQLITE_OK
            )
        with pytest.raises(RefusedError, match="authorizer"):
            await repo.attempts.enqueue("run")


OUTAGES = {
    "a full disk": ("pragma max_page_count = 1", "the disk is full: free some space"),
    "read only": ("pragma query_only = on", "may not write"),
}


@pytest.mark.parametrize("what", OUTAGES)
async def test_what_is_out_of_order_around_the_database_is_an_outage(tmp_path: Path, what: str) -> None:
    """It may be mended without a change of the call."""
    statement, words = OUTAGES[what]
    async with SqliteRuntimeRepository(tmp_path / "x.db") as repo:
        await own(repo, statement)
        with pytest.raises(DatabaseUnavailableError, match=words):  # noqa: PT012 - whichever meets it
            for _ in range(100):
                await repo.attempts.enqueue("run", payload="x" * PAGE)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (2**63, "beyond 64 bits"),
        (-(2**80), "beyond 64 bits"),
        ("secret\ud800", "no character"),
        (object(), "type that SQLite cannot hold"),
        (["secret"], "type that SQLite cannot hold"),
    ],
    ids=["2^63", "-2^80", "surrogate", "object", "list"],
)
async def test_a_value_that_cannot_be_bound_is_refused(tmp_path: Path, value: object, words: str) -> None:
    """Whatever gets past a verb's own checks leaves no driver's exception, and no word of the value."""
    async with SqliteRuntimeRepository(tmp_path / "x.db") as repo:
        for queries in (repo._database, await repo._database.heartbeats()):
            with pytest.raises(RefusedError, match=words) as caught:
                await queries.fetch("attempts.find", value)
            assert "secret" not in str(caught.value)
        async with repo._database.atomic() as statements:
            with pytest.raises(RefusedError, match=words):
                await statements.fetch("attempts.find", value)


async def test_a_connection_that_the_application_closed_is_an_outage(tmp_path: Path) -> None:
    """Neither the driver's ValueError nor its ProgrammingError gets out."""
    repo = await SqliteRuntimeRepository(tmp_path / "x.db")
    with pytest.raises(DatabaseUnavailableError, match="connection was closed"):
        async with repo.transaction() as transaction:
            await transaction.connection.close()
    with pytest.raises(DatabaseUnavailableError, match="connection was closed"):
        await repo.attempts.list()
    await repo.close()


async def spoil(path: Path, statement: str) -> None:
    """Another program's text in another encoding."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(statement)


SPOIL = "update runtime_attempts set run_id = cast(x'6dfc7878' as text), error = cast(x'ff' as text)"


@pytest.mark.parametrize("within", ["a verb", "a transaction"])
async def test_text_that_is_not_utf_8_is_read_all_the_same(tmp_path: Path, within: str) -> None:
    """One row of another program's does not keep the others from being claimed, listed, renewed or swept."""
    path = tmp_path / "x.db"
    async with SqliteRuntimeRepository(path) as repo:
        for name in "abc":
            await repo.attempts.enqueue("run", attempt_id=name)
        await spoil(path, SPOIL + " where attempt_id = 'b'")
        async with repo.transaction() if within == "a transaction" else contextlib.nullcontext(repo) as nouns:
            claimed = await nouns.leases.claim("worker", limit=5)
            assert sorted(lease.attempt_id for lease in claimed) == ["a", "b", "c"]
            assert [attempt.run_id for attempt in await nouns.attempts.list()] == ["run", "m\ufffdxx", "run"]
            due = max(lease.expires_at for lease in claimed)
            assert len(await nouns.leases.requeue_expired(now=due)) == 3
        assert len(await repo.leases.claim("worker", limit=5)) == 3


async def test_a_ledger_that_is_not_utf_8_is_refused_by_name(tmp_path: Path) -> None:
    """The look reads it as leniently, and boot says what it found."""
    path = await make(tmp_path / "x.db")
    await spoil(path, "update runtime_schema_migrations set name = cast(x'ff' as text) where version = 1")
    assert "\ufffd" in await refused(path, SchemaHistoryError)
