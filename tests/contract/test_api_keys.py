"""API keys: their secrets are hashed, never stored, and asked for in the same way whichever key is named."""

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import anyio
import pytest

from runtime_repo import (
    ApiKey,
    ApiKeyStatus,
    ConfigurationError,
    NotFoundError,
    OverloadedError,
    RuntimeRepoError,
    RuntimeRepository,
    UnreadableRowError,
    api_keys,
)
from tests.contract.conftest import Clock, Factory

MINUTE = timedelta(minutes=1)
AT_ONCE = 4
"""How many hashes are computed at the same time."""

WAITING = 64
"""How many may wait for that."""

COST = api_keys._COST
"""That of a new hash, before the tests made it cheaper."""

SALT = bytes(range(16))
DIGEST = hashlib.sha256(SALT + b"right").digest()
"""What ``Scrypt`` makes of the right secret, whatever the cost."""


class Scrypt:
    """Stands for ``hashlib.scrypt``: quick, counts its calls, and can hold them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls: list[tuple[int, int, int, int]] = []
        self.running = 0
        self.most_running = 0
        self.may_end = threading.Event()
        self.may_end.set()

    def __call__(self, password: bytes, *, salt: bytes, n: int, r: int, p: int, dklen: int, maxmem: int) -> bytes:
        assert 128 * n * r < maxmem <= 256 * n * r
        with self._lock:
            self.calls.append((n, r, p, dklen))
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        try:
            assert self.may_end.wait(10)
            return hashlib.sha256(salt + password).digest()[:dklen]
        finally:
            with self._lock:
                self.running -= 1


@pytest.fixture
def scrypt(monkeypatch: pytest.MonkeyPatch) -> Scrypt:
    """Every hash that is asked for, counted; where nothing depends on the digest."""
    counted = Scrypt()
    monkeypatch.setattr(hashlib, "scrypt", counted)
    return counted


async def change(repo: RuntimeRepository, key_id: str, **columns: str) -> None:
    """Write columns of a key as another program would."""
    schema = getattr(repo._database, "tokens", {"schema": "main"})["schema"]
    assignments = ", ".join(f"{column} = '{value}'" for column, value in columns.items())
    async with repo.transaction() as transaction:
        await transaction.connection.execute(
            f"update {schema}.runtime_api_keys set {assignments} where key_id = '{key_id}'"
        )


async def rows(repo: RuntimeRepository) -> list[dict[str, Any]]:
    """The table as it is stored."""
    schema = getattr(repo._database, "tokens", {"schema": "main"})["schema"]
    query = f"select * from {schema}.runtime_api_keys order by key_id"
    async with repo.transaction() as transaction:
        fetch = getattr(transaction.connection, "fetch", None) or transaction.connection.execute_fetchall
        return [dict(row) for row in await fetch(query)]


async def test_a_key_authenticates_with_its_secret(repo: RuntimeRepository, clock: Clock) -> None:
    """And with no other; what comes back is the key as it is stored."""
    key = await repo.api_keys.put("k", "right", role="admin", now=clock.now)
    assert key == ApiKey("k", "admin", ApiKeyStatus.ACTIVE, clock.now, clock.now)
    assert await repo.api_keys.get("k") == await repo.api_keys.find("k") == key
    assert await repo.api_keys.authenticate("k", "right") == key
    for wrong in ("wrong", "right ", "Right", "righ", "rightright"):
        assert await repo.api_keys.authenticate("k", wrong) is None
    assert await repo.api_keys.authenticate("K", "right") is None


@pytest.mark.usefixtures("scrypt")
async def test_a_key_is_an_operator_unless_it_is_said(repo: RuntimeRepository) -> None:
    """The role of a new key, as the database has it for the keys of version 1."""
    assert (await repo.api_keys.put("k", "right")).role == "operator"


@pytest.mark.parametrize("secret", ["x", "ü\N{SNOWMAN}\N{PILE OF POO}", "x" * 1024, "\N{PILE OF POO}" * 1024, " \n$"])
async def test_any_text_can_be_a_secret(repo: RuntimeRepository, secret: str) -> None:
    """Of up to 1024 characters, taken as it is."""
    await repo.api_keys.put("k", secret)
    assert await repo.api_keys.authenticate("k", secret)
    assert await repo.api_keys.authenticate("k", secret[:-1] + "y") is None


async def test_what_is_stored_is_scrypts_with_a_salt_of_its_own(
    repo: RuntimeRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form of the design: whoever knows the secret can verify it; two keys with one secret have different rows."""
    monkeypatch.setattr(api_keys, "_COST", COST)
    for name in ("a", "b"):
        await repo.api_keys.put(name, "right")
    stored = [row["secret_hash"].split("$") for row in await rows(repo)]
    for name, n, r, p, salt, digest in stored:
        assert (name, n, r, p) == ("scrypt", "16384", "8", "5")
        assert digest == hashlib.scrypt(b"right", salt=bytes.fromhex(salt), n=2**14, r=8, p=5, dklen=32).hex()
    assert stored[0][4] != stored[1][4]


