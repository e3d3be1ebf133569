"""How long an experiment takes: a body's turns, and what is before and after them. Plain arithmetic, no torch.

A turn trains one chunk of every variant that is alive, as many at once as there are slots, then scores them and keeps their
seeds. Who is alive is the scheduler's to say: `train_most` if nobody is stopped, `train_least` if halving stops exactly
1 - 1/factor at each rung, `train_expected` if variants arrive in random order of quality (see `survivors`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from chrysalis_ray.config.blueprint import EmbeddedBase
from chrysalis_ray.config.checks import domains_of
from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.config.population import Asha
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.training.planning.footprint import lane_tokens
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.measured import Measurement
from chrysalis_ray.training.planning.pace import Pace
from chrysalis_ray.training.planning.plan import Time

# Between two turns: omega, the trials and the scheduler take their decisions.
TURN_SECONDS = 0.07
# What comes beside training, on a machine that imports torch and transformers in START_SECONDS: CPU seconds of Ray, driver,
# omega and a worker, and of each trial; START_SERIAL is what no number of cores shortens. Counted on two cores.
START_SECONDS, START_CPU, TRIAL_CPU, START_SERIAL = 3.0, 14.5, 1.1, 8.0
# Reading, cutting, hashing and tokenising a megabyte of text; at the end merging, verdict, card and pages.
MEGABYTE_SECONDS, PAGES_SECONDS = 1.7, 5.5
GUESSED_START = 4.0  # where nobody measured
UNLIMITED_MEGABYTES = 50.0  # what a source without max_megabytes is taken for


def optimizer_steps(tokens: int, rows_per_step: int, sequence_length: int, reports: int) -> tuple[int, int]:
    """(steps, chunk_steps): the whole budget and the steps between two reports.

    `chunk_steps` = floor(total / reports) and at least 1; `steps` = chunk_steps x reports, so that every chunk is whole and
    there are exactly as many reports as asked (as many as steps, if there are fewer steps than reports). Raises ValueError if
    any argument is below 1.
    """
    if min(tokens, rows_per_step, sequence_length, reports) < 1:
        raise ValueError(
            f"tokens {tokens}, rows {rows_per_step}, length {sequence_length} and reports {reports} must all be >= 1"
        )
    total = max(tokens // (rows_per_step * sequence_length), 1)
    chunk = max(total // reports, 1)
    return chunk * min(reports, total), chunk


def steps_of(loaded: LoadedExperiment) -> tuple[int, int]:
    """`optimizer_steps` of this experiment."""
    population, lanes = loaded.experiment.population, loaded.blueprint.lanes
    return optimizer_steps(population.tokens_per_variant, lanes.rows_per_step, lanes.sequence_length, population.reports)


@dataclass(frozen=True)
class Turns:
    """The turns of bodies of `slots` each; `seconds(alive)` is one report of so many variants, a fraction of one allowed."""

    pace: Pace
    slots: int
    steps: int
    microsteps: int
    lane: float
    length: int
    scored: float  # held-out tokens per variant and report, on this worker
    fixed: bool = False  # whether all slots are computed, however few train
    bodies: int = 1  # that share every turn

    def seconds(self, alive: float) -> float:
        low = math.floor(alive)
        above = alive - low
        return (1 - above) * self._whole(low) + (above * self._whole(low + 1) if above else 0.0)

    def turn(self, variants: int) -> float:
        """One turn of so many variants, at most as many as there are slots."""
        computed = self.slots if self.fixed else variants
        steps = self.steps * self.pace.step(computed, self.lane, self.length, self.microsteps)
        return steps + self.pace.score(computed, self.scored) + variants * self.pace.keep + TURN_SECONDS

    def _whole(self, alive: int) -> float:
        full, rest = divmod(alive, self.slots * self.bodies)
        return full * self.turn(self.slots) + (self.turn(math.ceil(rest / self.bodies)) if rest else 0.0)


def time_of(
    loaded: LoadedExperiment,
    hardware: Hardware,
    turns: Turns,
    reports: int,
    measured: Measurement | None,
    assumption: str,
) -> Time:
    """Seconds of a whole run, from the first turn's to those of the last page."""
    population, pace, base = loaded.experiment.population, turns.pace, loaded.base
    start = measured.start if measured else GUESSED_START
    pretraining = 0.0
    if isinstance(base, EmbeddedBase):  # all weights learn: half as much again as for adapters over a frozen base
        pretraining = (measured.pretrain if measured else 1.5 * pace.per_token) * base.pretrain_tokens

    def train(alive: Callable[[int], float]) -> float:
        return sum(turns.seconds(alive(report)) for report in range(1, reports + 1))

    most = train(lambda report: population.variants)
    return Time(
        train_least=min(train(lambda report: halved(loaded, report, exact=True)), most),
        train_expected=min(train(lambda report: halved(loaded, report, exact=False)), most),
        train_most=most,
        pretrain=pretraining,
        judge=judge_seconds(loaded, pace, turns.slots, turns.bodies),
        overhead=overhead_seconds(loaded, hardware, turns.slots * turns.bodies, start / START_SECONDS),
        ridge_tokens=pace.ridge(turns.length),
        lane_tokens=round(turns.lane),
        packing_gain=pace.gain(max(turns.slots, 2), turns.lane, turns.length, turns.microsteps),
        assumption=assumption,
        measured=measured.date if measured else None,
    )


