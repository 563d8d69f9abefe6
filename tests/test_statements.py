"""How SQLite is given a query's arguments, and what one of its statements finds for the next."""

import sqlite3
from collections.abc import Iterator

import pytest

from runtime_repo.sqlite.statements import Prepared


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    """A database in memory."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("create table t (a, b)")
    yield connection
    connection.close()


def test_arguments_are_bound_by_their_numbers(connection: sqlite3.Connection) -> None:
    """In whichever order and how often the text names them; in literals, names and comments nothing is named."""
    query = Prepared("""-- Not $3, nor $1; here.
        select $2 as x, $1 as y, '$1; it''s' as "$ z", $2 /* $9 */ as w -- $4""")
    assert query.run(connection, ("one", "two")) == [{"x": "two", "y": "one", "$ z": "$1; it's", "w": "two"}]


def test_the_last_rows_are_the_answer(connection: sqlite3.Connection) -> None:
    """Of several statements; what has none does not count."""
    query = Prepared("insert into t values ($1, 1) returning a; insert into t values (2, $2);")
    assert query.run(connection, ("one", "two")) == [{"a": "one"}]
    assert Prepared("select a from t where a = $1").run(connection, ("nothing",)) == []


FINDING = """
select max(a) as "$2", min(b) as "$3" from t where a <= $1;
insert into t values ($2 + 100, $3);
select max(b) as "$4" from t where b > $3 and a < $2;
insert into t values (0, $4);
select a, b from t where a > 100 or a = 0 order by a;
"""


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1, 5), (2, 3)], [(0, 5), (102, 3)]),
        ([(2, 3)], [(102, 3)]),
        ([(9, 9)], []),
        ([(1, None)], []),
    ],
    ids=["all found", "the second found nothing", "the first found nothing", "half of it found"],
)
def test_what_one_finds_is_an_argument_of_the_next(
    connection: sqlite3.Connection, rows: list[tuple[int, int | None]], expected: list[tuple[int, int]]
) -> None:
    """What needs something that was not found is not done, and finds nothing itself."""
    connection.executemany("insert into t values (?, ?)", rows)
    found = Prepared(FINDING).run(connection, (5,))
    assert [(row["a"], row["b"]) for row in found] == expected
    assert len(connection.execute("select a from t").fetchall()) == len(rows) + len(expected)
