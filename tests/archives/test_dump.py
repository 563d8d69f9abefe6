"""PostgreSQL's own pg_dump, for whoever wants it."""

import secrets
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from runtime_repo import ArchiveError, ConfigurationError, PostgresRuntimeRepository
from tests.faults.conftest import POSTGRES_ONLY
from tests.postgres_server import PostgresServer, find_binaries

PASSWORD = "a 'secret'"  # noqa: S105

pytestmark = pytest.mark.parametrize("database", POSTGRES_ONLY, indirect=True)


@pytest.fixture
async def database(postgres_server: PostgresServer) -> AsyncIterator[dict[str, Any]]:
    """How a role that owns a database of the test's own gets there."""
    name = f"rr_dump_{secrets.token_hex(6)}"
    admin = await asyncpg.connect(postgres_server.url())
    password = PASSWORD.replace("'", "''")
    await admin.execute(f"create role {name} login password '{password}'")
    await admin.execute(f"create database {name} owner {name}")
    yield {"dsn": postgres_server.url(database=name), "user": name, "password": PASSWORD}
    await admin.execute(f"drop database {name}")
    await admin.execute(f"drop role {name}")
    await admin.close()


@pytest.fixture
def program(tmp_path: Path) -> str:
    """The server's pg_dump, which writes down with what it is called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "pg_restore").symlink_to(tool("pg_restore"))
    called = folder / "pg_dump"
    called.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nexec {tool("pg_dump")} "$@"\n')
    called.chmod(0o755)
    return str(called)


def tool(name: str) -> Path:
    """One of the server's own."""
    folder = find_binaries()
    assert folder is not None
    return folder / name


def restored(path: Path) -> str:
    """What a restore would run."""
    return subprocess.run([tool("pg_restore"), "--file=-", path], capture_output=True, text=True, check=True).stdout


def names(folder: Path) -> list[str]:
    """What is in it."""
    return sorted(path.name for path in folder.iterdir())


async def filled(database: dict[str, Any], schema: str = "runtime") -> PostgresRuntimeRepository:
    """A store with one attempt; a repository that was not awaited."""
    async with PostgresRuntimeRepository(**database, schema=schema) as repo:
        await repo.attempts.enqueue("run", attempt_id="a")
    return PostgresRuntimeRepository(**database, schema=schema)


@pytest.mark.parametrize("schema", ["runtime", 'odd "name"'])
async def test_a_dump_is_what_pg_restore_reads(
    database: dict[str, Any], program: str, tmp_path: Path, schema: str
) -> None:
    """For its owner alone, of this schema alone, and no password is among the arguments."""
    store = await filled(database, schema)
    path = tmp_path / "a.dump"
    report = await store.pg_dump(path, program=program)
    assert (report.path, report.size) == (str(path), path.stat().st_size)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "secret" not in (tmp_path / "called").read_text()
    sql = restored(path)
    assert sql.count("CREATE SCHEMA") == 1
    assert "CREATE TABLE" in sql
    assert names(tmp_path) == ["a.dump", "bin", "called"]


async def test_another_version_is_refused(database: dict[str, Any], tmp_path: Path) -> None:
    """What it wrote could not be restored, or it cannot read what is there."""
    store = await filled(database)
    for line in ("pg_dump (PostgreSQL) 99.1", "pg_dump (PostgreSQL) 9.6.1", "no version"):
        other = tmp_path / "pg_dump"
        other.write_text(f"#!/bin/sh\necho '{line}'\n")
        other.chmod(0o755)
        with pytest.raises(ConfigurationError, match="the same major version"):
            await store.pg_dump(tmp_path / "a.dump", program=str(other))
    with pytest.raises(ConfigurationError, match="client tools"):
        await store.pg_dump(tmp_path / "a.dump", program=str(tmp_path / "missing"))
    assert names(tmp_path) == ["pg_dump"]


async def test_a_dump_that_fails_leaves_nothing(database: dict[str, Any], program: str, tmp_path: Path) -> None:
    """There is such a file, there is no such schema, there is no such folder."""
    store = await filled(database)
    path = tmp_path / "a.dump"
    path.write_text("mine")
    with pytest.raises(ArchiveError, match="was left alone"):
        await store.pg_dump(path, program=program)
    assert path.read_text() == "mine"
    with pytest.raises(ArchiveError, match="no matching schemas"):
        await PostgresRuntimeRepository(**database, schema="other").pg_dump(tmp_path / "b.dump", program=program)
    with pytest.raises(ArchiveError, match="cannot be written"):
        await store.pg_dump(tmp_path / "none" / "c.dump", program=program)
    assert names(tmp_path) == ["a.dump", "bin", "called"]
