"""A row that cannot be read stands in nobody's way: it is named, and all others are served."""

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from runtime_repo import (
    ConfigurationError,
    Lease,
    NewAttempt,
    OverloadedError,
    Page,
    PayloadMismatchError,
    RuntimeRepository,
    UnreadableRowError,
    Worker,
)
from tests.contract.conftest import Clock, execute, runtime_schema
from tests.verbs import MINUTE

MILLISECOND = timedelta(milliseconds=1)
DEEP = "[" * 50_000 + "]" * 50_000

POISONS = {
    "microseconds": "enqueued_at_ms = 1700000000000000",
    "the far past": "enqueued_at_ms = -9000000000000000000",
    "no JSON": "payload_json = '{oops'",
    "a result that is none": "result_json = '}'",
    "JSON without end": f"payload_json = '{DEEP}'",
}
"""What another program may write on either database."""

SQLITES = {
    "a time as text": "enqueued_at_ms = 'soon'",
    "a fraction": "attempt_no = 1.5",
    "a number as text": "max_attempts = 'many'",
    "bytes": "run_id = x'ff00'",
    "bytes for JSON": "payload_json = x'ff00'",
    "a number beyond all": "priority = 9e99",
}
"""What SQLite lets it write besides."""


EACH = [("sqlite", name) for name in POISONS | SQLITES] + [("postgres", name) for name in POISONS]
poisoned = pytest.mark.parametrize(
    ("factory", "poison"),
    [(backend, (POISONS | SQLITES)[name]) for backend, name in EACH],
    indirect=["factory"],
    ids=[f"{backend}-{name}" for backend, name in EACH],
)
"""On each database an assignment that makes a row unreadable."""


async def spoil(repo: RuntimeRepository, poison: str, names: str = "'bad'") -> None:
    """Write it as another program would."""
    await execute(repo, f"update {{schema}}.runtime_attempts set {poison} where attempt_id in ({names})")
    await repo.attempts.reindex()


async def stored(repo: RuntimeRepository, columns: str) -> list[dict[str, Any]]:
    """What is in the table."""
    query = f"select {columns} from {runtime_schema(repo)}.runtime_attempts where attempt_id = 'bad'"
    async with repo.transaction() as transaction:
        fetch = getattr(transaction.connection, "fetch", None) or transaction.connection.execute_fetchall
        return [dict(row) for row in await fetch(query)]


def told(page: object) -> list[tuple[str, str]]:
    """Which rows a page could not read."""
    assert isinstance(page, Page)
    return [(error.table, error.key) for error in page.unreadable]


BAD = [("runtime_attempts", "bad")]


