"""A connection that is lost during boot: everything was rolled back, so the whole try is repeated, a few times."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest

from runtime_repo import DatabaseUnavailableError, SchemaReport
from runtime_repo.catalog import Catalog, Look
from runtime_repo.database import BootTransaction, Database, Lost
from runtime_repo.schema import Policy, ensure_schema, inspect_schema
from tests.lab import Lab
from tests.versions import HISTORY, NEWEST

CAUSE = OSError("reset by peer")


class Losing:
    """A real database whose connection is lost a number of times, at a look or just before a commit."""

    def __init__(self, database: Database, where: str, losses: int) -> None:
        self._database = database
        self._where = where
        self.losses = losses

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    def _lose(self, where: str) -> None:
        if where == self._where and self.losses:
            self.losses -= 1
            error = DatabaseUnavailableError("it is gone")
            error.__cause__ = CAUSE
            raise Lost from error

    async def open(self, shipped: Sequence[Catalog]) -> Look:
        self._lose("look")
        return await self._database.open(shipped)

    async def inspect(self, shipped: Sequence[Catalog]) -> Look:
        self._lose("look")
        return await self._database.inspect(shipped)

    @contextlib.asynccontextmanager
    async def lock(self) -> AsyncIterator[BootTransaction]:
        async with self._database.lock() as transaction:
            yield transaction
            self._lose("commit")


async def boot(lab: Lab, where: str, losses: int, policy: Policy) -> tuple[SchemaReport, int]:
    """Boot, and say how many losses it was spared."""
    async with lab.opened() as database:
        losing = Losing(database, where, losses)
        return await ensure_schema(cast(Database, losing), lab.migrations, policy), losing.losses


@pytest.mark.parametrize("where", ["look", "commit"])
@pytest.mark.parametrize("version", [0, 1])
async def test_a_lost_connection_is_tried_again(lab: Lab, where: str, version: int) -> None:
    """From a fresh look on; what was applied was rolled back, and the operator's own step is not repeated."""
    await lab.reach(version)
    steps: list[None] = []

    async def step() -> None:
        steps.append(None)

    report, left = await boot(lab, where, 3, Policy(before_migrate=step))
    assert left == 0
    assert (report.from_version, report.to_version, len(report.applied)) == (version, NEWEST, NEWEST - version)
    assert await lab.recorded() == HISTORY
    assert len(steps) == 1


@pytest.mark.parametrize("where", ["look", "commit"])
@pytest.mark.parametrize("lock_timeout", [0, 60])
async def test_who_loses_every_connection_is_told_why(lab: Lab, where: str, lock_timeout: float) -> None:
    """After a handful of tries, or when no time is left, the error of the last one comes out, with the driver's."""
    await lab.reach(1)
    before = (await lab.snapshot()).content
    with pytest.raises(DatabaseUnavailableError, match="it is gone") as caught:
        await boot(lab, where, 1000, Policy(lock_timeout=lock_timeout))
    assert caught.value.__cause__ is CAUSE
    assert (await lab.snapshot()).content == before


async def test_an_inspection_is_tried_again_too(lab: Lab) -> None:
    """It only reads."""
    await lab.reach(NEWEST)
    async with lab.opened() as database:
        status = await inspect_schema(cast(Database, Losing(database, "look", 2)), lab.migrations, Policy())
        assert status.refusal is None
        with pytest.raises(DatabaseUnavailableError):
            await inspect_schema(cast(Database, Losing(database, "look", 1000)), lab.migrations, Policy())
