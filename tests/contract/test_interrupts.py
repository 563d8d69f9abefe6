"""Interrupts: a question is asked once and answered once."""

import asyncio
import contextlib
import hashlib
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from runtime_repo import (
    AttemptStatus,
    Interrupt,
    InterruptStatus,
    InvalidTransitionError,
    LeaseLostError,
    NotFoundError,
    PayloadMismatchError,
    RuntimeRepository,
    UnreadableRowError,
)
from tests.contract.conftest import Clock, Factory, execute

MINUTE = timedelta(minutes=1)

QUESTION: dict[str, Any] = {"thread_id": "thread", "run_id": "run", "attempt_id": "a", "value": 1}
ANSWER: dict[str, Any] = {"interrupt_id": "i", "payload": 1}

BY_ANOTHER_PROGRAM = """
insert into {schema}.runtime_interrupts
       (interrupt_id, thread_id, run_id, attempt_id, value_json, status, created_at_ms)
values ('i', 'thread', 'run', 'a', '<value>', '<status>', 1600000000000)
"""


async def ask(repo: RuntimeRepository, interrupt_id: str, thread_id: str = "thread") -> Interrupt:
    """An interrupt that waits for its answer."""
    return await repo.interrupts.create(thread_id, "run", "a", "why?", interrupt_id=interrupt_id)


async def test_a_question_is_stored_as_it_was_asked(repo: RuntimeRepository, clock: Clock) -> None:
    """What comes back is what went in, and nobody has answered."""
    value = {"ask": "ü/\N{SNOWMAN}", "choices": [1, None, "\0"]}
    stored = await repo.interrupts.create("thread", "run", "a", value, interrupt_id="i", now=clock.now)
    assert stored == Interrupt(
        interrupt_id="i",
        thread_id="thread",
        run_id="run",
        attempt_id="a",
        value=value,
        status=InterruptStatus.PENDING,
        created_at=clock.now,
        resume_payload=None,
        resume_payload_hash=None,
        resumed_at=None,
    )
    assert await repo.interrupts.get("i") == await repo.interrupts.find("i") == stored
    assert (await repo.interrupts.create("thread", "run", "a", None)).value is None


async def test_the_same_id_again_is_the_same_question(repo: RuntimeRepository, clock: Clock) -> None:
    """A repeated create changes nothing, also when the question has been answered meanwhile."""
    create = partial(repo.interrupts.create, "thread", "run", "a", interrupt_id="i")
    first = await create({"x": 1, "y": 2}, now=clock.now)
    assert await create({"y": 2, "x": 1}, now=clock.advance(MINUTE)) == first
    answered = await repo.interrupts.resume("i", "because")
    assert await create({"x": 1, "y": 2}) == answered
    assert await repo.interrupts.list() == [answered]


async def test_numbers_as_keys_are_the_same_question_and_answer_again(repo: RuntimeRepository) -> None:
    """They are stored as text, in another order: the very same call must not be a conflict."""
    for value in ({2: "x", 10: "y"}, {2: "x", 10: "y"}, {"10": "y", "2": "x"}):
        await repo.interrupts.create("thread", "run", "a", value, interrupt_id="i")
    for value in ({2: "x", 10: "y"}, {2: "x", 10: "y"}, {"10": "y", "2": "x"}):
        answered = await repo.interrupts.resume("i", value)
        assert answered.value == answered.resume_payload == {"2": "x", "10": "y"}


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"thread_id": "other"}, ("thread_id",)),
        ({"run_id": "other"}, ("run_id",)),
        ({"attempt_id": "other"}, ("attempt_id",)),
        ({"value": True}, ("value",)),
        ({"value": None, "run_id": "other"}, ("run_id", "value")),
    ],
)
async def test_the_same_id_with_another_question_is_refused(
    repo: RuntimeRepository, change: dict[str, Any], differing: tuple[str, ...]
) -> None:
    """Two different questions under one id are a mistake that must not be lost."""
    stored = await repo.interrupts.create(**QUESTION, interrupt_id="i")
    with pytest.raises(PayloadMismatchError) as caught:
        await repo.interrupts.create(**(QUESTION | change), interrupt_id="i")
    assert caught.value.differing == differing
    assert await repo.interrupts.list() == [stored]


