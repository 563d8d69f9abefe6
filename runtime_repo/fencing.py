"""
What became of a lease: whether what was given is one, whether a write under it was a repetition or came too late, and
what this process knows of the leases that it holds, beyond what the database says.

A lease is known by its attempt, its token and its id. The token alone would do, but a restored backup or an
asynchronous failover forgets tokens and gives them out again; an id is never made twice.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime

from runtime_repo.database import Queries, Row
from runtime_repo.errors import ConfigurationError, LeaseLostError, NotFoundError, RefusedError, shown
from runtime_repo.outages import Outages
from runtime_repo.records import Attempt, AttemptStatus, Lease, attempt_from_row
from runtime_repo.values import is_text, skipped

__all__ = ["Holding", "check_lease", "ended", "ended_by", "holding", "lost", "refused", "repeated"]

_HELD = (AttemptStatus.LEASED, AttemptStatus.RUNNING)
_BY_ITS_HOLDER = ("complete", "fail", "release")

_held: dict[str, "Holding"] = {}


class Holding:
    """
    A lease that ``leases.hold`` keeps.

    Attributes:
        ended: Whether the holder itself has ended it, by a verb that was committed.
        when_ended: What to call as soon as it has.
        outages: Whom heartbeats tell when they fail.
    """

    __slots__ = ("ended", "holders", "outages", "when_ended")

    def __init__(self, outages: Outages) -> None:
        self.ended = False
        self.when_ended: list[Callable[[], None]] = []
        self.outages = outages
        self.holders = 0


@contextlib.contextmanager
def holding(lease_id: str, outages: Outages | None = None) -> Iterator[Holding]:
    """
    Keep in mind, while the block runs, whether the lease's own holder has ended it.

    Blocks for the same lease may be nested: they know the same, and the *outages* of the outermost count.
    """
    found = _held.setdefault(lease_id, Holding(outages or Outages(f"the holder of lease {lease_id!r}")))
    found.holders += 1
    try:
        yield found
    finally:
        found.holders -= 1
        if not found.holders:
            _held.pop(lease_id, None)


def ended(lease_ids: Iterable[str]) -> None:
    """The holder has ended these leases, and that is committed."""
    for lease_id in lease_ids if _held else ():
        if (found := _held.get(lease_id)) and not found.ended:
            found.ended = True
            for call in found.when_ended:
                call()


def check_lease(lease: Lease) -> Lease:
    """
    Refuse what is no lease, or one that no database has given out.

    Raises:
        ConfigurationError: It says what is wrong with it.
    """
    if not isinstance(lease, Lease):
        raise ConfigurationError(f"lease is {shown(lease)}: expected a Lease, as claim returns it")
    try:
        # Not how long they are: what an earlier program stored must be possible to finish.
        is_stored = (
            is_text(lease.lease_id + lease.attempt_id + lease.worker_id)
            and 0 <= lease.version < 2**63
            and type(lease.version) is int
            and isinstance(lease.attempt, Attempt)
            and type(lease.attempt.attempt_no) is int
            # Written out, for it is asked of every lease.
            and isinstance(lease.claimed_at, datetime)
            and lease.claimed_at.tzinfo is not None
            and isinstance(lease.heartbeat_at, datetime)
            and lease.heartbeat_at.tzinfo is not None
            and isinstance(lease.expires_at, datetime)
            and lease.expires_at.tzinfo is not None
            and (lease.asked_at is None or (isinstance(lease.asked_at, float) and math.isfinite(lease.asked_at)))
        )
    except TypeError:
        is_stored = False
    if not is_stored:
        raise ConfigurationError(f"lease is {shown(lease)}: expected a Lease with the values that claim returned")
    return lease


def ended_by(lease: Lease, attempt: Attempt) -> str | None:
    """Which of its holder's verbs ended *lease*; None while it is held, and if it was taken away."""
    is_its_own = (attempt.lease_version, attempt.lease_id) == _token(lease)
    return attempt.ended_by if is_its_own and attempt.ended_by in _BY_ITS_HOLDER else None


def _token(lease: Lease) -> tuple[int, str]:
    """The fencing token, and whose of all that were given it."""
    return lease.version, lease.lease_id


async def repeated(queries: Queries, lease: Lease, verb: str) -> Attempt:
    """The attempt, if *verb* has already ended this lease; otherwise it raises what ``refused`` says."""
    rows = await queries.fetch("attempts.stored", lease.attempt_id)
    attempt = attempt_from_row(rows[0]) if rows else None
    if attempt is not None and ended_by(lease, attempt) == verb:
        return attempt
    raise await refused(queries, lease)


async def refused(queries: Queries, lease: Lease) -> LeaseLostError | NotFoundError | RefusedError:
    """Why a write under *lease* found nothing to change: it is lost, unless the database keeps the row from us."""
    rows = await queries.fetch("leases.holder", lease.attempt_id, None)
    if rows and rows[0]["status"] in _HELD and (rows[0]["lease_version"], rows[0]["lease_id"]) == _token(lease):
        return skipped(f"attempt {lease.attempt_id!r}")
    return _lost(lease, rows)


async def lost(
    queries: Queries, lease: Lease, now_ms: int | None = None
) -> LeaseLostError | NotFoundError | RefusedError:
    """Why *lease* could not be renewed: it is lost, unless it still holds and the database skips its row."""
    rows = await queries.fetch("leases.holder", lease.attempt_id, now_ms)
    if rows and rows[0]["holds"] and (rows[0]["lease_version"], rows[0]["lease_id"]) == _token(lease):
        return skipped(f"lease {lease.lease_id!r}")
    return _lost(lease, rows)


def _lost(lease: Lease, rows: Sequence[Row]) -> LeaseLostError | NotFoundError:
    if not rows:
        return NotFoundError("attempt", lease.attempt_id)
    return LeaseLostError(
        lease.attempt_id,
        token=lease.version,
        current=rows[0]["lease_version"],
        status=rows[0]["status"],
        worker_id=rows[0]["worker_id"],
    )
