"""Version 1, laid by an earlier program, becomes version 2: nothing is lost, what was ambiguous is repaired."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from runtime_repo import AttemptStatus, UnsuitableDatabaseError
from tests.lab import LEDGER, TWO, Lab, Rebuild, Row, SqliteLab, Words, on_postgres, on_sqlite
from tests.schema.version_1 import SOON, TABLES
from tests.versions import HISTORY, NEWEST

# What version 2 adds to each table, and what it finds there in a row of version 1.
ADDED: Mapping[str, Row] = {
    "runtime_attempts": {
        "queue": "default",
        "priority": 0,
        "payload_json": None,
        "max_attempts": 10,
        "lease_version": 0,
        "worker_id": None,
        "enqueued_at_ms": 0,
        "started_at_ms": None,
        "finished_at_ms": None,
        "result_json": None,
        "error": None,
        "lease_id": None,
        "ended_by": None,
        "headers_json": None,
    },
    "runtime_leases": {"claimed_at_ms": 0},
    "runtime_jobs": {},
    "runtime_interrupts": {"resume_payload_json": None, "resume_payload_hash": None, "resumed_at_ms": None},
    "runtime_step_reports": {"payload_json": None, "lease_version": None},
    "runtime_audit_logs": {},
    "runtime_api_keys": {"role": "operator"},
}
FINAL = ("cancelled", "completed", "failed")
HELD = {
    "leased": {"lease_version": 7, "lease_id": "lease-1"},
    "running": {"lease_version": 5_000_000_000, "lease_id": "lease-2"},
}


async def test_every_row_of_version_1_survives_the_upgrade(lab: Lab) -> None:
    """All columns that were there compare equal, those that are new have their documented defaults."""
    await lab.reach(1)
    before = {table: await lab.all(table) for table in (LEDGER, *TABLES)}
    assert all(before.values())

    started = await lab.now_ms()
    report = await lab.ship(lab.migrations[:2])
    ended = await lab.now_ms()

    assert (report.from_version, report.to_version, report.tolerated) == (1, 2, ())
    assert [(applied.version, applied.name) for applied in report.applied] == [TWO]
    first, second = await lab.all(LEDGER)
    assert [first] == before[LEDGER]
    assert (second["version"], second["name"]) == TWO
    assert started <= second["applied_at_ms"] <= ended
    assert await lab.all("runtime_control") == []
    for table in TABLES:
        rows = await lab.all(table)
        for row in rows:
            if row.get("status") in FINAL and table == "runtime_attempts":
                assert started <= row["finished_at_ms"] <= ended
                row["finished_at_ms"] = None
        held = HELD if table == "runtime_attempts" else {}
        assert rows == [old | ADDED[table] | held.get(old.get("attempt_id", ""), {}) for old in before[table]]


async def test_what_waits_and_what_has_ended_is_listed(lab: Lab) -> None:
    """Each attempt is found as what its row says that it is: nothing is left to put right."""
    await lab.reach(1)
    await lab.boot()
    assert await lab.all("runtime_queue") == [
        {"attempt_id": name, "queue": "default", "priority": 0, "enqueued_at_ms": 0, "retry_at_ms": at}
        for name, at in (("backoff", SOON), ("delayed", SOON), ("queued", None))
    ]
    ended = {row["attempt_id"]: (row["status"], row["finished_at_ms"]) for row in await lab.all("runtime_finished")}
    attempts = {row["attempt_id"]: (row["status"], row["finished_at_ms"]) for row in await lab.all("runtime_attempts")}
    assert ended == {name: attempts[name] for name in FINAL}
    async with lab.repository() as repo:
        assert await repo.attempts.reindex() == 0


async def test_a_row_written_as_by_version_1_gets_the_defaults(lab: Lab) -> None:
    """Whoever names only the old columns still can: the new ones have defaults, and numbers go on where they were."""
    await lab.reach(2)
    await lab.execute(
        """
        insert into runtime_attempts (attempt_id, run_id, attempt_no, status) values ('new', 'run', 1, 'queued');
        insert into runtime_leases (lease_id, attempt_id, worker_id, lease_expires_at_ms, heartbeat_at_ms, version)
        values ('new', 'new', 'worker', 1, 1, 1);
        insert into runtime_interrupts (interrupt_id, thread_id, run_id, attempt_id, value_json, status, created_at_ms)
        values ('new', 't', 'r', 'a', '1', 'pending', 1);
        insert into runtime_step_reports (worker_id, attempt_id, action_id, status, dedupe_token, created_at_ms)
        values ('w', 'new', 'a', 'ok', 'd', 1);
        insert into runtime_api_keys (key_id, secret_hash, status, created_at_ms, updated_at_ms)
        values ('new', 'x', 'active', 1, 1);
        """
    )
    for table, added in ADDED.items():
        if added:
            [row] = [row for row in await lab.all(table) if next(iter(row.values())) in ("new", 3)]
            assert {column: row[column] for column in added} == added


async def test_what_was_at_work_goes_on(lab: Lab) -> None:
    """After the upgrade the queue is served: what was ready can be claimed, what was leased is still owned."""
    await lab.reach(1)
    async with lab.repository() as repo:
        [lease] = await repo.leases.claim("worker", limit=10)
        assert (lease.attempt_id, lease.version) == ("queued", 1)
        assert (await repo.attempts.complete(lease)).status is AttemptStatus.COMPLETED
        assert (await repo.attempts.get("leased")).lease_version == 7
        assert (await repo.attempts.get("backoff")).status is AttemptStatus.RETRY_BACKOFF


@on_postgres
@pytest.mark.parametrize(
    "change",
    [
        "select 1",
        """alter table runtime_leases rename constraint leases_pk to "it's" """,
        """alter table runtime_leases rename constraint one_lease_each to "a ""b"", %I" """,
        "alter table runtime_leases drop constraint one_lease_each;"
        'create unique index "Only One" on runtime_leases (attempt_id)',
        "create unique index another on runtime_leases (attempt_id)",
    ],
)
async def test_leases_are_kept_apart_by_their_attempts_alone(lab: Lab, change: str) -> None:
    """Whatever did it before, under whichever name: each index would cost every claim."""
    await lab.reach(1)
    await lab.execute(
        f"{change}; create unique index operators_own on runtime_leases (attempt_id) where version > 0;"
        "create unique index operators_other on runtime_leases (attempt_id, version)"
    )
    await lab.boot()
    leases = (await lab.look()).catalog.tables["runtime_leases"]
    assert leases.primary_key == ("attempt_id",)
    assert leases.indexes.keys() == {"idx_runtime_leases_expiry", "operators_own", "operators_other"}


@dataclass(frozen=True)
class Ambiguous:
    """An attempt of version 1, its lease's version if it has one, and what version 2 must make of both."""

    status: str
    expected: Row = field(default_factory=dict)
    """The columns that change; all others keep their values or have their defaults."""
    lease: int | None = None
    keeps_lease: bool = True
    attempt_no: int = 1
    retry_at_ms: int | None = None
    expires_at_ms: int = SOON
    finished: bool = False


