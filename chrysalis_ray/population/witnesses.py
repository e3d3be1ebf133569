"""Who learned from documents that are to be forgotten, over all runs of a folder, and where their text still lies.

A genome can forget; weights cannot. What was trained on a document keeps what it learned until it is trained again, so this
names every adapter that was: variants by their exposure, merges and the imago by what went into them, adapter zero where its A
came from the data, and an embedded base, which was grown from the train split.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import ChrysalisError
from chrysalis_ray.core.layout import CACHE, CacheLayout, RunLayout
from chrysalis_ray.core.records import read_json
from chrysalis_ray.genome.build import Genome, read_manifest
from chrysalis_ray.genome.tokens import open_tokens
from chrysalis_ray.population.exposure import exposure_to_any


@dataclass(frozen=True)
class Witness:
    """A run whose genome holds some of the documents. `variants` are those that learned from one: name -> steps, tokens and
    by whom they were trained. `adapters` are folders inside the run that carry it, `base` tells whether its base does.
    `unknown` says why it cannot be told who learned, None where it can."""

    run: str
    documents: int
    base: bool = False
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    unknown: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def runs_of(folders: Collection[Path]) -> list[RunLayout]:
    """Every run directory in one of the folders that has a genome, and the heats of every probe."""
    found = {path.resolve() for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    found |= {heat.parent for run in found for heat in RunLayout(run).probe().root.glob("*/run.json")}
    layouts = [RunLayout(path) for path in sorted(found)]
    return [layout for layout in layouts if layout.run_manifest.is_file() and (layout.genome / "manifest.json").is_file()]


def witnesses(runs: Collection[RunLayout], doc_ids: Collection[str]) -> list[Witness]:
    """Those of the runs whose genome holds one of the documents."""
    found = []
    for layout in runs:
        try:
            manifest = read_manifest(layout.genome)
        except ChrysalisError as error:
            found.append(Witness(str(layout.root), 0, unknown=error.message))
            continue
        held = {row["doc_id"]: row["split"] for row in manifest["content"]["documents"] if row["doc_id"] in set(doc_ids)}
        if held:
            found.append(_witness(layout, Genome(layout.genome, manifest["genome_id"], manifest), held))
    return found


def _witness(layout: RunLayout, genome: Genome, held: dict[str, str]) -> Witness:
    learnable = [doc_id for doc_id, split in held.items() if split == "train"]
    told = Witness(str(layout.root), len(held))
    if not learnable or not layout.base_manifest.is_file():
        return told
    try:
        base = read_json(layout.base_manifest)["type"] == "embedded"
        if not layout.branch_manifest.exists():
            return Witness(told.run, told.documents, base)
        exposed = exposure_to_any(layout, genome, open_tokens(layout.tokens), learnable)
        variants = {name: seen for name, seen in exposed.items() if seen["steps"]}
        adapters = tuple(path.relative_to(layout.root).as_posix() for path in _adapters(layout, set(variants)))
    except ChrysalisError as error:
        return Witness(told.run, told.documents, unknown=error.message)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Witness(told.run, told.documents, unknown=f"{type(error).__name__}: {error}")
    return Witness(told.run, told.documents, base, variants, adapters)


def _adapters(layout: RunLayout, variants: set[str]) -> Iterator[Path]:
    """Folders of adapters that carry what the variants learned."""
    if read_json(layout.run_manifest)["experiment"]["blueprint"].get("lora", {}).get("init") == "eva":
        yield layout.seed
    yield from (layout.adapter(name) for name in sorted(variants) if layout.adapter(name).is_dir())
    carriers = set(variants)
    if layout.merges_manifest.is_file():
        for name, entry in sorted(read_json(layout.merges_manifest)["candidates"].items()):
            if any(weight and member in variants for member, weight in entry["weights"].items()):
                carriers.add(name)
                yield layout.merge(name)
    if layout.verdict.is_file() and layout.imago.is_dir() and read_json(layout.verdict)["chosen"] in carriers:
        yield layout.imago


def places_of_text(genome: Genome, runs: Collection[RunLayout], holders: Collection[str]) -> list[str]:
    """Folders in which the text of the documents still lies: the genome they were taken out of, genomes and tokens of the runs
    in `holders`, and tokens that runs share."""
    inside = [layout for layout in runs if str(layout.root) in holders]
    places = {genome.folder, *(layout.genome for layout in inside), *(layout.tokens for layout in inside)}
    ids = {genome.genome_id, *(read_manifest(layout.genome)["genome_id"] for layout in inside)}
    for cache in {folder / CACHE for layout in runs for folder in layout.root.parents[:3:2]}:  # a heat's lies beside its run
        for folder in CacheLayout(cache).token_stores():
            try:
                known = read_json(folder / "manifest.json")["key"]["genome_id"]
            except (OSError, ValueError, KeyError, TypeError):  # half made, or damaged: it may hold the text
                known = genome.genome_id
            if known in ids:
                places.add(folder)
    return sorted(str(place) for place in places if place.is_dir())
