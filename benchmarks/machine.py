"""The machine under a measurement: what it is, how busy it is, and how much memory a tree of processes takes on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
LIBRARIES = ("ray", "torch", "transformers", "peft", "numpy")
INTERVAL_SECONDS = 0.25
SHARE_OF_A_CORE = 0.05  # the most that looking may cost


def describe() -> dict[str, Any]:
    """Cores, memory, versions. No names: neither of the host nor of any folder."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def processor() -> str:
    """The processor's model name, where the system tells it."""
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def wait_until_idle(load: float, patience_seconds: float) -> float:
    """Wait until the one-minute load is below `load`, or patience ends. Returns the load then."""
    deadline = time.monotonic() + patience_seconds
    while load_now() >= load and time.monotonic() < deadline:
        time.sleep(15)
    return load_now()


def load_now() -> float:
    """The one-minute load average."""
    return round(os.getloadavg()[0], 2)


@dataclass(frozen=True)
class Watched:
    """What a command took: wall seconds, peak memory of its process tree in bytes, processes at that moment, CPU seconds.

    `kinds` tells processes, MiB at the peak and CPU seconds by what a process calls itself.
    """

    seconds: float
    peak_bytes: int
    processes: int
    memory_by: str
    cpu_seconds: float
    foreign_load: float
    kinds: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        return {
            "process_seconds": self.seconds,
            "peak_mib": self.peak_bytes / 2**20,
            "processes_at_peak": self.processes,
            "memory_by": self.memory_by,
            "cpu_seconds": self.cpu_seconds,
            "foreign_load": self.foreign_load,
            "kinds": self.kinds,
        }


def watch(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Watched:
    """Run a command to its end and watch its process tree. Raises CalledProcessError with the tail of its output."""
    began, busy = time.monotonic(), busy_seconds()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=dict(environment), stdout=stream, stderr=subprocess.STDOUT)
        tree = Tree(process.pid)
        tree.start()
        code = process.wait()
        tree.stop()
    seconds = time.monotonic() - began
    if code:
        raise subprocess.CalledProcessError(code, list(command), output=log.read_text(errors="replace")[-4000:])
    own = tree.cpu_seconds()
    foreign = max(0.0, busy_seconds() - busy - own) / seconds
    return Watched(seconds, tree.peak_bytes, tree.peak_processes, tree.memory_by, own, round(foreign, 2), tree.kinds())


class Tree(threading.Thread):
    """Samples a process and all its descendants: the sum of their PSS, shared pages counted once; of RSS where PSS is hidden.

    A process that was seen once stays in the tree when its parent dies. Sampling slows down where one look at all
    processes would cost more than a twentieth of a core.
    """

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.members = {root}
        self.ended = threading.Event()
        self.peak_bytes = 0
        self.peak_processes = 0
        self.memory_by = "pss"
        self.ticks: dict[int, int] = {}
        self.names: dict[int, str] = {}
        self.bytes_at_peak: dict[int, int] = {}

    def run(self) -> None:
        pause = 0.0
        while not self.ended.wait(pause):
            began = time.thread_time()
            self.sample()
            pause = max(INTERVAL_SECONDS, (time.thread_time() - began) / SHARE_OF_A_CORE)

    def stop(self) -> None:
        self.ended.set()
        self.join()

    def cpu_seconds(self) -> float:
        """User and system time of all processes, as far as they were seen; the last moments of each are missing."""
        return sum(self.ticks.values()) / os.sysconf("SC_CLK_TCK")

    def kinds(self) -> dict[str, dict[str, float]]:
        """Processes, MiB at the peak and CPU seconds, by name; the largest first."""
        told: dict[str, dict[str, float]] = {}
        for pid, ticks in self.ticks.items():
            row = told.setdefault(self.names[pid], {"processes": 0, "mib_at_peak": 0.0, "cpu_seconds": 0.0})
            row["processes"] += 1
            row["mib_at_peak"] += self.bytes_at_peak.get(pid, 0) / 2**20
            row["cpu_seconds"] += ticks / os.sysconf("SC_CLK_TCK")
        ordered = sorted(told.items(), key=lambda item: -item[1]["mib_at_peak"])
        return {name: {key: round(value, 1) for key, value in row.items()} for name, row in ordered}

    def sample(self) -> None:
        stats = all_stats()
        grown = True
        while grown:
            fresh = {pid for pid, (parent, _) in stats.items() if parent in self.members} - self.members
            self.members |= fresh
            grown = bool(fresh)
        self.members &= stats.keys()
        for pid in self.members:
            self.ticks[pid] = stats[pid][1]
            self.names[pid] = name_of(pid) or self.names.get(pid, "?")
        each = {pid: self.memory(pid) for pid in self.members}
        total = sum(each.values())
        if total > self.peak_bytes:
            self.peak_bytes, self.peak_processes, self.bytes_at_peak = total, len(each), each

    def memory(self, pid: int) -> int:
        try:
            for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
        except PermissionError:
            self.memory_by = "rss"
            return resident(pid)
        except (FileNotFoundError, ProcessLookupError):  # gone between two looks
            return 0
        return 0


def name_of(pid: int) -> str:
    """What a process calls itself: Ray's workers say ``ray::Class.method``, scripts are named by their file."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    if words[0].startswith("ray::"):
        return words[0].partition(".")[0].split("(")[0].strip()
    if "-c" in words:
        return "python -c"
    scripts = [word for word in words[1:] if word.endswith(".py")]
    return Path(scripts[0] if scripts and "python" in words[0] else words[0]).name


def all_stats() -> dict[int, tuple[int, int]]:
    """pid -> (parent, clock ticks of user and system time) of every process."""
    stats = {}
    for folder in PROC.iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            stats[int(folder.name)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
    return stats


def resident(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def busy_seconds() -> float:
    """Seconds that all cores together were busy since the machine started."""
    fields = [int(field) for field in (PROC / "stat").read_text().splitlines()[0].split()[1:]]
    idle = fields[3] + fields[4]
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")
