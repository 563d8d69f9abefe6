"""What an operator is told of a store: what is there, what a boot would do, and what moves."""

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from runtime_repo import (
    ConfigurationError,
    DatabaseUnavailableError,
    NewAttempt,
    PostgresRuntimeRepository,
    QueueStats,
    RuntimeRepository,
    SchemaError,
    SchemaOutOfDateError,
    SchemaTooNewError,
    SqliteRuntimeRepository,
    StoreStatus,
)
from runtime_repo.schema import Policy, plan_schema
from tests.lab import LEDGER, ONE, Lab, PostgresLab, SqliteLab, on_postgres
from tests.schema.version_1 import SOON
from tests.versions import HISTORY, NEWEST, NEXT

MINUTE = timedelta(minutes=1)


async def status_of(lab: Lab, **options: Any) -> StoreStatus:
    """The status of a database that nobody has booted here, and proof that telling it changed nothing."""
    before = await lab.snapshot()
    repository = lab.repository(**options)
    async with lab.nothing_left():
        status = await repository.status()
        await repository.close()
    assert await lab.snapshot() == before
    return status


async def test_of_nothing_it_is_told_that_there_is_nothing(lab: Lab) -> None:
    """No file and no schema is made, and nothing is amiss."""
    status = await status_of(lab)
    assert (status.backend, status.ledger, status.queues, status.workers) == (lab.backend, (), (), ())
    assert (status.schema.found, status.schema.supported, status.schema.refusal) == (0, NEWEST, None)
    assert status.schema.pending == tuple(name for _, name in HISTORY)
    assert (status.failed, status.pending_interrupts, status.unknown) == (None, None, ())


async def test_of_a_store_all_is_told(lab: Lab) -> None:
    """Where it is, which server it has, its history with dates, what waits, who holds what, what is to be looked at."""
    started = datetime.now(UTC)
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many([NewAttempt("run", queue=queue) for queue in ("a", "a", "a", "b")])
        first, second, third = await repo.leases.claim("x", queues=["a", "b"], limit=3, ttl=MINUTE)
        await repo.attempts.fail(first, "boom")
        await repo.interrupts.create("thread", "run", second.attempt_id, "?")
        [last] = await repo.leases.claim("y", queues=["a", "b"], ttl=MINUTE)
        await repo.attempts.complete(last)
        await repo.leases.claim("nobody", queues="a")
        status = await repo.status()
        ages = [queue.oldest_age for queue in status.queues]
        assert [replace(queue, oldest_age=None) for queue in status.queues] == [
            replace(queue, oldest_age=None) for queue in await repo.attempts.stats()
        ]
        assert [age is None for age in ages] == [queue.ready == 0 for queue in status.queues]

    assert status.schema == await repo_inspected(lab)
    assert [(row.version, row.name) for row in status.ledger] == HISTORY
    assert all(abs(row.applied_at - started) < MINUTE for row in status.ledger)
    [worker] = status.workers
    assert (worker.worker_id, worker.leases, worker.expired) == ("x", 2, 0)
    assert worker.first_expiry == min(second.expires_at, third.expires_at)
    assert worker.heartbeat_at == max(second.heartbeat_at, third.heartbeat_at)
    assert (status.failed, status.pending_interrupts) == (1, 1)
    assert status.size is not None
    assert status.size > 50_000
    assert status.server is not None
    assert status.server.startswith({"sqlite": "SQLite 3.", "postgres": "PostgreSQL 1"}[lab.backend])
    assert (status.migrating, status.unknown) == (None, ())
    assert status.control is not None
    assert not status.control.is_quiesced
    assert lab.place.where.rpartition("/")[2] in status.place


async def repo_inspected(lab: Lab) -> object:
    """What an inspection finds."""
    repository = lab.repository()
    status = await repository.inspect()
    await repository.close()
    return status


