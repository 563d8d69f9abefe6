"""PostgreSQL: what the server refuses is no outage, what two wrote at once is repeated, and no error shows a row."""

import asyncio
import errno
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from runtime_repo import DatabaseUnavailableError, NewAttempt, PostgresRuntimeRepository, RefusedError, RuntimeRepoError
from runtime_repo.postgres.refusals import bare, meaning

RAISE = "create function {schema}.f() returns trigger language plpgsql as $$ begin {body} return new; end $$;"
BEFORE = "create trigger t before insert on {schema}.runtime_jobs for each row execute function {schema}.f()"


@pytest.fixture
async def repo(postgres_url: str, postgres_schema: str) -> AsyncIterator[PostgresRuntimeRepository]:
    """An open one."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as repo:
        yield repo


async def upsert(repo: PostgresRuntimeRepository, thread: str = "thread") -> object:
    """A verb that writes."""
    return await repo.jobs.upsert(thread, "running")


async def transact(repo: PostgresRuntimeRepository) -> object:
    """The same in a transaction."""
    async with repo.transaction() as transaction:
        return await transaction.jobs.upsert("thread", "running")


def shown(error: BaseException) -> str:
    """All that a traceback shows of it."""
    return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


@pytest.mark.parametrize("verb", [upsert, transact])
@pytest.mark.parametrize(
    ("ddl", "words"),
    [
        (
            RAISE.replace("{body}", "raise exception 'not on a Sunday';") + BEFORE,
            "not on a Sunday: a trigger or function of the operator's raised this",
        ),
        (
            "alter table {schema}.runtime_jobs add check (status <> 'running')",
            "violates check constraint.*a constraint",
        ),
        ("alter table {schema}.runtime_jobs drop column updated_at_ms", r"does not exist.*ensure_schema\(\)"),
        ("drop table {schema}.runtime_jobs", r"does not exist.*ensure_schema\(\)"),
        ("alter table {schema}.runtime_jobs alter column status type varchar(3)", "value too long.*correct it"),
    ],
    ids=["trigger", "constraint", "column", "table", "size"],
)
async def test_a_refusal_says_what_to_mend(
    repo: PostgresRuntimeRepository,
    postgres: asyncpg.Connection,
    postgres_schema: str,
    verb: Callable[[PostgresRuntimeRepository], Awaitable[object]],
    ddl: str,
    words: str,
) -> None:
    """The server's own words, a remedy that fits, and the repository works on."""
    await postgres.execute(ddl.replace("{schema}", postgres_schema))
    with pytest.raises(RefusedError, match=words) as caught:
        await verb(repo)
    assert isinstance(caught.value.__cause__, asyncpg.PostgresError)
    assert len(str(caught.value).splitlines()) == 1
    assert await repo.attempts.find("a") is None


async def test_a_refusal_shows_nothing_of_the_row(
    repo: PostgresRuntimeRepository, postgres: asyncpg.Connection, postgres_schema: str
) -> None:
    """PostgreSQL's DETAIL holds the row, which may be a key's hash; neither message nor cause shows it."""
    await postgres.execute(f"create unique index on {postgres_schema}.runtime_jobs (lower(thread_id))")
    await repo.jobs.upsert("hush", "running")
    with pytest.raises(RefusedError, match="violates unique constraint") as caught:
        await repo.jobs.upsert("HUSH", "running")
    cause = caught.value.__cause__
    assert isinstance(cause, asyncpg.UniqueViolationError)
    assert "hush" not in f"{caught.value} {cause} {cause!r} {vars(cause)} {shown(cause)}"


@pytest.mark.parametrize("code", ["40001", "40P01"])
async def test_a_verb_that_gave_way_is_repeated(
    repo: PostgresRuntimeRepository, postgres: asyncpg.Connection, postgres_schema: str, code: str
) -> None:
    """Two that wrote at once: one is given up by the server, and the verb is safe to repeat; not for ever."""
    body = f"if nextval('{postgres_schema}.s') <= 3 then raise exception 'busy' using errcode = '{code}'; end if;"
    await postgres.execute(
        f"create sequence {postgres_schema}.s;"
        + (RAISE.replace("{body}", body) + BEFORE).replace("{schema}", postgres_schema)
    )
    await upsert(repo)
    assert (await repo.jobs.get("thread")).status == "running"
    await postgres.execute(f"alter sequence {postgres_schema}.s restart")
    with pytest.raises(DatabaseUnavailableError, match="repeat the call, or the whole transaction"):
        await transact(repo)
    await postgres.execute(f"alter sequence {postgres_schema}.s minvalue -100 restart with -100")
    with pytest.raises(DatabaseUnavailableError, match="busy"):
        await upsert(repo, "another")


