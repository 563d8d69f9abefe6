"""Where a repository is kept, in words that another process understands."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

from runtime_repo import PostgresRuntimeRepository, RuntimeRepository, SchemaReport, SqliteRuntimeRepository
from runtime_repo.database import Backend, BootTransaction, Database
from runtime_repo.postgres import PostgresDatabase, Target
from runtime_repo.schema import Policy, ensure_schema, load_migrations
from runtime_repo.sqlite import SqliteDatabase

Moment = Literal["locked", "applied"]


@dataclass(frozen=True)
class Place:
    """Where a repository is kept. On PostgreSQL its connections bear the runtime schema's name."""

    backend: Backend
    where: str
    schema: str = "main"

    def repository(self, **options: Any) -> RuntimeRepository:
        """A repository that has not been awaited."""
        if self.backend == "sqlite":
            return SqliteRuntimeRepository(self.where, **options)
        settings = {"application_name": self.schema}
        return PostgresRuntimeRepository(self.where, schema=self.schema, **{"server_settings": settings, **options})

    def database(self, *, startup_timeout: float = 30) -> Database:
        """The port below, for a boot with other migrations than the shipped ones."""
        if self.backend == "sqlite":
            return SqliteDatabase(self.where, writes=True, backup=False, lock_timeout=5)
        target = Target(self.where, {"server_settings": {"application_name": self.schema}})
        return PostgresDatabase(target, schema=self.schema, startup_timeout=startup_timeout)

    async def boot_stalling(
        self, moment: Moment, stall: Callable[[], Awaitable[object]], *, startup_timeout: float = 30
    ) -> SchemaReport:
        """Boot, and call *stall* when the lock is taken, or when everything is applied and only COMMIT is missing."""
        database = self.database(startup_timeout=startup_timeout)
        lock = database.lock

        @asynccontextmanager
        async def stalling_lock() -> AsyncIterator[BootTransaction]:
            async with lock() as transaction:
                if moment == "locked":
                    await stall()
                yield transaction
                if moment == "applied":
                    await stall()

        database.lock = stalling_lock  # type: ignore[method-assign]
        try:
            return await ensure_schema(database, load_migrations(self.backend), Policy())
        finally:
            await database.close()
