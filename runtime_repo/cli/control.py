"""How the operator's switches read."""

from typing import TYPE_CHECKING

from rich.console import Console

from runtime_repo.cli.text import instant, said

if TYPE_CHECKING:
    from runtime_repo.control import ControlState, Stop

__all__ = ["shown", "words"]


def words(state: "ControlState") -> list[str]:
    """What is stopped, a line for each."""
    stopped = [] if state.quiesced is None else [_line("quiesced", state.quiesced)]
    return [*stopped, *(_line(f"queue {stop.queue} paused", stop) for stop in state.paused)]


def shown(console: Console, state: "ControlState") -> None:
    """Print it."""
    for line in words(state):
        console.print(said(line, style="yellow"))
    if state.quiesced is None and not state.paused:
        console.print(said("Everybody may claim from every queue.", style="green"))


def _line(what: str, stop: "Stop") -> str:
    return f"{what} since {instant(stop.since)}" + ("" if stop.reason is None else f": {stop.reason}")
