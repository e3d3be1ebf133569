"""One training step of N variants: packed in one pass against N sequential PEFT steps, both warm, in one process, without Ray.

    python benchmarks/packing.py
    python benchmarks/packing.py --variants 8 --lanes 64 256 1024 --json

Below the ridge a step is bound by what does not grow with its tokens (dispatch, and reading the base's weights), and N
variants share it; above it the arithmetic itself is what takes the time and a pack can save nothing. The base has random
weights: how long a step takes does not depend on them. Both sides do the same work; the losses are compared before any
clock runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import torch

from chrysalis_ray.config.blueprint import EmbeddedBase
from chrysalis_ray.config.loading import load_blueprint
from chrysalis_ray.config.resolve import BODY_FLOOR
from chrysalis_ray.core.records import write_json
from chrysalis_ray.training.lanes import MicroBatch, label
from chrysalis_ray.training.optimizer import SlotOptimizer, clip_slots, slot_norms
from chrysalis_ray.training.passes import long_enough
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.pace import guess_pace
from chrysalis_ray.training.planning.shapes import ModelShape

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TINY = HERE.parent / "blueprints" / "tiny.yaml"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, CLIP, LEARNING_RATE = 8, 16.0, 1.0, 1e-4


@dataclass(frozen=True)
class Shape:
    """Geometry of a Qwen3 base."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head: int
    intermediate: int
    vocabulary: int

    def sizes(self) -> ModelShape:
        """The same as the planner knows it."""
        return ModelShape(
            name="base",
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            key_value_heads=self.key_value_heads,
            head_size=self.head,
            intermediate=self.intermediate,
            vocabulary=self.vocabulary,
            tied=True,
        )


WIDE = Shape(1024, 6, 16, 8, 128, 3072, 8192)  # layers as wide as those of Qwen3-0.6B, fewer of them
QWEN = Shape(1024, 28, 16, 8, 128, 3072, 151_936)  # Qwen3-0.6B


@dataclass(frozen=True)
class Place:
    """Where both sides compute, and in what."""

    device: torch.device
    precision: str


HERE_ON_CPU = Place(torch.device("cpu"), "fp32")


def shapes() -> dict[str, Shape]:
    """The bases to look at: that of the quickstart, and a wider one."""
    base = load_blueprint(TINY).base
    assert isinstance(base, EmbeddedBase)
    tiny = Shape(
        base.hidden_size, base.layers, base.heads, base.key_value_heads, base.head_size, base.intermediate_size, base.vocabulary
    )
    return {"tiny": tiny, "wide": WIDE, "qwen3-0.6b": QWEN}


def tokens_per_pass(shape: Shape, place: Place) -> int:
    """As the planner chooses it where nobody measured."""
    on_gpu = {"gpus_per_worker": 1.0} if place.device.type == "cuda" else {}
    body, sizes = BODY_FLOOR.model_copy(update={"precision": place.precision, **on_gpu}), shape.sizes()
    pace = guess_pace(sizes, body, Hardware.local(), sizes.lora_parameters(RANK, TARGETS), 256, 0)
    return long_enough(pace.ridge(256), pace.kind)


def write_base(shape: Shape, folder: Path) -> None:
    """A base with random weights on disk, which both sides load."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head,
        intermediate_size=shape.intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


@dataclass(frozen=True)
class Rows:
    """What every variant sees in one step: ids, positions and labels [variants, rows, T]."""

    ids_VRT: torch.Tensor
    positions_VRT: torch.Tensor
    labels_VRT: torch.Tensor

    def on(self, device: torch.device) -> Rows:
        return Rows(self.ids_VRT.to(device), self.positions_VRT.to(device), self.labels_VRT.to(device))


def draw_rows(variants: int, tokens: int, vocabulary: int) -> Rows:
    """`tokens` per variant, in rows of at most 256 tokens, each two documents of unequal length."""
    length = min(256, tokens)
    generator = torch.Generator().manual_seed(1)
    shape = (variants, tokens // length, length)
    cut = length * 5 // 8
    positions = torch.cat([torch.arange(cut), torch.arange(length - cut)]).expand(shape).contiguous()
    ids, labels = (torch.randint(0, vocabulary, shape, generator=generator) for _ in range(2))
    return Rows(ids, positions, labels)


def quieten() -> None:
    """No notes of transformers between the rows of the table."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.disable_progress_bar()


