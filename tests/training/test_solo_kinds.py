"""Other kinds of adapters than LoRA: each trains as plain PEFT would train it, is resumed to the bit, and is left as a folder
that PEFT loads."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_training_solo import PRECISIONS, STEPS, left_of, member, zero_of
from training_texts import PROJECTIONS, TextTokens, weights

from chrysalis_ray.config.adapters import KINDS, OTHER_KINDS, PeftAdapter
from chrysalis_ray.config.blueprint import Blueprint
from chrysalis_ray.core.errors import MergeError, ModelError
from chrysalis_ray.core.records import Variant
from chrysalis_ray.seed.adapter import read_adapter
from chrysalis_ray.seed.solo import quiet, read_solo
from chrysalis_ray.seed.soul import pack_seed, unpack_seed
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import ReplicatedEngine
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.planning.alone import adapter_parameters
from chrysalis_ray.training.planning.shapes import read_shape
from chrysalis_ray.training.schedules import learning_rate_at
from chrysalis_ray.training.solo import SoloPack
from chrysalis_ray.training.step import train_chunk

SETTINGS: dict[str, dict[str, Any]] = {
    "lokr": {"decompose_factor": 4},
    "oft": {"oft_block_size": 16},
    "boft": {"boft_block_size": 8},
    "fourierft": {"n_frequency": 24},
    "road": {"group_size": 16},
}
TARGETS = ("q_proj", "v_proj", "down_proj")
LEFT_OUT = {  # fields of peft's configs that no kind has here
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",  # ours
    "fan_in_fan_out",  # peft finds out
    "init_weights", "init_ia3_weights",  # true but for MiSS: without, an untrained adapter changes the base
    "rank_dropout", "rank_dropout_scale", "module_dropout", "vera_dropout", "boft_dropout", "miss_dropout",  # drawn in training
    "bias", "save_projection", "use_effective_conv2d", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "lambda_pattern", "n_frequency_pattern", "r", "boft_n_butterfly_factor",
}  # fmt: skip


OF_LORA = {  # AdaLoRA's config has all that LoRA's has
    field.name for field in dataclasses.fields(peft.LoraConfig)
} | {"total_step"}  # ours: the steps of a variant
KEPT = [kind for kind in KINDS if kind != "adalora"]  # kinds that stay what they are; see test_adalora.py


def blueprint_of(kind: str, **changes: Any) -> Blueprint:
    written = {"type": kind, **SETTINGS.get(kind, {}), **({} if kind == "ln_tuning" else {"targets": TARGETS}), **changes}
    return Blueprint.model_validate({"name": "solo", "base": {"type": "embedded"}, "adapter": written})


def adapter_of(kind: str, **changes: Any) -> PeftAdapter:
    worn = blueprint_of(kind, **changes).worn
    assert isinstance(worn, PeftAdapter)
    return worn


def solo(base: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> SoloPack:
    rows = torch.float64 if dtype == torch.float64 else torch.float32
    engine = ReplicatedEngine(torch.device("cpu"))
    return SoloPack(load_base(base, PRECISIONS[dtype]), adapter_of(kind, **changes), engine, dtype=rows)


def by_plain_peft(
    base: Path, kind: str, own: Variant, tokens: TextTokens, start: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The adapter's state after all steps of a loop that a user of peft would write, from the same first numbers."""
    hyper, settings = own.hyperparameters, adapter_of(kind).settings(own.hyperparameters.rank, own.hyperparameters.alpha)
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind.upper())](task_type="CAUSAL_LM", **settings)
    with quiet():
        model = peft.get_peft_model(load_base(base, PRECISIONS[dtype]), config).eval()
        state = {f"base_model.model.{name.removeprefix('weight/')}": tensor for name, tensor in start.items()}
        state |= {k: v for k, v in peft.get_peft_model_state_dict(model).items() if k not in state}
        peft.set_peft_model_state_dict(model, state)
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
    with quiet():
        return {k.removeprefix("base_model.model."): v for k, v in peft.get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("kind", KEPT)
def test_a_variant_of_another_kind_is_what_plain_peft_makes_of_it(kind: str, tiny_base: Path, tokens: TextTokens) -> None:
    pack = solo(tiny_base, kind, torch.float64)
    pack.place(0, member(), zero_of(tiny_base), {"optimizer_step": 0})
    start = weights(pack, 0)
    train_chunk(pack, [0], tokens, STEPS)
    alone = by_plain_peft(tiny_base, kind, member(), tokens, start, torch.float64)
    ended, _ = pack.harvest(0)
    assert {name.partition("/")[2] for name in ended if name.startswith(("weight/", "constant/"))} == alone.keys()
    planned = adapter_parameters(read_shape(tiny_base / "config.json", "tiny"), blueprint_of(kind), 4)
    assert sum(tensor.numel() for tensor in start.values()) <= planned  # an estimate errs upwards
    for name in start:
        mine, theirs = ended[name], alone[name.removeprefix("weight/")]
        assert (mine - theirs).abs().max().item() <= 1e-12, name
        assert (mine - start[name]).abs().max().item() > 1e-5, name  # all of it was trained


@pytest.mark.parametrize("kind", KEPT)
def test_it_goes_on_from_its_seed_to_the_same_bytes_and_its_folder_gives_plain_peft_the_same_losses(
    kind: str, tiny_base: Path, tokens: TextTokens, tmp_path: Path
) -> None:
    """Another variant has worn the base in between."""
    from peft import PeftModel

    batch = tokens.batch([("code", 0), ("prose", 1)], "select")
    whole, first = solo(tiny_base, kind), solo(tiny_base, kind)
    whole.clear(0)
    bare = whole.score([0], batch)
    for pack, steps in ((whole, STEPS), (first, 3)):
        pack.place(0, member(), zero_of(tiny_base), {"optimizer_step": 0})
        torch.testing.assert_close(pack.score([0], batch), bare, rtol=0, atol=1e-5)  # untrained, it changes nothing
        train_chunk(pack, [0], tokens, steps)
    ended, kept = pack_seed(*whole.harvest(0)), pack_seed(*first.harvest(0))
    first.place(0, member(1, rank=2), zero_of(tiny_base), {"optimizer_step": 0})
    train_chunk(first, [0], tokens, 1)
    first.place(0, member(), *unpack_seed(kept))
    train_chunk(first, [0], tokens, STEPS - 3)
    assert sha256(pack_seed(*first.harvest(0))).digest() == sha256(ended).digest()

    scored, folder = whole.score([0], batch), left_of(whole, tiny_base, tmp_path)
    with quiet():
        model = PeftModel.from_pretrained(load_base(tiny_base, "fp32"), folder).eval()
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    labels = torch.from_numpy(batch.labels)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    torch.testing.assert_close(scored[0], losses, rtol=0, atol=2e-5)
    assert (scored - bare).abs().max() > 1e-4
    with pytest.raises(MergeError, match="only LoRA"):
        read_adapter(folder)
    first.load_solo(0, *read_solo(folder, first.worn))
    torch.testing.assert_close(first.score([0], batch), scored, rtol=0, atol=2e-5)
    first.clear(0)
    assert torch.equal(first.score([0], batch), bare)


def test_all_variants_begin_with_what_adapter_zero_gives(tiny_base: Path) -> None:
    pack, other = solo(tiny_base, "loha"), solo(tiny_base, "loha")
    begun = []
    for where, own in ((pack, member()), (other, member(5)), (other, replace(member(), seed_sha256="1" * 64))):
        where.place(0, own, zero_of(tiny_base), {"optimizer_step": 0})
        begun.append(weights(where, 0))
    assert all(torch.equal(tensor, begun[1][name]) for name, tensor in begun[0].items())
    assert not all(torch.equal(tensor, begun[2][name]) for name, tensor in begun[0].items())


def test_a_seed_of_another_kind_or_with_other_constants_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    pack = solo(tiny_base, "vera")
    pack.place(0, member(), zero_of(tiny_base), {"optimizer_step": 0})
    tensors, meta = pack.harvest(0)
    with pytest.raises(ModelError, match="not of this blueprint"):
        solo(tiny_base, "ia3").place(0, member(), tensors, meta)
    constants = [name for name in tensors if name.startswith("constant/")]
    assert constants == ["constant/base_model.vera_A", "constant/base_model.vera_B"]
    with pytest.raises(ModelError, match="what is not trained"):
        pack.place(0, member(), {name: tensor for name, tensor in tensors.items() if name not in constants}, meta)
    pack.place(0, member(), tensors | {name: 2 * tensors[name] for name in constants}, meta)
    doubled, _ = pack.harvest(0)
    assert torch.equal(doubled[constants[0]], 2 * tensors[constants[0]])  # those of the seed, not those that peft draws
    with pytest.raises(ModelError, match=r"adapter\.targets names 'query'"):
        solo(tiny_base, "loha", targets=("query",))
    with pytest.raises(ModelError, match="peft refuses"):
        solo(tiny_base, "oft", oft_block_size=7).place(0, member(), zero_of(tiny_base), {"optimizer_step": 0})
    folder = left_of(pack, tiny_base, tmp_path)
    with pytest.raises(MergeError, match="not 'IA3'"):
        read_solo(folder, adapter_of("ia3"))
    with pytest.raises(MergeError, match="d_initial"):
        read_solo(folder, adapter_of("vera", d_initial=0.2))


def test_every_kind_of_peft_is_trained_or_refused_and_has_its_fields() -> None:
    """By peft's own config classes: a field that is new in peft, or has another default, is noticed here."""
    assert {kind.value.lower() for kind in peft.PeftType} == KINDS.keys() | OTHER_KINDS.keys()
    for name, kind in KINDS.items():
        config = {
            field.name: field for field in dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name.upper())])
        }
        own = {kind.renamed.get(field, field): info.default for field, info in kind.model_fields.items() if field != "type"}
        assert own.keys() <= config.keys(), name
        assert config.keys() - own.keys() <= LEFT_OUT | (OF_LORA if name == "adalora" else set()), name
        for field, default in own.items():
            if field not in ("target_modules", "modules_to_save", "feedforward_modules"):
                assert default == config[field].default, (name, field)
    assert PROJECTIONS[0] in adapter_of("road").model_copy(update={"targets": None}).aimed_at(PROJECTIONS).targets
