"""What every benchmark needs: a PostgreSQL that keeps its commits, contenders that take turns, and one table."""

from __future__ import annotations

import contextlib
import os
import platform
import sqlite3
from importlib.metadata import version
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import asyncpg

from tests.postgres_server import PostgresServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence


@contextlib.contextmanager
def postgres_server(**settings: str) -> Iterator[str]:
    """Yield the URL of the server to use: of ORIS_TEST_POSTGRES_URL, else a private one."""
    given = os.environ.get("ORIS_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    with PostgresServer(durable=True, settings=settings) as server:
        # As a service connects: over TCP, with SCRAM.
        yield server.url()


@contextlib.asynccontextmanager
async def own_database(url: str, purpose: str) -> AsyncIterator[str]:
    """Yield the URL of a new database, so that what one part leaves in the catalog does not slow the next one down."""
    name = f"runtime_bench_{purpose}_{os.getpid()}"
    admin = await asyncpg.connect(url)
    try:
        await admin.execute(f"create database {name}")
        try:
            parts = urlsplit(url)
            yield f"{parts.scheme}://{parts.netloc}/{name}" + (f"?{parts.query}" if parts.query else "")
        finally:
            await admin.execute(f"drop database {name} with (force)")
    finally:
        await admin.close()


def turns(names: Sequence[str], rounds: int) -> list[str]:
    """Return who is next, again and again: back and forth, so that nobody always comes second."""
    return [name for number in range(rounds) for name in (names if number % 2 == 0 else names[::-1])]


def circumstances(server: str, distributions: Sequence[str]) -> str:
    """Return on what was measured: *server* is PostgreSQL's version, *distributions* are the packages that matter."""
    parts = [
        f"Python {platform.python_version()}, {os.cpu_count()} cores, PostgreSQL {server}",
        f"SQLite {sqlite3.sqlite_version}",
        *(f"{name} {version(name)}" for name in ("asyncpg", "aiosqlite", *distributions)),
    ]
    return ", ".join(parts)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return the lines below their head, as Markdown that is aligned."""
    rows = [head, *lines]
    widths = [max(len(row[number]) for row in rows) for number in range(len(head))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )
