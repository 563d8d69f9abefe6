"""
The public API as a user writes it; mypy checks the types that come out, nobody runs it.

A line that stops type-checking here breaks somebody's code.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, assert_type

import asyncpg

from runtime_repo import (
    Activity,
    ApiKey,
    ApiKeyStatus,
    AppliedMigration,
    Attempt,
    AttemptStatus,
    AuditEntry,
    BackupReport,
    Compatibility,
    ControlState,
    Difference,
    Interrupt,
    InterruptStatus,
    Job,
    Lease,
    LeaseHolder,
    LeaseLostError,
    LockHolder,
    MigrationError,
    MoveReport,
    NewAttempt,
    NotFoundError,
    NotQuietError,
    Page,
    PayloadMismatchError,
    PostgresRuntimeRepository,
    QueueStats,
    QuiesceProgress,
    RestoreReport,
    RetryPolicy,
    RuntimeRepository,
    RuntimeTransaction,
    SchemaDriftError,
    SchemaHistoryError,
    SchemaLockTimeoutError,
    SchemaPlan,
    SchemaReport,
    SchemaStatus,
    SchemaTooNewError,
    SqliteRuntimeRepository,
    StepReport,
    Stop,
    StoreStatus,
    move,
    repository_from_url,
)


async def awaiting_gives_the_very_class(pool: "asyncpg.Pool[asyncpg.Record]") -> None:
    """Both idioms, for each class and for the address of either."""
    assert_type(await SqliteRuntimeRepository("runtime.db"), SqliteRuntimeRepository)
    assert_type(await PostgresRuntimeRepository("postgresql://h/db", schema="runtime"), PostgresRuntimeRepository)
    assert_type(await repository_from_url("sqlite:///runtime.db", backup=False), RuntimeRepository)
    async with SqliteRuntimeRepository(Path("runtime.db"), migrate=False, on_drift="warn", lock_timeout=1) as embedded:
        assert_type(embedded, SqliteRuntimeRepository)
    async with PostgresRuntimeRepository(pool, startup_timeout=5.0) as shared:
        assert_type(shared, PostgresRuntimeRepository)
    async with repository_from_url("postgresql://h/db", min_size=1, max_size=5) as either:
        assert_type(either, RuntimeRepository)
    assert_type(await embedded.close(), None)


async def boot_is_reported(repo: RuntimeRepository) -> None:
    """What boot found and did."""

    async def take_a_backup() -> int:
        return 0

    PostgresRuntimeRepository("postgresql://h/db", before_migrate=take_a_backup)
    assert_type(repo.boot_report, SchemaReport)
    report = await repo.ensure_schema()
    assert_type(report, SchemaReport)
    assert_type((report.from_version, report.to_version), tuple[int, int])
    assert_type(report.applied, tuple[AppliedMigration, ...])
    assert_type(report.waited, float)
    assert_type(report.backup, Path | None)
    assert_type(report.tolerated, tuple[Difference, ...])
    status = await repo.inspect()
    assert_type(status, SchemaStatus)
    plan = await repo.plan()
    assert_type(plan, SchemaPlan)
    assert_type([(step.version, step.name, step.sql) for step in plan.migrations], list[tuple[int, str, str]])
    assert_type((plan.refusal, plan.backup, plan.tolerated), tuple[str | None, str | None, tuple[Difference, ...]])
    assert_type((status.found, status.supported, status.pending), tuple[int, int, tuple[str, ...]])
    assert_type(status.differences, tuple[Difference, ...])
    assert_type(status.refusal, str | None)
    assert_type(status.as_dict(), dict[str, Any])


async def a_worker_claims_and_finishes(repo: RuntimeRepository) -> None:
    """The verbs on attempts and leases."""
    attempt = await repo.attempts.enqueue(
        "run",
        attempt_id="a",
        queue="mail",
        priority=1,
        payload={"x": [1]},
        not_before=datetime.now(UTC),
        max_attempts=3,
    )
    assert_type(attempt, Attempt)
    assert_type(await repo.attempts.get("a"), Attempt)
    assert_type(await repo.attempts.find("a"), Attempt | None)
    assert_type(await repo.attempts.list(run_id="run", after="a", limit=10), Page[Attempt])
    leases = await repo.leases.claim("worker", limit=10, queues="mail", ttl=timedelta(minutes=1))
    assert_type(leases, Sequence[Lease])
    for lease in leases:
        assert_type(lease.version, int)
        assert_type(lease.expires_at, datetime)
        assert_type(lease.attempt, Attempt)
        assert_type(await repo.leases.heartbeat(lease), Lease)
        assert_type(await repo.attempts.complete(lease, {"sum": 3}), Attempt)
        assert_type(await repo.attempts.fail(lease, "boom", retry_in=timedelta(seconds=5)), Attempt)
        assert_type(await repo.attempts.start(lease), Attempt)
        assert_type(await repo.attempts.fail(lease, "boom", retry_in=RetryPolicy(max_attempts=3)), Attempt)
        assert_type(await repo.leases.release(lease, delay=timedelta(seconds=5)), Attempt)
    assert_type(await repo.attempts.complete_many((lease, None) for lease in leases), Sequence[bool])
    assert_type(await repo.leases.heartbeat_many(leases), Sequence[Lease | None])
    assert_type(await repo.leases.claim("worker", queues=["mail", "default"]), Sequence[Lease])
    assert_type(await repo.leases.claim_attempt("a", "worker"), Lease | None)
    assert_type(await repo.leases.list(worker_id="worker"), Page[Lease])
    assert_type(await repo.leases.requeue_expired(limit=10, grace=timedelta(seconds=5)), Page[Attempt])
    assert_type(await repo.attempts.enqueue_many([NewAttempt("run", priority=1)]), Sequence[str])
    assert_type(await repo.attempts.list(status=AttemptStatus.FAILED, queue="mail"), Page[Attempt])
    assert_type(await repo.attempts.list_dispatchable(queue="mail"), Page[Attempt])
    assert_type(await repo.attempts.stats(), Page[QueueStats])
    assert_type(await repo.attempts.cancel("a"), Attempt)
    assert_type(await repo.attempts.retry("a"), Attempt)
    assert_type(await repo.attempts.prune(older_than=timedelta(days=7)), int)
    assert_type(await repo.attempts.prune(older_than=timedelta(0), status=AttemptStatus.FAILED, actor="ann"), int)
    assert_type(await repo.attempts.depth("mail", most=100), int)
    assert_type(await repo.attempts.retry_many(actor="ann", error="disk full"), int)
    assert_type(await repo.attempts.cancel_many(actor="ann", queue="mail"), int)
    assert_type(attempt.status, AttemptStatus)
    assert_type(attempt.status.is_final, bool)
    assert_type(attempt.payload, Any)
    assert_type(attempt.retry_at, datetime | None)
    assert_type(attempt.worker_id, str | None)


async def a_person_answers(repo: RuntimeRepository) -> None:
    """The verbs on interrupts, and how the next attempt comes of an answer."""
    interrupt = await repo.interrupts.create("thread", "run", "a", {"ask": "go on?"}, interrupt_id="i")
    assert_type(interrupt, Interrupt)
    assert_type(interrupt.status, InterruptStatus)
    assert_type((interrupt.value, interrupt.resume_payload), tuple[Any, Any])
    assert_type((interrupt.resume_payload_hash, interrupt.resumed_at), tuple[str | None, datetime | None])
    assert_type(await repo.interrupts.get("i"), Interrupt)
    assert_type(await repo.interrupts.find("i"), Interrupt | None)
    pending = await repo.interrupts.list(thread_id="thread", status=InterruptStatus.PENDING, after="i", limit=10)
    assert_type(pending, Page[Interrupt])
    async with repo.transaction() as transaction:
        assert_type(await transaction.interrupts.resume("i", {"go": True}), Interrupt)
        await transaction.attempts.enqueue("run", attempt_id="after-i")
    assert_type(await repo.interrupts.cancel("i"), Interrupt)


async def an_application_keeps_its_books(repo: RuntimeRepository) -> None:
    """The verbs on jobs and audit entries."""
    job = await repo.jobs.upsert("thread", "active")
    assert_type(job, Job)
    assert_type((job.status, job.created_at, job.updated_at), tuple[str, datetime, datetime])
    assert_type(await repo.jobs.get("thread"), Job)
    assert_type(await repo.jobs.find("thread"), Job | None)
    assert_type(await repo.jobs.list(status="active", after="thread", limit=10), Page[Job])
    entry = await repo.audit.append(
        actor_type="user",
        actor_id="u-1",
        actor_role="admin",
        action="job.cancel",
        resource_type="job",
        resource_id="thread",
        result="ok",
        request_id="r-1",
        details={"why": "asked to"},
    )
    assert_type(entry, AuditEntry)
    assert_type((entry.audit_id, entry.actor_id, entry.created_at), tuple[int, str | None, datetime])
    hour = timedelta(hours=1)
    entries = await repo.audit.list(
        action="job.cancel", since=entry.created_at - hour, until=entry.created_at, after=entry.audit_id, limit=10
    )
    assert_type(entries, Page[AuditEntry])
    assert_type(await repo.audit.list(request_id="r-1"), Page[AuditEntry])


async def a_worker_reports_its_steps(repo: RuntimeRepository, lease: Lease) -> None:
    """The verbs on step reports."""
    report = await repo.step_reports.record(lease, "download", "done", "token", {"bytes": 7})
    assert_type(report, StepReport)
    assert_type((report.report_id, report.lease_version), tuple[int, int | None])
    assert_type(report.is_duplicate, bool)
    assert_type(report.payload, Any)
    assert_type(await repo.step_reports.list("a", after=report.report_id, limit=10), Page[StepReport])


async def a_caller_is_authenticated(repo: RuntimeRepository) -> None:
    """The verbs on API keys."""
    if not await repo.api_keys.any():
        assert_type(await repo.api_keys.put("key", "secret", role="admin"), ApiKey)
    key = await repo.api_keys.authenticate("key", "secret")
    assert_type(key, ApiKey | None)
    if key is not None:
        assert_type((key.role, key.status, key.updated_at), tuple[str, ApiKeyStatus, datetime])
    assert_type(await repo.api_keys.set_active("key", active=False), ApiKey)
    assert_type(await repo.api_keys.get("key"), ApiKey)
    assert_type(await repo.api_keys.find("key"), ApiKey | None)
    assert_type(await repo.api_keys.list(after="key", limit=10), Page[ApiKey])


async def an_operator_stops_and_resumes(repo: RuntimeRepository) -> None:
    """The verbs of control."""

    def show(progress: QuiesceProgress) -> None:
        assert_type((progress.waited, progress.leases), tuple[float, int])
        assert_type(progress.holders, tuple[LeaseHolder, ...])

    try:
        assert_type(await repo.control.quiesce("why", timeout=timedelta(seconds=1), progress=show), ControlState)
    except NotQuietError as error:
        assert_type(error.claims, tuple[LockHolder, ...])
    assert_type(await repo.control.pause("mail", "why"), ControlState)
    assert_type((await repo.control.resume("mail")).paused, tuple[Stop, ...])
    assert_type((await repo.control.state()).quiesced, Stop | None)
    said = await repo.can_run()
    assert_type(said, Compatibility)
    assert_type((said.answer, said.oldest, said.why), tuple[bool, int, str])


async def verbs_commit_together(embedded: SqliteRuntimeRepository, shared: PostgresRuntimeRepository) -> None:
    """In a transaction of their own, or in one that is open."""
    async with embedded.transaction() as transaction:
        assert_type(transaction, RuntimeTransaction)
        assert_type(await transaction.attempts.enqueue("run"), Attempt)
        await transaction.connection.execute("insert into orders (id) values (7)")
    connection = await asyncpg.connect()
    async with shared.transaction(connection) as part:
        assert_type(part, RuntimeTransaction)
    async with shared.transaction() as own:
        assert_type(own, RuntimeTransaction)


async def errors_carry_their_numbers(repo: RuntimeRepository) -> Mapping[str, object]:
    """What a handler can read from what it caught."""
    try:
        await repo
    except SchemaTooNewError as error:
        assert_type((error.found, error.supported), tuple[int, int])
    except SchemaHistoryError as error:
        assert_type(error.recorded, str | None)
    except SchemaDriftError as error:
        assert_type(error.differences, tuple[Difference, ...])
        return {difference.object: difference.expected for difference in error.differences}
    except SchemaLockTimeoutError as error:
        assert_type(error.waited, float)
        assert_type(error.holder, LockHolder | None)
    except MigrationError as error:
        assert_type((error.version, error.name), tuple[int, str])
    except LeaseLostError as error:
        assert_type((error.token, error.current), tuple[int, int | None])
        assert_type(error.worker_id, str | None)
    except PayloadMismatchError as error:
        assert_type(error.differing, tuple[str, ...])
    except NotFoundError as error:
        assert_type((error.what, error.key), tuple[str, str])
    return {}


async def a_store_is_told_of(repo: RuntimeRepository) -> None:
    """What is there, and what moves."""
    assert_type((await repo.doctor()).is_well, bool)
    status = await repo.status()
    assert_type(status, StoreStatus)
    assert_type((status.backend, status.server), tuple[Literal["sqlite", "postgres"], str | None])
    assert_type([row.applied_at for row in status.ledger], list[datetime])
    assert_type(status.schema, SchemaStatus)
    assert_type(status.migrating, LockHolder | None)
    assert_type(status.queues, tuple[QueueStats, ...])
    assert_type([(worker.leases, worker.first_expiry) for worker in status.workers], list[tuple[int, datetime]])
    assert_type([(table.size, table.rows) for table in status.tables], list[tuple[int, int | None]])
    assert_type((status.failed, status.pending_interrupts, status.size), tuple[int | None, int | None, int | None])
    assert_type((status.unknown, status.as_dict()), tuple[tuple[str, ...], dict[str, Any]])
    activity = await repo.activity(over=timedelta(minutes=1))
    assert_type(activity, Activity)
    assert_type([(queue.oldest_age, queue.completed) for queue in activity.queues], list[tuple[timedelta | None, int]])


async def a_store_is_kept_and_moved(repo: RuntimeRepository, other: RuntimeRepository, path: Path) -> None:
    """Archives, and what becomes of a store."""
    backup = await repo.backup(path)
    assert_type(backup, BackupReport)
    assert_type((backup.path, backup.version, backup.rows), tuple[Path, int, Mapping[str, int]])
    assert_type((backup.size, backup.left_out, backup.as_dict()), tuple[int, tuple[str, ...], dict[str, Any]])
    restored = await other.restore(str(path), force=True, keep_in=None)
    assert_type(restored, RestoreReport)
    assert_type((restored.kept, restored.requeued), tuple[str | None, int])
    assert_type((restored.not_granted, restored.overridden), tuple[tuple[str, ...], tuple[str, ...]])
    moved = await move(repo, other, force=False, folder=path)
    assert_type(moved, MoveReport)
    assert_type((moved.source, moved.target, moved.duration), tuple[str, str, float])
