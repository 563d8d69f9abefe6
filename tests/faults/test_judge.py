"""The judge of real runs, on histories that are written here: it sees each promise broken, and blames nobody else."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from runtime_repo import Attempt, AttemptStatus, Lease
from tests.faults.nemeses.history import Line
from tests.faults.nemeses.judge import LATE, LET_GO, RECOVERY, STOP, Evidence, Fate, Run, Tables, judge
from tests.faults.nemeses.workload import NO_BOOT, Role

TTL = 2.0
RESULT = {"by": "worker0"}


class Story:
    """What happened in a run whose last fault ended at 100, and whose load at 120."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.attempts: dict[str, Attempt] = {}
        self.leases: list[Lease] = []
        self.orders: list[str] = []
        self.effects: list[tuple[str, int]] = []
        self.fates: list[Fate] = []
        self.left = 0
        self._numbers = itertools.count()

    def line(self, at: float, kind: str, process: str = "worker0", **values: Any) -> None:
        """A process writes a line."""
        self.lines.append({"t": at, "k": kind, "p": process} | values)

    def call(
        self, at: float, verb: str, process: str = "worker0", *, took: float | None = 0.01, got: Any = (), **values: Any
    ) -> int:
        """A process calls a verb, and is answered unless *took* is None. Return the call's number."""
        number = next(self._numbers)
        self.line(at, "ask", process, n=number, f=verb, **values)
        if took is not None:
            self.line(at + took, "ok", process, n=number, f=verb, got=got)
        return number

    def claim(self, at: float, token: int, process: str = "worker0", lease: str | None = None) -> None:
        """A process claims the attempt `a`."""
        self.call(at, "claim", process, ttl=TTL, got=[["a", token, lease or f"lease {token}"]])

    def store(self, status: AttemptStatus = AttemptStatus.COMPLETED, token: int = 1, **values: Any) -> None:
        """In the end the attempt stands in the store."""
        known = {"attempt_id": "a", "attempt_no": 1, "max_attempts": 50, "payload": {"kind": "short"}, "result": RESULT}
        known |= {"status": status, "lease_version": token} | values
        blank = dict.fromkeys((field.name for field in dataclasses.fields(Attempt)), None)
        self.attempts[str(known["attempt_id"])] = Attempt(**{**blank, **known})  # type: ignore[arg-type]

    def hold(self, token: int) -> None:
        """In the end the attempt has a lease."""
        blank = dict.fromkeys((field.name for field in dataclasses.fields(Lease)), None)
        self.leases.append(Lease(**{**blank, "attempt_id": "a", "version": token}))  # type: ignore[arg-type]

    def fate(
        self, name: str, exit_code: int | None = None, asked_to_stop: float | None = None, ended: float | None = None
    ) -> None:
        """This became of a process."""
        role: Role = "worker" if name.startswith("worker") else "producer"
        self.fates.append(Fate(name, role, exit_code, asked_to_stop, ended))

    def broken(self) -> list[str]:
        """What the judge finds."""
        run = Run((), 100, 120, self.left, self.fates)
        tables = Tables(self.attempts, self.leases, self.orders, self.effects)
        verdict = judge(Evidence(self.lines, run, tables), Path())
        assert all(violation.promise in str(verdict) for violation in verdict.violations)
        return [violation.promise for violation in verdict.violations]


@pytest.fixture
def story() -> Story:
    """Nothing has happened yet."""
    return Story()


def test_an_ordinary_life_breaks_no_promise(story: Story) -> None:
    """Enqueued, claimed, worked on, taken over when the lease has ended, completed, and tried in vain by the first."""
    story.call(1, "enqueue", "producer0", a="a")
    story.claim(2, 1)
    story.line(2.1, "begin", a="a", token=1)
    story.line(2 + TTL, "step", a="a", token=1)
    story.call(4.5, "requeue_expired", "worker1", got=[["a", 1]])
    story.claim(5, 2, "worker1")
    story.line(5.1, "begin", "worker1", a="a", token=2)
    story.call(5.2, "heartbeat", "worker1", a="a", token=2, ttl=TTL)
    story.line(7.1, "step", "worker1", a="a", token=2)
    story.call(7.15, "complete", "worker1", a="a", token=2, value=RESULT)
    story.call(7.2, "complete", a="a", token=1, value=RESULT, took=None)
    story.store(token=2)
    assert story.broken() == []


def test_what_was_acknowledged_is_there(story: Story) -> None:
    """Of what was not acknowledged nothing is known; but many at once are all there or none."""
    story.call(1, "enqueue", a="a")
    story.call(2, "enqueue", a="b", took=None)
    assert story.broken() == ["an acknowledged attempt is not lost"]
    story.store()
    assert story.broken() == []
    story.call(3, "enqueue_many", ids=["c", "d"], took=None)
    assert story.broken() == []
    story.call(4, "enqueue_many", ids=["a", "d"], took=None)
    assert story.broken() == ["enqueue_many stores all, or none if it was not acknowledged"]


