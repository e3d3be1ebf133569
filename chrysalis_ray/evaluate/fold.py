"""An adapter folded into its base: a plain model folder that transformers loads alone, each weight being base + delta.

Nothing is written before everything was looked at: the adapter, every module of it in the base, and the room on the disk. What
is unfinished lies beside the folder that it will be; killed in the middle, the same command goes on with the files that are
missing, and ends with the same bytes. The base is hashed, read and never changed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chrysalis_ray import __version__
from chrysalis_ray.core.errors import ChrysalisError, MergeError
from chrysalis_ray.core.records import is_draft, read_json, sha256_of, sha256_of_file, sync_folder, write_bytes, write_json
from chrysalis_ray.evaluate.base_files import CONFIG, FOLDED, INDEX, BaseFiles, Kept, WeightsFile, open_base
from chrysalis_ray.evaluate.destination import destination, manifest_before, rename_into
from chrysalis_ray.evaluate.folded_file import Added, Part, write_parts
from chrysalis_ray.evaluate.folders import Source, open_sources
from chrysalis_ray.evaluate.known_base import OTHER_BASE, known_base
from chrysalis_ray.evaluate.vocabulary import refuse_other_vocabularies
from chrysalis_ray.seed.adapter import read_config
from chrysalis_ray.seed.streamed import TYPES, StreamedFactors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FINISHED, BUILDING = "finished.json", "model"  # of what is unfinished: the files that are whole, and where they lie
SPARE = 1 << 24  # bytes that a disk keeps free beside the folded model


@dataclass(frozen=True)
class Plan:
    """What will be written: the parts of every weights file, and whether a head that was the embedding gets its own weights."""

    parts: Mapping[str, tuple[WeightsFile, tuple[Part, ...]]]  # by the name of the file
    untied: str | None  # the tensor that the head now has

    def size(self, name: str) -> int:
        """Bytes of a weights file, to within what a longer head takes."""
        file, parts = self.parts[name]
        return len(file.head) + sum(part.kept.end - part.kept.start for part in parts)


def fold_adapter(name: str, base: Path, out: Path) -> dict[str, Any]:
    """Fold the adapter `name`, a PEFT folder or a hub id, into the model of the folder `base`, as the model folder `out`.

    Returns the manifest, with `done_before` if it lay there already. Raises MergeError for an adapter of another base, for a
    base whose weights are packed, and for an `out` that holds anything else; then nothing is written.
    """
    out = destination(out)
    (source,) = open_sources([name])
    files = open_base(base)
    refuse_other_vocabularies([(source.name, source.folder), (str(files.folder), files.folder)])
    plan = plan_of(source, files)
    _read_all(source)
    hashes = {path.name: sha256_of_file(path) for path in _files_of(files)}
    known = known_base(source, files, hashes)
    request = {"adapter": source.sha256, "base": hashes, "version": __version__}
    before = folded_before(out, request)
    request_sha256 = sha256_of(request)
    unfinished = out.with_name(f".{out.name}.{request_sha256[:16]}")
    if before is not None:
        shutil.rmtree(unfinished, ignore_errors=True)  # killed between the last two steps
        return before
    _refuse_too_little_room(out, plan, unfinished)
    with _alone(unfinished):
        if (meanwhile := folded_before(out, request)) is not None:
            return meanwhile
        building = unfinished / BUILDING
        building.mkdir(exist_ok=True)
        for draft in filter(is_draft, building.iterdir()):  # of a file that a kill kept from its name
            draft.unlink()
        written = _write_weights(plan, building, unfinished / FINISHED)
        written |= _write_beside(plan, files, building)
        manifest = {
            "request": request, "request_sha256": request_sha256, "adapter": source.name, "base": str(files.folder),
            "base_model": source.weights.base_model or None, "base_known_by": known,
            "modules": len(source.weights.factors), "untied": plan.untied, "files": dict(sorted(written.items())),
        }  # fmt: skip
        write_json(building / FOLDED, manifest)
        rename_into(building, out)
        sync_folder(out.parent)
    return manifest


def plan_of(source: Source, files: BaseFiles) -> Plan:
    """Every tensor of the base with what is added to it. Raises MergeError for a module that the base does not have so."""
    model = _without_weights(files)
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tensors, added, untied = files.tensors(), dict[str, Added](), None
    new: list[tuple[WeightsFile, Part]] = []
    for module in source.weights.factors:
        delta = _on_module(source, module, model)
        weight = model.get_parameter(f"{module}.weight")
        if shared[id(weight)] == 1:
            stored = _stored_name(f"{module}.weight", tensors, files)
            _refuse_other_shape(source, module, tensors[stored][1], tuple(weight.shape))
            added[stored] = delta
            continue
        embedding = _embedding_of_head(source, model, module)
        untied = f"{module}.weight"
        if untied in tensors or "text_config" in files.config:
            raise MergeError(
                f"{source.name} adapts {module}, which the base ties to {embedding} and stores in a way of its own",
                "leave the adapter beside its base, where both are exact",
            )
        file, kept = tensors[_stored_name(f"{embedding}.weight", tensors, files)]
        _refuse_other_shape(source, module, kept, tuple(weight.shape))
        new.append((file, Part(untied, kept, delta)))
    return Plan({
        file.path.name: (file, (
            *(Part(kept.name, kept, added.get(kept.name)) for kept in file.tensors),
            *(part for own, part in new if own is file),
        ))
        for file in files.weights
    }, untied)  # fmt: skip


def _without_weights(files: BaseFiles) -> PreTrainedModel:
    """The model that transformers makes of the base's config, with tensors that have no storage."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    # what transformers and torch raise for a config whose values are of another kind, or fit no model
    odd = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError,
           ImportError, StrictDataclassError)  # fmt: skip
    try:
        config = AutoConfig.from_pretrained(files.folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):  # nothing is computed: whatever attention the config asks for, it need not be installed
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="eager")
    except odd as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise MergeError(
            f"no model can be made of {files.folder / CONFIG}: {reason}", "give a causal language model of transformers"
        ) from error


