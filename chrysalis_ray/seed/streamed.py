"""A PEFT folder read one module at a time: the same adapter as `read_adapter` gives, without holding it in memory."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.seed.adapter import (
    FACTOR,
    WEIGHTS,
    AdapterWeights,
    by_pattern,
    dropout_of,
    geometry_of,
    is_target,
    named_targets,
    read_config,
    text_of,
    weights_file,
)
from chrysalis_ray.seed.strangers import no_factor
from chrysalis_ray.seed.tensors import FLOATS, bytes_between, is_finite, safetensors_header

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file, in bytes from its beginning."""

    shape: tuple[int, int]
    dtype: torch.dtype
    start: int
    end: int


class StreamedFactors(Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
    """module -> (A_RI, B_OR), fp32, read from the file whenever they are asked for; B carries the module's own `ratio`.

    A module has its own rank here: nothing is padded. Raises MergeError for values that are not finite.
    """

    def __init__(self, path: Path, places: Mapping[str, tuple[Place, Place]], ratios: Mapping[str, float]) -> None:
        self._path, self._places, self._ratios = path, places, ratios
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __getitem__(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        a_place, b_place = self._places[module]
        if (a_place.end, a_place.dtype) == (b_place.start, b_place.dtype):  # as in most files: both in one turn
            size = math.prod(a_place.shape)
            both_R = self._values(module, a_place.start, b_place.end, a_place.dtype)
            a_R, b_R = both_R[:size], both_R[size:]
        else:
            a_R, b_R = (self._values(module, place.start, place.end, place.dtype) for place in (a_place, b_place))
        a_ri, b_or = torch.from_numpy(a_R.reshape(a_place.shape)), torch.from_numpy(b_R.reshape(b_place.shape))
        ratio = self._ratios[module]
        return a_ri, b_or if ratio == 1.0 else b_or * ratio

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _values(self, module: str, start: int, end: int, dtype: torch.dtype) -> NDArray[np.float32]:
        """What lies from `start` to `end`, in fp32. In numpy, which cuts and shapes it without letting go of the interpreter:
        threads that read side by side would wait for each other."""
        try:
            content = bytes_between(self._descriptor, start, end)
        except EOFError as error:
            raise MergeError(
                f"{self._path} became shorter while it was read", "leave the adapter alone while it is merged"
            ) from error
        values = content.view(np.float32) if dtype == torch.float32 else _floats(content, dtype)
        if not is_finite(torch.from_numpy(values)):
            raise MergeError(
                f"{self._path}: module {module} holds values that are not finite, or beyond fp32", "leave that adapter out"
            )
        return values

    def shape(self, module: str) -> tuple[int, int, int]:
        """(out, rank, in) of a module, from the file's header."""
        a_place, b_place = self._places[module]
        return b_place.shape[0], a_place.shape[0], a_place.shape[1]


def _floats(content: NDArray[np.uint8], dtype: torch.dtype) -> NDArray[np.float32]:
    """The numbers of another type, in fp32."""
    return torch.from_numpy(content).view(dtype).to(torch.float32).numpy()


def open_adapter(folder: Path) -> AdapterWeights:
    """Read a PEFT LoRA folder of any peft version, module by module, as its `factors` are asked for.

    `rank` is the largest of any module, `scale` that of the config; per-module ranks and alphas are folded into the factors.
    Raises MergeError for what is not a plain LoRA, or not whole.
    """
    config = read_config(folder)
    rank, alpha, use_rslora = geometry_of(folder, config)
    path = weights_file(folder)
    places = _pair_places(folder, _places(path))
    scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    ratios: dict[str, float] = {}
    for module, (a_place, b_place) in places.items():
        own_rank = by_pattern(folder, config, "rank_pattern", module, rank)
        own_alpha = by_pattern(folder, config, "alpha_pattern", module, alpha)
        if a_place.shape[0] != own_rank or b_place.shape[1] != own_rank:
            raise MergeError(
                f"{folder}: module {module}: A is {a_place.shape}, B is {b_place.shape}, by the config the rank is {own_rank}",
                "the weights and the config of this adapter do not belong together",
            )
        ratios[module] = own_alpha / (math.sqrt(own_rank) if use_rslora else own_rank) / scale
    largest = max(a_place.shape[0] for a_place, _ in places.values())
    targets = named_targets(config)
    if not all(is_target(module, targets) for module in places):
        targets = list(places)
    return AdapterWeights(
        base_model=text_of(folder, config, "base_model_name_or_path") or "",
        revision=text_of(folder, config, "revision"),
        rank=largest,
        alpha=scale * (math.sqrt(largest) if use_rslora else largest),
        use_rslora=use_rslora,
        targets=tuple(sorted(targets)),
        factors=StreamedFactors(path, places, ratios),
        fan_in_fan_out=config.get("fan_in_fan_out") is True,
        dropout=dropout_of(folder, config),
    )


def _places(path: Path) -> Mapping[str, Place]:
    """Every tensor's place, once the file is known to be whole: safetensors checks shapes, offsets and lengths."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            head = content[: 8 + int.from_bytes(content[:8], "little")]
        _header(head)
        with safe_open(path, framework="pt"):
            pass
        found = _described(head)
    except KeyError as error:
        known = ", ".join(str(dtype) for dtype in FLOATS)
        raise MergeError(f"{path}: a tensor has the type {error}, not one of {known}", "export the adapter again") from error
    except (ValueError, SafetensorError, TypeError, RuntimeError) as error:
        reason = str(error) if type(error) is ValueError else f"not a whole safetensors file ({error})"
        raise MergeError(f"{path}: {reason}", "copy or export the adapter again") from error
    return found


@lru_cache(maxsize=4)
def _header(head: bytes) -> Mapping[str, Any]:
    """`safetensors_header`, read once: adapters of one base mostly begin with the same bytes."""
    return safetensors_header(head)


@lru_cache(maxsize=4)
def _described(head: bytes) -> Mapping[str, Place]:
    """Every tensor's place, by what stands before the data."""
    data = len(head)
    return {
        name: Place(tuple(entry["shape"]), TYPES[entry["dtype"]], *(data + offset for offset in entry["data_offsets"]))
        for name, entry in _header(head).items()
        if name != "__metadata__"
    }


def _pair_places(folder: Path, places: Mapping[str, Place]) -> dict[str, tuple[Place, Place]]:
    sides: dict[str, dict[str, Place]] = {}
    for name, place in places.items():
        match = FACTOR.fullmatch(name)
        if match is None:
            raise no_factor(folder, name)
        if len(place.shape) != 2:
            raise MergeError(f"{folder}: tensor {name!r} has shape {place.shape}, not two dimensions")
        if 0 in place.shape:  # as of a model whose parameters were sharded and never gathered
            raise MergeError(f"{folder}: tensor {name!r} has shape {place.shape}: there is nothing in it", "save it again")
        sides.setdefault(match["module"], {})[match["side"]] = place
    for module, found in sides.items():
        missing = {"A", "B"} - set(found)
        if missing:
            raise MergeError(f"{folder}: module {module} has no lora_{missing.pop()}", "copy or export the adapter again")
    if not sides:
        raise MergeError(f"{folder}: {WEIGHTS} holds no tensor", "copy or export the adapter again")
    return {module: (sides[module]["A"], sides[module]["B"]) for module in sorted(sides)}
