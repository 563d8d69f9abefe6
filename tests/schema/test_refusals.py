"""Databases that are not ours to serve. Each is refused with one clear reason, and not touched."""

from dataclasses import dataclass
from typing import Any

import pytest

from runtime_repo import ForeignSchemaError, SchemaHistoryError, SchemaOutOfDateError, SchemaTooNewError
from tests.lab import LEDGER, ONE, TWO, Change, Lab, Words, changes
from tests.versions import HISTORY, NEWEST, NEXT, RECORDED

POLICIES: list[dict[str, Any]] = [{}, {"migrate": False}, {"on_drift": "warn"}]
LEDGER_TABLE = f"create table {LEDGER} (version integer primary key, name text not null, applied_at_ms bigint not null)"
LEDGER_VIEW = f"create view {LEDGER} as select 1 as version, '{ONE[1]}' as name, 5 as applied_at_ms"


@pytest.mark.parametrize("version", RECORDED)
@pytest.mark.parametrize(
    ("ledger", "found"),
    [
        ([*HISTORY, NEXT], NEXT[0]),
        ([ONE, NEXT], NEXT[0]),
        ([*HISTORY, NEXT, (NEXT[0] + 1, "even_more")], NEXT[0] + 1),
        ([TWO, (99, "far_away")], 99),
        ([NEXT], NEXT[0]),
    ],
    ids=["the next", "1 and the next", "the next two", "2-99", "the next alone"],
)
async def test_a_newer_schema_is_refused(lab: Lab, version: int, ledger: list[tuple[int, str]], found: int) -> None:
    """A later version in the ledger is the first thing said, whatever is missing before it."""
    await lab.reach(version)
    await lab.record(*ledger)
    for policy in POLICIES:
        error = await lab.refused(SchemaTooNewError, **policy)
        assert (error.found, error.supported) == (found, NEWEST)


async def test_a_newer_schema_is_refused_as_such_although_it_looks_different(lab: Lab) -> None:
    """A newer release may have dropped and added tables and columns: that is neither drift nor foreign."""
    await lab.reach(NEWEST)
    await lab.record(*HISTORY, NEXT)
    await lab.execute("drop table runtime_jobs; alter table runtime_leases add column more text")
    await lab.execute("create table runtime_more (x text)")
    assert (await lab.refused(SchemaTooNewError)).found == NEXT[0]


@pytest.mark.parametrize(
    ("version", "ledger", "expected"),
    [
        (1, [TWO], (1, None, ONE[1])),
        (2, [TWO], (1, None, ONE[1])),
        (1, [(1, "someone_elses")], (1, "someone_elses", ONE[1])),
        (2, [(1, "Baseline_runtime_tables"), TWO], (1, "Baseline_runtime_tables", ONE[1])),
        (2, [ONE, (2, "someone_elses")], (2, "someone_elses", TWO[1])),
        (2, [(0, "zero"), ONE, TWO], (0, "zero", None)),
        (1, [(0, "zero")], (0, "zero", None)),
        (1, [(-1, "below"), ONE], (-1, "below", None)),
        (1, [(-1, "below")], (-1, "below", None)),
    ],
    ids=["gap at 1", "gap at 2", "name of 1", "case of 1", "name of 2", "0-1-2", "0", "negative-1", "negative"],
)
async def test_another_history_is_refused(
    lab: Lab, version: int, ledger: list[tuple[int, str]], expected: tuple[int, str | None, str | None]
) -> None:
    """The ledger must tell exactly the beginning of the history that this release ships."""
    await lab.reach(version)
    await lab.record(*ledger)
    for policy in POLICIES:
        error = await lab.refused(SchemaHistoryError, **policy)
        assert (error.version, error.recorded, error.shipped) == expected


@dataclass(frozen=True)
class Foreign:
    """Made in a database at *version*, so that these *tables* are not ours."""

    change: Change
    tables: tuple[str, ...] = ("runtime_jobs",)
    version: int = 0


