"""The example, run as its user would run it: a command in a folder, on either database."""

import contextlib
import hashlib
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.place import Place
from tests.programs import SECONDS, Programs

EXAMPLE = "checksum_files.py"
FILE = "checksum_files.db"
ODD_NAMES = [
    *(b"plain", b"two words", b"back\\slash", b"new\nline", b"carriage\rreturn", b"end\\", b"%41", b"-", b"'\"$`*"),
    *("grüße-\N{SNOWMAN}".encode(), b"not-utf-8-\xff\xfe", b".hidden"),
]


@pytest.fixture
def programs(tmp_path: Path, place: Place) -> Programs:
    """Where the example runs."""
    return Programs(tmp_path, place)


@pytest.fixture
def sqlite_programs(tmp_path: Path, sqlite_place: Place) -> Programs:
    """Where the database does not matter."""
    return Programs(tmp_path, sqlite_place)


HOLDERS = "select distinct worker_id from runtime_leases"


def wait_for(programs: Programs, query: str, *, rows: int = 1) -> list[str]:
    """Ask until the answer has this many rows."""
    deadline = time.monotonic() + SECONDS
    while len(answer := programs.ask(query, file=FILE)) < rows:
        assert time.monotonic() < deadline, f"{query}: {answer}"
        time.sleep(0.02)
    return answer


def wait_for_the_end_of_group(group: int) -> None:
    """Whoever is left of it ends by itself, a moment later."""
    deadline = time.monotonic() + SECONDS
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            assert time.monotonic() < deadline
            time.sleep(0.02)


def pid_of(worker_id: str) -> int:
    """The example names its workers by host and process."""
    return int(worker_id.rpartition(":")[2])


def sparse(path: Path, size: int) -> Path:
    """A file that takes no space, but time to read."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def checksums(text: bytes) -> dict[bytes, str]:
    """What the lines of ``sha256sum`` say; no name may appear twice."""
    found: dict[bytes, str] = {}
    for line in text.splitlines():
        match = re.fullmatch(rb"(\\?)([0-9a-f]{64})  (.+)", line)
        assert match, line
        escaped, digest, name = match.groups()
        if escaped:
            name = re.sub(rb"\\(.)", lambda found: {b"n": b"\n", b"r": b"\r"}.get(found[1], found[1]), name)
        assert name not in found
        found[name] = digest.decode()
    return found


def expected(*files: Path, relative_to: Path) -> dict[bytes, str]:
    """The same, from the standard library."""
    result = {}
    for path in files:
        with path.open("rb") as file:
            result[os.fsencode(path.relative_to(relative_to))] = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def check_with_sha256sum(programs: Programs, text: bytes) -> None:
    """Let the program for which the output is meant judge it, where there is one."""
    if program := shutil.which("sha256sum"):
        subprocess.run([program, "-c", "--strict", "--quiet"], input=text, cwd=programs.folder, check=True)


@pytest.fixture
def files(programs: Programs) -> list[Path]:
    """A tree with odd names, and with things in it that are no regular files."""
    deep = programs.folder / "files" / "deep er"
    deep.mkdir(parents=True)
    paths = [
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)) for folder in (deep, deep.parent) for name in ODD_NAMES
    ]
    for number, path in enumerate(paths):
        path.write_bytes(b"content %d" % number)
    (deep / "empty").touch()
    (deep / "to the top").symlink_to(deep.parent)
    (deep / "to a file").symlink_to(paths[0])
    os.mkfifo(deep / "pipe")
    return [*paths, deep / "empty"]


def test_every_file_is_listed_once_with_its_checksum(programs: Programs, files: list[Path]) -> None:
    """Whatever a name's bytes are, they arrive; links and pipes are passed over."""
    done = programs.done(EXAMPLE, "files", "--workers", "2")
    assert (done.returncode, b"\r" in done.stderr) == (0, False), done.stderr
    assert checksums(done.stdout) == expected(*files, relative_to=programs.folder)
    check_with_sha256sum(programs, done.stdout)


def test_exactly_one_process_migrates_and_the_next_run_finds_the_schema_current(
    programs: Programs, files: list[Path]
) -> None:
    """The table says so, and that every file was computed by one of the workers; the work is done anew."""
    first, second = programs.done(EXAMPLE, "files", "--workers", "4"), programs.done(EXAMPLE, "files", "--workers", "4")
    assert first.stdout == second.stdout
    for done, applied in ((first, 1), (second, 0)):
        head, *rows, parent, total = done.stderr.decode().splitlines()
        assert head.split() == ["process", "schema", "boot", "waited", "files"]
        assert len(rows) == 4
        assert sum(" applied 1, " in row for row in rows) == applied
        assert sum("current" in row for row in rows) == 4 or applied
        assert sum(int(row.split()[-1]) for row in rows) == len(files) == int(total.split()[1])
        assert "current" in parent


def test_the_output_file_appears_whole_and_is_not_hashed_itself(programs: Programs) -> None:
    """Nor are the database's files, though all of them lie in the folder."""
    (programs.folder / "a").write_bytes(b"a")
    for _ in range(2):
        done = programs.done(EXAMPLE, ".", "--output", "sums", "--workers", "1")
        assert (done.returncode, done.stdout) == (0, b"")
        text = (programs.folder / "sums").read_bytes()
        assert list(checksums(text)) == [b"./a"]
        check_with_sha256sum(programs, text)
    assert not list(programs.folder.glob("*partial*"))


