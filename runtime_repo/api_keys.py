"""
API keys: who may use the application.

A secret is hashed by scrypt, which takes a third of a second and 16 MiB: in threads, a few at once, for which only so
many may wait, whatever is asked of them. It is stored nowhere, and while it is here it is in an object whose repr is
redacted, since a traceback may show its locals.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Self

import anyio
from anyio.lowlevel import RunVar

from runtime_repo.database import Queries, Row, together
from runtime_repo.errors import ConfigurationError, NotFoundError, OverloadedError, shown
from runtime_repo.rows import UNREADABLE, Page, check_types, known_status, page, unreadable
from runtime_repo.shielding import settle
from runtime_repo.values import (
    check_after,
    check_count,
    check_id,
    from_ms,
    instant_ms,
    is_text,
    no_thread,
    skipped,
    written,
)

__all__ = ["ApiKey", "ApiKeyStatus", "ApiKeys"]

MAX_SECRET_LENGTH = 1024

_COST = (2**14, 8, 5)
"""
scrypt's n, r and p of a new hash: today's guidance (OWASP, Password Storage) where 16 MiB must do. They are stored
with each, so that a later release may raise them.
"""

_SALT_BYTES = 16
_DIGEST_BYTES = 32
_FORM = re.compile(r"scrypt\$(16384|32768|65536)\$(8)\$([1-9]|1[0-6])\$([0-9a-f]{32})\$([0-9a-f]{64})")
"""
What is stored of a secret: scrypt's n, r and p, the salt and the digest. A hash that is cheaper than any of ours was is
as unknown as one so expensive that a damaged row could stop the process.
"""

_MOST_WORK = 8 * _COST[0] * _COST[2]
"""Of n times p."""

_AT_ONCE = 4
"""How many hashes an event loop's threads compute at once."""

_MOST_WAITING = 64
"""How many may wait for one of these threads."""

_LONGEST = 60.0
"""Seconds after which a hash is given up."""

_turns: RunVar[anyio.CapacityLimiter] = RunVar("runtime_repo.api_keys")


_Cost = tuple[int, int, int]
"""n, r and p."""