async def test_what_has_run_out_is_counted(lab: Lab) -> None:
    """A lease that nobody has requeued yet."""
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run", now=long_ago)
        [lease] = await repo.leases.claim("silent", ttl=MINUTE, now=long_ago)
        [worker] = (await repo.status()).workers
    assert (worker.worker_id, worker.leases, worker.expired, worker.first_expiry) == ("silent", 1, 1, lease.expires_at)


@on_postgres
async def test_the_tables_sizes_are_told(lab: Lab) -> None:
    """With their indexes, the largest first; how many rows as they were analyzed."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many([NewAttempt("run", payload="x" * 1000) for _ in range(500)])
    assert {table.rows for table in (await status_of(lab)).tables} == {None}
    await lab.execute(f"analyze {lab.table('attempts')}")
    largest, *others = (await status_of(lab)).tables
    assert (largest.name, largest.rows) == ("runtime_attempts", 500)
    assert largest.size > max(table.size for table in others)
    assert {table.name for table in (largest, *others)} == {*lab.migrations[-1].catalog.tables, LEDGER}


async def test_an_earlier_version_is_told_of(lab: Lab) -> None:
    """A database as the program before ours left it: what a boot would do, and what it holds."""
    await lab.reach(1)
    status = await status_of(lab)
    assert (status.schema.found, status.schema.refusal) == (1, None)
    assert status.schema.pending == tuple(name for version, name in HISTORY if version > 1)
    assert [(row.version, row.name) for row in status.ledger] == [ONE]
    assert status.ledger[0].applied_at == datetime.fromtimestamp(1_600_000_000, UTC)
    assert status.queues == (QueueStats("default", 1, 2, 2, None),)
    assert [(worker.worker_id, worker.leases) for worker in status.workers] == [("worker-a", 1), ("worker-b", 1)]
    assert status.workers[0].first_expiry == datetime.fromtimestamp(SOON / 1000, UTC)
    assert status.unknown == ()


async def test_of_drift_every_difference_is_told_and_the_rest_too(lab: Lab) -> None:
    """A boot would be refused; the queues can be read all the same."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run", queue="a")
    await lab.execute(
        "alter table runtime_jobs add column mine text; drop index idx_runtime_jobs_status;"
        "drop index idx_runtime_interrupts_thread"
    )
    status = await status_of(lab)
    assert status.schema.refusal is not None
    assert len([one for one in status.schema.differences if one.expected is not None]) == 2
    assert len([one for one in status.schema.differences if one.expected is None]) == 1
    assert [queue.queue for queue in status.queues] == ["a"]
    assert status.unknown == ()


async def test_of_a_newer_schema_what_can_be_told_is_told(lab: Lab) -> None:
    """Its history, and the queues as far as this release can read them."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run", queue="a")
    await lab.record(*HISTORY, NEXT)
    status = await status_of(lab)
    assert str(NEXT[0]) in str(status.schema.refusal)
    assert status.ledger[-1].version == NEXT[0]
    assert [queue.queue for queue in status.queues] == ["a"]


async def test_what_cannot_be_told_is_said(lab: Lab) -> None:
    """A table that is missing takes nothing with it but what it holds."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run", queue="a")
    await lab.execute("drop table runtime_leases")
    status = await status_of(lab)
    assert (status.queues, status.workers, status.failed) == ((), (), 0)
    [unknown] = status.unknown
    assert unknown.startswith("the queues: ")
    assert "runtime_leases" in unknown


async def test_nothing_of_a_strangers_is_read(lab: Lab) -> None:
    """A view that bears a name of ours runs what its author wrote."""
    trap = {"sqlite": "abs(-9223372036854775808)", "postgres": "1 / (random() * 0)::int"}[lab.backend]
    await lab.execute(f"create view runtime_attempts as select {trap} as status")
    status = await status_of(lab)
    assert "runtime_attempts" in str(status.schema.refusal)
    [unknown] = status.unknown
    assert "nothing of it is read" in unknown
    assert (status.queues, status.ledger) == ((), ())


