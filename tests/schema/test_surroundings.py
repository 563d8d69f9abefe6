"""What a database, a role or another user brings: refused by name where a promise could not be kept, and never run."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from runtime_repo import (
    Difference,
    ForeignSchemaError,
    PostgresRuntimeRepository,
    SchemaDriftError,
    SchemaReport,
    SchemaStatus,
    UnsuitableDatabaseError,
)
from runtime_repo.queries import fill
from runtime_repo.schema import Policy, inspect_schema, load_migrations
from tests.lab import LEDGER, TWO, Lab, PostgresLab, SqliteLab, on_postgres, on_sqlite
from tests.versions import HISTORY, NEWEST, RECORDED

TOKENS = {"schema": "runtime", "now_ms": "0"}


@dataclass(frozen=True)
class Neighbours:
    """A database of the test's own, and two roles that may create schemas in it."""

    url: str
    admin: asyncpg.Connection
    us: str
    stranger: str

    def as_role(self, role: str) -> str:
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=f"{role}:secret@{parts.netloc.rpartition('@')[2]}"))

    async def run(self, role: str, sql: str) -> None:
        connection = await asyncpg.connect(self.as_role(role))
        try:
            await connection.execute(sql)
        finally:
            await connection.close()

    async def boot(self, role: str | None = None, **options: object) -> SchemaReport:
        url = self.url if role is None else self.as_role(role)
        async with PostgresRuntimeRepository(url, **options) as repository:  # type: ignore[arg-type]
            return repository.boot_report


@asynccontextmanager
async def database(lab: PostgresLab, options: str = "") -> AsyncIterator[Neighbours]:
    name = f"{lab.place.schema}_db"
    us, stranger = f"{lab.place.schema}_us", f"{lab.place.schema}_stranger"
    await lab.run_outside(f"create database {name} {options}")
    try:
        for role in (us, stranger):
            await lab.run_outside(f"create role {role} login password 'secret'")
            await lab.run_outside(f"grant create on database {name} to {role}")
        url = urlunsplit(urlsplit(lab.place.where)._replace(path=f"/{name}"))
        admin = await asyncpg.connect(url)
        try:
            yield Neighbours(url, admin, us, stranger)
        finally:
            await admin.close()
    finally:
        await lab.run_outside(f"drop database {name} with (force)")
        for role in (us, stranger):
            await lab.run_outside(f"drop role if exists {role}")


@pytest.fixture
async def neighbours(lab: PostgresLab) -> AsyncIterator[Neighbours]:
    async with database(lab) as neighbours:
        yield neighbours


@on_postgres
async def test_an_encoding_other_than_utf8_is_refused(lab: PostgresLab) -> None:
    """A payload may hold any character; the error names both encodings, and nothing was made."""
    async with database(lab, "encoding 'LATIN1' template template0 lc_collate 'C' lc_ctype 'C'") as latin:
        with pytest.raises(UnsuitableDatabaseError, match="LATIN1, expected UTF8") as caught:
            await latin.boot()
        assert len(caught.value.problems) == 1
        assert not await latin.admin.fetchval("select to_regnamespace('runtime') is not null")


@on_postgres
@pytest.mark.parametrize("version", [0, NEWEST])
@pytest.mark.parametrize("migrate", [True, False])
async def test_a_path_with_another_schema_before_pg_catalog_is_refused(
    lab: PostgresLab, version: int, *, migrate: bool
) -> None:
    """What is planted there would run as whoever calls a verb."""
    await lab.reach(version)
    settings = {"search_path": "public, pg_catalog"}
    error = await lab.refused(UnsuitableDatabaseError, server_settings=settings, migrate=migrate)
    assert "public, pg_catalog" in str(error)


@on_postgres
@pytest.mark.parametrize(
    "path",
    [
        "later, pg_catalog",
        '"La""ter", PG_CATALOG',
        '"$user", "pg_catalog"',
        "pg_catalog_2, pg_catalog",
        "pg_temp, later, pg_catalog",
    ],
)
async def test_a_schema_before_pg_catalog_that_comes_later_is_refused(lab: PostgresLab, path: str) -> None:
    """The path is judged as it is written, not by which of its schemas exist."""
    await lab.boot()
    for migrate in (True, False):
        error = await lab.refused(UnsuitableDatabaseError, server_settings={"search_path": path}, migrate=migrate)
        assert path in str(error)


