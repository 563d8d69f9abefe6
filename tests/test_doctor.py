"""What a doctor finds around the tables, each seen once where all is well and once where it is not."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from runtime_repo import (
    Diagnosis,
    Finding,
    NewAttempt,
    PostgresRuntimeRepository,
    RuntimeRepository,
    SqliteRuntimeRepository,
)
from runtime_repo import doctor as doctor_module
from runtime_repo.postgres import doctor as postgres_module
from runtime_repo.postgres.grants import grants
from runtime_repo.sqlite import doctor as sqlite_module
from tests.lab import Lab
from tests.postgres_server import PostgresServer
from tests.privileges import unprivileged


def the(diagnosis: Diagnosis, check: str) -> Finding:
    """The answer to a question, which is answered once."""
    [finding] = [finding for finding in diagnosis.findings if finding.check == check]
    return finding


async def diagnosed(repository: RuntimeRepository) -> Diagnosis:
    """What a doctor says through a repository that nobody has awaited."""
    try:
        return await repository.doctor()
    finally:
        await repository.close()


async def test_of_a_store_that_is_well_nothing_is_amiss(lab: Lab) -> None:
    """And every question is answered, through an open repository as through one that is not."""
    async with lab.repository() as repo:
        one = await repo.doctor()
    other = await diagnosed(lab.repository())
    assert [finding.check for finding in one.findings] == [finding.check for finding in other.findings]
    # The tests' own server does without.
    found = [finding for finding in other.findings if finding.check not in ("durability", "disk")]
    assert {finding.state for finding in found} == {"well"}, found
    assert all(finding.advice is None for finding in found)
    assert (one.refusal, one.repairs, one.script) == (None, (), "")
    assert one.as_dict()["findings"][0]["check"] == "schema"


async def test_where_there_is_nothing_that_is_said(lab: Lab) -> None:
    """A verify-only boot would be refused; nothing else is asked."""
    diagnosis = await diagnosed(lab.repository())
    assert (diagnosis.found, diagnosis.is_well) == (0, False)
    assert [(finding.check, finding.state) for finding in diagnosis.findings] == [("schema", "ill")]


async def test_clocks_that_differ_are_noticed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """By more than the question took."""
    await lab.boot()
    monkeypatch.setattr(doctor_module, "_SKEW", -1)
    finding = the(await diagnosed(lab.repository()), "clock")
    assert finding.state == "note"
    assert "NTP" in str(finding.advice)
    monkeypatch.undo()
    ahead = doctor_module.clock(1_000_000, 1_060_000, 1_000_100)
    assert (ahead.state, ahead.told[:38]) == ("note", "the database's clock is 59.950 s ahead")
    assert doctor_module.clock(1_000_000, 1_002_100, 1_000_900).state == "well"


@pytest.fixture
async def store(postgres_url: str, postgres_schema: str) -> AsyncIterator[PostgresRuntimeRepository]:
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as store:
        yield store


async def test_a_long_transaction_is_named(
    store: PostgresRuntimeRepository, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With who has it open, and the statement that ends it."""
    monkeypatch.setattr(postgres_module, "_LONG", 0.0)
    session = await asyncpg.connect(postgres_url, server_settings={"application_name": "the sleeper"})
    try:
        async with session.transaction():
            await session.execute("select 1")
            await asyncio.sleep(0.01)
            finding = the(await store.doctor(), "long transactions")
            assert finding.state == "ill"
            assert f"pid {session.get_server_pid()} (the sleeper, " in finding.told
            assert f"pg_terminate_backend({session.get_server_pid()})" in str(finding.advice)
        pid = session.get_server_pid()
    finally:
        await session.close()
    assert f"pid {pid} " not in the(await store.doctor(), "long transactions").told


