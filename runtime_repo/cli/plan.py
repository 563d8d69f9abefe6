"""``runtime-repo plan``: what a boot would do."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.text import Text

from runtime_repo.cli.shared import NO, YES, Call, on_database
from runtime_repo.cli.text import differences, said, statements

if TYPE_CHECKING:
    from runtime_repo.schema import SchemaPlan

__all__ = ["command"]


@on_database(
    "plan",
    "runtime-repo plan runtime.db",
    "runtime-repo plan postgresql://app@db.example/app --sql > upgrade.sql",
)
@click.option("--sql", is_flag=True, help="Print the SQL and nothing else, as one transaction.")
async def command(call: Call, *, sql: bool) -> int:
    """
    Show what a boot of this release would do: serve, refuse, or apply each of these migrations, with its SQL.

    Nothing is touched. Where it would migrate, the rows are read that could stand in the way.

    Exit codes: 0 it would serve, or migrate and serve; 1 it would be refused; 2 it could not be told.
    """
    repository = call.place.repository()
    try:
        plan = await repository.plan()
    finally:
        await repository.close()
    call.answer(plan.as_dict(), lambda console: _show_sql(plan) if sql else _show(console, plan))
    return YES if plan.refusal is None else NO


def _show(console: Console, plan: "SchemaPlan") -> None:
    for line in _summary(plan):
        console.print(line)
    for migration in plan.migrations:
        console.print()
        console.print(said(f"{migration.version} {migration.name}", style="bold"))
        console.print()
        console.print(statements(migration.sql))


def _summary(plan: "SchemaPlan") -> Iterator[Text]:
    if plan.refusal is not None:
        yield said(f"A boot would be refused: {plan.refusal}", style="red")
        return
    yield from differences(plan.tolerated)
    if not plan.migrations:
        yield said(f"A boot would change nothing: version {plan.found} is current.", style="green")
        return
    names = ", ".join(f"{migration.version} {migration.name}" for migration in plan.migrations)
    found = f"version {plan.found}" if plan.found else "nothing"
    yield said(f"A boot would go from {found} to version {plan.supported}, in one transaction: {names}")
    if plan.backup is not None:
        yield said(f"It would first copy the file to {plan.backup}")


def _show_sql(plan: "SchemaPlan") -> None:
    if plan.migrations:
        text = "\n".join(f"-- {each.version} {each.name}\n{each.sql}" for each in plan.migrations)
        click.echo(f"begin;\n\n{text}\ncommit;")
    elif plan.refusal is not None:
        click.echo(plan.refusal, err=True)
