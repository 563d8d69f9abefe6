"""
The promises, each judged from what the processes wrote down and from what stands in the store in the end.

Only what was acknowledged counts as done: a call that raised, was cancelled or was cut off by a kill may have happened
or not. "Before" means that one call had returned when the other was made. A process that did not run, because it was
stopped or because the machine was busy, is not blamed for what it did not do meanwhile.
"""

import itertools
import math
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime_repo import Attempt, AttemptStatus, Lease
from tests.faults.nemeses.history import Line
from tests.faults.nemeses.workload import GRACE, NO_BOOT, Role

LATE = 0.3
"""Seconds after the end of its lease's proof in which a body must have been cancelled."""

RECOVERY = 10.0
"""Seconds after the last fault in which every process must have done something again."""

STOP = GRACE + 5
"""Seconds in which a worker must have ended that was told to stop."""

LET_GO = 2.5
"""Seconds in which a caller that gives up must be let go."""

_SLACK = 0.05
_EXIT = 0.5
"""Seconds that a process takes to end once its program has ended."""

_SHOWN = 3
"""How many of the violations of one promise are shown in full."""

_TAIL = 15
"""How many lines are shown of what led to one."""


@dataclass(frozen=True)
class Injected:
    """A fault that was done."""

    name: str
    words: str
    since: float
    until: float


@dataclass(frozen=True)
class Fate:
    """What became of a process."""

    name: str
    role: Role
    exit_code: int | None
    """None while it lives; -9 when it was killed, or killed itself."""
    asked_to_stop: float | None
    ended: float | None


@dataclass(frozen=True)
class Run:
    """What was done, and when."""

    faults: Sequence[Injected]
    healed: float
    """When the last fault was over."""
    loaded_until: float
    """When nothing more was enqueued."""
    left: int
    """How many attempts were not done although there was time."""
    fates: Sequence[Fate]


@dataclass(frozen=True)
class Tables:
    """What stands in the store in the end."""

    attempts: Mapping[str, Attempt]
    leases: Sequence[Lease]
    orders: Iterable[str]
    effects: Sequence[tuple[str, int]]
    """The application's rows: each has the id of an attempt that was finished in its transaction, and the token."""
    problems: Sequence[str] = ()
    """What is wrong with the schema or the file."""


@dataclass(frozen=True)
class Violation:
    """A promise that was broken, and the attempt or the process that shows it."""

    promise: str
    words: str
    attempt_id: str | None = None
    process: str | None = None
    at: float = math.inf
    """When, if what led to it tells more than the end."""


@dataclass(frozen=True)
class Call:
    """A verb that was called; *answered* and *answer* are None unless it was acknowledged."""

    verb: str
    process: str
    asked: float
    values: Line
    answered: float | None = None
    answer: Line = field(default_factory=dict)

    @property
    def attempt_id(self) -> str:
        value: str = self.values["a"]
        return value

    @property
    def token(self) -> int:
        value: int = self.values["token"]
        return value


@dataclass(frozen=True)
class Claim:
    """A lease that was given out and acknowledged."""

    attempt_id: str
    token: int
    lease_id: str
    process: str
    asked: float
    answered: float
    ttl: float


class Evidence:
    """The lines of all processes, and what follows from them."""

    def __init__(self, lines: Iterable[Line], run: Run, tables: Tables) -> None:
        self.lines = sorted(lines, key=lambda line: line["t"])
        self.run = run
        self.tables = tables
        self.calls = list(_calls(self.lines))
        self.claims: dict[str, list[Claim]] = defaultdict(list)
        for call in self.acknowledged("claim"):
            for attempt_id, token, lease_id in call.answer["got"]:
                claim = Claim(attempt_id, token, lease_id, call.process, call.asked, _time(call), call.values["ttl"])
                self.claims[attempt_id].append(claim)
        self.requeued: dict[tuple[str, int], float] = {}
        for call in self.acknowledged("requeue_expired"):
            for attempt_id, token in call.answer["got"]:
                self.requeued.setdefault((attempt_id, token), _time(call))
        self.proofs: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
        """Of each lease when its holder learned until when it lasts, counted from when it asked."""
        for claim in itertools.chain.from_iterable(self.claims.values()):
            self.proofs[claim.attempt_id, claim.token].append((claim.answered, claim.asked + claim.ttl))
        for call in self.acknowledged("heartbeat"):
            self.proofs[call.attempt_id, call.token].append((_time(call), call.asked + call.values["ttl"]))
        self._overslept: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for line in self.of_kind("overslept"):
            self._overslept[line["p"]].append((line["since"], line["t"]))

    def of_kind(self, *kinds: str) -> Iterator[Line]:
        """The lines of these kinds."""
        return (line for line in self.lines if line["k"] in kinds)

    def called(self, *verbs: str) -> Iterator[Call]:
        """The calls of these verbs, whatever became of them."""
        return (call for call in self.calls if call.verb in verbs)

    def acknowledged(self, *verbs: str) -> Iterator[Call]:
        """The calls of these verbs that certainly took effect."""
        return (call for call in self.called(*verbs) if call.answered is not None)

    def ran(self, process: str, at: float) -> bool:
        """Whether the process had the time to act before *at*: it did not just wake."""
        return not any(since - LATE < at < until + LATE for since, until in self._overslept[process])


