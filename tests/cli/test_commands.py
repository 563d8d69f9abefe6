"""What each command answers: its exit code, its JSON, and what it leaves as it was."""

import contextlib
import json
import signal
import sqlite3
import time
from datetime import datetime
from pathlib import Path

import pytest

from runtime_repo import NewAttempt, SchemaError, SchemaReport
from tests.cli.program import GIVEN, ON_DATABASE, Program, ran
from tests.lab import Lab, PostgresLab, SqliteLab, on_postgres, on_sqlite
from tests.versions import HISTORY, NEWEST, NEXT

YES, NO, UNKNOWN = 0, 1, 2

STATES: dict[str, str | None] = {
    "nothing": None,
    "current": "",
    "extra": "alter table runtime_jobs add column mine text",
    "drift": "drop index idx_runtime_jobs_status; alter table runtime_jobs add column mine text",
    "newer": f"insert into runtime_schema_migrations (version, name, applied_at_ms) values ({NEXT[0]}, '{NEXT[1]}', 5)",
    "another history": "update runtime_schema_migrations set name = 'other' where version = 1",
    "foreign": "delete from runtime_schema_migrations",
}
"""What a database may be in."""


@pytest.fixture
def program(lab: Lab) -> Program:
    """The command on the test's own database."""
    return Program(lab.place)


async def booted(lab: Lab) -> SchemaReport | SchemaError:
    """What a boot that may only verify reports, or is refused for."""
    try:
        return await lab.boot(migrate=False)
    except SchemaError as error:
        return error


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
async def test_verify_says_yes_exactly_when_a_boot_would_serve(lab: Lab, program: Program, state: str | None) -> None:
    """And no in the boot's words otherwise, with every difference, the operator's own columns among them."""
    if state is not None:
        await lab.boot()
        await lab.execute(state or "select 1")
    before = await lab.snapshot()
    done = await program.run("verify")
    found = await program.json("verify", code=done.code)
    assert await lab.snapshot() == before

    answer = await booted(lab)
    assert done.errors == ""
    assert found["serves"] == (done.code == YES)
    if isinstance(answer, SchemaError):
        assert (done.code, found["refusal"]) == (NO, str(answer))
        assert str(answer) in done.output
    else:
        assert (done.code, found["refusal"]) == (YES, None)
    for difference in found["differences"]:
        assert difference["object"] in done.output
    assert ("mine" in done.output) == (state is not None and "mine" in state)


async def test_verify_may_be_asked_for_boots_that_only_warn(lab: Lab, program: Program) -> None:
    """They serve in spite of drift."""
    await lab.boot()
    await lab.execute("drop index idx_runtime_jobs_status")
    assert (await program.run("verify")).code == NO
    done = await program.run("verify", "--on-drift", "warn")
    assert done.code == YES
    assert "idx_runtime_jobs_status" in done.output


async def test_migrate_brings_nothing_to_this_release_and_says_so(lab: Lab, program: Program) -> None:
    """Each step with its time; again, there is nothing to do."""
    found = await program.json("migrate")
    assert [(step["version"], step["name"]) for step in found["applied"]] == HISTORY
    assert all(0 < step["duration"] < 60 for step in found["applied"])
    assert (found["from_version"], found["to_version"], found["backup"]) == (0, NEWEST, None)
    assert await lab.recorded() == HISTORY
    done = await program.run("migrate")
    assert (done.code, done.errors) == (YES, "")
    assert "Nothing to do" in done.output


async def test_migrate_shows_each_step_to_people(lab: Lab, program: Program) -> None:
    """From version 1, as it was left by an earlier program; on SQLite with the copy that it has taken."""
    await lab.reach(1)
    done = await program.run("migrate")
    assert (done.code, done.errors) == (YES, "")
    for version, name in HISTORY[1:]:
        assert f"{version}   {name}" in done.output
    assert f"From version 1 to version {NEWEST}" in done.output
    if isinstance(lab, SqliteLab):
        [backup] = lab.backups()
        assert backup in done.output


