"""
A password stays where it is, and so does an API key's secret: no message, repr, traceback, warning or log line shows
it, whatever fails.

Every failure runs with one canary for either. A traceback is searched as an error reporter would send it: every
exception behind it, every frame, with the locals. Only the frames of this file are left out, for they hold the canary.
"""

import asyncio
import base64
import copy
import gc
import hashlib
import logging
import pickle
import re
import secrets
import threading
import traceback
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest

from runtime_repo import (
    ConfigurationError,
    DatabaseUnavailableError,
    MigrationError,
    PostgresRuntimeRepository,
    RefusedError,
    RepositoryClosedError,
    RuntimeRepoError,
    RuntimeRepository,
    SchemaDriftError,
    SchemaLockTimeoutError,
    SqliteRuntimeRepository,
    repository_from_url,
)
from tests.postgres_server import PostgresServer

CANARY = "kanarienvogel" + secrets.token_hex(4)
ODD = f"{CANARY}@:/?#[ %"
"""A password that has to be percent-encoded; the canary is in both of its spellings."""

Make = Callable[..., PostgresRuntimeRepository]


def in_userinfo(place: str, user: str, **options: Any) -> PostgresRuntimeRepository:
    return PostgresRuntimeRepository(f"postgresql://{user}:{CANARY}@{place}", **options)


def in_query(place: str, user: str, **options: Any) -> PostgresRuntimeRepository:
    return PostgresRuntimeRepository(f"postgresql://{place}?user={user}&password={CANARY}", **options)


def in_option(place: str, user: str, **options: Any) -> PostgresRuntimeRepository:
    return PostgresRuntimeRepository(f"postgresql://{user}@{place}", password=CANARY, **options)


def in_url(place: str, user: str, **options: Any) -> Any:
    return repository_from_url(f"postgres://{user}:{CANARY}@{place}", **options)


def encoded(place: str, user: str, **options: Any) -> PostgresRuntimeRepository:
    return PostgresRuntimeRepository(f"postgresql://{user}:{quote(ODD, '')}@{place}", **options)


FORMS = [in_userinfo, in_query, in_option, in_url, encoded]


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and every other behind it, also those that a traceback would not show."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and found not in seen:
            seen.append(found)
            yield found
            waiting += [found.__cause__, found.__context__, *getattr(found, "exceptions", ())]


def reported(error: BaseException) -> str:
    """All that an error reporter could send: messages, reprs, notes, arguments, and frames with their locals."""
    lines = ["".join(traceback.format_exception(error))]
    for found in chain(error):
        lines += [str(found), repr(found), repr(found.args), repr(vars(found))]
        shown = traceback.TracebackException.from_exception(found, capture_locals=True)
        for frame in shown.stack:
            if frame.filename != __file__:
                lines.append(f"{frame.filename}:{frame.lineno} {frame.name} {frame.locals}")
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Record every log line and warning of the test, and find no canary in them."""
    caplog.set_level(logging.DEBUG)
    for name in ("asyncio", "asyncpg", "aiosqlite", "runtime_repo"):
        caplog.set_level(logging.DEBUG, logger=name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    assert CANARY not in "\n".join([caplog.text, *(f"{warning.message} {warning.source!r}" for warning in told)])


async def fails(kind: type[Exception] | tuple[type[Exception], ...], action: Callable[[], Awaitable[object]]) -> None:
    """Fail with *kind*, and show the canary nowhere."""
    with pytest.raises(kind) as caught:
        await action()
    shown = reported(caught.value)
    assert CANARY not in shown, next(line for line in shown.splitlines() if CANARY in line)


@pytest.fixture(params=FORMS, ids=lambda form: str(form.__name__))
def form(request: pytest.FixtureRequest) -> Make:
    """How the canary is given to the repository."""
    made: Make = request.param
    return made


@pytest.fixture
async def admin(postgres_server: PostgresServer) -> AsyncIterator[asyncpg.Connection]:
    """The private server's superuser."""
    connection = await asyncpg.connect(postgres_server.url())
    yield connection
    await connection.close()


