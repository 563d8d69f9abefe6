"""What a doctor asks of a PostgreSQL server, and of what stands around our tables there."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from runtime_repo.database import Reader, Row
from runtime_repo.doctor import Examined, Finding, clock, could_not_tell
from runtime_repo.errors import RuntimeRepoError
from runtime_repo.postgres.grants import needed
from runtime_repo.postgres.repairs import Facts, repairs
from runtime_repo.repairs import Repair, quoted

__all__ = ["examine"]

_LONG = 300.0
"""Seconds for which no transaction of a healthy application is open."""

_DEAD = 20_000
"""Dead rows that autovacuum, as our tables have it, lets nobody see for long."""


async def examine(
    reader: Reader, another: Reader, schema: str, space: str, examined: Examined
) -> tuple[Sequence[Finding], Sequence[Repair]]:
    """
    What there is to say, and what mends the drift.

    Args:
        another: Reads on a connection of its own.
        space: The schema's quoted name.
    """
    asked = _Asked(reader)
    names = json.dumps(examined.tables)
    before = time.time() * 1000
    for server in await asked.all("server", "doctor.server"):
        asked.found += [*_server(server), clock(before, server["now_ms"], time.time() * 1000)]
        wanted = json.dumps(
            [
                {"name": table, "privilege": privilege}
                for table, privileges in needed(examined.tables).items()
                for privilege in privileges
            ]
        )
        rights = await asked.all("rights", "doctor.rights", wanted, schema)
        asked.found += (_rights(row, server["role"], space) for row in rights)
    asked.found.append(await _pooler(reader, another))
    await asked.about("long transactions", _transactions, "doctor.transactions", _LONG)
    await asked.about("prepared transactions", _prepared, "doctor.prepared", _LONG)
    await asked.about("dead rows", _vacuumed, "doctor.vacuumed", schema, names)
    await asked.about("invalid indexes", partial(_invalid, space=space), "doctor.invalid", schema, names)
    if not examined.drift:
        return asked.found, ()
    facts = Facts(
        {row["name"]: row["key"] for row in await reader.fetch("doctor.keys", schema)},
        {(row["name"], row["attname"]): row["base"] for row in await reader.fetch("doctor.bases", schema)},
        {row["name"]: row["on_table"] for row in await reader.fetch("doctor.holding", schema)},
    )
    texts = [migration.sql for migration in examined.migrations]
    return asked.found, tuple(repairs(space, texts, examined.expected, examined.live, examined.drift, facts))


class _Asked:
    """The answers; a question that has none does not keep the others from theirs."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.found: list[Finding] = []

    async def all(self, check: str, query: str, *args: object) -> Sequence[Row]:
        """The rows of a query, none where it has no answer, which is told then."""
        try:
            return await self._reader.fetch(query, *args)
        except RuntimeRepoError as error:
            self.found.append(could_not_tell(check, error))
            return ()

    async def about(self, check: str, judge: Callable[[Sequence[Row]], Finding], query: str, *args: object) -> None:
        """What there is to say of the rows of a query."""
        count = len(self.found)
        rows = await self.all(check, query, *args)
        if len(self.found) == count:
            self.found.append(judge(rows))


def _server(row: Row) -> Iterator[Finding]:
    lossy = [name for name in ("fsync", "full_page_writes") if row[name] == "off"]
    kept = ", ".join(f"{name} {row[name]}" for name in ("fsync", "full_page_writes", "synchronous_commit", "wal_level"))
    if lossy:
        advice = f"turn {' and '.join(lossy)} on: without, a crash of the machine may leave no database at all"
        yield Finding("durability", "ill", kept, advice)
    elif row["synchronous_commit"] == "off":
        advice = "a crash forgets the last moments of what was acknowledged: set synchronous_commit to local or on"
        yield Finding("durability", "note", kept, advice)
    else:
        yield Finding("durability", "well", kept)
    if row["is_standby"] or row["read_only"] == "on":
        what = "the server is a standby" if row["is_standby"] else "sessions of this role are read-only"
        yield Finding("writing", "ill", what, "connect to the primary, as a role that may write")
    if row["isolation"] != "read committed":
        told = f"the default isolation level of this role or database is {row['isolation']}"
        yield Finding("isolation", "note", told, "each verb then costs two round trips more: set read committed")
    if row["autovacuum"] == "off":
        yield Finding("autovacuum", "ill", "autovacuum is off", "turn it on: every claim leaves dead rows behind")