@on_sqlite
async def test_migrate_takes_no_copy_where_none_is_wanted(lab: Lab, program: Program) -> None:
    """SQLite's, which is named otherwise."""
    assert isinstance(lab, SqliteLab)
    await lab.reach(1)
    assert (await program.json("migrate", "--no-copy"))["backup"] is None
    assert lab.backups() == []
    await lab.wipe()
    await lab.reach(1)
    assert (await program.json("migrate"))["backup"] == str(lab.path.with_name(lab.backups()[0]))


async def test_migrate_writes_an_archive_first_that_can_be_restored(lab: Lab, program: Program, tmp_path: Path) -> None:
    """Of what there is before the upgrade; of nothing there is none."""
    archive = tmp_path / "before.zip"
    await lab.reach(1)
    before = await lab.all("runtime_attempts")
    found = await program.json("migrate", "--backup", str(archive))
    assert (found["archive"]["path"], found["archive"]["version"]) == (str(archive), 1)
    assert (await program.run("restore", str(archive), "--force")).code == YES
    assert [row["attempt_id"] for row in await lab.all("runtime_attempts")] == [row["attempt_id"] for row in before]
    assert (await program.json("plan"))["found"] == 1

    other = Program(lab.another().place)
    assert (await other.json("migrate", "--backup", str(tmp_path / "nothing.zip")))["archive"] is None
    assert not (tmp_path / "nothing.zip").exists()


async def test_migrate_does_nothing_where_the_archive_cannot_be_written(lab: Lab, program: Program) -> None:
    """An upgrade without the backup that was wanted would be worse than none."""
    await lab.reach(1)
    before = await lab.content()
    done = await program.run("migrate", "--backup", "/nowhere/there.zip")
    assert (done.code, done.output) == (NO, "")
    assert "/nowhere/there.zip" in done.errors
    assert await lab.content() == before


async def test_migrate_says_no_and_changes_nothing_where_it_is_refused(lab: Lab, program: Program) -> None:
    """In the library's words, on stderr; with --json as a document, too."""
    await lab.boot()
    await lab.execute(STATES["foreign"] or "")
    before = await lab.content()
    done = await program.run("migrate", "--json")
    assert done.code == NO
    error = json.loads(done.output)["error"]
    assert error["type"] == "ForeignSchemaError"
    assert done.errors == f"runtime-repo: {error['message']}\n"
    assert await lab.content() == before


@on_postgres
async def test_who_waits_for_another_can_be_interrupted(lab: Lab, program: Program) -> None:
    """Ctrl-C is no answer: 2, and nothing was changed."""
    assert isinstance(lab, PostgresLab)
    async with lab.held():
        with program.running("migrate") as process:
            deadline = time.monotonic() + 30
            while not await lab.admin.fetchval(WAITING):
                assert time.monotonic() < deadline
            time.sleep(0.3)  # noqa: ASYNC251 - it begins to wait
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (UNKNOWN, "", "\nruntime-repo: interrupted\n")
    assert (await lab.content()).rows == {}


WAITING = "select count(*) from pg_stat_activity where application_name = 'runtime-repo'"


@on_postgres
async def test_whoever_could_not_get_the_lock_does_not_know(lab: Lab, program: Program) -> None:
    """The migration may succeed another time: 2, with who is in the way."""
    async with lab.held() as pid:
        done = await program.run("migrate", "--lock-timeout", "0.2")
    assert done.code == UNKNOWN
    assert f"process {pid}" in done.errors


@pytest.mark.parametrize("version", range(NEWEST + 1))
async def test_plan_shows_what_a_boot_would_do_and_touches_nothing(lab: Lab, program: Program, version: int) -> None:
    """As the library says it, and every statement to people."""
    await lab.reach(version)
    before = await lab.snapshot()
    found = await program.json("plan")
    done = await program.run("plan")
    assert await lab.snapshot() == before
    repository = lab.repository()
    plan = await repository.plan()
    await repository.close()
    assert found == json.loads(json.dumps(plan.as_dict()))
    assert (done.code, done.errors) == (YES, "")
    for migration in plan.migrations:
        for line in migration.sql.splitlines():
            assert line.rstrip() in done.output
    if version == NEWEST:
        assert "would change nothing" in done.output


