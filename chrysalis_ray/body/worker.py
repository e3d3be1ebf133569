"""What every worker of a body runs: hold the base, take turns, hand in results.

    load the frozen base, build the bank
    while there is a turn:
        train   place the variants that asked, train one chunk together, harvest their seeds
        judge   place adapters, score held-out rows in one packed pass

The worker does not know about Tune, schedulers or how many variants there are in all; it takes what a turn says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from chrysalis_ray.body.context import BodyContext, visible
from chrysalis_ray.body.morphology import Morphology
from chrysalis_ray.body.turn import Judged, Outcome, Turn, Work
from chrysalis_ray.core.collecting import no_garbage
from chrysalis_ray.core.errors import ChrysalisError, VariantLost
from chrysalis_ray.core.patterns import PLAIN, Patterns
from chrysalis_ray.core.postponed import PLAIN_MODELS, postponed
from chrysalis_ray.core.store import Store

if TYPE_CHECKING:
    from chrysalis_ray.config.adapters import PeftAdapter
    from chrysalis_ray.config.blueprint import Lora
    from chrysalis_ray.evaluate.heldout import DocumentScore
    from chrysalis_ray.genome.tokens import TokenStore
    from chrysalis_ray.seed.adapter import AdapterWeights
    from chrysalis_ray.training.pack import Pack


@dataclass(frozen=True)
class BodyPlan:
    """Everything a worker needs to build its part of a body; paths are on storage that all nodes share."""

    morphology: Morphology
    base_folder: str
    tokens_folder: str
    seed_folder: str
    store_folder: str
    targets: tuple[str, ...]
    rank: int
    rows_per_microstep: int
    rows_per_report: int
    omega_name: str
    namespace: str
    number: int = 0  # which of the run's bodies
    solo: Lora | PeftAdapter | None = None  # of what kind the adapters are, where no pack can hold them
    patterns: Patterns = PLAIN  # modules whose ranks and alphas are their own

    def in_namespace(self, namespace: str) -> BodyPlan:
        """The same plan for workers that look for omega in this Ray namespace."""
        return replace(self, namespace=namespace)

    def of_body(self, number: int) -> BodyPlan:
        """The same plan for another body of the run."""
        return replace(self, number=number)


def live(settings: dict[str, Any]) -> None:
    """The train loop given to Ray Train: one life of one worker."""
    plan: BodyPlan = settings["plan"]
    context = BodyContext.enter(plan.omega_name, plan.namespace, plan.number)
    try:
        take_turns(plan, context)
    except ChrysalisError as error:  # another life would end the same way: say so instead of dying again and again
        context.give_up(error)


def take_turns(plan: BodyPlan, context: BodyContext) -> None:
    """Grow this worker's part of the body, then do what omega says until it says dissolve."""
    with no_garbage():
        flesh = grow(plan)
    flesh.progress_to(context.pulse())
    number = -1
    while True:
        turn = context.next_turn(after=number)
        number = turn.number
        if turn.kind == "dissolve":
            return
        if turn.kind == "train":
            started = time.perf_counter()
            outcomes = train_turn(flesh, turn, context.rank)
            context.commit(turn, outcomes, time.perf_counter() - started)
        else:
            context.judged(turn, judge_turn(flesh, turn))


@dataclass
class Flesh:
    """A worker's share of the body: the pack, the tokens, the store, and which position each slot holds."""

    plan: BodyPlan
    pack: Pack
    tokens: TokenStore
    store: Store
    zero: AdapterWeights
    residents: dict[str, int] = field(default_factory=dict)  # variant -> slot
    positions: dict[int, str] = field(default_factory=dict)  # slot -> position
    progress: Callable[[], None] = lambda: None  # called whenever the worker has got on

    def progress_to(self, progress: Callable[[], None]) -> None:
        """From now on `progress` is called after every pass, and for every seed that is kept."""
        self.progress = progress
        for shard in self.pack.shards.all:
            shard.progress = progress


