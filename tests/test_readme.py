"""The README's Python blocks, each run as it stands there, where the text around it says that it belongs."""

import ast
import asyncio
import inspect
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import runtime_repo
from runtime_repo import (
    AttemptStatus,
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


async def test_the_dump_before_a_migration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres_server: PostgresServer
) -> None:
    """On what is fresh it fails, as the text says, and nothing is migrated; what is old is dumped before it is not."""
    name = f"rr_readme_{secrets.token_hex(6)}"
    admin = await asyncpg.connect(postgres_server.url())
    await admin.execute(f"create database {name}")
    url = postgres_server.url(database=name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("PATH", str(find_binaries()), prepend=os.pathsep)
    with pytest.raises(RuntimeError, match="not migrating"):
        await run(block("pg_dump"))
    old = PostgresRuntimeRepository(url)
    await ensure_schema(old._database, load_migrations("postgres")[:1], Policy())
    await old._database.close()
    repo = (await run(block("pg_dump")))["repo"]
    await repo.close()
    assert [applied.version for applied in repo.boot_report.applied] == RECORDED[1:]
    assert (tmp_path / "runtime.dump").read_bytes().startswith(b"PGDMP")
    await admin.execute(f"drop database {name}")
    await admin.close()


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
        worker = asyncio.create_task(run(block("Worker("), repo=repo, send_mail=send_mail))
        assert {await sent.get(), await sent.get()} == {"mail", "urgent"}
        os.kill(os.getpid(), signal.SIGTERM)
        await worker
        done = await repo.attempts.list(status=AttemptStatus.COMPLETED)
        assert {attempt.attempt_id: attempt.result for attempt in done} == {"mail": "sent", "urgent": "sent"}
        assert (await repo.attempts.get("other")).status == "queued"


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
    "pg_dump": test_the_dump_before_a_migration,
    "Worker(": test_the_worker,
    "insert into orders": test_the_order_and_its_attempt,
    "interrupts.resume": test_the_answer_and_what_follows_it,
}
"""A word of each block, and the test that runs it."""