def turns_of(loaded: LoadedExperiment, pace: Pace, slots: int, chunk_steps: int) -> Turns:
    evaluate, lanes = loaded.experiment.evaluate, loaded.blueprint.lanes
    domains = len(domains_of(loaded.experiment.genome))
    return Turns(
        pace=pace,
        slots=slots,
        steps=chunk_steps,
        microsteps=lanes.microsteps,
        lane=lane_tokens(loaded),
        length=lanes.sequence_length,
        scored=domains * evaluate.rows_per_report * lanes.sequence_length / (loaded.body.workers or 1),
        fixed=loaded.body.lanes == "fixed",
        bodies=bodies_of(loaded),
    )


def bodies_of(loaded: LoadedExperiment) -> int:
    """How many bodies stand at once; none without a variant."""
    return min(loaded.body.count or 1, loaded.experiment.population.variants)


# who is alive -------------------------------------------------------------------------------------------------------


def halved(loaded: LoadedExperiment, report: int, exact: bool) -> float:
    """Variants that train for their `report`-th report (from 1): all, or what halving has left."""
    population = loaded.experiment.population
    scheduler, alive = population.scheduler, float(population.variants)
    if not isinstance(scheduler, Asha):
        return alive
    rung = float(scheduler.grace_reports)
    while rung < report:
        share = max(alive / scheduler.reduction_factor, 1.0)
        alive = share if exact else survivors(alive, scheduler.reduction_factor)
        rung *= scheduler.reduction_factor
    return alive


def survivors(arrivals: float, factor: float) -> float:
    """How many of so many arrivals at a rung go on, on average, if they come in random order.

    ASHA stops who is below the (1 - 1/factor) quantile of those that came *before*, interpolated between two of them, and
    never the first. The k-th newcomer stands anywhere among the k with equal chance, so it goes on with the chance
    (k - 1 - (1 - 1/factor)(k - 2)) / k.
    """
    whole = math.floor(arrivals)

    def chance(newcomer: int) -> float:
        if newcomer == 1:
            return 1.0
        return (newcomer - 1 - (1 - 1 / factor) * (newcomer - 2)) / newcomer

    certain = sum(chance(newcomer) for newcomer in range(1, whole + 1))
    return certain + (arrivals - whole) * chance(whole + 1)


# beside training ----------------------------------------------------------------------------------------------------


def judge_seconds(loaded: LoadedExperiment, pace: Pace, slots: int, bodies: int = 1) -> float:
    """Every variant and merge on *select*; the seed, every variant and the chosen one on *report*; in packs of `slots`."""
    evaluate, variants = loaded.experiment.evaluate, loaded.experiment.population.variants
    domains, length = len(domains_of(loaded.experiment.genome)), loaded.blueprint.lanes.sequence_length
    tokens = domains * evaluate.rows_per_domain * length / (loaded.body.workers or 1)
    return sum(
        math.ceil(judged / slots) * pace.score(min(slots, judged), tokens)
        for judged in (
            math.ceil(together / bodies) for together in (variants + 1, max(len(loaded.experiment.merge), 1), variants + 2)
        )
    )


def overhead_seconds(loaded: LoadedExperiment, hardware: Hardware, slots: int, slowness: float) -> float:
    """Ray and its processes, the genome, and the pages at the end; `slowness` is 1 where torch is imported in START_SECONDS."""
    cores = max(hardware.cpus, 1)
    trials = min(slots, loaded.experiment.population.variants)
    ray = max(START_SERIAL, (START_CPU + TRIAL_CPU * trials) / cores)
    return slowness * (ray + megabytes_of(loaded.experiment.genome) * MEGABYTE_SECONDS + PAGES_SECONDS)


def megabytes_of(genome: GenomeSpec) -> float:
    """Text that the genome reads, by what its sources are limited to."""
    total = 0.0
    for source in genome.sources:
        limit = getattr(source, "max_megabytes", None)
        total += len(getattr(source, "domains", None) or (1,)) * (limit if limit is not None else UNLIMITED_MEGABYTES)
    return total
