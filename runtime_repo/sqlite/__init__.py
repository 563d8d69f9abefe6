"""SQLite: the only folder that imports aiosqlite."""

from runtime_repo.sqlite.database import SqliteDatabase
from runtime_repo.sqlite.repository import SqliteRuntimeRepository

__all__ = ["SqliteDatabase", "SqliteRuntimeRepository"]
