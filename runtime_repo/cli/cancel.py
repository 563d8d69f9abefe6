"""``runtime-repo cancel``: the end of what is not final."""

from datetime import timedelta
from typing import Any

import click

from runtime_repo.cli.many import SPAN, actor, carry_out, narrowing
from runtime_repo.cli.shared import Call, on_database

__all__ = ["command"]


@narrowing
@click.option(
    "--status",
    type=click.Choice(["queued", "retry_backoff", "leased", "running"]),
    help="Only those of this status; otherwise also those that somebody works on.",
)
@click.option("--older-than", type=SPAN, help="Only those that were enqueued more than that ago, such as 90s or 7d.")
@actor
@on_database(
    "cancel",
    "runtime-repo cancel runtime.db --queue emails --status queued",
    "runtime-repo cancel postgresql://app@db.example/app --older-than 7d --actor ann",
)
async def command(call: Call, *, actor: str | None, older_than: timedelta | None, **narrowed: Any) -> int:
    """
    Cancel attempts that are not final and fit all that is said; something has to be said.

    Whoever works on one learns it at the next write. It is done a thousand at a time, each with an entry of audit; what
    is interrupted has been done in part.

    Exit codes: 0 it is done; 1 a boot that may not migrate would be refused; 2 it could not be told.
    """
    if older_than is None and not any(narrowed[name] for name in ("status", "queue", "error")):
        raise click.UsageError(
            "nothing says which: give --status, --queue, --error or --older-than (--older-than 0s is all)"
        )
    return await carry_out(
        call,
        actor,
        "cancelling",
        "cancelled",
        lambda attempts, who: attempts.cancel_many(actor=who, older_than=older_than, **narrowed),
    )
