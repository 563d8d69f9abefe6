"""What is told of an outage: one line when it begins and one when it ends, whatever else ends in it or after it."""

import time

import pytest

from runtime_repo import DatabaseUnavailableError
from runtime_repo.outages import Outages


def refused() -> Exception:
    """An answer, if a bad one."""
    return DatabaseUnavailableError("connection refused")


def late() -> Exception:
    """No answer in time."""
    error = DatabaseUnavailableError("no answer within 5 s")
    error.__cause__ = TimeoutError()
    return error


def test_what_began_in_an_outage_is_not_told_after_it(caplog: pytest.LogCaptureFixture) -> None:
    """Calls and leases whose end comes late belong to the outage that is over; those that begin later do not."""
    outages = Outages("somebody")
    before = time.monotonic()
    outages.failed("claim", "claim", refused(), began=before)
    outages.lost(refused(), began=before)
    outages.succeeded("claim")
    assert len(caplog.records) == 2
    assert "leases that it could not keep: 1" in caplog.text
    outages.failed("report", "report", refused(), began=before)
    outages.lost(refused(), began=before)
    assert len(caplog.records) == 2
    outages.lost(refused(), began=time.monotonic())
    assert len(caplog.records) == 3


@pytest.mark.parametrize(("ttl", "lines"), [(60, 0), (0, 1)])
def test_a_call_without_an_answer_is_no_outage_while_others_have_theirs(
    caplog: pytest.LogCaptureFixture, ttl: float, lines: int
) -> None:
    """Within two thirds of the ttl; an error is one at once."""
    outages = Outages("somebody", ttl=ttl)
    outages.succeeded("renew")
    for error in (late(), TimeoutError()):
        outages.failed("report", "report", error, began=time.monotonic())
        assert len(caplog.records) == lines
    outages.failed("report", "report", refused(), began=time.monotonic())
    assert len(caplog.records) == 1
