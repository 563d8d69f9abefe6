"""The package's names are imported when they are first asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import runtime_repo
from tests.cli.program import environment


def loaded_after(program: str) -> set[str]:
    """The modules that a process has which does this."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys; print(*sys.modules)"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(done.stdout.split())


def test_every_public_name_is_found_where_it_lives() -> None:
    """Whatever is imported for type checkers is public, and the other way round."""
    tree = ast.parse(Path(runtime_repo.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(told) == sorted(runtime_repo.__all__)
    for name, module in told.items():
        assert getattr(runtime_repo, name) is getattr(sys.modules[str(module)], name)
    assert set(runtime_repo.__all__) <= set(dir(runtime_repo))
    assert set(runtime_repo.__all__) <= loaded_names("from runtime_repo import *")


def loaded_names(program: str) -> set[str]:
    """The names that a module has which does this."""
    found: dict[str, object] = {}
    exec(program, found)  # noqa: S102 - a star is allowed in no function
    return set(found)


def test_what_is_not_public_is_an_attribute_error() -> None:
    """As of every module."""
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        runtime_repo.nothing  # type: ignore[attr-defined] # noqa: B018


def test_who_uses_one_database_does_not_load_the_others_driver() -> None:
    """And who uses neither loads none."""
    assert not loaded_after("import runtime_repo") & {"asyncpg", "aiosqlite", "asyncio"}
    sqlite = loaded_after("from runtime_repo import SqliteRuntimeRepository, Worker, SchemaError")
    assert "aiosqlite" in sqlite
    assert "asyncpg" not in sqlite
    postgres = loaded_after("from runtime_repo import PostgresRuntimeRepository")
    assert "asyncpg" in postgres
    assert "aiosqlite" not in postgres