def test_what_was_rolled_back_was_not_acknowledged(story: Story) -> None:
    """A verb in a transaction counts when that is committed."""
    order = story.call(1, "order", took=None, a="a")
    story.call(1.1, "enqueue", a="a", within=order)
    assert story.broken() == []
    order = story.call(2, "order", took=1, a="a")
    assert story.broken() == ["an acknowledged attempt is not lost"]


def test_a_token_is_given_out_once(story: Story) -> None:
    """The same lease may be told of twice."""
    story.claim(1, 1)
    story.claim(1.005, 1)
    assert "a token is given out once" not in story.broken()
    story.claim(1.008, 1, "worker1", "another lease")
    assert "a token is given out once" in story.broken()


def test_tokens_grow(story: Story) -> None:
    """Who asks after another was answered gets a greater one; of two at once either may."""
    story.claim(1, 2)
    story.claim(1.005, 1, "worker1")
    assert "tokens grow" not in story.broken()
    story.claim(3, 1, "worker2", "lease 1")
    assert "tokens grow" in story.broken()


@pytest.mark.parametrize(
    ("stored", "promise"),
    [
        ({"token": 1}, "an acknowledged completion survives"),
        ({"status": AttemptStatus.QUEUED, "token": 2}, "an acknowledged completion survives"),
        ({"token": 2, "result": "another's"}, "a result is not overwritten"),
    ],
)
def test_a_completion_survives(story: Story, stored: dict[str, Any], promise: str) -> None:
    """With its token and its result."""
    story.call(1, "complete", a="a", token=2, value=RESULT)
    story.store(token=2)
    assert story.broken() == []
    story.store(**stored)
    assert story.broken() == [promise]


def test_one_owner_completes_an_attempt(story: Story) -> None:
    """And a lease ends in one way."""
    story.call(1, "complete", a="a", token=2, value=RESULT)
    story.store(token=2)
    story.call(2, "fail", a="a", token=2)
    assert story.broken() == ["a lease ends in one way"]
    story.call(1, "complete", a="a", token=1, value=RESULT)
    assert "one owner completes an attempt" in story.broken()


def test_a_cancellation_survives(story: Story) -> None:
    """Nobody completes what was cancelled."""
    story.call(1, "cancel", a="a")
    story.store(AttemptStatus.CANCELLED)
    assert story.broken() == []
    story.store(AttemptStatus.COMPLETED)
    assert story.broken() == ["an acknowledged cancellation survives"]


@pytest.mark.parametrize("verb", ["complete", "fail", "release", "start", "heartbeat"])
@pytest.mark.parametrize("loss", ["requeued", "claimed"])
def test_a_stale_write_is_refused(story: Story, verb: str, loss: str) -> None:
    """Whoever has lost the attempt has lost it before the successor's answer came."""
    story.claim(1, 1)
    if loss == "claimed":
        story.claim(4, 2, "worker1")
    else:
        story.call(4, "requeue_expired", "worker1", got=[["a", 1]])
    story.store(token=1)
    story.call(3.9, verb, a="a", token=1, took=0.05, value=RESULT, ttl=TTL)
    assert "a stale owner's write is refused" not in story.broken()
    story.call(5, verb, a="a", token=1, value=RESULT, ttl=TTL)
    assert "a stale owner's write is refused" in story.broken()


@pytest.mark.parametrize("heartbeat", [False, True])
def test_a_lease_is_not_taken_before_it_ends(story: Story, heartbeat: bool) -> None:  # noqa: FBT001
    """It lasts from when its holder asked for it, or for its renewal."""
    story.claim(1, 1)
    if heartbeat:
        story.call(2, "heartbeat", a="a", token=1, ttl=TTL)
    until = (2 if heartbeat else 1) + TTL
    story.claim(until - 0.02, 2, "worker1")
    assert story.broken() == []
    story.lines[-2]["t"] -= 0.2
    story.lines[-1]["t"] -= 0.2
    assert story.broken() == ["a lease is not taken before it ends"]
    story.call(2, "release", a="a", token=1, took=None)
    assert story.broken() == []


def test_a_body_ends_when_its_lease_cannot_be_proved(story: Story) -> None:
    """At the latest so long after; a process that did not run is excused for as long as it takes to act."""
    story.claim(1, 1)
    story.line(1.1, "begin", a="a", token=1)
    story.line(1 + TTL + LATE - 0.01, "step", a="a", token=1)
    assert story.broken() == []
    story.line(9, "step", a="a", token=1)
    assert story.broken() == ["hold() ends a body whose lease cannot be proved"]
    story.line(8.9, "overslept", since=2)
    assert story.broken() == []
    story.line(9.3, "step", a="a", token=1)
    assert story.broken() == ["hold() ends a body whose lease cannot be proved"]


