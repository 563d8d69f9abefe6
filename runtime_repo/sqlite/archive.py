"""
How rows leave a SQLite file for an archive, and how a file is replaced by one.

Everything here runs in a thread. The file itself is opened by SQLite alone: to close it after anybody else's ``open``
would drop the locks that this process has on it. A restore builds its content in ``<file>.restoring``, proves it there,
and brings it into the file in one transaction, whose first step keeps what was there in ``<file>.before-<time>``. Where
there is no such file, or none that SQLite can read, the new one takes its place by its name.
"""

import contextlib
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any, cast

from runtime_repo.archive import (
    Contents,
    Counter,
    Manifest,
    Raised,
    Reader,
    Stoppable,
    Tally,
    Terms,
    Writer,
    claim,
    contents,
    sync_folder,
)
from runtime_repo.catalog import Look
from runtime_repo.database import Backend
from runtime_repo.errors import ArchiveError, StoreInUseError, UnportableRowsError
from runtime_repo.queries import fill, split_statements
from runtime_repo.schema import Migration, load_migrations
from runtime_repo.sqlite.connection import Connection
from runtime_repo.sqlite.look import looking
from runtime_repo.sqlite.statements import Prepared

__all__ = ["Replacement", "exporting", "remains"]

_PIECE = 1 << 20
"""Bytes that are hashed and compressed in one go."""

_ROWS = 200
"""How many are encoded together."""

_MOST_CELLS = 20

_ESCAPED = [
    ("\\", "\\\\"),
    *(("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"), ("\b", "\\b"), ("\f", "\\f"), ("\v", "\\v")),
]
"""As COPY writes them; the backslash first."""

_RARE = "\r\b\f\v"
"""What has to be escaped, and would not show in the number of columns, rows or NULLs."""

_SMALL = (-(2**31), 2**31 - 1)

_LOCKS = Path("/proc/locks")
"""Where the system tells who has a file open, if it does."""

_WAIT_FOR_FILE = 5.0
"""Seconds to wait for a file that somebody is writing just now."""

Queries = Mapping[str, Prepared]


def exporting(
    queries: Queries, writer: Writer, migrations: Sequence[Migration], terms: Terms, target: Backend
) -> Callable[[Connection], Manifest]:
    """What writes all rows of one instant into an archive, on a connection for this alone."""
    look = looking(queries, [migration.catalog for migration in migrations])

    def work(connection: Connection) -> Manifest:
        if connection.execute("pragma main.encoding").fetchone()[0] != "UTF-8":
            raise ArchiveError(str(writer.path), "the database holds text as UTF-16: copy the file itself instead")
        # It begins with the first statement that reads, and keeps writers from nothing but starting the log anew.
        connection.execute("begin")
        try:
            found = contents(look(connection), migrations)
            if terms.is_move and not terms.force and (reasons := _holders(connection, queries)):
                raise StoreInUseError(reasons)
            _write(connection, queries, writer, found, migrations[found.version - 1], target)
        finally:
            connection.roll_back()
        return writer.finish(found, "sqlite")

    return work


def _write(
    connection: Connection, queries: Queries, writer: Writer, found: Contents, newest: Migration, target: Backend
) -> None:
    cells: list[str] = []
    for table in found.columns:
        shape = _Shape(table, newest, target)
        writer.begin(table, found.columns[table])
        try:
            for piece in shape.pieces(connection):
                writer.write(piece)
        except _Unportable:
            cells += shape.unportable(connection, _MOST_CELLS - len(cells))
        writer.end(shape.counter(connection, queries))
    if cells:
        raise UnportableRowsError(cells)


class _Unportable(Exception):  # noqa: N818 - it never leaves the module
    """A row holds what COPY text, or the target, cannot hold."""


