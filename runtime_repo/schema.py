"""
Boot: bring a database's schema to the version that this release ships, or say why not.

``ensure_schema`` is the whole of it, in the order in which it happens; ``decide`` is its judgement, a pure function,
the same for both databases. The migrations are files: their names are their numbers and names, and the newest one is
the supported version.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

from runtime_repo.catalog import CONTROL, LEDGER, Catalog, Look, Table, catalog_from_json, compare
from runtime_repo.database import BootTransaction, Busy, Database, Lost, Row
from runtime_repo.errors import (
    ConfigurationError,
    Difference,
    ForeignSchemaError,
    MigrationError,
    RefusedError,
    RemainsError,
    RuntimeRepoError,
    SchemaDriftError,
    SchemaError,
    SchemaHistoryError,
    SchemaLockTimeoutError,
    SchemaOutOfDateError,
    SchemaTooNewError,
    UnsuitableDatabaseError,
)
from runtime_repo.queries import split_statements
from runtime_repo.values import maybe_version

__all__ = [
    "AppliedMigration",
    "Compatibility",
    "Decision",
    "Migrate",
    "Migration",
    "PlannedMigration",
    "Policy",
    "Refuse",
    "SchemaPlan",
    "SchemaReport",
    "SchemaStatus",
    "Serve",
    "can_run",
    "decide",
    "ensure_schema",
    "inspect_schema",
    "inspected",
    "load_migrations",
    "plan_schema",
    "status_of",
]

_log = logging.getLogger("runtime_repo")

_POLL_FIRST = 0.05
_POLL_LAST = 0.25

_LOSSES = 5
"""How many connections may be lost during one boot: more is no accident."""


@dataclass(frozen=True)
class Migration:
    """One step forward: its number and name, its SQL with tokens, and the catalog it leads to."""

    version: int
    name: str
    sql: str
    catalog: Catalog
    check: str = ""
    """
    A query, with tokens, for what no database may hold that is to be migrated: *what* it is, the *number* of rows, and
    the key of one of them as *example*. It runs on a database of the version before, if that can be before anything is
    done.
    """

    def __post_init__(self) -> None:
        for statement in split_statements(self.sql):
            bare = re.sub(r"--[^\n]*|/\*.*?\*/", "", statement, flags=re.DOTALL).strip()
            if re.match(r"(begin|start|commit|end|rollback|abort|savepoint|release|prepare)\b", bare, re.IGNORECASE):
                raise ConfigurationError(
                    f"migration {self.version} ({self.name}) controls its own transaction ({bare.split()[0]}): "
                    "remove that statement; a migration commits together with its ledger row"
                )
        for line in re.findall(r"^--\s*oldest\b.*", self.sql, re.MULTILINE | re.IGNORECASE):
            number = re.fullmatch(r"-- oldest: (\d+)", line)
            if number is None or not 1 <= int(number[1]) <= self.version:
                raise ConfigurationError(
                    f"migration {self.version} ({self.name}) says {line!r}: expected '-- oldest: N', the oldest "
                    f"version whose release can run beside it, from 1 to {self.version}"
                )

    @property
    def oldest(self) -> int:
        """The oldest version whose release can still run beside it, as its line ``-- oldest: 2`` says; else its own."""
        said = re.search(r"^-- oldest: (\d+)$", self.sql, re.MULTILINE)
        return self.version if said is None else int(said[1])


@dataclass(frozen=True)
class Policy:
    """How the operator wants boot to decide."""

    migrate: bool = True
    on_drift: Literal["refuse", "warn"] = "refuse"
    lock_timeout: float = 60.0
    """Seconds."""
    before_migrate: Callable[[], Awaitable[object]] | None = None


@dataclass(frozen=True)
class AppliedMigration:
    """A migration that this boot applied, and how long it took in seconds."""

    version: int
    name: str
    duration: float


@dataclass(frozen=True)
class SchemaReport:
    """What boot found and did."""

    from_version: int
    """The version found; 0 is a fresh database."""
    to_version: int
    applied: tuple[AppliedMigration, ...] = ()
    """What this boot itself applied; empty when the schema was current or another process migrated it."""
    waited: float = 0.0
    """Seconds spent waiting for another process's migration or lock."""
    backup: Path | None = None
    """The backup that was taken before an upgrade (SQLite)."""
    tolerated: tuple[Difference, ...] = ()
    """Extra columns and indexes of the operator's and, with ``on_drift="warn"``, every drift."""


