"""Branch: self-contained variants from one seed. A pure function of the experiment; nothing is trained here."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from chrysalis_ray.config.blueprint import Blueprint
from chrysalis_ray.config.experiment import Experiment
from chrysalis_ray.config.population import (
    Choice,
    Grid,
    LevelMixes,
    LogUniform,
    Pb2,
    Pbt,
    Population,
    Range,
    SearchSpace,
    Uniform,
)
from chrysalis_ray.config.population_checks import common_rows, largest_rank, search_ranges, step_sizes
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Hyperparameters, Variant, read_json, sha256_of, write_json
from chrysalis_ray.core.shares import check_bounds
from chrysalis_ray.population.mixes import Budget, counted_in_rows, epigenome_of
from chrysalis_ray.population.sobol import sobol_point
from chrysalis_ray.population.words import LEVEL, MIX
from chrysalis_ray.training.planning.planner import optimizer_steps

ROWS = "rows_per_step"  # of the search space, but no hyperparameter: it makes the steps that those speak of
HYPERPARAMETERS = frozenset(SearchSpace.model_fields) - {ROWS}


@dataclass(frozen=True)
class Branching:
    """All that the variants of a population have in common, and how one is made from values of the search space."""

    experiment: Experiment
    blueprint: Blueprint
    domains: tuple[str, ...]
    seed_sha256: str
    genome_id: str
    base_sha256: str
    tokens: Mapping[str, int] = field(default_factory=dict)  # of every domain in training, where they are known
    rows: Mapping[str, int] = field(default_factory=dict)  # that they are packed into
    listed: tuple[Blueprint, ...] = ()  # where variants differ by blueprint: that of each, in place of the one of all

    def variant(self, index: int, values: Mapping[str, Any]) -> Variant:
        """Variant `index` with these values; the same for the same arguments on every machine. Raises GenomeError where the
        genome is too small for the caps and floors of its mix."""
        experiment, lanes = self.experiment, self.blueprint.lanes
        population = experiment.population
        own = self.listed[index] if self.listed else self.blueprint
        rows = own.lanes.rows_per_step if self.listed else values.get(ROWS, lanes.rows_per_step)
        common = common_rows(step_sizes(population.search, lanes))
        strides, chunk_strides = optimizer_steps(
            population.tokens_per_variant, common, lanes.sequence_length, population.reports
        )
        number = values.get(MIX, mix_number(population, index))
        budget = Budget(strides * common, rows, lanes.sequence_length, population.tokens_per_variant)
        epigenome, mix = epigenome_of(population.epigenomes, number, self.domains, experiment.rng_seed, values, budget)
        if self.rows:
            epigenome = counted_in_rows(epigenome, budget, self.tokens, self.rows, bred=breeds_levels(population))
        if self.tokens:
            check_bounds(epigenome, self.tokens, f"v{index:03d}-{mix}")
        drawn = {name: value for name, value in values.items() if name in HYPERPARAMETERS}
        return Variant(
            variant_id=f"v{index:03d}-{mix}",
            index=index,
            rng_seed=data_rng_seed(experiment, index),
            seed_sha256=self.seed_sha256,
            genome_id=self.genome_id,
            base_sha256=self.base_sha256,
            hyperparameters=replace(blueprint_hyperparameters(own), **drawn),
            epigenome=epigenome,
            steps=strides * (common // rows),
            chunk_steps=chunk_strides * (common // rows),
            rows_per_step=rows,
            sequence_length=lanes.sequence_length,
            parents=(self.seed_sha256,),
        )


def trained_tokens(layout: RunLayout) -> dict[str, int]:
    """Tokens of every domain's train split, of a genome that was tokenised."""
    parts = read_json(layout.tokens / "manifest.json")["parts"]
    return {domain: int(splits["train"]["tokens"]) for domain, splits in parts.items()}


def trained_rows(layout: RunLayout) -> dict[str, int]:
    """Rows of every domain's train split, of a genome that was tokenised."""
    parts = read_json(layout.tokens / "manifest.json")["parts"]
    return {domain: int(splits["train"]["rows"]) for domain, splits in parts.items()}


def breeds_levels(population: Population) -> bool:
    """Whether the scheduler changes levels while a variant trains."""
    return isinstance(population.scheduler, (Pbt, Pb2)) and "levels" in population.scheduler.mutate


def branch_population(branching: Branching) -> list[Variant]:
    """All variants of an experiment whose values are drawn before the first one trains."""
    experiment = branching.experiment
    return [branching.variant(index, drawn_values(experiment, index)) for index in range(experiment.population.variants)]


def data_rng_seed(experiment: Experiment, index: int) -> int:
    """What turns a mix into an order of rows. `paired` variants share it: common random numbers."""
    name: list[Any] = [experiment.rng_seed, "data"] if experiment.population.paired else [experiment.rng_seed, "data", index]
    return int(sha256_of(name)[:8], 16)


def blueprint_hyperparameters(blueprint: Blueprint) -> Hyperparameters:
    """The hyperparameters where the search space says nothing."""
    return Hyperparameters(
        rank=blueprint.rank,
        alpha=blueprint.alpha,
        use_rslora=blueprint.lora.use_rslora,
        plus_ratio=blueprint.lora.plus_ratio,
        freeze_a=blueprint.lora.freeze_a,
        dropout=blueprint.lora.dropout,
        optimizer=blueprint.optimizer.type,
        **blueprint.optimizer.model_dump(exclude={"type"}),
        **blueprint.schedule.model_dump(),
    )


