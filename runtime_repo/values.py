"""
Values that cross the border to the database, for every noun: identifiers, numbers, instants, durations and JSON.

Instants are aware ``datetime`` in UTC, durations ``timedelta``; in the database both are milliseconds. What is
invalid is refused here, before anything is written.
"""

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from runtime_repo.errors import ConfigurationError, OverloadedError, PayloadMismatchError, RefusedError, shown

__all__ = [
    "Columns",
    "as_read",
    "canonical",
    "check_after",
    "check_batch",
    "check_choice",
    "check_count",
    "check_id",
    "check_iterable",
    "check_key",
    "check_same",
    "from_json",
    "from_ms",
    "instant_ms",
    "is_key",
    "is_text",
    "json_text",
    "maybe_from_ms",
    "maybe_version",
    "new_id",
    "new_ids",
    "no_thread",
    "plain",
    "queue_names",
    "queues_json",
    "skipped",
    "span_ms",
    "storable",
    "to_json",
    "written",
]

MAX_ID_LENGTH = 512
MAX_ID_BYTES = 1024
MAX_KEY_BYTES = 1536
"""A key and one other fit into a row of an index of PostgreSQL's, which has 2,704 bytes."""

MAX_SPAN_MS = 1000 * 366 * 86_400_000
MAX_PAYLOAD_BYTES = 16 * 1024 * 1024
MAX_DEPTH = 100
MAX_BATCH = 10_000
MAX_BATCH_BYTES = 64 * 1024 * 1024

T = TypeVar("T")
S = TypeVar("S", bound=StrEnum)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EARLIEST, _LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_NO_KEY = re.compile("[\0\ufffd\ud800-\udfff]")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# Made once: json.dumps makes one for each value, unless it is to write what it writes by default.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_TOLERANT = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


