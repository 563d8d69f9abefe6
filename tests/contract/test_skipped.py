"""What the database neither does nor refuses, since a trigger skips the row, is told: no verb takes it for done."""

import contextlib
import secrets
from collections.abc import Awaitable, Callable

import pytest

from runtime_repo import (
    Attempt,
    Lease,
    LeaseLostError,
    NewAttempt,
    NotFoundError,
    NotQuietError,
    PostgresRuntimeRepository,
    RefusedError,
    RuntimeRepository,
    SqliteRuntimeRepository,
)
from tests.contract.conftest import Clock, execute
from tests.postgres_server import PostgresServer
from tests.verbs import MINUTE

Call = Callable[[RuntimeRepository, Lease], Awaitable[object]]


async def quiesce(repo: RuntimeRepository) -> None:
    """Without waiting for the lease that is held."""
    with contextlib.suppress(NotQuietError):
        await repo.control.quiesce(timeout=0 * MINUTE)


VERBS: dict[str, tuple[str, Call]] = {
    "enqueue": ("attempts", lambda repo, _: repo.attempts.enqueue("run", attempt_id="new")),
    "enqueue_many": ("attempts", lambda repo, _: repo.attempts.enqueue_many([NewAttempt("run", "new")])),
    "enqueue_many, ids made": ("attempts", lambda repo, _: repo.attempts.enqueue_many([NewAttempt("run")] * 2)),
    "claim": ("attempts", lambda repo, _: repo.leases.claim("worker")),
    "claim's lease": ("leases", lambda repo, _: repo.leases.claim("worker")),
    "claim from several": ("attempts", lambda repo, _: repo.leases.claim("worker", queues=["default", "other"])),
    "claim from several's leases": ("leases", lambda repo, _: repo.leases.claim("worker", queues=["default", "other"])),
    "claim_attempt's lease": ("leases", lambda repo, _: repo.leases.claim_attempt("ready", "worker")),
    "start": ("attempts", lambda repo, lease: repo.attempts.start(lease)),
    "complete": ("attempts", lambda repo, lease: repo.attempts.complete(lease)),
    "complete_many": ("attempts", lambda repo, lease: repo.attempts.complete_many([(lease, 1)])),
    "fail": ("attempts", lambda repo, lease: repo.attempts.fail(lease, "boom")),
    "release": ("attempts", lambda repo, lease: repo.leases.release(lease)),
    "cancel": ("attempts", lambda repo, _: repo.attempts.cancel("a")),
    "retry": ("attempts", lambda repo, _: repo.attempts.retry("failed")),
    "record": ("step_reports", lambda repo, lease: repo.step_reports.record(lease, "pay", "done", "t")),
    "create": ("interrupts", lambda repo, _: repo.interrupts.create("t", "run", "a", "?", interrupt_id="new")),
    "resume": ("interrupts", lambda repo, _: repo.interrupts.resume("i", "yes")),
    "interrupts.cancel": ("interrupts", lambda repo, _: repo.interrupts.cancel("i")),
    "upsert": ("jobs", lambda repo, _: repo.jobs.upsert("t", "fine")),
    "append": (
        "audit_logs",
        lambda repo, _: repo.audit.append(
            actor_type="user", action="do", resource_type="x", result="ok", request_id="r"
        ),
    ),
    "heartbeat": ("leases", lambda repo, lease: repo.leases.heartbeat(lease)),
    "heartbeat_many": ("leases", lambda repo, lease: repo.leases.heartbeat_many([lease])),
    "set_active": ("api_keys", lambda repo, _: repo.api_keys.set_active("known", active=False)),
    "put": ("api_keys", lambda repo, _: repo.api_keys.put("k", "secret")),
    "quiesce": ("control", lambda repo, _: quiesce(repo)),
    "pause": ("control", lambda repo, _: repo.control.pause("mail")),
}

SKIP = {
    "sqlite": (
        "create trigger skip_{verb} before {verb} on runtime_{table} when {when} begin select raise(ignore); end",
        "drop trigger skip_{verb}",
    ),
    "postgres": (
        "create or replace function {{schema}}.skip() returns trigger language plpgsql as 'begin return null; end'; "
        "create trigger skip_{verb} before {verb} on {{schema}}.runtime_{table} for each row "
        "when ({when}) execute function {{schema}}.skip()",
        "drop trigger skip_{verb} on {{schema}}.runtime_{table}",
    ),
}


async def each(repo: RuntimeRepository, number: int, table: str, when: str = "true") -> None:
    """Run one of the statements for each way to write."""
    statements = SKIP["sqlite" if isinstance(repo, SqliteRuntimeRepository) else "postgres"]
    for verb in ("insert", "update"):
        await execute(repo, statements[number].format(verb=verb, table=table, when=when))


