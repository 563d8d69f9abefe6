"""What this process knows of the leases that it holds, beyond what the database says."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

from runtime_repo.outages import Outages

__all__ = ["Holding", "ended", "holding"]

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
def holding(lease_id: str, outages: Outages) -> Iterator[Holding]:
    """
    Keep in mind, while the block runs, whether the lease's own holder has ended it.

    Blocks for the same lease may be nested: they know the same, and the *outages* of the outermost count.
    """
    found = _held.setdefault(lease_id, Holding(outages))
    found.holders += 1
    try:
        yield found
    finally:
        found.holders -= 1
        if not found.holders:
            _held.pop(lease_id, None)


def ended(lease_ids: Iterable[str]) -> None:
    """The holder has ended these leases, and that is committed."""
    for lease_id in lease_ids:
        if (found := _held.get(lease_id)) and not found.ended:
            found.ended = True
            for call in found.when_ended:
                call()
