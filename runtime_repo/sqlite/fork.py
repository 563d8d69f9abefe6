"""
What a fork does to SQLite: the child has the parent's connections in its memory, but none of the parent's locks.

They are never closed, for SQLite would clean up beside the parent's. But SQLite lets connections of one process share
their locks, so one of the child's own would rely on locks that only the parent has, and lose what it commits when the
parent closes: SHARED on the file, and on the index of its log. Both are taken here, for as long as the child lives.
Where the parent was in the midst of something there are more, and the child is refused the file.
"""

import contextlib
import os
import time
import weakref
from pathlib import Path

from runtime_repo.errors import ConfigurationError
from runtime_repo.sqlite.connection import Connection

__all__ = ["check_not_inherited", "hold_inherited", "is_idle", "note"]

_SHARED = (510, 0x40000002)
_SHARED_INDEX = (1, 128)
"""Length and offset, a part of SQLite's file format."""

_PATIENCE = 0.2
"""Seconds that a fork waits for hops to end; they rarely take more than some milliseconds."""

_connections: "weakref.WeakSet[Connection]" = weakref.WeakSet()

_refused: set[tuple[int, int]] = set()
"""Device and inode of files that cannot be opened in this process."""


def note(connection: Connection) -> None:
    """Have forks wait until it is idle."""
    _connections.add(connection)


def is_idle(connection: Connection) -> bool:
    return connection.hop is None and not connection.in_transaction


def hold_inherited(path: Path, *, was_idle: bool) -> None:
    """In the child: take the locks that SQLite believes this process to have, or see that nobody opens the file."""
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDWR)  # never closed: with any descriptor of a file all its locks go
        # Without WAL an idle connection has no locks.
        is_wal = os.pread(file, 2, 18) == b"\2\2"
        if not was_idle or (is_wal and not (_lock(file, *_SHARED) and _lock_index(path))):
            found = os.fstat(file)
            _refused.add((found.st_dev, found.st_ino))


def _lock_index(path: Path) -> bool:
    # It is gone when the parent has closed by now.
    try:
        return _lock(os.open(f"{path}-shm", os.O_RDWR), *_SHARED_INDEX)
    except OSError:
        return False


def _lock(file: int, length: int, offset: int) -> bool:
    import fcntl  # only where there are forks

    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, length, offset)
    except OSError:
        return False
    return True


def check_not_inherited(path: Path) -> None:
    """
    Let a file be opened.

    Raises:
        ConfigurationError: This process was forked while its parent used the file.
    """
    if not _refused:
        return
    with contextlib.suppress(OSError):
        found = path.stat()
        if (found.st_dev, found.st_ino) in _refused:
            raise ConfigurationError(
                f"the parent of this process was using {str(path)!r} when it forked, and SQLite's locks do not cross a "
                "fork: open it in a process that was spawned, or fork before the parent opens it"
            )


def _wait_for_idleness() -> None:
    deadline = time.monotonic() + _PATIENCE
    while any(connection.hop is not None for connection in list(_connections)) and time.monotonic() < deadline:
        time.sleep(0.0005)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_idleness)
