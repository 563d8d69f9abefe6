"""Verbs that share one hop, and one transaction where they write: each has a result and an error of its own."""

import contextlib
import re
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

from runtime_repo.database import Row
from runtime_repo.sqlite.connection import Connection, Hop
from runtime_repo.sqlite.turn import Waiting

__all__ = ["Group", "Part", "Query", "reads"]

T = TypeVar("T")

_READS, _WRITES = 1, 2

_NAMES = [str(number) for number in range(1, 100)]
"""What SQLite calls the parameters $1, $2, ..."""

_COMMENT = re.compile("--.*")

_LONGEST = 0.01
"""Seconds after which a group begins nothing more, so that nobody waits for long before what was done is committed."""


class Query:
    """The statements of a named query with its arguments."""

    def __init__(self, statements: Sequence[str], args: Sequence[object]) -> None:
        self._statements = statements
        self._parameters = dict(zip(_NAMES, args, strict=False))

    def alone(self, connection: Connection) -> Sequence[Row]:
        """Run it as a transaction of its own."""
        connection.prove()
        if connection.in_transaction:
            connection.roll_back()  # what nobody could end when it was to end
        if len(self._statements) == 1:
            return self._run(connection)
        connection.execute("begin immediate")
        try:
            rows = self._run(connection)
            connection.execute("commit")
        except BaseException:
            connection.roll_back()
            raise
        return rows

    def within(self, connection: Connection) -> Sequence[Row]:
        """Run it in the transaction that is open, of which it undoes nothing but itself if it fails."""
        connection.prove()
        return self._run(connection) if len(self._statements) == 1 else self._apart(connection)

    def shared(self, connection: Connection) -> Sequence[Row]:
        """As ``within``, whatever a trigger makes of its failure."""
        connection.prove()
        return self._apart(connection)

    def _apart(self, connection: Connection) -> Sequence[Row]:
        connection.execute("savepoint query")
        try:
            rows = self._run(connection)
            connection.execute("release savepoint query")
        except BaseException:
            if connection.in_transaction:
                connection.roll_back_to("query")
            raise
        return rows

    def _run(self, connection: Connection) -> Sequence[Row]:
        rows: Sequence[Row] = ()
        for statement in self._statements:
            cursor = connection.execute(statement, self._parameters)
            if cursor.description is not None:
                rows = cursor.fetchall()
        return rows


class Part(Waiting, Generic[T]):
    """
    What one caller wants, done alone or as a part of a group.

    Attributes:
        alone: How it is done alone.
        error: What it failed with in a group, as the driver raised it.
        is_done: Whether a group has done it, and ended it the one way or the other.
        rows: What it found.
    """

    error: Exception | None = None
    is_done = False
    rows: T
    _hop: Hop | None = None

    def __init__(
        self,
        alone: Callable[[Connection], T],
        shared: Callable[[Connection], T] | None = None,
        *,
        hurries: bool = False,
        when_called: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(_WRITES if shared else _READS, hurries=hurries)
        self.alone = alone
        self._shared = shared or alone
        self._when_called = when_called

    @property
    def writes(self) -> bool:
        return self.kind == _WRITES

    def called(self) -> None:
        self.asked_at = time.monotonic()
        if self._when_called is not None:
            self._when_called()

    def begin(self) -> None:
        """It belongs to a group, whether or not there is time for it."""
        self.error, self.is_done = None, False
        self._hop = Hop(self._shared)

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

    Where SQLite ends the transaction for the sake of one of them, such as one that was interrupted, the others are
    undone and are to be done again. Where it cannot be begun or committed, each of them has failed with that.
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
        try:
            connection.execute("begin immediate")
        except Exception as error:  # noqa: BLE001 - raised in whoever waits for a part
            for part in self._parts:
                part.fail(error)
            return
        last = self._do_each(connection)
        if not connection.in_transaction:
            for part in self._parts:
                if part is not last or part.error is None:
                    part.undo()
            return
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

    def _do_each(self, connection: Connection) -> Part[Any]:
        """Do one after the other, until there is no more time or no transaction; return the last."""
        end = time.monotonic() + _LONGEST
        for part in self._parts:
            part.do(connection)
            if time.monotonic() >= end or (self._writes and not connection.in_transaction):
                break
        return part


def reads(statement: str) -> bool:
    """Whether *statement* writes nothing."""
    words = _COMMENT.sub("", statement).split()
    return words[0] == "select" or (words[0] == "with" and not {"insert", "update", "delete"} & set(words))
