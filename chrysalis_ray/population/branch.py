"""Branch: N self-contained variants from one seed. A pure function of the experiment; nothing is trained here."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from chrysalis_ray.config.blueprint import Blueprint
from chrysalis_ray.config.experiment import Choice, Epigenomes, Experiment, Grid, LogUniform, Range, Uniform
from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant, read_json, sha256_of, write_json
from chrysalis_ray.training.planner import optimizer_steps


def branch_population(
    experiment: Experiment, blueprint: Blueprint, domains: Sequence[str], seed_sha256: str, genome_id: str, base_sha256: str
) -> list[Variant]:
    """The variants of an experiment, the same for the same arguments on every machine."""
    population, lanes = experiment.population, blueprint.lanes
    steps, chunk_steps = optimizer_steps(
        population.tokens_per_variant, lanes.rows_per_step, lanes.sequence_length, population.reports
    )
    settings = hyperparameters_of(experiment, blueprint)
    variants = []
    for index in range(population.variants):
        epigenome, mix = epigenome_of(population.epigenomes, index, domains, experiment.rng_seed)
        variants.append(
            Variant(
                variant_id=f"v{index:03d}-{mix}",
                index=index,
                rng_seed=int(sha256_of([experiment.rng_seed, "data", index])[:8], 16),
                seed_sha256=seed_sha256,
                genome_id=genome_id,
                base_sha256=base_sha256,
                hyperparameters=settings[index],
                epigenome=epigenome,
                steps=steps,
                chunk_steps=chunk_steps,
                rows_per_step=lanes.rows_per_step,
                sequence_length=lanes.sequence_length,
                parents=(seed_sha256,),
            )
        )
    return variants


def hyperparameters_of(experiment: Experiment, blueprint: Blueprint) -> list[Hyperparameters]:
    """The blueprint's hyperparameters with what the search space changes: grids crossed and dealt in turn, the rest drawn."""
    base = Hyperparameters(
        rank=blueprint.lora.rank,
        alpha=blueprint.lora.alpha,
        use_rslora=blueprint.lora.use_rslora,
        plus_ratio=blueprint.lora.plus_ratio,
        freeze_a=blueprint.lora.freeze_a,
        dropout=blueprint.lora.dropout,
        optimizer=blueprint.optimizer.type,
        **blueprint.optimizer.model_dump(exclude={"type"}),
        **blueprint.schedule.model_dump(),
    )
    space: dict[str, Range] = {
        name: getattr(experiment.population.search, name)
        for name in type(experiment.population.search).model_fields
        if getattr(experiment.population.search, name) is not None
    }
    grids = {name: spec.values for name, spec in space.items() if isinstance(spec, Grid)}
    crossed = [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
    rows = []
    for index in range(experiment.population.variants):
        drawn: dict[str, Any] = dict(crossed[index % len(crossed)])
        for name, spec in space.items():
            if not isinstance(spec, Grid):
                drawn[name] = draw(spec, random.Random(sha256_of([experiment.rng_seed, "search", name, index])))
        rows.append(replace(base, **drawn))
    return rows


def draw(spec: Range, generator: random.Random) -> Any:
    """One value from a range."""
    if isinstance(spec, LogUniform):
        return math.exp(generator.uniform(math.log(spec.low), math.log(spec.high)))
    if isinstance(spec, Uniform):
        return generator.uniform(spec.low, spec.high)
    if isinstance(spec, Choice):
        return generator.choice(spec.values)
    raise TypeError(f"a {spec.type} is dealt, not drawn")


def epigenome_of(spec: Epigenomes, index: int, domains: Sequence[str], rng_seed: int) -> tuple[Epigenome, str]:
    """The data mix of variant `index`, and a short name for it."""
    if spec.type == "listed":
        mix = spec.mixes[index % len(spec.mixes)]
        return Epigenome(express=dict(mix.express), prior=spec.prior), mix.name
    if spec.type == "brightened":
        bright = domains[index % len(domains)]
        levels = {domain: spec.level if domain == bright else 1.0 for domain in domains}
        return Epigenome(express=levels, prior=spec.prior), bright
    generator = random.Random(sha256_of([rng_seed, "mix", index]))
    raw = [generator.gammavariate(spec.concentration, 1.0) for _ in domains]
    total = sum(raw)
    levels = {domain: round(value / total, 6) for domain, value in zip(domains, raw, strict=True)}
    return Epigenome(express=levels, prior=spec.prior), max(levels, key=lambda domain: levels[domain])


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