def sequential(folder: Path, rows: Rows, place: Place = HERE_ON_CPU) -> Callable[[], list[float]]:
    """N PEFT models on one base in memory, each with its own AdamW; a call steps them one after the other.

    They share the base's tensors, which is kinder to memory and caches than N scripts would be.
    """
    from peft import LoraConfig, get_peft_model

    from chrysalis_ray.training.base import load_base

    variants = len(rows.ids_VRT)
    base: Any = load_base(folder, place.precision)
    rows = rows.on(place.device)
    base.to(place.device)
    model: Any = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)), "v0")
    for index in range(1, variants):
        model.add_adapter(f"v{index}", LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
    own = [[p for name, p in model.named_parameters() if f".v{index}." in name] for index in range(variants)]
    optimizers = [torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True) for parameters in own]

    def step() -> list[float]:
        losses = []
        for index in range(variants):
            model.set_adapter(f"v{index}")
            logits = model(input_ids=rows.ids_VRT[index], position_ids=rows.positions_VRT[index], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.labels_VRT[index].flatten())
            optimizers[index].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own[index], CLIP)
            optimizers[index].step()
            losses.append(loss.item())
        return losses

    return step


def packed(folder: Path, rows: Rows, place: Place = HERE_ON_CPU, held: int | None = None) -> Callable[[], list[float]]:
    """The same step for all variants, in passes of at most `held` tokens, by the parts of `training/step.py`."""
    from chrysalis_ray.core.records import Hyperparameters
    from chrysalis_ray.training.base import load_base
    from chrysalis_ray.training.engine import make_engine
    from chrysalis_ray.training.pack import Pack
    from chrysalis_ray.training.shards import Shard
    from chrysalis_ray.training.step import forward_backward, strided_gradients

    variants = len(rows.ids_VRT)
    device = place.device
    engine = make_engine(0, "none", place.precision, device)
    model, threads = load_base(folder, place.precision), torch.get_num_threads()
    pack = Pack(model, TARGETS, variants, RANK, engine, threads=threads, tokens_per_pass=held)
    settings = Hyperparameters(rank=RANK, alpha=ALPHA, learning_rate=LEARNING_RATE, weight_decay=0.0, clip=CLIP)
    generator = torch.Generator().manual_seed(2)
    for slot in range(variants):
        zero = {
            target.name: (
                torch.randn(RANK, target.in_features, generator=generator) / target.in_features**0.5,
                torch.zeros(target.out_features, RANK),
            )
            for target in pack.bank.targets
        }
        pack.load_adapter(slot, zero, ALPHA / RANK)
    pack.arrange(list(range(variants)))
    bank = pack.bank
    optimizers = [SlotOptimizer(settings, bank.flat_SP[slot], bank.gflat_SP[slot], bank.first_b) for slot in range(variants)]
    labels = rows.labels_VRT.flatten(1)
    lane = labels.shape[1]

    def batch(part: slice) -> MicroBatch:
        return MicroBatch(
            input_ids_NT=rows.ids_VRT[part].flatten(0, 1).to(device),
            position_ids_NT=rows.positions_VRT[part].flatten(0, 1).to(device),
            labelled=label(labels[part].numpy(), [1.0 / lane] * len(labels[part]), device),
        )

    batches = [
        [
            (part := slice(own.start + piece.start, own.start + piece.stop), batch(part))
            for piece in shard.passes(own.stop - own.start, lane)
        ]
        for shard, own in zip(pack.shards.live, pack.shards.rows, strict=True)
    ]

    def all_passes(shard: Shard, passes: Sequence[tuple[slice, MicroBatch]]) -> torch.Tensor:
        losses = []
        for part, batch in passes:
            shard.show(part)
            losses.append(forward_backward(shard, batch))
        return torch.cat(losses)

    def step() -> list[float]:
        pack.zero_gradients()
        with strided_gradients():
            losses_K = torch.cat(pack.shards.each(all_passes, batches))
        gradients_NP = bank.gflat_SP[:variants]  # a bank may have a row more than there are slots, which no variant owns
        clip_slots(gradients_NP, slot_norms(gradients_NP), [CLIP] * variants)
        for optimizer in optimizers:
            optimizer.step(LEARNING_RATE)
        return losses_K.view(variants, -1).mean(1).tolist()

    return step


