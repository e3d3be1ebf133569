"""The two sides of `ridge.py`: N variants as a run trains them, and N PEFT adapters one after the other, on the same rows.

Ours is `train_chunk`, as a worker of a body calls it: forks or threads, partners for a lone variant, passes as the planner
chooses them, rows drawn from each variant's mix, clip, optimizer, schedule. PEFT's rows lie ready. A chunk has a few steps,
where a real one has dozens: what a chunk costs beside its steps counts for more here than in a run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packing import ALPHA, CLIP, LEARNING_RATE, RANK, TARGETS, Place, Shape

from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.measuring import DOMAIN, synthetic_tokens
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.partners import groups
from chrysalis_ray.training.passes import splits
from chrysalis_ray.training.step import train_chunk

ROW = 256  # tokens of a row; a lane of fewer tokens is one row
READY = 8  # steps whose rows PEFT finds ready, again and again

Chunk = Callable[[int], list[float]]  # makes so many steps of every variant; their mean losses


def variant(index: int, tokens: int) -> Variant:
    """Number `index`, with rows of its own and `tokens` of them in a step."""
    length = min(ROW, tokens)
    settings = Hyperparameters(rank=RANK, alpha=ALPHA, learning_rate=LEARNING_RATE, weight_decay=0.0, clip=CLIP)
    return Variant(
        variant_id=f"r{index:03d}", index=index, rng_seed=index, seed_sha256="0" * 64, genome_id=DOMAIN, base_sha256="0" * 64,
        hyperparameters=settings, epigenome=Epigenome({DOMAIN: 1.0}), steps=1_000_000, chunk_steps=1,
        rows_per_step=tokens // length, sequence_length=length,
    )  # fmt: skip


class Ours(NamedTuple):
    """A pack that trains: `form` tells in words how its variants share the cores, `shared` whether a lone one has several."""

    train: Chunk
    form: Callable[[], str]
    shared: Callable[[], bool]


def packed(folder: Path, shape: Shape, variants: int, tokens: int, place: Place, threads: int, held: int) -> Ours:
    """A pack of `variants` on `threads`, in passes of at most `held` tokens."""
    engine = make_engine(0, "none", place.precision, place.device)
    model = load_base(folder, place.precision)
    pack = Pack(model, TARGETS, variants, RANK, engine, threads=threads, tokens_per_pass=held)
    generator = torch.Generator().manual_seed(2)
    for slot in range(variants):
        tensors = {}
        for target in pack.bank.targets:
            a_ri = torch.randn(RANK, target.in_features, generator=generator) / target.in_features**0.5
            tensors[f"weight/{target.name}.lora_A"] = a_ri
            tensors[f"weight/{target.name}.lora_B"] = torch.zeros(target.out_features, RANK)
        pack.place(slot, variant(slot, tokens), tensors, {"optimizer_step": 0})
    slots, store = list(range(variants)), synthetic_tokens(min(ROW, tokens), shape.vocabulary)
    shards = pack.shards

    def train(steps: int) -> list[float]:
        torch.set_num_threads(1 if len(shards.all) > 1 else threads)  # as a worker does
        return [told.train_loss or 0.0 for told in train_chunk(pack, slots, store, steps)]

    def partners() -> int:
        most = tokens // min(ROW, tokens) if shards.may_share else 1
        return len(groups(len(shards.live), len(shards.all), most)[0])

    def inside() -> int:
        several = shards.apart is None and splits(pack.bank.widest, tokens) and len(shards.all) > 1
        return threads // len(shards.live) if several else 1

    def form() -> str:
        if place.device.type != "cpu":
            return "one pass after the other"
        if partners() > 1:
            return f"{partners()} processes share each variant's rows"
        kind = "thread" if shards.apart is None else "process"
        many = f"{len(shards.live)} {kind}{'es' if kind == 'process' else 's'}" if len(shards.live) > 1 else f"one {kind}"
        return many if inside() == 1 else f"{many}, {inside()} threads in an operation"

    return Ours(train, form, lambda: partners() > 1 or (variants == 1 and inside() > 1))


def sequential(folder: Path, shape: Shape, variants: int, tokens: int, place: Place, threads: int) -> Chunk:
    """PEFT adapters on one base in memory, each with its own AdamW, stepped one after the other with `threads` in every
    operation. They share the base's tensors, which is kinder to memory and caches than N scripts would be."""
    from peft import LoraConfig, get_peft_model

    base: Any = load_base(folder, place.precision)
    base.to(place.device)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    model: Any = get_peft_model(base, config, "v0")
    for index in range(1, variants):
        model.add_adapter(f"v{index}", config)
    own = [[p for name, p in model.named_parameters() if f".v{index}." in name] for index in range(variants)]
    optimizers = [torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True) for parameters in own]
    store = synthetic_tokens(min(ROW, tokens), shape.vocabulary)
    ready = []
    for index in range(variants):
        batches = [store.batch(step.rows, "train") for step in Feed(variant(index, tokens), store).steps(0, READY)]
        arrays = [(batch.input_ids, batch.position_ids, batch.labels) for batch in batches]
        ready.append([tuple(torch.from_numpy(array).to(place.device) for array in three) for three in arrays])
    made = 0

    def train(steps: int) -> list[float]:
        nonlocal made
        torch.set_num_threads(threads)
        losses = [0.0] * variants
        for index in range(variants):
            model.set_adapter(f"v{index}")
            for number in range(made, made + steps):
                ids_RT, positions_RT, labels_RT = ready[index][number % READY]
                logits = model(input_ids=ids_RT, position_ids=positions_RT, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_RT.flatten())
                optimizers[index].zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(own[index], CLIP)
                optimizers[index].step()
                losses[index] += loss.item() / steps
        made += steps
        return losses

    return train
