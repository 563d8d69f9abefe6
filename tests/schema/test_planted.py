"""
Nobody's code runs as us: no statement of ours resolves to what another user can plant on the search path.

A function's name is resolved over the whole path unless it is qualified, and a better match wins wherever it stands. So
does an operator's, if ``pg_catalog`` has none for exactly these types. What a statement resolves to is what PostgreSQL
itself records of a function that consists of it.
"""

import ast
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

import runtime_repo
from runtime_repo import PostgresRuntimeRepository
from runtime_repo.postgres import PostgresDatabase, Target
from runtime_repo.queries import fill, load_queries, split_statements
from runtime_repo.schema import load_migrations
from tests.lab import PostgresLab, on_postgres

TYPES = [
    "boolean",
    '"char"',
    "name",
    "smallint",
    "integer",
    "bigint",
    "numeric",
    "double precision",
    "text",
    "oid",
    "regclass",
    "timestamptz",
    "interval",
    "json",
    "text[]",
    "name[]",
    "oid[]",
    "integer[]",
    "bigint[]",
]
"""What our columns, the catalogs' columns, our parameters and what we call are."""

PLANT = """
do $plant$
declare
  types regtype[] := array[{types}]::regtype[];
  ours regtype; theirs regtype; op text;
begin
  foreach ours in array types loop
    foreach theirs in array types loop
      execute format('create function {place}.two(%s, %s) returns boolean language sql as $$ select true $$',
                     ours, theirs);
      for op in
        select name from unnest(array[{operators}]) as name
         where not exists (select from pg_operator as o
                            where o.oprname = name and o.oprleft = ours and o.oprright = theirs)
      loop
        execute format('create operator {place}.%s (leftarg = %s, rightarg = %s, function = {place}.two)',
                       op, ours, theirs);
      end loop;
    end loop;
  end loop;
end $plant$
"""

PLANTED = """
select distinct d.refobjid::regoperator::text as name
  from pg_depend as d
  join pg_operator as o on o.oid = d.refobjid and d.refclassid = 'pg_operator'::regclass
 where o.oprnamespace = $1::text::regnamespace
"""

KEYWORDS = """
all and any array as asc by case cast check coalesce conflict desc distinct else end except exists extract filter from
greatest grouping having in index into is key lateral least limit not null nullif offset on operator or order over
partition returning row select set table then union unique using vacuum values when where with within
"""
"""What may stand before a parenthesis without being a function."""


def unqualified(text: str) -> set[str]:
    """The functions that a statement calls by their bare names."""
    bare = re.sub(r"--[^\n]*|'(?:[^']|'')*'", "", text)
    # What a statement names itself: common table expressions, and what stands before a list of columns.
    own = re.findall(r"(\w+)\s*(?:\([\w\s,]*\))?\s*as\s*(?:not\s+)?(?:materialized\s*)?\(", bare)
    named = re.findall(r"\b(?:as|into|recursive)\s+(\w+)\s*\(", bare)
    called = re.findall(r'(?<![\w."}])([a-z_]\w*)\s*\(', bare)
    return {*called} - {*KEYWORDS.split(), *own, *named}


def statements(schema: str) -> Iterator[tuple[str, str]]:
    """Every statement that is run on PostgreSQL, under a name."""
    tokens = PostgresDatabase(Target("postgresql://nowhere", {}), schema=schema, startup_timeout=1).tokens
    yield from load_queries("postgres", **tokens).items()
    for migration in load_migrations("postgres"):
        for kind, text in (("migration", migration.sql), ("check", migration.check)):
            for number, statement in enumerate(split_statements(fill(text, tokens)), 1):
                yield f"{kind} {migration.version}, statement {number}", statement


def is_ddl(statement: str) -> bool:
    """Whether it changes or vacuums what there is, or does what a query has told, and cannot be a function's body."""
    return re.match(r"(--[^\n]*\n|\s)*(create|alter|drop|do|vacuum)\b", statement) is not None


@pytest.fixture
async def planted(lab: PostgresLab) -> AsyncIterator[str]:
    """A schema full of operators that fit better, to be put on the search path."""
    place = f"{lab.place.schema}_planted"
    await lab.run_outside(f"create schema {place}")
    text = " ".join(re.sub(r"--[^\n]*|'(?:[^']|'')*'|::", "", statement) for _, statement in statements("x"))
    words = {"{types}": TYPES, "{operators}": sorted({*re.findall(r"[-+*/<>=~!@#%^&|`?]+", text)})}
    plant = PLANT.replace("{place}", place)
    for token, names in words.items():
        plant = plant.replace(token, ", ".join(f"'{name}'" for name in names))
    await lab.run_outside(plant)
    yield place
    await lab.run_outside(f"set client_min_messages = warning; drop schema {place} cascade")


