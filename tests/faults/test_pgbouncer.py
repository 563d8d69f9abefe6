"""Behind pgbouncer in transaction mode: every statement outside a transaction may run on another server connection."""

import asyncio
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from runtime_repo import NewAttempt, PostgresRuntimeRepository
from runtime_repo.postgres import database, notifications
from tests.cli.program import Program
from tests.faults.conftest import POSTGRES_ONLY, eventually, in_ci
from tests.lab import PostgresLab
from tests.place import Place
from tests.postgres_server import PostgresServer
from tests.privileges import reachable_folder, stand_in
from tests.versions import NEWEST

CONFIGURATION = """
[databases]
postgres = host={socket} port={server_port} user=postgres

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = 3
max_client_conn = 200
"""


@pytest.fixture(scope="module", params=POSTGRES_ONLY)
def pgbouncer(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a pgbouncer of our own with three server connections. In CI its absence fails."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        reason = "No pgbouncer found: install the system's package pgbouncer."
        if in_ci():
            pytest.fail(reason)
        pytest.skip(reason)
    account = stand_in()
    with tempfile.TemporaryDirectory(prefix="pgb-", dir=reachable_folder()) as name, socket.socket() as probe:
        folder = Path(name)
        folder.chmod(0o755)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        places = {"socket": postgres_server.folder, "server_port": postgres_server.port, "port": port}
        (folder / "pgbouncer.ini").write_text(CONFIGURATION.format(folder=folder, **places), "utf-8")
        (folder / "users").write_text('"postgres" ""\n', "utf-8")
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, str(folder / "pgbouncer.ini")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                # It refuses to run as root.
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
            )
        try:
            _wait_for(port, process, folder / "log")
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            process.terminate()
            process.wait(10)


def _wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert process.poll() is None, log.read_text("utf-8")
            assert time.monotonic() < deadline, log.read_text("utf-8")
            time.sleep(0.02)
        else:
            return


@pytest.fixture
async def lab(postgres_server: PostgresServer, postgres_schema: str) -> AsyncIterator[PostgresLab]:
    """A runtime schema of the test's own; the administrator goes straight to the server."""
    admin = await asyncpg.connect(postgres_server.url())
    try:
        lab = PostgresLab(postgres_server.url(), postgres_schema, admin, [])
        yield lab
        await admin.execute(f"drop schema if exists {postgres_schema} cascade")
    finally:
        await admin.close()


@pytest.mark.parametrize("version", [0, 1], ids=["fresh", "upgrade"])
async def test_many_boots_share_few_server_connections(lab: PostgresLab, pgbouncer: str, version: int) -> None:
    """Exactly one migrates, none fails, and no lock or setting stays on a connection that others get next."""
    await lab.lay(version)
    place = Place("postgres", pgbouncer, lab.place.schema)

    async def boot(number: int) -> int:
        async with place.repository(statement_cache_size=0, max_size=2) as repository:
            await repository.attempts.enqueue("run", attempt_id=str(number))
            assert (await repository.attempts.get(str(number))).run_id == "run"
            return len(repository.boot_report.applied)

    applied = await asyncio.wait_for(asyncio.gather(*(boot(number) for number in range(20))), 60)
    assert sorted(applied) == [0] * 19 + [NEWEST - version]
    assert await lab.version() == NEWEST
    assert await lab.migration_locks() == 0

    client = await asyncpg.connect(pgbouncer, statement_cache_size=0)
    try:
        for setting in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"):
            assert await client.fetchval(f"show {setting}") == "0"
    finally:
        await client.close()


async def test_a_boot_that_is_cancelled_gives_its_server_connection_back(lab: PostgresLab, pgbouncer: str) -> None:
    """The transaction is rolled back before pgbouncer lends the connection to somebody else."""
    await lab.lay(1)
    before = await lab.content()
    place = Place("postgres", pgbouncer, lab.place.schema)
    for _ in range(4):
        reached = asyncio.Event()

        async def stall(reached: asyncio.Event = reached) -> None:
            reached.set()
            await asyncio.Event().wait()

        repository = place.repository(statement_cache_size=0, before_migrate=stall)
        boot = asyncio.ensure_future(repository.ensure_schema())
        await reached.wait()
        assert await lab.migration_locks() == 1
        boot.cancel()
        await asyncio.wait([boot])
        assert await lab.migration_locks() == 0
    assert await lab.content() == before
    async with place.repository(statement_cache_size=0, lock_timeout=0) as repository:
        assert repository.boot_report.from_version == 1

    async def none_in_transaction() -> bool:
        return not [row for row in await lab.connections() if isinstance(row, tuple) and "transaction" in str(row[1])]

    await eventually(none_in_transaction)


