"""Where to connect and how, and how a connection is closed, given back and rolled back."""

import asyncio
import contextlib
import inspect
import itertools
import os
import re
import socket
import ssl
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Never, cast
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg

from runtime_repo.errors import ConfigurationError
from runtime_repo.shielding import CLEAN_UP

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Pool = asyncpg.Pool[asyncpg.Record]
    Lent = PoolConnectionProxy[asyncpg.Record]
    Connection = asyncpg.Connection[asyncpg.Record] | Lent

__all__ = [
    "DRIVER_ERRORS",
    "NO_LIMIT",
    "PATIENCE",
    "SUSPECT",
    "Target",
    "Unusable",
    "alive",
    "closed",
    "is_gone",
    "is_transient",
    "released",
    "rolled_back",
    "terminated",
]

DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)

PATIENCE = CLEAN_UP - 0.2
"""Seconds for the server's answer in a clean-up; then its connection is terminated, before itself is given up."""

NO_LIMIT = 1e9
"""Seconds, for the driver: None would be the application's own command_timeout."""

_TRY = 5.0
"""Seconds in which one server, of one or several, has to answer who connects, unless it has been seen to need more."""

_NEXT_TRY = 1.25
_HURRIED_TRY = 0.5
"""The same for each of several once one of them has answered, and for who has a lease to keep."""

_MOST_VAIN = 4
"""How often that doubles: as often as it takes to come to a server's usual time."""

SUSPECT = 0.25
"""Seconds after which whoever gives up connecting has had a reason to, unless the server is known to be as slow."""

_FIRST_STEPS = 0.05
"""Seconds for which nobody cancels the driver's connect: what has just begun would be left open, or logged as lost."""

_SILENT_FOR = 30.0
"""Seconds for which a server that was silent is tried after the others."""

_POOL_OPTIONS = set(inspect.signature(asyncpg.create_pool).parameters) - {"connection_class", "record_class"}
"""What a pool keeps for itself; it passes everything else to its connections."""

_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:,]*)(:\d*)?")

_KEEPALIVE = (
    ("SOL_SOCKET", "SO_KEEPALIVE", 1),
    ("IPPROTO_TCP", "TCP_KEEPIDLE", 10),
    ("IPPROTO_TCP", "TCP_KEEPALIVE", 10),  # macOS's name for it
    ("IPPROTO_TCP", "TCP_KEEPINTVL", 5),
    ("IPPROTO_TCP", "TCP_KEEPCNT", 3),
    ("IPPROTO_TCP", "TCP_USER_TIMEOUT", 15_000),
)
"""A peer that is gone is noticed within half a minute: by who waits for it, since the driver sets nothing of this."""


class Unusable(Exception):  # noqa: N818 - between the driver and the database; it never leaves the package
    """The driver can't make anything of the DSN or the options. Its own words, which may repeat a part, stay behind."""


@dataclass
class _Host:
    """One of the servers, as options that win over the DSN's, and what connecting to it was like."""

    options: dict[str, Any]
    took: float = 0.0
    """Seconds that the slowest answer of the last ones took."""
    silent_at: float = 0.0
    """When it was found silent; 0 once it has answered."""
    waiting: dict[asyncio.Timeout, float] = field(default_factory=dict)
    """Of those that connect to it just now how long each waits, and until when at least."""

    def answered(self, seconds: float) -> None:
        self.silent_at = 0.0
        self.took = max(seconds, self.took / 2)

    def gave_up(self, seconds: float) -> None:
        """Whoever connected has left after so long: where it might have answered by then, it is silent."""
        if seconds >= max(SUSPECT, min(2 * self.took, _NEXT_TRY)):
            self.silent_at = time.monotonic()

    @contextlib.asynccontextmanager
    async def answering(self, patience: float) -> AsyncIterator[None]:
        """Let the block wait so many seconds for it, or twice as many as it needed lately."""
        slow = 2 * self.took
        async with asyncio.timeout(max(patience, slow)) as limit:
            self.waiting[limit] = asyncio.get_running_loop().time() + max(_HURRIED_TRY, slow)
            try:
                yield
            finally:
                del self.waiting[limit]

    def tell_others(self) -> None:
        """It was silent to one of those who connect: the others, who came later, go on sooner."""
        now = asyncio.get_running_loop().time()
        for limit, at_least in self.waiting.items():
            when = limit.when()
            if when is not None and not limit.expired():
                limit.reschedule(min(when, max(now, at_least)))


