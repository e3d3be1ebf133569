"""Merging adapters that come from anywhere: PEFT folders or hub ids in, one PEFT folder with its `merge.json` out.

A merge is a function of its `request`: the hashes of what goes in, the method with its settings, the weights. The same request
again finds itself done; a folder that holds anything else is never touched. The base model is not loaded, and of the adapters
a few modules at a time; killed in the middle, the same command goes on with the modules that are missing.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from chrysalis_ray import __version__
from chrysalis_ray.config.merges import DensityMerge, Merge, RegmeanMerge, SeveralMerge
from chrysalis_ray.core.errors import MergeError, ModelError
from chrysalis_ray.core.records import read_json, sha256_of, sha256_of_file
from chrysalis_ray.evaluate.destination import destination, done_before, put_in_place
from chrysalis_ray.evaluate.vocabulary import refuse_other_vocabularies
from chrysalis_ray.merge.audit import findings, look_at, unanimous_by_chance
from chrysalis_ray.merge.finished import Layout, finished_modules
from chrysalis_ray.merge.gram import cosines
from chrysalis_ray.merge.inputs import Inputs
from chrysalis_ray.merge.per_layer import check_names, merge_adapters
from chrysalis_ray.merge.run import MEASURE, MergeResult
from chrysalis_ray.merge.weights import given_weights
from chrysalis_ray.merge.whole_regmean import looks_at_whole_inputs
from chrysalis_ray.seed.adapter import CONFIG, WEIGHTS, AdapterWeights, adapter_sha256, factor_name
from chrysalis_ray.seed.streamed import StreamedFactors, open_adapter
from chrysalis_ray.seed.tensors import head_of_floats

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """One adapter that takes part: the name it was given by, and where it lies."""

    name: str
    folder: Path
    weights: AdapterWeights
    sha256: str


def open_sources(names: Sequence[str]) -> list[Source]:
    """Every adapter, found and opened. Raises MergeError for one that is not there, no plain LoRA, or of another base."""
    folders = [find_folder(name) for name in names]
    with ThreadPoolExecutor(min(len(names), os.cpu_count() or 1)) as pool:
        opened = list(pool.map(lambda folder: (open_adapter(folder), adapter_sha256(folder)), folders))
    sources = [Source(name, folder, *read) for name, folder, read in zip(names, folders, opened, strict=True)]
    refuse_other_bases(sources)
    refuse_other_vocabularies([(source.name, source.folder) for source in sources])
    return sources


def find_folder(name: str) -> Path:
    """The folder called `name`, or the one that the hub id `name` (`owner/adapter`, `owner/adapter@revision`) is kept in."""
    folder = Path(name)
    if name and os.path.isdir(folder):
        return folder
    if name and os.path.exists(folder):  # which, unlike Path.exists, is no error for a name that no file can have
        raise MergeError(f"{name} is a file", "give the folder that holds it, the one that peft's save_pretrained wrote")
    if not HUB_ID.fullmatch(name):
        raise MergeError(f"there is no folder {name}", "give PEFT folders, or hub ids like owner/adapter")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MergeError(
            f"there is no folder {name}, and the hub gives no adapter of that name ({type(error).__name__}: {reason})",
            "look at the spelling; a private adapter needs `hf auth login`, and an offline machine one it has fetched before",
        ) from error


def refuse_other_bases(sources: Sequence[Source]) -> None:
    """Raises MergeError unless all adapters are of one base, by its name, its revision and the layout of its weights."""
    for what, told in (
        ("base", [source.weights.base_model for source in sources]),
        ("revision of the base", [source.weights.revision or "" for source in sources]),
        ("fan_in_fan_out", [str(source.weights.fan_in_fan_out) for source in sources]),
    ):
        named = {value: source.name for value, source in zip(told, sources, strict=True) if value}
        if len(named) > 1:
            (one, first), (two, second) = list(named.items())[:2]
            raise MergeError(
                f"{first} and {second} differ in the {what}: {one!r} and {two!r}",
                f"merge adapters of one base; if it is the same under two names, write one of them into both {CONFIG}",
            )


@dataclass(frozen=True)
class Texts:
    """Where adapters' inputs are measured: the base, and text of the kind each was trained on, one file for each or for all."""

    base: Path
    files: tuple[Path, ...]


