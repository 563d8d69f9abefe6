"""
The narrow tables beside attempts, by which they are found: where they are not in step with the attempts' own rows.

The verbs keep them in step. Another program that changes a row does not know of them, and two writes that cross may
leave a row behind. Both are looked for in small steps, without a lock, and only what is found is locked and put right.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from runtime_repo.database import Queries
from runtime_repo.queries import bounded

__all__ = ["STEP", "Seen", "look_through", "mend"]

STEP = 1000
"""How many rows are looked at in one step."""


class Seen(NamedTuple):
    """
    What was found in one step.

    Attributes:
        askew: The places of rows that are not found as what they are.
        stranded: The ids of attempts that are held under no lease.
        last: Behind which place the next step begins; None where there is none.
    """

    askew: Sequence[object]
    stranded: Sequence[str]
    last: object


async def look_through(queries: Queries, query: str, after: object) -> Seen:
    """Look at the next rows behind a place; None is before all."""
    rows = await queries.fetch(bounded(query, STEP), after, STEP)
    return Seen(
        [row["place"] for row in rows if row["kind"] in ("waiting", "finished")],
        [row["attempt_id"] for row in rows if row["kind"] == "held"],
        next((row["place"] for row in rows if row["kind"] == ""), None),
    )


async def mend(queries: Queries, query: str, seen: Seen) -> int:
    """Put right what was found, and return how many they were."""
    if seen.askew:
        await queries.fetch(query, json.dumps(seen.askew))
    return len(seen.askew)
