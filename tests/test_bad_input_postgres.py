"""PostgreSQL: what is invalid or cannot be reached is refused in one line; awkward valid names and settings work."""

import pickle
import secrets
import socket
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
    SchemaOutOfDateError,
    SqliteRuntimeRepository,
    repository_from_url,
)
from runtime_repo.schema import Policy, ensure_schema, load_migrations
from tests.postgres_server import PostgresServer
from tests.versions import NEWEST

READ_ONLY = {"server_settings": {"default_transaction_read_only": "on"}}
Connection = asyncpg.Connection


async def refused(kind: type[RuntimeRepoError], dsn: object, **options: Any) -> RuntimeRepoError:
    """Boot, and be refused with exactly *kind*, in one line."""
    with pytest.raises(RuntimeRepoError) as caught:
        await PostgresRuntimeRepository(dsn, **options)  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


async def namespaces(connection: Connection) -> set[str]:
    """The names of all schemas."""
    return {row["nspname"] for row in await connection.fetch("select nspname from pg_namespace")}


async def drop(connection: Connection, name: str) -> None:
    """Drop the schema of this name, whatever stands in the name."""
    quoted = name.replace('"', '""')
    await connection.execute(f'set client_min_messages = warning; drop schema if exists "{quoted}" cascade')


async def works(repo: PostgresRuntimeRepository) -> tuple[int, int]:
    """Store an attempt, claim and complete it; return the versions before and after the boot."""
    await repo.attempts.enqueue("run")
    (lease,) = await repo.leases.claim("worker")
    assert (await repo.attempts.complete(lease, "done")).result == "done"
    return repo.boot_report.from_version, repo.boot_report.to_version


@pytest.mark.parametrize(
    "dsn",
    [
        *("", "hidden", "host=localhost password=hidden", "mysql://u:hidden@h/db", "http://h", "//u:hidden@h/db"),
        *("sqlite:///x.db", "postgresql+asyncpg://u:hidden@h/db", "postgresql://u:hidden@[::1/db", None, 5, b"x"),
    ],
)
def test_a_dsn_that_cannot_be_parsed_is_refused_at_construction(dsn: object) -> None:
    """The error says what is expected and does not repeat what was given."""
    with pytest.raises(ConfigurationError, match="expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE") as caught:
        PostgresRuntimeRepository(dsn)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "dsn",
    [
        *("postgresql://127.0.0.1:port/db", "postgresql://127.0.0.1:99999/db", "postgresql://127.0.0.1:-1/db"),
        *("postgresql://127.0.0.1:5:6/db", "postgresql://127.0.0.1/db?sslmode=bogus", f"postgresql://{'h' * 70}/db"),
        *("postgresql://127.0.0.1/db?target_session_attrs=bogus", "postgresql://a..b/db"),
        *("postgresql://u:hidden@127.0.0.1,,localhost/db", "postgresql://u:hidden@,/db", "postgresql://h,h:x/db"),
        *("postgresql://u:hidden@/db?host=h,,h", "postgresql://u:hidden@/db?host=h,h&port=1,2,3"),
    ],
)
async def test_a_dsn_that_the_driver_cannot_use_is_refused_at_once(dsn: str) -> None:
    """No waiting for what cannot become right: a wrong port or option is a configuration error, in our words."""
    started = time.monotonic()
    error = await refused(ConfigurationError, dsn, startup_timeout=60)
    assert time.monotonic() - started < 5
    assert error.__cause__ is None
    assert error.__context__ is None
    frames = traceback.TracebackException.from_exception(error, capture_locals=True)
    shown = "".join(line for frame in frames.stack if "runtime_repo/" in frame.filename for line in str(frame.locals))
    assert "hidden" not in shown


def test_where_to_connect_cannot_be_pickled() -> None:
    """It may hold a password, and what crosses a process in a file or a pipe is read by others."""
    with pytest.raises(ConfigurationError, match="cannot be pickled"):
        pickle.dumps(PostgresRuntimeRepository("postgresql://u:hidden@h/db")._postgres._target)


@pytest.mark.parametrize("database", ["\ud800", "a\0b"])
async def test_a_database_that_no_server_can_have_is_refused(postgres_server: PostgresServer, database: str) -> None:
    """A lone surrogate and a NUL reach the driver, but no driver's exception comes back."""
    place = urlsplit(postgres_server.url())
    with pytest.raises(RuntimeRepoError) as caught:
        await PostgresRuntimeRepository(f"{place.scheme}://{place.netloc}/{database}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        *({"bogus": 1}, {"min_size": -1}, {"max_size": 0}, {"min_size": 5, "max_size": 2}, {"ssl": "bogus"}),
        *({"max_inactive_connection_lifetime": -1}, {"statement_cache_size": "x"}, {"command_timeout": "x"}),
    ],
)
async def test_a_pool_option_that_is_invalid_is_refused(postgres_url: str, options: dict[str, Any]) -> None:
    """Unknown or impossible options of the pool are a configuration error."""
    await refused(ConfigurationError, postgres_url, **options)


