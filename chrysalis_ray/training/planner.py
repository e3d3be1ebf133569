"""What an experiment would build, before anything is built: steps, bodies, memory, time. Plain arithmetic, no torch.

Figures are estimates with their assumptions beside them. Memory errs upwards; time is given as a span, because how many
variants a scheduler stops early is not known before they have trained.
"""

from __future__ import annotations

import math
from dataclasses import replace

from chrysalis_ray.config.blueprint import BodyPatch, EmbeddedBase
from chrysalis_ray.config.checks import domains_of
from chrysalis_ray.config.population import Asha, LevelMixes, Population
from chrysalis_ray.config.population_checks import largest_rank, rows_at_once, search_ranges, step_sizes
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.records import MOMENTS
from chrysalis_ray.training.hardware import GIB, Hardware
from chrysalis_ray.training.plan import Memory, Plan, Time, gib
from chrysalis_ray.training.shapes import ModelShape, shape_of

# Bytes per LoRA parameter and slot: fp32 weight and gradient, and what each moment of the optimizer adds.
BANK_BYTES, MOMENT_BYTES = 8, 4
# Rows of logits formed at once (fp32 logits and their gradient), so that the full logits never exist.
LOGITS_CHUNK = 1024
# A worker before it holds anything: a CUDA context, or Python with torch and Ray.
GPU_CONTEXT, CPU_PROCESS = int(0.6 * GIB), int(0.7 * GIB)
# A safety margin on what may be used.
USABLE = 0.92

# Effective FLOP/s of small fp32 matrix products per CPU thread, and seconds per layer and micro-step lost on dispatch.
CPU_FLOPS_PER_THREAD, CPU_LAYER_SECONDS = 25e9, 2e-3
# Share of a GPU's dense bf16 peak that LoRA training reaches, and the launch floor: 6,400 operations of 28 layers in 40 ms.
GPU_EFFICIENCY, GPU_LAYER_SECONDS = 0.45, 0.040 / 28
# Memory-bound operations: 2.6 us per token for 28 layers of width 1,024 on an H100.
GPU_SECONDS_PER_ELEMENT = 2.6e-6 / (28 * 1024)
# Dense bf16 peaks in FLOP/s, from the makers' data sheets.
GPU_PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "T4": 65e12, "V100": 125e12,
}  # fmt: skip
UNKNOWN_GPU_PEAK = 100e12
# What ZeRO-3 gathers with, in bytes per second and worker: NVLink inside a node, InfiniBand between nodes, gloo on CPUs.
LINK_NVLINK, LINK_BETWEEN_NODES, LINK_GLOO, GPUS_PER_NODE = 200e9, 40e9, 1e9, 8
# Before and after training: starting Ray, sealing and tokenising the genome, writing cards and the report.
OVERHEAD_SECONDS = 30.0


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


def plan(loaded: LoadedExperiment, hardware: Hardware) -> Plan:
    """What `loaded` would build on `hardware`. Raises ModelError if the base's config.json is broken."""
    loaded = with_largest_steps(loaded)
    population, lanes, body = loaded.experiment.population, loaded.blueprint.lanes, loaded.body
    steps, chunk = optimizer_steps(
        population.tokens_per_variant, lanes.rows_per_step, lanes.sequence_length, population.reports
    )
    shape, rank = shape_of(loaded.base), largest_rank(loaded)
    slots = min(body.slots or 1, population.variants)
    bodies = math.ceil(population.variants / slots)
    memory = worker_memory(shape, loaded, slots) if shape else None
    at_once, obstacles = _admit(body, memory, hardware, bodies)
    tokens = steps * lanes.rows_per_step * lanes.sequence_length
    time = _time(shape, loaded, hardware, slots, math.ceil(bodies / max(at_once, 1)), steps) if shape else None
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
        obstacles=tuple(obstacles),
        notes=tuple(_notes(loaded, shape, time, population.tokens_per_variant - tokens)),
    )


def with_largest_steps(loaded: LoadedExperiment) -> LoadedExperiment:
    """`loaded` with the lanes of its largest searched step: what costs most at once, and what takes the fewest steps."""
    search, lanes = loaded.experiment.population.search, loaded.blueprint.lanes
    if search.rows_per_step is None:
        return loaded
    largest = {"rows_per_step": step_sizes(search, lanes)[-1], "rows_per_microstep": rows_at_once(loaded)}
    return replace(loaded, blueprint=loaded.blueprint.model_copy(update={"lanes": lanes.model_copy(update=largest)}))


# memory -------------------------------------------------------------------------------------------------------------


