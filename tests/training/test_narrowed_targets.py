"""`lora.exclude` and `lora.layers` leave out what peft would; a pack without those modules is what peft makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_solo import STEPS, member
from training_texts import PROJECTIONS, TextTokens, weights

from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.population.harvest import adapter_of
from chrysalis_ray.seed.adapter import AdapterWeights, read_adapter, write_adapter
from chrysalis_ray.seed.solo import quiet
from chrysalis_ray.seed.zero import write_adapter_zero
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import ReplicatedEngine
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.schedules import learning_rate_at
from chrysalis_ray.training.step import train_chunk

OUT = ("layers.0.self_attn.q_proj", "up_proj")
AIMED = ("q_proj", "o_proj", "model.layers.1.mlp.down_proj")
NARROWINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, and what it is to peft
    "layers": ({"layers": (1,)}, {"layers_to_transform": [1]}),
    "exclude": ({"exclude": OUT}, {"exclude_modules": list(OUT)}),
    "both": (
        {"layers": (0,), "exclude": ("o_proj",), "targets": AIMED},
        {"layers_to_transform": [0], "exclude_modules": ["o_proj"], "target_modules": list(AIMED)},
    ),
}


def zero_of(base: Path, folder: Path, rank: int = 4, **lora: Any) -> AdapterWeights:
    write_adapter_zero(base, str(base), Lora(**{"targets": PROJECTIONS, "alpha": 8.0, **lora}), rank, 17, folder)
    return read_adapter(folder)


def by_plain_peft(base: Path, zero: AdapterWeights, tokens: TextTokens, theirs: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    own, hyper = member(), member().hyperparameters
    config = LoraConfig(**{"r": hyper.rank, "lora_alpha": hyper.alpha, "target_modules": list(PROJECTIONS), **theirs})
    model = get_peft_model(load_base(base, "fp64"), config).eval()
    adapted = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted.keys() == zero.factors.keys()
    for name, (a_ri, _) in zero.factors.items():
        adapted[name].lora_A["default"].weight.data = a_ri.double()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, eps=hyper.epsilon, weight_decay=hyper.weight_decay)
    feed = Feed(own, tokens)
    for step in range(STEPS):
        rows = tokens.batch(feed.step(step).rows, "train")
        adamw.param_groups[0]["lr"] = learning_rate_at(hyper, step, own.steps)
        ids, positions = torch.from_numpy(rows.input_ids), torch.from_numpy(rows.position_ids)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(rows.labels).flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, hyper.clip)
        adamw.step()
    return adapted


@pytest.mark.parametrize("name", NARROWINGS)
def test_a_pack_without_some_modules_is_what_plain_peft_makes_of_it(
    name: str, tiny_base: Path, tokens: TextTokens, tmp_path: Path
) -> None:
    ours, theirs = NARROWINGS[name]
    zero = zero_of(tiny_base, tmp_path / "seed", **ours)
    pack = Pack(
        load_base(tiny_base, "fp64"), tuple(zero.factors), 2, 8, ReplicatedEngine(torch.device("cpu")), dtype=torch.float64
    )
    begun = {
        f"weight/{module}.lora_{side}": t for module, pair in zero.factors.items() for side, t in zip("AB", pair, strict=True)
    }
    for slot in (0, 1):
        pack.place(slot, member(slot), begun, {"optimizer_step": 0})
    train_chunk(pack, [0, 1], tokens, STEPS)
    ended, alone = weights(pack, 0), by_plain_peft(tiny_base, zero, tokens, theirs)
    assert len(ended) == 2 * len(alone)
    for module, layer in alone.items():
        for side in "AB":
            mine, peft_s = ended[f"weight/{module}.lora_{side}"], getattr(layer, f"lora_{side}")["default"].weight
            assert (mine - peft_s).abs().max().item() <= 1e-12, module

    from peft import PeftModel

    folder = tmp_path / "adapter"
    write_adapter(
        folder, adapter_of({k: v.cpu() for k, v in ended.items()}, member().hyperparameters, zero), like=tmp_path / "seed"
    )
    with quiet():
        loaded = PeftModel.from_pretrained(load_base(tiny_base, "fp32"), folder).eval()
    assert sum(hasattr(module, "lora_A") for module in loaded.modules()) == len(alone)
    batch = tokens.batch([("code", 0)], "select")
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    with torch.no_grad():
        logits = loaded(input_ids=ids, position_ids=positions, use_cache=False).logits
    labels = torch.from_numpy(batch.labels)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    torch.testing.assert_close(pack.score([0], batch)[0].float(), losses, rtol=0, atol=2e-5)


def test_a_gaussian_a_has_pefts_spread(tiny_base: Path, tmp_path: Path) -> None:
    zero = zero_of(tiny_base, tmp_path / "seed", rank=16, init="gaussian")
    a_K = torch.cat([a_ri.flatten() for a_ri, _ in zero.factors.values()])
    assert a_K.std().item() == pytest.approx(1 / 16, rel=0.03)
    assert a_K.mean().abs().item() < 1e-3
    assert all((b_or == 0).all() for _, b_or in zero.factors.values())
    again = zero_of(tiny_base, tmp_path / "again", rank=16, init="gaussian", targets=("v_proj",))
    assert all(torch.equal(a_ri, zero.factors[name][0]) for name, (a_ri, _) in again.factors.items())  # of its name alone


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"layers": (2,)}, "layer 2, and the base has no such targets|finds nothing"),
        ({"layers": (0, 7)}, "layer 7, and the base has no such targets"),
        ({"exclude": ("q_projj",)}, "'q_projj', and lora.targets mean no such module"),
        ({"exclude": PROJECTIONS}, "peft finds nothing to adapt"),
    ],
)
def test_what_leaves_out_nothing_or_all_is_refused(lora: dict[str, Any], words: str, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        zero_of(tiny_base, tmp_path, **lora)
    assert not list(tmp_path.iterdir())
