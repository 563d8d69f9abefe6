"""Interrupts: questions that a run leaves behind, each answered once, by whoever comes first."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from runtime_repo.database import Queries, Row
from runtime_repo.errors import InvalidTransitionError, NotFoundError, PayloadMismatchError
from runtime_repo.rows import UNREADABLE, Page, check_types, known_status, page, unreadable
from runtime_repo.values import (
    as_read,
    canonical,
    check_after,
    check_choice,
    check_count,
    check_id,
    check_key,
    check_same,
    from_json,
    from_ms,
    instant_ms,
    json_text,
    maybe_from_ms,
    new_id,
    skipped,
    written,
)

__all__ = ["Interrupt", "InterruptStatus", "Interrupts"]


class InterruptStatus(StrEnum):
    """Where an interrupt is in its life. The last two are final."""

    PENDING = "pending"
    RESUMED = "resumed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Interrupt:
    """A question that an attempt left behind, and its answer."""

    interrupt_id: str
    thread_id: str
    run_id: str
    attempt_id: str
    """The attempt that asked."""
    value: Any
    """What is asked."""
    status: InterruptStatus
    """Whether there is an answer; None is one, too."""
    created_at: datetime
    resume_payload: Any
    """The answer."""
    resume_payload_hash: str | None
    """The SHA-256 of the answer's canonical JSON, in hexadecimal; None where there is no answer, or none is known."""
    resumed_at: datetime | None


