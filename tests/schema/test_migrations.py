"""Migrations that a test ships: applied on top, rolled back when they fail, refused when they cannot be right."""

import dataclasses

import pytest

from runtime_repo import (
    ConfigurationError,
    MigrationError,
    SchemaOutOfDateError,
    SchemaTooNewError,
    UnsuitableDatabaseError,
)
from runtime_repo.catalog import Catalog, Table
from runtime_repo.schema import Migration, Policy
from tests.lab import LEDGER, Lab, PostgresLab, on_postgres
from tests.versions import HISTORY, NEWEST, NEXT, RECORDED

NAMES = "create table {schema}.runtime_names (name text not null primary key);"
FILLED = "insert into {schema}.runtime_names (name) values ('a'), ('b');"


def next_one(lab: Lab, sql: str = NAMES + FILLED) -> Migration:
    """One more migration, which must lead to one more table."""
    tables = {**lab.migrations[-1].catalog.tables, "runtime_names": Table({"name": "text not null"}, ("name",))}
    return Migration(*NEXT, sql, Catalog(tables))


@pytest.mark.parametrize("version", [0, *RECORDED])
async def test_one_more_migration_is_applied_on_top(lab: Lab, version: int) -> None:
    """Whatever is pending is applied in order, and the next boot finds nothing to do."""
    await lab.reach(version)
    report = await lab.ship([*lab.migrations, next_one(lab)])
    assert (report.from_version, report.to_version) == (version, NEXT[0])
    assert [applied.version for applied in report.applied] == list(range(version + 1, NEXT[0] + 1))
    assert await lab.recorded() == [*HISTORY, NEXT]
    assert await lab.all("runtime_names") == [{"name": "a"}, {"name": "b"}]

    before = await lab.snapshot()
    assert (await lab.ship([*lab.migrations, next_one(lab)])).applied == ()
    assert await lab.snapshot() == before


async def test_the_release_before_refuses_what_the_next_has_migrated(lab: Lab) -> None:
    """Two releases side by side: the newer one migrates, the older one says so and touches nothing."""
    await lab.ship([*lab.migrations, next_one(lab)])
    error = await lab.refused(SchemaTooNewError)
    assert (error.found, error.supported) == (NEXT[0], NEWEST)


async def test_verify_only_counts_what_is_shipped(lab: Lab) -> None:
    """A release that ships one more finds the newest of this one out of date."""
    await lab.reach(NEWEST)
    before = await lab.snapshot()
    with pytest.raises(SchemaOutOfDateError) as caught:
        await lab.ship([*lab.migrations, next_one(lab)], Policy(migrate=False))
    assert (caught.value.found, caught.value.supported) == (NEWEST, NEXT[0])
    assert await lab.snapshot() == before


CHECK = "select 'a status of x' as what, count(*) as number, min(thread_id) as example from {schema}.runtime_jobs"


@pytest.mark.parametrize("version", RECORDED)
async def test_what_a_migration_could_not_migrate_is_refused(lab: Lab, version: int) -> None:
    """Its own query, beside it, says what and how many; it runs on the version before it."""
    await lab.reach(version)
    await lab.execute("update runtime_jobs set status = 'x'")
    before = (await lab.snapshot()).content
    checked = dataclasses.replace(next_one(lab), check=f"{CHECK} where status = 'x' and max_attempts = 10;")
    with pytest.raises(MigrationError, match="max_attempts"):
        await lab.ship([*lab.migrations, checked])
    checked = dataclasses.replace(next_one(lab), check=f"{CHECK} where status = 'x';")
    with pytest.raises(UnsuitableDatabaseError) as caught:
        await lab.ship([*lab.migrations, checked])
    (problem,) = caught.value.problems
    assert problem.startswith("2 rows have a status of x, such as the one of 'thread-1'")
    assert (await lab.snapshot()).content == before
    await lab.execute("update runtime_jobs set status = 'y'")
    assert (await lab.ship([*lab.migrations, checked])).to_version == NEXT[0]


FAILING = {
    "no SQL": "create tabel nonsense;" + NAMES,
    "first statement": "insert into {schema}.runtime_names (name) values ('early');" + NAMES,
    "last statement": NAMES + FILLED + "update {schema}.runtime_jobs set status = 'x'; drop table {schema}.nowhere;",
    "constraint": NAMES + FILLED + FILLED,
}