async def test_putting_again_replaces_the_secret(repo: RuntimeRepository, clock: Clock) -> None:
    """The old one does not authenticate any more; a role that is not given, and the time of creation, stay."""
    first = await repo.api_keys.put("k", "old", role="viewer", now=clock.now)
    second = await repo.api_keys.put("k", "new", now=clock.advance(MINUTE))
    assert second == ApiKey("k", "viewer", ApiKeyStatus.ACTIVE, first.created_at, clock.now)
    assert await repo.api_keys.authenticate("k", "old") is None
    assert await repo.api_keys.authenticate("k", "new") == second
    assert (await repo.api_keys.put("k", "new", role="admin")).role == "admin"


@pytest.mark.usefixtures("scrypt")
async def test_putting_the_same_again_changes_nothing_for_its_user(repo: RuntimeRepository) -> None:
    """Whoever does not know whether the call arrived repeats it: the key and its secret are the same."""
    first = await repo.api_keys.put("k", "right")
    again = await repo.api_keys.put("k", "right")
    assert (again.key_id, again.role, again.status) == (first.key_id, first.role, first.status)
    assert await repo.api_keys.authenticate("k", "right") == again
    assert await repo.api_keys.list() == [again]


@pytest.mark.usefixtures("scrypt")
async def test_twenty_tasks_put_one_key(factory: Factory) -> None:
    """One of the secrets is the key's, whole."""
    async with factory() as one, factory() as two:
        await asyncio.gather(*((one, two)[n % 2].api_keys.put("k", f"secret {n}") for n in range(20)))
        answers = [await one.api_keys.authenticate("k", f"secret {number}") for number in range(20)]
        assert [key for key in answers if key] == await two.api_keys.list()


@pytest.mark.usefixtures("scrypt")
async def test_an_inactive_key_does_not_authenticate(repo: RuntimeRepository, clock: Clock) -> None:
    """Until it is active again; to say it twice changes nothing, and a new secret does not bring it back."""
    key = await repo.api_keys.put("k", "right", now=clock.now)
    assert await repo.api_keys.set_active("k", active=True, now=clock.advance(MINUTE)) == key
    inactive = await repo.api_keys.set_active("k", active=False, now=clock.now)
    assert inactive == ApiKey("k", "operator", ApiKeyStatus.INACTIVE, key.created_at, clock.now)
    assert await repo.api_keys.set_active("k", active=False, now=clock.advance(MINUTE)) == inactive
    assert await repo.api_keys.authenticate("k", "right") is None
    assert (await repo.api_keys.put("k", "new")).status is ApiKeyStatus.INACTIVE
    assert await repo.api_keys.authenticate("k", "new") is None
    active = await repo.api_keys.set_active("k", active=True)
    assert await repo.api_keys.authenticate("k", "new") == active


@pytest.mark.usefixtures("scrypt")
async def test_an_unknown_key_is_not_found(repo: RuntimeRepository) -> None:
    """``get`` and ``set_active`` raise, ``find`` and ``authenticate`` return None."""
    assert await repo.api_keys.find("nobody") is None
    assert await repo.api_keys.authenticate("nobody", "right") is None
    for call in (repo.api_keys.get("nobody"), repo.api_keys.set_active("nobody", active=True)):
        with pytest.raises(NotFoundError, match="no API key 'nobody'"):
            await call
    assert await repo.api_keys.list() == []


@pytest.mark.usefixtures("scrypt")
async def test_any_tells_whether_it_was_ever_set_up(repo: RuntimeRepository) -> None:
    """Inactive keys count: to deactivate the last one does not open the door of the first boot again."""
    assert await repo.api_keys.any() is False
    await repo.api_keys.put("k", "right")
    assert await repo.api_keys.any() is True
    await repo.api_keys.set_active("k", active=False)
    assert await repo.api_keys.any() is True


