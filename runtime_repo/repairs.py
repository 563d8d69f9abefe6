"""
What mends drift: of each table that differs, the statements that make it what the ledger's version says.

Here is what both databases have in common: which part of a table a difference is about, and what a column's line says.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from runtime_repo.catalog import Catalog, Table
from runtime_repo.errors import Difference

__all__ = ["Column", "Part", "Repair", "by_table", "columns", "indexed", "lost", "no_null", "quoted", "renamed", "zero"]


@dataclass(frozen=True, slots=True)
class Repair:
    """
    What mends one table.

    Attributes:
        differences: Of what was found, what it mends.
        statements: To be run in their order, in one transaction with those of the others.
        warnings: What it cannot bring back, or may fail at, each a sentence.
    """

    differences: tuple[Difference, ...]
    statements: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


class Part(NamedTuple):
    """What a difference is about: ``index``, its name, and the difference."""

    kind: str
    name: str
    difference: Difference


_KINDS = (
    "unique constraint",
    "index",
    "trigger",
    "rule",
    "unlogged storage",
    "child table",
    "parent table",
    "conflict clause",
    "storage without rowid",
    "column instead of the rowid",
    "deferrable primary key",
    "check constraint",
    "exclusion constraint",
)


def by_table(drift: Sequence[Difference]) -> Mapping[str, list[Part]]:
    """The parts of each table that differ."""
    tables: dict[str, list[Part]] = {}
    for difference in drift:
        table, part = _part(difference)
        tables.setdefault(table, []).append(part)
    return tables


def _part(difference: Difference) -> tuple[str, Part]:
    what = difference.object
    words, _, table = what.rpartition(" on ")
    for kind in _KINDS:
        if words.startswith(kind):
            return table, Part(kind, words.removeprefix(kind).strip(), difference)
    if what.startswith("table "):
        return what.removeprefix("table "), Part("table", "", difference)
    if what.startswith("column "):
        table, _, column = what.removeprefix("column ").partition(".")
        return table, Part("column", column, difference)
    return what.removeprefix("primary key of "), Part("primary key", "", difference)


_COLUMN = re.compile(
    r"(?P<type>.+?)(?: collate (?P<collation>\S+)(?: \(nondeterministic\))?)?"
    r"(?P<domain> \(a domain with constraints\))?(?P<required> not null)?(?P<auto> auto)?"
    r"(?P<computed> generated)?(?: default (?P<default>.*?))?(?P<after> auto| generated)?"
)


class Column(NamedTuple):
    """What a column's line says."""

    type: str
    collation: str | None
    is_domain: bool
    is_required: bool
    is_auto: bool
    is_generated: bool
    default: str | None

    @classmethod
    def of(cls, line: str) -> "Column":
        """Read a line."""
        match = _COLUMN.fullmatch(line)
        assert match is not None  # noqa: S101 - every line has a type
        after = match["after"] or ""
        return cls(
            match["type"],
            match["collation"],
            match["domain"] is not None,
            match["required"] is not None,
            match["auto"] is not None or "auto" in after,
            match["computed"] is not None or "generated" in after,
            match["default"],
        )


def columns(table: Table) -> Mapping[str, Column]:
    """The columns of a table."""
    return {name: Column.of(line) for name, line in table.columns.items()}


def zero(column: Column) -> str:
    """What stands in a column that has lost what stood in it."""
    return column.default or {"text": "''", "blob": "x''"}.get(column.type, "0")


def renamed(expected: Table, live: Table, parts: Sequence[Part]) -> dict[str, str]:
    """Which columns were probably renamed, from what to what: the only ones that are missing and strange, and alike."""
    missing = [part for part in parts if part.kind == "column" and part.difference.found is None]
    strange = [part for part in parts if part.kind == "column" and part.name not in expected.columns]
    if len(missing) != 1 or len(strange) != 1:
        return {}
    [lost], [found] = missing, strange
    return {found.name: lost.name} if live.columns[found.name] == expected.columns[lost.name] else {}


def indexed(expected: Table) -> Iterator[tuple[str, str, str]]:
    """Every index of a table that is no constraint: its name, ``unique`` or nothing, and what it is on."""
    for name, line in expected.indexes.items():
        if not is_constraint(line):
            unique = "unique " if line.startswith("unique ") else ""
            yield name, unique, line.removeprefix("unique ")


def is_constraint(line: str) -> bool:
    """Whether a line is that of a unique constraint."""
    return re.fullmatch(r"unique \([^()]*\)", line) is not None


def constraints(expected: Table) -> Iterator[str]:
    """The columns of every unique constraint, in parentheses."""
    for line in expected.indexes.values():
        if is_constraint(line):
            yield line.removeprefix("unique ")


def quoted(name: str) -> str:
    """A name as both databases read it."""
    return '"' + name.replace('"', '""') + '"'


def holders(expected: Catalog, holding: Mapping[str, str], table: str) -> str | None:
    """The table that has an index of a missing one's, and so is that one under another name."""
    names = (holding.get(name) for name in expected.tables[table].indexes)
    return next((name for name in names if name is not None and name not in expected.tables), None)


def lost(table: str) -> Iterator[str]:
    """What is to be known of a table that is made anew."""
    yield f"what stood in {table} is not brought back: restore it from a backup, or go on without"
    if table in ("runtime_queue", "runtime_finished"):
        yield "call attempts.reindex() afterwards: what waits and what has ended is found anew"


def no_null(column: str) -> str:
    """What a constraint needs that is put back."""
    return f"it fails where {column} has a null: give such rows a value before"
