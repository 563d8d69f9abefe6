"""
The repository: its life, and its stores.

Awaiting it boots it, whoever awaits and however often: one boot happens, owned by a task of its own, and every awaiter
only waits for that. So a cancelled awaiter does not spoil the others, and the last one takes the boot with it.

What is open belongs to one event loop of one process. Every use passes a gate that refuses all others: another loop or
thread, the child of a fork, and a task that would wait for its own transaction.
"""

import asyncio
import contextlib
import functools
import inspect
import os
import warnings
import weakref
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Never, Self, SupportsIndex, TypeVar, get_args

from runtime_repo.api_keys import ApiKeys
from runtime_repo.archive import BackupReport, MoveReport, RestoreReport, backup, move_between, restore
from runtime_repo.attempts import Attempts
from runtime_repo.audit import Audit
from runtime_repo.control import Control
from runtime_repo.database import Backend, Database, Gate, Heartbeats, Row, Source, Transaction, Watch
from runtime_repo.doctor import Diagnosis, diagnose
from runtime_repo.errors import ConfigurationError, RepositoryClosedError, shown
from runtime_repo.interrupts import Interrupts
from runtime_repo.jobs import Jobs
from runtime_repo.leases import Leases
from runtime_repo.observing import Observe, ObservedSource, ObservedTransaction, Observer, observed_boot
from runtime_repo.schema import (
    Compatibility,
    Migration,
    Policy,
    SchemaPlan,
    SchemaReport,
    SchemaStatus,
    can_run,
    ensure_schema,
    inspect_schema,
    load_migrations,
    plan_schema,
)
from runtime_repo.shielding import CLEAN_UP, finish, leave
from runtime_repo.status import Activity, StoreStatus, activity_of_store, status_of_store
from runtime_repo.step_reports import StepReports

__all__ = ["RuntimeRepository", "RuntimeTransaction", "Unique", "check_flag", "check_seconds", "is_known_to_be_sync"]

_DYING = 0.4
"""Seconds for a boot that did not heed its cancellation to fail, once its connection was taken from it."""

T = TypeVar("T")