async def test_dead_rows_that_stay_are_told(
    store: PostgresRuntimeRepository,
    postgres: asyncpg.Connection,
    postgres_schema: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the server counts them; and a table that autovacuum must not come to."""
    monkeypatch.setattr(postgres_module, "_DEAD", 50)
    await store.attempts.enqueue_many([NewAttempt("run") for _ in range(100)])
    await postgres.execute(f"delete from {postgres_schema}.runtime_queue")
    async with asyncio.timeout(20):
        # A session tells what it did once a second at most, and when it has nothing else to do.
        while (finding := the(await store.doctor(), "dead rows")).state == "well":
            await postgres.execute("select 1")
            await asyncio.sleep(0.1)
    assert finding.told.startswith("autovacuum is losing: runtime_queue 100 beside 0 alive")
    await postgres.execute(f"alter table {postgres_schema}.runtime_queue set (autovacuum_enabled = off)")
    assert the(await store.doctor(), "dead rows").told == "autovacuum never comes to runtime_queue"


async def test_an_invalid_index_is_told_whoever_made_it(
    store: PostgresRuntimeRepository, postgres: asyncpg.Connection, postgres_schema: str
) -> None:
    """What a failed build has left behind on a table of ours, and the statement that builds it."""
    await postgres.execute(f'create index "own" on {postgres_schema}.runtime_jobs (updated_at_ms)')
    await postgres.execute(
        f"update pg_index set indisvalid = false where indexrelid = '{postgres_schema}.own'::regclass"
    )
    diagnosis = await store.doctor()
    finding = the(diagnosis, "invalid indexes")
    assert (finding.state, diagnosis.refusal) == ("ill", None)
    await postgres.execute(str(finding.advice))
    assert the(await store.doctor(), "invalid indexes").state == "well"


async def test_what_a_role_may_do_is_told(
    store: PostgresRuntimeRepository, postgres: asyncpg.Connection, postgres_url: str, postgres_schema: str
) -> None:
    """The owner all; a worker every verb; one that lacks something what that is, and the grant."""
    worker = f"{postgres_schema}_worker"
    assert "may migrate and may call every verb" in the(await store.doctor(), "rights").told
    await postgres.execute(f"create role {worker}")
    try:
        said = grants(postgres_schema, migrator=await postgres.fetchval("select current_user"), worker=worker)
        await postgres.execute("".join(said.after))
        settings = {"role": worker}
        asked = PostgresRuntimeRepository(postgres_url, schema=postgres_schema, server_settings=settings, migrate=False)
        async with asked as repo:
            assert the(await repo.doctor(), "rights").told == (f"role {worker} may not migrate and may call every verb")
            await postgres.execute(f"revoke insert on {postgres_schema}.runtime_queue from {worker}")
            finding = the(await repo.doctor(), "rights")
            assert (finding.state, finding.told) == ("ill", f"role {worker} lacks insert on runtime_queue")
            await postgres.execute(str(finding.advice).partition(": ")[2])
            assert the(await repo.doctor(), "rights").state == "well"
    finally:
        await postgres.execute(f"drop owned by {worker}; drop role {worker}")


async def test_a_server_that_forgets_is_ill(postgres_server: PostgresServer) -> None:
    """The tests' own is fast because it would not outlive a crash."""
    async with PostgresRuntimeRepository(postgres_server.url(), schema="doctored") as repo:
        diagnosis = await repo.doctor()
    finding = the(diagnosis, "durability")
    assert (finding.state, diagnosis.is_well) == ("ill", False)
    assert "fsync off" in finding.told


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.db"


async def test_a_file_that_is_not_in_wal_is_told(path: Path) -> None:
    """It serves, but readers and the writer wait for each other."""
    async with SqliteRuntimeRepository(path):
        pass
    assert the(await diagnosed(SqliteRuntimeRepository(path)), "durability").state == "well"
    async with SqliteRuntimeRepository(path) as repo, repo.transaction() as transaction:
        connection = transaction.connection
        await connection.execute("commit")
        await connection.execute("pragma journal_mode = delete")
        await connection.execute("begin")
    finding = the(await diagnosed(SqliteRuntimeRepository(path)), "durability")
    assert (finding.state, finding.told) == ("note", "journal_mode delete, synchronous 2 by default")


@pytest.mark.parametrize(("kind", "state"), [("nfs4", "ill"), ("fuse.sshfs", "ill"), ("9p", "ill"), ("ext4", "well")])
async def test_a_file_system_that_cannot_hold_wal_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, state: str
) -> None:
    """Whatever is mounted nearest to the file counts."""
    async with SqliteRuntimeRepository(path):
        pass
    mounts = path.with_name("mounts")
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - xfs /dev/sda1 rw\n"
        f"36 22 0:30 / {path.parent} rw - {kind} somewhere:/share rw\n"
        f"37 36 0:31 / {path.parent}/deeper rw - tmpfs tmpfs rw\n"
    )
    monkeypatch.setattr(sqlite_module, "_MOUNTS", mounts)
    finding = the(await diagnosed(SqliteRuntimeRepository(path)), "file system")
    assert (finding.state, finding.told) == (state, f"the file system is {kind}")


async def test_a_file_that_may_not_be_written_is_told(open_folder: Path) -> None:
    """With its folder, which WAL needs as well."""
    path = open_folder / "x.db"
    with unprivileged():
        async with SqliteRuntimeRepository(path):
            pass
        assert the(await diagnosed(SqliteRuntimeRepository(path)), "rights").state == "well"
        path.chmod(0o444)
        # Of root and its stand-in, the process asks as whom it acts.
        finding = the(await diagnosed(SqliteRuntimeRepository(path)), "rights")
    assert (finding.state, finding.told) == ("ill", f"this process may not write {path}")


async def test_a_wal_that_nobody_can_empty_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody reads for ever; and a file most of which is free."""
    async with SqliteRuntimeRepository(path) as repo:
        await repo.attempts.enqueue_many([NewAttempt("run", payload="x" * 1000) for _ in range(500)])
        monkeypatch.setattr(sqlite_module, "_LONG_WAL", 10_000)
        assert os.stat(f"{path}-wal").st_size > 10_000  # noqa: PTH116
        assert the(await repo.doctor(), "long transactions").state == "ill"
        assert the(await repo.doctor(), "free pages").state == "well"
        async with repo.transaction() as transaction:
            await transaction.connection.execute("delete from runtime_attempts")
        assert the(await repo.doctor(), "free pages").state == "note"


async def test_in_memory_there_is_less_to_ask() -> None:
    """And all of it is answered."""
    async with SqliteRuntimeRepository(":memory:") as repo:
        diagnosis = await repo.doctor()
    assert [finding.check for finding in diagnosis.findings] == ["schema", "durability", "clock"]
    assert diagnosis.is_well
