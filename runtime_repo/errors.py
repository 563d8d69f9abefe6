"""
Every error that leaves this package.

    RuntimeRepoError
    ├── SchemaError                    boot refused; the database was not touched
    │   ├── SchemaTooNewError          a newer release migrated it
    │   │   └── OutdatedReleaseError   ... while this one was running, which may claim nothing more
    │   ├── SchemaHistoryError         the ledger has a gap, or a name that is not ours
    │   ├── ForeignSchemaError         our table names are taken by somebody else
    │   ├── SchemaDriftError           the live structure is not the one of its version
    │   ├── SchemaOutOfDateError       a verify-only boot found migrations pending
    │   ├── SchemaLockTimeoutError     somebody else held the lock for too long
    │   ├── RemainsError               there is no store, but an interrupted restore's or a replaced one beside it
    │   ├── UnsuitableDatabaseError    its encoding, search path, owner or row security would break a promise
    │   └── MigrationError             a migration failed and was rolled back
    ├── NotFoundError(LookupError)
    ├── ConflictError
    │   ├── LeaseLostError
    │   ├── InvalidTransitionError
    │   └── PayloadMismatchError
    ├── NotQuietError                  something still runs that a quiesce has waited for
    ├── RepositoryClosedError
    ├── ConfigurationError(ValueError)
    ├── ArchiveError                   an archive is damaged, incomplete or unknown, or cannot be written
    ├── StoreInUseError                a store is not replaced or moved as long as somebody uses it
    ├── UnportableRowsError            rows hold what an archive, or the other database, cannot hold
    ├── UnreadableRowError             a row holds what this release cannot read
    ├── RefusedError                   the database understood and said no: to insist is no use
    ├── OverloadedError                too many callers wait already: try again later
    └── DatabaseUnavailableError       cannot be reached, opened or read: try again later

Numbers and names are attributes; the message says what was found, what was expected and what to do next.
A driver's exception leaves only as a ``__cause__``, and no text here ever contains a password.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

__all__ = [
    "ArchiveError",
    "ConfigurationError",
    "ConflictError",
    "DatabaseUnavailableError",
    "Difference",
    "ForeignSchemaError",
    "InvalidTransitionError",
    "LeaseHolder",
    "LeaseLostError",
    "LockHolder",
    "MigrationError",
    "NotFoundError",
    "NotQuietError",
    "OutdatedReleaseError",
    "OverloadedError",
    "PayloadMismatchError",
    "RefusedError",
    "RemainsError",
    "RepositoryClosedError",
    "RuntimeRepoError",
    "SchemaDriftError",
    "SchemaError",
    "SchemaHistoryError",
    "SchemaLockTimeoutError",
    "SchemaOutOfDateError",
    "SchemaTooNewError",
    "StoreInUseError",
    "UnportableRowsError",
    "UnreadableRowError",
    "UnsuitableDatabaseError",
    "shown",
]

_LONGEST_SHOWN = 600
"""Characters that a message repeats of a value: an id as long as ids may be fits."""


def shown(value: object) -> str:
    """
    A value as a message repeats it: as Python writes it, cut where it is long.

    Some cannot be written, such as a list that nests too deep, or a number of too many digits: then it says what it is.
    """
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - anything may come from a class of the caller's
        return f"something of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"


class RuntimeRepoError(Exception):
    """The root: catch this to catch everything that runtime_repo raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the constructor with the message: an error must be able to cross a process.
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: type[RuntimeRepoError], args: tuple[Any, ...]) -> RuntimeRepoError:
    error = kind.__new__(kind)
    error.args = args
    return error


class SchemaError(RuntimeRepoError):
    """Boot did not bring the schema to the version this release knows. Nothing was changed."""


class SchemaTooNewError(SchemaError):
    """The database was migrated by a newer release; this one must not serve it."""

    def __init__(self, found: int, supported: int) -> None:
        self.found = found
        self.supported = supported
        super().__init__(
            f"the database's schema is at version {found}, but this release supports version {supported}: "
            f"deploy a release that knows version {found}, or restore the backup taken before that upgrade"
        )


