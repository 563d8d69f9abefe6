"""Which commands there are, and what becomes of whatever one of them ends with."""

import contextlib
import importlib
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence

import click

from runtime_repo.cli.redaction import Redaction, printable
from runtime_repo.cli.shared import DEBUG, NO, UNKNOWN, YES, epilog

__all__ = ["COMMANDS", "app", "run"]

COMMANDS = {
    "Look at it": {
        "status": "What is there: versions, queues, leases, sizes, and what is not as it should be.",
        "plan": "What a boot of this release would do, and its SQL; nothing is touched.",
        "verify": "Whether a boot that may not migrate would serve.",
        "can-run": "Whether this release can run on it, and which older ones beside it.",
        "doctor": "What is wrong, and the SQL that mends it.",
        "grants": "What each role needs on PostgreSQL, and no more.",
        "top": "Queues, rates and the oldest age, live.",
    },
    "Change it": {
        "migrate": "Bring the schema to this release's version.",
        "backup": "Write all that is stored into an archive, while workers go on.",
        "restore": "Put an archive in the place of what is stored, which is kept.",
        "move": "Move a store to another place, such as from SQLite to PostgreSQL.",
        "quiesce": "Let nobody claim anything, and wait until nothing is held.",
        "pause": "Let nobody claim from a queue.",
        "resume": "Let everybody claim again.",
        "retry": "Give what has failed one more try.",
        "cancel": "Cancel what is not final.",
        "prune": "Delete what ended long ago.",
    },
}
"""Every command, and what it says of itself; ``name`` is in the file ``name.py``, with ``_`` for ``-``."""


class _Group(click.Group):
    """Commands that are imported when they are given."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"runtime_repo.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            import difflib

            similar = difflib.get_close_matches(args[0], known, 1)
            hint = f"did you mean {similar[0]}?" if similar else f"there are {', '.join(known)}"
            # What was given may be an address with a password in it.
            raise click.UsageError(f"there is no such command: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        width = max(len(name) for section in COMMANDS.values() for name in section)
        for title, section in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), words) for name, words in section.items()])


@click.command(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=epilog(
        "runtime-repo status runtime.db",
        "PGPASSWORD=… runtime-repo plan postgresql://app@db.example/app",
        "RUNTIME_REPO_URL=postgresql://app@db.example/app runtime-repo verify --json",
    ),
)
@click.version_option(package_name="runtime-repo", prog_name="runtime-repo", message="%(prog)s %(version)s")
@DEBUG
def app() -> None:
    """
    Operate a runtime_repo store: look at it, upgrade it, and keep it running.

    DATABASE is a file's path, sqlite:///PATH or postgresql://USER@HOST/DATABASE; left out, it is the environment
    variable RUNTIME_REPO_URL. Keep passwords in PGPASSWORD or ~/.pgpass: in an argument, every user of the machine
    sees them.

    Exit codes: 0 yes, 1 the answer is no, 2 it could not be told.
    """


def run(arguments: Sequence[str]) -> int:
    """Run what the *arguments* say and return the exit code; whatever fails is told on stderr, without a secret."""
    redaction = Redaction([*arguments, os.environ.get("RUNTIME_REPO_URL", "")])
    try:
        code = app.main(list(arguments), prog_name="runtime-repo", standalone_mode=False)
        sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(f"{error.format_message()}\n")
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        usage = "" if context is None else f"{context.get_usage()}\nTry '{context.command_path} --help'.\n\n"
        sys.stderr.write(usage)
        _say(redaction.of(error.format_message()))
    except (BrokenPipeError, SystemExit):
        # Whoever read what is printed has left; so that the interpreter does not complain when it flushes:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BaseException as error:  # noqa: BLE001 - its exit code would be an answer
        if "--debug" in arguments:
            sys.stderr.write(redaction.of("".join(traceback.format_exception(error))))
        return _failed(error, redaction, is_json="--json" in arguments)
    else:
        return code if isinstance(code, int) else YES
    return UNKNOWN


def _failed(error: BaseException, redaction: Redaction, *, is_json: bool) -> int:
    """Tell of an error: the library's own words, or that there is a mistake in the command."""
    import json

    from runtime_repo import errors

    # The others say no, for good reason: refused, in use, damaged, of another release.
    no_answer = (
        errors.ConfigurationError,
        errors.DatabaseUnavailableError,
        errors.OverloadedError,
        errors.SchemaLockTimeoutError,
        errors.UnreadableRowError,
    )

    words = redaction.of(" ".join(str(error).split()))
    if not isinstance(error, errors.RuntimeRepoError):
        words = f"internal error, {type(error).__name__}: {words} (--debug shows where)"
    if is_json:
        sys.stdout.write(json.dumps({"error": {"type": type(error).__name__, "message": words}}, indent=2) + "\n")
    _say(words)
    return NO if isinstance(error, errors.RuntimeRepoError) and not isinstance(error, no_answer) else UNKNOWN


def _say(words: str) -> None:
    """On one line, which a terminal would break within words."""
    line = f"runtime-repo: {printable(words)}"
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    sys.stderr.write(f"{line}\n")