def _calls(lines: Iterable[Line]) -> Iterator[Call]:
    """Match each call with its answer; what was done in a transaction is acknowledged when that is."""
    asked: dict[tuple[str, int], Line] = {}
    answers: dict[tuple[str, int], Line] = {}
    for line in lines:
        if line["k"] == "ask":
            asked[line["p"], line["n"]] = line
        elif line["k"] == "ok":
            answers[line["p"], line["n"]] = line
    for (process, number), line in asked.items():
        call = Call(line["f"], process, line["t"], line)
        answer = answers.get((process, number))
        within = line.get("within")
        if answer is not None and (within is None or (process, within) in answers):
            call = Call(line["f"], process, line["t"], line, answer["t"], answer)
        yield call


def _time(call: Call) -> float:
    assert call.answered is not None
    return call.answered


# -- the promises


def enqueued_attempts_survive(evidence: Evidence) -> Iterator[Violation]:
    """An acknowledged attempt is not lost; enqueue_many stores all or none."""
    stored = evidence.tables.attempts
    for call in evidence.acknowledged("enqueue", "order"):
        if call.attempt_id not in stored:
            yield Violation("an acknowledged attempt is not lost", "it is gone", call.attempt_id, call.process)
    for call in evidence.called("enqueue_many"):
        missing = [attempt_id for attempt_id in call.values["ids"] if attempt_id not in stored]
        if missing and (call.answered is not None or len(missing) < len(call.values["ids"])):
            words = f"{missing} of {call.values['ids']} are not there"
            yield Violation("enqueue_many stores all, or none if it was not acknowledged", words, missing[0])


def tokens_grow(evidence: Evidence) -> Iterator[Violation]:
    """A fencing token is given out once, and is greater than all before."""
    for attempt_id, claims in evidence.claims.items():
        leases: dict[int, str] = {}
        for claim in claims:
            if leases.setdefault(claim.token, claim.lease_id) != claim.lease_id:
                words = f"token {claim.token} was given out again"
                yield Violation("a token is given out once", words, attempt_id, claim.process)
        highest, known = 0, sorted(claims, key=lambda claim: claim.answered)
        for claim in sorted(claims, key=lambda claim: claim.asked):
            while known and known[0].answered < claim.asked:
                highest = max(highest, known.pop(0).token)
            if claim.token <= highest:
                words = f"token {claim.token} was given out after {highest}"
                yield Violation("tokens grow", words, attempt_id, claim.process)


def one_owner_completes(evidence: Evidence) -> Iterator[Violation]:
    """What was acknowledged as the end of an attempt or of a lease stays so, and is the only one."""
    owners: dict[str, set[int]] = defaultdict(set)
    for call in evidence.acknowledged("complete"):
        owners[call.attempt_id].add(call.token)
        found = evidence.tables.attempts.get(call.attempt_id)
        if found is None or (found.status, found.lease_version) != (AttemptStatus.COMPLETED, call.token):
            words = f"token {call.token} completed it, and now it is {_seen(found)}"
            yield Violation("an acknowledged completion survives", words, call.attempt_id, call.process)
        elif found.result != call.values.get("value"):
            words = f"{call.values.get('value')} was acknowledged, {found.result} is stored"
            yield Violation("a result is not overwritten", words, call.attempt_id, call.process)
    for attempt_id, tokens in owners.items():
        if len(tokens) > 1:
            yield Violation("one owner completes an attempt", f"tokens {sorted(tokens)} did", attempt_id)
    for call in evidence.acknowledged("cancel"):
        found = evidence.tables.attempts.get(call.attempt_id)
        if found is None or found.status is not AttemptStatus.CANCELLED:
            words = f"now it is {_seen(found)}"
            yield Violation("an acknowledged cancellation survives", words, call.attempt_id, call.process)
    ends: dict[tuple[str, int], set[str]] = defaultdict(set)
    for call in evidence.acknowledged("complete", "fail", "release"):
        ends[call.attempt_id, call.token].add(call.verb)
    for (attempt_id, token), verbs in ends.items():
        if len(verbs) > 1:
            yield Violation("a lease ends in one way", f"token {token}: {sorted(verbs)}", attempt_id)


