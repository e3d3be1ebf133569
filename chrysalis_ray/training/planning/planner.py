"""What an experiment would build, before anything is built: steps, body, memory, time. Plain arithmetic, no torch.

Where this kind of body was measured on this machine (`chrysalis plan --measure`), figures come from the measurement; else they
are estimates with their assumptions beside them. Memory errs upwards; time is given as a span, because how many variants a
scheduler stops early is not known before they have trained.
"""

from __future__ import annotations

import math
from dataclasses import replace

from chrysalis_ray.config.checks import domains_of
from chrysalis_ray.config.histories import heard_by_default
from chrysalis_ray.config.population import LevelMixes, Population
from chrysalis_ray.config.population_checks import largest_rank, rows_at_once, search_ranges, step_sizes
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.layout import CacheLayout
from chrysalis_ray.training.passes import WIDE, shards_of, splits, threads_of
from chrysalis_ray.training.planning.alone import adapter_parameters
from chrysalis_ray.training.planning.duration import bodies_of, optimizer_steps, steps_of, time_of, turns_of
from chrysalis_ray.training.planning.footprint import admit, held_tokens, lane_tokens, worker_memory
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.measured import Measurement, find_measurement, lane_of
from chrysalis_ray.training.planning.pace import assumption_of
from chrysalis_ray.training.planning.placement import place
from chrysalis_ray.training.planning.plan import Plan, Time
from chrysalis_ray.training.planning.shapes import ModelShape, shape_of
from chrysalis_ray.training.planning.slots import WORTHWHILE, SlotChoice, allowed_slots, pace_of, settle

__all__ = ["allowed_slots", "optimizer_steps", "plan", "with_largest_steps"]


def plan(loaded: LoadedExperiment, hardware: Hardware, cache: CacheLayout | None = None) -> Plan:
    """What `loaded` would build on `hardware`, by what `cache` knows of this machine.

    Raises ModelError if the base's config.json is broken.
    """
    loaded = with_largest_steps(loaded)
    population, lanes = loaded.experiment.population, loaded.blueprint.lanes
    shape = shape_of(loaded.base)
    loaded, why = place(loaded, hardware, shape, cache)
    measured = find_measurement(loaded, shape, hardware, cache)
    loaded, choice = settle(loaded, hardware, shape, measured)
    body = loaded.body.model_copy(update={"slots": choice.slots})
    steps, chunk = steps_of(loaded)
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
        lora_parameters=adapter_parameters(shape, loaded.blueprint, rank) if shape else None,
        body=body,
        slots_used=slots,
        bodies=bodies,
        bodies_at_once=at_once,
        hardware=hardware,
        memory=memory,
        time=time,
        measured=measured.date if measured else None,
        obstacles=tuple(obstacles),
        chosen=(*(loaded.chosen.reasons if loaded.chosen else ()), *loaded.selected, *why),
        adapter=loaded.blueprint.adapter_type,
        notes=tuple(_notes(loaded, choice, slots, shape, time, measured, population.tokens_per_variant - tokens)),
    )


def with_largest_steps(loaded: LoadedExperiment) -> LoadedExperiment:
    """`loaded` with the lanes of its largest searched step: what costs most at once, and what takes the fewest steps."""
    search, lanes = loaded.experiment.population.search, loaded.blueprint.lanes
    if search.rows_per_step is None:
        return loaded
    largest = {"rows_per_step": step_sizes(search, lanes)[-1], "rows_per_microstep": rows_at_once(loaded)}
    return replace(loaded, blueprint=loaded.blueprint.model_copy(update={"lanes": lanes.model_copy(update=largest)}))


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


# words --------------------------------------------------------------------------------------------------------------


def _notes(
    loaded: LoadedExperiment,
    choice: SlotChoice,
    slots: int,
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
    if reason := loaded.blueprint.worn.solo:
        notes.append(_solo_note(reason, variants, body.count or 1))
    if patterns := loaded.blueprint.patterns:
        told = [f"{name} {value:g}" for pattern in (patterns.ranks, patterns.alphas) for name, value in pattern.items()]
        notes.append(f"in all variants of their own rank or alpha: {', '.join(told)}")
    notes.append(_search_note(loaded.experiment.population))
    domains = domains_of(loaded.experiment.genome)
    if silent := heard_by_default(loaded.experiment, domains, shape.parameters if shape else None)[1]:
        notes.append(silent)
    if choice.why:
        notes.append(f"body.slots: auto means {choice.slots}: {choice.why}")
    if time is not None and not loaded.blueprint.worn.solo:
        notes.append(_packing_note(time, (body.gpus_per_worker or 0) > 0, slots))
    if shape is not None and (alone := _alone_note(loaded, shape)):
        notes.append(alone)
    if body.tokens_per_pass and (tokens := round(held_tokens(loaded, slots))) < round(slots * lane_tokens(loaded)):
        notes.append(
            f"of {slots} variants as many compute at once as {tokens:,} tokens hold, then the next: longer passes "
            "would hardly be faster, and hold more (body.tokens_per_pass)"
        )
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


def _solo_note(reason: str, variants: int, bodies: int) -> str:
    """That these variants share nothing at once."""
    one = "one after another" if bodies == 1 else f"one after another in {bodies} bodies"
    return f"a solo body: {reason}; {variants} variants train {one}, each by plain peft, and only start-up is shared"


def _search_note(population: Population) -> str:
    """Who proposes what, and who stops it."""
    ranges = list(search_ranges(population.search))
    if isinstance(population.epigenomes, LevelMixes):
        ranges += [f"level of {domain}" for domain in population.epigenomes.levels]
    over = f" over {', '.join(ranges)}" if ranges else ""
    paired = ", paired" if population.paired else ""
    mixes = population.epigenomes.type.replace("_", " ")
    return f"variants by {population.searcher.type}{over}; mixes: {mixes}{paired}; scheduler: {population.scheduler.type}"


def _alone_note(loaded: LoadedExperiment, shape: ModelShape) -> str | None:
    """How a variant trains that has several cores to itself, as the last of a population has (`shards.py`)."""
    body, lanes, shards = loaded.body, loaded.blueprint.lanes, shards_of(loaded.body)
    if shards == 1 or body.lanes == "fixed" or loaded.blueprint.worn.solo:
        return None
    rows, linears = lanes.rows_per_microstep or lanes.rows_per_step, shape.linears()
    widest = max((linears[name][0] for name in loaded.blueprint.lora.targets if name in linears), default=shape.hidden)
    if widest < WIDE and rows > 1:
        return f"a variant that is left alone has its {rows} rows shared by {min(rows, shards)} processes"
    if splits(widest, rows * lanes.sequence_length):
        return f"a variant that is left alone has {threads_of(body)} threads in its operations"
    return f"a variant that is left alone keeps to one core: one row of {lanes.sequence_length} tokens is too short to share"


def _packing_note(time: Time, on_gpu: bool, slots: int) -> str:
    device = "GPU" if on_gpu else "CPU"
    facts = f"one variant brings {time.lane_tokens:,} tokens per micro-step, the {device}'s ridge is near {time.ridge_tokens:,}"
    if time.packing_gain < WORTHWHILE:
        still = "it still saves memory, start-up and the wait for a first ranking" if slots > 1 else "here nothing is packed"
        return f"packing will not make the steps themselves faster ({facts}); {still}"
    if slots == 1:
        return f"a pack of two would make steps about {time.packing_gain:.1f} times faster ({facts}); here nothing is packed"
    return f"packing makes steps about {time.packing_gain:.1f} times faster than one variant after the other ({facts})"
