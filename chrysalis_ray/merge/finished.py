"""Modules that a merge has finished, kept on disk: killed in the middle, it goes on with the others.

`modules.bin` holds factors, A then B in fp32; `modules.jsonl` a line for each module, written after its factors: where they
lie, their sha256, and what the merge tells of the module. With a `Layout`, that of the file of the merged adapter, every module
is written to its place there, and in the end `modules.bin` is that file; else modules follow each other. A killed
process needs no sync, and what is synced on the way is for speed alone: should a power cut keep a line and lose its bytes,
their sha256 no longer fits, and the module is merged again. The first line names the request; the folder of another is emptied.
One process at a time, by a lock on `modules.jsonl`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chrysalis_ray.core.errors import ChrysalisError, MergeError
from chrysalis_ray.core.records import canonical_json
from chrysalis_ray.merge.core_space import Cut, is_finite

BYTES, LINES = "modules.bin", "modules.jsonl"
SYNCED_BYTES = 1 << 23  # of the merged file, between one sync and the next


class MergedModule(NamedTuple):
    """One module merged, what its method counted there, and the Gram matrix [N, N] of the members' changes."""

    cut: Cut
    counted: Mapping[str, float]
    gram_NN: Tensor


@dataclass(frozen=True)
class Layout:
    """A file that begins with `head`, has `size` bytes, and holds A and B of every module from its start on."""

    head: bytes
    starts: Mapping[str, int]
    size: int


@contextmanager
def finished_modules(folder: Path, request_sha256: str, layout: Layout | None = None) -> Iterator[FinishedModules]:
    """What was finished of this request in `folder`, made if it is not there. At the end the folder goes.

    It stays for the next time if the process is killed or interrupted, or the disk is full. Raises MergeError if another
    process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LINES).open("a+b") as lines:
        try:
            fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = not (folder / LINES).exists() or not os.path.samestat(os.fstat(lines.fileno()), (folder / LINES).stat())
        except (BlockingIOError, FileNotFoundError):
            gone = True  # or taken by another process, which may end at any moment
        if gone:
            raise MergeError(f"another process is making this merge in {folder}", "wait for it, or give another --out")
        with _own_file(folder / BYTES) as content:
            try:
                yield FinishedModules(lines, content, request_sha256, layout)
            except ChrysalisError:
                shutil.rmtree(folder, ignore_errors=True)  # it would be refused again
                raise
        shutil.rmtree(folder, ignore_errors=True)  # who finds the merge finished takes this away as well


def _own_file(path: Path) -> FileIO:
    """The file at `path`, made if it is not there. One that is an adapter's by another name already is left to that adapter."""
    if path.exists() and path.stat().st_nlink > 1:
        path.unlink()
    path.touch()
    return path.open("r+b", buffering=0)