class ApiKeyStatus(StrEnum):
    """Whether an API key authenticates."""

    ACTIVE = "active"
    INACTIVE = "inactive"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What may be known of an API key: neither its secret nor the hash of it."""

    key_id: str
    role: str
    status: ApiKeyStatus
    created_at: datetime
    updated_at: datetime


class ApiKeys:
    """
    The verbs on API keys. Every write is safe to repeat: a call that was cancelled or timed out may have happened.

    A secret is 1 to 1024 characters without NUL; make one with ``secrets.token_urlsafe()``. No error, log line or repr
    shows it. *now* is for tests: it stands in for the database's clock, which judges everything otherwise.
    """

    def __init__(self, queries: Queries) -> None:
        self._queries = queries

    async def put(self, key_id: str, secret: str, *, role: str | None = None, now: datetime | None = None) -> ApiKey:
        """
        Store a key, or replace the secret of the one that is stored.

        A new key is active and, unless a *role* is given, an ``operator``. One that is stored keeps its status, so
        that an inactive one does not come back, and its role unless another is given. Repeating the call stores the
        same secret again.

        Raises:
            UnreadableRowError: The stored key has an unknown status. It was left as it is.
            OverloadedError: 64 hashes wait to be computed already, or the process can start no thread for one.
        """
        given = _Secret(secret)
        del secret
        check_id("key_id", key_id)
        if role is not None:
            check_id("role", role)
        at = instant_ms("now", now)
        given.check()
        hashed = await _Hash.of(given)

        async def put(queries: Queries) -> ApiKey:
            rows = await queries.fetch("api_keys.put", key_id, role, str(hashed), at)
            # An unknown status fails here, within the transaction.
            return api_key_from_row(written(rows, f"API key {key_id!r}"))

        return await together(self._queries, put)

    async def get(self, key_id: str) -> ApiKey:
        """
        Return a key.

        Raises:
            NotFoundError: There is none with this id.
        """
        key = await self.find(key_id)
        if key is None:
            raise NotFoundError("API key", key_id)
        return key

    async def find(self, key_id: str) -> ApiKey | None:
        """Return a key, or None."""
        rows = await self._queries.fetch("api_keys.find", check_id("key_id", key_id))
        return api_key_from_row(rows[0]) if rows else None

    async def authenticate(self, key_id: str, secret: str) -> ApiKey | None:
        """
        Return the key if it is active and this is its secret, otherwise None.

        None is the answer to a key that is unknown or inactive, to a wrong secret, to a stored hash of unknown form
        (as a version 1 may have left), and to what no key could be, an empty secret for one: what a stranger sends is
        no mistake of the caller's. Whichever key is named, the work is the same, so that the time taken does not tell
        which exist.

        Raises:
            OverloadedError: 64 hashes wait to be computed already, or the process can start no thread for one: answer
                that the server is busy (503).
        """
        offered = _Secret(secret)
        del secret
        try:
            check_id("key_id", key_id)
            offered.check()
        except ConfigurationError:
            return None
        rows = await self._queries.fetch("api_keys.credentials", key_id)
        stored = _Hash.parse(rows[0]["secret_hash"]) if rows else None
        matches = await (stored or _nobodys()).matches(offered)
        if stored is None or not matches or rows[0]["status"] != ApiKeyStatus.ACTIVE:
            return None
        return api_key_from_row(rows[0])

    async def set_active(
        self,
        key_id: str,
        active: bool,  # noqa: FBT001 - the verb's name says what it means
        *,
        now: datetime | None = None,
    ) -> ApiKey:
        """
        Let a key authenticate, or no more. Repeating the call changes nothing.

        Raises:
            NotFoundError: There is none with this id.
            UnreadableRowError: The stored key has an unknown status. It was left as it is.
        """
        if not isinstance(active, bool):
            raise ConfigurationError(f"active is {shown(active)}: expected True or False")
        wanted, other = ApiKeyStatus.ACTIVE, ApiKeyStatus.INACTIVE
        if not active:
            wanted, other = other, wanted
        rows = await self._queries.fetch(
            "api_keys.set_active", check_id("key_id", key_id), wanted, other, instant_ms("now", now)
        )
        if not rows:
            await self.get(key_id)
            raise skipped(f"API key {key_id!r}")
        return api_key_from_row(rows[0])

    async def any(self) -> bool:
        """
        Return whether there is any key at all, whatever its status: False is an application that was never set up.

        Inactive keys count, so that to deactivate the last one does not open the door of the first boot again.
        """
        rows = await self._queries.fetch("api_keys.any")
        return bool(written(rows, "the look for a key")["found"])

    async def list(self, *, after: str = "", limit: int = 100) -> Page[ApiKey]:
        """
        Return one page of the keys, ordered by id.

        Pass the last id of a page as *after* to get the next; a page shorter than *limit* is the last. The order of
        text may differ between databases. What cannot be read is left out, and told in the page's ``unreadable``.
        """
        return await page(
            lambda after, limit: self._queries.fetch("api_keys.list", after, limit),
            api_key_from_row,
            after=check_after(after),
            limit=check_count("limit", limit),
            place=lambda row: row["key_id"],
        )


class _Secret:
    """A secret as it was given. A plain string would be shown by a traceback with locals."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "<a secret>"

    def check(self) -> None:
        """Refuse what cannot be a secret, without repeating it."""
        if not isinstance(self._text, str):
            found = f"no text, but {type(self._text).__name__}"
        elif not 0 < len(self._text) <= MAX_SECRET_LENGTH:
            found = f"{len(self._text)} characters long"
        elif not is_text(self._text):
            found = "text with NUL or half a surrogate pair"
        else:
            return
        raise ConfigurationError(f"secret is {found}: expected 1 to {MAX_SECRET_LENGTH} characters without NUL")

    def scrypt(self, cost: _Cost, salt: bytes) -> bytes:
        """Compute its digest, which takes long and lets other threads run."""
        n, r, p = cost
        return hashlib.scrypt(
            self._text.encode(), salt=salt, n=n, r=r, p=p, maxmem=2 * 128 * r * n, dklen=_DIGEST_BYTES
        )

    def scrypt_evenly(self, cost: _Cost, salt: bytes) -> bytes:
        """The same, and as much work for a hash of an older release as for one of today."""
        digest = self.scrypt(cost, salt)
        (n, r, p), (today, _, parts) = cost, _COST
        if (missing := (today * parts - n * p) // today) > 0:
            self.scrypt((today, r, missing), salt)
        return digest


@dataclass(frozen=True, slots=True)
class _Hash:
    """What is stored of a secret."""

    cost: _Cost
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    @classmethod
    async def of(cls, secret: _Secret) -> Self:
        """Hash a secret, with a salt of its own."""
        salt = secrets.token_bytes(_SALT_BYTES)
        return cls(_COST, salt, await _in_turn(partial(secret.scrypt, _COST, salt)))

    @classmethod
    def parse(cls, text: object) -> Self | None:
        """The hash that is stored as *text*, or None if its form is unknown."""
        match = _FORM.fullmatch(str(text))
        if match is None or int(match[1]) * int(match[3]) > _MOST_WORK:
            return None
        cost = int(match[1]), int(match[2]), int(match[3])
        return cls(cost, bytes.fromhex(match[4]), bytes.fromhex(match[5]))

    def __str__(self) -> str:
        n, r, p = self.cost
        return f"scrypt${n}${r}${p}${self.salt.hex()}${self.digest.hex()}"

    async def matches(self, secret: _Secret) -> bool:
        """Whether it is this secret's, compared in constant time."""
        return hmac.compare_digest(await _in_turn(partial(secret.scrypt_evenly, self.cost, self.salt)), self.digest)


def _nobodys() -> _Hash:
    """Compared with where no hash is stored, for the sake of the work."""
    return _Hash(_COST, secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_DIGEST_BYTES))


async def _in_turn(work: partial[bytes]) -> bytes:
    """Compute a hash in a thread, when one of the few is free."""
    try:
        turns = _turns.get()
    except LookupError:
        _turns.set(turns := anyio.CapacityLimiter(_AT_ONCE))
    if turns.statistics().tasks_waiting >= _MOST_WAITING:
        raise OverloadedError(f"{_MOST_WAITING} secrets wait to be hashed already: try again later")
    async with turns:
        # A thread can't be stopped: whoever is cancelled waits for it, or those that began next would be too many.
        hashing = asyncio.ensure_future(anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1)))
        try:
            return await settle(hashing, within=_LONGEST)
        except RuntimeError as error:
            raise no_thread(error) from error


def api_key_from_row(row: Row) -> ApiKey:
    """An API key from the columns that every statement on API keys returns."""
    try:
        key_id, role = row["key_id"], row["role"]
        check_types((key_id, role), 0)
        return ApiKey(
            key_id=key_id,
            role=role,
            status=known_status(ApiKeyStatus, row["status"]),
            created_at=from_ms(row["created_at_ms"]),
            updated_at=from_ms(row["updated_at_ms"]),
        )
    except UNREADABLE as error:
        raise unreadable("runtime_api_keys", row["key_id"], error) from None
