"""
A named query as SQLite runs it: its statements in their order, each with the arguments that it takes.

One may find something for those behind it: the columns of its one row that are called ``"$7"``, ``"$8"`` are the
arguments that follow the ones given. Where it finds none, or NULL, whatever needs that is not done at all.
"""

import operator
import re
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, cast

from runtime_repo.database import Row
from runtime_repo.queries import split_statements

__all__ = ["Prepared", "Statement"]

_TOKEN = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*\n?|/\*.*?\*/|\$(\d+)", re.DOTALL)
_FOUND = re.compile(r'as "\$(\d+)"')


class Statement:
    """
    One of a query's.

    Attributes:
        bound: Takes the arguments out in the order of the text.
        text: Without comments, and with its arguments in their order: to be bound by names they would cost as much as a
            quick statement.
        needs: Takes out those arguments that a statement before it has found; None if it needs none.
        finds: How many arguments it finds.
    """

    __slots__ = ("_names", "bound", "finds", "needs", "text")

    def __init__(self, text: str, found: frozenset[int] = frozenset()) -> None:
        places: list[int] = []

        def plain(match: re.Match[str]) -> str:
            if match[1] is None:
                return "" if match[0].startswith(("--", "/*")) else match[0]
            places.append(int(match[1]) - 1)
            return "?"

        self.text = _TOKEN.sub(plain, text).strip()
        needed = sorted(found.intersection(places))
        self.needs = _getter(needed) if needed else None
        self.finds = len(_FOUND.findall(text))
        self.bound = _getter(places)
        self._names: tuple[str, ...] | None = None

    def rows(self, cursor: sqlite3.Cursor, found: Sequence[Sequence[Any]]) -> Sequence[Row]:
        """What was *found*, by names, which are the same each time, for it names its columns."""
        if self._names is None:
            self._names = tuple(column[0] for column in cursor.description)
        return [dict(zip(self._names, row, strict=True)) for row in found]


def _getter(places: Sequence[int]) -> Callable[[Sequence[object]], tuple[Any, ...]]:
    """What takes the arguments at *places* out of all."""
    if len(places) > 1:
        return cast("Callable[[Sequence[object]], tuple[Any, ...]]", operator.itemgetter(*places))
    if not places:
        return lambda _args: ()
    (place,) = places
    return lambda args: (args[place],)


class Prepared:
    """
    A query.

    Attributes:
        statements: In their order; the rows of the last one that has any are the answer.
        is_single: Whether it is one statement, and so a transaction by itself.
        reads: Whether it writes nothing, and so needs no lock that others could be waiting for.
    """

    __slots__ = ("is_single", "reads", "statements")

    def __init__(self, text: str) -> None:
        statements: list[Statement] = []
        found: frozenset[int] = frozenset()
        for part in split_statements(text):
            statements.append(Statement(part, found))
            found |= {int(number) - 1 for number in _FOUND.findall(part)}
        self.statements = tuple(statements)
        self.is_single = len(statements) == 1
        self.reads = self.is_single and _reads(statements[0].text)

    def run(self, connection: Any, args: Sequence[object]) -> Sequence[Row]:
        """Run it on a *connection*, in the transaction that is open, if one is."""
        rows: Sequence[Row] = []
        for statement in self.statements:
            if statement.needs is not None and None in statement.needs(args):
                args = (*args, *(None,) * statement.finds)
                continue
            cursor = connection.execute(statement.text, statement.bound(args))
            if cursor.description is None:
                continue
            # The driver's own rows look for a column from the first to the last, at each access.
            cursor.row_factory = None
            found = cursor.fetchall()
            if statement.finds:
                args = (*args, *(found[0] if found else (None,) * statement.finds))
            else:
                rows = statement.rows(cursor, found)
        return rows


def _reads(statement: str) -> bool:
    """Whether *statement* writes nothing."""
    words = statement.split()
    return words[0] == "select" or (words[0] == "with" and not {"insert", "update", "delete"} & set(words))