@pytest.mark.usefixtures("scrypt")
async def test_keys_are_listed_by_pages(repo: RuntimeRepository) -> None:
    """Every key is on exactly one page, whatever its status."""
    for number in range(5):
        await repo.api_keys.put(f"k{number}", "right")
    await repo.api_keys.set_active("k2", active=False)
    seen: list[ApiKey] = []
    while page := await repo.api_keys.list(after=seen[-1].key_id if seen else "", limit=2):
        assert len(page) <= 2
        seen += page
    assert [key.key_id for key in seen] == ["k0", "k1", "k2", "k3", "k4"]
    assert [key.key_id for key in seen if key.status is not ApiKeyStatus.ACTIVE] == ["k2"]


def form(n: object = 2**14, r: object = 8, p: object = 1, salt: str = SALT.hex(), digest: str = DIGEST.hex()) -> str:
    """A stored hash of the right secret, unless it says otherwise."""
    return f"scrypt${n}${r}${p}${salt}${digest}"


@pytest.mark.parametrize(("n", "p"), [(2**14, 1), (2**15, 1), (2**16, 1), (2**14, 2)])
async def test_a_hash_of_another_cost_authenticates(repo: RuntimeRepository, n: int, p: int) -> None:
    """As an earlier release stored it, and as a later one may."""
    await repo.api_keys.put("k", "other")
    digest = hashlib.scrypt(b"right", salt=SALT, n=n, r=8, p=p, dklen=32, maxmem=2**28)
    await change(repo, "k", secret_hash=form(n, p=p, digest=digest.hex()))
    assert await repo.api_keys.authenticate("k", "right")
    assert await repo.api_keys.authenticate("k", "other") is None


UNKNOWN_FORMS = [
    *("", "right", "scrypt", "$2b$12$KIXQ4oN1Y9xQ1Z1Z1Z1Z1u", "pbkdf2$1000$00$00", DIGEST.hex(), "scrypt$$$$$"),
    *(form(2**31), form(2**62), form("9" * 400), form(2**17), form(2**13), form(2), form(0), form(-(2**14))),
    *(form(2**14 + 1), form("2**14"), form("016384"), form("١٦٣٨٤"), form(r=1), form(r=2**30), form(p=0)),
    *(
        form(p=2**30),
        form(p=17),
        form(2**16, p=16),
        form(p=""),
        form() + "\n",
        form() + "$",
        " " + form(),
        form().upper(),
        form()[:-1],
    ),
    *(form(salt=""), form(salt="zz" * 16), form(digest=""), form(digest="00"), form(digest=DIGEST.hex()[:-2])),
    *(form(salt=SALT.hex() * 99999), form(digest=DIGEST.hex() + "00"), form(digest="é" * 64)),
]
"""What version 1, or another program, may have left; never a hash of ours."""


async def test_a_hash_of_unknown_form_never_authenticates(repo: RuntimeRepository, scrypt: Scrypt) -> None:
    """Nor does it raise, or cost more than any other: version 1 may have left anything. A new secret mends it."""
    await repo.api_keys.put("k", "other")
    for stored in UNKNOWN_FORMS:
        await change(repo, "k", secret_hash=form())
        assert await repo.api_keys.authenticate("k", "right")
        await change(repo, "k", secret_hash=stored)
        scrypt.calls.clear()
        assert await repo.api_keys.authenticate("k", "right") is None, stored[:50]
        assert scrypt.calls == [(2**14, 8, 1, 32)], stored[:50]
        await repo.api_keys.put("k", "right")
        assert await repo.api_keys.authenticate("k", "right"), stored[:50]