# Also of a lease that owns nothing any more: its holder may be alive, and its token must not be given out again.
TOKEN = {"lease_version": 4}

AMBIGUOUS = {
    "leased with a lease": Ambiguous("leased", {"lease_version": 4}, lease=4),
    "running with a lease": Ambiguous("running", {"lease_version": 4}, lease=4),
    "running with a lease that has run out": Ambiguous("running", {"lease_version": 4}, lease=4, expires_at_ms=1),
    "queued with a lease": Ambiguous("queued", {"lease_version": 4}, lease=4),
    "retry_backoff with a lease": Ambiguous("retry_backoff", {"lease_version": 4}, lease=4, retry_at_ms=SOON),
    "leased without a lease": Ambiguous("leased", {"status": "queued"}),
    "running without a lease": Ambiguous("running", {"status": "queued"}),
    "retry_backoff without a time": Ambiguous("retry_backoff", {"status": "queued"}),
    "retry_backoff without a time, with a lease": Ambiguous(
        "retry_backoff", {"status": "queued", "lease_version": 4}, lease=4
    ),
    "retry_backoff with a time in the past": Ambiguous("retry_backoff", retry_at_ms=1),
    "queued with a time": Ambiguous("queued", retry_at_ms=SOON),
    "completed": Ambiguous("completed", finished=True),
    "failed": Ambiguous("failed", finished=True),
    "cancelled": Ambiguous("cancelled", finished=True),
    "completed with a lease": Ambiguous("completed", TOKEN, lease=4, keeps_lease=False, finished=True),
    "failed with a lease": Ambiguous("failed", TOKEN, lease=4, keeps_lease=False, finished=True),
    "cancelled with a lease": Ambiguous("cancelled", TOKEN, lease=4, keeps_lease=False, finished=True),
    "tried nine times": Ambiguous("queued", attempt_no=9),
    "tried ten times": Ambiguous("queued", {"max_attempts": 11}, attempt_no=10),
    "tried a hundred times": Ambiguous("leased", {"max_attempts": 101, "lease_version": 99}, lease=99, attempt_no=100),
    "failed at the tenth try": Ambiguous("failed", {"max_attempts": 11}, attempt_no=10, finished=True),
    "everything at once": Ambiguous("running", {"status": "queued", "max_attempts": 13}, attempt_no=12),
}


