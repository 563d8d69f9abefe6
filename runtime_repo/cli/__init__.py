"""
The command ``runtime-repo``: it prints what the library returns, and knows nothing of its own.

One file per command, imported when that command is given, so that ``--help`` loads neither the library nor a driver.
Its exit code is an answer: 0 is yes, 1 is no, and 2 is that it could not be told, for whatever reason.
"""

import io
import sys
from importlib.util import find_spec
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command that this process was started with, and exit as it says."""
    missing = [package for package in ("click", "rich") if find_spec(package) is None]
    if missing:
        sys.stderr.write(
            f"runtime-repo: the command needs {' and '.join(missing)}: install the extra cli, "
            "as in pip install 'runtime-repo[cli]'\n"
        )
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows fewer characters is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from runtime_repo.cli.app import run

    sys.exit(run(sys.argv[1:]))