@pytest.mark.parametrize("code", ["40001", "40P01"])
async def test_a_verb_of_several_statements_that_gave_way_is_repeated(
    repo: PostgresRuntimeRepository, postgres: asyncpg.Connection, postgres_schema: str, code: str
) -> None:
    """All of it, a few times; as a part of the application's transaction once, whose whole must be begun again."""
    body = f"if nextval('{postgres_schema}.s') <= 3 then raise exception 'busy' using errcode = '{code}'; end if;"
    await postgres.execute(f"create sequence {postgres_schema}.s")
    await postgres.execute(RAISE.replace("{body}", body).replace("{schema}", postgres_schema))
    for table in ("attempts", "api_keys"):
        await postgres.execute(
            f"create trigger t before insert on {postgres_schema}.runtime_{table} "
            f"for each row execute function {postgres_schema}.f()"
        )
    restart = f"alter sequence {postgres_schema}.s restart"
    assert await repo.attempts.enqueue_many([NewAttempt("run", "one")]) == ["one"]
    await postgres.execute(restart)
    assert (await repo.api_keys.put("key", "secret")).key_id == "key"
    await postgres.execute(restart)
    with pytest.raises(DatabaseUnavailableError, match="busy") as caught:
        async with repo.transaction() as transaction:
            await transaction.attempts.enqueue_many([NewAttempt("run", "two")])
    assert caught.value.gave_way
    assert await postgres.fetchval(f"select last_value from {postgres_schema}.s") == 1
    await postgres.execute(f"alter sequence {postgres_schema}.s minvalue -100 restart with -100")
    with pytest.raises(DatabaseUnavailableError, match="busy"):
        await repo.attempts.enqueue_many([NewAttempt("run", "three")])


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_rivals_are_no_failures_under_any_isolation_level(
    postgres_url: str, postgres_schema: str, isolation: str
) -> None:
    """Whatever the role's or the database's default is, a verb waits for its rival and goes on."""
    settings = {"default_transaction_isolation": isolation}
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema, server_settings=settings) as repo:
        await repo.attempts.enqueue_many([NewAttempt("run") for _ in range(80)])

        async def work(name: str) -> None:
            for _ in range(10):
                for lease in await repo.leases.claim(name):
                    await repo.attempts.complete(lease)

        await asyncio.gather(*(work(f"worker-{number}") for number in range(8)))
        # Known by then: nothing is tried in vain any more.
        assert repo._database._is_isolated  # type: ignore[attr-defined]


@pytest.mark.parametrize("given", [False, True], ids=["ours", "given"])
async def test_a_connection_that_turned_read_only_is_given_up(
    postgres_url: str, postgres_schema: str, *, given: bool
) -> None:
    """Its server is a standby by now, and a new connection would reach the primary; idle ones of ours go with it."""
    made = []

    async def init(connection: Any) -> None:
        made.append(connection)

    async with asyncpg.create_pool(postgres_url, min_size=0, max_size=3, init=init) as pool:
        options: dict[str, Any] = {} if given else {"max_size": 3, "init": init}
        async with PostgresRuntimeRepository(
            pool if given else postgres_url, schema=postgres_schema, **options
        ) as repo:
            await asyncio.gather(*(transact(repo) for _ in range(1 if given else 3)))
            await asyncio.sleep(0.05)
            for connection in made:
                if not connection.is_closed():
                    await connection.execute("set default_transaction_read_only = on")
            with pytest.raises(DatabaseUnavailableError, match="standby or the session is read-only"):
                await upsert(repo)
            for _ in range(4):
                await upsert(repo)