@on_sqlite
async def test_the_planned_statements_can_be_given_to_the_databases_own_shell(lab: Lab, program: Program) -> None:
    """Then a boot that may only verify would serve."""
    await lab.reach(1)
    done = await program.run("plan", "--sql")
    await lab.execute(done.output)
    assert (await program.run("verify")).code == YES


async def test_plan_says_no_where_a_boot_would_be_refused(lab: Lab, program: Program) -> None:
    """With --sql there is no statement to run by mistake."""
    await lab.boot()
    await lab.execute(STATES["newer"] or "")
    done = await program.run("plan")
    assert done.code == NO
    assert f"version {NEXT[0]}" in done.output
    done = await program.run("plan", "--sql")
    assert (done.code, done.output) == (NO, "")
    assert f"version {NEXT[0]}" in done.errors


async def test_status_tells_what_the_library_does(lab: Lab, program: Program) -> None:
    """As one document, and to people with every queue and worker."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many([NewAttempt("run", queue=queue) for queue in ("[red]", "b", "b")])
        await repo.leases.claim("worker-[bold]x", queues="b")
        status = (await repo.status()).as_dict()
    found = await program.json("status")
    assert found.keys() == status.keys()
    for same in ("backend", "schema", "ledger", "control", "failed", "pending_interrupts", "unknown"):
        assert found[same] == status[same]
    assert [(queue["queue"], queue["ready"], queue["leased"]) for queue in found["queues"]] == [
        ("[red]", 1, 0),
        ("b", 1, 1),
    ]
    done = await program.run("status")
    assert (done.code, done.errors) == (YES, "")
    for words in ("[red]", "worker-[bold]x", f"version {NEWEST}, current", HISTORY[-1][1], found["server"]):
        assert words in done.output
    assert datetime.fromisoformat(found["ledger"][0]["applied_at"])


async def test_nothing_that_is_stored_gives_the_terminal_orders(lab: Lab, program: Program) -> None:
    """Whoever may enqueue could write to the operator's screen otherwise."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run", queue="a\x1b]0;x\x07\nb")
        await repo.leases.claim("w\x1b[2J", queues="a\x1b]0;x\x07\nb")
        await repo.control.pause("c\x1b[2J", "r\x1b[2J")
    for name in ("status", "top", "verify", "resume"):
        done = await program.run(name, *GIVEN.get(name, ()))
        assert done.code == YES
        assert "\x1b" not in done.output
    assert r"a\x1b]0;x\x07\nb" in (await program.run("status")).output


async def test_status_says_no_where_a_boot_would_be_refused_and_tells_the_rest(lab: Lab, program: Program) -> None:
    """Of a drifted schema, what waits is still shown."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run", queue="emails")
    await lab.execute(STATES["drift"] or "")
    done = await program.run("status")
    assert done.code == NO
    assert "idx_runtime_jobs_status" in done.output
    assert "column runtime_jobs.mine is extra" in done.output
    assert "emails" in done.output


async def test_status_of_nothing_creates_nothing(lab: Lab, program: Program) -> None:
    """It is what a boot would serve."""
    before = await lab.snapshot()
    done = await program.run("status")
    assert (done.code, done.errors) == (YES, "")
    assert "nothing yet" in done.output
    assert await lab.snapshot() == before


async def test_what_is_quiesced_stays_so_until_it_is_resumed(lab: Lab, program: Program) -> None:
    """Nobody can claim meanwhile, and the status says since when and why."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run")
        found = await program.json("quiesce", "--reason", "an upgrade")
        assert found["quiesced"]["reason"] == "an upgrade"
        assert found == (await repo.control.state()).as_dict()
        assert await repo.leases.claim("x") == []
        done = await program.run("status")
        assert "an upgrade" in done.output
        assert (await program.json("status"))["control"] == found
        done = await program.run("resume")
        assert (done.code, done.errors) == (YES, "")
        assert "Everybody may claim" in done.output
        assert len(await repo.leases.claim("x")) == 1


