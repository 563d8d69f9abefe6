"""A connection that runs several statements in one hop to its thread, and knows its file again."""

import contextlib
import gc
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from runtime_repo.database import Busy
from runtime_repo.errors import DatabaseUnavailableError

__all__ = ["Connection", "Hop"]

_execute = sqlite3.Connection.execute

_PROVED_FOR = 2.0
"""Seconds for which a file that was found in its place is taken to be there still."""


class Hop:
    """
    A function to run on the connection's thread, dressed as what aiosqlite lets through: parameters and cursor. It may
    run within another.

    Args:
        work: What to run.
        repeats: Whether it may be run a second time where the first one came upon text that is not UTF-8.

    Attributes:
        connection: Where it runs or ran; None as long as it has not begun.
        failed: Whether it has ended with an error.
    """

    __slots__ = ("_repeats", "_result", "_runs", "_work", "connection", "failed", "given_up")

    _lock = threading.Lock()
    """Of all of them, since each holds it for a moment only."""

    def __init__(self, work: Callable[["Connection"], Any], *, repeats: bool = True) -> None:
        self._work = work
        self._repeats = repeats
        self._result: Any = None
        self._runs = False
        self.connection: Connection | None = None
        self.given_up = False
        self.failed = False

    def run(self, connection: "Connection") -> Self:
        with self._lock:
            if self.given_up:
                return self
            self.connection = connection
            self._runs = True
        around = connection.hop
        connection.hop = self
        try:
            self._result = self._read(connection)
        except BaseException:
            self.failed = True
            raise
        finally:
            connection.hop = around
            with self._lock:
                self._runs = False
        return self

    def _read(self, connection: "Connection") -> Any:
        try:
            return self._work(connection)
        except Exception as error:
            if not self._repeats or connection.text_factory is not str or not _is_undecodable(error):
                raise
        # Outside of the handler, which would keep the cursor that failed. A function in Python for each cell of text
        # is slow, so it is there only once it is needed.
        connection.text_factory = _decoded
        return self._work(connection)

    def give_up(self) -> None:
        """Nobody waits for it any more: what has not begun never does, and a statement that runs is interrupted."""
        with self._lock:
            self.given_up = True
            if self._runs and self.connection is not None:
                self.connection.interrupt()

    def fetchall(self) -> Any:
        return self._result


class Connection(sqlite3.Connection):
    """
    aiosqlite has no public way to do several statements in one hop, at 90 µs a hop; this is the way.

    Args:
        first: Run it as soon as the connection is open.
        path: The file, None for a database in memory.
        create: Make the file if it is absent.
    """

    hop: Hop | None = None

    def __init__(self, *args: Any, first: Hop, path: Path | None, create: bool, **options: Any) -> None:
        self._path = path
        self._proved_at = time.monotonic()
        if path is not None and create:
            _create(path)
        self._identity = _known(path)
        super().__init__(*args, **options)
        try:
            if self._identity != _known(path):
                raise Busy  # replaced, or moved by a file system of layers, in this very moment
            self.row_factory = sqlite3.Row
            first.run(self)
            if first.given_up:
                raise InterruptedError
        except BaseException:
            self.close()
            raise

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        if isinstance(parameters, Hop):
            return parameters.run(self)
        if self.hop is not None and self.hop.given_up:
            # An interruption between two statements stops neither.
            raise InterruptedError
        return _execute(self, sql, parameters)

    def roll_back(self) -> None:
        """End the transaction that is open, if one is."""
        try:
            self.rollback()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                raise
        else:
            return
        # An interruption lasts, for this statement too, as long as any other is under way: one of the application's
        # that was not read to its end. The driver does not tell which there are.
        for thing in gc.get_objects():
            if issubclass(type(thing), sqlite3.Cursor) and getattr(thing, "connection", None) is self:
                thing.close()
        self.rollback()

    def roll_back_to(self, savepoint: str) -> None:
        """Undo what was done since *savepoint*, or all of the transaction where that is not possible."""
        try:
            # Not by the method above, which executes nothing for a hop that was given up.
            _execute(self, f"rollback to savepoint {savepoint}")
            _execute(self, f"release savepoint {savepoint}")
        except sqlite3.Error:
            self.roll_back()

    def prove(self, *, now: bool = False) -> None:
        """
        See every few seconds, or *now*, that the file is still in its place: what is written into one that was moved
        away is lost with it.

        Raises:
            DatabaseUnavailableError: It is not.
        """
        at = time.monotonic()
        if at - self._proved_at < _PROVED_FOR and not now:
            return
        if self._path is not None and self._identity is not None:
            try:
                found = _identity(self._path)
            except OSError:
                return  # nothing can be told, such as in a folder that was closed meanwhile
            if found != self._identity:
                what = "deleted" if found is None else "replaced"
                raise DatabaseUnavailableError(
                    f"SQLite database {str(self._path)!r} was {what} while it was open: what this process wrote since "
                    "then went into the file that was moved away; close this repository and construct another"
                )
        self._proved_at = at


def _known(path: Path | None) -> tuple[int, int] | None:
    """As below; None also for what may not be looked at."""
    try:
        return None if path is None else _identity(path)
    except OSError:
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is; None is none. It is never opened outside of SQLite, for that would drop SQLite's locks."""
    try:
        found = os.stat(path)  # noqa: PTH116 - this is not worth an object
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _create(path: Path) -> None:
    """Make an empty database that only its owner can read: it will hold the hashes of keys."""
    # Where a link leads, as SQLite would.
    place = os.path.realpath(path)
    with contextlib.suppress(OSError):  # it is there, or SQLite will say why it cannot be
        try:
            # Not opened, for the end of that would drop the locks of another connection of this process.
            os.mknod(place, stat.S_IFREG | 0o600)
        except (AttributeError, PermissionError):
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _decoded(text: bytes) -> str:
    return text.decode(errors="replace")


def _is_undecodable(error: BaseException | None) -> bool:
    """Whether the driver came upon text that is not UTF-8, also below what a reader made of that."""
    while error is not None:
        if isinstance(error, sqlite3.OperationalError) and str(error).startswith("Could not decode to UTF-8"):
            return True
        error = error.__context__
    return False
