"""The repository class of SQLite."""

import os
from collections.abc import Awaitable, Callable
from typing import Literal

from runtime_repo.repository import RuntimeRepository, check_flag, check_seconds
from runtime_repo.sqlite.database import SqliteDatabase

__all__ = ["SqliteRuntimeRepository"]


class SqliteRuntimeRepository(RuntimeRepository):
    """
    The store on SQLite: embedded, one machine, any number of processes.

    Construction does no I/O. ``await`` it, or enter it with ``async with``: either brings the file to the schema that
    this release knows before anything can be queried. The file is switched to WAL, which does not work on network
    file systems, and keeps SQLite's default of a synchronous commit.

    Args:
        path: The database file; it is created when it is missing, its folder is not. ``:memory:`` is one private
            database without backup.
        migrate: False is verify-only: nothing is created or written, and pending migrations refuse the boot.
        on_drift: ``"warn"`` serves although the structure has drifted, and logs every difference.
        backup: Copy the file beside itself before an upgrade, named ``<file>.v<version>-<time>.backup``.
        before_migrate: A coroutine function that runs once, under the lock, before the first migration is applied.
        lock_timeout: Seconds to wait for another process's migration or write.

    Raises:
        ConfigurationError: An argument cannot be meant.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        migrate: bool = True,
        on_drift: Literal["refuse", "warn"] = "refuse",
        backup: bool = True,
        before_migrate: Callable[[], Awaitable[object]] | None = None,
        lock_timeout: float = 60.0,
        verb_timeout: float | None = 30.0,
    ) -> None:
        check_flag("migrate", migrate)
        check_flag("backup", backup)
        if verb_timeout is not None:
            check_seconds("verb_timeout", verb_timeout, positive=True)
        super().__init__(
            SqliteDatabase(path, writes=migrate, backup=backup, lock_timeout=lock_timeout, verb_timeout=verb_timeout),
            migrate=migrate,
            on_drift=on_drift,
            before_migrate=before_migrate,
            lock_timeout=lock_timeout,
        )
