"""``runtime-repo move``: move a store to another place."""

from typing import TYPE_CHECKING

import click
from rich.console import Console

from runtime_repo.cli.shared import YES, Call, Place, on_database
from runtime_repo.cli.text import number, said
from runtime_repo.cli.working import working

if TYPE_CHECKING:
    from runtime_repo.archive import MoveReport

__all__ = ["command"]


@on_database(
    "move",
    "runtime-repo move runtime.db postgresql://migrator@db.example/app",
    "runtime-repo move postgresql://migrator@db.example/app sqlite:///runtime.db --json",
    words=("TARGET",),
)
@click.option("--force", is_flag=True, help="Also while leases are active, whose holders go on in the source.")
@click.option("--target-schema", metavar="NAME", help="The target's runtime schema, on PostgreSQL.")
@click.option(
    "--folder", type=click.Path(file_okay=False, exists=True), help="Where an archive of it is kept meanwhile."
)
async def command(call: Call, *, force: bool, target_schema: str | None, folder: str | None) -> int:
    """
    Move the store DATABASE to the empty place TARGET, from SQLite to PostgreSQL or back: every row as it is, with its
    id, token, lease and number.

    Quiesce the source first. It is only read, and goes on existing. On the target all of it is one transaction, which
    is proved before it is committed. What the target cannot hold is listed before anything is written.

    Exit codes: 0 it was moved; 1 it was refused, and nothing was written; 2 it could not be told.
    """
    from runtime_repo.archive import move

    given = call.place
    source = Place(given.given, given.schema if given.is_postgres else None, given.wait)
    target = Place(call.words[0], target_schema, given.wait)
    if target.is_postgres and target_schema is None and not given.is_postgres:
        target = Place(call.words[0], given.schema, given.wait)
    opened, other = source.repository(), target.repository()
    try:
        with working(call, "moving"):
            report = await move(opened, other, force=force, folder=folder)
    finally:
        await opened.close()
        await other.close()
    call.answer(report.as_dict(), lambda console: _show(console, report))
    return YES


def _show(console: Console, report: "MoveReport") -> None:
    for what in report.left_out:
        console.print(said(f"not moved: {what}", style="yellow"))
    rows = number(sum(report.rows.values()))
    words = f"Moved: {rows} rows of version {report.version}, the same on both sides, in {report.duration:.2f} s."
    console.print(said(words, style="green"))