async def test_the_work_is_the_same_whichever_key_is_named(
    repo: RuntimeRepository, scrypt: Scrypt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    That of our own cost for a right and a wrong secret, an unknown and an inactive key, an unknown status, and a key
    whose hash an earlier release has made.
    """
    monkeypatch.setattr(api_keys, "_COST", COST)
    await repo.api_keys.put("old", "right")
    await change(repo, "old", secret_hash=form())
    for name in ("right", "inactive", "odd"):
        await repo.api_keys.put(name, "right")
    await repo.api_keys.set_active("inactive", active=False)
    await change(repo, "odd", status="revoked")
    answers = []
    for name, secret in (
        ("right", "right"),
        ("right", "wrong"),
        ("nobody", "right"),
        ("inactive", "right"),
        ("inactive", "wrong"),
        ("odd", "right"),
        ("old", "right"),
        ("old", "wrong"),
    ):
        scrypt.calls.clear()
        answers.append(await repo.api_keys.authenticate(name, secret) is not None)
        assert {call[:2] for call in scrypt.calls} == {(2**14, 8)}
        assert sum(call[2] for call in scrypt.calls) == 5, name
    assert answers == [True, False, False, False, False, False, True, False]


async def test_no_more_than_so_many_wait(repo: RuntimeRepository, scrypt: Scrypt) -> None:
    """Whoever would be the next is told at once, and nobody else: a flood of guesses fills no memory."""
    await repo.api_keys.put("k", "right")
    scrypt.may_end.clear()
    calls = [asyncio.create_task(repo.api_keys.authenticate("k", "right")) for _ in range(AT_ONCE + WAITING)]
    try:
        await until(lambda: api_keys._turns.get().statistics().tasks_waiting == WAITING)
        for call in (repo.api_keys.authenticate("k", "right"), repo.api_keys.put("l", "right")):
            with pytest.raises(OverloadedError, match="try again later"):
                await call
    finally:
        scrypt.may_end.set()
    assert all(await asyncio.gather(*calls))
    assert await repo.api_keys.authenticate("k", "right")


@pytest.mark.parametrize("status", ["revoked", "", "ACTIVE"])
async def test_an_unknown_status_is_an_error_that_names_it(repo: RuntimeRepository, status: str) -> None:
    """To read it and to change it, which leaves it as it is; to authenticate with it is refused as with any other."""
    await repo.api_keys.put("k", "right", role="viewer")
    await change(repo, "k", status=status)
    before = await rows(repo)
    listed = await repo.api_keys.list()
    assert (listed, [error.key for error in listed.unreadable]) == ([], ["k"])
    verbs: list[Callable[[], Awaitable[object]]] = [
        lambda: repo.api_keys.get("k"),
        lambda: repo.api_keys.find("k"),
        lambda: repo.api_keys.set_active("k", active=True),
        lambda: repo.api_keys.set_active("k", active=False),
        lambda: repo.api_keys.put("k", "new", role="admin"),
    ]
    for verb in verbs:
        with pytest.raises(UnreadableRowError, match=f"row k of runtime_api_keys .* unknown status '{status}'"):
            await verb()
    assert await repo.api_keys.authenticate("k", "right") is None
    assert await rows(repo) == before
    assert await repo.api_keys.any()


@pytest.mark.usefixtures("scrypt")
async def test_keys_are_written_with_a_transaction(repo: RuntimeRepository) -> None:
    """Or not at all; and within it they authenticate already."""
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the whole block fails
        async with repo.transaction() as transaction:
            await transaction.api_keys.put("k", "right")
            assert await transaction.api_keys.authenticate("k", "right")
            raise ZeroDivisionError
    assert not await repo.api_keys.any()


async def test_an_error_within_a_transaction_spoils_only_its_own_part(repo: RuntimeRepository) -> None:
    """A key that could not be put leaves the rest of the transaction as it is."""
    await repo.api_keys.put("odd", "right")
    await change(repo, "odd", status="revoked")
    async with repo.transaction() as transaction:
        await transaction.api_keys.put("a", "right")
        with pytest.raises(RuntimeRepoError, match="revoked"):
            await transaction.api_keys.put("odd", "new")
        await transaction.api_keys.put("b", "right")
    await change(repo, "odd", status="active")
    assert [key.key_id for key in await repo.api_keys.list()] == ["a", "b", "odd"]
    assert await repo.api_keys.authenticate("odd", "right")


# --- Threads ---------------------------------------------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop and the threads go on until it is so."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a thread that begins or ends sets no event
            await asyncio.sleep(0.001)


async def test_the_event_loop_goes_on_while_hashes_are_computed(repo: RuntimeRepository, scrypt: Scrypt) -> None:
    """A few at once, each in a thread: other tasks' verbs are served meanwhile, and the rest wait for their turn."""
    scrypt.may_end.clear()
    puts = [asyncio.create_task(repo.api_keys.put(f"k{number}", "right")) for number in range(3 * AT_ONCE)]
    await until(lambda: scrypt.running == AT_ONCE)
    await repo.attempts.enqueue("run")
    assert len(await repo.attempts.list()) == 1
    assert not any(put.done() for put in puts)
    scrypt.may_end.set()
    await asyncio.gather(*puts)
    assert (scrypt.most_running, len(scrypt.calls)) == (AT_ONCE, 3 * AT_ONCE)


@pytest.mark.parametrize("by", ["task", "scope"])
async def test_whoever_is_cancelled_leaves_no_hash_behind(repo: RuntimeRepository, scrypt: Scrypt, by: str) -> None:
    """
    A thread can't be stopped, so a cancelled call ends with it; one whose turn has not come ends at once. Never do more
    run than may, and every turn is given back. asyncio's way, and anyio's.
    """
    await repo.api_keys.put("k", "right")
    before = threading.active_count()
    for _ in range(3):
        scrypt.calls.clear()
        scrypt.may_end.clear()
        ended: list[int] = []

        async def call(number: int, ended: list[int] = ended) -> None:
            try:
                await repo.api_keys.authenticate("k", "right")
            finally:
                ended.append(number)

        if by == "task":
            tasks = [asyncio.create_task(call(number)) for number in range(3 * AT_ONCE)]
            await until(lambda: scrypt.running == AT_ONCE)
            for task in tasks:
                task.cancel()
            await until(lambda ended=ended: len(ended) == 2 * AT_ONCE)  # type: ignore[misc]
            # Cancelled again, and still not left alone.
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0)
            assert len(ended) == 2 * AT_ONCE
            scrypt.may_end.set()
            await asyncio.wait(tasks)
            assert all(task.cancelled() for task in tasks)
        else:
            async with anyio.create_task_group() as group:
                for number in range(3 * AT_ONCE):
                    group.start_soon(call, number)
                await until(lambda: scrypt.running == AT_ONCE)
                group.cancel_scope.cancel()
                with anyio.CancelScope(shield=True):
                    await until(lambda ended=ended: len(ended) == 2 * AT_ONCE)  # type: ignore[misc]
                scrypt.may_end.set()
        assert (scrypt.running, len(scrypt.calls)) == (0, AT_ONCE)
    assert scrypt.most_running == AT_ONCE
    assert threading.active_count() <= before + AT_ONCE
    async with asyncio.timeout(10):
        assert all(await asyncio.gather(*(repo.api_keys.authenticate("k", "right") for _ in range(2 * AT_ONCE))))