def _seen(attempt: Attempt | None) -> str:
    return "gone" if attempt is None else f"{attempt.status}, token {attempt.lease_version}"


def stale_writes_are_refused(evidence: Evidence) -> Iterator[Violation]:
    """Once another has the attempt, or it was taken away, nothing that the former owner writes is accepted."""
    for call in evidence.acknowledged("complete", "fail", "release", "start", "heartbeat"):
        taken = evidence.requeued.get((call.attempt_id, call.token))
        if taken is not None and taken < call.asked:
            words = f"{call.verb} by token {call.token} was accepted {call.asked - taken:.2f} s after it was requeued"
            yield Violation("a stale owner's write is refused", words, call.attempt_id, call.process)
        for claim in evidence.claims[call.attempt_id]:
            if claim.token > call.token and claim.answered < call.asked:
                words = f"{call.verb} by token {call.token} was accepted after {claim.process} had {claim.token}"
                yield Violation("a stale owner's write is refused", words, call.attempt_id, call.process)


def leases_last(evidence: Evidence) -> Iterator[Violation]:
    """A lease that its holder could prove is not taken away, unless somebody ended it."""
    ended = {(call.attempt_id, call.token) for call in evidence.called("complete", "fail", "release")}
    cancelled = {call.attempt_id for call in evidence.called("cancel")}
    taken = [(attempt_id, token, at, "requeued") for (attempt_id, token), at in evidence.requeued.items()]
    for attempt_id, claims in evidence.claims.items():
        for before, after in itertools.pairwise(sorted(claims, key=lambda claim: claim.token)):
            taken.append((attempt_id, before.token, after.answered, f"claimed by {after.process}"))
    for attempt_id, token, at, how in taken:
        if attempt_id in cancelled or (attempt_id, token) in ended:
            continue
        proved = max((until for known, until in evidence.proofs[attempt_id, token] if known < at), default=at)
        if at < proved - _SLACK:
            words = f"token {token} was {how} {proved - at:.2f} s too early"
            yield Violation("a lease is not taken before it ends", words, attempt_id)


def bodies_end(evidence: Evidence) -> Iterator[Violation]:
    """A body does not run on when another's has begun, nor when its lease can no longer be proved."""
    begins: dict[str, list[tuple[int, float, str]]] = defaultdict(list)
    for line in evidence.of_kind("begin"):
        begins[line["a"]].append((line["token"], line["t"], line["p"]))
    steps: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for line in evidence.of_kind("step"):
        if evidence.ran(line["p"], line["t"]):
            steps[line["a"], line["token"], line["p"]].append(line["t"])
    for (attempt_id, token, process), times in steps.items():
        other = min((begun for later, begun, _ in begins[attempt_id] if later > token), default=times[-1])
        if times[-1] > other:
            words = f"token {token} worked on for {times[-1] - other:.2f} s beside its successor"
            yield Violation("a body ends before another's try begins", words, attempt_id, process)
        proofs = sorted(evidence.proofs[attempt_id, token])
        for time in times:
            proved = max((until for known, until in proofs if known <= time), default=time)
            if time > proved + LATE:
                words = f"token {token} worked on for {times[-1] - proved:.2f} s after its lease could last be proved"
                yield Violation("hold() ends a body whose lease cannot be proved", words, attempt_id, process)
                break


