"""``runtime-repo resume``: let everybody claim again."""

import click

from runtime_repo.cli.control import shown
from runtime_repo.cli.shared import YES, Call, on_database

__all__ = ["command"]


@on_database("resume", "runtime-repo resume runtime.db", "runtime-repo resume runtime.db --queue emails")
@click.option("--queue", help="A queue that was paused, instead of the store that was quiesced.")
async def command(call: Call, *, queue: str | None) -> int:
    """
    Let everybody claim again, after runtime-repo quiesce or, with --queue, after runtime-repo pause.

    A queue that is paused stays so when the store is resumed, and the other way round.

    Exit codes: 0 it is done; 2 it could not be told.
    """
    async with call.place.repository(migrate=False) as repository:
        state = await repository.control.resume(queue)
    call.answer(state.as_dict(), lambda console: shown(console, state))
    return YES
