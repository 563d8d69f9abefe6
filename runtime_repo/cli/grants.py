"""``runtime-repo grants``: what each role needs on PostgreSQL, and no more."""

import json
import os

import click

from runtime_repo.cli.shared import DEBUG, SCHEMA, YES, epilog

__all__ = ["command"]


@click.command(
    "grants",
    epilog=epilog(
        "runtime-repo grants --migrator app_owner --worker app --monitor grafana --backup backup | psql",
        "runtime-repo grants --migrator app_owner --worker app --server 17",
    ),
)
@click.option("--migrator", required=True, metavar="ROLE", help="Owns the schema: boots, upgrades, quiesces, restores.")
@click.option("--worker", metavar="ROLE", help="Boots where nothing is pending, and calls every verb.")
@click.option("--monitor", metavar="ROLE", help="Sees how much there is to do, and no payload.")
@click.option("--backup", metavar="ROLE", help="Reads all of it.")
@click.option(
    "--server",
    type=click.IntRange(14),
    default=14,
    show_default=True,
    help="The server's major version; from 17 on workers are let vacuum.",
)
@click.option("--schema", help="The runtime schema.  [default: $RUNTIME_REPO_SCHEMA, else runtime]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@DEBUG
def command(*, schema: str | None, as_json: bool, server: int, migrator: str, **roles: str | None) -> int:
    """
    Print the statements that give each of these roles exactly what it needs of a runtime schema on PostgreSQL.

    Nothing is run and no database is asked. Run it again after an upgrade.

    Exit codes: 0 they are printed; 2 something is no role's name.
    """
    from runtime_repo.postgres.grants import grants

    name = schema or os.environ.get(SCHEMA) or "runtime"
    said = grants(name, migrator=migrator, server=server, **roles)
    click.echo(json.dumps(said.as_dict(), indent=2, ensure_ascii=False) if as_json else str(said), nl=as_json)
    return YES
