"""What the commands have in common that write many attempts: which are meant, who wants it, and how it ended."""

import getpass
import re
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from runtime_repo.cli.shared import YES, Call
from runtime_repo.cli.text import counted, said
from runtime_repo.cli.working import working

__all__ = ["SPAN", "actor", "carry_out", "narrowing"]

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


if TYPE_CHECKING:
    _SpanType = click.ParamType[timedelta]
else:
    _SpanType = click.ParamType


class _Span(_SpanType):
    """A number and its unit."""

    name = "span"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value)
        if match is None:
            self.fail(f"{value!r} is no span: expected a number and s, m, h or d, such as 90s or 7d", param, ctx)
        try:
            return timedelta(**{_UNITS[match[2]]: float(match[1])})
        except OverflowError:
            self.fail(f"{value!r} is longer than there is time", param, ctx)


SPAN = _Span()


def narrowing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which attempts are meant, and of no more than how many."""
    for option in (
        click.option("--limit", type=click.IntRange(1), help="Of no more than so many."),
        click.option("--error", metavar="WORDS", help="Only those whose last error has these words in it."),
        click.option("--queue", metavar="QUEUE", help="Only those of this queue."),
    ):
        function = option(function)
    return function


def actor(function: Callable[..., Any]) -> Callable[..., Any]:
    """Who wants it, for the audit."""
    return click.option("--actor", help="Who wants it, for the audit.  [default: the user of this process]")(function)


async def carry_out(
    call: Call, given: str | None, verb: str, done: str, work: Callable[[Any, str], Awaitable[int]]
) -> int:
    """Do *work* with the store's attempts for whoever wants it, and print how many there were."""
    who = given or _user()
    async with call.place.repository(migrate=False) as repository:
        with working(call, f"{verb} attempts"):
            count = await work(repository.attempts, who)

    def show(console: Console) -> None:
        console.print(said(f"{counted(count, 'attempt')} {done}", style="green" if count else ""))

    call.answer({"count": count, "actor": who}, show)
    return YES


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise click.UsageError("this process's user has no name: say who wants it (--actor)") from error
