"""What this machine has, asked without torch: processors, memory, GPUs, and the packages that a body needs."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from chrysalis_ray.config.blueprint import BodyPatch
from chrysalis_ray.core.errors import ModelError

GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """A machine, or several alike taken together. Memory in bytes; `gpu_memory` is that of one GPU."""

    cpus: int
    memory: int
    gpus: int = 0
    gpu_memory: int = 0
    gpu_name: str = ""
    nodes: int = 1
    processor: str = ""

    @classmethod
    def local(cls) -> Hardware:
        """This machine, within the limits of its container. With NVIDIA GPUs it takes as long as nvidia-smi does."""
        name, count, gpu_memory = _nvidia()
        return cls(cpus=_cpus(), memory=_memory(), gpus=count, gpu_memory=gpu_memory, gpu_name=name, processor=_processor())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        gpus = f", {self.gpus} x {self.gpu_name or 'GPU'} of {self.gpu_memory / GIB:.0f} GiB" if self.gpus else ", no GPU"
        nodes = f"{self.nodes} nodes: " if self.nodes > 1 else ""
        return f"{nodes}{self.cpus} CPU cores, {self.memory / GIB:.1f} GiB{gpus}"


def check_machine(body: BodyPatch) -> None:
    """Raise ModelError where this machine lacks what a body needs and what would show only after the work."""
    check_quantisation(body.quantization)
    if body.compile:
        check_compiler(on_gpu=(body.gpus_per_worker or 0) > 0)
    if body.offload == "nvme":
        from chrysalis_ray.training.engine import check_nvme

        check_nvme()


def check_compiler(*, on_gpu: bool) -> None:
    """Raise ModelError where torch.compile has nothing to compile with: a C++ compiler, on a GPU triton and a C compiler."""
    wanted = ("gcc", "cc", "clang") if on_gpu else ("g++", "c++", "clang++")
    own = os.environ.get("CC" if on_gpu else "CXX")
    if not any(shutil.which(name) for name in (own, *wanted) if name):
        raise ModelError(
            f"body.compile needs a {'C' if on_gpu else 'C++'} compiler, and none of {', '.join(wanted)} is on the PATH",
            "install one (apt install g++) on every node, or leave compile out",
        )
    if on_gpu and find_spec("triton") is None:
        raise ModelError(
            "body.compile needs the package triton on a GPU, and it is not installed",
            "pip install triton, or leave compile out",
        )


def check_quantisation(kind: str | None) -> None:
    """Raise ModelError where what a base quantised as `kind` needs is not installed."""
    if kind == "nf4" and find_spec("bitsandbytes") is None:
        raise ModelError(
            "body.quantization is nf4, which needs the package bitsandbytes, and it is not installed",
            "pip install -c constraints.txt -e '.[nf4]', or write int8 or none",
        )


def _cpus() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _first_line(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
        count = min(count, max(1, int(quota[0]) // int(quota[1])))
    return count


def _processor() -> str:
    """The processor's model name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _first_line(Path("/sys/fs/cgroup/memory.max"))
    return min(total, int(limit)) if limit.isdigit() else total


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _nvidia() -> tuple[str, int, int]:
    """(name, count, bytes of the smallest) of the NVIDIA GPUs; ("", 0, 0) where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "", 0, 0
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "", 0, 0
    rows = [line.rsplit(",", 1) for line in answer.strip().splitlines() if "," in line]
    mebibytes = [int(row[1]) for row in rows if row[1].strip().isdigit()]
    return (rows[0][0].strip(), len(mebibytes), min(mebibytes) << 20) if mebibytes else ("", 0, 0)
