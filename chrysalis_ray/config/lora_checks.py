"""Whether what a blueprint says of LoRA fits the base and the ranks that an experiment searches."""

from __future__ import annotations

from collections.abc import Iterator

from chrysalis_ray.config.blueprint import EmbeddedBase
from chrysalis_ray.config.population_checks import largest_rank
from chrysalis_ray.config.problems import Finding
from chrysalis_ray.config.resolve import LoadedExperiment


def check_lora(loaded: LoadedExperiment) -> Iterator[Finding]:
    """Every problem, as (path in the file where it was written, what is wrong and meant)."""
    lora, base = loaded.blueprint.lora, loaded.base
    if loaded.blueprint.adapter is not None:
        for field in ("exclude", "layers"):
            if getattr(lora, field):
                yield ("lora", field), "is for LoRA, in whose place adapter stands; name its targets in full instead"
        return
    if isinstance(base, EmbeddedBase):
        for layer in lora.layers or ():
            if layer >= base.layers:
                yield ("lora", "layers"), f"{layer} is no layer: the base has {base.layers}, counted from 0"
    asked = {
        loaded.blueprint.rank,
        largest_rank(loaded),
        *(getattr(merge, "rank", None) or 0 for merge in loaded.experiment.merge),
    }
    searched = loaded.experiment.population.search.rank is not None
    if lora.init == "gaussian" and (searched or any(rank != lora.rank for rank in asked if isinstance(rank, int) and rank)):
        yield (
            ("lora", "init"),
            "the spread of gaussian is 1/rank, and of one adapter zero variants and merges of several ranks begin; "
            "write kaiming, or one rank for all",
        )