class FinishedModules:
    """module -> MergedModule, on disk, its factors mapped into memory. Threads may use it side by side."""

    def __init__(self, lines: Any, content: FileIO, request_sha256: str, layout: Layout | None = None) -> None:
        self._lines, self._content, self._layout, self._lock = lines, content, layout, threading.Lock()
        self._whole: mmap.mmap | None = None  # the file of a layout, once it is as long as it will be
        self._found = self._trusted(request_sha256)
        if not self._found:
            for stream in (lines, content):
                stream.truncate(0)
            lines.write(_first_line(request_sha256) + b"\n")
            lines.flush()
        if layout is not None:
            _write_at(content, 0, layout.head)
            content.truncate(layout.size)
            self._whole = mmap.mmap(content.fileno(), layout.size, access=mmap.ACCESS_COPY)
        self._end = os.fstat(content.fileno()).st_size
        self._digest = hashlib.sha256(layout.head if layout else b"")
        self._hashed = self._synced = len(layout.head) if layout else 0

    def whole(self, modules: Collection[str]) -> tuple[Path, str | None] | None:
        """The file, if it is that of an adapter of these modules, all of which were added or found, and its sha256, if all
        were hashed along. Nothing is synced."""
        if self._layout is None or set(modules) != set(self._layout.starts):
            return None
        return Path(self._content.name), self._digest.hexdigest() if self._hashed == self._layout.size else None

    def hash_along(self, module: str, merged: MergedModule) -> None:
        """Take a module that was added or found into the hash of the file, if it is the next one there."""
        if self._layout is not None and self._layout.starts[module] == self._hashed:
            size = sum(side.nbytes for side in merged.cut.factors)
            self._digest.update(os.pread(self._content.fileno(), size, self._hashed))  # read, not mapped: it need not stay
            self._hashed += size
            if (
                self._hashed - self._synced >= SYNCED_BYTES
            ):  # the disk is busy while others merge, and little is left to the end
                os.fsync(self._content.fileno())
                self._synced = self._hashed

    def find(self, module: str) -> MergedModule | None:
        """The module as it was finished before, or None."""
        return self._found.get(module)

    def add(self, module: str, merged: MergedModule) -> MergedModule:
        """Keep a module; what comes back has its factors on disk, not in memory. Raises MergeError unless they are finite."""
        cut = merged.cut
        a_ri, b_or = (side.contiguous() for side in cut.factors)
        if not (is_finite(a_ri) and is_finite(b_or)):
            raise MergeError(f"module {module} comes out beyond what fp32 holds", "leave out the variant that diverged")
        parts = [side.view(-1).view(torch.uint8).numpy().data for side in (a_ri, b_or)]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        told: dict[str, Any] = {
            "module": module, "bytes": sum(map(len, parts)), "sha256": digest.hexdigest(),
            "rank": len(a_ri), "in": a_ri.shape[1], "out": len(b_or),
            "energy": cut.energy, "lost": cut.lost, "available_rank": cut.available_rank,
            "counted": dict(merged.counted), "gram": merged.gram_NN.tolist(),
        }  # fmt: skip
        told["start"] = self._place(module, told["bytes"])
        for start, part in zip((told["start"], told["start"] + len(parts[0])), parts, strict=True):
            _write_at(self._content, start, part)
        if self._layout is not None and hasattr(os, "posix_fadvise"):  # the disk may begin with what will be synced
            os.posix_fadvise(self._content.fileno(), told["start"], told["bytes"], os.POSIX_FADV_DONTNEED)
        with self._lock:
            self._lines.write(json.dumps(told).encode() + b"\n")
            self._lines.flush()
        return MergedModule(self._mapped(told), merged.counted, merged.gram_NN)

    def _place(self, module: str, size: int) -> int:
        if self._layout is not None:
            return self._layout.starts[module]
        with self._lock:
            start = -(-self._end // mmap.PAGESIZE) * mmap.PAGESIZE
            self._end = start + size
        return start

    def _trusted(self, request_sha256: str) -> dict[str, MergedModule]:
        """What the lines tell of this request, as far as they are whole and their bytes are what they were."""
        self._lines.seek(0)
        first, *others = self._lines.read().split(b"\n")
        found: dict[str, MergedModule] = {}
        if first != _first_line(request_sha256):
            return found
        whole = len(first) + 1
        for line in others[:-1]:  # what stands after the last end of a line is empty, or torn by a kill
            try:
                told = json.loads(line)
            except ValueError:
                break
            whole += len(line) + 1
            content = os.pread(self._content.fileno(), told["bytes"], told["start"])
            if hashlib.sha256(content).hexdigest() == told["sha256"]:
                gram_NN = torch.tensor(told["gram"], dtype=torch.float64)
                found[told["module"]] = MergedModule(self._mapped(told), told["counted"], gram_NN)
        self._lines.truncate(whole)
        return found

    def _mapped(self, told: dict[str, Any]) -> Cut:
        size, rank = told["bytes"], told["rank"]
        if self._whole is not None:
            view, before = self._whole, told["start"]
        else:
            before = told["start"] % mmap.ALLOCATIONGRANULARITY  # a file is mapped from a page on
            view = mmap.mmap(self._content.fileno(), before + size, access=mmap.ACCESS_COPY, offset=told["start"] - before)
        values = torch.frombuffer(view, dtype=torch.float32, offset=before, count=size // 4)
        a_ri, b_or = values[: rank * told["in"]].view(rank, -1), values[rank * told["in"] :].view(-1, rank)
        return Cut((a_ri, b_or), told["energy"], told["lost"], told["available_rank"])


def _write_at(content: FileIO, start: int, part: bytes | memoryview) -> None:
    while part:
        count = os.pwrite(content.fileno(), part, start)
        start, part = start + count, part[count:]


def _first_line(request_sha256: str) -> bytes:
    return canonical_json({"request_sha256": request_sha256})