async def test_a_generated_id_is_another_question_each_time(repo: RuntimeRepository) -> None:
    """Without an id nothing is recognized."""
    first, second = [await repo.interrupts.create("thread", "run", "a", "why?") for _ in range(2)]
    assert first.interrupt_id != second.interrupt_id
    assert len(await repo.interrupts.list(thread_id="thread")) == 2


async def test_an_answer_is_stored(repo: RuntimeRepository, clock: Clock) -> None:
    """With its time, and the hash of its canonical JSON; the question stays as it was."""
    asked = await ask(repo, "i")
    answered = await repo.interrupts.resume("i", {"b": [None], "a": 1}, now=clock.now)
    assert (answered.status, answered.resume_payload) == (InterruptStatus.RESUMED, {"a": 1, "b": [None]})
    assert answered.resume_payload_hash == hashlib.sha256(b'{"a":1,"b":[null]}').hexdigest()
    assert (answered.resumed_at, answered.created_at, answered.value) == (clock.now, asked.created_at, "why?")
    assert await repo.interrupts.get("i") == answered


async def test_the_same_answer_again_is_the_first_answer(repo: RuntimeRepository, clock: Clock) -> None:
    """Equal as JSON, whatever the order of keys: what was stored first is returned, its time included."""
    await ask(repo, "i")
    first = await repo.interrupts.resume("i", {"a": 1, "b": 2}, now=clock.now)
    assert await repo.interrupts.resume("i", {"b": 2, "a": 1}, now=clock.advance(MINUTE)) == first
    assert await repo.interrupts.get("i") == first


@pytest.mark.parametrize("other", [None, False, 1.0, "1", {}, [1]])
async def test_another_answer_is_refused(repo: RuntimeRepository, other: object) -> None:
    """The first one stays, and the error says what differs."""
    await ask(repo, "i")
    first = await repo.interrupts.resume("i", 1)
    with pytest.raises(PayloadMismatchError, match="interrupt 'i'") as caught:
        await repo.interrupts.resume("i", other)
    assert caught.value.differing == ("resume_payload",)
    assert await repo.interrupts.get("i") == first


async def test_none_is_an_answer(repo: RuntimeRepository) -> None:
    """It differs from no answer by its status and its hash, and from every other answer."""
    asked = await ask(repo, "i")
    answered = await repo.interrupts.resume("i", None)
    assert (asked.resume_payload, answered.resume_payload) == (None, None)
    assert (asked.status, answered.status) == (InterruptStatus.PENDING, InterruptStatus.RESUMED)
    assert answered.resume_payload_hash == hashlib.sha256(b"null").hexdigest()
    assert await repo.interrupts.resume("i", None) == answered
    others: list[object] = [False, "", {}]
    for other in others:
        with pytest.raises(PayloadMismatchError):
            await repo.interrupts.resume("i", other)


async def test_a_withdrawn_question_takes_no_answer(repo: RuntimeRepository) -> None:
    """To cancel twice is to cancel once; who answers learns that it is cancelled."""
    await ask(repo, "i")
    cancelled = await repo.interrupts.cancel("i")
    assert (cancelled.status, cancelled.resumed_at) == (InterruptStatus.CANCELLED, None)
    assert await repo.interrupts.cancel("i") == cancelled
    with pytest.raises(InvalidTransitionError) as caught:
        await repo.interrupts.resume("i", None)
    assert (caught.value.status, caught.value.verb) == ("cancelled", "resume")
    assert await repo.interrupts.get("i") == cancelled


async def test_an_answered_question_cannot_be_withdrawn(repo: RuntimeRepository) -> None:
    """The answer may be in use already."""
    await ask(repo, "i")
    answered = await repo.interrupts.resume("i", "because")
    with pytest.raises(InvalidTransitionError) as caught:
        await repo.interrupts.cancel("i")
    assert (caught.value.status, caught.value.verb) == ("resumed", "cancel")
    assert await repo.interrupts.get("i") == answered


async def test_an_unknown_interrupt_is_not_found(repo: RuntimeRepository) -> None:
    """Every verb on one says so, but ``find``, which returns None."""
    assert await repo.interrupts.find("nobody") is None
    calls = (repo.interrupts.get("nobody"), repo.interrupts.resume("nobody", 1), repo.interrupts.cancel("nobody"))
    for call in calls:
        with pytest.raises(NotFoundError, match="interrupt 'nobody'"):
            await call