async def test_a_view_in_a_tables_place_is_not_read(lab: Lab) -> None:
    """The rest of the store is told of."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run")
        await repo.leases.claim("x")
    trap = {"sqlite": "abs(-9223372036854775808)", "postgres": "1 / (random() * 0)::int"}[lab.backend]
    await lab.execute(f"drop table runtime_interrupts; create view runtime_interrupts as select {trap} as status")
    status = await status_of(lab)
    assert "runtime_interrupts" in str(status.schema.refusal)
    assert (status.pending_interrupts, status.unknown) == (None, ())
    assert [worker.worker_id for worker in status.workers] == ["x"]


async def test_a_row_that_cannot_be_read_hides_no_other(lab: Lab) -> None:
    """What another program wrote is said, with the reason."""
    async with lab.repository():
        pass
    await lab.execute(
        f"insert into {lab.table('leases')} values ('a', 'a', 'worker', 9223372036854775807, 5, 1, 0),"
        " ('b', 'b', 'another', 5, 5, 1, 0)"
    )
    await lab.execute("insert into runtime_control values ('quiesce', 'null', 9223372036854775807)")
    status = await status_of(lab)
    assert [worker.worker_id for worker in status.workers] == ["another"]
    assert status.control is None
    assert sorted(unknown.partition(":")[0] for unknown in status.unknown) == ["one of the leases", "the control"]


async def test_what_the_operator_has_stopped_is_told(lab: Lab) -> None:
    """As the control says it."""
    async with lab.repository() as repo:
        assert (await repo.status()).control == await repo.control.state()
        await repo.control.pause("emails", "the mail server is down")
        await repo.control.quiesce("an upgrade")
        state = await repo.control.state()
    status = await status_of(lab)
    assert status.control == state
    assert state.is_quiesced
    assert status.as_dict()["control"] == state.as_dict()


async def test_who_migrates_is_told_and_keeps_nothing_from_being_told(lab: Lab) -> None:
    """The holder of the migration lock, which on SQLite nobody can know; who merely works is not named."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run")
        async with repo.transaction() as transaction:
            await transaction.attempts.enqueue("run")
            other = lab.repository()
            assert (await other.status()).migrating is None
            await other.close()
        async with lab.held() as pid:
            status = await status_of(lab) if lab.backend == "postgres" else await repo.status()
    assert (status.migrating and status.migrating.pid) == pid
    assert status.queues[0].ready == 2