async def uses(lab: PostgresLab, connection: asyncpg.Connection, place: str, statement: str) -> list[str]:
    """Which of the operators planted at *place*, which is on the path of *connection*, a statement resolves to."""
    kinds = ", ".join(await lab.parameters(statement))
    body = statement.rstrip().removesuffix(";")
    await connection.execute(f"create function {place}.probe({kinds}) returns void begin atomic {body}; end")
    found = [row["name"] for row in await connection.fetch(PLANTED, place)]
    await connection.execute(f"drop function {place}.probe")
    return sorted(found)


@on_postgres
async def test_no_statement_resolves_to_what_was_planted(lab: PostgresLab, planted: str) -> None:
    """Neither an operator, whatever its types, nor a function that is called by its bare name."""
    settings = {"search_path": planted}
    connection = await asyncpg.connect(lab.place.where, server_settings=settings)
    found: dict[str, object] = {}
    try:
        async with PostgresRuntimeRepository(lab.place.where, schema=lab.place.schema, server_settings=settings):
            pass
        # What the migrations made: defaults, predicates of indexes, and the like.
        assert await connection.fetch(PLANTED, planted) == []
        for name, statement in statements(lab.place.schema):
            if not is_ddl(statement) and (operators := await uses(lab, connection, planted, statement)):
                found[name] = operators
            if functions := unqualified(statement):
                found[name] = functions
    finally:
        await connection.close()
    assert found == {}


INEXACT = {
    "select extract(epoch from pg_catalog.statement_timestamp()) * 1000": ["*(numeric,integer)"],
    "select from pg_catalog.pg_class where oid = 0": ["=(oid,integer)"],
    "select from pg_catalog.pg_class where relname = any ($1::text[]) and oid = 0::oid and relpages > $2": [],
    "select $1::text || 1::bigint": ["||(text,bigint)"],
    "with a (b) as (update pg_catalog.pg_class set reltuples = 1 where oid = $1::bigint returning 1) select b from a": [
        "=(oid,bigint)"
    ],
}


@on_postgres
async def test_what_was_planted_is_found(lab: PostgresLab, planted: str) -> None:
    """The test above fails for a statement that is not exact."""
    connection = await asyncpg.connect(lab.place.where, server_settings={"search_path": planted})
    try:
        for statement, operators in INEXACT.items():
            found = await uses(lab, connection, planted, statement)
            assert [name.rpartition(".")[2] for name in found] == operators
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("statement", "functions"),
    [
        ("select concat_ws(' ', a) from t", {"concat_ws"}),
        ("select pg_catalog.concat_ws(' ', a), coalesce(b, c) from t where x in (1) and exists (select 1)", set()),
        ("with a (b) as (select 1), c as (select 2), d (e) as materialized (select 3) select b from a", set()),
        ("insert into t (a, b) values (1, lower('f(x)')) on conflict (a) do nothing", {"lower"}),
        ("select count(*) filter (where a) over (partition by b) from pg_catalog.unnest(c) as u (v)", {"count"}),
    ],
)
def test_a_bare_call_is_found(statement: str, functions: set[str]) -> None:
    """What is qualified, a keyword or named by the statement itself is none."""
    assert unqualified(statement) == functions


def test_no_statement_in_the_code_calls_a_bare_function() -> None:
    """The few that stand in Python are built there, and not among those above."""
    code = "".join(path.read_text(encoding="utf-8") for path in Path(runtime_repo.__path__[0]).rglob("*.py"))
    assert re.findall(r"(?<![.\w])pg_(?!catalog|dump\()[a-z_]+\(", code) == []


def built() -> Iterator[tuple[str, str]]:
    """The statements with parameters that stand in Python, and are not SQLite's."""
    for path in Path(runtime_repo.__path__[0]).rglob("*.py"):
        for node in () if path.parent.name == "sqlite" else ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value.strip()
                if re.match(r"(select|with|insert|update|delete)\s", text) and re.search(r"\$1|\bfrom\b", text):
                    yield f"{path.name}, line {node.lineno}", text


@on_postgres
async def test_the_driver_asks_for_no_type(lab: PostgresLab) -> None:
    """
    For what its core does not know asyncpg sends a query of its own, whose operators are not qualified: of arrays it
    knows those of texts and of oids.
    """
    assert any("$1" in text for _, text in built()), "there is such a statement"
    await lab.boot()
    asked: list[object] = []
    connection = await asyncpg.connect(lab.place.where, connection_class=recording(asked))
    try:
        for name, statement in [*statements(lab.place.schema), *built()]:
            if not is_ddl(statement):
                await connection.prepare(statement)
                assert asked == [], name
        await connection.prepare("select $1::int4[]")
        assert asked != [], "one that does is found"
    finally:
        await connection.close()


def recording(asked: list[object]) -> type[asyncpg.Connection]:
    """A connection that notes each type that the driver asks for."""

    class Recording(asyncpg.Connection):
        async def _introspect_types(self, *args: object) -> object:
            asked.append(args)
            return await super()._introspect_types(*args)  # type: ignore[misc]

    return Recording
