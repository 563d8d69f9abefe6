"""The errors: their tree, their numbers, their words, and that nothing else leaves the package."""

import copy
import inspect
import pickle
import re
import sqlite3
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import runtime_repo
from runtime_repo import (
    ArchiveError,
    ConfigurationError,
    ConflictError,
    DatabaseUnavailableError,
    Difference,
    ForeignSchemaError,
    InvalidTransitionError,
    LeaseHolder,
    LeaseLostError,
    LockHolder,
    MigrationError,
    NotFoundError,
    NotQuietError,
    OutdatedReleaseError,
    OverloadedError,
    PayloadMismatchError,
    PostgresRuntimeRepository,
    RefusedError,
    RemainsError,
    RepositoryClosedError,
    RuntimeRepoError,
    RuntimeRepository,
    SchemaDriftError,
    SchemaError,
    SchemaHistoryError,
    SchemaLockTimeoutError,
    SchemaOutOfDateError,
    SchemaTooNewError,
    SqliteRuntimeRepository,
    StoreInUseError,
    UnportableRowsError,
    UnreadableRowError,
    UnsuitableDatabaseError,
    errors,
)
from runtime_repo.catalog import LEDGER
from runtime_repo.schema import load_migrations
from tests.verbs import CALLS, prepare

CLASSES = {name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)}

HOLDER = LockHolder(42, "worker", "10.0.0.7", 3.25)
WORKER = LeaseHolder("w-1", 3, "a-1", datetime(2030, 1, 1, tzinfo=UTC))

