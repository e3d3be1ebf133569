"""Safetensors bytes, read with suspicion.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header, raw data. The library
checks offsets and lengths; what it lets pass and we do not: a tensor named twice, a number that is not finite, a type that
is not a float.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from mmap import mmap
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for json: the object, or ValueError for a key that stands there twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        twins = sorted({key for key, _ in pairs if sum(other == key for other, _ in pairs) > 1})
        raise ValueError(f"key {twins[0]!r} stands there twice")
    return value


def safetensors_header(content: bytes | mmap) -> dict[str, Any]:
    """What the header says of every tensor. Raises ValueError, in words for a person, for what is none."""
    if len(content) < 8:
        raise ValueError(f"{len(content)} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", content[:8])
    if length > min(MAX_HEADER_BYTES, len(content) - 8):
        raise ValueError(f"the header says it is {length} bytes long, {len(content) - 8} bytes follow")
    try:
        header = json.loads(content[8 : 8 + length].decode("utf-8"), object_pairs_hook=unique_keys)
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError("the header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header


def parse_tensors(content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors and the metadata of safetensors bytes. Raises ValueError, in words for a person, on anything wrong."""
    metadata = safetensors_header(content).get("__metadata__") or {}
    try:
        tensors = load(content)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"not a whole safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"tensor {name!r} has type {tensor.dtype}, not a float")
        refuse_infinite(name, tensor)
    return tensors, metadata


def tensor_bytes(tensors: Mapping[str, torch.Tensor], key: str, value: str) -> bytes:
    """Safetensors bytes with exactly one metadata entry: with two their order, and so the bytes, would vary.

    Raises ValueError for a value that is not finite.
    """
    for name, tensor in tensors.items():
        refuse_infinite(name, tensor)
    own = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in sorted(tensors.items())}
    return save(own, metadata={key: value})


def write_floats(
    stream: BinaryIO, shapes: Mapping[str, tuple[int, ...]], tensor_of: Callable[[str], torch.Tensor], key: str, value: str
) -> None:
    """The bytes of `tensor_bytes` for fp32 tensors, written one at a time as `tensor_of` gives them.

    Raises ValueError for a value that is not finite.
    """
    stream.write(head_of_floats(shapes, key, value)[0])
    for name in sorted(shapes):
        tensor = tensor_of(name).detach().to("cpu", torch.float32).contiguous()
        refuse_infinite(name, tensor)
        assert tuple(tensor.shape) == shapes[name], f"{name} changed its shape to {tuple(tensor.shape)}"
        stream.write(tensor.view(-1).view(torch.uint8).numpy().data)


def head_of_floats(shapes: Mapping[str, tuple[int, ...]], key: str, value: str) -> tuple[bytes, dict[str, int]]:
    """What stands before the data of fp32 tensors, and where each of them begins, in bytes from the beginning of the file."""
    header: dict[str, Any] = {"__metadata__": {key: value}}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(shapes):
        starts[name], end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [starts[name], end]}
    head = header_bytes(header)
    return head, {name: len(head) + start for name, start in starts.items()}


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """What stands before the data of tensors that `header` tells of: its length, and itself, to a multiple of 8 bytes."""
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head


def bytes_between(descriptor: int, start: int, end: int) -> NDArray[np.uint8]:
    """What lies from `start` to `end` in an open file. Raises EOFError if it became shorter."""
    content = np.empty(end - start, dtype=np.uint8)
    rest = content.data
    while rest:
        count = os.preadv(descriptor, [rest], end - len(rest))
        if count == 0:
            raise EOFError(f"the file ends {len(rest)} bytes too early")
        rest = rest[count:]
    return content


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is. One that is not makes the sum so, and a sum is ten times as quick as looking at each."""
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


def refuse_infinite(name: str, tensor: torch.Tensor) -> None:
    if not is_finite(tensor):
        raise ValueError(f"tensor {name!r} holds {int((~torch.isfinite(tensor)).sum())} values that are not finite")


def is_finite_number(value: Any) -> bool:
    """True for an int or float (not bool) that is neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