@pytest.mark.usefixtures("scrypt")
async def test_a_cancelled_put_has_happened_or_not(factory: Factory) -> None:
    """Wherever the cancellation strikes: one of the two secrets is the key's, and to repeat the call brings the new."""
    async with factory() as repo:
        turns = 0
        finished = False
        while not finished:
            old, new = f"old {turns}", f"new {turns}"
            await repo.api_keys.put("k", old)
            task = asyncio.ensure_future(repo.api_keys.put("k", new))
            for _ in range(turns):
                await asyncio.sleep(0)
            finished = task.done()
            task.cancel()
            await asyncio.wait([task])
            assert len([s for s in (old, new) if await repo.api_keys.authenticate("k", s)]) == 1
            await repo.api_keys.put("k", new)
            assert await repo.api_keys.authenticate("k", new)
            turns += 1 + turns // 4
            assert turns < 10**6


@pytest.mark.usefixtures("scrypt")
def test_every_event_loop_has_turns_of_its_own(factory: Factory) -> None:
    """One loop after another, and several in threads at once, use the module and end."""

    async def use(name: str) -> bool:
        async with factory() as repo:
            await repo.api_keys.put(name, "right")
            answers = await asyncio.gather(*(repo.api_keys.authenticate(name, "right") for _ in range(2 * AT_ONCE)))
            return all(answers)

    asyncio.run(use("first"))
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda name=name: answers.append(asyncio.run(use(name))), daemon=True)
        for name in ("a", "b", "c")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [True, True, True]


# --- Bad input -------------------------------------------------------------------------------------------------------

IDS: list[Any] = ["", "x" * 513, "a\0", "\ud800", 7, None]
SECRETS: list[tuple[Any, str]] = [
    ("", "0 characters"),
    ("hush" * 257, "1028 characters long: expected 1 to 1024"),
    ("hush\0", "NUL"),
    ("hush\ud800", "half a surrogate pair"),
    (b"hush", "no text, but bytes"),
    (None, "no text, but NoneType"),
]


async def test_a_secret_that_is_invalid_is_not_told(repo: RuntimeRepository, scrypt: Scrypt) -> None:
    """The error names the argument, and of the secret nothing else; nothing is computed or stored."""
    for secret, word in SECRETS:
        with pytest.raises(ConfigurationError, match=f"secret .*{word}") as refused:
            await repo.api_keys.put("k", secret)
        assert "hush" not in f"{refused.value} {refused.value!r}"
    assert scrypt.calls == []
    assert not await repo.api_keys.any()


async def test_what_no_key_can_be_does_not_authenticate(repo: RuntimeRepository, scrypt: Scrypt) -> None:
    """A stranger's input is not the caller's mistake: no error, and no work that it could ask for without end."""
    await repo.api_keys.put("k", "right")
    scrypt.calls.clear()
    for key_id in IDS:
        assert await repo.api_keys.authenticate(key_id, "right") is None
    for secret, _ in SECRETS:
        assert await repo.api_keys.authenticate("k", secret) is None
    assert scrypt.calls == []
