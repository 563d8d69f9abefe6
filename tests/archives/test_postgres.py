"""What is PostgreSQL's alone: roles, grants, locks, what depends on the tables, and who waits for them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from runtime_repo import (
    NewAttempt,
    PostgresRuntimeRepository,
    RefusedError,
    SchemaLockTimeoutError,
    StoreInUseError,
    archive,
)
from tests.archives.store import TABLES, everything, fill
from tests.contract.conftest import eventually
from tests.lab import Lab, PostgresLab, on_postgres

pytestmark = on_postgres


@pytest.fixture
async def role(lab: PostgresLab) -> AsyncIterator[str]:
    """A role that may do nothing."""
    name = f"{lab.place.schema}_role"
    await lab.run_outside(f"create role {name} login password 'secret'")
    yield name
    await lab.run_outside(f"drop owned by {name} cascade; drop role {name}")


def as_role(lab: Lab, role: str) -> PostgresRuntimeRepository:
    """A repository of that role's."""
    parts = urlsplit(lab.place.where)
    url = f"{parts.scheme}://{role}:secret@{parts.netloc.rpartition('@')[2]}{parts.path}"
    return PostgresRuntimeRepository(url + (f"?{parts.query}" if parts.query else ""), schema=lab.place.schema)


async def test_a_role_that_may_only_read_takes_a_backup(lab: PostgresLab, role: str, tmp_path: Path) -> None:
    """USAGE on the schema and SELECT on its tables; what it may not know of a sequence, the rows tell."""
    await fill(lab)
    schema = lab.place.schema
    await lab.execute(
        f"grant usage on schema {schema} to {role}; grant select on all tables in schema {schema} to {role}"
    )
    await as_role(lab, role).backup(tmp_path / "a.archive")
    await lab.wipe()
    await lab.repository().restore(tmp_path / "a.archive")
    async with lab.repository() as repo:
        [lease] = await repo.leases.claim("worker")
        assert (await repo.step_reports.record(lease, "step", "ok", "token")).report_id == 3


async def test_a_backup_keeps_off_nobody_but_who_rewrites(lab: PostgresLab, tmp_path: Path) -> None:
    """It waits for one who does in short tries, and then finds every row: a snapshot from before would show none."""
    await fill(lab)
    async with lab.session() as session:
        transaction = session.transaction()
        await transaction.start()
        await session.execute(f"alter table {lab.table('attempts')} alter column attempt_no type bigint")
        await session.execute(f"alter table {lab.table('attempts')} alter column attempt_no type integer")
        task = asyncio.create_task(lab.repository().backup(tmp_path / "a.archive"))
        await asyncio.sleep(0.5)
        assert not task.done()
        await transaction.commit()
        assert (await task).rows["runtime_attempts"] == 30


