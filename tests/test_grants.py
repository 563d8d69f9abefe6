"""Least privilege on PostgreSQL: each role can do its own, verb by verb, and with one grant less it cannot."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from runtime_repo import (
    ConfigurationError,
    Lease,
    PostgresRuntimeRepository,
    RefusedError,
    RuntimeRepository,
)
from runtime_repo.postgres.grants import Grants, grants
from tests.lab import Lab, PostgresLab, on_postgres
from tests.verbs import CALLS, prepare
from tests.versions import NEWEST

NOW = datetime(2030, 1, 1, tzinfo=UTC)

ALONE = {"attempts.wait", "attempts.vacuum", "leases.hold"}
"""What is no part of a transaction."""


OPERATORS = {"control.quiesce", "control.pause", "control.resume"}
"""What sets a switch."""


class Undone(Exception):  # noqa: N818 - it is raised so that a transaction leaves nothing
    pass


@dataclass
class Roles:
    """A runtime schema, and a role for each who has to do with it."""

    url: str
    schema: str
    admin: asyncpg.Connection
    said: Grants

    def name(self, role: str) -> str:
        return f"{self.schema}_{role}"

    def repository(self, role: str, **options: Any) -> PostgresRuntimeRepository:
        """A repository of that role's."""
        settings = {"role": self.name(role)}
        return PostgresRuntimeRepository(self.url, schema=self.schema, server_settings=settings, **options)

    async def run(self, role: str, statement: str) -> None:
        await self.admin.execute(f"set role {self.name(role)}")
        try:
            await self.admin.execute(statement)
        finally:
            await self.admin.execute("reset role")

    async def given(self, role: str) -> list[tuple[str, str]]:
        """Every privilege that the role has on the schema and on what is in it, and on which object."""
        rows = await self.admin.fetch(
            """
            select lower(p.privilege_type) as privilege, what
              from (select 'schema ' || nspname as what, nspacl as acl from pg_namespace where nspname = $1
                     union all
                    select case relkind when 'S' then 'sequence ' else '' end || c.oid::regclass, relacl
                      from pg_class as c
                     where relnamespace = $1::regnamespace) as held,
                   aclexplode(acl) as p
             where p.grantee = $2::regrole
             union all
            select lower(p.privilege_type) || ' (' || attname || ')', attrelid::regclass::text
              from pg_class as c join pg_attribute on attrelid = c.oid, aclexplode(attacl) as p
             where relnamespace = $1::regnamespace and p.grantee = $2::regrole
             order by 2, 1
            """,
            self.schema,
            self.name(role),
        )
        return [(row["privilege"], row["what"]) for row in rows]


@pytest.fixture
async def roles(postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection) -> AsyncIterator[Roles]:
    """Everything as it was said: booted by the migrator, which may create nothing but in its own schema."""
    names = {role: f"{postgres_schema}_{role}" for role in ("migrator", "worker", "monitor", "backup")}
    said = grants(postgres_schema, **names, server=postgres.get_server_version().major)
    roles = Roles(postgres_url, postgres_schema, postgres, said)
    for name in names.values():
        await postgres.execute(f"create role {name}")
    try:
        for statement in said.before:
            await postgres.execute(statement)
        async with roles.repository("migrator") as repo:
            assert repo.boot_report.to_version == NEWEST
        # Twice, for it takes away nothing of what it gives.
        for _ in range(2):
            await roles.run("migrator", f"begin; {''.join(said.after)} commit")
        yield roles
    finally:
        await postgres.execute("set client_min_messages = warning; rollback; reset role")
        for name in names.values():
            await postgres.execute(f"drop owned by {name} cascade; drop role {name}")


async def call(repo: RuntimeRepository, verb: str, lease: Lease) -> None:
    """Call a verb and undo what it did."""
    if verb in ALONE | OPERATORS:
        await CALLS[verb](repo, lease, NOW)
        return
    with contextlib.suppress(Undone):
        async with repo.transaction() as transaction:
            await CALLS[verb](transaction, lease, NOW)
            raise Undone


@contextlib.asynccontextmanager
async def without(roles: Roles, role: str, privilege: str, what: str) -> AsyncIterator[None]:
    """The role has one privilege less meanwhile."""
    name = roles.name(role)
    await roles.run("migrator", f"revoke {privilege} on {what} from {name}")
    yield
    await roles.run("migrator", f"grant {privilege} on {what} to {name}")


