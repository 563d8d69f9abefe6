"""Runs the examples as their users would: as commands, in a folder of the test's own."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

import runtime_repo
from tests.place import Place

EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 60


@contextlib.contextmanager
def contained(command: list[str], **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """Let a command run in a process group of its own, as a terminal does; it does not outlive the test."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Programs:
    """The examples, run in *folder*: on PostgreSQL each is told its place, on SQLite it makes its default file."""

    folder: Path
    place: Place

    @property
    def environment(self) -> dict[str, str]:
        """With the library that is tested here, whether it is installed or lies in the working tree."""
        place = {"RUNTIME_REPO_URL": self.place.where, "RUNTIME_REPO_SCHEMA": self.place.schema}
        given = place if self.place.backend == "postgres" else {}
        return os.environ | {"PYTHONPATH": str(Path(runtime_repo.__file__).parents[1])} | given

    def command(self, example: str, *arguments: str, told: bool = True) -> list[str]:
        """The command that runs an example; unless it is *told* by options, it has to look into its environment."""
        options = ["--database", self.place.where, "--schema", self.place.schema]
        database = options if told and self.place.backend == "postgres" else []
        return [sys.executable, "-W", "error", str(EXAMPLES / example), *database, *arguments]

    def done(self, example: str, *arguments: str, said: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run it to its end, with its input and output piped."""
        return subprocess.run(
            self.command(example, *arguments),
            cwd=self.folder,
            env=self.environment,
            input=said,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )

    def run(self, example: str, *arguments: str, said: str = "") -> str:
        """Run it to its end, without a complaint, and return what it printed."""
        done = self.done(example, *arguments, said=said.encode())
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode()

    @contextlib.contextmanager
    def running(self, command: list[str], *, text: bool = False) -> Iterator["subprocess.Popen[Any]"]:
        """Let it run in the folder."""
        with contained(command, cwd=self.folder, env=self.environment, stdin=subprocess.PIPE, text=text) as process:
            yield process

    def ask(self, statement: str, *, file: str) -> list[Any]:
        """
        The first column of an administrator's answer, from the example's database; SQLite's is in *file*.

        Nothing, as long as there are no tables.
        """
        if self.place.backend == "postgres":
            return asyncio.run(self._fetch(statement))
        path = self.folder / file
        with contextlib.closing(sqlite3.connect(path if path.exists() else ":memory:")) as connection:
            try:
                return [row[0] for row in connection.execute(statement)]
            except sqlite3.OperationalError as error:
                if "no such table" in str(error) or "locked" in str(error):
                    return []
                raise

    async def _fetch(self, statement: str) -> list[Any]:
        connection = await asyncpg.connect(self.place.where, server_settings={"search_path": self.place.schema})
        try:
            return [row[0] for row in await connection.fetch(statement)]
        except asyncpg.UndefinedTableError:
            return []
        finally:
            await connection.close()
