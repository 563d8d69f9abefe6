"""For whatever drifts a doctor says the SQL that mends it: run as it stands, after which a verify-only boot serves."""

from collections.abc import Awaitable, Callable

import pytest

from runtime_repo import Diagnosis
from tests.lab import Lab, PostgresLab, changes, on_postgres
from tests.schema.test_drift import DRIFT, DRIFT_OF_2, POSTGRES_DRIFT, Drift
from tests.versions import NEWEST, RECORDED


async def diagnosed(lab: Lab) -> Diagnosis:
    """What a doctor says of a database that nobody has booted here."""
    repository = lab.repository()
    try:
        return await repository.doctor()
    finally:
        await repository.close()


async def mended(lab: Lab, diagnosis: Diagnosis) -> None:
    """Run the script; a verify-only boot, which compares before it asks for the version, finds nothing amiss."""
    await lab.execute(diagnosis.script)
    assert await lab.version() == diagnosis.found


@pytest.mark.parametrize("version", RECORDED)
@changes(DRIFT)
async def test_drift_is_mended(lab: Lab, case: Drift, version: int) -> None:
    """At every version; all that differs is said to be mended, each table once, and what is not concerned is kept."""
    await lab.reach(version)
    await lab.change(case.change)
    diagnosis = await diagnosed(lab)
    assert diagnosis.found == version
    assert not diagnosis.is_well
    told = [difference for repair in diagnosis.repairs for difference in repair.differences]
    assert sorted(told, key=str) == sorted(case.expected(lab), key=str)
    await mended(lab, diagnosis)


@changes(DRIFT_OF_2)
async def test_drift_from_what_version_2_added_is_mended(lab: Lab, case: Drift) -> None:
    """What an upgrade added counts like what was there before it."""
    await lab.reach(2)
    await lab.change(case.change)
    await mended(lab, await diagnosed(lab))


@on_postgres
@pytest.mark.parametrize("change", [change for change, _ in POSTGRES_DRIFT.values()], ids=POSTGRES_DRIFT.keys())
async def test_drift_in_what_only_postgresql_knows_is_mended(lab: Lab, change: str) -> None:
    """Another type, sequence, operator class, collation, method or order of NULLs is put back."""
    await lab.reach(NEWEST)
    await lab.execute(change)
    await mended(lab, await diagnosed(lab))


async def test_a_doctor_touches_nothing(lab: Lab) -> None:
    """Neither where there is nothing, nor an earlier version, nor drift; and it leaves nothing behind."""
    prepared: list[Callable[[], Awaitable[None]]] = [
        lambda: lab.reach(0),
        lambda: lab.reach(NEWEST),
        lambda: lab.execute("drop table runtime_leases"),
    ]
    for prepare in prepared:
        await prepare()
        before = await lab.snapshot()
        async with lab.nothing_left():
            await diagnosed(lab)
        assert await lab.snapshot() == before


async def rows(lab: Lab, table: str) -> list[dict[str, object]]:
    return [dict(row) for row in await lab.all(table)]


@pytest.mark.parametrize("name", ["not null dropped", "default added", "unique constraint dropped", "column renamed"])
async def test_what_stood_there_stands_there_still(lab: Lab, name: str) -> None:
    """Rows, what an operator has added to the table, and the number that comes next."""
    await lab.reach(NEWEST)
    for table in ("runtime_jobs", "runtime_step_reports"):
        await lab.execute(f"alter table {table} add column note text; create index own_{table} on {table} (note)")
    async with lab.repository() as repo:
        await repo.jobs.upsert("thread", "fine")
        await repo.attempts.enqueue("run")
        [lease] = await repo.leases.claim("worker")
        for token in "ab":
            await repo.step_reports.record(lease, "pay", "done", token)
        last = max(report.report_id for report in await repo.step_reports.list(lease.attempt_id))
        await lab.execute("update runtime_jobs set note = 'mine'")
    kept = {table: await rows(lab, table) for table in ("runtime_jobs", "runtime_step_reports")}
    kept["runtime_step_reports"].pop()
    await lab.change(DRIFT[name].change)
    await lab.execute(f"delete from runtime_step_reports where report_id = {last}")
    await mended(lab, await diagnosed(lab))
    assert {table: await rows(lab, table) for table in kept} == kept
    async with lab.repository() as repo:
        told = {difference.object for difference in repo.boot_report.tolerated}
        assert "column runtime_jobs.note" in told
        assert "index own_runtime_step_reports on runtime_step_reports" in told
        report = await repo.step_reports.record(lease, "pay", "done", "c")
        assert report.report_id > last


@on_postgres
async def test_what_strangers_may_run_is_taken_away(lab: Lab) -> None:
    """Where a stranger owns the schema, expressions on our tables are drift; the owner runs the SQL."""
    assert isinstance(lab, PostgresLab)
    await lab.reach(NEWEST)
    await lab.execute(
        "alter table runtime_jobs add column note text default lower('X'), add constraint odd check (status <> '');"
        "create index odd_index on runtime_jobs (lower(status))"
    )
    owner, reader = f"{lab.place.schema}_owner", f"{lab.place.schema}_reader"
    await lab.run_outside(
        f"create role {owner}; create role {reader}; alter schema {lab.place.schema} owner to {owner};"
        f"grant usage on schema {lab.place.schema} to {reader};"
        f"grant select on all tables in schema {lab.place.schema} to {reader}"
    )
    try:
        options = {"server_settings": {"role": reader}, "migrate": False}
        repository = lab.repository(**options)
        diagnosis = await repository.doctor()
        await repository.close()
        assert {difference.object for repair in diagnosis.repairs for difference in repair.differences} == {
            "column runtime_jobs.note",
            "index odd_index on runtime_jobs",
            "check constraint odd on runtime_jobs",
        }
        await lab.execute(diagnosis.script)
        async with lab.repository(**options) as repo:
            assert repo.boot_report.to_version == NEWEST
    finally:
        await lab.run_outside(
            f"alter schema {lab.place.schema} owner to current_user; drop owned by {owner}, {reader};"
            f"drop role {owner}, {reader}"
        )


@pytest.mark.parametrize("table", ["runtime_leases", "runtime_finished", "runtime_queue"])
async def test_a_table_that_is_made_anew_is_kept_as_the_migration_keeps_it(lab: Lab, table: str) -> None:
    """With what is no drift where it is missing: a table that is its key, and room in its pages."""

    async def kept() -> object:
        if isinstance(lab, PostgresLab):
            return await lab.rows(f"select reloptions from pg_class where oid = '{table}'::regclass")
        [row] = await lab.rows(f"select sql from sqlite_schema where name = '{table}'")
        return "without rowid" in str(row["sql"])

    await lab.reach(NEWEST)
    before = await kept()
    await lab.execute(f"drop table {table}")
    await mended(lab, await diagnosed(lab))
    assert await kept() == before
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run")
        await repo.attempts.reindex()
        [lease] = await repo.leases.claim("worker")
        await repo.attempts.complete(lease)
