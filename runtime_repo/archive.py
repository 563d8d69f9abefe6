"""
Backup, restore and move: one archive for both databases.

An archive is a zip file: for each table of ours one member with its rows as PostgreSQL's COPY writes text, and
``manifest.json``, which says what they are and how to prove them. Which tables and columns there are is told by the
catalogs beside the migrations. A table's *row hash* is the sum, modulo 2^256, of the SHA-256 of each row's text: it is
the same on both databases, in whatever order they keep their rows.

Here are the file's form, what is refused, and the three verbs in the order in which they happen. How rows leave and
enter a database is the business of ``postgres/archive.py`` and ``sqlite/archive.py``. Whatever blocks runs in threads.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from runtime_repo.catalog import Ledger, LedgerRow, Look
from runtime_repo.database import Backend, Database
from runtime_repo.errors import ArchiveError, ConfigurationError, SchemaDriftError
from runtime_repo.schema import Migration, Policy, Refuse, Serve, decide, load_migrations
from runtime_repo.shielding import finish, settle

if TYPE_CHECKING:
    from runtime_repo.repository import RuntimeRepository

__all__ = [
    "FORMAT",
    "TOKEN_STEP",
    "BackupReport",
    "Contents",
    "Counter",
    "Grant",
    "Loaded",
    "Manifest",
    "Member",
    "MoveReport",
    "Raised",
    "Reader",
    "RestoreReport",
    "Stoppable",
    "Tally",
    "Terms",
    "Writer",
    "backup",
    "checked_path",
    "claim",
    "contents",
    "in_thread",
    "move",
    "move_between",
    "needed",
    "put_in_place",
    "restore",
    "sync_folder",
]

T = TypeVar("T")

FORMAT = 1
"""It grows when an earlier release could not read an archive any more."""

TOKEN_STEP = 1_000_000
"""By how much a restore raises the tokens of what may be claimed again: no attempt is claimed as often in a history."""

_MANIFEST = "manifest.json"
_PIECE = 1 << 20
"""Bytes that are hashed, compressed or sent in one go."""


@dataclass(frozen=True)
class Counter:
    """The last number that a column which counts by itself has given out."""

    column: str
    last: int


@dataclass(frozen=True)
class Member:
    """What one table's member holds, and how to prove it."""

    columns: tuple[str, ...]
    rows: int
    size: int
    """Bytes of text."""
    sha256: str
    row_hash: str
    counter: Counter | None = None


@dataclass(frozen=True)
class Grant:
    """A privilege on something in the runtime schema (PostgreSQL)."""

    privilege: str
    grantee: str
    """A role's name, empty for PUBLIC."""
    kind: Literal["schema", "table", "column", "default"]
    name: str = ""
    """The table; of a default privilege the kind of object that it is for."""
    column: str = ""
    owner: str = ""
    """Of a default privilege: whose objects it is for."""
    is_grantable: bool = False

    def __str__(self) -> str:
        on = {
            "schema": "the runtime schema",
            "table": f"table {self.name}",
            "column": f"column {self.name}.{self.column}",
            "default": f"{self.name} that {self.owner} creates",
        }[self.kind]
        return f"{self.privilege} on {on} to {self.grantee or 'public'}"


@dataclass(frozen=True)
class Contents:
    """What of a store goes into an archive."""

    version: int
    ledger: Ledger
    columns: Mapping[str, tuple[str, ...]]
    """Of each table."""
    left_out: tuple[str, ...]
    """What hangs on our tables and is none of ours, so that the archive does not contain it."""


@dataclass(frozen=True)
class Manifest:
    """What an archive says of itself."""

    backend: Backend
    release: str
    created_at: str
    version: int
    ledger: Ledger
    tables: Mapping[str, Member]
    left_out: tuple[str, ...] = ()
    grants: tuple[Grant, ...] = ()

    @property
    def rows(self) -> dict[str, int]:
        """How many, of each table."""
        return {name: member.rows for name, member in self.tables.items()}