class Unique:
    """What cannot be copied, since it holds connections, nor pickled, since it may hold a password."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Never:
        raise ConfigurationError(
            f"a {type(self).__name__} cannot be pickled or copied: it holds connections and may hold a password; "
            "construct another where it is needed, from the address"
        )


class Stores(Unique):
    """
    The nouns, each with its verbs.

    Attributes:
        api_keys: Who may use the application: put, authenticate, set_active.
        attempts: Units of work: enqueue, complete, fail.
        audit: Who did what: append, list.
        control: The operator's switches: quiesce, pause, resume, state.
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
        self.control = Control(queries, self.leases)
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
        observe: Observe | None = None,
    ) -> None:
        check_flag("migrate", migrate)
        check_seconds("lock_timeout", lock_timeout)
        if on_drift not in ("refuse", "warn"):
            raise ConfigurationError(f"on_drift is {shown(on_drift)}: expected 'refuse' or 'warn'")
        self._left: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        prepare = None if before_migrate is None else self._wanted(_checked(before_migrate))
        self._policy = Policy(migrate, on_drift, lock_timeout, prepare)
        self._database = database
        self._boot: _Boot | None = None
        self._report: SchemaReport | None = None
        self._closed = False
        self._observer = None if observe is None else Observer(observe)
        self._gate = _Gate(database if self._observer is None else ObservedSource(database, self._observer))
        super().__init__(self._gate)
        _constructed.add(self)

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
            self._let_go()
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
            ConfigurationError: It is open in another event loop or process, or this task has a transaction open.
            RepositoryClosedError: The repository was closed.
        """
        if self._report is None or self._closed:
            return (await self).boot_report
        self._gate.check()
        return await self._ensure()

    async def inspect(self) -> SchemaStatus:
        """
        Look at the schema as it is now, and tell what a boot would find: for a health check, or before a deployment.

        It writes nothing and creates nothing, whatever the boot may do, and needs no boot: on a repository that was not
        awaited it looks through a connection of its own, and so it does at any file, beside the transactions of others.

        Raises:
            DatabaseUnavailableError: The database cannot be reached, opened or read.
            ConfigurationError: It is open in another event loop or process, or this task has a transaction open.
            RepositoryClosedError: The repository was closed.
        """
        return await self._looked(inspect_schema)

    async def plan(self) -> SchemaPlan:
        """
        Tell what a boot would do now: why it would be refused, or each migration that it would apply, with its SQL.

        As ``inspect``, it writes nothing and needs no boot. Where it would migrate, it also reads every row that could
        stand in the way, which takes about as long as in that boot; it waits for no lock.

        Raises:
            DatabaseUnavailableError: The database cannot be reached, opened or read.
            ConfigurationError: It is open in another event loop or process, or this task has a transaction open.
            RepositoryClosedError: The repository was closed.
        """
        return await self._looked(plan_schema)

    async def status(self) -> StoreStatus:
        """
        Tell all that an operator asks first: the server, the schema and its history, queues, leases, switches, sizes.

        As ``inspect``, it writes nothing and needs no boot; what cannot be told, such as of a schema that is refused,
        is said in ``unknown``. It reads all that waits and is held, as ``attempts.stats`` does.

        Raises:
            DatabaseUnavailableError: The database cannot be reached, opened or read.
            ConfigurationError: It is open in another event loop or process, or this task has a transaction open.
            RepositoryClosedError: The repository was closed.
        """
        return await self._looked(status_of_store)

    async def doctor(self) -> Diagnosis:
        """
        Find out what is wrong: drift, with the SQL that mends it, and whatever around the tables makes them slow or
        unsafe.

        As ``inspect``, it writes nothing and needs no boot; it judges as a verify-only boot that refuses drift. On
        PostgreSQL it reads through two connections at once, to notice a pooler.

        Raises:
            DatabaseUnavailableError: The database cannot be reached, opened or read.
            ConfigurationError: It is open in another event loop or process, or this task has a transaction open.
            RepositoryClosedError: The repository was closed.
        """
        return await self._looked(diagnose)

    async def activity(self, *, over: timedelta = timedelta(seconds=10)) -> Activity:
        """
        Tell what moves in each queue: what waits and is held now, and how much of it ended within *over* until now.

        As ``inspect``, it writes nothing and needs no boot, but only of a schema that a verify-only boot would serve.

        Raises:
            SchemaError: It would not; the subclass says why.
            DatabaseUnavailableError: The database cannot be reached, opened or read.
            ConfigurationError: *over* is no span; it is open in another event loop or process, or this task has a
                transaction open.
            RepositoryClosedError: The repository was closed.
        """
        return await self._looked(functools.partial(activity_of_store, over=over))

    async def can_run(self) -> Compatibility:
        """
        Look at the schema as it is now, and tell whether this release can run on it, and which older ones can then.

        As ``inspect``: it writes nothing, and needs no boot.

        Raises:
            DatabaseUnavailableError: The database cannot be reached, opened or read.
            ConfigurationError: It is open in another event loop or process, or this task has a transaction open.
            RepositoryClosedError: The repository was closed.
        """
        return await self._looked(can_run)

    async def _looked(self, look: Callable[[Database, Sequence[Migration], Policy], Awaitable[T]]) -> T:
        with self._looking():
            return await look(self._database, load_migrations(self._database.backend), self._policy)

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """Something is looked at meanwhile, booted or not."""
        loop = _running_loop()
        if self._closed:
            raise RepositoryClosedError(f"{self!r} cannot look any more: construct another")
        self._gate.check()
        with self._gate.opening(loop):
            yield

    async def backup(self, path: str | os.PathLike[str]) -> BackupReport:
        """
        Write all that is stored into a new archive at *path*, as it is at one instant, while others go on working.

        It needs no boot, migrates nothing and takes a store of any version up to this release's, so that an upgrade can
        be preceded by it. The archive is readable for its owner alone, appears under its name when it has been proved
        by reading it back, and never takes the place of a file. Columns, indexes and triggers of the operator's on our
        tables are not in it; the report names them. On PostgreSQL the role needs to read the tables, and no more.

        Raises:
            ArchiveError: There is such a file, it cannot be written, or there is no store.
            UnportableRowsError: Another program wrote into a SQLite file what its columns are not for.
            SchemaError: The store is a newer release's or somebody else's, or has lost tables or columns; or its tables
                were locked for ``lock_timeout``.
            DatabaseUnavailableError: The database cannot be reached, opened or read.
            ConfigurationError: It is open in another event loop or process, or this task has a transaction open.
            RepositoryClosedError: The repository was closed.
        """
        with self._looking():
            return await backup(self._database, path, patience=self._policy.lock_timeout)

    async def restore(
        self, path: str | os.PathLike[str], *, force: bool = False, keep_in: str | None = None
    ) -> RestoreReport:
        """
        Put what an archive holds in the place of what is stored, at the archive's version, and keep what was there.

        Stop every worker first. Whatever ends it, be it SIGKILL, the old store or the new one is there as a whole, and
        the same call again succeeds. An archive of either database can be restored.

        The history after the backup is cut off, and nobody who worked in it can finish anything here: what was held by
        a lease is queued again without having lost its try, and the fencing tokens of all that may be claimed again go
        on a million further. Who works on PostgreSQL all the same waits until it is done, and goes on in the new store.

        Args:
            path: An archive that ``backup`` wrote.
            force: Also while leases are active, other processes have the store open or its tables locked, or the
                application's views and foreign keys depend on it and would go on using what is replaced.
            keep_in: On PostgreSQL, the schema that shall keep the tables which are replaced, where the role may not
                create one. Otherwise they are kept in a new one, called as the runtime schema and ``_before_<time>``,
                and on SQLite in a file beside, ``<file>.before-<time>``.

        Raises:
            StoreInUseError: Somebody uses what would be replaced; see *force*.
            ArchiveError: The archive is damaged, or none of ours.
            SchemaError: The archive is of a newer release, or the database is unsuitable.
            RefusedError: The role may not do it.
            DatabaseUnavailableError: The database cannot be reached, opened, read or written.
            ConfigurationError: The repository is open: restore by one that was not awaited.
            RepositoryClosedError: The repository was closed.
        """
        check_flag("force", force)
        with self._replacing():
            return await restore(self._database, path, force=force, keep_in=keep_in, patience=self._policy.lock_timeout)

    async def _move(
        self, target: "RuntimeRepository", *, force: bool, folder: str | os.PathLike[str] | None
    ) -> MoveReport:
        check_flag("force", force)
        if not isinstance(target, RuntimeRepository) or target is self:
            raise ConfigurationError(f"the target is {target!r}: expected another repository than the source")
        with self._looking(), target._replacing():
            return await move_between(
                self._database, target._database, force=force, folder=folder, patience=self._policy.lock_timeout
            )

    @contextlib.contextmanager
    def _replacing(self) -> Iterator[None]:
        """What is stored is replaced meanwhile, which must come before any boot."""
        with self._looking():
            if self._report is not None or self._boot is not None:
                raise ConfigurationError(
                    f"{self!r} is in use: close it, and construct another that is not awaited for this"
                )
            yield

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[RuntimeTransaction]:
        """
        Let several verbs, and the application's own statements, take effect together.

        They are committed when the block ends and rolled back when it raises or is cancelled; a cancelled block may
        still have been committed if it had come to its end. Use the nouns of what it yields: those of the repository
        would not be part of it, and could wait for it for ever, so the task that has it open is refused them. Tasks of
        the block's own may share what it yields, and take turns. On SQLite, which has one writer, the verbs of every
        other task wait for the block; keep it short.

        Raises:
            ConfigurationError: This task has a transaction open on this repository already, or the repository is open
                in another event loop or process.
            RepositoryClosedError: The repository is not open.
            DatabaseUnavailableError: The database cannot be reached, or does not commit.
        """
        async with self._transaction() as transaction:
            yield transaction

    @contextlib.asynccontextmanager
    async def _transaction(
        self, statements: AbstractAsyncContextManager[Transaction] | None = None
    ) -> AsyncIterator[RuntimeTransaction]:
        own = self._gate.atomic()
        async with contextlib.AsyncExitStack() as stack:
            opened = await stack.enter_async_context(statements or own)
            if statements is not None and self._observer is not None:
                # Its end is not seen, so what it did is not told.
                opened = ObservedTransaction(opened, self._observer, [])
            gate = _TransactionGate(_OneByOne(opened), self._gate)
            try:
                with self._gate.within_transaction():
                    yield RuntimeTransaction(gate, opened.connection)
            finally:
                gate.is_open = False
                if self._gate.is_inherited:
                    # To end it is the parent's affair.
                    _keep_for_good(stack.pop_all())
            if self._gate.is_inherited:
                self._gate.check_place()
        if statements is None:
            gate.committed()

    async def close(self) -> None:
        """
        Close it for good and leave no connection, thread or task. May be repeated; a boot under way is given up.

        In the child of a fork it does nothing: what is open is the parent's.

        Raises:
            ConfigurationError: It is open in another event loop, and stays open there. Where that loop has ended, its
                connections are dropped now.
        """
        if self._gate.is_inherited:
            return
        if self._gate.is_foreign():
            self._refuse_to_close()
        self._closed = True
        self._gate.is_open = False
        if self._boot is not None:
            await self._give_up(self._boot)
        await self._database.close()
        self._gate.loop = None

    def _refuse_to_close(self) -> Never:
        if self._gate.loop is not None and self._gate.loop.is_closed():
            self._closed = True
            self._gate.is_open = False
            self._database.abandon()
        self._gate.check_place()
        raise AssertionError

    def _let_go(self) -> None:
        """Abandon what is open; where its event loop still runs in another thread, there."""
        loop = self._gate.loop
        if loop is not None and loop.is_running() and self._gate.is_foreign():
            # Unless it ends at this very moment.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._database.abandon)
        else:
            self._database.abandon()

    def _inherit(self) -> None:
        """This process is the child of a fork: keep what is open for good, since letting go of it would close it."""
        if self._gate.loop is not None:
            self._gate.is_inherited = True
            _keep_for_good(self)
            self._database.inherited()

    async def _ready(self) -> Self:
        loop = _running_loop()
        if not self._closed:
            self._gate.check_place()
        while self._report is None and not self._closed:
            if self._boot is None:
                self._gate.loop = loop
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
            # One that was left behind has no connection any more: what is open by now is another boot's.
            if self._boot is not None and self._boot.task is asyncio.current_task():
                await self._database.close()
            raise

    def _wanted(self, before_migrate: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
        """*before_migrate*, after which a boot ends that was left behind, since this did not heed its cancellation."""

        async def call() -> object:
            answer = await before_migrate()
            if asyncio.current_task() in self._left:
                raise asyncio.CancelledError
            return answer

        return call

    async def _ensure(self) -> SchemaReport:
        report = await ensure_schema(
            observed_boot(self._database, self._observer), load_migrations(self._database.backend), self._policy
        )
        if self._observer is not None:
            self._observer.booted(report)
        return report

    async def _join(self, boot: "_Boot") -> None:
        """
        Wait for a boot.

        Only an awaiter that is still waiting when boot ends opens the repository; if all were cancelled, what it opened
        is closed.
        """
        boot.awaiters += 1
        try:
            either: list[asyncio.Future[Any]] = [boot.task, boot.left_behind]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if boot.awaiters == 1 and self._report is None:
                await self._give_up(boot)
            raise
        finally:
            boot.awaiters -= 1
        if self._boot is boot and not boot.given_up:
            self._boot = None
            if boot.has_failed:
                self._gate.loop = None
        if not self._closed and boot.task.done():
            self._report = boot.task.result()
            self._gate.is_open = True

    def _give_up(self, boot: "_Boot") -> Coroutine[Any, Any, None]:
        """Mark it at once, so that nobody joins it any more; see it off when awaited."""
        if boot.given_up:
            return finish(_wait_for(boot.ended), within=2 * CLEAN_UP + _DYING)
        boot.given_up = True
        boot.task.cancel()
        return finish(self._see_off(boot), within=2 * CLEAN_UP + _DYING)

    async def _see_off(self, boot: "_Boot") -> None:
        """Let it end. One that waits for a silent server loses its connection, and is left behind at worst."""
        try:
            await asyncio.wait([boot.task], timeout=CLEAN_UP)
            if not boot.task.done():
                self._database.abandon()
                await asyncio.wait([boot.task], timeout=_DYING)
            if not boot.task.done():
                self._left.add(boot.task)
                leave(boot.task)
                boot.left_behind.set_result(None)
            elif not boot.has_failed:
                # It ended well in the very turn in which it was given up: nobody will close what it opened.
                await self._database.close()
        finally:
            self._boot = None
            self._gate.loop = None
            boot.ended.set()


class _Gate(Unique):
    """What the nouns query, while that is open, for those who may use it."""

    closed = "the repository is not open: await it first, and do not use it after close()"
    is_within = False

    def __init__(self, queries: Source) -> None:
        self._queries = queries
        self._within: set[asyncio.Task[Any]] = set()
        self.is_open = False
        self.is_inherited = False
        """Whether this process is the child of the one that opened it."""
        self.loop: asyncio.AbstractEventLoop | None = None
        """The event loop that what is open, or being opened, belongs to."""

    # Each coroutine that only awaits another would cost as much as a column.
    def fetch(self, query: str, *args: object) -> Coroutine[Any, Any, Sequence[Row]]:
        return self._opened().fetch(query, *args)

    async def glance(self, query: str, *args: object, within: float) -> Sequence[Row] | None:
        return await self._opened().glance(query, *args, within=within)

    def atomic(self) -> AbstractAsyncContextManager[Transaction]:
        return self._opened().atomic()

    def tell(self, queues: Iterable[str]) -> None:
        # Closed meanwhile, it has nobody to tell.
        if self.is_open:
            self._queries.tell(queues)

    def after_commit(self, do: Callable[[], None]) -> None:
        do()

    def watch(self, queues: Collection[str]) -> AbstractAsyncContextManager[Watch]:
        return self._opened().watch(queues)

    async def vacuum(self) -> None:
        await self._opened().vacuum()

    async def heartbeats(self) -> Heartbeats:
        return await self._opened().heartbeats()

    def _opened(self) -> Source:
        if not self.is_open and not self.is_inherited:
            raise RepositoryClosedError(self.closed)
        self.check()
        return self._queries

    def check(self) -> None:
        """
        Let through who may use what is open.

        Raises:
            ConfigurationError: Another event loop or process, or a task that has a transaction open.
        """
        self.check_place()
        if self._within and asyncio.current_task() in self._within:
            raise ConfigurationError(
                "this task has a transaction open on this repository, which the repository's own verbs are no part of "
                "and could wait for without end: use the nouns of the transaction"
            )

    def check_place(self) -> None:
        """As ``check``, without the last."""
        if self.is_inherited:
            raise ConfigurationError(
                "this repository was opened before the process was forked, and what is open belongs to the parent: "
                "open one of your own in the child"
            )
        if self.is_foreign():
            ended = self.loop is not None and self.loop.is_closed()
            raise ConfigurationError(
                "this repository was opened in an event loop that has ended: open one in the loop that uses it"
                if ended
                else "this repository is open in another event loop, or another thread: use and close it there, and "
                "open one of your own here"
            )

    def is_foreign(self) -> bool:
        """Whether what is open belongs to another event loop than the one that runs here."""
        return self.loop is not None and self.loop is not asyncio._get_running_loop()

    @contextlib.contextmanager
    def opening(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Something of *loop* is open meanwhile, if nothing is open for longer."""
        if self.loop is not None:
            yield
            return
        self.loop = loop
        try:
            yield
        finally:
            # Unless it was awaited meanwhile.
            if not self.is_open:
                self.loop = None

    @contextlib.contextmanager
    def within_transaction(self) -> Iterator[None]:
        """This task has a transaction open meanwhile."""
        task = asyncio.current_task()
        if task is None:
            yield
            return
        self._within.add(task)
        try:
            yield
        finally:
            self._within.discard(task)


