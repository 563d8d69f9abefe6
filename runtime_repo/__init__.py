"""A durable store for async workers that brings its own schema to the right version at boot."""

from runtime_repo.errors import (
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
    PayloadMismatchError,
    RepositoryClosedError,
    RuntimeRepoError,
    SchemaDriftError,
    SchemaError,
    SchemaHistoryError,
    SchemaLockTimeoutError,
    SchemaOutOfDateError,
    SchemaTooNewError,
)
from runtime_repo.postgres import PostgresRuntimeRepository
from runtime_repo.records import Attempt, AttemptStatus, Lease, NewAttempt, QueueStats, RetryPolicy
from runtime_repo.repository import RuntimeRepository, RuntimeTransaction
from runtime_repo.schema import AppliedMigration, SchemaReport
from runtime_repo.sqlite import SqliteRuntimeRepository
from runtime_repo.url import repository_from_url
from runtime_repo.worker import Handler, Worker

__all__ = [
    "AppliedMigration",
    "Attempt",
    "AttemptStatus",
    "ConfigurationError",
    "ConflictError",
    "DatabaseUnavailableError",
    "Difference",
    "ForeignSchemaError",
    "Handler",
    "InvalidTransitionError",
    "Lease",
    "LeaseLostError",
    "LockHolder",
    "MigrationError",
    "NewAttempt",
    "NotFoundError",
    "PayloadMismatchError",
    "PostgresRuntimeRepository",
    "QueueStats",
    "RepositoryClosedError",
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
    "SchemaTooNewError",
    "SqliteRuntimeRepository",
    "Worker",
    "repository_from_url",
]
