"""Whether what a blueprint says of LoRA fits the base and the ranks that an experiment searches."""

from __future__ import annotations

from collections.abc import Iterator

from chrysalis_ray.config.blueprint import MOVED_INITS, EmbeddedBase
from chrysalis_ray.config.population_checks import largest_rank, smallest_target
from chrysalis_ray.config.problems import Finding
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.patterns import means


def check_lora(loaded: LoadedExperiment) -> Iterator[Finding]:
    """Every problem, as (path in the file where it was written, what is wrong and meant)."""
    lora, base = loaded.blueprint.lora, loaded.base
    if loaded.blueprint.adapter is not None:
        for field in ("exclude", "layers", "rank_pattern", "alpha_pattern"):
            if getattr(lora, field):
                yield ("lora", field), "is for LoRA, in whose place adapter stands; name its targets in full instead"
        return
    if isinstance(base, EmbeddedBase):
        for layer in lora.layers or ():
            if layer >= base.layers:
                yield ("lora", "layers"), f"{layer} is no layer: the base has {base.layers}, counted from 0"
    yield from _patterns(loaded)
    asked = {
        *lora.rank_pattern.values(),
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


def _patterns(loaded: LoadedExperiment) -> Iterator[Finding]:
    lora, base, search = loaded.blueprint.lora, loaded.base, loaded.experiment.population.search
    for field, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        at = ("lora", field)
        if pattern and lora.init in MOVED_INITS:
            yield (
                at,
                f"does not go with init: {lora.init}, of which one scale is kept for all modules; leave one of the two out",
            )
        for key in pattern:
            widest = smallest_target(base, (key.rpartition(".")[2],))
            if field == "rank_pattern" and widest is not None and pattern[key] > widest:
                yield (*at, key), f"rank {pattern[key]:g} is above {widest}, the smaller side of that matrix; write less"
        drawn = field.removesuffix("_pattern")
        if getattr(search, drawn) is not None and all(any(means(key, target) for key in pattern) for target in lora.targets):
            yield (
                ("population", "search", drawn),
                f"blueprint.lora.{field} gives every target its own; leave one of the two out",
            )
