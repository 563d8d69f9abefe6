"""What is logged of an outage: one line when it begins and one when it ends, however many loops run into it."""

import logging
import math
import time

from runtime_repo.errors import DatabaseUnavailableError, RuntimeRepoError
from runtime_repo.observing import Observer, OutageBegan, OutageEnded

__all__ = ["Outages"]

_log = logging.getLogger("runtime_repo")

_LONGEST_WAIT = 20.0
"""Seconds without an answer that are taken for an outage, however long leases are."""


class Outages:
    """
    The outages that one worker, or one hold of its own, goes through.

    Whoever calls the database tells what became of it, under a key of its own. The outage is over when none of them
    waits for the database any more and a call has succeeded. Errors of another kind within it are told once, too.

    That a call was not answered in time is no outage as long as others are answered: it may have waited behind this
    process's own transactions, or on a connection that died. A heartbeat has to be answered every third of the *ttl*,
    so two thirds without any answer are an outage, and that is told before a lease is lost.

    Args:
        who: Whose outages they are, as the log shall say.
        ttl: For how many seconds a heartbeat proves a lease.
        observer: Is told as well.
    """

    def __init__(self, who: str, *, ttl: float = math.inf, observer: Observer | None = None) -> None:
        self._who = who
        self._observer = observer
        self._longest_wait = min(2 * ttl / 3, _LONGEST_WAIT)
        self._answered_at = time.monotonic()
        self._since = 0.0
        self._over_at = 0.0
        self._failing: set[object] = set()
        self._told: set[type[Exception]] = set()
        self._lost = 0

    def failed(self, key: object, doing: str, error: Exception, *, began: float) -> None:
        """A call of *key*'s that *began* then, by the monotonic clock, has failed and will be tried again."""
        if not self._told:
            # On a connection that died in the outage before, or as above.
            if began < self._over_at or (_was_late(error) and self._has_answers()):
                _log.debug("%s could not %s: %s", self._who, doing, error)
                return
            self._since = time.monotonic()
        self._failing.add(key)
        kind = DatabaseUnavailableError if isinstance(error, TimeoutError) else type(error)
        if kind in self._told:
            _log.debug("%s still cannot %s: %s", self._who, doing, error)
            return
        if self._observer is not None and not self._told:
            self._observer.tell(OutageBegan(self._who, doing, error))
        self._told.add(kind)
        # Of an error that is not ours nobody knows where it comes from.
        trace = None if isinstance(error, (RuntimeRepoError, TimeoutError)) else error
        _log.warning("%s cannot %s and tries again until it can: %s", self._who, doing, error, exc_info=trace)

    def lost(self, error: Exception, *, began: float) -> None:
        """
        A lease was given up, because since it *began* the database has not answered: the outage's last line tells how
        many were, of those that are known by then.
        """
        self._lost += bool(self._told)
        is_told = self._told or began < self._over_at
        _log.log(logging.DEBUG if is_told else logging.WARNING, "%s gives a lease up: %s", self._who, error)

    def succeeded(self, key: object) -> None:
        """A call of *key*'s has succeeded."""
        self._failing.discard(key)
        self._answered_at = time.monotonic()
        if not self._told or self._failing:
            return
        lost = f"; leases that it could not keep: {self._lost}" if self._lost else ""
        _log.warning("%s can go on after %.1f s%s", self._who, time.monotonic() - self._since, lost)
        if self._observer is not None:
            self._observer.tell(OutageEnded(self._who, time.monotonic() - self._since, self._lost))
        self._told.clear()
        self._over_at = time.monotonic()
        self._lost = 0

    def given_up(self, key: object) -> None:
        """Whatever failed under *key* is not tried again."""
        self._failing.discard(key)

    def _has_answers(self) -> bool:
        return time.monotonic() - self._answered_at < self._longest_wait


def _was_late(error: Exception) -> bool:
    """Whether there was no answer in time, and not an error."""
    return isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError)
