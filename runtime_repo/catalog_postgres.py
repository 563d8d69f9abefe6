"""From what PostgreSQL says about itself to a catalog: pure functions over rows. What is compared stands in ``catalog``."""

import re
from collections.abc import Collection, Mapping, Sequence

from runtime_repo.catalog import LEDGER, Catalog, LedgerRow, Table
from runtime_repo.database import Row

__all__ = ["catalog_from_rows", "ledger_from_text"]

_KINDS = {"r": "table", "p": "partitioned table", "v": "view", "m": "materialized view", "f": "foreign table"}

# Object ids below 10,000 are assigned by hand in PostgreSQL's sources and never change (src/include/catalog/*.dat).
_TYPES = {
    "16": "boolean",
    "20": "bigint",
    "21": "smallint",
    "23": "integer",
    "25": "text",
    "114": "json",
    "3802": "jsonb",
}
_DEFAULT_OPERATOR_CLASSES = {"1978", "3124", "3126"}
"""B-tree on integer, bigint and text."""


def ledger_from_text(text: str) -> tuple[LedgerRow, ...] | None:
    """The ledger's rows; None when one of them is not a ledger's."""
    rows = _records(text)
    if not all(re.fullmatch(r"-?\d+", number or "") for version, _, at in rows for number in (version, at)):
        return None
    return tuple(
        sorted((LedgerRow(int(version), name, int(at)) for version, name, at in rows), key=lambda r: r.version)
    )


def catalog_from_rows(rows: Sequence[Row], owned: Collection[tuple[str, str]]) -> Catalog:
    """The live catalog; *owned* are the (table, column) pairs whose default is a sequence of their own."""
    return Catalog({row["relname"]: _table(row, owned) for row in rows})


def _table(row: Row, owned: Collection[tuple[str, str]]) -> Table:
    name = row["relname"]
    defaults = {number: default for number, default in _records(row["defaults"])}
    names: dict[str, str] = {}
    columns: dict[str, str] = {}
    for number, column, kind, modifier, not_null, identity, generated in _records(row["columns"]):
        names[number] = column
        line = _TYPES.get(kind, f"type {kind}") + ("" if modifier == "-1" else f"({modifier})")
        if name == LEDGER and column == "version" and line in ("smallint", "bigint"):
            line = "integer"  # an earlier program's ledger may have any of them
        if not_null == "t":
            line += " not null"
        if identity or (name, column) in owned:
            line += " auto"
        elif generated:
            line += " generated"
        elif number in defaults:
            line += f" default {_default(defaults[number])}"
        columns[column] = line
    primary_key: tuple[str, ...] = ()
    indexes: dict[str, str] = {}
    for index, primary, *key in _records(row["indexes"]):
        if primary == "t":
            primary_key = tuple(names[number] for number in key[3].split())
        else:
            indexes[_unqualified(index)] = _index(key, names)
    return Table(columns, primary_key, indexes, _KINDS.get(_letter(row["relkind"]), "relation"))


def _index(key: Sequence[str], names: Mapping[str, str]) -> str:
    """One line for an index. One that is invalid or deferrable says so, for it can't do what it is there for."""
    unique, valid, size, numbers, options, classes, expressions, predicate = key
    parts = []
    for number, option, operators in zip(numbers.split(), options.split(), classes.split(), strict=False):
        part = names.get(number, f"({expressions})")
        if operators not in _DEFAULT_OPERATOR_CLASSES:
            part += f" operators {operators}"
        parts.append(part + {"0": "", "1": " desc nulls last", "2": " nulls first", "3": " desc"}[option])
    line = ("unique " if unique == "t" else "") + f"({', '.join(parts)})"
    if included := [names[number] for number in numbers.split()[int(size) :]]:
        line += f" include ({', '.join(included)})"
    if predicate:
        line += f" where {predicate}"
    return line if valid == "t" else line + " invalid"


def _default(expression: str) -> str:
    """``'x'::text`` and ``'0'::bigint`` mean what ``'x'`` and ``0`` do."""
    if match := re.fullmatch(r"\(*'(-?\d+)'::(?:bigint|integer|smallint)\)*", expression):
        return match[1]
    if match := re.fullmatch(r"\(*('(?:[^']|'')*')::text\)*", expression):
        return match[1]
    return expression


def _letter(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _unqualified(name: str) -> str:
    """The last part of a name as PostgreSQL writes it, with or without its schema, quoted or not."""
    match = re.search(r'(?:"((?:[^"]|"")*)"|([^."]+))$', name)
    assert match is not None
    return match[1].replace('""', '"') if match[1] is not None else match[2]


def _records(text: str) -> list[list[str]]:
    """The fields of an array of records, as PostgreSQL writes both; NULL is an empty field."""
    elements = re.findall(r'"((?:[^"\\]|\\.)*)"', text, re.DOTALL)
    return [_fields(re.sub(r"\\(.)", r"\1", element, flags=re.DOTALL)) for element in elements]


def _fields(record: str) -> list[str]:
    fields = re.findall(r'[(,](?:"((?:[^"\\]|\\.|"")*)"|([^,()"]*))', record, re.DOTALL)
    return [re.sub(r'\\(.)|"(")', r"\1\2", quoted, flags=re.DOTALL) if quoted else bare for quoted, bare in fields]
