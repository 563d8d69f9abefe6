"""What may have changed although the ledger is right: refused if it matters, tolerated and told if it does not."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from runtime_repo import Difference, SchemaDriftError
from runtime_repo.catalog import Catalog, Table
from runtime_repo.schema import Migration
from tests.lab import LEDGER, Change, Lab, PostgresLab, Rebuild, Words, changes, on_postgres
from tests.versions import HISTORY, NEWEST, NEXT, RECORDED

AUDIT_ROLE = "column runtime_audit_logs.actor_role"
KEYS_INDEX = "index idx_runtime_api_keys_status on runtime_api_keys"
JOBS_STATUS = "column runtime_jobs.status"
ATTEMPT_NO = "column runtime_attempts.attempt_no"
REPORT_ID = "column runtime_step_reports.report_id"
WITH_DEFAULT = "none, or one with a default"
READY = "index idx_runtime_queue_ready on runtime_queue"
UNIQUE_REPORT = Difference("unique constraint on runtime_step_reports", "unique (attempt_id, dedupe_token)", None)
JOBS_REST = "    status TEXT NOT NULL,\n    created_at_ms BIGINT NOT NULL,\n    updated_at_ms BIGINT NOT NULL"
DROP_UNIQUE = "alter table runtime_step_reports drop constraint reported_once"
SQLITE_TRIGGER = "CREATE TRIGGER mine after delete"
POSTGRES_TRIGGER = (
    "create function mine() returns trigger language plpgsql as 'begin return null; end';"
    "create trigger mine after delete on runtime_jobs execute function mine()"
)
# ALTER TABLE cannot add such a column to SQLite's tables, but an earlier program can have created it.
WITHOUT_DEFAULT = (
    "pragma writable_schema = on;"
    "update sqlite_schema set sql = replace(sql, 'note int not null default 0', 'note int not null')"
    " where name = 'runtime_jobs';"
    "pragma writable_schema = reset;"
)
NEW_KEYS_INDEX = "drop index idx_runtime_api_keys_status; create {} idx_runtime_api_keys_status on runtime_api_keys {}"


def schema_of(lab: Lab) -> str:
    assert isinstance(lab, PostgresLab)
    return lab.place.schema


def constrained(lab: Lab, domain: str) -> Difference:
    """A column of a domain, which no verb fills."""
    kind = f"{schema_of(lab)}.{domain}"
    return Difference("column runtime_jobs.note", WITH_DEFAULT, f"{kind} (a domain with constraints) not null")


@dataclass(frozen=True)
class Drift:
    """A change, and what differs then. *differences* may depend on the lab."""

    change: Change
    differences: tuple[Difference, ...] | Callable[[Lab], tuple[Difference, ...]]

    def expected(self, lab: Lab) -> tuple[Difference, ...]:
        return self.differences(lab) if callable(self.differences) else self.differences


def drift(change: Change, name: str, expected: str, found: str | None) -> Drift:
    """One difference, the same on both databases."""
    return Drift(change, (Difference(name, expected, found),))


def rebuilt(table: str, old: str, new: str, postgres: str | None, then: str = "") -> Words:
    """One change where SQLite has to rebuild the table; *then* follows on both."""
    return Words(Rebuild(table, old, new, then), postgres and f"{postgres}; {then}")


def jobs_index(key: str, found: str, kind: str = "index") -> Drift:
    """The index of our name with another definition."""
    return drift(NEW_KEYS_INDEX.format(kind, key), KEYS_INDEX, "(status)", found)


DRIFT = {
    "column dropped": drift(
        "alter table runtime_audit_logs drop column details_json",
        "column runtime_audit_logs.details_json",
        "text",
        None,
    ),
    "column renamed": Drift(
        "alter table runtime_jobs rename column updated_at_ms to changed_at_ms",
        lambda lab: (
            Difference("column runtime_jobs.updated_at_ms", f"{lab.milliseconds} not null", None),
            Difference("column runtime_jobs.changed_at_ms", WITH_DEFAULT, f"{lab.milliseconds} not null"),
        ),
    ),
    "indexed column renamed": Drift(
        "alter table runtime_api_keys rename column status to state",
        (
            Difference("column runtime_api_keys.status", "text not null", None),
            Difference("column runtime_api_keys.state", WITH_DEFAULT, "text not null"),
            Difference(KEYS_INDEX, "(status)", "(state)"),
        ),
    ),
    "not null added": drift(
        rebuilt(
            "runtime_audit_logs",
            '"actor_role" TEXT',
            '"actor_role" TEXT NOT NULL',
            "alter table runtime_audit_logs alter column actor_role set not null",
        ),
        AUDIT_ROLE,
        "text",
        "text not null",
    ),
    "not null dropped": drift(
        rebuilt(
            "runtime_jobs",
            "status TEXT NOT NULL",
            "status TEXT",
            "alter table runtime_jobs alter column status drop not null",
        ),
        JOBS_STATUS,
        "text not null",
        "text",
    ),
    "ledger's not null dropped": drift(
        rebuilt(LEDGER, "name TEXT NOT NULL", "name TEXT", f"alter table {LEDGER} alter column name drop not null"),
        f"column {LEDGER}.name",
        "text not null",
        "text",
    ),
    "type changed": Drift(
        rebuilt(
            "runtime_attempts",
            "attempt_no INT NOT NULL",
            "attempt_no REAL NOT NULL",
            "alter table runtime_attempts alter column attempt_no type real",
        ),
        (Difference(ATTEMPT_NO, "integer not null", "real not null"),),
    ),
    "integer widened": drift(
        Words(None, "alter table runtime_attempts alter column attempt_no type bigint"),
        ATTEMPT_NO,
        "integer not null",
        "bigint not null",
    ),
    "milliseconds narrowed": drift(
        Words(
            None, "update runtime_jobs set updated_at_ms = 0; alter table runtime_jobs alter updated_at_ms type integer"
        ),
        "column runtime_jobs.updated_at_ms",
        "bigint not null",
        "integer not null",
    ),
    "default added": drift(
        rebuilt(
            "runtime_jobs",
            "status TEXT NOT NULL",
            "status TEXT DEFAULT 'idle' NOT NULL",
            "alter table runtime_jobs alter column status set default 'idle'",
        ),
        JOBS_STATUS,
        "text not null",
        "text not null default 'idle'",
    ),
    "number no longer automatic": Drift(
        rebuilt(
            "runtime_step_reports",
            "INTEGER PRIMARY KEY AUTOINCREMENT",
            "INTEGER PRIMARY KEY",
            "alter table runtime_step_reports alter column report_id drop default",
        ),
        lambda lab: (Difference(REPORT_ID, f"{lab.milliseconds} not null auto", f"{lab.milliseconds} not null"),),
    ),
    "index dropped": drift("drop index idx_runtime_api_keys_status", KEYS_INDEX, "(status)", None),
    "index on another column": jobs_index("(updated_at_ms)", "(updated_at_ms)"),
    "index on one more column": jobs_index("(status, updated_at_ms)", "(status, updated_at_ms)"),
    "index descending": jobs_index("(status desc)", "(status desc)"),
    "index unique": jobs_index("(status)", "unique (status)", "unique index"),
    "index partial": Drift(
        NEW_KEYS_INDEX.format("index", "(status) where status is not null"),
        lambda lab: (
            Difference(
                KEYS_INDEX,
                "(status)",
                "(status) where " + ("(status IS NOT NULL)" if lab.backend == "postgres" else "status is not null"),
            ),
        ),
    ),
    "index of the other order": drift(
        "drop index idx_runtime_step_reports_attempt;"
        "create index idx_runtime_step_reports_attempt on runtime_step_reports (created_at_ms desc, attempt_id)",
        "index idx_runtime_step_reports_attempt on runtime_step_reports",
        "(attempt_id, created_at_ms desc)",
        "(created_at_ms desc, attempt_id)",
    ),
    "index no longer descending": drift(
        "drop index idx_runtime_audit_logs_created;"
        "create index idx_runtime_audit_logs_created on runtime_audit_logs (created_at_ms)",
        "index idx_runtime_audit_logs_created on runtime_audit_logs",
        "(created_at_ms desc)",
        "(created_at_ms)",
    ),
    "index invalid": drift(
        Words(
            None,
            "update pg_index set indisvalid = false where indexrelid = 'idx_runtime_api_keys_status'::regclass",
        ),
        KEYS_INDEX,
        "(status)",
        "(status) invalid",
    ),
    "unique constraint's index invalid": Drift(
        Words(None, "update pg_index set indisvalid = false where indexrelid = 'reported_once'::regclass"),
        (UNIQUE_REPORT,),
    ),
    "unique constraint dropped": Drift(
        rebuilt(
            "runtime_step_reports",
            ",\n    CONSTRAINT reported_once UNIQUE (attempt_id, dedupe_token)",
            "",
            DROP_UNIQUE,
        ),
        (UNIQUE_REPORT,),
    ),
    "unique constraint on one column only": Drift(
        rebuilt(
            "runtime_step_reports",
            "UNIQUE (attempt_id, dedupe_token)",
            "UNIQUE (dedupe_token)",
            f"{DROP_UNIQUE}; alter table runtime_step_reports add unique (dedupe_token)",
        ),
        (UNIQUE_REPORT,),
    ),
    "unique constraint replaced by a partial index": Drift(
        rebuilt(
            "runtime_step_reports",
            ",\n    CONSTRAINT reported_once UNIQUE (attempt_id, dedupe_token)",
            "",
            DROP_UNIQUE,
            "create unique index once on runtime_step_reports (attempt_id, dedupe_token) where report_id > 0",
        ),
        (UNIQUE_REPORT,),
    ),
    "unique constraint deferrable": Drift(
        Words(
            None,
            f"{DROP_UNIQUE};"
            "alter table runtime_step_reports add unique (attempt_id, dedupe_token) deferrable initially deferred",
        ),
        (UNIQUE_REPORT,),
    ),
    "primary key dropped": drift(
        rebuilt(
            "runtime_jobs",
            "thread_id TEXT CONSTRAINT jobs_pk PRIMARY KEY",
            "thread_id TEXT NOT NULL",
            "alter table runtime_jobs drop constraint jobs_pk; alter table runtime_jobs alter thread_id set not null",
        ),
        "primary key of runtime_jobs",
        "(thread_id)",
        None,
    ),
    "primary key widened": drift(
        rebuilt(
            "runtime_jobs",
            f"thread_id TEXT CONSTRAINT jobs_pk PRIMARY KEY,\n{JOBS_REST}",
            f"thread_id TEXT NOT NULL,\n{JOBS_REST},\n    CONSTRAINT jobs_pk PRIMARY KEY (thread_id, status)",
            "alter table runtime_jobs drop constraint jobs_pk, add primary key (thread_id, status)",
        ),
        "primary key of runtime_jobs",
        "(thread_id)",
        "(thread_id, status)",
    ),
    "trigger": Drift(
        Words(f"{SQLITE_TRIGGER} on runtime_jobs begin select 1; end", POSTGRES_TRIGGER),
        lambda lab: (
            Difference(
                "trigger mine on runtime_jobs",
                "none",
                f"{SQLITE_TRIGGER} on runtime_jobs begin select 1; end"
                if lab.backend == "sqlite"
                else f"CREATE TRIGGER mine AFTER DELETE ON {schema_of(lab)}.runtime_jobs FOR EACH STATEMENT "
                f"EXECUTE FUNCTION {schema_of(lab)}.mine()",
            ),
        ),
    ),
    "trigger on a name in another case": drift(
        Words(f"{SQLITE_TRIGGER} on RUNTIME_JOBS begin select 1; end", None),
        "trigger mine on runtime_jobs",
        "none",
        f"{SQLITE_TRIGGER} on RUNTIME_JOBS begin select 1; end",
    ),
    "rule": Drift(
        Words(None, "create rule mine as on delete to runtime_jobs do instead nothing"),
        lambda lab: (
            Difference(
                "rule mine on runtime_jobs",
                "none",
                f"CREATE RULE mine AS ON DELETE TO {schema_of(lab)}.runtime_jobs DO INSTEAD NOTHING;",
            ),
        ),
    ),
    "unlogged": drift(
        Words(None, "alter table runtime_jobs set unlogged"),
        "unlogged storage on runtime_jobs",
        "none",
        "a crash empties the table",
    ),
    "primary key deferrable": drift(
        Words(
            None,
            "alter table runtime_jobs drop constraint jobs_pk; alter table runtime_jobs add primary key (thread_id)"
            " deferrable",
        ),
        "deferrable primary key on runtime_jobs",
        "none",
        "no ON CONFLICT can name it",
    ),
    "column of a NOT NULL domain": Drift(
        Words(
            None,
            "create domain required as int not null; alter table runtime_jobs add column note required default 1;"
            "alter table runtime_jobs alter note drop default",
        ),
        lambda lab: (constrained(lab, "required"),),
    ),
    "column of a domain of a domain with CHECK": Drift(
        Words(
            None,
            "create domain checked as int check (value > 0); create domain indirect as checked;"
            "alter table runtime_jobs add column note indirect",
        ),
        lambda lab: (constrained(lab, "indirect"),),
    ),
    "child table": Drift(
        Words(None, "create table mine () inherits (runtime_jobs)"),
        lambda lab: (
            Difference(f"child table {schema_of(lab)}.mine on runtime_jobs", "none", "it inherits the table"),
        ),
    ),
    "collation by which two ids are equal": drift(
        rebuilt("runtime_interrupts", "run_id TEXT NOT NULL", "run_id TEXT COLLATE NOCASE NOT NULL", None),
        "column runtime_interrupts.run_id",
        "text not null",
        "text collate nocase not null",
    ),
    "collation of a key only": drift(
        rebuilt(
            "runtime_jobs",
            f"thread_id TEXT CONSTRAINT jobs_pk PRIMARY KEY,\n{JOBS_REST}",
            f"thread_id TEXT NOT NULL,\n{JOBS_REST},\n    CONSTRAINT jobs_pk PRIMARY KEY (thread_id COLLATE NOCASE)",
            None,
        ),
        "primary key of runtime_jobs",
        "(thread_id)",
        "(thread_id collate nocase)",
    ),
    "conflict clause": drift(
        rebuilt("runtime_jobs", "status TEXT NOT NULL", "status TEXT NOT NULL ON CONFLICT IGNORE", None),
        "conflict clause of status on runtime_jobs",
        "none",
        "on conflict ignore",
    ),
    "without rowid": drift(
        Words(Rebuild("runtime_attempts", "run_id", "run_id", options="without rowid"), None),
        "storage without rowid on runtime_attempts",
        "none",
        "the primary key is the table",
    ),
    "a column instead of the rowid": drift(
        Words("alter table runtime_attempts add column RowID text", None),
        "column instead of the rowid on runtime_attempts",
        "none",
        "rowid text",
    ),
    "not null column that no verb fills": Drift(
        Words(
            "alter table runtime_jobs add column note int not null default 0;" + WITHOUT_DEFAULT,
            "alter table runtime_jobs add column note int not null default 0;"
            "alter table runtime_jobs alter column note drop default",
        ),
        (Difference("column runtime_jobs.note", WITH_DEFAULT, "integer not null"),),
    ),
    "table renamed": drift("alter table runtime_jobs rename to jobs", "table runtime_jobs", "a table", None),
    "table dropped": drift("drop table runtime_leases", "table runtime_leases", "a table", None),
    "several": Drift(
        "drop table runtime_leases; drop index idx_runtime_interrupts_thread;"
        "drop index idx_runtime_api_keys_status; alter table runtime_audit_logs drop column resource_id",
        (
            Difference("column runtime_audit_logs.resource_id", "text", None),
            Difference("index idx_runtime_api_keys_status on runtime_api_keys", "(status)", None),
            Difference("index idx_runtime_interrupts_thread on runtime_interrupts", "(thread_id)", None),
            Difference("table runtime_leases", "a table", None),
        ),
    ),
}

# What PostgreSQL words in its own way: that it is found, and under which name.
POSTGRES_DRIFT = {
    "another sequence": (
        "create sequence loose; alter table runtime_step_reports alter column report_id set default nextval('loose')",
        REPORT_ID,
    ),
    "varchar": ("alter table runtime_jobs alter column status type varchar(40)", JOBS_STATUS),
    "index with an operator class": (NEW_KEYS_INDEX.format("index", "(status text_pattern_ops)"), KEYS_INDEX),
    "index with a collation": (NEW_KEYS_INDEX.format("index", '(status collate "POSIX")'), KEYS_INDEX),
    "index of another method": (NEW_KEYS_INDEX.format("index", "using hash (status)"), KEYS_INDEX),
    "index with nulls first": (NEW_KEYS_INDEX.format("index", "(status nulls first)"), KEYS_INDEX),
    "index including a column": (NEW_KEYS_INDEX.format("index", "(status) include (updated_at_ms)"), KEYS_INDEX),
    "index on an expression": (NEW_KEYS_INDEX.format("index", "(lower(status))"), KEYS_INDEX),
}

# Of what only version 2 has.
DRIFT_OF_2 = {
    "default changed": drift(
        Words(
            Rebuild(
                "runtime_attempts",
                "max_attempts integer not null default 10",
                "max_attempts integer not null default 3",
            ),
            "alter table runtime_attempts alter column max_attempts set default 3",
        ),
        "column runtime_attempts.max_attempts",
        "integer not null default 10",
        "integer not null default 3",
    ),
    "default dropped": drift(
        Words(
            Rebuild("runtime_attempts", "queue text not null default 'default'", "queue text not null"),
            "alter table runtime_attempts alter column queue drop default",
        ),
        "column runtime_attempts.queue",
        "text not null default 'default'",
        "text not null",
    ),
    "default of another case": drift(
        Words(
            Rebuild("runtime_api_keys", "default 'operator'", "default 'Operator'"),
            "alter table runtime_api_keys alter column role set default 'Operator'",
        ),
        "column runtime_api_keys.role",
        "text not null default 'operator'",
        "text not null default 'Operator'",
    ),
    "table of version 2 dropped": drift("drop table runtime_control", "table runtime_control", "a table", None),
    "index of version 2 dropped": drift(
        "drop index idx_runtime_attempts_run",
        "index idx_runtime_attempts_run on runtime_attempts",
        "(run_id, attempt_id)",
        None,
    ),
    "predicate dropped": Drift(
        "drop index idx_runtime_queue_ready; create index idx_runtime_queue_ready"
        " on runtime_queue (queue, priority desc, enqueued_at_ms, attempt_id)",
        lambda lab: (
            Difference(
                READY,
                lab.migrations[1].catalog.tables["runtime_queue"].indexes["idx_runtime_queue_ready"],
                "(queue, priority desc, enqueued_at_ms, attempt_id)",
            ),
        ),
    ),
}


@pytest.mark.parametrize("version", RECORDED)
@changes(DRIFT)
async def test_drift_is_refused(lab: Lab, case: Drift, version: int) -> None:
    """Every difference that matters is named, with what was expected and what was found; before an upgrade too."""
    await lab.reach(version)
    await lab.change(case.change)
    error = await lab.refused(SchemaDriftError)
    assert error.version == version
    assert sorted(error.differences, key=str) == sorted(case.expected(lab), key=str)
    assert all(str(difference) in str(error) for difference in error.differences)


@changes(DRIFT_OF_2)
async def test_drift_from_what_version_2_added_is_refused(lab: Lab, case: Drift) -> None:
    """What an upgrade added counts like what was there before it."""
    await lab.reach(2)
    await lab.change(case.change)
    assert (await lab.refused(SchemaDriftError)).differences == case.expected(lab)


@on_postgres
@pytest.mark.parametrize("version", RECORDED)
@pytest.mark.parametrize(("change", "name"), POSTGRES_DRIFT.values(), ids=POSTGRES_DRIFT.keys())
async def test_drift_in_what_only_postgresql_knows_is_refused(lab: Lab, version: int, change: str, name: str) -> None:
    """Another type, sequence, operator class, collation, method or order of NULLs is another meaning."""
    await lab.reach(version)
    await lab.execute(change)
    assert [difference.object for difference in (await lab.refused(SchemaDriftError)).differences] == [name]


@on_postgres
async def test_an_index_that_a_failed_concurrent_build_left_behind_is_refused(lab: Lab) -> None:
    """It bears our constraint's name and looks like it, but proves nothing."""
    await lab.reach(NEWEST)
    await lab.execute(DROP_UNIQUE)
    await lab.execute(
        "insert into runtime_step_reports (worker_id, attempt_id, action_id, status, dedupe_token, created_at_ms)"
        " select worker_id, attempt_id, action_id, status, dedupe_token, created_at_ms from runtime_step_reports"
    )
    with pytest.raises(lab.driver_error, match="could not create unique index"):
        await lab.execute(
            "create unique index concurrently reported_once on runtime_step_reports (attempt_id, dedupe_token)"
        )
    assert (await lab.refused(SchemaDriftError)).differences == (UNIQUE_REPORT,)


