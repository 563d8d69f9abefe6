"""What all commands have in common: help, exit codes of a process, and that no password is ever shown."""

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest

from runtime_repo import RuntimeRepository
from runtime_repo.cli.app import COMMANDS, app
from runtime_repo.cli.shared import Place
from tests.cli.program import GIVEN, ON_DATABASE, environment, executed, ran
from tests.postgres_server import PostgresServer

NAMES = [name for section in COMMANDS.values() for name in section]
YES, NO, UNKNOWN = 0, 1, 2

CANARY = "kanarienvogel" + secrets.token_hex(4)
ODD = f"{CANARY}@:/?#[ %"
"""A password that has to be percent-encoded; the canary is in both of its spellings."""


async def test_the_help_names_every_command() -> None:
    """As short as it is, and what the exit codes mean."""
    done = await ran("--help")
    assert (done.code, done.errors) == (YES, "")
    for name in NAMES:
        assert f"\n  {name} " in done.output
    assert "Exit codes: 0 yes, 1 the answer is no, 2 it could not be told" in done.output


@pytest.mark.parametrize("name", NAMES)
async def test_every_command_has_an_example_and_json(name: str) -> None:
    """Each example is a call of that very command; and no other exit codes than the three."""
    done = await ran(name, "--help")
    assert (done.code, done.errors) == (YES, "")
    examples = done.output.partition("Examples:")[2]
    assert f"runtime-repo {name}" in examples
    assert "--json" in done.output.partition("Examples:")[0]
    assert "Exit codes: 0 " in " ".join(done.output.split())
    assert app.get_command(None, name) is not None  # type: ignore[arg-type]


def test_help_loads_neither_the_library_nor_a_driver() -> None:
    """What it is made of starts in a fraction of the time that those take."""
    program = (
        "import sys\nsys.argv = ['runtime-repo', '--help']\nfrom runtime_repo.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "print(*sys.modules)"
    )
    done = executed("-c", program)
    loaded = set(done.output.splitlines()[-1].split())
    assert "runtime_repo.cli.app" in loaded
    assert not loaded & {"asyncio", "asyncpg", "aiosqlite", "anyio", "rich", "sqlite3", "runtime_repo.repository"}


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_it_says_which_to_install(missing: str) -> None:
    """And does not know the answer to anything: 2."""
    program = f"import sys; sys.modules['{missing}'] = None; from runtime_repo.cli import main; main()"
    done = executed("-c", program)
    assert (done.code, done.output) == (UNKNOWN, "")
    assert "pip install 'runtime-repo[cli]'" in done.errors
    assert missing in done.errors
    assert len(done.errors.splitlines()) == 1


def test_the_installed_command_is_the_module(tmp_path: Path) -> None:
    """``runtime-repo`` and ``python -m runtime_repo`` are the same; a process exits with the answer."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    module, function = project["scripts"]["runtime-repo"].split(":")
    assert importlib.util.find_spec("runtime_repo.__main__") is not None
    path = str(tmp_path / "x.db")
    script = f"import sys; from {module} import {function}; sys.exit({function}())"
    assert executed("-m", "runtime_repo", "verify", path).code == NO
    assert executed("-m", "runtime_repo", "migrate", path).code == YES
    assert executed("-c", script, "verify", path).code == YES
    assert executed("-m", "runtime_repo", "verify").code == UNKNOWN


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status"], "expected DATABASE, found nothing (DATABASE may be in the environment instead"),
        (["status", "a", "b"], "expected DATABASE, found 2"),
        (["stats"], "did you mean status?"),
        (["nonsense"], "there are status, plan"),
        (["status", "--nonsense", "a"], "--nonsense"),
        (["top", "a.db", "--interval", "0"], "--interval"),
        (["status", "a.db", "--schema", "x"], "--schema is for PostgreSQL"),
        (["status", "user:hush@host/db"], "without its scheme"),
        (["status", "host=h password=hush"], "without its scheme"),
        (["status", "mysql://user:hush@host/db"], "neither sqlite:///PATH nor postgresql://"),
        (["status", ""], "expected a file's path"),
        (["status", "postgresql://h/d", "--schema", "pg_x"], "not beginning with 'pg_'"),
    ],
)
async def test_what_is_typed_wrong_is_no_answer(arguments: list[str], words: str) -> None:
    """2, and what was expected; a password that was typed is not repeated."""
    done = await ran(*arguments)
    assert (done.code, done.output) == (UNKNOWN, "")
    assert words in " ".join(done.errors.split())
    assert "hush" not in done.errors


async def test_without_arguments_it_shows_its_help() -> None:
    """On stderr, for nothing was answered."""
    done = await ran()
    assert (done.code, done.output) == (UNKNOWN, "")
    assert "\nLook at it:\n" in done.errors


@pytest.mark.parametrize("name", ON_DATABASE)
async def test_a_mistake_of_ours_is_no_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a command did not foresee: 2, in one line, whose traceback is shown when it is asked for."""

    def fail(*_: object, **__: object) -> RuntimeRepository:
        raise RuntimeError(f"no such thing: postgresql://u:{CANARY}@h/d")

    monkeypatch.setattr(Place, "repository", fail)
    address = f"postgresql://u:{CANARY}@h/d"
    done = await ran(name, address, *GIVEN.get(name, ()))
    assert (done.code, done.output) == (UNKNOWN, "")
    [line] = done.errors.splitlines()
    assert line.startswith("runtime-repo: internal error, RuntimeError: no such thing: postgresql://u:***@h/d")
    done = await ran(name, address, *GIVEN.get(name, ()), "--json", "--debug")
    assert done.code == UNKNOWN
    assert json.loads(done.output)["error"]["type"] == "RuntimeError"
    assert "Traceback" in done.errors
    assert CANARY not in done.output + done.errors


