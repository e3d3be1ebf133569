"""AdaLoRA: peft's own allocator takes ranks away at the right steps, goes on to the bit, and leaves a plain LoRA."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_solo_kinds import adapter_of, blueprint_of, solo
from test_training_solo import PRECISIONS, member, zero_of
from training_texts import TextTokens, weights

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.records import Variant
from chrysalis_ray.seed.adapter import read_adapter, read_config
from chrysalis_ray.seed.solo import is_plain, quiet, write_solo
from chrysalis_ray.seed.soul import pack_seed, unpack_seed
from chrysalis_ray.seed.zero import write_adapter_zero
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.planning.alone import adapter_parameters
from chrysalis_ray.training.planning.shapes import read_shape
from chrysalis_ray.training.schedules import learning_rate_at
from chrysalis_ray.training.solo import SoloPack
from chrysalis_ray.training.step import train_chunk

STEPS = 12
SETTINGS = {"target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 2, "orth_reg_weight": 0.1}
OWN = replace(member(rank=6, alpha=12.0), steps=STEPS)


def ada(base: Path, dtype: torch.dtype = torch.float32, own: Variant = OWN, **changes: Any) -> SoloPack:
    pack = solo(base, "adalora", dtype, **{**SETTINGS, **changes})
    pack.place(0, own, zero_of(base), {"optimizer_step": 0})
    return pack


def by_plain_peft(
    base: Path, own: Variant, tokens: TextTokens, start: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A loop as peft's documentation has it; peft itself adds its penalty to whatever loss the base gives."""
    hyper = own.hyperparameters
    config = peft.AdaLoraConfig(**adapter_of("adalora", **SETTINGS).settings(hyper.rank, hyper.alpha, own.steps))
    with quiet():
        model: Any = peft.get_peft_model(load_base(base, PRECISIONS[dtype]), config).eval()
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad = False  # as peft says and does on a base in fp32; on others it forgets
        elif parameter.requires_grad:
            short = name.removeprefix("base_model.model.").removesuffix(".default")
            parameter.data = start[f"weight/{short}"].to(dtype).clone()
    tuner = model.base_model
    plain, feed = tuner.model.forward, Feed(own, tokens)

    def forward_with_loss(labels: torch.Tensor, **inputs: Any) -> Any:
        told = plain(**inputs, use_cache=False)
        told.loss = torch.nn.functional.cross_entropy(told.logits.flatten(0, 1), labels.flatten())
        return told

    tuner.model.forward = forward_with_loss
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, eps=hyper.epsilon, weight_decay=hyper.weight_decay)
    for step in range(own.steps):
        rows = tokens.batch(feed.step(step).rows, "train")
        adamw.param_groups[0]["lr"] = learning_rate_at(hyper, step, own.steps)
        ids, positions = torch.from_numpy(rows.input_ids), torch.from_numpy(rows.position_ids)
        loss = tuner(input_ids=ids, position_ids=positions, labels=torch.from_numpy(rows.labels)).loss
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, hyper.clip)
        adamw.step()
        tuner.update_and_allocate(step)
    named = {name.removeprefix("base_model.model."): p.data for name, p in model.named_parameters() if p.requires_grad}
    return {f"weight/{name.removesuffix('.default')}": tensor for name, tensor in named.items()}


