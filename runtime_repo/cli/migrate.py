"""``runtime-repo migrate``: bring the schema to this release's version."""

from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from runtime_repo.cli.shared import YES, Call, on_database, seconds
from runtime_repo.cli.text import differences, said, table
from runtime_repo.cli.working import working

if TYPE_CHECKING:
    from runtime_repo.archive import BackupReport
    from runtime_repo.schema import SchemaReport

__all__ = ["command"]


@on_database(
    "migrate",
    "runtime-repo migrate runtime.db",
    "runtime-repo migrate postgresql://migrator@db.example/app --backup before-upgrade.zip",
)
@click.option(
    "--backup",
    metavar="ARCHIVE",
    help="Write all that is stored into this new file first, as runtime-repo backup does.",
)
@click.option("--copy/--no-copy", default=None, help="On SQLite, copy the file beside itself first.  [default: --copy]")
@seconds("--lock-timeout", "How long to wait for another's migration, or for the locks of live traffic.", default=60.0)
async def command(call: Call, *, backup: str | None, copy: bool | None, lock_timeout: float) -> int:
    """
    Bring the schema to this release's version, as a boot would, and show each step with its time.

    All of it is one transaction: whatever fails or interrupts it leaves the database as it was. Where the schema is
    current nothing is done, and nothing is backed up.

    Exit codes: 0 the schema is this release's; 1 it was refused, and nothing was changed; 2 it could not be told.
    """
    options: dict[str, Any] = {"lock_timeout": lock_timeout}
    if copy is not None:
        if call.place.is_postgres:
            raise click.UsageError("--copy is for SQLite: on PostgreSQL take a --backup")
        options["backup"] = copy
    archives: list[BackupReport] = []

    async def take_backup() -> None:
        """Under the lock: no other migration can come between."""
        other = call.place.repository()
        try:
            if backup is not None and (await other.inspect()).found:
                archives.append(await other.backup(backup))
        finally:
            await other.close()

    with working(call, "migrating"):
        async with call.place.repository(before_migrate=take_backup, **options) as repository:
            report = repository.boot_report
    archive = archives[0] if archives else None
    call.answer(_as_dict(report, archive), lambda console: _show(console, report, archive))
    return YES


def _as_dict(report: "SchemaReport", archive: "BackupReport | None") -> dict[str, Any]:
    from runtime_repo.values import plain

    values: dict[str, Any] = plain(report)
    return values | {"archive": None if archive is None else archive.as_dict()}


def _show(console: Console, report: "SchemaReport", archive: "BackupReport | None") -> None:
    for line in differences(report.tolerated):
        console.print(line)
    if not report.applied:
        waited = (
            f" (another process migrated it, {report.waited:.1f} s)" if report.from_version < report.to_version else ""
        )
        console.print(said(f"Nothing to do: version {report.to_version} is current.{waited}", style="green"))
        return
    steps = table("version", "migration", "time", align="rlr")
    for step in report.applied:
        steps.add_row(str(step.version), step.name, f"{step.duration:.3f} s")
    console.print(steps)
    if report.backup is not None:
        console.print(said(f"before that the file was copied to {report.backup}"))
    if archive is not None:
        console.print(said(f"before that all that was stored was written to {archive.path}"))
    if report.waited >= 0.1:
        console.print(said(f"waited {report.waited:.1f} s for locks"))
    found = f"version {report.from_version}" if report.from_version else "nothing"
    console.print(said(f"From {found} to version {report.to_version}.", style="green"))
