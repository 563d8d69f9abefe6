"""
Who the tests are to the operating system: the account that stands in for root, a way to be it for a while, and the
folder that it can reach. What the tests do with it does not live here.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# A Unix socket's path ends at 103 bytes on macOS and 107 on Linux; macOS' own temporary folder alone takes 49.
_LONGEST_BASE = 60


def stand_in() -> pwd.struct_passwd | None:
    """Return the account `nobody` when the tests run as root, and None when they are unprivileged already."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """
    Be `nobody` inside the block, so that file permissions count although the tests run as root.

    Without root nothing changes, for they count anyway. The change holds for all threads of the process, and
    Python itself may live where only root can read: import beforehand what the block needs.
    """
    account = stand_in()
    if account is None:
        yield
        return
    groups, group, user = os.getgroups(), os.getegid(), os.geteuid()
    # The user goes last and comes back first: only root may change the groups.
    try:
        os.setgroups([])
        os.setegid(account.pw_gid)
        os.seteuid(account.pw_uid)
        yield
    finally:
        os.seteuid(user)
        os.setegid(group)
        os.setgroups(groups)


def reachable_folder() -> Path:
    """Return the temporary folder, or /tmp where that is closed to the stand-in or too long to hold a socket."""
    base = Path(tempfile.gettempdir()).resolve()
    closed = stand_in() is not None and any(not folder.stat().st_mode & 0o001 for folder in (base, *base.parents))
    return Path("/tmp") if closed or len(os.fsencode(base)) > _LONGEST_BASE else base  # noqa: S108 - mkdtemp's parent
