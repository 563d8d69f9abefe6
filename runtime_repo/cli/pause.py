"""``runtime-repo pause``: let nobody claim from a queue."""

from datetime import timedelta

import click

from runtime_repo.cli.control import shown
from runtime_repo.cli.shared import YES, Call, on_database, seconds
from runtime_repo.cli.working import working

__all__ = ["command"]


@on_database(
    "pause",
    "runtime-repo pause runtime.db emails --reason 'the mail server is down'",
    "runtime-repo pause postgresql://app@db.example/app emails",
    words=("QUEUE",),
)
@click.option("--reason", help="Why, for whoever looks at the status.")
@seconds("--timeout", "Seconds to wait for claims that had begun.", default=60.0)
async def command(call: Call, *, reason: str | None, timeout: float) -> int:  # noqa: ASYNC109 - an option's value
    """
    Let nobody claim from QUEUE any more, until runtime-repo resume --queue QUEUE; what is held of it goes on.

    Exit codes: 0 nobody can claim from it; 1 a transaction that had begun before still may; 2 it could not be told.
    """
    async with call.place.repository(migrate=False) as repository:
        with working(call, "pausing"):
            state = await repository.control.pause(call.words[0], reason, timeout=timedelta(seconds=timeout))
    call.answer(state.as_dict(), lambda console: shown(console, state))
    return YES
