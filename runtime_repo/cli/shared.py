"""What every command has: a database to work on, options, and two ways to print an answer."""

import functools
import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from runtime_repo.repository import RuntimeRepository

__all__ = ["DEBUG", "NO", "UNKNOWN", "YES", "Call", "Place", "epilog", "on_database", "seconds"]

YES, NO, UNKNOWN = 0, 1, 2
"""The exit codes."""

ADDRESS = "RUNTIME_REPO_URL"
SCHEMA = "RUNTIME_REPO_SCHEMA"

_WIDE = 200
"""Columns of a table that nobody looks at on a terminal: nothing is cut off."""

DEBUG = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
"""It is looked for among the arguments, for what cannot be parsed has a traceback, too."""


def epilog(*examples: str) -> str:
    """What stands below a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)


@dataclass(frozen=True)
class Place:
    """A database as it was given, which is never shown: the library shows it without its password."""

    given: str
    schema: str | None
    wait: float = 10.0
    """Seconds for a server to answer."""

    def repository(self, **options: Any) -> "RuntimeRepository":
        """
        A repository that has not been awaited; *options* go to its class.

        Raises:
            ConfigurationError: It is no database's address.
            click.UsageError: It is an address that was not written as one, or has options of the other database.
        """
        if "://" not in self.given:
            from runtime_repo.sqlite import SqliteRuntimeRepository

            self._check_schema()
            _check_path(self.given)
            return SqliteRuntimeRepository(self.given, **options)

        from runtime_repo.url import repository_from_url

        if not self.is_postgres:
            self._check_schema()
            return repository_from_url(self.given, **options)
        schema = self.schema or os.environ.get(SCHEMA) or "runtime"
        # It works behind a pooler too, which none of these commands would be slower for.
        ours = {"statement_cache_size": 0, "server_settings": {"application_name": "runtime-repo"}}
        given = {"schema": schema, "listen": False, "startup_timeout": self.wait} | ours | options
        return repository_from_url(self.given, **given)

    def _check_schema(self) -> None:
        if self.schema is not None:
            raise click.UsageError("--schema is for PostgreSQL: a SQLite file has one schema")

    @property
    def is_postgres(self) -> bool:
        return self.given.startswith(("postgresql://", "postgres://"))

    def __repr__(self) -> str:
        return "Place(…)"


def _check_path(path: str) -> None:
    """Refuse what is an address without its scheme: as a path it would be shown, with the password in it."""
    if re.match(r"[^/:@]+:.*@|.*\bpassword=", path) and not Path(path).exists():
        raise click.UsageError(
            "DATABASE looks like an address without its scheme (it is not repeated here, since it may hold a "
            "password): write postgresql://USER@HOST/DATABASE, or ./ before a path"
        )


class Call:
    """
    One call of a command: what it works on, and where its answer goes.

    Attributes:
        place: The database.
        words: What was given besides, as many as the command has words.
        is_json: Whether the answer is to be one JSON document.
    """

    def __init__(self, place: Place, words: tuple[str, ...], *, is_json: bool) -> None:
        self.place = place
        self.words = words
        self.is_json = is_json

    @functools.cached_property
    def console(self) -> "Console":
        """For people. A terminal's lines are broken between words; what is no terminal has them as long as they are."""
        from rich.console import Console

        console = Console(highlight=False)
        return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=_WIDE)

    def answer(self, value: Mapping[str, Any], show: Callable[["Console"], None]) -> None:
        """Print *value* as JSON, or *show* it to people."""
        if self.is_json:
            click.echo(json.dumps(value, indent=2))
        else:
            show(self.console)


F = TypeVar("F", bound=Callable[..., Any])

Function = Callable[..., Awaitable[int]]


def seconds(name: str, words: str, *, default: float, least: float = 0, most: float | None = None) -> Callable[[F], F]:
    """An option that is a time."""
    kind = click.FloatRange(least, most)
    return click.option(name, type=kind, metavar="SECONDS", default=default, show_default=True, help=words)


def on_database(name: str, *examples: str, words: tuple[str, ...] = ()) -> Callable[[Function], click.Command]:
    """
    Make a command of an async function, which is called with a Call and its options and returns the exit code.

    DATABASE is the first of its arguments, and may be left out where the environment has it; *words* are the others.
    """
    metavar = " ".join(["[DATABASE]", *words])

    def made(function: Function) -> click.Command:
        def run(
            given: tuple[str, ...],
            schema: str | None,
            wait: float,
            as_json: bool,  # noqa: FBT001 - by name
            **options: Any,
        ) -> int:
            import asyncio

            address, others = _told_apart(given, words)
            call = Call(Place(address, schema, wait), others, is_json=as_json)

            async def answer() -> int:
                return await function(call, **options)

            return asyncio.run(answer())

        functools.update_wrapper(run, function)
        own = run.__dict__.pop("__click_params__", [])
        for decorate in (
            DEBUG,
            click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
            seconds(
                "--wait", "How long a server may take to answer, on PostgreSQL.", default=10.0, least=0.1, most=3600
            ),
            click.option(
                "--schema",
                metavar="NAME",
                help="The runtime schema, on PostgreSQL.  [default: $RUNTIME_REPO_SCHEMA, else runtime]",
            ),
            click.argument("given", nargs=-1, metavar=metavar),
        ):
            run = decorate(run)
        # The command's own options are shown first: what is decorated last.
        run.__dict__["__click_params__"] += own
        return click.command(name, epilog=epilog(*examples))(run)

    return made


def _told_apart(given: tuple[str, ...], words: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The address and the other words; what was given too much is not repeated, it may be an address."""
    if len(given) == len(words) and (address := os.environ.get(ADDRESS)):
        return address, given
    if len(given) == len(words) + 1:
        return given[0], given[1:]
    expected = " ".join(["DATABASE", *words])
    hint = "" if len(given) > len(words) else f" (DATABASE may be in the environment instead, as {ADDRESS})"
    raise click.UsageError(f"expected {expected}, found {len(given) or 'nothing'}{hint}")
