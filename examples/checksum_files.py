"""
Compute the SHA-256 of every file below a folder, with several processes that share the work through one database.

The workers boot at the same moment on a database that need not exist yet: one of them migrates it, the others wait.
Each file is one attempt. The library's worker claims a few, keeps their leases while they are computed, and completes
them. When it is killed half-way, the others take over once its leases have run out. The output is what
``sha256sum -c`` reads.
"""

import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import os
import secrets
import signal
import socket
import stat
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from runtime_repo import Attempt, Lease, RuntimeRepoError, RuntimeRepository, Worker, repository_from_url

AT_ONCE, PAGE = 4, 500
CLEAR = "\r\x1b[K" if sys.stderr.isatty() else ""  # removes the progress bar
PAUSE = 0.1  # seconds before an idle process looks again


def main() -> int:
    """Start the workers, give them the files, and write what they found."""
    args = parse_arguments()
    paths, failures = find_files(args)
    if not paths and not failures:
        return complain(f"there is no regular file below {args.folder}", code=2)
    run_id = f"checksums-{secrets.token_hex(8)}"
    try:
        with running_workers(args, queue=run_id) as workers:
            done = asyncio.run(have_computed(args, run_id, paths, workers))
        lines = b"".join(checksum_line(attempt) for attempt in done if not attempt.error)
        if args.output:
            (partial := Path(f"{args.output}.{run_id}")).write_bytes(lines)
            partial.replace(args.output)  # whole, or not at all
        else:
            sys.stdout.buffer.write(lines)
            sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        return complain("interrupted: nothing was written", code=130)
    except (RuntimeRepoError, OSError) as error:
        return complain(str(error))
    failures += [f"{path_of(attempt)!r}: {attempt.error}" for attempt in done if attempt.error]
    return max((complain(failure) for failure in failures), default=0)


def worker_process(parent: Connection, args: Namespace, queue: str) -> None:
    """A worker: it boots a repository of its own, then claims and computes until the parent hangs up."""
    try:
        asyncio.run(boot_and_work(parent, args, queue, f"{socket.gethostname()}:{os.getpid()}"))
    except RuntimeRepoError as error:
        sys.exit(complain(f"worker {os.getpid()}: {error}"))
    except (EOFError, ConnectionError):
        sys.exit(1)  # the parent is gone


async def boot_and_work(parent: Connection, args: Namespace, queue: str, worker_id: str) -> None:
    """Boot at the parent's signal, tell it how that went, and work."""
    say(parent, worker_id)
    hear(parent)
    started = time.monotonic()
    try:
        repo = await repository_from_url(args.url, **args.options)
    except RuntimeRepoError as error:
        say(parent, "", str(error))
        return
    async with repo:
        say(parent, boot_of(repo, started))
        worker = Worker(
            repo,
            handler=partial(compute, repo),
            worker_id=worker_id,
            queues=queue,
            concurrency=AT_ONCE,
            ttl=args.ttl,
            retry=None,  # a file that cannot be read is not tried again
            grace=timedelta(0),
            sweep_every=args.ttl / 5,
            signals=(),
        )
        loop = asyncio.get_running_loop()
        loop.add_reader(parent.fileno(), worker.stop)
        try:
            await worker.run()
        finally:
            loop.remove_reader(parent.fileno())


async def compute(repo: RuntimeRepository, lease: Lease) -> object:
    """What a worker does with an attempt, while its lease is kept: the result is the checksum."""
    try:
        return await asyncio.to_thread(checksum, Path(path_of(lease.attempt)))
    except OSError as error:
        return await repo.attempts.fail(lease, error.strerror or str(error))


def say(pipe: Connection, words: str, error: str = "") -> None:
    """Send text: what is pickled for a pipe that breaks makes Python 3.13 complain (CPython's issue 111331)."""
    pipe.send_bytes(json.dumps([words, error]).encode())


def hear(pipe: Connection) -> str:
    words, error = json.loads(pipe.recv_bytes())
    if error:
        raise ChildProcessError(error)
    return str(words)