def _rights(row: Row, role: str, space: str) -> Finding:
    lacking = [*row["lacking"], *(f"usage on sequence {name}" for name in row["sequences"] if name)]
    may = "may migrate" if row["may_create"] and row["is_owner"] else "may not migrate"
    if not lacking:
        return Finding("rights", "well", f"role {role} {may} and may call every verb")
    if len(lacking) > 3 and not row["may_create"]:
        told = f"role {role} {may} and lacks, of what a worker needs, {', '.join(lacking)}"
        return Finding("rights", "note", told, _granting(lacking, role, space))
    return Finding("rights", "ill", f"role {role} lacks {', '.join(lacking)}", _granting(lacking, role, space))


def _granting(lacking: Sequence[str], role: str, space: str) -> str:
    statements = []
    for what in lacking:
        privilege, _, name = what.partition(" on ")
        place = name if name.startswith("sequence ") else f"{space}.{name}"
        statements.append(f"grant {privilege} on {place} to {quoted(role)};")
    return f"if it is to be a worker's: {' '.join(statements)}"


async def _pooler(reader: Reader, another: Reader) -> Finding:
    """
    Whether a pooler gives one connection's session to another's transaction.

    Two connections that are open at the same time never have one session otherwise.
    """
    try:
        for _ in range(3):
            pids = [(await each.fetch("doctor.backend"))[0]["pid"] for each in (reader, another)]
            if pids[0] == pids[1]:
                return Finding(
                    "pooler",
                    "note",
                    "a pooler in between gives sessions away at the end of a transaction",
                    "pass statement_cache_size=0 and listen=False: nobody can listen through it, so new work is "
                    "noticed by polling",
                )
    except RuntimeRepoError as error:
        return could_not_tell("pooler", error)
    return Finding("pooler", "well", "no pooler in transaction mode was noticed")


def _transactions(rows: Sequence[Row]) -> Finding:
    if not rows:
        return Finding("long transactions", "well", f"none has been open for {_LONG:g} s, of those that this role sees")
    who = ", ".join(
        f"pid {row['pid']} ({row['application_name'] or 'without a name'}, {row['user_name']}, {row['state']}) for "
        f"{row['age']:.0f} s"
        for row in rows
    )
    pids = " ".join(f"select pg_catalog.pg_terminate_backend({row['pid']});" for row in rows)
    advice = f"dead rows stay for as long, and claims read past them: end them, or have them ended: {pids}"
    return Finding("long transactions", "ill", f"open: {who}", advice)


def _prepared(rows: Sequence[Row]) -> Finding:
    if not rows:
        return Finding("prepared transactions", "well", f"none has waited for {_LONG:g} s")
    who = ", ".join(f"{row['gid']!r} of {row['user_name']} for {row['age']:.0f} s" for row in rows)
    advice = "nobody ends them but who commits or rolls them back, and dead rows stay until then: rollback prepared"
    return Finding("prepared transactions", "ill", f"waiting: {who}", advice)


def _vacuumed(rows: Sequence[Row]) -> Finding:
    off = [row["name"] for row in rows if row["is_off"]]
    losing = [row for row in rows if row["dead"] > max(_DEAD, row["alive"] // 2)]
    if off:
        told = f"autovacuum never comes to {', '.join(off)}"
        return Finding("dead rows", "ill", told, f"alter table … reset (autovacuum_enabled), on {', '.join(off)}")
    if not losing:
        return Finding(
            "dead rows", "well", f"{sum(row['dead'] for row in rows):,} in all our tables, as was counted last"
        )
    worst = ", ".join(f"{row['name']} {row['dead']:,} beside {row['alive']:,} alive{_since(row)}" for row in losing)
    return Finding(
        "dead rows",
        "ill",
        f"autovacuum is losing: {worst}",
        "end long transactions, which keep them, then vacuum; let autovacuum be faster (autovacuum_max_workers, "
        "autovacuum_naptime), or let workers vacuum (MAINTAIN, from PostgreSQL 17 on)",
    )


def _since(row: Row) -> str:
    return ", never vacuumed" if row["since"] is None else f", vacuumed {row['since']:.0f} s ago"


def _invalid(rows: Sequence[Row], *, space: str) -> Finding:
    if not rows:
        return Finding("invalid indexes", "well", "none")
    named = ", ".join(f"{row['name']} on {row['on_table']}" for row in rows)
    statements = " ".join(f"reindex index concurrently {space}.{quoted(row['name'])};" for row in rows)
    return Finding("invalid indexes", "ill", f"left behind by a build that failed: {named}", statements)
