"""
What tests of faults share: patience, and servers of their own for what the shared one cannot bear.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from runtime_repo import RuntimeRepository
from tests.lab import PostgresLab
from tests.postgres_server import PostgresServer


async def eventually(fact: Callable[[], Awaitable[object]], seconds: float = 10) -> None:
    """Wait until *fact* holds; what has been asked for takes a moment to be seen."""
    deadline = time.monotonic() + seconds
    while not await fact():
        assert time.monotonic() < deadline, f"it did not happen in {seconds} s"
        await asyncio.sleep(0.005)


async def still_waits(task: "asyncio.Task[Any]") -> None:
    """Give *task* some turns in which it could wrongly end."""
    done, _ = await asyncio.wait([task], timeout=0.15)
    assert not done, f"it did not wait: {task!r}"


@asynccontextmanager
async def closing(repository: RuntimeRepository) -> AsyncIterator[RuntimeRepository]:
    """Close it in the end without booting it first: a test that fails must not disturb those that follow."""
    try:
        yield repository
    finally:
        await repository.close()


POSTGRES_ONLY = [pytest.param(None, id="postgres_schema_migration")]
"""For a fixture with a server of the tests' own."""


@pytest.fixture(params=POSTGRES_ONLY)
def new_server(request: pytest.FixtureRequest) -> Iterator[Callable[..., PostgresServer]]:
    """Starts servers of the test's own, for what the shared one cannot bear. Fails or skips as the shared one does."""
    request.getfixturevalue("postgres_server")
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(PostgresServer(**options))


@asynccontextmanager
async def lab_on(server: PostgresServer, schema: str = "runtime") -> AsyncIterator[PostgresLab]:
    """A lab on a server of the test's own."""
    admin = await asyncpg.connect(server.url())
    try:
        yield PostgresLab(server.url(), schema, admin)
    finally:
        await admin.close()


def in_ci() -> bool:
    """Whether what is missing here must not go unnoticed."""
    return os.environ.get("CI", "").lower() in {"true", "1"}
