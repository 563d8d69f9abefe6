"""The connection by which leases are renewed: it never waits behind the work, and whatever is silent is given up."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from runtime_repo.database import Row, Transaction
from runtime_repo.errors import ConfigurationError, RepositoryClosedError
from runtime_repo.postgres.target import PATIENCE, SUSPECT, closed, is_gone, released, terminated
from runtime_repo.shielding import leave

if TYPE_CHECKING:
    from runtime_repo.postgres.target import Connection, Pool

__all__ = ["Heartbeats"]

_LEAST = 2
"""Connections that a pool needs: one for heartbeats, one for everything else."""


class Heartbeats:
    """
    Queries on a connection of their own, which is made for the first of them and kept.

    They take turns. One that is cancelled, or gets no answer in time, takes the connection with it at once: it waits
    for nobody, and the next one connects anew. But a connection that is just being made is everybody's: who gives up
    leaves it to the next one, unless it has had its time.

    Args:
        connect: A new connection; of a pool that was given, one of the pool's.
        run: Runs a query on a connection, in bounded time.
        pool: The pool that was given, if one was.
    """

    def __init__(
        self,
        connect: Callable[[], Coroutine[Any, Any, "Connection"]],
        run: Callable[["Connection", str, Sequence[object]], Coroutine[Any, Any, Sequence[Row]]],
        pool: "Pool | None",
    ) -> None:
        self._connect = connect
        self._run = run
        self._pool = pool
        self._turn = asyncio.Lock()
        self._connection: Connection | None = None
        self._answered_at = 0.0
        self._connecting: asyncio.Task[None] | None = None
        self._began_at = 0.0

    async def reserve(self) -> None:
        """
        Take a connection of the pool that was given before the work has all of them.

        Raises:
            ConfigurationError: The pool is too small.
            DatabaseUnavailableError: None became free in time.
        """
        if self._pool is None:
            return
        if (size := self._pool.get_max_size()) < _LEAST:
            raise ConfigurationError(
                f"the pool that was given has max_size={size}, and heartbeats need a connection of their own: expected "
                f"a pool of {_LEAST} or more, or of 3 to be told of new work as well (LISTEN)"
            )
        async with self._turn:
            await self._connected()

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        """Run a named query as one atomic step and return its rows."""
        rows, _ = await self.ask(query, *args)
        return rows

    async def ask(self, query: str, *args: object) -> tuple[Sequence[Row], float]:
        """As ``fetch``; return also when it was sent, by ``time.monotonic()``."""
        async with self._turn:
            connection = await self._connected()
            asked_at = time.monotonic()
            try:
                rows = await self._run(connection, query, args)
            except BaseException:
                # Also where the server has answered: an error is so rare that its connection is not worth judging.
                self.drop()
                raise
            self._answered_at = time.monotonic()
            return rows, asked_at

    def atomic(self) -> AbstractAsyncContextManager[Transaction]:
        raise ConfigurationError("heartbeats are single statements: use the repository for a transaction")

    def tell(self, queues: Iterable[str]) -> None:
        """Nobody waits for a heartbeat."""

    def drop(self) -> None:
        """Let the next one connect anew."""
        connection, self._connection = self._connection, None
        terminated(connection)

    def doubt(self, seconds: float) -> None:
        """Somebody else has had no answer for so long: let the next one connect anew, unless one was answered since."""
        if self._answered_at < time.monotonic() - seconds:
            self.drop()

    def abandon(self) -> None:
        """Leave no connection, without waiting for that."""
        self._give_up()
        self.drop()

    async def close(self, within: float = PATIENCE) -> None:
        """Leave no connection. May be repeated."""
        if (connecting := self._give_up()) is not None:
            await asyncio.wait([connecting], timeout=within)
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._pool is None:
            await closed(connection, within)
        else:
            await released(self._pool, connection, within)

    async def _connected(self) -> "Connection":
        while self._connection is None or is_gone(self._connection):
            connecting = self._connecting
            if connecting is None or connecting.done():
                connecting = self._connecting = asyncio.create_task(self._make(), name="runtime_repo heartbeats")
                # Of one that fails while nobody waits for it nobody has to know.
                connecting.add_done_callback(lambda made: made.cancelled() or made.exception())
                self._began_at = time.monotonic()
            try:
                await asyncio.wait([connecting])
            except asyncio.CancelledError:
                if time.monotonic() - self._began_at >= SUSPECT:
                    self._give_up()
                raise
            if connecting.cancelled():
                raise RepositoryClosedError("the repository was closed: construct another")
            connecting.result()
        return self._connection

    async def _make(self) -> None:
        self._connection = await self._connect()
        self._answered_at = time.monotonic()

    def _give_up(self) -> "asyncio.Task[None] | None":
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            leave(connecting)
        return connecting
