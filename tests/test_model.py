"""
Random verbs at random times, on SQLite and on PostgreSQL, against one small model: every answer and every error is the
same, and so is all that is stored afterwards.

``ORIS_TEST_EXAMPLES=5000`` runs so many other examples, such as for a night.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from runtime_repo import (
    Attempt,
    AttemptStatus,
    Lease,
    NewAttempt,
    PostgresRuntimeRepository,
    RetryPolicy,
    RuntimeRepoError,
    RuntimeRepository,
    SqliteRuntimeRepository,
)
from tests.model import Model

EXAMPLES = int(os.environ.get("ORIS_TEST_EXAMPLES", "0"))
SETTINGS = settings(
    max_examples=EXAMPLES or 120,
    derandomize=not EXAMPLES,
    stateful_step_count=50,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)

Opened = Callable[[], AbstractAsyncContextManager[RuntimeRepository]]

SECOND = timedelta(seconds=1)

# Few of each, so that they meet; spans that add up to each other, so that the very instant of an end is met.
spans = st.sampled_from([SECOND, timedelta(milliseconds=1), 2 * SECOND, 60 * SECOND])
delays = st.just(timedelta(0)) | spans
ids = st.sampled_from([f"a{number}" for number in range(4)])
queues = st.sampled_from(["default", "default", "mail"])
workers = st.sampled_from(["worker1", "worker2"])
limits = st.sampled_from([1, 1, 2, 3])
given_out = st.integers(0, 5) | st.integers(0, 29)
"""A lease, the newest first: most are stale, as those are that were read or renewed before."""

# What two attempts of one id must have in common: run, queue and payload.
identities = st.sampled_from(
    [("run1", "default", None)] * 8 + [("run2", "mail", {"n": [1, None]}), ("run1", "mail", "")]
)
new_attempts = st.tuples(ids, identities, st.none() | delays, st.integers(0, 1), st.integers(1, 3))
New = tuple[str, tuple[str, str, Any], timedelta | None, int, int]

policies = st.builds(
    RetryPolicy,
    base=delays,
    factor=st.sampled_from([1, 2.0]),
    cap=delays,
    jitter=st.just(0),
    max_attempts=st.none() | st.integers(1, 3),
)
with_a_lease = precondition(lambda store: store.leases)


class Store(RuleBasedStateMachine):
    """A repository and the model, which are told the same."""

    def __init__(self, runner: asyncio.Runner, opened: Opened) -> None:
        super().__init__()
        self.runner = runner
        self.stack = AsyncExitStack()
        self.repo = runner.run(self.stack.enter_async_context(opened()))
        self.model = Model()
        self.now = datetime(2030, 1, 1, tzinfo=UTC)
        self.leases: list[Lease] = []
        self.writes: list[Callable[[], Any]] = []
        self.steps = 0

    def teardown(self) -> None:
        """Look once more, and close what was opened."""
        try:
            self._compare()
        finally:
            self.runner.run(self.stack.aclose())

    def both(
        self,
        verb: str,
        *args: Any,
        told: Callable[[Any], dict[str, Any]] = lambda _: {},
        timed: bool = True,
        **options: Any,
    ) -> Any:
        """
        Let both do it and compare. Return the answer, None where it was an error.

        *told* is what the model has to be told of the answer: where the contract leaves a choice, what was chosen.
        """
        if timed:
            options["now"] = self.now
        noun, name = verb.split(".")
        answer = _outcome(lambda: self.runner.run(getattr(getattr(self.repo, noun), name)(*args, **options)))
        modelled = self.model.list_leases if verb == "leases.list" else getattr(self.model, name)
        expected = _outcome(lambda: modelled(*args, **options, **told(answer)))
        assert answer == expected, f"{verb} was expected to be answered otherwise"
        return None if isinstance(answer, Refusal) else answer

    def lease(self, number: int) -> Lease:
        """One that was given out."""
        return self.leases[-1 - number % len(self.leases)]

    @invariant()
    def everything_stored_is_the_same(self) -> None:
        """Each attempt and each lease, whole. Now and then: most of it is in the answers as well."""
        self.steps += 1
        if self.steps % 5 == 0:
            self._compare()

    def _compare(self) -> None:
        self.both("attempts.list", limit=1000, timed=False)
        self.both("leases.list", limit=1000, timed=False)

    @rule(span=spans)
    def time_passes(self, span: timedelta) -> None:
        """Otherwise it stands still."""
        self.now += span

    @rule(number=st.integers(0, 3))
    def again(self, number: int) -> None:
        """Whatever a lease's holder has done, and whatever has happened since."""
        if number < len(self.writes):
            self.writes[-1 - number]()

    def write(self, verb: str, *args: Any, **options: Any) -> None:
        """Do what is done with a lease, now and perhaps again."""
        self.writes.append(partial(self.both, verb, *args, **options))
        self.writes[-1]()

    # --- attempts ---

    @initialize(new=st.lists(new_attempts, min_size=4, max_size=9), limit=limits, ttl=spans)
    def begin(self, new: Sequence[New], limit: int, ttl: timedelta) -> None:
        """Something is there and something is held, or nothing can happen to it."""
        self._enqueue_many(new)
        self._claim("worker1", limit, ["default", "mail"], ttl)

    @rule(new=st.lists(new_attempts, min_size=1, max_size=4), together=st.booleans(), named=st.booleans())
    def enqueue(self, new: Sequence[New], *, together: bool, named: bool) -> None:
        """Some of them stored already, or given twice; one by one also without an id."""
        if together:
            self._enqueue_many(new)
            return
        for given in map(self._new, new):
            options = asdict(given)
            if named:
                self.both("attempts.enqueue", **options)
            else:
                del options["attempt_id"]
                self.both("attempts.enqueue", told=lambda answer: {"attempt_id": answer.attempt_id}, **options)

    def _enqueue_many(self, new: Sequence[New]) -> None:
        self.both("attempts.enqueue_many", [self._new(one) for one in new], told=_blamed)

    def _new(self, new: New) -> NewAttempt:
        attempt_id, (run_id, queue, payload), delay, priority, max_attempts = new
        not_before = None if delay is None else self.now + delay - SECOND
        return NewAttempt(run_id, attempt_id, queue, priority, payload, not_before, max_attempts)

    @rule(
        attempt_id=ids,
        run_id=st.sampled_from([None, "run1", "run2"]),
        status=st.none() | st.sampled_from(AttemptStatus),
        queue=st.none() | queues,
        after=st.just("") | ids,
        worker_id=st.none() | workers,
        limit=limits,
    )
    def look(self, attempt_id: str, queue: str | None, worker_id: str | None, limit: int, **filters: Any) -> None:
        """By id, by each filter, and ahead. Leases that are read can be used like those that were claimed."""
        self.both("attempts.get", attempt_id, timed=False)
        self.both("attempts.find", attempt_id, timed=False)
        self.both("attempts.list", queue=queue, limit=limit, timed=False, **filters)
        self.both("attempts.list_dispatchable", queue=queue or "default", limit=limit)
        self.both("attempts.stats")
        page = self.both("leases.list", worker_id=worker_id, limit=limit, timed=False)
        for last in page[-1:]:
            self.both("leases.list", worker_id=worker_id, after=last.lease_id, limit=limit, timed=False)
            self.leases.append(last)

    @rule(attempt_id=ids, verb=st.sampled_from(["retry", "cancel", "prune"]), older_than=delays, limit=limits)
    def act_by_hand(self, attempt_id: str, verb: str, older_than: timedelta, limit: int) -> None:
        """Try it again, end it, or forget it."""
        if verb == "prune":
            self.both("attempts.prune", older_than=older_than, limit=limit)
        else:
            self.both(f"attempts.{verb}", attempt_id, timed=verb != "retry")

    @with_a_lease
    @rule(number=given_out)
    def start(self, number: int) -> None:
        """Begin."""
        self.write("attempts.start", self.lease(number))

    @with_a_lease
    @rule(many=st.lists(given_out, min_size=1, max_size=3), result=st.sampled_from([None, {"sum": 3}]))
    def complete(self, many: list[int], result: Any) -> None:
        """Finish one, or whichever are held of many, where an attempt may be given twice, under two tokens."""
        if len(many) == 1:
            self.write("attempts.complete", self.lease(many[0]), result)
        else:
            self.write("attempts.complete_many", [(self.lease(number), result) for number in many])

    @with_a_lease
    @rule(number=given_out, error=st.sampled_from(["boom", "bang"]), retry_in=st.none() | delays | policies)
    def fail(self, number: int, error: str, retry_in: timedelta | RetryPolicy | None) -> None:
        """Not finish."""
        self.write("attempts.fail", self.lease(number), error, retry_in=retry_in)

    # --- leases ---

    @rule(worker=workers, limit=limits, names=queues | st.lists(queues, min_size=1, max_size=3), ttl=spans, span=delays)
    def claim(self, worker: str, limit: int, names: str | list[str], ttl: timedelta, span: timedelta) -> None:
        """From one queue or several, after a while."""
        self.now += span
        self._claim(worker, limit, names, ttl)

    def _claim(self, worker: str, limit: int, names: str | list[str], ttl: timedelta) -> None:
        self.leases += self.both("leases.claim", worker, limit=limit, queues=names, ttl=ttl, told=_lease_ids)

    @rule(attempt_id=ids, worker=workers, ttl=spans)
    def claim_attempt(self, attempt_id: str, worker: str, ttl: timedelta) -> None:
        """This very one."""
        lease = self.both("leases.claim_attempt", attempt_id, worker, ttl=ttl, told=lambda lease: _lease_ids([lease]))
        self.leases += [lease] if lease else []

    @with_a_lease
    @rule(many=st.lists(given_out, min_size=1, max_size=3), ttl=spans)
    def heartbeat(self, many: list[int], ttl: timedelta) -> None:
        """Keep one, or whichever are held of many."""
        if len(many) == 1:
            lease = self.both("leases.heartbeat", self.lease(many[0]), ttl=ttl)
            self.leases += [lease] if lease else []
        else:
            self.both("leases.heartbeat_many", [self.lease(number) for number in many], ttl=ttl)

    @with_a_lease
    @rule(number=given_out, delay=st.none() | delays)
    def release(self, number: int, delay: timedelta | None) -> None:
        """Give it back."""
        self.write("leases.release", self.lease(number), delay=delay)

    @rule(limit=limits, grace=st.sampled_from([timedelta(0), SECOND]), span=st.sampled_from([60 * SECOND, SECOND]))
    def requeue_expired(self, limit: int, grace: timedelta, span: timedelta) -> None:
        """After a while."""
        self.now += span
        self.both("leases.requeue_expired", limit=limit, grace=grace, told=_taken)