def transactions_are_atomic(evidence: Evidence) -> Iterator[Violation]:
    """An application's row and what the store did with it are both there, or neither is."""
    stored, orders = evidence.tables.attempts, set(evidence.tables.orders)
    for call in evidence.called("order"):
        if (call.attempt_id in orders) != (call.attempt_id in stored):
            words = f"the order is {'' if call.attempt_id in orders else 'not '}there, its attempt is the other way"
            yield Violation("transaction() is atomic", words, call.attempt_id, call.process)
    effects: dict[str, list[int]] = defaultdict(list)
    for attempt_id, token in evidence.tables.effects:
        effects[attempt_id].append(token)
    for attempt in stored.values():
        if attempt.payload["kind"] != "transaction":
            continue
        is_done = attempt.status is AttemptStatus.COMPLETED
        has_child = f"{attempt.attempt_id}+child" in stored
        if effects[attempt.attempt_id] != ([attempt.lease_version] if is_done else []) or has_child != is_done:
            words = f"it is {_seen(attempt)}, has effects by tokens {effects[attempt.attempt_id]}"
            words += f", and {'a' if has_child else 'no'} child"
            yield Violation("transaction() is atomic", words, attempt.attempt_id)
    for call in evidence.acknowledged("finish"):
        if not effects[call.attempt_id]:
            words = "it has no effect"
            yield Violation("an acknowledged transaction survives", words, call.attempt_id, call.process)


def tries_are_counted(evidence: Evidence) -> Iterator[Violation]:
    """An attempt has no more tries than it may have, and fails after the last one only."""
    for attempt in evidence.tables.attempts.values():
        words = f"try {attempt.attempt_no} of {attempt.max_attempts}, {attempt.status}"
        if attempt.attempt_no > attempt.max_attempts:
            yield Violation("there are no more tries than max_attempts", words, attempt.attempt_id)
        if attempt.status is AttemptStatus.FAILED and attempt.attempt_no < attempt.max_attempts:
            yield Violation("an attempt fails after its last try only", words, attempt.attempt_id)


def the_store_agrees(evidence: Evidence) -> Iterator[Violation]:
    """What is held has a lease with its token, and nothing else has one."""
    leases = {lease.attempt_id: lease.version for lease in evidence.tables.leases}
    for attempt in evidence.tables.attempts.values():
        is_held = attempt.status in (AttemptStatus.LEASED, AttemptStatus.RUNNING)
        if leases.get(attempt.attempt_id) != (attempt.lease_version if is_held else None):
            words = f"it is {_seen(attempt)}, and its lease's token is {leases.get(attempt.attempt_id)}"
            yield Violation("what is held has a lease, and nothing else", words, attempt.attempt_id)
    for attempt_id in leases.keys() - evidence.tables.attempts.keys():
        yield Violation("what is held has a lease, and nothing else", "the lease has no attempt", attempt_id)
    for problem in evidence.tables.problems:
        yield Violation("the store is whole", problem)


def everybody_goes_on(evidence: Evidence) -> Iterator[Violation]:
    """Who was open when the last fault ended does something within `RECOVERY`, and in the end nothing is left."""
    waiting = not_recovered(evidence.lines, evidence.run)
    for process in sorted(waiting):
        words = (
            f"nothing in {min(RECOVERY, evidence.run.loaded_until - evidence.run.healed):.1f} s after the last fault"
        )
        yield Violation("every process works again by itself", words, process=process)
    if evidence.run.left:
        left = next((a.attempt_id for a in evidence.tables.attempts.values() if not a.status.is_final), None)
        yield Violation("what was enqueued is done", f"it is one of {evidence.run.left} that are left", left)


def not_recovered(lines: Iterable[Line], run: Run) -> set[str]:
    """Of the processes that were open when the last fault ended, and live, those that have done nothing since."""
    waiting: set[str] = set()
    for line in lines:
        if line["k"] == "open" and line["t"] < run.healed:
            waiting.add(line["p"])
        elif run.healed < line["t"] < run.healed + RECOVERY:
            # A worker that sweeps, or keeps its leases, may still be one that does not work.
            is_worker = line["p"].startswith("worker")
            if line["k"] == "begin" or (line["k"] == "ok" and not is_worker):
                waiting.discard(line["p"])
    gone = (min(fate.asked_to_stop or math.inf, fate.ended or math.inf) < run.loaded_until for fate in run.fates)
    return waiting - {fate.name for fate, is_gone in zip(run.fates, gone, strict=True) if is_gone}