@pytest.mark.parametrize("verb", VERBS)
async def test_what_is_skipped_is_told(repo: RuntimeRepository, verb: str) -> None:
    """As refused, in words that name what to look for; nothing is written, and the lease holds as before."""
    table, call = VERBS[verb]
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ("a", "failed", "ready")])
    lease = await repo.leases.claim_attempt("a", "worker")
    failed = await repo.leases.claim_attempt("failed", "worker")
    assert lease is not None
    assert failed is not None
    await repo.attempts.fail(failed, "boom")
    await repo.interrupts.create("t", "run", "a", "?", interrupt_id="i")
    await repo.api_keys.put("known", "secret")
    before = await repo.attempts.list(), await repo.leases.list(), await repo.interrupts.list()
    await each(repo, 0, table)
    with pytest.raises(RefusedError, match="trigger"):
        await call(repo, lease)
    await each(repo, 1, table)
    assert (await repo.attempts.list(), await repo.leases.list(), await repo.interrupts.list()) == before
    await call(repo, lease)


async def test_a_lost_lease_is_still_lost(repo: RuntimeRepository) -> None:
    """It is not the database that keeps the row from whoever lost it."""
    await repo.attempts.enqueue("run", attempt_id="a")
    (lease,) = await repo.leases.claim("worker")
    await repo.attempts.cancel("a")
    await each(repo, 0, "attempts")
    with pytest.raises(LeaseLostError):
        await repo.attempts.complete(lease)


async def test_of_many_leases_only_the_one_that_is_skipped_is_not_kept(repo: RuntimeRepository, clock: Clock) -> None:
    """That is told; one that has run out, or was given back, is only lost, whatever is skipped."""
    names = ["a", "b", "expired", "released"]
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in names], now=clock.now)
    spans = {"expired": MINUTE}
    leases = [
        await repo.leases.claim_attempt(name, "worker", ttl=spans.get(name, 3 * MINUTE), now=clock.now)
        for name in names
    ]
    a, b, expired, released = (lease for lease in leases if lease is not None)
    await repo.leases.release(released)
    clock.advance(2 * MINUTE)
    await each(repo, 0, "leases", "new.attempt_id <> 'a'")
    with pytest.raises(RefusedError, match=f"{b.lease_id}.*trigger"):
        await repo.leases.heartbeat_many([a, b, expired, released], ttl=60 * MINUTE, now=clock.now)
    clock.advance(10 * MINUTE)
    kept = await repo.leases.heartbeat_many([a, b, expired, released], now=clock.now)
    assert [lease is not None for lease in kept] == [True, False, False, False]


@pytest.mark.parametrize("queues", ["default", ["default", "other"]])
async def test_one_lease_that_is_skipped_undoes_the_claim(repo: RuntimeRepository, queues: str | list[str]) -> None:
    """No attempt is left to nobody, whether its own lease was skipped or another's."""
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ("a", "b")])
    before = await repo.attempts.list()
    await each(repo, 0, "leases", "new.attempt_id = 'b'")
    with pytest.raises(RefusedError, match="trigger"):
        await repo.leases.claim("worker", limit=2, queues=queues)
    assert await repo.attempts.list() == before
    assert await repo.leases.list() == []
    (lease,) = await repo.leases.claim("worker", queues=queues)
    assert lease.attempt_id == "a"


async def test_enqueue_many_is_all_or_nothing(repo: RuntimeRepository) -> None:
    """Where one of many is skipped none is stored."""
    await each(repo, 0, "attempts", "new.run_id = 'b'")
    with pytest.raises(RefusedError, match="trigger"):
        await repo.attempts.enqueue_many([NewAttempt("a"), NewAttempt("b"), NewAttempt("c")])
    assert await repo.attempts.list() == []
    assert len(await repo.attempts.enqueue_many([NewAttempt("a"), NewAttempt("c")])) == 2


async def test_what_waits_and_is_not_cancelled_waits_as_before(repo: RuntimeRepository) -> None:
    """Where it is skipped the next claim has it."""
    await repo.attempts.enqueue("run", attempt_id="a")
    await each(repo, 0, "attempts")
    with pytest.raises(RefusedError, match="trigger"):
        await repo.attempts.cancel("a")
    await each(repo, 1, "attempts")
    assert [lease.attempt_id for lease in await repo.leases.claim("worker")] == ["a"]


KEEP = {
    "sqlite": "create trigger keep before delete on runtime_attempts when old.attempt_id = 'kept' "
    "begin select raise(ignore); end",
    "postgres": "create function {schema}.keep() returns trigger language plpgsql as 'begin return null; end'; "
    "create trigger keep before delete on {schema}.runtime_attempts for each row "
    "when (old.attempt_id = 'kept') execute function {schema}.keep()",
}


