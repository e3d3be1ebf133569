"""`chrysalis doctor`: is this machine ready, and if not, the line that helps. Imports neither torch nor Ray."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from chrysalis_ray import __version__
from chrysalis_ray.cli.arguments import Json
from chrysalis_ray.cli.outcome import FAILED, print_json

LIBRARIES = ("ray", "deepspeed", "transformers", "peft", "datasets", "wandb")
GIB = 1 << 30
_ROOM_BYTES = 5 * GIB
_SHARED_MEMORY_BYTES = GIB // 2


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `state` is ok, note (works, could be better) or missing (does not work)."""

    name: str
    state: str
    found: str
    remedy: str | None = None


def doctor(json: Json = False) -> int:
    """Check this machine.

    Looks at Python, torch, Ray, GPUs, memory and disk; exit 1 if something is missing.

    \b
    chrysalis doctor
    """
    findings = [*_software(), *_hardware(), *_surroundings()]
    if json:
        print_json({"version": __version__, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            print(f"{finding.state:<8}{finding.name:<15}{finding.found}")
            if finding.remedy:
                print(f"{'':<23}{finding.remedy}")
    return FAILED if any(finding.state == "missing" for finding in findings) else 0


def _software() -> Iterator[Finding]:
    yield Finding("chrysalis_ray", "ok", __version__)
    state = "ok" if sys.version_info >= (3, 11) else "missing"
    yield Finding("python", state, f"{platform.python_version()} on {platform.system()} {platform.machine()}", sys.executable)
    for library in LIBRARIES:
        version = _version(library)
        if version is None:
            yield Finding(library, "missing", "not installed", "pip install -c constraints.txt -e .")
        else:
            yield Finding(library, "ok", version)
    yield _sketching()


def _sketching() -> Finding:
    from chrysalis_ray.genome.native import kernel

    if kernel is not None:
        return Finding("sketching", "ok", "compiled")
    remedy = "with a C compiler and Python's headers: pip install -c constraints.txt -e ."
    return Finding("sketching", "note", "not compiled: works, but a genome takes longer to build", remedy)


def _hardware() -> Iterator[Finding]:
    from chrysalis_ray.training.planning.hardware import Hardware

    machine = Hardware.local()
    yield Finding("processors", "ok", f"{machine.cpus} CPU cores, {machine.memory / GIB:.1f} GiB of memory")
    gpus = f"{machine.gpus} x {machine.gpu_name}, {machine.gpu_memory / GIB:.0f} GiB each" if machine.gpus else "none found"
    yield Finding("GPUs", "ok", gpus)
    yield _torch(machine.gpus)


def _torch(gpus: int) -> Finding:
    version = _version("torch")
    if version is None:
        return Finding("torch", "missing", "not installed", "pip install -c constraints.txt -e .")
    built_for_gpus = _version("nvidia-cublas") or _version("nvidia-cublas-cu12") or "+cu" in version or "+rocm" in version
    found = f"{version}, built for {'GPUs' if built_for_gpus else 'CPUs'}"
    if gpus and not built_for_gpus:
        pinned = version.partition("+")[0]
        return Finding("torch", "note", found, f"to use the GPUs: pip install --force-reinstall --no-deps torch=={pinned}")
    if built_for_gpus and not gpus:
        return Finding("torch", "note", found, "works; the CPU build is a tenth of the size (see the head of the Makefile)")
    return Finding("torch", "ok", found)


def _surroundings() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    remedy = "a run of a large model needs more; `chrysalis run --runs DIR` writes elsewhere" if free < _ROOM_BYTES else None
    yield Finding("disk", "note" if remedy else "ok", f"{free / GIB:.1f} GiB free in {Path.cwd()}", remedy)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        remedy = "Ray will spill to disk; in a container: docker run --shm-size=2g" if size < _SHARED_MEMORY_BYTES else None
        yield Finding("shared memory", "note" if remedy else "ok", f"{size / GIB:.1f} GiB", remedy)
    mode = os.environ.get("RAY_AUTH_MODE")
    yield Finding("Ray tokens", "ok", f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE is not set: on for local clusters")


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
