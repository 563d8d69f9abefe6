"""
What an error of the driver's means to a caller: out of reach, to be tried again, or refused.

No words leave here that may hold what was stored: of a server's error only its primary message, of the driver's only
what is said here.
"""

import errno

import asyncpg

from runtime_repo.errors import DatabaseUnavailableError, RefusedError, RuntimeRepoError
from runtime_repo.queries import SKIPPED
from runtime_repo.values import skipped

__all__ = ["bare", "is_conflict", "is_lost", "is_spoilt", "meaning"]

_CONFLICTS = ("40001", "40P01")
"""Two that wrote at once: the very same statement, begun again, is likely to succeed."""

_UNAVAILABLE = (
    *("08", "40", "53", "57", "58", "XX"),
    *("25006", "25P03", "25P04", "26000", "42P05", "55006", "55P03", "72000"),
)
"""SQLSTATEs, or their first characters, of what may pass without anybody mending the statement or the schema."""

_SPOILING = ("25006", "26000", "42P05")
"""What goes on for as long as the connection lives."""

_POOLER = (
    "a pooler in between runs each statement on another server connection: pass statement_cache_size=0, "
    "as behind a transaction-pooling pgbouncer"
)
_OWN_FILES = "this process has too many files open, or its machine has: close some, or raise the limit (ulimit -n)"
_OWN_THREADS = "raise the limit of this process's threads or memory (ulimit -u, the container's)"
_VERIFY = "the schema is not the one that this release needs: ensure_schema() says what differs"

_REMEDIES = {
    "08": "check that the server runs and can be reached from here",
    "22": "the server cannot store this value: correct it",
    "23": "a constraint refuses the row: correct the row, or drop the constraint if it is none of ours",
    "25006": "the server is a standby or the session is read-only: migrate on the primary, in a session that may write",
    "25P02": "a statement of this transaction had failed: let its error leave the block",
    "25P03": "the transaction was left idle for too long: keep it short",
    "25P04": "the transaction took longer than the role's transaction_timeout: keep it short",
    "26000": _POOLER,
    "28000": "check the user and the server's pg_hba.conf",
    "28P01": "check the user and the password",
    "3D000": "create the database, or name another one",
    "3F000": _VERIFY,
    "40": "two wrote at once: repeat the call, or the whole transaction that it is a part of",
    "42501": "grant the role what it lacks, or boot once under a role that has it",
    "42703": _VERIFY,
    "42883": _VERIFY,
    "42P01": _VERIFY,
    "42P05": _POOLER,
    "44": "a view's check option refuses the row: it is none of ours",
    "53": "free the server's disk, memory or connections, and try again",
    "53300": "free some connections, or raise the server's max_connections",
    "54": "it is larger than the server allows: make it smaller",
    "55P03": "somebody else holds the row or the table: try again",
    "57014": "it took longer than the role's statement_timeout, or somebody cancelled it: try again",
    "57P03": "the server was starting or stopping: wait for it, or raise startup_timeout",
    "P0": "a trigger or function of the operator's raised this: mend it, or what it names",
    "XX": "the server's log says more: try again, and check its disk if it stays",
}
"""By SQLSTATE, or by its first characters."""

_TOUCHED = ("detail", "hint", "context", "internal_query")
"""Where a server, or the driver, repeats what was stored."""


