"""The network between the processes and PostgreSQL: a relay in the test's own event loop that misbehaves on command."""

import asyncio
import contextlib
import math
import socket
import struct
from collections.abc import Callable
from random import Random
from typing import Literal, Self

Mode = Literal["pass", "stall", "blackhole", "refuse"]
"""
What befalls connections, the open ones when it is set and those that are made meanwhile:

- *pass*: they are forwarded.
- *stall*: what is sent is held, and forwarded later. A network that is cut for a while; TCP sends again.
- *blackhole*: what is sent is swallowed, and nobody is told, then or later. A machine without power, a firewall that
  lost its table. Connections that are made after *pass* work again.
- *refuse*: they are reset.
"""

_RESET = struct.pack("ii", 1, 0)
_CHUNK = 65_536


class _Link:
    """One connection, forwarded; *dead* is one whose words are swallowed."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter | None = None) -> None:
        self.client = client
        self.ends = [client] if server is None else [client, server]
        self.is_dead = server is None

    def reset(self) -> None:
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.transport.abort()


class Network:
    """
    Listens on a free port of 127.0.0.1 and forwards to the port *target*.

    An asynchronous context manager, which leaves no connection open.
    """

    def __init__(self, target: int, random: Random) -> None:
        self._target = target
        self._random = random
        self._mode: Mode = "pass"
        self._flows = asyncio.Event()
        self._flows.set()
        self._links: set[_Link] = set()
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for link in self._links:
            link.reset()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def _swallows(self) -> bool:
        return self._mode == "blackhole"

    def become(self, mode: Mode) -> None:
        """From now on do as *mode* says."""
        self._mode = mode
        if mode == "blackhole":
            self.forget(1)
        if mode == "refuse":
            self.drop(1)
        if mode == "stall":
            self._flows.clear()
        else:
            self._flows.set()

    def drop(self, share: float) -> int:
        """Reset this share of the living connections, at least one if there is one; return how many."""
        return self._each(share, _Link.reset)

    def half_close(self, share: float) -> int:
        """Say to the clients of this share of them that the server has ended, and swallow what they still send."""

        def close(link: _Link) -> None:
            link.is_dead = True
            if link.client.can_write_eof():
                link.client.write_eof()

        return self._each(share, close)

    def forget(self, share: float) -> int:
        """Swallow from now on what is sent on this share of them; new ones work."""

        def kill(link: _Link) -> None:
            link.is_dead = True

        return self._each(share, kill)

    def _each(self, share: float, do: Callable[[_Link], None]) -> int:
        living = [link for link in self._links if not link.is_dead]
        some = self._random.sample(living, math.ceil(share * len(living)))
        for link in some:
            do(link)
        return len(some)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == "refuse":
            _Link(writer).reset()
            return
        if self._swallows:
            link = _Link(writer)
            pumps = [self._pump(link, reader, writer)]
        else:
            try:
                answers, server = await asyncio.open_connection("127.0.0.1", self._target)
            except OSError:
                _Link(writer).reset()
                return
            link = _Link(writer, server)
            # The mode may have changed while the server was called.
            link.is_dead = self._swallows
            pumps = [self._to_server(link, reader, server), self._pump(link, answers, writer)]
        self._links.add(link)
        try:
            await asyncio.gather(*pumps)
        finally:
            self._links.discard(link)
            for end in link.ends:
                end.transport.abort()

    async def _to_server(self, link: _Link, client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        await self._pump(link, client, server)
        if link.is_dead:
            # Nobody will tell the server, and it would keep the connection, and its locks, for hours.
            server.transport.abort()

    async def _pump(self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Forward until *source* ends, and then its end."""
        try:
            while data := await source.read(_CHUNK):
                await self._flows.wait()
                if not link.is_dead:
                    sink.write(data)
                    await sink.drain()
            await self._flows.wait()
            if not link.is_dead and sink.can_write_eof():
                sink.write_eof()
        except (OSError, RuntimeError):
            if not link.is_dead:
                link.reset()
