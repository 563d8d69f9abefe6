"""That something is under way, on a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from runtime_repo.cli.shared import Call

__all__ = ["working"]


@contextmanager
def working(call: Call, what: str) -> Iterator[Any]:
    """Show on stderr, if it is a terminal, for how long *what* has been going on; nothing of it stays."""
    if call.is_json or not sys.stderr.isatty():
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(what)
        yield progress
