"""
Fencing: a worker is paused for longer than its lease, another takes over, and the first one wakes up too late.

    python examples/two_workers_one_attempt.py

Both are processes. The first is really stopped (SIGSTOP), as a long garbage collection, a suspended laptop or a
frozen virtual machine would stop it: it cannot know that it has lost the attempt. Its result is refused all the same.
"""

import asyncio
import secrets
import signal
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from asyncio.subprocess import PIPE, Process
from datetime import timedelta

from runtime_repo import Lease, LeaseLostError, RuntimeRepoError, RuntimeRepository, repository_from_url

TTL = timedelta(seconds=1)


async def slow_worker(repo: RuntimeRepository, queue: str) -> None:
    """Claim, be paused by whoever reads our lines, and complete when a line comes back."""
    (lease,) = await repo.leases.claim("slow", queues=queue, ttl=TTL)
    say("slow", f"claimed the attempt, token {lease.version}")
    await asyncio.to_thread(sys.stdin.readline)
    await complete(repo, lease, "slow")


async def quick_worker(repo: RuntimeRepository, queue: str) -> None:
    """Take over as soon as the lease has run out."""
    leases = await repo.leases.claim("quick", queues=queue, ttl=TTL)
    while not leases:
        await repo.attempts.wait(queue, timeout=TTL / 10)
        for attempt in await repo.leases.requeue_expired():
            say("quick", f"{attempt.error}: ready again, as try {attempt.attempt_no}")
        leases = await repo.leases.claim("quick", queues=queue, ttl=TTL)
    say("quick", f"claimed the attempt, token {leases[0].version}")
    await complete(repo, leases[0], "quick")


async def complete(repo: RuntimeRepository, lease: Lease, name: str) -> None:
    try:
        await repo.attempts.complete(lease, f"by the {name} worker")
        say(name, "completed it")
    except LeaseLostError as lost:
        say(name, f"is refused. {lost}")


def say(who: str, words: str) -> None:
    print(f"{who:<5} | {words}", flush=True)


async def start(role: str, queue: str, args: Namespace) -> Process:
    """This program again, as one of the workers."""
    schema = ["--schema", args.schema] if args.schema else []
    given = ["--database", args.database, *schema, "--role", role, "--queue", queue]
    return await asyncio.create_subprocess_exec(sys.executable, __file__, *given, stdin=PIPE, stdout=PIPE)


async def tell(worker: Process, said: bytes | None = None) -> None:
    """Pass on the next line that a worker prints, or all of them until its end, after saying something to it."""
    if said is not None:
        lines, _ = await worker.communicate(said)
    elif worker.stdout:
        lines = await worker.stdout.readline()
    print(lines.decode(), end="", flush=True)


async def direct(repo: RuntimeRepository, args: Namespace) -> None:
    """Let the two meet."""
    queue = f"fencing-{secrets.token_hex(4)}"
    attempt = await repo.attempts.enqueue("fencing", queue=queue)
    slow = await start("slow", queue, args)
    try:
        await tell(slow)
        slow.send_signal(signal.SIGSTOP)
        say("", "the slow worker is paused, for longer than its lease")
        await tell(await start("quick", queue, args), b"")
        slow.send_signal(signal.SIGCONT)
        say("", "the slow worker wakes up, and wants to complete")
        await tell(slow, b"\n")
    finally:
        if slow.returncode is None:
            slow.kill()
    say("", f"the result: {(await repo.attempts.get(attempt.attempt_id)).result}")


async def main(args: Namespace) -> None:
    options = {"schema": args.schema} if args.schema else {}
    async with repository_from_url(args.database, **options) as repo:
        if args.role == "slow":
            await slow_worker(repo, args.queue)
        elif args.role == "quick":
            await quick_worker(repo, args.queue)
        else:
            await direct(repo, args)


def parse_arguments() -> Namespace:
    parser = ArgumentParser(description="Show that a worker that lost its lease cannot finish.")
    parser.add_argument("--database", default="sqlite:///two_workers.db", help="sqlite:///PATH or postgresql://...")
    parser.add_argument("--schema", help="the runtime schema, on PostgreSQL")
    parser.add_argument("--role", choices=["slow", "quick"], help=SUPPRESS)
    parser.add_argument("--queue", help=SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        asyncio.run(main(parse_arguments()))
    except RuntimeRepoError as error:
        sys.exit(f"two_workers_one_attempt.py: {error}")
