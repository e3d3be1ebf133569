"""Whether budget, search space, scheduler and merges of a population fit together, and with the blueprint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import get_args

from chrysalis_ray.config.blueprint import OTHER_OPTIMIZERS, Base, Decay, EmbeddedBase, Lanes, OptimizerType
from chrysalis_ray.config.merges import EnsembleMerge, WinnerMerge
from chrysalis_ray.config.population import (
    Asha,
    Bohb,
    Choice,
    Epigenomes,
    Grid,
    HyperBand,
    LevelMixes,
    LogUniform,
    MedianStopping,
    Pb2,
    Pbt,
    Population,
    Range,
    SearchSpace,
    Uniform,
)  # fmt: skip
from chrysalis_ray.config.problems import Finding, Location, suggestion
from chrysalis_ray.config.resolve import LoadedExperiment

WORDS: dict[str, tuple[str, ...]] = {"decay": get_args(Decay), "optimizer": get_args(OptimizerType)}
SWITCHES = ("freeze_a",)
WHOLE = {"rank": "[4, 8, 16]", "rows_per_step": "[2, 4, 8]"}  # whole numbers, and an example of values
BELOW_ONE = math.nextafter(1.0, 0.0)
# name -> (smallest, whether the smallest itself is allowed, largest)
LIMITS: dict[str, tuple[float, bool, float]] = {
    "learning_rate": (0.0, False, math.inf), "rank": (1, True, 1024), "alpha": (0.0, False, math.inf),
    "weight_decay": (0.0, True, math.inf), "clip": (0.0, True, math.inf), "warmup_fraction": (0.0, True, 1.0),
    "final_fraction": (0.0, True, 1.0), "plus_ratio": (0.0, False, math.inf), "dropout": (0.0, True, BELOW_ONE),
    "rows_per_step": (1, True, 2**20),
}  # fmt: skip


def check_population(loaded: LoadedExperiment) -> Iterator[Finding]:
    """Every problem of the population and the merges, as (path in the experiment, what is wrong and meant)."""
    population = loaded.experiment.population
    yield from _budget(loaded)
    yield from _ranges(population.search)
    yield from _scheduler(loaded)
    yield from _merges(loaded)


def _budget(loaded: LoadedExperiment) -> Iterator[Finding]:
    population, lanes = loaded.experiment.population, loaded.blueprint.lanes
    sizes = step_sizes(population.search, lanes)
    rows = common_rows(sizes)
    per_step = rows * lanes.sequence_length
    steps = population.tokens_per_variant // per_step
    product = f"{rows} rows x {lanes.sequence_length} tokens"
    if len(sizes) > 1:
        product += f": {rows} rows are whole steps of {', '.join(map(str, sizes))}, and a report is equally many for all"
    if steps < 1:
        yield (
            ("population", "tokens_per_variant"),
            (
                f"{population.tokens_per_variant} tokens are less than one optimizer step of {per_step} ({product}); "
                f"write at least {per_step * population.reports} for {population.reports} reports"
            ),
        )
    elif steps < population.reports:
        yield (
            ("population", "reports"),
            (
                f"{population.reports} reports, but {population.tokens_per_variant} tokens are only {steps} "
                f"optimizer steps of {per_step} ({product}); write reports: {steps} or fewer, "
                f"or tokens_per_variant: {per_step * population.reports} or more"
            ),
        )


def step_sizes(search: SearchSpace, lanes: Lanes) -> tuple[int, ...]:
    """The rows per step that variants can have, ascending."""
    drawn = getattr(search.rows_per_step, "values", ())
    return tuple(sorted({size for size in drawn if isinstance(size, int) and size >= 1})) or (lanes.rows_per_step,)


def common_rows(sizes: Sequence[int]) -> int:
    """The fewest rows that are whole steps of every size. Reports are multiples of them: equally many tokens for all."""
    return math.lcm(*sizes)


def rows_at_once(loaded: LoadedExperiment) -> int:
    """Rows of every variant in one pass: those of the smallest step, where the blueprint does not say."""
    lanes = loaded.blueprint.lanes
    return lanes.rows_per_microstep or step_sizes(loaded.experiment.population.search, lanes)[0]


def search_ranges(search: SearchSpace) -> dict[str, Range]:
    """The ranges that are set, by the name of the hyperparameter."""
    return {name: value for name in SearchSpace.model_fields if (value := getattr(search, name)) is not None}


def _ranges(search: SearchSpace) -> Iterator[Finding]:
    for name, drawn in search_ranges(search).items():
        at: Location = ("population", "search", name)
        if isinstance(drawn, (Choice, Grid)):
            for position, value in enumerate(drawn.values):
                what = _bad_value(name, value)
                if what:
                    yield (*at, "values", position), what
            if isinstance(drawn, Grid) and len(set(map(repr, drawn.values))) < len(drawn.values):
                yield (*at, "values"), "a grid holds a value twice"
        elif name in WORDS:
            yield (*at, "type"), f"{name} is a word; write type: choice, values: [{', '.join(WORDS[name])}]"
        elif name in SWITCHES:
            yield (*at, "type"), f"{name} is true or false; write type: choice, values: [true, false]"
        elif name in WHOLE:
            kind = f"{name} is a whole number, {drawn.type} draws fractions"
            yield (*at, "type"), f"{kind}; write type: choice, values: {WHOLE[name]}"
        else:
            yield from _bad_ends(name, drawn, at)


def _bad_ends(name: str, drawn: Uniform | LogUniform, at: Location) -> Iterator[Finding]:
    for end in ("low", "high"):
        if what := bad_number(name, getattr(drawn, end)):
            yield (*at, end), what


def _bad_value(name: str, value: object) -> str | None:
    if name in SWITCHES:
        return None if isinstance(value, bool) else f"{value!r} is not true or false"
    if name not in WORDS:
        return bad_number(name, value)
    if isinstance(value, str) and value in WORDS[name]:
        return None
    if name == "optimizer" and (what := OTHER_OPTIMIZERS.get(str(value).lower())):
        return f"{value!r} {what}; known: {', '.join(WORDS[name])}"
    return f"{value!r} is no {name}; {suggestion(str(value), WORDS[name])}"


def bad_number(name: str, value: object, limits: tuple[float, bool, float] | None = None) -> str | None:
    """What is wrong with `value` as the number `name`, or None. `limits` are those of `LIMITS` unless given."""
    low, low_allowed, high = limits or LIMITS[name]
    if isinstance(value, str):
        return f"{value!r} is text; a number was meant: write it without quotes"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{str(value).lower()} is true/false; a number was meant"
    if name in WHOLE and not isinstance(value, int):
        return f"{value:g} is no whole number; a {name} such as 8 was meant"
    if value < low or (value == low and not low_allowed) or value > high:
        least = f"{'at least' if low_allowed else 'above'} {low:g}"
        most = "" if high == math.inf else " and below 1" if high == BELOW_ONE else f" and at most {high:g}"
        return f"{value:g} is out of range; {name} must be {least}{most}"
    return None


def _scheduler(loaded: LoadedExperiment) -> Iterator[Finding]:
    population = loaded.experiment.population
    scheduler, at = population.scheduler, ("population", "scheduler")
    reports, variants = population.reports, population.variants
    if isinstance(scheduler, (Asha, MedianStopping)) and scheduler.grace_reports >= reports:
        yield (
            (*at, "grace_reports"),
            (
                f"{scheduler.grace_reports} of {reports} reports: nothing could ever be stopped early; "
                "write fewer, or scheduler type: fifo"
            ),
        )
    elif isinstance(scheduler, Asha):
        rungs = 1 + int(math.log(reports / scheduler.grace_reports) / math.log(scheduler.reduction_factor) + 1e-9)
        if scheduler.brackets > rungs:
            yield (
                (*at, "brackets"),
                (f"{scheduler.brackets} brackets, but {reports} reports have only {rungs} rungs; write at most {rungs}"),
            )
    if isinstance(scheduler, MedianStopping) and scheduler.min_variants > variants:
        yield (*at, "min_variants"), f"{scheduler.min_variants} of {variants} variants; write at most {variants}"
    if isinstance(scheduler, (Pbt, Pb2)):
        yield from _pbt(scheduler, population)
    if isinstance(scheduler, (HyperBand, Bohb)):
        yield from _hyperband(scheduler, population)
    auto = loaded.body.slots == "auto" or "count" in loaded.open
    if isinstance(scheduler, (Pbt, Pb2, HyperBand)) and not auto and loaded.places < variants:
        why = "population based training needs all of them at once, or those of different waves never exchange weights"
        if isinstance(scheduler, HyperBand):
            why = "hyperband halves whole brackets, so all of them must be there at once"
        each = -(-variants // (loaded.body.count or 1))
        yield ("population", "variants"), f"{variants} variants in {loaded.places} slots: {why}; write body: {{slots: {each}}}"


def _hyperband(scheduler: HyperBand | Bohb, population: Population) -> Iterator[Finding]:
    first = full_bracket(scheduler, population.reports)
    if population.reports < scheduler.reduction_factor:
        yield (
            ("population", "reports"),
            f"{population.reports} reports are less than one halving by {scheduler.reduction_factor:g}: nothing could ever be "
            "stopped early; write more reports, or scheduler type: fifo",
        )
    elif population.variants <= first and isinstance(scheduler, HyperBand):  # bohb begins with the bracket halved most
        yield (
            ("population", "variants"),
            f"{population.variants} variants fill only the bracket in which nothing is stopped ({first} variants train the "
            f"whole budget); write variants: {2 * first} or more, or scheduler type: asha",
        )


def full_bracket(scheduler: HyperBand | Bohb, reports: int) -> int:
    """Variants of the first bracket: those that train the whole budget whatever they report."""
    return round(math.log(reports) / math.log(scheduler.reduction_factor)) + 1


def _pbt(scheduler: Pbt | Pb2, population: Population) -> Iterator[Finding]:
    at, reports, variants = ("population", "scheduler"), population.reports, population.variants
    if variants < 2:
        yield (
            ("population", "variants"),
            ("population based training copies the best to the worst: at least 2 variants were meant"),
        )
    if scheduler.perturb_every_reports >= reports:
        yield (
            (*at, "perturb_every_reports"),
            (f"{scheduler.perturb_every_reports} of {reports} reports: nothing would ever be perturbed; write fewer"),
        )
    ranges = search_ranges(population.search)
    strength = getattr(scheduler, "level_strength", None)
    if strength is not None and "levels" not in scheduler.mutate:
        yield (*at, "level_strength"), "says how strongly levels are mutated, and mutate does not name levels; add it there"
    for position, name in enumerate(scheduler.mutate):
        if name == "levels" and strength is not None:
            continue
        if name == "levels":
            yield from _mutated_levels(scheduler, population.epigenomes, (*at, "mutate", position))
        elif name not in ranges:
            example = "{type: log_uniform, low: 1e-4, high: 1e-2}"
            yield (
                (*at, "mutate", position),
                f"population.search has no range for {name} to draw from; add `{name}: {example}`",
            )
        elif scheduler.mutate.index(name) < position:
            yield (*at, "mutate", position), f"{name!r} is named twice"
        elif isinstance(scheduler, Pb2) and not isinstance(ranges[name], (Uniform, LogUniform)):
            path: Location = ("population", "search", name, "type")
            yield path, f"pb2 proposes {name} between two ends; write type: log_uniform or type: uniform, with low and high"


def _mutated_levels(scheduler: Pbt | Pb2, epigenomes: Epigenomes, at: Location) -> Iterator[Finding]:
    if not isinstance(epigenomes, LevelMixes):
        yield (
            at,
            (
                f"{epigenomes.type} mixes have no ranges to draw levels from; write epigenomes type: levels"
                + (", or level_strength: 0.3" if isinstance(scheduler, Pbt) else "")
            ),
        )
        return
    for domain, drawn in epigenomes.levels.items():
        path: Location = ("population", "epigenomes", "levels", domain, "type")
        if isinstance(scheduler, Pb2) and not isinstance(drawn, (Uniform, LogUniform)):
            yield path, "pb2 proposes levels between two ends; write type: log_uniform or type: uniform, with low and high"


# merging ------------------------------------------------------------------------------------------------------------


def _merges(loaded: LoadedExperiment) -> Iterator[Finding]:
    population = loaded.experiment.population
    top = largest_rank(loaded)
    total = loaded.blueprint.patterns.largest(top) * population.variants
    widest = smallest_target(loaded.base, loaded.blueprint.lora.targets) if loaded.blueprint.adapter is None else None
    for position, merge in enumerate(loaded.experiment.merge):
        at = ("merge", position, "rank")
        if isinstance(merge, WinnerMerge) or merge.rank is None:
            continue
        if merge.rank == "exact":
            room = total if widest is None else min(total, widest)
            yield at, f"every slot of the body would need room for it; write {room}, which is exact, or a smaller number"
        elif isinstance(merge, EnsembleMerge) and merge.rank > total:
            yield at, (f"{population.variants} deltas of rank {top} sum to rank {total} at most; write {total} or leave it out")
        elif widest is not None and merge.rank > widest:
            yield at, f"{merge.rank} is above {widest}, the smaller side of the smallest target matrix; write {widest} or less"
    if widest is not None and top > widest:
        where: Location = ("population", "search", "rank") if population.search.rank else ("blueprint",)
        yield where, f"rank {top} is above {widest}, the smaller side of the smallest target matrix; write {widest} or less"


def largest_rank(loaded: LoadedExperiment) -> int:
    """The largest rank any variant can have: the bank is that wide."""
    drawn = loaded.experiment.population.search.rank
    if isinstance(drawn, (Choice, Grid)):
        return max((int(value) for value in drawn.values if isinstance(value, (int, float))), default=loaded.blueprint.rank)
    return loaded.blueprint.rank


def smallest_target(base: Base, targets: tuple[str, ...]) -> int | None:
    """min(in, out) over the target matrices of an embedded base; None where the shapes are not in the YAML."""
    if not isinstance(base, EmbeddedBase):
        return None
    sides = {
        "q_proj": base.heads * base.head_size, "k_proj": base.key_value_heads * base.head_size,
        "v_proj": base.key_value_heads * base.head_size, "o_proj": base.heads * base.head_size,
        "gate_proj": base.intermediate_size, "up_proj": base.intermediate_size, "down_proj": base.intermediate_size,
    }  # fmt: skip
    return min((min(sides[target], base.hidden_size) for target in targets if target in sides), default=None)
