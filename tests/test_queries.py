"""The named statements: each is understood by both engines, and written in the house's hand."""

import asyncio
import contextlib
import re
import sqlite3
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import asyncpg
import pytest

from runtime_repo import NewAttempt, PostgresRuntimeRepository, SqliteRuntimeRepository
from runtime_repo.queries import bounded, load_queries, split_statements

FOLDER = Path(str(files("runtime_repo")))
CREATING = {"schema.create_namespace", "schema.create_ledger"}
"""What cannot be prepared where it has been done."""

SQLITE = load_queries("sqlite", schema="main", now_ms="0")
POSTGRES = load_queries("postgres", schema="{schema}", now_ms="0::bigint")
HEADERS = [
    f"{path.stem}.{line.removeprefix('-- name: ')}"
    for path in sorted((FOLDER / "queries").glob("*.sql"))
    for line in path.read_text(encoding="utf-8").splitlines()
    if line.startswith("-- name")
]
"""As they stand: the noun, the name, for how many rows each of several is, and for which database."""


def named(header: str) -> list[str]:
    """What the query of a header is called, once for each number of rows."""
    name, *bounds = header.split(" @")[0].split(" ")
    return [f"{name} {bound}" for bound in bounds] or [name]


@pytest.fixture
async def sqlite(tmp_path: Path) -> sqlite3.Connection:
    """A migrated file."""
    async with SqliteRuntimeRepository(tmp_path / "x.db"):
        pass
    return sqlite3.connect(tmp_path / "x.db")


async def test_sqlite_understands_every_statement(sqlite: sqlite3.Connection) -> None:
    """Every statement of every query can be planned against the migrated schema, its parameters bound by name."""
    parameters = {str(number): None for number in range(1, 20)}
    try:
        for name in sorted(SQLITE.keys() - CREATING):
            statements = list(split_statements(SQLITE[name]))
            assert statements, name
            for statement in statements:
                assert sqlite.execute(f"explain {statement}", parameters).fetchall(), name
    finally:
        sqlite.close()


READ_THROUGH = {"api_keys.any", "attempts.stats", "status.queues_without_names", "status.workers"}
READ_THROUGH |= {"control.holders", "control.list", "control.outdated"}
READ_THROUGH |= {"leases.list", "leases.list_by_worker", "leases.give_back", "leases.park"}
"""What reads a table from end to end, as it must, or one of a few rows."""

ABOUT_ALL = ("schema.", "archive.", "doctor.")
"""What is about every row, or about what there is."""

NO_TABLES = {"CONSTANT", "SUBQUERY", "subquery", "json_each", "named", "given", "silent", "leased", "chosen"}
NO_TABLES |= {"first", "found", "here", "seen", "endless", "expired", "ended", "last", "p", "s", "f"}
"""What else SQLite reads through, under whichever name the statements give it."""


async def test_sqlite_reads_no_table_from_end_to_end(sqlite: sqlite3.Connection) -> None:
    """Each row is looked up, and a page begins somewhere; all that is held is read to count it, or for a lease's id."""
    parameters = {str(number): None for number in range(1, 20)}
    reading = set()
    try:
        for name in SQLITE:
            for statement in split_statements(SQLITE[name]) if not name.startswith(ABOUT_ALL) else ():
                for step in sqlite.execute(f"explain query plan {statement}", parameters).fetchall():
                    if (match := re.match(r"SCAN (\w+)", step[-1])) and match[1] not in NO_TABLES:
                        reading.add(name)
    finally:
        sqlite.close()
    assert reading == READ_THROUGH


