"""The heats of a probe: short populations in which candidate blueprints race. Plain arithmetic, no torch.

Candidates that can share a body run in one heat, a variant each: the same base, the same target modules, rows of one length,
the same arithmetic. The others run in heats of their own, one after another. All train the same tokens of one mix over one
genome, the one of the experiment's own blueprint, and draw their rows with one rng_seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from chrysalis_ray.config.blueprint import Blueprint
from chrysalis_ray.config.candidates import probe_tokens
from chrysalis_ray.config.checks import domains_of
from chrysalis_ray.config.epigenome import DirichletMixes, ListedMixes, Mix
from chrysalis_ray.config.experiment import Experiment, Tracking
from chrysalis_ray.config.histories import heard_by_default
from chrysalis_ray.config.merges import WinnerMerge
from chrysalis_ray.config.population import BranchSearch, Fifo, Grid, Population, SearchSpace
from chrysalis_ray.config.population_checks import common_rows, search_ranges
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.errors import ConfigError
from chrysalis_ray.core.layout import CacheLayout
from chrysalis_ray.core.records import sha256_of
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.plan import Plan, clock
from chrysalis_ray.training.planning.planner import plan
from chrysalis_ray.training.planning.shapes import shape_of

REPORTS = 4  # of a candidate: what a killed probe loses at most is a quarter
MIX = "mean"
JUDGED_WHOLE = 262_144  # tokens of a domain
PATTERNS = ("rank_pattern", "alpha_pattern")
# Fields of a body that change no arithmetic beyond rounding: those of a heat are its first candidate's.
_PLACEMENT = {"count", "workers", "cpus_per_worker", "slots", "zero_stage", "offload", "nvme_path", "activation_checkpointing",
              "compile", "threads"}  # fmt: skip


@dataclass(frozen=True)
class Heat:
    """A short population: variant k is `names[k]`, trained by `blueprints[k]`."""

    name: str
    loaded: LoadedExperiment
    names: tuple[str, ...]
    blueprints: tuple[Blueprint, ...]

    @property
    def base(self) -> str:
        """The same for heats on the same base in the same numbers: one of 4 bits is another, whose own loss is higher."""
        numbers = (self.loaded.body.precision, self.loaded.body.quantization)
        return sha256_of([self.loaded.base.model_dump(mode="json", exclude={"chat_template"}), *numbers])


def heats_of(loaded: LoadedExperiment) -> list[Heat]:
    """The heats that decide between the candidates of `loaded`. Raises ConfigError where a heat has no whole step."""
    groups: dict[str, list[tuple[str, LoadedExperiment]]] = {}
    for name, candidate in loaded.candidates:
        groups.setdefault(_body_key(candidate), []).append((name, candidate))
    return [_heat(loaded, f"heat-{number:02d}", group) for number, group in enumerate(groups.values())]


def question_of(heats: Sequence[Heat]) -> str:
    """The hash of all that the outcome of these heats depends on."""
    told = [[heat.loaded.resolved()["sha256"], heat.names, [_recipe(each) for each in heat.blueprints]] for heat in heats]
    return sha256_of(told)


def _recipe(blueprint: Blueprint) -> dict[str, Any]:
    """What variants of a heat are trained by. What says nothing is left out: probes of before there was such a field go on."""
    told = blueprint.model_dump(mode="json", include={"lora", "adapter", "optimizer", "schedule", "lanes"})
    for part, name in ((told, "adapter"), *((told["lora"], name) for name in ("exclude", "layers", *PATTERNS))):
        if not part[name]:
            del part[name]
    return told


def _body_key(candidate: LoadedExperiment) -> str:
    """What candidates of one body have in common."""
    blueprint, template = candidate.blueprint, candidate.chat_template
    lora, recipe = blueprint.lora, _recipe(blueprint)
    alone = [recipe["lora"], recipe.get("adapter")] if blueprint.worn.solo else None  # a solo body is made for one kind
    of_one_rank = lora.rank if lora.init == "gaussian" else None  # by which adapter zero is drawn
    body = candidate.written_body.model_dump(mode="json", exclude=_PLACEMENT)
    base = candidate.base.model_dump(mode="json") | {"chat_template": template and str(template.resolve())}
    modules = [sorted(lora.targets), sorted(lora.exclude), sorted(lora.layers or ()), lora.layers is None]
    modules += [blueprint.patterns.to_json()] if blueprint.patterns else []
    return sha256_of([base, modules, lora.init, of_one_rank, alone, blueprint.lanes.sequence_length, body])


def _heat(loaded: LoadedExperiment, name: str, group: Sequence[tuple[str, LoadedExperiment]]) -> Heat:
    """A heat of `group`. What all share, the bank's width too, is that of the candidate of the largest rank."""
    blueprints = tuple(candidate.blueprint for _, candidate in group)
    carrier = max((candidate for _, candidate in group), key=lambda candidate: candidate.blueprint.rank)
    rows = sorted({blueprint.lanes.rows_per_step for blueprint in blueprints})
    at_once = math.gcd(*(b.lanes.rows_per_microstep or b.lanes.rows_per_step for b in blueprints))
    lanes = carrier.blueprint.lanes.model_copy(update={"rows_per_microstep": at_once})
    blueprint = carrier.blueprint.model_copy(update={"lanes": lanes, "body": group[0][1].blueprint.body})
    tokens, stride = probe_tokens(loaded), common_rows(rows) * lanes.sequence_length
    if tokens < stride:
        raise ConfigError(
            f"{loaded.path}: probe.tokens: {tokens} are not one step of {', '.join(n for n, _ in group)}, whose steps of "
            f"{', '.join(map(str, rows))} rows meet every {stride} tokens; write at least {stride}"
        )
    experiment = _short(loaded, carrier, len(group), tokens, min(REPORTS, tokens // stride), rows)
    short = replace(carrier, experiment=experiment, blueprint=blueprint, chosen=None, selected=(), candidates=())
    return Heat(name, short, tuple(name for name, _ in group), blueprints)


def _short(
    loaded: LoadedExperiment, carrier: LoadedExperiment, variants: int, tokens: int, reports: int, rows: Sequence[int]
) -> Experiment:
    """The experiment of a heat: that of `loaded`, short, all variants on one mix, nothing merged and nothing tracked."""
    probe, experiment = loaded.experiment.probe, carrier.experiment
    assert probe is not None
    search = SearchSpace(rows_per_step=Grid(type="grid", values=tuple(rows))) if len(rows) > 1 else SearchSpace()
    population = Population(
        variants=variants,
        tokens_per_variant=tokens,
        reports=reports,
        search=search,
        epigenomes=_mean_mix(loaded),
        paired=True,
        searcher=BranchSearch(type="branch"),
        scheduler=Fifo(type="fifo"),
        max_failures=experiment.population.max_failures,
    )
    judging = {"rows_per_domain": _judging_rows(loaded, carrier.blueprint.lanes.sequence_length)}
    changes = {
        "probe": None,
        "genome": loaded.experiment.genome,
        "population": population,
        "evaluate": experiment.evaluate.model_copy(update=judging),
        "merge": (WinnerMerge(method="winner"),),
        "tracking": Tracking(wandb="disabled"),
    }
    return experiment.model_copy(update=changes)


def _judging_rows(loaded: LoadedExperiment, length: int) -> int:
    """Held-out rows of a domain, of `length` tokens. Shorter ones are as many more, so that all hear the same documents; where
    bases differ as many as hold `JUDGED_WHOLE` tokens, since tokenizers cut documents differently and whole ones compare."""
    probe, evaluate = loaded.experiment.probe, loaded.experiment.evaluate
    assert probe is not None
    longest = max(candidate.blueprint.lanes.sequence_length for _, candidate in loaded.candidates)
    rows = math.ceil((probe.rows_per_domain or evaluate.rows_per_domain) * longest / length)
    several = len({sha256_of(candidate.base.model_dump(mode="json")) for _, candidate in loaded.candidates}) > 1
    return max(rows, JUDGED_WHOLE // length) if several and not probe.rows_per_domain else rows


def _mean_mix(loaded: LoadedExperiment) -> ListedMixes:
    """One mix for all candidates: the mean of those that the experiment's variants hear, with what goes without a budget."""
    mixes, domains = loaded.experiment.population.epigenomes, domains_of(loaded.experiment.genome)
    shape = shape_of(loaded.base)
    heard, _ = heard_by_default(loaded.experiment, domains, shape.parameters if shape else None)
    if isinstance(mixes, ListedMixes):
        shares = [{d: level / sum(mix.express.values()) for d, level in mix.express.items()} for mix in mixes.mixes]
        express = {d: sum(share.get(d, 0.0) for share in shares) / len(shares) for d in domains}
    elif isinstance(mixes, DirichletMixes):
        express = {d: mixes.concentrations.get(d, mixes.concentration) for d in heard}
    else:
        express = dict.fromkeys(heard, 1.0)
    most = max(express.values())
    mean = Mix(name=MIX, express={d: level / most for d, level in express.items() if level > 0})
    kept = {name: getattr(mixes, name) for name in ("prior", "silence", "floors", "loss_weights") if getattr(mixes, name)}
    return ListedMixes(type="listed", mixes=(mean,), **kept)


def in_vain(loaded: LoadedExperiment) -> list[str]:
    """What the candidates differ in, and the experiment's search draws anyway: a line for people, or none."""
    drawn = search_ranges(loaded.experiment.population.search)
    recipes = [blueprint_words(candidate.blueprint) for _, candidate in loaded.candidates]
    same = [name for name in drawn if len({str(recipe[name]) for recipe in recipes}) > 1]
    return [f"population.search draws {' and '.join(same)} for each variant, whatever the probe decides"] if same else []


def blueprint_words(blueprint: Blueprint) -> dict[str, Any]:
    """What a blueprint says where `population.search` can say otherwise, by the names of the search."""
    own = {**blueprint.optimizer.model_dump(), **blueprint.lora.model_dump(), **blueprint.schedule.model_dump()}
    rank = {"rank": blueprint.rank, "alpha": blueprint.alpha}
    return {**own, **rank, "optimizer": blueprint.optimizer.type, "rows_per_step": blueprint.lanes.rows_per_step}


# what it costs ------------------------------------------------------------------------------------------------------


def with_probe(planned: Plan, loaded: LoadedExperiment, hardware: Hardware, cache: CacheLayout | None = None) -> Plan:
    """`planned` with what the probe before the run will cost, where there is one to be held."""
    if not loaded.candidates:
        return planned
    heats = heats_of(loaded)
    plans = [plan(heat.loaded, hardware, cache) for heat in heats]
    names = ", ".join(name for heat in heats for name in heat.names)
    runs = "1 short population" if len(heats) == 1 else f"{len(heats)} short populations, one after another"
    times = [each.time.expected for each in plans if each.time]
    seconds = f", about {clock(sum(times))}" if len(times) == len(plans) else ""
    tokens = sum(each.tokens for each in plans)
    told = [
        f"probe: first {len(loaded.candidates)} blueprints ({names}) train {plans[0].tokens_per_variant:,} tokens each in "
        f"{runs}: {tokens:,} tokens{seconds}; what is planned here is the run by {loaded.candidates[0][0]}, which stays unless "
        "another is better beyond doubt",
        *(f"probe: {line}" for line in in_vain(loaded)),
        *(
            f"probe: {', '.join(heat.names)} cannot be tried here: {each.obstacles[0]}"
            for heat, each in zip(heats, plans, strict=True)
            if each.obstacles
        ),
    ]
    return replace(planned, notes=(*told, *planned.notes))
