"""
The repository: its life, and its stores.

Awaiting it boots it, whoever awaits and however often: one boot happens, owned by a task of its own, and every awaiter
only waits for that. So a cancelled awaiter does not spoil the others, and the last one takes the boot with it.
"""

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Generator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Literal, Self, get_args

from runtime_repo.api_keys import ApiKeys
from runtime_repo.attempts import Attempts
from runtime_repo.audit import Audit
from runtime_repo.database import Backend, Database, Gate, Queries, Row, Source, Statements, Watch
from runtime_repo.errors import ConfigurationError, RepositoryClosedError
from runtime_repo.interrupts import Interrupts
from runtime_repo.jobs import Jobs
from runtime_repo.leases import Leases
from runtime_repo.schema import Policy, SchemaReport, ensure_schema, load_migrations
from runtime_repo.shielding import finish
from runtime_repo.step_reports import StepReports

__all__ = ["RuntimeRepository", "RuntimeTransaction"]


class Stores:
    """
    The nouns, each with its verbs.

    Attributes:
        api_keys: Who may use the application: put, authenticate, set_active.
        attempts: Units of work: enqueue, complete, fail.
        audit: Who did what: append, list.
        interrupts: Questions and their answers: create, resume, cancel.
        jobs: What the application says of its threads: upsert, get, list.
        leases: Ownership of attempts: claim, heartbeat, requeue_expired.
        step_reports: What was done within an attempt: record, list.
    """

    def __init__(self, queries: Gate) -> None:
        self.api_keys = ApiKeys(queries)
        self.attempts = Attempts(queries)
        self.audit = Audit(queries)
        self.interrupts = Interrupts(queries)
        self.jobs = Jobs(queries)
        self.leases = Leases(queries)
        self.step_reports = StepReports(queries)


class RuntimeTransaction(Stores):
    """
    The nouns in one transaction, which ends with its block.

    Attributes:
        connection: The driver's own connection, for the application's statements: on PostgreSQL asyncpg's, on SQLite
            aiosqlite's. Leave COMMIT and ROLLBACK to the block. Its errors are the driver's.
    """

    def __init__(self, gate: "_Gate", connection: Any) -> None:
        super().__init__(gate)
        self.connection = connection


