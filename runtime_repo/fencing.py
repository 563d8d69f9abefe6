"""What this process knows of the leases that it holds, beyond what the database says."""

import contextlib
from collections.abc import Iterable, Iterator

__all__ = ["Holding", "ended", "holding"]

_held: dict[str, "Holding"] = {}


class Holding:
    """
    A lease that ``leases.hold`` keeps.

    Attributes:
        ended: Whether the holder itself has ended it, by a verb that was committed.
    """

    __slots__ = ("ended",)

    def __init__(self) -> None:
        self.ended = False


@contextlib.contextmanager
def holding(lease_id: str) -> Iterator[Holding]:
    """Keep in mind, while the block runs, whether the lease's own holder has ended it."""
    found = _held.setdefault(lease_id, Holding())
    try:
        yield found
    finally:
        _held.pop(lease_id, None)


def ended(lease_ids: Iterable[str]) -> None:
    """The holder has ended these leases, and that is committed."""
    for lease_id in lease_ids:
        if found := _held.get(lease_id):
            found.ended = True
