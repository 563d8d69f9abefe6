"""Verbs that share one hop, and one transaction where they write: each has a result and an error of its own."""

import contextlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

from runtime_repo.database import Row
from runtime_repo.sqlite.connection import Connection, Hop
from runtime_repo.sqlite.statements import Prepared
from runtime_repo.sqlite.turn import Waiting

__all__ = ["Glance", "Group", "Part", "Query"]

T = TypeVar("T")

_READS, _WRITES = 1, 2

_LONGEST = 0.01
"""Seconds after which a group begins nothing more, so that nobody waits for long before what was done is committed."""


class Query:
    """A named query with its arguments."""

    __slots__ = ("_args", "_prepared")

    def __init__(self, prepared: Prepared, args: Sequence[object]) -> None:
        self._prepared = prepared
        self._args = args

    @property
    def reads(self) -> bool:
        """Whether it writes nothing."""
        return self._prepared.reads

    def alone(self, connection: Connection) -> Sequence[Row]:
        """Run it as a transaction of its own."""
        connection.prove()
        if connection.in_transaction:
            connection.roll_back()  # what nobody could end when it was to end
        if self._prepared.is_single:
            return self._prepared.run(connection, self._args)
        connection.execute("begin immediate")
        try:
            rows = self._prepared.run(connection, self._args)
            connection.execute("commit")
        except BaseException:
            connection.roll_back()
            raise
        return rows

    def within(self, connection: Connection) -> Sequence[Row]:
        """Run it in the transaction that is open, of which it undoes nothing but itself if it fails."""
        if self._prepared.is_single:
            return self.bare(connection)
        return self.apart(connection)

    def bare(self, connection: Connection) -> Sequence[Row]:
        """Run it in the transaction that is open, and leave what it did to its caller if it fails."""
        connection.prove()
        return self._prepared.run(connection, self._args)

    def apart(self, connection: Connection) -> Sequence[Row]:
        """As ``within``, whatever a trigger makes of its failure."""
        connection.prove()
        connection.execute("savepoint query")
        try:
            rows = self._prepared.run(connection, self._args)
            connection.execute("release savepoint query")
        except BaseException:
            if connection.in_transaction:
                connection.roll_back_to("query")
            raise
        return rows


class Glance(Generic[T]):
    """A function that only reads, done as a query is."""

    __slots__ = ("alone", "apart", "bare")

    reads = True

    def __init__(self, work: Callable[[Connection], T]) -> None:
        self.alone = self.apart = self.bare = work


class Part(Waiting, Generic[T]):
    """
    What one caller wants, done alone or as a part of a group.

    Attributes:
        error: What it failed with in a group, as the driver raised it.
        is_done: Whether a group has done it, and ended it the one way or the other.
        rows: What it found.
        what: What is to be done.
    """

    __slots__ = ("_hop", "_when_called", "error", "is_done", "rows", "what")

    rows: T

    def __init__(
        self,
        what: "Query | Glance[T]",
        *,
        hurries: bool = False,
        when_called: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(_READS if what.reads else _WRITES, hurries=hurries)
        self.what: Any = what
        self.error: Exception | None = None
        self.is_done = False
        self._when_called = when_called
        self._hop: Hop | None = None

    @property
    def writes(self) -> bool:
        return self.kind == _WRITES

    def called(self) -> None:
        self.asked_at = time.monotonic()
        if self._when_called is not None:
            self._when_called()

    def begin(self) -> None:
        """It belongs to a group, whether or not there is time for it. It may be done as if none failed."""
        self.error, self.is_done = None, False
        self._hop = Hop(self.what.bare, repeats=not self.writes)

    def begin_apart(self) -> None:
        """It is to be done again so that it may fail."""
        before = cast(Hop, self._hop)
        self.error, self.is_done = None, False
        self._hop = Hop(self.what.apart)
        if before.given_up:
            self._hop.give_up()

    def do(self, connection: Connection) -> None:
        """Do it, and keep how it ended."""
        hop = cast(Hop, self._hop)
        try:
            self.rows = hop.run(connection).fetchall()
        except Exception as error:  # noqa: BLE001 - raised in whoever waits for it
            self.error = error
        self.is_done = True

    def fail(self, error: Exception) -> None:
        """What it has done, or failed to do, counts no more: it has failed with *error*."""
        self.error, self.is_done = error, True

    def undo(self) -> None:
        """What it has done, or failed to do, counts no more, through no fault of its own: it is to be done alone."""
        self.error, self.is_done, self.is_alone = None, False, True

    def give_up(self) -> None:
        """Nobody waits for it any more: if it has not begun it never does, and a statement that runs is interrupted."""
        if self._hop is not None:
            self._hop.give_up()


class Group:
    """
    Parts of one kind that are done together: those that only read one after the other, those that write in one
    transaction.

    Hardly any fails, so the transaction is begun as if none did. Where one does all of it is begun anew, each with a
    savepoint of its own. Where SQLite ends the transaction for the sake of one of them, such as one that was
    interrupted, the others are undone and are to be done again. Where it cannot be begun or committed, each of them has
    failed with that.
    """

    def __init__(self, parts: Sequence[Part[Any]]) -> None:
        self._parts = parts
        self._writes = parts[0].writes
        for part in parts:
            part.begin()

    def do(self, connection: Connection) -> None:
        """Do as many as there is time for, at least the first."""
        if connection.in_transaction:
            connection.roll_back()  # what nobody could end when it was to end
        if not self._writes:
            self._do_each(connection)
            return
        if not self._begin(connection):
            return
        last = self._do_each(connection, until_one_fails=True)
        if last.error is not None and connection.in_transaction:
            connection.roll_back()
            for part in self._parts:
                part.begin_apart()
            if not self._begin(connection):
                return
            last = self._do_each(connection)
        if not connection.in_transaction:
            for part in self._parts:
                if part is not last or part.error is None:
                    part.undo()
            return
        self._commit(connection)

    def _begin(self, connection: Connection) -> bool:
        """Begin the transaction, or let each part have failed with what stands in the way."""
        try:
            connection.execute("begin immediate")
        except Exception as error:  # noqa: BLE001 - raised in whoever waits for a part
            for part in self._parts:
                part.fail(error)
            return False
        return True

    def _commit(self, connection: Connection) -> None:
        try:
            connection.execute("commit")
        except Exception as error:  # noqa: BLE001 - as above
            is_interrupted = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT
            for part in self._parts:
                if is_interrupted:
                    part.undo()  # nobody meant the commit
                elif part.is_done:
                    part.fail(error)
            with contextlib.suppress(sqlite3.Error):
                connection.roll_back()

    def _do_each(self, connection: Connection, *, until_one_fails: bool = False) -> Part[Any]:
        """Do one after the other, until there is no more time or no transaction; return the last."""
        end = time.monotonic() + _LONGEST
        for part in self._parts:
            part.do(connection)
            if part.error is not None and (until_one_fails or (self._writes and not connection.in_transaction)):
                break
            if time.monotonic() >= end:
                break
        return part