class OutdatedReleaseError(SchemaTooNewError):
    """
    A newer release has migrated the database while this one was running, and this one cannot run beside it: it claims
    nothing more. What it holds it may finish.

    *oldest* is the oldest version of the schema whose release can.
    """

    def __init__(self, found: int, supported: int, oldest: int) -> None:
        super().__init__(found, supported)
        self.oldest = oldest
        beside = "" if oldest == found else f", and releases from version {oldest} on can run beside it"
        self.args = (
            f"a newer release has migrated the database to version {found}{beside}; this one supports version "
            f"{supported}, so it claims nothing more: deploy a release that knows version {found}",
        )


class SchemaHistoryError(SchemaError):
    """The ledger does not tell the history that this release ships: a gap, or a name that is not ours."""

    def __init__(self, version: int, recorded: str | None, shipped: str | None) -> None:
        self.version = version
        self.recorded = recorded
        self.shipped = shipped
        if recorded is None:
            what = f"has no row for version {version} ({shipped!r}), although a later version is recorded"
        elif shipped is None:
            what = f"records a version {version} ({recorded!r}), which no release has ever shipped"
        else:
            what = f"records version {version} as {recorded!r}, but this release ships it as {shipped!r}"
        super().__init__(
            f"the ledger runtime_schema_migrations {what}: nothing was changed; "
            "check that this is the right database, or restore its backup"
        )


class ForeignSchemaError(SchemaError):
    """
    Objects exist that bear our names and that no ledger accounts for, or the names of what is pending: nothing is ever
    adopted. *tables* names them all; what is not a table says what it is, as in ``column runtime_attempts.queue``.
    """

    def __init__(self, tables: Sequence[str]) -> None:
        self.tables = tuple(tables)
        super().__init__(
            f"the database holds objects with our names that our migrations did not create: {', '.join(self.tables)}; "
            "nothing was changed: point to another database or runtime schema, or move these objects away"
        )


@dataclass(frozen=True)
class Difference:
    """One difference between the live catalog and the expected one. ``None`` stands for *absent*."""

    object: str
    expected: str | None
    found: str | None

    def __str__(self) -> str:
        if self.expected is None:
            return f"{self.object} is extra: {self.found}"
        if self.found is None:
            return f"{self.object} is missing: expected {self.expected}"
        return f"{self.object} differs: expected {self.expected}, found {self.found}"


class SchemaDriftError(SchemaError):
    """The live structure is not the one that its recorded version has."""

    def __init__(self, version: int, differences: Sequence[Difference]) -> None:
        self.version = version
        self.differences = tuple(differences)
        super().__init__(
            f"the database's structure has drifted from version {version}: "
            + "; ".join(map(str, self.differences))
            + ". Undo these changes, or boot with on_drift='warn' to serve all the same"
        )


class SchemaOutOfDateError(SchemaError):
    """A verify-only boot (``migrate=False``) found migrations pending."""

    def __init__(self, found: int, supported: int) -> None:
        self.found = found
        self.supported = supported
        super().__init__(
            f"the database's schema is at version {found}, this release needs version {supported}, and this boot "
            "may not migrate (migrate=False): boot once with migrate=True under a role that may create tables"
        )


@dataclass(frozen=True)
class LockHolder:
    """Who holds the lock that boot waits for. Unknown on SQLite, where no process can be asked."""

    pid: int
    application_name: str
    client_address: str | None
    """An IP address, or ``local`` for a Unix socket; None where this role may not see it."""
    transaction_age: float | None
    """Seconds since the holder's transaction began; None where it has none, or this role may not see it."""
    user: str | None = None
    session_age: float | None = None
    """Seconds since the holder connected; None where this role may not see it."""

    def __str__(self) -> str:
        if self.transaction_age is not None:
            doing = f"in a transaction of {self.transaction_age:.1f} s"
        elif self.session_age is not None:
            doing = f"in no transaction, connected for {self.session_age:.1f} s"
        else:
            doing = "in a transaction of unknown age"
        return (
            f"process {self.pid} (user {self.user or 'unknown'}, application {self.application_name!r}, "
            f"client {self.client_address or 'unknown'}, {doing})"
        )