@pytest.fixture
async def role(admin: asyncpg.Connection, form: Make) -> AsyncIterator[str]:
    """A role with the canary for its password, which may create schemas."""
    name = f"role_{secrets.token_hex(4)}"
    await admin.execute(f"create role {name} login password '{ODD if form is encoded else CANARY}'")
    await admin.execute(f"grant create on database postgres to {name}")
    yield name
    await admin.execute(f"set client_min_messages = warning; drop owned by {name} cascade; drop role {name}")


@pytest.fixture
def place(postgres_server: PostgresServer) -> str:
    """The private server's host, port and database."""
    return f"127.0.0.1:{postgres_server.port}/postgres"


@pytest.mark.parametrize(
    ("place", "options", "kind"),
    [
        ("127.0.0.1:1/db", {"startup_timeout": 0.1}, DatabaseUnavailableError),
        ("no-such-host.invalid/db", {"startup_timeout": 0.1, "timeout": 0.1}, DatabaseUnavailableError),
        ("127.0.0.1:port/db", {}, ConfigurationError),
        ("127.0.0.1:99999/db", {}, ConfigurationError),
        ("[::1/db", {}, ConfigurationError),
        ("127.0.0.1:1/db", {"bogus": 1}, ConfigurationError),
        ("127.0.0.1:1/db", {"min_size": -1}, ConfigurationError),
        ("127.0.0.1:1/db", {"ssl": "bogus"}, ConfigurationError),
        ("127.0.0.1:1/db", {"command_timeout": "x"}, ConfigurationError),
        ("127.0.0.1:1/db", {"schema": "pg_x"}, ConfigurationError),
        ("127.0.0.1:1/db", {"startup_timeout": -1}, ConfigurationError),
        ("127.0.0.1:1/db", {"on_drift": "x"}, ConfigurationError),
    ],
)
async def test_what_never_connects_shows_no_password(
    form: Make, place: str, options: dict[str, Any], kind: type[RuntimeRepoError]
) -> None:
    """A DSN that cannot be used, an invalid option, a server that cannot be reached."""

    async def boot() -> object:
        return await form(place, "me", **options)

    await fails(kind, boot)


@pytest.mark.parametrize(
    "dsn",
    [
        *("mysql://u:{}@h/db", "u:{}@h/db", "host=h password={}", "postgresql://u:{}@[::1/db", "{}"),
        *("postgresql://u:{}", "postgresql://u:{}/a@h/db", "postgresql://u:a/{}@h/db", "postgresql://u:1/{}@h/db"),
        *("postgresql://u:{}?a@h/db", "postgresql://u:1?{}@h/db", "postgresql://u:{}#a@h/db", "postgresql://u:1#{}@h"),
        *(
            "postgresql://u:a@{}/a@h/db",
            "postgresql://u:a:{}@h:port/db",
            "postgresql:u:{}@h/db",
            "postgresql:///u:{}@h",
        ),
        *("postgresql://u:[{}@h/db", "postgresql://:{}@h:port/db", "postgresql://u:1,{}@h:port/db"),
    ],
)
@pytest.mark.parametrize("make", [PostgresRuntimeRepository, repository_from_url])
async def test_a_mistyped_dsn_shows_no_password(dsn: str, make: Callable[..., Any]) -> None:
    """A password with characters that should have been encoded is cut in the wrong place, and yet not shown."""

    async def boot() -> object:
        # A host that is the password's rest resolves to nothing.
        options = {"startup_timeout": 0.01} if dsn.startswith("postgresql:") else {}
        return await make(dsn.format(CANARY), **options)

    await fails(RuntimeRepoError, boot)


async def test_what_the_server_refuses_shows_no_password(form: Make, place: str, role: str) -> None:
    """A wrong password, and a database or a privilege that is missing."""
    host = place.partition("/")[0]
    for user, database, options, kind in (
        ("postgres", "postgres", {}, DatabaseUnavailableError),
        (role, "nope", {}, DatabaseUnavailableError),
        (role, "postgres", {"server_settings": {"bogus": "1"}}, DatabaseUnavailableError),
        (role, "postgres", {"server_settings": {"default_transaction_read_only": "on"}}, MigrationError),
    ):

        async def boot(user: str = user, database: str = database, options: dict[str, Any] = options) -> object:
            return await form(f"{host}/{database}", user, **({"schema": role} | options))

        await fails(kind, boot)