def boot_of(repo: RuntimeRepository, started: float) -> str:
    """Who brought the schema to its version, how long the boot took, and how long of that it waited for another."""
    report = repo.boot_report
    schema = "current" if report.from_version == report.to_version else "another applied"
    if report.applied:
        schema = "applied " + ", ".join(str(migration.version) for migration in report.applied)
    return f"{schema:<16} {time.monotonic() - started:>6.3f} s {report.waited:>6.3f} s"


def checksum(path: Path) -> dict[str, str | int]:
    """Read a file, which has to stay as it is until the end."""
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    after = path.stat()
    if any(getattr(before, name) != getattr(after, name) for name in ("st_dev", "st_ino", "st_size", "st_mtime_ns")):
        raise OSError("the file changed while it was read")
    return {"sha256": digest, "size": before.st_size}


@dataclass
class Process:
    process: BaseProcess
    pipe: Connection
    worker_id: str = ""
    boot: str = ""


@contextlib.contextmanager
def running_workers(args: Namespace, queue: str) -> Iterator[Sequence[Process]]:
    """Start the processes, have all of them boot at one moment, and see them off at the end."""
    context = multiprocessing.get_context("spawn")
    workers: list[Process] = []
    try:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit it: Ctrl-C is the parent's
        for _ in range(args.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=worker_process, args=(theirs, args, queue))
            process.start()
            theirs.close()  # only the worker holds it now, so the pipe ends with the worker
            workers.append(Process(process, ours))
        signal.signal(signal.SIGINT, interrupt)
        for worker in workers:
            worker.worker_id = hear(worker.pipe)
        for worker in workers:
            say(worker.pipe, "boot")
        for worker in workers:
            worker.boot = hear(worker.pipe)
        yield workers
    except EOFError:
        raise ChildProcessError("a worker died before it had booted") from None
    finally:
        for worker in workers:
            worker.pipe.close()
        patience = time.monotonic() + 1
        for worker in workers:
            worker.process.join(max(0, patience - time.monotonic()))
            worker.process.kill()


async def have_computed(args: Namespace, run_id: str, paths: list[str], workers: Sequence[Process]) -> list[Attempt]:
    """Enqueue every path, wait until all attempts are final, and return them in the order of the paths."""
    started = time.monotonic()
    ids = [f"{run_id}-{number:09}" for number in range(len(paths) + 1)]  # the order of ids is the order of paths
    enqueued = size = 0
    unfinished, done = list[str](), dict[str, Attempt]()
    async with repository_from_url(args.url, **args.options) as repo:
        boot = boot_of(repo, started)
        while len(done) < len(paths):
            if not any(worker.process.is_alive() for worker in workers):
                raise ChildProcessError(f"all {len(workers)} workers died: nothing was written")
            page = paths[enqueued : enqueued + PAGE]
            unfinished += [ids[enqueued]] if page else []
            for path in page:
                enqueued += 1
                payload = {"path": quote_from_bytes(os.fsencode(path))}  # a name is any bytes, JSON is text
                await repo.attempts.enqueue(run_id, attempt_id=ids[enqueued], queue=run_id, payload=payload)
            await collect(repo, run_id, unfinished, done)
            size = sum(attempt.result["size"] for attempt in done.values() if attempt.result)
            show_progress(len(done), len(paths), size, time.monotonic() - started)
            await asyncio.sleep(0 if page else PAUSE)
    print_table(boot, workers, list(done.values()), size, time.monotonic() - started)
    return [attempt for _, attempt in sorted(done.items())]


async def collect(repo: RuntimeRepository, run_id: str, unfinished: list[str], done: dict[str, Attempt]) -> None:
    """Read the run page by page; a page whose attempts are all final is not read again."""
    for after in list(unfinished):
        page = await repo.attempts.list(run_id=run_id, after=after, limit=PAGE)
        final = {attempt.attempt_id: attempt for attempt in page if attempt.status.is_final}
        done |= final
        if len(final) == len(page):
            unfinished.remove(after)
        elif not final:
            break  # claims go by age, so nothing is final further on


def path_of(attempt: Attempt) -> str:
    return os.fsdecode(unquote_to_bytes(attempt.payload["path"]))


