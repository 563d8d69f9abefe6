"""``runtime-repo doctor``: what is wrong, and what mends it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from runtime_repo.cli.redaction import printable
from runtime_repo.cli.shared import NO, YES, Call, on_database
from runtime_repo.cli.text import said, statements

if TYPE_CHECKING:
    from runtime_repo.doctor import Diagnosis, Finding

__all__ = ["command"]

_STYLES = {"well": "green", "note": "yellow", "ill": "red", "unknown": "magenta"}


@click.option("--sql", is_flag=True, help="Print the SQL that mends drift and nothing else, as one transaction.")
@on_database(
    "doctor",
    "runtime-repo doctor runtime.db",
    "runtime-repo doctor postgresql://app@db.example/app --sql | psql -v ON_ERROR_STOP=1",
    "runtime-repo doctor runtime.db --sql | sqlite3 -bail runtime.db",
)
async def command(call: Call, *, sql: bool) -> int:
    """
    Find out what is wrong: drift, with the SQL that mends it, rights, settings, clocks, long transactions, dead rows,
    invalid indexes, a pooler in between, a file system that cannot hold WAL.

    Nothing is touched. After the SQL has been run, runtime-repo verify says yes.

    Exit codes: 0 all is well, apart from what may be meant; 1 something is ill, or a boot that may not migrate would be
    refused; 2 it could not be told.
    """
    repository = call.place.repository()
    try:
        diagnosis = await repository.doctor()
    finally:
        await repository.close()
    if sql and not call.is_json:
        click.echo(diagnosis.script, nl=False)
    else:
        call.answer(diagnosis.as_dict(), lambda console: _show(console, diagnosis))
    return YES if diagnosis.is_well else NO


def _show(console: Console, diagnosis: "Diagnosis") -> None:
    width = max(len(finding.check) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        for line in _lines(finding, width):
            console.print(line)
    if diagnosis.repairs:
        console.print()
        console.print(said("What mends the drift, as one transaction:", style="bold"))
        console.print(statements(diagnosis.script))
        for repair in diagnosis.repairs:
            for warning in repair.warnings:
                console.print(said(f"Beware: {warning}", style="yellow"))


def _lines(finding: "Finding", width: int) -> Iterator[Text]:
    line = said(f"{finding.state:<8}", style=_STYLES[finding.state])
    yield line.append(f"{finding.check:<{width}}  {printable(finding.told)}", style="default")
    if finding.advice is not None:
        yield said(" " * (8 + width + 2) + finding.advice, style="dim")