async def test_postgres_understands_every_query(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """Every query can be prepared against the migrated schema; what it answers has names, each of them once."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema):
        pass
    queries = load_queries("postgres", schema=postgres_schema, now_ms="0::bigint")
    for name in sorted(queries.keys() - CREATING):
        statement = await postgres.prepare(queries[name])
        columns = Counter(attribute.name for attribute in statement.get_attributes())
        assert "?column?" not in columns, name
        assert max(columns.values(), default=1) == 1, name


RARE = [
    ("jobs.list_by_status", "idx_runtime_jobs_status", ("rare", "", 100)),
    ("interrupts.list_by_status", "idx_runtime_interrupts_status", ("pending", "", 100)),
    ("interrupts.list_by_thread", "idx_runtime_interrupts_thread", ("rare", "", 100, None)),
    ("audit.list", "idx_runtime_audit_logs_created", (0, 9000, 0, 100)),
    ("audit.list_by_action", "idx_runtime_audit_logs_action", (0, 9000, 0, 100, "rare")),
    ("audit.list_by_request", "idx_runtime_audit_logs_request", (0, 9000, 0, 100, "r1", None)),
]
"""What is asked for, the index that must find it, and what it is asked with."""

MANY = """
insert into {schema}.runtime_jobs (thread_id, status, created_at_ms, updated_at_ms)
select 't' || n, <rare, done>, n, n from (<numbers>) as x;
insert into {schema}.runtime_interrupts (interrupt_id, thread_id, run_id, attempt_id, value_json, status, created_at_ms)
select 'i' || n, 't' || (n / 5), 'r', 'a', '1', <pending, resumed>, n from (<numbers>) as x;
insert into {schema}.runtime_audit_logs (actor_type, action, resource_type, result, request_id, created_at_ms)
select 'user', <rare, a>, 'job', 'ok', 'r' || n, n from (<numbers>) as x;
"""


def many(schema: str, numbers: str) -> str:
    """Ten thousand rows of each, of which the last ones are rare."""
    text = MANY.replace("{schema}", schema).replace("<numbers>", numbers)
    return re.sub(r"<(\w+), (\w+)>", r"case when n > 9990 then '\1' else '\2' end", text)


def test_sqlite_finds_what_is_rare_by_its_index(sqlite: sqlite3.Connection) -> None:
    """No list walks through the table to the few rows that it returns."""
    numbers = "with recursive c (n) as (select 1 union all select n + 1 from c where n < 10000) select n from c"
    try:
        sqlite.executescript(many("main", numbers))
        for query, index, given in RARE:
            parameters = {str(number): value for number, value in enumerate(given, 1)}
            plan = sqlite.execute(f"explain query plan {SQLITE[query]}", parameters).fetchall()
            assert f" USING INDEX {index} (" in plan[0][3], (query, plan[0][3])
    finally:
        sqlite.close()


async def test_postgres_finds_what_is_rare_by_its_index(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """The same, also with the plan that serves every value: the planner does not know then that it is rare."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema):
        pass
    await postgres.execute(f"{many(postgres_schema, 'select generate_series(1, 10000) as n')} analyze;")
    queries = load_queries("postgres", schema=postgres_schema, now_ms="0::bigint")
    for query, index, given in RARE:
        parameters = (await postgres.prepare(queries[query])).get_parameters()
        await postgres.execute(f"prepare page ({', '.join(kind.name for kind in parameters)}) as {queries[query]}")
        values = ", ".join("null" if value is None else f"'{value}'" for value in given)
        for mode in ("force_generic_plan", "force_custom_plan"):
            await postgres.execute(f"set plan_cache_mode = {mode}")
            plan = "\n".join(row[0] for row in await postgres.fetch(f"explain execute page ({values})"))
            assert f" {index} " in plan, (query, mode, plan)
        await postgres.execute("deallocate page")


async def test_a_look_at_an_idle_queue_reads_no_table(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """Whatever is ready in others: a waiting worker looks every few seconds. In a generic plan, and in one for it."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema):
        pass
    await postgres.execute(
        f"insert into {postgres_schema}.runtime_queue (attempt_id, queue, priority, enqueued_at_ms) "
        f"select 'a' || n, 'busy', 0, 0 from generate_series(1, 50000) as n; "
        f"analyze {postgres_schema}.runtime_queue"
    )
    query = load_queries("postgres", schema=postgres_schema, now_ms="0::bigint")["attempts.next"]
    await postgres.execute(f"prepare look (text) as {query}")
    for mode in ("force_generic_plan", "force_custom_plan"):
        await postgres.execute(f"set plan_cache_mode = {mode}")
        plan = "\n".join(row[0] for row in await postgres.fetch("""explain execute look ('["idle"]')"""))
        assert "Seq Scan" not in plan, (mode, plan)
        assert "idx_runtime_queue_ready" in plan, (mode, plan)
        (blocks,) = re.findall(
            r"Buffers: shared hit=(\d+)",
            "\n".join(
                row[0] for row in await postgres.fetch("""explain (analyze, buffers) execute look ('["idle"]')""")
            ).split("Planning")[0],
        )[:1]
        assert int(blocks) < 20, blocks


BURST = """
insert into {schema}.runtime_attempts
       (attempt_id, run_id, attempt_no, status, queue, lease_version, lease_id, finished_at_ms)
select 'a' || n, 'r' || n % 1000, 1, case n % 4 when 0 then 'leased' when 1 then 'completed' else 'queued' end, 'busy',
       1, 'l' || n, case n % 4 when 1 then n end
  from generate_series(1, {count}) as n;
insert into {schema}.runtime_queue (attempt_id, queue, priority, enqueued_at_ms, retry_at_ms)
select 'a' || n, 'busy', 0, 0, case n % 4 when 3 then n end from generate_series(1, {count}) as n where n % 4 in (2, 3);
insert into {schema}.runtime_leases
       (lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version)
select 'l' || n, 'a' || n, 'w', n, 0, 1 from generate_series(1, {count}) as n where n % 4 = 0;
insert into {schema}.runtime_finished (finished_at_ms, attempt_id, status)
select n, 'a' || n, 'completed' from generate_series(1, {count}) as n where n % 4 = 1;
"""
"""Of everything a part, without a pause in which it could be analyzed."""

GIVEN = {
    "attempts.cancel": ("a4", 9000),
    "attempts.cancel_many": ('["a1", "a2", "a4"]', None, "busy", None, 0, 9000),
    "attempts.complete": ("a4", 1, None, 9000, "l4"),
    "attempts.complete_many": ("{a4,1,l4,null}", 9000),
    "attempts.complete_shared": ("{a4,1,l4,null}", 9000),
    "attempts.depth": ("busy", 100, 9000),
    "attempts.enqueue": ("new", "r", None, "busy", 0, None, 1, None, 9000),
    "attempts.enqueue_many": (
        '[{"attempt_id": "new", "run_id": "r", "queue": "q", "priority": 0, "max_attempts": 1}]',
        0,
    ),
    "attempts.enqueue_new": (
        '[{"attempt_id": "n", "run_id": "r", "queue": "q", "priority": 0, "max_attempts": 1}]',
        0,
        1,
    ),
    "attempts.fail": ("a4", 1, "boom", None, 9000, "l4"),
    "attempts.find": ("a4",),
    "attempts.list_all": ("a2", 100, None),
    "attempts.list_by_run": ("r4", "", 100, None, None),
    "attempts.list_completed": ("completed", "a2", 100, None),
    "attempts.list_dispatchable": ("busy", 100, 9000),
    "attempts.list_ended": ("failed", "", 100, None),
    "attempts.list_held": ("leased", "", 100, None),
    "attempts.list_waiting": ("queued", "", 100, None),
    "attempts.look_through": ("", 1000),
    "attempts.look_through_queue": ("", 1000),
    "attempts.mend": ('["a1", "a2", "a3"]',),
    "attempts.next": ('["busy", "idle"]',),
    "attempts.prune": (0, 100, 9000),
    "attempts.prune_many": (0, '[{"finished_at_ms": 1, "attempt_id": "a1"}]', 9000),
    "attempts.retry": ("a4",),
    "attempts.retry_many": ('["a1", "a2", "a4"]', "failed", "busy", "boom", 0, 9000),
    "attempts.seen_many": ('["a1", "a2", "a3"]',),
    "attempts.sift_ended": ("a2", "failed", "busy", "boom", 0, 9000, 1000),
    "attempts.sift_held": ("a2", None, "busy", None, 0, 9000, 1000),
    "attempts.sift_old": ("a1", None, "busy", None, 0, 9000, 1000, 1),
    "attempts.sift_waiting": ("a2", None, "busy", None, 0, 9000, 1000),
    "attempts.start": ("a4", 1, "l4", 9000),
    "attempts.stored": ("a4",),
    "attempts.stored_many": ('["a1", "a2", "a3"]',),
    "attempts.unqueue": ('["a1", "a2", "a3"]',),
    "leases.claim": ('["busy", "idle"]', "w", 1000, "claim", 9000, 1),
    "leases.claim_attempt": ("a2", "w", 1000, "claim", 9000),
    "leases.heartbeat": ("l4", 1, 1000, 0, "a4"),
    "leases.heartbeat_many": ('[{"lease_id": "l4", "attempt_id": "a4", "token": 1}]', 1000, 0),
    "leases.held_many": ('["a1", "a2", "a4"]', 9000),
    "leases.holder": ("a4", 9000),
    "leases.list_silent": (100, 9000, 0),
    "leases.park": ("l4", "cannot be read", 9000, "a4"),
    "leases.release": ("a4", 1, None, 9000, "l4"),
    "leases.requeue_expired": (100, 9000, 0, None),
    "step_reports.record": ("a4", 1, "w", "x", "done", "t", None, 9000, "l4"),
    "step_reports.recorded": ("a4", 1, "t", "l4"),
}
"""What each query on attempts is asked with, but for those that read all that waits or is held."""

AT_ONCE = 60_000


async def prepared(connection: asyncpg.Connection, queries: Mapping[str, str]) -> dict[str, str]:
    """Every query under a name of its own, and how it is executed, as often as it takes to keep one plan."""
    executed = {}
    for number, name in enumerate(sorted(queries)):
        if (given := GIVEN.get(name.split(" ")[0])) is None:
            continue
        kinds = ", ".join(kind.name for kind in (await connection.prepare(queries[name])).get_parameters())
        await connection.execute(f"prepare p{number} ({kinds}) as {queries[name]}")
        values = ", ".join("null" if value is None else f"'{value}'" for value in given)
        executed[name] = f"execute p{number} ({values})"
        for _ in range(7):
            await connection.fetch(f"explain {executed[name]}")
    return executed


def read_through(plan: str) -> set[str]:
    """The tables of ours that a plan reads from end to end, but for those that are almost empty here."""
    return set(re.findall(r"Seq Scan on (runtime_\w+)", plan)) - {"runtime_step_reports", "runtime_interrupts"}


async def test_postgres_reads_no_table_from_end_to_end(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """
    Nothing of what workers do, in whichever way it was planned: when nothing was there, and the plan is kept, or after
    a burst that nobody has analyzed yet, or afterwards.
    """
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema):
        pass
    queries = load_queries("postgres", schema=postgres_schema, now_ms="0::bigint")
    found: dict[tuple[str, str, str], set[str]] = {}
    async with contextlib.AsyncExitStack() as stack:
        old: dict[str, tuple[asyncpg.Connection, dict[str, str]]] = {}
        for mode in ("auto", "force_generic_plan"):
            connection = await asyncpg.connect(postgres_url)
            stack.push_async_callback(connection.close)
            await connection.execute(f"set plan_cache_mode = {mode}")
            old[mode] = connection, await prepared(connection, queries)
        await postgres.execute(BURST.format(schema=postgres_schema, count=AT_ONCE))
        for when in ("in a burst", "after it"):
            for mode, (connection, executed) in old.items():
                for name, execute in executed.items():
                    plan = "\n".join(row[0] for row in await connection.fetch(f"explain {execute}"))
                    if tables := read_through(plan):
                        found[name, mode, when] = tables
            for mode in ("force_custom_plan", "force_generic_plan"):
                connection = await asyncpg.connect(postgres_url)
                stack.push_async_callback(connection.close)
                await connection.execute(f"set plan_cache_mode = {mode}")
                for name, execute in (await prepared(connection, queries)).items():
                    plan = "\n".join(row[0] for row in await connection.fetch(f"explain {execute}"))
                    if tables := read_through(plan):
                        found[name, mode, f"{when}, new"] = tables
            await postgres.execute(
                f"analyze {postgres_schema}.runtime_attempts, {postgres_schema}.runtime_queue, "
                f"{postgres_schema}.runtime_leases, {postgres_schema}.runtime_finished"
            )
    # Of half of all that waits there is no quicker way.
    assert {name for name, *_ in found} <= {"leases.claim 10000"}, found


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_postgres_compares_no_two_lists_row_by_row(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection, mode: str
) -> None:
    """
    Not even where a vacuum has found a table empty, as it often does: PostgreSQL takes it to have one row from then on,
    in whatever order it joins it.
    """
    tables = ", ".join(f"{postgres_schema}.runtime_{name}" for name in ("attempts", "queue", "leases", "finished"))
    queries = load_queries("postgres", schema=postgres_schema, now_ms="0::bigint")
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as repo:
        await repo.attempts.enqueue_many([NewAttempt("run") for _ in range(2000)])
        await repo.leases.claim("worker", limit=2000)
        await postgres.execute(f"delete from {postgres_schema}.runtime_attempts")
        await postgres.execute(f"delete from {postgres_schema}.runtime_leases")
        # A transaction of another test's may keep the dead rows for a moment.
        async with asyncio.timeout(60):
            while await postgres.fetchval(f"select pg_relation_size('{postgres_schema}.runtime_attempts')"):
                await postgres.execute(f"vacuum analyze {tables}")
        await repo.attempts.enqueue_many([NewAttempt("run") for _ in range(2000)])
    await postgres.execute(f"set plan_cache_mode = {mode}")
    await postgres.execute(f"prepare take as {queries['leases.claim 1000']}")
    await postgres.execute(f"prepare keep as {queries['leases.heartbeat_many']}")
    await postgres.execute(f"prepare sweep as {queries['leases.requeue_expired']}")
    await postgres.execute(f"prepare finish as {queries['attempts.complete_many']}")
    await postgres.execute(f"prepare share as {queries['attempts.complete_shared']}")

    async def compared_in_vain(execute: str) -> int:
        plan = "\n".join(row[0] for row in await postgres.fetch(f"explain (analyze, timing off) execute {execute}"))
        return sum(map(int, re.findall(r"Rows Removed by Join Filter: (\d+)", plan)))

    take = """take ('["default"]', 'w', 1000, '{}', null, 1000)"""
    assert await compared_in_vain(take.format("one")) < 10_000
    given = await postgres.fetchval(
        "select json_agg(json_build_object('attempt_id', attempt_id, 'token', version, 'lease_id', lease_id))::text"
        f" from {postgres_schema}.runtime_leases"
    )
    assert given.count("token") == 1000
    assert await compared_in_vain(f"keep ('{given}', 1000, null)") < 10_000
    given = await postgres.fetchval(
        "select (array_agg(attempt_id) || array_agg(version::text) || array_agg(lease_id)"
        f" || array_agg(null::text))::text from {postgres_schema}.runtime_leases"
    )
    await postgres.execute("begin")
    assert await compared_in_vain(f"share ('{given}', null)") < 10_000
    await postgres.execute("rollback")
    assert await compared_in_vain(f"finish ('{given}', null)") < 10_000
    assert await compared_in_vain(take.format("two")) < 10_000
    assert await compared_in_vain("sweep (1000, 100000, 0, null)") < 10_000
    assert await postgres.fetchval(f"select count(*) from {postgres_schema}.runtime_queue") == 1000


def test_every_query_on_attempts_is_looked_at() -> None:
    """But for those that read all that waits or is held, as they say, and what has no plan."""
    names = {name.split(" ")[0] for name in POSTGRES if name.split(".")[0] in ("attempts", "leases")}
    held = {"leases.give_back", "leases.list", "leases.list_by_worker"}
    assert names - GIVEN.keys() == {"attempts.stats", "attempts.vacuum", *held}


MANY_REPORTS = """
insert into {schema}.runtime_step_reports (worker_id, attempt_id, action_id, status, dedupe_token, created_at_ms)
  with recursive numbers (n) as (select 1 union all select n + 1 from numbers where n < 20000)
select 'worker', 'a' || (n % 100), 'x', 'done', 't' || n, n from numbers
"""


async def test_sqlite_reads_no_other_attempts_reports(sqlite: sqlite3.Connection) -> None:
    """A page of reports is looked up by the attempt, with statistics and without."""
    try:
        sqlite.execute(MANY_REPORTS.format(schema="main"))
        for preparation in ("select 1", "analyze"):
            sqlite.execute(preparation).fetchall()
            query = f"explain query plan {SQLITE['step_reports.list']}"
            plan = [row[3] for row in sqlite.execute(query, {"1": "a5", "2": 0, "3": 10})]
            assert "(attempt_id=?)" in plan[0]
    finally:
        sqlite.close()


async def test_postgres_reads_no_other_attempts_reports(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """A page of reports is looked up by the attempt, in a generic plan and in one made for the arguments."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema):
        pass
    await postgres.execute(MANY_REPORTS.format(schema=postgres_schema))
    await postgres.execute(f"analyze {postgres_schema}.runtime_step_reports")
    query = load_queries("postgres", schema=postgres_schema, now_ms="0::bigint")["step_reports.list"]
    await postgres.execute("prepare page as " + re.sub("--.*", "", query))
    for mode in ("force_generic_plan", "force_custom_plan"):
        await postgres.execute(f"set plan_cache_mode = {mode}")
        for arguments in ("'a5', 0, 3", "'a5', 0, 100", "'nobody', 0, 100", "'a5', 19000, 100"):
            lines = [row[0] for row in await postgres.fetch(f"explain (costs off) execute page ({arguments})")]
            conditions = [line for line in lines if "Index Cond" in line]
            assert conditions, lines
            assert all("attempt_id" in line for line in conditions), lines


@pytest.mark.parametrize("texts", [SQLITE, POSTGRES], ids=["sqlite", "postgres"])
def test_every_statement_is_lower_case_and_names_its_columns(texts: dict[str, str]) -> None:
    """No ``select *``, which breaks when a column comes; no capitals outside comments and literals."""
    for name, text in texts.items():
        bare = re.sub(r"--[^\n]*|'(?:[^']|'')*'", "", text)
        assert bare == bare.lower(), name
        assert not re.search(r"(select|returning)\s+(\w+\.)?\*|,\s*(\w+\.)?\*", bare), name


def test_every_name_is_given_once() -> None:
    """A name stands once, or once for each database: a second one would silently replace the first."""
    names = Counter(HEADERS)
    assert [name for name, count in names.items() if count > 1] == []
    both = {name.split(" ")[0] for name in HEADERS if " @" not in name}
    assert not both & {name.split(" ")[0] for name in HEADERS if " @" in name}


def test_every_header_is_read() -> None:
    """No statement is lost, or swallowed by the one before it, for a header that is misspelt."""
    for backend, texts in (("sqlite", SQLITE), ("postgres", POSTGRES)):
        headers = [name for name in HEADERS if " @" not in name or name.endswith(f" @{backend}")]
        assert texts.keys() == {name for header in headers for name in named(header)}


def test_every_query_is_used_and_every_name_in_the_code_exists() -> None:
    """The code names only queries that exist, and there is none that nobody runs."""
    code = "".join(path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.py"))
    nouns = "|".join({name.split(".")[0] for name in HEADERS})
    used = set(re.findall(rf'"((?:{nouns})\.[a-z_]+)"', code))
    assert used == {name.split(" ")[0] for name in SQLITE.keys() | POSTGRES.keys()}


@pytest.mark.parametrize(("count", "bound"), [(1, 1), (2, 10), (10, 10), (11, 100), (10_000, 10_000)])
def test_a_query_is_made_for_at_least_as_many_rows_as_are_wanted(count: int, bound: int) -> None:
    """And for no more than the next of the numbers that its header has."""
    assert bounded("leases.claim", count) == f"leases.claim {bound}"
    assert f"limit {bound}\n" in POSTGRES[f"leases.claim {bound}"]