class _Shape:
    """What a table's rows look like, and how they are read and written as COPY text."""

    def __init__(self, table: str, migration: Migration, target: Backend = "sqlite") -> None:
        self.table = table
        catalog = migration.catalog.tables[table]
        self.columns = tuple(catalog.columns)
        self._lines = tuple(catalog.columns.values())
        self._types = [
            {int if line.startswith("integer") else str, *(() if "not null" in line else (NoneType,))}
            for line in self._lines
        ]
        self._key = catalog.primary_key[0].partition(" ")[0]
        there = load_migrations(target)[migration.version - 1].catalog.tables[table].columns
        self._is_small = tuple(target == "postgres" and there[name].startswith("integer") for name in self.columns)
        self._automatic = next((name for name, line in catalog.columns.items() if line.endswith(" auto")), None)

    def pieces(self, connection: sqlite3.Connection) -> Iterator[bytes]:
        """
        The rows as COPY text, in pieces of whole lines.

        Raises:
            _Unportable: There is a cell that it cannot tell.
        """
        collected, size = [], 0
        cursor = sqlite3.Connection.execute(connection, f"select {', '.join(self.columns)} from main.{self.table}")  # noqa: S608
        cursor.row_factory = None
        with contextlib.closing(cursor), _decodable():
            while rows := cursor.fetchmany(_ROWS):
                piece = self._encoded(rows)
                collected.append(piece)
                size += len(piece)
                if size >= _PIECE:
                    yield b"".join(collected)
                    collected, size = [], 0
        if collected:
            yield b"".join(collected)

    def _encoded(self, rows: Sequence[Sequence[Any]]) -> bytes:
        """Column by column, for that is quicker than cell by cell."""
        columns = list(zip(*rows, strict=True))
        nulls = 0
        texts: list[Sequence[str]] = []
        for number, column in enumerate(columns):
            found = set(map(type, column))
            if not found <= self._types[number]:
                raise _Unportable
            if self._is_small[number]:
                self._check_small(column)
            is_text = str in self._types[number]
            if NoneType in found:
                nulls += column.count(None)
                texts.append(["\\N" if cell is None else cell if is_text else str(cell) for cell in column])
            else:
                texts.append(column if is_text else list(map(str, column)))
        data = self._joined(texts)
        is_plain = (
            data.count("\t") == len(rows) * (len(columns) - 1)
            and data.count("\n") == len(rows)
            and data.count("\\") == nulls
            and not any(character in data for character in _RARE)
        )
        if not is_plain:
            data = self._joined([self._escaped(number, column) for number, column in enumerate(columns)])
        if "\0" in data:
            raise _Unportable
        return data.encode()

    def _joined(self, columns: Sequence[Sequence[str]]) -> str:
        return "\n".join(map("\t".join, zip(*columns, strict=True))) + "\n"

    def _escaped(self, number: int, column: Sequence[Any]) -> Sequence[str]:
        if str not in self._types[number]:
            return ["\\N" if cell is None else str(cell) for cell in column]
        every = "".join(filter(None, column))
        for character, escaped in _ESCAPED:
            if character in every:
                column = [cell and cell.replace(character, escaped) for cell in column]
        return ["\\N" if cell is None else cell for cell in column]

    def _check_small(self, column: Sequence[int | None]) -> None:
        numbers = [number for number in column if number is not None]
        if numbers and not _SMALL[0] <= min(numbers) <= max(numbers) <= _SMALL[1]:
            raise _Unportable

    def unportable(self, connection: sqlite3.Connection, most: int) -> list[str]:
        """The first cells that cannot be told, each by its table, row and column."""
        cells = ", ".join(f"typeof({name}), cast({name} as blob)" for name in self.columns)
        cursor = sqlite3.Connection.execute(connection, f"select quote({self._key}), {cells} from main.{self.table}")  # noqa: S608
        cursor.row_factory = None
        found: list[str] = []
        with contextlib.closing(cursor):
            for key, *values in cursor:
                for number, name in enumerate(self.columns):
                    problem = self._problem(number, values[2 * number], values[2 * number + 1])
                    if problem:
                        found.append(f"{self.table}, row {_short(key)}, {name}: {problem}")
                if len(found) >= most:
                    break
        return found[:most]

    def _problem(self, number: int, kind: str, value: bytes | None) -> str | None:
        line = self._lines[number]
        expected = line.partition(" ")[0]
        if value is None:
            return "it is NULL" if "not null" in line else None
        if kind != expected:
            return f"it is {kind}, expected {expected}"
        if expected == "integer":
            is_held = not self._is_small[number] or _SMALL[0] <= int(value) <= _SMALL[1]
            return None if is_held else "its number has more than the 32 bits that PostgreSQL has for it"
        if b"\0" in value:
            return "it holds the character NUL"
        try:
            value.decode()
        except UnicodeDecodeError:
            return "it is no text in UTF-8, such as a lone surrogate"
        return None

    def counter(self, connection: sqlite3.Connection, queries: Queries) -> Counter | None:
        if self._automatic is None:
            return None
        largest = sqlite3.Connection.execute(
            connection,
            f"select coalesce(max({self._automatic}), 0) from main.{self.table}",  # noqa: S608
        ).fetchone()[0]
        last = 0
        with contextlib.suppress(sqlite3.OperationalError):  # where nothing counts by itself there is no such table
            rows = queries["archive.counter"].run(connection, (self.table,))
            last = rows[0]["last"] if rows else 0
        return Counter(self._automatic, max(last, largest))

    def load(self, connection: sqlite3.Connection, pieces: Iterator[bytes]) -> None:
        """Insert COPY text that comes in pieces of any size. A number becomes one by its column's affinity."""
        names = ", ".join(self.columns)
        marks = ", ".join("?" for _ in self.columns)
        nulls = ", ".join("?" if "not null" in line else r"nullif(?, '\N')" for line in self._lines)
        fast = f"insert into main.{self.table} ({names}) values ({nulls})"  # noqa: S608
        exact = f"insert into main.{self.table} ({names}) values ({marks})"  # noqa: S608
        rest = b""
        for piece in pieces:
            data, end, rest = (rest + piece).rpartition(b"\n")
            if not end:
                continue
            lines = data.decode().split("\n")
            if data.count(b"\\") == data.count(b"\\N"):
                connection.executemany(fast, [line.split("\t") for line in lines])
            else:
                connection.executemany(exact, [list(map(_unescaped, line.split("\t"))) for line in lines])