@on_postgres
@pytest.mark.parametrize(
    "path",
    ["", "pg_catalog", "public", "pg_catalog, public", '"$user", public', "pg_temp, pg_catalog", '"my pg_catalog"'],
)
async def test_a_path_with_pg_catalog_first_is_served(lab: PostgresLab, path: str) -> None:
    """Whether it is named or not, and beside a temporary table too."""

    async def init(connection: asyncpg.Connection) -> None:
        await connection.execute("create temporary table t (x text)")

    for _ in range(2):
        report = await lab.boot(server_settings={"search_path": path}, init=init)
        assert (report.to_version, report.tolerated) == (NEWEST, ())


@on_postgres
@pytest.mark.parametrize("table", [LEDGER, "runtime_jobs"])
async def test_row_security_that_applies_is_refused(neighbours: Neighbours, table: str) -> None:
    """Not an empty store, and not somebody else's tables; with a warned boot too."""
    await neighbours.boot(neighbours.us)
    change = f"alter table runtime.{table} enable row level security, force row level security"
    await neighbours.run(neighbours.us, change)
    for options in ({}, {"migrate": False}, {"on_drift": "warn"}):
        with pytest.raises(UnsuitableDatabaseError, match=table):
            await neighbours.boot(neighbours.us, **options)
    tolerated = (await neighbours.boot(on_drift="warn")).tolerated
    told = Difference(f"row security on {table}", None, "it does not apply to this role")
    assert told in tolerated


@on_postgres
@pytest.mark.parametrize("version", [0, *RECORDED])
async def test_how_the_server_spells_names_does_not_matter(lab: PostgresLab, version: int) -> None:
    """quote_all_identifiers changes the text of every definition, and none of the definitions."""
    await lab.reach(version)
    for value in ("on", "off", "on"):
        assert (await lab.boot(server_settings={"quote_all_identifiers": value})).tolerated == ()


@on_postgres
async def test_a_strangers_schema_is_not_migrated(neighbours: Neighbours) -> None:
    """Who owns the schema may plant a trigger once we have laid our tables."""
    await neighbours.run(
        neighbours.stranger, f"create schema runtime; grant all on schema runtime to {neighbours.us}, public"
    )
    for role in (neighbours.us, None):
        with pytest.raises(UnsuitableDatabaseError, match=neighbours.stranger):
            await neighbours.boot(role)
    assert await neighbours.admin.fetchval("select count(*) from pg_tables where schemaname = 'runtime'") == 0


@on_postgres
async def test_a_strangers_schema_is_told_of(neighbours: Neighbours) -> None:
    """Served, as whoever may only read has to be served, and reported at every boot."""
    await neighbours.boot(neighbours.stranger)
    everything = f"all tables in schema runtime to {neighbours.us}"
    await neighbours.run(
        neighbours.stranger, f"grant usage on schema runtime to {neighbours.us}; grant select on {everything}"
    )
    for role in (neighbours.us, None):
        (told,) = (await neighbours.boot(role)).tolerated
        assert told.object == "schema runtime"
        assert neighbours.stranger in str(told.found)


@on_postgres
@pytest.mark.parametrize("trust", ["its own", "a role that it belongs to", "the database's owner", "a superuser"])
async def test_a_trusted_owner_is_no_stranger(neighbours: Neighbours, trust: str) -> None:
    """Ours, our group's, the database's or a superuser's schema is migrated and served without a word."""
    us, other = neighbours.us, neighbours.stranger
    await neighbours.admin.execute(
        {
            "its own": f"create schema runtime authorization {us}",
            "a role that it belongs to": f"create schema runtime authorization {other}; grant {other} to {us}",
            "the database's owner": f"create schema runtime authorization {other};"
            f"alter database {urlsplit(neighbours.url).path[1:]} owner to {other}",
            "a superuser": "create schema runtime",
        }[trust]
    )
    await neighbours.admin.execute(f"grant all on schema runtime to {us}")
    for _ in range(2):
        assert (await neighbours.boot(us)).tolerated == ()


