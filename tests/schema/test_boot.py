"""What a boot does to a database that it may serve: nothing more than is pending, and beside what else lives there."""

import asyncio
import re
from datetime import timedelta

import pytest

from runtime_repo import AttemptStatus, Difference, SchemaOutOfDateError, SchemaReport
from tests.lab import LEDGER, Change, Lab, SqliteLab, Words, on_sqlite
from tests.versions import HISTORY, NEWEST, RECORDED

MINUTE = timedelta(minutes=1)

# Version 2, as the design has it: each table's columns, and its indexes by name.
VERSION_2 = {
    LEDGER: ("version name applied_at_ms", {}),
    "runtime_attempts": (
        "attempt_id run_id attempt_no status retry_at_ms queue priority payload_json max_attempts lease_version "
        "worker_id enqueued_at_ms started_at_ms finished_at_ms result_json error lease_id ended_by headers_json",
        {
            "idx_runtime_attempts_run": "(run_id, attempt_id)",
        },
    ),
    "runtime_queue": (
        "attempt_id queue priority enqueued_at_ms retry_at_ms",
        {
            "idx_runtime_queue_ready": "(queue, priority desc, enqueued_at_ms, attempt_id)",
            "idx_runtime_queue_due": "(queue, retry_at_ms, attempt_id)",
        },
    ),
    "runtime_finished": (
        "finished_at_ms attempt_id status",
        {
            "idx_runtime_finished_status": "(status, attempt_id)",
        },
    ),
    "runtime_leases": (
        "lease_id attempt_id worker_id lease_expires_at_ms heartbeat_at_ms version claimed_at_ms",
        {
            "idx_runtime_leases_expiry": "(lease_expires_at_ms)",
        },
    ),
    "runtime_jobs": (
        "thread_id status created_at_ms updated_at_ms",
        {"idx_runtime_jobs_status": "(status, thread_id)"},
    ),
    "runtime_interrupts": (
        "interrupt_id thread_id run_id attempt_id value_json status created_at_ms resume_payload_json "
        "resume_payload_hash resumed_at_ms",
        {
            "idx_runtime_interrupts_status": "(status, interrupt_id)",
            "idx_runtime_interrupts_thread": "(thread_id)",
            "idx_runtime_interrupts_attempt": "(attempt_id)",
        },
    ),
    "runtime_step_reports": (
        "report_id worker_id attempt_id action_id status dedupe_token created_at_ms payload_json lease_version",
        {
            "idx_runtime_step_reports_attempt": "(attempt_id, created_at_ms desc)",
            "": "unique (attempt_id, dedupe_token)",
        },
    ),
    "runtime_audit_logs": (
        "audit_id actor_type actor_id actor_role action resource_type resource_id result request_id details_json "
        "created_at_ms",
        {
            "idx_runtime_audit_logs_created": "(created_at_ms desc)",
            "idx_runtime_audit_logs_request": "(request_id, audit_id)",
            "idx_runtime_audit_logs_action": "(action, created_at_ms desc)",
        },
    ),
    "runtime_api_keys": (
        "key_id secret_hash status created_at_ms updated_at_ms role",
        {"idx_runtime_api_keys_status": "(status)"},
    ),
    "runtime_control": ("name value_json updated_at_ms", {}),
}


async def test_a_clean_start_reaches_the_supported_version(lab: Lab) -> None:
    """From nothing, the ledger records every migration at the database's time, and the report tells of all."""
    before = await lab.now_ms()
    report = await lab.boot()
    rows, after = await lab.all(LEDGER), await lab.now_ms()
    assert [(row.pop("version"), row.pop("name")) for row in rows] == HISTORY
    assert all(row.keys() == {"applied_at_ms"} and before <= row["applied_at_ms"] <= after for row in rows)
    assert (report.from_version, report.to_version) == (0, NEWEST)
    assert [(applied.version, applied.name) for applied in report.applied] == HISTORY
    assert all(0 < applied.duration < 60 for applied in report.applied)
    assert (report.waited, report.backup, report.tolerated) == (0.0, None, ())


async def test_a_clean_start_makes_the_documented_schema(lab: Lab) -> None:
    """Every table of version 2 is there, with the columns and indexes that the design lists and no others."""
    await lab.ship(lab.migrations[:2])
    catalog = (await lab.look()).catalog
    found = {
        name: (
            " ".join(table.columns),
            {
                index if index.startswith("idx_") else "": line.split(" where ")[0]
                for index, line in table.indexes.items()
            },
        )
        for name, table in catalog.tables.items()
    }
    assert found == VERSION_2
    partial = {i for table in catalog.tables.values() for i, line in table.indexes.items() if " where " in line}
    assert partial == {f"idx_runtime_{name}" for name in ("queue_ready", "queue_due", "finished_status")}