class Target:
    """Where to connect, and how; its repr shows no secret, and it cannot be pickled."""

    def __init__(self, dsn: "str | Pool", options: dict[str, Any]) -> None:
        self.pool = dsn if isinstance(dsn, asyncpg.Pool) else None
        self._dsn = dsn if isinstance(dsn, str) else ""
        self._connect = options.get("connect")
        self._init = options.get("init")
        self._setup = options.get("setup")
        self._is_tuned = bool(options)
        self._made: weakref.WeakSet[asyncpg.Connection[asyncpg.Record]] = weakref.WeakSet()
        # Connections that are still being made, and those of them that nobody waits for any more.
        self._connecting: set[asyncio.Task[Connection]] = set()
        self._left: set[asyncio.Task[Connection]] = set()
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
        # A connect of the application's own finds its way by itself.
        is_found = self.pool is not None or self._connect is not None or not self._shown
        self._hosts = [_Host(host) for host in ([{}] if is_found else _hosts(self._dsn, options))]
        self._rounds = _rounds(self._dsn, options) if len(self._hosts) > 1 else [{}]
        # How often some were silent and none has answered since one did; None is before any has.
        self._vain: int | None = None
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

    def patience(self, startup_timeout: float, *, hurried: bool = False) -> float:
        """For how long, in seconds, one server may be silent to who connects, so that there is time for all of them."""
        usual = _TRY
        if len(self._hosts) > 1 and self._vain is not None:
            # They may all be slow rather than silent.
            usual = min((_HURRIED_TRY if hurried else _NEXT_TRY) * 2**self._vain, _TRY)
        return min(usual, startup_timeout / (len(self._hosts) * len(self._rounds) + 1))

    def new_pool(self, connect: Callable[..., Awaitable["Connection"]]) -> "Pool":
        """
        A pool, not yet open, that connects by *connect*.

        Raises:
            Unusable: asyncpg refuses the options.
        """
        with contextlib.suppress(Exception):
            return asyncpg.create_pool(self._dsn, **self._options | {"connect": connect})
        raise Unusable

    async def lend(self, patience: float) -> "Connection":
        """
        A connection as a pool lends it: a plain one, which costs less than to make and close a pool for it.

        Of a pool that was given it is one of the pool's, however long that takes. *patience* as in ``connect``.
        """
        if self.pool is not None:
            await self.pool
            connection = await self.pool.acquire()
            alive(connection)
            return connection
        if self._is_tuned:
            self.new_pool(asyncpg.connect)  # not to be used: it refuses invalid sizes
        options = {name: value for name, value in self._options.items() if name not in _POOL_OPTIONS}
        return await self.connect(self._dsn, patience=patience, setup=self._setup, **options)

    async def connect(
        self, *args: Any, patience: float, setup: Callable[..., Any] | None = None, **options: Any
    ) -> "Connection":
        """
        Connect as asyncpg's pools do, for the pool or instead of it; each server has *patience* seconds to answer.

        A server that needed longer for its last answer has twice that.

        Raises:
            Unusable: asyncpg cannot make anything of the DSN or the options.
            Exception: Whatever the driver raises, or the application's own *connect*, *init* or *setup*.
        """
        connection = await self._first_of_all(args, options, patience)
        self._made.add(cast("asyncpg.Connection[asyncpg.Record]", connection))
        try:
            alive(connection)
            for prepare in (self._init, setup):
                if prepare is not None:
                    await prepare(connection)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def close(self, within: float) -> None:
        """Leave nothing of what was given up while it connected."""
        if self._left:
            await asyncio.wait(self._left, timeout=within)

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

        So the server sees at once when the parent ends, whatever the child does, and rolls back what it had begun; and
        should the child go on with the event loop, it reads and writes nothing that is the parent's.
        """
        # There is no public way to it. One that is closed has no socket.
        transports: list[Any] = [getattr(connection, "_transport", None) for connection in list(self._made)]
        sockets = [transport.get_extra_info("socket") for transport in transports if transport is not None]
        nothing = os.open(os.devnull, os.O_RDWR)
        for each in (*sockets, *(found for task in self._connecting for found in _sockets(task))):
            # One that cannot be found stays as it is.
            with contextlib.suppress(AttributeError, OSError, ValueError):
                os.dup2(nothing, each.fileno(), inheritable=False)
        os.close(nothing)

    def forget_silence(self) -> None:
        """Try the servers in the order in which they are named: those that answer are not as they should be."""
        for host in self._hosts:
            host.silent_at = 0.0

    async def _first_of_all(self, args: Sequence[Any], options: dict[str, Any], patience: float) -> "Connection":
        """
        The first server that answers as it should; one that was silent a moment ago is as good as not there.

        asyncpg would go through them by itself, but under one time-out for all: one that is silent takes all of it.
        """
        failures: list[Exception] = []
        for wanted, host in self._in_order():
            began = time.monotonic()
            try:
                async with host.answering(patience):
                    connection = await self._connected(args, options | host.options | wanted)
            except asyncio.CancelledError:
                # Whoever has less patience begins with the next server when he tries again.
                host.gave_up(time.monotonic() - began)
                raise
            except Exception as error:
                if not is_transient(error):
                    raise
                if isinstance(error, TimeoutError):
                    host.silent_at = time.monotonic()
                    if len(self._hosts) > 1 and self._vain == 0:
                        host.tell_others()
                failures.append(error)
            else:
                host.answered(time.monotonic() - began)
                self._vain = 0
                return connection
        if self._vain is not None and any(isinstance(failure, TimeoutError) for failure in failures):
            self._vain = min(self._vain + 1, _MOST_VAIN)
        # One that refuses says more than one that is silent.
        raise next((failure for failure in failures if not isinstance(failure, TimeoutError)), failures[0])

    def _in_order(self) -> list[tuple[dict[str, Any], _Host]]:
        """What to ask of which server: in the order that is wanted, but first of those that were not silent lately."""
        since = time.monotonic() - _SILENT_FOR
        return sorted(
            itertools.product(self._rounds, self._hosts),
            key=lambda found: found[1].silent_at if found[1].silent_at > since else 0.0,
        )

    async def _connected(self, args: Sequence[Any], options: dict[str, Any]) -> "Connection":
        """
        A connection of one server.

        Whoever is cancelled does not wait for the driver's end, and neither is the driver cancelled in its first steps:
        between two of them nobody hears how they end but asyncio's log.
        """
        began = time.monotonic()
        connecting = asyncio.create_task(self._connect_now(args, options), name="runtime_repo connect")
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)
        try:
            await asyncio.wait([connecting])
        except asyncio.CancelledError:
            self._left.add(connecting)
            connecting.add_done_callback(self._dropped)
            left = _FIRST_STEPS - (time.monotonic() - began)
            asyncio.get_running_loop().call_later(max(left, 0), connecting.cancel)
            raise
        return connecting.result()

    def _dropped(self, connecting: "asyncio.Task[Connection]") -> None:
        """It has ended, too late."""
        self._left.discard(connecting)
        if not connecting.cancelled() and connecting.exception() is None:
            terminated(connecting.result())

    async def _connect_now(self, args: Sequence[Any], options: dict[str, Any]) -> "Connection":
        is_theirs = self._connect is not None or callable(options.get("password"))
        try:
            connection: Connection = await (self._connect or asyncpg.connect)(*args, **options)
        except Exception as error:
            known = isinstance(error, (asyncpg.PostgresError, OSError)) or type(error) is asyncpg.InterfaceError
            if known or is_transient(error) or (is_theirs and not isinstance(error, (TypeError, ValueError))):
                raise
        else:
            return connection
        # asyncpg meets many things only when they fail it: IndexError, TypeError, its ClientConfigurationError. Raised
        # out here this has no context, whose frames would hold the DSN.
        raise Unusable


def _sockets(task: "asyncio.Task[Any]") -> Iterator[Any]:
    """The sockets of what *task* is about to connect: only the steps that are under way know them yet."""
    step: Any = task.get_coro()
    while (frame := getattr(step, "cr_frame", None)) is not None:
        for value in list(frame.f_locals.values()):
            if isinstance(value, socket.socket):
                yield value
            elif isinstance(value, asyncio.BaseTransport):
                yield value.get_extra_info("socket")
        step = step.cr_await


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


def _hosts(dsn: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Each server that is named, as options that win over the DSN's; where it is only one, or asyncpg has to look
    elsewhere for it or to refuse it, a single one without options.
    """
    try:
        found = list(_named(dsn, options))
    except (ValueError, TypeError, AttributeError):
        found = []
    return found if len(found) > 1 else [{}]