class SchemaLockTimeoutError(SchemaError):
    """Another session held a lock that the migration needs for longer than ``lock_timeout``."""

    def __init__(self, waited: float, holder: LockHolder | None) -> None:
        self.waited = waited
        self.holder = holder
        super().__init__(
            f"waited {waited:.1f} s for the lock that a migration needs, held by {holder or 'an unknown process'}: "
            "let that process finish or end it, then boot again; or raise lock_timeout"
        )


class MigrationError(SchemaError):
    """A migration, or a step that must precede it, failed. Everything was rolled back; the cause is attached."""

    def __init__(self, version: int, name: str, reason: str) -> None:
        self.version = version
        self.name = name
        super().__init__(f"migration {version} ({name}) failed and was rolled back: {reason}, then boot again")


class UnsuitableDatabaseError(SchemaError):
    """
    The database or the session has a property under which a promise could not be kept. Nothing was changed.

    *problems* are sentences, each with what was found, what was expected and what to do.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("the database cannot be served as it is: " + "; ".join(self.problems))


class RemainsError(SchemaError):
    """
    There is no store, but beside its place stands what a restore keeps or leaves: an empty one would hide a loss.

    *remains* names it: schemas on PostgreSQL, files on SQLite.
    """

    def __init__(self, remains: Sequence[str]) -> None:
        self.remains = tuple(remains)
        super().__init__(
            f"there is no store here, but beside it stands what a restore has kept or left: {', '.join(self.remains)}; "
            "nothing was created: repeat the restore or put back what was kept, or move it away for an empty store"
        )


class NotFoundError(RuntimeRepoError, LookupError):
    """No row has this id."""

    def __init__(self, what: str, key: str) -> None:
        self.what = what
        self.key = key
        super().__init__(f"there is no {what} {shown(key)}: it was never stored here, or it was pruned")


class ConflictError(RuntimeRepoError):
    """The row is not in the state that this write needs. Nothing was changed."""


class LeaseLostError(ConflictError):
    """
    The lease is no longer yours to act on: stop working and discard what you have.

    *token* is the fencing token you hold, *current* the last one given out, *status* the attempt's status and
    *worker_id* who holds it now (None when nobody does). All three are None where the database did not answer in time
    to prove the lease: then nothing is known but that it can no longer be relied on.
    """

    def __init__(
        self, attempt_id: str, *, token: int, current: int | None, status: str | None, worker_id: str | None
    ) -> None:
        self.attempt_id = attempt_id
        self.token = token
        self.current = current
        self.status = status
        self.worker_id = worker_id
        if current is None:
            what = "can no longer be proved: the database did not answer in time, so who holds the attempt is unknown"
        else:
            what = f"is lost: the attempt is {status}, its current token is {current}, held by {worker_id or 'nobody'}"
        super().__init__(
            f"the lease on attempt {shown(attempt_id)} with token {token} {what}: "
            "stop working on it and discard the result"
        )


class InvalidTransitionError(ConflictError):
    """The verb does not apply to a row in this status: read it again and decide anew."""

    def __init__(self, what: str, key: str, *, status: str, verb: str) -> None:
        self.what = what
        self.key = key
        self.status = status
        self.verb = verb
        super().__init__(f"cannot {verb} {what} {shown(key)}: it is {status}; read it again and decide anew")


class PayloadMismatchError(ConflictError):
    """The same id was stored before with other content. What is stored was left as it is."""

    def __init__(self, what: str, key: str, differing: Sequence[str]) -> None:
        self.what = what
        self.key = key
        self.differing = tuple(differing)
        super().__init__(
            f"{what} {shown(key)} is stored already with another {', '.join(differing)}: "
            "use a new id, or repeat the call with the content that is stored"
        )


@dataclass(frozen=True)
class LeaseHolder:
    """A worker that holds leases."""

    worker_id: str
    leases: int
    """How many."""
    attempt_id: str
    """What one of them is on."""
    expires_at: datetime | None
    """When the last of them runs out, unless it is renewed; None where that is no time."""

    def __str__(self) -> str:
        until = "an unknown time" if self.expires_at is None else self.expires_at.isoformat(" ", "seconds")
        return f"worker {self.worker_id!r} ({self.leases}, such as on attempt {self.attempt_id!r}, until {until})"


class NotQuietError(RuntimeRepoError):
    """
    After *waited* seconds something still runs that ``control.quiesce`` or ``control.pause`` has waited for. The switch
    is set: nothing new begins.

    *claims* are transactions that had begun before and may still claim, *holders* the workers that hold leases.
    """

    def __init__(self, waited: float, claims: Sequence[LockHolder], holders: Sequence[LeaseHolder]) -> None:
        self.waited = waited
        self.claims = tuple(claims)
        self.holders = tuple(holders)
        if claims:
            what = f"transactions that had begun before may still claim: {_several(claims)}: end them"
        else:
            leases = sum(holder.leases for holder in holders)
            what = f"leases that are held: {leases}, by {_several(holders)}: let them finish, or run out"
        super().__init__(
            f"waited {waited:.1f} s, and nothing new is claimed, but there are still {what}, and call it again; "
            "resume() lets everybody claim"
        )


_SHOWN = 5


def _several(found: Sequence[object]) -> str:
    """The first of them, in words."""
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(map(str, found[:_SHOWN])) + more


class RepositoryClosedError(RuntimeRepoError):
    """The repository is not open: not awaited yet, or closed."""


class ConfigurationError(RuntimeRepoError, ValueError):
    """An argument is invalid: wrong type, out of range, or contradictory. Nothing was opened or written."""


class ArchiveError(RuntimeRepoError):
    """
    An archive is damaged, incomplete or of an unknown form, or its file cannot be read or written.

    *path* is the file, empty where there is nothing to write into one; *reason* is what is wrong. What was being
    restored was rolled back.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"the archive {path!r}: {reason}" if path else reason)