def test_a_killed_workers_files_are_taken_over(programs: Programs) -> None:
    """SIGKILL while it holds leases loses no file and doubles none, and the table shows the death."""
    folder = programs.folder / "files"
    folder.mkdir()
    paths = [sparse(folder / f"{number:03}", 8_000_000 + number) for number in range(120)]
    with programs.running(programs.command(EXAMPLE, "files", "--lease", "1")) as process:
        while True:
            victim = wait_for(programs, HOLDERS)[0]
            os.kill(pid_of(victim), signal.SIGSTOP)
            if victim in programs.ask(HOLDERS, file=FILE):
                os.kill(pid_of(victim), signal.SIGKILL)
                break
            os.kill(pid_of(victim), signal.SIGCONT)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert checksums(out) == expected(*paths, relative_to=programs.folder)
    (row,) = [line for line in err.decode().splitlines() if line.startswith(victim)]
    assert row.endswith("died: -9")


def test_nothing_is_written_when_all_workers_died(programs: Programs) -> None:
    """Half a list would look like a whole one."""
    folder = programs.folder / "files"
    folder.mkdir()
    for number in range(16):
        sparse(folder / str(number), 10**12)
    with programs.running(programs.command(EXAMPLE, "files", "--workers", "2", "--output", "sums")) as process:
        for worker in wait_for(programs, HOLDERS, rows=2):
            os.kill(pid_of(worker), signal.SIGKILL)
        out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (1, b"")
    assert err == b"checksum_files.py: all 2 workers died: nothing was written\n"
    assert not (programs.folder / "sums").exists()


def test_a_lease_is_kept_while_a_big_file_is_read_and_ctrl_c_ends_everything(programs: Programs) -> None:
    """The heartbeat goes on beside the computing; an interrupt leaves neither a process nor a result."""
    (programs.folder / "files").mkdir()
    sparse(programs.folder / "files" / "big", 10**12)
    with programs.running(programs.command(EXAMPLE, "files", "--workers", "2", "--lease", "1")) as process:
        wait_for(programs, "select worker_id from runtime_leases where heartbeat_at_ms > claimed_at_ms")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out) == (130, b"")
        assert err == b"checksum_files.py: interrupted: nothing was written\n"
        wait_for_the_end_of_group(process.pid)


def test_a_file_that_disappears_or_changes_is_reported(programs: Programs) -> None:
    """The others are listed all the same, and the exit code says that something is missing."""
    folder = programs.folder / "files"
    folder.mkdir()
    gone, changing = sparse(folder / "a gone", 2**29), sparse(folder / "b\nchanging", 2**26)
    (folder / "c").write_bytes(b"c")
    with programs.running(programs.command(EXAMPLE, "files", "--workers", "1")) as process:
        wait_for(programs, HOLDERS)
        gone.unlink()
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            os.utime(changing)
            time.sleep(0.001)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert checksums(out) == expected(folder / "c", relative_to=programs.folder)
    assert err.decode().splitlines()[-2:] == [
        "checksum_files.py: 'files/a gone': No such file or directory",
        "checksum_files.py: 'files/b\\nchanging': the file changed while it was read",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["missing"], 2, "missing does not exist"),
        (["a file"], 2, "a file is not a folder"),
        (["empty"], 2, "no regular file below empty"),
        ([], 2, "FOLDER"),
        (["full", "--workers", "0"], 2, "--workers is 0: expected 1 or more"),
        (["full", "--workers", "many"], 2, "--workers"),
        (["full", "--lease", "0"], 2, "--lease is 0.0: expected 0.1 to 3600 seconds"),
        (["full", "--lease", "nan"], 2, "--lease is nan"),
        (["full", "--output", "missing/sums"], 2, "--output is missing/sums"),
        (["full", "--output", "empty"], 2, "--output is empty: expected a file"),
        (["full", "--database", "mysql://localhost/x"], 2, "database URL"),
        (["full", "--database", ""], 2, "path"),
        (["full", "--database", "a file", "--workers", "1"], 1, "no SQLite database"),
        (["full", "--database", "missing/x.db", "--workers", "1"], 1, "does not exist: create it first"),
        (["full", "--database", "postgresql://127.0.0.1:nonsense/x", "--workers", "1"], 1, "DSN"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    sqlite_programs: Programs, arguments: list[str], code: int, reason: str
) -> None:
    """Two is for what the user wrote, one for what the database says; nothing is created."""
    (sqlite_programs.folder / "a file").write_text("this is not a database")
    (sqlite_programs.folder / "empty").mkdir()
    (sqlite_programs.folder / "full").mkdir()
    (sqlite_programs.folder / "full" / "a").touch()
    done = sqlite_programs.done(EXAMPLE, *arguments)
    (line,) = done.stderr.decode().splitlines()
    assert reason in line
    assert (done.returncode, done.stdout) == (code, b"")
    assert sorted(path.name for path in sqlite_programs.folder.iterdir()) == ["a file", "empty", "full"]


def test_a_terminal_sees_a_progress_bar(sqlite_programs: Programs) -> None:
    """One line, redrawn in place, and gone when the table is printed."""
    (sqlite_programs.folder / "files").mkdir()
    (sqlite_programs.folder / "files" / "a").write_bytes(b"a")
    screen, terminal = pty.openpty()
    with subprocess.Popen(
        sqlite_programs.command(EXAMPLE, "files", "--workers", "1"),
        cwd=sqlite_programs.folder,
        env=sqlite_programs.environment,
        stdout=subprocess.PIPE,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # what Linux says at the end of a terminal
            while part := os.read(screen, 4096):
                shown += part
        out, _ = process.communicate(timeout=SECONDS)
    os.close(screen)
    assert (process.returncode, len(checksums(out))) == (0, 1)
    *bars, table = shown.decode().split("\r\x1b[K")
    assert re.fullmatch(r"\[#{30}\] 1/1 files  \d+\.\d MB/s", bars[-1])
    assert not any("\n" in bar for bar in bars)
    assert table.startswith("process ")
