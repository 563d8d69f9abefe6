"""
Compress files: a worker that stops gracefully, and the command that gives it work.

    python examples/worker.py enqueue FILE...    # from now on FILE.gz is somebody's job
    python examples/worker.py run                # does it, until Ctrl-C or SIGTERM

Run as many workers as you like, on as many machines as see the database and the files. Stopped, a worker finishes
what it has begun, for ten seconds at most, and gives back the rest; killed, others take over half a minute later.
"""

import asyncio
import gzip
import hashlib
import logging
import os
import shutil
import sys
from argparse import ArgumentParser, Namespace
from datetime import timedelta
from pathlib import Path

from runtime_repo import (
    Lease,
    NewAttempt,
    RetryPolicy,
    RuntimeRepoError,
    RuntimeRepository,
    Worker,
    repository_from_url,
)

QUEUE = "gzip"


async def compress(lease: Lease) -> dict[str, int]:
    """The handler. It may run again for the same attempt, so it writes the whole file or nothing."""
    path = Path(lease.attempt.payload)
    # In a thread, so that the event loop stays free for the heartbeat; under a name that nobody else writes to.
    sizes = await asyncio.to_thread(compress_file, path, path.with_name(f".{path.name}.{lease.lease_id}.partial"))
    print(f"{path}: {sizes['before']} -> {sizes['after']} bytes", flush=True)
    return sizes


def compress_file(path: Path, partial: Path) -> dict[str, int]:
    target = path.with_name(f"{path.name}.gz")
    try:
        with path.open("rb") as plain, gzip.open(partial, "wb") as packed:
            shutil.copyfileobj(plain, packed)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return {"before": path.stat().st_size, "after": target.stat().st_size}


async def enqueue(repo: RuntimeRepository, files: list[Path]) -> None:
    """Each file as it is now is one attempt: to enqueue it twice changes nothing."""
    attempts = []
    for path in files:
        version = f"{path.resolve()}\0{path.stat().st_mtime_ns}"
        attempt_id = f"gzip-{hashlib.sha256(os.fsencode(version)).hexdigest()}"
        attempts.append(NewAttempt("compress", attempt_id=attempt_id, queue=QUEUE, payload=str(path.resolve())))
    await repo.attempts.enqueue_many(attempts)


async def run(repo: RuntimeRepository, concurrency: int) -> None:
    """Work until told to stop."""
    worker = Worker(
        repo,
        compress,
        queues=QUEUE,
        concurrency=concurrency,
        retry=RetryPolicy(max_attempts=3),
        grace=timedelta(seconds=10),
    )
    print(f"{worker.worker_id} waits for work", flush=True)
    await worker.run()
    print(f"{worker.worker_id} has stopped", flush=True)


async def main(args: Namespace) -> None:
    """Boot, and do what was asked for."""
    options = {"schema": args.schema} if args.schema else {}
    async with repository_from_url(args.database, **options) as repo:
        if args.command == "run":
            await run(repo, args.concurrency)
        else:
            await enqueue(repo, args.files)


def parse_arguments() -> Namespace:
    parser = ArgumentParser(description="Compress files, by workers that share the work through one database.")
    parser.add_argument("--database", default="sqlite:///worker.db", help="sqlite:///PATH or postgresql://...")
    parser.add_argument("--schema", help="the runtime schema, on PostgreSQL")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("enqueue").add_argument("files", nargs="+", type=Path)
    commands.add_parser("run").add_argument("--concurrency", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    try:
        asyncio.run(main(parse_arguments()))
    except (RuntimeRepoError, OSError) as error:
        sys.exit(f"worker.py: {error}")
