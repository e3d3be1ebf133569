"""What a worker holds in memory, and whether this machine has room for it. Plain arithmetic, no torch.

Estimates err upwards. Where the machine was measured, its own figures stand in their place.
"""

from __future__ import annotations

import math

from chrysalis_ray.config.blueprint import BodyPatch
from chrysalis_ray.config.population_checks import largest_rank
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.records import MOMENTS
from chrysalis_ray.training.passes import logits_chunk, shards_of, tokens_at_once
from chrysalis_ray.training.planning.alone import adapter_parameters, held_beside, kept_activations
from chrysalis_ray.training.planning.hardware import GIB, Hardware
from chrysalis_ray.training.planning.judged import heard_bytes, judged_bytes
from chrysalis_ray.training.planning.measured import Measurement
from chrysalis_ray.training.planning.plan import Memory, gib
from chrysalis_ray.training.planning.shapes import ModelShape

# Bytes per LoRA parameter and slot: fp32 weight and gradient, and what each moment of the optimizer adds.
BANK_BYTES, MOMENT_BYTES = 8, 4
# A worker before it holds anything: a CUDA context, or Python with torch and Ray.
GPU_CONTEXT, CPU_PROCESS = int(0.6 * GIB), int(0.7 * GIB)
# What Ray adds to a process that has imported all else a worker imports, which is where a measurement begins.
RAY_IN_A_WORKER = 160 << 20
# Shards of a parameter that DeepSpeed holds at once of a base that lies on a disk.
NVME_BUFFERS = 5
# Copies of one layer's gradients of all slots, where gradients are sharded: where they are made, sent from and received.
LAYER_COPIES = 3
# A safety margin on what may be used.
USABLE = 0.92


def worker_memory(shape: ModelShape, loaded: LoadedExperiment, slots: int, measured: Measurement | None = None) -> Memory:
    """Bytes on one worker that hosts `slots` variants, all of them training at once, or judging: whatever takes more."""
    if measured is not None:
        return _measured_memory(shape, loaded, slots, measured)
    body = loaded.body
    workers, width = body.workers or 1, 2 if body.precision == "bf16" else 4
    whole = shape.parameters * width
    shard, gathered = whole, 0
    if body.zero_stage == 3:  # a shard, and two layers (or the embedding) gathered: the one at work and the one fetched ahead
        shard = math.ceil(whole / workers)
        gathered = max(2 * shape.layer_parameters, shape.embedding_parameters) * width
    offloaded = shard if body.offload in ("cpu", "nvme") else 0
    buffers = NVME_BUFFERS * max(shape.embedding_parameters, shape.layer_parameters) * width // workers
    in_memory = offloaded if body.offload == "cpu" else buffers if body.offload == "nvme" else 0
    tokens = math.ceil(held_tokens(loaded, slots))
    per_layer = shape.saved_elements * width
    kept = shape.layers * shape.hidden * width + per_layer if body.activation_checkpointing else shape.layers * per_layer
    on_gpu = (body.gpus_per_worker or 0) > 0
    return Memory(
        base=shard - offloaded + gathered + held_beside(shape, loaded.blueprint) * width,
        bank=bank_memory(shape, loaded, slots),
        activations=round(tokens * kept * kept_activations(loaded.blueprint.worn, body.precision)),
        logits=min(tokens, logits_chunk(shape.vocabulary, on_gpu=on_gpu)) * shape.vocabulary * 8,  # raw ones, and in fp32
        process=GPU_CONTEXT if on_gpu else CPU_PROCESS,
        host=CPU_PROCESS + in_memory + heard_bytes(shape, loaded) if on_gpu else 0,
        judging=0 if on_gpu else judged_bytes(shape, loaded, slots),
    )


def _measured_memory(shape: ModelShape, loaded: LoadedExperiment, slots: int, measured: Measurement) -> Memory:
    """The same from a measurement; what logits take is part of what a token was seen to take.

    It was taken with the blueprint's optimizer: a variant may draw one that remembers more. What a kind of adapter other than
    LoRA has to remember is known from there alone.
    """
    on_gpu, held = (loaded.body.gpus_per_worker or 0) > 0, measured.holding
    told = bank_memory(shape, loaded, slots) if loaded.blueprint.adapter is None else 0
    return Memory(
        base=held.base,
        bank=max(slots * held.per_slot, told),
        activations=round(held_tokens(loaded, slots) * held.per_token),
        logits=0,
        process=held.process + (0 if on_gpu else RAY_IN_A_WORKER),
        host=CPU_PROCESS + heard_bytes(shape, loaded) if on_gpu else 0,
        judging=0 if on_gpu else judged_bytes(shape, loaded, slots),
    )