@pytest.mark.parametrize("settings", [{"bogus": "1"}, {"statement_timeout": "x"}])
async def test_a_server_setting_that_the_server_refuses_is_named(postgres_url: str, settings: dict[str, str]) -> None:
    """The server's own words are in the message."""
    error = await refused(DatabaseUnavailableError, postgres_url, server_settings=settings)
    assert next(iter(settings)) in str(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"startup_timeout": 0}, "startup_timeout is 0: expected a number of seconds, more than 0"),
        ({"startup_timeout": -1}, "startup_timeout is -1"),
        ({"startup_timeout": float("nan")}, "startup_timeout is nan"),
        ({"startup_timeout": float("inf")}, "startup_timeout is inf"),
        ({"startup_timeout": "5"}, "startup_timeout is '5'"),
        ({"verb_timeout": 0}, "verb_timeout is 0: expected a number of seconds, more than 0"),
        ({"verb_timeout": float("inf")}, "verb_timeout is inf"),
        ({"lock_timeout": -1}, "lock_timeout is -1: expected a number of seconds, 0 or more"),
        ({"on_drift": "ignore"}, "on_drift is 'ignore': expected 'refuse' or 'warn'"),
    ],
)
def test_an_option_that_is_invalid_is_refused_at_construction(options: dict[str, Any], words: str) -> None:
    """The error names the option and its value."""
    with pytest.raises(ConfigurationError) as caught:
        PostgresRuntimeRepository("postgresql://h/db", **options)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("dsn", "cause", "words"),
    [
        ("postgresql://u:hidden@127.0.0.1:{closed}/db", ConnectionRefusedError, "Connect call failed"),
        ("postgresql://u:hidden@no-such-host.invalid/db", socket.gaierror, ""),
        ("postgresql://u@/db?host=/no/such/folder", FileNotFoundError, "No such file"),
    ],
)
async def test_an_unreachable_server_is_tried_until_the_startup_timeout(
    dsn: str, cause: type[OSError], words: str
) -> None:
    """The wait is bounded; the error says in words what happened, and what to check."""
    with socket.socket() as taken:
        # Bound but not listening: nobody else can answer there.
        taken.bind(("127.0.0.1", 0))
        started = time.monotonic()
        error = await refused(
            DatabaseUnavailableError, dsn.format(closed=taken.getsockname()[1]), startup_timeout=0.2, timeout=0.2
        )
    assert time.monotonic() - started < 5
    # A name server that is itself out of reach does not answer in time.
    assert isinstance(error.__cause__, (cause, TimeoutError) if cause is socket.gaierror else cause)
    assert words in str(error)
    assert f": {getattr(error.__cause__, 'errno', None)}: " not in str(error)
    assert "check that the server runs" in str(error)
    assert "hidden" not in str(error)


@pytest.mark.parametrize(
    ("url", "cause", "remedy"),
    [
        (lambda s: s.url(database="nope"), asyncpg.InvalidCatalogNameError, "create the database"),
        (lambda s: s.url("postgres", "wrong"), asyncpg.InvalidPasswordError, "check the user and the password"),
        (lambda s: s.url(user="stranger"), asyncpg.InvalidPasswordError, "check the user and the password"),
        (lambda s: s.socket_url("stranger"), asyncpg.InvalidAuthorizationSpecificationError, "check the user"),
    ],
    ids=["wrong-database", "wrong-password", "unknown-user", "unknown-user-on-the-socket"],
)
async def test_what_the_server_refuses_is_not_tried_again(
    postgres_server: PostgresServer,
    url: Callable[[PostgresServer], str],
    cause: type[Exception],
    remedy: str,
) -> None:
    """A wrong password or a missing database fails at once, whatever the startup timeout, with its remedy."""
    started = time.monotonic()
    error = await refused(DatabaseUnavailableError, url(postgres_server), startup_timeout=60)
    assert time.monotonic() - started < 5
    assert type(error.__cause__) is cause
    assert remedy in str(error)


@pytest.fixture
async def admin(postgres_server: PostgresServer) -> AsyncIterator[Connection]:
    """The private server's superuser: roles are made on no other."""
    connection = await asyncpg.connect(postgres_server.url())
    yield connection
    await connection.close()