@dataclass(frozen=True)
class Terms:
    """On which terms rows enter a database."""

    force: bool = False
    """Also while leases are active, others have the store open, or what is not ours depends on it."""
    keep_in: str | None = None
    """The schema that keeps what is replaced; None is a new one (PostgreSQL)."""
    is_move: bool = False
    """Into what must be empty, with every lease and token as it is; otherwise what is there is replaced."""
    patience: float = 60.0
    """Seconds to wait for locks."""


@dataclass(frozen=True)
class Loaded:
    """What became of a database that rows entered."""

    kept: str | None = None
    requeued: int = 0
    overridden: tuple[str, ...] = ()
    not_granted: tuple[str, ...] = ()


class _Report:
    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        values: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True)
class BackupReport(_Report):
    """What a backup has written, and proved by reading it back."""

    path: Path
    backend: Backend
    version: int
    """The schema's."""
    rows: Mapping[str, int]
    """Of each table."""
    size: int
    """Bytes of the file."""
    left_out: tuple[str, ...]
    """What the archive does not contain: columns, indexes, triggers of the operator's on our tables."""
    duration: float
    """Seconds."""


@dataclass(frozen=True)
class RestoreReport(_Report):
    """What a restore has put in place, and what became of what was there."""

    path: Path
    backend: Backend
    """The database that was restored into."""
    version: int
    rows: Mapping[str, int]
    kept: str | None
    """Where what was there before is kept: a schema, or on SQLite a file; None where there was nothing."""
    requeued: int
    """How many attempts were held by a lease, which ended with the history that was cut off: they are queued again."""
    left_out: tuple[str, ...]
    """As the archive says: what was on the tables and is not any more."""
    not_granted: tuple[str, ...]
    """Privileges of before that could not be granted again, each with the reason (PostgreSQL)."""
    overridden: tuple[str, ...]
    """What would have refused it without *force*."""
    duration: float


@dataclass(frozen=True)
class MoveReport(_Report):
    """What was moved."""

    source: str
    target: str
    version: int
    rows: Mapping[str, int]
    left_out: tuple[str, ...]
    duration: float