@dataclass(frozen=True)
class Serve:
    """The schema is the one this release knows."""

    from_version: int
    tolerated: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class Migrate:
    """These migrations are pending."""

    from_version: int
    pending: tuple[Migration, ...]
    tolerated: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class Refuse:
    """This database must not be served or changed, because."""

    error: SchemaError


Decision = Serve | Migrate | Refuse


@dataclass(frozen=True)
class SchemaStatus:
    """What a read-only look at a database finds."""

    found: int
    """The version recorded; 0 is a database that holds nothing of ours, or one whose ledger cannot be read."""
    supported: int
    """The newest version that this release knows."""
    pending: tuple[str, ...]
    """The names of the migrations that lie between the two, in order."""
    differences: tuple[Difference, ...]
    """Every drift from the version recorded, and everything extra."""
    refusal: str | None
    """Why a boot with this policy would be refused; None if it would serve, or migrate and serve."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PlannedMigration:
    """A migration that a boot would apply, and all that it would execute for it, the ledger's row included."""

    version: int
    name: str
    sql: str


@dataclass(frozen=True)
class SchemaPlan:
    """What a boot would do."""

    found: int
    """The version recorded; 0 is a database that holds nothing of ours, or one whose ledger cannot be read."""
    supported: int
    """The newest version that this release knows."""
    refusal: str | None
    """Why a boot would be refused; None if it would serve, or migrate and serve."""
    migrations: tuple[PlannedMigration, ...] = ()
    """What it would apply, in order and in one transaction; nothing where it is refused or the schema is current."""
    backup: str | None = None
    """The copy that it would take before that (SQLite), with ``<time>`` in the place of the time."""
    tolerated: tuple[Difference, ...] = ()
    """What it would serve in spite of."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Compatibility:
    """Whether this release can run on a database as it is now, and which others can."""

    found: int
    """The version recorded; 0 is a database that holds nothing of ours, or one whose ledger cannot be read."""
    supported: int
    """The newest version that this release knows."""
    oldest: int
    """
    The oldest release, by the version that it supports, whose workers go on: beside the schema that is there or, where
    this release is newer, beside what a boot of it makes of that. Older ones end with ``OutdatedReleaseError``.
    """
    answer: bool
    """Whether a boot of this release serves."""
    is_outdated: bool
    """Whether workers of this release that run already claim nothing more; where they may go on, no new one boots."""
    why: str
    """A sentence."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


@cache
def load_migrations(backend: str) -> tuple[Migration, ...]:
    """
    The migrations that this release ships for *backend*, oldest first.

    ``NNNN_name.sql`` is the migration, ``NNNN_name.catalog.json`` what it leads to, and ``checks/NNNN_name.sql``, if
    there is one, the query for what it could not migrate.

    Raises:
        ConfigurationError: A migration has no catalog yet.
    """
    folder = files("runtime_repo") / "migrations" / backend
    texts = {file.name: file for file in folder.iterdir()}
    checks = {file.name: file for file in texts["checks"].iterdir()}
    migrations = []
    for filename in sorted(name for name in texts if name.endswith(".sql")):
        stem = filename.removesuffix(".sql")
        version, _, name = stem.partition("_")
        if f"{stem}.catalog.json" not in texts:
            raise ConfigurationError(f"migration {stem} has no catalog beside it: run python -m tests.catalogs")
        catalog = catalog_from_json(texts[f"{stem}.catalog.json"].read_text(encoding="utf-8"))
        check = checks[filename].read_text(encoding="utf-8") if filename in checks else ""
        sql = texts[filename].read_text(encoding="utf-8")
        migrations.append(Migration(int(version), name, sql, catalog, check))
    return tuple(migrations)