@pytest.mark.parametrize("case", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
async def test_what_version_1_left_ambiguous_is_repaired(lab: Lab, case: Ambiguous) -> None:
    """Each repair does what the design says to this attempt and its lease, and nothing to any other row."""
    await lab.reach(1)
    retry_at = "null" if case.retry_at_ms is None else case.retry_at_ms
    await lab.execute(
        f"insert into runtime_attempts values ('it', 'run', {case.attempt_no}, '{case.status}', {retry_at})"
    )
    if case.lease is not None:
        await lab.execute(
            f"insert into runtime_leases values ('its', 'it', 'worker', {case.expires_at_ms}, 1, {case.lease})"
        )
    [attempt] = await lab.rows("select * from runtime_attempts where attempt_id = 'it'")
    leases = await lab.all("runtime_leases")
    others = "select attempt_id, run_id, attempt_no, status, retry_at_ms from runtime_attempts where attempt_id <> 'it'"
    before = await lab.rows(f"{others} order by 1")

    started = await lab.now_ms()
    await lab.ship(lab.migrations[:2])
    ended = await lab.now_ms()

    [repaired] = await lab.rows("select * from runtime_attempts where attempt_id = 'it'")
    finished_at = repaired.pop("finished_at_ms")
    assert (started <= finished_at <= ended) if case.finished else finished_at is None
    expected: dict[str, Any] = attempt | ADDED["runtime_attempts"] | case.expected
    if case.lease is not None:
        expected["lease_id"] = "its"
    del expected["finished_at_ms"]
    assert repaired == expected
    assert await lab.all("runtime_leases") == [
        lease | ADDED["runtime_leases"] for lease in leases if case.keeps_lease or lease["lease_id"] != "its"
    ]
    assert await lab.rows(f"{others} order by 1") == before


async def test_a_lease_on_no_attempt_is_deleted(lab: Lab) -> None:
    """It owns nothing, and would be in the way of an attempt of that name."""
    await lab.reach(1)
    before = await lab.all("runtime_leases")
    await lab.execute(f"insert into runtime_leases values ('lost', 'nowhere', 'worker', {SOON}, 1, 4)")
    await lab.ship(lab.migrations[:2])
    assert await lab.all("runtime_leases") == [lease | ADDED["runtime_leases"] for lease in before]


async def test_a_queued_attempt_with_a_lease_can_be_claimed_all_the_same(lab: Lab) -> None:
    """The new lease replaces the old one, under a token that the old holder never had."""
    await lab.reach(1)
    await lab.execute(
        f"delete from runtime_attempts where attempt_id = 'queued';"
        f"insert into runtime_attempts values ('it', 'run', 1, 'queued', null);"
        f"insert into runtime_leases values ('old', 'it', 'worker-of-old', {SOON}, 1, 4)"
    )
    async with lab.repository() as repo:
        [lease] = await repo.leases.claim("worker", ttl=timedelta(minutes=1))
        assert (lease.attempt_id, lease.version) == ("it", 5)
        assert await lab.rows("select worker_id, version from runtime_leases where attempt_id = 'it'") == [
            {"worker_id": "worker", "version": 5}
        ]
        assert (await repo.attempts.complete(lease)).status is AttemptStatus.COMPLETED


@pytest.mark.parametrize("status", ["leased", "running", "retry_backoff"])
async def test_an_attempt_that_nobody_would_have_finished_is_ready_again(lab: Lab, status: str) -> None:
    """What was made queued can be claimed at once."""
    await lab.reach(1)
    await lab.execute(
        f"delete from runtime_attempts where attempt_id = 'queued';"
        f"insert into runtime_attempts values ('it', 'run', 1, '{status}', null)"
    )
    async with lab.repository() as repo:
        assert [lease.attempt_id for lease in await repo.leases.claim("worker", limit=10)] == ["it"]


async def test_an_empty_version_1_is_upgraded_too(lab: Lab) -> None:
    """No rows, nothing to repair."""
    await lab.reach(1)
    for table in TABLES:
        await lab.execute(f"delete from {table}")
    assert (await lab.boot()).to_version == NEWEST
    assert await lab.recorded() == HISTORY


LONG = "ü" * 512 + "x"  # 513 characters
FITS = "ü" * 512  # 1,024 bytes

# Columns that are ids or in a new index, which row gets too long a one, and the key by which the error names that row.
TOO_LONG = {
    "runtime_attempts.attempt_id": ("attempt_id = 'queued'", LONG[:60]),
    "runtime_attempts.run_id": ("attempt_id = 'queued'", "queued"),
    "runtime_attempts.status": ("attempt_id = 'queued'", "queued"),
    "runtime_leases.lease_id": ("lease_id = 'lease-1'", LONG[:60]),
    "runtime_leases.worker_id": ("lease_id = 'lease-1'", "lease-1"),
    "runtime_jobs.thread_id": ("thread_id = 'thread-1'", LONG[:60]),
    "runtime_interrupts.attempt_id": ("interrupt_id = 'interrupt-1'", "interrupt-1"),
    "runtime_step_reports.dedupe_token": ("report_id = 2", "2"),
    "runtime_api_keys.key_id": ("key_id = 'key-1'", LONG[:60]),
}


@pytest.mark.parametrize(("place", "case"), TOO_LONG.items(), ids=TOO_LONG.keys())
async def test_an_id_that_is_too_long_is_refused_before_anything_is_done(
    lab: Lab, place: str, case: tuple[str, str]
) -> None:
    """The error tells the number of rows and names one. The limit is that of the verbs, the same on both databases."""
    table, column = place.split(".")
    where, key = case
    await lab.reach(1)
    await lab.execute(f"update {table} set {column} = '{LONG}' where {where}")

    async def step() -> None:
        pytest.fail("it was to be refused before that")

    (problem,) = (await lab.refused(UnsuitableDatabaseError, before_migrate=step)).problems
    assert problem.startswith("1 rows have ")
    assert all(word in problem for word in (table, column, "512 characters", f"{key!r}"))
    await lab.execute(f"update {table} set {column} = '{FITS}' where {column} = '{LONG}'")
    assert (await lab.boot()).to_version == NEWEST


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("runtime_attempts", "attempt_id"),
        ("runtime_leases", "lease_id"),
        ("runtime_jobs", "thread_id"),
        ("runtime_interrupts", "interrupt_id"),
        ("runtime_api_keys", "key_id"),
    ],
)
async def test_an_empty_key_is_refused_before_anything_is_done(lab: Lab, table: str, key: str) -> None:
    """No verb can name such a row and no list shows it; the error does."""
    await lab.reach(1)
    first = f"(select min({key}) from {table})"
    await lab.execute(f"update {table} set {key} = '' where {key} = {first}")
    (problem,) = (await lab.refused(UnsuitableDatabaseError)).problems
    assert problem.startswith(f"1 rows have an empty {key} in {table}, ")
    await lab.execute(f"update {table} set {key} = 'mended' where {key} = ''")
    assert (await lab.boot()).to_version == NEWEST


