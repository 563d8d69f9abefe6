"""Every contract test runs on both backends, through public verbs only."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import pytest

from runtime_repo import RuntimeRepository, api_keys
from tests.place import Place

Factory = Callable[[], RuntimeRepository]


@pytest.fixture
def sqlite_factory(sqlite_place: Place) -> Factory:
    """Makes repositories on one file of the test's own."""
    return sqlite_place.repository


@pytest.fixture
def postgres_factory(postgres_place: Place) -> Factory:
    """Makes repositories on one runtime schema of the test's own."""
    return postgres_place.repository


@pytest.fixture(params=["sqlite", "postgres"])
def factory(request: pytest.FixtureRequest) -> Factory:
    """Makes repositories on the test's database, once for each backend."""
    chosen: Factory = request.getfixturevalue(f"{request.param}_factory")
    return chosen


@pytest.fixture
async def repo(factory: Factory) -> AsyncIterator[RuntimeRepository]:
    """An open repository on a database of its own."""
    async with factory() as repository:
        yield repository


@pytest.fixture(autouse=True)
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets are hashed at a fifth of the cost; whoever tests the cost sets it back."""
    monkeypatch.setattr(api_keys, "_COST", (2**14, 8, 1))


def runtime_schema(repo: RuntimeRepository) -> str:
    """The name, quoted, of the schema that the tables are in."""
    tokens: dict[str, str] = getattr(repo._database, "tokens", {"schema": "main"})
    return tokens["schema"]


async def execute(repo: RuntimeRepository, statement: str) -> None:
    """Run a statement of another program's; ``{schema}`` stands for the runtime schema."""
    async with repo.transaction() as transaction:
        await transaction.connection.execute(statement.replace("{schema}", runtime_schema(repo)))


async def eventually(fact: Callable[[], object]) -> None:
    """Wait until *fact* holds."""
    deadline = time.monotonic() + 10
    while not fact():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


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
