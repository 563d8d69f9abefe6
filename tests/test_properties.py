"""What holds for any input: boot's judgement, the loading of SQL, catalogs, JSON and ids. Pure functions only."""

import json
import random
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_repo import (
    ConfigurationError,
    ForeignSchemaError,
    SchemaDriftError,
    SchemaError,
    SchemaHistoryError,
    SchemaOutOfDateError,
    SchemaTooNewError,
)
from runtime_repo.catalog import (
    LEDGER,
    Catalog,
    LedgerRow,
    Look,
    Table,
    catalog_from_json,
    catalog_to_json,
    compare,
)
from runtime_repo.queries import fill, split_statements
from runtime_repo.schema import Migrate, Migration, Policy, Refuse, Serve, decide, load_migrations
from runtime_repo.sqlite.catalog import catalog_from_rows
from runtime_repo.values import from_json, new_id, to_json

settings.register_profile("runtime_repo", deadline=None, max_examples=100, derandomize=True, database=None)
settings.load_profile("runtime_repo")

# --- Boot's judgement ------------------------------------------------------------------------------------------------

LEDGER_TABLE = Table({"version": "integer not null", "name": "text not null", "applied_at_ms": "bigint"}, ("version",))


def expected_catalog(version: int) -> Catalog:
    """Migration *n* adds table ``t<n>``, and a column to each that was there."""
    tables = {LEDGER: LEDGER_TABLE}
    for number in range(1, version + 1):
        columns = {"id": "text not null", "key": "text", **{f"c{later}": "bigint" for later in range(number, version)}}
        indexes = {f"i{number}": "(key desc, id)", "u": "unique (id, key)"}
        tables[f"t{number}"] = Table(columns, ("id",), indexes)
    return Catalog(tables)


def shipped(count: int) -> tuple[Migration, ...]:
    """As many migrations as asked for."""
    return tuple(Migration(n, f"step_{n}", f"create table t{n};", expected_catalog(n)) for n in range(1, count + 1))


def change(table: Table, what: str) -> Table | None:
    """The table after *what* was done to it; None when it is gone."""
    if what == "gone":
        return None
    without_key = {name: line for name, line in table.columns.items() if name != "key"}
    first = next((name for name in table.indexes if name.startswith("i")), "")
    changed: dict[str, Table] = {
        "view": replace(table, kind="view"),
        "column gone": replace(table, columns=without_key),
        "column changed": replace(table, columns=dict(table.columns) | {"key": "blob"}),
        "key changed": replace(table, primary_key=("key",)),
        "index gone": replace(table, indexes={"u": "unique (id, key)"}),
        "index changed": replace(table, indexes=dict(table.indexes) | {first: "(key, id)"}),
        "constraint gone": replace(table, indexes={first: "(key desc, id)"}),
        "column extra": replace(table, columns=dict(table.columns) | {"mine": "text"}),
        "index extra": replace(table, indexes=dict(table.indexes) | {"mine": "(key)"}),
        "index renamed": replace(table, indexes={"mine": "(key desc, id)", "u": "unique (id, key)"}),
        "constraint reordered": replace(table, indexes={first: "(key desc, id)", "mine": "unique (key, id)"}),
    }
    return changed.get(what, table)


DRIFTS = ("gone", "column gone", "column changed", "key changed", "index gone", "index changed", "constraint gone")
HARMLESS = ("column extra", "index extra", "index renamed", "constraint reordered")
CHANGES = st.sampled_from(["", "", "", "view", *DRIFTS, *HARMLESS])


@dataclass(frozen=True)
class Case:
    """What boot finds: how many migrations are shipped, what is recorded, and what was done to which tables."""

    supported: int
    recorded: dict[int, str] | None
    laid: int
    """The version whose tables are there; 0 is none."""
    changes: dict[str, str]
    stranger: bool
    policy: Policy

    @property
    def ledger(self) -> tuple[LedgerRow, ...] | None:
        if self.recorded is None:
            return None
        return tuple(LedgerRow(version, name, 0) for version, name in self.recorded.items())

    @property
    def catalog(self) -> Catalog:
        tables = dict(expected_catalog(self.laid).tables) if self.laid else {}
        if self.recorded is None:
            tables.pop(LEDGER, None)
        else:
            tables[LEDGER] = LEDGER_TABLE
        left = {name: change(table, self.changes.get(name, "")) for name, table in tables.items()}
        if self.stranger:
            left["theirs"] = Table({"x": "text"})
        return Catalog({name: table for name, table in left.items() if table is not None})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    supported = draw(st.integers(1, 4))
    version = draw(st.integers(0, supported))
    recorded: dict[int, str] | None = {n: f"step_{n}" for n in range(1, version + 1)}
    assert recorded is not None
    match draw(st.sampled_from(["right"] * 4 + ["none", "gap", "name", "newer", "odd"])):
        case "none":
            recorded = None
        case "gap" if recorded:
            del recorded[draw(st.sampled_from(sorted(recorded)))]
        case "name" if recorded:
            recorded[draw(st.sampled_from(sorted(recorded)))] = "another"
        case "newer":
            recorded[draw(st.integers(supported + 1, supported + 3))] = "later"
        case "odd":
            recorded[draw(st.integers(-1, 0))] = "odd"
    return Case(
        supported,
        recorded,
        draw(st.sampled_from([version, version, version, *range(supported + 1)])),
        {f"t{n}": draw(CHANGES) for n in range(1, supported + 1)},
        draw(st.booleans()),
        Policy(migrate=draw(st.booleans()), on_drift=draw(st.sampled_from(["refuse", "warn"]))),
    )


