"""
What must finish although its caller is cancelled, and for how long at most.

A shielded cancel scope stops anyio's cancellation but not a native ``task.cancel()``, and a native shield stops only
that: clean-up is owned by a task of its own, under both. None of it waits without a bound, for the other side may never
answer: whoever cleans up a connection terminates it when the bound has passed.
"""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

import anyio

__all__ = ["CLEAN_UP", "finish", "leave", "settle"]

T = TypeVar("T")

CLEAN_UP = 1.5
"""Seconds that one clean-up may take. A caller may have to wait for it, and must hear of its cancellation soon."""

_left: set["asyncio.Future[Any]"] = set()
"""What was left to itself, so that it is not collected before it has ended."""


async def finish(work: Coroutine[Any, Any, T], *, within: float = CLEAN_UP) -> T | None:
    """
    Run *work* to its end whatever happens to the caller, then let a cancellation through.

    After *within* seconds it is cancelled and left to itself, and the caller goes on without its result.
    """
    with contextlib.suppress(TimeoutError):
        return await settle(asyncio.ensure_future(work), within=within)
    return None


async def settle(future: "asyncio.Future[T]", *, within: float = CLEAN_UP) -> T:
    """
    Wait for *future* whatever happens to the caller, then let a cancellation through.

    Raises:
        TimeoutError: It has not ended within so many seconds; it was cancelled and is left to itself.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within
    try:
        await asyncio.wait([future], timeout=within)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            while not future.done() and (left := deadline - loop.time()) > 0:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future], timeout=left)
        leave(future)
        raise
    if not future.done():
        leave(future)
        raise TimeoutError
    return future.result()


def leave(future: "asyncio.Future[Any]") -> None:
    """Cancel what nobody waits for any more: it ends by itself, and its error is no news."""
    _left.add(future)
    future.add_done_callback(_ended)
    future.cancel()


def _ended(future: "asyncio.Future[Any]") -> None:
    _left.discard(future)
    if not future.cancelled():
        future.exception()
