"""
The public API as a user writes it; mypy checks the types that come out, nobody runs it.

A line that stops type-checking here breaks somebody's code.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, assert_type

import asyncpg

from runtime_repo import (
    AppliedMigration,
    Attempt,
    AttemptStatus,
    Difference,
    Lease,
    LeaseLostError,
    LockHolder,
    MigrationError,
    NewAttempt,
    NotFoundError,
    PayloadMismatchError,
    PostgresRuntimeRepository,
    QueueStats,
    RetryPolicy,
    RuntimeRepository,
    RuntimeTransaction,
    SchemaDriftError,
    SchemaHistoryError,
    SchemaLockTimeoutError,
    SchemaReport,
    SchemaTooNewError,
    SqliteRuntimeRepository,
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
    assert_type(await repo.attempts.list(run_id="run", after="a", limit=10), Sequence[Attempt])
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
    assert_type(await repo.leases.list(worker_id="worker"), Sequence[Lease])
    assert_type(await repo.leases.requeue_expired(limit=10, grace=timedelta(seconds=5)), Sequence[Attempt])
    assert_type(await repo.attempts.enqueue_many([NewAttempt("run", priority=1)]), Sequence[str])
    assert_type(await repo.attempts.list(status=AttemptStatus.FAILED, queue="mail"), Sequence[Attempt])
    assert_type(await repo.attempts.list_dispatchable(queue="mail"), Sequence[Attempt])
    assert_type(await repo.attempts.stats(), Sequence[QueueStats])
    assert_type(await repo.attempts.cancel("a"), Attempt)
    assert_type(await repo.attempts.retry("a"), Attempt)
    assert_type(await repo.attempts.prune(older_than=timedelta(days=7)), int)
    assert_type(attempt.status, AttemptStatus)
    assert_type(attempt.status.is_final, bool)
    assert_type(attempt.payload, Any)
    assert_type(attempt.retry_at, datetime | None)
    assert_type(attempt.worker_id, str | None)


async def verbs_commit_together(embedded: SqliteRuntimeRepository, shared: PostgresRuntimeRepository) -> None:
    """In a transaction of their own, or in one that is open."""
    async with embedded.transaction() as transaction:
        assert_type(transaction, RuntimeTransaction)
        assert_type(await transaction.attempts.enqueue("run"), Attempt)
        await transaction.connection.execute("insert into orders (id) values (7)")
    connection = await asyncpg.connect()
    async with shared.transaction(connection) as part, shared.transaction() as own:
        assert_type((part, own), tuple[RuntimeTransaction, RuntimeTransaction])


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
        assert_type((error.token, error.current), tuple[int, int])
        assert_type(error.worker_id, str | None)
    except PayloadMismatchError as error:
        assert_type(error.differing, tuple[str, ...])
    except NotFoundError as error:
        assert_type((error.what, error.key), tuple[str, str])
    return {}
