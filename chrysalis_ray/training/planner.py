"""What an experiment would build, before anything is built: steps, body, memory, time. Plain arithmetic, no torch.

Where this kind of body was measured on this machine (`chrysalis plan --measure`), figures come from the measurement; else they
are estimates with their assumptions beside them. Memory errs upwards; time is given as a span, because how many variants a
scheduler stops early is not known before they have trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from chrysalis_ray.config.checks import domains_of
from chrysalis_ray.config.histories import heard_by_default
from chrysalis_ray.config.population import HyperBand, LevelMixes, Pb2, Pbt, Population
from chrysalis_ray.config.population_checks import largest_rank, rows_at_once, search_ranges, step_sizes
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.layout import CacheLayout
from chrysalis_ray.training.duration import bodies_of, time_of, turns_of
from chrysalis_ray.training.footprint import admit, has_room, slot_bytes, worker_memory
from chrysalis_ray.training.hardware import Hardware
from chrysalis_ray.training.measured import Measurement, find_measurement, lane_of
from chrysalis_ray.training.pace import Pace, assumption_of, guess_pace
from chrysalis_ray.training.plan import Plan, Time
from chrysalis_ray.training.shapes import ModelShape, shape_of

# Packing is worth its name from this gain in time on; slots beyond it are taken only for another tenth.
WORTHWHILE = 1.1
# Slots that `body.slots: auto` means while nothing is known of the base.
SLOTS_UNKNOWN = 8


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


def plan(loaded: LoadedExperiment, hardware: Hardware, cache: CacheLayout | None = None) -> Plan:
    """What `loaded` would build on `hardware`, by what `cache` knows of this machine.

    Raises ModelError if the base's config.json is broken.
    """
    loaded = with_largest_steps(loaded)
    population, lanes = loaded.experiment.population, loaded.blueprint.lanes
    shape = shape_of(loaded.base)
    measured = find_measurement(loaded, shape, hardware, cache)
    choice = choose_slots(loaded, hardware, shape, measured)
    body = loaded.body.model_copy(update={"slots": choice.slots})
    steps, chunk = _steps(loaded)
    bodies = bodies_of(loaded)
    slots = min(choice.slots, math.ceil(population.variants / bodies))
    memory = worker_memory(shape, loaded, slots, measured) if shape else None
    at_once, obstacles = admit(body, memory, hardware, bodies)
    tokens = steps * lanes.rows_per_step * lanes.sequence_length
    time = _time(loaded, hardware, shape, measured, slots, steps // chunk, chunk) if shape else None
    rank = largest_rank(loaded)
    return Plan(
        name=loaded.experiment.name,
        base=shape.name if shape else getattr(loaded.base, "model", "embedded"),
        parameters=shape.parameters if shape else None,
        variants=population.variants,
        steps=steps,
        chunk_steps=chunk,
        reports=steps // chunk,
        tokens_per_variant=tokens,
        tokens=tokens * population.variants,
        domains=domains_of(loaded.experiment.genome),
        rank=rank,
        lora_parameters=shape.lora_parameters(rank, loaded.blueprint.lora.targets) if shape else None,
        body=body,
        slots_used=slots,
        bodies=bodies,
        bodies_at_once=at_once,
        hardware=hardware,
        memory=memory,
        time=time,
        measured=measured.date if measured else None,
        obstacles=tuple(obstacles),
        notes=tuple(_notes(loaded, choice, shape, time, measured, population.tokens_per_variant - tokens)),
    )


def with_largest_steps(loaded: LoadedExperiment) -> LoadedExperiment:
    """`loaded` with the lanes of its largest searched step: what costs most at once, and what takes the fewest steps."""
    search, lanes = loaded.experiment.population.search, loaded.blueprint.lanes
    if search.rows_per_step is None:
        return loaded
    largest = {"rows_per_step": step_sizes(search, lanes)[-1], "rows_per_microstep": rows_at_once(loaded)}
    return replace(loaded, blueprint=loaded.blueprint.model_copy(update={"lanes": lanes.model_copy(update=largest)}))


def _steps(loaded: LoadedExperiment) -> tuple[int, int]:
    population, lanes = loaded.experiment.population, loaded.blueprint.lanes
    return optimizer_steps(population.tokens_per_variant, lanes.rows_per_step, lanes.sequence_length, population.reports)


def _time(
    loaded: LoadedExperiment,
    hardware: Hardware,
    shape: ModelShape,
    measured: Measurement | None,
    slots: int,
    reports: int,
    chunk: int,
) -> Time:
    pace = pace_of(loaded, hardware, shape, measured)
    turns = turns_of(loaded, pace, slots, chunk)
    return time_of(loaded, hardware, turns, reports, measured, assumption_of(loaded.body, hardware))


def pace_of(loaded: LoadedExperiment, hardware: Hardware, shape: ModelShape, measured: Measurement | None) -> Pace:
    """How fast a worker of this experiment is: as measured, else as guessed."""
    if measured is not None:
        return measured.pace
    adapter = shape.lora_parameters(largest_rank(loaded), loaded.blueprint.lora.targets)
    length = loaded.blueprint.lanes.sequence_length
    return guess_pace(shape, loaded.body, hardware, adapter, length, slot_bytes(shape, loaded))


# slots --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlotChoice:
    """How many slots, and why; `why` is empty where the number was written by a person."""

    slots: int
    why: str = ""


def choose_slots(
    loaded: LoadedExperiment, hardware: Hardware, shape: ModelShape | None, measured: Measurement | None
) -> SlotChoice:
    """The slots of the body: as written, or for `auto` the fewest that are nearly as fast as any number that fits.

    A turn of n variants trains a chunk, scores and keeps seeds. The numbers 1, 2, 4 ... up to what the searcher and the
    scheduler allow are compared by seconds per variant. One is the answer where packing would not save a tenth of them.
    """
    written, population = loaded.body.slots, loaded.experiment.population
    if written != "auto":
        return SlotChoice(written or 1)
    allowed = allowed_slots(population, bodies_of(loaded))
    if shape is None:
        return SlotChoice(min(SLOTS_UNKNOWN, allowed[-1]), "the sizes of the base are not known yet")
    if measured is not None and measured.slots < measured.asked:
        allowed = [slots for slots in allowed if slots <= measured.slots] or allowed[:1]
    needs = {slots: worker_memory(shape, loaded, slots, measured) for slots in allowed}
    fitting = [slots for slots in allowed if has_room(loaded.body, needs[slots], hardware)] or allowed[:1]
    pace, chunk = pace_of(loaded, hardware, shape, measured), _steps(loaded)[1]
    each = {slots: turns_of(loaded, pace, slots, chunk).turn(slots) / slots for slots in fitting}
    best = min(each.values())
    chosen = next(slots for slots in fitting if each[slots] <= WORTHWHILE * best)
    return SlotChoice(chosen, _why(chosen, fitting[-1] < allowed[-1], fitting[-1], each))


def allowed_slots(population: Population, bodies: int = 1) -> list[int]:
    """1, 2, 4 ... and a body's share of all variants; only that where the scheduler compares them at once, fewer where a
    searcher learns."""
    variants = math.ceil(population.variants / bodies)
    if isinstance(population.scheduler, (Pbt, Pb2, HyperBand)):
        return [variants]
    most = max(variants // 4, 1) if population.proposes else variants
    powers = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*powers, most]


def _why(chosen: int, limited: bool, largest: int, each: dict[int, float]) -> str:
    if len(each) == 1:
        return "no other number fits" if limited else "scheduler and searcher leave no other number"
    one = max(each) if 1 not in each else 1
    gain = each[one] / each[chosen]
    room = f", and no more than {largest} fit" if limited and chosen == largest else ""
    if chosen == 1:
        return f"packing would save less than a tenth of the time{room}"
    return f"a report of a variant costs {gain:.1f} times less than alone, with more slots less than a tenth more{room}"


def with_slots(loaded: LoadedExperiment, slots: int) -> LoadedExperiment:
    """The same experiment with a number where `body.slots: auto` was written."""
    body = loaded.experiment.body.model_copy(update={"slots": slots})
    return replace(loaded, experiment=loaded.experiment.model_copy(update={"body": body}))


# words --------------------------------------------------------------------------------------------------------------


def _notes(
    loaded: LoadedExperiment,
    choice: SlotChoice,
    shape: ModelShape | None,
    time: Time | None,
    measured: Measurement | None,
    unused: int,
) -> list[str]:
    notes = []
    body, variants = loaded.body, loaded.experiment.population.variants
    if shape is None:
        model = getattr(loaded.base, "model", "")
        notes.append(
            f"memory and time follow once the config.json of {model} is on this machine (a folder, or the hub's cache)"
        )
    notes.append(_search_note(loaded.experiment.population))
    domains = domains_of(loaded.experiment.genome)
    if silent := heard_by_default(loaded.experiment, domains, shape.parameters if shape else None)[1]:
        notes.append(silent)
    if choice.why:
        notes.append(f"body.slots: auto means {choice.slots}: {choice.why}")
    if time is not None:
        notes.append(_packing_note(time, (body.gpus_per_worker or 0) > 0))
    if measured is not None:
        notes += _measured_notes(loaded, measured)
    if loaded.experiment.population.search.rows_per_step:
        sizes = ", ".join(map(str, step_sizes(loaded.experiment.population.search, loaded.blueprint.lanes)))
        notes.append(f"steps of {sizes} rows: the steps told here are the largest; a report is equally many tokens for all")
    places = choice.slots * (body.count or 1)
    if places > variants:
        notes.append(f"{places} slots for {variants} variants: {places - variants} stay empty")
    if unused:
        notes.append(f"{unused:,} tokens per variant are left over: chunks are whole optimizer steps, and reports whole chunks")
    return notes


def _measured_notes(loaded: LoadedExperiment, measured: Measurement) -> list[str]:
    """What to bear in mind of a measurement."""
    notes = []
    wanted = lane_of(loaded)
    if measured.lane != wanted:
        notes.append(
            f"measured at {measured.lane.rows} rows of {measured.lane.length} tokens, not at {wanted.rows} of {wanted.length}: "
            "--measure again for these"
        )
    if measured.slots < measured.asked:
        notes.append(f"{measured.asked} slots ran out of memory when measured; {measured.slots} did not")
    return notes


def _search_note(population: Population) -> str:
    """Who proposes what, and who stops it."""
    ranges = list(search_ranges(population.search))
    if isinstance(population.epigenomes, LevelMixes):
        ranges += [f"level of {domain}" for domain in population.epigenomes.levels]
    over = f" over {', '.join(ranges)}" if ranges else ""
    paired = ", paired" if population.paired else ""
    mixes = population.epigenomes.type.replace("_", " ")
    return f"variants by {population.searcher.type}{over}; mixes: {mixes}{paired}; scheduler: {population.scheduler.type}"


def _packing_note(time: Time, on_gpu: bool) -> str:
    device = "GPU" if on_gpu else "CPU"
    facts = f"one variant brings {time.lane_tokens:,} tokens per micro-step, the {device}'s ridge is near {time.ridge_tokens:,}"
    if time.packing_gain < WORTHWHILE:
        still = "memory, start-up and the wait for a first ranking"
        return f"packing will not make the steps themselves faster ({facts}); it still saves {still}"
    return f"packing makes steps about {time.packing_gain:.1f} times faster than one variant after the other ({facts})"
