"""
Least privilege: what each role of an operator's may do with a runtime schema, as the statements that say so.

What a worker needs is read from the statements of its verbs, so that a new column, table or verb needs nothing here.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from runtime_repo.catalog import LEDGER
from runtime_repo.errors import ConfigurationError
from runtime_repo.postgres.names import check_role, check_schema
from runtime_repo.queries import load_queries
from runtime_repo.repairs import quoted
from runtime_repo.schema import load_migrations

__all__ = ["Grants", "grants", "needed"]

_NOUNS = ("api_keys", "attempts", "audit", "interrupts", "jobs", "leases", "step_reports")
"""Whose verbs a worker calls."""

_CONTROL = "runtime_control"

_LOOKED_AT = (LEDGER, _CONTROL)
"""What everybody looks at, and only the owner changes: a boot, and every claim."""

_MONITORED = {
    "runtime_attempts": "select (attempt_id, status, queue)",
    "runtime_finished": "select",
    "runtime_interrupts": "select (status)",
    "runtime_leases": "select",
    "runtime_queue": "select",
}
"""What there is to see of the work, without payloads, results and secrets."""

_ORDER = ("select", "insert", "update", "delete")


@dataclass(frozen=True, slots=True)
class Grants:
    """
    The statements, each to be run as it stands.

    Attributes:
        before: To be run once, before the first boot, by whoever may create schemas.
        after: To be run by the migrator, in one transaction, after the first boot and after every upgrade. They give
            each role exactly what it needs, and take away what it had of our tables besides.
        notes: What may be wanted as well, each a sentence and its statement.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """One script, with comments."""
        lines = ["-- Once, before the first boot, by whoever may create schemas in the database:", *self.before]
        lines += ["", "-- By the migrator, after the first boot and after every upgrade:"]
        lines += ["begin;", *self.after, "commit;"]
        for note in self.notes:
            lines += ["", *(f"-- {line}" for line in note.splitlines())]
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


def grants(
    schema: str = "runtime",
    *,
    migrator: str,
    worker: str | None = None,
    monitor: str | None = None,
    backup: str | None = None,
    server: int = 14,
) -> Grants:
    """
    Return what gives each of these roles exactly what it needs of a runtime schema.

    - The *migrator* owns the schema and the tables: it boots, upgrades, quiesces and restores.
    - A *worker* boots where nothing is pending and calls every verb. It adds audit entries and reads them, and changes
      neither those nor the ledger nor the operator's switches.
    - A *monitor* asks for ``inspect``, ``plan``, ``status``, ``activity``, ``doctor``, ``attempts.stats`` and
      ``control.state``; it sees no payload and no result.
    - A *backup* reads all of it.

    Nothing is run, and no role is created.

    Args:
        schema: The runtime schema's name.
        server: The server's major version: from 17 on a worker may be let vacuum what its claims leave behind.

    Raises:
        ConfigurationError: A name cannot be one, or one role stands in for two.
    """
    check_schema(schema)
    roles = [role for role in (migrator, worker, monitor, backup) if role is not None]
    for role in roles:
        check_role(role)
    if len({*roles}) < len(roles):
        raise ConfigurationError(
            f"the roles are {', '.join(roles)}: expected each once, since each may do other things"
        )
    space, owner = quoted(schema), quoted(migrator)
    after: list[str] = []
    for name, wanted in ((worker, _worker(server)), (monitor, _monitor()), (backup, _backup())):
        if name is not None:
            after += _given(space, owner, quoted(name), wanted)
    if backup is not None:
        after.append(f"grant select on all sequences in schema {space} to {quoted(backup)};")
    notes = []
    if worker is not None:
        numbers = ", ".join(f"{space}.{name}" for name in _numbers())
        notes.append(
            "Where version 1 was laid with BIGSERIAL a worker draws the numbers itself:\n"
            f"grant usage on sequence {numbers} to {quoted(worker)};"
        )
    if monitor is not None:
        notes.append(
            "To see what other users' sessions do, such as who holds a lock:\n"
            f"grant pg_read_all_stats to {quoted(monitor)};"
        )
    return Grants((f"create schema if not exists {space} authorization {owner};",), tuple(after), tuple(notes))


def _given(space: str, owner: str, role: str, wanted: Mapping[str, str]) -> Iterator[str]:
    tables = ", ".join(f"{space}.{table}" for table in _tables())
    # What was granted for later tables, as an earlier recipe of ours did, would be given again by the next migration.
    yield f"alter default privileges for role {owner} in schema {space} revoke all on tables from {role};"
    yield f"revoke all on {tables} from {role};"
    yield f"grant usage on schema {space} to {role};"
    for table, privileges in sorted(wanted.items()):
        yield f"grant {privileges} on {space}.{table} to {role};"


def _worker(server: int) -> Mapping[str, str]:
    wanted: dict[str, str] = dict.fromkeys(_LOOKED_AT, "select")
    wanted |= {table: ", ".join(sorted(used, key=_ORDER.index)) for table, used in _used().items()}
    for table in ("runtime_leases", "runtime_queue") if server >= 17 else ():
        wanted[table] += ", maintain"
    return wanted


def needed(tables: Collection[str]) -> Mapping[str, Sequence[str]]:
    """What a worker needs to do with those of our tables that are there."""
    wanted = {table: frozenset({"select"}) for table in _LOOKED_AT} | dict(_used())
    return {table: sorted(wanted[table], key=_ORDER.index) for table in tables if table in wanted}


def _monitor() -> Mapping[str, str]:
    return dict.fromkeys(_LOOKED_AT, "select") | _MONITORED


def _backup() -> Mapping[str, str]:
    return dict.fromkeys(_tables(), "select")


@cache
def _tables() -> tuple[str, ...]:
    return (LEDGER, *(name for name in load_migrations("postgres")[-1].catalog.tables if name != LEDGER))


@cache
def _numbers() -> tuple[str, ...]:
    """The sequences of what counts by itself, as PostgreSQL names them."""
    tables = load_migrations("postgres")[-1].catalog.tables
    return tuple(
        f"{name}_{column}_seq"
        for name, table in tables.items()
        for column, line in table.columns.items()
        if "auto" in line
    )


@cache
def _used() -> Mapping[str, frozenset[str]]:
    """What the verbs' statements do with each table. A row is locked only where it may be changed."""
    used: dict[str, set[str]] = defaultdict(set)
    texts = load_queries("postgres", schema="{}", now_ms="0")
    for name in texts:
        if name.split(".")[0] not in _NOUNS:
            continue
        # Each part begins with what it does, and names a table of ours next.
        for part in re.split(r"(?=\binsert into|\bupdate \{\}|\bdelete from)", re.sub(r"--.*", "", texts[name])):
            for table in re.findall(r"\{\}\.(\w+)", part):
                used[table].add("select")
            if match := re.match(r"(insert|update|delete)\b[^{]*\{\}\.(\w+)", part):
                used[match[2]].add(match[1])
                if match[1] == "insert" and re.search(r"\bdo\s+update\b", part):
                    used[match[2]].add("update")
    return {table: frozenset(privileges) for table, privileges in used.items()}