def grow(plan: BodyPlan) -> Flesh:
    """Load the base once and build an empty bank beside it."""
    import torch

    morphology = plan.morphology
    plain = plan.solo is None and not morphology.compile and not morphology.zero_stage
    with postponed(PLAIN_MODELS) if plain else nullcontext():
        from chrysalis_ray.genome.tokens import open_tokens
        from chrysalis_ray.seed.adapter import read_adapter
        from chrysalis_ray.training.base import load_base
        from chrysalis_ray.training.engine import make_engine
        from chrysalis_ray.training.pack import Pack
        from chrysalis_ray.training.solo import SoloPack
        from chrysalis_ray.training.trunk import checkpoint_activations

    threads = morphology.threads or (1 if morphology.virtual_workers else torch.get_num_threads())
    torch.set_num_threads(threads)
    device = worker_device(morphology)
    with postponed(PLAIN_MODELS) if plain else nullcontext():  # transformers imports more when it reads a model
        model = load_base(visible(plan.base_folder), morphology.precision, morphology.quantization, morphology.attention)
    if morphology.activation_checkpointing:
        checkpoint_activations(model)
    virtual = morphology.virtual_workers
    disk = morphology.nvme_path
    engine = make_engine(morphology.zero_stage, morphology.offload, morphology.precision, device, virtual, disk)
    zero = read_adapter(visible(plan.seed_folder))
    if plan.solo:
        pack: Pack = SoloPack(model, plan.solo, engine, morphology.lanes)
    else:
        shards = 1 if morphology.compile else threads  # compiled operations use the threads inside
        lanes, gradients, targets = morphology.lanes, morphology.gradients, tuple(zero.factors)
        held = morphology.tokens_per_pass
        pack = Pack(
            model,
            targets,
            morphology.slots,
            plan.rank,
            engine,
            lanes,
            threads=shards,
            gradients=gradients,
            tokens_per_pass=held,
            patterns=plan.patterns,
        )
    if morphology.compile:
        from chrysalis_ray.training.compiled import compile_layers  # it loads the compiler, which takes a second

        compile_layers(pack)
    if len(pack.shards.all) > 1:
        torch.set_num_threads(1)  # of this thread, which waits for those of the shards; they set their own
    return Flesh(
        plan=plan,
        pack=pack,
        tokens=open_tokens(visible(plan.tokens_folder)),
        store=Store(visible(plan.store_folder)),
        zero=zero,
    )


def worker_device(morphology: Morphology) -> Any:
    """The device Ray Train gave this worker, or the CPU."""
    import torch

    if morphology.gpus_per_worker <= 0:
        return torch.device("cpu")
    import ray.train.torch

    return ray.train.torch.get_device()


def train_turn(flesh: Flesh, turn: Turn, rank: int) -> list[Outcome]:
    """One chunk for every variant of the turn; rank 0 also puts the new seeds into the store."""
    from chrysalis_ray.evaluate.heldout import score_rows
    from chrysalis_ray.training.memory import peak_memory
    from chrysalis_ray.training.step import train_chunk

    slots = settle(flesh, turn.work)
    started = time.perf_counter()
    steps = [work.variant.chunk_steps for work in turn.work]
    metrics = train_chunk(flesh.pack, slots, flesh.tokens, steps, flesh.plan.rows_per_microstep)
    seconds = time.perf_counter() - started
    scores = score_rows(flesh.pack, slots, flesh.tokens, "select", flesh.plan.rows_per_report)
    peak = peak_memory(flesh.pack.engine.device)
    outcomes = []
    for work, slot, metric in zip(turn.work, slots, metrics, strict=True):
        flesh.positions[slot] = work.target
        flesh.progress()
        tensors, meta = flesh.pack.harvest(slot)
        described = {**meta, "variant": work.variant.to_json(), "position": work.target, "parent": work.origin}
        seed, ending = keep_seed(flesh.store, tensors, described) if rank == 0 else ("", {})
        row = {
            **metric.to_json(),
            **ending,
            "select_loss": mean_loss(scores[slot]),
            "seconds": seconds,
            "tokens_per_second": work.variant.chunk_steps * work.variant.tokens_per_step / seconds,
            "packed_with": len(turn.work) - 1,
            "peak_memory": peak,
        }
        outcomes.append(Outcome(work.target, seed, row))
    return outcomes