def workers_stop_when_told_only(evidence: Evidence) -> Iterator[Violation]:
    """A worker that is told to stop ends within `STOP`, with status 0; another does not end."""
    for fate in evidence.run.fates:
        if fate.asked_to_stop is not None:
            took = None if fate.ended is None else fate.ended - fate.asked_to_stop
            if took is None or took > STOP + _EXIT:
                words = "it did not" if took is None else f"it took {took:.1f} s"
                yield Violation(f"a worker stops within {STOP:g} s", words, process=fate.name)
            # It may not have come to listening, or to a handler that kills it.
            elif fate.exit_code not in (0, -signal.SIGTERM, -signal.SIGKILL):
                yield Violation(
                    "a worker that is told to stop ends well", f"status {fate.exit_code}", process=fate.name
                )
        elif fate.exit_code not in (None, NO_BOOT, -signal.SIGKILL):
            words = f"it ended with status {fate.exit_code}"
            yield Violation("a process goes on until it is told to stop", words, process=fate.name)


def callers_are_let_go(evidence: Evidence) -> Iterator[Violation]:
    """Who gives up a call has the control back within `LET_GO`."""
    for line in evidence.of_kind("patience"):
        if line["took"] > line["allowed"] + LET_GO and evidence.ran(line["p"], line["t"]):
            words = f"a time-out of {line['allowed']:.2f} s took {line['took']:.1f} s"
            yield Violation("a caller that gives up is let go", words, process=line["p"], at=line["t"])


PROMISES: Sequence[Callable[[Evidence], Iterator[Violation]]] = (
    enqueued_attempts_survive,
    tokens_grow,
    one_owner_completes,
    stale_writes_are_refused,
    leases_last,
    bodies_end,
    transactions_are_atomic,
    tries_are_counted,
    the_store_agrees,
    everybody_goes_on,
    workers_stop_when_told_only,
    callers_are_let_go,
)


# -- the judgement


@dataclass(frozen=True)
class Verdict:
    """What was found, with what shows it."""

    evidence: Evidence
    violations: Sequence[Violation]
    folder: Path
    """Where the histories and the logs are."""

    def __str__(self) -> str:
        run, violations = self.evidence.run, self.violations
        lines = [
            f"{Counter(call.verb for call in self.evidence.calls if call.answered is not None)}",
            f"unknown: {Counter(call.verb for call in self.evidence.calls if call.answered is None)}",
            f"errors: {Counter(line['error'] for line in self.evidence.of_kind('error'))}",
            *(f"{fault.since:.2f} to {fault.until:.2f} {fault.name}: {fault.words}" for fault in run.faults),
            f"healed at {run.healed:.2f}, loaded until {run.loaded_until:.2f}",
            f"violations: {dict(Counter(violation.promise for violation in violations))}",
        ]
        shown: Counter[str] = Counter()
        for violation in violations:
            shown[violation.promise] += 1
            if shown[violation.promise] <= _SHOWN:
                lines += self._told(violation)
        return "\n".join(lines)

    def _told(self, violation: Violation) -> Iterator[str]:
        about = " ".join(part for part in (violation.attempt_id, violation.process) if part)
        yield f"\nBROKEN: {violation.promise}: {about}: {violation.words}"
        lines = [line for line in self._lines_about(violation) if line["k"] != "step" and line["t"] <= violation.at]
        yield from (f"    {_readable(line)}" for line in lines[-_TAIL:])
        log = self.folder / f"{violation.process}.log"
        if log.exists():
            yield f"    the end of {log.name}:"
            yield from (f"        {line}" for line in log.read_text(errors="replace").splitlines()[-_TAIL:])

    def _lines_about(self, violation: Violation) -> Iterator[Line]:
        """Those that name the attempt, with the answers to them; or else all of the process."""
        calls: set[tuple[str, int]] = set()
        for line in self.evidence.lines:
            if violation.attempt_id is None:
                is_about = line["p"] == violation.process
            else:
                ids = [line.get("a"), *line.get("ids", ()), *(found[0] for found in line.get("got", ()))]
                is_about = violation.attempt_id in ids or (line["p"], line.get("n")) in calls
            if is_about:
                calls.add((line["p"], line.get("n", -1)))
                yield line


def _readable(line: Line) -> str:
    words = [f"{line['t']:.3f} {line['p']} {line['k']} {line.get('f', '')}"]
    return " ".join(words + [f"{name}={value}" for name, value in line.items() if name not in ("t", "p", "k", "f")])


def judge(evidence: Evidence, folder: Path) -> Verdict:
    """Ask of every promise whether it was kept."""
    return Verdict(evidence, [violation for promise in PROMISES for violation in promise(evidence)], folder)
