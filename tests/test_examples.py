"""The smaller examples, each run as its user would run it, on either database."""

import asyncio
import contextlib
import gzip
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import runtime_repo
from runtime_repo.schema import load_migrations
from tests.versions import NEWEST

EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 60
ID = re.compile(r"'[0-9a-f]{8}-[0-9a-f-]{27}'")


@dataclass(frozen=True)
class Place:
    """A folder of the test's own, and what names its database to an example; on SQLite the example's default."""

    folder: Path
    url: str | None = None
    schema: str | None = None

    def command(self, example: str, *arguments: str) -> list[str]:
        database = ["--database", self.url, "--schema", self.schema] if self.url and self.schema else []
        return [sys.executable, "-W", "error", str(EXAMPLES / example), *database, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """With the library that is tested here, whether it is installed or lies in the working tree."""
        given = {"RUNTIME_REPO_URL": self.url, "RUNTIME_REPO_SCHEMA": self.schema} if self.url and self.schema else {}
        return os.environ | {"PYTHONPATH": str(Path(runtime_repo.__file__).parents[1])} | given

    def run(self, example: str, *arguments: str, said: str = "") -> str:
        """Run it to its end, and return what it printed."""
        done = subprocess.run(
            self.command(example, *arguments),
            cwd=self.folder,
            env=self.environment,
            input=said,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def execute(self, statement: str) -> None:
        """Run a statement of an administrator's on the service's database."""

        async def on_postgres() -> None:
            connection = await asyncpg.connect(self.url)
            await connection.execute(f"set search_path to {self.schema}; {statement}")
            await connection.close()

        if self.url:
            asyncio.run(on_postgres())
        else:
            with contextlib.closing(sqlite3.connect(self.folder / "reports.db")) as connection:
                connection.execute(statement)

    @contextlib.contextmanager
    def running(self, command: list[str]) -> Iterator["subprocess.Popen[str]"]:
        """Let it run; whatever happens, it does not outlive the test."""
        with subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where an example runs."""
    if request.param == "sqlite":
        return Place(tmp_path)
    return Place(tmp_path, request.getfixturevalue("postgres_url"), request.getfixturevalue("postgres_schema"))


def lines_until(process: "subprocess.Popen[str]", word: str) -> list[str]:
    """What it prints until a line has *word*; fails when it ends before."""
    lines: list[str] = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if word in line:
            return lines
    raise AssertionError(f"no {word!r} in {lines}, {process.stderr and process.stderr.read()}")


def test_the_worker_compresses_what_it_is_given_and_stops_when_told(place: Place) -> None:
    """Files that were enqueued before it came and while it waits; SIGTERM ends it with 0, and nothing is left half."""
    texts = {f"file {number}.txt": f"{number} words " * 1000 for number in range(5)}
    for name, text in texts.items():
        (place.folder / name).write_text(text)
    first, *rest = texts
    place.run("worker.py", "enqueue", first)
    with place.running(place.command("worker.py", "run")) as process:
        lines_until(process, first)
        place.run("worker.py", "enqueue", *rest)
        place.run("worker.py", "enqueue", *texts)  # once more: nobody does it twice
        printed = [line for _ in rest for line in lines_until(process, " bytes")]
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=SECONDS)
    assert (process.returncode, "Traceback" in error) == (0, False)
    assert "has stopped" in out
    assert len(printed) == len(rest)
    assert {name: gzip.decompress((place.folder / f"{name}.gz").read_bytes()).decode() for name in texts} == texts
    assert not list(place.folder.glob("*.partial"))


def test_the_worker_says_what_it_cannot_open(tmp_path: Path) -> None:
    """In one line, without a traceback."""
    place = Place(tmp_path)
    command = [*place.command("worker.py", "--database", "sqlite:///missing/worker.db"), "enqueue", "x"]
    done = subprocess.run(command, cwd=tmp_path, env=place.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch("worker.py: .*'.*missing' does not exist.*\n", done.stderr)


def test_of_two_workers_the_one_that_was_paused_is_refused(place: Place) -> None:
    """A process that was really stopped for longer than its lease; the result is the other's."""
    lines = ID.sub("ID", place.run("two_workers_one_attempt.py")).splitlines()
    assert lines == [
        "slow  | claimed the attempt, token 1",
        "      | the slow worker is paused, for longer than its lease",
        "quick | the lease of worker slow expired: ready again, as try 2",
        "quick | claimed the attempt, token 2",
        "quick | completed it",
        "      | the slow worker wakes up, and wants to complete",
        "slow  | is refused. the lease on attempt ID with token 1 is lost: the attempt is completed, its current token "
        "is 2, held by nobody: stop working on it and discard the result",
        "      | the result: by the quick worker",
    ]


def test_a_purchase_waits_for_a_person_and_is_answered_once(place: Place) -> None:
    """Interrupted at the question, it is asked again by the next run; answered, it is not asked any more."""
    purchase = ("pause_and_resume.py", "a boat", "12000")
    with place.running(place.command(*purchase)) as process:
        assert process.stdout
        assert process.stdout.read(24) == "Pay 12000 for a boat? [y"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert place.run(*purchase, said="n\n") == "Pay 12000 for a boat? [y/n] a boat: declined by you\n"
    assert place.run(*purchase, said="y\n") == "a boat: declined by you\n"


@pytest.fixture
def service(place: Place) -> Iterator[str]:
    """The web service, as soon as it answers; stopped as its user would stop it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "error", str(EXAMPLES / "fastapi_app.py"), "--port", str(port)]
    with place.running(command) as process:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(OSError):
                ask(f"{address}/health")
                break
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield address
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=SECONDS)


def ask(url: str, body: object = None, **headers: str) -> tuple[int, Any]:
    """The status and the JSON of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} | headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_the_service_works_in_the_background(service: str) -> None:
    """The same key is one report; what differs under the same key, is unknown or cannot be a key is refused."""
    key = {"Idempotency-Key": "a"}
    for _ in range(2):
        status, answer = ask(f"{service}/reports", {"month": "2026-02"}, **key)
        assert (status, answer["id"]) == (202, "a")
    deadline = time.monotonic() + SECONDS
    while answer["status"] != "completed":
        assert time.monotonic() < deadline
        _, answer = ask(f"{service}/reports/a")
    assert answer == {
        "id": "a",
        "status": "completed",
        "result": {"month": "2026-02", "working_days": 20},
        "error": None,
    }
    assert ask(f"{service}/reports", {"month": "2026-03"}, **key)[0] == 409
    assert ask(f"{service}/reports/b")[0] == 404
    assert ask(f"{service}/reports/{513 * 'c'}")[0] == ask(f"{service}/reports/a%00")[0] == 422
    assert ask(f"{service}/reports", {"month": "2026-03"}, **{"Idempotency-Key": ""})[0] == 422
    assert ask(f"{service}/health") == (200, {"status": "healthy", "schema_version": NEWEST, "queues": {}})


def test_the_service_reports_that_its_tables_are_gone(service: str, place: Place) -> None:
    """It does not put empty ones in their place: whoever has lost a store wants to know."""
    tables = ["runtime_schema_migrations", *load_migrations("postgres" if place.url else "sqlite")[-1].catalog.tables]
    for table in tables:
        place.execute(f"drop table if exists {table}")
    for _ in range(2):
        status, answer = ask(f"{service}/health")
        assert (status, answer["status"]) == (503, "unhealthy")
        assert "version 0" in answer["reason"]


def test_the_service_reports_a_schema_that_is_not_what_it_was(service: str, place: Place) -> None:
    """What no boot would accept makes a running process unhealthy, with the reason."""
    place.execute("drop index idx_runtime_jobs_status")
    status, answer = ask(f"{service}/health")
    assert (status, answer["status"]) == (503, "unhealthy")
    assert "idx_runtime_jobs_status" in answer["reason"]