def merge_folders(
    names: Sequence[str],
    spec: Merge,
    out: Path,
    seed_name: str | None = None,
    given: Sequence[float] | None = None,
    texts: Texts | None = None,
    base_model: str | None = None,
) -> dict[str, Any]:
    """Merge the adapters `names` into the folder `out`; returns the manifest, with `done_before` if it lay there already.

    `seed_name` is the adapter they were branched from, the anchor of the merge; `base_model` the base that they must be of, if
    they name any. Raises MergeError for what cannot be merged,
    and for an `out` that holds anything else.
    """
    refuse_unjudged(spec, given)
    if given is not None:
        given_weights(given, len(names))
    refuse_unmeasured(spec, texts, len(names))
    if isinstance(spec, SeveralMerge):
        check_names(spec, names)
    out = destination(out)
    sources = open_sources(names if seed_name is None else [*names, seed_name])
    refuse_other_base(sources, base_model)
    seed = None if seed_name is None else sources.pop()
    request = request_of(sources, seed, spec, given, texts)
    request_sha256 = sha256_of(request)
    unfinished = out.with_name(f".{out.name}.{request_sha256[:16]}")
    before = done_before(out, request)
    if before is not None:
        shutil.rmtree(unfinished, ignore_errors=True)  # killed between the last two steps
        return before
    everyone = [*sources, *([seed] if seed else [])]
    rank = max(source.weights.rank for source in sources)
    with finished_modules(unfinished, request_sha256, layout_of(everyone, spec, rank)) as finished:
        if (meanwhile := done_before(out, request)) is not None:
            return meanwhile
        result = merge_adapters(
            spec,
            names,
            [source.weights.factors for source in sources],
            [source.weights.scale for source in sources],
            seed.weights.factors if seed else None,
            seed.weights.scale if seed else 1.0,
            None,
            rank,
            given,
            inputs=None if texts is None else measured_inputs(texts, sources, seed, spec, unfinished),
            finished=finished,
        )
        manifest = {
            "request": request,
            "request_sha256": request_sha256,
            "adapters": [source.name for source in sources],
            "seed_adapter": seed.name if seed else None,
            "base_model": sources[0].weights.base_model,
            **named_result(result, [source.name for source in sources]),
        }
        ready = finished.whole(result.factors)
        return put_in_place(unfinished, out, adapter_of(result, everyone), common_task(everyone), manifest, ready)


def layout_of(sources: Sequence[Source], spec: Merge, rank: int) -> Layout | None:
    """The file of the merged weights, as long as every module of the sources comes out; None if its rank is not known yet."""
    asked = getattr(spec, "rank", None) or rank
    if asked == "exact":
        return None
    sizes: dict[str, tuple[int, int, int]] = {}
    for source in sources:
        factors = source.weights.factors
        assert isinstance(factors, StreamedFactors)
        sizes |= {module: factors.shape(module) for module in factors}
    shapes = {(module, "A"): (asked, size[2]) for module, size in sizes.items()}
    shapes |= {(module, "B"): (size[0], asked) for module, size in sizes.items()}
    names = {key: factor_name(*key) for key in shapes}
    head, starts = head_of_floats({names[key]: shape for key, shape in shapes.items()}, "format", "pt")
    ends = {key: starts[names[key]] + 4 * math.prod(shape) for key, shape in shapes.items()}
    if any(ends[module, "A"] != starts[names[module, "B"]] for module in sizes):
        return None  # a module whose name comes between A and B of another one
    return Layout(head, {module: starts[names[module, "A"]] for module in sizes}, max(ends.values()))


def request_of(
    sources: Sequence[Source], seed: Source | None, spec: Merge, given: Sequence[float] | None, texts: Texts | None
) -> dict[str, Any]:
    """All that a merge depends on."""
    request: dict[str, Any] = {
        "adapters": [source.sha256 for source in sources],
        "seed_adapter": seed.sha256 if seed else None,
        "spec": spec.model_dump(mode="json"),
        "given_weights": None if given is None else list(given),
        "version": __version__,
    }
    if (isinstance(spec, SeveralMerge) and spec.layer_weights) or (isinstance(spec, DensityMerge) and spec.densities):
        request["names"] = [source.name for source in sources]  # what the weights go by
    if texts is not None:
        request["texts"] = [sha256_of_file(file) for file in texts.files]
        request["base_weights"] = {file.name: sha256_of_file(file) for file in sorted(texts.base.glob("*.safetensors"))}
    return request


def refuse_other_base(sources: Sequence[Source], base_model: str | None) -> None:
    """Raises MergeError for an adapter that names another base than `base_model`."""
    for source in sources:
        if base_model and source.weights.base_model not in ("", base_model):
            raise MergeError(f"{source.name} is an adapter of {source.weights.base_model!r}, not of {base_model!r}",
                             "write the base of these adapters as base_model")  # fmt: skip


def refuse_unjudged(spec: Merge, given: Sequence[float] | None) -> None:
    """Raises MergeError for what only variants that were judged can have, or what is asked for twice."""
    if not isinstance(spec, SeveralMerge):
        raise MergeError("`winner` is the one with the lowest held-out loss, and nothing has judged these adapters",
                         "give --strategy ensemble and a --weights of 1 for it, or take that adapter as it is")  # fmt: skip
    if "best_share" in spec.model_fields_set:
        raise MergeError("best_share takes the best of those that were judged", "leave it out, and name the adapters to merge")
    if given is not None and "weights" in spec.model_fields_set:
        raise MergeError(f"--weights and weights={spec.weights} both say how much an adapter counts", "leave one of them out")


