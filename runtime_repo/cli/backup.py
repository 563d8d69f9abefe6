"""``runtime-repo backup``: write all that is stored into an archive."""

from typing import TYPE_CHECKING

import click
from rich.console import Console

from runtime_repo.cli.shared import YES, Call, on_database
from runtime_repo.cli.text import number, said, size
from runtime_repo.cli.working import working

if TYPE_CHECKING:
    from runtime_repo.archive import BackupReport
    from runtime_repo.repository import RuntimeRepository

__all__ = ["command"]


@on_database(
    "backup",
    "runtime-repo backup runtime.db runtime-2025-11-25.zip",
    "runtime-repo backup postgresql://backup@db.example/app before-upgrade.zip",
    words=("ARCHIVE",),
)
@click.option(
    "--pg-dump",
    is_flag=True,
    help="On PostgreSQL, by the server's own pg_dump of the same major version, for pg_restore.",
)
async def command(call: Call, *, pg_dump: bool) -> int:
    """
    Write all that is stored into the new file ARCHIVE, as it is at one instant, while workers go on.

    It is readable for its owner alone, is read back before it gets its name, and never takes the place of a file.

    Exit codes: 0 it was written and proved; 1 it was refused, such as where there is such a file; 2 it could not be
    told.
    """
    repository = call.place.repository()
    try:
        with working(call, "writing the archive"):
            if pg_dump:
                await _dumped(call, repository)
                return YES
            report = await repository.backup(call.words[0])
    finally:
        await repository.close()
    call.answer(report.as_dict(), lambda console: _show(console, report))
    return YES


async def _dumped(call: Call, repository: "RuntimeRepository") -> None:
    from runtime_repo.postgres import PostgresRuntimeRepository

    if not isinstance(repository, PostgresRuntimeRepository):
        raise click.UsageError("--pg-dump is for PostgreSQL: leave it out")
    dump = await repository.pg_dump(call.words[0])
    call.answer(
        dump.as_dict(), lambda console: console.print(said(f"{dump.path}, {size(dump.size)}, by {dump.program}"))
    )


def _show(console: Console, report: "BackupReport") -> None:
    rows = number(sum(report.rows.values()))
    console.print(said(f"{rows} rows of version {report.version}, {size(report.size)}, in {report.duration:.2f} s"))
    for what in report.left_out:
        console.print(said(f"not in it: {what}", style="yellow"))
    console.print(said(f"{report.path} was written and read back.", style="green"))
