"""Records: what can be said of them without a database."""

import collections
import copy
import dataclasses
import pickle
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_repo import Attempt, AttemptStatus, ConfigurationError, Lease, RetryPolicy
from runtime_repo.records import attempt_from_row, lease_from_row
from runtime_repo.values import from_json, new_ids

SECOND = timedelta(seconds=1)


def test_a_delay_grows_up_to_the_cap() -> None:
    """Each is *factor* times the one before; the cap holds for the thousandth, too."""
    policy = RetryPolicy(base=SECOND, factor=2, cap=timedelta(seconds=10), jitter=0)
    delays = [policy.delay(number) for number in (1, 2, 3, 4, 5, 10_000)]
    assert delays == [SECOND, 2 * SECOND, 4 * SECOND, 8 * SECOND, 10 * SECOND, 10 * SECOND]
    assert RetryPolicy(base=timedelta(0), jitter=0).delay(10_000) == timedelta(0)


@given(number=st.integers(1, 10**6), jitter=st.floats(0, 1), factor=st.floats(1, 1e300))
def test_jitter_only_shortens(number: int, jitter: float, factor: float) -> None:
    """A delay is between its fraction of the full one and the full one, and never above the cap."""
    full = RetryPolicy(base=SECOND, factor=factor, jitter=0).delay(number)
    some = RetryPolicy(base=SECOND, factor=factor, jitter=jitter).delay(number)
    assert full is not None
    assert some is not None
    assert full * (1 - jitter) - timedelta.resolution <= some <= full <= timedelta(minutes=5)


def test_jitter_spreads() -> None:
    """What failed together does not come back together."""
    assert len({RetryPolicy().delay(5) for _ in range(50)}) > 40


def test_a_policy_gives_up_after_its_last_try() -> None:
    """The try that it names is the last one."""
    policy = RetryPolicy(max_attempts=3)
    assert policy.delay(2) is not None
    assert (policy.delay(3), policy.delay(4)) == (None, None)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"base": -SECOND}, "base"),
        ({"cap": -SECOND}, "cap"),
        ({"base": 1}, "base"),
        ({"factor": 0.5}, "factor"),
        ({"factor": "2"}, "factor"),
        ({"jitter": None}, "jitter"),
        ({"max_attempts": True}, "max_attempts"),
        ({"factor": float("nan")}, "factor"),
        ({"factor": float("inf")}, "factor"),
        ({"jitter": 1.5}, "jitter"),
        ({"jitter": float("nan")}, "jitter"),
        ({"max_attempts": 0}, "max_attempts"),
    ],
)
def test_a_policy_that_is_invalid_is_refused(wrong: dict[str, Any], word: str) -> None:
    """At once, not at the first failure."""
    with pytest.raises(ConfigurationError, match=word):
        RetryPolicy(**wrong)


def test_ids_made_together_are_in_order() -> None:
    """The order of text is the order of making, and they are UUIDs of version 7."""
    ids = list(islice(new_ids(), 10_000))
    assert ids == sorted(set(ids))
    assert {(name[14], name[19] in "89ab", len(name)) for name in ids} == {("7", True, 36)}


def test_a_lease_that_travels_is_not_proved_by_another_clock() -> None:
    """It arrives as it was, but for what only this process's clock could say."""
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    attempt: Any = None
    lease = Lease("l", "a", "worker", 1, moment, moment, moment, attempt, asked_at=1e9)
    for travelled in (pickle.loads(pickle.dumps(lease)), copy.copy(lease)):  # noqa: S301 - made here
        assert travelled == lease
        assert travelled.asked_at is None
    assert dataclasses.replace(lease, worker_id="b").asked_at == 1e9


def test_what_is_read_from_a_row_is_a_record_like_any_other() -> None:
    """Of its kind, frozen, and equal to one that was constructed; however it was made."""
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    row: dict[str, Any] = collections.defaultdict(lambda: None)  # what a column may always be
    row |= {"attempt_id": "a", "run_id": "run", "queue": "q", "status": "leased", "worker_id": "w", "lease_id": "l"}
    row |= {"attempt_no": 1, "priority": 0, "max_attempts": 3, "lease_version": 1, "payload_json": ' {"n": [1]}\n'}
    ends = ("enqueued_at_ms", "claimed_at_ms", "heartbeat_at_ms", "lease_expires_at_ms")
    row |= dict.fromkeys(ends, int(moment.timestamp() * 1000))
    attempt = attempt_from_row(row)
    lease = lease_from_row(row, asked_at=1.0)
    assert (type(attempt), type(lease)) == (Attempt, Lease)
    assert attempt == dataclasses.replace(attempt) == lease.attempt
    assert (attempt.attempt_id, attempt.status, attempt.payload) == ("a", AttemptStatus.LEASED, {"n": [1]})
    assert attempt.enqueued_at == moment
    assert lease == Lease("l", "a", "w", 1, moment, moment, moment, attempt)
    assert pickle.loads(pickle.dumps(lease)) == copy.deepcopy(lease) == lease  # noqa: S301 - made here
    for record in (attempt, lease):
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.attempt_id = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"), [(" 1", 1), ("1\r\n\t ", 1), ("[1] ", [1]), ('"\\u00e9"', "\N{LATIN SMALL LETTER E WITH ACUTE}")]
)
def test_json_may_have_blanks_around_it(text: str, value: object) -> None:
    """As others may write it."""
    assert from_json(text) == value


@pytest.mark.parametrize(
    "text", ["", " ", "1 2", "[1", "[1]]", "x", "\N{ZERO WIDTH NO-BREAK SPACE}1", "'a'", '"a', "-"]
)
def test_what_is_no_json_is_told(text: str) -> None:
    """Whatever comes first in it."""
    with pytest.raises(ValueError, match="no JSON"):
        from_json(text)