@pytest.mark.parametrize("migrate", [True, False], ids=["migrate", "verify-only"])
@pytest.mark.parametrize("name", ["several", "not null dropped", "index dropped"])
async def test_a_warned_boot_serves_and_tells(
    lab: Lab, name: str, caplog: pytest.LogCaptureFixture, *, migrate: bool
) -> None:
    """With on_drift='warn' every difference is logged as a warning and reported, and nothing is mended."""
    await lab.reach(NEWEST)
    await lab.change(DRIFT[name].change)
    before = (await lab.snapshot()).content
    with caplog.at_level(logging.INFO, "runtime_repo"):
        report = await lab.boot(on_drift="warn", migrate=migrate)
    assert (report.from_version, report.to_version, report.applied) == (NEWEST, NEWEST, ())
    assert set(report.tolerated) == set(DRIFT[name].expected(lab))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(report.tolerated)
    assert all(str(difference) in text for difference, text in zip(report.tolerated, warnings, strict=True))
    assert (await lab.snapshot()).content == before


async def test_a_warned_boot_upgrades_all_the_same(lab: Lab) -> None:
    """Drift that the migration does not stumble over is tolerated before and after it."""
    await lab.reach(1)
    await lab.execute("drop index idx_runtime_api_keys_status")
    report = await lab.boot(on_drift="warn")
    assert (report.from_version, report.to_version) == (1, NEWEST)
    assert report.tolerated == DRIFT["index dropped"].expected(lab)
    assert await lab.recorded() == HISTORY


