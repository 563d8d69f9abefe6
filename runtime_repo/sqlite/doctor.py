"""What a doctor asks of a SQLite file, and of the file system that it is on."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from runtime_repo.database import Reader, Row
from runtime_repo.doctor import Examined, Finding, clock
from runtime_repo.repairs import Repair
from runtime_repo.sqlite.repairs import Facts, repairs

__all__ = ["examine", "file_system"]

_REMOTE = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "gluster", "lustre", "fuse.s", "vboxsf", "virtiofs")
"""How file systems begin whose files are shared with other machines, which cannot share a WAL's memory."""

_LONG_WAL = 100 * 1024 * 1024
"""Bytes; a checkpoint is due every 4 MB."""

_MOUNTS = Path("/proc/self/mountinfo")


async def examine(reader: Reader, path: Path | None, examined: Examined) -> tuple[Sequence[Finding], Sequence[Repair]]:
    """What there is to say of the file at *path*, None for one in memory, and what mends the drift."""
    before = time.time() * 1000
    [row] = await reader.fetch("doctor.file")
    after = time.time() * 1000
    found = [*_kept(row, path), clock(before, row["now_ms"], after)]
    if path is not None:
        found += [_rights(path), *_file(row, path)]
    if not examined.drift:
        return found, ()
    rows = await reader.fetch("doctor.holding")
    facts = Facts(
        {each["name"]: each["definition"] for each in rows if each["definition"]},
        {each["name"]: each["on_table"] for each in rows},
    )
    return found, tuple(repairs(examined.expected, examined.live, examined.drift, facts))


def _kept(row: Row, path: Path | None) -> Iterator[Finding]:
    mode, full = row["journal_mode"], row["synchronous"]
    told = f"journal_mode {mode}, synchronous {full} by default"
    if path is None:
        yield Finding("durability", "note", "it is in memory, and ends with the process")
    elif mode in ("off", "memory"):
        yield Finding("durability", "ill", told, "a crash may destroy the file: pragma journal_mode = wal")
    elif mode != "wal":
        advice = "readers and the writer wait for each other: boot it, which switches to WAL where that can be"
        yield Finding("durability", "note", told, advice)
    else:
        yield Finding("durability", "well", told)
    if path is not None and (kind := file_system(path)) is not None:
        is_remote = kind.startswith(_REMOTE)
        told = f"the file system is {kind}"
        advice = "WAL needs memory that all processes share, which machines do not: keep the file on a local disk"
        yield Finding("file system", "ill" if is_remote else "well", told, advice if is_remote else None)


def file_system(path: Path) -> str | None:
    """What kind of file system a file is on; None where the system does not tell."""
    best: tuple[int, str | None] = (-1, None)
    with contextlib.suppress(OSError, ValueError, IndexError):
        place = path.resolve()
        for line in _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
            fields, _, rest = line.partition(" - ")
            mounted = Path(fields.split(" ")[4].replace(r"\040", " "))
            # Of two at one place the later one is seen.
            if place.is_relative_to(mounted) and len(mounted.parts) >= best[0]:
                best = (len(mounted.parts), rest.split(" ")[0])
    return best[1]


def _rights(path: Path) -> Finding:
    # As whom the process acts, where that can be asked.
    effective = os.access in os.supports_effective_ids
    lacking = [str(it) for it in (path, path.parent) if not os.access(it, os.W_OK, effective_ids=effective)]
    if not lacking:
        return Finding("rights", "well", "this process may write the file and its folder")
    told = f"this process may not write {' and '.join(lacking)}"
    return Finding("rights", "ill", told, "WAL needs both, for readers too: grant the user what it lacks")


def _file(row: Row, path: Path) -> Iterator[Finding]:
    wal = 0
    with contextlib.suppress(OSError):
        # Its size is looked up: to open it and close it again would drop this process's locks.
        wal = Path(f"{path}-wal").stat().st_size
    if wal > _LONG_WAL:
        told = f"the WAL has {wal / 1e6:,.0f} MB"
        advice = "somebody reads without an end, so that no checkpoint empties it: end that transaction, then "
        yield Finding("long transactions", "ill", told, advice + "pragma wal_checkpoint(truncate)")
    else:
        yield Finding("long transactions", "well", f"the WAL has {wal / 1e6:,.1f} MB")
    size = row["pages"] * row["page_size"]
    free = row["free_pages"] * row["page_size"]
    if free > max(size / 2, _LONG_WAL):
        told = f"{free / 1e6:,.0f} of the file's {size / 1e6:,.0f} MB are free"
        yield Finding("free pages", "note", told, "they are used again; to give them back: vacuum, while nobody works")
    else:
        yield Finding("free pages", "well", f"{free / 1e6:,.1f} of the file's {size / 1e6:,.1f} MB are free")
    with contextlib.suppress(OSError):
        left = shutil.disk_usage(path.parent).free
        told = f"{left / 1e6:,.0f} MB are left on the disk"
        is_tight = left < 2 * size
        advice = "a backup before an upgrade takes as much as the file, and so may a restore: make room"
        yield Finding("disk", "note" if is_tight else "well", told, advice if is_tight else None)
