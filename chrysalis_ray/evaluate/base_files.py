"""The files of a base model's folder, opened with suspicion and without loading a model.

A folder is what transformers writes: ``config.json``, and ``model.safetensors`` or an index with its shards. Names in an index
come from outside: each must be a plain file of the folder. A link may lead to the blobs of the hub's own cache, nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.seed.tensors import MAX_HEADER_BYTES, safetensors_header, unique_keys

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FOLDED = "fold.json"  # beside a model that an adapter was folded into
# What transformers reads beside the weights, or a person has to pass on with them.
BESIDE = (
    "generation_config.json", "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model",
    "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
MAX_JSON_BYTES = 64_000_000
AGAIN = "copy the model folder again"
A_BASE = "give the base's folder as --base: config.json and safetensors"


@dataclass(frozen=True)
class Kept:
    """A tensor as it lies in a file, in bytes from the file's beginning; `kind` is what safetensors calls its type."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class WeightsFile:
    """One safetensors file: what stands before the data as it stands there, and the tensors in order of their bytes."""

    path: Path
    head: bytes
    tensors: tuple[Kept, ...]


@dataclass(frozen=True)
class BaseFiles:
    """A base's folder. `beside` are the small files that belong to it, config and index aside."""

    folder: Path
    config: Mapping[str, Any]
    index: Mapping[str, Any] | None
    weights: tuple[WeightsFile, ...]
    beside: tuple[Path, ...]

    def tensors(self) -> dict[str, tuple[WeightsFile, Kept]]:
        """Every tensor by its name, and the file it lies in."""
        return {kept.name: (file, kept) for file in self.weights for kept in file.tensors}


def open_base(folder: Path) -> BaseFiles:
    """The files of a base. Raises MergeError for a folder that is not whole, needs code of its own, or keeps packed weights."""
    if not folder.is_dir():
        raise MergeError(f"there is no folder {folder}", A_BASE)
    folder = folder.resolve()
    config = _json(file_of(folder, CONFIG))
    if "auto_map" in config:
        raise MergeError(
            f"the base at {folder} brings Python code of its own ({config['auto_map']})",
            "choose a model that transformers itself implements; remote code is never run",
        )
    if config.get("quantization_config"):
        told = config["quantization_config"]
        method = told.get("quant_method") if isinstance(told, dict) else told
        raise MergeError(
            f"the weights of the base at {folder} are quantised ({method}): a sum would have to be rounded to few bits again, "
            "and would not be what was trained",
            "fold into the base that it was quantised from, the one of bf16 or fp32 weights",
        )
    index = _json(file_of(folder, INDEX)) if (folder / INDEX).is_file() else None
    if index is not None and (folder / SINGLE).is_file():
        raise MergeError(f"{folder} holds both {SINGLE} and {INDEX}", "take away the one that is not this model's")
    weights = _indexed(folder, index) if index is not None else (_open_weights(_single(folder)),)
    if not any(file.tensors for file in weights):
        raise MergeError(f"the files of the base at {folder} hold no tensor", AGAIN)
    beside = {path.name for pattern in BESIDE for path in folder.glob(pattern) if path.is_file() or not path.exists()}
    return BaseFiles(folder, config, index, weights, tuple(file_of(folder, name) for name in sorted(beside)))


def file_of(folder: Path, name: str) -> Path:
    """The file `name` of the folder. Raises MergeError for what leads elsewhere, or is absent."""
    path = folder / name
    if not path.is_file():
        raise MergeError(f"{folder} has no {name}", A_BASE if name == CONFIG else AGAIN)
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if path.resolve().parent not in (folder, blobs):
        raise MergeError(f"{path} is a link out of its folder", "give the folder in which the files themselves lie")
    return path


def _shard(folder: Path, name: str) -> Path:
    """The weights file that an index calls `name`. Raises MergeError for what is a path, or is called like anything else."""
    if not SHARD_NAME.fullmatch(name):
        raise MergeError(f"{folder / INDEX} names the file {name[:100]!r}, which is no plain name.safetensors", AGAIN)
    return file_of(folder, name)


def _single(folder: Path) -> Path:
    if not (folder / SINGLE).is_file():
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".safetensors", ".gguf")
        )
        raise MergeError(
            f"{folder} holds neither {SINGLE} nor {INDEX}, only {', '.join(others[:3]) or 'no weights'}",
            "load the model with transformers and write it with save_pretrained",
        )
    return file_of(folder, SINGLE)


def _indexed(folder: Path, index: Mapping[str, Any]) -> tuple[WeightsFile, ...]:
    """The shards of an index, each of which must hold what the index says of it, and nothing else."""
    said = index.get("weight_map")
    if not isinstance(said, dict) or not said:
        raise MergeError(f"{folder / INDEX} has no weight_map", AGAIN)
    files = tuple(_open_weights(_shard(folder, name)) for name in sorted(set(map(str, said.values()))))
    held = [(kept.name, file.path.name) for file in files for kept in file.tensors]
    wrong = sorted(set(said.items()) ^ set(held))
    if wrong or len(held) != len(said):
        name, file = wrong[0] if wrong else held[0]
        raise MergeError(f"{folder / INDEX} and its files do not belong together: {name} in {file}", AGAIN)
    return files


def _open_weights(path: Path) -> WeightsFile:
    """A safetensors file by its header, once the library has checked shapes, offsets and lengths."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"the header says it is {length} bytes long")
            stream.seek(0)
            head = stream.read(8 + length)
        header = safetensors_header(head)
        with safe_open(path, framework="pt"):
            pass
    except (ValueError, SafetensorError, OSError) as error:
        raise MergeError(f"{path} is no whole safetensors file: {error}", AGAIN) from error
    kept = [
        Kept(name, tuple(entry["shape"]), entry["dtype"], *(len(head) + offset for offset in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    return WeightsFile(path, head, tuple(sorted(kept, key=lambda tensor: (tensor.start, tensor.end))))


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise MergeError(f"{path} is {path.stat().st_size} bytes long", AGAIN)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise MergeError(f"{path} is no JSON: {error}", AGAIN) from error
    if not isinstance(value, dict):
        raise MergeError(f"{path} holds no JSON object", AGAIN)
    return value
