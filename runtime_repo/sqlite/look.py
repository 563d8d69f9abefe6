"""What boot reads of a SQLite database."""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from runtime_repo.catalog import LEDGER, Catalog, Look
from runtime_repo.sqlite.catalog import catalog_from_rows, fingerprint, ledger_from_rows
from runtime_repo.sqlite.connection import Connection

__all__ = ["looking"]


def looking(queries: Mapping[str, Sequence[str]], shipped: Sequence[Catalog]) -> Callable[[Connection], Look]:
    """The look: the ledger and the live catalog."""
    ours = [LEDGER, *shipped[-1].tables]
    span = {"1": min(ours), "2": max(ours)}
    known: dict[str | None, Catalog] = {catalog.fingerprint: catalog for catalog in shipped if catalog.fingerprint}

    def glance(connection: Connection) -> Look:
        try:
            rows = connection.execute(queries["schema.look"][0], span).fetchall()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                raise
            return Look(None, Catalog())  # a ledger that is missing, or not ours, is not even parsed
        text = fingerprint(rows)
        return Look(ledger_from_rows(rows), known.get(text, Catalog(fingerprint=text)))

    def work(connection: Connection) -> Look:
        look = glance(connection)
        if look.catalog.tables:
            return look
        # The text is unknown. Several statements must see one state, or a migration that commits between them
        # would look like drift.
        names = {"1": json.dumps(ours)}
        own = not connection.in_transaction
        if own:
            connection.execute("begin")
        try:
            columns = connection.execute(queries["schema.columns"][0], names).fetchall()
            indexes = connection.execute(queries["schema.indexes"][0], names).fetchall()
            # Last, for the first statement that succeeds fixes the state, and this one may fail.
            look = glance(connection)
        finally:
            if own:
                connection.rollback()
        catalog = replace(catalog_from_rows(columns, indexes, shipped[-1]), fingerprint=look.catalog.fingerprint)
        return Look(look.ledger if catalog.has_ledger else None, catalog)

    return work
