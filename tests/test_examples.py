"""The smaller examples, each run as its user would run it, on either database."""

import contextlib
import gzip
import json
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime_repo.schema import load_migrations
from tests.place import Place
from tests.programs import SECONDS, Programs
from tests.versions import NEWEST

ID = re.compile(r"'[0-9a-f]{8}-[0-9a-f-]{27}'")


@pytest.fixture
def programs(tmp_path: Path, place: Place) -> Programs:
    """Where an example runs."""
    return Programs(tmp_path, place)


def lines_until(process: "subprocess.Popen[str]", word: str) -> list[str]:
    """What it prints until a line has *word*; fails when it ends before."""
    lines: list[str] = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if word in line:
            return lines
    raise AssertionError(f"no {word!r} in {lines}, {process.stderr and process.stderr.read()}")


def test_the_worker_compresses_what_it_is_given_and_stops_when_told(programs: Programs) -> None:
    """Files that were enqueued before it came and while it waits; SIGTERM ends it with 0, and nothing is left half."""
    texts = {f"file {number}.txt": f"{number} words " * 1000 for number in range(5)}
    for name, text in texts.items():
        (programs.folder / name).write_text(text)
    first, *rest = texts
    programs.run("worker.py", "enqueue", first)
    with programs.running(programs.command("worker.py", "run"), text=True) as process:
        lines_until(process, first)
        programs.run("worker.py", "enqueue", *rest)
        programs.run("worker.py", "enqueue", *texts)  # once more: nobody does it twice
        printed = [line for _ in rest for line in lines_until(process, " bytes")]
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=SECONDS)
    assert (process.returncode, "Traceback" in error) == (0, False)
    assert "has stopped" in out
    assert len(printed) == len(rest)
    assert {name: gzip.decompress((programs.folder / f"{name}.gz").read_bytes()).decode() for name in texts} == texts
    assert not list(programs.folder.glob("*.partial"))


def test_the_worker_says_what_it_cannot_open(tmp_path: Path, sqlite_place: Place) -> None:
    """In one line, without a traceback."""
    programs = Programs(tmp_path, sqlite_place)
    command = programs.command("worker.py", "--database", "sqlite:///missing/worker.db", "enqueue", "x")
    done = subprocess.run(command, cwd=tmp_path, env=programs.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch("worker.py: .*'.*missing' does not exist.*\n", done.stderr)


def test_of_two_workers_the_one_that_was_paused_is_refused(programs: Programs) -> None:
    """A process that was really stopped for longer than its lease; the result is the other's."""
    lines = ID.sub("ID", programs.run("two_workers_one_attempt.py")).splitlines()
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


def test_a_purchase_waits_for_a_person_and_is_answered_once(programs: Programs) -> None:
    """Interrupted at the question, it is asked again by the next run; answered, it is not asked any more."""
    purchase = ("pause_and_resume.py", "a boat", "12000")
    with programs.running(programs.command(*purchase), text=True) as process:
        assert process.stdout
        assert process.stdout.read(24) == "Pay 12000 for a boat? [y"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert programs.run(*purchase, said="n\n") == "Pay 12000 for a boat? [y/n] a boat: declined by you\n"
    assert programs.run(*purchase, said="y\n") == "a boat: declined by you\n"


def test_an_upgrade_is_taken_back(programs: Programs) -> None:
    """Every step is told with its time; in the end there is nothing left, in no file and in no schema."""
    lines = programs.run("rollback_drill.py", "--attempts", "2000").splitlines()
    assert [line.partition(" s  ")[2].partition(":")[0] for line in lines] == [
        "the previous release lays its store",
        "its workers work, and are stopped",
        "backup",
        "upgrade, and new work",
        "the previous release does not boot any more",
        "restore",
        "the previous release boots",
        "every attempt is compared",
        "its workers work again",
        "in all",
    ]
    assert all(re.match(r" *\d+\.\d\d s  ", line) for line in lines)
    assert "version 2 is too new" in lines[4]
    assert "all 2000 attempts of before are there, and no other" in lines[7]
    assert not list(programs.folder.iterdir())
    if programs.place.backend == "postgres":
        schemas = f"select nspname from pg_namespace where starts_with(nspname, '{programs.place.schema}')"
        assert programs.ask(schemas, file="drill.db") == []


def test_the_drill_touches_no_store(programs: Programs) -> None:
    """It wants a place of its own."""
    file = programs.folder / "drill.db"
    file.touch()
    if programs.place.backend == "postgres":
        programs.run("worker.py", "enqueue", str(file))
    done = programs.done("rollback_drill.py")
    assert (done.returncode, b"not empty" in done.stderr) == (1, True)


@pytest.fixture
def service(programs: Programs) -> Iterator[str]:
    """The web service, as soon as it answers; stopped as its user would stop it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = programs.command("fastapi_app.py", "--port", str(port), told=False)
    with programs.running(command, text=True) as process:
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


def test_the_service_reports_that_its_tables_are_gone(service: str, programs: Programs) -> None:
    """It does not put empty ones in their place: whoever has lost a store wants to know."""
    tables = ["runtime_schema_migrations", *load_migrations(programs.place.backend)[-1].catalog.tables]
    for table in tables:
        programs.ask(f"drop table if exists {table}", file="reports.db")
    for _ in range(2):
        status, answer = ask(f"{service}/health")
        assert (status, answer["status"]) == (503, "unhealthy")
        assert "version 0" in answer["reason"]


def test_the_service_reports_a_schema_that_is_not_what_it_was(service: str, programs: Programs) -> None:
    """What no boot would accept makes a running process unhealthy, with the reason."""
    programs.ask("drop index idx_runtime_jobs_status", file="reports.db")
    status, answer = ask(f"{service}/health")
    assert (status, answer["status"]) == (503, "unhealthy")
    assert "idx_runtime_jobs_status" in answer["reason"]