class Tally:
    """Counts and hashes COPY text that comes in pieces of any size."""

    def __init__(self) -> None:
        self.rows = 0
        self.size = 0
        self._bytes = hashlib.sha256(usedforsecurity=False)
        self._sum = 0
        self._rest = b""

    def feed(self, piece: bytes) -> None:
        self._bytes.update(piece)
        self.size += len(piece)
        lines = (self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        self.rows += len(lines)
        sha256 = hashlib.sha256
        self._sum = (self._sum + sum(map(int.from_bytes, [sha256(line).digest() for line in lines]))) % 2**256

    def member(self, columns: Sequence[str], counter: Counter | None = None) -> Member:
        """What was fed; every row must have ended."""
        return Member(tuple(columns), self.rows, self.size, self.sha256, self.row_hash, counter)

    @property
    def sha256(self) -> str:
        return self._bytes.hexdigest()

    @property
    def row_hash(self) -> str:
        return f"{self._sum:064x}"


def contents(look: Look, migrations: Sequence[Migration]) -> Contents:
    """
    What of a store that was looked at goes into an archive, at whichever version it is.

    Raises:
        SchemaError: It cannot be read for what it is: the ledger is another's or a newer release's, or tables or
            columns are missing. Whatever else has drifted is left out, and said.
        ArchiveError: There is nothing of ours.
    """
    found = look.version
    known = [migration for migration in migrations if migration.version <= found]
    # As a release would that shipped no more: nothing is pending then.
    is_known = bool(known) and found <= migrations[-1].version
    decision = decide(look, known if is_known else migrations, Policy(migrate=False, on_drift="warn"))
    if isinstance(decision, Refuse):
        if not look.ledger and not look.problems and not look.catalog.tables:
            raise _nothing_here()
        raise decision.error
    if not isinstance(decision, Serve) or look.ledger is None:
        raise _nothing_here()
    catalog = known[-1].catalog
    missing = [
        difference
        for difference in decision.tolerated
        if difference.found is None and difference.object.startswith(("table ", "column "))
    ]
    if missing:
        raise SchemaDriftError(found, missing)
    return Contents(
        found,
        look.ledger,
        {name: tuple(table.columns) for name, table in catalog.tables.items()},
        tuple(str(difference) for difference in decision.tolerated),
    )


def _nothing_here() -> ArchiveError:
    return ArchiveError("", "there is no store of ours in the database, and nothing was written: check the address")


def needed(manifest: Manifest, migrations: Sequence[Migration], path: Path) -> list[Migration]:
    """
    The migrations that lead to what an archive holds.

    Raises:
        SchemaError: A newer release wrote it, or its ledger tells another history.
        ArchiveError: It does not hold what its version has.
    """
    found = [migration for migration in migrations if migration.version <= manifest.version]
    catalog = found[-1].catalog if found else None
    look = Look(manifest.ledger, catalog or migrations[-1].catalog)
    decision = decide(look, found if manifest.version <= migrations[-1].version and found else migrations, Policy())
    if isinstance(decision, Refuse):
        raise decision.error
    expected = {name: tuple(table.columns) for name, table in catalog.tables.items()} if catalog else {}
    if {name: member.columns for name, member in manifest.tables.items()} != expected:
        raise ArchiveError(str(path), f"its tables and columns are not those of version {manifest.version}: {_ANOTHER}")
    return found


_ANOTHER = "nothing was changed; take another archive, or write it again"


class Stoppable:
    """Whoever waits for it may give up, from another thread: it ends at its next step, by an InterruptedError."""

    _is_stopped = False

    def stop(self) -> None:
        """Nobody waits for it any more."""
        self._is_stopped = True

    def _go_on(self) -> None:
        if self._is_stopped:
            raise InterruptedError


class Writer(Stoppable):
    """
    Writes an archive beside its place, readable for its owner alone, and puts it there when it has been proved.

    Its methods block: they are for threads, one at a time. ``stop`` and ``drop`` may be called by others. One that is
    *passing* is read at once, by whoever proves it then, and outlives no crash.
    """

    def __init__(self, path: Path, *, is_passing: bool = False) -> None:
        self.path = path
        self._is_passing = is_passing
        self._partial = path.with_name(path.name + ".partial")
        # None until it is opened, and again when it is closed.
        self._file: Any = None
        self._zip: Any = None
        self._member: Any = None
        self._tally = Tally()
        self._members: dict[str, Member] = {}
        self._table: tuple[str, Sequence[str]] = ("", ())

    def open(self) -> None:
        """
        Raises:
            ArchiveError: There is such a file, somebody else is writing it, or it cannot be written.
        """
        with self._translated():
            if os.path.lexists(self.path):
                raise ArchiveError(str(self.path), "there is such a file, and a backup never overwrites: name another")
            self._file = os.fdopen(claim(self._partial), "r+b")
            self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)

    def begin(self, table: str, columns: Sequence[str]) -> None:
        """What follows are rows of this table."""
        with self._translated():
            self._table = table, columns
            self._tally = Tally()
            info = zipfile.ZipInfo(f"{table}.copy", datetime.now(UTC).timetuple()[:6])
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (stat.S_IFREG | 0o600) << 16
            info._compresslevel = 1  # type: ignore[attr-defined]  # it has a public name in newer releases only
            self._member = self._zip.open(info, "w", force_zip64=True)

    def write(self, piece: bytes) -> None:
        with self._translated():
            for start in range(0, len(piece), _PIECE):
                self._go_on()
                self._member.write(piece[start : start + _PIECE])
            self._tally.feed(piece)

    def end(self, counter: Counter | None = None) -> None:
        """These were all rows of the table."""
        with self._translated():
            self._member.close()
            self._member = None
            table, columns = self._table
            self._members[table] = self._tally.member(columns, counter)

    def finish(self, found: Contents, backend: Backend, grants: Sequence[Grant] = ()) -> Manifest:
        """
        Prove what was written by reading it from the file, and put it in its place, durably.

        Raises:
            ArchiveError: It could not be written, or is not what was written; nothing is left.
        """
        manifest = Manifest(
            backend,
            _release(),
            datetime.now(UTC).isoformat(timespec="milliseconds"),
            found.version,
            found.ledger,
            dict(self._members),
            found.left_out,
            tuple(grants),
        )
        with self._translated():
            self._zip.writestr(_MANIFEST, json.dumps({"format": FORMAT} | asdict(manifest), indent=1))
            self._zip.close()
            self._file.flush()
            if not self._is_passing:
                os.fsync(self._file.fileno())
        if not self._is_passing:
            self._prove(manifest)
        with self._translated():
            put_in_place(self._partial, self.path)
            self._close()
        return manifest

    def _prove(self, manifest: Manifest) -> None:
        with contextlib.closing(Reader(self._partial, self._go_on)) as reader:
            if reader.open() != manifest:
                raise ArchiveError(str(self.path), "its manifest is not what was written: check the disk")
            for table in manifest.tables:
                for _ in reader.pieces(table):
                    pass

    def drop(self) -> None:
        """Leave nothing beside."""
        with contextlib.suppress(Exception):
            self._close()

    def _close(self) -> None:
        # The lock on it, by which nobody else takes it for what a kill has left, ends with the file.
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._partial.unlink(missing_ok=True)
            self._zip = self._member = None
            self._file.close()
            self._file = None

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except InterruptedError:
            raise
        except FileExistsError:
            reason = "there is such a file by now, and a backup never overwrites: name another"
            raise ArchiveError(str(self.path), reason) from None
        except BlockingIOError:
            raise ArchiveError(str(self.path), "another backup is writing it: wait, or name another") from None
        except OSError as error:
            reason = (
                f"it cannot be written ({error.strerror or error}): free some space, grant the folder, or name another"
            )
            raise ArchiveError(str(self.path), reason) from error