def _named(dsn: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The servers as asyncpg finds them: in the options, in the DSN, in its query, or in the environment."""
    parts = urlsplit(dsn)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    names, port = options.get("host"), options.get("port")
    if isinstance(names, str) or "service" in query or "service" in options:
        return
    netloc = "" if names else parts.netloc.rpartition("@")[2]
    text = netloc or query.get("host") or os.environ.get("PGHOST", "")
    specs = [(name, "") for name in names] if names else [_split(spec, quoted=bool(netloc)) for spec in text.split(",")]
    if not netloc and not port and "port" in query:
        port = query["port"].split(",")
    if not all(name for name, _ in specs):
        return
    ports: list[Any] = list(port) if isinstance(port, (list, tuple)) else [port] * len(specs)
    if not port:
        usual = os.environ.get("PGPORT", "5432").split(",")
        usual = usual * len(specs) if len(usual) == 1 else usual
        ports = [own or other for (_, own), other in zip(specs, usual, strict=True)]
    for (name, _), number in zip(specs, ports * len(specs) if len(ports) == 1 else ports, strict=True):
        yield {"host": name, "port": int(number)}


def _split(spec: str, *, quoted: bool) -> tuple[str, str]:
    """A host and its port, which may be empty."""
    if spec.startswith("/"):
        return spec, ""
    if spec.startswith("["):
        name, _, port = spec[1:].partition("]")
        port = port.removeprefix(":")
    else:
        name, _, port = spec.partition(":")
    return (unquote(name), unquote(port)) if quoted else (name, port)


def _rounds(dsn: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of each server, in as many rounds: asyncpg itself can't prefer one when it is shown one only."""
    with contextlib.suppress(ValueError):
        query = parse_qs(urlsplit(dsn).query).get("target_session_attrs", [None])
        wanted = options.get("target_session_attrs") or query[-1] or os.environ.get("PGTARGETSESSIONATTRS")
        if wanted == "prefer-standby":
            return [{"target_session_attrs": "standby"}, {"target_session_attrs": "any"}]
    return [{}]


def alive(connection: "Connection") -> None:
    """Let the system notice when the other side is gone."""
    # There is no public way to the socket.
    transport = getattr(connection, "_transport", None)
    found = transport.get_extra_info("socket") if transport is not None else None
    if found is not None and found.family in (socket.AF_INET, socket.AF_INET6):
        for level, name, value in _KEEPALIVE:
            if hasattr(socket, name):
                # Some systems know an option and refuse it all the same.
                with contextlib.suppress(OSError):
                    found.setsockopt(getattr(socket, level), getattr(socket, name), value)


def is_gone(connection: "Connection") -> bool:
    """Whether it can't be used any more, also because its pool has it back."""
    with contextlib.suppress(asyncpg.InterfaceError):
        return connection.is_closed()
    return True


def terminated(opened: "Pool | Connection | None") -> None:
    """Let go of it at once, whatever state it and its event loop are in."""
    if opened is not None:
        with contextlib.suppress(Exception):
            opened.terminate()


async def closed(opened: "Pool | Connection", within: float = PATIENCE) -> bool:
    """Say goodbye to the server; drop what is open, and return False, when it does not answer."""
    try:
        async with asyncio.timeout(within):
            await opened.close()
    except TimeoutError:
        opened.terminate()
        return False
    except DRIVER_ERRORS:
        opened.terminate()
    return True


async def released(pool: "Pool", connection: "Connection", within: float = PATIENCE) -> bool:
    """
    Give it back when the server is done with what was cancelled; drop it, and return False, when it does not answer.
    """
    try:
        await pool.release(cast("Lent", connection), timeout=within)
    except TimeoutError:
        # It has been dropped by its pool.
        return False
    except DRIVER_ERRORS:
        # As has one that cannot be reset.
        pass
    return True


async def rolled_back(connection: "Connection", rollback: str = "rollback") -> bool:
    """Roll back; drop the connection, and return False, when the server does not answer."""
    try:
        # It also waits for the end of what was cancelled.
        async with asyncio.timeout(PATIENCE):
            await connection.execute(rollback, timeout=NO_LIMIT)
    except TimeoutError:
        terminated(connection)
        return False
    except DRIVER_ERRORS:
        # A connection that is gone has rolled back already.
        pass
    return True


def is_transient(error: BaseException) -> bool:
    """Whether the server may accept the very same connection a moment later."""
    if isinstance(error, asyncpg.PostgresConnectionError):
        return not isinstance(error, asyncpg.ProtocolViolationError)
    if isinstance(error, RuntimeError):
        # To resolve a name takes a thread.
        return "can't start new thread" in str(error)
    return isinstance(
        error,
        (
            asyncpg.AdminShutdownError,
            asyncpg.CannotConnectNowError,
            asyncpg.CrashShutdownError,
            asyncpg.TooManyConnectionsError,
            asyncpg.exceptions.TargetServerAttributeNotMatched,
            OSError,
        ),
    ) and not isinstance(error, ssl.SSLError)