def held_tokens(loaded: LoadedExperiment, slots: int) -> float:
    """Tokens of so many variants whose activations stand at once on one worker."""
    body = loaded.body
    return tokens_at_once(slots, lane_tokens(loaded), body.tokens_per_pass, shards_of(body), body.lanes == "fixed")


def lane_tokens(loaded: LoadedExperiment) -> float:
    """Tokens that one variant brings to a micro-step, on one worker."""
    lanes = loaded.blueprint.lanes
    return (lanes.rows_per_microstep or lanes.rows_per_step) / (loaded.body.workers or 1) * lanes.sequence_length


def bank_memory(shape: ModelShape, loaded: LoadedExperiment, slots: int) -> int:
    """Bytes of so many slots on one worker: weights of all and moments of its own, and gradients of all or of its own."""
    each, workers = slot_bytes(shape, loaded), loaded.body.workers or 1
    plain = each * BANK_BYTES // bank_bytes(loaded)
    if loaded.body.gradients == "whole" or workers == 1:
        return slots * plain + shared_out(slots, workers) * (each - plain)
    gradient = plain // 2
    layer = LAYER_COPIES * slots * math.ceil(gradient / shape.layers)
    return slots * (plain - gradient) + shared_out(slots, workers) * (each - plain + gradient) + layer


def shared_out(slots: int, workers: int) -> int:
    """The most slots whose optimizer one of several workers keeps."""
    return math.ceil(slots / workers)


def slot_bytes(shape: ModelShape, loaded: LoadedExperiment) -> int:
    """Bytes of one slot: weights, gradients, moments."""
    return adapter_parameters(shape, loaded.blueprint, largest_rank(loaded)) * bank_bytes(loaded)


def bank_bytes(loaded: LoadedExperiment) -> int:
    """Bytes per LoRA parameter and slot, by the most demanding optimizer that a variant can have."""
    drawn = loaded.experiment.population.search.optimizer
    kinds = [loaded.blueprint.optimizer.type, *(getattr(drawn, "values", ()))]
    return BANK_BYTES + MOMENT_BYTES * max(len(MOMENTS[str(kind)]) for kind in kinds)


def admit(body: BodyPatch, memory: Memory | None, hardware: Hardware, bodies: int) -> tuple[int, list[str]]:
    """(bodies of those wanted that have room at once, what stands in the way)."""
    workers, gpus, cpus = body.workers or 1, body.gpus_per_worker or 0.0, body.cpus_per_worker or 1.0
    obstacles = []
    at_once = min(bodies, int(hardware.cpus / (workers * cpus)))
    if at_once < 1:
        obstacles.append(f"a body needs {workers * cpus:g} CPU cores (workers {workers} x {cpus:g}), there are {hardware.cpus}")
    if gpus > 0:
        at_once = min(at_once, int(hardware.gpus / (workers * gpus)))
        if hardware.gpus < workers * gpus:
            obstacles.append(f"a body needs {workers * gpus:g} GPUs (workers {workers} x {gpus:g}), there are {hardware.gpus}")
    if memory is not None:
        at_once = _admit_memory(body, memory, hardware, at_once, obstacles)
    if at_once < bodies and not obstacles:
        obstacles.append(f"of {bodies} bodies {at_once} have room on this machine at once; lower body.count to {at_once}")
    return max(at_once, 0), obstacles


def has_room(body: BodyPatch, memory: Memory, hardware: Hardware) -> bool:
    """Whether one such body fits into the memory of this machine, whatever else it lacks."""
    obstacles: list[str] = []
    _admit_memory(body, memory, hardware, 1, obstacles)
    return not obstacles


def _admit_memory(body: BodyPatch, memory: Memory, hardware: Hardware, at_once: int, obstacles: list[str]) -> int:
    workers, gpus = body.workers or 1, body.gpus_per_worker or 0.0
    remedy = (
        "lower body.slots, body.tokens_per_pass or lanes.rows_per_microstep, set activation_checkpointing: true, or raise "
        "workers with zero_stage: 3"
    )
    if gpus > 0:
        room = hardware.gpu_memory * USABLE * min(gpus, 1.0)
        if hardware.gpus and memory.total > room:
            obstacles.append(
                f"a worker needs {gib(memory.total)}, a GPU gives {gib(room)} of {gib(hardware.gpu_memory)}; {remedy}"
            )
        host = memory.host * workers
    else:
        host = memory.total * workers
    room = hardware.memory * USABLE
    if host > room:
        obstacles.append(f"a body needs {gib(host)} of main memory, there are {gib(room)}; {remedy}")
    return min(at_once, int(room / host)) if host else at_once
