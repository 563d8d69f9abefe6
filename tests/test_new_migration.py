"""A new migration is two files: what the README says about adding one, done in a copy of the library."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runtime_repo
from runtime_repo import PostgresRuntimeRepository, SqliteRuntimeRepository
from tests.versions import NEWEST

ROOT = Path(__file__).parents[1]
SECONDS = 120
NAME = f"{NEWEST + 1:04}_recipes"

MIGRATION = """
create table {schema}.runtime_recipes (recipe_id text not null primary key, created_at_ms bigint not null);
create index INDEX (created_at_ms desc, recipe_id);
alter table {schema}.runtime_jobs add column recipe text;
alter table {schema}.runtime_leases add column helpings integer not null default 1;
"""
INDEX = {
    "sqlite": "{schema}.idx_runtime_recipes_created on runtime_recipes",
    "postgres": "idx_runtime_recipes_created on {schema}.runtime_recipes",
}

BOOT = """
import asyncio, sys
import runtime_repo

async def boot(repository):
    async with repository as repo:
        print(repo.boot_report.from_version, repo.boot_report.to_version, (await repo.jobs.get("thread")).status)

asyncio.run(boot(runtime_repo.SqliteRuntimeRepository(sys.argv[1])))
asyncio.run(boot(runtime_repo.PostgresRuntimeRepository(*sys.argv[2:3], schema=sys.argv[3])))
"""

PART = [
    "tests/contract/test_jobs.py",
    "tests/contract/test_leases.py",
    "tests/schema/test_catalogs.py",
    "tests/schema/test_boot.py",
]
"""
What runs against the copy: the nouns whose tables the migration changes, and what proves catalogs and boot. The rest
would tell the same in minutes instead of some ten seconds.
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout of the library's, without a file for the next version."""
    copy = tmp_path / "checkout"
    shutil.copytree(Path(runtime_repo.__file__).parent, copy / "runtime_repo")
    shutil.copytree(ROOT / "tests", copy / "tests")
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def run(copy: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the copy, whose packages come before all others of their names."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env=inherited | {"PYTHONPATH": str(copy)} | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.usefixtures("postgres_server")
async def test_the_recipe_for_a_migration_works(
    copy: Path, tmp_path: Path, postgres_url: str, postgres_schema: str
) -> None:
    """Two files and the command, and nothing else: databases of this release are upgraded, and the tests hold."""
    recipe = (ROOT / "README.md").read_text("utf-8").partition("## Adding a migration")[2].partition("\n## ")[0]
    (command,) = re.findall(r"`python (-m [\w.]+)`", recipe)
    assert "NNNN_<name>.sql" in recipe

    path = tmp_path / "runtime.db"
    for repository in (
        SqliteRuntimeRepository(path),
        PostgresRuntimeRepository(postgres_url, schema=postgres_schema),
    ):
        async with repository as repo:
            await repo.jobs.upsert("thread", "fine")
    for backend, index in INDEX.items():
        file = copy / "runtime_repo" / "migrations" / backend / f"{NAME}.sql"
        file.write_text(MIGRATION.replace("INDEX", index), "utf-8")

    boot = ("-c", BOOT, str(path), postgres_url, postgres_schema)
    done = run(copy, *boot)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{NAME} has no catalog beside it: run python {command}" in done.stderr

    done = run(copy, *command.split())
    assert (done.returncode, done.stderr) == (0, "")
    done = run(copy, *boot)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"{NEWEST} {NEWEST + 1} fine"] * 2

    pytest_options = ("-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "pytest"))
    done = run(copy, "-m", "pytest", *pytest_options, *PART, ORIS_TEST_POSTGRES_URL=postgres_url)
    assert done.returncode == 0, done.stdout[-10_000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 100
