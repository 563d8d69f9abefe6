"""A PostgreSQL that falls silent: it answers nothing and closes nothing, and that ends no more than a call."""

import ast
import asyncio
import contextlib
import functools
import gc
import inspect
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import asyncpg
import pytest

import runtime_repo
from runtime_repo import (
    ConfigurationError,
    DatabaseUnavailableError,
    Lease,
    PostgresRuntimeRepository,
    RepositoryClosedError,
)
from runtime_repo.database import Lost
from runtime_repo.leases import Leases
from runtime_repo.postgres import PostgresDatabase, Target, connections, heartbeats
from runtime_repo.postgres import target as targets
from runtime_repo.schema import load_migrations
from runtime_repo.shielding import finish, settle
from tests.contract.conftest import eventually

CATALOGS = [migration.catalog for migration in load_migrations("postgres")]

SOON = 2.5
"""Seconds within which whoever gives up has left, whatever the server does."""

Make = Callable[..., PostgresRuntimeRepository]


class Relay:
    """The network between us and the server, which can be cut without a word."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._there = (parts.hostname, parts.port)
        self._user = parts.netloc.rpartition("@")[0]
        self._path = parts.path
        self._links: list[list[bool]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self.port = 0
        self.is_silent = False
        self.silent_at: bytes | None = None
        """What has to be said for a connection to be dead from then on."""

    @property
    def url(self) -> str:
        """The database, by way of this."""
        return f"postgresql://{self._user}@127.0.0.1:{self.port}{self._path}"

    @property
    def links(self) -> int:
        """How many connections there are that are alive."""
        return sum(not dead for (dead,) in self._links)

    def cut(self) -> None:
        """Kill the connections that are open; new ones work."""
        for link in self._links:
            link[0] = True

    def fall_silent(self) -> None:
        """Kill those that are open, and all that are made from now on."""
        self.cut()
        self.is_silent = True

    def work(self) -> None:
        """Let new connections work. Those that were killed stay dead."""
        self.is_silent = False

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection."""
        self._tasks.add(asyncio.ensure_future(self._forward(reader, writer)))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = [self.is_silent]
        self._links.append(link)
        self._writers.append(writer)
        there, back = await asyncio.open_connection(*self._there)
        self._writers.append(back)
        await asyncio.gather(self._pump(link, reader, back), self._pump(link, there, writer), return_exceptions=True)
        self._links.remove(link)

    async def _pump(self, link: list[bool], source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await self._pour(link, source, sink)
        if not link[0]:
            sink.close()

    async def _pour(self, link: list[bool], source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if self.silent_at is not None and self.silent_at in data:
                link[0] = True
            if not link[0] and not self.is_silent:
                sink.write(data)

    async def close(self) -> None:
        """Leave nothing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()


@contextlib.asynccontextmanager
async def relayed(url: str) -> AsyncIterator[Relay]:
    """A relay that runs."""
    relay = Relay(url)
    server = await asyncio.start_server(relay.accept, "127.0.0.1", 0)
    relay.port = server.sockets[0].getsockname()[1]
    yield relay
    server.close()
    await relay.close()


@pytest.fixture
async def relay(postgres_url: str, postgres_schema: str) -> AsyncIterator[Relay]:  # noqa: ARG001 - dropped after it
    """A network of the test's own."""
    async with relayed(postgres_url) as relay:
        yield relay


@pytest.fixture
async def other(postgres_url: str) -> AsyncIterator[Relay]:
    """The way to a second host."""
    async with relayed(postgres_url) as relay:
        yield relay


@pytest.fixture
async def make(relay: Relay, postgres_schema: str) -> AsyncIterator[Make]:
    """Makes repositories by way of the relay, and closes them in the end."""
    async with contextlib.AsyncExitStack() as stack:

        def make(**options: Any) -> PostgresRuntimeRepository:
            repo = PostgresRuntimeRepository(relay.url, schema=postgres_schema, **options)
            stack.push_async_callback(repo.close)
            return repo

        yield make


@contextlib.contextmanager
def within(seconds: float) -> Any:
    """Prove that the block takes no longer."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"it took {took:.1f} s"


async def upsert(repo: PostgresRuntimeRepository) -> object:
    """A verb."""
    return await repo.jobs.upsert("thread", "running")


async def claim(repo: PostgresRuntimeRepository) -> object:
    """A verb that gives back what it may have got when it is cancelled, over a connection that is as dead."""
    return await repo.leases.claim("worker")


async def transact(repo: PostgresRuntimeRepository) -> object:
    """Several verbs."""
    async with repo.transaction() as transaction:
        return await transaction.jobs.upsert("thread", "running")


Verb = Callable[[PostgresRuntimeRepository], Awaitable[object]]


@pytest.mark.parametrize(
    ("how", "verb"),
    [
        *(("asyncio.timeout", upsert), ("task.cancel", upsert), ("anyio scope", transact)),
        *(("asyncio.timeout", claim), ("anyio scope", claim)),
    ],
)
async def test_who_gives_up_leaves_soon(relay: Relay, make: Make, verb: Verb, how: str) -> None:
    """The clean-up waits for a server that answers, and not for one that does not."""
    repo = await make()
    await verb(repo)
    await asyncio.sleep(0.02)  # until the pool has its connection back
    relay.fall_silent()
    with within(0.1 + SOON):
        if how == "asyncio.timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await verb(repo)
        elif how == "task.cancel":
            task = asyncio.ensure_future(verb(repo))
            await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
        else:
            with anyio.move_on_after(0.1) as scope:
                await verb(repo)
            assert scope.cancelled_caught


@pytest.mark.parametrize("verb", [upsert, transact])
async def test_a_verb_without_an_answer_is_an_outage_after_its_time(relay: Relay, make: Make, verb: Verb) -> None:
    """Nobody has to set a time-out for that."""
    repo = await make(verb_timeout=0.2)
    await verb(repo)
    relay.fall_silent()
    with within(0.2 + SOON), pytest.raises(DatabaseUnavailableError, match=r"within 0\.2 s \(verb_timeout\)"):
        await verb(repo)


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_a_transaction_that_cannot_end_ends(relay: Relay, make: Make, end: str) -> None:
    """The block's own error goes through where it was to be rolled back."""
    repo = await make(verb_timeout=0.2)

    async def block() -> None:
        async with repo.transaction() as transaction:
            await transaction.jobs.upsert("thread", "running")
            relay.fall_silent()
            if end == "rollback":
                raise KeyError(end)

    kind = KeyError if end == "rollback" else DatabaseUnavailableError
    with within(0.2 + SOON), pytest.raises(kind):
        await block()


async def test_closing_does_not_wait_for_a_silent_server(relay: Relay, make: Make) -> None:
    """Not for all that it has open together: one that listens, one for heartbeats, the pool, and news to tell."""
    repo = await make()
    task = asyncio.ensure_future(repo.attempts.wait())
    await asyncio.sleep(0.1)
    await (await repo._database.heartbeats()).fetch("attempts.find", "a")
    await repo.attempts.find("a")
    assert relay.links >= 3
    relay.fall_silent()
    repo._database.tell(["mail"])
    await asyncio.sleep(0.05)
    with within(SOON):
        await repo.close()
    await asyncio.wait([task], timeout=5)
    assert task.exception()
    assert [each for each in asyncio.all_tasks() if each.get_name().startswith("runtime_repo")] == []


@pytest.mark.parametrize("given", [False, True], ids=["ours", "given"])
async def test_a_verb_works_again_as_soon_as_a_new_connection_does(
    relay: Relay, make: Make, postgres_schema: str, *, given: bool
) -> None:
    """One that was silent is dropped, and of a pool of ours the idle ones with it: they may be as dead."""
    async with contextlib.AsyncExitStack() as stack:
        pool = (
            await stack.enter_async_context(asyncpg.create_pool(relay.url, min_size=0, max_size=5)) if given else None
        )
        repo = PostgresRuntimeRepository(pool, schema=postgres_schema) if pool else make()
        await stack.enter_async_context(repo)
        await asyncio.gather(*(transact(repo) for _ in range(4 if not given else 1)))
        relay.cut()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await upsert(repo)
        for _ in range(6):
            with within(SOON):
                await upsert(repo)


@pytest.mark.parametrize("verb", [upsert, transact, claim])
async def test_what_waits_for_an_answer_that_was_lost_is_told(
    relay: Relay, make: Make, monkeypatch: pytest.MonkeyPatch, verb: Verb
) -> None:
    """As soon as a new connection works the server is asked, and says that it does nothing there."""
    quickly(monkeypatch)
    repo = await make(verb_timeout=None)
    await verb(repo)
    await asyncio.sleep(0.02)
    relay.fall_silent()
    lost = asyncio.ensure_future(verb(repo))
    _, waiting = await asyncio.wait([lost], timeout=0.5)
    assert waiting
    relay.work()
    with within(5), pytest.raises(DatabaseUnavailableError):
        await lost
    with within(SOON):
        await verb(repo)


async def test_what_waits_for_a_lock_goes_on_waiting(
    make: Make, monkeypatch: pytest.MonkeyPatch, postgres: asyncpg.Connection, postgres_schema: str
) -> None:
    """The server says that it is at work on it, however often it is asked."""
    quickly(monkeypatch)
    repo = await make()
    await upsert(repo)
    async with postgres.transaction():
        await postgres.execute(f"lock table {postgres_schema}.runtime_jobs in access exclusive mode")
        waiting = asyncio.ensure_future(upsert(repo))
        await asyncio.sleep(0.6)
        assert not waiting.done()
    await waiting


def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is overdue be asked about soon."""
    monkeypatch.setattr(connections, "_WATCH", 0.05)
    monkeypatch.setattr(connections, "_OVERDUE", 0.1)
    monkeypatch.setattr(connections, "GRACE", 0.1)
    monkeypatch.setattr(targets, "_TRY", 0.2)


async def test_a_silent_look_ends_with_the_startup_timeout(relay: Relay, make: Make) -> None:
    """The connection was made, and then says nothing: tried again on another, which is as silent."""
    relay.silent_at = b"runtime_schema_migrations"
    repo = make(startup_timeout=1)
    with within(1 + 2 * SOON), pytest.raises(DatabaseUnavailableError):
        await repo
    relay.silent_at = None
    await repo
    assert await repo.attempts.find("a") is None


@contextlib.asynccontextmanager
async def opened(relay: Relay, schema: str) -> AsyncIterator[PostgresDatabase]:
    """The port below a boot that is under way."""
    opened = PostgresDatabase(Target(relay.url, {}), schema=schema, startup_timeout=4)
    try:
        await opened.open(CATALOGS)
        yield opened
    finally:
        await opened.close()


async def test_a_connection_that_is_lost_during_a_look_may_be_made_anew(relay: Relay, postgres_schema: str) -> None:
    """Boot is told apart what may be tried again from what has taken all of the startup_timeout."""
    async with opened(relay, postgres_schema) as boot:
        relay.cut()
        with within(2 + 1), pytest.raises(Lost) as caught:
            await boot.open(CATALOGS)
        assert isinstance(caught.value.__cause__, DatabaseUnavailableError)
        assert not (await boot.open(CATALOGS)).catalog.tables


async def test_a_connection_that_is_lost_under_the_lock_has_rolled_back(
    relay: Relay, postgres_schema: str, postgres: asyncpg.Connection
) -> None:
    """So the whole try may be repeated on another."""
    async with opened(relay, postgres_schema) as boot:

        async def migrate() -> None:
            async with boot.lock() as transaction:
                await transaction.execute("schema.create_namespace")
                own = boot._connections._own
                assert own is not None
                await postgres.fetch("select pg_terminate_backend($1)", own.get_server_pid())
                await transaction.execute("schema.create_ledger")

        with pytest.raises(Lost) as caught:
            await migrate()
        assert isinstance(caught.value.__cause__, DatabaseUnavailableError)
        assert not (await boot.open(CATALOGS)).namespace
        async with boot.lock():
            pass


async def test_a_migration_whose_answer_was_lost_is_not_waited_for(
    relay: Relay, postgres_schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under no limit, but the server says that it is at work on nothing."""
    quickly(monkeypatch)

    async def migrate(boot: PostgresDatabase) -> None:
        async with boot.lock() as transaction:
            relay.cut()
            await transaction.execute("schema.create_namespace")

    async with opened(relay, postgres_schema) as boot:
        with within(5), pytest.raises(Lost):
            await migrate(boot)


async def test_a_migration_that_is_cancelled_while_the_server_is_silent_ends(relay: Relay, make: Make) -> None:
    """Under no limit of ours, but whoever gives up leaves."""
    relay.silent_at = b"create table"
    repo = make(startup_timeout=60)
    boot = asyncio.ensure_future(repo.ensure_schema())
    await asyncio.sleep(0.3)
    assert not boot.done()
    boot.cancel()
    with within(2 * SOON):
        await asyncio.wait([boot])


@contextlib.asynccontextmanager
async def silent_host() -> AsyncIterator[int]:
    """The port of a server that accepts and says nothing."""
    writers = []

    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for writer in writers:
        writer.close()


@pytest.mark.parametrize(
    ("form", "wanted"),
    [("netloc", None), ("query", "read-write"), ("options", "prefer-standby"), ("netloc", "prefer-standby")],
)
async def test_of_several_hosts_a_silent_one_is_passed_over(
    postgres_url: str, postgres_schema: str, form: str, wanted: str | None
) -> None:
    """Each has its share of startup_timeout, also where the driver would look for a standby first."""
    parts = urlsplit(postgres_url)
    user = parts.netloc.rpartition("@")[0]
    async with silent_host() as silent:
        ports = [silent, parts.port]
        options: dict[str, Any] = {} if wanted is None else {"target_session_attrs": wanted}
        if form == "netloc":
            dsn = f"postgresql://{user}@" + ",".join(f"127.0.0.1:{port}" for port in ports) + parts.path
        elif form == "query":
            dsn = f"postgresql://{user}@{parts.path}?host=127.0.0.1,127.0.0.1&port={silent},{parts.port}"
        else:
            dsn = f"postgresql://{user}@{parts.path}"
            options |= {"host": ["127.0.0.1", "127.0.0.1"], "port": ports}
        with within(2 * SOON):
            async with PostgresRuntimeRepository(dsn, schema=postgres_schema, startup_timeout=1.5, **options) as repo:
                assert await repo.attempts.find("a") is None


@contextlib.asynccontextmanager
async def two_hosts(first: Relay, second: Relay, schema: str) -> AsyncIterator[PostgresRuntimeRepository]:
    """Open by way of the first."""
    dsn = first.url.replace(f":{first.port}", f":{first.port},127.0.0.1:{second.port}")
    async with PostgresRuntimeRepository(dsn, schema=schema) as repo:
        assert (first.links, second.links) == (1, 0)
        yield repo


async def claim_again_and_again(repo: PostgresRuntimeRepository, patience: float) -> None:
    """As a worker does, until it is answered."""
    async with asyncio.timeout(15):
        while True:
            with contextlib.suppress(TimeoutError, DatabaseUnavailableError):
                async with asyncio.timeout(patience):
                    await repo.leases.claim("worker")
                    return


@pytest.mark.parametrize(
    ("patience", "seconds"),
    [
        # A try on the silent connection and its clean-up, then the first host has what patience it gets.
        pytest.param(2.0, 2.0 + SOON + targets._NEXT_TRY, id="enough for both"),
        pytest.param(0.5, 0.5 + SOON + 1.0, id="too little for one"),
    ],
)
async def test_whoever_has_little_time_reaches_the_second_host(
    relay: Relay, other: Relay, postgres_schema: str, monkeypatch: pytest.MonkeyPatch, patience: float, seconds: float
) -> None:
    """The first falls silent; it is left alone for a while, and then it is the first again."""
    async with two_hosts(relay, other, postgres_schema) as repo:
        relay.fall_silent()
        with within(seconds):
            await claim_again_and_again(repo, patience)
        relay.work()
        async with busy(repo, 4):
            assert relay.links == 0
        monkeypatch.setattr(targets, "_SILENT_FOR", 0.0)
        async with busy(repo, 6):
            assert relay.links > 0


async def write_read_only(repo: PostgresRuntimeRepository) -> None:
    """As if the connection led to a standby."""
    async with repo.transaction() as transaction:
        await transaction.connection.execute("set transaction read only")
        await transaction.jobs.upsert("thread", "running")


async def test_a_server_that_is_read_only_is_not_preferred(relay: Relay, other: Relay, postgres_schema: str) -> None:
    """It may be the standby of the one that was silent for a moment."""
    async with two_hosts(relay, other, postgres_schema) as repo:
        relay.fall_silent()
        await claim_again_and_again(repo, 0.5)
        relay.work()
        with pytest.raises(DatabaseUnavailableError, match="read-only"):
            await write_read_only(repo)
        await upsert(repo)
        assert (relay.links, other.links) == (1, 0)


async def test_a_lease_outlives_the_silence_of_the_first_host(relay: Relay, other: Relay, postgres_schema: str) -> None:
    """The heartbeats have reached the second by the time that the lease has to be renewed."""
    async with two_hosts(relay, other, postgres_schema) as repo:
        await repo.attempts.enqueue("run")
        (lease,) = await repo.leases.claim("worker", ttl=timedelta(seconds=3))
        async with repo.leases.hold(lease, ttl=timedelta(seconds=3)):
            # The first heartbeat connects.
            await asyncio.sleep(1.5)
            relay.fall_silent()
            await asyncio.sleep(3.5)
        assert other.links


async def test_a_slow_server_of_several_is_given_more_and_more_time() -> None:
    """Where none of them answers in time, they may all be slow rather than silent."""
    target = Target("postgresql://a,b/db", {})
    assert target.patience(60) == targets._TRY
    target._vain = 0
    assert [target.patience(60), target.patience(60, hurried=True)] == [1.25, 0.5]
    async with silent_host() as silent:
        target = Target(f"postgresql://127.0.0.1:{silent},127.0.0.1:{silent}/db", {})
        target._vain = 0
        for expected in [(2.5, 1.0), (5.0, 2.0), (5.0, 4.0), (5.0, 5.0), (5.0, 5.0)]:
            with pytest.raises(TimeoutError):
                await target.lend(0.01)
            assert (target.patience(60), target.patience(60, hurried=True)) == expected
    target._vain = 1
    with pytest.raises(ConnectionRefusedError):
        await target.lend(1)
    assert target._vain == 1


async def test_who_connects_later_need_not_find_out_for_himself(
    relay: Relay, other: Relay, postgres_schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the first host is silent, unless none has answered for a while: then each has all of its time."""
    monkeypatch.setattr(targets, "_HURRIED_TRY", 0.1)
    async with two_hosts(relay, other, postgres_schema) as repo:
        assert isinstance(repo._database, PostgresDatabase)
        target = repo._database._target
        relay.fall_silent()
        for vain, least, most in [(0, 0.1, 0.9), (1, 0.95, 3.0)]:
            target.forget_silence()
            target._vain = vain
            one = asyncio.ensure_future(target.lend(0.3))
            await asyncio.sleep(0.15)
            began = time.monotonic()
            later = await target.lend(1)
            assert least < time.monotonic() - began < most
            await asyncio.gather((await one).close(), later.close())


async def test_a_silent_host_does_not_take_all_of_the_startup_timeout(relay: Relay, make: Make) -> None:
    """It is tried again, for it may be there by then."""
    relay.is_silent = True
    boot = asyncio.ensure_future(make(startup_timeout=2).ensure_schema())
    await asyncio.sleep(0.1)
    relay.work()
    async with asyncio.timeout(1.9):
        await boot


async def test_the_last_try_to_connect_begins_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that comes up just in time is reached."""
    tries = []
    connect = asyncpg.connect

    async def counted(*args: Any, **options: Any) -> Any:
        tries.append(time.monotonic())
        return await connect(*args, **options)

    monkeypatch.setattr(asyncpg, "connect", counted)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailableError, match="Connect call failed"):
            await PostgresRuntimeRepository(f"postgresql://127.0.0.1:{taken.getsockname()[1]}/db", startup_timeout=0.7)
    assert len(tries) > 2
    assert 0.69 < tries[-1] - began < 0.9


@pytest.mark.parametrize("given", [False, True], ids=["ours", "given"])
async def test_every_socket_is_kept_alive(postgres_url: str, postgres_schema: str, *, given: bool) -> None:
    """The system notices a peer that is gone, which the driver alone never would."""
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(asyncpg.create_pool(postgres_url, min_size=0)) if given else None
        repo = await stack.enter_async_context(PostgresRuntimeRepository(pool or postgres_url, schema=postgres_schema))
        async with repo.transaction() as transaction:
            found = transaction.connection._transport.get_extra_info("socket")
            assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            for name, value in [("TCP_KEEPIDLE", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 15_000)]:
                if hasattr(socket, name):
                    assert found.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


def leases(queries: Any) -> Leases:
    """The verbs on leases, by way of *queries*."""
    return Leases(queries)


async def a_lease(repo: PostgresRuntimeRepository) -> Lease:
    """One that is held."""
    await repo.attempts.enqueue("run")
    (lease,) = await repo.leases.claim("worker", ttl=timedelta(seconds=30))
    return lease


@contextlib.asynccontextmanager
async def busy(repo: PostgresRuntimeRepository, number: int) -> AsyncIterator[None]:
    """So many tasks have a transaction open meanwhile."""
    over, ready = asyncio.Event(), asyncio.Barrier(number + 1)

    async def hold() -> None:
        async with repo.transaction():
            await ready.wait()
            await over.wait()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(number):
            tasks.create_task(hold())
        try:
            await ready.wait()
            yield
        finally:
            over.set()


@pytest.mark.parametrize("given", [False, True], ids=["ours", "given"])
async def test_heartbeats_do_not_wait_behind_transactions(
    postgres_url: str, postgres_schema: str, *, given: bool
) -> None:
    """Ten handlers hold all that the pool can lend, and their leases are renewed all the same."""
    async with contextlib.AsyncExitStack() as stack:
        pool = await stack.enter_async_context(asyncpg.create_pool(postgres_url, min_size=0)) if given else None
        repo = await stack.enter_async_context(PostgresRuntimeRepository(pool or postgres_url, schema=postgres_schema))
        lease = await a_lease(repo)
        kept = leases(await repo._database.heartbeats())
        await stack.enter_async_context(busy(repo, 9 if given else 10))
        for _ in range(10):
            with within(2):
                lease = await kept.heartbeat(lease)


async def test_a_silent_heartbeat_is_given_up_at_once(relay: Relay, make: Make) -> None:
    """Its caller has no time to lose, and the next one goes by a new connection."""
    repo = await make()
    lease = await a_lease(repo)
    kept = leases(await repo._database.heartbeats())
    await kept.heartbeat(lease)
    relay.cut()
    with within(0.1 + 0.9), pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await kept.heartbeat(lease)
    with within(SOON):
        await kept.heartbeat(lease)


async def test_a_connection_that_is_being_made_outlives_whoever_gives_up(
    postgres_url: str, postgres_schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heartbeats in a hurry would each begin anew and never have one; whoever has waited for long does begin anew."""
    made = 0
    answers = asyncio.Event()
    answers.set()

    async def connect(*args: Any, **options: Any) -> asyncpg.Connection:
        nonlocal made
        made += 1
        await answers.wait()
        return await asyncpg.connect(*args, **options)

    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema, connect=connect) as repo:
        lease = await a_lease(repo)
        assert isinstance(repo._database, PostgresDatabase)
        beats = repo._database._connections.heartbeats
        kept = leases(beats)
        made = 0
        for suspect, expected in [(60.0, 1), (0.01, 3)]:
            answers.clear()
            monkeypatch.setattr(heartbeats, "SUSPECT", suspect)
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await asyncio.gather(*(kept.heartbeat(lease) for _ in range(3)))
                if suspect < 1:
                    break
            answers.set()
            await kept.heartbeat(lease)
            assert made == expected
            beats.drop()
        answers.clear()
        waiting = asyncio.ensure_future(kept.heartbeat(lease))
        await asyncio.sleep(0.01)
        with within(SOON):
            await repo.close()
            with pytest.raises(RepositoryClosedError):
                await waiting
    assert [each for each in asyncio.all_tasks() if each.get_name().startswith("runtime_repo")] == []


async def test_a_heartbeat_that_was_just_answered_is_not_given_up_for_another_connection(
    relay: Relay, make: Make
) -> None:
    """One that was silent for as long as a clean-up may take says nothing of what has been answered since."""
    repo = await make()
    lease = await a_lease(repo)
    assert isinstance(repo._database, PostgresDatabase)
    beats = repo._database._connections.heartbeats
    kept = leases(beats)
    await kept.heartbeat(lease)
    before = beats._connection
    relay.cut()
    repo._database._connections.fell_silent()
    assert beats._connection is before
    beats._answered_at -= 60
    repo._database._connections.fell_silent()
    with within(SOON):
        await kept.heartbeat(lease)


async def test_a_look_is_repeated_when_another_connection_was_silent(relay: Relay, make: Make) -> None:
    """It only reads, so nobody has to wait until it is known that its own connection is as dead."""
    repo = await make()
    await upsert(repo)
    await asyncio.sleep(0.02)
    assert isinstance(repo._database, PostgresDatabase)
    relay.cut()
    look = asyncio.ensure_future(repo._database.glance("attempts.next", '["default"]', within=3))
    await asyncio.sleep(0.1)
    repo._database._connections.fell_silent()
    with within(2):
        assert await look


async def test_what_was_made_since_is_not_dropped_for_another_connections_silence(relay: Relay, make: Make) -> None:
    """It has shown that it works."""
    repo = await make()
    async with busy(repo, 3):
        pass
    assert isinstance(repo._database, PostgresDatabase)
    repo._database._connections.fell_silent()
    await asyncio.sleep(0.05)
    assert relay.links == 3
    for made in repo._database._connections._made:
        repo._database._connections._made[made] -= 60
    repo._database._connections.fell_silent()
    await eventually(lambda: not relay.links)


@pytest.mark.parametrize("steps", range(8))
async def test_who_gives_up_while_connecting_leaves_nothing_to_the_log(
    postgres_url: str, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    """In whichever of its first steps: the driver would leave a future behind that nobody asks, or an open socket."""
    target = Target(postgres_url, {})
    connecting = asyncio.ensure_future(target.lend(5))
    for _ in range(steps):
        await asyncio.sleep(0)
    connecting.cancel()
    with within(SOON), pytest.raises(asyncio.CancelledError):
        await connecting
    await target.close(1)
    await asyncio.sleep(0)
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
    assert [each for each in asyncio.all_tasks() if each.get_name().startswith("runtime_repo")] == []


async def test_a_pool_of_one_cannot_have_heartbeats(postgres_url: str, postgres_schema: str) -> None:
    """It is refused by its size: they would wait behind every transaction."""
    async with (
        asyncpg.create_pool(postgres_url, min_size=0, max_size=1) as pool,
        PostgresRuntimeRepository(pool, schema=postgres_schema) as repo,
    ):
        with pytest.raises(ConfigurationError, match=r"max_size=1.*expected a pool of 2 or more"):
            await repo._database.heartbeats()


async def test_waiting_for_a_connection_of_the_pool_is_bounded(postgres_url: str, postgres_schema: str) -> None:
    """The error says how many there are and what to do."""
    repo = PostgresRuntimeRepository(postgres_url, schema=postgres_schema, max_size=2, verb_timeout=0.3)
    async with repo, busy(repo, 2):
        with within(2), pytest.raises(DatabaseUnavailableError, match=r"none of the pool's 2 connections.*max_size"):
            await upsert(repo)


async def test_a_cancelled_query_has_ended_before_the_next_begins(postgres_url: str, postgres_schema: str) -> None:
    """On a server that answers, whoever cancels still waits for that."""
    async with PostgresRuntimeRepository(postgres_url, schema=postgres_schema, max_size=1) as repo:
        for _ in range(20):
            task = asyncio.ensure_future(repo.jobs.upsert("thread", "old"))
            await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.wait([task])
            await repo.jobs.upsert("thread", "new")
            assert (await repo.jobs.get("thread")).status == "new"


async def test_the_look_of_an_inspection_leaves_nothing(
    relay: Relay, make: Make, postgres: asyncpg.Connection, postgres_schema: str
) -> None:
    """On a connection for this alone, bounded like a boot; on the pool where the repository is open."""
    repo = make(startup_timeout=1)
    assert not (await repo._database.inspect(CATALOGS)).catalog.tables
    assert await postgres.fetchval("select to_regnamespace($1)", postgres_schema) is None
    for _ in range(50):
        await asyncio.sleep(0.01)
        if not relay.links:
            break
    assert relay.links == 0
    relay.silent_at = b"to_regnamespace"
    with within(1 + SOON), pytest.raises(DatabaseUnavailableError):
        await repo._database.inspect(CATALOGS)
    relay.silent_at = None
    await repo
    look = await repo._database.inspect(CATALOGS)
    assert look.catalog is CATALOGS[-1]
    assert await repo.attempts.find("a") is None


@functools.cache
def all_calls() -> list[tuple[Path, str, ast.Call]]:
    """Every call in the package, with the name of what is called."""
    found = []
    for path in Path(runtime_repo.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                found.append((path, name, node))
    return found


def calls(name: str) -> list[tuple[Path, ast.Call]]:
    """Every call in the package of something of this name."""
    return [(path, node) for path, called, node in all_calls() if called == name]


def test_nothing_shielded_is_unbounded() -> None:
    """All of it goes through two functions that have a bound, and nobody takes that away."""
    for function in (finish, settle):
        assert 0 < inspect.signature(function).parameters["within"].default <= 2
    for path, call in calls("CancelScope"):
        assert path.name == "shielding.py" or not any(keyword.arg == "shield" for keyword in call.keywords), path
    settled = {path for path, _ in calls("settle")}
    for path, _ in calls("shield"):
        # Whoever waits there is let go; what he waited for is then settled.
        assert path in settled, path
    found = calls("finish") + calls("settle")
    assert len(found) > 5
    for _, call in found:
        for keyword in call.keywords:
            assert keyword.arg == "within", ast.unparse(call)
            assert not (isinstance(keyword.value, ast.Constant) and keyword.value.value is None), ast.unparse(call)
    for path, call in calls("release"):
        # The driver's own shield: a connection that is given back to its pool.
        if path.parent.name == "postgres" and call.args:
            assert any(keyword.arg == "timeout" for keyword in call.keywords), ast.unparse(call)
