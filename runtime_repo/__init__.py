"""
A durable store for async workers that brings its own schema to the right version at boot.

A name is imported when it is first asked for: who uses one of the two databases does not load the other's driver, and
the command answers ``--help`` at once.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime_repo.api_keys import ApiKey, ApiKeyStatus
    from runtime_repo.archive import BackupReport, MoveReport, RestoreReport, move
    from runtime_repo.audit import AuditEntry
    from runtime_repo.control import ControlState, QuiesceProgress, Stop
    from runtime_repo.doctor import Diagnosis, Finding
    from runtime_repo.errors import (
        ArchiveError,
        ConfigurationError,
        ConflictError,
        DatabaseUnavailableError,
        Difference,
        ForeignSchemaError,
        InvalidTransitionError,
        LeaseHolder,
        LeaseLostError,
        LockHolder,
        MigrationError,
        NotFoundError,
        NotQuietError,
        OutdatedReleaseError,
        OverloadedError,
        PayloadMismatchError,
        RefusedError,
        RemainsError,
        RepositoryClosedError,
        RuntimeRepoError,
        SchemaDriftError,
        SchemaError,
        SchemaHistoryError,
        SchemaLockTimeoutError,
        SchemaOutOfDateError,
        SchemaTooNewError,
        StoreInUseError,
        UnportableRowsError,
        UnreadableRowError,
        UnsuitableDatabaseError,
    )
    from runtime_repo.interrupts import Interrupt, InterruptStatus
    from runtime_repo.jobs import Job
    from runtime_repo.observing import (
        BootStep,
        Claimed,
        Completed,
        Event,
        Failed,
        LeaseLost,
        Migrated,
        Observe,
        OutageBegan,
        OutageEnded,
        Statement,
        Swept,
    )
    from runtime_repo.postgres import PostgresRuntimeRepository
    from runtime_repo.records import Attempt, AttemptStatus, Lease, NewAttempt, QueueStats
    from runtime_repo.repairs import Repair
    from runtime_repo.repository import RuntimeRepository, RuntimeTransaction
    from runtime_repo.retry import RetryPolicy
    from runtime_repo.rows import Page
    from runtime_repo.schema import (
        AppliedMigration,
        Compatibility,
        PlannedMigration,
        SchemaPlan,
        SchemaReport,
        SchemaStatus,
    )
    from runtime_repo.sqlite import SqliteRuntimeRepository
    from runtime_repo.status import (
        Activity,
        QueueActivity,
        RecordedMigration,
        StoreStatus,
        TableSize,
        WorkerLeases,
    )
    from runtime_repo.step_reports import StepReport
    from runtime_repo.url import repository_from_url
    from runtime_repo.worker import Handler, Worker

__all__ = [
    "Activity",
    "ApiKey",
    "ApiKeyStatus",
    "AppliedMigration",
    "ArchiveError",
    "Attempt",
    "AttemptStatus",
    "AuditEntry",
    "BackupReport",
    "BootStep",
    "Claimed",
    "Compatibility",
    "Completed",
    "ConfigurationError",
    "ConflictError",
    "ControlState",
    "DatabaseUnavailableError",
    "Diagnosis",
    "Difference",
    "Event",
    "Failed",
    "Finding",
    "ForeignSchemaError",
    "Handler",
    "Interrupt",
    "InterruptStatus",
    "InvalidTransitionError",
    "Job",
    "Lease",
    "LeaseHolder",
    "LeaseLost",
    "LeaseLostError",
    "LockHolder",
    "Migrated",
    "MigrationError",
    "MoveReport",
    "NewAttempt",
    "NotFoundError",
    "NotQuietError",
    "Observe",
    "OutageBegan",
    "OutageEnded",
    "OutdatedReleaseError",
    "OverloadedError",
    "Page",
    "PayloadMismatchError",
    "PlannedMigration",
    "PostgresRuntimeRepository",
    "QueueActivity",
    "QueueStats",
    "QuiesceProgress",
    "RecordedMigration",
    "RefusedError",
    "RemainsError",
    "Repair",
    "RepositoryClosedError",
    "RestoreReport",
    "RetryPolicy",
    "RuntimeRepoError",
    "RuntimeRepository",
    "RuntimeTransaction",
    "SchemaDriftError",
    "SchemaError",
    "SchemaHistoryError",
    "SchemaLockTimeoutError",
    "SchemaOutOfDateError",
    "SchemaPlan",
    "SchemaReport",
    "SchemaStatus",
    "SchemaTooNewError",
    "SqliteRuntimeRepository",
    "Statement",
    "StepReport",
    "Stop",
    "StoreInUseError",
    "StoreStatus",
    "Swept",
    "TableSize",
    "UnportableRowsError",
    "UnreadableRowError",
    "UnsuitableDatabaseError",
    "Worker",
    "WorkerLeases",
    "move",
    "repository_from_url",
]

_DRIVERS = {"SqliteRuntimeRepository": "sqlite", "PostgresRuntimeRepository": "postgres", "repository_from_url": "url"}
"""Where those names live that load a driver, or both."""

_HOMES = [
    "errors",
    "retry",
    "rows",
    "records",
    "schema",
    "archive",
    "status",
    "control",
    "doctor",
    "repairs",
    "api_keys",
    "audit",
    "interrupts",
    "jobs",
    "step_reports",
    "repository",
    "observing",
    "worker",
]
"""Where the others live, and are looked for in this order."""

if not TYPE_CHECKING:  # to a type checker every name would be there

    def __getattr__(name: str) -> object:
        homes = [_DRIVERS[name]] if name in _DRIVERS else _HOMES if name in __all__ else ()
        for home in homes:
            module = importlib.import_module(f"{__name__}.{home}")
            if name in module.__all__:
                globals()[name] = found = getattr(module, name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(globals().keys() | set(__all__))