def test_a_body_ends_before_another_begins(story: Story) -> None:
    """Not one step beside the successor."""
    story.claim(1, 1)
    story.claim(2, 2, "worker1")
    story.call(1.5, "release", a="a", token=1, took=None)
    story.line(1.1, "begin", a="a", token=1)
    story.line(2.1, "step", a="a", token=1)
    story.line(2.2, "begin", "worker1", a="a", token=2)
    assert story.broken() == []
    story.line(2.25, "step", a="a", token=1)
    assert story.broken() == ["a body ends before another's try begins"]


def test_transactions_are_atomic(story: Story) -> None:
    """A row and its attempt, or neither; an end, its effect and the next attempt, or none of them."""
    story.call(1, "order", took=None, a="a")
    story.orders = ["a"]
    assert story.broken() == ["transaction() is atomic"]
    story.store()
    assert story.broken() == []
    story.store(attempt_id="b", payload={"kind": "transaction"})
    assert story.broken() == ["transaction() is atomic"]
    story.effects = [("b", 1)]
    assert story.broken() == ["transaction() is atomic"]
    story.store(attempt_id="b+child")
    assert story.broken() == []
    story.effects = [("b", 1), ("b", 1)]
    assert story.broken() == ["transaction() is atomic"]


def test_an_acknowledged_transaction_survives(story: Story) -> None:
    """Also when all of it is gone alike."""
    story.call(1, "finish", a="a", token=1)
    assert story.broken() == ["an acknowledged transaction survives"]


def test_tries_are_counted(story: Story) -> None:
    """An attempt fails after its last try, and has no more."""
    story.store(AttemptStatus.FAILED, attempt_no=3, max_attempts=3)
    assert story.broken() == []
    story.store(AttemptStatus.FAILED, attempt_no=2, max_attempts=3)
    assert story.broken() == ["an attempt fails after its last try only"]
    story.store(AttemptStatus.FAILED, attempt_no=4, max_attempts=3)
    assert story.broken() == ["there are no more tries than max_attempts"]


def test_what_is_held_has_a_lease(story: Story) -> None:
    """With its token; and nothing else has one."""
    story.store(AttemptStatus.RUNNING, 2)
    assert story.broken() == ["what is held has a lease, and nothing else"]
    story.hold(2)
    assert story.broken() == []
    story.store(AttemptStatus.RUNNING, 3)
    assert story.broken() == ["what is held has a lease, and nothing else"]
    story.store(AttemptStatus.COMPLETED, 2)
    assert story.broken() == ["what is held has a lease, and nothing else"]


@pytest.mark.parametrize(("name", "sign"), [("worker0", "begin"), ("producer0", "ok")])
def test_a_process_works_again(story: Story, name: str, sign: str) -> None:
    """Who was open when the last fault ended, and lived on; a worker that only sweeps does not work."""
    story.line(1, "open", name)
    story.fate(name, 0, asked_to_stop=121, ended=122)
    story.line(99, sign, name, a="a", token=1, n=-1)
    if name == "worker0":
        story.call(101, "requeue_expired", name)
    assert story.broken() == ["every process works again by itself"]
    story.line(100 + RECOVERY + 1, sign, name, a="a", token=1, n=-1)
    assert story.broken() == ["every process works again by itself"]
    story.line(100 + RECOVERY - 1, sign, name, a="a", token=1, n=-1)
    assert story.broken() == []


def test_who_is_gone_need_not_work_again(story: Story) -> None:
    """Killed or told to stop before the load ended."""
    story.line(1, "open", "worker0")
    story.line(1, "open", "worker1")
    story.fate("worker0", -9, ended=101)
    story.fate("worker1", 0, asked_to_stop=99, ended=100)
    assert story.broken() == []


def test_what_was_enqueued_is_done(story: Story) -> None:
    """Once there was time for it."""
    story.left = 1
    assert story.broken() == ["what was enqueued is done"]


@pytest.mark.parametrize(
    ("exit_code", "asked_to_stop", "ended", "promise"),
    [
        (None, None, None, None),
        (-9, None, 5, None),
        (NO_BOOT, None, 5, None),
        (0, None, 5, "a process goes on until it is told to stop"),
        (1, None, 5, "a process goes on until it is told to stop"),
        (0, 5, 5 + STOP, None),
        (0, 5, 6 + STOP, f"a worker stops within {STOP:g} s"),
        (None, 5, None, f"a worker stops within {STOP:g} s"),
        (1, 5, 6, "a worker that is told to stop ends well"),
    ],
)
def test_a_worker_stops_when_it_is_told_to(
    story: Story, exit_code: int | None, asked_to_stop: float | None, ended: float | None, promise: str | None
) -> None:
    """In time and well, and not otherwise."""
    story.fate("worker0", exit_code, asked_to_stop, ended)
    assert story.broken() == ([] if promise is None else [promise])


def test_a_caller_is_let_go(story: Story) -> None:
    """Soon after its own time-out."""
    story.line(5, "patience", "producer0", allowed=1, took=1 + LET_GO - 0.1)
    assert story.broken() == []
    story.line(9, "patience", "producer0", allowed=1, took=1 + LET_GO + 0.1)
    assert story.broken() == ["a caller that gives up is let go"]