async def test_a_fresh_schema_is_usable_at_once(lab: Lab) -> None:
    """Work can be enqueued, claimed and completed as soon as the repository has been awaited."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run", attempt_id="a", payload={"n": 1})
        [lease] = await repo.leases.claim("worker", ttl=MINUTE)
        done = await repo.attempts.complete(lease, "done")
    assert (done.status, done.result) == (AttemptStatus.COMPLETED, "done")


@pytest.mark.parametrize("version", [0, *RECORDED])
async def test_booting_again_changes_nothing(lab: Lab, version: int) -> None:
    """The second boot applies nothing and leaves every row, definition and time as they are."""
    await lab.reach(version)
    await lab.boot()
    before = await lab.snapshot()
    assert await lab.boot() == SchemaReport(from_version=NEWEST, to_version=NEWEST)
    assert await lab.snapshot() == before


async def test_the_schema_may_be_ensured_again_on_an_open_repository(lab: Lab) -> None:
    """ensure_schema() boots, and repeats the proof at any time; the report of the boot stays."""
    repo = lab.repository()
    try:
        first = await repo.ensure_schema()
        assert [applied.version for applied in first.applied] == RECORDED
        before = await lab.snapshot()
        assert await repo.ensure_schema() == SchemaReport(from_version=NEWEST, to_version=NEWEST)
        assert await lab.snapshot() == before
        assert repo.boot_report is first
    finally:
        await repo.close()


async def test_many_that_boot_at_once_apply_every_migration_once(lab: Lab) -> None:
    """Exactly one of the boots that found version 1 migrates; the others find its work done."""
    await lab.reach(1)
    reports = await asyncio.gather(*(lab.boot() for _ in range(8)))
    assert sorted(len(report.applied) for report in reports) == [0] * 7 + [NEWEST - 1]
    assert {report.to_version for report in reports} == {NEWEST}
    assert await lab.recorded() == HISTORY


@pytest.mark.parametrize("version", [0, 1])
async def test_a_verify_only_boot_refuses_what_is_pending(lab: Lab, version: int) -> None:
    """It says what it found and what it needs, and writes nothing: not even SQLite's file is created."""
    await lab.reach(version)
    error = await lab.refused(SchemaOutOfDateError, migrate=False)
    assert (error.found, error.supported) == (version, NEWEST)


@on_sqlite
async def test_a_verify_only_boot_leaves_an_empty_file_empty(lab: SqliteLab) -> None:
    """An empty file is a fresh database, and stays one."""
    lab.path.touch()
    assert (await lab.refused(SchemaOutOfDateError, migrate=False)).found == 0
    assert lab.path.stat().st_size == 0


async def test_a_verify_only_boot_serves_what_is_current(lab: Lab) -> None:
    """At the supported version it serves, and changes nothing, SQLite's journal mode included."""
    await lab.reach(NEWEST)
    before = await lab.snapshot()
    async with lab.repository(migrate=False) as repo:
        assert repo.boot_report == SchemaReport(from_version=NEWEST, to_version=NEWEST)
        assert (await repo.attempts.get("queued")).status is AttemptStatus.QUEUED
    assert await lab.snapshot() == before


NEIGHBOURS = """
create table jobs (thread_id text primary key, runtime_jobs text);
insert into jobs values ('t', 'j');
create table runtime_settings (name text);
create view runtime_overview as select * from jobs;
create index idx_jobs on jobs (runtime_jobs);
"""


@pytest.mark.parametrize("version", [0, *RECORDED])
async def test_what_else_lives_here_is_left_alone(lab: Lab, version: int) -> None:
    """Other tables, views and indexes do not matter, whatever their names begin with, and stay as they are."""
    await lab.reach(version)
    await lab.execute(NEIGHBOURS)
    before = await lab.snapshot()
    report = await lab.boot()
    assert (report.from_version, report.to_version, report.tolerated) == (version, NEWEST, ())
    after = await lab.snapshot()
    assert {name: after.content.rows[name] for name in ("jobs", "runtime_settings")} == {
        "jobs": before.content.rows["jobs"],
        "runtime_settings": [],
    }
    theirs = {line for line in before.content.objects if re.search(r"\bjobs\b|_settings|_overview", line)}
    assert len(theirs) >= 4
    assert theirs <= set(after.content.objects)


@pytest.mark.parametrize(
    "change",
    [
        Words(None, 'create table "RUNTIME_JOBS" (x text)'),
        Words(None, "create function runtime_jobs() returns int language sql as 'select 1'"),
        "create table jobs (x text); create index idx_runtime_jobs_state on jobs (x)",
    ],
    ids=["other case", "function", "index name"],
)
async def test_names_that_only_look_like_ours_do_not_matter(lab: Lab, change: Change) -> None:
    """PostgreSQL distinguishes quoted names by case, and keeps functions apart from tables."""
    if isinstance(change, Words) and lab.backend == "sqlite":
        change = "create table jobs (x text)"
    await lab.change(change)
    assert (await lab.boot()).to_version == NEWEST


async def test_the_same_object_may_be_awaited_again_once_the_database_is_mended(lab: Lab) -> None:
    """A refusal is not the end of a repository."""
    await lab.reach(1)
    await lab.execute("drop index idx_runtime_jobs_status")
    repo = lab.repository()
    try:
        with pytest.raises(Exception, match="idx_runtime_jobs_status"):
            await repo
        await lab.execute("create index idx_runtime_jobs_status on runtime_jobs (status)")
        assert (await repo).boot_report.to_version == NEWEST
    finally:
        await repo.close()


async def test_a_difference_reads_as_a_sentence(lab: Lab) -> None:
    """The report of what is tolerated can be printed as it is."""
    await lab.reach(NEWEST)
    await lab.execute("alter table runtime_jobs add column note text")
    assert (await lab.boot()).tolerated == (Difference("column runtime_jobs.note", None, "text"),)