@pytest.fixture
async def role(admin: Connection) -> AsyncIterator[str]:
    """A role that may log in, with its name as its password, and nothing else."""
    name = f"role_{secrets.token_hex(4)}"
    await admin.execute(f"create role {name} login password '{name}'")
    yield name
    await admin.execute(f"drop owned by {name} cascade; drop role {name}")


@pytest.fixture
async def private_schema(admin: Connection) -> AsyncIterator[str]:
    """The name of a schema on the private server, dropped afterwards."""
    name = f"rr_test_{secrets.token_hex(4)}"
    yield name
    await drop(admin, name)


async def test_a_role_that_may_not_create_is_told_so(
    postgres_server: PostgresServer, admin: Connection, role: str, private_schema: str
) -> None:
    """On a fresh database it is refused and leaves nothing; the remedy is a grant."""
    error = await refused(MigrationError, postgres_server.url(role, role), schema=private_schema)
    assert isinstance(error.__cause__, asyncpg.InsufficientPrivilegeError)
    assert "grant the role what it lacks" in str(error)
    assert private_schema not in await namespaces(admin)


async def test_a_role_needs_to_read_the_ledger_and_no_more_to_boot(
    postgres_server: PostgresServer, admin: Connection, role: str, private_schema: str
) -> None:
    """Step by step: without USAGE and SELECT on the ledger boot is refused, with them a current schema is served."""
    url = postgres_server.url(role, role)
    async with PostgresRuntimeRepository(postgres_server.url(), schema=private_schema):
        pass
    for grant in (f"usage on schema {private_schema}", f"select on {private_schema}.runtime_schema_migrations"):
        error = await refused(RefusedError, url, schema=private_schema)
        assert isinstance(error.__cause__, asyncpg.InsufficientPrivilegeError)
        assert "grant the role what it lacks" in str(error)
        await admin.execute(f"grant {grant} to {role}")
    async with PostgresRuntimeRepository(url, schema=private_schema) as repo:
        assert repo.boot_report.from_version == NEWEST
        with pytest.raises(RefusedError, match="permission denied for table runtime_attempts"):
            await repo.attempts.find("a")


async def test_a_role_that_may_not_connect_is_told_so(
    postgres_server: PostgresServer, admin: Connection, role: str
) -> None:
    """The database's own CONNECT privilege counts, too."""
    database = f"closed_{role}"
    await admin.execute(f"create database {database}")
    try:
        await admin.execute(f"revoke connect on database {database} from public")
        error = await refused(DatabaseUnavailableError, postgres_server.url(role, role, database), startup_timeout=60)
        assert "grant the role what it lacks" in str(error)
    finally:
        await admin.execute(f"drop database {database}")


async def served_but_read_only(url: str, schema: str, **options: Any) -> None:
    """A current schema is served; what only reads works, what writes is refused with the remedy."""
    async with PostgresRuntimeRepository(url, schema=schema, **options) as repo:
        assert (repo.boot_report.from_version, repo.boot_report.applied) == (NEWEST, ())
        assert await repo.attempts.find("a") is None
        with pytest.raises(DatabaseUnavailableError, match="the server is a standby or the session is read-only"):
            await repo.attempts.enqueue("run")


async def refused_but_untouched(url: str, schema: str, **options: Any) -> None:
    """Pending migrations are refused: what may not write says so, and verify-only says what is pending."""
    error = await refused(MigrationError, url, schema=schema, **options)
    assert isinstance(error.__cause__, asyncpg.ReadOnlySQLTransactionError)
    assert "migrate on the primary" in str(error)
    await refused(SchemaOutOfDateError, url, schema=schema, migrate=False, **options)


async def test_a_read_only_session_cannot_migrate_but_serves(
    postgres_url: str, postgres_schema: str, postgres: Connection
) -> None:
    """Fresh is refused and untouched; current boots, for nothing needs to be written."""
    await refused_but_untouched(postgres_url, postgres_schema, **READ_ONLY)
    assert postgres_schema not in await namespaces(postgres)
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema):
        pass
    await served_but_read_only(postgres_url, postgres_schema, **READ_ONLY)


async def test_a_hot_standby_cannot_migrate_but_serves(postgres_server: PostgresServer, private_schema: str) -> None:
    """A standby serves what its primary has migrated."""
    async with PostgresRuntimeRepository(postgres_server.url(), schema=private_schema):
        pass
    with postgres_server.standby() as standby:
        await refused_but_untouched(standby.url(), "rr_test_nowhere")
        await served_but_read_only(standby.url(), private_schema)


