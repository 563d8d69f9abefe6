"""What boot reads of a SQLite database."""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from runtime_repo.catalog import LEDGER, Catalog, Look
from runtime_repo.sqlite.catalog import catalog_from_rows, fingerprint, ledger_from_rows
from runtime_repo.sqlite.connection import Connection
from runtime_repo.sqlite.statements import Prepared

__all__ = ["inspecting", "looking"]


def inspecting(queries: Mapping[str, Prepared], shipped: Sequence[Catalog]) -> Callable[[Connection], Look]:
    """The look, and what one that is not to lead to a boot asks besides."""
    look = looking(queries, shipped)

    def work(connection: Connection) -> Look:
        found = look(connection)
        if not found.is_newer(shipped):
            return found
        rows = queries["control.oldest"].run(connection, ())
        return replace(found, oldest=rows[0]["value_json"] if rows else None)

    return work


def looking(queries: Mapping[str, Prepared], shipped: Sequence[Catalog]) -> Callable[[Connection], Look]:
    """The look: the ledger and the live catalog."""
    newest = shipped[-1].tables
    ours = [LEDGER, *newest]
    span = min(ours), max(ours)
    known: dict[str | None, Catalog] = {catalog.fingerprint: catalog for catalog in shipped if catalog.fingerprint}

    def glance(connection: Connection) -> Look:
        # To plan a view that bears the ledger's name costs nothing, but to read it may never end.
        if not queries["schema.is_table"].run(connection, (LEDGER,))[0]["is_table"]:
            return Look(None, Catalog())
        try:
            rows = queries["schema.look"].run(connection, span)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                raise
            return Look(None, Catalog())  # a ledger that is not ours is not even parsed
        text = fingerprint(rows)
        return Look(ledger_from_rows(rows), known.get(text, Catalog(fingerprint=text)))

    def work(connection: Connection) -> Look:
        look = glance(connection)
        if look.catalog is shipped[-1]:
            return look
        # Several statements must see one state, or a migration that commits between them would look like drift.
        names = (json.dumps(ours),)
        every = (json.dumps([*ours, *(index for table in newest.values() for index in table.indexes)]),)
        own = not connection.in_transaction
        if own:
            connection.execute("begin")
        try:
            taken = queries["schema.names"].run(connection, every)
            columns = queries["schema.columns"].run(connection, names)
            indexes = queries["schema.indexes"].run(connection, names)
            triggers = queries["schema.triggers"].run(connection, names)
            # Last, for the first statement that succeeds fixes the state, and this one may fail.
            look = glance(connection)
        finally:
            if own:
                connection.rollback()
        look = replace(look, names=frozenset(row["name"] for row in taken))
        if look.catalog.tables:
            return look
        catalog = catalog_from_rows(columns, indexes, shipped[-1], triggers)
        catalog = replace(catalog, fingerprint=look.catalog.fingerprint)
        return replace(look, ledger=look.ledger if catalog.has_ledger else None, catalog=catalog)

    return work