def parse_arguments() -> Namespace:
    """Read the command line, and refuse in one line what cannot be meant."""
    parser = ArgumentParser(usage=SUPPRESS, description="Compute the SHA-256 of every file below FOLDER.")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--database", default="checksum_files.db", help="path or postgresql:// URL; %(default)s")
    parser.add_argument("--schema", default="runtime", help="runtime schema on PostgreSQL; %(default)s")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="processes; %(default)s")
    parser.add_argument(
        "--lease", type=float, default=5, metavar="SECONDS", help="until a dead one is replaced; %(default)s"
    )
    parser.add_argument("--output", metavar="FILE", help="where the checksums go; standard output")
    args = parser.parse_args()
    folder, output = Path(args.folder), Path(args.output or "-")
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}: expected 1 or more")
    if not 0.1 <= args.lease <= 3600:
        parser.error(f"--lease is {args.lease}: expected 0.1 to 3600 seconds")
    args.ttl = timedelta(seconds=args.lease)
    if not folder.is_dir():
        parser.error(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    if not output.parent.is_dir() or (output.exists() and not output.is_file()):
        parser.error(f"--output is {output}: expected a file, in a folder that exists")
    args.url = args.database if "://" in args.database else f"sqlite:///{args.database}"
    args.options = {} if args.url.startswith("sqlite:") else {"schema": args.schema}
    try:
        repository_from_url(args.url, **args.options)  # not awaited, so nothing is opened
    except ValueError as error:
        parser.error(str(error))
    return args


def find_files(args: Namespace) -> tuple[list[str], list[str]]:
    """The regular files below the folder, sorted, without this run's own; and what could not be looked at."""
    database = args.database.removeprefix("sqlite:///")
    candidates = [Path(name) for name in (database, f"{database}-wal", f"{database}-shm", args.output or os.devnull)]
    own = [path.stat() for path in candidates if path.exists()]
    paths, failures = list[str](), list[str]()
    for place, _, names in os.walk(args.folder, onerror=lambda error: failures.append(str(error))):
        for path in (f"{place.rstrip('/')}/{name}" for name in names):
            try:
                status = Path(path).lstat()
                if stat.S_ISREG(status.st_mode) and not any(os.path.samestat(status, one) for one in own):
                    paths.append(path)
            except OSError as error:
                failures.append(str(error))
    return sorted(paths, key=os.fsencode), failures


def checksum_line(attempt: Attempt) -> bytes:
    """A line of ``sha256sum``; a backslash at its beginning says that the name is escaped."""
    name = os.fsencode(path_of(attempt))
    escaped = name.replace(b"\\", rb"\\").replace(b"\n", rb"\n").replace(b"\r", rb"\r")
    return b"%s%s  %s\n" % (b"\\" if escaped != name else b"", attempt.result["sha256"].encode(), escaped)


def show_progress(done: int, total: int, size: int, seconds: float) -> None:
    """Draw one line in place, if standard error is a terminal."""
    if sys.stderr.isatty():
        line = f"[{'#' * (30 * done // total):.<30}] {done}/{total} files  {size / 1e6 / seconds:.1f} MB/s"
        print(CLEAR + line[: (os.get_terminal_size(2).columns or 80) - 1], end="", file=sys.stderr, flush=True)


def print_table(boot: str, workers: Sequence[Process], done: Sequence[Attempt], size: int, seconds: float) -> None:
    """Tell who migrated, how long each boot took and waited, and who computed how much."""
    files = Counter(attempt.worker_id for attempt in done)
    table = [f"{CLEAR}{'process':<28} {'schema':<16} {'boot':>8} {'waited':>8} {'files':>8}"]
    for worker in workers:
        end = "" if worker.process.exitcode is None else f"  died: {worker.process.exitcode}"
        table.append(f"{worker.worker_id:<28} {worker.boot} {files[worker.worker_id]:>8}{end}")
    table.append(f"{'parent':<28} {boot}")
    table.append(f"{'total':<62} {len(done):>9}  {size / 1e6:.1f} MB in {seconds:.1f} s")
    print(*table, sep="\n", file=sys.stderr)


def complain(message: str, *, code: int = 1) -> int:
    print(f"{CLEAR}checksum_files.py: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