def test_whoever_stops_reading_is_told_nothing(tmp_path: Path) -> None:
    """As ``… | head`` does: no traceback, and no answer."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "runtime_repo", "plan", str(tmp_path / "x.db")],
            stdout=writing,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (UNKNOWN, b"")


def test_a_terminal_of_few_characters_is_no_reason_to_fail(tmp_path: Path) -> None:
    """What it does not know is written out."""
    name = str(tmp_path / "\N{HORSE}.db")
    done = executed("-m", "runtime_repo", "status", name, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.code, done.errors) == (YES, "")
    assert r"\U0001f40e.db" in done.output


FORMS = {
    "in the address": "postgresql://{user}:{encoded}@{place}",
    "in its query": "postgresql://{place}?user={user}&password={encoded}",
    "wrong": "postgresql://{user}:{encoded}x@{place}",
    "cut in the wrong place": "postgresql://{user}:{plain}@{place}",
    "of nobody": "postgresql://{user}:{encoded}@127.0.0.1:1/d",
    "mistyped": "postgress://{user}:{encoded}@{place}",
}


@pytest.fixture(scope="module")
def user() -> str:
    """A role of this module's."""
    return f"role_{secrets.token_hex(4)}"


@pytest.fixture
async def role(postgres_server: PostgresServer, user: str) -> AsyncIterator[str]:
    """A role whose password holds the canary, and what has to be encoded."""
    connection = await asyncpg.connect(postgres_server.url())
    await connection.execute(f"create role {user} login password '{ODD}'; grant create on database postgres to {user}")
    yield user
    await connection.execute(f"set client_min_messages = warning; drop owned by {user} cascade; drop role {user}")
    await connection.close()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
async def test_no_output_shows_a_password(postgres_server: PostgresServer, role: str, form: str) -> None:
    """Of any command, in whichever way it ends, for people, as JSON, and with a traceback."""
    place = f"127.0.0.1:{postgres_server.port}/postgres"
    address = form.format(user=role, encoded=quote(ODD, ""), plain=ODD, place=place)
    for name in ("status", "migrate", *ON_DATABASE):
        for options in (["--json"], ["--debug"]):
            done = await ran(name, address, *GIVEN.get(name, ()), *options, "--schema", "hush", "--wait", "0.2")
            assert CANARY not in done.output + done.errors, (name, options)
    assert CANARY not in "".join(shown(address))


def shown(address: str) -> Iterator[str]:
    """What a place says of itself."""
    place = Place(address, None)
    yield repr(place)
    yield str(place)


async def test_a_password_may_come_from_the_environment(
    postgres_server: PostgresServer, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no other user of the machine sees it."""
    address = f"postgresql://{role}@127.0.0.1:{postgres_server.port}/postgres"
    assert (await ran("status", address, "--wait", "1")).code == UNKNOWN
    monkeypatch.setenv("PGPASSWORD", ODD)
    done = await ran("status", address)
    assert (done.code, done.errors) == (YES, "")
    assert CANARY not in done.output