async def test_a_forgotten_statement_cache_behind_a_pooler_is_named(postgres_url: str, postgres_schema: str) -> None:
    """The remedy is in the message, and the connection is not kept."""
    made = []

    async def init(connection: Any) -> None:
        made.append(connection)

    repo = PostgresRuntimeRepository(postgres_url, schema=postgres_schema, max_size=1, init=init)
    async with repo:
        await upsert(repo)
        await asyncio.sleep(0.05)
        await made[0].execute("deallocate all")
        with pytest.raises(DatabaseUnavailableError, match="statement_cache_size=0"):
            await upsert(repo)
        await upsert(repo)


async def test_a_connection_that_two_use_is_told_in_our_words(repo: PostgresRuntimeRepository) -> None:
    """'Another operation is in progress' is the driver's; it says nothing to a user."""
    async with repo.transaction() as transaction:
        slow = asyncio.ensure_future(transaction.connection.execute("select pg_sleep(0.3)"))
        await asyncio.sleep(0.05)
        with pytest.raises(DatabaseUnavailableError, match="is used by another task at this moment"):
            await transaction.jobs.upsert("thread", "running")
        await slow


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (asyncpg.DataError("invalid input for query argument $1: 'hush'"), RefusedError, "cannot be encoded"),
        (asyncpg.InternalClientError("cannot switch to state 12; hush"), DatabaseUnavailableError, "not ready"),
        (asyncpg.InterfaceError("connection is closed"), DatabaseUnavailableError, "the connection was lost"),
        (asyncpg.InterfaceError("pool is closing"), DatabaseUnavailableError, "the pool is closed"),
        (RuntimeError("can't start new thread"), DatabaseUnavailableError, "start a thread.*ulimit -u"),
        (OSError(errno.EMFILE, "Too many open files"), DatabaseUnavailableError, "Too many open files.*ulimit -n"),
        (
            asyncpg.TargetServerAttributeNotMatched("none of the hosts"),
            DatabaseUnavailableError,
            "target_session_attrs",
        ),
        (IndexError("hush"), DatabaseUnavailableError, "IndexError"),
        (RecursionError("hush"), DatabaseUnavailableError, "RecursionError"),
        (TimeoutError(), DatabaseUnavailableError, "no answer in time"),
        (asyncpg.DiskFullError("could not extend file"), DatabaseUnavailableError, "free the server's disk"),
        (asyncpg.ProgramLimitExceededError("index row size 3000"), RefusedError, "make it smaller"),
        (asyncpg.AdminShutdownError("terminating connection"), DatabaseUnavailableError, "terminating connection"),
        (asyncpg.QueryCanceledError("statement timeout"), DatabaseUnavailableError, "statement_timeout"),
        (asyncpg.InsufficientPrivilegeError("denied"), RefusedError, "grant the role what it lacks"),
        (asyncpg.UndefinedFunctionError("no f()"), RefusedError, r"ensure_schema\(\)"),
    ],
)
def test_every_error_of_the_drivers_means_one_of_ours(
    error: Exception, kind: type[RuntimeRepoError], words: str
) -> None:
    """In one line, without the driver's own words, which may repeat what was given."""
    found = meaning(error, "PostgreSQL here")
    assert type(found) is kind
    with pytest.raises(kind, match=words):
        raise found
    assert "hush" not in str(found)
    if isinstance(error, asyncpg.DataError):
        assert "hush" not in str(bare(error))


async def idle(repo: PostgresRuntimeRepository) -> None:
    """Do nothing in a transaction until its connection has ended, then something."""
    over = asyncio.Event()
    async with repo.transaction() as transaction:
        transaction.connection.add_termination_listener(lambda _: over.set())
        async with asyncio.timeout(10):
            await over.wait()
        await transaction.jobs.upsert("thread", "running")


async def test_a_transaction_that_was_idle_for_too_long_is_told_so(postgres_url: str, postgres_schema: str) -> None:
    """The server ends its session meanwhile: the remedy names the role's setting, and the next verb works."""
    settings = {"idle_in_transaction_session_timeout": "50ms"}
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema, server_settings=settings) as repo:
        with pytest.raises(DatabaseUnavailableError, match="idle_in_transaction_session_timeout"):
            await idle(repo)
        await upsert(repo)
