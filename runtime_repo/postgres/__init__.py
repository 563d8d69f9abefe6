"""PostgreSQL: the only folder that imports asyncpg."""

from runtime_repo.postgres.connections import Target
from runtime_repo.postgres.database import PostgresDatabase
from runtime_repo.postgres.repository import PostgresRuntimeRepository

__all__ = ["PostgresDatabase", "PostgresRuntimeRepository", "Target"]
