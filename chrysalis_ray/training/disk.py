"""A folder on a fast disk for the parameters of one worker, which nobody else writes to and which goes when it is over.

DeepSpeed writes below a path by data type and rank alone: two bodies of one node, two runs, a run and a measurement would write
over each other's weights, and it clears what it finds there. So every worker gets a folder of its own, held by a lock that ends
with its process, however that ends. Whoever comes next removes the folders whose lock nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
import weakref
from pathlib import Path

from chrysalis_ray.core.errors import ModelError

PREFIX, LOCK = "chrysalis-", ".lock"


class DiskFolder:
    """`path` is this worker's until `close`, or until this object or its process is gone.

    Raises ModelError where `disk` is no folder, may not be written to, or has less room than `needed` bytes.
    """

    def __init__(self, disk: Path, needed: int) -> None:
        if not disk.is_dir():
            raise ModelError(
                f"there is no folder {disk} on node {os.uname().nodename}",
                "make it on the fast disk of every node, or set body.nvme_path to one that is there",
            )
        try:
            _sweep(disk)
            self._lock, self.path = _claim(disk)
            self.path.mkdir()
        except OSError as error:
            raise ModelError(f"{disk} cannot be written to: {error}", "set body.nvme_path to a folder that can") from error
        self.close = weakref.finalize(self, _remove, self._lock, self.path)
        free = shutil.disk_usage(disk).free
        if free < needed:
            self.close()
            raise ModelError(
                f"a worker's part of the base takes {needed} bytes and {disk} has {free} left",
                "make room there, or set body.nvme_path to a larger disk",
            )


def _claim(disk: Path) -> tuple[int, Path]:
    """A new name and its lock, held. Another worker may sweep it away before it is held: then a new one is taken."""
    while True:
        path = disk / f"{PREFIX}{uuid.uuid4().hex[:12]}"
        lock = os.open(path.with_suffix(LOCK), os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        if _holds(lock) and os.fstat(lock).st_nlink:
            return lock, path
        os.close(lock)


def _holds(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(disk: Path) -> None:
    """Remove what workers left that are gone."""
    for name in disk.glob(f"{PREFIX}*{LOCK}"):
        try:
            lock = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # another one sweeps, or it belongs to somebody else
        if _holds(lock):
            _remove(lock, name.with_suffix(""))
        else:
            os.close(lock)


def _remove(lock: int, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.with_suffix(LOCK).unlink(missing_ok=True)
    os.close(lock)
