"""``runtime-repo restore``: put an archive in the place of what is stored."""

from typing import TYPE_CHECKING

import click
from rich.console import Console

from runtime_repo.cli.shared import YES, Call, on_database
from runtime_repo.cli.text import number, said
from runtime_repo.cli.working import working

if TYPE_CHECKING:
    from runtime_repo.archive import RestoreReport

__all__ = ["command"]


@on_database(
    "restore",
    "runtime-repo restore runtime.db runtime-2025-11-25.zip",
    "runtime-repo restore postgresql://migrator@db.example/app before-upgrade.zip --json",
    words=("ARCHIVE",),
)
@click.option(
    "--force",
    is_flag=True,
    help="Also while leases are active, others use the store, or the application's views depend on it.",
)
@click.option(
    "--keep-in",
    metavar="SCHEMA",
    help="On PostgreSQL, the schema that keeps what is replaced, where the role may not create one.",
)
async def command(call: Call, *, force: bool, keep_in: str | None) -> int:
    """
    Put what ARCHIVE holds in the place of what is stored, at the archive's version, and keep what was there.

    Stop every worker first. Whatever interrupts it leaves the old store or the new one, whole, and the same command
    again succeeds.

    Exit codes: 0 it was restored; 1 it was refused, and nothing was changed; 2 it could not be told.
    """
    repository = call.place.repository()
    try:
        with working(call, "restoring"):
            report = await repository.restore(call.words[0], force=force, keep_in=keep_in)
    finally:
        await repository.close()
    call.answer(report.as_dict(), lambda console: _show(console, report))
    return YES


def _show(console: Console, report: "RestoreReport") -> None:
    console.print(said(f"{number(sum(report.rows.values()))} rows, in {report.duration:.2f} s"))
    for title, found in (
        ("in spite of", report.overridden),
        ("not in the archive", report.left_out),
        ("not granted again", report.not_granted),
    ):
        for what in found:
            console.print(said(f"{title}: {what}", style="yellow"))
    if report.requeued:
        console.print(said(f"{number(report.requeued)} attempts that were held are queued again"))
    if report.kept is not None:
        console.print(said(f"what was there before is kept in {report.kept}"))
    console.print(said(f"Restored: version {report.version}.", style="green"))