@lru_cache(maxsize=128)  # what one statement wrote has one time, and is read together
def from_ms(value: int) -> datetime:
    """The instant that a ``_ms`` column holds."""
    # In parts, of which each is small: a number that is large takes half as long again.
    return _EPOCH + timedelta(0, value // 1000, value % 1000 * 1000)


def maybe_from_ms(value: int | None) -> datetime | None:
    return None if value is None else from_ms(value)


def instant_ms(name: str, value: datetime | None) -> int | None:
    """An aware instant in milliseconds since the epoch; None stays None."""
    if value is None:
        return None
    if not isinstance(value, datetime):
        raise ConfigurationError(f"{name} is {shown(value)}: expected an aware datetime")
    if value.utcoffset() is None:
        raise ConfigurationError(f"{name} is {shown(value)}, without a time zone: pass an aware datetime, such as UTC")
    if not _EARLIEST <= value <= _LATEST:
        raise ConfigurationError(f"{name} is {shown(value)}: expected an instant of the years 1 to 9999 in UTC")
    return (value - _EPOCH) // timedelta(milliseconds=1)


def span_ms(name: str, value: timedelta, *, positive: bool = False) -> int:
    """A duration in milliseconds; never negative, and not zero where it must be positive."""
    if not isinstance(value, timedelta):
        raise ConfigurationError(f"{name} is {shown(value)}: expected a timedelta")
    milliseconds = value // timedelta(milliseconds=1)
    if not (1 if positive else 0) <= milliseconds <= MAX_SPAN_MS:
        raise ConfigurationError(
            f"{name} is {shown(value)}: expected {'at least a millisecond' if positive else '0 or more'}, "
            "at most 1000 years"
        )
    return milliseconds


def check_id(name: str, value: str, *, most: int = MAX_ID_BYTES) -> str:
    """An id or a name that both databases can store, alone and in every index."""
    if isinstance(value, str) and 0 < len(value) <= MAX_ID_LENGTH:
        if value.isascii():
            if "\0" not in value:
                return value
        elif is_text(value) and len(value.encode()) <= most:
            return value
    found = f"{len(value)} characters long" if isinstance(value, str) and len(value) > 80 else shown(value)
    raise ConfigurationError(
        f"{name} is {found}: expected 1 to {MAX_ID_LENGTH} characters without NUL, at most {most} bytes of UTF-8"
    )


def check_key(name: str, value: str) -> str:
    """An attempt's or an interrupt's id, which may be longer than what stands beside it in an index."""
    return check_id(name, value, most=MAX_KEY_BYTES)


def queue_names(queues: str | Sequence[str]) -> Sequence[str]:
    """The queues that are named, each once."""
    if not isinstance(queues, Iterable):
        raise ConfigurationError(f"queues is {shown(queues)}: expected the name of a queue, or several")
    names = [check_id("queues", name) for name in ([queues] if isinstance(queues, str) else queues)]
    if not names:
        raise ConfigurationError("queues is empty: expected the name of a queue, or several")
    return list(dict.fromkeys(names))


def queues_json(queues: str | Sequence[str]) -> str:
    """The queues that are named, each once, as a JSON array."""
    return _queue_json(queues) if type(queues) is str else json.dumps(queue_names(queues))


@lru_cache(maxsize=128)  # whoever works asks for the same one again and again
def _queue_json(queue: str) -> str:
    return json.dumps(queue_names(queue))


def check_after(value: str) -> str:
    """The id after which a page begins; the first page begins after the empty one."""
    return value if value == "" else check_key("after", value)


def is_text(value: str) -> bool:
    """Whether both databases can store it: neither takes a lone surrogate, PostgreSQL takes no NUL."""
    return _is_plain(value) or _NO_TEXT.search(value) is None


def is_key(value: str) -> bool:
    """Whether a row that was read under this id is found by it: what was no UTF-8 is read as something else."""
    return _is_plain(value) or _NO_KEY.search(value) is None


def _is_plain(value: str) -> bool:
    """Whether it is ASCII without NUL, as almost everything is: to look for one character takes a fifth of the time."""
    return isinstance(value, str) and value.isascii() and "\0" not in value


def storable(value: str) -> str:
    """Text with what no database can store replaced."""
    return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", value)


def check_count(name: str, value: int, *, least: int = 1, most: int = 2**31 - 1) -> int:
    """A number of things that both databases can store as an integer."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigurationError(f"{name} is {shown(value)}: expected a whole number from {least} to {most}")
    return value


def check_iterable(name: str, value: Iterable[T], what: str) -> Iterable[T]:
    """Several of what is expected, or an error that names them."""
    if not isinstance(value, Iterable):
        raise ConfigurationError(f"{name} is {shown(value)}: expected an iterable {what}")
    return value


def check_batch(name: str, count: int, size: int = 0) -> None:
    """Refuse more in one call than one statement should carry: more things, or more bytes of JSON together."""
    if count > MAX_BATCH:
        raise ConfigurationError(f"{name} are {count}: expected at most {MAX_BATCH}; use more calls")
    if size > MAX_BATCH_BYTES:
        raise ConfigurationError(
            f"{name} are {size} bytes of JSON together: expected at most {MAX_BATCH_BYTES}; use more calls"
        )


class Columns(list[str | None]):
    """
    Rows that a query is given, column after column, all of text.

    To PostgreSQL they are one array, which takes a third of the time that JSON takes to write and to read; to SQLite,
    which has no arrays, they are JSON: an array of objects.
    """

    def __init__(self, **columns: Sequence[str | None]) -> None:
        super().__init__(chain.from_iterable(columns.values()))
        self._columns = columns

    @cached_property
    def _json(self) -> str:
        return json.dumps(
            [dict(zip(self._columns, row, strict=True)) for row in zip(*self._columns.values(), strict=True)]
        )

    def __conform__(self, _protocol: object) -> str:
        """What the standard library's driver of SQLite asks of an argument that it does not know."""
        return self._json


def written(rows: Sequence[T], what: str) -> T:
    """
    The row with which a statement answers that must have one.

    Raises:
        RefusedError: It has none, and the database gave no reason.
    """
    if not rows:
        raise skipped(what)
    return rows[0]


def skipped(what: str) -> RefusedError:
    """The error for what the database neither did nor refused."""
    return RefusedError(
        f"{what} was neither written nor refused by the database, or it is hidden from this role: look for a trigger "
        "or a rule that skips the row, or a policy of row security that hides it"
    )


def no_thread(error: RuntimeError) -> OverloadedError:
    """The error for a thread that was not to be had."""
    return OverloadedError(
        f"this process can start no thread ({error}): try again later, or raise the limit of its threads or memory "
        "(ulimit -u, the container's)"
    )


def check_choice(name: str, kind: type[S], value: str) -> S:
    """One of the members of an enumeration."""
    try:
        return kind(value)
    except Exception:  # noqa: BLE001 - its own message repeats the value, which may not be possible
        raise ConfigurationError(f"{name} is {shown(value)}: expected one of {', '.join(kind)}") from None


def check_same(kind: str, key: str, found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse what is *given* under a key *found* with other content; only the fields in *found* are compared."""
    if differing := [name.removesuffix("_json") for name in found if found[name] != given[name]]:
        raise PayloadMismatchError(kind, key, differing)


def to_json(name: str, value: Any) -> str | None:
    """Canonical JSON, so that equal values are equal text; None is stored as NULL."""
    return None if value is None else json_text(name, value)


def json_text(name: str, value: Any) -> str:
    """Canonical JSON also of None, where that is a value like any other."""
    try:
        text = _encoded(_CANONICAL, value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{name} cannot be stored as JSON: {error}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and not _is_shallow(text):
        raise ConfigurationError(
            f"{name} nests more than {MAX_DEPTH} levels deep: expected at most that; flatten it, or store it as text"
        )
    if len(text) > MAX_PAYLOAD_BYTES:
        raise ConfigurationError(
            f"{name} is {len(text)} bytes of JSON: expected at most {MAX_PAYLOAD_BYTES}; store it elsewhere "
            "and pass a reference"
        )
    return text


def canonical(value: Any) -> str:
    """JSON of what was stored, the same for equal values: another program may have nested deeper, or written NaN."""
    return _encoded(_TOLERANT, value)


def _encoded(encoder: json.JSONEncoder, value: Any) -> str:
    try:
        return encoder.encode(value)
    except RecursionError:
        return _on_its_own_stack(encoder.encode, value)


def _is_shallow(text: str) -> bool:
    """Whether JSON nests no deeper than is allowed: without its strings, each pass takes the innermost level away."""
    levels = _STRING.sub(b"", text.encode()).translate(_BRACKETS, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        levels = levels.replace(b"[]", b"")
    return not levels


def as_read(text: str) -> str:
    """Re-encode as it will be read back: JSON turns number keys into strings, which changes their order."""
    return canonical(from_json(text))


def from_json(text: str | None) -> Any:
    """
    The value of a ``_json`` column.

    Raises:
        ValueError: It is no JSON, or nests too deep to be parsed.
    """
    if text is None:
        return None
    try:
        # Almost everything is text that begins and ends with its value, which takes a third of the time.
        value, end = _scan(text, 0)
        if end == len(text):
            return value
    except (StopIteration, TypeError, ValueError, RecursionError):
        pass
    try:
        return json.loads(text)
    except RecursionError:
        pass
    except ValueError as error:
        raise _no_json(error) from None
    try:
        return _on_its_own_stack(json.loads, text)
    except (ValueError, RuntimeError) as error:
        raise _no_json(error) from None


def plain(value: Any) -> Any:
    """*value* as JSON has it: records as objects, instants in ISO 8601, spans in seconds, paths as text."""
    if is_dataclass(value):
        return {part.name: plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    return value.total_seconds() if isinstance(value, timedelta) else value


def maybe_version(text: str | None) -> int | None:
    """The version that a ``_json`` column holds, whatever another program has written there."""
    try:
        value = from_json(text)
    except (TypeError, ValueError):
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _no_json(error: Exception) -> ValueError:
    return ValueError(f"it holds what is no JSON, or nests too deep ({error})")


def _on_its_own_stack(work: Callable[[Any], T], value: Any) -> T:
    """
    Do what recurses in a thread, which begins with all of the stack, however little the caller has left of it.

    Raises:
        OverloadedError: There can be no thread: it says nothing of the value.
    """
    with ThreadPoolExecutor(1) as threads:
        try:
            done = threads.submit(work, value)
        except RuntimeError as error:
            raise no_thread(error) from error
        return done.result()


_chance = random.Random()  # noqa: S311 - ids must be unique, not secret
"""Seeded by the system, in a child of a fork anew, and never by the application: to ask the system takes longer."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_chance.seed)


def new_id() -> str:
    """A unique id whose text order is the order of creation, to the millisecond (the layout of UUID version 7)."""
    return next(new_ids())


def new_ids() -> Iterator[str]:
    """Unique ids, each of which comes after the one before it in the order of text."""
    head = time.time_ns() // 1_000_000
    chance = _chance.getrandbits(12 + 14 + 47)
    start = f"{head >> 16:08x}-{head & 0xFFFF:04x}-7{chance >> 61:03x}-{0x8000 | chance >> 47 & 0x3FFF:04x}"
    # Of its 48 bits the uppermost is left clear, so that counting on does not overflow.
    tail = chance & (1 << 47) - 1
    while True:
        yield f"{start}-{tail:012x}"
        tail += 1 + _chance.getrandbits(16)
