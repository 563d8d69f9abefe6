"""A durable store for async workers that brings its own schema to the right version at boot."""

from runtime_repo.api_keys import ApiKey, ApiKeyStatus
from runtime_repo.archive import BackupReport, MoveReport, RestoreReport, move
from runtime_repo.audit import AuditEntry
from runtime_repo.errors import (
    ArchiveError,
    ConfigurationError,
    ConflictError,
    DatabaseUnavailableError,
    Difference,
    ForeignSchemaError,
    InvalidTransitionError,
    LeaseLostError,
    LockHolder,
    MigrationError,
    NotFoundError,
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
from runtime_repo.postgres import PostgresRuntimeRepository
from runtime_repo.records import Attempt, AttemptStatus, Lease, NewAttempt, QueueStats
from runtime_repo.repository import RuntimeRepository, RuntimeTransaction
from runtime_repo.retry import RetryPolicy
from runtime_repo.rows import Page
from runtime_repo.schema import AppliedMigration, SchemaReport, SchemaStatus
from runtime_repo.sqlite import SqliteRuntimeRepository
from runtime_repo.step_reports import StepReport
from runtime_repo.url import repository_from_url
from runtime_repo.worker import Handler, Worker

__all__ = [
    "ApiKey",
    "ApiKeyStatus",
    "AppliedMigration",
    "ArchiveError",
    "Attempt",
    "AttemptStatus",
    "AuditEntry",
    "BackupReport",
    "ConfigurationError",
    "ConflictError",
    "DatabaseUnavailableError",
    "Difference",
    "ForeignSchemaError",
    "Handler",
    "Interrupt",
    "InterruptStatus",
    "InvalidTransitionError",
    "Job",
    "Lease",
    "LeaseLostError",
    "LockHolder",
    "MigrationError",
    "MoveReport",
    "NewAttempt",
    "NotFoundError",
    "OverloadedError",
    "Page",
    "PayloadMismatchError",
    "PostgresRuntimeRepository",
    "QueueStats",
    "RefusedError",
    "RemainsError",
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
    "SchemaReport",
    "SchemaStatus",
    "SchemaTooNewError",
    "SqliteRuntimeRepository",
    "StepReport",
    "StoreInUseError",
    "UnportableRowsError",
    "UnreadableRowError",
    "UnsuitableDatabaseError",
    "Worker",
    "move",
    "repository_from_url",
]