def worker_memory(shape: ModelShape, loaded: LoadedExperiment, slots: int) -> Memory:
    """Bytes on one worker that hosts `slots` variants, all of them training at once."""
    body, lanes = loaded.body, loaded.blueprint.lanes
    workers, width = body.workers or 1, 2 if body.precision == "bf16" else 4
    whole = shape.parameters * width
    shard, gathered = whole, 0
    if body.zero_stage == 3:  # a shard, and two layers (or the embedding) gathered: the one at work and the one fetched ahead
        shard = math.ceil(whole / workers)
        gathered = max(2 * shape.layer_parameters, shape.embedding_parameters) * width
    offloaded = shard if body.offload == "cpu" else 0
    rows = (lanes.rows_per_microstep or lanes.rows_per_step) / workers
    tokens = math.ceil(slots * rows * lanes.sequence_length)
    per_layer = shape.saved_elements * width
    kept = shape.layers * shape.hidden * width + per_layer if body.activation_checkpointing else shape.layers * per_layer
    bank = slots * shape.lora_parameters(largest_rank(loaded), loaded.blueprint.lora.targets) * bank_bytes(loaded)
    on_gpu = (body.gpus_per_worker or 0) > 0
    return Memory(
        base=shard - offloaded + gathered,
        bank=bank,
        activations=tokens * kept,
        logits=min(tokens, LOGITS_CHUNK) * shape.vocabulary * 8,
        process=GPU_CONTEXT if on_gpu else CPU_PROCESS,
        host=CPU_PROCESS + offloaded if on_gpu else 0,
    )


def bank_bytes(loaded: LoadedExperiment) -> int:
    """Bytes per LoRA parameter and slot, by the most demanding optimizer that a variant can have."""
    drawn = loaded.experiment.population.search.optimizer
    kinds = [loaded.blueprint.optimizer.type, *(getattr(drawn, "values", ()))]
    return BANK_BYTES + MOMENT_BYTES * max(len(MOMENTS[str(kind)]) for kind in kinds)


def _admit(body: BodyPatch, memory: Memory | None, hardware: Hardware, bodies: int) -> tuple[int, list[str]]:
    """(bodies that stand at once, what stands in the way)."""
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
    return max(at_once, 0), obstacles


