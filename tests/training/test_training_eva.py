"""Adapter zero from the data: the leading principal directions of what a target reads, as peft finds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from training_texts import LENGTH, PROJECTIONS, TextTokens, new_pack, variant, weights

from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.seed.adapter import read_adapter
from chrysalis_ray.seed.zero import write_adapter_zero
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.eva import TOKENS, Principal, leading_directions, sampled_rows
from chrysalis_ray.training.step import train_chunk

RANK = 6
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


def of_data(base: Path, tokens: TextTokens, rank: int = RANK, rng_seed: int = 3) -> dict[str, torch.Tensor]:
    return leading_directions(load_base(base, "fp32"), TARGETS, tokens, rank, rng_seed)  # type: ignore[arg-type]


def what_they_read(base: Path, tokens: TextTokens, rng_seed: int = 3) -> dict[str, torch.Tensor]:
    """The inputs of every target at labelled tokens, fp64, found without any of the code under test but the choice of rows."""
    model = load_base(base, "fp64")
    read: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            module.register_forward_pre_hook(lambda _, x, name=name: read.setdefault(name, []).append(x[0]))
    for rows in sampled_rows(tokens, rng_seed):  # type: ignore[arg-type]
        for row in rows:
            batch = tokens.batch([row], "train")
            real = batch.document[0] >= 0
            ids, places = (torch.from_numpy(a[:, real]) for a in (batch.input_ids, batch.position_ids))
            before = {name: len(parts) for name, parts in read.items()}
            with torch.no_grad():
                model(input_ids=ids, position_ids=places)
            for name, parts in read.items():
                assert len(parts) == before.get(name, 0) + 1
                parts[-1] = parts[-1][0, torch.from_numpy(batch.labels[0, real] != -100)]
    return {name: torch.cat(parts) for name, parts in read.items()}


def angle(left_ri: torch.Tensor, right_ri: torch.Tensor) -> float:
    """The largest angle between two subspaces of orthonormal rows, as its sine."""
    cosines = torch.linalg.svdvals(left_ri.double() @ right_ri.double().T)
    return (1.0 - cosines.min().clamp(max=1.0) ** 2).sqrt().item()


def test_the_directions_are_those_of_the_whole_matrix_and_nested(tiny_base: Path, tokens: TextTokens) -> None:
    """All activations at once, centred, in fp64: the first r of ours span the first r of theirs, where r + 1 is set apart."""
    found = of_data(tiny_base, tokens)
    read = what_they_read(tiny_base, tokens)
    assert found.keys() == read.keys()
    apart = 0
    for name, a_ri in found.items():
        x_ki = read[name] - read[name].mean(0)
        _, values, directions = torch.linalg.svd(x_ki, full_matrices=False)
        assert a_ri.shape == (RANK, x_ki.shape[1])
        assert (a_ri @ a_ri.T - torch.eye(RANK)).abs().max() < 1e-5
        assert (a_ri.gather(1, a_ri.abs().argmax(1, keepdim=True)) > 0).all()
        explained = (x_ki @ a_ri.double().T).square().sum()
        assert explained >= (1 - 1e-4) * values[:RANK].square().sum()
        for rank in range(1, RANK + 1):
            if values[rank] < 0.95 * values[rank - 1]:
                assert angle(a_ri[:rank], directions[:rank]) < 0.02
                apart += 1
    assert apart > len(found)


def test_peft_finds_the_same_subspaces(tiny_base: Path, tokens: TextTokens) -> None:
    """peft's own EVA without redistribution of ranks, on the same rows in one batch."""
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    found = of_data(tiny_base, tokens)
    rows = [row for rows in sampled_rows(tokens, 3) for row in rows]  # type: ignore[arg-type]
    batch = tokens.batch(rows, "train")
    inputs = {name: torch.from_numpy(getattr(batch, name)) for name in ("input_ids", "position_ids", "labels")}
    config = LoraConfig(r=RANK, target_modules=list(TARGETS), init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    model = load_base(tiny_base, "fp32")
    theirs = get_eva_state_dict(model, [inputs], config, show_progress_bar=False)
    read = what_they_read(tiny_base, tokens)
    assert theirs.keys() == found.keys()
    for name, their_ri in theirs.items():
        x_ki = read[name] - read[name].mean(0)
        ours, peft = ((x_ki @ a_ri.double().T).square().sum().item() for a_ri in (found[name], their_ri))
        assert ours >= peft * (1 - 1e-4)
        assert peft == pytest.approx(ours, rel=0.02)
        values = torch.linalg.svdvals(x_ki)
        for rank in range(1, RANK + 1):
            if values[rank] < 0.8 * values[rank - 1]:  # peft's own search for directions is a rough one
                assert angle(found[name][:rank], their_ri[:rank]) < 0.1


def test_batches_of_any_size_give_the_same_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ki = torch.randn(600, 40, generator=generator) * 0.85 ** torch.arange(40) + 5.0
    _, _, exact = torch.linalg.svd((x_ki - x_ki.mean(0)).double(), full_matrices=False)
    for size in (1, 7, 100, 600):
        principal = Principal(40, 20)
        for part in x_ki.split(size):
            principal.fold(part, generator)
        assert principal.count == 600
        assert torch.allclose(principal.mean_I, x_ki.mean(0), atol=1e-4)
        assert angle(principal.leaders(8), exact[:8]) < 0.02


def test_adapter_zero_from_data_is_reproducible_and_changes_nothing(
    tiny_base: Path, tokens: TextTokens, tmp_path: Path
) -> None:
    lora = Lora(init="eva", rank=RANK, targets=TARGETS)
    twice = [of_data(tiny_base, tokens) for _ in range(2)]
    shas = [
        write_adapter_zero(tiny_base, "base", lora, RANK, 3, tmp_path / str(index), directions=found)
        for index, found in enumerate(twice)
    ]
    assert shas[0] == shas[1]
    other = of_data(tiny_base, tokens, rng_seed=4)
    assert write_adapter_zero(tiny_base, "base", lora, RANK, 4, tmp_path / "other", directions=other) != shas[0]
    zero = read_adapter(tmp_path / "0")
    assert not any(b_or.any() for _, b_or in zero.factors.values())

    tensors = {}
    for name, (a_ri, b_or) in zero.factors.items():
        tensors[f"weight/{name}.lora_A"], tensors[f"weight/{name}.lora_B"] = a_ri, b_or
    pack = new_pack(tiny_base, 2, rank=RANK, targets=TARGETS)
    pack.place(0, variant(0, rank=2), tensors, {"optimizer_step": 0})
    pack.clear(1)
    for name, (a_ri, _) in zero.factors.items():
        assert torch.equal(weights(pack, 0)[f"weight/{name}.lora_A"], a_ri[:2])
    rows = tokens.batch([("code", 0)], "select")
    scored = pack.score([0, 1], rows)  # type: ignore[arg-type]
    assert torch.equal(scored[0], scored[1])
    train_chunk(pack, [0], tokens, 3)  # type: ignore[arg-type]
    assert any(tensor.any() for name, tensor in weights(pack, 0).items() if name.endswith("lora_B"))


def test_rows_come_from_all_domains_alike(tokens: TextTokens) -> None:
    batches = list(sampled_rows(tokens, 1))  # type: ignore[arg-type]
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows)
    each = TOKENS // LENGTH // 2
    counts = {domain: sum(row[0] == domain for row in rows) for domain in tokens.domains}
    assert counts == {domain: min(each, tokens.rows(domain, "train")) for domain in tokens.domains}
    assert batches == list(sampled_rows(tokens, 1))  # type: ignore[arg-type]
    assert batches != list(sampled_rows(tokens, 2))  # type: ignore[arg-type]
    assert np.mean([len({domain for domain, _ in batch}) for batch in batches]) > 1


