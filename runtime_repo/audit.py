"""Audit: who did what to what, and how it went. Entries are added and read; no verb changes or deletes one."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from runtime_repo.database import Queries, Row
from runtime_repo.errors import NotFoundError, UnreadableRowError
from runtime_repo.rows import UNREADABLE, Page, check_types, page, unreadable
from runtime_repo.values import check_count, check_id, from_json, from_ms, instant_ms, to_json, written

__all__ = ["Audit", "AuditEntry"]

_FIRST, _LAST = -(2**63), 2**63 - 1
"""Before and after every id and every instant."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what to what, and how it went, in the application's own words."""

    audit_id: int
    actor_type: str
    actor_id: str | None
    actor_role: str | None
    action: str
    resource_type: str
    resource_id: str | None
    result: str
    request_id: str
    details: Any
    created_at: datetime


class Audit:
    """
    The verbs on audit entries.

    *now* is for tests: it stands in for the database's clock.
    """

    def __init__(self, queries: Queries) -> None:
        self._queries = queries

    async def append(
        self,
        *,
        actor_type: str,
        action: str,
        resource_type: str,
        result: str,
        request_id: str,
        actor_id: str | None = None,
        actor_role: str | None = None,
        resource_id: str | None = None,
        details: Any = None,
        now: datetime | None = None,
    ) -> AuditEntry:
        """
        Add an entry, in the application's own words.

        Repeating the call adds a second entry: a call that was cancelled or timed out may have happened, and a log
        rather holds an act twice than not at all. Entries of one act have its *request_id* in common. In a
        ``repo.transaction()`` the entry is stored if, and only if, what it tells of is.

        Args:
            actor_type: What kind of actor it was, such as ``user`` or ``worker``.
            action: What was done, such as ``attempt.cancel``.
            resource_type: To what kind of thing.
            result: How it went, such as ``ok`` or ``denied``.
            request_id: What the entries of one act have in common; ``list`` finds them by it.
            actor_id: Which actor.
            actor_role: In which role.
            resource_id: Which thing.
            details: Whatever else there is to know: any JSON.
        """
        rows = await self._queries.fetch(
            "audit.append",
            check_id("actor_type", actor_type),
            _maybe_id("actor_id", actor_id),
            _maybe_id("actor_role", actor_role),
            check_id("action", action),
            check_id("resource_type", resource_type),
            _maybe_id("resource_id", resource_id),
            check_id("result", result),
            check_id("request_id", request_id),
            to_json("details", details),
            instant_ms("now", now),
        )
        return audit_entry_from_row(written(rows, "the audit entry"))

    async def list(
        self,
        *,
        request_id: str | None = None,
        action: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Page[AuditEntry]:
        """
        Return one page of the entries of a request or an action, or of all, the newest first.

        *since* is included and *until* is not, both to the millisecond. Pass the ``audit_id`` of the last entry of a
        page as *after* to get the next, which is older; a page shorter than *limit* is the last. What is added
        meanwhile is newer and moves no page. A page reads no more than it returns, of a request all its entries. What
        cannot be read is left out, and told in the page's ``unreadable``.

        Raises:
            NotFoundError: There is no entry *after*: it was deleted by other means.
        """
        start = _FIRST if since is None else instant_ms("since", since)
        end = (_LAST if until is None else instant_ms("until", until), _FIRST)
        size = check_count("limit", limit)
        of_request, of_action = _maybe_id("request_id", request_id), _maybe_id("action", action)
        if after is not None:
            last = check_count("after", after, most=_LAST)
            moments = await self._queries.fetch("audit.find_moment", last)
            if not moments:
                raise NotFoundError("audit entry", str(last))
            moment = moments[0]["created_at_ms"]
            if not isinstance(moment, int):
                raise UnreadableRowError("runtime_audit_logs", str(last), "its time is no whole number")
            end = min(end, (moment, last))
        query, which = "audit.list", tuple[str | None, ...]()
        if of_request is not None:
            query, which = "audit.list_by_request", (of_request, of_action)
        elif of_action is not None:
            query, which = "audit.list_by_action", (of_action,)
        return await page(
            lambda end, size: self._queries.fetch(query, start, *end, size, *which),
            audit_entry_from_row,
            after=end,
            limit=size,
            place=lambda row: (row["created_at_ms"], row["audit_id"]),
        )


def _maybe_id(name: str, value: str | None) -> str | None:
    return None if value is None else check_id(name, value)


def audit_entry_from_row(row: Row) -> AuditEntry:
    """An audit entry from the columns that every statement on audit entries returns."""
    try:
        actor_type, action, resource_type = row["actor_type"], row["action"], row["resource_type"]
        result, request_id = row["result"], row["request_id"]
        check_types((actor_type, action, resource_type, result, request_id), row["audit_id"])
        return AuditEntry(
            audit_id=row["audit_id"],
            actor_type=actor_type,
            actor_id=row["actor_id"],
            actor_role=row["actor_role"],
            action=action,
            resource_type=resource_type,
            resource_id=row["resource_id"],
            result=result,
            request_id=request_id,
            details=from_json(row["details_json"]),
            created_at=from_ms(row["created_at_ms"]),
        )
    except UNREADABLE as error:
        raise unreadable("runtime_audit_logs", row["audit_id"], error) from None
