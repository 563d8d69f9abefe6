"""Records: what can be said of them without a database."""

import copy
import dataclasses
import pickle
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_repo import ConfigurationError, Lease, RetryPolicy
from runtime_repo.values import new_ids

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