def decide(look: Look, migrations: Sequence[Migration], policy: Policy) -> Decision:
    """
    Serve, migrate these, or refuse because: unsuitable, foreign, too new, a gap or another name, drift, remains,
    pending.

    What only stands in the way of a migration is served, and told of, but not migrated: a name that is taken, a schema
    or a table whose owner may be anybody.
    """
    ledger = look.ledger
    supported = migrations[-1].version
    recorded = {row.version: row.name for row in ledger or ()}
    version = max(recorded, default=0)
    shipped = {migration.version: migration for migration in migrations}
    pending = tuple(m for m in migrations if m.version > version)

    if look.problems:
        return Refuse(UnsuitableDatabaseError(look.problems))
    if foreign := _foreign(look, shipped.get(min(version, supported)), migrations[-1]):
        return Refuse(ForeignSchemaError(foreign))
    if version > supported:
        return Refuse(SchemaTooNewError(version, supported))
    for number in sorted(recorded.keys() | {m.version for m in migrations if m.version <= version}):
        name = shipped[number].name if number in shipped else None
        if recorded.get(number) != name:
            return Refuse(SchemaHistoryError(number, recorded.get(number), name))

    drift, extra = _compared(shipped[version], look) if version else ([], [])
    if drift and policy.on_drift == "refuse":
        return Refuse(SchemaDriftError(version, drift))
    tolerated = (*drift, *extra, *look.reservations)
    if version == supported:
        return Serve(version, tolerated)
    if look.remains:
        return Refuse(RemainsError(look.remains))
    if not policy.migrate:
        return Refuse(SchemaOutOfDateError(version, supported))
    if taken := _taken(look, shipped.get(version), pending):
        return Refuse(ForeignSchemaError(taken))
    if look.reservations:
        return Refuse(UnsuitableDatabaseError([str(reservation) for reservation in look.reservations]))
    return Migrate(version, pending, tolerated)


def _compared(recorded: Migration, look: Look) -> tuple[list[Difference], list[Difference]]:
    """What is drift, and what is tolerated; less is where strangers may have made it."""
    return compare(recorded.catalog, look.catalog, is_trusted=not look.reservations)


def _foreign(look: Look, recorded: Migration | None, newest: Migration) -> list[str]:
    """Our names on what our migrations did not create."""
    ledger, catalog = look.ledger, look.catalog
    if ledger and recorded and catalog is recorded.catalog:
        return []  # recognized: a look answers with the very catalog that it was given
    ours = newest.catalog.tables.keys() | {LEDGER}
    taken = [name for name in sorted(catalog.tables) if name in ours]
    if not ledger:
        return taken
    expected = {LEDGER, *(recorded.catalog.tables if recorded else ours)}
    return [name for name in taken if catalog.tables[name].kind != "table" or name not in expected]


def _taken(look: Look, recorded: Migration | None, pending: Sequence[Migration]) -> list[str]:
    """The names of what the pending migrations create, where something has them already: they would fail half-way."""
    if not look.names:
        return []
    tables = dict(recorded.catalog.tables) if recorded else {}
    taken: set[str] = set()
    for migration in pending:
        words = set(re.findall(r"\w+", migration.sql))
        for name, table in migration.catalog.tables.items():
            before = tables.get(name, Table({}))
            # An index whose name the migration leaves to the database gets one that is free.
            indexes = words & table.indexes.keys()
            created = {name} - tables.keys() | indexes - before.indexes.keys()
            taken |= created & look.names
            live = look.catalog.tables[name].columns if name in tables and name in look.catalog.tables else ()
            taken |= {f"column {name}.{new}" for new in table.columns.keys() - before.columns.keys() if new in live}
        tables = dict(migration.catalog.tables)
    return sorted(taken)


