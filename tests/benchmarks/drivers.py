"""
Who boots: this library, and the bare drivers doing by hand the least that the same boot could need.

A bare boot knows beforehand what it will find, so it bounds what a library can reach. It reads no catalog, decides
nothing, and has its migrations loaded before the clock starts. The peers live in `peers.py`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import aiosqlite
import asyncpg

from runtime_repo import PostgresRuntimeRepository, SqliteRuntimeRepository
from runtime_repo.database import Backend
from tests.place import Place

Kind = Literal["warm", "cold", "storm"]
Boot = Callable[[], Awaitable[None] | None]

LEDGER = "runtime_schema_migrations"
_LOOK = "select version, name from {schema}.runtime_schema_migrations"
_RECORD = "insert into {schema}.runtime_schema_migrations (version, name, applied_at_ms) values {rows};"
# Durability is left at SQLite's default, as the library leaves it.
_PATIENCE = 60.0
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


@dataclass(frozen=True)
class Script:
    """A migration as it stands in its file, its tokens still unfilled."""

    version: int
    name: str
    text: str

    def filled(self, schema: str) -> str:
        return self.text.replace("{schema}", schema).replace("{now_ms}", str(int(time.time() * 1000)))


def scripts(backend: Backend) -> list[Script]:
    """Return the library's own migrations, oldest first."""
    folder = files("runtime_repo") / "migrations" / backend
    found = [
        Script(int(file.name[:4]), file.name.removesuffix(".sql")[5:], file.read_text(encoding="utf-8"))
        for file in folder.iterdir()
        if file.name.endswith(".sql")
    ]
    if not found:
        raise FileNotFoundError(f"runtime_repo ships no migrations for {backend}: there is nothing to compare with.")
    return sorted(found, key=lambda script: script.version)


def statements(text: str) -> list[str]:
    """Split a script where SQLite itself sees the end of a statement."""
    done: list[str] = []
    rest = ""
    for piece in text.split(";")[:-1]:
        rest += piece + ";"
        if sqlite3.complete_statement(rest):
            done.append(rest.strip())
            rest = ""
    return done


def ours(place: Place) -> Boot:
    async def boot() -> None:
        if place.backend == "postgres":
            await (await PostgresRuntimeRepository(place.where, schema=place.schema)).close()
        else:
            await (await SqliteRuntimeRepository(place.where)).close()

    return boot


def bare(place: Place, kind: Kind) -> Boot:
    if place.backend == "postgres":
        return _postgres_warm(place) if kind == "warm" else _postgres_cold(place, locked=kind == "storm")
    return _sqlite_warm(place) if kind == "warm" else _sqlite_cold(place, locked=kind == "storm")


def _postgres_warm(place: Place) -> Boot:
    look = _LOOK.replace("{schema}", f'"{place.schema}"')

    async def boot() -> None:
        connection = await asyncpg.connect(place.where)
        try:
            await connection.fetch(look)
        finally:
            await connection.close()

    return boot


def _postgres_cold(place: Place, *, locked: bool) -> Boot:
    schema = f'"{place.schema}"'
    ddl = _ddl("postgres", schema)

    async def boot() -> None:
        connection = await asyncpg.connect(place.where)
        try:
            async with connection.transaction():
                if locked:
                    await connection.execute("select pg_advisory_xact_lock(1, 1)")
                    if await connection.fetchval("select to_regclass($1) is not null", f"{schema}.{LEDGER}"):
                        return
                await connection.execute(f"create schema {schema}")
                for step in ddl:
                    await connection.execute(step)
        finally:
            await connection.close()

    return boot


def _sqlite_warm(place: Place) -> Boot:
    look = _LOOK.replace("{schema}", "main")

    async def boot() -> None:
        async with aiosqlite.connect(place.where, isolation_level=None) as connection:
            await connection.execute_fetchall(look)

    return boot


def _sqlite_cold(place: Place, *, locked: bool) -> Boot:
    ddl = [statement for step in _ddl("sqlite", "main") for statement in statements(step)]

    async def boot() -> None:
        async with aiosqlite.connect(place.where, isolation_level=None, timeout=_PATIENCE) as connection:
            await _switch_to_wal(connection)
            await connection.execute_fetchall("begin immediate")
            look = f"pragma main.table_info({LEDGER})"
            if not (locked and list(await connection.execute_fetchall(look))):
                for statement in ddl:
                    await connection.execute_fetchall(statement)
            await connection.execute_fetchall("commit")

    return boot


async def _switch_to_wal(connection: aiosqlite.Connection) -> None:
    # SQLite does not wait for this lock, whatever the timeout: of two that switch a new file at once, one is refused.
    for _ in range(10_000):
        try:
            await connection.execute_fetchall("pragma journal_mode = wal")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in _BUSY:
                raise
            await asyncio.sleep(0.002)
        else:
            return
    raise TimeoutError("The file was locked all the time.")


def _ddl(backend: Backend, schema: str) -> list[str]:
    """Return the ledger, every migration's text and the ledger's rows: one text for each round trip."""
    found = scripts(backend)
    column = "bigint" if backend == "postgres" else "integer"
    shape = f"version integer primary key, name text not null, applied_at_ms {column} not null"
    now = int(time.time() * 1000)
    rows = ", ".join(f"({script.version}, '{script.name}', {now})" for script in found)
    return [
        f"create table {schema}.{LEDGER} ({shape});",
        *(script.filled(schema) for script in found),
        _RECORD.replace("{schema}", schema).replace("{rows}", rows),
    ]