async def test_a_refused_boot_shows_no_password(form: Make, place: str, role: str, admin: asyncpg.Connection) -> None:
    """A lock that somebody holds, a structure that has drifted."""

    async def boot() -> object:
        return await form(place, role, schema=role, lock_timeout=0.1)

    transaction = admin.transaction()
    await transaction.start()
    await admin.execute(f"create schema {role}")
    await fails(SchemaLockTimeoutError, boot)
    await transaction.rollback()

    async with form(place, role, schema=role):
        await admin.execute(f"alter table {role}.runtime_jobs drop column status")
        await fails(SchemaDriftError, boot)


async def test_an_open_repository_shows_no_password(
    form: Make, place: str, role: str, admin: asyncpg.Connection
) -> None:
    """Neither its repr, nor what a verb raises: on a missing table, on a lost connection, after the close."""

    async def enqueue() -> object:
        return await repo.attempts.enqueue("run")

    repo = form(place, role, schema=role, startup_timeout=0.1)
    assert role in repr(repo)
    assert CANARY not in f"{repo!r} {repo} {repo._database!r}"
    async with repo:
        await repo.attempts.enqueue("run")
        assert CANARY not in f"{repo!r} {repo.boot_report!r}"
        await admin.execute(f"alter table {role}.runtime_attempts rename to gone")
        await fails(RefusedError, enqueue)

        # The next verb has to connect again, with a password that is no longer right. Whoever tells others of the new
        # attempt may be connecting at this moment, with one that was.
        tellers = [task for task in asyncio.all_tasks() if task.get_name() == "runtime_repo teller"]
        await asyncio.gather(*tellers)
        await admin.execute(f"alter role {role} password 'another'")
        await admin.execute("select pg_terminate_backend(pid, 5000) from pg_stat_activity where usename = $1", role)
        for _ in range(3):
            await fails(DatabaseUnavailableError, enqueue)
    await fails(RepositoryClosedError, enqueue)
    await fails(RepositoryClosedError, repo.ensure_schema)


