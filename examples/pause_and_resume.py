"""
Pause for a person: a purchase is paid only when somebody has approved it, today or next week.

    python examples/pause_and_resume.py "a boat" 12000

The worker asks and is done with it: no process waits while the question is open. Interrupt the program at the question
(Ctrl-C) and start it again, with the same purchase: the question is still there, and it is answered once.
"""

import asyncio
import sys
from argparse import ArgumentParser, Namespace

from runtime_repo import (
    Interrupt,
    InterruptStatus,
    Lease,
    NotFoundError,
    RuntimeRepoError,
    RuntimeRepository,
    Worker,
    repository_from_url,
)

QUEUE = "purchases"


class Purchases:
    """The two steps of a purchase, and the question between them."""

    def __init__(self, repo: RuntimeRepository) -> None:
        self.repo = repo

    async def handle(self, lease: Lease) -> str:
        """Do the step that the attempt is for. Each may be run again, so each has its effects once."""
        thread = lease.attempt.run_id
        if lease.attempt.payload["step"] == "ask":
            return await self.ask(lease, thread)
        answer = (await self.repo.interrupts.get(f"approve {thread}")).resume_payload
        status = "paid" if answer["approved"] else f"declined by {answer['by']}"
        await self.repo.jobs.upsert(thread, status)
        return status

    async def ask(self, lease: Lease, thread: str) -> str:
        """Leave the question behind, and complete: both or neither."""
        async with self.repo.transaction() as transaction:
            await transaction.interrupts.create(
                thread,
                lease.attempt.run_id,
                lease.attempt_id,
                {"question": f"Pay {lease.attempt.payload['price']} for {thread}?"},
                interrupt_id=f"approve {thread}",
            )
            await transaction.jobs.upsert(thread, "waiting for approval")
            await transaction.attempts.complete(lease, "asked")
        return "asked"

    async def answer(self, interrupt: Interrupt, *, approved: bool, by: str) -> None:
        """Keep the answer, and enqueue what comes next: both or neither."""
        async with self.repo.transaction() as transaction:
            await transaction.interrupts.resume(interrupt.interrupt_id, {"approved": approved, "by": by})
            await transaction.attempts.enqueue(
                interrupt.run_id, attempt_id=f"act on {interrupt.interrupt_id}", queue=QUEUE, payload={"step": "act"}
            )


async def buy(repo: RuntimeRepository, what: str, price: int) -> str:
    """Order it, answer what is asked, and return how it ended."""
    purchases = Purchases(repo)
    # The name is the identity: to order the same again is to ask how it is doing.
    await repo.attempts.enqueue(what, attempt_id=f"ask {what}", queue=QUEUE, payload={"step": "ask", "price": price})
    worker = Worker(repo, purchases.handle, queues=QUEUE, signals=())
    working = asyncio.create_task(worker.run())
    try:
        while True:
            for interrupt in await repo.interrupts.list(thread_id=what, status=InterruptStatus.PENDING):
                approved = await ask_person(interrupt.value["question"])
                await purchases.answer(interrupt, approved=approved, by="you")
            try:
                status = (await repo.jobs.get(what)).status
            except NotFoundError:
                status = "new"
            if status not in ("new", "waiting for approval"):
                return status
            await asyncio.sleep(0.05)
    finally:
        worker.stop()
        await working


async def ask_person(question: str) -> bool:
    """Wait for a line; not in a thread, which could not be interrupted."""
    print(f"{question} [y/n] ", end="", flush=True)
    answered = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, answered.set)
    try:
        await answered.wait()
    finally:
        asyncio.get_running_loop().remove_reader(sys.stdin)
    return sys.stdin.readline().strip().lower().startswith("y")


async def main(args: Namespace) -> None:
    options = {"schema": args.schema} if args.schema else {}
    async with repository_from_url(args.database, **options) as repo:
        print(f"{args.what}: {await buy(repo, args.what, args.price)}")


def parse_arguments() -> Namespace:
    parser = ArgumentParser(description="Buy something, if a person approves.")
    parser.add_argument("--database", default="sqlite:///purchases.db", help="sqlite:///PATH or postgresql://...")
    parser.add_argument("--schema", help="the runtime schema, on PostgreSQL")
    parser.add_argument("what")
    parser.add_argument("price", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        asyncio.run(main(parse_arguments()))
    except RuntimeRepoError as error:
        sys.exit(f"pause_and_resume.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
