"""``runtime-repo status``: what is there."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from runtime_repo.cli.control import words
from runtime_repo.cli.shared import NO, YES, Call, on_database
from runtime_repo.cli.text import counted, differences, facts, instant, number, said, size, span, table

if TYPE_CHECKING:
    from rich.table import Table

    from runtime_repo.status import StoreStatus

__all__ = ["command"]

_MOST = 10
"""How many workers are shown; --json has all of them."""


@on_database("status", "runtime-repo status runtime.db", "runtime-repo status postgresql://app@db.example/app --json")
async def command(call: Call) -> int:
    """
    Show what is there: the server, the schema and its history, queues, leases, switches and sizes.

    It reads only, needs no boot, and tells what can be told also of a schema at an earlier version or one that a boot
    would refuse.

    Exit codes: 0 a boot of this release would serve, or migrate and serve; 1 it would be refused; 2 it could not be
    told.
    """
    repository = call.place.repository()
    try:
        status = await repository.status()
    finally:
        await repository.close()
    call.answer(status.as_dict(), lambda console: _show(console, status))
    return YES if status.schema.refusal is None else NO


def _show(console: Console, status: "StoreStatus") -> None:
    console.print(said(status.place, style="bold"))
    console.print(facts(list(_facts(status))))
    for part in _tables(status):
        console.print()
        console.print(part)
    remarks = list(differences(status.schema.differences, status.schema.refusal))
    remarks += [said(f"? {what}", style="yellow") for what in status.unknown]
    if remarks:
        console.print()
    for line in remarks:
        console.print(line)


def _facts(status: "StoreStatus") -> Iterator[tuple[str, Text]]:
    yield "server", said(f"{status.server}, {size(status.size)}" if status.server else "there is no such file yet")
    yield "schema", _schema(status)
    for number_, row in enumerate(status.ledger):
        yield "ledger" if number_ == 0 else "", said(f"{row.version} {row.name}, {instant(row.applied_at)}")
    if status.migrating is not None:
        yield "migrating", said(str(status.migrating), style="yellow")
    if status.control is not None:
        for number_, line in enumerate(words(status.control)):
            yield "stopped" if number_ == 0 else "", said(line, style="yellow")
    if status.failed is not None:
        held = sum(worker.leases for worker in status.workers)
        yield "leases", said(f"{number(held)} held by {counted(len(status.workers), 'worker')}")
        yield "failed", said(counted(status.failed, "attempt"), style="red" if status.failed else "")
        yield "interrupts", said(f"{number(status.pending_interrupts)} pending")


def _schema(status: "StoreStatus") -> Text:
    schema = status.schema
    if schema.refusal is not None:
        return said(f"refused: {schema.refusal}", style="red")
    found = f"version {schema.found}" if schema.found else "nothing yet"
    if schema.pending:
        return said(f"{found}; a boot would apply {', '.join(schema.pending)}", style="yellow")
    return said(f"{found}, current", style="green")


def _tables(status: "StoreStatus") -> Iterator["Table"]:
    now = datetime.now(UTC)
    if status.queues:
        queues = table("queue", "ready", "delayed", "leased", "oldest", align="lrrrr")
        for queue in status.queues:
            counts = (number(queue.ready), number(queue.delayed), number(queue.leased))
            queues.add_row(said(queue.queue), *counts, span(queue.oldest_age))
        yield queues
    if status.workers:
        workers = table("worker", "leases", "expired", "heartbeat", "first expires", align="lrrrr")
        for worker in status.workers[:_MOST]:
            left = worker.first_expiry - now
            workers.add_row(
                said(worker.worker_id),
                number(worker.leases),
                number(worker.expired),
                f"{span(max(now - worker.heartbeat_at, now - now))} ago",
                f"in {span(left)}" if left.total_seconds() > 0 else f"{span(-left)} ago",
            )
        if len(status.workers) > _MOST:
            workers.add_row(f"and {len(status.workers) - _MOST:,} more", *[""] * 4, style="dim")
        yield workers
    if status.tables:
        tables = table("table", "rows, about", "size", align="lrr")
        for each in status.tables:
            tables.add_row(each.name, number(each.rows), size(each.size))
        yield tables
