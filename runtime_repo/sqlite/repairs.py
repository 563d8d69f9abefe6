"""How drift is mended on SQLite, which alters little in its place: a table is made anew, with what it holds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from runtime_repo.catalog import Catalog, Table
from runtime_repo.errors import Difference
from runtime_repo.repairs import (
    Column,
    Part,
    Repair,
    by_table,
    columns,
    constraints,
    holders,
    indexed,
    lost,
    no_null,
    quoted,
    renamed,
    zero,
)

__all__ = ["Facts", "repairs"]

_IN_PLACE = ("index", "trigger")

_WITHOUT_ROWID = "storage without rowid"
"""How a catalog says that a table is its primary key."""

_MADE_ANEW = ("conflict clause", "column instead of the rowid", _WITHOUT_ROWID)
"""What hung on a table that is made as ours is, and nobody misses."""


@dataclass(frozen=True)
class Facts:
    """
    What a catalog does not tell.

    Attributes:
        texts: The text of each index that has one.
        holding: Which table has the index of a name.
    """

    texts: Mapping[str, str]
    holding: Mapping[str, str]


def repairs(expected: Catalog, live: Catalog, drift: Sequence[Difference], facts: Facts) -> Iterator[Repair]:
    """What mends *drift*, table by table."""
    for name, parts in by_table(drift).items():
        mending = _Mending(name, expected.tables[name], live.tables.get(name, Table({})), facts)
        if parts[0].kind == "table":
            mending.create(holders(expected, facts.holding, name))
        elif all(part.kind in _IN_PLACE for part in parts):
            mending.alter(parts)
        else:
            mending.rebuild(parts)
        yield Repair(tuple(part.difference for part in parts), tuple(mending.statements), tuple(mending.warnings))


class _Mending:
    def __init__(self, name: str, expected: Table, live: Table, facts: Facts) -> None:
        self._name = name
        self._expected = expected
        self._live = live
        self._facts = facts
        self.statements: list[str] = []
        self.warnings: list[str] = []

    def create(self, other_name: str | None) -> None:
        """Make the table that is missing, or give it its name back."""
        if other_name is not None:
            self._say(f"alter table {quoted(other_name)} rename to {self._name}")
            return
        self._create(self._name, {})
        self._make_indexes()
        self.warnings += lost(self._name)

    def alter(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if part.kind == "trigger":
                self._say(f"drop trigger {quoted(part.name)}")
                continue
            if part.name in self._live.indexes:
                self._say(f"drop index {quoted(part.name)}")
            self._make_indexes(part.name)

    def rebuild(self, parts: Sequence[Part]) -> None:
        """
        A new table, what the old one holds, and its name; an operator's own columns and indexes are kept, and what was
        created with the table by somebody else is not.
        """
        moved = renamed(self._expected, self._live, parts)
        extra = {
            name: column
            for name, column in columns(self._live).items()
            if name not in self._expected.columns and name not in moved
        }
        for name in [name for name, column in extra.items() if column.is_generated]:
            self.warnings.append(f"{self._name}.{name} is computed, and is not made again")
            del extra[name]
        # One of this name hides what SQLite calls so.
        hiding = {name: f"{name}_kept" for name in extra if name.lower() == "rowid"}
        for name, kept in hiding.items():
            self.warnings.append(f"{self._name}.{name} is called {kept}")
        new = f"{self._name}_mended"
        self._create(new, {hiding.get(name, name): column for name, column in extra.items()})
        names, values = [], []
        sources = {new: old for old, new in moved.items()}
        for name, column in columns(self._expected).items():
            source = sources.get(name, name)
            found = self._live.columns.get(source)
            names.append(name)
            if found is None:
                values.append(zero(column) if column.is_required else "null")
                self.warnings.append(f"what stood in {self._name}.{name} is not brought back")
            else:
                other = Column.of(found).type != column.type
                values.append(f"cast({quoted(source)} as {column.type})" if other else quoted(source))
                if column.is_required and not Column.of(found).is_required:
                    self.warnings.append(no_null(f"{self._name}.{name}"))
        names += [quoted(hiding.get(name, name)) for name in extra]
        values += [quoted(name) for name in extra]
        self._say(f"insert into {new} ({', '.join(names)}) select {', '.join(values)} from {self._name}")  # noqa: S608
        if any(column.is_auto for column in columns(self._expected).values()):
            # A number that was given out is not given out again.
            self._say(
                "insert into sqlite_sequence (name, seq) select name || '_mended', seq from sqlite_sequence "  # noqa: S608
                f"where name = '{self._name}' and not exists (select 1 from sqlite_sequence where name = '{new}')"
            )
            self._say(
                "update sqlite_sequence set seq = max(seq, coalesce((select seq from sqlite_sequence "  # noqa: S608
                f"where name = '{self._name}'), 0)) where name = '{new}'"
            )
        self._say(f"drop table {self._name}")
        self._say(f"alter table {new} rename to {self._name}")
        self._make_indexes()
        for index in self._live.indexes:
            if index not in self._expected.indexes and (text := self._facts.texts.get(index)):
                self._say(text.rstrip().removesuffix(";"))
        others = sorted(
            what
            for what in self._live.attached.keys() - self._expected.attached.keys()
            if not what.startswith(_MADE_ANEW)
        )
        self.warnings += [f"{what} on {self._name} is not made again" for what in others]

    def _create(self, name: str, extra: Mapping[str, Column]) -> None:
        lines = []
        automatic = False
        for column, wanted in columns(self._expected).items():
            if wanted.is_auto:
                automatic = True
                lines.append(f"{column} integer primary key autoincrement")
            else:
                lines.append(f"{column} {_definition(wanted, is_required=wanted.is_required)}")
        lines += [
            f"{quoted(column)} {_definition(found, is_required=found.is_required and found.default is not None)}"
            for column, found in extra.items()
        ]
        if not automatic:
            lines.append(f"primary key ({', '.join(self._expected.primary_key)})")
        lines += [f"unique {key}" for key in constraints(self._expected)]
        options = " without rowid" if _WITHOUT_ROWID in self._expected.attached else ""
        self._say(f"create table {name} ({', '.join(lines)}){options}")

    def _make_indexes(self, name: str | None = None) -> None:
        for index, unique, on in indexed(self._expected):
            if name in (None, index):
                self._say(f"create {unique}index {index} on {self._name} {on}")

    def _say(self, statement: str) -> None:
        self.statements.append(statement + ";")


def _definition(column: Column, *, is_required: bool) -> str:
    collation = "" if column.collation is None else f" collate {column.collation}"
    default = "" if column.default is None else f" default {column.default}"
    return column.type + collation + (" not null" if is_required else "") + default
