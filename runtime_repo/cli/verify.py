"""``runtime-repo verify``: whether a boot that may not migrate would serve."""

from typing import TYPE_CHECKING

import click
from rich.console import Console

from runtime_repo.cli.shared import NO, YES, Call, on_database
from runtime_repo.cli.text import differences, said

if TYPE_CHECKING:
    from runtime_repo.schema import SchemaStatus

__all__ = ["command"]


@on_database("verify", "runtime-repo verify runtime.db", "runtime-repo verify postgresql://app@db.example/app --json")
@click.option(
    "--on-drift",
    type=click.Choice(["refuse", "warn"]),
    default="refuse",
    show_default=True,
    help="As the boots that this is asked for have it.",
)
async def command(call: Call, on_drift: str) -> int:
    """
    Tell whether a boot of this release that may not migrate (migrate=False) would serve, and print every difference.

    Exit codes: 0 it would; 1 it would be refused; 2 it could not be told.
    """
    repository = call.place.repository(migrate=False, on_drift=on_drift)
    try:
        status = await repository.inspect()
    finally:
        await repository.close()
    call.answer({"serves": status.refusal is None} | status.as_dict(), lambda console: _show(console, status))
    return YES if status.refusal is None else NO


def _show(console: Console, status: "SchemaStatus") -> None:
    if status.refusal is None:
        console.print(said(f"It would serve: version {status.found} is as this release knows it.", style="green"))
    else:
        console.print(said(f"It would be refused: {status.refusal}", style="red"))
    for line in differences(status.differences, status.refusal):
        console.print(line)