def test_more_directions_than_there_are_are_refused(tiny_base: Path, tokens: TextTokens, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"q_proj reads 48 numbers.*49 directions\n.*lora.init"):
        of_data(tiny_base, tokens, rank=49)
    few = TextTokens(Tokenizer.from_file(str(tiny_base / "tokenizer.json")), {"code": ["import argparse"]}, {}, 16)
    with pytest.raises(ModelError, match=r"span \d directions, lora.init: eva was asked for 40\n.*add sources"):
        of_data(tiny_base, few, rank=40)
    lora = Lora(init="eva", rank=4, targets=("q_proj",))
    with pytest.raises(ModelError, match=r"directions \[4, 48\] for .*q_proj, there are none"):
        write_adapter_zero(tiny_base, "base", lora, 4, 3, tmp_path / "zero", directions={})


def test_qkv_share_what_they_read(tiny_base: Path, tokens: TextTokens) -> None:
    found = leading_directions(load_base(tiny_base, "fp32"), PROJECTIONS, tokens, 4, 3)  # type: ignore[arg-type]
    for layer in range(2):
        at = f"model.layers.{layer}"
        assert torch.equal(found[f"{at}.self_attn.q_proj"], found[f"{at}.self_attn.v_proj"])
        assert torch.equal(found[f"{at}.mlp.gate_proj"], found[f"{at}.mlp.up_proj"])
        assert not torch.equal(found[f"{at}.self_attn.q_proj"], found[f"{at}.mlp.gate_proj"])
