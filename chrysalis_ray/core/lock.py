"""One process at a time in a run directory. Standard library only.

The lock is `flock` on a file inside the directory, so that the kernel gives it back however its holder ends: a Ctrl-C, a
`kill -9` or a power cut leave nothing to clean up. The file stays; it says who held it last.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chrysalis_ray.core.errors import RunError

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def sole_owner(path: Path) -> Iterator[None]:
    """Inside this block no other process, on this machine or on one that shares the file system, holds the lock at `path`.

    Creates the file and its folder. Raises RunError at once if somebody else holds it, or if the place cannot be written.
    """
    descriptor = _open(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise RunError(
                    f"the file system of {path.parent} gives no locks: {error}", "mount it with flock, or use another --runs"
                ) from error
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise RunError(
                f"{path.parent} is in use by {holder}; nothing in it was touched",
                "wait for it or end it, then run the same command again; or give this run another --name",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunError(
            f"{path.parent} cannot be written: {error.strerror}", "give a folder that you may write to with --runs"
        ) from error