@on_postgres
@pytest.mark.parametrize("volatility", ["volatile", "immutable"])
@pytest.mark.parametrize("migrate", [True, False])
async def test_a_view_on_the_ledgers_name_is_refused_unread(
    neighbours: Neighbours, volatility: str, *, migrate: bool
) -> None:
    """To plan a statement that names it runs an immutable function, so it is not even named."""
    await neighbours.run(
        neighbours.stranger,
        f"""
        create schema runtime; grant usage on schema runtime to public;
        create table runtime.loot (who text); grant all on runtime.loot to public;
        create function runtime.evil() returns int language plpgsql {volatility} as $$ begin
          perform pg_notify('loot', current_user); return 1; end $$;
        create view runtime.{LEDGER} as select 1 as version, 'x'::text as name, runtime.evil()::bigint as applied_at_ms
         where runtime.evil() = 1;
        grant select on runtime.{LEDGER} to public;
        """,
    )
    loot: list[object] = []
    await neighbours.admin.add_listener("loot", lambda *words: loot.append(words[3]))
    for role in (neighbours.us, None):
        with pytest.raises(ForeignSchemaError) as caught:
            await neighbours.boot(role, migrate=migrate)
        assert caught.value.tables == (LEDGER,)
    await neighbours.admin.execute("select 1")
    assert loot == []


LEDGER_TABLE = (
    f"create table runtime.{LEDGER} (version int primary key, name text not null, applied_at_ms bigint not null);"
)
TRAP = """
create function runtime.evil() returns int language plpgsql immutable as $$ begin
  perform pg_notify('loot', current_user); return 1; end $$;
"""
PLANTED_LEDGERS = {
    "index": LEDGER_TABLE + f"create index on runtime.{LEDGER} ((runtime.evil() + version))",
    "partial index": LEDGER_TABLE + f"create index on runtime.{LEDGER} (name) where version > runtime.evil()",
    "statistics": LEDGER_TABLE
    + f"create statistics runtime.s on (runtime.evil() + version), name from runtime.{LEDGER}",
    "nothing yet": LEDGER_TABLE + f"insert into runtime.{LEDGER} values (2, '{TWO[1]}', 0)",
    "materialized view": f"create materialized view runtime.{LEDGER} as"
    " select 1 as version, 'x'::text as name, 1::bigint as applied_at_ms;"
    f"create index on runtime.{LEDGER} ((runtime.evil() + version))",
}


@on_postgres
@pytest.mark.parametrize("planted", PLANTED_LEDGERS)
@pytest.mark.parametrize("is_theirs", [True, False], ids=["a stranger's schema", "a trusted schema"])
async def test_a_planted_ledger_is_refused_unread(neighbours: Neighbours, planted: str, *, is_theirs: bool) -> None:
    """To plan a statement that names a table folds the functions in expressions of its indexes and statistics."""
    us, stranger = neighbours.us, neighbours.stranger
    await neighbours.admin.execute(
        f"create schema runtime authorization {stranger if is_theirs else 'current_user'};"
        f"grant all on schema runtime to {stranger}; grant usage on schema runtime to public"
    )
    await neighbours.run(stranger, f"{TRAP} {PLANTED_LEDGERS[planted]}; grant select on runtime.{LEDGER} to public")
    loot: list[object] = []
    await neighbours.admin.add_listener("loot", lambda *words: loot.append(words[3]))
    for role in (us, None):
        for options in ({}, {"migrate": False}, {"on_drift": "warn"}):
            with pytest.raises((ForeignSchemaError, UnsuitableDatabaseError), match=LEDGER):
                await neighbours.boot(role, **options)
    await neighbours.admin.execute("select 1")
    assert loot == []


@on_postgres
@pytest.mark.parametrize(
    "trap",
    [
        f"index trap on runtime.{LEDGER} ((runtime.evil() + version))",
        f"index trap on runtime.{LEDGER} (name) where version > runtime.evil()",
        f"statistics runtime.trap on (runtime.evil() + version), name from runtime.{LEDGER}",
        "statistics runtime.trap on (runtime.evil() + created_at_ms), status from runtime.runtime_jobs",
    ],
)
async def test_a_trap_in_a_strangers_store_is_refused_unread(neighbours: Neighbours, trap: str) -> None:
    """Although all the rest is as it has to be; the trap is named."""
    await neighbours.boot(neighbours.stranger)
    await neighbours.run(
        neighbours.stranger,
        f"{TRAP} create {trap};"
        "grant usage on schema runtime to public; grant all on all tables in schema runtime to public",
    )
    loot: list[object] = []
    await neighbours.admin.add_listener("loot", lambda *words: loot.append(words[3]))
    for role in (neighbours.us, None):
        for options in ({}, {"migrate": False}, {"on_drift": "warn"}):
            with pytest.raises(UnsuitableDatabaseError, match=f"{trap.split()[0]} trap on"):
                await neighbours.boot(role, **options)
    await neighbours.admin.execute("select 1")
    assert neighbours.us not in loot
    assert await neighbours.admin.fetchval("select current_user") not in loot


