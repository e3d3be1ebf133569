"""What this process takes and took of memory, as the system and the GPU tell. Bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PROC = Path("/proc")
STATUS = PROC / "self/status"
PRIVATE = ("Private_Clean", "Private_Dirty", "Private_Hugetlb")


def peak_memory(device: torch.device) -> int:
    """The most that was held so far: allocated by torch on a GPU; else resident in main memory, shared libraries with it.

    On a CPU forks of this process are counted with it, by what they share with nobody. 0 where the system does not tell.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return (_told("VmHWM") or _most_resident()) + sum(own_peak(process) for process in descendants())


def own_peak(process: int) -> int:
    """The most that another process held alone: its peak less the pages it shares now. 0 for one that is gone."""
    folder = PROC / str(process)
    shares = _told("Rss", folder / "smaps_rollup") - sum(_told(key, folder / "smaps_rollup") for key in PRIVATE)
    return max(_told("VmHWM", folder / "status") - shares, 0)


def descendants() -> list[int]:
    """The processes that this one has started and those that they have, as long as they live."""
    children: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = children.get(os.getpid(), [])
    for process in found:  # which grows
        found += children.get(process, [])
    return found


def resident_memory(device: torch.device) -> int:
    """What is held now, counted as `peak_memory` counts."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    return _told("VmRSS")


def process_memory(device: torch.device) -> int:
    """What this process takes before it holds anything: resident in main memory; on a GPU the driver's context.

    Other processes on that GPU are counted in: neither can use what they hold.
    """
    if device.type == "cuda":
        import torch

        free, whole = torch.cuda.mem_get_info(device)
        return whole - free - torch.cuda.memory_reserved(device)
    return _told("VmRSS")


@contextmanager
def limited_memory(room: int | None) -> Iterator[None]:
    """Meanwhile this process maps at most `room` bytes beyond what it has mapped; None limits nothing.

    Where memory runs out, an allocation then fails here, instead of the system ending some process of its choice.
    """
    mapped = _told("VmSize")
    if room is None or not mapped:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = mapped + room
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _told(key: str, file: Path = STATUS) -> int:
    """A field of /proc/self/status, or a file like it, in bytes; 0 where there is none."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _most_resident() -> int:
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
