"""
What a schema looks like: the expected catalog of each version, the live one, and their difference.

A column and an index are each one canonical line, such as ``integer not null default 10`` and
``(queue, priority desc) where status = 'queued'``, built from a database's answers by the backend. Compared is
meaning, not spelling, so whatever does not matter (a constraint's name, varying spellings of one type) is
gone from the line before it is compared, and what does matter can be read in the message.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime_repo.errors import Difference

__all__ = [
    "CONTROL",
    "LEDGER",
    "Catalog",
    "Ledger",
    "LedgerRow",
    "Look",
    "Table",
    "catalog_from_json",
    "catalog_to_json",
    "compare",
]

LEDGER = "runtime_schema_migrations"
CONTROL = "runtime_control"


@dataclass(frozen=True)
class Table:
    """One relation. *kind* is ``table`` unless our name stands on something else."""

    columns: Mapping[str, str]
    primary_key: tuple[str, ...] = ()
    indexes: Mapping[str, str] = field(default_factory=dict)
    kind: str = "table"
    attached: Mapping[str, str] = field(default_factory=dict)
    """
    What else hangs on it, such as ``trigger audit``, and its text. Nothing does on what we create, except that SQLite
    keeps some without rowids.
    """


@dataclass(frozen=True)
class Catalog:
    """
    The relations that bear our names.

    *fingerprint* identifies the text in which the database itself keeps exactly this catalog, so that a warm boot
    recognizes it without asking for every column. Another text may still mean the same: then the columns decide.
    """

    tables: Mapping[str, Table] = field(default_factory=dict)
    fingerprint: str | None = None

    @property
    def has_ledger(self) -> bool:
        """Whether a table with the ledger's name has the ledger's columns."""
        table = self.tables.get(LEDGER)
        return (
            table is not None and table.kind == "table" and {"version", "name", "applied_at_ms"} <= set(table.columns)
        )


@dataclass(frozen=True)
class LedgerRow:
    """One applied migration, as recorded."""

    version: int
    name: str
    applied_at_ms: int


Ledger = tuple[LedgerRow, ...]


@dataclass(frozen=True)
class Look:
    """What boot sees before it decides. *ledger* is None where there is no ledger with our columns."""

    ledger: Ledger | None
    catalog: Catalog
    namespace: bool = True
    """Whether the runtime schema itself exists; always true on SQLite."""
    names: frozenset[str] = frozenset()
    """Which names of the newest version's tables and indexes are in use, by whatever it may be. It may be empty where
    the catalog is that of the newest version."""
    problems: tuple[str, ...] = ()
    """Why the database cannot be served as it is, each a sentence."""
    reservations: tuple[Difference, ...] = ()
    """What keeps it from being migrated, but not from being served."""
    oldest: str | None = None
    """
    Of a ledger that is newer than what this release ships, where it was inspected: the oldest version whose release can
    still run beside it, as it stands in runtime_control, if it does.
    """

    remains: tuple[str, ...] = ()
    """Where there is nothing of ours: what a restore has kept or left beside, each a schema or a file."""

    @property
    def version(self) -> int:
        """The version recorded; 0 where nothing is, or it cannot be read."""
        return max((row.version for row in self.ledger or ()), default=0)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing of ours."""
        return not self.ledger and not self.catalog.tables and not self.problems

    def is_newer(self, shipped: Sequence[Catalog]) -> bool:
        """Whether it may say so."""
        table = self.catalog.tables.get(CONTROL)
        return (
            table is not None
            and table.kind == "table"
            and not self.problems
            and not self.reservations
            and any(row.version > len(shipped) for row in self.ledger or ())
        )


_CHANGES_MEANING = (
    "trigger",
    "rule",
    "unlogged storage",
    "child table",
    "conflict clause",
    "storage without rowid",
    "column instead of the rowid",
    "deferrable primary key",
)
"""Of what hangs on a table, that which makes a statement of ours do something else than it says."""


_RUNS_CODE = ("check constraint", "exclusion constraint", "parent table")
"""Of what else hangs on a table, that which evaluates an expression of its author's for whoever writes."""


