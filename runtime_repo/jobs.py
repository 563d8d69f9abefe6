"""Jobs: how each thread is doing, in the application's own words."""

from dataclasses import dataclass
from datetime import datetime

from runtime_repo.database import Queries, Row
from runtime_repo.errors import NotFoundError
from runtime_repo.rows import UNREADABLE, Page, check_types, page, unreadable
from runtime_repo.values import check_after, check_count, check_id, from_ms, instant_ms, written

__all__ = ["Job", "Jobs"]


@dataclass(frozen=True, slots=True)
class Job:
    """What the application says of a thread: one row for each, with a status in the application's own words."""

    thread_id: str
    status: str
    created_at: datetime
    updated_at: datetime


class Jobs:
    """
    The verbs on jobs.

    *now* is for tests: it stands in for the database's clock.
    """

    def __init__(self, queries: Queries) -> None:
        self._queries = queries

    async def upsert(self, thread_id: str, status: str, *, now: datetime | None = None) -> Job:
        """
        Say how a thread is doing, whether it was heard of before or not.

        The status is the application's own: any text of 1 to 512 characters. ``created_at`` is kept and
        ``updated_at`` moves, also when the status is the one that is stored. Repeating the call is safe; of two that
        differ the one that comes last stays.
        """
        rows = await self._queries.fetch(
            "jobs.upsert", check_id("thread_id", thread_id), check_id("status", status), instant_ms("now", now)
        )
        return job_from_row(written(rows, f"job {thread_id!r}"))

    async def get(self, thread_id: str) -> Job:
        """
        Return a thread's job.

        Raises:
            NotFoundError: The thread has none.
        """
        job = await self.find(thread_id)
        if job is None:
            raise NotFoundError("job", thread_id)
        return job

    async def find(self, thread_id: str) -> Job | None:
        """Return a thread's job, or None."""
        rows = await self._queries.fetch("jobs.find", check_id("thread_id", thread_id))
        return job_from_row(rows[0]) if rows else None

    async def list(self, *, status: str | None = None, after: str = "", limit: int = 100) -> Page[Job]:
        """
        Return one page of the jobs, of one status or of all, ordered by thread.

        Pass the last thread of a page as *after* to get the next; a page shorter than *limit* is the last. The order
        of text may differ between databases. A status is looked up, and a page reads all that have it. What cannot be
        read is left out, and told in the page's ``unreadable``.
        """
        query, given = "jobs.list", tuple[str, ...]()
        if status is not None:
            query, given = "jobs.list_by_status", (check_id("status", status),)
        return await page(
            lambda after, limit: self._queries.fetch(query, *given, after, limit),
            job_from_row,
            after=check_after(after),
            limit=check_count("limit", limit),
            place=lambda row: row["thread_id"],
        )


def job_from_row(row: Row) -> Job:
    """A job from the columns that every statement on jobs returns."""
    try:
        thread_id, status = row["thread_id"], row["status"]
        check_types((thread_id, status), 0)
        return Job(thread_id, status, from_ms(row["created_at_ms"]), from_ms(row["updated_at_ms"]))
    except UNREADABLE as error:
        raise unreadable("runtime_jobs", row["thread_id"], error) from None
