"""PostgreSQL: the only folder that imports asyncpg."""

from runtime_repo.postgres.database import PostgresDatabase
from runtime_repo.postgres.repository import PostgresRuntimeRepository
from runtime_repo.postgres.target import Target

__all__ = ["PostgresDatabase", "PostgresRuntimeRepository", "Target"]
