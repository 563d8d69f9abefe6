"""
Writes the ``.catalog.json`` beside each migration from what a real database looks like after it.

Run ``python -m tests.catalogs`` after adding a migration; a test proves the files against fresh migrations.
"""

import asyncio
import re
import tempfile
from importlib.resources import files
from pathlib import Path

from runtime_repo.catalog import LEDGER, Catalog, Table, catalog_to_json
from runtime_repo.database import Database
from runtime_repo.postgres import PostgresDatabase, Target
from runtime_repo.sqlite import SqliteDatabase
from tests.postgres_server import PostgresServer


async def fresh_catalogs(database: Database) -> dict[str, str]:
    """The text of every catalog file of *database*'s backend, from migrating it from nothing."""
    folder = Path(str(files("runtime_repo"))) / "migrations" / database.backend
    texts: dict[str, str] = {}
    try:
        await database.open([Catalog({LEDGER: Table({})})])
        async with database.lock() as transaction:
            if database.backend == "postgres":
                await transaction.execute("schema.create_namespace")
            await transaction.execute("schema.create_ledger")
            names = {LEDGER}
            for file in sorted(folder.glob("*.sql")):
                sql = file.read_text(encoding="utf-8")
                await transaction.script(sql)
                await transaction.fetch("schema.record", int(file.stem[:4]), file.stem[5:])
                names |= set(re.findall(r"create table \{schema\}\.(\w+)", sql))
                look = await transaction.look([Catalog({name: Table({}) for name in names})])
                texts[f"{file.stem}.catalog.json"] = catalog_to_json(look.catalog)
    finally:
        await database.close()
    return texts


async def _write() -> None:
    with tempfile.TemporaryDirectory() as folder, PostgresServer() as server:
        for database in (
            SqliteDatabase(Path(folder) / "fresh.db", writes=True, backup=False, lock_timeout=5),
            PostgresDatabase(Target(server.url(), {}), schema="fresh", startup_timeout=5),
        ):
            for name, text in (await fresh_catalogs(database)).items():
                (Path(str(files("runtime_repo"))) / "migrations" / database.backend / name).write_text(text, "utf-8")


if __name__ == "__main__":
    asyncio.run(_write())