def hyperparameters_of(experiment: Experiment, blueprint: Blueprint) -> list[Hyperparameters]:
    """The hyperparameters of every variant whose values are drawn before the first one trains."""
    base = blueprint_hyperparameters(blueprint)
    drawn = [drawn_values(experiment, index) for index in range(experiment.population.variants)]
    return [replace(base, **{name: row[name] for name in row if name in HYPERPARAMETERS}) for row in drawn]


def branched_rank(loaded: LoadedExperiment) -> int:
    """The largest rank of a variant: of those that are drawn, or of those that may be proposed."""
    if loaded.experiment.population.proposes:
        return largest_rank(loaded)
    return max(row.rank for row in hyperparameters_of(loaded.experiment, loaded.blueprint))


def bank_rank(loaded: LoadedExperiment) -> int:
    """The rank every slot has room for: the largest that a variant or a merge asks for."""
    asked = [rank for merge in loaded.experiment.merge if (rank := getattr(merge, "rank", None))]
    return max([branched_rank(loaded), *asked])


# values -------------------------------------------------------------------------------------------------------------


def ranges_of(population: Population) -> dict[str, Range]:
    """The search space: hyperparameters by their names, levels of domains as `level.<domain>`."""
    epigenomes, space = population.epigenomes, search_ranges(population.search)
    if isinstance(epigenomes, LevelMixes):
        space |= {f"{LEVEL}{domain}": drawn for domain, drawn in sorted(epigenomes.levels.items())}
    return space


def drawn_values(experiment: Experiment, index: int) -> dict[str, Any]:
    """The values of variant `index`: grids crossed and dealt in turn, the rest drawn, or placed by a Sobol point."""
    population = experiment.population
    space = ranges_of(population)
    grids = crossed_grids(population)
    values: dict[str, Any] = dict(grids[index % len(grids)])
    free = {name: spec for name, spec in space.items() if not isinstance(spec, Grid)}
    if population.searcher.type == "sobol":
        point = sobol_point(index, len(free), experiment.rng_seed)
        return values | {name: placed(spec, at) for (name, spec), at in zip(free.items(), point, strict=True)}
    for name, spec in free.items():
        values[name] = draw(spec, random.Random(sha256_of([experiment.rng_seed, "search", name, index])))
    return values


def crossed_grids(population: Population) -> list[dict[str, Any]]:
    """Every combination of the values of all grids; one empty one if there is no grid."""
    grids = {name: spec.values for name, spec in ranges_of(population).items() if isinstance(spec, Grid)}
    return [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]


def mix_number(population: Population, index: int) -> int:
    """Which mix variant `index` is dealt. A grid of mixes is crossed with the other grids, the others go round in turn."""
    return index // len(crossed_grids(population)) if population.epigenomes.type == "simplex_grid" else index


def draw(spec: Range, generator: random.Random) -> Any:
    """One value from a range."""
    if isinstance(spec, Choice):
        return generator.choice(spec.values)
    return placed(spec, generator.random())


def placed(spec: Range, at: float) -> Any:
    """The value at `at` in [0, 1) of a range: its inverse distribution function."""
    if isinstance(spec, LogUniform):
        return math.exp(math.log(spec.low) + (math.log(spec.high) - math.log(spec.low)) * at)
    if isinstance(spec, Uniform):
        return spec.low + (spec.high - spec.low) * at
    if isinstance(spec, Choice):
        return spec.values[int(at * len(spec.values))]
    raise TypeError(f"a {spec.type} is dealt, not drawn")


# files --------------------------------------------------------------------------------------------------------------


def write_branch(layout: RunLayout, variants: Sequence[Variant]) -> None:
    """One `variant.json` each, the manifest last."""
    for variant in variants:
        write_json(layout.variant(variant.variant_id), variant.to_json())
    write_json(layout.branch_manifest, {"variants": [variant.variant_id for variant in variants]})


def read_branch(layout: RunLayout) -> list[Variant]:
    """The variants that were branched. Raises RunError when a `variant.json` is missing or malformed."""
    try:
        ids = read_json(layout.branch_manifest)["variants"]
        return [Variant.from_json(read_json(layout.variant(variant_id))) for variant_id in ids]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{layout.branch_manifest}: {error}", "delete branch.json and variants/ to branch again") from error


def check_origins(variants: Sequence[Variant], seed_sha256: str, genome_id: str, base_sha256: str) -> None:
    """Raises RunError if the variants were branched from another seed, genome or base than the run has now."""
    for variant in variants:
        for what, then, now in (
            ("genome", variant.genome_id, genome_id),
            ("base", variant.base_sha256, base_sha256),
            ("seed", variant.seed_sha256, seed_sha256),
        ):
            if then != now:
                raise RunError(
                    f"{variant.variant_id} was branched on {what} {then[:12]}, but the {what} is {now[:12]} now",
                    f"put the {what} back as it was, or give a run on the new one another --name",
                )