async def test_interrupts_are_listed_by_thread_and_status(repo: RuntimeRepository) -> None:
    """Each filter, and both together; every interrupt is on exactly one page."""
    for number in range(8):
        await ask(repo, f"i{number}", thread_id=f"t{number % 2}")
    for number in (0, 1, 2):
        await repo.interrupts.resume(f"i{number}", number)
    await repo.interrupts.cancel("i3")

    async def ids(**filters: Any) -> list[str]:
        seen: list[str] = []
        while page := await repo.interrupts.list(**filters, after=seen[-1] if seen else "", limit=2):
            assert len(page) <= 2
            assert seen[-1:] != [page[-1].interrupt_id]
            seen += [interrupt.interrupt_id for interrupt in page]
        return seen

    assert await ids() == [f"i{number}" for number in range(8)]
    assert await ids(thread_id="t1") == ["i1", "i3", "i5", "i7"]
    assert await ids(status=InterruptStatus.PENDING) == ["i4", "i5", "i6", "i7"]
    assert await ids(status=InterruptStatus.RESUMED) == ["i0", "i1", "i2"]
    assert await ids(status=InterruptStatus.CANCELLED) == ["i3"]
    assert await ids(thread_id="t0", status=InterruptStatus.RESUMED) == ["i0", "i2"]
    assert await ids(thread_id="nobody") == []


async def test_of_rival_answers_one_wins(factory: Factory) -> None:
    """At the same moment, round after round: one answer is stored, whoever gave it holds it, all others are told."""
    async with factory() as one, factory() as two:
        for number in range(20):
            name = f"i{number}"
            await ask(one, name)
            answers = await asyncio.gather(
                *(
                    repo.interrupts.resume(name, f"{who} {n}")
                    for n in range(3)
                    for who, repo in (("1", one), ("2", two))
                ),
                return_exceptions=True,
            )
            (winner,) = [answer for answer in answers if isinstance(answer, Interrupt)]
            assert [type(answer) for answer in answers].count(PayloadMismatchError) == 5
            assert await two.interrupts.get(name) == winner


async def test_the_same_answer_from_everybody_is_everybodys(factory: Factory) -> None:
    """A click that was sent twice, to two processes: nobody is refused, and all see the same."""
    async with factory() as one, factory() as two:
        await ask(one, "i")
        answers = await asyncio.gather(*(repo.interrupts.resume("i", "yes") for repo in (one, two) * 5))
        assert set(map(repr, answers)) == {repr(await one.interrupts.get("i"))}


@pytest.mark.parametrize("commits", [True, False])
async def test_a_rival_waits_for_the_end_of_a_transaction(factory: Factory, commits: bool) -> None:  # noqa: FBT001
    """It is refused when the first answer is committed, and wins when that is rolled back."""
    async with factory() as one, factory() as two:
        await ask(one, "i")
        rivals: list[asyncio.Task[Interrupt]] = []
        with contextlib.suppress(ZeroDivisionError):
            async with one.transaction() as transaction:
                await transaction.interrupts.resume("i", "first")
                rivals.append(asyncio.create_task(two.interrupts.resume("i", "second")))
                for _ in range(20):
                    await transaction.interrupts.get("i")
                assert not rivals[0].done()
                if not commits:
                    raise ZeroDivisionError
        (rival,) = rivals
        if commits:
            with pytest.raises(PayloadMismatchError):
                await rival
        else:
            assert (await rival).resume_payload == "second"
        assert (await one.interrupts.get("i")).resume_payload == ("first" if commits else "second")


async def test_an_answer_and_the_next_attempt_are_stored_together(factory: Factory) -> None:
    """A worker asks and completes; whoever answers enqueues what comes next; each of them all or nothing."""
    async with factory() as worker, factory() as person:
        await worker.attempts.enqueue("run", attempt_id="a1")
        (lease,) = await worker.leases.claim("worker")
        async with worker.transaction() as asking:
            await asking.interrupts.create("thread", "run", "a1", "go on?", interrupt_id="i")
            assert await person.interrupts.find("i") is None
            await asking.attempts.complete(lease)
        assert (await person.attempts.get("a1")).status is AttemptStatus.COMPLETED

        async def answer(payload: str) -> None:
            async with person.transaction() as answering:
                interrupt = await answering.interrupts.resume("i", payload)
                await answering.attempts.enqueue("run", attempt_id=f"after {payload}", payload=interrupt.resume_payload)
                if payload == "broken":
                    raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await answer("broken")
        assert (await worker.interrupts.get("i")).status is InterruptStatus.PENDING
        for _ in range(2):
            await answer("yes")
        with pytest.raises(PayloadMismatchError):
            await answer("no")
        assert [a.attempt_id for a in await worker.attempts.list()] == ["a1", "after yes"]
        (lease,) = await worker.leases.claim("worker")
        assert lease.attempt.payload == "yes"