async def ensure_schema(database: Database, migrations: Sequence[Migration], policy: Policy) -> SchemaReport:
    """
    Bring *database* to the newest of *migrations*, exactly once among any number of processes.

    Look without a lock; when something is pending take the lock, look and decide again, apply everything with its
    ledger rows, verify, and commit as one. Whatever fails leaves the database as it was.

    Raises:
        SchemaError: Boot is refused; the subclass says why.
        DatabaseUnavailableError: The database cannot be read.
    """
    catalogs = [migration.catalog for migration in migrations]
    patience = _Patience(policy.lock_timeout)
    preparation: _Preparation | None = None
    look: Look | None = None
    found: int | None = None
    losses = 0
    while True:
        try:
            look = look or await database.open(catalogs)
            decision = decide(look, migrations, policy)
            if isinstance(decision, Refuse):
                raise decision.error
            found = decision.from_version if found is None else found
            if isinstance(decision, Serve):
                await database.serve(len(migrations))
                return _report(found, decision, patience)
            patience.begin()
            async with database.lock() as transaction:
                look = await transaction.look(catalogs)
                decision = decide(look, migrations, policy)
                if not isinstance(decision, Migrate):
                    continue
                preparation = preparation or await _prepare(database, transaction, decision, policy)
                applied = await _apply(transaction, look, decision, migrations)
                verified = _verify(await transaction.look(catalogs), migrations, policy)
            await database.serve(len(migrations))
            return _report(decision.from_version, verified, patience, applied, preparation.backup)
        except Busy as busy:
            if patience.exhausted:
                raise SchemaLockTimeoutError(patience.waited, await database.lock_holder()) from busy.__cause__
            await patience.wait()
            look = None
        except Lost as lost:
            # As while connecting: the next look connects anew, and says whether a commit got through.
            losses += 1
            if losses == _LOSSES or patience.exhausted:
                raise (error := _behind(lost)) from error.__cause__
            await patience.wait()
            look = None


async def inspect_schema(database: Database, migrations: Sequence[Migration], policy: Policy) -> SchemaStatus:
    """
    Look at *database* and say what a boot with this *policy* would make of it. Nothing is created or written.

    Raises:
        DatabaseUnavailableError: The database cannot be read.
        SchemaLockTimeoutError: It was locked for longer than ``lock_timeout``.
    """
    return status_of(await inspected(database, migrations, policy), migrations, policy)


def status_of(look: Look, migrations: Sequence[Migration], policy: Policy) -> SchemaStatus:
    """What a boot would make of what was seen."""
    found = look.version
    recorded = next((migration for migration in migrations if migration.version == found), None)
    drift, extra = _compared(recorded, look) if recorded else ([], [])
    decision = decide(look, migrations, policy)
    return SchemaStatus(
        found,
        migrations[-1].version,
        tuple(migration.name for migration in migrations if migration.version > found),
        (*drift, *extra, *look.reservations),
        str(decision.error) if isinstance(decision, Refuse) else None,
    )


async def plan_schema(database: Database, migrations: Sequence[Migration], policy: Policy) -> SchemaPlan:
    """
    Say what a boot with this *policy* would do now, and in which words. Nothing is created or written.

    Where it would migrate, the rows are read that it would be refused for: that takes as long as in a boot.

    Raises:
        DatabaseUnavailableError: The database cannot be read.
        SchemaLockTimeoutError: It was locked for longer than ``lock_timeout``.
    """
    look = await inspected(database, migrations, policy)
    decision = decide(look, migrations, policy)
    found = look.version
    supported = migrations[-1].version
    if isinstance(decision, Refuse):
        return SchemaPlan(found, supported, str(decision.error))
    if isinstance(decision, Serve):
        return SchemaPlan(found, supported, None, tolerated=decision.tolerated)
    if found and (refusal := await _foreseen(database, decision.pending[0])):
        return SchemaPlan(found, supported, refusal)
    return SchemaPlan(
        found,
        supported,
        None,
        tuple(_planned(database, look, decision, migrations)),
        database.backup_name(found) if found else None,
        decision.tolerated,
    )


async def _foreseen(database: Database, first: Migration) -> str | None:
    """Why a boot would be refused by the check of the *first* migration."""
    if not first.check:
        return None
    try:
        async with database.reading() as reader:
            problems = _problems(await reader.ask(first.check))
    except RefusedError as error:
        return str(MigrationError(first.version, first.name, str(error)))
    return str(UnsuitableDatabaseError(problems)) if problems else None


