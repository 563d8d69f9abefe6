"""What mends, what writes many attempts, and what roles need: as an operator types it."""

import getpass
from datetime import timedelta

import pytest

from runtime_repo import NewAttempt
from tests.cli.program import Program, ran
from tests.lab import Lab

YES, NO, UNKNOWN = 0, 1, 2


@pytest.fixture
def program(lab: Lab) -> Program:
    """The command on the test's own database."""
    return Program(lab.place)


async def test_what_a_doctor_prints_mends_the_drift(lab: Lab, program: Program) -> None:
    """Run as it stands, after which verify says yes."""
    await lab.boot()
    await lab.execute("drop index idx_runtime_jobs_status; alter table runtime_audit_logs drop column result")
    done = await program.run("doctor")
    assert done.code == NO
    assert "column runtime_audit_logs.result is missing" in " ".join(done.output.split())
    assert "Beware: what stood in runtime_audit_logs.result is not brought back" in " ".join(done.output.split())
    found = await program.json("doctor", code=NO)
    script = (await program.run("doctor", "--sql")).output
    assert found["script"] == script
    assert (await program.run("verify")).code == NO
    await lab.execute(script)
    assert (await program.run("verify")).code == YES
    assert (await program.run("doctor", "--sql")).output == ""
    assert (await program.json("doctor", code=(await program.run("doctor")).code))["repairs"] == []


async def test_of_nothing_a_doctor_says_that_it_is_no_store(program: Program) -> None:
    """1, and nothing is made."""
    done = await program.run("doctor")
    assert (done.code, done.errors) == (NO, "")
    assert "version 0" in done.output


async def test_many_attempts_are_retried_cancelled_and_pruned(lab: Lab, program: Program) -> None:
    """By queue, status, error and age; the audit says who, by default the user of the process."""
    async with lab.repository() as repo:
        await repo.attempts.enqueue_many([NewAttempt("run", queue=queue) for queue in "aab"])
        for lease in await repo.leases.claim("worker", queues=["a", "b"], limit=3):
            await repo.attempts.fail(lease, "disk full" if lease.attempt.queue == "a" else "boom")
        assert await program.json("retry", "--queue", "a", "--error", "disk", "--limit", "1") == {
            "count": 1,
            "actor": getpass.getuser(),
        }
        assert (await program.run("retry", "--older-than", "1h")).output == "0 attempts to be tried again\n"
        done = await program.run("cancel", "--status", "queued", "--actor", "ann")
        assert (done.code, done.output) == (YES, "1 attempt cancelled\n")
        done = await program.run("prune", "--older-than", "0s", "--status", "failed", "--limit", "1", "--actor", "ann")
        assert (done.code, done.output) == (YES, "1 attempt deleted\n")
        assert (await program.json("prune", "--older-than", "0s"))["count"] == 2
        entries = [(entry.action, entry.actor_id, entry.details["count"]) for entry in await repo.audit.list()]
    user = getpass.getuser()
    assert entries == [
        ("attempts.prune", user, 2),
        ("attempts.prune", "ann", 1),
        ("attempts.cancel_many", "ann", 1),
        ("attempts.retry_many", user, 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cancel", "x.db"], "nothing says which"),
        (["prune", "x.db"], "--older-than"),
        (["prune", "x.db", "--older-than", "7"], "'7' is no span: expected a number and s, m, h or d"),
        (["retry", "x.db", "--older-than", "99999999999d"], "longer than there is time"),
        (["cancel", "x.db", "--status", "failed"], "--status"),
        (["grants"], "--migrator"),
        (["grants", "--migrator", "m", "--worker", "m"], "each once"),
    ],
)
async def test_what_is_typed_wrong_is_no_answer(arguments: list[str], words: str) -> None:
    """2, and what was expected; no file is made."""
    done = await ran(*arguments)
    assert (done.code, done.output) == (UNKNOWN, "")
    assert words in " ".join(done.errors.split())


async def test_an_attempt_that_is_not_there_yet_is_not_migrated_to(lab: Lab, program: Program) -> None:
    """What writes attempts never migrates: 1, and the boot's own words."""
    await lab.reach(1)
    done = await program.run("retry")
    assert (done.code, done.output) == (NO, "")
    assert "migrate=False" in done.errors
    assert await lab.version() == 1


async def test_grants_are_printed_without_a_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script for psql, or as JSON; the schema may be the environment's."""
    monkeypatch.setenv("RUNTIME_REPO_SCHEMA", "work")
    done = await ran("grants", "--migrator", "owner", "--worker", "app", "--server", "17")
    assert (done.code, done.errors) == (YES, "")
    assert 'grant select, insert on "work".runtime_audit_logs to "app";' in done.output
    assert "maintain" in done.output
    done = await ran("grants", "--migrator", "owner", "--worker", "app", "--json")
    assert done.code == YES
    assert '"before"' in done.output


def test_a_span_is_a_number_and_a_unit() -> None:
    """As operators write it."""
    from runtime_repo.cli.many import SPAN

    assert SPAN.convert("90s", None, None) == timedelta(seconds=90)
    assert SPAN.convert("1.5h", None, None) == timedelta(minutes=90)
    assert SPAN.convert("7d", None, None) == timedelta(days=7)