@on_postgres
async def test_a_locked_table_hides_no_other(lab: Lab) -> None:
    """Whoever alters one makes nobody wait who only wants to be told."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run")
    assert isinstance(lab, PostgresLab)
    async with lab.admin.transaction():
        await lab.admin.execute(f"lock table {lab.table('interrupts')} in access exclusive mode")
        other = lab.repository()
        async with asyncio.timeout(20):
            status = await other.status()
        await other.close()
    assert len(status.queues) == 1
    assert any(unknown.startswith("the counts: ") for unknown in status.unknown)


async def test_what_cannot_be_reached_is_an_error(lab: Lab) -> None:
    """Nothing is told of it, for it might be anything."""
    repository: RuntimeRepository = PostgresRuntimeRepository("postgresql://u@127.0.0.1:1/d", startup_timeout=1)
    if isinstance(lab, SqliteLab):
        lab.path.write_bytes(b"no database" * 100)
        repository = lab.repository()
    for tell in (repository.status, repository.plan, repository.activity):
        with pytest.raises(DatabaseUnavailableError):
            await tell()
    await repository.close()


async def test_what_is_told_is_plain_as_json(lab: Lab) -> None:
    """The same keys whatever there is, instants in ISO 8601 and spans in seconds."""
    empty = (await status_of(lab)).as_dict()
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run")
        await repo.leases.claim("x")
        await repo.attempts.enqueue("run")
        full = json.loads(json.dumps((await repo.status()).as_dict()))
        moves = json.loads(json.dumps((await repo.activity(over=MINUTE)).as_dict()))
    assert full.keys() == empty.keys()
    assert datetime.fromisoformat(full["ledger"][0]["applied_at"]).tzinfo is not None
    assert set(full["queues"][0]) == {"queue", "ready", "delayed", "leased", "oldest_age"}
    assert full["queues"][0]["oldest_age"] < 60
    assert set(full["workers"][0]) == {"worker_id", "leases", "expired", "first_expiry", "heartbeat_at"}
    assert (moves["span"], moves["queues"][0]["queue"]) == (60, "default")


# What a boot would do.


@pytest.mark.parametrize("version", range(NEWEST + 1))
async def test_a_plan_is_what_a_boot_then_does(lab: Lab, version: int) -> None:
    """The same migrations from the same version, and the copy that is then there; until then nothing is touched."""
    await lab.reach(version)
    before = await lab.snapshot()
    repository = lab.repository()
    plan = await repository.plan()
    assert await lab.snapshot() == before
    await repository.close()

    report = await lab.boot()
    assert (plan.found, plan.supported, plan.refusal) == (report.from_version, report.to_version, None)
    planned = [(migration.version, migration.name) for migration in plan.migrations]
    assert planned == [(applied.version, applied.name) for applied in report.applied]
    if report.backup is None:
        assert plan.backup is None
    else:
        start, end = str(plan.backup).split("<time>")
        assert str(report.backup).startswith(start)
        assert str(report.backup).endswith(end)


@pytest.mark.parametrize("version", range(NEWEST))
async def test_a_plans_statements_do_what_a_boot_does(lab: Lab, version: int) -> None:
    """By hand, in one transaction, they lead to what a boot that may only verify serves."""
    await lab.reach(version)
    repository = lab.repository()
    plan = await repository.plan()
    await repository.close()
    if isinstance(lab, PostgresLab) and version == 0:
        assert f'create schema "{lab.place.schema}"' in plan.migrations[0].sql
        await lab.admin.execute("".join(migration.sql for migration in plan.migrations))
    else:
        await lab.execute(f"begin; {''.join(migration.sql for migration in plan.migrations)} commit;")
    assert (await lab.boot(migrate=False)).to_version == NEWEST
    assert await lab.recorded() == HISTORY


async def test_the_plan_says_which_releases_may_run_beside_it(lab: Lab) -> None:
    """A migration's own line is kept in the control, by hand as by a boot."""
    *before, last = lab.migrations
    shipped = (*before, replace(last, sql=f"-- oldest: 1\n{last.sql}"))
    kept = []
    for by_hand in (True, False):
        other = lab.another()
        await other.reach(1)
        if by_hand:
            async with other.opened() as database:
                plan = await plan_schema(database, shipped, Policy())
            await other.execute(f"begin; {''.join(migration.sql for migration in plan.migrations)} commit;")
        else:
            await other.ship(shipped)
        kept.append([(row["name"], row["value_json"]) for row in await other.all("runtime_control")])
    assert kept == [[("oldest", "1")]] * 2


async def test_no_copy_is_planned_where_none_is_wanted(lab: Lab) -> None:
    """On PostgreSQL a boot takes none."""
    await lab.reach(1)
    options: dict[str, Any] = {"backup": False} if lab.backend == "sqlite" else {}
    repository = lab.repository(**options)
    plan = await repository.plan()
    await repository.close()
    assert plan.backup is None


@pytest.mark.parametrize(
    "broken",
    [
        "update runtime_schema_migrations set name = 'other' where version = 1",
        "create table runtime_queue (a text)",
        "drop table runtime_leases",
        "insert into runtime_schema_migrations (version, name, applied_at_ms) values (9, 'nine', 5)",
        "delete from runtime_schema_migrations",
        f"insert into runtime_jobs values ('{'x' * 600}', 'done', 0, 0)",
        "insert into runtime_attempts values ('', 'run', 1, 'queued', null)",
    ],
)
async def test_a_plan_is_refused_as_the_boot_is(lab: Lab, broken: str) -> None:
    """In the same words, and both leave everything as it was; what stands in a row is found, too."""
    await lab.reach(1)
    await lab.execute(broken)
    before = await lab.snapshot()
    repository = lab.repository()
    plan = await repository.plan()
    await repository.close()
    assert await lab.snapshot() == before
    with pytest.raises(SchemaError) as refused:
        await lab.boot()
    assert plan.refusal == str(refused.value)
    assert (plan.migrations, plan.backup) == ((), None)


