"""From what PostgreSQL says about itself to a catalog: pure functions over rows. ``catalog`` compares."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from runtime_repo.catalog import LEDGER, Ledger, LedgerRow, Table
from runtime_repo.database import Row

__all__ = ["Text", "ledger_from_csv", "tables_from_rows", "text_from_copy"]

_KINDS = {
    "r": "table",
    "p": "partitioned table",
    "v": "view",
    "m": "materialized view",
    "f": "foreign table",
    "t": "type",
    "i": "index",
}


def ledger_from_csv(text: str) -> Ledger | None:
    """The ledger's rows, as COPY tells them; None when one of them is not a ledger's."""
    try:
        rows = [LedgerRow(int(version), name, int(instant)) for version, name, instant in csv.reader(io.StringIO(text))]
    except ValueError:
        return None
    return tuple(sorted(rows, key=lambda row: row.version))


class Text(NamedTuple):
    """What a warm boot reads of the catalogs."""

    is_nothing: bool
    """Whether the runtime schema is missing."""
    is_trusted: bool
    """Whether no stranger owns the schema or one of our relations."""
    fingerprint: str
    """Identifies the rest, in whatever order PostgreSQL keeps its parts."""


def text_from_copy(copied: str) -> Text:
    """The raw text of our relations, as COPY tells it."""
    path, *parts = (part.split(r"\n") for part in copied.rstrip("\n").split("\t"))
    # The namespace and the relations: who owns them is told at the end of the line.
    lines = [[line.removesuffix(" stranger") for line in part] for part in parts[:2]] + parts[2:]
    text = "\t".join(r"\n".join(sorted(part)) for part in (path, *lines))
    return Text(
        is_nothing=(path, parts[0]) == (["f"], [r"\N"]),
        is_trusted=lines == parts,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
    )


def tables_from_rows(rows: Sequence[Row], attached: Sequence[Row]) -> Mapping[str, Table] | None:
    """
    The live relations, column by column and index by index, and what hangs on them; None when an index has lost its
    definition meanwhile.
    """
    indexes = {row["relname"]: json.loads(row["indexes"] or "[]") for row in rows}
    if any(definition is None for found in indexes.values() for *_, definition in found):
        return None
    return {
        row["relname"]: _table(
            row,
            indexes[row["relname"]],
            {other["what"]: other["line"] for other in attached if other["relname"] == row["relname"]},
        )
        for row in rows
    }


def _table(row: Row, found: Sequence[Sequence[Any]], attached: Mapping[str, str]) -> Table:
    name = row["relname"]
    names: dict[int, str] = {}
    columns: dict[str, str] = {}
    for number, column, kind, not_null, generated, auto, default, is_constrained, loose in json.loads(
        row["columns"] or "[]"
    ):
        names[number] = column
        line = str(kind)
        if name == LEDGER and column == "version" and kind in ("smallint", "bigint"):
            line = "integer"  # an earlier program's ledger may have any of them
        if loose:
            line += f" collate {loose} (nondeterministic)"
        if is_constrained:
            line += " (a domain with constraints)"
        if not_null or is_constrained:
            line += " not null"
        if auto:
            line += " auto"
        elif generated:
            line += " generated"
        elif default is not None:
            line += f" default {_default(default)}"
        columns[column] = line
    primary_key: tuple[str, ...] = ()
    indexes: dict[str, str] = {}
    for index, primary, *facts in found:
        if primary and facts[2]:
            primary_key = tuple(names[number] for number in facts[3])
            if not facts[1]:
                attached = {**attached, "deferrable primary key": "no ON CONFLICT can name it"}
        else:
            indexes[index] = _index(*facts)
    letter = row["relkind"].decode() if isinstance(row["relkind"], bytes) else row["relkind"]
    return Table(columns, primary_key, indexes, _KINDS.get(letter, "relation"), attached)


def _index(unique: bool, immediate: bool, valid: bool, _key: Any, definition: str) -> str:  # noqa: FBT001
    """One line for an index. One that is invalid or deferrable says so, for it can't do what it is there for."""
    line = definition.partition(" USING ")[2].removeprefix("btree ")
    line = re.sub(r" WITH \([^()]*\)", "", line)  # storage parameters are the operator's
    line = line.replace(" DESC", " desc").replace(" WHERE ", " where ", 1)
    if unique:
        line = "unique " + line + ("" if immediate else " deferrable")
    return line if valid else line + " invalid"


def _default(expression: str) -> str:
    """``'x'::text`` and ``'0'::bigint`` mean what ``'x'`` and ``0`` do."""
    if match := re.fullmatch(r"\(*'(-?\d+)'::(?:bigint|integer|smallint)\)*", expression):
        return match[1]
    if match := re.fullmatch(r"\(*('(?:[^']|'')*')::text\)*", expression):
        return match[1]
    return expression