class Refusal:
    """An error, compared by all that can be known of it."""

    def __init__(self, error: RuntimeRepoError) -> None:
        self.error = error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Refusal) and self._known == other._known

    def __hash__(self) -> int:
        return hash(str(self.error))

    def __repr__(self) -> str:
        return repr(self.error)

    @property
    def _known(self) -> tuple[object, ...]:
        return type(self.error), str(self.error), vars(self.error)


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RuntimeRepoError as error:
        return Refusal(error)


def _blamed(answer: Any) -> dict[str, Any]:
    return {"blamed": getattr(answer.error, "key", None) if isinstance(answer, Refusal) else None}


def _lease_ids(leases: Sequence[Lease | None]) -> dict[str, Any]:
    return {"lease_ids": {lease.attempt_id: lease.lease_id for lease in leases if lease}}


def _taken(attempts: Sequence[Attempt]) -> dict[str, Any]:
    return {"taken": [attempt.attempt_id for attempt in attempts]}


@pytest.fixture(autouse=True)
def numbered_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that are made are in the order of making, or an example could not be played again."""
    ids = (f"{number:09}" for number in count())
    monkeypatch.setattr("runtime_repo.values.new_ids", lambda: ids)


def drive(runner: asyncio.Runner, opened: Opened) -> None:
    """Run the machine's examples, each on an empty database."""
    run_state_machine_as_test(lambda: Store(runner, opened), settings=SETTINGS)  # type: ignore[arg-type]


def test_sqlite_keeps_its_promises(tmp_path: Path) -> None:
    """Each example has a file of its own."""
    paths = (tmp_path / f"{number}.db" for number in count())
    with asyncio.Runner() as runner:
        drive(runner, lambda: SqliteRuntimeRepository(next(paths)))


def test_postgres_keeps_its_promises(postgres_url: str, postgres_schema: str) -> None:
    """The examples share a runtime schema, which is emptied for each."""

    async def both() -> tuple[RuntimeRepository, asyncpg.Connection]:
        return await PostgresRuntimeRepository(postgres_url, schema=postgres_schema), await asyncpg.connect(
            postgres_url
        )

    with asyncio.Runner() as runner:
        repo, admin = runner.run(both())

        @asynccontextmanager
        async def emptied() -> AsyncIterator[RuntimeRepository]:
            tables = ", ".join(
                f"{postgres_schema}.runtime_{name}" for name in ("attempts", "queue", "leases", "finished")
            )
            await admin.execute(f"truncate {tables}")
            yield repo

        try:
            drive(runner, emptied)
        finally:
            runner.run(admin.close())
            runner.run(repo.close())