def refuse_unmeasured(spec: Merge, texts: Texts | None, count: int) -> None:
    """Raises MergeError unless inputs can be measured where, and only where, the method goes by them."""
    if isinstance(spec, RegmeanMerge) and texts is None:
        raise MergeError("`regmean` weighs every adapter by its own inputs, and nobody measured them", MEASURE)
    if texts is None:
        return
    if not isinstance(spec, RegmeanMerge):
        raise MergeError(f"`{spec.method}` looks at no text", "leave --base and --text out, or give --strategy regmean")
    if len(texts.files) not in (1, count):
        raise MergeError(f"{len(texts.files)} texts for {count} adapters", "give one --text for each adapter, or one for all")
    absent = next((file for file in texts.files if not file.is_file()), None)
    if absent is not None or not texts.base.is_dir():
        raise MergeError(f"there is no {absent or texts.base}", "give the base's folder as --base, and text files as --text")


def measured_inputs(texts: Texts, sources: Sequence[Source], seed: Source | None, spec: Merge, scratch: Path) -> Inputs:
    """What every adapter feeds the modules of the base on its own text. Loads the base, once. Whole inputs lie in `scratch`."""
    from chrysalis_ray.evaluate.inputs import input_directions, measure_inputs, read_rows
    from chrysalis_ray.evaluate.whole_inputs import measured_files
    from chrysalis_ray.training.base import inspect_folder, load_base

    everyone = [source.weights.factors for source in [*sources, *([seed] if seed else [])]]
    try:
        inspect_folder(texts.base)
    except ModelError as error:
        raise MergeError(error.message, error.remedy) from error
    files = texts.files if len(texts.files) > 1 else texts.files * len(sources)
    rows = {file: read_rows(file, texts.base) for file in set(files)}
    load = partial(load_base, texts.base, "fp32")
    readers = [(source.weights, rows[file]) for source, file in zip(sources, files, strict=True)]
    if looks_at_whole_inputs(spec):
        return measured_files(scratch, load, readers, everyone)
    model, directions = load(), input_directions(everyone)
    return [measure_inputs(model, adapter, own, directions) for adapter, own in readers]


def named_result(result: MergeResult, names: Sequence[str]) -> dict[str, Any]:
    """The result without its tensors, members called by name where it counts them. Members have numbers in `weights` alone."""
    told = result.to_json()
    notes = dict(told["notes"])
    for key in ("held_out", "modules_missing_as_zero"):
        if key in notes:
            notes[key] = {names[int(index)]: value for index, value in notes[key].items()}
    return {**told, "notes": notes}


def adapter_of(result: MergeResult, sources: Sequence[Source]) -> AdapterWeights:
    """The merged factors as an adapter of the sources' base, for every module that any of them has."""
    return replace(
        sources[0].weights,
        base_model=next((source.weights.base_model for source in sources if source.weights.base_model), ""),
        revision=next((source.weights.revision for source in sources if source.weights.revision), None),
        rank=result.rank,
        alpha=float(result.rank),
        use_rslora=False,
        targets=tuple(sorted({target for source in sources for target in source.weights.targets})),
        factors=result.factors,
        dropout=0.0,
    )


def common_task(sources: Sequence[Source]) -> str | None:
    """The task_type of the adapters' configs if it is one and the same; peft can do without."""
    tasks = {read_json(source.folder / CONFIG).get("task_type") for source in sources}
    task = tasks.pop()
    return task if not tasks and isinstance(task, str) else None


def audit_folders(names: Sequence[str], seed_name: str | None = None) -> dict[str, Any]:
    """What the adapters look like beside each other, and in words what merging them will do. Nothing is written."""
    sources = open_sources(names if seed_name is None else [*names, seed_name])
    return audit_sources(sources, None if seed_name is None else sources.pop())


def audit_sources(sources: Sequence[Source], seed: Source | None) -> dict[str, Any]:
    """What adapters of one base look like beside each other."""
    cohort = look_at(
        [source.weights.factors for source in sources],
        [source.weights.scale for source in sources],
        seed.weights.factors if seed else None,
        seed.weights.scale if seed else 1.0,
    )
    cosine_NN = cosines(cohort.gram_NN)
    rows = [
        {
            "name": source.name,
            "sha256": source.sha256,
            "rank": cohort.ranks[number],
            "alpha": source.weights.alpha,
            "use_rslora": source.weights.use_rslora,
            "modules": cohort.modules[number],
            "norm": float(cohort.gram_NN[number, number].clamp(min=0.0).sqrt()),
            "effective_rank": cohort.effective_ranks[number],
            "cosines": [round(float(value), 6) for value in cosine_NN[number]],
        }
        for number, source in enumerate(sources)
    ]
    return {
        "base_model": sources[0].weights.base_model,
        "seed_adapter": seed.name if seed else None,
        "adapters": rows,
        "principal_cosine": cohort.principal_cosine,
        "condition": cohort.condition,
        "mean_kept_by_rank": cohort.kept,
        "agreement": cohort.agreement,
        "agreement_by_chance": unanimous_by_chance(len(sources)),
        "findings": findings(cohort, [source.name for source in sources], seed is not None),
    }