@on_sqlite
async def test_what_names_the_leases_still_does(lab: SqliteLab) -> None:
    """Their table is made anew under its own name: a view of the operator's shows the same rows as before."""
    await lab.reach(1)
    await lab.execute("create view mine as select lease_id, attempt_id, version from runtime_leases")
    before = await lab.rows("select * from mine order by 1")
    await lab.boot()
    assert await lab.rows("select * from mine order by 1") == before
    assert len(before) == len(HELD)
    assert (await lab.look()).catalog.tables["runtime_leases"].primary_key == ("attempt_id",)


@on_sqlite
async def test_a_column_that_would_be_lost_is_refused_before_anything_is_done(lab: SqliteLab) -> None:
    """SQLite changes no table's key: that of the leases is made anew, with the columns that it is known to have."""
    await lab.reach(1)
    await lab.execute("alter table runtime_leases add column note text")
    (problem,) = (await lab.refused(UnsuitableDatabaseError)).problems
    assert "a column of another program's" in problem
    assert "'note'" in problem
    await lab.execute("alter table runtime_leases drop column note")
    assert (await lab.boot()).to_version == NEWEST


async def test_the_last_number_of_tries_is_kept(lab: Lab) -> None:
    """An attempt that has used up all numbers is upgraded, and no number overflows."""
    await lab.reach(1)
    last = 2**31 - 1
    await lab.execute(f"update runtime_attempts set attempt_no = {last} where attempt_id = 'queued'")
    await lab.execute(f"update runtime_attempts set attempt_no = {last - 1} where attempt_id = 'leased'")
    await lab.boot()
    rows = await lab.rows("select attempt_id, attempt_no, max_attempts from runtime_attempts where attempt_no > 100")
    assert {row["attempt_id"]: (row["attempt_no"], row["max_attempts"]) for row in rows} == {
        "queued": (last, last),
        "leased": (last - 1, last),
    }
    async with lab.repository() as repo:
        [lease] = await repo.leases.claim("worker")
        assert (await repo.attempts.fail(lease, "no", retry_in=timedelta(minutes=1))).status is AttemptStatus.FAILED