# The error, its attributes, and what its message says: what was found, what was expected, what to do next.
EXAMPLES: list[tuple[RuntimeRepoError, dict[str, Any], list[str]]] = [
    (RuntimeRepoError("words"), {}, ["words"]),
    (SchemaError("words"), {}, ["words"]),
    (SchemaTooNewError(7, 2), {"found": 7, "supported": 2}, ["version 7", "version 2", "deploy a release", "backup"]),
    (
        SchemaHistoryError(1, None, "baseline"),
        {"version": 1, "recorded": None, "shipped": "baseline"},
        ["no row for version 1", "'baseline'", "nothing was changed", "restore its backup"],
    ),
    (
        SchemaHistoryError(1, "theirs", "baseline"),
        {"version": 1, "recorded": "theirs", "shipped": "baseline"},
        ["version 1", "'theirs'", "'baseline'", "right database"],
    ),
    (
        SchemaHistoryError(0, "zero", None),
        {"version": 0, "recorded": "zero", "shipped": None},
        ["version 0", "'zero'", "right database"],
    ),
    (
        ForeignSchemaError(["runtime_jobs", "runtime_leases"]),
        {"tables": ("runtime_jobs", "runtime_leases")},
        ["runtime_jobs, runtime_leases", "nothing was changed", "move these objects away"],
    ),
    (
        SchemaDriftError(2, [Difference("column t.a", "text", "blob"), Difference("table u", "a table", None)]),
        {
            "version": 2,
            "differences": (Difference("column t.a", "text", "blob"), Difference("table u", "a table", None)),
        },
        ["version 2", "column t.a differs: expected text, found blob", "table u is missing", "on_drift='warn'"],
    ),
    (
        SchemaOutOfDateError(1, 2),
        {"found": 1, "supported": 2},
        ["version 1", "version 2", "migrate=False", "boot once with migrate=True"],
    ),
    (
        SchemaLockTimeoutError(60.25, HOLDER),
        {"waited": 60.25, "holder": HOLDER},
        ["60.2 s", "process 42", "'worker'", "10.0.0.7", "3.2 s", "raise lock_timeout"],
    ),
    (SchemaLockTimeoutError(0.5, None), {"waited": 0.5, "holder": None}, ["0.5 s", "unknown process"]),
    (
        MigrationError(2, "roles", "no space"),
        {"version": 2, "name": "roles"},
        ["migration 2 (roles)", "rolled back", "no space", "boot again"],
    ),
    (
        RemainsError(["schema runtime_before_1"]),
        {"remains": ("schema runtime_before_1",)},
        ["no store here", "schema runtime_before_1", "nothing was created", "repeat the restore"],
    ),
    (
        ArchiveError("a.archive", "it is damaged: take another"),
        {"path": "a.archive", "reason": "it is damaged: take another"},
        ["'a.archive'", "it is damaged: take another"],
    ),
    (
        StoreInUseError(["worker 'w' holds 1 active leases: stop it", "two"]),
        {"reasons": ("worker 'w' holds 1 active leases: stop it", "two")},
        ["in use", "worker 'w'", "stop it", "two"],
    ),
    (
        UnportableRowsError(["runtime_jobs, row 'a', status: it is blob"]),
        {"cells": ("runtime_jobs, row 'a', status: it is blob",)},
        ["runtime_jobs, row 'a', status", "correct or delete"],
    ),
    (NotFoundError("attempt", "a-1"), {"what": "attempt", "key": "a-1"}, ["no attempt 'a-1'", "pruned"]),
    (ConflictError("words"), {}, ["words"]),
    (
        LeaseLostError("a-1", token=3, current=5, status="leased", worker_id="w"),
        {"attempt_id": "a-1", "token": 3, "current": 5, "status": "leased", "worker_id": "w"},
        ["'a-1'", "token 3", "token is 5", "leased", "held by w", "discard the result"],
    ),
    (
        LeaseLostError("a-1", token=3, current=3, status="queued", worker_id=None),
        {"attempt_id": "a-1", "token": 3, "current": 3, "status": "queued", "worker_id": None},
        ["nobody", "queued"],
    ),
    (
        LeaseLostError("a-1", token=3, current=None, status=None, worker_id=None),
        {"attempt_id": "a-1", "token": 3, "current": None, "status": None, "worker_id": None},
        ["'a-1'", "token 3", "can no longer be proved", "unknown", "discard the result"],
    ),
    (
        InvalidTransitionError("attempt", "a-1", status="failed", verb="cancel"),
        {"what": "attempt", "key": "a-1", "status": "failed", "verb": "cancel"},
        ["cannot cancel", "'a-1'", "failed"],
    ),
    (
        PayloadMismatchError("attempt", "a-1", ["queue", "payload"]),
        {"what": "attempt", "key": "a-1", "differing": ("queue", "payload")},
        ["attempt 'a-1'", "queue, payload", "use a new id"],
    ),
    (
        OutdatedReleaseError(4, 2, 3),
        {"found": 4, "supported": 2, "oldest": 3},
        ["version 4", "version 3", "supports version 2", "claims nothing more", "knows version 4"],
    ),
    (OutdatedReleaseError(3, 2, 3), {"found": 3, "supported": 2, "oldest": 3}, ["version 3", "supports version 2"]),
    (
        NotQuietError(60.25, [HOLDER], []),
        {"waited": 60.25, "claims": (HOLDER,), "holders": ()},
        ["60.2 s", "process 42", "may still claim", "end them", "resume()"],
    ),
    (
        NotQuietError(1.0, [], [WORKER] * 7),
        {"waited": 1.0, "claims": (), "holders": (WORKER,) * 7},
        ["1.0 s", "held: 21", "worker 'w-1' (3, such as on attempt 'a-1', until 2030-01-01", "2 more", "resume()"],
    ),
    (RepositoryClosedError("words"), {}, ["words"]),
    (ConfigurationError("words"), {}, ["words"]),
    (DatabaseUnavailableError("words"), {}, ["words"]),
    (RefusedError("words"), {}, ["words"]),
    (OverloadedError("words"), {}, ["words"]),
    (
        UnreadableRowError("runtime_attempts", "'a-1'", "enqueued_at_ms is 10**16"),
        {"table": "runtime_attempts", "key": "'a-1'", "reason": "enqueued_at_ms is 10**16"},
        ["'a-1'", "runtime_attempts", "enqueued_at_ms is 10**16", "correct or delete it"],
    ),
    (
        UnsuitableDatabaseError(["its encoding is LATIN1: create it as UTF8", "two"]),
        {"problems": ("its encoding is LATIN1: create it as UTF8", "two")},
        ["LATIN1", "UTF8", "two"],
    ),
]
EACH = pytest.mark.parametrize(
    ("error", "attributes", "words"), EXAMPLES, ids=[f"{n}-{type(e).__name__}" for n, (e, _, _) in enumerate(EXAMPLES)]
)


def drawn(text: str) -> dict[str, tuple[str, ...]]:
    """The tree in *text*: each class with its parents."""
    tree: dict[str, tuple[str, ...]] = {}
    path: list[str] = []
    for line in text.splitlines():
        if match := re.match(
            r"    (?P<indent>(?:[│ ] {3})*)(?:[├└]── )?(?P<name>\w+Error)(?:\((?P<other>\w+)\))?", line
        ):
            depth = line.index(match["name"]) // 4 - 1
            path[depth:] = [match["name"]]
            tree[match["name"]] = (path[depth - 1] if depth else "Exception", *filter(None, [match["other"]]))
    return tree


