"""An answer that stands for a commit waits for the standbys like one: what was acknowledged outlives a failover."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import asyncpg
import pytest

from runtime_repo import Lease, NewAttempt, PostgresRuntimeRepository, RuntimeRepository
from tests.postgres_server import PostgresServer

Call = Callable[[RuntimeRepository, Lease], Awaitable[object]]

REPEATED: dict[str, Call] = {
    "enqueue": lambda repo, _: repo.attempts.enqueue("run", attempt_id="a"),
    "enqueue_many": lambda repo, _: repo.attempts.enqueue_many([NewAttempt("run", "a")]),
    "complete": lambda repo, lease: repo.attempts.complete(lease, "done"),
    "complete_many": lambda repo, lease: repo.attempts.complete_many([(lease, "done")]),
    "fail": lambda repo, lease: repo.attempts.fail(lease, "boom"),
    "release": lambda repo, lease: repo.leases.release(lease),
    "retry": lambda repo, _: repo.attempts.retry("failed"),
    "cancel": lambda repo, _: repo.attempts.cancel("a"),
    "interrupts.create": lambda repo, _: repo.interrupts.create("t", "run", "a", "why?", interrupt_id="i"),
    "step_reports.record": lambda repo, lease: repo.step_reports.record(lease, "pay", "done", "token"),
}
"""What may be repeated, and answers as the first time."""

AFTER_A_QUESTION: dict[str, Call] = {
    "interrupts.resume": lambda repo, _: repo.interrupts.resume("i", "yes"),
    "interrupts.cancel": lambda repo, _: repo.interrupts.cancel("i"),
}
READS: dict[str, Call] = {
    "get": lambda repo, _: repo.attempts.get("a"),
    "list": lambda repo, _: repo.attempts.list(),
    "interrupts.find": lambda repo, _: repo.interrupts.find("i"),
    "step_reports.list": lambda repo, _: repo.step_reports.list("a"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server whose settings are the test's."""
    with PostgresServer(
        settings={"synchronous_commit": "on", "max_wal_senders": "1", "wal_level": "replica"}
    ) as server:
        yield server


@pytest.fixture
async def admin(server: PostgresServer) -> AsyncIterator[asyncpg.Connection]:
    """Who may change its settings, and whom no commit keeps waiting."""
    connection = await asyncpg.connect(server.url())
    await connection.execute("set synchronous_commit = local")
    yield connection
    await no_standbys(connection)
    await connection.execute("drop schema if exists runtime cascade")
    await connection.close()


async def standbys(server: PostgresServer, admin: asyncpg.Connection) -> None:
    """Let every commit wait for a standby that is not there, from now on."""
    await _set(admin, "nobody")
    probe = await asyncpg.connect(server.url())
    try:
        # The setting is shown before commits heed it: that comes when the checkpointer has read it, too.
        commit = asyncio.ensure_future(_commit(probe))
        while not await waiting(admin):
            if commit.done():
                commit = asyncio.ensure_future(_commit(probe))
            await asyncio.sleep(0.005)
        await admin.execute("select pg_cancel_backend($1)", probe.get_server_pid())
        await commit
    finally:
        await probe.close()


async def no_standbys(admin: asyncpg.Connection) -> None:
    """Let no commit wait any more."""
    await _set(admin, "")


async def _commit(connection: asyncpg.Connection) -> None:
    await connection.execute("select pg_logical_emit_message(true, 'probe', '')")


async def _set(admin: asyncpg.Connection, names: str) -> None:
    await admin.execute(f"alter system set synchronous_standby_names = '{names}'")
    await admin.execute("select pg_reload_conf()")


async def waiting(admin: asyncpg.Connection) -> bool:
    """Whether a commit waits for a standby."""
    return bool(await admin.fetchval("select count(*) from pg_stat_activity where wait_event = 'SyncRep'"))


@pytest.mark.parametrize("verb", REPEATED | AFTER_A_QUESTION)
async def test_a_repeated_call_waits_for_the_standbys(
    server: PostgresServer, admin: asyncpg.Connection, verb: str
) -> None:
    """Its answer says that the first one is done, which no standby may know yet; a read says no such thing."""
    call = (REPEATED | AFTER_A_QUESTION)[verb]
    async with PostgresRuntimeRepository(server.url()) as repo:
        await repo.attempts.enqueue_many([NewAttempt("run", "failed"), NewAttempt("run", "a")])
        failed = await repo.leases.claim_attempt("failed", "worker")
        lease = await repo.leases.claim_attempt("a", "worker")
        assert failed is not None
        assert lease is not None
        await repo.attempts.fail(failed, "boom")
        if verb in AFTER_A_QUESTION:
            await REPEATED["interrupts.create"](repo, lease)
        first = await call(repo, lease)
        await standbys(server, admin)
        again = asyncio.ensure_future(call(repo, lease))
        while not await waiting(admin):
            assert not again.done(), "it answered"
            await asyncio.sleep(0.005)
        for read in READS.values():
            await read(repo, lease)
        assert not again.done()
        await no_standbys(admin)
        assert await again == first
