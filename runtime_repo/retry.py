"""When to try a failed attempt again."""

import math
import random
from dataclasses import dataclass
from datetime import timedelta

from runtime_repo.errors import ConfigurationError, shown
from runtime_repo.values import check_count, span_ms

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """
    When to try a failed attempt again: exponential backoff with a cap and jitter.

    The first retry comes after *base*, each later one after *factor* times as long, never after more than *cap*. Of
    each delay a random part, at most the fraction *jitter*, is left out, so that what failed together does not come
    back together. After try number *max_attempts* there is no other; the attempt's own limit holds as well.

    Raises:
        ConfigurationError: A span is negative, *factor* is below 1, *jitter* is not between 0 and 1.
    """

    base: timedelta = timedelta(seconds=1)
    factor: float = 2.0
    cap: timedelta = timedelta(minutes=5)
    jitter: float = 0.5
    max_attempts: int | None = None

    def __post_init__(self) -> None:
        span_ms("base", self.base)
        span_ms("cap", self.cap)
        if not isinstance(self.factor, (int, float)) or not 1 <= self.factor < math.inf:
            raise ConfigurationError(f"factor is {shown(self.factor)}: expected a number from 1 on")
        if not isinstance(self.jitter, (int, float)) or not 0 <= self.jitter <= 1:
            raise ConfigurationError(f"jitter is {shown(self.jitter)}: expected a fraction from 0 to 1")
        if self.max_attempts is not None:
            check_count("max_attempts", self.max_attempts)

    def delay(self, attempt_no: int) -> timedelta | None:
        """How long to wait after try number *attempt_no* has failed; None is not to try again."""
        if self.max_attempts is not None and attempt_no >= self.max_attempts:
            return None
        try:
            longest = min(self.base * self.factor ** (attempt_no - 1), self.cap)
        except OverflowError:
            longest = self.cap if self.base else self.base
        return longest * (1 - self.jitter * random.random())  # noqa: S311