async def test_quiesce_says_no_where_something_is_still_held(lab: Lab, program: Program) -> None:
    """And who holds it; it is quiesced all the same."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many([NewAttempt("run"), NewAttempt("run")])
        await repo.leases.claim("worker-7")
        done = await program.run("quiesce", "--timeout", "0.05")
        assert (done.code, done.output) == (NO, "")
        assert "worker-7" in done.errors
        assert await repo.leases.claim("x") == []


async def test_a_queue_is_paused_by_its_name_and_resumed_by_it(lab: Lab, program: Program) -> None:
    """The others go on; to resume the store does not resume it."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many([NewAttempt("run", queue=queue) for queue in ("emails", "reports")])
        done = await program.run("pause", "emails", "--reason", "the server is down")
        assert (done.code, done.errors) == (YES, "")
        assert "emails" in done.output
        assert "the server is down" in done.output
        assert [stop["queue"] for stop in (await program.json("resume"))["paused"]] == ["emails"]
        [lease] = await repo.leases.claim("x", queues=["emails", "reports"], limit=2)
        assert lease.attempt.queue == "reports"
        assert (await program.json("resume", "--queue", "emails"))["paused"] == []
        assert len(await repo.leases.claim("x", queues="emails")) == 1


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
async def test_can_run_answers_as_the_library_does(lab: Lab, program: Program, state: str | None) -> None:
    """Before a deployment, of whatever there is."""
    if state is not None:
        await lab.boot()
        await lab.execute(state or "select 1")
    repository = lab.repository()
    expected = await repository.can_run()
    await repository.close()
    done = await program.run("can-run")
    assert (done.code, done.errors) == (YES if expected.answer else NO, "")
    assert expected.why in done.output
    assert await program.json("can-run", code=done.code) == expected.as_dict()


async def test_top_shows_what_moves(lab: Lab, program: Program) -> None:
    """Once, as a document and to people."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many([NewAttempt("run", queue=queue) for queue in ("emails", "emails", "b")])
        [lease] = await repo.leases.claim("x", queues="emails")
        await repo.attempts.complete(lease)
    found = await program.json("top", "--over", "100")
    assert [(queue["queue"], queue["ready"], queue["completed"]) for queue in found["queues"]] == [
        ("b", 1, 0),
        ("emails", 1, 1),
    ]
    done = await program.run("top", "--once")
    assert (done.code, done.errors) == (YES, "")
    assert "emails" in done.output


async def test_top_ends_at_ctrl_c_with_yes(lab: Lab, program: Program) -> None:
    """Meanwhile it shows what comes and goes, one look below the other where there is no terminal."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run", queue="emails")
        with program.running("top", "--interval", "0.1") as process:
            assert process.stdout is not None
            while "emails" not in process.stdout.readline():
                pass
            await repo.attempts.enqueue_many([NewAttempt("run", queue="reports") for _ in range(50)])
            while "reports" not in (line := process.stdout.readline()):
                pass
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (YES, "")
    _, ready, _, _, *_, came, done, failed = line.split()
    assert (ready, done, failed) == ("50", "0", "0")
    assert float(came.replace(",", "")) > 1


async def test_top_says_no_of_an_earlier_version(lab: Lab, program: Program) -> None:
    """It has no queues to show."""
    await lab.reach(1)
    done = await program.run("top", "--once")
    assert (done.code, done.output) == (NO, "")
    assert "version 1" in done.errors


OF_FILES = {"backup", "restore"}
"""What says no of a file before it asks the database."""


@pytest.mark.parametrize("name", sorted(set(ON_DATABASE) - OF_FILES))
async def test_what_cannot_be_reached_is_not_known(lab: Lab, program: Program, name: str) -> None:
    """2, with the library's words, and nothing but them."""
    if isinstance(lab, SqliteLab):
        lab.path.write_bytes(b"no database" * 100)
        program = Program(lab.place)
        done = await program.run(name, *GIVEN.get(name, ()))
    else:
        done = await ran(name, "postgresql://u:hush@127.0.0.1:1/d", *GIVEN.get(name, ()), "--wait", "0.1")
    assert (done.code, done.output) == (UNKNOWN, "")
    assert len(done.errors.splitlines()) == 1
    assert "hush" not in done.errors


