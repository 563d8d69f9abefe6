"""
The named statements, one ``.sql`` file per noun, and how they are loaded.

A statement stands under ``-- name: verb``; where the databases truly differ, each dialect has its own under
``-- name: verb @sqlite`` and ``-- name: verb @postgres``. A query may be several statements on SQLite, which has no
data-modifying common table expressions; they run in one transaction and the last one's rows are the answer.

The tokens in a statement: ``{schema}`` and ``{now_ms}`` are the database's; ``{attempt}``, ``{attempt_of_a}`` and
``{lease}`` are the columns that a row of each has, named once, here; ``{skipped}`` is what a statement that must fail
says, and ``{too_long}`` what no lease lasts; the rest is what one dialect says and the other need not.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.resources import files

from runtime_repo.errors import ConfigurationError

__all__ = ["SKIPPED", "fill", "load_queries", "split_statements"]

SKIPPED = "rows were skipped"
"""What a statement that wrote less than it had to fails with, so that all of it is rolled back: ``{skipped}``."""

_TOKEN = re.compile(r"\{(\w*)\}|[{}]")
_HEADER = re.compile(r"^-- name: (?P<name>\w+)(?: @(?P<backend>sqlite|postgres))?$", re.MULTILINE)

_ATTEMPT = (
    "attempt_id, run_id, attempt_no, status, queue, priority, payload_json, max_attempts, lease_version, worker_id, "
    "enqueued_at_ms, retry_at_ms, started_at_ms, finished_at_ms, result_json, error, lease_id, ended_by"
)
_ATTEMPT_OF_A = ", ".join(f"a.{column}" for column in _ATTEMPT.split(", "))
_COLUMNS = {
    "skipped": SKIPPED,
    # Milliseconds; longer than any lease that is asked for.
    "too_long": str(1001 * 366 * 86_400_000),
    "attempt": _ATTEMPT,
    "attempt_of_a": _ATTEMPT_OF_A,
    # Of a lease that holds, its attempt's lease_id is its own.
    "lease": "l.lease_id, l.lease_expires_at_ms, l.heartbeat_at_ms, l.claimed_at_ms, "
    + _ATTEMPT_OF_A.replace("a.lease_id, ", ""),
}
_DIALECTS = {
    # A row that is locked is a write: its commit waits for the standbys, as that of the write does which it stands for.
    # SQLite's have nobody to wait for.
    # A name that is not qualified may be another user's: of functions PostgreSQL takes the one that matches best, in
    # whichever schema of the search path it is.
    "sqlite": {"durably": "", "pg_catalog": ""},
    "postgres": {"durably": "for no key update", "pg_catalog": "pg_catalog."},
}


def fill(text: str, tokens: Mapping[str, str]) -> str:
    """Replace each ``{token}``, exactly; any other brace is a mistake in the file and fails."""

    def value(match: re.Match[str]) -> str:
        try:
            return tokens[match[1]]
        except KeyError:
            raise ConfigurationError(f"unexpected {match[0]!r} in SQL; the tokens are {', '.join(tokens)}") from None

    return _TOKEN.sub(value, text)


@lru_cache(maxsize=16)
def load_queries(backend: str, *, schema: str, now_ms: str) -> Mapping[str, str]:
    """
    Every query of *backend*, as ``noun.verb``; its tokens are filled in when it is first asked for.

    ``{schema_text}`` is the schema's quoted name, to stand within e'…': where arguments can't be bound.
    """
    text = schema.replace("\\", "\\\\").replace("'", "\\'")
    tokens = {"schema": schema, "schema_text": text, "now_ms": now_ms}
    return _Filled(_TEXTS[backend], tokens | _COLUMNS | _DIALECTS[backend])


class _Filled(Mapping[str, str]):
    def __init__(self, texts: Mapping[str, str], tokens: Mapping[str, str]) -> None:
        self._texts = texts
        self._tokens = tokens
        self._filled: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        if name not in self._filled:
            self._filled[name] = fill(self._texts[name], self._tokens)
        return self._filled[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


def _texts(backend: str) -> Mapping[str, str]:
    texts: dict[str, str] = {}
    for file in files(__name__).iterdir():
        if file.name.endswith(".sql"):
            noun = file.name.removesuffix(".sql")
            parts = _HEADER.split(file.read_text(encoding="utf-8"))[1:]
            for name, only, text in zip(parts[0::3], parts[1::3], parts[2::3], strict=True):
                if only in (None, backend):
                    texts[f"{noun}.{name}"] = text.strip()
    return texts


_TEXTS = {backend: _texts(backend) for backend in ("sqlite", "postgres")}
"""Read at import: constructing a repository does no I/O."""


def split_statements(script: str) -> Iterator[str]:
    """The statements of a script: literals, quoted names and comments may contain semicolons."""
    start = 0
    for token in re.finditer(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/|;", script, re.DOTALL):
        if token.group() == ";":
            yield script[start : token.end()].strip()
            start = token.end()
    if re.sub(r"--[^\n]*|/\*.*?\*/|\s", "", script[start:], flags=re.DOTALL):
        yield script[start:].strip()
