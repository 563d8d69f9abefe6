"""What boot reads of a PostgreSQL database, and what it does under the advisory lock."""

import asyncio
import contextlib
import functools
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runtime_repo.catalog import LEDGER, Catalog, Ledger, Look
from runtime_repo.database import Busy, Row
from runtime_repo.errors import Difference
from runtime_repo.postgres.catalog import Text, ledger_from_csv, tables_from_rows, text_from_copy
from runtime_repo.postgres.target import NO_LIMIT, rolled_back
from runtime_repo.queries import fill
from runtime_repo.shielding import finish

if TYPE_CHECKING:
    from runtime_repo.postgres.target import Connection

__all__ = ["LOCK_TIMEOUT", "BootTransaction", "Looks", "begin"]

LOCK_TIMEOUT = "100ms"
"""How long one try may queue live traffic behind it while it waits for a table."""

_GLANCE = 1.0
"""Seconds after which a look that only names the ledger gives way to one that says what it waits for."""

_BOUNDED = f"set local lock_timeout = '{LOCK_TIMEOUT}'; set local quote_all_identifiers = off;"
"""How the server is told to spell names must not look like drift."""

_WATCHFUL = (
    "set local tcp_keepalives_idle = 10; set local tcp_keepalives_interval = 5; set local tcp_keepalives_count = 3;"
    "set local tcp_user_timeout = 15000;"
)
"""
The server notices within half a minute that the booter's machine is gone: until then it keeps the lock and the tables'
locks, by its own default for two hours. Where it cannot, or the connection is no TCP, this sets nothing.
"""