@on_sqlite
async def test_a_row_without_a_key_gets_one(lab: SqliteLab) -> None:
    """SQLite accepts NULLs in a text primary key: such rows stay, each with an id of its own, and block nobody."""
    await lab.reach(1)
    await lab.change(Words(Rebuild("runtime_interrupts", "TEXT NOT NULL PRIMARY KEY", "TEXT PRIMARY KEY"), None))
    await lab.execute(
        """
        insert into runtime_attempts values (null, 'run', 1, 'queued', null), (null, 'run', 2, 'failed', null);
        insert into runtime_jobs values (null, 'active', 1, 1), (null, 'done', 2, 2);
        insert into runtime_interrupts values (null, 't', 'r', 'a', '1', 'pending', 1);
        """
    )
    before = {table: len(await lab.all(table)) for table in TABLES}
    await lab.boot()
    assert {table: len(await lab.all(table)) for table in TABLES} == before
    for table, key in (
        ("runtime_attempts", "attempt_id"),
        ("runtime_jobs", "thread_id"),
        ("runtime_interrupts", "interrupt_id"),
    ):
        ids = [row[key] for row in await lab.all(table)]
        assert len({*ids}) == len(ids)
        assert all(isinstance(found, str) for found in ids)
        assert any(found.startswith("without-id-") for found in ids)
    async with lab.repository() as repo:
        claimed = {lease.attempt_id for lease in await repo.leases.claim("worker", limit=9)}
        assert "queued" in claimed
        assert len(claimed) == 2