@pytest.mark.parametrize("version", [0, *RECORDED])
@pytest.mark.parametrize("sql", FAILING.values(), ids=FAILING.keys())
async def test_a_failing_migration_rolls_everything_back(lab: Lab, version: int, sql: str) -> None:
    """The error names the migration and carries the driver's; what came before it in this boot is undone as well."""
    await lab.reach(version)
    before = await lab.snapshot()
    with pytest.raises(MigrationError) as caught:
        await lab.ship([*lab.migrations, next_one(lab, sql)])
    assert (caught.value.version, caught.value.name) == NEXT
    assert isinstance(caught.value.__cause__, lab.driver_error)
    assert (await lab.snapshot()).content == before.content
    assert (await lab.ship([*lab.migrations, next_one(lab)])).from_version == version


MISLEADING = {
    "no table": "update {schema}.runtime_jobs set status = 'x';",
    "another column": "create table {schema}.runtime_names (nom text not null primary key);",
    "nullable": "create table {schema}.runtime_names (name text primary key); drop index {index};",
    "an index dropped": NAMES + "drop index {index};",
    "ledger row": NAMES + f"delete from {{schema}}.{LEDGER} where version = {NEWEST};",
}


@pytest.mark.parametrize("version", [0, NEWEST])
@pytest.mark.parametrize("sql", MISLEADING.values(), ids=MISLEADING.keys())
async def test_a_migration_that_does_not_lead_to_its_catalog_is_rolled_back(lab: Lab, version: int, sql: str) -> None:
    """What was promised is proved before the commit."""
    await lab.reach(version)
    before = await lab.snapshot()
    with pytest.raises(MigrationError) as caught:
        await lab.ship([*lab.migrations, next_one(lab, sql.replace("{index}", "{schema}.idx_runtime_jobs_status"))])
    assert (caught.value.version, caught.value.name) == NEXT
    assert (await lab.snapshot()).content == before.content


@pytest.mark.parametrize(
    "sql",
    [
        "commit",
        "COMMIT;",
        "Rollback",
        "begin; create table x (y text); end;",
        "start transaction",
        "savepoint here",
        "create table x (y text);commit;",
        "create table x (y text); -- done;\n  /* now */ Commit /* it */ ;",
        "insert into x values (';'); abort",
    ],
)
async def test_a_migration_that_ends_its_transaction_cannot_be_constructed(lab: Lab, sql: str) -> None:
    """It could not commit together with its ledger row, so it is refused before any database is opened."""
    with pytest.raises(ConfigurationError, match=f"migration {NEXT[0]}"):
        next_one(lab, NAMES + sql)


@pytest.mark.parametrize(
    "sql",
    [
        "insert into {schema}.runtime_names (name) values ('x; commit; y')",
        "-- commit;\ninsert into {schema}.runtime_names (name) values ('it''s; rollback')",
        "/* begin; commit; */ delete from {schema}.runtime_names where name = 'commit'",
        'create table {schema}."commit; rollback" ("begin; end" text); drop table {schema}."commit; rollback"',
    ],
)
async def test_the_words_in_literals_names_and_comments_do_no_harm(lab: Lab, sql: str) -> None:
    """Only a statement can end a transaction."""
    assert (await lab.ship([*lab.migrations, next_one(lab, NAMES + sql)])).to_version == NEXT[0]


async def test_a_stray_brace_fails_the_migration_not_the_database(lab: Lab) -> None:
    """A token that nobody fills in is a mistake in the file."""
    await lab.reach(NEWEST)
    before = await lab.snapshot()
    stray = dataclasses.replace(next_one(lab), sql=NAMES + "insert into {shema}.runtime_names (name) values ('a')")
    with pytest.raises(ConfigurationError, match="shema"):
        await lab.ship([*lab.migrations, stray])
    assert (await lab.snapshot()).content == before.content


@on_postgres
async def test_the_server_soon_notices_that_who_migrates_is_gone(lab: PostgresLab) -> None:
    """A machine that vanishes says nothing; by its own default the server keeps its locks for two hours."""
    settings = [f"tcp_keepalives_{name}" for name in ("idle", "interval", "count")]
    asked = "; ".join(
        f"insert into {{schema}}.runtime_names values ('{name} ' || pg_catalog.current_setting('{name}'))"
        for name in settings
    )
    shipped = next_one(lab)
    await lab.ship([*lab.migrations, dataclasses.replace(shipped, sql=f"{shipped.sql}; {asked};")])
    told = [row["name"] for row in await lab.all("runtime_names")]
    assert {f"{name} {seconds}" for name, seconds in zip(settings, (10, 5, 3), strict=True)} <= {*told}
