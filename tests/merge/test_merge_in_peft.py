"""A merge as plain peft sees it: logits of base + written adapter equal those of base + dense delta, and peft's own merges."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from chrysalis_ray.config.merges import ConsensusMerge, EnsembleMerge
from chrysalis_ray.merge.run import merge_modules
from chrysalis_ray.seed.adapter import AdapterWeights, read_adapter, write_adapter

IDS = torch.arange(10)[None]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = Qwen3Config(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=8, vocab_size=32, max_position_embeddings=32)  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def variants(base, tmp_path_factory):
    """Three adapters of peft itself, of ranks 2, 3 and 4, one of them rsLoRA."""
    folder = tmp_path_factory.mktemp("variants")
    for rank in (2, 3, 4):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, init_lora_weights=False, use_rslora=rank == 3)
        torch.manual_seed(rank)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(str(folder / str(rank)))
    return [read_adapter(folder / str(rank)) for rank in (2, 3, 4)]


def merged(variants, config, rank):
    return merge_modules(
        config, [v.factors for v in variants], [v.scale for v in variants], None, 1.0, [1.0] * len(variants), rank
    )


@pytest.mark.parametrize("rank", [2, 9])
@pytest.mark.parametrize(
    "config", [EnsembleMerge(method="ensemble"), ConsensusMerge(method="consensus")], ids=lambda c: c.method
)
def test_plain_peft_gives_the_logits_of_the_dense_delta(tmp_path, base, variants, config, rank):
    result = merged(variants, config, rank)
    weights = AdapterWeights("base", None, rank, float(rank), False, tuple(TARGETS), result.factors)
    write_adapter(tmp_path / "merge", weights)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "merge"))
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for module, (a_ri, b_or) in result.factors.items():
            dense.get_submodule(module).weight += b_or @ a_ri
        torch.testing.assert_close(loaded(IDS).logits, dense(IDS).logits, atol=2e-5, rtol=1e-4)
        assert float((loaded(IDS).logits - base(IDS).logits).abs().max()) > 1e-2


def test_at_full_rank_the_logits_are_those_of_the_adapters_side_by_side(base, variants):
    result = merged(variants, EnsembleMerge(method="ensemble"), 9)
    parallel, single = copy.deepcopy(base), copy.deepcopy(base)
    with torch.no_grad():
        for module, (a_ri, b_or) in result.factors.items():
            parallel.get_submodule(module).weight += sum(v.delta(module) for v in variants) / 3
            single.get_submodule(module).weight += b_or @ a_ri
        torch.testing.assert_close(single(IDS).logits, parallel(IDS).logits, atol=2e-5, rtol=1e-4)


def all_in_peft(folder, base, variants):
    """One peft model with every variant loaded under the name v0, v1, ..."""
    for n, variant in enumerate(variants):
        write_adapter(folder / str(n), variant)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "0"), adapter_name="v0")
    for n in range(1, len(variants)):
        model.load_adapter(str(folder / str(n)), adapter_name=f"v{n}")
    return model


def test_the_exact_merge_is_pefts_concatenation(tmp_path, base, variants):
    plain = [0, 2]  # peft keeps rsLoRA's scale by mistake
    model = all_in_peft(tmp_path, base, variants)
    model.add_weighted_adapter([f"v{n}" for n in plain], [0.3, 0.7], "theirs", combination_type="cat")
    ours = merge_modules(
        EnsembleMerge(method="ensemble", rank="exact"), [variants[n].factors for n in plain],
        [variants[n].scale for n in plain], None, 1.0, None, 1, given=[3.0, 7.0],
    )  # fmt: skip
    assert ours.rank == 6
    assert ours.residual == 0.0
    for module, (a_ri, b_or) in ours.factors.items():
        theirs = model.base_model.model.get_submodule(module).get_delta_weight("theirs")
        torch.testing.assert_close(b_or @ a_ri, theirs, atol=1e-5, rtol=1e-4)


def test_the_mean_is_that_of_pefts_dense_svd(tmp_path, base, variants):
    model = all_in_peft(tmp_path, base, variants)
    plain = [n for n, variant in enumerate(variants) if not variant.use_rslora]  # peft keeps rsLoRA's scale by mistake
    model.add_weighted_adapter([f"v{n}" for n in plain], [0.5, 0.5], "theirs", combination_type="svd", svd_rank=4)
    ours = merged([variants[n] for n in plain], EnsembleMerge(method="ensemble"), 4)
    for module, (a_ri, b_or) in ours.factors.items():
        theirs = model.base_model.model.get_submodule(module).get_delta_weight("theirs")
        torch.testing.assert_close(b_or @ a_ri, theirs, atol=1e-4, rtol=1e-3)
