"""The named statements: each is understood by both engines, and written in the house's hand."""

import re
import sqlite3
from collections import Counter
from importlib.resources import files
from pathlib import Path

import asyncpg
import pytest

from runtime_repo import PostgresRuntimeRepository, SqliteRuntimeRepository
from runtime_repo.queries import load_queries, split_statements

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


async def test_sqlite_reads_through_a_status_only_to_count_or_sweep(sqlite: sqlite3.Connection) -> None:
    """
    Nothing that workers do costs more for what else is queued, and only the sweep for what else is leased. Without
    statistics SQLite thinks little of an index on the very ids, or of a partial one, where the status is named as well.
    """
    parameters = {str(number): None for number in range(1, 20)}
    reading = set()
    try:
        for name in SQLITE.keys() - CREATING:
            for statement in split_statements(SQLITE[name]):
                plan = sqlite.execute(f"explain query plan {statement}", parameters).fetchall()
                if any("_attempts_status (status=?)" in step[-1] for step in plan):
                    reading.add(name)
    finally:
        sqlite.close()
    assert reading == {"attempts.stats", "leases.requeue_expired", "leases.list_silent"}


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
        f"insert into {postgres_schema}.runtime_attempts (attempt_id, run_id, attempt_no, status, queue) "
        f"select 'a' || n, 'r', 1, 'queued', 'busy' from generate_series(1, 50000) as n; "
        f"analyze {postgres_schema}.runtime_attempts"
    )
    query = load_queries("postgres", schema=postgres_schema, now_ms="0::bigint")["attempts.next"]
    await postgres.execute(f"prepare look (text) as {query}")
    for mode in ("force_generic_plan", "force_custom_plan"):
        await postgres.execute(f"set plan_cache_mode = {mode}")
        plan = "\n".join(row[0] for row in await postgres.fetch("""explain execute look ('["idle"]')"""))
        assert "Seq Scan" not in plan, (mode, plan)
        assert "idx_runtime_attempts_ready" in plan, (mode, plan)
        (blocks,) = re.findall(
            r"Buffers: shared hit=(\d+)",
            "\n".join(
                row[0] for row in await postgres.fetch("""explain (analyze, buffers) execute look ('["idle"]')""")
            ).split("Planning")[0],
        )[:1]
        assert int(blocks) < 20, blocks


async def test_a_sweep_and_a_claim_of_many_read_no_table(
    postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """Each attempt is looked up by its id, whichever plan serves; the sweep reads what is held besides."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema):
        pass
    await postgres.execute(
        f"insert into {postgres_schema}.runtime_attempts (attempt_id, run_id, attempt_no, status, queue) "
        f"select 'a' || n, 'r', 1, case when n < 5000 then 'leased' else 'queued' end, 'busy' "
        f"from generate_series(1, 50000) as n; "
        f"insert into {postgres_schema}.runtime_leases "
        f"(lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version) "
        f"select 'l' || n, 'a' || n, 'w', n, 0, 1 from generate_series(1, 4999) as n; "
        f"analyze {postgres_schema}.runtime_attempts, {postgres_schema}.runtime_leases"
    )
    queries = load_queries("postgres", schema=postgres_schema, now_ms="0::bigint")
    for name, given in {
        "leases.requeue_expired": "100, 9000, 0, null",
        "leases.claim": """'busy', 'w', 1000, '["1", "2"]', 9000""",
        "leases.claim_from_several": """'["busy"]', 'w', 1000, '["1", "2"]', 9000""",
        "leases.heartbeat_many": """'[{"lease_id": "l1", "attempt_id": "a1", "token": 1}]', 1000, 0""",
        "attempts.complete_many": """'[{"lease_id": "l1", "attempt_id": "a1", "token": 1}]', 9000""",
        "attempts.stored_many": """'["a1"]'""",
        "attempts.prune": "0, 100, 9000",
    }.items():
        kinds = ", ".join(kind.name for kind in (await postgres.prepare(queries[name])).get_parameters())
        await postgres.execute(f"prepare many ({kinds}) as {queries[name]}")
        for mode in ("force_generic_plan", "force_custom_plan"):
            await postgres.execute(f"set plan_cache_mode = {mode}")
            plan = "\n".join(row[0] for row in await postgres.fetch(f"explain execute many ({given})"))
            assert not re.search(r"Seq Scan on runtime_attempts(?! held)", plan), (name, mode, plan)
        await postgres.execute("deallocate many")


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
    both = {name.split(" @")[0] for name in HEADERS if " @" not in name}
    assert not both & {name.split(" @")[0] for name in HEADERS if " @" in name}


def test_every_header_is_read() -> None:
    """No statement is lost, or swallowed by the one before it, for a header that is misspelt."""
    for backend, texts in (("sqlite", SQLITE), ("postgres", POSTGRES)):
        expected = {name.split(" @")[0] for name in HEADERS if " @" not in name or name.endswith(f" @{backend}")}
        assert texts.keys() == expected


def test_every_query_is_used_and_every_name_in_the_code_exists() -> None:
    """The code names only queries that exist, and there is none that nobody runs."""
    code = "".join(path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.py"))
    nouns = "|".join({name.split(".")[0] for name in HEADERS})
    used = set(re.findall(rf'"((?:{nouns})\.[a-z_]+)"', code))
    assert used == SQLITE.keys() | POSTGRES.keys()
