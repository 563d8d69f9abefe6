"""
Runs the command as an operator would, told its database by argument or environment: in this process, which is quick,
and as a process of its own where that makes a difference.
"""

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime_repo
from runtime_repo.cli.app import COMMANDS, run
from tests.place import Place
from tests.programs import contained

SECONDS = 60

GIVEN: Mapping[str, Sequence[str]] = {
    "top": ["--once"],
    "pause": ["emails"],
    "cancel": ["--older-than", "1d"],
    "prune": ["--older-than", "1d"],
    "backup": ["/nowhere/there.zip"],
    "restore": ["/nowhere/there.zip"],
    "move": ["/nowhere/there.db"],
}
"""What a command needs besides the database, to come to an end."""

ON_DATABASE = [name for section in COMMANDS.values() for name in section if name != "grants"]
"""The commands that work on one."""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    output: str
    errors: str


@dataclass(frozen=True)
class Program:
    """The command, on one database."""

    place: Place

    def command(self, name: str, *options: str) -> list[str]:
        """What is typed."""
        schema = ["--schema", self.place.schema] if self.place.backend == "postgres" else []
        return [name, self.place.where, *options, *schema]

    async def run(self, name: str, *options: str) -> Done:
        """Run a command on the database to its end."""
        return await ran(*self.command(name, *options))

    async def json(self, name: str, *options: str, code: int = 0) -> Any:
        """What it prints as one JSON document, with this exit code and without a complaint."""
        done = await self.run(name, *options, "--json")
        assert (done.code, done.errors) == (code, "")
        return json.loads(done.output)

    @contextlib.contextmanager
    def running(self, name: str, *options: str) -> Iterator["subprocess.Popen[str]"]:
        """Let it run as a process of its own, which does not outlive the test."""
        command = [sys.executable, "-W", "error", "-m", "runtime_repo", *self.command(name, *options)]
        unbuffered = environment(PYTHONUNBUFFERED="1")
        with contained(command, env=unbuffered, stdin=subprocess.DEVNULL, text=True) as process:
            yield process


async def ran(*arguments: str) -> Done:
    """Run the command with these arguments in this process, in an event loop of its own."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = await asyncio.to_thread(run, arguments)
    return Done(code, output.getvalue(), errors.getvalue())


def executed(*command: str, **more: str) -> Done:
    """Run Python with these arguments as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def environment(**more: str) -> Mapping[str, str]:
    """This process's, with the library that is tested here, installed or in the working tree, and no database."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "RUNTIME_REPO"))}
    return inherited | {"PYTHONPATH": str(Path(runtime_repo.__file__).parents[1])} | more
