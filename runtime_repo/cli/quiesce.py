"""``runtime-repo quiesce``: let nobody claim anything, and wait until nothing is held."""

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from runtime_repo.cli.control import shown
from runtime_repo.cli.shared import YES, Call, on_database, seconds
from runtime_repo.cli.working import working

if TYPE_CHECKING:
    from runtime_repo.control import QuiesceProgress

__all__ = ["command"]


@on_database(
    "quiesce",
    "runtime-repo quiesce runtime.db --reason 'upgrade to 2.0'",
    "runtime-repo quiesce postgresql://app@db.example/app --timeout 600",
)
@click.option("--reason", help="Why, for whoever looks at the status.")
@seconds("--timeout", "Seconds to wait for what is held; nothing new is claimed either way.", default=60.0)
async def command(call: Call, *, reason: str | None, timeout: float) -> int:  # noqa: ASYNC109 - an option's value
    """
    Let nobody claim anything any more, and wait until nothing is held; until runtime-repo resume, whatever restarts.

    Workers finish what they hold, and find nothing more. It may be repeated, to wait on.

    Exit codes: 0 nothing is held, and nobody can claim; 1 something is still held, but nothing new is claimed; 2 it
    could not be told.
    """
    async with call.place.repository(migrate=False) as repository:
        with working(call, "quiescing") as progress:

            def tell(waiting: "QuiesceProgress") -> None:
                if progress is not None:
                    progress.update(progress.task_ids[0], description=_waiting(waiting))

            state = await repository.control.quiesce(reason, timeout=timedelta(seconds=timeout), progress=tell)
    call.answer(state.as_dict(), lambda console: shown(console, state))
    return YES


def _waiting(found: "QuiesceProgress") -> Any:
    if found.claims:
        return f"waiting for {len(found.claims)} transactions that may still claim"
    return f"waiting for {found.leases:,} leases of {len(found.holders):,} workers"
