"""A process that enqueues one attempt after the other and says each time that it is committed, until it is killed."""

import asyncio
import json
import sys

from tests.place import Place


async def write(place: Place, name: str) -> None:
    async with place.repository() as repo:
        number = 0
        while True:
            await repo.attempts.enqueue("run", attempt_id=f"{name} {number:06d}")
            number += 1
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(write(Place(**json.loads(sys.argv[1])), sys.argv[2]))