def verdict(case: Case) -> tuple[type[object], object]:
    """The design's order, from what was done to the database and not from what it looks like."""
    there = {n for n in range(1, case.laid + 1) if case.changes[f"t{n}"] != "gone"}
    views = {n for n in there if case.changes[f"t{n}"] == "view"}
    if not case.recorded:
        if there or case.recorded is not None:
            return ForeignSchemaError, None
        return (Migrate, 0) if case.policy.migrate else (SchemaOutOfDateError, 0)
    version = max(case.recorded)
    if views or (1 <= version <= case.supported and any(n > version for n in there)):
        return ForeignSchemaError, None
    if version > case.supported:
        return SchemaTooNewError, version
    for number in sorted({*case.recorded, *range(1, version + 1)}):
        if number < 1 or case.recorded.get(number) != f"step_{number}":
            return SchemaHistoryError, number
    drifted = case.laid < version or any(case.changes[f"t{n}"] in DRIFTS for n in range(1, version + 1))
    if drifted and case.policy.on_drift == "refuse":
        return SchemaDriftError, version
    if version == case.supported:
        return Serve, version
    if not case.policy.migrate:
        return SchemaOutOfDateError, version
    # The columns that the pending migrations add are there already.
    if case.laid > version and any(n <= version for n in there):
        return ForeignSchemaError, None
    return Migrate, version


@given(cases())
@settings(max_examples=1000)
def test_boot_decides_in_the_designs_order(case: Case) -> None:
    """Foreign, too new, a gap or another name, drift, pending in verify-only; otherwise migrate or serve."""
    decision = decide(Look(case.ledger, case.catalog), shipped(case.supported), case.policy)
    kind, number = verdict(case)
    match decision:
        case Serve() | Migrate():
            assert (type(decision), decision.from_version) == (kind, number)
            if case.policy.on_drift == "refuse" and decision.from_version:
                extra = [n for n in range(1, case.laid + 1) if case.changes[f"t{n}"].endswith("extra")]
                assert len(decision.tolerated) == len(extra)
        case Refuse(error=error):
            assert isinstance(error, SchemaError)
            assert type(error) is kind
            assert getattr(error, "found", getattr(error, "version", None)) == number
            assert len(str(error).splitlines()) == 1


@given(cases())
def test_what_is_pending_is_every_version_above_in_order(case: Case) -> None:
    """Nothing is left out and nothing is applied twice; after it was applied, boot serves."""
    migrations = shipped(case.supported)
    decision = decide(Look(case.ledger, case.catalog), migrations, case.policy)
    if not isinstance(decision, Migrate):
        return
    assert decision.pending == migrations[decision.from_version :] != ()
    after = (*(case.ledger or ()), *(LedgerRow(m.version, m.name, 0) for m in decision.pending))
    assert decide(Look(after, migrations[-1].catalog), migrations, case.policy) == Serve(case.supported)


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_ledgers_rows_does_not_matter(case: Case, order: random.Random) -> None:
    """A table has no order."""
    rows = list(case.ledger or ())
    order.shuffle(rows)
    ledger = None if case.ledger is None else tuple(rows)
    looks = (Look(found, case.catalog) for found in (case.ledger, ledger))
    once, again = (decide(look, shipped(case.supported), case.policy) for look in looks)
    assert repr(once) == repr(again)


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
@given(data=st.data())
def test_what_is_extra_is_never_drift(backend: str, data: st.DataObject) -> None:
    """The operator's columns, indexes and tables are listed, and change nothing in the decision."""
    migrations = load_migrations(backend)
    newest = migrations[-1].catalog
    assert compare(newest, Catalog(dict(newest.tables))) == ([], [])
    tables = dict(newest.tables)
    names = st.from_regex(r"[a-z_]{1,8}", fullmatch=True).map(lambda name: f"op_{name}")
    expected = set()
    for name in data.draw(st.lists(st.sampled_from(sorted(tables)), min_size=1, unique=True)):
        columns, indexes = data.draw(st.tuples(st.sets(names, max_size=2), st.sets(names, max_size=2)))
        tables[name] = replace(
            tables[name],
            columns=dict(tables[name].columns) | dict.fromkeys(columns, "text"),
            indexes=dict(tables[name].indexes) | {index: f"(op_{index})" for index in indexes},
        )
        expected |= {f"column {name}.{column}" for column in columns} | {
            f"index {index} on {name}" for index in indexes
        }
    live = Catalog(tables | {"op_table": Table({"x": "text"})})
    drift, extra = compare(newest, live)
    assert drift == []
    assert {difference.object for difference in extra} == expected
    ledger = tuple(LedgerRow(migration.version, migration.name, 0) for migration in migrations)
    decision = decide(Look(ledger, live), migrations, Policy())
    assert isinstance(decision, Serve)
    assert set(decision.tolerated) == set(extra)