@on_postgres
@pytest.mark.parametrize("version", RECORDED)
async def test_a_strangers_tables_in_a_trusted_schema_are_told_of(neighbours: Neighbours, version: int) -> None:
    """Whoever may create in the schema may own what is named as ours: served and reported, but not migrated."""
    us, stranger = neighbours.us, neighbours.stranger
    await neighbours.admin.execute(f"create schema runtime; grant all on schema runtime to {us}, {stranger}")
    sql = "".join(fill(migration.sql, TOKENS) for migration in load_migrations("postgres")[:version])
    rows = ", ".join(f"({number}, '{name}', 0)" for number, name in HISTORY[:version])
    await neighbours.run(stranger, f"{LEDGER_TABLE} insert into runtime.{LEDGER} values {rows}; {sql}")
    await neighbours.run(stranger, f"grant select on all tables in schema runtime to {us}")
    tables = load_migrations("postgres")[version - 1].catalog.tables
    if version < NEWEST:
        with pytest.raises(UnsuitableDatabaseError, match=stranger):
            await neighbours.boot(us)
        return
    for _ in range(2):
        tolerated = (await neighbours.boot(us)).tolerated
        assert [told.object for told in tolerated] == sorted(f"table {name}" for name in tables)
        assert all(stranger in str(told.found) for told in tolerated)


@on_postgres
async def test_one_table_of_a_strangers_is_told_of(neighbours: Neighbours) -> None:
    """A warm boot sees the owner of each table."""
    await neighbours.boot(neighbours.us)
    await neighbours.admin.execute(f"alter table runtime.runtime_jobs owner to {neighbours.stranger}")
    (told,) = (await neighbours.boot(neighbours.us)).tolerated
    assert told.object == "table runtime_jobs"


STRANGERS_EXPRESSIONS = {
    "check constraint": "add constraint c check (runtime.evil() = 1)",
    "default": "add column x integer default runtime.evil()",
    "generated column": "add column x integer generated always as (runtime.evil()) stored",
    "index": "alter status set not null; create index i on runtime.runtime_jobs ((runtime.evil()))",
    "partial index": "alter status set not null; create index i on runtime.runtime_jobs (status) where status <> ''",
    "domain": "add column x runtime.positive default 1",
}


@on_postgres
@pytest.mark.parametrize("planted", STRANGERS_EXPRESSIONS)
async def test_a_strangers_expression_on_a_table_of_ours_is_drift(neighbours: Neighbours, planted: str) -> None:
    """A verb would run it; the same of a trusted owner's is tolerated."""
    owner = neighbours.stranger
    await neighbours.boot(owner)
    await neighbours.run(
        owner,
        f"{TRAP} create domain runtime.positive as int check (value > 0);"
        f"alter table runtime.runtime_jobs {STRANGERS_EXPRESSIONS[planted]};"
        "grant usage on schema runtime to public; grant all on all tables in schema runtime to public",
    )
    assert [told.expected for told in (await neighbours.boot(owner)).tolerated] == [None]
    for role in (neighbours.us, None):
        for migrate in (True, False):
            with pytest.raises(SchemaDriftError, match="runtime_jobs"):
                await neighbours.boot(role, migrate=migrate)


@on_postgres
async def test_a_strangers_plain_column_and_index_are_tolerated(neighbours: Neighbours) -> None:
    """They hold no expression."""
    await neighbours.boot(neighbours.stranger)
    await neighbours.run(
        neighbours.stranger,
        "alter table runtime.runtime_jobs add column note text;"
        "create index mine on runtime.runtime_jobs (note) include (status);"
        "grant usage on schema runtime to public; grant all on all tables in schema runtime to public",
    )
    told = [difference.object for difference in (await neighbours.boot(neighbours.us)).tolerated]
    assert told == ["column runtime_jobs.note", "index mine on runtime_jobs", "schema runtime"]