async def test_no_table_is_rewritten_beneath_a_backup(
    lab: PostgresLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its snapshot is younger than its locks: whoever would rewrite a table waits, even before its turn has come."""
    await fill(lab)
    began, go_on = threading.Event(), threading.Event()
    begin = archive.Writer.begin

    def slow(self: archive.Writer, table: str, columns: Sequence[str]) -> None:
        began.set()
        assert go_on.wait(30)
        begin(self, table, columns)

    monkeypatch.setattr(archive.Writer, "begin", slow)
    task = asyncio.create_task(lab.repository().backup(tmp_path / "a.archive"))
    await eventually(began.is_set)
    rewrite = f"alter table {lab.table('attempts')} alter column attempt_no type bigint"
    async with lab.session() as session:
        await session.execute("set lock_timeout = '100ms'")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await session.execute(rewrite)
        go_on.set()
        assert (await task).rows["runtime_attempts"] == 30
        await session.execute(rewrite)


async def test_a_backup_does_not_wait_for_a_lock_without_end(lab: PostgresLab, tmp_path: Path) -> None:
    """It says who holds it, and leaves no file."""
    await fill(lab)
    async with lab.session() as session, session.transaction():
        await session.execute(f"lock table {lab.table('attempts')} in access exclusive mode")
        with pytest.raises(SchemaLockTimeoutError, match="'holder'"):
            await lab.repository(lock_timeout=0.3).backup(tmp_path / "a.archive")
    assert [path.name for path in tmp_path.glob("a.*")] == []  # noqa: ASYNC240


async def test_a_restore_is_refused_while_a_table_is_locked(lab: PostgresLab, tmp_path: Path) -> None:
    """By whom, it says; nothing was changed."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.execute("update runtime_leases set lease_expires_at_ms = 0")
    before = await everything(lab)
    async with lab.session() as session, session.transaction():
        await session.execute(f"lock table {lab.table('jobs')} in access share mode")
        with pytest.raises(StoreInUseError, match=r"locked by process .*'holder'"):
            await lab.repository().restore(tmp_path / "a.archive")
    assert await everything(lab) == before
    assert (await lab.repository().restore(tmp_path / "a.archive")).overridden == ()


async def test_who_waits_for_a_restore_goes_on_in_the_restored_store(lab: PostgresLab, tmp_path: Path) -> None:
    """No write lands in what was replaced: a verb of an open repository, prepared before, lands in the new tables."""
    await fill(lab)
    path = tmp_path / "a.archive"
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many([NewAttempt("ballast", payload="x" * 200) for _ in range(5000)])
        await repo.backup(path)
        for number in range(6):  # so that its statement has a plan of its own
            await repo.attempts.enqueue("before", attempt_id=f"before {number}")
        restoring = asyncio.create_task(lab.repository().restore(path, force=True))
        written = 0
        while not restoring.done():
            await repo.attempts.enqueue("meanwhile", attempt_id=f"meanwhile {written}")
            written += 1
        report = await restoring
        last = await repo.attempts.get(f"meanwhile {written - 1}")
        assert last.run_id == "meanwhile"
        names = {row["attempt_id"] for row in await lab.rows("select attempt_id from runtime_attempts")}
        kept = {row["attempt_id"] for row in await lab.rows(f"select attempt_id from {report.kept}.runtime_attempts")}
    assert {f"meanwhile {number}" for number in range(written)} == {
        name for name in names | kept if name.startswith("meanwhile")
    }
    assert not {name for name in names & kept if name.startswith("meanwhile")}


async def test_grants_are_those_of_what_was_replaced(lab: PostgresLab, role: str, tmp_path: Path) -> None:
    """On tables and columns; those on the schema, and the default ones, have stayed with it."""
    await fill(lab)
    schema = lab.place.schema
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.execute(
        f"grant usage on schema {schema} to {role}; grant select, insert on runtime_jobs to {role} with grant option;"
        f"grant update (status) on runtime_jobs to {role};"
        f"alter default privileges in schema {schema} grant select on tables to {role}"
    )
    await lab.repository().restore(tmp_path / "a.archive", force=True)
    assert await lab.rows(
        f"select has_schema_privilege('{role}', '{schema}', 'usage') as a,"
        f" has_table_privilege('{role}', 'runtime_jobs', 'insert with grant option') as b,"
        f" has_column_privilege('{role}', 'runtime_jobs', 'status', 'update') as c,"
        f" has_table_privilege('{role}', 'runtime_jobs', 'delete') as d,"
        f" has_table_privilege('{role}', 'runtime_attempts', 'select') as e"
    ) == [{"a": True, "b": True, "c": True, "d": False, "e": True}]


async def test_grants_come_with_the_archive_where_nothing_was(lab: PostgresLab, role: str, tmp_path: Path) -> None:
    """Schema, tables and default privileges; what is not granted, for its role is gone, is reported."""
    await fill(lab)
    schema, gone = lab.place.schema, f"{lab.place.schema}_gone"
    await lab.execute(
        f"create role {gone}; grant usage on schema {schema} to {role}, {gone}; grant select on runtime_jobs to {role};"
        f"alter default privileges in schema {schema} grant select on tables to {role}"
    )
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.wipe()
    await lab.run_outside(f"drop role {gone}")
    report = await lab.repository().restore(tmp_path / "a.archive")
    [missing] = report.not_granted
    assert missing.startswith(f"USAGE on the runtime schema to {gone}: ")
    await lab.execute("create table later (a integer)")
    assert await lab.rows(
        f"select has_schema_privilege('{role}', '{schema}', 'usage') as a,"
        f" has_table_privilege('{role}', 'runtime_jobs', 'select') as b,"
        f" has_table_privilege('{role}', 'runtime_attempts', 'insert') as c,"
        f" has_table_privilege('{role}', 'later', 'select') as d"
    ) == [{"a": True, "b": True, "c": False, "d": True}]


async def test_what_depends_on_the_tables_refuses_a_restore(lab: PostgresLab, tmp_path: Path) -> None:
    """A view and a foreign key of the application's would stay with the old tables, and nobody would notice."""
    await fill(lab)
    await lab.execute(
        "update runtime_leases set lease_expires_at_ms = 0; create view theirs as select thread_id from runtime_jobs;"
        "create table mine (id text references runtime_attempts)"
    )
    await lab.repository().backup(tmp_path / "a.archive")
    with pytest.raises(StoreInUseError) as caught:
        await lab.repository().restore(tmp_path / "a.archive")
    assert [reason.split(" would")[0].replace(f"{lab.place.schema}.", "") for reason in caught.value.reasons] == [
        "foreign key mine_id_fkey of mine",
        "view theirs",
    ]
    report = await lab.repository().restore(tmp_path / "a.archive", force=True)
    assert len(report.overridden) == 2
    assert (await lab.boot(migrate=False)).tolerated == ()


async def test_a_role_that_may_not_create_schemas_restores_into_one_that_is_there(
    lab: PostgresLab, role: str, tmp_path: Path
) -> None:
    """What is replaced is kept where it is told to; without that it says what an administrator has to do."""
    schema, keep = lab.place.schema, f"{lab.place.schema}_keep"
    await lab.execute(f"alter schema {schema} owner to {role}")
    await lab.run_outside(f"create schema {keep} authorization {role}")
    async with as_role(lab, role) as repo:
        await repo.attempts.enqueue("run", attempt_id="a")
        await repo.backup(tmp_path / "a.archive")
        await repo.attempts.enqueue("run", attempt_id="b")
    before = await everything(lab)
    with pytest.raises(RefusedError, match="keep_in"):
        await as_role(lab, role).restore(tmp_path / "a.archive")
    with pytest.raises(RefusedError, match="create that schema"):
        await as_role(lab, role).restore(tmp_path / "a.archive", keep_in="nowhere")
    assert await everything(lab) == before
    report = await as_role(lab, role).restore(tmp_path / "a.archive", keep_in=keep)
    assert report.kept == keep
    assert [row["attempt_id"] for row in await lab.rows("select attempt_id from runtime_attempts")] == ["a"]
    kept = await lab.rows(f"select attempt_id from {keep}.runtime_attempts order by 1")
    assert [row["attempt_id"] for row in kept] == ["a", "b"]
    async with as_role(lab, role) as repo:
        assert (await repo.attempts.get("a")).lease_version == 1_000_000
    await lab.run_outside(f"drop schema {keep} cascade")


async def test_other_tables_in_the_schema_are_left_alone(lab: PostgresLab, tmp_path: Path) -> None:
    """The application's own may live there, too."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.execute("create table theirs (a integer); insert into theirs values (5)")
    await lab.repository().restore(tmp_path / "a.archive", force=True)
    assert await lab.rows("select a from theirs") == [{"a": 5}]


async def test_a_store_of_a_newer_release_is_replaced(lab: PostgresLab, tmp_path: Path) -> None:
    """The way back, by the previous release: tables that it does not know are kept with the others."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.execute(
        "create table runtime_later (a integer);"
        "insert into runtime_schema_migrations (version, name, applied_at_ms) values (3, 'later', 5)"
    )
    report = await lab.repository().restore(tmp_path / "a.archive", force=True)
    assert await lab.rows("select to_regclass('runtime_later') as it") == [{"it": None}]
    assert await lab.rows(f"select count(*) as number from {report.kept}.runtime_later") == [{"number": 0}]
    assert (await lab.boot(migrate=False)).tolerated == ()


