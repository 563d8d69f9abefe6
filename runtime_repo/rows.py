"""
How rows become records.

A row can hold anything, for other programs write to the database as well. So a conversion raises one error for whatever
it cannot read, which names the row: ``UnreadableRowError``.
"""

import operator
from collections.abc import Awaitable, Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any, Generic, TypeVar

from runtime_repo.database import Row
from runtime_repo.errors import LockHolder, UnreadableRowError, shown

__all__ = [
    "UNREADABLE",
    "Page",
    "check_types",
    "known_status",
    "lock_holder_from_row",
    "page",
    "readable",
    "unknown_status",
    "unreadable",
]

T = TypeVar("T")
S = TypeVar("S", bound=StrEnum)

_MOST_UNREADABLE = 1000
"""How many errors a page keeps. It reads on past more of them, too."""

UNREADABLE = (TypeError, ValueError, ArithmeticError, RuntimeError)
"""What a conversion meets: a value of another type, of no known word, out of range, or that nests too deep."""


class Page(list[T], Generic[T]):
    """
    What a list returns, as a list.

    Attributes:
        unreadable: The errors of rows that belong here and cannot be read; an operator should correct or delete them.
    """

    __slots__ = ("unreadable",)

    def __init__(self, found: Iterable[T] = (), unreadable: Iterable[UnreadableRowError] = ()) -> None:
        super().__init__(found)
        self.unreadable = tuple(unreadable)


def readable(rows: Iterable[Row], read: Callable[[Row], T]) -> Page[T]:
    """What can be read of *rows*, and the errors of the others."""
    found: Page[T] = Page()
    errors = []
    for row in rows:
        try:
            found.append(read(row))
        except UnreadableRowError as error:
            errors.append(error)
    found.unreadable = tuple(errors)
    return found


async def page(
    fetch: Callable[[Any, int], Awaitable[Sequence[Row]]],
    read: Callable[[Row], T],
    *,
    after: Any,
    limit: int,
    place: Callable[[Row], Any],
) -> Page[T]:
    """
    *limit* records, or all that are left, from *fetch*: it returns so many rows after a place, in the order of places.

    It goes on past rows that cannot be read, so that a page shorter than *limit* is the last.
    """
    found: list[T] = []
    errors: dict[str, UnreadableRowError] = {}
    wanted = limit
    while True:
        rows = await fetch(after, wanted)
        here, kept = after, len(found)
        for row in rows:
            try:
                found.append(read(row))
            except UnreadableRowError as error:
                if len(errors) < _MOST_UNREADABLE:
                    errors[error.key] = error
            else:
                if len(found) == limit:
                    break
            if _is_place(place(row)):
                here, kept = place(row), len(found)
        if len(found) == limit or len(rows) < wanted:
            return Page(found, errors.values())
        # No step may be so small that there is no end to it; where no key tells the place, it is made from here anew.
        wanted = max(wanted, 100) if here != after else 2 * wanted
        after = here
        del found[kept:]


def _is_place(key: Any) -> bool:
    """Whether a page may begin after a key: not where it is NULL or was no UTF-8, which is read as something else."""
    return key is not None and not (isinstance(key, str) and "\N{REPLACEMENT CHARACTER}" in key)


def check_types(texts: tuple[str, ...], number: int) -> None:
    """Raise a TypeError unless all are text and a number. Each check is one call, for this is done for every row."""
    "".join(texts)
    operator.index(number)


def known_status(kind: type[S], status: str) -> S:
    try:
        return kind(status)
    except ValueError:
        raise unknown_status(kind, status) from None


def unknown_status(kind: type[StrEnum], status: object) -> ValueError:
    return ValueError(f"it has the unknown status {shown(status)}; known are {', '.join(kind)}")


def unreadable(table: str, key: object, error: Exception) -> UnreadableRowError:
    reason = str(error)
    if not isinstance(error, ValueError):
        # Python's own words.
        reason = f"a value is of another type or out of range ({reason})"
    return UnreadableRowError(table, "NULL" if key is None else str(key), reason)


def lock_holder_from_row(row: Row) -> LockHolder:
    """Another session, as PostgreSQL tells of it."""
    return LockHolder(
        row["pid"],
        row["application_name"],
        row["client_address"],
        row["transaction_age"],
        row["user_name"],
        row["session_age"],
    )
