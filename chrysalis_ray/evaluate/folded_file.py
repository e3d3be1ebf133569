"""A weights file of a base written again with an adapter added: the same names, types, metadata and order.

Every number is summed in fp64 and rounded once to the type it has in the base; what the adapter does not touch is copied byte
by byte. A block of rows is in memory at a time, whatever the size of a tensor.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.evaluate.base_files import Kept, WeightsFile
from chrysalis_ray.seed.adapter import AdapterWeights
from chrysalis_ray.seed.streamed import TYPES
from chrysalis_ray.seed.tensors import bytes_between, header_bytes, is_finite, safetensors_header

BLOCK_ENTRIES = 1 << 20  # 8 MiB in fp64
COPIED_BYTES = 1 << 24


@dataclass(frozen=True)
class Added:
    """The delta of one module of an adapter, on a weight stored [out, in], or [in, out] with `transposed`."""

    adapter: AdapterWeights
    module: str
    transposed: bool

    def factors(self) -> tuple[Tensor, Tensor]:
        """fp64 factors whose product has the shape of the stored weight; the adapter's scale is in the first."""
        a_ri, b_or = self.adapter.factors[self.module]
        scaled_or, a_ri = self.adapter.scale * b_or.double(), a_ri.double()
        return (a_ri.T, scaled_or.T) if self.transposed else (scaled_or, a_ri)


@dataclass(frozen=True)
class Part:
    """One tensor of the file to be written: its name, the bytes that it begins as, and what is added to them."""

    name: str
    kept: Kept
    added: Added | None = None


def write_parts(file: WeightsFile, parts: Sequence[Part], path: Path) -> str:
    """Write `parts`, the tensors of `file` in its order and then new ones made of them, to `path`; returns the sha256.

    On disk for good when it returns. Raises MergeError for a sum that its type cannot hold.
    """
    digest = hashlib.sha256()
    with file.path.open("rb", buffering=0) as source, path.open("wb") as stream:
        for piece in _pieces(source, file, parts):
            stream.write(piece)
            digest.update(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def head_with(file: WeightsFile, parts: Sequence[Part]) -> bytes:
    """What stands before the data: as in `file`, unless there are tensors that it does not have."""
    new = parts[len(file.tensors) :]
    if not new:
        return file.head
    header = safetensors_header(file.head)
    end = max(kept.end for kept in file.tensors) - len(file.head)
    for part in new:
        size = part.kept.end - part.kept.start
        header[part.name] = {"dtype": part.kept.kind, "shape": list(part.kept.shape), "data_offsets": [end, end + size]}
        end += size
    return header_bytes(header)


def _pieces(source: BinaryIO, file: WeightsFile, parts: Sequence[Part]) -> Iterator[bytes | memoryview]:
    yield head_with(file, parts)
    for part in parts:
        yield from _copied(source, part.kept) if part.added is None else _summed(source, part, part.added)


def _copied(source: BinaryIO, kept: Kept) -> Iterator[bytes | memoryview]:
    for start in range(kept.start, kept.end, COPIED_BYTES):
        yield _bytes(source, start, min(start + COPIED_BYTES, kept.end))


def _summed(source: BinaryIO, part: Part, added: Added) -> Iterator[bytes | memoryview]:
    """The bytes of weight + delta, a block of rows at a time."""
    kept, dtype = part.kept, TYPES[part.kept.kind]
    rows, columns = kept.shape
    left_Rr, right_rC = added.factors()
    row_bytes = columns * dtype.itemsize
    step = max(1, BLOCK_ENTRIES // columns)
    for row in range(0, rows, step):
        last = min(row + step, rows)
        stored = _bytes(source, kept.start + row * row_bytes, kept.start + last * row_bytes)
        weight_bC = torch.frombuffer(stored, dtype=torch.uint8).view(dtype).view(-1, columns).double()
        sum_bC = rounded(torch.addmm(weight_bC, left_Rr[row:last], right_rC), dtype)
        if not is_finite(sum_bC):
            raise MergeError(
                f"{part.name} holds values that are not finite, or the sum is beyond what {kept.kind} holds",
                "fold into the same base in bf16 or fp32" if kept.kind == "F16" else "leave out the one that diverged",
            )
        yield sum_bC.view(-1).view(torch.uint8).numpy().data


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 numbers in `dtype`, each the nearest one, as if rounded once.

    torch goes by way of fp32 to the 16-bit types, which rounds twice. So a number that fp32 does not hold is first taken to the
    odd one of its two neighbours there, which lies on no boundary of a shorter type (Boldo and Melquiond 2008).
    """
    if dtype in (torch.float64, torch.float32):
        return exact.to(dtype)
    nearest = exact.to(torch.float32)
    beyond = torch.sign(exact - nearest.double()).float() * torch.inf  # nan where fp32 holds the number
    even = (nearest.view(torch.int32) & 1) == 0
    return torch.where(beyond.isnan() | ~even, nearest, torch.nextafter(nearest, beyond)).to(dtype)


def _bytes(source: BinaryIO, start: int, end: int) -> memoryview:
    try:
        return bytes_between(source.fileno(), start, end).data
    except EOFError as error:
        raise MergeError(
            "a file of the base became shorter while it was read", "leave the base alone while it is folded"
        ) from error
