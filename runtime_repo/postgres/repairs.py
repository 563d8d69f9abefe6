"""How drift is mended on PostgreSQL: each part of a table that differs is altered in its place."""

import re
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

_ORDER = ("trigger", "rule", "child table", "parent table", "check constraint", "exclusion constraint", "column")
"""What goes first, so that it does not stand in the way of the rest."""


@dataclass(frozen=True)
class Facts:
    """
    What a catalog does not tell.

    Attributes:
        keys: The name of each table's primary key.
        bases: What the domain of a column, by its table and name, is in the end.
        holding: Which table has the index of a name.
    """

    keys: Mapping[str, str]
    bases: Mapping[tuple[str, str], str]
    holding: Mapping[str, str]


def repairs(
    schema: str, texts: Sequence[str], expected: Catalog, live: Catalog, drift: Sequence[Difference], facts: Facts
) -> Iterator[Repair]:
    """
    What mends *drift*, table by table.

    Args:
        schema: The runtime schema's quoted name.
        texts: The migrations, which tell how a table is kept.
    """
    for name, parts in by_table(drift).items():
        mending = _Mending(schema, name, expected.tables[name], live.tables.get(name, Table({})), parts, facts)
        if parts[0].kind == "table":
            mending.create(texts, holders(expected, facts.holding, name))
        else:
            mending.alter()
        yield Repair(tuple(part.difference for part in parts), tuple(mending.statements), tuple(mending.warnings))