def _planned(
    database: Database, look: Look, decision: Migrate, migrations: Sequence[Migration]
) -> Iterator[PlannedMigration]:
    """In the words of ``_apply``."""

    def said(query: str, *args: object) -> str:
        text = database.text(query)
        for number, value in enumerate(args, 1):
            text = text.replace(f"${number}", f"'{value}'" if isinstance(value, str) else str(value))
        return text

    for migration in decision.pending:
        statements = []
        if migration is decision.pending[0]:
            if not look.namespace:
                statements.append(said("schema.create_namespace"))
            if look.ledger is None:
                statements.append(said("schema.create_ledger"))
        statements.append(database.filled(migration.sql))
        statements.append(said("schema.record", migration.version, migration.name))
        if migration is decision.pending[-1] and (kept := _kept(look, migration, migrations)):
            statements.append(said(*kept))
        sql = "\n\n".join(f"{statement.strip().removesuffix(';')};" for statement in statements)
        yield PlannedMigration(migration.version, migration.name, sql + "\n")


async def inspected(database: Database, migrations: Sequence[Migration], policy: Policy) -> Look:
    """
    What a look at *database* sees, which creates and writes nothing.

    Raises:
        DatabaseUnavailableError: The database cannot be read.
        SchemaLockTimeoutError: It was locked for longer than ``lock_timeout``.
    """
    catalogs = [migration.catalog for migration in migrations]
    return await _inspected(database, catalogs, _Patience(policy.lock_timeout))


async def can_run(database: Database, migrations: Sequence[Migration], policy: Policy) -> Compatibility:
    """
    Look at *database* and say whether this release can run on it. Nothing is created or written.

    Raises:
        As ``inspect_schema``.
    """
    look = await inspected(database, migrations, policy)
    found = look.version
    supported = migrations[-1].version
    decision = decide(look, migrations, policy)
    oldest = _oldest(migrations) if found <= supported else maybe_version(look.oldest) or found
    is_outdated = found > supported and oldest > supported
    match decision:
        case Serve():
            why = f"the schema is at version {found}, which this release serves"
        case Migrate(pending=pending):
            names = ", ".join(migration.name for migration in pending)
            why = f"a boot of this release applies {names}, and serves"
            if found and oldest > found:
                why += f"; workers of releases that know no version {oldest} end then"
        case Refuse(error=error):
            why = str(error)
            if found > supported:
                going_on = "end" if is_outdated else "go on"
                why += f"; workers of this release that run already {going_on}"
    return Compatibility(found, supported, oldest, not isinstance(decision, Refuse), is_outdated, why)


def _oldest(migrations: Sequence[Migration]) -> int:
    """The oldest release that can run beside what all of *migrations* have made."""
    return max(migration.oldest for migration in migrations)


async def _inspected(database: Database, catalogs: Sequence[Catalog], patience: "_Patience") -> Look:
    patience.begin()
    losses = 0
    while True:
        try:
            return await database.inspect(catalogs)
        except Busy as busy:
            if patience.exhausted:
                holder = await database.lock_holder(apart=True)
                raise SchemaLockTimeoutError(patience.waited, holder) from busy.__cause__
        except Lost as lost:
            losses += 1
            if losses == _LOSSES or patience.exhausted:
                raise (error := _behind(lost)) from error.__cause__
        await patience.wait()


def _behind(lost: Lost) -> BaseException:
    """The error of ours that says what was lost."""
    return lost.__cause__ or lost