def test_the_tree_is_the_one_that_is_drawn() -> None:
    """Every class of the drawing exists with exactly these parents, and every class is in the drawing."""
    assert drawn(errors.__doc__ or "") == {
        name: tuple(parent.__name__ for parent in kind.__bases__) for name, kind in CLASSES.items()
    }


def test_every_error_is_public() -> None:
    """Whatever can be raised can be caught by a name of the package."""
    assert set(CLASSES) <= set(runtime_repo.__all__)
    assert set(CLASSES) <= set(errors.__all__)
    assert all(getattr(runtime_repo, name) is kind for name, kind in CLASSES.items())


def test_every_error_is_described() -> None:
    """The examples below leave no class out, and every class says what it means."""
    assert {type(error) for error, _, _ in EXAMPLES} == set(CLASSES.values())
    assert all(kind.__doc__ for kind in CLASSES.values())


@EACH
def test_an_error_says_in_one_line_what_its_attributes_hold(
    error: RuntimeRepoError, attributes: dict[str, Any], words: list[str]
) -> None:
    """Numbers and names are attributes; the message has them too, and the remedy."""
    assert vars(error) == attributes
    (line,) = str(error).splitlines()
    assert [word for word in words if word not in line] == []


@EACH
@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, *(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in range(6))],  # noqa: S301
)
def test_an_error_survives_a_round_trip(
    error: RuntimeRepoError, attributes: dict[str, Any], words: list[str], again: Callable[[Any], Any]
) -> None:
    """A copy, and one that crossed a process, has the same type, words and attributes."""
    twin = again(error)
    assert type(twin) is type(error)
    assert (str(twin), repr(twin), twin.args) == (str(error), repr(error), error.args)
    assert vars(twin) == attributes
    assert words


Break = Callable[[], Awaitable[object]]


@pytest.fixture(params=["sqlite", "postgres"])
def broken(
    request: pytest.FixtureRequest, tmp_path: Path, postgres_url: str, postgres_schema: str
) -> tuple[RuntimeRepository, Break, type[Exception]]:
    """A repository, how to take its tables away behind its back, and what its driver raises then."""
    tables = load_migrations(request.param)[-1].catalog.tables.keys() - {LEDGER}
    if request.param == "sqlite":

        async def break_sqlite() -> None:
            connection = sqlite3.connect(tmp_path / "x.db")
            for table in tables:
                connection.execute(f"drop table {table}")
            connection.close()

        return SqliteRuntimeRepository(tmp_path / "x.db"), break_sqlite, sqlite3.Error

    async def break_postgres() -> None:
        connection = await asyncpg.connect(postgres_url)
        for table in tables:
            await connection.execute(f"drop table {postgres_schema}.{table}")
        await connection.close()

    return PostgresRuntimeRepository(postgres_url, schema=postgres_schema), break_postgres, asyncpg.PostgresError


async def test_a_drivers_exception_leaves_a_verb_only_as_a_cause(
    broken: tuple[RuntimeRepository, Break, type[Exception]],
) -> None:
    """Whichever verb meets the trouble, it raises our error in one line, with the driver's behind it."""
    repo, break_it, driver = broken
    async with repo:
        now = datetime.now(UTC)
        lease = await prepare(repo, now)
        await break_it()
        # SQLite has nothing to vacuum.
        idle = {"leases.hold", *(["attempts.vacuum"] if driver is sqlite3.Error else [])}
        for verb in CALLS.keys() - idle:
            with pytest.raises((DatabaseUnavailableError, RefusedError)) as caught:
                await CALLS[verb](repo, lease, now)
            assert isinstance(caught.value.__cause__, driver)
            assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(SchemaDriftError):
            await repo.ensure_schema()


@pytest.mark.parametrize("error", ["\ud800", "boom\ud800", "\0"])
async def test_any_words_of_a_failure_can_be_stored(
    broken: tuple[RuntimeRepository, Break, type[Exception]], error: str
) -> None:
    """A worker that reports a failure is not failed itself by a character in it."""
    async with broken[0] as repo:
        await repo.attempts.enqueue("run")
        (lease,) = await repo.leases.claim("worker")
        failed = await repo.attempts.fail(lease, error)
        assert failed.error
        assert failed.error.startswith(error[:-1])