async def test_its_indexes_are_used_at_once(lab: PostgresLab, tmp_path: Path) -> None:
    """Also by whoever has an older snapshot: none of them waits for old transactions to end."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    await lab.repository().restore(tmp_path / "a.archive", force=True)
    assert (
        await lab.rows(
            "select indexrelid::regclass::text as name from pg_index join pg_class as c on c.oid = indrelid"
            f" where c.relnamespace = '{lab.place.schema}'::regnamespace and (indcheckxmin or not indisvalid)"
        )
        == []
    )


async def test_the_owner_stays_the_owner(lab: PostgresLab, role: str, tmp_path: Path) -> None:
    """An administrator who restores does not take the tables from whoever serves them."""
    await lab.run_outside(f"grant {role} to current_user")
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    for table in TABLES:
        await lab.execute(f"alter table {table} owner to {role}")
    await lab.repository().restore(tmp_path / "a.archive", force=True)
    owners = await lab.rows(
        "select distinct pg_get_userbyid(relowner)::text as owner from pg_class"
        f" where relnamespace = '{lab.place.schema}'::regnamespace and relkind = 'r'"
    )
    assert owners == [{"owner": role}]


async def test_one_restores_while_the_others_wait(lab: PostgresLab, tmp_path: Path) -> None:
    """Under boot's lock: a boot and another restore come after it, and each finds a whole store."""
    await fill(lab)
    await lab.repository().backup(tmp_path / "a.archive")
    reports = await asyncio.gather(
        *(lab.repository().restore(tmp_path / "a.archive", force=True) for _ in range(3)), lab.boot()
    )
    assert len({str(getattr(report, "kept", None)) for report in reports}) == 4
    assert await lab.migration_locks() == 0


async def test_a_server_that_ends_the_connection_changes_nothing(lab: PostgresLab, tmp_path: Path) -> None:
    """The error says that the database is unavailable; the old store is whole."""
    await fill(lab)
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many([NewAttempt("ballast", payload="x" * 500) for _ in range(5000)])
    await lab.repository().backup(tmp_path / "a.archive")
    before = await everything(lab)
    restoring = asyncio.create_task(lab.repository().restore(tmp_path / "a.archive", force=True))
    ended: list[object] = []

    async def end() -> bool:
        ended.extend(
            await lab.admin.fetch(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name = $1 and query ilike 'copy%'",
                lab.place.schema,
            )
        )
        return bool(ended)

    while not restoring.done() and not await end():
        pass
    with pytest.raises(Exception, match="PostgreSQL") as caught:
        await restoring
    assert not isinstance(caught.value, asyncpg.PostgresError)
    assert await everything(lab) == before
