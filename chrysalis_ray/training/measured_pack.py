"""The pack that is measured, as `body/worker.py` grows it: on the real base, or on one of its architecture."""

from __future__ import annotations

import os
import time
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from chrysalis_ray.config.adapters import KINDS
from chrysalis_ray.config.blueprint import EmbeddedBase, Lora
from chrysalis_ray.training.base import DTYPES, load_base
from chrysalis_ray.training.embedded import LENGTH, ROWS, build, pretrain
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.measured_order import Order
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.packed import find_targets
from chrysalis_ray.training.solo import SoloPack
from chrysalis_ray.training.trunk import checkpoint_activations


def make_pack(order: Order, device: torch.device) -> Pack:
    """The pack as `body/worker.py` grows it."""
    torch.set_num_threads(order.threads)
    model = make_base(order.base, order.precision)
    if order.activation_checkpointing:
        checkpoint_activations(model)
    engine = make_engine(order.zero_stage, order.offload, order.precision, device, nvme_path=order.nvme_path)
    worn = KINDS[order.worn["type"]].model_validate(order.worn) if "type" in order.worn else Lora.model_validate(order.worn)
    if worn.solo or not isinstance(worn, Lora):
        return SoloPack(model, worn, engine)
    targets = [target.name for target in find_targets(model, worn.targets) if worn.takes(target.name)]
    lanes: Literal["fixed", "compacted"] = "fixed" if order.compile else "compacted"
    shards, held = 1 if order.compile else order.threads, order.tokens_per_pass
    gradients, rank = order.gradients, order.rank
    pack = Pack(
        model, targets, order.slots, rank, engine, lanes, threads=shards, gradients=gradients, tokens_per_pass=held,
        patterns=worn.patterns,
    )  # fmt: skip
    if order.compile:
        from chrysalis_ray.training.compiled import compile_layers

        compile_layers(pack)
        pack.lanes = "compacted"  # fewer variants are loaded to see what a body of so many slots would take
    if len(pack.shards.all) > 1:
        torch.set_num_threads(1)
    return pack


def make_base(base: dict[str, Any], precision: str) -> PreTrainedModel:
    """The base of a folder with weights, or one with random weights of the same architecture."""
    if base["type"] == "folder":
        return load_base(base["path"], precision)
    model: Any
    if base["type"] == "embedded":
        model = build(EmbeddedBase.model_validate(base["spec"]), 0)
        model.to(DTYPES[precision])
    else:
        config = AutoConfig.from_pretrained(base["path"], local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision], trust_remote_code=False)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def pretrain_seconds(base: dict[str, Any], look: float) -> float:
    """Seconds per token in which an embedded base learns all its weights, in the driver's process; 0 for other bases."""
    if base["type"] != "embedded":
        return 0.0
    torch.set_num_threads(os.cpu_count() or 1)
    spec = EmbeddedBase.model_validate(base["spec"])
    model = build(spec, 0)

    def step_seconds(steps: int) -> float:
        rows = torch.randint(0, spec.vocabulary, (steps * ROWS, LENGTH + 1))
        began = time.perf_counter()
        pretrain(model, rows, spec.pretrain_learning_rate, lambda line: None)
        return (time.perf_counter() - began) / steps

    once = step_seconds(2)  # it warms up, too
    return step_seconds(max(1, min(20, int(look / once)))) / (ROWS * LENGTH)
