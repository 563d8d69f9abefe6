"""What the holder of a lease writes with it, as a table: each verb in the form that needs the least."""

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from runtime_repo import Lease, LeaseLostError, NotFoundError, RuntimeRepository, RuntimeTransaction

Repo = RuntimeRepository | RuntimeTransaction
Write = Callable[[Repo, Lease, datetime], Awaitable[object]]

MINUTE = timedelta(minutes=1)

ENDS: dict[str, Write] = {
    "complete": lambda repo, lease, now: repo.attempts.complete(lease, "done", now=now),
    "complete_many": lambda repo, lease, now: repo.attempts.complete_many([(lease, "done")], now=now),
    "fail": lambda repo, lease, now: repo.attempts.fail(lease, "boom", now=now),
    "fail, retry": lambda repo, lease, now: repo.attempts.fail(lease, "boom", retry_in=MINUTE, now=now),
    "release": lambda repo, lease, now: repo.leases.release(lease, now=now),
    "release, delay": lambda repo, lease, now: repo.leases.release(lease, delay=MINUTE, now=now),
}
"""What ends the lease."""

BEATS: dict[str, Write] = {
    "heartbeat": lambda repo, lease, now: repo.leases.heartbeat(lease, ttl=2 * MINUTE, now=now),
    "heartbeat_many": lambda repo, lease, now: repo.leases.heartbeat_many([lease], ttl=2 * MINUTE, now=now),
}
"""What keeps it."""

WRITES: dict[str, Write] = {"start": lambda repo, lease, now: repo.attempts.start(lease, now=now)} | ENDS | BEATS


async def refusal(write: Awaitable[object]) -> LeaseLostError | NotFoundError | None:
    """The error with which a lost lease is refused; None where many are answered at once and say no more."""
    try:
        answer = await write
    except (LeaseLostError, NotFoundError) as error:
        return error
    assert answer in ([False], [None]), f"it was not refused: {answer!r}"
    return None
