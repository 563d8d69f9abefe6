"""The README's Python blocks and runbooks, each run as it stands there, where the text says that it belongs."""

import ast
import asyncio
import inspect
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import runtime_repo
from runtime_repo import (
    ArchiveError,
    AttemptStatus,
    Lease,
    NewAttempt,
    PostgresRuntimeRepository,
    RuntimeRepository,
    SqliteRuntimeRepository,
)
from runtime_repo.schema import Policy, ensure_schema, load_migrations
from tests.postgres_server import PostgresServer, find_binaries
from tests.versions import RECORDED

README = Path(__file__).parents[1] / "README.md"
BLOCKS: list[str] = re.findall(r"^ *```python\n(.*?)^ *```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
PUBLIC = {name: getattr(runtime_repo, name) for name in runtime_repo.__all__}


COMMANDS: list[str] = re.findall(r"^ *```sh\n(.*?)^ *```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def command(word: str) -> str:
    """The only block of commands with this word."""
    (found,) = [text for text in COMMANDS if word in text]
    return found


def block(word: str) -> str:
    """The only block with this word."""
    (found,) = [text for text in BLOCKS if word in text]
    return found


async def run(text: str, **names: Any) -> dict[str, Any]:
    """Run a block with these names and all of the library's, as if it stood in an ``async def``; return its names."""
    code = compile(text, README, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    namespace = PUBLIC | {"asyncio": asyncio, "os": os} | names
    done = eval(code, namespace)  # noqa: S307 - what the README says
    if inspect.isawaitable(done):
        await done
    return namespace


def test_every_block_has_a_test() -> None:
    """A new one is not forgotten, and none that a test wants is missing."""
    assert sorted(block(word) for word in TOLD) == sorted(BLOCKS)


def test_the_first_example_is_a_program(tmp_path: Path) -> None:
    """It runs, again as well, and leaves a file in which the attempt is completed."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block("asyncio.run")],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(runtime_repo.__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    async def results() -> list[object]:
        async with SqliteRuntimeRepository(tmp_path / "runtime.db", migrate=False) as repo:
            return [attempt.result for attempt in await repo.attempts.list(status=AttemptStatus.COMPLETED)]

    assert asyncio.run(results()) == [{"said": "hello world"}] * 2


@pytest.fixture
async def database(postgres_server: PostgresServer) -> AsyncIterator[str]:
    """The URL of a database of the test's own."""
    name = f"rr_readme_{secrets.token_hex(6)}"
    admin = await asyncpg.connect(postgres_server.url())
    await admin.execute(f"create database {name}")
    yield postgres_server.url(database=name)
    await admin.execute(f"drop database {name}")
    await admin.close()


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a block's commands in a folder of the test's own, as an operator would."""
    command = tmp_path / "bin" / "runtime-repo"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m runtime_repo "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(Path(runtime_repo.__file__).parents[1]))
    for folder in (find_binaries(), command.parent):
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)

    def run(text: str, **environment: str) -> None:
        shown = textwrap.dedent(text)
        done = subprocess.run(
            ["sh", "-ec", shown], env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{shown}\n{done.stdout}\n{done.stderr}"

    return run


async def lay_version_1(repository: RuntimeRepository) -> None:
    """What the previous release left, with one attempt."""
    await ensure_schema(repository._database, load_migrations(repository._database.backend)[:1], Policy())
    schema = "main" if isinstance(repository, SqliteRuntimeRepository) else "runtime"
    async with repository._database.atomic() as transaction:
        await transaction.connection.execute(
            f"insert into {schema}.runtime_attempts (attempt_id, run_id, attempt_no, status) "
            "values ('before', 'run', 1, 'queued')"
        )
    await repository._database.close()


async def test_the_archive_before_a_migration(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On what is fresh there is nothing to save, and nothing is migrated; what is old is saved as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", database)
    with pytest.raises(ArchiveError, match="there is no store"):
        await run(block("before_migrate=save"))
    await lay_version_1(PostgresRuntimeRepository(database))
    repo = (await run(block("before_migrate=save")))["repo"]
    await repo.close()
    assert [applied.version for applied in repo.boot_report.applied] == RECORDED[1:]
    report = await PostgresRuntimeRepository(database).restore("before-upgrade.zip")
    assert report.version == 1


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
async def test_the_upgrade_and_the_way_back(
    backend: str, database: str, shell: Callable[..., None], tmp_path: Path
) -> None:
    """The runbooks' commands, one after the other: what was there before is there again."""
    url = str(tmp_path / "runtime.db") if backend == "sqlite" else database
    make: Callable[..., RuntimeRepository] = (
        SqliteRuntimeRepository if backend == "sqlite" else PostgresRuntimeRepository
    )
    await lay_version_1(make(url))
    shell(command("migrate --backup"), RUNTIME_REPO_URL=url)
    async with make(url, migrate=False) as repo:
        assert [attempt.attempt_id for attempt in await repo.attempts.list()] == ["before"]
        await repo.attempts.enqueue("run", attempt_id="after")
    shell(command("restore before-upgrade.zip"), RUNTIME_REPO_URL=url)
    assert (await make(url).inspect()).found == 1
    async with make(url) as repo:
        assert [attempt.attempt_id for attempt in await repo.attempts.list()] == ["before"]


async def test_the_dump_and_its_restore(database: str, shell: Callable[..., None]) -> None:
    """The alternative for whoever has the client's tools: the schema is replaced, or it is not."""
    await lay_version_1(PostgresRuntimeRepository(database))
    dump, restore = command("--pg-dump").split("\n", 1)
    shell(dump, DATABASE_URL=database)
    async with PostgresRuntimeRepository(database) as repo:
        await repo.attempts.enqueue("run", attempt_id="after")
    shell(restore, DATABASE_URL=database)
    assert (await PostgresRuntimeRepository(database).inspect()).found == 1


async def test_the_move(database: str, shell: Callable[..., None]) -> None:
    """The store is in the other database, and may be claimed from there."""
    async with SqliteRuntimeRepository("runtime.db") as repo:
        await repo.attempts.enqueue("run", attempt_id="moved")
    shell(command("runtime-repo move"), DATABASE_URL=database)
    async with PostgresRuntimeRepository(database, migrate=False) as repo:
        assert [lease.attempt_id for lease in await repo.leases.claim("worker")] == ["moved"]


def test_the_grants(shell: Callable[..., None]) -> None:
    """They are printed."""
    shell(command("runtime-repo grants"))


@pytest.fixture(params=["sqlite", "postgres"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> RuntimeRepository:
    """On either database."""
    if request.param == "sqlite":
        return SqliteRuntimeRepository(tmp_path / "runtime.db")
    url, schema = (request.getfixturevalue(f"postgres_{name}") for name in ("url", "schema"))
    return PostgresRuntimeRepository(url, schema=schema, server_settings={"search_path": schema})


async def test_the_worker(repository: RuntimeRepository) -> None:
    """What its queues hold is handled until it is told to stop, and what its handler returns is the result."""
    sent: asyncio.Queue[object] = asyncio.Queue()

    async def send_mail(payload: object) -> str:
        await sent.put(payload)
        return "sent"

    async with asyncio.timeout(20), repository as repo:
        await repo.attempts.enqueue_many(
            [NewAttempt("run", queue, queue=queue, payload=queue) for queue in ("mail", "urgent", "other")]
        )
        worker = asyncio.create_task(run(block("send_mail"), repo=repo, send_mail=send_mail))
        assert {await sent.get(), await sent.get()} == {"mail", "urgent"}
        os.kill(os.getpid(), signal.SIGTERM)
        await worker
        done = await repo.attempts.list(status=AttemptStatus.COMPLETED)
        assert {attempt.attempt_id: attempt.result for attempt in done} == {"mail": "sent", "urgent": "sent"}
        assert (await repo.attempts.get("other")).status == "queued"


async def test_the_telemetry(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is enqueued is handled, with or without a provider."""
    monkeypatch.setenv("DATABASE_URL", database)

    async def handle(lease: Lease) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return lease.attempt.queue

    async with asyncio.timeout(20):
        await run(block("Telemetry()"), handle=handle)
    async with PostgresRuntimeRepository(database) as repo:
        assert [attempt.result for attempt in await repo.attempts.list()] == ["mail"]


async def test_the_order_and_its_attempt(repository: RuntimeRepository) -> None:
    """The application's row and the attempt, or neither."""
    async with repository as repo:
        async with repo.transaction() as transaction:
            await transaction.connection.execute("create table orders (id integer primary key)")
        await run(block("insert into orders"), repo=repo)
        assert [(attempt.run_id, attempt.queue) for attempt in await repo.attempts.list()] == [("order-7", "orders")]
        with pytest.raises(Exception, match=r"(?i)unique"):
            await run(block("insert into orders"), repo=repo)
        assert len(await repo.attempts.list()) == 1


async def test_the_answer_and_what_follows_it(repository: RuntimeRepository) -> None:
    """The interrupt is answered and the next attempt stored; once more, it is the same."""
    async with repository as repo:
        asked = await repo.interrupts.create("thread", "run", "a", "may I?")
        for _ in range(2):
            await run(block("interrupts.resume"), repo=repo, interrupt_id=asked.interrupt_id)
        assert (await repo.interrupts.get(asked.interrupt_id)).resume_payload == {"approved": True}
        (attempt,) = await repo.attempts.list()
        assert (attempt.attempt_id, attempt.run_id) == (f"after-{asked.interrupt_id}", "run")


TOLD: dict[str, Callable[..., Awaitable[None] | None]] = {
    "asyncio.run": test_the_first_example_is_a_program,
    "before_migrate=save": test_the_archive_before_a_migration,
    "send_mail": test_the_worker,
    "Telemetry()": test_the_telemetry,
    "insert into orders": test_the_order_and_its_attempt,
    "interrupts.resume": test_the_answer_and_what_follows_it,
}
"""A word of each block, and the test that runs it."""