class Looks:
    """Reads the ledger and the live catalog of one runtime schema."""

    def __init__(self, schema: str, tokens: Mapping[str, str], queries: Mapping[str, str]) -> None:
        self._schema = schema
        self.tokens = tokens
        self.queries = queries
        self._has_found_nothing = False

    async def look(self, connection: "Connection", shipped: Sequence[Catalog]) -> Look:
        if problem := _encoding_problem(connection):
            return Look(None, Catalog(), problems=(problem,))
        # To read a table that is locked waits for it. The close look, which has a limit, finds out whether it is that.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GLANCE):
                if look := await self.recognize(connection, shipped):
                    return look
        around, is_readable = await self.look_around(connection, shipped)
        if around.problems or not around.names:
            return around
        # Several statements must see one state, or a migration that commits between them would look like drift.
        try:
            await connection.execute(f"begin isolation level repeatable read read only; {_BOUNDED}", timeout=NO_LIMIT)
            return await self.look_closely(connection, shipped, around, is_readable=is_readable)
        finally:
            await finish(rolled_back(connection))

    async def recognize(self, connection: "Connection", shipped: Sequence[Catalog]) -> Look | None:
        """
        The look, in two round trips, if the catalog's text is that of the newest version; in one if there is nothing.

        Where strangers own what is all as we made it, one more tells who they are.
        """
        nothing = Look(None, Catalog(), namespace=False)
        if (
            self._has_found_nothing
            and await connection.execute(self.queries["schema.is_nothing"], timeout=NO_LIMIT) == "SELECT 1"
        ):
            return nothing
        text = await self._text(connection, shipped)
        self._has_found_nothing = text.is_nothing
        if text.is_nothing:
            return nothing
        if text.fingerprint != shipped[-1].fingerprint:
            return None
        look = Look(None, shipped[-1])
        if not text.is_trusted:
            around, _ = await self.look_around(connection, shipped)
            if around.problems:
                return None
            look = replace(around, catalog=shipped[-1])
        return replace(look, ledger=await self._ledger(connection))

    async def look_around(self, connection: "Connection", shipped: Sequence[Catalog]) -> tuple[Look, bool]:
        """
        What stands in the way, and which names are taken, in one statement that reads nothing of a stranger's; and
        whether the ledger may be named.
        """
        newest = shipped[-1].tables
        indexes = (index for table in newest.values() for index in table.indexes)
        names = list(dict.fromkeys([LEDGER, *newest, *indexes]))
        qualified = self._qualified(names)
        row, *_ = await connection.fetch(
            self.queries["schema.surroundings"], self.tokens["schema"], qualified, timeout=NO_LIMIT
        )
        around = Look(
            None,
            Catalog(),
            namespace=row["namespace"],
            names=frozenset(name for name, full in zip(names, qualified, strict=True) if full in row["taken"]),
            problems=tuple(_problems(row)),
            reservations=tuple(self._strangers(row)),
        )
        ledger = f"{self.tokens['schema']}.{LEDGER}"
        is_planted = ledger in row["theirs"] and not around.names & (newest.keys() - {LEDGER})
        return around, row["readable"] and not is_planted

    def _strangers(self, row: Row) -> Iterator[Difference]:
        """Whoever may change at any time what is ours: the schema's owner, and those of tables in it."""
        trusted = f"owned by {row['role']}, a role that it belongs to, the database's owner or a superuser"
        found = "owned by {}, who may change it at any time: migrate as that role, or change the owner"
        if row["stranger"]:
            yield Difference(f"schema {self._schema}", trusted, found.format(row["stranger"]))
        for table, owner in sorted(zip(row["theirs"], row["owners"], strict=True)):
            if owner != row["stranger"]:
                yield Difference(f"table {table.rpartition('.')[2]}", trusted, found.format(owner))

    async def look_closely(
        self, connection: "Connection", shipped: Sequence[Catalog], around: Look, *, is_readable: bool
    ) -> Look:
        """
        The catalog first, then the ledger if there is one: naming a missing one would abort the transaction.

        One that is not readable is taken for somebody else's.

        Raises:
            Busy: An index went away while it was read, for PostgreSQL describes one as it is now, not as the snapshot
                has it: somebody is migrating.
        """
        names = [LEDGER, *shipped[-1].tables]
        rows = await connection.fetch(self.queries["schema.catalog"], self._schema, names, timeout=NO_LIMIT)
        attached = await connection.fetch(self.queries["schema.attached"], self._schema, names, timeout=NO_LIMIT)
        tables = tables_from_rows([row for row in rows if row["relname"] is not None], attached)
        if tables is None:
            raise Busy
        catalog = Catalog(tables)
        if catalog.has_ledger and not is_readable:
            # A migration may have committed it since.
            around, is_readable = await self.look_around(connection, shipped)
        if not catalog.has_ledger or not is_readable:
            return replace(around, catalog=catalog, namespace=bool(rows))
        ledger = await self._ledger(connection)
        text = (await self._text(connection, shipped)).fingerprint
        known = next((catalog for catalog in shipped if catalog.fingerprint == text), Catalog(tables, text))
        return replace(around, ledger=ledger, catalog=known)

    async def _text(self, connection: "Connection", shipped: Sequence[Catalog]) -> Text:
        """The live catalog's text, unprepared: in one round trip."""
        names = ", ".join(_literal(name) for name in self._qualified(sorted(shipped[-1].tables)))
        # The last, for the schema may be called so, too.
        head, _, tail = self.queries["schema.look"].rpartition("$1")
        query = f"{head}array[{names}]{tail}"
        return text_from_copy(await _copied(connection.copy_from_query, query))

    async def _ledger(self, connection: "Connection") -> Ledger | None:
        """The ledger, of a table: COPY has no plan, by which a stranger's code could run."""
        copy = functools.partial(connection.copy_from_table, LEDGER, schema_name=self._schema, format="csv")
        return ledger_from_csv(await _copied(copy, columns=["version", "name", "applied_at_ms"]))

    def _qualified(self, names: Iterable[str]) -> list[str]:
        return [f"{self.tokens['schema']}.{name}" for name in names]


