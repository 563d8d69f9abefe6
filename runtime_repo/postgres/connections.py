"""
Every connection of one repository, and where it is: boot's own, in the pool or lent by it, kept for the next verb, the
one that listens, the one that renews leases. What is asked on them has an end, also when the server falls silent.
"""

import asyncio
import contextlib
import functools
import logging
import random
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from runtime_repo.database import Busy, Lost, Row
from runtime_repo.errors import ConfigurationError, DatabaseUnavailableError, RepositoryClosedError, RuntimeRepoError
from runtime_repo.postgres.heartbeats import Heartbeats
from runtime_repo.postgres.refusals import bare, is_spoilt, meaning
from runtime_repo.postgres.target import (
    NO_LIMIT,
    PATIENCE,
    Target,
    Unusable,
    alive,
    closed,
    is_transient,
    released,
    rolled_back,
    terminated,
)
from runtime_repo.shielding import finish

if TYPE_CHECKING:
    from runtime_repo.postgres.target import Connection, Lent, Pool

__all__ = ["FAREWELL", "GRACE", "Connections"]

_log = logging.getLogger("runtime_repo")

T = TypeVar("T")

FAREWELL = 0.7
"""Seconds for each step of closing, before what is left is dropped."""

_POOL_WAIT = 30.0
"""Seconds to wait for a connection of the pool where verbs have no limit."""

GRACE = 1.0
"""Seconds for the last try to connect, which begins when the time is up, and for an answer that is still under way."""

_OVERDUE = 3.0
_WATCH = 2.0
"""Seconds after which an answer is asked about, and between two looks for such ones."""

_AT_WORK = """
select pid, state, pid operator(pg_catalog.=) pg_catalog.pg_backend_pid() as asks
  from pg_catalog.pg_stat_activity
 where pid operator(pg_catalog.=) any (array(
           select x::pg_catalog.int4 from pg_catalog.unnest($1::pg_catalog.text[]) as x))
    or pid operator(pg_catalog.=) pg_catalog.pg_backend_pid()
"""
"""
What the server does for some of its sessions, and for the one that asks.

For an array of numbers the driver would ask the server how to spell one, in words of its own, which resolve to whatever
stands on the path; texts it knows.
"""


