"""One process at a time in a run directory. Standard library only.

The lock is `flock` on a file inside the directory, so that the kernel gives it back however its holder ends: a Ctrl-C, a
`kill -9` or a power cut leave nothing to clean up. The file stays; it says who held it last.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
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
                raise _no_locks(path, error) from error
            raise RunError(
                f"{path.parent} is in use by {_holder(descriptor)}; nothing in it was touched",
                "wait for it or end it, then run the same command again; or give this run another --name",
            ) from error
        _sign(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def in_turn(path: Path, waiting: Callable[[str], None]) -> Iterator[None]:
    """As `sole_owner`, but who comes second waits; `waiting` is then told who holds the lock."""
    descriptor = _open(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise _no_locks(path, error) from error
            waiting(_holder(descriptor))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _sign(descriptor)
        yield
    finally:
        os.close(descriptor)


def _no_locks(path: Path, error: OSError) -> RunError:
    return RunError(f"the file system of {path.parent} gives no locks: {error}", "mount it with flock, or use another --runs")


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"


def _sign(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunError(
            f"{path.parent} cannot be written: {error.strerror}", "give a folder that you may write to with --runs"
        ) from error
