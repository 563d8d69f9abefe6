"""
One storm: a runner that imports what boots, forks the processes, lets them all go at once and prints what became of
them as JSON. `boot.py` starts it as a process of its own, because only a process without threads may fork.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from tests.place import Place

from . import drivers

if TYPE_CHECKING:
    from .drivers import Boot, Kind

# Each process ends itself after so many seconds, whatever it waits for; so everything here is bounded.
LIFETIME = 60
_ERROR_LENGTH = 300


def contender(name: str, kind: Kind, place: Place) -> Boot:
    """Return the boot of this name; the peers are imported only by those who ask for one."""
    if name == "ours":
        return drivers.ours(place)
    if name == "bare":
        return drivers.bare(place, kind)
    from . import peers

    return peers.prepare(name, place)


async def timed(boot: Boot) -> float:
    """Boot once and return the seconds that it took, with nothing left on the processor by whoever booted before."""
    for thread in threading.enumerate():
        if "_connection_worker_thread" in thread.name:  # aiosqlite's, which its close() does not see off
            thread.join(LIFETIME)
    start = time.perf_counter()
    outcome = boot()
    if outcome is not None:
        await outcome
    return time.perf_counter() - start


def rage(boot: Boot, count: int) -> tuple[float, list[str]]:
    """Let *count* processes boot at once; return the seconds until the last was done, and the errors of the others."""
    ready, tell_ready = os.pipe()
    gate, hold_gate = os.pipe()
    results, tell_result = os.pipe()
    gc.collect()
    gc.freeze()
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            os.close(hold_gate)
            _boot_and_exit(boot, tell_ready, gate, tell_result)
        children.append(child)
    os.close(tell_ready)
    os.close(tell_result)
    for _ in children:
        os.read(ready, 1)
    start = time.monotonic()
    os.close(hold_gate)
    with os.fdopen(results, "rb") as lines:
        said = [json.loads(line) for line in lines]
    for child in children:
        os.waitpid(child, 0)
    errors = [error for _, error in said if error] + [f"no answer in {LIFETIME} s"] * (count - len(said))
    return max((end for end, _ in said), default=start + LIFETIME) - start, errors


def _boot_and_exit(boot: Boot, tell_ready: int, gate: int, tell_result: int) -> NoReturn:
    signal.alarm(LIFETIME)
    error = ""
    try:
        os.write(tell_ready, b".")
        os.close(tell_ready)
        os.read(gate, 1)
        asyncio.run(timed(boot))
    except BaseException as reason:  # noqa: BLE001 - whatever it is, it is this process's result
        error = f"{type(reason).__name__}: {reason}"[:_ERROR_LENGTH]
    end = time.monotonic()
    # Short enough for one atomic write.
    os.write(tell_result, json.dumps([end, error]).encode() + b"\n")
    os._exit(0)


def main() -> None:
    request = json.load(sys.stdin)
    boot = contender(request["name"], "storm", Place(**request["place"]))
    seconds, errors = rage(boot, request["count"])
    json.dump({"seconds": seconds, "errors": errors}, sys.stdout)


if __name__ == "__main__":
    main()
