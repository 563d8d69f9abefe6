"""The table as a picture: one bar a line, from the limit to the right if it is kept, to the left if it is missed."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .race import Limit, Line

_WIDTH, _LEFT, _RIGHT = 1040, 540, 140
_ROW, _BAR, _HEAD = 22, 12, 58
# The scale is logarithmic: half of what was asked for is as far from the limit as twice as much.
_LEAST, _MOST = 0.5, 8.0
_TICKS = (0.5, 1.0, 2.0, 4.0, 8.0)
_NAMES = {"postgres": "PostgreSQL", "sqlite": "SQLite"}
# These can be read on white and on black.
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #7d8590; }
.kept { fill: #2f9e6e; } .missed { fill: #d9534f; }
.grid { stroke: #7d8590; stroke-opacity: 0.25; } .limit { stroke: #7d8590; stroke-width: 2; }
.backend { fill-opacity: 0.75; } .end { text-anchor: end; } .middle { text-anchor: middle; }
"""


def drawn(lines: Sequence[Line]) -> str:
    """Return an SVG of all lines that have a limit."""
    judged = [(line, line.limit) for line in lines if line.limit is not None]
    height = _HEAD + _ROW * len(judged) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        "<title>What the store reaches, against its limits</title>",
        f"<style>{_STYLE}</style>",
        f'<text x="{_place(1):.1f}" y="16" class="middle">times the limit</text>',
        *(_tick(value, height) for value in _TICKS),
        *(_bar(number, line, limit) for number, (line, limit) in enumerate(judged)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _place(headroom: float) -> float:
    shown = min(max(headroom, _LEAST), _MOST)
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log(shown / _LEAST) / math.log(_MOST / _LEAST)


def _tick(value: float, height: int) -> str:
    x = _place(value)
    kind = "limit" if value == 1 else "grid"
    return (
        f'<text x="{x:.1f}" y="36" class="middle">{value:g}</text>'
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="44" y2="{height - 8}" class="{kind}"/>'
    )


def _bar(number: int, line: Line, limit: Limit) -> str:
    y = _HEAD + _ROW * number
    start, end = sorted((_place(1), _place(limit.headroom(line.ratio))))
    label = f'{escape(f"{line.work}, against {line.against}")} <tspan class="backend">({_NAMES[line.backend]})</tspan>'
    return (
        f'<text x="{_LEFT - 12}" y="{y + 10}" class="end">{label}</text>'
        f'<rect x="{start:.1f}" y="{y}" width="{max(end - start, 1):.1f}" height="{_BAR}" rx="2"'
        f' class="{"missed" if line.missed else "kept"}"/>'
        f'<text x="{_WIDTH - _RIGHT + 12}" y="{y + 10}">{line.ratio:.2f} ({escape(str(limit))})</text>'
    )