@pytest.mark.parametrize(
    "awkward",
    [
        *('a"b; drop schema public', "with space", "ünï\N{SNOWMAN}", "UPPER", "PG_x", "{schema}", "{", "}}", "it's"),
        *("100%s", "back\\slash", "\\", "a.b", '"', '""', "$1", "$$", "--", "/*", ";", "new\nline", "(a,b)", "1", " "),
    ],
)
async def test_any_name_is_the_name_of_exactly_that_schema(
    postgres_url: str, postgres: Connection, awkward: str
) -> None:
    """Whatever stands in the name is a name: it boots, in that schema and no other, and works there."""
    token = secrets.token_hex(4)
    name = f"{awkward}_{token}"
    try:
        async with PostgresRuntimeRepository(postgres_url, schema=name) as repo:
            assert await works(repo) == (0, NEWEST)
        async with PostgresRuntimeRepository(postgres_url, schema=name, migrate=False) as repo:
            assert await works(repo) == (NEWEST, NEWEST)
        # Other processes' tests make and drop schemas of theirs meanwhile.
        there = await namespaces(postgres)
        assert {found for found in there if token in found} == {name}
        assert {"public", "information_schema"} <= there
        tables = await postgres.fetch("select tablename from pg_tables where schemaname = $1", name)
        assert {row["tablename"] for row in tables} >= {"runtime_schema_migrations", "runtime_attempts"}
    finally:
        await drop(postgres, name)


@pytest.mark.parametrize("letter", ["x", "ü"])
async def test_a_name_of_63_bytes_fits_and_one_of_64_does_not(
    postgres_url: str, postgres: Connection, letter: str
) -> None:
    """The limit is PostgreSQL's own and counts bytes: a longer name would be cut silently."""
    name = secrets.token_hex(4)
    name += "x" * ((63 - len(name)) % len(letter.encode())) + letter * ((63 - len(name)) // len(letter.encode()))
    assert len(name.encode()) == 63
    try:
        async with PostgresRuntimeRepository(postgres_url, schema=name) as repo:
            assert await works(repo) == (0, NEWEST)
        assert name in await namespaces(postgres)
    finally:
        await drop(postgres, name)
    with pytest.raises(ConfigurationError, match="64 bytes: expected 1 to 63 bytes of UTF-8"):
        PostgresRuntimeRepository(postgres_url, schema=name + "x")


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 64, "ü" * 32, "pg_", "pg_x", "pg_temp", "\ud800", None, 3, b"x"])
def test_a_name_that_is_invalid_is_refused_at_construction(name: object) -> None:
    """The error shows the name and says what is expected."""
    with pytest.raises(ConfigurationError, match="expected 1 to 63 bytes of UTF-8") as caught:
        PostgresRuntimeRepository("postgresql://h/db", schema=name)  # type: ignore[arg-type]
    (line,) = str(caught.value).splitlines()
    assert repr(name) in line


@pytest.mark.parametrize(
    ("setting", "limit"),
    [("statement_timeout", "150ms"), ("lock_timeout", "1ms"), ("idle_in_transaction_session_timeout", "1ms")],
)
async def test_a_timeout_of_the_role_does_not_break_a_migration(
    postgres_url: str, postgres_schema: str, setting: str, limit: str
) -> None:
    """However long an index build takes, the clock does not end it; after the boot the role's setting holds again."""
    repo = PostgresRuntimeRepository(postgres_url, schema=postgres_schema, server_settings={setting: limit})
    *earlier, newest = load_migrations("postgres")
    slow = replace(newest, sql=newest.sql + "\nselect pg_sleep(0.2);")
    try:
        report = await ensure_schema(repo._database, (*earlier, slow), Policy())
        assert (report.from_version, report.to_version) == (0, NEWEST)
    finally:
        await repo._database.close()


@pytest.mark.parametrize("given", [False, True], ids=["ours", "given"])
async def test_a_time_limit_of_the_applications_does_not_break_a_migration(
    postgres_url: str, postgres_schema: str, *, given: bool
) -> None:
    """*command_timeout* is for the application's statements: boot's own have none, however it is given."""
    options: dict[str, Any] = {"command_timeout": 0.15}
    async with asyncpg.create_pool(postgres_url, min_size=0, **options) as pool:
        repo = PostgresRuntimeRepository(
            pool if given else postgres_url, schema=postgres_schema, **({} if given else options)
        )
        *earlier, newest = load_migrations("postgres")
        slow = replace(newest, sql=newest.sql + "\nselect pg_sleep(0.4);")
        try:
            report = await ensure_schema(repo._database, (*earlier, slow), Policy())
            assert (report.from_version, report.to_version) == (0, NEWEST)
        finally:
            await repo._database.close()


