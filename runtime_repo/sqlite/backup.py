"""A copy of a SQLite database beside it, taken online."""

import asyncio
import contextlib
import os
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

from runtime_repo.database import Busy
from runtime_repo.errors import DatabaseUnavailableError
from runtime_repo.shielding import settle
from runtime_repo.sqlite.connection import Connection

__all__ = ["back_up"]


async def back_up(source: Path, target: Path, run: Callable[[Callable[[Connection], None]], Awaitable[None]]) -> None:
    """Copy the database online; what stands under *target*'s name is always a whole copy."""
    partial = target.with_name(target.name + ".partial")
    cancelled = False

    def work(connection: Connection) -> None:
        def check(_status: int, _remaining: int, _total: int) -> None:
            if cancelled:
                raise InterruptedError

        # An API key's hash must not become readable in the copy.
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with contextlib.closing(sqlite3.connect(partial)) as copy:
            copy.execute("pragma journal_mode = off")  # half a copy is thrown away, not rolled back
            connection.backup(copy, pages=1024, progress=check)
        shutil.copymode(source, partial)
        partial.replace(target)
        _sync_folder(target.parent)

    try:
        await asyncio.shield(copying := asyncio.ensure_future(run(work)))
    except BaseException:
        cancelled = True
        with contextlib.suppress(Busy, DatabaseUnavailableError, OSError):
            await settle(copying)
        partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename in *folder* durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