@poisoned
async def test_a_claim_passes_it_by(
    repo: RuntimeRepository, clock: Clock, poison: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What was claimed with it is handed out; it has failed, says why, is logged once, and comes no more."""
    ids = ("bad", "good", "too")
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ids], now=clock.now)
    await spoil(repo, poison)
    leases = await repo.leases.claim("worker", limit=3, ttl=MINUTE, now=clock.now)
    assert {lease.attempt_id for lease in leases} == {"good", "too"}
    (row,) = await stored(repo, "status, error, ended_by, finished_at_ms")
    assert (row["status"], row["ended_by"]) == ("failed", "park")
    assert row["error"].startswith("the row bad of runtime_attempts cannot be read: ")
    assert row["finished_at_ms"] == clock.now.timestamp() * 1000
    assert await repo.leases.claim("worker", limit=3, now=clock.now + timedelta(hours=1)) == []
    assert len(await repo.leases.list()) == 2
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


@poisoned
async def test_whoever_wants_this_very_one_is_told(repo: RuntimeRepository, poison: str) -> None:
    """By name, and it is parked as well; to read it is refused in the same words, before and after."""
    await repo.attempts.enqueue("run", attempt_id="bad")
    await spoil(repo, poison)
    verbs: list[Callable[[], Awaitable[object]]] = [
        lambda: repo.attempts.get("bad"),
        lambda: repo.attempts.find("bad"),
        lambda: repo.leases.claim_attempt("bad", "worker"),
        lambda: repo.attempts.get("bad"),
        lambda: repo.attempts.enqueue("run", attempt_id="bad"),
    ]
    for verb in verbs:
        with pytest.raises(UnreadableRowError) as told:
            await verb()
        assert (told.value.table, told.value.key) == ("runtime_attempts", "bad")
        assert len(str(told.value)) < 400
    assert await repo.leases.claim_attempt("bad", "worker") is None
    assert (await stored(repo, "status"))[0]["status"] == "failed"


@poisoned
async def test_lists_have_the_others(repo: RuntimeRepository, clock: Clock, poison: str) -> None:
    """And say what they left out."""
    ids = ("a", "bad", "c")
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ids], now=clock.now)
    await repo.leases.claim("worker", limit=3, ttl=MINUTE, now=clock.now)
    await spoil(repo, poison)
    pages = [
        await repo.attempts.list(),
        await repo.attempts.list(run_id="run"),
        await repo.attempts.list(status=(await repo.attempts.get("a")).status),
    ]
    for page in pages if "run_id" not in poison else pages[:1]:
        assert [attempt.attempt_id for attempt in page] == ["a", "c"]
        assert told(page) == BAD
    leases = await repo.leases.list()
    assert sorted(lease.attempt_id for lease in leases) == ["a", "c"]
    assert told(leases) == BAD
    assert await repo.attempts.stats(now=clock.now)
    swept = await repo.leases.requeue_expired(now=clock.now + MINUTE)
    assert sorted(attempt.attempt_id for attempt in swept) == ["a", "c"]
    assert told(swept) == BAD
    dispatchable = await repo.attempts.list_dispatchable(limit=2)
    assert [attempt.attempt_id for attempt in dispatchable] == ["a", "c"]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 300])
async def test_a_page_shorter_than_its_limit_is_the_last(repo: RuntimeRepository, limit: int) -> None:
    """However many rows between two that can be read cannot."""
    names = [f"{number:03}" for number in range(260)]
    good = {"000", "130", "131", "132", "258"}
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in names])
    bad = ", ".join(f"'{name}'" for name in names if name not in good)
    await spoil(repo, POISONS["microseconds"], bad)
    seen: list[str] = []
    unreadable: set[str] = set()
    while True:
        page = await repo.attempts.list(after=seen[-1] if seen else "", limit=limit)
        seen += [attempt.attempt_id for attempt in page]
        unreadable |= {error.key for error in page.unreadable}
        if len(page) < limit:
            break
    assert seen == sorted(good)
    assert unreadable == set(names) - good


async def test_keys_that_are_no_text_end_no_list(sqlite_factory: Callable[[], RuntimeRepository]) -> None:
    """SQLite may hold bytes for a key, and text that is no UTF-8: neither hides what comes after it, nor is endless."""
    async with sqlite_factory() as repo:
        await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ("a", "aé", "b", "z")])
        copies = ", ".join(f"(cast(x'61{n:02x}' as text))" for n in range(0x80, 0x100))
        await execute(
            repo,
            "insert into runtime_attempts (attempt_id, run_id, attempt_no, status, payload_json) "
            f"select column1, 'run', 1, 'completed', '{{' from (values {copies}, (x'00ff'), (x'01'))",
        )
        for limit in (1, 2, 5, 1000):
            seen: list[str] = []
            while True:
                page = await asyncio.wait_for(repo.attempts.list(after=seen[-1] if seen else "", limit=limit), 10)
                seen += [attempt.attempt_id for attempt in page]
                if len(page) < limit:
                    break
            assert seen == ["a", "aé", "b", "z"]


async def test_leases_without_an_attempt_are_swept(repo: RuntimeRepository, clock: Clock) -> None:
    """However many there are, those of dead workers behind them come at once; what lives is left alone."""
    await repo.attempts.enqueue_many([NewAttempt("erased") for _ in range(50)], now=clock.now)
    await repo.leases.claim("dead", limit=50, ttl=MINUTE, now=clock.now)
    await execute(repo, "delete from {schema}.runtime_attempts where run_id = 'erased'")
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ("b", "c")], now=clock.now)
    await repo.leases.claim_attempt("b", "dead", ttl=2 * MINUTE, now=clock.now)
    await repo.leases.claim_attempt("c", "alive", ttl=4 * MINUTE, now=clock.now)
    now = clock.advance(3 * MINUTE)
    assert [attempt.attempt_id for attempt in await repo.leases.requeue_expired(limit=10, now=now)] == ["b"]
    for _ in range(5):
        assert await repo.leases.requeue_expired(limit=10, now=now) == []
    assert await rows(repo, "runtime_leases") == 1
    assert [lease.worker_id for lease in await repo.leases.list()] == ["alive"]


async def rows(repo: RuntimeRepository, table: str) -> int:
    """How many there are."""
    async with repo.transaction() as transaction:
        fetch = getattr(transaction.connection, "fetch", None) or transaction.connection.execute_fetchall
        return int((await fetch(f"select count(*) from {runtime_schema(repo)}.{table}"))[0][0])


@poisoned
async def test_a_worker_lives_through_it(repo: RuntimeRepository, poison: str) -> None:
    """And does what was claimed with it."""
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ("bad", "good")])
    await spoil(repo, poison)
    done = asyncio.Event()

    async def handle(lease: object) -> None:  # noqa: ARG001
        done.set()

    worker = Worker(repo, handle, signals=())
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(10):
        await done.wait()
    worker.stop()
    await running
    assert (await repo.attempts.get("good")).status == "completed"


async def test_a_report_a_job_an_entry_and_a_key(repo: RuntimeRepository) -> None:
    """What holds for attempts holds for every list."""
    await repo.attempts.enqueue("run", attempt_id="a")
    lease = await repo.leases.claim_attempt("a", "worker")
    assert lease is not None
    for name in ("1", "2", "3"):
        await repo.step_reports.record(lease, "pay", "done", name)
        await repo.jobs.upsert(name, "fine")
        await repo.interrupts.create("t", "run", "a", name, interrupt_id=name)
        await repo.audit.append(actor_type="user", action="do", resource_type="x", result="ok", request_id="r")
        await repo.api_keys.put(name, "secret")
    for table, key in {
        "step_reports": "dedupe_token",
        "jobs": "thread_id",
        "interrupts": "interrupt_id",
        "audit_logs": "audit_id",
        "api_keys": "key_id",
    }.items():
        wrong = "created_at_ms = 1700000000000000"
        await execute(repo, f"update {{schema}}.runtime_{table} set {wrong} where cast({key} as text) = '2'")
    pages: list[Page[Any]] = [
        await repo.step_reports.list("a", limit=2),
        await repo.jobs.list(limit=2),
        await repo.jobs.list(status="fine", limit=2),
        await repo.interrupts.list(limit=2),
        await repo.interrupts.list(thread_id="t", limit=2),
        await repo.audit.list(limit=2),
        await repo.audit.list(request_id="r", limit=2),
        await repo.audit.list(action="do", limit=2),
        await repo.api_keys.list(limit=2),
    ]
    for page in pages:
        assert len(page) == 2
        assert len(page.unreadable) == 1
    with pytest.raises(UnreadableRowError, match="runtime_jobs"):
        await repo.jobs.get("2")
    with pytest.raises(UnreadableRowError, match="runtime_interrupts"):
        await repo.interrupts.get("2")


@pytest.mark.parametrize("way", ["one queue", "several queues", "by its id"])
async def test_the_last_token_is_given_out_to_nobody(repo: RuntimeRepository, way: str) -> None:
    """Another program put it there, and there is none after it: the attempt has failed and says why; no token twice."""

    async def claim(name: str) -> list[Lease]:
        if way == "by its id":
            lease = await repo.leases.claim_attempt(name, "worker")
            return [lease] if lease else []
        return list(await repo.leases.claim("worker", queues="default" if way == "one queue" else ["default", "b"]))

    for last in (2**63 - 1, 2**63 - 2):
        name = f"bad-{last}"
        await repo.attempts.enqueue("run", attempt_id=name)
        await spoil(repo, f"lease_version = {last}", f"'{name}'")
        if way == "by its id":
            with pytest.raises(UnreadableRowError, match="lease_version is the last"):
                await claim(name)
        else:
            assert await claim(name) == []
        failed = await repo.attempts.get(name)
        assert (failed.status, failed.lease_version) == ("failed", 2**63 - 1)
        assert "lease_version is the last" in str(failed.error)
    await repo.attempts.enqueue("run", attempt_id="good")
    await spoil(repo, f"lease_version = {2**63 - 3}", "'good'")
    [lease] = await claim("good")
    assert lease.version == 2**63 - 2
    assert (await repo.attempts.complete(lease)).status == "completed"


async def test_what_is_no_json_in_the_strict_sense_is_compared(repo: RuntimeRepository) -> None:
    """It was read before, so a repeated call finds it to be other content, and raises nothing else."""
    await repo.attempts.enqueue("run", attempt_id="bad", payload=[1])
    await spoil(repo, "payload_json = '[NaN]'")
    with pytest.raises(PayloadMismatchError):
        await repo.attempts.enqueue("run", attempt_id="bad", payload=[1])
    await spoil(repo, f"payload_json = '{'[' * 700}{']' * 700}'")
    with pytest.raises(PayloadMismatchError):
        await repo.attempts.enqueue("run", attempt_id="bad", payload=[1])


async def test_a_time_that_is_none_ends_no_wait_and_no_list(sqlite_factory: Callable[[], RuntimeRepository]) -> None:
    """SQLite may hold text where a time belongs: a waiting caller waits for the others, a page names it."""
    async with sqlite_factory() as repo:
        await repo.attempts.enqueue("run", attempt_id="bad")
        await spoil(repo, "status = 'retry_backoff', retry_at_ms = 'soon'")
        assert not await repo.attempts.wait(timeout=timedelta(0))
        await repo.attempts.enqueue("run", attempt_id="good")
        assert await repo.attempts.wait(timeout=timedelta(0))
        assert [lease.attempt_id for lease in await repo.leases.claim("worker", limit=2)] == ["good"]
        entry = await repo.audit.append(actor_type="user", action="do", resource_type="x", result="ok", request_id="r")
        await execute(repo, "update runtime_audit_logs set created_at_ms = 'then'")
        with pytest.raises(UnreadableRowError, match="runtime_audit_logs"):
            await repo.audit.list(after=entry.audit_id)


@pytest.mark.parametrize("time", [-(2**63), 2**63 - 1])
async def test_the_queues_are_counted_whatever_the_time_of_one(repo: RuntimeRepository, time: int) -> None:
    """An age beyond all numbers is as old as can be said, on both databases alike; a time to come is no age."""
    await repo.attempts.enqueue_many([NewAttempt("run", "bad", "of the bad"), NewAttempt("run", "good")])
    await spoil(repo, f"enqueued_at_ms = {time}")
    page = await repo.attempts.stats()
    assert [(stats.queue, stats.ready) for stats in page] == [("default", 1), ("of the bad", 1)]
    assert page[1].oldest_age == (timedelta(0) if time > 0 else timedelta.max // MILLISECOND * MILLISECOND)


NAMES = [
    ("sqlite", "attempt_id = cast(x'626164ff' as text)"),
    ("sqlite", "attempt_id = 'bad' || char(0)"),
    ("sqlite", "lease_version = -7"),
    ("postgres", "attempt_id = 'bad\N{REPLACEMENT CHARACTER}'"),
    ("postgres", "lease_version = -7"),
]
"""What makes an attempt one that no verb finds again."""


@pytest.mark.parametrize(("factory", "poison"), NAMES, indirect=["factory"])
async def test_what_could_never_be_finished_is_parked(repo: RuntimeRepository, clock: Clock, poison: str) -> None:
    """Not claimed again and again: the first claim parks it, and hands out the others."""
    ids = ("bad", "good")
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ids], now=clock.now)
    await spoil(repo, poison)
    (lease,) = await repo.leases.claim("worker", limit=2, now=clock.now)
    assert lease.attempt_id == "good"
    query = "select status, ended_by from {schema}.runtime_attempts where status = 'failed'"
    async with repo.transaction() as transaction:
        fetch = getattr(transaction.connection, "fetch", None) or transaction.connection.execute_fetchall
        rows = [tuple(row) for row in await fetch(query.replace("{schema}", runtime_schema(repo)))]
    assert rows == [("failed", "park")]
    assert await repo.leases.claim("worker", limit=2, now=clock.now + timedelta(hours=1)) == []


async def test_no_id_is_taken_that_a_claim_would_park(repo: RuntimeRepository) -> None:
    """What stands for bytes that were no text is refused beforehand."""
    with pytest.raises(ConfigurationError, match="U\\+FFFD"):
        await repo.attempts.enqueue("run", attempt_id="a\N{REPLACEMENT CHARACTER}")
    assert await repo.attempts.list() == []


def without_threads() -> None:
    """What starts a thread where the system has none to give."""
    raise RuntimeError("can't start new thread")


async def test_without_a_thread_nothing_is_judged(repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nests deep is read in one, and secrets are hashed in some: no attempt is parked for that, no key refused."""
    await repo.attempts.enqueue("run", attempt_id="bad")
    deep = "[" * 500 + "]" * 500
    await spoil(repo, f"payload_json = '{deep}'")
    limit = sys.getrecursionlimit()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda _: without_threads())
        for verb in (repo.api_keys.authenticate, repo.api_keys.put):
            with pytest.raises(OverloadedError, match="ulimit -u"):
                await verb("key", "secret")
        sys.setrecursionlimit(300)
        try:
            with pytest.raises(OverloadedError, match="ulimit -u"):
                await repo.leases.claim("worker")
        finally:
            sys.setrecursionlimit(limit)
    (lease,) = await repo.leases.claim("worker")
    assert lease.attempt_id == "bad"
    assert await repo.api_keys.put("key", "secret") == await repo.api_keys.authenticate("key", "secret")


