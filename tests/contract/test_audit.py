"""Audit: entries are added and read, the newest first."""

import contextlib
from datetime import timedelta
from typing import Any

import pytest

from runtime_repo import (
    AuditEntry,
    NotFoundError,
    RuntimeRepository,
    RuntimeTransaction,
)
from tests.contract.conftest import Clock, execute

MINUTE = timedelta(minutes=1)
MOMENT = timedelta(milliseconds=1)

ACT = {"actor_type": "user", "action": "job.cancel", "resource_type": "job", "result": "ok", "request_id": "r"}

BY_ANOTHER_PROGRAM = """
insert into {schema}.runtime_audit_logs
       (actor_type, action, resource_type, result, request_id, details_json, created_at_ms)
values ('', 'job.read', 'job', 'ok', 'r', '<details>', 1600000000000)
"""


async def act(repo: RuntimeRepository | RuntimeTransaction, **changes: Any) -> AuditEntry:
    """An entry."""
    return await repo.audit.append(**(ACT | changes))


async def test_an_entry_is_stored_as_it_was_added(repo: RuntimeRepository, clock: Clock) -> None:
    """Who did what to what and how it went; what is left out is None."""
    bare = await act(repo, now=clock.now)
    assert (bare.actor_id, bare.actor_role, bare.resource_id, bare.details) == (None, None, None, None)
    full = await act(
        repo, actor_id="u-1", actor_role="admin", resource_id="t", details={"why": "\N{SNOWMAN}"}, now=clock.now
    )
    assert full == AuditEntry(
        audit_id=full.audit_id,
        actor_type="user",
        actor_id="u-1",
        actor_role="admin",
        action="job.cancel",
        resource_type="job",
        resource_id="t",
        result="ok",
        request_id="r",
        details={"why": "\N{SNOWMAN}"},
        created_at=clock.now,
    )
    assert full.audit_id > bare.audit_id
    assert await repo.audit.list() == [full, bare]


async def test_the_time_is_the_databases(repo: RuntimeRepository) -> None:
    """Without *now* it is the same clock that stamps attempts."""
    before = (await repo.attempts.enqueue("run")).enqueued_at
    entry = await act(repo)
    after = (await repo.attempts.enqueue("run")).enqueued_at
    assert before <= entry.created_at <= after


async def test_an_act_told_twice_is_two_entries(repo: RuntimeRepository, clock: Clock) -> None:
    """At least once: a repeated call adds another, and the request they have in common tells that it is one act."""
    first, second = [await act(repo, request_id="once", now=clock.now) for _ in range(2)]
    assert first.audit_id != second.audit_id
    assert await repo.audit.list(request_id="once") == [second, first]


async def test_an_entry_is_stored_with_what_it_tells_of(repo: RuntimeRepository) -> None:
    """In one transaction: the act and its entry, or neither."""
    for fails in (True, False):
        with contextlib.suppress(ZeroDivisionError):
            async with repo.transaction() as transaction:
                await transaction.jobs.upsert("thread", "cancelled")
                await act(transaction, resource_id="thread")
                if fails:
                    raise ZeroDivisionError
        assert (len(await repo.audit.list()), len(await repo.jobs.list())) == ((0, 0) if fails else (1, 1))


async def pages(repo: RuntimeRepository, limit: int = 2, **filters: Any) -> list[int]:
    """The ids on all pages."""
    seen: list[int] = []
    while page := await repo.audit.list(**filters, after=seen[-1] if seen else None, limit=limit):
        assert len(page) <= limit
        assert seen[-1:] != [page[-1].audit_id]
        seen += [entry.audit_id for entry in page]
    return seen


async def test_the_newest_comes_first(repo: RuntimeRepository, clock: Clock) -> None:
    """By time; of one instant the one that was added last. Every entry is on exactly one page, whatever its size."""
    later, latest = clock.now + MINUTE, clock.now + 2 * MINUTE
    times = [later, clock.now, later, later, latest, clock.now, later]
    added = [(moment, (await act(repo, now=moment)).audit_id) for moment in times]
    expected = [audit_id for _, audit_id in sorted(added, reverse=True)]
    for limit in (1, 2, 3, 7, 100):
        assert await pages(repo, limit) == expected


