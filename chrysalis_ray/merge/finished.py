"""Modules that a merge has finished, kept on disk: killed in the middle, it goes on with the others.

`modules.bin` holds factors, A then B in fp32, one module after the other; `modules.jsonl` a line for each module, written after
its factors: where they lie, their sha256, and what the merge tells of the module. Nothing is synced, which no killed process
needs: should a power cut keep a line and lose its bytes, their sha256 no longer fits, and the module is merged again. The first
line names the request; a folder of another one is emptied. One process at a time, by a lock on `modules.jsonl`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.records import canonical_json
from chrysalis_ray.merge.core_space import Cut

BYTES, LINES = "modules.bin", "modules.jsonl"


class MergedModule(NamedTuple):
    """One module merged, what its method counted there, and the Gram matrix [N, N] of the members' changes."""

    cut: Cut
    counted: Mapping[str, float]
    gram_NN: Tensor


@contextmanager
def finished_modules(folder: Path, request_sha256: str) -> Iterator[FinishedModules]:
    """What was finished of this request in `folder`, made if it is not there. At the end the folder goes.

    It stays for the next time if the process is killed or interrupted, or the disk is full. Raises MergeError if another
    process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LINES).open("a+b") as lines, (folder / BYTES).open("a+b") as content:
        try:
            fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MergeError(
                f"another process is making this merge in {folder}", "wait for it, or give another --out"
            ) from error
        try:
            yield FinishedModules(lines, content, request_sha256)
        except MergeError:
            shutil.rmtree(folder)  # it would be refused again
            raise
    shutil.rmtree(folder)


class FinishedModules:
    """module -> MergedModule, on disk, its factors mapped into memory. Threads may use it side by side."""

    def __init__(self, lines: Any, content: Any, request_sha256: str) -> None:
        self._lines, self._content, self._lock = lines, content, threading.Lock()
        self._found = self._trusted(request_sha256)
        if not self._found:
            for stream in (lines, content):
                stream.truncate(0)
            lines.write(_first_line(request_sha256) + b"\n")
            lines.flush()

    def find(self, module: str) -> MergedModule | None:
        """The module as it was finished before, or None."""
        return self._found.get(module)

    def add(self, module: str, merged: MergedModule) -> MergedModule:
        """Keep a module; what comes back has its factors on disk, not in memory."""
        cut = merged.cut
        a_ri, b_or = (side.contiguous() for side in cut.factors)
        parts = [side.view(-1).view(torch.uint8).numpy().data for side in (a_ri, b_or)]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        told = {
            "module": module, "bytes": sum(map(len, parts)), "sha256": digest.hexdigest(),
            "rank": len(a_ri), "in": a_ri.shape[1], "out": len(b_or),
            "energy": cut.energy, "lost": cut.lost, "available_rank": cut.available_rank,
            "counted": dict(merged.counted), "gram": merged.gram_NN.tolist(),
        }  # fmt: skip
        with self._lock:
            told["start"] = -(-self._content.seek(0, os.SEEK_END) // mmap.PAGESIZE) * mmap.PAGESIZE
            self._content.truncate(told["start"])  # up to the next page: that is where a file can be mapped
            self._content.writelines(parts)
            self._content.flush()
            self._lines.write(json.dumps(told).encode() + b"\n")
            self._lines.flush()
        return self._mapped(told)

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
                found[told["module"]] = self._mapped(told)
        self._lines.truncate(whole)
        return found

    def _mapped(self, told: dict[str, Any]) -> MergedModule:
        size, rank = told["bytes"], told["rank"]
        view = mmap.mmap(self._content.fileno(), size, access=mmap.ACCESS_COPY, offset=told["start"])
        values = torch.frombuffer(view, dtype=torch.float32)
        a_ri, b_or = values[: rank * told["in"]].view(rank, -1), values[rank * told["in"] :].view(-1, rank)
        cut = Cut((a_ri, b_or), told["energy"], told["lost"], told["available_rank"])
        return MergedModule(cut, told["counted"], torch.tensor(told["gram"], dtype=torch.float64))


def _first_line(request_sha256: str) -> bytes:
    return canonical_json({"request_sha256": request_sha256})
