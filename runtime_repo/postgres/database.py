"""
One runtime schema of a PostgreSQL database behind the port.

Every statement names the runtime schema, and settings are SET LOCAL only: nothing here depends on the state of a
session, so it runs behind a transaction-pooling pgbouncer (with ``statement_cache_size=0``).
"""

import asyncio
import contextlib
import functools
import json
import logging
import random
import secrets
import weakref
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from runtime_repo.archive import Loaded, Manifest, Reader, Terms, Writer
from runtime_repo.catalog import Catalog, Look
from runtime_repo.database import Backend, Busy, Lost, Row, Watch
from runtime_repo.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    LockHolder,
    MigrationError,
    RepositoryClosedError,
    RuntimeRepoError,
)
from runtime_repo.postgres.archive import export, kept_prefix, load
from runtime_repo.postgres.boot import BootTransaction, Looks, begin
from runtime_repo.postgres.connections import (
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
from runtime_repo.postgres.heartbeats import Heartbeats
from runtime_repo.postgres.notifications import Deaf, Hear, Listener, Teller
from runtime_repo.postgres.refusals import bare, is_conflict, is_lost, is_spoilt, meaning
from runtime_repo.queries import load_queries
from runtime_repo.repository import Unique, check_seconds
from runtime_repo.schema import Migration, load_migrations
from runtime_repo.shielding import finish

if TYPE_CHECKING:
    from runtime_repo.postgres.connections import Connection, Lent, Pool

__all__ = ["PostgresDatabase"]

_log = logging.getLogger("runtime_repo")

T = TypeVar("T")

_LOCK_CLASS = 0x72756E74
"""The first of the advisory lock's two integers; it must never change, or two releases would not exclude each other."""

_REST = 0.4
"""Seconds between two such tries, whoever makes them."""

_LISTEN_CHECK = 2.0
"""Seconds after which a connection that listens is asked whether it still does, and for which it may be silent then."""

_OWN_VOICE = 3.0
"""Seconds in which a connection that listens has to hear what this process tells it."""

_CLOSING = 2.0
_FAREWELL = 0.7
"""Seconds for closing everything, and for each step of it, before what is left is dropped."""

_POOL_WAIT = 30.0
"""Seconds to wait for a connection of the pool where verbs have no limit."""

_TRIES = 5
"""How often a verb is tried that the server gives up for another's sake."""

_GRACE = 1.0
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


class PostgresDatabase(Unique):
    """One runtime schema of a PostgreSQL database behind the port."""

    backend: Backend = "postgres"

    def __init__(
        self,
        target: Target,
        *,
        schema: str,
        startup_timeout: float,
        verb_timeout: float | None = 30.0,
        listen: bool = True,
    ) -> None:
        self._target = target
        self._schema = schema
        _check_schema(schema)
        check_seconds("startup_timeout", startup_timeout, positive=True)
        self._startup_timeout = startup_timeout
        if verb_timeout is not None:
            check_seconds("verb_timeout", verb_timeout, positive=True)
        self._verb_timeout = verb_timeout
        self.tokens = {
            "schema": '"' + schema.replace('"', '""') + '"',
            "now_ms": "(extract(epoch from pg_catalog.statement_timestamp()) * 1000::numeric)::bigint",
        }
        self.queries = load_queries("postgres", **self.tokens)
        self._looks = Looks(schema, self.tokens, self.queries)
        # A hash that is the same in every release, process and machine, as a signed integer.
        number = zlib.crc32(schema.encode())
        self._lock_key = number - 2**31
        # The name of a schema may be too long for one.
        self._channel = f"runtime_repo_{number:08x}"
        self._pool: Pool | None = None
        # Boot's own connection. The first verb makes the pool, which takes it over.
        self._own: Connection | None = None
        self._has_booted = False
        # Until when boot goes on connecting and looking, from its first try on.
        self._boot_until: float | None = None
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
        # Whether the session's default isolation level would give a verb another meaning; None is not known.
        self._is_isolated: bool | None = None
        self._teller = Teller(self._tell_now)
        # Of a pool that was given one is for heartbeats, and one has to be left for the verbs.
        has_room = target.pool is None or target.pool.get_max_size() > 2
        self._listener = Listener(self._listening if listen and has_room else None)
        self._hearing: Connection | None = None
        self._heartbeats = Heartbeats(functools.partial(self._lend, hurried=True), self._verb, target.pool)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._target!r}, schema={self._schema!r})"

    async def _connected(self) -> "Connection":
        """Connect, trying again while the server may come up; the last try begins when the time is up."""
        now = asyncio.get_running_loop().time
        deadline = self._boot_until = self._boot_until or now() + self._startup_timeout
        pause = 0.05
        patience = self._target.patience(self._startup_timeout)
        failure: RuntimeRepoError | None = None
        while True:
            answer = await self._try_to_connect(max(deadline, now() + _GRACE), patience)
            if not isinstance(answer, RuntimeRepoError):
                return answer
            cause = answer.__cause__
            if cause is None or not is_transient(cause) or now() >= deadline:
                self._boot_until = None
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

    async def _lend(self, *, hurried: bool = False) -> "Connection":
        """A connection for something else than verbs: outside of a pool of ours, and one of a pool that was given."""
        if self._target.pool is not None:
            return await self._waited_for(self._target.pool)
        async with self._in_time(self._startup_timeout, "startup_timeout"):
            with self.translated(connecting=True):
                return await self._target.lend(self._target.patience(self._startup_timeout, hurried=hurried))

    async def close(self) -> None:
        await finish(self._close(), within=_CLOSING)

    async def _close(self) -> None:
        told, *_ = await asyncio.gather(
            self._teller.close(_FAREWELL),
            self._listener.close(),
            self._heartbeats.close(_FAREWELL),
            self._stopped_watching(),
        )
        pool, self._pool = self._pool, None
        own, self._own = self._own, None
        self._has_booted = False
        self._boot_until = None
        if pool is not None:
            self._hand_back(pool)
        if own is not None:
            # The pool, if it is ours, has not been opened.
            await self._returned(own)
        elif pool is not None and pool is not self._target.pool:
            if told:
                await closed(pool, _FAREWELL)
            else:
                terminated(pool)
                await self._teller.close(_FAREWELL)
        # What was told in the end was an answer to wait for.
        self._stop_watching()
        await self._target.close(_FAREWELL)

    def abandon(self) -> None:
        with contextlib.suppress(Exception):
            self._listener.abandon()
            self._stop_watching()
        pool, self._pool = self._pool, None
        own, self._own = self._own, None
        self._heartbeats.abandon()
        for opened in (own, pool):
            if opened is not self._target.pool:
                # The event loop may be closed by now; its end has closed the sockets then.
                terminated(opened)

    def inherited(self) -> None:
        self._target.inherited()

    async def _open_pool(self) -> "Pool":
        if not self._has_booted:
            raise RepositoryClosedError(f"{self!r} is not open: await the repository first, and not after close()")
        if self._pool is None:
            self._pool = self._target.pool or self._target.new_pool(self._take_over)
        return await self._pool

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

    @contextlib.asynccontextmanager
    async def _in_time(self, seconds: float | None, name: str) -> AsyncIterator[None]:
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
    def _unlimited(self, connection: "Connection") -> Iterator[None]:
        """For boot's statements under the lock, which take their time: only an answer that was lost ends them."""
        self._watch_over(connection)
        try:
            with self.translated():
                yield
        finally:
            self._unanswered.pop(connection, None)

    def _watch_over(self, connection: "Connection") -> None:
        loop = asyncio.get_running_loop()
        self._unanswered[connection] = loop.time()
        if self._watch is None:
            self._watch = loop.call_later(_WATCH, self._look_after)

    @contextlib.asynccontextmanager
    async def _acquired(self) -> AsyncIterator["Connection"]:
        """A connection: boot's own until it has ended, then one of the pool's."""
        if self._own is not None and not self._has_booted:
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
            self._fell_silent()

    async def _roll_back(self, connection: "Connection", rollback: str = "rollback") -> None:
        if not await rolled_back(connection, rollback):
            self._fell_silent()

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

    def _fell_silent(self) -> None:
        """
        The server, or the network, has answered nothing on a connection of ours for a clean-up: what else is idle may
        be as dead, unless it was made since. What only reads is asked again on another connection.

        A pool that was given is its owner's: of it only the connection that was silent has gone.
        """
        if self._target.pool is None:
            self._drop_idle(PATIENCE)
            self._heartbeats.doubt(PATIENCE)
            terminated(self._hearing)
            while self._glancing:
                terminated(self._glancing.pop())

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
            await asyncio.wait([asking], timeout=_FAREWELL)

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
            asking = await self._lend()
            try:
                async with asyncio.timeout(_OVERDUE):
                    rows = await asking.fetch(_AT_WORK, [str(pid) for pid in pids.values()], timeout=NO_LIMIT)
            finally:
                await finish(self._returned(asking))
            if [row["pid"] for row in rows if row["asks"]] != [asking.get_server_pid()]:
                return
            # Of another role's session the state may not be told.
            at_work = {row["pid"] for row in rows if not (row["state"] or "").startswith("idle")}
            await asyncio.sleep(_GRACE)
            lost = [
                one for one in overdue if pids.get(one) not in at_work and self._unanswered.get(one) == overdue[one]
            ]
            for one in lost:
                terminated(one)
            if lost:
                self._fell_silent()
        except Exception as error:  # noqa: BLE001 - the answers have a limit of their own
            _log.debug("the server cannot be asked about what it does not answer: %s", type(error).__name__)
        finally:
            self._asking = None

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        async with self._acquired() as connection:
            return await self._verb(connection, query, args)

    async def glance(self, query: str, *args: object, within: float) -> Sequence[Row] | None:
        was_asked = False
        try:
            async with asyncio.timeout(within) as limit:
                while True:
                    was_given_up = False
                    try:
                        async with self._acquired() as connection:
                            if not was_asked:
                                was_asked = True
                                limit.reschedule(asyncio.get_running_loop().time() + within)
                            self._glancing.add(connection)
                            try:
                                return await self._verb(connection, query, args)
                            finally:
                                was_given_up = connection not in self._glancing
                                self._glancing.discard(connection)
                    except DatabaseUnavailableError:
                        if not was_given_up:
                            raise
        except TimeoutError:
            pool = self._pool
            if was_asked or pool is None or pool.get_idle_size() or pool.get_size() < pool.get_max_size():
                raise
            return None

    async def _verb(self, connection: "Connection", query: str, args: Sequence[object]) -> Sequence[Row]:
        """One statement as a transaction of its own, again where the server gave it up for another's sake."""
        tries = 1
        while True:
            try:
                return await self._try_verb(connection, self.queries[query], args)
            except DatabaseUnavailableError as error:
                # Whoever called is in no transaction, and a verb is safe to repeat.
                if tries == _TRIES or not is_conflict(error.__cause__):
                    raise
            if self._is_isolated is None:
                await self._ask_for_isolation(connection)
            await asyncio.sleep(random.uniform(0, 0.01) * 2**tries)  # noqa: S311
            tries += 1

    async def _try_verb(self, connection: "Connection", text: str, args: Sequence[object]) -> Sequence[Row]:
        """Under READ COMMITTED, which is every session's default where nobody has changed it."""
        if not self._is_isolated:
            return await self.answer(connection, connection.fetch, text, *args)
        async with self._together(connection, "begin isolation level read committed", "commit", "rollback"):
            return await self.answer(connection, connection.fetch, text, *args)

    async def _ask_for_isolation(self, connection: "Connection") -> None:
        """
        Learn, after the first conflict, whether the role or the database has another default isolation level.

        Under it a verb fails where it should wait for a rival and go on, and does nothing else otherwise: to ask each
        connection beforehand would cost a round trip.
        """
        with contextlib.suppress(RuntimeRepoError):
            level = await self.answer(connection, connection.fetchval, "show default_transaction_isolation")
            self._is_isolated = level != "read committed"

    @contextlib.asynccontextmanager
    async def atomic(self) -> AsyncIterator["_Transaction"]:
        untold: set[str] = set()
        try:
            async with (
                self._acquired() as connection,
                self._together(connection, "begin isolation level read committed", "commit", "rollback"),
            ):
                yield _Transaction(self, connection, untold)
        except DatabaseUnavailableError as error:
            error.gave_way = is_conflict(error.__cause__)
            raise
        self.tell(untold)

    @contextlib.asynccontextmanager
    async def part(self, connection: "Connection", untold: set[str]) -> AsyncIterator["_Transaction"]:
        """Transaction that take effect with a transaction that is open already, or fail alone."""
        begin, commit = "savepoint runtime_repo", "release savepoint runtime_repo"
        async with self._together(connection, begin, commit, f"rollback to savepoint runtime_repo; {commit}"):
            yield _Transaction(self, connection, untold)

    @contextlib.asynccontextmanager
    async def part_of_theirs(self, connection: "Connection") -> AsyncIterator["_Transaction"]:
        """As above, in a transaction of the application's: when it commits, which we do not see, it tells by itself."""
        untold: set[str] = set()
        async with self.part(connection, untold) as statements:
            yield statements
            if untold:
                await statements.fetch("schema.tell", self._channel, json.dumps(list(untold)))

    async def vacuum(self) -> None:
        async with self._acquired() as connection:
            await self.answer(connection, connection.execute, self.queries["attempts.vacuum"])

    async def heartbeats(self) -> Heartbeats:
        await self._heartbeats.reserve()
        return self._heartbeats

    def tell(self, queues: Iterable[str]) -> None:
        self._teller.tell(queues)

    async def _tell_now(self, queues: Iterable[str]) -> None:
        await self.fetch("schema.tell_now", self._channel, json.dumps(list(queues)))

    def watch(self, queues: Collection[str]) -> contextlib.AbstractAsyncContextManager[Watch]:
        return self._listener.watch(queues)

    @contextlib.asynccontextmanager
    async def _listening(self, hear: Hear) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
        """
        A connection of its own that listens, and what returns when it is lost.

        Raises:
            Deaf: It does not hear what this process tells it.
        """
        over = asyncio.Event()
        heard = asyncio.Event()
        # No queue's name is as long.
        marker = secrets.token_hex(1000)

        def told(*words: Any) -> None:
            if words[3] == marker:
                heard.set()
            else:
                hear(words[3])

        def lost_it(_connection: "Connection") -> None:
            over.set()
            heard.set()

        self._hearing = connection = await self._lend()
        try:
            connection.add_termination_listener(lost_it)
            await self.answer(connection, connection.add_listener, self._channel, told)
            await self._tell_now([marker])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_OWN_VOICE):
                    await heard.wait()
            if not heard.is_set():
                raise Deaf(
                    f"PostgreSQL {self._target}: a connection that listens does not hear what this process tells it: "
                    "pass listen=False where a transaction-pooling pgbouncer is in between, as there nobody can listen"
                )

            async def lost() -> None:
                while not over.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_LISTEN_CHECK):
                            await over.wait()
                            return
                    # A network that is cut says nothing.
                    try:
                        async with self._in_time(_LISTEN_CHECK, "the check of a connection that listens"):
                            with self.translated():
                                await connection.execute(f"listen {self._channel}", timeout=NO_LIMIT)
                    except DatabaseUnavailableError as error:
                        if isinstance(error.__cause__, TimeoutError):
                            self._fell_silent()
                        raise

            yield lost
        finally:
            self._hearing = None
            await finish(self._hung_up(connection))

    async def _returned(self, connection: "Connection") -> None:
        """Leave a connection that was lent as it was."""
        given = self._target.pool
        await (closed(connection, _FAREWELL) if given is None else released(given, connection, _FAREWELL))

    async def _hung_up(self, connection: "Connection") -> None:
        """Leave one that listens, which nobody else could use."""
        await closed(connection, _FAREWELL)
        if self._target.pool is not None:
            await released(self._target.pool, connection, _FAREWELL)

    @contextlib.asynccontextmanager
    async def _together(self, connection: "Connection", begin: str, commit: str, rollback: str) -> AsyncIterator[None]:
        # asyncpg's own transaction() is left corrupt by a BEGIN that is cancelled, and can't send its ROLLBACK in a
        # scope of anyio's that was cancelled.
        try:
            await self.answer(connection, connection.execute, begin)
            yield
            answer = await self.answer(connection, connection.execute, commit)
            if answer == "ROLLBACK":
                # That is no error to PostgreSQL.
                raise DatabaseUnavailableError(
                    f"PostgreSQL {self._target}: the transaction was rolled back, since a statement had failed: "
                    "let the error leave the block, or run what may fail within connection.transaction()"
                )
        except BaseException:
            await finish(self._roll_back(connection, rollback))
            raise

    async def open(self, shipped: Sequence[Catalog]) -> Look:
        if not self._has_booted and (self._own is None or self._own.is_closed()):
            until = self._boot_until
            await self.close()
            self._boot_until = until
            self._own = await self._connected()
        async with self._acquired() as connection:
            look = await self._looked(connection, shipped)
        self._boot_until = None
        return look

    async def _looked(self, connection: "Connection", shipped: Sequence[Catalog]) -> Look:
        """The look, in bounded time."""
        now = asyncio.get_running_loop().time()
        left = self._startup_timeout if self._boot_until is None else max(self._boot_until - now, _GRACE)
        try:
            # Half, so that there is time for another try on another connection.
            async with self._in_time(max(left / 2, _GRACE), "a half of what was left of startup_timeout"):
                with self.translated():
                    return await self._looks.look(connection, shipped)
        except DatabaseUnavailableError as error:
            _check_busy(error)
            if is_lost(error.__cause__):
                terminated(connection)
                if self._boot_until is None or self._boot_until > asyncio.get_running_loop().time():
                    raise Lost from error
                self._boot_until = None
            raise

    @contextlib.asynccontextmanager
    async def lock(self) -> AsyncIterator[BootTransaction]:
        async with self._acquired() as connection:
            try:
                # In a transaction of its own, for most who try at once fail, and need not begin or roll back for that.
                await self._try_lock(connection)
                await self._try_lock(connection, begin(connection.get_server_version().major))
                yield BootTransaction(
                    self._looks, connection, functools.partial(self._unlimited, connection), self._startup_timeout
                )
                with self._unlimited(connection):
                    await connection.execute("commit", timeout=NO_LIMIT)
            except BaseException as error:
                await finish(self._roll_back(connection))
                if isinstance(error, (MigrationError, DatabaseUnavailableError)):
                    if isinstance(error.__cause__, (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)):
                        await self._rest(connection)
                        raise Busy from error.__cause__
                    if is_lost(error.__cause__):
                        terminated(connection)
                        raise Lost from error
                raise

    async def _try_lock(self, connection: "Connection", begin: str = "") -> None:
        """Try once, in one round trip: what is executed without arguments answers with its number of rows."""
        key = f"{_LOCK_CLASS}, '{self._lock_key}'::pg_catalog.int4"
        query = f"select where pg_catalog.pg_try_advisory_xact_lock({key})"
        async with self._in_time(self._startup_timeout, "startup_timeout"):
            with self.translated():
                answer = await connection.execute(f"{begin} {query}", timeout=NO_LIMIT)
        if answer != "SELECT 1":
            raise Busy

    async def _rest(self, connection: "Connection") -> None:
        """
        Keep the lock for a moment without wanting any table.

        Each try may hold up live traffic, and the next of four hundred booters would begin one at once: so all of
        them rest. Should one of them be quicker than this, it rests after its own try.
        """
        try:
            with contextlib.suppress(Busy):
                await self._try_lock(connection, begin(connection.get_server_version().major))
            await asyncio.sleep(_REST)
        finally:
            await finish(self._roll_back(connection))

    @contextlib.asynccontextmanager
    async def _apart(self) -> AsyncIterator["Connection"]:
        """A connection beside that of a boot which may be under way, or one of the pool's once that has ended."""
        if self._has_booted:
            async with self._acquired() as connection:
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
            await finish(self._returned(answer))

    async def inspect(self, shipped: Sequence[Catalog]) -> Look:
        try:
            async with self._apart() as connection, self._in_time(self._startup_timeout, "startup_timeout"):
                with self.translated():
                    return await self._looks.look(connection, shipped)
        except DatabaseUnavailableError as error:
            _check_busy(error)
            raise

    async def lock_holder(self, *, apart: bool = False) -> LockHolder | None:
        async with self._apart() if apart else self._acquired() as connection:
            text = self.queries["schema.lock_holder"]
            rows = await self.answer(connection, connection.fetch, text, _LOCK_CLASS, self._lock_key, self._schema)
        if not rows:
            return None
        row = rows[0]
        return LockHolder(
            row["pid"],
            row["application_name"],
            row["client_address"],
            row["transaction_age"],
            row["user_name"],
            row["session_age"],
        )

    async def serve(self, version: int) -> None:  # noqa: ARG002 - the operator's backups are no affair of ours
        self._has_booted = True
        if self._target.pool is not None and self._own is not None:
            own, self._own = self._own, None
            await released(self._target.pool, own)
        elif self._target.is_eager:
            with self.translated(connecting=True):
                await self._open_pool()

    async def take_backup(self, from_version: int) -> Path | None:  # noqa: ARG002
        return None

    async def remains(self, *, apart: bool = False) -> Sequence[str]:
        async with self._apart() if apart else self._acquired() as connection:
            text = self.queries["archive.remains"]
            rows = await self.answer(connection, connection.fetch, text, kept_prefix(self._schema))
        return [f"schema {row['name']}" for row in rows]

    async def export(self, writer: Writer, migrations: Sequence[Migration], terms: Terms, target: Backend) -> Manifest:  # noqa: ARG002 - whatever is here fits anywhere
        return await export(self, writer, migrations, terms)

    async def load(self, reader: Reader, migrations: Sequence[Migration], terms: Terms) -> Loaded:
        return await load(self, reader, migrations, terms)

    def named(self, name: str) -> str:
        """The qualified name of something in the runtime schema."""
        return f'{self.tokens["schema"]}."{name}"'

    def shipped(self) -> Sequence[Migration]:
        return load_migrations(self.backend)

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


