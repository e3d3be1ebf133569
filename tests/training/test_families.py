"""Every supported family keeps the contracts, every other one is refused with its reason.

The oracle is plain PEFT as a user would write it who packs nothing: every document a sequence of its own, whole logits of
the whole model, torch's cross entropy, clip and AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import REFUSED, SUPPORTED, Family, write_family
from training_texts import Rows, TextTokens, fresh_adapter, same, variant, weights
from transformers import GPT2Config, MistralConfig, PretrainedConfig

from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.records import Variant
from chrysalis_ray.seed.adapter import read_adapter, write_adapter
from chrysalis_ray.seed.zero import write_adapter_zero
from chrysalis_ray.training.base import inspect_folder, load_base
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.planning.shapes import read_shape
from chrysalis_ray.training.schedules import learning_rate_at
from chrysalis_ray.training.step import train_chunk
from chrysalis_ray.training.trunk import checkpoint_activations

STEPS = 4
RANK = 4
VARIANTS = (
    variant(0, rank=4, alpha=8.0, learning_rate=1e-3, clip=1.0, decay="cosine", warmup_fraction=0.0),
    variant(1, rank=2, alpha=12.0, learning_rate=4e-3, weight_decay=0.1, clip=0.2, decay="linear", warmup_fraction=0.2),
    variant(2, rank=3, alpha=4.0, use_rslora=True, learning_rate=2e-3, clip=0.0, decay="constant", beta2=0.95),
)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Grown:
    """A family's model folder, and its three variants after a few steps in one pack, in fp64."""

    name: str
    family: Family
    folder: Path
    pack: Pack