class Connections:
    """
    The one owner of a repository's connections.

    Args:
        target: Where to connect, or the pool that was given.
        startup_timeout: Seconds for boot to connect in, and for each connection outside of a pool of ours.
        verb_timeout: Seconds for each answer of the server, and to wait for a connection of the pool; None is no limit.
        verb: Runs a named query on a connection, for the heartbeats.
    """

    def __init__(
        self,
        target: Target,
        startup_timeout: float,
        verb_timeout: float | None,
        verb: Callable[["Connection", str, Sequence[object]], Coroutine[Any, Any, Sequence[Row]]],
    ) -> None:
        self._target = target
        self._startup_timeout = startup_timeout
        self._verb_timeout = verb_timeout
        self._pool: Pool | None = None
        # Boot's own connection. The first verb makes the pool, which takes it over.
        self._own: Connection | None = None
        self.has_booted = False
        # Until when boot goes on connecting and looking, from its first try on.
        self.boot_until: float | None = None
        # The pool's connection that was used last, until the event loop's next turn.
        self._spare: Lent | None = None
        self._handing_back: asyncio.Future[None] | None = None
        self._waiting = 0
        # Those that a pool of ours has and since when, those that are in use, and since when which of these owes a verb
        # its answer.
        self._made: weakref.WeakKeyDictionary[Connection, float] = weakref.WeakKeyDictionary()
        self._lent: set[Connection] = set()
        self._unanswered: dict[Connection, float] = {}
        # Those of which something is only read that may as well be read by another.
        self._glancing: set[Connection] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None
        self._hearing: Connection | None = None
        self.heartbeats = Heartbeats(functools.partial(self.lend, hurried=True), verb, target.pool)

    @property
    def is_open(self) -> bool:
        """Whether boot has a connection, or is over."""
        return self.has_booted or (self._own is not None and not self._own.is_closed())

    @property
    def is_late(self) -> bool:
        """Whether boot's time is up."""
        return self.boot_until is not None and self.boot_until <= asyncio.get_running_loop().time()

    @property
    def seconds_left(self) -> float:
        """For how long boot goes on connecting and looking; a look of its own has all the time that a boot has."""
        if self.boot_until is None:
            return self._startup_timeout
        return max(self.boot_until - asyncio.get_running_loop().time(), GRACE)

    async def open(self) -> None:
        """Connect for boot, trying again while the server may come up, until ``boot_until``."""
        self._own = await self._connected()

    async def serve(self) -> None:
        """Boot is over: from here on connections are the pool's."""
        self.has_booted = True
        if self._target.pool is not None and self._own is not None:
            own, self._own = self._own, None
            await released(self._target.pool, own)
        elif self._target.is_eager:
            with self.translated(connecting=True):
                await self._open_pool()

    async def quieten(self) -> None:
        """Leave no heartbeats, and ask about no answer."""
        await asyncio.gather(self.heartbeats.close(FAREWELL), self._stopped_watching())

    def drop(self) -> None:
        """Say no goodbye to those of a pool of ours: the server is silent."""
        if self._pool is not self._target.pool:
            terminated(self._pool)

    async def close(self) -> None:
        """Leave no connection."""
        pool, self._pool = self._pool, None
        own, self._own = self._own, None
        self.has_booted = False
        self.boot_until = None
        if pool is not None:
            self._hand_back(pool)
        if own is not None:
            # The pool, if it is ours, has not been opened.
            await self.returned(own)
        elif pool is not None and pool is not self._target.pool:
            await closed(pool, FAREWELL)
        # What was told in the end was an answer to wait for.
        self._stop_watching()
        await self._target.close(FAREWELL)

    def abandon(self) -> None:
        """Let go of everything without waiting."""
        with contextlib.suppress(Exception):
            self._stop_watching()
        pool, self._pool = self._pool, None
        own, self._own = self._own, None
        self.heartbeats.abandon()
        for opened in (own, pool):
            if opened is not self._target.pool:
                # The event loop may be closed by now; its end has closed the sockets then.
                terminated(opened)

    def inherited(self) -> None:
        self._target.inherited()

    @contextlib.asynccontextmanager
    async def acquired(self) -> AsyncIterator["Connection"]:
        """A connection: boot's own until it has ended, then one of the pool's."""
        if self._own is not None and not self.has_booted:
            yield self._own
            return
        connection, pool = self._taken_spare(), self._pool
        if connection is None or pool is None:
            with self.translated(connecting=True):
                pool = await self._open_pool()
            connection = await self._waited_for(pool)
        self._lent.add(connection)
        try:
            yield connection
        except BaseException as error:
            if is_spoilt(error):
                self._dismiss(connection, error)
            # It is back when the server is done with it, whoever does not want to wait for that.
            await finish(self._give_back(pool, connection))
            raise
        finally:
            self._lent.discard(connection)
        # Release and acquire cost about a tenth of a quick query, so the connection is kept for one turn of the loop: a
        # verb that follows at once reuses it, unless another task waits for one.
        if self._target.can_reuse and self._spare is None and not self._waiting:
            self._spare = connection
            asyncio.get_running_loop().call_soon(self._hand_back, pool)
        else:
            await self._give_back(pool, connection)

    @contextlib.asynccontextmanager
    async def apart(self) -> AsyncIterator["Connection"]:
        """A connection beside that of a boot which may be under way, or one of the pool's once that has ended."""
        if self.has_booted:
            async with self.acquired() as connection:
                yield connection
            return
        answer = await self._try_to_connect(
            asyncio.get_running_loop().time() + self._startup_timeout, self._target.patience(self._startup_timeout)
        )
        if isinstance(answer, RuntimeRepoError):
            raise answer
        try:
            yield answer
        finally:
            await finish(self.returned(answer))

    async def lend(self, *, hurried: bool = False) -> "Connection":
        """A connection for something else than verbs: outside of a pool of ours, and one of a pool that was given."""
        if self._target.pool is not None:
            return await self._waited_for(self._target.pool)
        async with self.in_time(self._startup_timeout, "startup_timeout"):
            with self.translated(connecting=True):
                return await self._target.lend(self._target.patience(self._startup_timeout, hurried=hurried))

    @contextlib.contextmanager
    def glancing(self, connection: "Connection") -> Iterator[Callable[[], bool]]:
        """What is asked in the block may as well be asked of another; yields whether it was given up for that."""
        self._glancing.add(connection)
        was_given_up = False
        try:
            yield lambda: was_given_up
        finally:
            was_given_up = connection not in self._glancing
            self._glancing.discard(connection)

    @property
    def is_exhausted(self) -> bool:
        """Whether the pool is open, and has neither an idle connection nor room for another."""
        pool = self._pool
        return pool is not None and not pool.get_idle_size() and pool.get_size() >= pool.get_max_size()

    @contextlib.asynccontextmanager
    async def hearing(self) -> AsyncIterator["Connection"]:
        """One that listens."""
        self._hearing = connection = await self.lend()
        try:
            yield connection
        finally:
            self._hearing = None
            await finish(self._hung_up(connection))

    async def returned(self, connection: "Connection") -> None:
        """Leave a connection that was lent as it was."""
        given = self._target.pool
        await (closed(connection, FAREWELL) if given is None else released(given, connection, FAREWELL))

    async def _hung_up(self, connection: "Connection") -> None:
        """Leave one that listens, which nobody else could use."""
        await closed(connection, FAREWELL)
        if self._target.pool is not None:
            await released(self._target.pool, connection, FAREWELL)

    async def answer(self, connection: "Connection", ask: Callable[..., Awaitable[T]], *args: object) -> T:
        """The server's answer to one statement on *connection*, within ``verb_timeout``."""
        self._watch_over(connection)
        limit = asyncio.timeout(self._verb_timeout)
        try:
            async with limit:
                return await ask(*args)
        except Exception as error:  # noqa: BLE001 - as in translated()
            late = limit.expired() and isinstance(error, TimeoutError)
            raise self._late(self._verb_timeout, "verb_timeout") if late else self._meaning(error) from bare(error)
        finally:
            self._unanswered.pop(connection, None)

    @contextlib.contextmanager
    def unlimited(self, connection: "Connection") -> Iterator[None]:
        """For boot's statements under the lock, which take their time: only an answer that was lost ends them."""
        self._watch_over(connection)
        try:
            with self.translated():
                yield
        finally:
            self._unanswered.pop(connection, None)

    @contextlib.asynccontextmanager
    async def in_time(self, seconds: float | None, name: str) -> AsyncIterator[None]:
        """
        For the driver's calls within ``translated``, whose own time-outs have become errors of ours.

        Raises:
            DatabaseUnavailableError: The block has been cancelled after so many seconds.
        """
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise self._late(seconds, name) from bare(error)

    @contextlib.contextmanager
    def translated(self, *, connecting: bool = False) -> Iterator[None]:
        """Let no driver's exception out but as a cause, without its frames: a verb may have had to connect anew."""
        try:
            yield
        except (RuntimeRepoError, Busy, Lost):
            raise
        except Unusable:
            failure = self._meaning(Unusable(), connecting=connecting)
        except Exception as error:  # noqa: BLE001 - nothing else leaves a verb, whatever the driver meets
            raise self._meaning(error, connecting=connecting) from bare(error)
        else:
            return
        raise failure

    async def roll_back(self, connection: "Connection", rollback: str = "rollback") -> None:
        if not await rolled_back(connection, rollback):
            self.fell_silent()

    def fell_silent(self) -> None:
        """
        The server, or the network, has answered nothing on a connection of ours for a clean-up: what else is idle may
        be as dead, unless it was made since. What only reads is asked again on another connection.

        A pool that was given is its owner's: of it only the connection that was silent has gone.
        """
        if self._target.pool is None:
            self._drop_idle(PATIENCE)
            self.heartbeats.doubt(PATIENCE)
            terminated(self._hearing)
            while self._glancing:
                terminated(self._glancing.pop())

    async def _connected(self) -> "Connection":
        """Connect, trying again while the server may come up; the last try begins when the time is up."""
        now = asyncio.get_running_loop().time
        deadline = self.boot_until = self.boot_until or now() + self._startup_timeout
        pause = 0.05
        patience = self._target.patience(self._startup_timeout)
        failure: RuntimeRepoError | None = None
        while True:
            answer = await self._try_to_connect(max(deadline, now() + GRACE), patience)
            if not isinstance(answer, RuntimeRepoError):
                return answer
            cause = answer.__cause__
            if cause is None or not is_transient(cause) or now() >= deadline:
                self.boot_until = None
                # One that was cut short says less than the one before it.
                raise failure if failure and isinstance(cause, TimeoutError) else answer
            if failure is None or not isinstance(cause, TimeoutError):
                failure = answer
            if isinstance(cause, TimeoutError):
                # It may be slow rather than silent.
                patience *= 2
            await asyncio.sleep(min(pause * random.uniform(0.5, 1.5), max(deadline - now(), 0)))  # noqa: S311
            pause = min(pause * 2, 1.0)

    async def _try_to_connect(self, deadline: float, patience: float) -> "Connection | RuntimeRepoError":
        """Try once. An error is returned, not raised, so that asyncpg's own frames and words stay behind."""
        self._target.check_loop()
        try:
            async with asyncio.timeout_at(deadline):
                return await self._target.lend(patience)
        except Exception as error:  # noqa: BLE001 - also what the application's own connect or init raises
            failure = self._meaning(error, connecting=True)
            if not isinstance(error, Unusable):
                failure.__cause__ = bare(error)
        return failure

    async def _take_over(self, *args: Any, **options: Any) -> "Connection":
        """Connect for the pool: its first connection is boot's, if that still lives."""
        own, self._own = self._own, None
        if own is None or own.is_closed():
            own = await self._target.connect(*args, patience=self._target.patience(self._startup_timeout), **options)
        self._made[own] = asyncio.get_running_loop().time()
        return own

    async def _open_pool(self) -> "Pool":
        if not self.has_booted:
            raise RepositoryClosedError(f"{self!r} is not open: await the repository first, and not after close()")
        if self._pool is None:
            self._pool = self._target.pool or self._target.new_pool(self._take_over)
        return await self._pool

    def _watch_over(self, connection: "Connection") -> None:
        loop = asyncio.get_running_loop()
        self._unanswered[connection] = loop.time()
        if self._watch is None:
            self._watch = loop.call_later(_WATCH, self._look_after)

    def _taken_spare(self) -> "Lent | None":
        spare, self._spare = self._spare, None
        return spare

    async def _waited_for(self, pool: "Pool") -> "Lent":
        """A connection of the pool, which may have to connect, in bounded time."""
        seconds, name = self._verb_timeout or _POOL_WAIT, "verb_timeout"
        self._waiting += 1
        try:
            async with asyncio.timeout(seconds):
                with self.translated(connecting=True):
                    connection = await pool.acquire()
        except TimeoutError as error:
            if pool.get_idle_size() or pool.get_size() < pool.get_max_size():
                raise self._late(seconds, name) from bare(error)
            raise DatabaseUnavailableError(
                f"PostgreSQL {self._target}: none of the pool's {pool.get_max_size()} connections became free within "
                f"{seconds:g} s ({name}), transactions of other tasks hold them: within a transaction use the nouns of "
                "what it yields, end transactions sooner, or raise the pool's max_size"
            ) from bare(error)
        finally:
            self._waiting -= 1
        if self._target.pool is not None:
            alive(connection)
        return connection

    def _hand_back(self, pool: "Pool") -> None:
        if (spare := self._taken_spare()) is not None:
            self._handing_back = asyncio.ensure_future(self._give_back(pool, spare))

    async def _give_back(self, pool: "Pool", connection: "Connection") -> None:
        if not await released(pool, connection):
            self.fell_silent()

    def _dismiss(self, connection: "Connection", error: BaseException) -> None:
        """Give up a connection that would go on failing, and with one that is read-only all that may be so."""
        terminated(connection)
        if is_spoilt(error, "25006"):
            self._target.forget_silence()
            self._drop_idle()

    def _drop_idle(self, older_than: float = 0.0) -> None:
        """Let the pool, if it is ours, connect anew, where a connection is as many seconds old."""
        terminated(self._taken_spare())
        made_by = asyncio.get_running_loop().time() - older_than
        busy = set()
        for connection in self._lent:
            with contextlib.suppress(asyncpg.InterfaceError):
                busy.add(connection.get_server_pid())
        for made, made_at in tuple(self._made.items()):
            if made_at <= made_by and not made.is_closed() and made.get_server_pid() not in busy:
                terminated(made)

    def _look_after(self) -> None:
        """Ask about what has not been answered for a while; look again as long as anything is under way."""
        loop = asyncio.get_running_loop()
        self._watch = loop.call_later(_WATCH, self._look_after) if self._unanswered else None
        overdue = {one: began for one, began in self._unanswered.items() if began < loop.time() - _OVERDUE}
        if overdue and self._asking is None:
            self._asking = asyncio.create_task(self._ask_about(overdue), name="runtime_repo inquiry")

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._asking is not None:
            self._asking.cancel()

    async def _stopped_watching(self) -> None:
        asking = self._asking
        self._stop_watching()
        if asking is not None:
            await asyncio.wait([asking], timeout=FAREWELL)

    async def _ask_about(self, overdue: dict["Connection", float]) -> None:
        """
        End what waits for an answer that was lost: a new connection works, and the server is at work on nothing there.

        Nobody else can know: a statement may wait for a lock for as long, and a network that lost a connection says
        nothing. Behind a pooler, whose process ids are its own, it is left to ``verb_timeout``.
        """
        try:
            pids = {}
            for one in overdue:
                with contextlib.suppress(asyncpg.InterfaceError):
                    pids[one] = one.get_server_pid()
            asking = await self.lend()
            try:
                async with asyncio.timeout(_OVERDUE):
                    rows = await asking.fetch(_AT_WORK, [str(pid) for pid in pids.values()], timeout=NO_LIMIT)
            finally:
                await finish(self.returned(asking))
            if [row["pid"] for row in rows if row["asks"]] != [asking.get_server_pid()]:
                return
            # Of another role's session the state may not be told.
            at_work = {row["pid"] for row in rows if not (row["state"] or "").startswith("idle")}
            await asyncio.sleep(GRACE)
            lost = [
                one for one in overdue if pids.get(one) not in at_work and self._unanswered.get(one) == overdue[one]
            ]
            for one in lost:
                terminated(one)
            if lost:
                self.fell_silent()
        except Exception as error:  # noqa: BLE001 - the answers have a limit of their own
            _log.debug("the server cannot be asked about what it does not answer: %s", type(error).__name__)
        finally:
            self._asking = None

    def _meaning(self, error: BaseException, *, connecting: bool = False) -> RuntimeRepoError:
        if isinstance(error, Unusable):
            return ConfigurationError(
                f"asyncpg cannot use the DSN or the pool options for {self._target}: check their spelling "
                "(its message is not repeated here, since it may hold a password)"
            )
        return meaning(error, f"PostgreSQL {self._target}", connecting=connecting)

    def _late(self, seconds: float | None, name: str) -> DatabaseUnavailableError:
        return DatabaseUnavailableError(
            f"PostgreSQL {self._target}: no answer within {seconds:g} s ({name}), so whether it has happened is not "
            "known: check that the server runs and can be reached from here, then repeat it"
        )