@contextlib.contextmanager
def _decodable() -> Iterator[None]:
    """
    Text that is none in UTF-8 is not portable.

    Raises:
        _Unportable: There was some.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        if "decode" not in str(error):
            raise
    else:
        return
    raise _Unportable


def _unescaped(cell: str) -> str | None:
    if "\\" not in cell:
        return cell
    if cell == "\\N":
        return None
    # Two backslashes are always one, and never the end of something else.
    parts = cell.split("\\\\")
    for number, part in enumerate(parts):
        if "\\" in part:
            for character, escaped in _ESCAPED[1:]:
                part = part.replace(escaped, character)
            parts[number] = part
    return "\\".join(parts)


def _short(key: str) -> str:
    return key if len(key) <= 60 else key[:57] + "..."


def _holders(connection: Connection, queries: Queries) -> list[str]:
    return [
        f"worker {row['worker_id']!r} holds {row['number']} active leases: stop it and wait for them to end"
        for row in queries["archive.holders"].run(connection, ())
    ]


def remains(path: Path) -> list[str]:
    """What restores have kept or left beside a file."""
    found = []
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            end = entry.name.removeprefix(path.name)
            if end != entry.name and (end == ".restoring" or re.fullmatch(r"\.before-\d{8}T\d{12}Z", end)):
                found.append(entry.path)
    return sorted(found)


class Replacement(Stoppable):
    """
    A file's new content, from its archive until it is in place.

    The methods are for threads, one after the other: ``begin``, ``build`` and one of the two that put it in place, and
    ``end`` whatever happens. ``stop`` may be called by others.
    """

    def __init__(
        self,
        path: Path,
        queries: Queries,
        tokens: Mapping[str, str],
        reader: Reader,
        migrations: Sequence[Migration],
        terms: Terms,
    ) -> None:
        # Where a link leads, as SQLite would.
        self.path = Path(os.path.realpath(path))
        self._new = self.path.with_name(self.path.name + ".restoring")
        self._kept = self.path.with_name(f"{self.path.name}.before-{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}")
        self._queries = queries
        self._tokens = tokens
        self._reader = reader
        self._migrations = migrations
        self._terms = terms
        self._rows = reader if terms.is_move else Raised(reader)
        self._file: int | None = None
        self.is_there = False
        """Whether a move finds that it has been done."""
        self.overridden: list[str] = []

    def begin(self) -> None:
        """
        Have the new file to ourselves, and see that nobody has the old one open.

        Raises:
            StoreInUseError: Another restore is under way, or another process uses the file.
        """
        with self._translated():
            try:
                self._file = claim(self._new)
            except BlockingIOError:
                raise StoreInUseError([f"another restore is writing {self._new}: wait for its end"]) from None
        for left in self.path.parent.glob(f"{_escaped(self.path.name)}.before-*.partial*"):
            with contextlib.suppress(OSError):
                left.unlink()
        self.object(_users(self.path))

    @property
    def requeued(self) -> int:
        """How many attempts were held."""
        return self._rows.requeued

    def object(self, reasons: Sequence[str]) -> None:
        if reasons and not self._terms.force:
            raise StoreInUseError([*reasons[:-1], f"{reasons[-1]}; or pass force=True"])
        self.overridden += reasons

    def look(self, connection: Connection) -> int | None:
        """
        See what the file holds; return the size of its pages, None if there is nothing in it.

        Raises:
            StoreInUseError: It holds what must not be replaced.
        """
        if not _LOCKS.exists() and not self._terms.force:
            # It succeeds only where nobody else has it open.
            connection.execute("pragma main.journal_mode = delete").fetchone()
        look: Look = looking(self._queries, [migration.catalog for migration in load_migrations("sqlite")])(connection)
        ours = sorted(look.catalog.tables)
        if self._terms.is_move and ours:
            self._recognize(connection, ours)
            return None
        names = [row["name"] for row in self._queries["archive.objects"].run(connection, ())]
        others = [name for name in names if not name.lower().startswith(("runtime_", "sqlite_"))]
        if others and self._terms.is_move:
            raise StoreInUseError([f"the target is not empty, it has {', '.join(others)}: name another place"])
        self.object(
            [f"the file also has {', '.join(others)}, which would be replaced with it: keep a copy"] if others else []
        )
        if "runtime_leases" in ours:
            self.object(_holders(connection, self._queries))
        if not names:
            return None
        size: int = connection.execute("pragma main.page_size").fetchone()[0]
        return size

    def _recognize(self, connection: Connection, found: Sequence[str]) -> None:
        """
        Let a move pass that has been done already, such as one that was killed before it could say so.

        Raises:
            StoreInUseError: What is there is something else.
        """
        try:
            for table in self._reader.manifest.tables:
                self._prove(_Shape(table, self._migrations[-1]), connection)
        except (ArchiveError, sqlite3.OperationalError):
            reason = f"the target is not empty, it has {', '.join(found)}: name another place"
            raise StoreInUseError([reason]) from None
        self.is_there = True

    def build(self, page_size: int | None) -> None:
        """
        Make the new file, and prove that it holds what the archive does.

        Raises:
            ArchiveError: It does not, or the archive is damaged.
        """
        with contextlib.closing(sqlite3.connect(self._new, isolation_level=None)) as connection:
            connection.set_progress_handler(lambda: self._is_stopped, 100_000)
            if page_size is not None:
                connection.execute(f"pragma page_size = {page_size}")
            # Whatever ends it before it is whole, it is thrown away.
            connection.execute("pragma journal_mode = off").fetchone()
            connection.execute("pragma synchronous = off")
            connection.execute("begin")
            self._lay(connection)
            indexes = self._queries["archive.indexes"].run(connection, ())
            for index in indexes:
                connection.execute(f"drop index {index['name']}")
            shapes = [_Shape(table, self._migrations[-1]) for table in self._reader.manifest.tables]
            for shape in shapes:
                # Rows that a migration has laid itself, should one ever.
                connection.execute(f"delete from main.{shape.table}")  # noqa: S608
                self._load(shape, connection)
            for shape in shapes:
                self._prove(shape, connection)
            for index in indexes:
                connection.execute(index["sql"])
            self._count_on(connection)
            connection.execute("commit")
            connection.execute("pragma journal_mode = delete").fetchone()
        self._go_on()
        with self._translated():
            os.fsync(cast(int, self._file))

    def _lay(self, connection: sqlite3.Connection) -> None:
        self._queries["schema.create_ledger"].run(connection, ())
        for migration in self._migrations:
            for statement in split_statements(fill(migration.sql, self._tokens)):
                connection.execute(statement)

    def _load(self, shape: _Shape, connection: sqlite3.Connection) -> None:
        try:
            with contextlib.closing(self._rows.pieces(shape.table)) as pieces:
                shape.load(connection, pieces)
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError, UnicodeDecodeError) as error:
            reason = (
                f"the rows of {shape.table} are not what a backup writes: nothing was changed; take another archive"
            )
            raise ArchiveError(str(self._reader.path), reason) from error

    def _prove(self, shape: _Shape, connection: sqlite3.Connection) -> None:
        tally = Tally()
        with contextlib.suppress(_Unportable):
            for piece in shape.pieces(connection):
                self._go_on()
                tally.feed(piece)
        if (tally.rows, tally.row_hash) != self._rows.proof(shape.table):
            reason = f"the rows of {shape.table} that were stored are not those of it: nothing was changed"
            raise ArchiveError(str(self._reader.path), f"{reason}; check the disk")

    def _count_on(self, connection: sqlite3.Connection) -> None:
        for table, member in self._reader.manifest.tables.items():
            if member.counter is not None and member.counter.last > 0:
                self._queries["archive.count_on"].run(connection, (table, member.counter.last))

    def into_live(self, connection: Connection) -> Path:
        """
        Bring it into the file that is there, in one transaction of its log: its readers and writers see the old content
        or the new. Return the file that keeps the old one.
        """
        if connection.execute("pragma main.journal_mode").fetchone()[0] != "wal":
            # Else nobody could read what is replaced, in order to keep it.
            mode = connection.execute("pragma main.journal_mode = wal").fetchone()[0]
            if mode != "wal":
                raise StoreInUseError(
                    [f"{self.path} cannot be switched to WAL (it is {mode!r}): close whatever uses it"]
                )
        deadline = time.monotonic() + max(_WAIT_FOR_FILE, self._terms.patience if self._terms.force else 0)
        is_kept = False

        def progress(status: int, _remaining: int, _total: int) -> None:
            nonlocal is_kept
            self._go_on()
            if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                if time.monotonic() > deadline:
                    raise StoreInUseError([f"{self.path} is being written by another process: stop it"])
            elif not is_kept:
                # From here on nobody else writes.
                self._keep()
                is_kept = True

        with contextlib.closing(sqlite3.connect(f"{self._new.as_uri()}?immutable=1", uri=True)) as new:
            [count] = new.execute("pragma page_count").fetchone()
            new.backup(connection, pages=min(1024, max(count // 2, 1)), progress=progress, sleep=0.02)
        return self._kept

    def _keep(self) -> None:
        partial = self._kept.with_name(self._kept.name + ".partial")
        with self._translated():
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        source = f"{self.path.as_uri()}?mode=ro"
        with (
            contextlib.closing(sqlite3.connect(source, uri=True)) as old,
            contextlib.closing(sqlite3.connect(partial)) as copy,
        ):
            copy.execute("pragma journal_mode = off").fetchone()
            old.backup(copy, pages=1024, progress=lambda *_: self._go_on())
            copy.execute("pragma journal_mode = delete").fetchone()
        with self._translated():
            file = os.open(partial, os.O_RDWR)
            try:
                os.fsync(file)
            finally:
                os.close(file)
            partial.rename(self._kept)
            sync_folder(self.path.parent)

    def into_place(self) -> Path | None:
        """
        Put it where no file is, or one that nobody can read, which is kept with what belongs to it. Return that.

        Killed in between it leaves no file in the place, which no boot takes for a new store, or one of the two.
        """
        with self._translated():
            kept = None
            if os.path.lexists(self.path) and self.path.stat().st_size:
                kept = self._kept
                shutil.copymode(self.path, self._new)
                # Not moved, so that there is a file at every moment.
                kept.hardlink_to(self.path)
            for end in ("-wal", "-journal"):
                # Else it would be taken for the new one's.
                with contextlib.suppress(FileNotFoundError):
                    os.rename(f"{self.path}{end}", f"{self._kept}{end}")  # noqa: PTH104
            Path(f"{self.path}-shm").unlink(missing_ok=True)
            self._new.replace(self.path)
            sync_folder(self.path.parent)
        return kept

    def stop(self) -> None:
        """Nobody waits for it any more."""
        super().stop()
        self._reader.stop()

    def end(self) -> None:
        """Leave nothing that is of no use."""
        if self._file is None:
            return
        # While it is still ours. Put in its place it is called otherwise.
        for path in (self._new, *self.path.parent.glob(f"{_escaped(self.path.name)}.before-*.partial*")):
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(self._file)
        self._file = None

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except InterruptedError:
            raise
        except OSError as error:
            reason = f"the folder {self.path.parent} cannot be written ({error.strerror or error}): nothing was changed"
            raise ArchiveError(str(self._reader.path), f"{reason}; free some space, or grant it") from error


def _escaped(name: str) -> str:
    """For a pattern of file names."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _users(path: Path) -> list[str]:
    """The processes that have a database open, where the system tells."""
    wanted = set()
    for name in (str(path), f"{path}-shm", f"{path}-wal"):
        with contextlib.suppress(OSError):
            found = os.stat(name)  # noqa: PTH116
            wanted.add(f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}")
    try:
        lines = _LOCKS.read_text("ascii").splitlines()
    except OSError:
        return []
    pids = set()
    for line in lines:
        words = line.split()
        if "->" not in words and len(words) > 5 and words[1] == "POSIX" and words[5] in wanted:
            pids.add(words[4])
    own = str(os.getpid())
    return [
        f"process {pid}{' (this one)' if pid == own else ''} has {path} open: stop it, or close the repository"
        for pid in sorted(pids)
    ]