async def test_the_environment_names_the_database(lab: Lab, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the runtime schema; what is given wins."""
    await lab.boot()
    monkeypatch.setenv("RUNTIME_REPO_URL", lab.place.where)
    monkeypatch.setenv("RUNTIME_REPO_SCHEMA", lab.place.schema)
    done = await ran("verify")
    assert (done.code, done.errors) == (YES, "")
    monkeypatch.setenv("RUNTIME_REPO_URL", "nothing.db")
    monkeypatch.setenv("RUNTIME_REPO_SCHEMA", "nothing")
    assert (await program.run("verify")).code == YES


async def test_a_file_may_be_named_by_a_url(tmp_path: Path) -> None:
    """As the library reads it."""
    assert (await ran("migrate", f"sqlite:///{tmp_path / 'x.db'}")).code == YES
    with contextlib.closing(sqlite3.connect(tmp_path / "x.db")) as connection:
        assert connection.execute("select count(*) from runtime_schema_migrations").fetchone() == (NEWEST,)


async def test_a_backup_brings_everything_back(lab: Lab, program: Program, tmp_path: Path) -> None:
    """What was written since is kept beside, and told of."""
    archive = str(tmp_path / "store.zip")
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run", attempt_id="before")
        found = await program.json("backup", archive)
        assert (found["path"], found["rows"]["runtime_attempts"]) == (archive, 1)
        await repo.attempts.enqueue("run", attempt_id="after")
    done = await program.run("backup", archive)
    assert (done.code, done.output) == (NO, "")
    assert archive in done.errors

    done = await program.run("restore", archive)
    assert (done.code, done.errors) == (YES, "")
    assert "what was there before is kept in" in done.output
    assert f"Restored: version {NEWEST}" in done.output
    async with lab.repository() as repo:
        assert [attempt.attempt_id for attempt in await repo.attempts.list()] == ["before"]
    done = await program.run("backup", str(tmp_path / "again.zip"))
    assert (done.code, done.errors) == (YES, "")
    assert "again.zip was written and read back" in done.output


async def test_an_archive_of_what_cannot_be_reached_is_not_known(tmp_path: Path) -> None:
    """Neither one to be written nor one to be restored."""
    archive = str(tmp_path / "store.zip")
    assert (await ran("migrate", str(tmp_path / "x.db"))).code == YES
    assert (await ran("backup", str(tmp_path / "x.db"), archive)).code == YES
    nobody = "postgresql://u:hush@127.0.0.1:1/d"
    for command in (("backup", nobody, str(tmp_path / "other.zip")), ("restore", nobody, archive)):
        done = await ran(*command, "--wait", "0.1")
        assert (done.code, done.output) == (UNKNOWN, "")
        assert len(done.errors.splitlines()) == 1
        assert "hush" not in done.errors


async def test_a_restore_says_no_while_somebody_works(lab: Lab, program: Program, tmp_path: Path) -> None:
    """Unless it is told to do it all the same."""
    archive = str(tmp_path / "store.zip")
    async with lab.repository() as repo:
        await repo.attempts.enqueue("run", attempt_id="before")
        await program.run("backup", archive)
        await repo.leases.claim("worker-7")
    done = await program.run("restore", archive)
    assert (done.code, done.output) == (NO, "")
    found = await program.json("restore", archive, "--force")
    assert found["overridden"]
    assert found["rows"]["runtime_leases"] == 0


@pytest.mark.parametrize("back", [False, True])
async def test_a_store_moves_to_the_other_database_and_back(sqlite_lab: Lab, postgres_lab: Lab, *, back: bool) -> None:
    """Every row, with its id."""
    source, target = (postgres_lab, sqlite_lab) if back else (sqlite_lab, postgres_lab)
    async with source.repository() as repo:
        await repo.attempts.enqueue("run", attempt_id="here")
    schema = ["--schema", postgres_lab.place.schema]
    done = await ran("move", source.place.where, target.place.where, *schema, "--json")
    assert (done.code, done.errors) == (YES, "")
    assert json.loads(done.output)["rows"]["runtime_attempts"] == 1
    async with target.repository() as repo:
        assert [attempt.attempt_id for attempt in await repo.attempts.list()] == ["here"]
        await repo.attempts.enqueue("run", attempt_id="there")
    done = await ran("move", source.place.where, target.place.where, *schema)
    assert (done.code, done.output) == (NO, "")


async def test_a_schema_moves_to_another(postgres_lab: PostgresLab) -> None:
    """Each has a name of its own."""
    other = postgres_lab.another()
    async with postgres_lab.repository() as repo:
        await repo.attempts.enqueue("run", attempt_id="here")
    where = postgres_lab.place.where
    names = ("--schema", postgres_lab.place.schema, "--target-schema", other.place.schema)
    done = await ran("move", where, where, *names)
    assert (done.code, done.errors) == (YES, "")
    assert "the same on both sides" in done.output
    async with other.repository() as repo:
        assert len(await repo.attempts.list()) == 1


QUEUE = {"queue", "ready", "delayed", "leased", "oldest_age"}
SHAPES: dict[str, dict[str, set[str] | None]] = {
    "status": {
        **dict.fromkeys(("backend", "place", "server", "migrating", "failed", "pending_interrupts", "size", "unknown")),
        "schema": {"found", "supported", "pending", "differences", "refusal"},
        "ledger": {"version", "name", "applied_at"},
        "control": {"quiesced", "paused", "oldest"},
        "queues": QUEUE,
        "workers": {"worker_id", "leases", "expired", "first_expiry", "heartbeat_at"},
        "tables": {"name", "size", "rows"},
    },
    "plan": {
        **dict.fromkeys(("found", "supported", "refusal", "backup", "tolerated")),
        "migrations": {"version", "name", "sql"},
    },
    "verify": {
        **dict.fromkeys(("serves", "found", "supported", "pending", "refusal")),
        "differences": {"object", "expected", "found"},
    },
    "can-run": dict.fromkeys(("found", "supported", "oldest", "answer", "is_outdated", "why")),
    "top": {**dict.fromkeys(("place", "at", "span")), "queues": QUEUE | {"completed", "failed", "cancelled"}},
    "migrate": {
        **dict.fromkeys(("from_version", "to_version", "waited", "backup", "tolerated", "archive")),
        "applied": {"version", "name", "duration"},
    },
    "quiesce": {**dict.fromkeys(("paused", "oldest")), "quiesced": {"since", "reason", "queue"}},
    "pause": {**dict.fromkeys(("quiesced", "oldest")), "paused": {"since", "reason", "queue"}},
    "resume": dict.fromkeys(("quiesced", "paused", "oldest")),
    "backup": dict.fromkeys(("path", "backend", "version", "rows", "size", "left_out", "duration")),
}
"""What programs rely on: the keys of each document, and of what is in it, or of each of those in it."""


@pytest.mark.parametrize("name", SHAPES)
async def test_a_document_has_the_same_keys_for_ever(lab: Lab, program: Program, name: str, tmp_path: Path) -> None:
    """Another release may add some, here as well."""
    given = [str(tmp_path / "store.zip")] if name == "backup" else GIVEN.get(name, ())
    if name not in ("plan", "migrate"):
        async with lab.repository() as repo:
            await repo.attempts.enqueue_many([NewAttempt("run"), NewAttempt("run")])
            if name == "status":
                await repo.leases.claim("worker")
    if name == "verify":
        await lab.execute("alter table runtime_jobs add column mine text")
    found = await program.json(name, *given)
    assert found.keys() == SHAPES[name].keys()
    for key, keys in SHAPES[name].items():
        parts = found[key] if isinstance(found[key], list) else [found[key]]
        assert keys is None or parts or (name, lab.backend) == ("status", "sqlite")
        for part in parts if keys is not None else ():
            assert part.keys() == keys, key
