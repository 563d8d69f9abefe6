"""A rival that migrates between any two statements of a boot: every gap in which another process could get ahead."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from runtime_repo import SchemaLockTimeoutError
from runtime_repo.sqlite.connection import Connection, Hop
from tests.lab import Lab, SqliteLab
from tests.place import Place
from tests.versions import NEWEST

FAR = 1_000
"""More statements than any boot runs."""


class Gap:
    """The gap before the *n*-th statement, whoever runs it."""

    def __init__(self, n: int) -> None:
        self._left = n

    @property
    def passed(self) -> bool:
        return self._left < 0

    def due(self) -> bool:
        """Count one statement; true once."""
        self._left -= 1
        return self._left == -1


async def rival(place: Place) -> None:
    """Boot, if the other one does not hold the lock."""
    with contextlib.suppress(SchemaLockTimeoutError):
        async with place.repository(lock_timeout=0):
            pass


def intrude_on_sqlite(patch: pytest.MonkeyPatch, gap: Gap, place: Place) -> None:
    """Let the rival boot on the connection's own thread, which waits for it meanwhile."""
    run = Connection.execute

    def execute(connection: Connection, sql: str, parameters: Any = (), /) -> Any:
        if not isinstance(parameters, Hop) and gap.due():
            asyncio.run(rival(place))
        return run(connection, sql, parameters)

    patch.setattr(Connection, "execute", execute)


def intrude_on_postgres(patch: pytest.MonkeyPatch, gap: Gap, place: Place) -> None:
    """Let the rival boot before asyncpg sends what it was given."""

    def intruded(run: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **options: Any) -> Any:
            if gap.due():
                await rival(place)
            return await run(*args, **options)

        return call

    for name in ("fetch", "fetchval", "execute"):
        patch.setattr(asyncpg.Connection, name, intruded(getattr(asyncpg.Connection, name)))


@pytest.mark.parametrize("version", [0, 1], ids=["fresh", "upgrade"])
async def test_a_rival_may_migrate_between_any_two_statements(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """Half of what is seen may be older than the other half: that is neither foreign nor drift, and nobody fails."""
    winners = []
    for n in range(FAR):
        lab = lab.another()
        await lab.lay(version)
        gap = Gap(n)
        async with lab.nothing_left():
            with monkeypatch.context() as patch:
                (intrude_on_sqlite if isinstance(lab, SqliteLab) else intrude_on_postgres)(patch, gap, lab.place)
                async with lab.repository() as repository:
                    report = repository.boot_report
        assert report.to_version == NEWEST, f"gap {n}"
        assert report.from_version in (version, NEWEST), f"gap {n}"
        winners.append(not report.applied)
        if not gap.passed:
            break
    # The rival got ahead in the first gaps, and came too late in the last.
    assert winners[0]
    assert not winners[-1]
    assert len(winners) > 5
