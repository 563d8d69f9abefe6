"""
The copy of a SQLite database that a boot takes before its upgrade, beside it and online.

It is called ``….partial`` while it is written, ``….pending`` once it is whole, and only after the upgrade has committed
by its own name. So a copy of a boot that did not commit never outlives it for long: an error or a cancellation removes
it at once, and what a kill left is removed by the next boot that upgrades the same file, which has the write lock and
therefore knows that nobody else is at work. A boot that was killed between its commit and the renaming leaves the name
to the next one that finds the file up to date. A copy under its own name is never removed.
"""

import asyncio
import contextlib
import os
import re
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

from runtime_repo.archive import sync_folder
from runtime_repo.database import Busy
from runtime_repo.errors import RuntimeRepoError
from runtime_repo.shielding import settle
from runtime_repo.sqlite.connection import Connection

__all__ = ["Copy", "backup_path", "name_what_is_pending", "remove_what_was_left"]

_PARTIAL = ".partial"
_PENDING = ".pending"
_LEFT = re.compile(r"(\d+)-\d{8}T\d{12}Z\.backup\.(pending|partial(-wal|-shm)?)")


class Copy:
    """
    A copy of *source* as it is at *version*.

    Attributes:
        target: What it is called in the end.
        is_taken: Whether it is there, whole, until its upgrade has committed.
    """

    def __init__(self, source: Path, version: int) -> None:
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
        self.target = backup_path(source, version, moment)
        self.is_taken = False
        self._source = source
        self._partial = self.target.with_name(self.target.name + _PARTIAL)
        self._pending = self.target.with_name(self.target.name + _PENDING)

    async def take(self, run: Callable[[Callable[[Connection], None]], Awaitable[None]]) -> None:
        """Copy the database by *run*, a hop of a connection that has no transaction, under another's write lock."""
        cancelled = False

        def work(connection: Connection) -> None:
            def check(_status: int, _remaining: int, _total: int) -> None:
                if cancelled:
                    raise InterruptedError

            remove_what_was_left(self._source)
            try:
                self._copy(connection, check)
                check(0, 0, 0)
            except BaseException:
                self.drop()
                raise

        try:
            await asyncio.shield(copying := asyncio.ensure_future(run(work)))
        except BaseException:
            cancelled = True
            with contextlib.suppress(Busy, RuntimeRepoError, TimeoutError):
                await settle(copying)
            self.drop()
            raise
        self.is_taken = True

    def _copy(self, connection: Connection, check: Callable[[int, int, int], None]) -> None:
        # An API key's hash must not become readable in the copy.
        os.close(os.open(self._partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with contextlib.closing(sqlite3.connect(self._partial)) as copy:
            copy.execute("pragma journal_mode = off")  # half a copy is thrown away, not rolled back
            # Nobody writes meanwhile, or each write would make it begin anew.
            connection.backup(copy, pages=1024, progress=check)
            # Not the WAL of its source: who looks at the copy would make files beside it.
            copy.execute("pragma journal_mode = delete").fetchone()
        shutil.copymode(self._source, self._partial)
        self._partial.replace(self._pending)
        sync_folder(self.target.parent)

    def keep(self) -> None:
        """Give it its own name, durably: its upgrade has committed."""
        if self.is_taken:
            _name(self._pending, self.target)

    def drop(self) -> None:
        """Remove it: its upgrade did not commit."""
        self.is_taken = False
        for path in (
            self._pending,
            *(self._partial.with_name(self._partial.name + end) for end in ("", "-wal", "-shm")),
        ):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def backup_path(source: Path, version: int, moment: str) -> Path:
    """What a copy of *source* is called in the end."""
    return source.with_name(f"{source.name}.v{version}-{moment}.backup")


def remove_what_was_left(source: Path) -> None:
    """Remove what boots left that were killed before they committed: nobody else can be taking a copy now."""
    for path, _ in _left(source):
        with contextlib.suppress(OSError):
            path.unlink()


def name_what_is_pending(source: Path, version: int) -> None:
    """Name what a boot left that was killed after it had committed: *source* is known to be at *version* by now."""
    with contextlib.suppress(OSError):
        for path, before in _left(source):
            # Of this version, a newer release may just be taking one.
            if path.suffix == _PENDING and before < version:
                _name(path, path.with_suffix(""))


def _name(pending: Path, target: Path) -> None:
    # Another boot, which finds the upgrade done, may have been quicker; and whatever fails here, the next one mends.
    with contextlib.suppress(OSError):
        pending.replace(target)
        sync_folder(target.parent)


def _left(source: Path) -> list[tuple[Path, int]]:
    """Copies of *source* that have no name of their own yet, and what belongs to them, each with its version."""
    start = f"{source.name}.v"
    with os.scandir(source.parent) as entries:
        found = [(entry, _LEFT.fullmatch(entry.name, len(start))) for entry in entries if entry.name.startswith(start)]
    return [(Path(entry.path), int(match[1])) for entry, match in found if match]