class _TransactionGate(_Gate):
    """What the nouns of a transaction query, until it ends."""

    closed = "the transaction has ended: use what it yields within its block only"
    is_within = True

    def __init__(self, queries: Source, repository: _Gate) -> None:
        super().__init__(queries)
        self.is_open = True
        self._repository = repository
        self._undone: list[Callable[[], None]] = []

    def check(self) -> None:
        self._repository.check_place()

    def after_commit(self, do: Callable[[], None]) -> None:
        self._undone.append(do)

    def committed(self) -> None:
        for do in self._undone:
            do()


class _OneByOne:
    """Queries in one transaction, whichever tasks make them: parts of it that overlap would undo each other."""

    def __init__(self, statements: Transaction) -> None:
        self._statements = statements
        self._turn = asyncio.Lock()

    async def fetch(self, query: str, *args: object) -> Sequence[Row]:
        async with self._turn:
            return await self._statements.fetch(query, *args)

    async def glance(self, query: str, *args: object, within: float) -> Sequence[Row] | None:
        async with asyncio.timeout(within):
            return await self.fetch(query, *args)

    @contextlib.asynccontextmanager
    async def atomic(self) -> AsyncIterator[Transaction]:
        async with self._turn, self._statements.atomic() as part:
            yield part

    def tell(self, queues: Iterable[str]) -> None:
        self._statements.tell(queues)

    def watch(self, queues: Collection[str]) -> AbstractAsyncContextManager[Watch]:  # noqa: ARG002
        raise ConfigurationError("a transaction cannot wait for work, it sees none that comes: wait outside of it")

    async def vacuum(self) -> None:
        raise ConfigurationError("a transaction cannot vacuum: do it outside of it")

    async def heartbeats(self) -> Heartbeats:
        raise ConfigurationError("a transaction cannot hold a lease, it commits too late: hold it outside of it")


