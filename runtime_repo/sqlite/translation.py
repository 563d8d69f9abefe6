"""What the driver raises, as what this package raises: busy, unavailable or refused, told apart by SQLite's code."""

import os
import sqlite3
from pathlib import Path

from runtime_repo.database import Busy
from runtime_repo.errors import DatabaseUnavailableError, RefusedError, RuntimeRepoError
from runtime_repo.queries import SKIPPED
from runtime_repo.values import skipped

__all__ = ["is_writable", "translated"]

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_SCHEMA}
"""To be tried again."""

_UNAVAILABLE = {
    sqlite3.SQLITE_INTERNAL,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_ABORT,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_MISUSE,
    sqlite3.SQLITE_NOLFS,
    sqlite3.SQLITE_NOTADB,
}
"""Something around the database fails. All that is in neither set is about the statement or its values."""

_REMEDIES = {
    sqlite3.SQLITE_CONSTRAINT_TRIGGER: "a trigger forbids it: mend the trigger, or write what it lets through",
    sqlite3.SQLITE_CONSTRAINT: "a constraint forbids it: mend the constraint, or write what it allows",
    sqlite3.SQLITE_TOOBIG: "a value is longer than this database takes: keep it elsewhere and a reference to it here",
    sqlite3.SQLITE_AUTH: "the connection's authorizer forbids it: let it through",
    sqlite3.SQLITE_ERROR: "ensure_schema() says what is missing or changed: undo it, or mend the trigger that failed",
}


_MOVED = "the file was deleted or replaced while it was open: close this repository and construct another"


def translated(error: Exception, path: Path | None) -> Exception:
    """What to raise from *error*. No text here holds a value that was given or stored."""
    if isinstance(error, (RuntimeRepoError, Busy)):
        return error
    if isinstance(error, sqlite3.Error) and (code := getattr(error, "sqlite_errorcode", None)) is not None:
        if code & 0xFF in _BUSY:
            return Busy()
        if code & 0xFF in _UNAVAILABLE:
            moved = code == sqlite3.SQLITE_READONLY_DBMOVED
            return _unavailable(path, str(error), _MOVED if moved else _reason(code & 0xFF, path))
        if code == sqlite3.SQLITE_ERROR and SKIPPED in str(error):
            return skipped(f"SQLite database {str(path or ':memory:')!r}: what was given")
        remedy = _REMEDIES.get(code) or _REMEDIES.get(code & 0xFF, "write what SQLite takes there")
        return RefusedError(f"SQLite refused to do it: {error}: {remedy}")
    match error:
        case MemoryError():
            return _unavailable(path, "out of memory", "give this process more of it")
        case RecursionError():
            return RefusedError("a value is nested too deeply for SQLite's driver: flatten it")
        case UnicodeError():
            return RefusedError("a text holds what is no character (a lone surrogate): remove it")
        case OverflowError():
            return RefusedError("a whole number is beyond 64 bits, and SQLite holds none such: pass a smaller one")
        case sqlite3.Error() if "closed" not in str(error):
            return RefusedError("a value has a type that SQLite cannot hold: pass text, a number or bytes")
        case sqlite3.Error() | ValueError():
            return _unavailable(path, "its connection was closed", "close this repository and construct another")
        case RuntimeError() if "thread" in str(error):
            return _unavailable(
                path, str(error), "raise the limit of this process's threads or memory (ulimit -u, the container's)"
            )
        case OSError():
            return _unavailable(path, error.strerror or type(error).__name__, _reason(0, path))
        case _:
            return RefusedError(f"SQLite's driver refused to do it ({type(error).__name__}): see the cause")


def _unavailable(path: Path | None, what: str, reason: str) -> DatabaseUnavailableError:
    return DatabaseUnavailableError(f"SQLite database {str(path or ':memory:')!r}: {what}: {reason}")


def _reason(code: int, path: Path | None) -> str:
    """Why, as far as it can be seen, and what to do."""
    if code == sqlite3.SQLITE_INTERRUPT:
        return "its statement was interrupted: call it again"
    if code == sqlite3.SQLITE_NOMEM:
        return "give this process more memory"
    if code == sqlite3.SQLITE_FULL:
        return "the disk is full: free some space"
    if path is None:
        return "construct another"
    if os.path.isdir(path):  # noqa: PTH112 - pathlib's raises where it may not look
        return "it is a folder: name a file in it"
    if not os.path.isdir(path.parent):  # noqa: PTH112
        return f"the folder {str(path.parent)!r} does not exist: create it first"
    if code == sqlite3.SQLITE_NOTADB:
        return "the file is no SQLite database: name another path, or move the file away"
    if code == sqlite3.SQLITE_CORRUPT:
        return "the file is damaged or truncated: restore a backup"
    if code == sqlite3.SQLITE_CANTOPEN and is_writable(path):
        return "this process may have too many files open: close some, or raise its limit (ulimit -n)"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return "this process may not write the file or its folder (WAL needs both): grant it, or name another path"
    return "check the file, its disk and its permissions"


def is_writable(path: Path) -> bool:
    """Whether this process may read and write the file, and write beside it."""
    effective = os.access in os.supports_effective_ids
    return os.access(path, os.R_OK | os.W_OK, effective_ids=effective) and os.access(
        path.parent, os.W_OK, effective_ids=effective
    )