async def test_a_worker_that_lost_its_lease_asks_nothing(repo: RuntimeRepository) -> None:
    """The question and the completion are one: neither is stored without the other."""
    await repo.attempts.enqueue("run", attempt_id="a")
    (lease,) = await repo.leases.claim("worker")
    await repo.leases.release(lease)
    with pytest.raises(LeaseLostError):  # noqa: PT012 - the whole block fails
        async with repo.transaction() as transaction:
            await transaction.interrupts.create("thread", "run", "a", "why?", interrupt_id="i")
            await transaction.attempts.complete(lease)
    assert await repo.interrupts.list() == []


async def test_an_interrupt_does_not_change_the_attempt(repo: RuntimeRepository) -> None:
    """Not when it is asked, answered or withdrawn; and it needs none that is stored."""
    before = await repo.attempts.enqueue("run", attempt_id="a")
    await ask(repo, "i")
    await repo.interrupts.resume("i", "yes")
    await repo.interrupts.create("thread", "run", "nowhere", "why?", interrupt_id="j")
    await repo.interrupts.cancel("j")
    assert await repo.attempts.list() == [before]


async def test_a_question_of_an_earlier_program_can_be_answered(repo: RuntimeRepository) -> None:
    """Also recognized when it is asked again, though its JSON is spelt in another way."""
    text = BY_ANOTHER_PROGRAM.replace("<status>", "pending").replace("<value>", '{"y": "ü", "x": [null]}')
    await execute(repo, text)
    stored = await repo.interrupts.create("thread", "run", "a", {"x": [None], "y": "ü"}, interrupt_id="i")
    assert (stored.status, stored.value) == (InterruptStatus.PENDING, {"x": [None], "y": "ü"})
    assert (await repo.interrupts.resume("i", "yes")).resume_payload == "yes"


async def test_an_answer_of_an_earlier_program_is_not_known(repo: RuntimeRepository) -> None:
    """It kept none, so no payload is proved to be the same: it can be read, not answered again or withdrawn."""
    await execute(repo, BY_ANOTHER_PROGRAM.replace("<status>", "resumed").replace("<value>", "null"))
    (stored,) = await repo.interrupts.list(status=InterruptStatus.RESUMED)
    assert (stored.resume_payload, stored.resume_payload_hash, stored.resumed_at) == (None, None, None)
    for call in (repo.interrupts.resume("i", None), repo.interrupts.resume("i", "yes"), repo.interrupts.cancel("i")):
        with pytest.raises(InvalidTransitionError) as caught:
            await call
        assert caught.value.status == "resumed"
    assert await repo.interrupts.get("i") == stored


@pytest.mark.parametrize(
    ("status", "value", "words"),
    [("snoozed", "null", "unknown status 'snoozed'; known are pending"), ("pending", "{why", "no JSON")],
)
async def test_a_row_that_cannot_be_read_is_named(repo: RuntimeRepository, status: str, value: str, words: str) -> None:
    """An unknown status, or what is no JSON: every verb that reads it says which row, and changes nothing."""
    await execute(repo, BY_ANOTHER_PROGRAM.replace("<status>", status).replace("<value>", value))
    for call in (repo.interrupts.get("i"), ask(repo, "i")):
        with pytest.raises(UnreadableRowError, match=f"row i of runtime_interrupts .*{words}"):
            await call
    (error,) = (await repo.interrupts.list()).unreadable
    assert (error.table, error.key) == ("runtime_interrupts", "i")
    if status == "snoozed":
        for call in (repo.interrupts.resume("i", 1), repo.interrupts.cancel("i")):
            with pytest.raises(UnreadableRowError, match=words):
                await call