async def test_a_forgotten_repository_shows_no_password(form: Make, place: str, role: str) -> None:
    """The warning for one that was never closed names the database and the user only."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        await form(place, role, schema=role)
        gc.collect()
    said = [f"{warning.message} {warning.source!r}" for warning in told if warning.category is ResourceWarning]
    assert any(role in words for words in said)
    assert CANARY not in "".join(said)


async def test_what_cannot_be_pickled_shows_no_password(form: Make) -> None:
    """Neither to another process nor as a copy does a repository, or what it is made of, go; the error says so."""
    repo = form("127.0.0.1:1/db", "me")
    database: Any = repo._database
    embedded = SqliteRuntimeRepository("x.db")
    for thing in (repo, database, database._target, embedded, embedded._database):
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):

            async def go(attempt: Callable[[Any], object] = attempt, thing: Any = thing) -> object:
                return attempt(thing)

            await fails(ConfigurationError, go)


@pytest.mark.parametrize(
    "url", ["sqlite:///x.db?password={}", "sqlite:///x.db#{}", "sqlite://u:{}@h/x.db?mode=ro", "mysql://u:{}@h/db"]
)
async def test_a_url_that_is_refused_shows_no_password(url: str) -> None:
    """Nor do the options that came with it."""

    async def make() -> object:
        return repository_from_url(url.format(CANARY), password=CANARY)

    await fails(ConfigurationError, make)


# --- The secrets of API keys -----------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgres"])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, postgres_url: str, postgres_schema: str
) -> AsyncIterator[RuntimeRepository]:
    """An open repository, in turn on each of the databases."""
    if request.param == "sqlite":
        repo: RuntimeRepository = SqliteRuntimeRepository(tmp_path / "runtime.db")
    else:
        repo = PostgresRuntimeRepository(postgres_url, schema=postgres_schema)
    async with repo:
        yield repo


def schema_of(repo: RuntimeRepository) -> str:
    return str(getattr(repo._database, "tokens", {"schema": "main"})["schema"])


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.iterdir()]


def verbs(repo: RuntimeRepository) -> list[Callable[[], Awaitable[object]]]:
    """Those that are given a secret."""
    return [lambda: repo.api_keys.put("k", CANARY), lambda: repo.api_keys.authenticate("k", CANARY)]


async def test_a_secret_is_in_no_record_and_nowhere_in_the_database(store: RuntimeRepository, tmp_path: Path) -> None:
    """Of what is read, and of what is stored: the columns of every table, and on SQLite the bytes of the files."""
    first = await store.api_keys.put("k", CANARY)
    shown = [
        first,
        await store.api_keys.get("k"),
        await store.api_keys.authenticate("k", CANARY),
        store,
        store.api_keys,
    ]
    hashes = re.compile("scrypt|[0-9a-f]{32}")
    assert not [record for record in map(repr, shown) if CANARY in record or hashes.search(record)]
    async with store.transaction() as transaction:
        query = f"select key_id, secret_hash from {schema_of(store)}.runtime_api_keys"
        fetch = getattr(transaction.connection, "fetch", None) or transaction.connection.execute_fetchall
        ((key_id, stored),) = await fetch(query)
    assert key_id == "k"
    spellings = [CANARY.encode(), CANARY.encode().hex().encode(), base64.b64encode(CANARY.encode()).rstrip(b"=")]
    assert not [
        text for text in [stored.encode(), *contents(tmp_path)] if any(spelling in text for spelling in spellings)
    ]


@pytest.mark.parametrize(
    "secret",
    ["", CANARY + "\0", CANARY + "\ud800", CANARY * 99, CANARY.encode(), [CANARY]],
    ids=["empty", "NUL", "surrogate", "long", "bytes", "list"],
)
async def test_a_secret_that_is_refused_is_not_repeated(store: RuntimeRepository, secret: Any) -> None:
    """Nor is one that was given with another argument that is refused."""
    await fails(ConfigurationError, lambda: store.api_keys.put("k", secret))
    await fails(ConfigurationError, lambda: store.api_keys.put("", CANARY))
    await fails(ConfigurationError, lambda: store.api_keys.put("k", CANARY, role=""))


async def test_a_verb_that_fails_shows_no_secret(store: RuntimeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a status that is unknown, a table that is missing, a hash that fails, and after the close."""
    await store.api_keys.put("k", CANARY)
    async with store.transaction() as transaction:
        await transaction.connection.execute(f"update {schema_of(store)}.runtime_api_keys set status = 'odd'")
    await fails(RuntimeRepoError, verbs(store)[0])

    def fail(*_: object, **__: object) -> bytes:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "scrypt", fail)
        for verb in verbs(store):
            await fails(MemoryError, verb)
    async with store.transaction() as transaction:
        await transaction.connection.execute(f"alter table {schema_of(store)}.runtime_api_keys rename to gone")
    for verb in verbs(store):
        await fails((DatabaseUnavailableError, RefusedError), verb)
    await store.close()
    for verb in verbs(store):
        await fails(RepositoryClosedError, verb)


async def test_a_verb_that_times_out_shows_no_secret(store: RuntimeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while it computes the hash, nor while it waits for its turn or for the database."""
    may_end = threading.Event()

    def hold(*_: object, **__: object) -> bytes:
        may_end.wait(10)
        return bytes(32)

    async def in_time(verb: Callable[[], Awaitable[object]]) -> None:
        async with asyncio.timeout(0.05):
            await verb()

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "scrypt", hold)
        asyncio.get_running_loop().call_later(0.2, may_end.set)
        await asyncio.gather(*(fails(TimeoutError, partial(in_time, verb)) for verb in 4 * verbs(store)))
    async with store.transaction() as transaction:
        if isinstance(store, PostgresRuntimeRepository):
            await transaction.connection.execute(f"lock table {schema_of(store)}.runtime_api_keys")
        task = asyncio.create_task(fails(TimeoutError, partial(in_time, verbs(store)[1])))
        await asyncio.wait([task])
        await task