class Reader(Stoppable):
    """
    Reads an archive, and refuses whatever is not what was written.

    Its methods block: they are for threads, one at a time.

    Raises:
        ArchiveError: From each of them: it says what is damaged.
    """

    requeued = 0
    """Its rows are as they were."""

    def __init__(self, path: Path, go_on: Callable[[], None] | None = None) -> None:
        self.path = path
        self._zip: Any = None
        self._manifest: Manifest | None = None
        self._go_on_too = go_on

    @property
    def manifest(self) -> Manifest:
        """Of an archive that is open."""
        return cast(Manifest, self._manifest)

    def open(self) -> Manifest:
        with self._translated():
            self._zip = zipfile.ZipFile(self.path)
            names = self._zip.namelist()
            if _MANIFEST not in names:
                raise self._damaged("it has no manifest")
            self._manifest = self._read_manifest(self._zip.read(_MANIFEST))
            if sorted(names) != sorted([_MANIFEST, *(f"{table}.copy" for table in self._manifest.tables)]):
                raise self._damaged("its members are not those that its manifest names")
        return self._manifest

    def pieces(self, table: str) -> Generator[bytes, None, None]:
        """
        A table's text; the last step proves that it was all that was written, and nothing else.

        The row hash is left to whoever stores the rows, to be compared with what is stored.
        """
        member = self.manifest.tables[table]
        found = hashlib.sha256(usedforsecurity=False)
        with self._translated(), self._zip.open(f"{table}.copy") as file:
            while piece := file.read(_PIECE):
                self._go_on()
                found.update(piece)
                yield piece
        if found.hexdigest() != member.sha256:
            raise self._damaged(f"the rows of {table} are not those that were written")

    def proof(self, table: str) -> tuple[int, str]:
        """How many rows a database has that has stored them all, and their hash."""
        member = self.manifest.tables[table]
        return member.rows, member.row_hash

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()

    def _go_on(self) -> None:
        if self._go_on_too is not None:
            self._go_on_too()
        super()._go_on()

    def _read_manifest(self, text: bytes) -> Manifest:
        data = json.loads(text)
        if (form := data["format"]) != FORMAT:
            reason = f"its form is {form!r}, and this release reads {FORMAT}: use the release that wrote it"
            raise ArchiveError(str(self.path), reason)
        if data["backend"] not in get_args(Backend):
            raise ValueError
        tables = {
            name: Member(
                tuple(member["columns"]),
                int(member["rows"]),
                int(member["size"]),
                str(member["sha256"]),
                str(member["row_hash"]),
                Counter(str(member["counter"]["column"]), int(member["counter"]["last"]))
                if member["counter"]
                else None,
            )
            for name, member in data["tables"].items()
        }
        return Manifest(
            data["backend"],
            str(data["release"]),
            str(data["created_at"]),
            int(data["version"]),
            tuple(
                LedgerRow(int(row["version"]), str(row["name"]), int(row["applied_at_ms"])) for row in data["ledger"]
            ),
            tables,
            tuple(map(str, data["left_out"])),
            tuple(Grant(**grant) for grant in data["grants"]),
        )

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except InterruptedError:
            raise
        except OSError as error:
            reason = f"it cannot be read ({error.strerror or error}): check the path and its permissions"
            raise ArchiveError(str(self.path), reason) from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise self._damaged(f"it is no zip file, cut short or changed ({error})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged("its manifest is not what a backup writes") from error

    def _damaged(self, what: str) -> ArchiveError:
        return ArchiveError(str(self.path), f"{what}: {_ANOTHER}")


class Raised:
    """
    An archive's rows as a restored store has them: nobody of the history that was cut off can finish anything.

    - Of whatever may be claimed again, or for the first time, the next token is larger than any that that history may
      have given out. What is completed or cancelled was final in it, too.
    - What a lease holds waits again, without having lost its try: its lease has ended with that history.
    - At version 1, where a token is its lease's, that stays, for tokens to go on from, and has expired.

    They are changed on their way, since a database would have to write each of them twice.
    """

    def __init__(self, reader: Reader) -> None:
        self.requeued = 0
        self._reader = reader
        self._queued: dict[bytes, bytes] = {}
        self._tallies: dict[str, Tally] = {}

    def pieces(self, table: str) -> Generator[bytes, None, None]:
        """As the reader's, in the order of its tables."""
        change = self._change(table)
        with contextlib.closing(self._reader.pieces(table)) as pieces:
            yield from pieces if change is None else self._changed(table, pieces, change)

    def _changed(self, table: str, pieces: Iterator[bytes], change: Callable[[bytes], bytes]) -> Iterator[bytes]:
        self._tallies[table] = tally = Tally()
        rest = b""
        for piece in pieces:
            data, end, rest = (rest + piece).rpartition(b"\n")
            try:
                changed = b"".join(map(change, data.split(b"\n"))) if end else b""
            except (ValueError, IndexError) as error:
                reason = f"the rows of {table} are not what a backup writes: {_ANOTHER}"
                raise ArchiveError(str(self._reader.path), reason) from error
            if changed:
                tally.feed(changed)
                yield changed
        if table == "runtime_queue" and self._queued:
            waiting = b"".join(self._queued.values())
            tally.feed(waiting)
            yield waiting

    def proof(self, table: str) -> tuple[int, str]:
        """As the reader's, of the rows as they are now."""
        if table not in self._tallies:
            return self._reader.proof(table)
        return self._tallies[table].rows, self._tallies[table].row_hash

    def _change(self, table: str) -> Callable[[bytes], bytes] | None:
        """What becomes of a line, which ends with its newline then; None where nothing changes."""
        tables = self._reader.manifest.tables
        is_first = "lease_version" not in tables["runtime_attempts"].columns
        columns = tables[table].columns
        if table == "runtime_attempts" and not is_first:
            return self._raising(columns, tables["runtime_queue"].columns)
        if table == "runtime_leases":
            return self._expiring(columns) if is_first else lambda _: b""
        if table == "runtime_queue":
            return lambda line: b"" if line.partition(b"\t")[0] in self._queued else line + b"\n"
        return None

    def _raising(self, columns: Sequence[str], waiting: Sequence[str]) -> Callable[[bytes], bytes]:
        status, token = columns.index("status"), columns.index("lease_version")
        requeued = {"status": b"queued", "retry_at_ms": b"\\N", "lease_id": b"\\N", "ended_by": b"restore"}
        changes = [(columns.index(name), value) for name, value in requeued.items()]
        queued = [columns.index(name) for name in waiting]

        def change(line: bytes) -> bytes:
            if line.split(b"\t", status + 1)[status] in (b"completed", b"cancelled"):
                return line + b"\n"
            cells = line.split(b"\t")
            cells[token] = _raised(cells[token])
            if cells[status] in (b"leased", b"running"):
                for number, value in changes:
                    cells[number] = value
                self.requeued += 1
                self._queued[cells[0]] = b"\t".join([cells[number] for number in queued]) + b"\n"
            return b"\t".join(cells) + b"\n"

        return change

    def _expiring(self, columns: Sequence[str]) -> Callable[[bytes], bytes]:
        token, expires, proved = map(columns.index, ("version", "lease_expires_at_ms", "heartbeat_at_ms"))

        def change(line: bytes) -> bytes:
            cells = line.split(b"\t")
            cells[token] = _raised(cells[token])
            cells[expires] = min(cells[expires], cells[proved], key=int)
            return b"\t".join(cells) + b"\n"

        return change


def _raised(token: bytes) -> bytes:
    # There is none after the last; whoever has it keeps it.
    raised = int(token) + TOKEN_STEP
    return b"%d" % raised if raised < 2**63 else token


def claim(path: Path) -> int:
    """
    Open a file to be written anew, which is our own until it is closed: what a kill has left is taken over.

    Raises:
        BlockingIOError: Somebody is writing it.
        OSError: It cannot be opened.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o600)
        try:
            _lock(file)
            # Its owner may have put it in its place, or away, in this moment.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                path.chmod(0o600)
                os.ftruncate(file, 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int) -> None:
    with contextlib.suppress(ImportError):
        import fcntl  # only where there is such a lock

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def put_in_place(new: Path, path: Path) -> None:
    """
    Give a file that is whole its name, durably; *new* may stay beside as another name of it.

    Raises:
        FileExistsError: There is such a file.
    """
    # A link never takes the place of a file; where there are no links, a look beforehand has to do.
    try:
        path.hardlink_to(new)
    except FileExistsError:
        raise
    except OSError:
        if os.path.lexists(path):
            raise FileExistsError from None
        new.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in *folder* durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


async def in_thread(stop: Callable[[], None], work: Callable[..., T], *args: object) -> T:
    """
    Do *work* in a thread. Whoever is cancelled tells it to *stop*, and waits for its end, for a while.

    No thread is waited for without a bound, but one that writes to a disk which hangs may outlive that.
    """
    running = asyncio.get_running_loop().run_in_executor(None, lambda: work(*args))
    try:
        await asyncio.wait([running])
    except asyncio.CancelledError:
        stop()
        with contextlib.suppress(Exception):
            await settle(running)
        raise
    return running.result()


async def backup(database: Database, path: str | os.PathLike[str], *, patience: float) -> BackupReport:
    """Write what is stored into a new archive, and prove it."""
    began = time.monotonic()
    writer = Writer(checked_path(path))
    manifest = await _exported(database, writer, Terms(patience=patience, force=True))
    return BackupReport(
        writer.path,
        database.backend,
        manifest.version,
        manifest.rows,
        writer.path.stat().st_size,
        manifest.left_out,
        time.monotonic() - began,
    )


async def _exported(database: Database, writer: Writer, terms: Terms, target: Backend | None = None) -> Manifest:
    try:
        await in_thread(writer.stop, writer.open)
        return await database.export(writer, load_migrations(database.backend), terms, target or database.backend)
    except BaseException:
        writer.stop()
        await finish(in_thread(writer.stop, writer.drop))
        raise


async def restore(
    database: Database, path: str | os.PathLike[str], *, force: bool, keep_in: str | None, patience: float
) -> RestoreReport:
    """Put an archive's content in the place of what is stored, which is kept."""
    began = time.monotonic()
    checked = checked_path(path)
    async with _opened(checked) as reader:
        migrations = needed(reader.manifest, load_migrations(database.backend), checked)
        loaded = await database.load(reader, migrations, Terms(force, keep_in, patience=patience))
        manifest = reader.manifest
    return RestoreReport(
        checked,
        database.backend,
        manifest.version,
        manifest.rows,
        loaded.kept,
        loaded.requeued,
        manifest.left_out,
        loaded.not_granted,
        loaded.overridden,
        time.monotonic() - began,
    )


@contextlib.asynccontextmanager
async def _opened(path: Path) -> AsyncIterator[Reader]:
    reader = Reader(path)
    try:
        await in_thread(reader.stop, reader.open)
        yield reader
    finally:
        reader.close()


async def move(
    source: "RuntimeRepository",
    target: "RuntimeRepository",
    *,
    force: bool = False,
    folder: str | os.PathLike[str] | None = None,
) -> MoveReport:
    """
    Move a store to another place, such as from SQLite to PostgreSQL: every row with its id, token, lease and number.

    Quiesce the source first: what is written to it after the move began is not moved. It is only read, and goes on
    existing. On the target, which must be empty, everything happens in one transaction, and is committed when it is
    proved to be the same rows. Neither is booted or migrated: the version stays what it is.

    A move that was killed can be repeated: the target is empty then, or holds the very same rows, and that is success.

    Args:
        source: Where the rows are; awaited or not.
        target: Where they go; not awaited. On PostgreSQL its role must be allowed to create tables.
        force: Move active leases, too, whose holders go on working on the source until then.
        folder: Where an archive of it is written meanwhile, and left by a kill; the system's folder for such files
            unless given.

    Raises:
        StoreInUseError: The target holds something else, or leases are active. Nothing was written.
        UnportableRowsError: The target cannot hold some of the rows. Nothing was written.
        SchemaError: The source is none of ours, or of a newer release; or the target is unsuitable.
        ArchiveError: The folder cannot be written.
        ConfigurationError: The target is open, or both are the same.
        DatabaseUnavailableError: One of them cannot be reached, opened or read.
    """
    return await source._move(target, force=force, folder=folder)


async def move_between(
    source: Database, target: Database, *, force: bool, folder: str | os.PathLike[str] | None, patience: float
) -> MoveReport:
    """As ``move``, between databases."""
    began = time.monotonic()
    # On the disk and not straight across: so neither of two databases waits in a transaction for the other.
    with tempfile.TemporaryDirectory(prefix="runtime-repo-move-", dir=folder, ignore_cleanup_errors=True) as name:
        writer = Writer(Path(name) / "moved.archive", is_passing=True)
        terms = Terms(force, is_move=True, patience=patience)
        await _exported(source, writer, terms, target.backend)
        async with _opened(writer.path) as reader:
            manifest = reader.manifest
            migrations = needed(manifest, load_migrations(target.backend), writer.path)
            await target.load(reader, migrations, terms)
    return MoveReport(
        repr(source),
        repr(target),
        manifest.version,
        manifest.rows,
        manifest.left_out,
        time.monotonic() - began,
    )


def checked_path(path: str | os.PathLike[str]) -> Path:
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ConfigurationError(f"the archive's path is {path!r}: expected the path of a file")
    return Path(name).absolute()


def _release() -> str:
    try:
        return version("runtime-repo")
    except PackageNotFoundError:
        return "unknown"