@pytest.fixture(scope="session")
def folder_of(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("families") / name
            made[name] = write_family(SUPPORTED[name].config(), folder, tiny_base)
        return made[name]

    return make


@pytest.fixture(scope="module", params=SUPPORTED)
def grown(request: pytest.FixtureRequest, folder_of: Callable[[str], Path], tokens: TextTokens) -> Grown:
    folder, family = folder_of(request.param), SUPPORTED[request.param]
    pack = packed(folder, family, "fp64")
    train_chunk(pack, range(3), tokens, STEPS)
    return Grown(request.param, family, folder, pack)


def packed(folder: Path, family: Family, precision: str, lanes: str = "compacted", checkpointing: bool = False) -> Pack:
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = load_base(folder, precision)
    if checkpointing:
        checkpoint_activations(model)
    engine = make_engine(0, "none", precision, "cpu")
    pack = Pack(model, family.targets, 3, RANK, engine, lanes=lanes, dtype=dtype)  # type: ignore[arg-type]
    for slot, member in enumerate(VARIANTS):
        pack.place(slot, member, fresh_adapter(pack, member.index), {"optimizer_step": 0})
    return pack


# alone, as a user would write it --------------------------------------------------------------------------------------


def documents(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of every document as a sequence of its own, padded on the right, where causal attention sees nothing."""
    ids, labels = [], []
    for row in range(len(rows.document)):
        for document in np.unique(rows.document[row][rows.document[row] >= 0]):
            inside = rows.document[row] == document
            ids.append(torch.from_numpy(rows.input_ids[row][inside]))
            labels.append(torch.from_numpy(rows.labels[row][inside]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=-100)


def train_alone(grown: Grown, member: Variant, tokens: TextTokens) -> Tensors:
    from peft import LoraConfig, get_peft_model

    hyper = member.hyperparameters
    config = LoraConfig(r=hyper.rank, lora_alpha=hyper.alpha, use_rslora=hyper.use_rslora,
                        target_modules=list(grown.family.targets), fan_in_fan_out=grown.name == "gpt2")  # fmt: skip
    model = get_peft_model(load_base(grown.folder, "fp64"), config)
    start = fresh_adapter(grown.pack, member.index)
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data = start[f"weight/{name}.lora_A"][: hyper.rank].double()
        layer.lora_B["default"].weight.data = start[f"weight/{name}.lora_B"][:, : hyper.rank].double()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, betas=(hyper.beta1, hyper.beta2), weight_decay=hyper.weight_decay)
    feed = Feed(member, tokens)
    for step in range(STEPS):
        ids, labels = documents(tokens.batch(feed.step(step).rows, "train"))
        adamw.param_groups[0]["lr"] = learning_rate_at(hyper, step, member.steps)
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten())
        adamw.zero_grad()
        loss.backward()
        if hyper.clip:
            torch.nn.utils.clip_grad_norm_(parameters, hyper.clip)
        adamw.step()
    return {
        f"weight/{name}.lora_{side}": getattr(layer, f"lora_{side}")["default"].weight.data
        for name, layer in layers.items()
        for side in "AB"
    }


def largest_difference(left: Tensors, right: Tensors) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


# supported ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", range(3))
def test_packed_equals_separate_peft_on_separate_documents(grown: Grown, slot: int, tokens: TextTokens) -> None:
    found, expected = weights(grown.pack, slot), train_alone(grown, VARIANTS[slot], tokens)
    assert largest_difference(found, expected) <= (1e-12 if grown.family.exact else 1e-7)
    start = fresh_adapter(grown.pack, VARIANTS[slot].index)
    moved = {name: (value - start[name][: value.shape[0], : value.shape[1]]).abs().max() for name, value in found.items()}
    assert min(moved.values()) > 1e-4, "every target learns"


def test_the_loss_is_the_model_s_own(grown: Grown, tokens: TextTokens) -> None:
    """Of documents that share rows, under the bare base, against the model's own `loss` on each document alone."""
    tolerance = 1e-12 if grown.family.exact else 1e-6
    pack, base = packed(grown.folder, grown.family, "fp64"), load_base(grown.folder, "fp64")
    pack.load_adapter(
        0, {t.name: (torch.ones(1, t.in_features), torch.ones(t.out_features, 1)) for t in pack.bank.targets}, 0.0
    )
    rows = tokens.batch([("code", 0), ("code", 1), ("prose", 2)], "select")
    scores, seen = pack.score([0], rows)[0].numpy(), 0
    for row in range(3):
        for document in np.unique(rows.document[row][rows.document[row] >= 0]):
            inside = rows.document[row] == document
            ids, labels = (torch.from_numpy(part[row : row + 1, inside]) for part in (rows.input_ids, rows.labels))
            with torch.no_grad():
                own = base(input_ids=ids, labels=torch.cat([torch.tensor([[-100]]), labels[:, :-1]], 1))
            assert scores[row, inside].sum() / (labels != -100).sum() == pytest.approx(own.loss.item(), abs=2e-6)
            plain = torch.nn.functional.cross_entropy(own.logits[0], labels[0], reduction="none").numpy()
            assert np.abs(plain - scores[row, inside]).max() <= tolerance
            seen += 1
    assert seen > 5


def test_a_neighbour_of_nan_changes_no_bit(grown: Grown, tokens: TextTokens) -> None:
    healthy, poisoned = (packed(grown.folder, grown.family, "fp32") for _ in range(2))
    poisoned.bank.flat_SP[1].fill_(float("nan"))
    for pack in (healthy, poisoned):
        train_chunk(pack, range(3), tokens, 2)
    assert all(same(healthy.harvest(slot)[0], poisoned.harvest(slot)[0]) for slot in (0, 2))
    assert all(torch.isfinite(tensor).all() for tensor in weights(poisoned, 2).values())


def test_recomputed_activations_and_churn_change_no_bit(grown: Grown, tokens: TextTokens) -> None:
    """Fixed lanes: with and without activation checkpointing, and with a neighbour pruned and another put in its place."""
    quiet = packed(grown.folder, grown.family, "fp32", "fixed")
    busy = packed(grown.folder, grown.family, "fp32", "fixed", checkpointing=True)
    train_chunk(quiet, range(3), tokens, 3)
    train_chunk(busy, range(3), tokens, 1)
    busy.clear(1)
    train_chunk(busy, [2, 0], tokens, 1)
    busy.place(1, variant(7, rank=3), fresh_adapter(busy, 7), {"optimizer_step": 0})
    train_chunk(busy, [0, 1, 2], tokens, 1)
    assert all(same(quiet.harvest(slot)[0], busy.harvest(slot)[0]) for slot in (0, 2))


def test_plain_peft_loads_what_was_trained(grown: Grown, tokens: TextTokens, tmp_path: Path) -> None:
    """From adapter zero to the exported folder: plain PEFT gives every document the losses that the pack gives it."""
    from peft import PeftModel

    write_adapter_zero(grown.folder, "base", Lora(targets=grown.family.targets), RANK, 1, tmp_path / "zero")
    zero = read_adapter(tmp_path / "zero")
    member, trained = VARIANTS[1].hyperparameters, weights(grown.pack, 1)
    factors = {
        name: (trained[f"weight/{name}.lora_A"].float(), trained[f"weight/{name}.lora_B"].float()) for name in zero.factors
    }
    exported = replace(zero, rank=member.rank, alpha=member.alpha, factors=factors)
    write_adapter(tmp_path / "exported", exported)
    pack = packed(grown.folder, grown.family, "fp64")
    pack.load_adapter(0, read_adapter(tmp_path / "exported").factors, exported.scale)
    loaded = PeftModel.from_pretrained(load_base(grown.folder, "fp64"), str(tmp_path / "exported"))
    rows = tokens.batch([("prose", 0), ("code", 3)], "select")
    ids, labels = documents(rows)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(loaded(input_ids=ids).logits.mT, labels, reduction="none")
    score = pack.score([0], rows)[0]
    assert losses[labels != -100].tolist() == pytest.approx(score[torch.from_numpy(rows.labels) != -100].tolist(), abs=1e-6)
    assert zero.fan_in_fan_out == exported.fan_in_fan_out == (grown.name == "gpt2")


def test_the_planner_counts_what_there_is(grown: Grown) -> None:
    shape = read_shape(grown.folder / "config.json", grown.name)
    assert shape.parameters == load_base(grown.folder, "fp32").num_parameters()
    assert inspect_folder(grown.folder)["layers"] == shape.layers == 2
    assert shape.vocabulary == 512
    bank = sum(RANK * (target.in_features + target.out_features) for target in grown.pack.bank.targets)
    assert shape.lora_parameters(RANK, grown.family.targets) == bank
    assert {name.rpartition(".")[2] for name in shape.linears()} == set(grown.family.targets)


# refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_share_rows_is_refused_with_its_reason(name: str, tiny_base: Path, tmp_path: Path) -> None:
    config, target, reason = REFUSED[name]
    model = load_base(write_family(config(), tmp_path / name, tiny_base), "fp32")
    with pytest.raises(ModelError, match=reason) as refusal:
        Pack(model, [target], 2, RANK, make_engine(0, "none", "fp32", "cpu"))
    assert "choose a" in str(refusal.value)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**{**vars(SUPPORTED["mistral"].config()), "sliding_window": 40}),
        GPT2Config(vocab_size=512, n_embd=48, n_layer=1, n_head=4, n_positions=40),
    ],
    ids=["window", "positions"],
)
def test_rows_longer_than_a_window_or_the_positions_are_refused(
    config: PretrainedConfig, tiny_base: Path, tmp_path: Path, tokens: TextTokens
) -> None:
    model = load_base(write_family(config, tmp_path / "base", tiny_base), "fp32")
    targets = ["c_attn"] if config.model_type == "gpt2" else ["q_proj"]
    pack = Pack(model, targets, 1, RANK, make_engine(0, "none", "fp32", "cpu"))
    pack.place(0, VARIANTS[0], fresh_adapter(pack, 0), {"optimizer_step": 0})
    with pytest.raises(ModelError, match=r"rows of 48 tokens are longer than the 40(.|\n)*sequence_length to at most 40"):
        train_chunk(pack, [0], tokens, 1)
