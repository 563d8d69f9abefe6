"""Every contract test runs on both backends, through public verbs only."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from runtime_repo import PostgresRuntimeRepository, RuntimeRepository, SqliteRuntimeRepository


@pytest.fixture
async def sqlite_repo(tmp_path: Path) -> AsyncIterator[RuntimeRepository]:
    """An open repository on a file of its own."""
    async with SqliteRuntimeRepository(tmp_path / "runtime.db") as repository:
        yield repository


@pytest.fixture
async def postgres_repo(postgres_url: str, postgres_schema: str) -> AsyncIterator[RuntimeRepository]:
    """An open repository on a runtime schema of its own."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema) as repository:
        yield repository


@pytest.fixture(params=["sqlite", "postgres"])
def repo(request: pytest.FixtureRequest) -> RuntimeRepository:
    """An open repository, once for each backend."""
    repository: RuntimeRepository = request.getfixturevalue(f"{request.param}_repo")
    return repository


class Clock:
    """The time that a test passes to the verbs instead of waiting for it."""

    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)

    def advance(self, span: timedelta) -> datetime:
        """Move on, and tell the time."""
        self.now += span
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock of the test's own."""
    return Clock()