def _on_module(source: Source, module: str, model: PreTrainedModel) -> Added:
    """The adapter's delta on a linear module of the model. Raises MergeError if there is none of that name and shape."""
    from chrysalis_ray.seed.linear import linear_shape, stored_transposed

    try:
        layer = model.get_submodule(module)
    except AttributeError as error:
        raise MergeError(f"{source.name} adapts {module}, and the base has no such module", OTHER_BASE) from error
    shape, factors = linear_shape(layer), source.weights.factors
    assert isinstance(factors, StreamedFactors)
    out_size, _, in_size = factors.shape(module)
    if shape != (out_size, in_size):
        told = f"is [{shape[0]}, {shape[1]}] there" if shape else f"is a {type(layer).__name__} there, not a linear module"
        raise MergeError(f"{source.name} adapts {module} of [{out_size}, {in_size}], which {told}", OTHER_BASE)
    transposed = stored_transposed(layer)
    if transposed and not source.weights.fan_in_fan_out:
        raise MergeError(
            f"{source.name} says fan_in_fan_out: false, and the base keeps {module} as [in, out]",
            "write fan_in_fan_out: true into its adapter_config.json, as peft does for such a base",
        )
    return Added(source.weights, module, transposed)


def _stored_name(name: str, tensors: Mapping[str, object], files: BaseFiles) -> str:
    """What a tensor is called in the files: as in the model, or without the first part of its name, which some hub folders of
    bare models leave out for all."""
    first, _, rest = name.partition(".")
    if name in tensors:
        return name
    if rest in tensors and not any(other.startswith(f"{first}.") for other in tensors):
        return rest
    raise MergeError(
        f"the files of the base at {files.folder} hold no {name}; they hold {min(tensors)} and {len(tensors) - 1} more",
        "load the base with transformers and write it with save_pretrained, which gives tensors the names of its modules",
    )


def _refuse_other_shape(source: Source, module: str, kept: Kept, shape: tuple[int, ...]) -> None:
    if kept.kind not in TYPES:
        raise MergeError(
            f"the base keeps {kept.name} as {kept.kind}: packed numbers, to which nothing can be added",
            "fold into the base that it was packed from, the one of bf16 or fp32 weights",
        )
    if kept.shape != shape:
        raise MergeError(
            f"{source.name} adapts {module}: {kept.name} of the base is {kept.shape}, by its config {shape}", OTHER_BASE
        )