async def test_what_a_trigger_keeps_from_being_pruned_is_left_whole(repo: RuntimeRepository, clock: Clock) -> None:
    """With what was reported and asked in it, and found as what it is; the others go."""
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ("kept", "old")], now=clock.now)
    for lease in await repo.leases.claim("worker", limit=2, now=clock.now):
        await repo.step_reports.record(lease, "pay", "done", "t", now=clock.now)
        await repo.interrupts.create("t", "run", lease.attempt_id, "?", interrupt_id=lease.attempt_id)
        await repo.attempts.fail(lease, "boom", now=clock.now)
    kept = await repo.attempts.get("kept")
    await execute(repo, KEEP["sqlite" if isinstance(repo, SqliteRuntimeRepository) else "postgres"])
    clock.advance(MINUTE)
    for pruned in (1, 0):
        assert await repo.attempts.prune(older_than=MINUTE / 2, now=clock.now) == pruned
    assert await repo.attempts.list() == await repo.attempts.list(status=kept.status) == [kept]
    assert len(await repo.step_reports.list("kept")) == 1
    assert [asked.interrupt_id for asked in await repo.interrupts.list()] == ["kept"]
    assert await repo.attempts.reindex() == 0


POLICY = """
alter table {{schema}}.runtime_{table} enable row level security;
create policy seen on {{schema}}.runtime_{table} for select using (true);
create policy kept on {{schema}}.runtime_{table} for update using (false);
"""
"""Every row is shown, and none can be written or locked."""


async def test_what_may_be_read_but_not_changed_is_told(postgres_server: PostgresServer) -> None:
    """A policy of row security that shows a row and lets nobody lock it: nothing is lost, and nothing is missing."""
    role = schema = f"rr_test_{secrets.token_hex(6)}"
    async with PostgresRuntimeRepository(postgres_server.url(), schema=schema) as owner:
        await owner.attempts.enqueue_many([NewAttempt("run", "a"), NewAttempt("run", "failed", max_attempts=1)])
        lease, failed = await owner.leases.claim("worker", limit=2)
        await owner.attempts.fail(failed, "boom")
        await owner.interrupts.create("t", "run", "a", "?", interrupt_id="i")
        await execute(owner, f"create role {role} login password 'secret'")
        await execute(owner, f"grant usage on schema {schema} to {role}")
        await execute(owner, f"grant all on all tables in schema {schema} to {role}")
        try:
            async with PostgresRuntimeRepository(postgres_server.url(role, "secret"), schema=schema) as repo:
                for table in ("attempts", "interrupts"):
                    await execute(owner, POLICY.format(table=table))
                for call in (
                    lambda: repo.attempts.complete(lease),
                    lambda: repo.attempts.complete_many([(lease, 1)]),
                    lambda: repo.attempts.cancel("a"),
                    lambda: repo.attempts.retry("failed"),
                    lambda: repo.interrupts.resume("i", "yes"),
                    lambda: repo.interrupts.cancel("i"),
                ):
                    with pytest.raises(RefusedError, match="policy"):
                        await call()
                with pytest.raises(NotFoundError):
                    await repo.attempts.cancel("none")
        finally:
            await execute(owner, f"drop owned by {role}; drop role {role}")
        assert await owner.attempts.complete_many([(lease, 1)]) == [True]


REFUSE = {
    "sqlite": "create trigger refuse before update on runtime_attempts when new.attempt_id = 'bad' "
    "begin select raise(abort, 'no'); end",
    "postgres": "create function {schema}.refuse() returns trigger language plpgsql as 'begin raise ''no''; end'; "
    "create trigger refuse before update on {schema}.runtime_attempts for each row "
    "when (new.attempt_id = 'bad') execute function {schema}.refuse()",
}


async def test_what_the_database_refuses_stops_no_sweep(
    repo: RuntimeRepository, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The others are taken, however many at once, and it is logged once; alone it is an error, as in a transaction."""
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ("bad", "b", "c")], now=clock.now)
    await repo.leases.claim("worker", limit=1, ttl=MINUTE / 2, now=clock.now)
    await repo.leases.claim("worker", limit=2, ttl=MINUTE, now=clock.now)
    await execute(repo, REFUSE["sqlite" if isinstance(repo, SqliteRuntimeRepository) else "postgres"])
    clock.advance(2 * MINUTE)
    with pytest.raises(RefusedError):
        async with repo.transaction() as transaction:
            await transaction.leases.requeue_expired(now=clock.now)
    swept: list[Attempt] = []
    with caplog.at_level("ERROR"):
        for _ in range(2):
            with contextlib.suppress(RefusedError):
                swept += await repo.leases.requeue_expired(limit=1, now=clock.now)
        swept += await repo.leases.requeue_expired(now=clock.now)
        with pytest.raises(RefusedError):
            await repo.leases.requeue_expired(now=clock.now)
    assert {attempt.attempt_id for attempt in swept} == {"b", "c"}
    assert len([record for record in caplog.records if "'bad'" in record.getMessage()]) == 1