class _Boot:
    """A boot under way, and how many wait for it."""

    def __init__(self, task: "asyncio.Task[SchemaReport]") -> None:
        self.task = task
        self.awaiters = 0
        self.given_up = False
        self.ended = asyncio.Event()
        """Nobody has to wait for it any more."""
        self.left_behind: asyncio.Future[None] = task.get_loop().create_future()

    @property
    def has_failed(self) -> bool:
        """Of one that has ended: whether there is nothing that it opened."""
        return self.task.cancelled() or self.task.exception() is not None


async def _wait_for(event: asyncio.Event) -> None:
    await event.wait()


_constructed: "weakref.WeakSet[RuntimeRepository]" = weakref.WeakSet()

_kept: list[object] = []
"""What a parent had open when it forked this process."""


def _keep_for_good(inherited: object) -> None:
    """
    Let what is *inherited* be collected never, not even when the interpreter ends.

    A connection that is collected is closed: SQLite would clean up beside the parent's, under locks that are not ours;
    a transport would change the set of events that the parent waits for.
    """
    _kept.append(inherited)
    # Where ctypes is missing, it is collected with this module, as the very last.
    with contextlib.suppress(ImportError):
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


def _inherit() -> None:
    for repository in list(_constructed):
        repository._inherit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_inherit)