def _embedding_of_head(source: Source, model: PreTrainedModel, module: str) -> str:
    """The embedding whose weights an adapted head shares. Raises MergeError for anything else that is shared."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    layer = model.get_submodule(module)
    name = next((name for name, other in model.named_modules() if other is embedding), None)
    if layer is not head or name is None or layer.weight is not embedding.weight:
        raise MergeError(
            f"{source.name} adapts {module}, whose weights other modules of the base share", "train it on modules of their own"
        )
    if read_config(source.folder).get("ensure_weight_tying"):
        raise MergeError(
            f"{source.name} was trained with ensure_weight_tying, so that {module} and {name} have one delta, and its files "
            f"hold none of {name}",
            "fold it with peft: merge_and_unload",
        )
    return name


def _read_all(source: Source) -> None:
    """Raises MergeError for values of the adapter that are not finite, before anything is written."""
    for module in source.weights.factors:
        _ = source.weights.factors[module]


def _files_of(files: BaseFiles) -> list[Path]:
    """Everything of the base that goes into the folded model."""
    index = [files.folder / INDEX] if files.index is not None else []
    return [files.folder / CONFIG, *index, *files.beside, *(file.path for file in files.weights)]


# writing ----------------------------------------------------------------------------------------------------------------


def folded_before(out: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of the same request, if it lies whole in `out`; None if there is nothing. Raises MergeError otherwise."""
    manifest = manifest_before(out, FOLDED, request, "model")
    if manifest is None:
        return None
    files = manifest.get("files")
    if not isinstance(files, dict) or any(
        not (out / name).is_file() or sha256_of_file(out / name) != sha256 for name, sha256 in files.items()
    ):
        raise MergeError(f"{out} holds this model, but its files were changed since", "move the folder away and fold again")
    return {**manifest, "done_before": True}


def _refuse_too_little_room(out: Path, plan: Plan, unfinished: Path) -> None:
    """Raises MergeError unless the disk holds all weights files that are not written yet."""
    place = next(parent for parent in out.parents if parent.is_dir())
    wanted, free = sum(map(plan.size, plan.parts)) - _bytes_below(unfinished), shutil.disk_usage(place).free
    if wanted + SPARE > free:
        raise MergeError(
            f"the folded model takes {wanted / 1e9:.2f} GB more, and {place} has {free / 1e9:.2f} GB left",
            "make room, or give an --out on another disk",
        )


def _bytes_below(folder: Path) -> int:
    """The size of all files there; another process may be about to take some away."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.path.getsize(os.path.join(parent, name))
    return size


@contextmanager
def _alone(unfinished: Path) -> Iterator[None]:
    """The folder of what is unfinished, for one process. It is gone afterwards, unless that was killed or the disk is full."""
    busy = MergeError(f"another process is folding this model in {unfinished}", "wait for it, or give another --out")
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        lock = (unfinished / "lock").open("a")
    except FileNotFoundError:  # it ends at this moment
        raise busy from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = not os.path.samestat(os.fstat(lock.fileno()), (unfinished / "lock").stat())
        except (BlockingIOError, FileNotFoundError):
            gone = True
        if gone:
            raise busy
        try:
            yield
        except ChrysalisError:
            shutil.rmtree(unfinished, ignore_errors=True)  # it would be refused again
            raise
        shutil.rmtree(unfinished, ignore_errors=True)  # who finds the model finished takes this away as well


def _write_weights(plan: Plan, building: Path, finished: Path) -> dict[str, str]:
    """Every weights file, those aside that were finished before; their hashes. A file has its name when it is whole."""
    try:
        before = dict(read_json(finished))
    except (OSError, ValueError, TypeError):
        before = {}
    hashes: dict[str, str] = {}
    for name, (file, parts) in plan.parts.items():
        place = building / name
        if name not in before or not place.is_file() or sha256_of_file(place) != before[name]:
            part = place.with_name(f".{name}.part")
            before[name] = write_parts(file, parts, part)
            part.rename(place)
            sync_folder(building)
            write_json(finished, before)
        hashes[name] = before[name]
    return hashes


def _write_beside(plan: Plan, files: BaseFiles, building: Path) -> dict[str, str]:
    """Config, index and small files, as the base has them; with a head of its own, config and index say so."""
    config, index = (files.folder / CONFIG).read_bytes(), None if files.index is None else (files.folder / INDEX).read_bytes()
    if plan.untied is not None:
        config = _json_bytes({**files.config, "tie_word_embeddings": False})
        if files.index is not None:
            owner = next(name for name, (_, parts) in plan.parts.items() if parts[-1].name == plan.untied)
            total = {"total_size": sum(p.kept.end - p.kept.start for _, parts in plan.parts.values() for p in parts)}
            told, mapped = files.index.get("metadata"), {**files.index["weight_map"], plan.untied: owner}
            metadata = {**told, **total} if isinstance(told, dict) else total
            index = _json_bytes({**files.index, "metadata": metadata, "weight_map": mapped})
    contents = {CONFIG: config, **({INDEX: index} if index is not None else {})}
    contents |= {path.name: path.read_bytes() for path in files.beside}
    for name, content in contents.items():
        write_bytes(building / name, content)
    return {name: sha256_of_file(building / name) for name in contents}


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