# --- The loading of SQL ----------------------------------------------------------------------------------------------

_INSIDE = st.text(st.sampled_from("ab;{}-/* \n$?'\""), max_size=6)
FRAGMENTS = st.one_of(
    st.sampled_from(["select", "update", "x", "1", "=", "(", ")", ",", "$1", "-", "/", "*"]),
    _INSIDE.map(lambda inside: "'" + inside.replace("'", "''") + "'"),
    _INSIDE.map(lambda inside: '"' + inside.replace('"', '""') + '"'),
    _INSIDE.map(lambda inside: "/*" + inside.replace("*/", "") + " */"),
    _INSIDE.map(lambda inside: "--" + inside.replace("\n", "") + "\n"),
)
STATEMENTS = st.lists(FRAGMENTS, max_size=6).map(lambda fragments: " ".join(["do", *fragments, "done"]))


@given(st.lists(STATEMENTS, max_size=5), st.sampled_from(["", ";", "; -- the end", ";\n/* the ; end */\n"]))
def test_a_script_is_split_at_its_own_semicolons_only(statements: Sequence[str], end: str) -> None:
    """Semicolons in literals, quoted names and comments belong to the statement; no word is lost."""
    script = ";\n".join(statements) + (end if statements else "")
    found = list(split_statements(script))
    assert [statement.removesuffix(";") for statement in found] == statements
    assert all(statement.endswith(";") for statement in found[:-1])


@given(st.lists(st.sampled_from(["{schema}", "{now_ms}", "x", "'", "\\1", "$1", "%s", " "])), st.text(), st.text())
def test_tokens_are_replaced_exactly(parts: Sequence[str], schema: str, now_ms: str) -> None:
    """A value goes in as it is, whatever it holds: braces, backslashes, another token's name."""
    values = {"{schema}": schema, "{now_ms}": now_ms}
    filled = fill("".join(parts), {"schema": schema, "now_ms": now_ms})
    assert filled == "".join(values.get(part, part) for part in parts)


@given(st.text(st.sampled_from("ab{}"), max_size=8))
def test_a_leftover_brace_fails(text: str) -> None:
    """Any brace that is no token's is a mistake in the file."""
    left = re.sub(r"\{[ab]\}", "", text)
    if "{" in left or "}" in left:
        with pytest.raises(ConfigurationError, match="unexpected"):
            fill(text, {"a": "1", "b": "2"})
    else:
        assert fill(text, {"a": "1", "b": "2"}) == text.replace("{a}", "1").replace("{b}", "2")


@given(
    st.sampled_from(["begin", "COMMIT", "Rollback", "savepoint x", "release x", "end", "start transaction", "abort"]),
    st.lists(STATEMENTS, max_size=2),
    st.sampled_from(["", "-- why\n", "/* why; */ "]),
)
def test_a_migration_cannot_control_its_own_transaction(word: str, before: Sequence[str], comment: str) -> None:
    """A commit inside a migration would part it from its ledger row."""
    with pytest.raises(ConfigurationError, match="controls its own transaction"):
        Migration(1, "x", "".join(f"{statement};\n" for statement in before) + f"{comment}{word};", Catalog())


# --- Catalogs --------------------------------------------------------------------------------------------------------

LINES = st.dictionaries(st.text(max_size=5), st.text(max_size=8), max_size=3)
TABLES = st.builds(Table, LINES, st.lists(st.text(max_size=4), max_size=2).map(tuple), LINES)