async def test_a_pooler_behind_which_nobody_can_listen_is_found_out(
    lab: PostgresLab, pgbouncer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is told does not arrive: one warning, no connection held for it, and who waits looks by himself."""
    monkeypatch.setattr(database, "_OWN_VOICE", 0.3)
    monkeypatch.setattr(notifications, "_POLL_DEAF", 0.2)
    monkeypatch.setattr(notifications, "_PAUSE_FIRST", 0.01)
    repository = PostgresRuntimeRepository(pgbouncer, schema=lab.place.schema, statement_cache_size=0)
    async with asyncio.timeout(20), repository:
        waiting = asyncio.ensure_future(repository.attempts.wait("mail"))

        async def fell_back() -> bool:
            return "pass listen=False" in caplog.text

        await eventually(fell_back)
        await asyncio.sleep(0.5)
        assert caplog.text.count("once a second") == 1
        assert repository._postgres._connections._hearing is None
        await repository.attempts.enqueue("run", queue="mail")
        assert await waiting
        again = asyncio.ensure_future(repository.attempts.wait("post"))
        await asyncio.sleep(0.5)
        assert caplog.text.count("once a second") == 1
        again.cancel()


async def test_a_doctor_notices_the_pooler(lab: PostgresLab, pgbouncer: str) -> None:
    """Two connections that are open at once are given one session; without a pooler that never happens."""
    found = {}
    for where in (pgbouncer, lab.place.where):
        async with Place("postgres", where, lab.place.schema).repository(statement_cache_size=0) as repository:
            diagnosis = await repository.doctor()
            found[where] = next(finding for finding in diagnosis.findings if finding.check == "pooler")
    assert (found[pgbouncer].state, found[lab.place.where].state) == ("note", "well")
    assert "listen=False" in str(found[pgbouncer].advice)


async def test_every_command_works_behind_it(lab: PostgresLab, pgbouncer: str, tmp_path: Path) -> None:
    """Without an option for that; and no setting of theirs stays on a connection that others get next."""
    program = Program(Place("postgres", pgbouncer, lab.place.schema))
    archive = str(tmp_path / "store.zip")
    for name, *given in (
        ("plan",),
        ("migrate",),
        ("verify",),
        ("can-run",),
        ("status",),
        ("top", "--once"),
        ("quiesce",),
        ("pause", "emails"),
        ("resume",),
        ("backup", archive),
        ("restore", archive),
    ):
        done = await program.run(name, *given)
        assert (name, done.code, done.errors) == (name, 0, "")
    client = await asyncpg.connect(pgbouncer, statement_cache_size=0)
    try:
        for setting in ("lock_timeout", "default_transaction_read_only", "transaction_read_only"):
            assert await client.fetchval(f"show {setting}") in ("0", "off")
    finally:
        await client.close()


async def test_archives_go_through_the_pooler(lab: PostgresLab, pgbouncer: str, tmp_path: Path) -> None:
    """A backup beside live traffic and a restore, each in one transaction; no setting and no lock stays behind."""
    place = Place("postgres", pgbouncer, lab.place.schema)
    async with place.repository(statement_cache_size=0, max_size=2) as repository:
        await repository.attempts.enqueue_many([NewAttempt("run", payload="x" * 1000) for _ in range(3000)])
        backup = asyncio.create_task(place.repository(statement_cache_size=0).backup(tmp_path / "a.archive"))
        while not backup.done():
            await repository.attempts.enqueue("meanwhile")
        assert (await backup).rows["runtime_attempts"] >= 3000
    report = await place.repository(statement_cache_size=0).restore(tmp_path / "a.archive")
    assert report.rows == (await backup).rows
    assert (await lab.boot(migrate=False)).tolerated == ()
    assert await lab.migration_locks() == 0
    client = await asyncpg.connect(pgbouncer, statement_cache_size=0)
    try:
        for setting, usual in (("lock_timeout", "0"), ("row_security", "on"), ("transaction_read_only", "off")):
            assert await client.fetchval(f"show {setting}") == usual
    finally:
        await client.close()
    await lab.run_outside(f"set client_min_messages = warning; drop schema {report.kept} cascade")