@on_postgres
async def test_the_message_names_a_table_whose_rows_are_hidden_once(neighbours: Neighbours) -> None:
    """The ledger, too."""
    await neighbours.boot(neighbours.us)
    change = f"alter table runtime.{LEDGER} enable row level security, force row level security"
    await neighbours.run(neighbours.us, change)
    with pytest.raises(UnsuitableDatabaseError) as caught:
        await neighbours.boot(neighbours.us)
    assert str(caught.value).count(LEDGER) == 1


@on_postgres
@pytest.mark.parametrize("volatility", ["volatile", "immutable"])
async def test_a_policy_on_the_ledger_is_not_run(neighbours: Neighbours, volatility: str) -> None:
    """It would run for whoever reads the table, so a ledger that hides rows is not read."""
    await neighbours.boot(neighbours.stranger)
    await neighbours.run(
        neighbours.stranger,
        f"""
        grant usage on schema runtime to public; grant select on all tables in schema runtime to public;
        create function runtime.evil(integer) returns boolean language plpgsql {volatility} as $$ begin
          perform pg_notify('loot', current_user); return true; end $$;
        create policy trap on runtime.{LEDGER} using (runtime.evil(1) and runtime.evil(version));
        alter table runtime.{LEDGER} enable row level security;
        """,
    )
    loot: list[object] = []
    await neighbours.admin.add_listener("loot", lambda *words: loot.append(words[3]))
    for migrate in (True, False):
        with pytest.raises(UnsuitableDatabaseError, match=LEDGER):
            await neighbours.boot(neighbours.us, migrate=migrate)
    await neighbours.admin.execute("select 1")
    assert loot == []


@on_sqlite
async def test_a_view_without_end_on_the_ledgers_name_is_refused_unread(lab: SqliteLab) -> None:
    """To read it would fill the memory."""
    await lab.execute(
        f"create view {LEDGER} as with recursive n (version) as (select 1 union all select version + 1 from n)"
        " select version, 'x' as name, 1 as applied_at_ms from n"
    )
    for migrate in (True, False):
        assert (await lab.refused(ForeignSchemaError, migrate=migrate)).tables == (LEDGER,)


async def inspected(lab: Lab, **policy: object) -> SchemaStatus:
    """What a look says, which leaves everything as it was."""
    before = await lab.snapshot()
    async with lab.opened() as opened:
        status = await inspect_schema(opened, lab.migrations, Policy(**policy))  # type: ignore[arg-type]
    assert await lab.snapshot() == before
    assert json.loads(json.dumps(status.as_dict())).keys() == status.as_dict().keys()
    return status


@pytest.mark.parametrize("version", RECORDED)
async def test_an_inspection_says_what_a_boot_would_do(lab: Lab, version: int) -> None:
    """Found, supported and pending; a boot that may not migrate would be refused."""
    await lab.reach(version)
    pending = tuple(name for _, name in HISTORY[version:])
    assert await inspected(lab) == SchemaStatus(version, NEWEST, pending, (), None)
    refusal = (await inspected(lab, migrate=False)).refusal
    assert (refusal is None) == (version == NEWEST)


async def test_an_inspection_tells_of_every_difference(lab: Lab) -> None:
    """Drift and what is extra, each with its object, and the refusal in a boot's own words."""
    await lab.reach(NEWEST)
    await lab.execute("drop index idx_runtime_jobs_status; alter table runtime_jobs add column note text")
    status = await inspected(lab)
    assert [difference.object for difference in status.differences] == [
        "index idx_runtime_jobs_status on runtime_jobs",
        "column runtime_jobs.note",
    ]
    assert "idx_runtime_jobs_status" in str(status.refusal)
    assert (await inspected(lab, on_drift="warn")).refusal is None
    assert status.as_dict()["differences"][1] == {
        "object": "column runtime_jobs.note",
        "expected": None,
        "found": "text",
    }


async def test_an_inspection_of_nothing_and_of_something_foreign(lab: Lab) -> None:
    """An empty store is not current, and somebody else's table is said to be that."""
    assert (await lab.rows("select 1 as one")) == [{"one": 1}]
    await lab.execute("create table jobs (x text)")
    status = await inspected(lab)
    assert (status.found, status.pending, status.refusal) == (0, tuple(name for _, name in HISTORY), None)
    await lab.execute("create table runtime_jobs (x text)")
    assert "runtime_jobs" in str((await inspected(lab)).refusal)
