"""The catalogs that ship with the migrations are what the migrations lead to, on every way there."""

from pathlib import Path

import pytest

import runtime_repo
from runtime_repo.catalog import Catalog, compare
from tests.catalogs import fresh_catalogs
from tests.lab import LEDGER, ONE, TWO, Lab, on_postgres
from tests.versions import HISTORY, NEWEST, RECORDED

POSTGRES_COLUMNS = """
select table_name, column_name, data_type, is_nullable, is_generated,
       case when column_default like 'nextval(%' or is_identity = 'YES' then 'auto' else column_default end as value
  from information_schema.columns
 where table_schema = current_schema
   and not (table_name = 'runtime_schema_migrations' and column_name = 'version')
 order by 1, 2
"""
POSTGRES_INDEXES = """
select tablename, regexp_replace(indexdef, 'INDEX \\S+ ON', 'INDEX ON') as definition
  from pg_indexes
 where schemaname = current_schema
 order by 1, 2
"""
POSTGRES_CONSTRAINTS = """
select conrelid::regclass::text as relation, contype::text as kind, pg_get_constraintdef(oid) as definition
  from pg_constraint
 where connamespace = to_regnamespace(current_schema)::oid
   and contype <> 'n'
 order by 1, 2, 3
"""


async def test_the_shipped_catalogs_are_what_fresh_migrations_lead_to(lab: Lab) -> None:
    """Beside every migration stands its catalog, and its text is the one that tests/catalogs.py makes."""
    folder = Path(runtime_repo.__file__).parent / "migrations" / lab.backend
    shipped = {file.name: file.read_text("utf-8") for file in folder.glob("*.json")}
    assert await fresh_catalogs(lab.database()) == shipped
    assert {name.removesuffix(".catalog.json") for name in shipped} == {file.stem for file in folder.glob("*.sql")}


async def test_both_backends_ship_the_same_history(lab: Lab) -> None:
    """A version has one name wherever it is applied."""
    assert [(migration.version, migration.name) for migration in lab.migrations] == HISTORY
    assert HISTORY[:2] == [ONE, TWO]
    assert list(range(1, NEWEST + 1)) == RECORDED


@pytest.mark.parametrize("version", RECORDED)
async def test_an_earlier_programs_tables_mean_the_same_as_ours(lab: Lab, version: int) -> None:
    """At every version there is no difference to the shipped catalog, in either direction."""
    await lab.reach(version)
    shipped = Catalog(lab.migrations[version - 1].catalog.tables)
    live = Catalog((await lab.look()).catalog.tables)
    assert live.tables.keys() == shipped.tables.keys()
    assert compare(shipped, live) == ([], [])
    assert compare(live, shipped) == ([], [])


async def test_upgraded_in_two_boots_is_the_same_as_fresh(lab: Lab) -> None:
    """Version 1 of ours, upgraded by a later release, is catalog by catalog what one boot makes of nothing."""
    await lab.boot()
    fresh, text = (await lab.look()).catalog, await described(lab)
    await lab.wipe()
    await lab.ship(lab.migrations[:1])
    await lab.ship(lab.migrations)
    assert (await lab.look()).catalog == fresh
    assert await described(lab) == text


async def described(lab: Lab) -> object:
    """The database's own description of everything that is in it."""
    if lab.backend == "sqlite":
        return await lab.rows("select type, name, tbl_name, sql from sqlite_schema order by type, name")
    names = "select indexname, indexdef from pg_indexes where schemaname = current_schema order by indexname"
    return [await lab.rows(sql) for sql in (POSTGRES_COLUMNS, names, POSTGRES_CONSTRAINTS)]


@on_postgres
async def test_an_upgraded_earlier_program_is_the_same_as_fresh_to_postgresql(lab: Lab) -> None:
    """Its own catalogs agree, but for names of constraints and the spelling of automatic numbers."""
    views = (POSTGRES_COLUMNS, POSTGRES_INDEXES, POSTGRES_CONSTRAINTS)
    await lab.boot()
    fresh = [await lab.rows(sql) for sql in views]
    await lab.wipe()
    await lab.reach(NEWEST)
    assert [await lab.rows(sql) for sql in views] == fresh
    assert len(fresh[0]) > 60
    assert len(await lab.all(LEDGER)) == NEWEST
