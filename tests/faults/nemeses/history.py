"""
What processes wrote down: a file of JSON lines for each of them.

A line is written by one system call before a verb and by one after it, so that who is killed leaves what was begun.
Times are of the monotonic clock, which all processes of a machine share.
"""

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
"""
`t` is when, `p` which process, `k` what kind of line. Lines about a verb's call have its number `n` and its name `f`;
lines about an attempt have its id `a` and the fencing `token`.
"""


class History:
    """What one process writes down."""

    def __init__(self, folder: Path, process: str) -> None:
        self.process = process
        self._file = os.open(folder / f"{process}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._numbers = itertools.count()

    def write(self, kind: str, /, **values: Any) -> None:
        line = {"t": round(time.monotonic(), 4), "p": self.process, "k": kind} | values
        os.write(self._file, f"{json.dumps(line, default=str)}\n".encode())

    def ask(self, verb: str, /, **values: Any) -> int:
        """Write that *verb* is about to be called, and return the call's number."""
        number = next(self._numbers)
        self.write("ask", n=number, f=verb, **values)
        return number


class Reader:
    """Reads what all processes of a folder have written since it read last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def lines(self) -> Iterator[Line]:
        """Yield the new lines, each process's in its order; one that a kill has cut is left out."""
        for path in sorted(self._folder.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            whole, _, _ = new.rpartition(b"\n")
            self._read[path] = self._read.get(path, 0) + len(whole) + bool(whole)
            yield from map(json.loads, whole.splitlines())