STRANDED = [
    (backend, statement)
    for backend in ("sqlite", "postgres")
    for statement in (
        "delete from {schema}.runtime_leases where attempt_id = 'bad'",
        "update {schema}.runtime_leases set lease_expires_at_ms = 9223372036854775807 where attempt_id = 'bad'",
        "update {schema}.runtime_leases set lease_expires_at_ms = 'soon' where attempt_id = 'bad'",
        "update {schema}.runtime_leases set lease_expires_at_ms = x'ff' where attempt_id = 'bad'",
    )
    if backend == "sqlite" or ("'soon'" not in statement and "x'ff'" not in statement)
]
"""What leaves an attempt held for ever."""


@pytest.mark.parametrize(("factory", "statement"), STRANDED, indirect=["factory"])
async def test_no_attempt_is_held_for_ever(repo: RuntimeRepository, clock: Clock, statement: str) -> None:
    """The sweep takes it as one whose lease has expired, the lost try counts, and what others hold stays theirs."""
    await repo.attempts.enqueue_many([NewAttempt("run", name) for name in ("bad", "good")], now=clock.now)
    leases = await repo.leases.claim("worker", limit=2, ttl=timedelta(days=366_000), now=clock.now)
    await execute(repo, statement)
    (attempt,) = await repo.leases.requeue_expired(limit=1, now=clock.now)
    assert (attempt.attempt_id, attempt.status, attempt.attempt_no) == ("bad", "queued", 2)
    assert attempt.ended_by == "expire"
    assert (attempt.error or "").startswith("the lease of worker worker ")
    assert await repo.leases.requeue_expired(now=clock.now) == []
    assert [lease.attempt_id for lease in await repo.leases.list()] == ["good"]
    assert await repo.attempts.complete_many([(lease, 1) for lease in leases], now=clock.now) == [
        lease.attempt_id == "good" for lease in leases
    ]
    assert await repo.leases.claim("worker", now=clock.now) != []