async def test_a_verify_only_plan_is_refused_where_something_is_pending(lab: Lab) -> None:
    """It is the repository's own boot that it tells of."""
    repository = lab.repository(migrate=False)
    plan = await repository.plan()
    await repository.close()
    with pytest.raises(SchemaOutOfDateError) as refused:
        await lab.boot(migrate=False)
    assert plan.refusal == str(refused.value)


# What moves.


async def test_what_ended_lately_is_counted_by_queue(lab: Lab) -> None:
    """How it ended, and only within the span; what waits and is held is as in the statistics."""
    now = datetime.now(UTC)
    async with lab.repository() as repo:
        for queue in ("a", "b"):
            await repo.attempts.enqueue_many([NewAttempt("run", queue=queue) for _ in range(6)])
        leases = list(await repo.leases.claim("x", queues="a", limit=4))
        await repo.attempts.complete_many([(lease, None) for lease in leases[:2]])
        await repo.attempts.fail(leases[2], "boom")
        await repo.attempts.complete(leases[3], now=now - timedelta(minutes=5))
        await repo.attempts.cancel((await repo.attempts.list_dispatchable(queue="b", limit=1))[0].attempt_id)
        [held] = await repo.leases.claim("x", queues="b")
        activity = await repo.activity(over=MINUTE)
        longer = await repo.activity(over=timedelta(hours=1))
        stats = {queue.queue: queue for queue in await repo.attempts.stats()}
    a, b = activity.queues
    assert (a.queue, a.completed, a.failed, a.cancelled) == ("a", 2, 1, 0)
    assert (b.queue, b.completed, b.failed, b.cancelled) == ("b", 0, 0, 1)
    assert (a.ready, a.leased, b.ready, b.leased) == (2, 0, 4, 1)
    assert {queue.queue: queue.ready for queue in activity.queues} == {name: one.ready for name, one in stats.items()}
    assert longer.queues[0].completed == 3
    assert abs(activity.at - now) < MINUTE
    assert held.attempt.queue == "b"


async def test_a_queue_that_has_run_empty_is_still_told_of(lab: Lab) -> None:
    """As long as something of it has ended lately."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run")
        [lease] = await repo.leases.claim("x")
        await repo.attempts.complete(lease)
        [queue] = (await repo.activity()).queues
    assert (queue.queue, queue.ready, queue.oldest_age, queue.completed) == ("default", 0, None, 1)


async def test_what_moves_is_told_of_this_releases_schema_only(lab: Lab) -> None:
    """Nothing but that has the tables to tell it from."""
    await lab.reach(1)
    repository = lab.repository()
    with pytest.raises(SchemaOutOfDateError):
        await repository.activity()
    await repository.close()
    async with lab.repository():
        pass
    await lab.record(*HISTORY, NEXT)
    repository = lab.repository()
    with pytest.raises(SchemaTooNewError):
        await repository.activity()
    await repository.close()


@pytest.mark.parametrize("over", [timedelta(0), timedelta(seconds=-1), 10, None])
async def test_a_span_that_is_none_is_refused(lab: Lab, over: Any) -> None:
    """Before anything is asked."""
    async with lab.repository() as repo:
        with pytest.raises(ConfigurationError, match="over"):
            await repo.activity(over=over)


async def test_what_is_in_memory_is_told_by_itself() -> None:
    """Nobody else has it."""
    async with SqliteRuntimeRepository(":memory:") as repo:
        await repo.attempts.enqueue("run")
        status = await repo.status()
        assert [(queue.queue, queue.ready) for queue in status.queues] == [("default", 1)]
        assert (status.place, status.unknown) == (":memory:", ())
        assert (await repo.plan()).migrations == ()
        assert len((await repo.activity()).queues) == 1