class Interrupts:
    """
    The verbs on interrupts. Every write is safe to repeat: a call that was cancelled or timed out may have happened.

    An interrupt does not change an attempt. A worker that needs an answer creates the interrupt and completes its
    attempt; whoever answers resumes the interrupt and enqueues the next attempt, each in one ``repo.transaction()``.

    *now* is for tests: it stands in for the database's clock.
    """

    def __init__(self, queries: Queries) -> None:
        self._queries = queries

    async def create(
        self,
        thread_id: str,
        run_id: str,
        attempt_id: str,
        value: Any,
        *,
        interrupt_id: str | None = None,
        now: datetime | None = None,
    ) -> Interrupt:
        """
        Ask a question, once.

        Repeating the call with the same *interrupt_id* returns the interrupt that is stored, as it is by now. Neither
        the thread nor the attempt need be stored here.

        Args:
            thread_id: The conversation or process that waits for the answer, in the application's own terms; ``list``
                finds its questions.
            run_id: The run whose work stands still until there is one: whoever answers enqueues its next attempt.
            attempt_id: The attempt that asks.
            value: What is asked: any JSON, None included.
            interrupt_id: Makes the call safe to repeat. Without one a time-ordered id is made, and every call is
                another interrupt.

        Raises:
            PayloadMismatchError: The id is stored already with another thread, run, attempt or value.
        """
        interrupt_id = new_id() if interrupt_id is None else check_key("interrupt_id", interrupt_id)
        given = {
            "thread_id": check_id("thread_id", thread_id),
            "run_id": check_id("run_id", run_id),
            "attempt_id": check_key("attempt_id", attempt_id),
            "value": as_read(json_text("value", value)),
        }
        rows = await self._queries.fetch("interrupts.create", interrupt_id, *given.values(), instant_ms("now", now))
        if rows:
            return interrupt_from_row(rows[0])
        rows = await self._queries.fetch("interrupts.stored", interrupt_id)
        stored = interrupt_from_row(written(rows, f"interrupt {interrupt_id!r}"))
        found = {
            "thread_id": stored.thread_id,
            "run_id": stored.run_id,
            "attempt_id": stored.attempt_id,
            # An earlier program may have spelt it differently.
            "value": canonical(stored.value),
        }
        check_same("interrupt", interrupt_id, found, given)
        return stored

    async def get(self, interrupt_id: str) -> Interrupt:
        """
        Return an interrupt.

        Raises:
            NotFoundError: There is none with this id.
        """
        interrupt = await self.find(interrupt_id)
        if interrupt is None:
            raise NotFoundError("interrupt", interrupt_id)
        return interrupt

    async def find(self, interrupt_id: str) -> Interrupt | None:
        """Return an interrupt, or None."""
        rows = await self._queries.fetch("interrupts.find", check_key("interrupt_id", interrupt_id))
        return interrupt_from_row(rows[0]) if rows else None

    async def list(
        self,
        *,
        thread_id: str | None = None,
        status: InterruptStatus | None = None,
        after: str = "",
        limit: int = 100,
    ) -> Page[Interrupt]:
        """
        Return one page of the interrupts of a thread or a status, or of all, ordered by id.

        Pass the last id of a page as *after* to get the next; a page shorter than *limit* is the last. The order of
        text may differ between databases. A thread and a status are looked up, and a page reads all that have it. What
        cannot be read is left out, and told in the page's ``unreadable``.
        """
        wanted = None if status is None else check_choice("status", InterruptStatus, status)
        query, which, rest = "interrupts.list", tuple[str, ...](), tuple[str | None, ...]()
        if thread_id is not None:
            query, which, rest = "interrupts.list_by_thread", (check_id("thread_id", thread_id),), (wanted,)
        elif wanted is not None:
            query, which = "interrupts.list_by_status", (wanted,)
        return await page(
            lambda after, limit: self._queries.fetch(query, *which, after, limit, *rest),
            interrupt_from_row,
            after=check_after(after),
            limit=check_count("limit", limit),
            place=lambda row: row["interrupt_id"],
        )

    async def resume(self, interrupt_id: str, payload: Any, *, now: datetime | None = None) -> Interrupt:
        """
        Answer the question, once: *payload* is any JSON, and None is an answer like any other.

        The first answer stays. Repeating the call with the same payload, equal as JSON whatever the order of its
        keys, returns the interrupt as it was answered. Of rivals with different payloads one wins; in a
        ``repo.transaction()`` the others wait for its end before they learn which.

        Raises:
            NotFoundError: There is none with this id.
            PayloadMismatchError: It was answered with another payload: read the answer that counts.
            InvalidTransitionError: It was cancelled, or an earlier program resumed it and left no answer to compare.
        """
        text = as_read(json_text("payload", payload))
        digest = hashlib.sha256(text.encode()).hexdigest()
        rows = await self._queries.fetch(
            "interrupts.resume", check_key("interrupt_id", interrupt_id), text, digest, instant_ms("now", now)
        )
        interrupt = await self._as_it_is(interrupt_id, rows)
        if interrupt.resume_payload_hash is None:
            raise InvalidTransitionError("interrupt", interrupt_id, status=interrupt.status, verb="resume")
        if interrupt.resume_payload_hash != digest:
            raise PayloadMismatchError("interrupt", interrupt_id, ["resume_payload"])
        return interrupt

    async def cancel(self, interrupt_id: str) -> Interrupt:
        """
        Withdraw a question that nobody has answered. Repeating the call changes nothing.

        Raises:
            NotFoundError: There is none with this id.
            InvalidTransitionError: It has been answered already.
        """
        rows = await self._queries.fetch("interrupts.cancel", check_key("interrupt_id", interrupt_id))
        interrupt = await self._as_it_is(interrupt_id, rows)
        if interrupt.status is not InterruptStatus.CANCELLED:
            raise InvalidTransitionError("interrupt", interrupt_id, status=interrupt.status, verb="cancel")
        return interrupt

    async def _as_it_is(self, interrupt_id: str, rows: Sequence[Row]) -> Interrupt:
        """
        The interrupt that was changed, or the one that need not be.

        The latter answers for what was done before and may not be on any standby yet, so it waits as that did.
        """
        changed = bool(rows)
        rows = rows or await self._queries.fetch("interrupts.stored", interrupt_id)
        if not rows:
            await self.get(interrupt_id)
            raise skipped(f"interrupt {interrupt_id!r}")
        interrupt = interrupt_from_row(rows[0])
        if not changed and interrupt.status is InterruptStatus.PENDING:
            raise skipped(f"interrupt {interrupt_id!r}")
        return interrupt


def interrupt_from_row(row: Row) -> Interrupt:
    """An interrupt from the columns that every statement on interrupts returns."""
    try:
        interrupt_id, thread_id, run_id = row["interrupt_id"], row["thread_id"], row["run_id"]
        check_types((interrupt_id, thread_id, run_id), 0)
        return Interrupt(
            interrupt_id=interrupt_id,
            thread_id=thread_id,
            run_id=run_id,
            attempt_id=row["attempt_id"],
            value=from_json(row["value_json"]),
            status=known_status(InterruptStatus, row["status"]),
            created_at=from_ms(row["created_at_ms"]),
            resume_payload=from_json(row["resume_payload_json"]),
            resume_payload_hash=row["resume_payload_hash"],
            resumed_at=maybe_from_ms(row["resumed_at_ms"]),
        )
    except UNREADABLE as error:
        raise unreadable("runtime_interrupts", row["interrupt_id"], error) from None
