"""Jobs: how each thread is doing."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from runtime_repo import Job, NotFoundError, RuntimeRepository
from tests.contract.conftest import Clock, Factory, execute

MINUTE = timedelta(minutes=1)


async def test_a_job_is_stored_and_updated_in_place(repo: RuntimeRepository, clock: Clock) -> None:
    """One row for each thread: when it was first heard of stays, status and time move."""
    start = clock.now
    first = await repo.jobs.upsert("thread", "active", now=start)
    assert first == Job("thread", "active", created_at=start, updated_at=start)
    assert await repo.jobs.get("thread") == first
    second = await repo.jobs.upsert("thread", "waiting for \N{SNOWMAN}", now=clock.advance(MINUTE))
    assert second == Job("thread", "waiting for \N{SNOWMAN}", created_at=start, updated_at=start + MINUTE)
    assert await repo.jobs.list() == [second]


async def test_to_say_it_again_moves_only_the_time(repo: RuntimeRepository, clock: Clock) -> None:
    """A repeated call is the same job, heard of just now; at the same instant it is equal."""
    first = await repo.jobs.upsert("thread", "active", now=clock.now)
    assert await repo.jobs.upsert("thread", "active", now=clock.now) == first
    again = await repo.jobs.upsert("thread", "active", now=clock.advance(MINUTE))
    assert again == Job("thread", "active", first.created_at, clock.now)


async def test_the_time_is_the_databases(repo: RuntimeRepository) -> None:
    """Without *now* it is the same clock that stamps attempts."""
    before = (await repo.attempts.enqueue("run")).enqueued_at
    job = await repo.jobs.upsert("thread", "active")
    after = (await repo.attempts.enqueue("run")).enqueued_at
    assert before <= job.created_at <= job.updated_at <= after


async def test_an_unknown_thread_has_no_job(repo: RuntimeRepository) -> None:
    """``get`` raises, ``find`` returns None."""
    assert await repo.jobs.find("nobody") is None
    with pytest.raises(NotFoundError, match="job 'nobody'"):
        await repo.jobs.get("nobody")
    await repo.jobs.upsert("thread", "active")
    assert await repo.jobs.find("thread") == await repo.jobs.get("thread")


async def test_jobs_are_listed_by_pages(repo: RuntimeRepository) -> None:
    """Of a status or of all, ordered by thread; every job is on exactly one page."""
    for number in range(7):
        await repo.jobs.upsert(f"t{number}", "done" if number % 2 else "active")

    async def threads(**filters: Any) -> list[str]:
        seen: list[str] = []
        while page := await repo.jobs.list(**filters, after=seen[-1] if seen else "", limit=2):
            assert len(page) <= 2
            assert seen[-1:] != [page[-1].thread_id]
            seen += [job.thread_id for job in page]
        return seen

    assert await threads() == ["t0", "t1", "t2", "t3", "t4", "t5", "t6"]
    assert await threads(status="done") == ["t1", "t3", "t5"]
    assert await threads(status="active") == ["t0", "t2", "t4", "t6"]
    assert await threads(status="nowhere") == []


async def test_twenty_tasks_upsert_one_thread_once(factory: Factory) -> None:
    """Simultaneous calls agree on one row, whose status is one of theirs."""
    async with factory() as one, factory() as two:
        calls = (repo.jobs.upsert("thread", f"s{number}") for number in range(10) for repo in (one, two))
        jobs = await asyncio.gather(*calls)
        assert len({job.created_at for job in jobs}) == 1
        (stored,) = await one.jobs.list()
        assert stored in jobs


async def test_a_row_of_an_earlier_program_is_a_job(repo: RuntimeRepository, clock: Clock) -> None:
    """Whatever it called its statuses."""
    columns = "thread_id, status, created_at_ms, updated_at_ms"
    await execute(repo, f"insert into {{schema}}.runtime_jobs ({columns}) values ('thread', 'IN PROGRESS?', -1, 0)")
    stored = await repo.jobs.get("thread")
    assert stored.status == "IN PROGRESS?"
    assert await repo.jobs.list(status="IN PROGRESS?") == [stored]
    updated = await repo.jobs.upsert("thread", "done", now=clock.now)
    assert updated == Job("thread", "done", stored.created_at, clock.now)