class _Patience:
    """A bounded wait in short, growing steps, each of random length so that waiters do not march together."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._step = _POLL_FIRST
        self._since: float | None = None
        self.waited = 0.0
        """Seconds of tries that were in vain, and of the pauses between them."""

    def begin(self) -> None:
        """Count from the first try on."""
        if self._since is None:
            self._since = time.monotonic()

    @property
    def exhausted(self) -> bool:
        """Whether there is no more patience, after a try that was in vain."""
        self._count()
        return self.waited >= self._timeout

    async def wait(self) -> None:
        pause = min(self._step * random.uniform(0.5, 1.5), self._timeout - self.waited)  # noqa: S311
        await asyncio.sleep(max(pause, 0))
        self._step = min(self._step * 2, _POLL_LAST)
        self._count()

    def _count(self) -> None:
        self.begin()
        now = time.monotonic()
        self.waited += now - cast(float, self._since)
        self._since = now


@dataclass(frozen=True)
class _Preparation:
    backup: Path | None


async def _check(transaction: BootTransaction, migration: Migration) -> None:
    """Find what the migration would fail for, in a database of the version before it."""
    try:
        rows = await transaction.ask(migration.check) if migration.check else ()
    except RuntimeRepoError as error:
        raise MigrationError(migration.version, migration.name, str(error)) from error.__cause__
    if problems := _problems(rows):
        raise UnsuitableDatabaseError(problems)


def _problems(rows: Iterable[Row]) -> list[str]:
    """What a migration's check has found."""
    return [
        f"{row['number']} rows have {row['what']}, such as the one of {row['example']!r}: change or delete them"
        for row in rows
        if row["number"]
    ]


async def _prepare(database: Database, transaction: BootTransaction, decision: Migrate, policy: Policy) -> _Preparation:
    """What happens once, under the lock, before the first change."""
    if decision.from_version:
        await _check(transaction, decision.pending[0])
    backup = None
    if decision.from_version:
        try:
            backup = await database.take_backup(decision.from_version)
        except RuntimeRepoError as error:
            first = decision.pending[0]
            raise MigrationError(first.version, first.name, str(error)) from error.__cause__
    if policy.before_migrate is not None:
        await policy.before_migrate()
    return _Preparation(backup)


async def _apply(
    transaction: BootTransaction, look: Look, decision: Migrate, migrations: Sequence[Migration]
) -> tuple[AppliedMigration, ...]:
    """Apply what is pending, each with its ledger row, and keep which releases can run beside the last."""
    applied: list[AppliedMigration] = []
    for migration in decision.pending:
        started = time.monotonic()
        try:
            if migration is decision.pending[0]:
                if not look.namespace:
                    await transaction.execute("schema.create_namespace")
                if look.ledger is None:
                    await transaction.execute("schema.create_ledger")
            elif decision.from_version:
                await _check(transaction, migration)
            await transaction.script(migration.sql)
            await transaction.fetch("schema.record", migration.version, migration.name)
            if migration is decision.pending[-1] and (kept := _kept(look, migration, migrations)):
                await transaction.fetch(*kept)
        except (ConfigurationError, SchemaError):
            raise
        except RuntimeRepoError as error:
            raise MigrationError(migration.version, migration.name, str(error)) from error.__cause__
        applied.append(AppliedMigration(migration.version, migration.name, time.monotonic() - started))
    return tuple(applied)


def _kept(look: Look, last: Migration, migrations: Sequence[Migration]) -> tuple[str, str] | None:
    """The query, with its argument, that keeps which releases can run beside the *last* of what is applied."""
    if CONTROL not in last.catalog.tables:
        return None
    oldest = _oldest(migrations)
    if oldest < last.version:
        return "control.allow", str(oldest)
    return ("control.clear", "oldest") if CONTROL in look.catalog.tables else None


def _verify(look: Look, migrations: Sequence[Migration], policy: Policy) -> Serve:
    """Prove, before the commit, that the migrations led where they should."""
    newest = migrations[-1]
    match decide(look, migrations, policy):
        case Serve() as verified:
            return verified
        case Refuse(error=error):
            reason = f"it did not lead to its catalog: {error}: mend the migration or its catalog file"
            raise MigrationError(newest.version, newest.name, reason)
        case Migrate(pending=pending):
            missing = pending[0]
            reason = "its ledger row is missing after it was written: find what deletes it, such as a trigger"
            raise MigrationError(missing.version, missing.name, reason)


def _report(
    found: int,
    decision: Serve,
    patience: _Patience,
    applied: tuple[AppliedMigration, ...] = (),
    backup: Path | None = None,
) -> SchemaReport:
    for difference in decision.tolerated:
        level = logging.INFO if difference.expected is None else logging.WARNING
        _log.log(level, "schema: %s (tolerated)", difference)
    return SchemaReport(found, decision.from_version, applied, patience.waited, backup, decision.tolerated)