class _Mending:
    def __init__(
        self, schema: str, name: str, expected: Table, live: Table, parts: Sequence[Part], facts: Facts
    ) -> None:
        self._schema = schema
        self._name = name
        self._table = f"{schema}.{name}"
        self._expected = expected
        self._live = live
        self._parts = parts
        self._facts = facts
        self.statements: list[str] = []
        self.warnings: list[str] = []

    def create(self, texts: Sequence[str], other_name: str | None) -> None:
        """Make the table that is missing, or give it its name back."""
        if other_name is not None:
            self._say(f"alter table {self._schema}.{quoted(other_name)} rename to {self._name}")
            return
        lines = [f"{column} {_definition(read)}" for column, read in columns(self._expected).items()]
        lines.append(f"primary key ({', '.join(self._expected.primary_key)})")
        lines += [f"unique {key}" for key in constraints(self._expected)]
        self._say(f"create table {self._table} ({', '.join(lines)})")
        for text in texts:
            for options in re.findall(rf"alter table \{{schema\}}\.{self._name} set (\([^;]*\));", text):
                self._say(f"alter table {self._table} set {' '.join(options.split())}")
        for index, unique, on in indexed(self._expected):
            self._say(f"create {unique}index {index} on {self._table} {on}")
        self.warnings += lost(self._name)

    def alter(self) -> None:
        moved = renamed(self._expected, self._live, self._parts)
        for old, new in moved.items():
            self._say(f"alter table {self._table} rename column {quoted(old)} to {new}")
        for part in sorted(self._parts, key=lambda part: (*_ORDER, part.kind).index(part.kind)):
            if part.kind == "column" and part.name not in (*moved, *moved.values()):
                self._column(part)
            elif part.kind != "column":
                getattr(self, "_" + part.kind.replace(" ", "_"))(part)

    def _column(self, part: Part) -> None:
        name = part.name
        wanted = columns(self._expected).get(name)
        found = None if part.difference.found is None else Column.of(part.difference.found)
        if wanted is None:
            assert found is not None  # noqa: S101 - what is extra is there
            self._extra(name, found)
        elif found is None:
            self._add(name, wanted)
        else:
            self._change(name, wanted, found)

    def _extra(self, name: str, found: Column) -> None:
        """A column of somebody else's stays, but stands in no insert's way."""
        column = quoted(name)
        if found.is_domain:
            base = self._facts.bases.get((self._name, name), "text")
            self._alter(f"alter column {column} type {base} using {column}::{base}")
        if found.is_generated:
            self._alter(f"alter column {column} drop expression")
        if found.default is not None:
            self._alter(f"alter column {column} drop default")
        if found.is_required:
            self._alter(f"alter column {column} drop not null")

    def _add(self, name: str, wanted: Column) -> None:
        if wanted.is_required and not wanted.is_auto:
            self._alter(f"add column {name} {wanted.type} not null default {zero(wanted)}")
            if wanted.default is None:
                self._alter(f"alter column {name} drop default")
        else:
            self._alter(f"add column {name} {_definition(wanted)}")
        self.warnings.append(f"what stood in {self._name}.{name} is not brought back")

    def _change(self, name: str, wanted: Column, found: Column) -> None:
        if found.is_generated:
            self._alter(f"alter column {name} drop expression")
        has_other_type = (found.type, found.collation, found.is_domain) != (wanted.type, None, False)
        default = found.default
        if default is not None and (has_other_type or wanted.default != default):
            self._alter(f"alter column {name} drop default")
            default = None
        if has_other_type:
            self._alter(f"alter column {name} type {wanted.type} using {name}::{wanted.type}")
        if wanted.default != default:
            self._alter(f"alter column {name} set default {wanted.default}")
        if wanted.is_required and not found.is_required:
            self._alter(f"alter column {name} set not null")
            self.warnings.append(no_null(f"{self._name}.{name}"))
        elif found.is_required and not wanted.is_required:
            self._alter(f"alter column {name} drop not null")
        if wanted.is_auto and not found.is_auto:
            self._count(name)

    def _count(self, name: str) -> None:
        """Let it count by itself, from where it was."""
        self._alter(f"alter column {name} add generated by default as identity")
        table = self._table.replace("'", "''")
        self._say(
            "select pg_catalog.setval(d.objid::pg_catalog.regclass, "  # noqa: S608
            f"(select coalesce(pg_catalog.max({name}), 0) + 1 from {self._table}), false) "
            "from pg_catalog.pg_depend as d join pg_catalog.pg_attribute as a "
            "on a.attrelid = d.refobjid and a.attnum = d.refobjsubid "
            f"where d.refobjid = '{table}'::pg_catalog.regclass and a.attname = '{name}' and d.deptype = 'i'"
        )

    def _primary_key(self, _: Part) -> None:
        if (key := self._facts.keys.get(self._name)) is not None:
            self._alter(f"drop constraint {quoted(key)}")
        self._alter(f"add primary key ({', '.join(self._expected.primary_key)})")

    _deferrable_primary_key = _primary_key

    def _unique_constraint(self, part: Part) -> None:
        wanted = part.difference.expected or ""
        for index, line in self._live.indexes.items():
            if line == f"{wanted} invalid":
                self._say(f"reindex index {self._schema}.{quoted(index)}")
                return
        self._alter(f"add {wanted}")
        self.warnings.append(f"it fails where {self._name} has two rows alike: delete one of each pair before")

    def _index(self, part: Part) -> None:
        if part.name in self._live.indexes:
            self._say(f"drop index {self._schema}.{quoted(part.name)}")
        for index, unique, on in indexed(self._expected):
            if index == part.name:
                self._say(f"create {unique}index {index} on {self._table} {on}")

    def _trigger(self, part: Part) -> None:
        self._say(f"drop trigger {quoted(part.name)} on {self._table}")

    def _rule(self, part: Part) -> None:
        self._say(f"drop rule {quoted(part.name)} on {self._table}")

    def _unlogged_storage(self, _: Part) -> None:
        self._alter("set logged")

    def _child_table(self, part: Part) -> None:
        # As the server names it, quoted where it has to be.
        self._say(f"alter table {part.name} no inherit {self._table}")

    def _parent_table(self, part: Part) -> None:
        self._alter(f"no inherit {part.name}")

    def _check_constraint(self, part: Part) -> None:
        self._alter(f"drop constraint {quoted(part.name)}")

    _exclusion_constraint = _check_constraint

    def _alter(self, change: str) -> None:
        self._say(f"alter table {self._table} {change}")

    def _say(self, statement: str) -> None:
        self.statements.append(statement + ";")


def _definition(column: Column) -> str:
    required = " not null" if column.is_required else ""
    default = "" if column.default is None else f" default {column.default}"
    return column.type + required + default + (" generated by default as identity" if column.is_auto else "")
