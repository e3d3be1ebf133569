"""What judging holds beside base and bank, when what training held is let go of. Plain arithmetic, no torch; it errs upwards.

heard     what the head is given of all candidates, for so many rows as are kept at a time (`evaluate/listener.py`)
worn      one layer of a candidate for each thread (`worn.py`)
passes    hidden states before and after a layer, those of the turn before, and who may look at whom
"""

from __future__ import annotations

import math

from chrysalis_ray.config.checks import domains_of
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.training.passes import LANE_TOKENS, SCORED_TOKENS, WORN, most_kept, shards_of, variants_per_pass
from chrysalis_ray.training.planning.shapes import ModelShape

FP32 = 4
STANDING = 3  # hidden states of every token of a pass
# Held-out rows of each slot in one pass of scoring (`evaluate/heldout.py`).
SCORED_ROWS = 8


def judged_bytes(shape: ModelShape, loaded: LoadedExperiment, slots: int) -> int:
    """Bytes that judging takes on a worker that computes on a CPU."""
    body, length = loaded.body, loaded.blueprint.lanes.sequence_length
    in_turns = body.zero_stage != 3 and body.lanes != "fixed" and loaded.blueprint.worn.solo is None
    lane = max(SCORED_ROWS * length, LANE_TOKENS) if in_turns else SCORED_ROWS * length
    shards, held = shards_of(body), body.tokens_per_pass and body.tokens_per_pass * SCORED_TOKENS
    if in_turns:
        held = min(WORN, held or WORN)
    tokens = shards * lane * variants_per_pass(math.ceil(slots / shards), lane, held)
    worn = shards * shape.layer_parameters if in_turns and body.precision != "bf16" else 0
    return heard_bytes(shape, loaded) + FP32 * (tokens * (STANDING * shape.hidden + length) + worn)


def heard_bytes(shape: ModelShape, loaded: LoadedExperiment) -> int:
    """Bytes that a worker keeps of all candidates while they are compared: nothing where nobody is."""
    experiment, on_gpu = loaded.experiment, (loaded.body.gpus_per_worker or 0) > 0
    variants = experiment.population.variants
    if loaded.blueprint.worn.solo or variants < 2:
        return 0
    row = FP32 * (1 + variants + len(experiment.merge)) * loaded.blueprint.lanes.sequence_length * shape.hidden
    rows = math.ceil(len(domains_of(experiment.genome)) * experiment.evaluate.rows_per_domain / (loaded.body.workers or 1))
    return min(rows * row, max(row, most_kept(on_gpu=on_gpu)))