def keep_seed(store: Store, tensors: dict[str, Any], described: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The blob of a seed; for weights that are no numbers any more none, and how that variant ends: the others go on."""
    from chrysalis_ray.seed.soul import pack_seed

    try:
        return store.put(pack_seed(tensors, described)), {}
    except VariantLost as error:
        return "", {"state": "evicted", "reason": error.message}


def settle(flesh: Flesh, work: Sequence[Work]) -> list[int]:
    """Give every variant of the turn a slot that holds its origin: kept, copied from another slot, or read from the store."""
    taking = {item.variant.variant_id for item in work}
    for variant_id in [name for name in flesh.residents if name not in taking]:
        del flesh.residents[variant_id]  # its seed is in the store; its slot may be used
    free = [slot for slot in range(flesh.plan.morphology.slots) if slot not in flesh.residents.values()]
    holders = {position: slot for slot, position in flesh.positions.items()}
    copies = {
        item.origin: flesh.pack.harvest(holders[item.origin])
        for item in work
        if item.origin in holders and flesh.positions.get(flesh.residents.get(item.variant.variant_id, -1)) != item.origin
    }
    slots = []
    for item in work:
        slot = flesh.residents.get(item.variant.variant_id)
        if slot is None:
            slot = flesh.residents[item.variant.variant_id] = free.pop(0)
        if flesh.positions.get(slot) == item.origin:
            flesh.pack.reconfigure(slot, item.variant)
        else:
            tensors, meta = copies[item.origin] if item.origin in copies else read_origin(flesh, item)
            flesh.pack.place(slot, item.variant, tensors, meta)
        flesh.positions[slot] = item.origin
        slots.append(slot)
    return slots


def read_origin(flesh: Flesh, item: Work) -> tuple[dict[str, Any], dict[str, Any]]:
    """The seed this chunk starts from: adapter zero, or a blob of the store."""
    from chrysalis_ray.seed.soul import unpack_seed

    if item.seed is None:
        tensors = {}
        for module, (a_rank_in, b_out_rank) in flesh.zero.factors.items():
            tensors[f"weight/{module}.lora_A"] = a_rank_in
            tensors[f"weight/{module}.lora_B"] = b_out_rank
        return tensors, {"optimizer_step": 0}
    return unpack_seed(flesh.store.get(item.seed))


def judge_turn(flesh: Flesh, turn: Turn) -> Judged:
    """Score every candidate on the same held-out rows, or ask all the same questions. Nobody resides in the bank afterwards:
    its slots were used for it."""
    from chrysalis_ray.evaluate.judging import judge_candidates

    flesh.residents.clear()
    flesh.positions.clear()
    if turn.questions is not None:
        from chrysalis_ray.evaluate.asking import ask_candidates
        from chrysalis_ray.evaluate.questions import Reader

        decode = Reader(visible(flesh.plan.base_folder)).decode
        return ask_candidates(flesh.pack, turn.questions, turn.candidates, visible, decode)
    return judge_candidates(flesh.pack, flesh.tokens, turn.candidates, turn.split, turn.rows_per_domain, visible)


def mean_loss(scores: Sequence[DocumentScore]) -> float | None:
    """Mean over domains of the token-weighted loss, nats per token: the same number the verdict uses. None if not finite."""
    sums: dict[str, list[float]] = {}
    for score in scores:
        entry = sums.setdefault(score.domain, [0.0, 0.0])
        entry[0] += score.loss_sum
        entry[1] += score.tokens
    mean = sum(loss / tokens for loss, tokens in sums.values()) / len(sums)
    return mean if math.isfinite(mean) else None
