"""
The named statements, one ``.sql`` file per noun, and how they are loaded.

A statement stands under ``-- name: verb``; where the databases truly differ, each dialect has its own under
``-- name: verb @sqlite`` and ``-- name: verb @postgres``. A query may be several statements on SQLite, which has no
data-modifying common table expressions; they run in one transaction and the rows of the last one that has any are the
answer. What one of them finds for the next ones is called ``"$7"``, as the argument that it is then; where it is NULL,
whatever needs it is not done.

The columns of a row are named once, in the head of a file: ``-- columns job: thread_id, status``. Statements of every
file refer to them as ``{job}``, and as ``{job_of_x}`` where a table's alias goes before each; so may other such lines.

A statement under ``-- name: verb 1 10 100`` is there once for each number, as ``verb 10``, with the number in the place
of ``{most}``: ``bounded`` says which of them serves. PostgreSQL keeps one plan for all values of a parameter, and plans
anew each time where it takes that one to be dear; a number in the text it knows.

What stands under ``-- part: name`` is no statement but what several have in common: ``{name}``. A part may have others
in it that stand before it, in its file or in one whose name comes earlier.

The other tokens: ``{schema}`` and ``{now_ms}`` are the database's; ``{supported}`` is the newest version that this
release knows, and ``{known}`` all of them, as texts; ``{skipped}`` is what a statement that must fail says, and
``{too_long}`` what no lease lasts; the rest is what one dialect says and the other need not.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.resources import files

from runtime_repo.errors import ConfigurationError

__all__ = ["SKIPPED", "bounded", "fill", "load_queries", "split_statements", "uncommented"]

SKIPPED = "rows were skipped"
"""What a statement that wrote less than it had to fails with, so that all of it is rolled back: ``{skipped}``."""

_TOKEN = re.compile(r"\{(\w*)\}|[{}]")
_HEADER = re.compile(r"^-- (name|part): (\w+)((?: \d+)*)(?: @(sqlite|postgres))?$", re.MULTILINE)
_ROW = re.compile(r"^-- columns (\w+): (.*(?:\n--  .*)*)", re.MULTILINE)

_WORDS = {
    "skipped": SKIPPED,
    # Milliseconds; longer than any lease that is asked for.
    "too_long": str(1001 * 366 * 86_400_000),
}
_DIALECTS = {
    # A row that is locked is a write: its commit waits for the standbys, as that of the write does which it stands for.
    # SQLite's have nobody to wait for.
    # A name that is not qualified may be another user's: of functions PostgreSQL takes the one that matches best, in
    # whichever schema of the search path it is.
    # Where a row stands and is found again: SQLite may hold a key that no text names.
    "sqlite": {"durably": "", "pg_catalog": "", "place": "rowid", "before_all": "-9223372036854775808"},
    "postgres": {
        "durably": "for no key update",
        "pg_catalog": "pg_catalog.",
        "place": "attempt_id",
        "before_all": "''",
    },
}


def fill(text: str, tokens: Mapping[str, str]) -> str:
    """Replace each ``{token}``, exactly; any other brace is a mistake in the file and fails."""

    def value(match: re.Match[str]) -> str:
        name, of, alias = (match[1] or "").partition("_of_")
        try:
            return f"{alias}." + tokens[name].replace(", ", f", {alias}.") if of else tokens[name]
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
    tokens |= _WORDS | _DIALECTS[backend]
    tokens |= {"supported": str(_KNOWN[backend][-1]), "known": ", ".join(f"'{known}'" for known in _KNOWN[backend])}
    tokens |= {name: fill(columns, _ROWS) for name, columns in _ROWS.items()}
    for name, part in _PARTS.items():
        tokens[name] = fill(part, tokens)
    return _Filled(_TEXTS[backend], tokens)


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


@lru_cache(maxsize=128)
def bounded(query: str, count: int) -> str:
    """The *query* for at least *count* rows, of those that differ in how many they are made for."""
    return f"{query} {next(bound for bound in _BOUNDS[query] if count <= bound)}"


def uncommented(text: str) -> str:
    """A statement's text without the lines that are comments."""
    return re.sub(r"^--.*\n", "", text, flags=re.MULTILINE)


def _read() -> None:
    """Take the files apart."""
    for noun, file in _FILES.items():
        _, *parts = _HEADER.split(file)
        for kind, name, bounds, only, text in zip(*(parts[n::5] for n in range(5)), strict=True):
            if kind == "part":
                _PARTS[name] = uncommented(text.strip())
                continue
            query = f"{noun}.{name}"
            _BOUNDS[query] = sorted({*_BOUNDS.get(query, ()), *map(int, bounds.split())})
            for backend, texts in _TEXTS.items():
                if only in (None, backend):
                    texts |= {f"{query} {bound}": text.strip().replace("{most}", bound) for bound in bounds.split()}
                    if not bounds:
                        texts[query] = text.strip()
        for name, columns in _ROW.findall(file):
            _ROWS[name] = " ".join(columns.replace("--", "").split())


_FILES = {
    file.name.removesuffix(".sql"): file.read_text(encoding="utf-8")
    for file in sorted(files(__name__).iterdir(), key=lambda file: file.name)
    if file.name.endswith(".sql")
}
"""Read at import: constructing a repository does no I/O."""

_KNOWN = {
    backend: sorted(
        int(file.name.partition("_")[0])
        for file in (files("runtime_repo") / "migrations" / backend).iterdir()
        if file.name.endswith(".sql")
    )
    for backend in _DIALECTS
}
"""The versions of the migrations that this release ships."""

_TEXTS: dict[str, dict[str, str]] = {"sqlite": {}, "postgres": {}}
_BOUNDS: dict[str, list[int]] = {}
_PARTS: dict[str, str] = {}
_ROWS: dict[str, str] = {}
_read()


def split_statements(script: str) -> Iterator[str]:
    """The statements of a script: literals, quoted names and comments may contain semicolons."""
    start = 0
    for token in re.finditer(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/|;", script, re.DOTALL):
        if token.group() == ";":
            yield script[start : token.end()].strip()
            start = token.end()
    if re.sub(r"--[^\n]*|/\*.*?\*/|\s", "", script[start:], flags=re.DOTALL):
        yield script[start:].strip()