# Read once, at import: a boot reads no files, and of four hundred that start at the same second none parses them.
# A migration that has no catalog yet fails the boot, not the program that writes its catalog.
for _backend in get_args(Backend):
    with contextlib.suppress(ConfigurationError):
        load_migrations(_backend)


def check_seconds(name: str, value: float, *, positive: bool = False) -> None:
    """A time-out in seconds: finite, never negative, and not zero where it must be positive."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # No clock counts further, and an integer may be larger than any float.
    if not is_number or not 0 <= value < 2**62 or (positive and not value):
        raise ConfigurationError(
            f"{name} is {shown(value)}: expected a number of seconds, {'more than 0' if positive else '0 or more'}"
        )


def check_flag(name: str, value: object) -> None:
    """Nothing but True and False: ``"false"``, as it comes from the environment, would count as true."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} is {shown(value)}: expected True or False")


def _checked(before_migrate: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
    """*before_migrate*, refused now if it can be told to be no coroutine function, and otherwise when it is called."""
    expected = "expected a coroutine function without arguments"
    if not callable(before_migrate) or is_known_to_be_sync(before_migrate):
        raise ConfigurationError(f"before_migrate is {shown(before_migrate)}: {expected}")

    async def call() -> object:
        begun = before_migrate()
        if not inspect.isawaitable(begun):
            raise ConfigurationError(f"before_migrate returned {type(begun).__name__}, nothing to await: {expected}")
        return await begun

    return call


def is_known_to_be_sync(function: Any) -> bool:
    """Whether *function* can be told to be no coroutine function; of some callables it shows when they are called."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function) and not inspect.iscoroutinefunction(function):
        function = type(function).__call__
    # A lambda has no other way to call a coroutine function with arguments.
    return (
        inspect.isroutine(function)
        and not inspect.iscoroutinefunction(function)
        and getattr(function, "__name__", "") != "<lambda>"
    )


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "runtime_repo needs a running asyncio event loop, since its drivers do: "
            "use asyncio.run(), or anyio with backend='asyncio'; trio is not supported"
        ) from None