@dataclass(frozen=True)
class Extra:
    """A change that does not matter, and what is told about it, which may depend on the lab."""

    change: Change
    told: tuple[Difference, ...] | Callable[[Lab], tuple[Difference, ...]] = ()

    def expected(self, lab: Lab) -> tuple[Difference, ...]:
        return self.told(lab) if callable(self.told) else self.told


def told(sqlite: str, in_sqlite: str, postgres: str, in_postgres: str) -> Callable[[Lab], tuple[Difference, ...]]:
    """What is told of the jobs, in each database's words."""

    def differences(lab: Lab) -> tuple[Difference, ...]:
        what, line = (sqlite, in_sqlite) if lab.backend == "sqlite" else (postgres, in_postgres)
        if lab.backend == "postgres":
            what, line = (text.replace("{schema}", schema_of(lab)) for text in (what, line))
        return (Difference(f"{what} on runtime_jobs", None, line),)

    return differences


EXTRA = {
    "column": Extra(
        "alter table runtime_jobs add column note text; update runtime_jobs set note = 'mine'",
        (Difference("column runtime_jobs.note", None, "text"),),
    ),
    "index": Extra(
        "create index operators_own on runtime_jobs (updated_at_ms desc)",
        (Difference("index operators_own on runtime_jobs", None, "(updated_at_ms desc)"),),
    ),
    "unique index": Extra(
        "create unique index operators_own on runtime_jobs (created_at_ms)",
        (Difference("index operators_own on runtime_jobs", None, "unique (created_at_ms)"),),
    ),
    "table": Extra("create table runtime_notes (note text)"),
    "column of a plain domain": Extra(
        Words(None, "create domain plain as int;alter table runtime_jobs add column note plain default 1"),
        lambda lab: (Difference("column runtime_jobs.note", None, f"{schema_of(lab)}.plain default 1"),),
    ),
    "policy that nothing enables": Extra(Words(None, "create policy mine on runtime_jobs using (false)")),
    "forced row security": Extra(
        Words(None, "alter table runtime_jobs force row level security"),
        (Difference("forced row security on runtime_jobs", None, "it is not enabled"),),
    ),
    "parent table": Extra(
        Words(
            None,
            "create table mine (status text); alter table mine alter status set not null;"
            "alter table runtime_jobs inherit mine",
        ),
        lambda lab: (
            Difference(f"parent table {schema_of(lab)}.mine on runtime_jobs", None, "the table belongs to it"),
        ),
    ),
    "check constraint": Extra(
        rebuilt(
            "runtime_jobs",
            "status TEXT NOT NULL",
            "status TEXT NOT NULL CHECK (status <> '')",
            "alter table runtime_jobs add constraint mine check (status <> '')",
        ),
        told("check constraint of status", "status <> ''", "check constraint mine", "CHECK ((status <> ''::text))"),
    ),
    "check constraint on the table": Extra(
        Words(
            Rebuild(
                "runtime_step_reports",
                "CONSTRAINT reported_once",
                "CONSTRAINT mine CHECK (report_id > 0), CONSTRAINT reported_once",
            ),
            None,
        ),
        (Difference("check constraint mine on runtime_step_reports", None, "report_id > 0"),),
    ),
    "foreign key": Extra(
        rebuilt(
            "runtime_jobs",
            "status TEXT NOT NULL",
            "status TEXT NOT NULL REFERENCES theirs (status) ON DELETE CASCADE",
            "create table theirs (status text primary key);"
            "insert into theirs select distinct status from runtime_jobs;"
            "alter table runtime_jobs add constraint mine foreign key (status) references theirs on delete cascade",
        ),
        told(
            "foreign key of status",
            "references theirs (status) on delete cascade",
            "foreign key mine",
            "FOREIGN KEY (status) REFERENCES {schema}.theirs(status) ON DELETE CASCADE",
        ),
    ),
    "foreign key of another table": Extra(
        Words(None, "create table theirs (job text constraint mine references runtime_jobs)"),
        told(
            "",
            "",
            "foreign key mine of {schema}.theirs",
            "FOREIGN KEY (job) REFERENCES {schema}.runtime_jobs(thread_id)",
        ),
    ),
    "deterministic collation": Extra(
        Words(None, 'alter table runtime_api_keys alter column secret_hash type text collate "POSIX"'),
        (Difference("collation of secret_hash on runtime_api_keys", None, "POSIX"),),
    ),
    "row security that does not apply": Extra(
        Words(None, "alter table runtime_jobs enable row level security, force row level security"),
        (Difference("row security on runtime_jobs", None, "it does not apply to this role"),),
    ),
    "strict": Extra(
        Words(
            Rebuild(
                "runtime_jobs",
                "BIGINT NOT NULL,\n    updated_at_ms BIGINT NOT NULL",
                "INT NOT NULL,\n    updated_at_ms INT NOT NULL",
                options="strict",
            ),
            None,
        ),
        (Difference("strict types on runtime_jobs", None, "a value of another type is refused"),),
    ),
    "equal index under another name": Extra(
        "drop index idx_runtime_api_keys_status; create index operators_own on runtime_api_keys (status)"
    ),
    "equal index under two names": Extra("create index operators_own on runtime_api_keys (status)"),
    "unique index instead of a constraint": Extra(
        rebuilt(
            "runtime_step_reports",
            ",\n    CONSTRAINT reported_once UNIQUE (attempt_id, dedupe_token)",
            "",
            DROP_UNIQUE,
            "create unique index operators_own on runtime_step_reports (dedupe_token, attempt_id)",
        ),
    ),
    "constraint of another name": Extra(
        rebuilt(
            "runtime_step_reports",
            "CONSTRAINT reported_once UNIQUE",
            'CONSTRAINT "Only One" UNIQUE',
            'alter table runtime_step_reports rename constraint reported_once to "Only One, ""really"""',
        )
    ),
    "columns in another order": Extra(
        rebuilt(
            "runtime_jobs",
            "    created_at_ms BIGINT NOT NULL,\n    updated_at_ms BIGINT NOT NULL",
            "    updated_at_ms BIGINT NOT NULL,\n    created_at_ms BIGINT NOT NULL",
            "alter table runtime_jobs rename created_at_ms to x; alter table runtime_jobs rename updated_at_ms to"
            " created_at_ms; alter table runtime_jobs rename x to updated_at_ms",
        )
    ),
    "identity, by default": Extra(
        Words(
            None,
            "alter table runtime_step_reports alter report_id drop default;"
            "alter table runtime_step_reports alter report_id add generated by default as identity (start 100)",
        )
    ),
    "identity, always": Extra(
        Words(
            None,
            "alter table runtime_step_reports alter report_id drop default;"
            "alter table runtime_step_reports alter report_id add generated always as identity (start 100)",
        )
    ),
    "a column that was dropped": Extra(
        Words(None, "alter table runtime_jobs add column gone text; alter table runtime_jobs drop column gone")
    ),
    "smallint ledger": Extra(
        rebuilt(LEDGER, "version INTEGER", "version SMALLINT", f"alter table {LEDGER} alter version type smallint")
    ),
    "integer ledger": Extra(
        rebuilt(LEDGER, "version INTEGER", "version INT", f"alter table {LEDGER} alter version type integer")
    ),
    "bigint ledger": Extra(
        rebuilt(LEDGER, "version INTEGER", "version BIGINT", f"alter table {LEDGER} alter version type bigint")
    ),
    "varchar": Extra(rebuilt("runtime_jobs", "status TEXT NOT NULL", "status VARCHAR(40) not\nnull", None)),
    "types of the same affinity": Extra(
        rebuilt("runtime_attempts", "attempt_no INT NOT NULL", "attempt_no UNSIGNED BIG INT NOT NULL", None)
    ),
    "other case and quotes": Extra(
        rebuilt("runtime_jobs", "status TEXT NOT NULL", "[STATUS] `text` /* , */ NOT NULL -- it's\n", None)
    ),
}