def _admit_memory(body: BodyPatch, memory: Memory, hardware: Hardware, at_once: int, obstacles: list[str]) -> int:
    workers, gpus = body.workers or 1, body.gpus_per_worker or 0.0
    remedy = (
        "lower body.slots or lanes.rows_per_microstep, set activation_checkpointing: true, or raise workers with zero_stage: 3"
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


# time ---------------------------------------------------------------------------------------------------------------


def _time(shape: ModelShape, loaded: LoadedExperiment, hardware: Hardware, slots: int, waves: int, steps: int) -> Time:
    lanes, body = loaded.blueprint.lanes, loaded.body
    workers = body.workers or 1
    adapter = shape.lora_parameters(largest_rank(loaded), loaded.blueprint.lora.targets)
    flops = shape.training_flops(adapter, lanes.sequence_length)
    if body.activation_checkpointing:
        flops += shape.forward_flops(lanes.sequence_length)
    speed, floor, per_token = _device(shape, body, hardware)
    token_seconds = flops / speed + per_token
    lane = lanes.rows_per_step / lanes.microsteps * lanes.sequence_length / workers

    def step(variants: float) -> float:
        return lanes.microsteps * max(floor, variants * lane * token_seconds)

    least_share = _stopped_share(loaded)
    packed = steps * step(slots) * waves
    base = loaded.base
    pretraining = 1.5 * flops / speed * base.pretrain_tokens if isinstance(base, EmbeddedBase) else 0.0
    return Time(
        train_least=max(packed * least_share, steps * lanes.microsteps * floor * waves),
        train_most=packed,
        pretrain=pretraining,
        judge=_judged_tokens(loaded) * shape.forward_flops(lanes.sequence_length) / (speed * workers),
        overhead=OVERHEAD_SECONDS,
        ridge_tokens=max(round(floor / token_seconds), 1),
        lane_tokens=round(lane),
        packing_gain=slots * step(1) / step(slots),
        assumption=_assumption(body, hardware),
    )


def _device(shape: ModelShape, body: BodyPatch, hardware: Hardware) -> tuple[float, float, float]:
    """(FLOP/s of one worker, seconds that a micro-step takes at least, seconds per token beside the FLOPs)."""
    gathering = _gather_seconds(shape, body)
    if (body.gpus_per_worker or 0) > 0:
        peak = _peak(hardware)
        share = min(body.gpus_per_worker or 1.0, 1.0)
        speed = peak * GPU_EFFICIENCY * share * (1.0 if body.precision == "bf16" else 0.5)
        slower = GPU_PEAKS["H100"] / peak
        floor = max(GPU_LAYER_SECONDS * shape.layers, gathering)
        return speed, floor, GPU_SECONDS_PER_ELEMENT * shape.layers * shape.hidden * slower
    wanted = body.threads or math.ceil(body.cpus_per_worker or 1)
    threads = max(min(wanted, hardware.cpus / (body.workers or 1)), 1)
    # A CPU step takes at least as long as reading the base from memory, worth about 30 tokens of computing, or the dispatch.
    reading = 30 * shape.forward_flops(1) * 2 / (CPU_FLOPS_PER_THREAD * threads)
    return CPU_FLOPS_PER_THREAD * threads, max(reading, CPU_LAYER_SECONDS * shape.layers, gathering), 0.0


def _peak(hardware: Hardware) -> float:
    """Dense bf16 peak of the GPUs in FLOP/s; an H100's where there are none, a modest one's where the name is unknown."""
    if not hardware.gpus:
        return GPU_PEAKS["H100"]
    return next((peak for name, peak in GPU_PEAKS.items() if name in hardware.gpu_name), UNKNOWN_GPU_PEAK)


def _gather_seconds(shape: ModelShape, body: BodyPatch) -> float:
    """Seconds per micro-step in which ZeRO-3 gathers the base: forward, backward, and once more where activations are redone.

    The same for any number of variants: packing N of them divides it by N.
    """
    workers = body.workers or 1
    if body.zero_stage != 3:
        return 0.0
    link = LINK_GLOO
    if (body.gpus_per_worker or 0) > 0:
        link = LINK_NVLINK if workers <= GPUS_PER_NODE else LINK_BETWEEN_NODES
    times = 3 if body.activation_checkpointing else 2
    return times * shape.parameters * (2 if body.precision == "bf16" else 4) * (1 - 1 / workers) / link


def _assumption(body: BodyPatch, hardware: Hardware) -> str:
    if not (body.gpus_per_worker or 0):
        return f"{CPU_FLOPS_PER_THREAD / 1e9:.0f} GFLOP/s per CPU thread"
    which = hardware.gpu_name if hardware.gpus else "an H100 (there is no GPU here)"
    return f"{GPU_EFFICIENCY:.0%} of {_peak(hardware) / 1e12:.0f} TFLOP/s of {which or 'an unknown GPU'}"


def _stopped_share(loaded: LoadedExperiment) -> float:
    """Share of all variant steps that remain if halving stops exactly 1 - 1/factor at each rung; 1 for other schedulers."""
    population = loaded.experiment.population
    scheduler, alive = population.scheduler, float(population.variants)
    if not isinstance(scheduler, Asha):
        return 1.0
    spent, last, rung = 0.0, 0.0, float(scheduler.grace_reports)
    while rung < population.reports:
        spent, last = spent + alive * (rung - last), rung
        alive, rung = max(alive / scheduler.reduction_factor, 1.0), rung * scheduler.reduction_factor
    return (spent + alive * (population.reports - last)) / (population.variants * population.reports)


def _judged_tokens(loaded: LoadedExperiment) -> int:
    """Tokens judged: every variant and merge on *select*, the seed and the chosen one on *report*; and in the reports."""
    evaluate, population = loaded.experiment.evaluate, loaded.experiment.population
    domains, length = len(domains_of(loaded.experiment.genome)), loaded.blueprint.lanes.sequence_length
    final = (population.variants + len(loaded.experiment.merge) + 4) * evaluate.rows_per_domain
    running = population.variants * population.reports * evaluate.rows_per_report
    return (final + running) * domains * length


# words --------------------------------------------------------------------------------------------------------------


def _notes(loaded: LoadedExperiment, shape: ModelShape | None, time: Time | None, unused: int) -> list[str]:
    notes = []
    body, variants = loaded.body, loaded.experiment.population.variants
    if shape is None:
        model = getattr(loaded.base, "model", "")
        notes.append(
            f"memory and time follow once the config.json of {model} is on this machine (a folder, or the hub's cache)"
        )
    notes.append(_search_note(loaded.experiment.population))
    if loaded.experiment.population.search.rows_per_step:
        sizes = ", ".join(map(str, step_sizes(loaded.experiment.population.search, loaded.blueprint.lanes)))
        notes.append(f"steps of {sizes} rows: the steps told here are the largest; a report is equally many tokens for all")
    if time is not None:
        notes.append(_packing_note(time, (body.gpus_per_worker or 0) > 0))
    if (body.slots or 1) > variants:
        notes.append(f"{body.slots} slots for {variants} variants: {(body.slots or 1) - variants} stay empty")
    if unused:
        notes.append(f"{unused:,} tokens per variant are left over: chunks are whole optimizer steps, and reports whole chunks")
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
    if time.packing_gain < 1.1:
        still = "memory, start-up and the wait for a first ranking"
        return f"packing will not make the steps themselves faster ({facts}); it still saves {still}"
    return f"packing makes steps about {time.packing_gain:.1f} times faster than one variant after the other ({facts})"
