"""``runtime-repo retry``: one more try for what has failed."""

from datetime import timedelta
from typing import Any

import click

from runtime_repo.cli.many import SPAN, actor, carry_out, narrowing
from runtime_repo.cli.shared import Call, on_database

__all__ = ["command"]


@narrowing
@click.option("--older-than", type=SPAN, help="Only those that failed more than that ago, such as 90s or 7d.")
@actor
@on_database(
    "retry",
    "runtime-repo retry runtime.db --queue emails --error 'connection refused'",
    "runtime-repo retry postgresql://app@db.example/app --older-than 1h --limit 1000",
)
async def command(call: Call, *, actor: str | None, older_than: timedelta | None, **narrowed: Any) -> int:
    """
    Give failed attempts one more try: all of them, or those that fit all that is said.

    It is done a thousand at a time, each with an entry of audit; what is interrupted has been done in part.

    Exit codes: 0 it is done; 1 a boot that may not migrate would be refused; 2 it could not be told.
    """
    return await carry_out(
        call,
        actor,
        "retrying",
        "to be tried again",
        lambda attempts, who: attempts.retry_many(actor=who, older_than=older_than, **narrowed),
    )