@pytest.mark.parametrize("version", RECORDED)
@changes(EXTRA)
async def test_what_does_not_matter_is_served(lab: Lab, case: Extra, version: int) -> None:
    """The operator's own columns, indexes, tables and constraints are left alone; meaning counts, not spelling."""
    await lab.reach(version)
    await lab.change(case.change)
    before = await lab.snapshot()
    report = await lab.boot()
    assert (report.from_version, report.to_version, report.tolerated) == (version, NEWEST, case.expected(lab))
    if version == NEWEST:
        assert (await lab.snapshot()).content == before.content
    assert (await lab.boot()).tolerated == case.expected(lab)


@on_postgres
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("alter table runtime_jobs force row level security", "forced row security on runtime_jobs"),
        ("create table mine (like runtime_jobs); alter table runtime_jobs inherit mine", "parent table"),
        (
            "create table mine (like runtime_jobs) partition by list (status);"
            "alter table mine attach partition runtime_jobs default",
            "parent table",
        ),
    ],
)
async def test_a_warm_boot_tells_of_what_its_tables_were_given(lab: PostgresLab, change: str, told: str) -> None:
    """Of what we created ourselves, and recognize by its text."""
    await lab.boot()
    assert (await lab.boot()).tolerated == ()
    await lab.execute(change)
    (difference,) = (await lab.boot()).tolerated
    assert difference.object.startswith(told)


@on_postgres
async def test_a_warm_boot_refuses_a_deferrable_primary_key(lab: PostgresLab) -> None:
    """Every ON CONFLICT would fail."""
    await lab.boot()
    await lab.execute(
        "alter table runtime_jobs drop constraint runtime_jobs_pkey;"
        "alter table runtime_jobs add primary key (thread_id) deferrable"
    )
    await lab.refused(SchemaDriftError)


async def test_a_constraint_serves_where_a_unique_index_is_expected(lab: Lab) -> None:
    """The other way round: a later migration may create a unique index, and the operator may make it a constraint."""
    await lab.reach(NEWEST)
    tables = dict(lab.migrations[-1].catalog.tables)
    tables["runtime_names"] = Table({"name": "text not null"}, (), {"idx_names": "unique (name)"})
    sql = "create table {schema}.runtime_names (name text not null);"
    later = Migration(*NEXT, sql, Catalog(tables))
    await lab.execute("create table runtime_names (name text not null unique)")
    await lab.record(*HISTORY, NEXT)
    report = await lab.ship([*lab.migrations, later])
    assert (report.to_version, report.applied, report.tolerated) == (NEXT[0], (), ())
