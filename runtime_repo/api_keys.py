"""
API keys: who may use the application.

A secret is hashed by scrypt, which takes 66 ms and 16 MiB: in threads, a few at once, whatever is asked of them. It is
stored nowhere, and while it is here it is in an object whose repr is redacted, since a traceback may show its locals.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Self

import anyio
from anyio.lowlevel import RunVar

from runtime_repo.database import Queries
from runtime_repo.errors import ConfigurationError, NotFoundError
from runtime_repo.records import ApiKey, ApiKeyStatus, api_key_from_row
from runtime_repo.shielding import settle
from runtime_repo.values import check_after, check_count, check_id, instant_ms, is_text

__all__ = ["ApiKeys"]

MAX_SECRET_LENGTH = 1024

_N = 2**14
_SALT_BYTES = 16
_DIGEST_BYTES = 32
_FORM = re.compile(r"scrypt\$(16384|32768|65536)\$8\$1\$([0-9a-f]{32})\$([0-9a-f]{64})")
"""
What is stored of a secret: scrypt's n, r and p, the salt and the digest. A later release may raise n. A hash that is
cheaper than ours is as unknown as one so expensive that a damaged row could stop the process.
"""

_AT_ONCE = 4
"""How many hashes an event loop's threads compute at once."""

_LONGEST = 60.0
"""Seconds after which a hash is given up."""

_turns: RunVar[anyio.CapacityLimiter] = RunVar("runtime_repo.api_keys")


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
            RuntimeRepoError: The stored key has an unknown status. It was left as it is.
        """
        given = _Secret(secret)
        del secret
        check_id("key_id", key_id)
        if role is not None:
            check_id("role", role)
        at = instant_ms("now", now)
        given.check()
        hashed = await _Hash.of(given)
        async with self._queries.atomic() as queries:
            rows = await queries.fetch("api_keys.put", key_id, role, str(hashed), at)
            # An unknown status fails here, within the transaction.
            return api_key_from_row(rows[0])

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
        matches = await (stored or _NOBODYS).matches(offered)
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
            RuntimeRepoError: The stored key has an unknown status. It was left as it is.
        """
        if not isinstance(active, bool):
            raise ConfigurationError(f"active is {active!r}: expected True or False")
        wanted, other = ApiKeyStatus.ACTIVE, ApiKeyStatus.INACTIVE
        if not active:
            wanted, other = other, wanted
        rows = await self._queries.fetch(
            "api_keys.set_active", check_id("key_id", key_id), wanted, other, instant_ms("now", now)
        )
        if not rows:
            raise NotFoundError("API key", key_id)
        return api_key_from_row(rows[0])

    async def any(self) -> bool:
        """
        Return whether there is any key at all, whatever its status: False is an application that was never set up.

        Inactive keys count, so that to deactivate the last one does not open the door of the first boot again.
        """
        rows = await self._queries.fetch("api_keys.any")
        return bool(rows[0]["found"])

    async def list(self, *, after: str = "", limit: int = 100) -> Sequence[ApiKey]:
        """
        Return one page of the keys, ordered by id.

        Pass the last id of a page as *after* to get the next; a page shorter than *limit* is the last. The order of
        text may differ between databases.
        """
        rows = await self._queries.fetch("api_keys.list", check_after(after), check_count("limit", limit))
        return [api_key_from_row(row) for row in rows]


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

    def scrypt(self, n: int, salt: bytes) -> bytes:
        """Compute its digest, which takes long and lets other threads run."""
        return hashlib.scrypt(
            self._text.encode(), salt=salt, n=n, r=8, p=1, maxmem=2 * 128 * 8 * n, dklen=_DIGEST_BYTES
        )


@dataclass(frozen=True, slots=True)
class _Hash:
    """What is stored of a secret."""

    n: int
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    @classmethod
    async def of(cls, secret: _Secret) -> Self:
        """Hash a secret, with a salt of its own."""
        salt = secrets.token_bytes(_SALT_BYTES)
        return cls(_N, salt, await _in_turn(partial(secret.scrypt, _N, salt)))

    @classmethod
    def parse(cls, text: object) -> Self | None:
        """The hash that is stored as *text*, or None if its form is unknown."""
        match = _FORM.fullmatch(str(text))
        return match and cls(int(match[1]), bytes.fromhex(match[2]), bytes.fromhex(match[3]))

    def __str__(self) -> str:
        return f"scrypt${self.n}$8$1${self.salt.hex()}${self.digest.hex()}"

    async def matches(self, secret: _Secret) -> bool:
        """Whether it is this secret's, compared in constant time."""
        return hmac.compare_digest(await _in_turn(partial(secret.scrypt, self.n, self.salt)), self.digest)


_NOBODYS = _Hash(_N, secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_DIGEST_BYTES))
"""Compared with where no hash is stored, for the sake of the work."""


async def _in_turn(work: partial[bytes]) -> bytes:
    """Compute a hash in a thread, when one of the few is free."""
    try:
        turns = _turns.get()
    except LookupError:
        _turns.set(turns := anyio.CapacityLimiter(_AT_ONCE))
    async with turns:
        # A thread can't be stopped: whoever is cancelled waits for it, or those that began next would be too many.
        hashing = asyncio.ensure_future(anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1)))
        return await settle(hashing, within=_LONGEST)
