"""Layers that wear one candidate after the other, against those of transformers and against changes carried beside weights."""

from __future__ import annotations

import pytest
import torch
from families import GATED, SUPPORTED
from torch import nn
from training_texts import fresh_adapter, new_pack
from transformers import AutoModelForCausalLM

from chrysalis_ray.training import folded, pack, worn
from chrysalis_ray.training.compiled import compile_layers
from chrysalis_ray.training.quick import additive, quicken
from chrysalis_ray.training.trunk import checkpoint_activations, document_mask
from chrysalis_ray.training.worn import WornLayer, wear

WORN = {"qwen3", "qwen2", "llama", "mistral"}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lanes of every worn pass that was made, however few its tokens are."""
    made: list[int] = []
    real = worn.worn_pass
    monkeypatch.setattr(folded, "FEWEST", 1)
    monkeypatch.setattr(worn, "worn_pass", lambda *given: made.append(given[-1]) or real(*given))
    return made


def base_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SUPPORTED[family].config()).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # fresh ones are all 0 or all 1
            parameter.copy_(parameter + 0.3 * torch.randn(parameter.shape))
    return model


def given_rows(rows: int = 6, length: int = 12) -> dict[str, object]:
    """Rows of three documents each."""
    generator = torch.Generator().manual_seed(1)
    positions = (torch.arange(length) % 5).expand(rows, length)
    ids = torch.randint(50, (rows, length), generator=generator)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": additive(document_mask(positions), torch.float32),
        "use_cache": False,
    }


@pytest.mark.parametrize("family", [family for family in SUPPORTED if SUPPORTED[family].targets == GATED])
@pytest.mark.parametrize("at_once", [1, 30, 10**6])
@torch.no_grad()
def test_hidden_states_are_those_of_the_layers_it_stands_for(
    family: str, at_once: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = base_of(family), given_rows(length=24)
    usual = model.base_model(**given).last_hidden_state
    quicken(model)
    wear(model)
    monkeypatch.setattr(worn, "AT_ONCE", at_once)
    passes.clear()
    found = model.base_model(**given).last_hidden_state
    assert passes == ([1, 1] if family in WORN else [])  # two layers
    assert (found - usual).abs().max() <= 1e-5 * usual.abs().max()


@torch.no_grad()
def test_a_mask_of_words_is_a_mask_of_numbers(passes: list[int]) -> None:
    """Long rows come with a bool mask: who may look at whom."""
    model, given = base_of("qwen3"), given_rows(length=40)
    quicken(model)
    wear(model)
    passes.clear()
    added = model.base_model(**given).last_hidden_state
    told = model.base_model(**given | {"attention_mask": document_mask(given["position_ids"])}).last_hidden_state
    assert passes == [1, 1, 1, 1]
    assert torch.equal(told, added)


@pytest.mark.parametrize("targets", [GATED, ("k_proj", "down_proj")])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_lane_wears_its_own(targets, threads, tiny_base, tokens, passes, monkeypatch) -> None:
    """Adapters in slots and sums of them, some modules without: as with changes carried beside the weights."""
    batch = tokens.batch([("code", 0), ("prose", 1), ("code", 1)], "select")
    pack = new_pack(tiny_base, 5, rank=8, targets=targets, threads=threads)
    members = []
    for slot, rank in enumerate((2, 8, 1, 8, 5)):
        tensors = fresh_adapter(pack, slot)
        factors = {
            target.name: (
                tensors[f"weight/{target.name}.lora_A"][:rank],
                10 * tensors[f"weight/{target.name}.lora_B"][:, :rank],
            )
            for target in pack.bank.targets
        }
        pack.load_adapter(slot, factors, 0.5 + slot)
        members.append((factors, 0.5 + slot))
    weights = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    blend = pack.blend(members, weights)
    passes.clear()
    found = pack.judge([3, 0, 4, 1, 2], batch), pack.judge_blend(blend, batch)
    assert sum(passes) == 2 * (5 + 3)  # layers times lanes
    monkeypatch.setattr(folded, "FEWEST", 10**9)
    usual = pack.judge([3, 0, 4, 1, 2], batch), pack.judge_blend(blend, batch)
    assert sum(passes) == 2 * (5 + 3)
    for own, plain in zip(found, usual, strict=True):
        assert (own.losses - plain.losses).abs().max() <= 1e-5 * plain.losses.abs().max()
        assert torch.equal(own.hits, plain.hits)
        assert (own.losses[0] - own.losses[1]).abs().max() > 1e-3


def test_what_a_lane_comes_to_does_not_depend_on_its_neighbours(tiny_base, tokens, passes) -> None:
    batch = tokens.batch([("code", 0), ("prose", 1), ("code", 1)], "select")
    pack = new_pack(tiny_base, 3, rank=8)
    for slot in range(3):
        tensors = fresh_adapter(pack, slot)
        names = [target.name for target in pack.bank.targets]
        pack.load_adapter(
            slot, {name: (tensors[f"weight/{name}.lora_A"], tensors[f"weight/{name}.lora_B"]) for name in names}, 2.0
        )
    passes.clear()
    together, alone = pack.judge([0, 1, 2], batch), pack.judge([1], batch)
    assert passes == [3, 3, 1, 1]
    assert torch.equal(together.losses[1], alone.losses[0])


@pytest.mark.parametrize("odd", ["something is learned", "somebody listens", "no mask", "few tokens"])
def test_any_other_pass_goes_the_usual_way(odd: str, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, heard = base_of("qwen3"), given_rows(), []
    quicken(model)
    wear(model)
    passes.clear()
    if odd == "somebody listens":
        model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, given: heard.append(module))
    if odd == "no mask":
        given |= {"attention_mask": None, "position_ids": None}
    if odd == "few tokens":
        monkeypatch.setattr(folded, "FEWEST", 73)
    with torch.set_grad_enabled(odd == "something is learned"):
        model.base_model(**given)
    assert len(passes) == (1 if odd == "somebody listens" else 0)  # the other layer is worn
    assert len(heard) == (1 if odd == "somebody listens" else 0)


def test_a_layer_that_computes_something_else_stays_as_it_is() -> None:
    """Under a known name, but with a sum of its own."""
    model = base_of("llama")
    known = type(model.model.layers[0])

    class LlamaDecoderLayer(known):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor, *given: object, **settings: object) -> torch.Tensor:
            return super().forward(hidden_states, *given, **settings) + 0.01 * hidden_states

    model.model.layers[1].__class__ = LlamaDecoderLayer
    quicken(model)
    wear(model)
    assert isinstance(model.model.layers[0], WornLayer)
    assert type(model.model.layers[1]) is LlamaDecoderLayer


def test_layers_that_are_recomputed_wear_nothing_and_are_not_counted_on() -> None:
    model = base_of("qwen3")
    checkpoint_activations(model)
    quicken(model)
    assert not wear(model)
    assert not any(isinstance(module, WornLayer) for module in model.modules())


def test_more_lanes_go_together_where_layers_are_worn(tiny_base, tokens, monkeypatch) -> None:
    """As many as `WORN` holds, where lanes are long enough; the scores are those of lanes that go alone, to the bit."""
    batch = tokens.batch([("code", 0), ("prose", 1), ("code", 1)], "select")
    own, taken = new_pack(tiny_base, 4, rank=8), []
    for slot in range(4):
        tensors = fresh_adapter(own, slot)
        names = [target.name for target in own.bank.targets]
        own.load_adapter(
            slot, {name: (tensors[f"weight/{name}.lora_A"], tensors[f"weight/{name}.lora_B"]) for name in names}, 2.0
        )
    real = own.shards.in_turns
    monkeypatch.setattr(own.shards, "in_turns", lambda parts, lanes, blend: taken.append(lanes) or real(parts, lanes, blend))
    lane, found = batch.labels.size, []
    for module, fewest in ((folded, 1), (pack, 1), (pack, lane + 1)):
        monkeypatch.setattr(module, "FEWEST", fewest)
        monkeypatch.setattr(pack, "CACHED", lane)
        monkeypatch.setattr(pack, "WORN", 3 * lane)
        found.append(own.judge([0, 1, 2, 3], batch).losses)
    assert taken == [1, 3, 1]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_layers_that_are_compiled_wear_nothing(tiny_base) -> None:
    pack = new_pack(tiny_base, 2, lanes="fixed")
    modules = list(pack.shards.all[0].trunk.modules())
    assert sum(isinstance(module, WornLayer) for module in modules) == 2
    compile_layers(pack, backend="eager")
    assert not any(isinstance(module, WornLayer) for module in modules)


@pytest.mark.parametrize("family", sorted(WORN))
def test_a_base_of_another_precision_wears_nothing(family: str) -> None:
    model = base_of(family).double()
    quicken(model)
    wear(model)
    assert not any(isinstance(module, WornLayer) for module in model.modules())


def test_a_version_whose_layers_take_things_in_another_order_is_called_by_their_names() -> None:
    model = base_of("llama")
    known = type(model.model.layers[0])

    class LlamaDecoderLayer(known):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache_position=None, **settings):
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **settings
            )

    usual = model.base_model(**given_rows()).last_hidden_state
    for layer in model.model.layers:
        layer.__class__ = LlamaDecoderLayer
    quicken(model)
    wear(model)
    assert isinstance(model.model.layers[0], WornLayer)
    found = model.base_model(**given_rows()).last_hidden_state  # gradients may be wanted: the usual way
    assert (found - usual).abs().max() <= 1e-5 * usual.abs().max()
