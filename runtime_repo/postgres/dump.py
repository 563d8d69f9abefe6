"""A backup by PostgreSQL's own pg_dump, for whoever wants its format rather than ours."""

import asyncio
import contextlib
import inspect
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime_repo.archive import claim, in_thread, put_in_place
from runtime_repo.errors import ArchiveError, ConfigurationError
from runtime_repo.shielding import finish

if TYPE_CHECKING:
    from runtime_repo.postgres.target import Connection

__all__ = ["DumpReport", "dump"]


@dataclass(frozen=True)
class DumpReport:
    """A dump that was written."""

    path: str
    size: int
    """In bytes."""
    program: str
    """What wrote it, with its version."""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


async def dump(connection: "Connection", schema: str, path: Path, *, program: str, patience: float) -> DumpReport:
    """
    Have *program* write the runtime schema of the database that *connection* leads to into a new file.

    What is secret goes by the environment, which only the same user can read, and never by the arguments.
    """
    major = connection.get_server_version().major
    version = (await _said(program, "--version", path=path)).strip()
    if (found := re.search(r"\) (\d+)", version)) is None or int(found[1]) != major:
        raise ConfigurationError(
            f"{program} is {version!r}, and the server PostgreSQL {major}: expected the same major version, for an "
            "older one cannot read it, and a newer one writes settings that this server refuses when it is restored"
        )
    environment = await _way_to(connection)
    with _new_file(path) as (partial, file):
        await _said(
            program,
            "--format=custom",
            '--schema="' + schema.replace('"', '""') + '"',
            f"--lock-wait-timeout={int(patience * 1000)}",
            "--no-password",
            f"--file={partial}",
            path=path,
            environment=environment,
        )
        if not await _said(str(Path(program).with_name("pg_restore")), "--list", str(partial), path=path):
            raise ArchiveError(str(path), "pg_restore finds nothing in it")
        size = os.fstat(file).st_size
        await in_thread(_nothing, _finish, partial, file, path)
    return DumpReport(str(path), size, version)


async def _way_to(connection: "Connection") -> dict[str, str]:
    """The server that was reached, and as whom, in the environment's words. There is no public way to them."""
    found: Any = connection
    address, parameters = found._addr, found._params
    host, port = (os.path.split(address)[0], address.rpartition(".")[2]) if isinstance(address, str) else address
    password = parameters.password
    if callable(password):
        password = password()
    if inspect.isawaitable(password):
        password = await password
    way = {"PGHOST": host, "PGPORT": str(port), "PGUSER": parameters.user, "PGDATABASE": parameters.database}
    if password:
        way["PGPASSWORD"] = password
    if parameters.ssl:
        way["PGSSLMODE"] = parameters.sslmode.name.replace("_", "-")
    return way


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[tuple[Path, int]]:
    """A file beside *path*, for its owner alone, which is gone when the block has ended: its name, and it."""
    if path.exists():
        raise ArchiveError(str(path), "there is such a file, and it was left alone: name another")
    partial = path.with_name(f"{path.name}.partial")
    try:
        file = claim(partial)
        try:
            yield partial, file
        finally:
            partial.unlink(missing_ok=True)
            os.close(file)
    except OSError as error:
        raise ArchiveError(str(path), f"it cannot be written: {error.strerror or error}") from error


def _nothing() -> None:
    """What is as good as done is not stopped."""


def _finish(partial: Path, file: int, path: Path) -> None:
    os.fsync(file)
    put_in_place(partial, path)


async def _said(program: str, *arguments: str, path: Path, environment: dict[str, str] | None = None) -> str:
    """What a program prints; whoever is cancelled ends it."""
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | (environment or {}),
        )
    except OSError as error:
        raise ConfigurationError(
            f"{program} cannot be run ({error.strerror or error}): install PostgreSQL's client tools of the server's "
            "version, or take the library's own archive, which needs none"
        ) from None
    try:
        printed, words = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await finish(process.wait())
        raise
    if process.returncode != 0:
        last = words.decode(errors="replace").strip().rpartition("\n")[2]
        raise ArchiveError(str(path), f"{Path(program).name} failed, and nothing was written: {last}")
    return printed.decode(errors="replace")
