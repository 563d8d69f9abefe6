"""What boot reads of a PostgreSQL database, and what it does under the advisory lock."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import asyncpg

from runtime_repo.catalog import LEDGER, Catalog, Ledger, Look
from runtime_repo.database import Busy, Row
from runtime_repo.postgres.catalog import fingerprint, ledger_from_lines, tables_from_rows
from runtime_repo.postgres.connections import NO_LIMIT, rolled_back
from runtime_repo.queries import fill
from runtime_repo.shielding import finish

if TYPE_CHECKING:
    from runtime_repo.postgres.connections import Connection

__all__ = ["LOCK_TIMEOUT", "BootTransaction", "Looks", "begin"]

LOCK_TIMEOUT = "100ms"
"""How long one try may queue live traffic behind it while it waits for a table."""


class Looks:
    """Reads the ledger and the live catalog of one runtime schema."""

    def __init__(self, schema: str, tokens: Mapping[str, str], queries: Mapping[str, str]) -> None:
        self._schema = schema
        self.tokens = tokens
        self.queries = queries

    async def look(self, connection: "Connection", shipped: Sequence[Catalog]) -> Look:
        with contextlib.suppress(asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
            if look := await self.recognize(connection, shipped):
                return look
        # The catalog is unknown, or the ledger is missing or not ours, and then not even parsed.
        if look := await self.find_nothing(connection, shipped):
            return look
        # Several statements must see one state, or a migration that commits between them would look like drift.
        try:
            await connection.execute(
                f"begin isolation level repeatable read read only; set local lock_timeout = '{LOCK_TIMEOUT}'",
                timeout=NO_LIMIT,
            )
            return await self.look_closely(connection, shipped)
        finally:
            await finish(rolled_back(connection))

    async def recognize(self, connection: "Connection", shipped: Sequence[Catalog]) -> Look | None:
        """The look, in one statement, if the catalog's text is that of a version shipped. It names the ledger."""
        ledger, text = await self._glance(connection, shipped)
        return next((Look(ledger, catalog) for catalog in shipped if catalog.fingerprint == text), None)

    async def find_nothing(self, connection: "Connection", shipped: Sequence[Catalog]) -> Look | None:
        """The look, in one cheap statement, if nothing bears one of our names."""
        names = self._qualified([LEDGER, *shipped[-1].tables])
        (row,) = await connection.fetch(self.queries["schema.taken"], self.tokens["schema"], names, timeout=NO_LIMIT)
        return None if row["taken"] else Look(None, Catalog(), namespace=row["namespace"])

    async def look_closely(self, connection: "Connection", shipped: Sequence[Catalog]) -> Look:
        """
        The catalog first, then the ledger if there is one: naming a missing one would abort the transaction.

        Raises:
            Busy: An index went away while it was read, for PostgreSQL describes one as it is now, not as the snapshot
                has it: somebody is migrating.
        """
        names = [LEDGER, *shipped[-1].tables]
        rows = await connection.fetch(self.queries["schema.catalog"], self._schema, names, timeout=NO_LIMIT)
        tables = tables_from_rows([row for row in rows if row["relname"] is not None])
        if tables is None:
            raise Busy
        catalog = Catalog(tables)
        if not catalog.has_ledger:
            return Look(None, catalog, namespace=bool(rows))
        ledger, text = await self._glance(connection, shipped)
        return Look(ledger, Catalog(tables, text))

    async def _glance(self, connection: "Connection", shipped: Sequence[Catalog]) -> tuple[Ledger | None, str]:
        names = self._qualified(sorted(shipped[-1].tables))
        (row,) = await connection.fetch(self.queries["schema.look"], names, timeout=NO_LIMIT)
        return ledger_from_lines(row["ledger"]), fingerprint(row, self._schema)

    def _qualified(self, names: Iterable[str]) -> list[str]:
        return [f"{self.tokens['schema']}.{name}" for name in names]


class BootTransaction:
    """What boot does under the advisory lock, which ends with this transaction."""

    def __init__(
        self,
        looks: Looks,
        connection: "Connection",
        translated: Callable[[], AbstractContextManager[None]],
        look_timeout: float,
    ) -> None:
        self._looks = looks
        self._translated = translated
        self._look_timeout = look_timeout
        self._connection = connection
        self._has_recorded = False

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        with self._translated():
            rows = await self._connection.fetch(self._looks.queries[query], *args, timeout=NO_LIMIT)
        self._has_recorded |= query == "schema.record"
        return rows

    async def execute(self, query: str) -> None:
        # Not prepared: one round trip instead of two.
        with self._translated():
            await self._connection.execute(self._looks.queries[query], timeout=NO_LIMIT)

    async def script(self, text: str) -> None:
        text = fill(text, self._looks.tokens)
        with self._translated():
            await self._connection.execute(text, timeout=NO_LIMIT)

    async def look(self, shipped: Sequence[Catalog]) -> Look:
        with self._translated():
            async with asyncio.timeout(self._look_timeout):
                return await self._look(shipped)

    async def _look(self, shipped: Sequence[Catalog]) -> Look:
        # A ledger that took a row is there, and may be named without risk to the transaction.
        first = self._looks.recognize if self._has_recorded else self._looks.find_nothing
        return await first(self._connection, shipped) or await self._looks.look_closely(self._connection, shipped)


def begin(server: int) -> str:
    """
    Begin as boot needs it, whatever the role's settings are: a fresh snapshot for each statement, no waiting behind
    live traffic, and no end to an index build or a backup by the clock.
    """
    unlimited = ["statement_timeout", "idle_in_transaction_session_timeout"]
    if server >= 17:
        unlimited.append("transaction_timeout")
    settings = "".join(f"set local {name} = 0;" for name in unlimited)
    return f"begin isolation level read committed; set local lock_timeout = '{LOCK_TIMEOUT}'; {settings}"
