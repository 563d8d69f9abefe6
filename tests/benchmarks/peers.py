"""
The peers at boot, each in its cheapest usual set-up, with whatever can be prepared done before the clock starts.

- Alembic: `command.upgrade(config, "head")` on a synchronous engine (psycopg, sqlite3), which is cheaper than its
  asynchronous template; our two versions as two revisions, each sent as one script where the driver can; the
  PostgreSQL schema is there already.
- Alembic + lock: the same with the well-known recipe of a transaction-level advisory lock in `env.py`.
- DBOS: `DBOS.migrate`, the migration of its system database alone, a fraction of `DBOS.launch`. Its own schema.
- LangGraph: `setup()` of the asynchronous savers. Its own schema, which has fewer tables than ours.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from .drivers import scripts, statements

if TYPE_CHECKING:
    from runtime_repo.database import Backend
    from tests.place import Place

    from .drivers import Boot

DISTRIBUTIONS = (
    "alembic",
    "SQLAlchemy",
    "psycopg",
    "dbos",
    "langgraph-checkpoint-postgres",
    "langgraph-checkpoint-sqlite",
)

_ENVIRONMENT = """
from alembic import context
from sqlalchemy import create_engine, pool

settings = context.config.attributes
engine = create_engine(settings["url"], poolclass=pool.NullPool)
with engine.connect() as connection:
    context.configure(connection=connection, version_table_schema=settings["version_schema"])
    with context.begin_transaction():
        if settings["lock"]:
            connection.exec_driver_sql("select pg_advisory_xact_lock(1, 1)")
        context.run_migrations()
"""
_REVISION = """
from alembic import context, op

revision = {version!r}
down_revision = {previous!r}
SCRIPTS = {scripts!r}


def upgrade():
    connection = op.get_bind().execution_options(no_parameters=True)
    for script in SCRIPTS:
        script = script.replace("{{schema}}", context.config.attributes["schema"])
        connection.exec_driver_sql(script.replace("{{now_ms}}", "1767225600000"))
"""


def prepare(name: str, place: Place) -> Boot:
    """Return the peer's boot; what a deployment does only once is done here."""
    if name == "dbos":
        return _dbos(place)
    if place.backend == "postgres":
        _create_schema(place)
    if name == "langgraph":
        return _langgraph(place)
    return _alembic(place, lock=name == "alembic + lock")


def _alembic(place: Place, *, lock: bool) -> Boot:
    command = import_module("alembic.command")
    config = import_module("alembic.config").Config()
    config.set_main_option("script_location", _script_folder(place.backend).name.replace("%", "%%"))
    if place.backend == "postgres":
        url = import_module("sqlalchemy").make_url(place.where).set(drivername="postgresql+psycopg")
        schema, version_schema = f'"{place.schema}"', place.schema
    else:
        url, schema, version_schema = f"sqlite:///{place.where}", "main", None
    config.attributes.update(url=url, schema=schema, version_schema=version_schema, lock=lock)

    def boot() -> None:
        command.upgrade(config, "head")

    return boot


@cache
def _script_folder(backend: Backend) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="alembic-")
    versions = Path(folder.name, "versions")
    versions.mkdir()
    Path(folder.name, "env.py").write_text(_ENVIRONMENT, encoding="utf-8")
    previous = None
    for script in scripts(backend):
        version = f"{script.version:04}"
        parts = [script.text] if backend == "postgres" else statements(script.text)
        text = _REVISION.format(version=version, previous=previous, scripts=parts)
        (versions / f"{version}_{script.name}.py").write_text(text, encoding="utf-8")
        previous = version
    return folder


def _dbos(place: Place) -> Boot:
    migrate = import_module("dbos").DBOS.migrate

    def boot() -> None:
        if place.backend == "postgres":
            migrate(place.where, schema=place.schema)
        else:
            migrate(f"sqlite:///{place.where}")

    return boot


def _langgraph(place: Place) -> Boot:
    if place.backend == "postgres":
        saver = import_module("langgraph.checkpoint.postgres.aio").AsyncPostgresSaver
        joint = "&" if "?" in place.where else "?"
        target = f"{place.where}{joint}options={quote(f'-csearch_path={place.schema}')}"
    else:
        saver = import_module("langgraph.checkpoint.sqlite.aio").AsyncSqliteSaver
        target = place.where

    async def boot() -> None:
        async with saver.from_conn_string(target) as opened:
            await opened.setup()

    return boot


def _create_schema(place: Place) -> None:
    with closing(import_module("psycopg").connect(place.where, autocommit=True)) as connection:
        connection.execute(f'create schema if not exists "{place.schema}"')
