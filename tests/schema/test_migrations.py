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
from tests.schema.lab import LEDGER, ONE, TWO, Lab

THREE = (3, "names")
NAMES = "create table {schema}.runtime_names (name text not null primary key);"
FILLED = "insert into {schema}.runtime_names (name) values ('a'), ('b');"


def third(lab: Lab, sql: str = NAMES + FILLED) -> Migration:
    """A third migration, which must lead to one more table."""
    tables = {**lab.migrations[1].catalog.tables, "runtime_names": Table({"name": "text not null"}, ("name",))}
    return Migration(*THREE, sql, Catalog(tables))


@pytest.mark.parametrize("version", [0, 1, 2])
async def test_a_third_migration_is_applied_on_top(lab: Lab, version: int) -> None:
    """Whatever is pending is applied in order, and the next boot finds nothing to do."""
    await lab.reach(version)
    report = await lab.ship([*lab.migrations, third(lab)])
    assert (report.from_version, report.to_version) == (version, 3)
    assert [applied.version for applied in report.applied] == list(range(version + 1, 4))
    assert await lab.recorded() == [ONE, TWO, THREE]
    assert await lab.all("runtime_names") == [{"name": "a"}, {"name": "b"}]

    before = await lab.snapshot()
    assert (await lab.ship([*lab.migrations, third(lab)])).applied == ()
    assert await lab.snapshot() == before


async def test_the_release_before_refuses_what_the_next_has_migrated(lab: Lab) -> None:
    """Two releases side by side: the newer one migrates, the older one says so and touches nothing."""
    await lab.ship([*lab.migrations, third(lab)])
    error = await lab.refused(SchemaTooNewError)
    assert (error.found, error.supported) == (3, 2)


async def test_verify_only_counts_what_is_shipped(lab: Lab) -> None:
    """At version 2 a release that ships 3 is out of date."""
    await lab.reach(2)
    before = await lab.snapshot()
    with pytest.raises(SchemaOutOfDateError) as caught:
        await lab.ship([*lab.migrations, third(lab)], Policy(migrate=False))
    assert (caught.value.found, caught.value.supported) == (2, 3)
    assert await lab.snapshot() == before


CHECK = "select 'a status of x' as what, count(*) as number, min(thread_id) as example from {schema}.runtime_jobs"


@pytest.mark.parametrize("version", [1, 2])
async def test_what_a_migration_could_not_migrate_is_refused(lab: Lab, version: int) -> None:
    """Its own query, beside it, says what and how many; it runs on the version before it."""
    await lab.reach(version)
    await lab.execute("update runtime_jobs set status = 'x'")
    before = (await lab.snapshot()).content
    checked = dataclasses.replace(third(lab), check=f"{CHECK} where status = 'x' and max_attempts = 10;")
    with pytest.raises(MigrationError, match="max_attempts"):
        await lab.ship([*lab.migrations, checked])
    checked = dataclasses.replace(third(lab), check=f"{CHECK} where status = 'x';")
    with pytest.raises(UnsuitableDatabaseError) as caught:
        await lab.ship([*lab.migrations, checked])
    (problem,) = caught.value.problems
    assert problem.startswith("2 rows have a status of x, such as the one of 'thread-1'")
    assert (await lab.snapshot()).content == before
    await lab.execute("update runtime_jobs set status = 'y'")
    assert (await lab.ship([*lab.migrations, checked])).to_version == 3


FAILING = {
    "no SQL": "create tabel nonsense;" + NAMES,
    "first statement": "insert into {schema}.runtime_names (name) values ('early');" + NAMES,
    "last statement": NAMES + FILLED + "update {schema}.runtime_jobs set status = 'x'; drop table {schema}.nowhere;",
    "constraint": NAMES + FILLED + FILLED,
}


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("sql", FAILING.values(), ids=FAILING.keys())
async def test_a_failing_migration_rolls_everything_back(lab: Lab, version: int, sql: str) -> None:
    """The error names the migration and carries the driver's; what came before it in this boot is undone as well."""
    await lab.reach(version)
    before = await lab.snapshot()
    with pytest.raises(MigrationError) as caught:
        await lab.ship([*lab.migrations, third(lab, sql)])
    assert (caught.value.version, caught.value.name) == THREE
    assert isinstance(caught.value.__cause__, lab.driver_error)
    assert (await lab.snapshot()).content == before.content
    assert (await lab.ship([*lab.migrations, third(lab)])).from_version == version


MISLEADING = {
    "no table": "update {schema}.runtime_jobs set status = 'x';",
    "another column": "create table {schema}.runtime_names (nom text not null primary key);",
    "nullable": "create table {schema}.runtime_names (name text primary key); drop index {index};",
    "an index dropped": NAMES + "drop index {index};",
    "ledger row": NAMES + f"delete from {{schema}}.{LEDGER} where version = 2;",
}


@pytest.mark.parametrize("version", [0, 2])
@pytest.mark.parametrize("sql", MISLEADING.values(), ids=MISLEADING.keys())
async def test_a_migration_that_does_not_lead_to_its_catalog_is_rolled_back(lab: Lab, version: int, sql: str) -> None:
    """What was promised is proved before the commit."""
    await lab.reach(version)
    before = await lab.snapshot()
    with pytest.raises(MigrationError) as caught:
        await lab.ship([*lab.migrations, third(lab, sql.replace("{index}", "{schema}.idx_runtime_jobs_status"))])
    assert (caught.value.version, caught.value.name) == THREE
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
    with pytest.raises(ConfigurationError, match="migration 3"):
        third(lab, NAMES + sql)


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
    assert (await lab.ship([*lab.migrations, third(lab, NAMES + sql)])).to_version == 3


async def test_a_stray_brace_fails_the_migration_not_the_database(lab: Lab) -> None:
    """A token that nobody fills in is a mistake in the file."""
    await lab.reach(2)
    before = await lab.snapshot()
    stray = dataclasses.replace(third(lab), sql=NAMES + "insert into {shema}.runtime_names (name) values ('a')")
    with pytest.raises(ConfigurationError, match="shema"):
        await lab.ship([*lab.migrations, stray])
    assert (await lab.snapshot()).content == before.content