async def needless(
    roles: Roles, role: str, fails: Callable[[str], Awaitable[bool]], but: frozenset[str] = frozenset()
) -> list[tuple[str, str]]:
    """The privileges without which everything still works."""
    found = []
    given = await roles.given(role)
    assert ("usage", f"schema {roles.schema}") in given
    for privilege, what in given:
        if privilege not in but:
            async with without(roles, role, privilege, what):
                if not await fails(what):
                    found.append((privilege, what.rpartition(".")[2]))
    return found


async def is_refused(action: Awaitable[object]) -> bool:
    try:
        await action
    except RefusedError as error:
        if not isinstance(error.__cause__, asyncpg.InsufficientPrivilegeError):
            raise
        return True
    return False


async def test_a_worker_can_do_all_that_it_does_and_no_more(roles: Roles) -> None:
    """
    Every verb passes, and so does a boot that finds nothing to do; with any grant less a verb or the boot is refused.
    """
    async with roles.repository("migrator") as owner:
        await owner.control.pause("mail")
        await owner.control.quiesce()
        await owner.control.resume()
        lease = await prepare(owner, NOW)
    # What a reindex has to put right.
    await roles.run("migrator", f"delete from {roles.schema}.runtime_finished")
    async with roles.repository("worker") as repo:
        for verb in CALLS:
            assert await is_refused(call(repo, verb, lease)) == (verb in OPERATORS), verb

        async def fails(what: str) -> bool:
            # Those first that the table may be named after.
            for verb in sorted(CALLS, key=lambda verb: verb.split(".")[0] not in what):
                if verb not in {"api_keys.authenticate", "attempts.vacuum"} | OPERATORS and await is_refused(
                    call(repo, verb, lease)
                ):
                    return True
            async with contextlib.AsyncExitStack() as stack:
                return await is_refused(stack.enter_async_context(roles.repository("worker")))

        found = await needless(roles, "worker", fails, frozenset({"maintain"}))
    assert found == []


async def test_a_worker_may_vacuum_where_the_server_can_let_it(roles: Roles) -> None:
    """From PostgreSQL 17 on, and what its claims write to, but nothing else."""
    can = roles.admin.get_server_version().major >= 17
    maintained = [what.rpartition(".")[2] for privilege, what in await roles.given("worker") if privilege == "maintain"]
    assert maintained == (["runtime_leases", "runtime_queue"] if can else [])
    async with roles.repository("worker") as repo:
        await repo.attempts.vacuum()
    await roles.admin.execute("select pg_stat_clear_snapshot()")
    rows = await roles.admin.fetch(
        "select relname from pg_stat_all_tables where schemaname = $1 and vacuum_count > 0 order by 1", roles.schema
    )
    assert [row["relname"] for row in rows] == maintained


FORBIDDEN = [
    "update {}.runtime_audit_logs set result = 'fine'",
    "delete from {}.runtime_audit_logs",
    "truncate {}.runtime_audit_logs",
    "insert into {}.runtime_control values ('quiesce', 'true', 0)",
    "update {}.runtime_control set value_json = 'false'",
    "delete from {}.runtime_control",
    "insert into {}.runtime_schema_migrations values (9, 'nine', 0)",
    "update {}.runtime_schema_migrations set name = 'x'",
    "delete from {}.runtime_schema_migrations",
    "create table {}.mine ()",
    "alter table {}.runtime_jobs add column mine int",
]


async def test_a_worker_cannot_change_what_it_only_adds_to_or_reads(roles: Roles) -> None:
    """Neither the audit's past, nor the operator's switches, nor the ledger, nor the schema."""
    for statement in FORBIDDEN:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await roles.run("worker", statement.format(roles.schema))


async def look(repo: RuntimeRepository) -> None:
    """What a monitor does."""
    assert (await repo.inspect()).refusal is None
    await repo.plan()
    await repo.attempts.stats()
    await repo.control.state()
    await repo.activity()
    diagnosis = await repo.doctor()
    assert "unknown" not in {finding.state for finding in diagnosis.findings}
    if unknown := (await repo.status()).unknown:
        raise RefusedError(str(unknown))