async def test_settings_of_the_session_change_nothing(postgres_url: str, postgres_schema: str) -> None:
    """Search path, isolation level and output formats of the role are its own business."""
    settings = {
        "search_path": "pg_catalog",
        "default_transaction_isolation": "serializable",
        "bytea_output": "escape",
        "DateStyle": "German",
        "IntervalStyle": "sql_standard",
        "TimeZone": "Asia/Kolkata",
        "extra_float_digits": "0",
    }
    for found in (0, NEWEST):
        async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema, server_settings=settings) as repo:
            assert await works(repo) == (found, NEWEST)


async def test_a_pool_that_was_closed_is_refused(postgres_url: str, postgres_schema: str) -> None:
    """The error says that it is the pool; nothing is tried again."""
    pool = await asyncpg.create_pool(postgres_url, min_size=0)
    await pool.close()
    error = await refused(DatabaseUnavailableError, pool, schema=postgres_schema)
    assert "pool is closed" in str(error)


async def test_a_pool_of_the_callers_stays_open(postgres_url: str, postgres_schema: str) -> None:
    """A pool that was given is used and never closed, not even by a boot that is refused."""
    async with asyncpg.create_pool(postgres_url, min_size=0) as pool:
        await refused(SchemaOutOfDateError, pool, schema=postgres_schema, migrate=False)
        async with PostgresRuntimeRepository(pool, schema=postgres_schema) as repo:
            assert await works(repo) == (0, NEWEST)
        assert await pool.fetchval("select 1") == 1
        with pytest.raises(ConfigurationError, match="an existing pool has its options already"):
            PostgresRuntimeRepository(pool, min_size=1)


async def test_a_repository_that_is_not_open_says_so(postgres_url: str, postgres_schema: str) -> None:
    """Neither before it is awaited nor after it is closed does a verb reach the database."""
    repo = PostgresRuntimeRepository(postgres_url, schema=postgres_schema)
    with pytest.raises(RepositoryClosedError, match="await"):
        await repo.attempts.find("a")
    async with repo:
        pass
    with pytest.raises(RepositoryClosedError):
        await repo.attempts.find("a")
    with pytest.raises(RepositoryClosedError, match="construct another"):
        await repo


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///runtime.db", "{cwd}/runtime.db"),
        ("sqlite:///folder/runtime.db", "{cwd}/folder/runtime.db"),
        ("sqlite:////var/lib/runtime.db", "/var/lib/runtime.db"),
        ("sqlite:///:memory:", ":memory:"),
        ("sqlite:///a b%20.db", "{cwd}/a b%20.db"),
    ],
)
def test_a_sqlite_url_names_a_file(url: str, path: str) -> None:
    """Three slashes are relative, four are absolute."""
    repo = repository_from_url(url)
    assert isinstance(repo, SqliteRuntimeRepository)
    assert f"SqliteDatabase({path.format(cwd=Path.cwd())!r})" in repr(repo)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
async def test_a_postgres_url_is_a_dsn(postgres_url: str, postgres_schema: str, scheme: str) -> None:
    """Both of PostgreSQL's schemes are understood, and options go to the class."""
    url = f"{scheme}://{postgres_url.partition('://')[2]}"
    async with repository_from_url(url, schema=postgres_schema) as repo:
        assert isinstance(repo, PostgresRuntimeRepository)
        assert await works(repo) == (0, NEWEST)


@pytest.mark.parametrize(
    "url",
    [
        *("", "runtime.db", "hidden", "mysql://u:hidden@h/db", "sqlite://hidden.db", "sqlite:hidden.db"),
        *("postgresql:u:hidden@h", "://hidden", "postgresql+psycopg://u:hidden@h/db", None, b"sqlite:///hidden"),
    ],
)
def test_a_url_that_names_no_database_is_refused_and_not_repeated(url: object) -> None:
    """It may hold a password; the error only says which two forms are understood."""
    with pytest.raises(ConfigurationError, match="sqlite:///PATH") as caught:
        repository_from_url(url)  # type: ignore[arg-type]
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite:///", "sqlite:///file:x.db", "sqlite:///a\0b"])
def test_a_sqlite_url_without_a_usable_path_is_refused(url: str) -> None:
    """The path is judged as if it had been given to the class."""
    with pytest.raises(ConfigurationError, match="expected a file's path"):
        repository_from_url(url)