async def test_what_is_added_meanwhile_moves_no_page(repo: RuntimeRepository, clock: Clock) -> None:
    """An auditor who turns pages misses nothing, and sees nothing twice."""
    old = [(await act(repo, now=clock.advance(MINUTE))).audit_id for _ in range(6)]
    first = await repo.audit.list(limit=3)
    await act(repo, now=clock.advance(MINUTE))
    second = await repo.audit.list(limit=3, after=first[-1].audit_id)
    assert [entry.audit_id for entry in [*first, *second]] == old[::-1]


async def test_entries_are_listed_by_request_action_and_time(repo: RuntimeRepository, clock: Clock) -> None:
    """Each filter, and any of them together; *since* is included, *until* is not."""
    start = clock.now
    for number in range(12):
        await act(repo, request_id=f"r{number % 2}", action=f"a{number % 3}", now=start + number * MINUTE)
    numbers = {entry.audit_id: (entry.created_at - start) // MINUTE for entry in await repo.audit.list()}

    async def listed(**filters: Any) -> list[int]:
        return [numbers[audit_id] for audit_id in await pages(repo, **filters)]

    assert await listed(request_id="r0") == [10, 8, 6, 4, 2, 0]
    assert await listed(action="a1") == [10, 7, 4, 1]
    assert await listed(request_id="r1", action="a1") == [7, 1]
    assert await listed(since=start + 9 * MINUTE) == [11, 10, 9]
    assert await listed(since=start + 9 * MINUTE + MOMENT) == [11, 10]
    assert await listed(until=start + 2 * MINUTE) == [1, 0]
    assert await listed(until=start + 2 * MINUTE + MOMENT) == [2, 1, 0]
    assert await listed(since=start + 2 * MINUTE, until=start + 5 * MINUTE) == [4, 3, 2]
    assert await listed(action="a2", since=start + 3 * MINUTE, until=start + 11 * MINUTE) == [8, 5]
    assert await listed(request_id="r0", since=start + 3 * MINUTE, until=start + 8 * MINUTE) == [6, 4]
    assert await listed(since=start + MINUTE, until=start + MINUTE) == []
    assert await listed(request_id="nobody") == await listed(action="nothing") == []


async def test_a_page_goes_on_within_its_filters(repo: RuntimeRepository, clock: Clock) -> None:
    """After an entry that is newer than *until*, or of another action, comes the first that the filters let through."""
    first, second, third = [await act(repo, action=f"a{n}", now=clock.advance(MINUTE)) for n in range(3)]
    assert await repo.audit.list(after=third.audit_id, until=second.created_at) == [first]
    assert await repo.audit.list(after=third.audit_id, action="a0") == [first]
    assert await repo.audit.list(after=first.audit_id) == []


async def test_a_place_that_is_gone_is_not_the_end(repo: RuntimeRepository, clock: Clock) -> None:
    """Somebody deleted a page's last entry by other means: an error, not an empty page that looks like the end."""
    await act(repo, now=clock.now)
    last = await act(repo, now=clock.now)
    await execute(repo, f"delete from {{schema}}.runtime_audit_logs where audit_id = {last.audit_id}")
    with pytest.raises(NotFoundError, match=f"audit entry '{last.audit_id}'"):
        await repo.audit.list(after=last.audit_id)


async def test_an_entry_of_an_earlier_program_is_read(repo: RuntimeRepository) -> None:
    """Whatever its words were; an entry whose details are no JSON is named beside the others."""
    await execute(repo, BY_ANOTHER_PROGRAM.replace("<details>", '{"n": 1}'))
    (entry,) = await repo.audit.list(action="job.read")
    assert (entry.actor_type, entry.details) == ("", {"n": 1})
    await execute(repo, BY_ANOTHER_PROGRAM.replace("<details>", "{n: 1}"))
    page = await repo.audit.list()
    assert page == [entry]
    assert [(error.table, error.key) for error in page.unreadable] == [("runtime_audit_logs", str(entry.audit_id + 1))]
