"""The repository class of SQLite."""

import contextlib
import os
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from runtime_repo.archive import RestoreReport
from runtime_repo.observing import Observe
from runtime_repo.repository import RuntimeRepository, check_flag, check_seconds
from runtime_repo.sqlite.database import SqliteDatabase

__all__ = ["SqliteRuntimeRepository"]


class SqliteRuntimeRepository(RuntimeRepository):
    """
    The store on SQLite: embedded, one machine, any number of processes.

    Construction does no I/O. ``await`` it, or enter it with ``async with``: either brings the file to the schema that
    this release knows before anything can be queried. The file is switched to WAL, which does not work on network
    file systems, and keeps SQLite's default of a synchronous commit. A new file is readable by its owner only.

    A file has one writer. Within a process the verbs and transactions of all tasks take turns, in the order in which
    they came. Verbs that wait at the same moment are committed together, which costs little more than one of them; each
    still succeeds or fails for itself, and returns when it is committed. Whoever renews leases is the next in turn: a
    heartbeat waits for the transaction that is open, and for no other however many are queued. So keep a transaction
    shorter than half of your leases.

    A file that is deleted or replaced while it is open is noticed within two seconds by verbs and at once by
    ``ensure_schema()``: a DatabaseUnavailableError tells that what was written since is in the file that was moved
    away. Close the repository then and construct another.

    Args:
        path: The database file; it is created when it is missing, its folder is not. ``:memory:`` is one private
            database without backup.
        migrate: False is verify-only: nothing is created or written, and pending migrations refuse the boot.
        on_drift: ``"warn"`` serves although the structure has drifted, and logs every difference.
        backup: Copy the file beside itself before an upgrade, named ``<file>.v<version>-<time>.backup``. Until the
            upgrade has committed that name ends with ``.partial``, and with ``.pending`` once the copy is whole. A copy
            of a boot that does not commit is removed, one left by a kill by the next boot that upgrades. A copy under
            its own name is never removed.
        before_migrate: A coroutine function that runs once, under the lock, before the first migration is applied.
        lock_timeout: Seconds to wait for another process's migration or write.
        verb_timeout: Seconds that a verb may take, waiting for its turn and for locks included, and so each statement
            of a transaction, its begin and its commit; None is without end. What does not end in time is interrupted
            and a DatabaseUnavailableError. Migrations and backups are not limited.
        observe: Is called with an event for whatever happens: a boot's step, a migration, a statement with its duration
            and error, a claim, a completion, a failure, a lost lease, a sweep, an outage.
            What it raises is logged once.

    Raises:
        ConfigurationError: An argument is invalid.
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
        observe: Observe | None = None,
    ) -> None:
        check_flag("migrate", migrate)
        check_flag("backup", backup)
        if verb_timeout is not None:
            check_seconds("verb_timeout", verb_timeout, positive=True)
        self._sqlite = SqliteDatabase(
            path, writes=migrate, backup=backup, lock_timeout=lock_timeout, verb_timeout=verb_timeout
        )
        super().__init__(
            self._sqlite,
            migrate=migrate,
            on_drift=on_drift,
            before_migrate=before_migrate,
            lock_timeout=lock_timeout,
            observe=observe,
        )

    async def restore(
        self, path: str | os.PathLike[str], *, force: bool = False, keep_in: str | None = None
    ) -> RestoreReport:
        """
        As ``RuntimeRepository.restore``, also from a SQLite file, such as the copy that a boot takes before an upgrade.

        Raises:
            UnportableRowsError: The file holds what its columns are not for.
        """
        self._sqlite.check_another(path)
        if not _is_sqlite(path):
            return await super().restore(path, force=force, keep_in=keep_in)
        with tempfile.TemporaryDirectory(prefix="runtime-repo-restore-", ignore_cleanup_errors=True) as folder:
            archive = Path(folder) / "copy.archive"
            copy = SqliteRuntimeRepository(path, migrate=False)
            await copy.backup(archive)
            report = await super().restore(archive, force=force, keep_in=keep_in)
        return replace(report, path=Path(os.path.abspath(path)))  # noqa: ASYNC240, PTH100


def _is_sqlite(path: object) -> bool:
    """Whether a file begins as SQLite's do; whatever is wrong with it, who reads it says."""
    if isinstance(path, (str, os.PathLike)):
        with contextlib.suppress(OSError, ValueError), Path(path).open("rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    return False
