"""
Every schema test runs on both backends.

``pytest -k schema_migration`` selects all of them, ``-k postgres_schema_migration`` PostgreSQL's.
"""

from pathlib import Path

import asyncpg
import pytest

pytest.register_assert_rewrite("tests.schema.lab")

from tests.schema.lab import Lab, PostgresLab, SqliteLab  # noqa: E402 - only what is imported later is rewritten


@pytest.fixture
def sqlite_lab(tmp_path: Path) -> Lab:
    """A file that does not exist yet."""
    folder = tmp_path / "database"
    folder.mkdir()
    return SqliteLab(folder / "runtime.db")


@pytest.fixture
async def postgres_lab(postgres_url: str, postgres_schema: str, postgres: asyncpg.Connection) -> Lab:
    """A schema that does not exist yet."""
    await postgres.execute(f"set search_path = {postgres_schema}")
    return PostgresLab(postgres_url, postgres_schema, postgres)


@pytest.fixture(params=["schema_migration", "postgres_schema_migration"])
def lab(request: pytest.FixtureRequest) -> Lab:
    """This test's own empty database, once for each backend."""
    prefix = "postgres" if request.param.startswith("postgres") else "sqlite"
    lab: Lab = request.getfixturevalue(f"{prefix}_lab")
    return lab