class _Transaction:
    """Queries on one connection, in a transaction whose end is another's business."""

    def __init__(self, database: PostgresDatabase, connection: "Connection", untold: set[str]) -> None:
        self._database = database
        self._untold = untold
        self.connection = connection

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        text = self._database.queries[query]
        return await self._database.answer(self.connection, self.connection.fetch, text, *args)

    def atomic(self) -> contextlib.AbstractAsyncContextManager["_Transaction"]:
        return self._database.part(self.connection, self._untold)

    def tell(self, queues: Iterable[str]) -> None:
        self._untold.update(queues)


def _check_busy(error: DatabaseUnavailableError) -> None:
    """
    Raise Busy for what a look meets while somebody changes our tables.

    One is locked, or an index went away while it was described ("cache lookup failed", an internal error).
    """
    if isinstance(error.__cause__, (asyncpg.LockNotAvailableError, asyncpg.InternalServerError)):
        raise Busy from error.__cause__


def _check_schema(schema: str) -> None:
    try:
        size = len(schema.encode())
    except (AttributeError, UnicodeEncodeError):
        size = 0
    if not 0 < size <= 63 or "\0" in schema or schema.startswith("pg_"):
        raise ConfigurationError(
            f"the runtime schema's name is {schema!r}, {size} bytes: expected 1 to 63 bytes of UTF-8 (PostgreSQL would "
            "cut a longer one silently, and two names would share a schema), without NUL, not beginning with 'pg_'"
        )
