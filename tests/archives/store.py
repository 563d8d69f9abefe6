"""A store with something in every table, and what its tables hold."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_repo import Attempt, Lease, NewAttempt
from runtime_repo.schema import load_migrations
from tests.lab import Lab, Row

ODD = ["\\N", "\\", "a\tb", "a\nb\r", "\b\f\v", "\\t", "é 🐎", "a\\\\N", "'\"", "", "a\\"]
"""What COPY has to escape, and what looks as if it had been."""

TABLES = tuple(load_migrations("sqlite")[-1].catalog.tables)
FIRST = tuple(load_migrations("sqlite")[0].catalog.tables)


@dataclass(frozen=True)
class Filled:
    """Who holds what in the store."""

    held: Lease
    done: Attempt
    done_by: Lease
    failed_by: Lease


async def fill(lab: Lab, number: int = 30) -> Filled:
    """Put something into every table."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many(
            [
                NewAttempt(
                    f"run {odd}", attempt_id=f"{n:05d} {odd}", payload={odd: n}, priority=n % 3, headers={"h": odd}
                )
                for n in range(number)
                for odd in [ODD[n % len(ODD)]]
            ]
        )
        held, done_by, failed_by = await repo.leases.claim("worker\t1", limit=3)
        await repo.attempts.start(held)
        for token in ("once", "twice"):
            await repo.step_reports.record(held, "step", "ok", token, payload={"\\": None})
        done = await repo.attempts.complete(done_by, {"said": "\n"})
        await repo.attempts.fail(failed_by, "it\twas\nso")
        await repo.interrupts.create("thread", "run", "attempt", {"ask": "\\"}, interrupt_id="i")
        await repo.jobs.upsert("thread", "\\N")
        await repo.api_keys.put("key", "secret", role="reader")
        await repo.audit.append(actor_type="user", action="a", resource_type="r", result="ok", request_id="q")
    # More than a float can tell.
    values = """('x', '{"a": "\\\\"}', 9007199254740993)"""
    await lab.execute(f"insert into runtime_control (name, value_json, updated_at_ms) values {values}")
    return Filled(held, done, done_by, failed_by)


async def everything(lab: Lab, tables: tuple[str, ...] = TABLES) -> dict[str, list[Row]]:
    """Every row of every table."""
    found = {}
    for table in tables:
        rows = await lab.rows(f"select * from {lab.place.schema}.{table}")
        found[table] = sorted(rows, key=repr)
    return found


def manifest(path: Path) -> dict[str, Any]:
    """What an archive says of itself."""
    with zipfile.ZipFile(path) as archive:
        loaded: dict[str, Any] = json.loads(archive.read("manifest.json"))
        return loaded


def row_hashes(path: Path) -> Mapping[str, str]:
    """The hash of each table's rows."""
    return {name: member["row_hash"] for name, member in manifest(path)["tables"].items()}


def changed(path: Path, target: Path, **contents: bytes | None) -> Path:
    """A copy of an archive with other members; None takes one away, and a new name adds one."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        members = {name: source.read(name) for name in source.namelist()}
        for name, content in contents.items():
            full = "manifest.json" if name == "manifest" else f"{name}.copy"
            if content is None:
                del members[full]
            else:
                members[full] = content
        for name, data in members.items():
            copy.writestr(name, data)
    return target


def names(folder: Path, pattern: str = "*") -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.glob(pattern))