class StoreInUseError(RuntimeRepoError):
    """
    A store is replaced or moved only when nobody uses it. Nothing was changed.

    *reasons* are sentences, each with what was found and what to do. All of them at once can be overridden by *force*,
    but for a target that is not empty.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("the store is in use: " + "; ".join(self.reasons))


class UnportableRowsError(RuntimeRepoError):
    """
    Rows hold what an archive, or the database that they are to move to, cannot hold. Nothing was written.

    *cells* are the first of them, each with its table, row, column and what is wrong with it.
    """

    def __init__(self, cells: Sequence[str]) -> None:
        self.cells = tuple(cells)
        super().__init__(
            f"rows that another program wrote cannot be carried over: {'; '.join(self.cells)}: correct or delete them"
        )


class UnreadableRowError(RuntimeRepoError):
    """
    A row holds what this release cannot read: another program wrote it, or a newer release.

    *table* and *key* say which, *reason* why. Whoever meets one among others goes on with the others.
    """

    def __init__(self, table: str, key: str, reason: str) -> None:
        self.table = table
        self.key = key
        self.reason = reason
        super().__init__(
            f"the row {key} of {table} cannot be read: {reason}: another program or a newer release wrote it; "
            "correct or delete it"
        )


class RefusedError(RuntimeRepoError):
    """
    The database understood the statement and refused it: a constraint, a trigger, a privilege, a size, an encoding.

    Nothing was written, and to repeat the call is of no use until what the message names has been mended.
    """


class OverloadedError(RuntimeRepoError):
    """Too many callers wait for the same thing already. Nothing was done: try again later."""


class DatabaseUnavailableError(RuntimeRepoError):
    """
    The database cannot be reached, opened or read, or did not answer in time: try again later.

    *gave_way* says that a whole transaction was rolled back for a rival's sake: begun anew it is likely to succeed.
    """

    gave_way = False