async def _copied(copy: Callable[..., Awaitable[str]], *args: Any, **options: Any) -> str:
    """What the server copies out."""
    found = bytearray()

    async def more(data: bytes) -> None:
        found.extend(data)

    await copy(*args, **options, output=more, timeout=NO_LIMIT)
    return found.decode()


def _literal(text: str) -> str:
    """As it stands in a statement, whatever the session's settings are."""
    return "e'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _encoding_problem(connection: "Connection") -> str | None:
    encoding = connection.get_settings().server_encoding
    if encoding == "UTF8":
        return None
    return (
        f"its encoding is {encoding}, expected UTF8, since ids and payloads may hold any character: create a database "
        "with encoding 'UTF8' and template template0, and restore into that"
    )


def _problems(row: Row) -> Iterator[str]:
    names = _names(row["path"])
    if {*names[: names.index("pg_catalog")]} - {"pg_temp"} if "pg_catalog" in names else ():
        yield (
            f"the session's search_path puts another schema before pg_catalog ({row['path']}), where functions may be "
            f"planted that run as {row['role']}: remove pg_catalog from the role's or database's search_path, or let "
            "it come first"
        )
    if row["hidden"]:
        yield (
            f"row-level security hides rows of {', '.join(row['hidden'])} from {row['role']}: disable it, or exempt "
            "the role (alter role ... bypassrls)"
        )
    for trap in row["traps"]:
        yield (
            f"{trap} may run code of the table's owner as {row['role']} when the table is only named: "
            "drop it, or change the table's owner"
        )


def _names(path: str) -> list[str]:
    """The schemas that a search_path names, whether there are such or not."""
    found = re.findall(r'"((?:[^"]|"")*)"|([^\s,"]+)', path)
    return [quoted.replace('""', '"') if quoted else bare.lower() for quoted, bare in found]


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

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        with self._translated():
            return await self._connection.fetch(self._looks.queries[query], *args, timeout=NO_LIMIT)

    async def execute(self, query: str) -> None:
        # Not prepared: one round trip instead of two.
        with self._translated():
            await self._connection.execute(self._looks.queries[query], timeout=NO_LIMIT)

    async def script(self, text: str) -> None:
        text = fill(text, self._looks.tokens)
        with self._translated():
            await self._connection.execute(text, timeout=NO_LIMIT)

    async def ask(self, text: str) -> Sequence[Row]:
        with self._translated():
            # Rolled back, for it would keep locks on our tables from the operator's own step.
            await self._connection.execute("savepoint asked", timeout=NO_LIMIT)
            rows: Sequence[Row] = await self._connection.fetch(fill(text, self._looks.tokens), timeout=NO_LIMIT)
            await self._connection.execute("rollback to savepoint asked; release savepoint asked", timeout=NO_LIMIT)
        return rows

    async def look(self, shipped: Sequence[Catalog]) -> Look:
        with self._translated():
            async with asyncio.timeout(self._look_timeout):
                return await self._look(shipped)

    async def _look(self, shipped: Sequence[Catalog]) -> Look:
        if look := await self._looks.recognize(self._connection, shipped):
            return look
        around, is_readable = await self._looks.look_around(self._connection, shipped)
        if around.problems or not around.names:
            return around
        return await self._looks.look_closely(self._connection, shipped, around, is_readable=is_readable)


def begin(server: int, mode: str = "isolation level read committed") -> str:
    """
    Begin as boot needs it, whatever the role's settings are: a fresh snapshot for each statement, no waiting behind
    live traffic, no end to an index build or a backup by the clock, and a near one if the booter's machine is gone.
    """
    unlimited = ["statement_timeout", "idle_in_transaction_session_timeout"]
    if server >= 17:
        unlimited.append("transaction_timeout")
    settings = "".join(f"set local {name} = 0;" for name in unlimited)
    return f"begin {mode}; {_BOUNDED} {_WATCHFUL} {settings}"
