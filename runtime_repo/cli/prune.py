"""``runtime-repo prune``: what has ended long ago is deleted."""

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from runtime_repo.cli.many import SPAN, actor, carry_out, narrowing
from runtime_repo.cli.shared import Call, on_database

if TYPE_CHECKING:
    from runtime_repo.attempts import Attempts

__all__ = ["command"]

_BATCH = 1000


@narrowing
@click.option("--status", type=click.Choice(["completed", "failed", "cancelled"]), help="Only those of this status.")
@click.option(
    "--older-than", type=SPAN, required=True, help="Only those that ended more than that ago, such as 90s or 7d."
)
@actor
@on_database(
    "prune",
    "runtime-repo prune runtime.db --older-than 30d",
    "runtime-repo prune postgresql://app@db.example/app --older-than 7d --status completed",
)
async def command(call: Call, *, actor: str | None, older_than: timedelta, limit: int | None, **narrowed: Any) -> int:
    """
    Delete final attempts that ended long ago and fit all that is said, with their reports and questions.

    It is done a thousand at a time, the oldest first, each with an entry of audit; what is interrupted has been done in
    part.

    Exit codes: 0 it is done; 1 a boot that may not migrate would be refused; 2 it could not be told.
    """

    async def work(attempts: "Attempts", who: str) -> int:
        count = 0
        while True:
            wanted = _BATCH if limit is None else min(_BATCH, limit - count)
            done = await attempts.prune(actor=who, older_than=older_than, limit=wanted, **narrowed)
            count += done
            if done < wanted or count == limit:
                return count

    return await carry_out(call, actor, "pruning", "deleted", work)