def meaning(error: BaseException, place: str, *, connecting: bool = False) -> RuntimeRepoError:
    """
    The error of ours that says what *error* means; it has no cause yet.

    Whatever is refused while *connecting* is an outage: who waits for a password to be set is right to try again.
    """
    code = _code(error)
    if _is_drivers_own(error):
        return RefusedError(
            f"{place}: a value cannot be encoded for the server: correct it, such as text with a lone surrogate "
            "or a number that is too large (it is not repeated here, since it may be secret)"
        )
    if isinstance(error, asyncpg.PostgresError):
        if code == "22P02" and SKIPPED in _words(error):
            return skipped(f"{place}: what was given")
        usual = "mend what the server names"
        if isinstance(error, asyncpg.PostgresConnectionError):
            usual = _REMEDIES["08"]
        kind = DatabaseUnavailableError if connecting or code.startswith(_UNAVAILABLE) else RefusedError
        return kind(f"{place}: {_words(error)}: {_of(_REMEDIES, code) or usual}")
    if isinstance(error, asyncpg.exceptions.TargetServerAttributeNotMatched):
        return DatabaseUnavailableError(f"{place}: no server is as target_session_attrs wants it: try again later")
    if isinstance(error, asyncpg.exceptions.OutdatedSchemaCacheError):
        return DatabaseUnavailableError(f"{place}: the schema was changed meanwhile: repeat it")
    if isinstance(error, asyncpg.InterfaceError):
        words = str(error.args[0]) if error.args else ""
        if "pool is clos" in words:
            return DatabaseUnavailableError(f"{place}: the pool is closed: open another one")
        if is_lost(error):
            # The driver keeps to itself what the server said when it ended a session that was idle.
            return DatabaseUnavailableError(
                f"{place}: the connection was lost: {_REMEDIES['08']}, and keep transactions shorter than the role's "
                "idle_in_transaction_session_timeout and transaction_timeout"
            )
        if connecting:
            return DatabaseUnavailableError(f"{place}: {_words(error)}: {_REMEDIES['08']}")
        return DatabaseUnavailableError(
            f"{place}: the connection is used by another task at this moment: let one task use it at a time"
        )
    if isinstance(error, asyncpg.InternalClientError):
        return DatabaseUnavailableError(f"{place}: the connection was not ready for a statement: try again")
    if isinstance(error, TimeoutError):
        words = _words(error) or "no answer in time"
        return DatabaseUnavailableError(f"{place}: {words}: {_REMEDIES['08']}")
    if isinstance(error, OSError):
        remedy = _REMEDIES["08"] if error.errno not in (errno.EMFILE, errno.ENFILE) else _OWN_FILES
        return DatabaseUnavailableError(f"{place}: {_words(error) or type(error).__name__}: {remedy}")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return DatabaseUnavailableError(f"{place}: this process can't start a thread: {_OWN_THREADS}")
    # Of what nobody foresaw not even the words can be trusted.
    return DatabaseUnavailableError(f"{place}: {type(error).__name__}: {_REMEDIES['08']}")


def is_conflict(error: BaseException | None) -> bool:
    """Whether the server gave one of two up that wrote at once."""
    return _code(error) in _CONFLICTS


def is_lost(error: BaseException | None) -> bool:
    """Whether the connection is of no use any more."""
    if isinstance(error, asyncpg.InternalClientError):
        # So one that was terminated between two statements shows itself: "cannot switch to state 12".
        return True
    if isinstance(error, asyncpg.InterfaceError):
        return any("closed" in str(word) or "released" in str(word) for word in error.args)
    code = _code(error)
    return isinstance(error, OSError) or (code.startswith("08") and code != "08P01") or code in ("57P01", "57P02")


def is_spoilt(error: BaseException, *codes: str) -> bool:
    """
    Whether the connection would fail the next caller, too: its server turned read-only, a pooler changed its session,
    or it met what nobody foresaw. *codes* are those SQLSTATEs to tell apart from the others.
    """
    found = [one for one in (error, error.__cause__) if one is not None]
    if any(_code(one) in (codes or _SPOILING) for one in found):
        return True
    cause = error.__cause__
    foreseen = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
    return (
        not codes
        and isinstance(error, DatabaseUnavailableError)
        and cause is not None
        and not isinstance(cause, foreseen)
    )


def bare(error: BaseException) -> BaseException:
    """
    The error without the frames behind it, which hold the password in the driver's locals, and without what a server
    or the driver repeats of a row.
    """
    error.__context__ = error.__cause__ = None
    for name in _TOUCHED:
        if getattr(error, name, None) is not None:
            setattr(error, name, None)
    if _is_drivers_own(error):
        error.args = ("invalid input for a query argument",)
    return error.with_traceback(None)


def _is_drivers_own(error: BaseException) -> bool:
    """Whether the driver could not encode an argument, which its message repeats: no server has seen it."""
    return isinstance(error, asyncpg.DataError) and error.severity is None


def _code(error: BaseException | None) -> str:
    return str(getattr(error, "sqlstate", None) or "")


def _of(remedies: dict[str, str], code: str) -> str | None:
    """By the whole SQLSTATE, else by its class."""
    return remedies.get(code) or remedies.get(code[:2])


def _words(error: BaseException) -> str:
    # Of an OSError's arguments the first is its number.
    return " ".join(str(getattr(error, "strerror", None) or (error.args[0] if error.args else "")).split())
