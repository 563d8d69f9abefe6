"""The repository class of PostgreSQL."""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal

import asyncpg

from runtime_repo.archive import checked_path
from runtime_repo.errors import ConfigurationError
from runtime_repo.observing import Observe
from runtime_repo.postgres.database import PostgresDatabase
from runtime_repo.postgres.dump import DumpReport
from runtime_repo.postgres.target import Target
from runtime_repo.repository import RuntimeRepository, RuntimeTransaction, check_flag

if TYPE_CHECKING:
    from runtime_repo.postgres.target import Connection, Pool

__all__ = ["PostgresRuntimeRepository"]


class PostgresRuntimeRepository(RuntimeRepository):
    """
    The store on PostgreSQL 14 and newer: any number of machines.

    Construction does no I/O. ``await`` it, or enter it with ``async with``: either brings the runtime schema to what
    this release knows before anything can be queried. Any number of workers may do so at once, also under a role that
    may only read when nothing is pending, and behind a transaction-pooling pgbouncer (with ``statement_cache_size=0``).

    Args:
        dsn: ``postgresql://user:password@host:port/database``, as asyncpg reads it, or an asyncpg pool that is open:
            it is used and never closed.
        schema: The namespace that holds the ledger and every table. Two of them in one database are independent.
        migrate: False is verify-only: nothing is written, and pending migrations refuse the boot.
        on_drift: ``"warn"`` serves although the structure has drifted, and logs every difference.
        before_migrate: A coroutine function that runs once, under the lock, before the first migration is applied:
            the place for a backup.
        lock_timeout: Seconds to wait for another process's migration, or for the locks of live traffic.
        startup_timeout: Seconds for connecting. A server that refuses connections, is starting or is full, and a name
            that does not resolve yet, are tried again until then, and so is one that stays silent, of several in the
            DSN the next; a wrong password or a missing database fail at once. Boot's looks have as long, and its
            migrations no limit.
        verb_timeout: Seconds for a verb, and for each statement, begin and commit of a transaction: without an answer
            until then the database is unavailable. None is no limit.
        listen: Whether ``attempts.wait`` and ``Worker`` are told of new work by the server, on one connection of their
            own from the first wait on (of a pool that is given, one of its connections, if it may have more than two:
            one is for heartbeats). False polls once a second instead: behind a transaction-pooling pgbouncer nobody can
            listen, which is found out otherwise, with a warning.
        observe: Is called with an event for whatever happens: a boot's step, a migration, a statement with its duration
            and error, a claim, a completion, a failure, a lost lease, a sweep, an outage.
            What it raises is logged once.
        pool_options: Passed to ``asyncpg.create_pool``. ``min_size`` is 0 unless given.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    def __init__(
        self,
        dsn: "str | Pool",
        *,
        schema: str = "runtime",
        migrate: bool = True,
        on_drift: Literal["refuse", "warn"] = "refuse",
        before_migrate: Callable[[], Awaitable[object]] | None = None,
        lock_timeout: float = 60.0,
        startup_timeout: float = 30.0,
        verb_timeout: float | None = 30.0,
        listen: bool = True,
        observe: Observe | None = None,
        **pool_options: Any,
    ) -> None:
        try:
            target = Target(dsn, pool_options)
        finally:
            # From here on no frame of ours holds a password that a traceback with locals could show.
            dsn, pool_options = "", {}
        check_flag("listen", listen)
        self._postgres = PostgresDatabase(
            target, schema=schema, startup_timeout=startup_timeout, verb_timeout=verb_timeout, listen=listen
        )
        super().__init__(
            self._postgres,
            migrate=migrate,
            on_drift=on_drift,
            before_migrate=before_migrate,
            lock_timeout=lock_timeout,
            observe=observe,
        )

    async def pg_dump(self, path: str | os.PathLike[str], *, program: str = "pg_dump") -> DumpReport:
        """
        Write the runtime schema into the new file *path* by PostgreSQL's own ``pg_dump``, in its custom format.

        For whoever wants to restore with ``pg_restore``; ``backup`` needs no client tool, and can be restored by
        ``restore``. As ``backup`` it needs no boot. The file is readable for its owner alone, is looked through by the
        ``pg_restore`` beside it before it gets its name, and never takes the place of another.

        Args:
            path: Where it goes.
            program: Which ``pg_dump``; it must be of the server's major version.

        Raises:
            ArchiveError: There is such a file, it cannot be written, or ``pg_dump`` failed; with its last words.
            ConfigurationError: The program cannot be run or is of another version, or the repository is open in another
                event loop or process, or this task has a transaction open.
            DatabaseUnavailableError: The database cannot be reached.
            RepositoryClosedError: The repository was closed.
        """
        with self._looking():
            return await self._postgres.dump(checked_path(path), program=program, patience=self._policy.lock_timeout)

    @contextlib.asynccontextmanager
    async def transaction(self, connection: "Connection | None" = None) -> AsyncIterator[RuntimeTransaction]:
        """
        Let several verbs, and the application's own statements, take effect together.

        With a *connection* of the application's own to the same database, on which a transaction is open, they are a
        part of that transaction: they are committed or rolled back with it, and when the block raises they alone are
        undone (a savepoint). Otherwise as in ``RuntimeRepository.transaction``.

        Raises:
            ConfigurationError: No transaction is open on *connection*; this task has a transaction open on this
                repository already, or the repository is open in another event loop or process.
            RepositoryClosedError: The repository is not open.
            DatabaseUnavailableError: The database cannot be reached, or does not commit.
        """
        if connection is not None and not _is_in_transaction(connection):
            raise ConfigurationError(
                "no transaction is open on the connection: begin one first (async with connection.transaction()), "
                "or leave the connection out"
            )
        part = None if connection is None else self._postgres.part_of_theirs(connection)
        async with self._transaction(part) as transaction:
            yield transaction


def _is_in_transaction(connection: "Connection") -> bool:
    # One that was given back to its pool does not even answer.
    with contextlib.suppress(asyncpg.InterfaceError):
        return connection.is_in_transaction()
    return False
