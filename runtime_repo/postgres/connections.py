"""Where to connect and how, and how a connection is closed, given back and rolled back."""

import asyncio
import contextlib
import inspect
import os
import re
import ssl
import weakref
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Never, cast
from urllib.parse import urlsplit

import asyncpg

from runtime_repo.errors import ConfigurationError

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Pool = asyncpg.Pool[asyncpg.Record]
    Lent = PoolConnectionProxy[asyncpg.Record]
    Connection = asyncpg.Connection[asyncpg.Record] | Lent

__all__ = ["CLOSE_TIMEOUT", "DRIVER_ERRORS", "Target", "bare", "closed", "is_transient", "released", "rolled_back"]

DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)

CLOSE_TIMEOUT = 5.0
"""Seconds for saying goodbye to the server, before the connections are dropped."""

_POOL_OPTIONS = set(inspect.signature(asyncpg.create_pool).parameters) - {"connection_class", "record_class"}
"""What a pool keeps for itself; it passes everything else to its connections."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:,]*)(:\d*)?")


class Target:
    """Where to connect, and how; its repr shows no secret, and it cannot be pickled."""

    def __init__(self, dsn: "str | Pool", options: dict[str, Any]) -> None:
        self.pool = dsn if isinstance(dsn, asyncpg.Pool) else None
        self._dsn = dsn if isinstance(dsn, str) else ""
        self._connect = options.get("connect") or asyncpg.connect
        self._init = options.get("init")
        self._setup = options.get("setup")
        self._is_tuned = bool(options)
        self._made: weakref.WeakSet[asyncpg.Connection[asyncpg.Record]] = weakref.WeakSet()
        self.can_reuse = not isinstance(dsn, asyncpg.Pool) and not options.keys() & {"setup", "reset"}
        """Whether a connection may be used again before the pool has it back: it is ours, and calls nobody at that."""
        # What we leave behind is no session state, so a connection needs no round trip to be reset.
        self._options: dict[str, Any] = {"min_size": 0, "reset": _nothing_to_reset} | options | {"init": None}
        self._shown = "an existing pool"
        if self.pool is None:
            self._shown = _shown(dsn) if isinstance(dsn, str) else ""
            problem = None if self._shown else "it is no postgresql:// URL that can be parsed"
        else:
            problem = "an existing pool has its options already" if options else None
        dsn, options = "", {}
        if problem:
            raise ConfigurationError(
                f"the DSN cannot be used: {problem}; expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with "
                "special characters percent-encoded (it is not repeated here, since it may hold a password)"
            )

    def __repr__(self) -> str:
        return self._shown

    def __reduce__(self) -> Never:
        raise ConfigurationError(f"{self!r} cannot be pickled or copied: it may hold a password; construct another")

    @property
    def is_eager(self) -> bool:
        """Whether the pool shall have connections before somebody wants one."""
        return bool(self._options["min_size"] or self._options.get("init_size"))

    def new_pool(self, connect: Callable[..., Awaitable["Connection"]]) -> "Pool":
        """A pool, not yet open, that connects by *connect*."""
        return asyncpg.create_pool(self._dsn, **self._options | {"connect": connect})

    async def lend(self) -> "Connection":
        """A connection as a pool lends it: a plain one, which costs less than to make and close a pool for it."""
        if self.pool is not None:
            await self.pool
            return await self.pool.acquire()
        if self._is_tuned:
            asyncpg.create_pool(self._dsn, **self._options)  # not to be used: it refuses sizes that cannot be meant
        options = {name: value for name, value in self._options.items() if name not in _POOL_OPTIONS}
        return await self.connect(self._dsn, setup=self._setup, **options)

    async def connect(self, *args: Any, setup: Callable[..., Any] | None = None, **options: Any) -> "Connection":
        """Connect as asyncpg's pools do, for the pool or instead of it."""
        connection: Connection = await self._connect(*args, **options)
        self._made.add(cast("asyncpg.Connection[asyncpg.Record]", connection))
        try:
            for prepare in (self._init, setup):
                if prepare is not None:
                    await prepare(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    def check_loop(self) -> None:
        """
        Let a pool be used that was given.

        Raises:
            ConfigurationError: It belongs to another event loop.
        """
        # There is no public way to its loop.
        if self.pool is not None and getattr(self.pool, "_loop", None) is not asyncio.get_running_loop():
            raise ConfigurationError(
                "the pool belongs to another event loop, or to the parent of this process: create one here"
            )

    def inherited(self) -> None:
        """
        In the child of a fork: put nothing in the place of each socket, without shutting it down.

        So the server sees at once when the parent ends, whatever the child does, and rolls back what it had begun.
        """
        nothing = os.open(os.devnull, os.O_RDWR)
        for connection in list(self._made):
            # One that is closed has no socket; one whose socket cannot be found stays as it is.
            with contextlib.suppress(AttributeError, OSError, ValueError):
                # There is no public way to it.
                transport: Any = getattr(connection, "_transport", None)
                os.dup2(nothing, transport.get_extra_info("socket").fileno(), inheritable=False)
        os.close(nothing)


def _shown(dsn: str) -> str:
    """The DSN without what may be secret: the password, and the query, where asyncpg takes one too."""
    try:
        dsn.encode()
        parts = urlsplit(dsn)
        _, _, hosts = parts.netloc.rpartition("@")
        user = parts.username
    except ValueError:
        return ""
    if parts.scheme not in ("postgresql", "postgres") or "\0" in dsn:
        return ""
    if "@" in parts.path + parts.query + parts.fragment or not all(map(_HOST.fullmatch, hosts.split(","))):
        # A character of the password that should have been encoded cuts it wrongly: its rest may be anywhere.
        return f"{parts.scheme}://..."
    return f"{parts.scheme}://{f'{user}@' if user else ''}{hosts}{parts.path}"


async def _nothing_to_reset(_connection: "Connection") -> None:
    pass


async def closed(opened: "Pool | Connection") -> None:
    """Say goodbye to the server; drop what is open when it does not answer."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await opened.close()
    except (TimeoutError, *DRIVER_ERRORS):
        opened.terminate()


async def released(pool: "Pool", connection: "Connection") -> None:
    # One that cannot be reset is dropped by its pool.
    with contextlib.suppress(*DRIVER_ERRORS):
        await pool.release(cast("Lent", connection))


async def rolled_back(connection: "Connection", rollback: str = "rollback") -> None:
    # A connection that is gone has rolled back already.
    with contextlib.suppress(*DRIVER_ERRORS):
        await connection.execute(rollback)


def is_transient(error: BaseException) -> bool:
    """Whether the server may accept the very same connection a moment later."""
    if isinstance(error, asyncpg.PostgresConnectionError):
        return not isinstance(error, asyncpg.ProtocolViolationError)
    return isinstance(
        error,
        (
            asyncpg.CannotConnectNowError,
            asyncpg.TooManyConnectionsError,
            asyncpg.exceptions.TargetServerAttributeNotMatched,
            OSError,
        ),
    ) and not isinstance(error, ssl.SSLError)


def bare(error: BaseException) -> BaseException:
    """The error without the frames behind it: asyncpg's hold the password in their locals."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