def compare(expected: Catalog, live: Catalog, *, is_trusted: bool = True) -> tuple[list[Difference], list[Difference]]:
    """
    Return what is drift, and what is extra and tolerated.

    - Drift is whatever changes what our statements mean: a table, column, key, unique constraint or index that is
      missing or another; a collation by which two ids may be equal that are not the same (on SQLite any but BINARY);
      a table that a crash empties (UNLOGGED); a trigger, a rule, a child table, a deferrable primary key; of SQLite's
      a conflict clause, and storage WITHOUT ROWID where ours has it, or a column of that name; an extra column
      that is NOT NULL, or of a domain with constraints, and has no default, for it makes every insert fail.
    - Where strangers own what is ours (not *is_trusted*), drift is every expression of theirs, too, for it runs as
      whoever calls a verb: an extra column's default, an expression or a predicate of an extra index, a CHECK or
      exclusion constraint, the bounds of a partition.
    - Tolerated is what may refuse or speed up a statement, but not change it: extra columns and indexes, CHECK and
      exclusion constraints, foreign keys in either direction, a parent table, a deterministic collation, row security
      that does not apply to this role, STRICT.
    - Neither are other tables, constraints' names, storage parameters, statistics, comments, privileges,
      policies that nothing enables.

    What cannot be served even with ``on_drift="warn"``, such as row security that applies, is no drift but a problem of
    the look.
    """
    drift: list[Difference] = []
    extra: list[Difference] = []
    if expected.tables == live.tables:
        return drift, extra
    for name, table in expected.tables.items():
        found = live.tables.get(name)
        if found is None:
            drift.append(Difference(f"table {name}", "a table", None))
            continue
        _compare_columns(name, table, found, drift, extra, is_trusted=is_trusted)
        if table.primary_key != found.primary_key:
            drift.append(Difference(f"primary key of {name}", _key(table.primary_key), _key(found.primary_key)))
        _compare_indexes(name, table, found, drift, extra, is_trusted=is_trusted)
        for attached, line in found.attached.items():
            if table.attached.get(attached) == line:
                continue
            refused = attached.startswith(_CHANGES_MEANING if is_trusted else (*_CHANGES_MEANING, *_RUNS_CODE))
            difference = Difference(f"{attached} on {name}", "none" if refused else None, line)
            (drift if refused else extra).append(difference)
    return drift, extra


def _key(columns: Sequence[str]) -> str | None:
    return f"({', '.join(columns)})" if columns else None


def _compare_columns(
    name: str, expected: Table, found: Table, drift: list[Difference], extra: list[Difference], *, is_trusted: bool
) -> None:
    for column, line in expected.columns.items():
        if found.columns.get(column) != line:
            drift.append(Difference(f"column {name}.{column}", line, found.columns.get(column)))
    for column, line in found.columns.items():
        if column in expected.columns:
            continue
        if " not null" in line and not re.search(" (default|auto|generated)", line):
            drift.append(Difference(f"column {name}.{column}", "none, or one with a default", line))
        elif not is_trusted and re.search(" (default|generated)|domain with constraints", line):
            drift.append(Difference(f"column {name}.{column}", "none that runs a stranger's code", line))
        else:
            extra.append(Difference(f"column {name}.{column}", None, line))


def _compare_indexes(
    name: str, expected: Table, found: Table, drift: list[Difference], extra: list[Difference], *, is_trusted: bool
) -> None:
    meanings = {_meaning(line) for line in found.indexes.values()}
    wanted = {_meaning(line) for line in expected.indexes.values()}
    for index, line in expected.indexes.items():
        if _is_constraint(line):
            if _meaning(line) not in meanings:
                drift.append(Difference(f"unique constraint on {name}", line, None))
        elif index in found.indexes and found.indexes[index] != line:
            drift.append(Difference(f"index {index} on {name}", line, found.indexes[index]))
        elif _meaning(line) not in meanings:
            drift.append(Difference(f"index {index} on {name}", line, None))
    for index, line in found.indexes.items():
        if index in expected.indexes or _meaning(line) in wanted:
            continue
        if not is_trusted and re.search(r"\(.*\(| where ", line.replace(" INCLUDE (", "")):
            drift.append(Difference(f"index {index} on {name}", "none that runs a stranger's code", line))
        else:
            extra.append(Difference(f"index {index} on {name}", None, line))


def _is_constraint(line: str) -> bool:
    """A valid unique index over all rows is a unique constraint, whichever way it was declared."""
    return re.fullmatch(r"unique \([^()]*\)", line) is not None


def _meaning(line: str) -> str:
    """Two lines of one meaning compare equal: which column a unique constraint names first does not matter."""
    if not _is_constraint(line):
        return line
    columns = line.removeprefix("unique (").removesuffix(")").split(", ")
    return f"unique {sorted(column.removesuffix(' desc') for column in columns)}"


def catalog_to_json(catalog: Catalog) -> str:
    """The text of a ``.catalog.json`` file."""
    tables = {
        name: {
            "columns": dict(table.columns),
            "primary_key": list(table.primary_key),
            "indexes": dict(sorted(table.indexes.items())),
            **({"attached": dict(table.attached)} if table.attached else {}),
        }
        for name, table in sorted(catalog.tables.items())
    }
    head: dict[str, Any] = {} if catalog.fingerprint is None else {"fingerprint": catalog.fingerprint}
    return json.dumps(head | {"tables": tables}, indent=2) + "\n"


def catalog_from_json(text: str) -> Catalog:
    """The catalog that a ``.catalog.json`` file tells."""
    data = json.loads(text)
    tables = {
        name: Table(table["columns"], tuple(table["primary_key"]), table["indexes"], attached=table.get("attached", {}))
        for name, table in data["tables"].items()
    }
    return Catalog(tables, data.get("fingerprint"))