def ranks_left(tensors: dict[str, torch.Tensor]) -> list[int]:
    return [int((tensor != 0).sum()) for name, tensor in tensors.items() if name.endswith("lora_E")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_what_a_loop_of_plain_peft_makes_of_it(
    dtype: torch.dtype, tolerance: float, tiny_base: Path, tokens: TextTokens
) -> None:
    pack = ada(tiny_base, dtype)
    start = weights(pack, 0)
    train_chunk(pack, [0], tokens, 5)
    train_chunk(pack, [0], tokens, STEPS - 5)
    ended, alone = weights(pack, 0), by_plain_peft(tiny_base, OWN, tokens, start, dtype)
    assert ended.keys() == alone.keys() == start.keys()
    assert sum(ranks_left(ended)) == 2 * len(ranks_left(ended))  # the budget: two of six on average
    assert len(set(ranks_left(ended))) > 1  # not everywhere as many
    for name in start:
        assert (ended[name] - alone[name]).abs().max().item() <= tolerance, name
    planned = adapter_parameters(read_shape(tiny_base / "config.json", "tiny"), blueprint_of("adalora"), 6)
    assert sum(tensor.numel() for tensor in start.values()) <= planned


@pytest.mark.parametrize("kept_after", [1, 5, 9, 10])
def test_it_goes_on_from_its_seed_to_the_same_bytes(kept_after: int, tiny_base: Path, tokens: TextTokens) -> None:
    """Before anything is taken away, between, when it was settled, and after; another variant has worn the base since."""
    whole, first = ada(tiny_base), ada(tiny_base)
    train_chunk(whole, [0], tokens, STEPS)
    train_chunk(first, [0], tokens, kept_after)
    kept = pack_seed(*first.harvest(0))
    first.place(0, replace(member(1, rank=4), steps=STEPS), zero_of(tiny_base), {"optimizer_step": 0})
    train_chunk(first, [0], tokens, 2)
    first.place(0, OWN, *unpack_seed(kept))
    train_chunk(first, [0], tokens, STEPS - kept_after)
    assert sha256(pack_seed(*first.harvest(0))).digest() == sha256(pack_seed(*whole.harvest(0))).digest()


def test_what_it_remembers_decides_and_must_be_its_own(tiny_base: Path, tokens: TextTokens) -> None:
    """One module was important to the seed, beyond all that the last steps can say."""
    pack = ada(tiny_base, beta1=0.98, beta2=0.98)
    train_chunk(pack, [0], tokens, 5)
    tensors, meta = pack.harvest(0)
    running = {name: tensor for name, tensor in tensors.items() if name.startswith("running/")}
    assert {name.split("/")[1].split(".")[0] for name in running} == {"importance", "uncertainty", "kept"}
    module = "model.layers.1.mlp.down_proj.lora_E"
    loved = {name: tensor + 1e3 for name, tensor in running.items() if name.endswith(module) and "kept" not in name}
    assert len(loved) == 2
    pack.place(0, OWN, {**tensors, **loved}, meta)
    train_chunk(pack, [0], tokens, STEPS - 5)
    assert (weights(pack, 0)[f"weight/{module}"] != 0).all()
    assert sum(ranks_left(weights(pack, 0))) == 2 * len(ranks_left(weights(pack, 0)))
    with pytest.raises(ModelError, match="remembers"):
        pack.place(0, OWN, {**tensors, "running/importance.model.norm": torch.ones(2)}, meta)


def test_a_step_that_was_not_finite_settles_nothing_and_the_next_one_does(tiny_base: Path, tokens: TextTokens) -> None:
    pack = ada(tiny_base)
    train_chunk(pack, [0], tokens, 8)
    pack.occupant(0).optimizer_step = 9  # as if step 8, which settles the ranks, had been skipped
    train_chunk(pack, [0], tokens, 1)
    assert sum(ranks_left(weights(pack, 0))) == 2 * len(ranks_left(weights(pack, 0)))
    train_chunk(pack, [0], tokens, 2)
    assert sum(ranks_left(weights(pack, 0))) == 2 * len(ranks_left(weights(pack, 0)))


@pytest.mark.parametrize("steps", [0, STEPS])
def test_a_plain_lora_is_left_that_peft_loads_and_that_is_judged_the_same(
    steps: int, tiny_base: Path, tokens: TextTokens, tmp_path: Path
) -> None:
    batch = tokens.batch([("code", 0), ("prose", 1)], "select")
    pack = ada(tiny_base)
    if steps:
        train_chunk(pack, [0], tokens, steps)
    scored, folder = pack.score([0], batch), tmp_path / "adapter"
    write_adapter_zero(tiny_base, str(tiny_base), pack.worn, 6, 17, tmp_path / "seed")
    write_solo(folder, *unpack_seed(pack_seed(*pack.harvest(0))), OWN.hyperparameters, tmp_path / "seed")
    assert is_plain(folder)
    config = read_config(folder)
    kept = {max(rank, 1) for rank in ranks_left(weights(pack, 0))}
    assert {config["r"], *config["rank_pattern"].values()} == kept
    with quiet():
        model = peft.PeftModel.from_pretrained(load_base(tiny_base, "fp32"), folder).eval()
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    labels = torch.from_numpy(batch.labels)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    torch.testing.assert_close(scored[0], losses, rtol=0, atol=2e-5)
    adapter = read_adapter(folder)
    pack.load_adapter(0, adapter.factors, adapter.scale)
    torch.testing.assert_close(pack.score([0], batch), scored, rtol=0, atol=2e-5)