FOREIGN = {
    "table without a ledger": Foreign("create table runtime_jobs (x text)"),
    "exactly our table without a ledger": Foreign(f"drop table {LEDGER}", (), version=1),
    "two tables": Foreign(
        "create table runtime_leases (x text); create table runtime_attempts (x text)",
        ("runtime_attempts", "runtime_leases"),
    ),
    "table of version 2": Foreign("create table runtime_control (x text)", ("runtime_control",)),
    "other case": Foreign(Words("create table Runtime_Jobs (x text)", None)),
    "table with an empty ledger": Foreign(
        f"create table runtime_jobs (x text); {LEDGER_TABLE}", ("runtime_jobs", LEDGER)
    ),
    "version 1 with an emptied ledger": Foreign(f"delete from {LEDGER}", (), version=1),
    "empty ledger": Foreign(LEDGER_TABLE, (LEDGER,)),
    "ledger of another tool": Foreign(
        f"create table {LEDGER} (id integer, script text); insert into {LEDGER} values (1, 'x')", (LEDGER,)
    ),
    "ledger without a time": Foreign(
        f"create table {LEDGER} (version integer, name text); insert into {LEDGER} values (1, '{ONE[1]}')", (LEDGER,)
    ),
    "ledger with words for versions": Foreign(
        f"create table {LEDGER} (version text, name text, applied_at_ms bigint);"
        f"insert into {LEDGER} values ('one', '{ONE[1]}', 5)",
        (LEDGER,),
    ),
    "view": Foreign("create view runtime_jobs as select 'x' as thread_id"),
    "view on the ledger's name": Foreign(LEDGER_VIEW, (LEDGER,)),
    "view on the ledger's name beside a table": Foreign(
        f"create table runtime_jobs (x text); {LEDGER_VIEW}", ("runtime_jobs", LEDGER)
    ),
    "index": Foreign("create table jobs (x text); create index runtime_jobs on jobs (x)"),
    "materialized view": Foreign(Words(None, "create materialized view runtime_jobs as select 'x' as thread_id")),
    "partitioned table": Foreign(Words(None, "create table runtime_jobs (x text) partition by list (x)")),
    "sequence": Foreign(Words(None, "create sequence runtime_jobs")),
    "composite type": Foreign(Words(None, "create type runtime_jobs as (x text)")),
    "enum": Foreign(Words(None, "create type runtime_jobs as enum ('x')")),
    "virtual table": Foreign(Words("create virtual table runtime_jobs using fts5 (x)", None)),
    "table runtime_control at version 1": Foreign(
        "create table runtime_control (name text primary key, value_json text not null, updated_at_ms bigint not null)",
        ("runtime_control",),
        version=1,
    ),
    "view runtime_control at version 1": Foreign(
        "create view runtime_control as select 'quiesce' as name", ("runtime_control",), version=1
    ),
    "view instead of a table at version 1": Foreign(
        "alter table runtime_jobs rename to jobs; create view runtime_jobs as select * from jobs", version=1
    ),
    "view instead of a table at version 2": Foreign(
        "alter table runtime_jobs rename to jobs; create view runtime_jobs as select * from jobs", version=2
    ),
}


@changes(FOREIGN)
async def test_what_is_not_ours_is_refused(lab: Lab, case: Foreign) -> None:
    """One of our names with no ledger or an empty one, a ledger that is none, our name on a view: never adopted."""
    await lab.reach(case.version)
    await lab.change(case.change)
    tables = case.tables
    if not tables:
        tables = tuple(sorted((await lab.look()).catalog.tables))
        assert "runtime_attempts" in tables
    for policy in POLICIES:
        assert (await lab.refused(ForeignSchemaError, **policy)).tables == tables


async def test_foreign_is_said_before_too_new(lab: Lab) -> None:
    """The first reason in the documented order: whose it is comes before how new it is."""
    await lab.reach(1)
    await lab.record(ONE, NEXT)
    await lab.execute("alter table runtime_jobs rename to jobs; create view runtime_jobs as select * from jobs")
    assert (await lab.refused(ForeignSchemaError)).tables == ("runtime_jobs",)


async def test_history_is_said_before_drift_and_drift_before_pending(lab: Lab) -> None:
    """A wrong name is the reason although an index is missing as well."""
    await lab.reach(1)
    await lab.execute("drop index idx_runtime_jobs_status")
    await lab.record((1, "someone_elses"))
    assert (await lab.refused(SchemaHistoryError, migrate=False)).recorded == "someone_elses"


# What is there at a version, and the names that the pending migrations find taken.
TAKEN = {
    "an index's name on another table": Foreign(
        "create table jobs (x text); create index idx_runtime_attempts_run on jobs (x)",
        ("idx_runtime_attempts_run",),
        1,
    ),
    "an index's name in a fresh database": Foreign(
        "create table jobs (x text); create index idx_runtime_jobs_status on jobs (x)", ("idx_runtime_jobs_status",)
    ),
    "a table under an index's name": Foreign(
        "create table idx_runtime_queue_due (x text)", ("idx_runtime_queue_due",), 1
    ),
    "an index built in advance": Foreign(
        "create index idx_runtime_attempts_run on runtime_attempts (run_id, attempt_id)",
        ("idx_runtime_attempts_run",),
        1,
    ),
    "a type under a new table's name": Foreign(
        Words(None, "create type runtime_control as enum ('x')"), ("runtime_control",), 1
    ),
    "new columns": Foreign(
        "alter table runtime_attempts add column queue text; alter table runtime_api_keys add column role text",
        ("column runtime_api_keys.role", "column runtime_attempts.queue"),
        1,
    ),
    "an index and a column": Foreign(
        "create index idx_runtime_queue_ready on runtime_jobs (status);"
        "alter table runtime_attempts add column priority integer",
        ("column runtime_attempts.priority", "idx_runtime_queue_ready"),
        1,
    ),
}


@changes(TAKEN)
async def test_the_names_of_what_is_pending_are_found_taken_before_anything_is_done(lab: Lab, case: Foreign) -> None:
    """Otherwise the migration would fail half-way, after a backup and the operator's own step."""
    await lab.reach(case.version)
    await lab.change(case.change)

    async def step() -> None:
        pytest.fail("it was to be refused before that")

    error = await lab.refused(ForeignSchemaError, before_migrate=step)
    assert error.tables == case.tables
    if not isinstance(case.change, Words):
        assert (await lab.refused(SchemaOutOfDateError, migrate=False)).found == case.version