class RuntimeRepository(Stores):
    """
    A durable store whose schema is exactly the one this release knows, once it has been awaited.

    ``await repo`` and ``async with repo`` both boot it and may be repeated and mixed; many tasks may await it together
    and one boot happens. After a failure it may be awaited again; after ``close()`` it is closed for good.
    """

    def __init__(
        self,
        database: Database,
        *,
        migrate: bool,
        on_drift: Literal["refuse", "warn"],
        before_migrate: Callable[[], Awaitable[object]] | None,
        lock_timeout: float,
    ) -> None:
        check_seconds("lock_timeout", lock_timeout)
        if on_drift not in ("refuse", "warn"):
            raise ConfigurationError(f"on_drift is {on_drift!r}: expected 'refuse' or 'warn'")
        self._policy = Policy(migrate, on_drift, lock_timeout, before_migrate)
        self._database = database
        self._boot: _Boot | None = None
        self._report: SchemaReport | None = None
        self._closed = False
        self._gate = _Gate(database, "the repository is not open: await it first, and do not use it after close()")
        super().__init__(self._gate)

    def __repr__(self) -> str:
        if not hasattr(self, "_closed"):
            # A traceback with locals shows also what could not be constructed.
            return f"<{type(self).__name__}, not constructed>"
        state = "closed" if self._closed else "open" if self._report else "not awaited yet"
        return f"<{type(self).__name__} {self._database!r}, {state}>"

    @property
    def boot_report(self) -> SchemaReport:
        """
        What the boot found and did.

        Raises:
            RepositoryClosedError: It has not been awaited yet.
        """
        if self._report is None:
            raise RepositoryClosedError(f"{self!r} has no boot report: await it first")
        return self._report

    def __await__(self) -> Generator[Any, None, Self]:
        return self._ready().__await__()

    async def __aenter__(self) -> Self:
        return await self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # Also where construction failed, before there was anything to forget.
        if getattr(self, "_report", None) is not None and not self._closed:
            # First let go: where warnings are errors, the warning ends this method.
            self._database.abandon()
            warnings.warn(
                f"{self!r} was never closed: use 'async with', or await close()",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    async def ensure_schema(self) -> SchemaReport:
        """
        Bring the schema to the version this release knows, or prove that it is there; may be called at any time.

        Boots the repository if it has not been awaited, and returns what was found and done. Other processes may do
        the same at the same moment: exactly one of them applies the migrations.

        Raises:
            SchemaError: Refused; the subclass says why, and the database was not touched.
            DatabaseUnavailableError: The database cannot be reached, opened or read.
            RepositoryClosedError: The repository was closed.
        """
        if self._report is None or self._closed:
            return (await self).boot_report
        return await self._ensure()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[RuntimeTransaction]:
        """
        Let several verbs, and the application's own statements, take effect together.

        They are committed when the block ends and rolled back when it raises or is cancelled; a cancelled block may
        still have been committed if it had come to its end. Use the nouns of what it yields: those of the repository
        are not part of it. Tasks of the block's own may share them, and take turns. On SQLite, which has one writer,
        the verbs of every other task wait for the block, and a verb of the repository within it is refused; keep it
        short.

        Raises:
            RepositoryClosedError: The repository is not open.
            DatabaseUnavailableError: The database cannot be reached, or does not commit.
        """
        async with self._transaction() as transaction:
            yield transaction

    @contextlib.asynccontextmanager
    async def _transaction(
        self, statements: AbstractAsyncContextManager[Statements] | None = None
    ) -> AsyncIterator[RuntimeTransaction]:
        own = self._gate.atomic()
        async with statements or own as opened:
            gate = _TransactionGate(_OneByOne(opened))
            try:
                yield RuntimeTransaction(gate, opened.connection)
            finally:
                gate.is_open = False
        if statements is None:
            gate.committed()

    async def close(self) -> None:
        """Close it for good and leave no connection, thread or task. May be repeated; a boot under way is given up."""
        self._closed = True
        self._gate.is_open = False
        if self._boot is not None:
            await self._give_up(self._boot)
        await self._database.close()

    async def _ready(self) -> Self:
        _require_asyncio()
        while self._report is None and not self._closed:
            if self._boot is None:
                self._boot = _Boot(asyncio.create_task(self._start(), name="runtime_repo boot"))
            if self._boot.given_up:
                await self._boot.ended.wait()
            else:
                await self._join(self._boot)
        if self._closed:
            raise RepositoryClosedError(f"{self!r} cannot be awaited any more: construct another")
        return self

    async def _start(self) -> SchemaReport:
        try:
            return await self._ensure()
        except BaseException:
            await self._database.close()
            raise

    async def _ensure(self) -> SchemaReport:
        return await ensure_schema(self._database, load_migrations(self._database.backend), self._policy)

    async def _join(self, boot: "_Boot") -> None:
        """Wait for a boot. It counts as successful only when an awaiter has lived to see it."""
        boot.awaiters += 1
        try:
            await asyncio.wait([boot.task])
        except asyncio.CancelledError:
            if boot.awaiters == 1 and self._report is None:
                await self._give_up(boot)
            raise
        finally:
            boot.awaiters -= 1
        if self._boot is boot and not boot.given_up:
            self._boot = None
        if not self._closed:
            self._report = boot.task.result()
            self._gate.is_open = True

    def _give_up(self, boot: "_Boot") -> Coroutine[Any, Any, None]:
        """Mark it at once, so that nobody joins it any more; see it off when awaited."""
        boot.given_up = True
        boot.task.cancel()
        return finish(self._see_off(boot))

    async def _see_off(self, boot: "_Boot") -> None:
        await asyncio.wait([boot.task])
        if not boot.task.cancelled() and boot.task.exception() is None:
            # It ended well in the very turn in which it was given up: nobody will close what it opened.
            await self._database.close()
        self._boot = None
        boot.ended.set()


class _Gate:
    """What the nouns query, while that is open."""

    def __init__(self, queries: Source, closed: str) -> None:
        self._queries = queries
        self._closed = closed
        self.is_open = False

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        return await self._opened().fetch(query, *args)

    def atomic(self) -> AbstractAsyncContextManager[Statements]:
        return self._opened().atomic()

    def tell(self, queues: Iterable[str]) -> None:
        # Closed meanwhile, it has nobody to tell.
        if self.is_open:
            self._queries.tell(queues)

    def after_commit(self, do: Callable[[], None]) -> None:
        do()

    def watch(self, queues: Collection[str]) -> AbstractAsyncContextManager[Watch]:
        return self._opened().watch(queues)

    async def heartbeats(self) -> Queries:
        return await self._opened().heartbeats()

    def _opened(self) -> Source:
        if not self.is_open:
            raise RepositoryClosedError(self._closed)
        return self._queries


class _TransactionGate(_Gate):
    """What the nouns of a transaction query, until it ends."""

    def __init__(self, queries: Source) -> None:
        super().__init__(queries, "the transaction has ended: use what it yields within its block only")
        self.is_open = True
        self._undone: list[Callable[[], None]] = []

    def after_commit(self, do: Callable[[], None]) -> None:
        self._undone.append(do)

    def committed(self) -> None:
        for do in self._undone:
            do()


class _OneByOne:
    """Queries in one transaction, whichever tasks make them: parts of it that overlap would undo each other."""

    def __init__(self, statements: Statements) -> None:
        self._statements = statements
        self._turn = asyncio.Lock()

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        async with self._turn:
            return await self._statements.fetch(query, *args)

    @contextlib.asynccontextmanager
    async def atomic(self) -> AsyncIterator[Statements]:
        async with self._turn, self._statements.atomic() as part:
            yield part

    def tell(self, queues: Iterable[str]) -> None:
        self._statements.tell(queues)

    def watch(self, queues: Collection[str]) -> AbstractAsyncContextManager[Watch]:  # noqa: ARG002
        raise ConfigurationError("a transaction cannot wait for work, it sees none that comes: wait outside of it")

    async def heartbeats(self) -> Queries:
        raise ConfigurationError("a transaction cannot hold a lease, it commits too late: hold it outside of it")


class _Boot:
    """A boot under way, and how many wait for it."""

    def __init__(self, task: "asyncio.Task[SchemaReport]") -> None:
        self.task = task
        self.awaiters = 0
        self.given_up = False
        self.ended = asyncio.Event()


# Read once, at import: a boot reads no files, and of four hundred that start at the same second none parses them.
for _backend in get_args(Backend):
    load_migrations(_backend)


def check_seconds(name: str, value: float, *, positive: bool = False) -> None:
    """A time-out in seconds: finite, never negative, and not zero where it must be positive."""
    if not isinstance(value, (int, float)) or not 0 <= value < float("inf") or (positive and not value):
        raise ConfigurationError(
            f"{name} is {value!r}: expected a number of seconds, {'more than 0' if positive else '0 or more'}"
        )


def _require_asyncio() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "runtime_repo needs a running asyncio event loop, since its drivers do: "
            "use asyncio.run(), or anyio with backend='asyncio'; trio is not supported"
        ) from None
