"""Rolling deploys: which releases can run beside a newer schema, and who can tell before it is deployed."""

import asyncio
import dataclasses
import json
from collections.abc import Sequence

import pytest

from runtime_repo import Compatibility, ConfigurationError, OutdatedReleaseError, SchemaTooNewError
from runtime_repo.schema import Migration, Policy, can_run, load_migrations
from tests.lab import Lab
from tests.schema.test_migrations import NAMES, next_one
from tests.versions import NEWEST, NEXT, RECORDED

FIRST = NEWEST + 1
SECOND = NEWEST + 2


def shipped(lab: Lab, *oldest: int | None) -> list[Migration]:
    """The migrations of a later release: one more for each, with the oldest release beside it if it says one."""
    migrations = list(lab.migrations)
    for number, beside in enumerate(oldest, NEWEST + 1):
        said = "" if beside is None else f"-- oldest: {beside}\n"
        sql = NAMES if number == FIRST else "update {schema}.runtime_jobs set status = status;"
        one = next_one(lab, f"-- Names, for a test.\n{said}\n{sql}")
        migrations.append(dataclasses.replace(one, version=number, name=f"names{number}"))
    return migrations


async def asked(lab: Lab, migrations: Sequence[Migration]) -> Compatibility:
    """What a release that ships these migrations says of the database."""
    async with lab.opened() as database:
        return await can_run(database, migrations, Policy())


async def test_a_running_release_goes_on_beside_a_schema_that_lets_it(lab: Lab) -> None:
    """It claims as before, while no new one of it boots; whoever asks hears both."""
    async with asyncio.timeout(20), lab.repository() as repo:
        await repo.attempts.enqueue("run", attempt_id="a")
        assert await lab.ship(shipped(lab, NEWEST))
        (lease,) = await repo.leases.claim("worker")
        await repo.attempts.complete(lease)
        assert await repo.leases.claim("worker") == []
        assert (await repo.control.state()).oldest == NEWEST
        said = await repo.can_run()
        assert dataclasses.replace(said, why="") == Compatibility(
            FIRST, NEWEST, NEWEST, answer=False, is_outdated=False, why=""
        )
        assert "run already go on" in said.why
    await lab.refused(SchemaTooNewError)


async def test_a_running_release_ends_beside_a_schema_that_does_not(lab: Lab) -> None:
    """Which is what a migration means that says nothing."""
    async with asyncio.timeout(20), lab.repository() as repo:
        await repo.attempts.enqueue("run", attempt_id="a")
        assert await lab.ship(shipped(lab, None))
        with pytest.raises(OutdatedReleaseError) as caught:
            await repo.leases.claim("worker")
        assert (caught.value.found, caught.value.supported, caught.value.oldest) == (FIRST, NEWEST, FIRST)
        said = await repo.can_run()
        assert (said.oldest, said.answer, said.is_outdated) == (FIRST, False, True)
        assert "run already end" in said.why


@pytest.mark.parametrize(
    ("declared", "oldest"),
    [
        ([NEWEST, NEWEST], NEWEST),
        ([NEWEST, FIRST], FIRST),
        ([NEWEST, None], SECOND),
        ([None, NEWEST], FIRST),
        ([1, 1], NEWEST),
    ],
)
@pytest.mark.parametrize("step_by_step", [False, True], ids=["at once", "step by step"])
async def test_the_oldest_release_is_that_of_all_migrations(
    lab: Lab, declared: list[int | None], oldest: int, *, step_by_step: bool
) -> None:
    """A release runs beside a schema if every migration that it does not know lets it, in however many boots."""
    migrations = shipped(lab, *declared)
    await lab.reach(NEWEST)
    if step_by_step:
        await lab.ship(migrations[:-1])
    await lab.ship(migrations)
    switches = [(row["name"], row["value_json"]) for row in await lab.all("runtime_control")]
    assert switches == ([] if oldest == SECOND else [("oldest", str(oldest))])
    said = await asked(lab, lab.migrations)
    assert (said.found, said.oldest, said.is_outdated) == (SECOND, oldest, oldest > NEWEST)
    assert (await asked(lab, migrations)).oldest == oldest


@pytest.mark.parametrize("version", [0, *RECORDED])
async def test_before_a_deploy_it_is_known_who_goes_on(lab: Lab, version: int) -> None:
    """Of an older database the answer is about what a boot makes of it; nothing is touched or made by asking."""
    await lab.reach(version)
    before = await lab.snapshot()
    async with lab.nothing_left():
        repository = lab.repository()
        said = await repository.can_run()
        await repository.close()
    assert (said.found, said.supported, said.oldest) == (version, NEWEST, NEWEST)
    assert (said.answer, said.is_outdated) == (True, False)
    for declared in (NEWEST, None):
        later = await asked(lab, shipped(lab, declared))
        assert (later.found, later.supported, later.oldest) == (version, FIRST, declared or FIRST)
        assert later.answer
        assert ("end then" in later.why) == (0 < version < (declared or FIRST))
    assert json.loads(json.dumps(said.as_dict()))["answer"] is True
    assert await lab.snapshot() == before


async def test_what_a_boot_refuses_is_answered_with_no(lab: Lab) -> None:
    """And with the reason."""
    await lab.reach(NEWEST)
    await lab.execute("drop table runtime_jobs")
    said = await lab.repository().can_run()
    assert (said.answer, said.is_outdated) == (False, False)
    assert "runtime_jobs" in said.why


@pytest.mark.parametrize(
    "line", ["-- oldest: 0", f"-- oldest: {FIRST + 1}", "-- oldest 2", "-- Oldest: 2", "--oldest: x"]
)
async def test_a_line_that_cannot_be_meant_is_refused(lab: Lab, line: str) -> None:
    """Before anything is done: taken for a comment, it would end workers that were to go on."""
    with pytest.raises(ConfigurationError, match=f"migration {NEXT[0]}.*oldest: N"):
        next_one(lab, f"{line}\n{NAMES}")


def test_both_databases_say_the_same() -> None:
    """Of every migration that is shipped."""
    sqlite, postgres = (
        [migration.oldest for migration in load_migrations(backend)] for backend in ("sqlite", "postgres")
    )
    assert sqlite == postgres