def compare(folder: Path, variants: int, tokens: int, shape: Shape, repeats: int, place: Place = HERE_ON_CPU) -> dict[str, Any]:
    """Seconds of both sides, taken in turns so that a busy moment of the machine meets both. Exits if the losses differ."""
    rows = draw_rows(variants, tokens, shape.vocabulary)
    one, other = sequential(folder, rows, place), packed(folder, rows, place, tokens_per_pass(shape, place))
    difference = max(abs(a - b) for a, b in zip(one(), other(), strict=True))  # before the first update both are the base
    if difference > (1e-4 if place.precision == "fp32" else 5e-2):
        sys.exit(f"{tokens} tokens: the two sides start at losses {difference:.2e} apart; nothing was timed")
    seconds: tuple[list[float], list[float]] = ([], [])
    one(), other()
    for _ in range(repeats):
        for step, taken in zip((one, other), seconds, strict=True):
            began = time.perf_counter()
            step()
            taken.append(time.perf_counter() - began)
    sequential_seconds, packed_seconds = statistics.median(seconds[0]), statistics.median(seconds[1])
    return {
        "variants": variants,
        "tokens_per_variant": tokens,
        "sequential_ms": sequential_seconds * 1000,
        "packed_ms": packed_seconds * 1000,
        "ratio": sequential_seconds / packed_seconds,
        "ratio_of_fastest": min(seconds[0]) / min(seconds[1]),
        "repeats": repeats,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", type=int, default=8)
    parser.add_argument("--lanes", type=int, nargs="+", default=[16, 64, 256, 512, 1024], help="tokens per variant and step")
    parser.add_argument("--shapes", nargs="+", default=["tiny", "wide"], choices=["tiny", "wide"])
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--seconds", type=float, default=6.0, help="about how long to look at each row")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "packing.json", help="also write JSON, by default here")
    asked = parser.parse_args(arguments)
    told, bases = [], shapes()
    quieten()
    print(f"{'base':<12}{'threads':>8}{'tokens':>8}{'sequential':>13}{'packed':>11}{'ratio':>8}   N = {asked.variants}")
    for threads in asked.threads:
        torch.set_num_threads(threads)
        for name in asked.shapes:
            with tempfile.TemporaryDirectory() as folder:
                write_base(bases[name], Path(folder))
                for tokens in asked.lanes:
                    load = machine.load_now()
                    first = compare(Path(folder), asked.variants, tokens, bases[name], 2)
                    each = (first["sequential_ms"] + first["packed_ms"]) / 1000
                    repeats = min(200, max(5, int(asked.seconds / each)))
                    row = compare(Path(folder), asked.variants, tokens, bases[name], repeats)
                    told.append({"base": name, "threads": threads, "load_before": load, **row})
                    print(
                        f"{name:<12}{threads:>8}{tokens:>8}{row['sequential_ms']:>10.1f} ms{row['packed_ms']:>8.1f} ms"
                        f"{row['ratio']:>7.2f}x",
                        flush=True,
                    )
    if asked.json:
        write_json(asked.json, {"machine": machine.describe(), "rows": told})


if __name__ == "__main__":
    main()
