"""How many variants a body hosts at once, where `body.slots: auto` leaves it open. Plain arithmetic, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from chrysalis_ray.config.population import HyperBand, Pb2, Pbt, Population
from chrysalis_ray.config.population_checks import largest_rank
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.training.passes import LONG_ENOUGH, long_enough
from chrysalis_ray.training.planning.alone import adapter_parameters
from chrysalis_ray.training.planning.duration import bodies_of, steps_of, turns_of
from chrysalis_ray.training.planning.footprint import has_room, held_tokens, lane_tokens, slot_bytes, worker_memory
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.measured import Measurement
from chrysalis_ray.training.planning.pace import Pace, guess_pace
from chrysalis_ray.training.planning.shapes import ModelShape

# Packing is worth its name from this gain in time on; slots beyond it are taken only for another tenth.
WORTHWHILE = 1.1
# Slots that `body.slots: auto` means while nothing is known of the base.
SLOTS_UNKNOWN = 8


def pace_of(loaded: LoadedExperiment, hardware: Hardware, shape: ModelShape, measured: Measurement | None) -> Pace:
    """How fast a worker of this experiment is: as measured, else as guessed."""
    held = loaded.body.tokens_per_pass
    if measured is not None:
        return replace(measured.pace, tokens_per_pass=held)
    adapter = adapter_parameters(shape, loaded.blueprint, largest_rank(loaded))
    length = loaded.blueprint.lanes.sequence_length
    return replace(guess_pace(shape, loaded.body, hardware, adapter, length, slot_bytes(shape, loaded)), tokens_per_pass=held)


@dataclass(frozen=True)
class SlotChoice:
    """How many slots, and why; `why` is empty where the number was written by a person."""

    slots: int
    why: str = ""


def settle(
    loaded: LoadedExperiment, hardware: Hardware, shape: ModelShape | None, measured: Measurement | None
) -> tuple[LoadedExperiment, SlotChoice]:
    """`loaded` with passes as long as pays and memory allows, and the slots of its body.

    Passes are left as they are where somebody wrote how long they are, and where one holds all variants anyway.
    """
    if loaded.body.tokens_per_pass or shape is None or loaded.blueprint.worn.solo:
        return loaded, choose_slots(loaded, hardware, shape, measured)
    strict = loaded.body.virtual_workers is not None  # how many workers there are must not be felt
    pace = pace_of(loaded, hardware, shape, measured)
    tokens = LONG_ENOUGH if strict else long_enough(pace.ridge(loaded.blueprint.lanes.sequence_length), pace.kind)
    held = loaded.with_body(tokens_per_pass=tokens)
    choice = choose_slots(held, hardware, shape, measured)
    slots = min(choice.slots, math.ceil(loaded.experiment.population.variants / bodies_of(loaded)))
    while (
        not strict
        and tokens > lane_tokens(loaded)
        and not has_room(held.body, worker_memory(shape, held, slots, measured), hardware)
    ):
        tokens //= 2
        held = loaded.with_body(tokens_per_pass=tokens)
    return (held if held_tokens(held, slots) < held_tokens(loaded, slots) else loaded), choice


def choose_slots(
    loaded: LoadedExperiment, hardware: Hardware, shape: ModelShape | None, measured: Measurement | None
) -> SlotChoice:
    """The slots of the body: as written, or for `auto` the fewest that are nearly as fast as any number that fits.

    A turn of n variants trains a chunk, scores and keeps seeds. The numbers 1, 2, 4 ... up to what the searcher and the
    scheduler allow are compared by seconds per variant. One is the answer where packing would not save a tenth of them.
    """
    written, population = loaded.body.slots, loaded.experiment.population
    if loaded.blueprint.worn.solo:
        return SlotChoice(1)
    if written != "auto":
        return SlotChoice(written or 1)
    allowed = allowed_slots(population, bodies_of(loaded))
    if shape is None:
        return SlotChoice(min(SLOTS_UNKNOWN, allowed[-1]), "the sizes of the base are not known yet")
    if measured is not None and measured.slots < measured.asked:
        allowed = [slots for slots in allowed if slots <= measured.slots] or allowed[:1]
    needs = {slots: worker_memory(shape, loaded, slots, measured) for slots in allowed}
    fitting = [slots for slots in allowed if has_room(loaded.body, needs[slots], hardware)] or allowed[:1]
    pace, chunk = pace_of(loaded, hardware, shape, measured), steps_of(loaded)[1]
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
