"""Step reports: what a worker says it did within an attempt, each stored once."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from runtime_repo.database import Queries, Row
from runtime_repo.fencing import check_lease, refused
from runtime_repo.records import Lease
from runtime_repo.rows import UNREADABLE, Page, check_types, page, unreadable
from runtime_repo.values import (
    as_read,
    canonical,
    check_count,
    check_id,
    check_key,
    check_same,
    from_json,
    from_ms,
    instant_ms,
    to_json,
)

__all__ = ["StepReport", "StepReports"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a worker reported of one step of an attempt, stored once for each dedupe token."""

    report_id: int
    """It grows with every report of the same attempt."""
    attempt_id: str
    action_id: str
    status: str
    """In the worker's own words."""
    dedupe_token: str
    payload: Any
    worker_id: str
    lease_version: int | None
    """The fencing token under which it was reported; None from version 1."""
    created_at: datetime
    is_duplicate: bool = field(default=False, compare=False)
    """Whether the ``record`` that returned it found it stored already."""


class StepReports:
    """
    The verbs on step reports, which nothing changes. They are deleted with their attempt, when that is pruned.

    *now* is for tests: it stands in for the database's clock, which judges everything otherwise.
    """

    def __init__(self, queries: Queries) -> None:
        self._queries = queries

    async def record(
        self,
        lease: Lease,
        action_id: str,
        status: str,
        dedupe_token: str,
        payload: Any = None,
        *,
        now: datetime | None = None,
    ) -> StepReport:
        """
        Store what was done in a step of the attempt, once for each *dedupe_token* of the attempt.

        Repeating the call returns the report that is stored, with ``is_duplicate``, also after this lease has ended.
        So does the call of a later try that holds the attempt now: the step was done before. A report is accepted for
        as long as a result would be, even when the lease has run out meanwhile.

        Raises:
            LeaseLostError: The attempt is no longer this lease's to report on: stop working.
            PayloadMismatchError: The dedupe token is stored already with another action, status or payload.
        """
        check_lease(lease)
        given = {
            "action_id": check_id("action_id", action_id),
            "status": check_id("status", status),
            "payload": to_json("payload", payload),
        }
        token = check_id("dedupe_token", dedupe_token)
        rows = await self._queries.fetch(
            "step_reports.record",
            lease.attempt_id,
            lease.version,
            lease.worker_id,
            given["action_id"],
            given["status"],
            token,
            given["payload"],
            instant_ms("now", now),
            lease.lease_id,
        )
        if rows:
            return step_report_from_row(rows[0])
        rows = await self._queries.fetch(
            "step_reports.recorded", lease.attempt_id, lease.version, token, lease.lease_id
        )
        if not rows:
            raise await refused(self._queries, lease)
        stored = step_report_from_row(rows[0], is_duplicate=True)
        found = {
            "action_id": stored.action_id,
            "status": stored.status,
            "payload": None if stored.payload is None else canonical(stored.payload),
        }
        given["payload"] = given["payload"] and as_read(given["payload"])
        check_same("step report", token, found, given)
        return stored

    async def list(self, attempt_id: str, *, after: int = 0, limit: int = 100) -> Page[StepReport]:
        """
        Return one page of an attempt's reports, in the order in which they were stored.

        Pass the last ``report_id`` of a page as *after* to get the next, also later: whatever is stored after a page
        was read comes after it. What cannot be read is left out, and told in the page's ``unreadable``.
        """
        of_attempt = check_key("attempt_id", attempt_id)
        return await page(
            lambda after, limit: self._queries.fetch("step_reports.list", of_attempt, after, limit),
            step_report_from_row,
            after=check_count("after", after, least=0, most=2**63 - 1),
            limit=check_count("limit", limit),
            place=lambda row: row["report_id"],
        )


def step_report_from_row(row: Row, *, is_duplicate: bool = False) -> StepReport:
    """A step report from the columns that every statement on step reports returns."""
    try:
        attempt_id, action_id, status = row["attempt_id"], row["action_id"], row["status"]
        dedupe_token, worker_id, version = row["dedupe_token"], row["worker_id"], row["lease_version"]
        check_types((attempt_id, action_id, status, dedupe_token, worker_id), row["report_id"] | (version or 0))
        return StepReport(
            report_id=row["report_id"],
            attempt_id=attempt_id,
            action_id=action_id,
            status=status,
            dedupe_token=dedupe_token,
            payload=from_json(row["payload_json"]),
            worker_id=worker_id,
            lease_version=version,
            created_at=from_ms(row["created_at_ms"]),
            is_duplicate=is_duplicate,
        )
    except UNREADABLE as error:
        raise unreadable("runtime_step_reports", row["report_id"], error) from None