async def test_a_monitor_sees_how_much_there_is_to_do_and_no_more(roles: Roles) -> None:
    """It inspects, counts and diagnoses; with any grant less it cannot. It reads no payload."""
    async with roles.repository("migrator") as owner:
        await prepare(owner, NOW)

    async def fails(_: str) -> bool:
        async with contextlib.AsyncExitStack() as stack:
            try:
                await look(await stack.enter_async_context(roles.repository("monitor", migrate=False)))
            except RefusedError:
                return True
        return False

    assert not await fails("")
    assert await needless(roles, "monitor", fails) == []
    async with roles.repository("monitor", migrate=False) as repo:
        assert await is_refused(repo.attempts.find("held"))
        assert await is_refused(repo.api_keys.find("key"))
        assert await is_refused(repo.attempts.enqueue("run"))


async def test_a_backup_reads_all_and_changes_nothing(roles: Roles, tmp_path: Path) -> None:
    """With any grant less there is none, but for the counters': without, they go on after the highest number."""
    async with roles.repository("migrator") as owner:
        await prepare(owner, NOW)
    number = 0

    async def fails(_: str) -> bool:
        nonlocal number
        number += 1
        repository = roles.repository("backup", migrate=False)
        try:
            return await is_refused(repository.backup(tmp_path / f"{number}.zip"))
        finally:
            await repository.close()

    assert not await fails("")
    assert await needless(roles, "backup", fails) == [
        ("select", "runtime_audit_logs_audit_id_seq"),
        ("select", "runtime_step_reports_report_id_seq"),
    ]
    async with roles.repository("backup", migrate=False) as repo:
        assert await is_refused(repo.attempts.enqueue("run"))
        assert await is_refused(repo.control.pause("mail"))


async def test_what_was_granted_by_an_earlier_recipe_is_taken_back(roles: Roles) -> None:
    """All rights on all tables, those of later ones included: afterwards the worker has what it needs."""
    worker = roles.name("worker")
    before = await roles.given("worker")
    await roles.run(
        "migrator",
        f"grant select, insert, update, delete on all tables in schema {roles.schema} to {worker};"
        f"alter default privileges in schema {roles.schema} grant select, insert, update, delete on tables to {worker}",
    )
    await roles.run("migrator", "".join(roles.said.after))
    assert await roles.given("worker") == before
    await roles.run("migrator", f"create table {roles.schema}.later ()")
    assert await roles.given("worker") == before


@on_postgres
async def test_numbers_of_a_sequence_of_ones_own_need_one_more(lab: Lab) -> None:
    """A table that was laid with BIGSERIAL draws its numbers as the caller; the note says what that needs."""
    assert isinstance(lab, PostgresLab)
    await lab.reach(1)
    async with lab.place.repository():
        pass
    schema, worker = lab.place.schema, f"{lab.place.schema}_worker"
    user = await lab.admin.fetchval("select current_user")
    said = grants(schema, migrator=user, worker=worker)
    await lab.run_outside(f"create role {worker}")
    try:
        await lab.run_outside("".join(said.after))
        repository = PostgresRuntimeRepository(lab.place.where, schema=schema, server_settings={"role": worker})
        async with repository as repo:
            entry = {"actor_type": "user", "action": "a", "resource_type": "x", "result": "ok", "request_id": "r"}
            with pytest.raises(RefusedError, match="sequence"):
                await repo.audit.append(**entry)  # type: ignore[arg-type]
            await lab.run_outside(said.notes[0].splitlines()[-1])
            await repo.audit.append(**entry)  # type: ignore[arg-type]
    finally:
        await lab.run_outside(f"drop owned by {worker}; drop role {worker}")


def test_it_is_one_script() -> None:
    """Which psql runs as it stands: what is only for some is a comment, and every name is quoted."""
    text = str(grants('a"b', migrator="the owner", worker="w", server=17))
    assert 'create schema if not exists "a""b" authorization "the owner";' in text.splitlines()
    assert 'grant select, insert on "a""b".runtime_audit_logs to "w";' in text.splitlines()
    assert all(line.endswith(";") or line.startswith("--") or not line for line in text.splitlines())


@pytest.mark.parametrize("wrong", [{"worker": "m"}, {"worker": ""}, {"backup": "public"}, {"monitor": "pg_monitor"}])
def test_a_role_is_named_and_has_one_part(wrong: dict[str, str]) -> None:
    """A worker that is the owner has every right; everybody is nobody's role."""
    with pytest.raises(ConfigurationError, match="role"):
        grants(migrator="m", **wrong)  # type: ignore[arg-type]
