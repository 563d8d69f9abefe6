"""Connecting at boot: what may pass is tried again until startup_timeout, what cannot is said at once."""

import asyncio
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import asyncpg
import pytest

from runtime_repo import DatabaseUnavailableError, PostgresRuntimeRepository
from tests.faults.conftest import closing, eventually, lab_on
from tests.lab import PostgresLab, on_postgres
from tests.place import Place
from tests.postgres_server import PostgresServer
from tests.versions import NEWEST

TIMEOUT = 0.3


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts the tries at connecting."""
    connect = Mock(wraps=asyncpg.connect)
    monkeypatch.setattr(asyncpg, "connect", connect)
    return connect


async def tried_again(tries: Mock) -> None:
    """Wait until connecting has failed and was tried once more."""

    async def again() -> bool:
        return tries.call_count >= 2

    await eventually(again)


async def test_a_server_that_starts_meanwhile_is_waited_for(
    new_server: Callable[..., PostgresServer], tries: Mock
) -> None:
    """A worker may be started before its database."""
    server = new_server()
    place = Place("postgres", server.url(), "runtime")
    await asyncio.to_thread(server.stop, keep=True)
    async with closing(place.repository(startup_timeout=60)) as repository:
        boot = asyncio.ensure_future(repository.ensure_schema())
        await tried_again(tries)
        await asyncio.to_thread(server.start)
        assert (await asyncio.wait_for(boot, 10)).to_version == NEWEST


async def test_a_full_server_is_waited_for(new_server: Callable[..., PostgresServer], tries: Mock) -> None:
    """Others leave, as they do after a deployment."""
    settings = {"max_connections": "5", "superuser_reserved_connections": "0", "max_wal_senders": "0"}
    server = new_server(settings=settings)
    others = [await asyncpg.connect(server.url()) for _ in range(5)]
    place = Place("postgres", server.url(), "runtime")
    async with closing(place.repository(startup_timeout=60)) as repository:
        boot = asyncio.ensure_future(repository.ensure_schema())
        await tried_again(tries)
        for other in others:
            await other.close()
        assert (await asyncio.wait_for(boot, 10)).to_version == NEWEST


@on_postgres
@pytest.mark.parametrize("how", ["refused", "silent", "unknown name"])
async def test_an_unreachable_server_is_given_up_in_time(lab: PostgresLab, how: str) -> None:
    """Whether it refuses, says nothing or cannot be found: one clear error in about startup_timeout, nothing left."""
    connected: list[asyncio.StreamWriter] = []

    async def say_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(writer)

    async with lab.nothing_left():
        listener = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        if how != "silent":
            listener.close()
            await listener.wait_closed()
        host = "no-such-host.invalid" if how == "unknown name" else "127.0.0.1"
        repository = PostgresRuntimeRepository(f"postgresql://{host}:{port}/runtime", startup_timeout=TIMEOUT)
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailableError, match="can be reached"):
            await repository
        assert TIMEOUT / 3 < time.monotonic() - began < TIMEOUT + 2
        for writer in connected:
            writer.close()
        listener.close()
        await listener.wait_closed()


@on_postgres
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"password": "wrong"}, "check the user and the password"),
        ({"user": "nobody_known", "password": "any"}, "check the user and the password"),
        ({"database": "nowhere"}, "create the database"),
    ],
    ids=["password", "user", "database"],
)
async def test_what_waiting_cannot_mend_fails_at_once(
    lab: PostgresLab, postgres_server: PostgresServer, tries: Mock, target: dict[str, str], words: str
) -> None:
    """One try, and a remedy; the password is not shown."""
    place = Place("postgres", postgres_server.url(**target), lab.place.schema)
    with pytest.raises(DatabaseUnavailableError, match=words) as caught:
        await place.repository(startup_timeout=60)
    assert tries.call_count == 1
    assert "wrong" not in str(caught.value)


@on_postgres
async def test_a_machine_without_a_descriptor_or_a_thread_left_is_waited_for(
    lab: PostgresLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others of its processes end: that is an outage like any other."""
    troubles: list[Exception] = [OSError(24, "Too many open files"), RuntimeError("can't start new thread")]
    connect = asyncpg.connect

    async def meet_trouble(*args: Any, **options: Any) -> Any:
        if troubles:
            raise troubles.pop()
        return await connect(*args, **options)

    monkeypatch.setattr(asyncpg, "connect", meet_trouble)
    async with lab.repository(startup_timeout=20) as repository:
        assert repository.boot_report.to_version == NEWEST
    assert not troubles


async def test_a_server_that_went_away_and_came_back_is_booted_again(
    new_server: Callable[..., PostgresServer],
) -> None:
    """A crash between boot and the next look costs an error, not the repository."""
    server = new_server(durable=True)
    async with lab_on(server) as lab:
        repository = await lab.repository(startup_timeout=TIMEOUT)
    async with closing(repository):
        await asyncio.to_thread(server.crash)
        with pytest.raises(DatabaseUnavailableError):
            await repository.ensure_schema()
        await asyncio.to_thread(server.start)
        report = await repository.ensure_schema()
        assert (report.from_version, report.applied) == (NEWEST, ())
        assert await repository.attempts.find("a") is None
