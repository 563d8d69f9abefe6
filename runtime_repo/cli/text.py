"""How numbers, spans and instants read, and what a table looks like."""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from runtime_repo.cli.redaction import printable

if TYPE_CHECKING:
    from runtime_repo.errors import Difference

__all__ = [
    "MISSING",
    "counted",
    "differences",
    "facts",
    "instant",
    "number",
    "rate",
    "said",
    "size",
    "span",
    "statements",
    "table",
]

MISSING = "-"
"""Where there is nothing to say."""


def said(words: str, style: str = "") -> Text:
    """*words*, whoever wrote them: nothing in them is taken for markup, or for an order to the terminal."""
    return Text(printable(words), style=style)


def number(value: float | None) -> str:
    """With commas."""
    return MISSING if value is None else f"{value:,}"


def statements(sql: str) -> RenderableType:
    """SQL, coloured where there are colours."""
    from rich.syntax import Syntax

    return Syntax(sql.rstrip(), "postgresql", theme="ansi_dark", background_color="default", word_wrap=True)


def counted(value: int, noun: str) -> str:
    """So many of something."""
    return f"{number(value)} {noun}{'' if value == 1 else 's'}"


def rate(value: float | None) -> str:
    """So many a second; of few the first digit counts."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.1f}"


def size(value: int | None) -> str:
    """Bytes, in the unit that leaves one to three digits before the point."""
    if value is None:
        return MISSING
    amount, units = float(value), ["B", "kB", "MB", "GB", "TB"]
    while round(amount) >= 1000 and len(units) > 1:
        amount /= 1000
        del units[0]
    return f"{amount:.0f} {units[0]}" if amount >= 100 or units[0] == "B" else f"{amount:.1f} {units[0]}"


def span(value: timedelta | None) -> str:
    """Its two largest units."""
    if value is None:
        return MISSING
    seconds = value.total_seconds()
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole} s" if minutes else f"{whole} s"


def instant(value: datetime) -> str:
    """To the second, in UTC."""
    return f"{value:%Y-%m-%d %H:%M:%S} UTC"


def table(*columns: str, align: str, title: str = "") -> Table:
    """A table without lines; *align* has an ``l`` or ``r`` for each column."""
    made = Table(title=title or None, box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    for column, side in zip(columns, align, strict=True):
        made.add_column(column, justify="right" if side == "r" else "left", overflow="fold", no_wrap=side == "r")
    return made


def facts(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    """What is to be said under each of a few words."""
    made = Table.grid(padding=(0, 3, 0, 0))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, value)
    return made


def differences(found: Sequence["Difference"], told: str | None = None) -> Iterator[Text]:
    """A line for each: what is not as it should be, and what is merely extra. Those that were *told* are left out."""
    for difference in found:
        if told is None or str(difference) not in told:
            is_extra = difference.expected is None
            yield said(f"{'·' if is_extra else '!'} {difference}", style="" if is_extra else "yellow")