@given(st.dictionaries(st.text(max_size=5), TABLES, max_size=3), st.none() | st.text(max_size=8))
def test_a_catalog_survives_its_file(tables: Mapping[str, Table], fingerprint: str | None) -> None:
    """What is written is what is read, and writing it again gives the same bytes."""
    catalog = Catalog(tables, fingerprint)
    text = catalog_to_json(catalog)
    assert catalog_from_json(text) == catalog
    assert catalog_to_json(catalog_from_json(text)) == text
    assert compare(catalog, catalog_from_json(text)) == ([], [])


def index_line(predicate: str) -> str:
    """The catalog's line for a partial index with this predicate, as SQLite would keep its text."""
    row = {
        "table": "t",
        "name": "i",
        "unique": 0,
        "origin": "c",
        "partial": 1,
        "column": "a",
        "desc": 0,
        "coll": "BINARY",
        "sql": f"CREATE INDEX i ON t (a) WHERE {predicate}",
    }
    column = {"table": "t", "sql": "create table t (a)", "kind": "table", "name": "a", "type": "text"}
    nothing = {"notnull": 0, "pk": 0, "dflt_value": None, "hidden": 0}
    shipped_tables = Catalog({"t": Table({})})
    return catalog_from_rows([column | nothing], [row], shipped_tables).tables["t"].indexes["i"]


PREDICATE = [
    "status",
    "=",
    "'Queued'",
    "and",
    "(",
    "retry_at_ms",
    "is",
    "not",
    "null",
    "or",
    "priority",
    ">=",
    "10",
    ")",
]
NAMES = {"status", "retry_at_ms", "priority"}


@given(st.data())
def test_spelling_does_not_change_an_expression(data: st.DataObject) -> None:
    """Case, whitespace, comments, quotes around names and parentheses around all of it mean nothing."""
    words = []
    for word in PREDICATE:
        spelt = word if word.startswith("'") else data.draw(st.sampled_from([word, word.upper(), word.title()]))
        quotes = data.draw(st.sampled_from(["{}", '"{}"', "`{}`", "[{}]"])) if word in NAMES else "{}"
        words += [quotes.format(spelt), data.draw(st.sampled_from([" ", "\n\t", " /* ; */ ", " -- '\n"]))]
    depth = data.draw(st.integers(0, 3))
    assert index_line("(" * depth + "".join(words) + ")" * depth) == index_line(" ".join(PREDICATE))


@given(st.integers(0, len(PREDICATE) - 1), st.sampled_from(["'queued'", "'QUEUED '", "other", "11", "<="]))
def test_meaning_does_change_an_expression(position: int, word: str) -> None:
    """A literal in another case, another name, number or operator is another index."""
    other = [*PREDICATE[:position], word, *PREDICATE[position + 1 :]]
    assert index_line(" ".join(other)) != index_line(" ".join(PREDICATE))


# --- Records ---------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any, order: random.Random) -> Any:
    """An equal value whose objects were filled in another order."""
    if isinstance(value, dict):
        items = [(key, shuffled(inner, order)) for key, inner in value.items()]
        order.shuffle(items)
        return dict(items)
    return [shuffled(inner, order) for inner in value] if isinstance(value, list) else value


@given(VALUES, st.randoms(use_true_random=False))
def test_equal_values_are_equal_text(value: Any, order: random.Random) -> None:
    """JSON is canonical, one line of ASCII without NUL, and comes back as it went in; None is NULL."""
    text = to_json("payload", value)
    assert to_json("payload", shuffled(value, order)) == text
    assert from_json(text) == value
    assert (text is None) == (value is None)
    if text is not None:
        assert text.isascii()
        assert "\0" not in text
        assert json.loads(text) == value
        assert len(text.splitlines()) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", object(), {("a",): 1}, {1: 1, "a": 2}])
def test_what_is_no_json_is_refused_by_name(value: object) -> None:
    """The error names the argument."""
    with pytest.raises(ConfigurationError, match="payload cannot be stored as JSON"):
        to_json("payload", [value])


def test_a_new_id_is_a_uuid_of_version_7_whose_order_is_time() -> None:
    """The first 48 bits are the milliseconds of its creation, so that text order is the order of creation."""
    made = []
    for _ in range(2000):
        before = time.time_ns() // 1_000_000
        text = new_id()
        after = time.time_ns() // 1_000_000
        number = uuid.UUID(text)
        assert (str(number), number.version, number.variant) == (text, 7, uuid.RFC_4122)
        moment = number.int >> 80
        assert before <= moment <= after
        made.append((text, moment))
    assert len({text for text, _ in made}) == len(made)
    moments = [moment for _, moment in sorted(made)]
    assert moments == sorted(moments)
