"""The base: grown, found, checked, refused."""

from __future__ import annotations

import inspect
import json
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from chrysalis_ray.config.blueprint import EmbeddedBase, PretrainedBase
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.layout import CacheLayout
from chrysalis_ray.training.base import load_base, prepare_base
from chrysalis_ray.training.embedded import END
from chrysalis_ray.training.muon import Muon, orthogonalised

SPEC = EmbeddedBase(
    type="embedded",
    hidden_size=32,
    layers=2,
    heads=2,
    key_value_heads=1,
    head_size=16,
    intermediate_size=64,
    vocabulary=384,
    pretrain_tokens=16_384,
)


@dataclass(frozen=True)
class Text:
    text: str


class ModuleText:
    """As much of a genome as a base reads: two modules' source as two domains."""

    genome_id = "modules"
    chats: frozenset[str] = frozenset()
    domains = ("json", "textwrap")

    def documents(self, domain: str, split: str) -> Iterator[Text]:
        assert split == "train"
        return iter([Text(inspect.getsource({"json": json, "textwrap": textwrap}[domain]))])


def silent(message: str) -> None:
    assert message


def test_a_grown_base_is_an_ordinary_model_folder_and_is_grown_once(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    told: list[str] = []
    cache = CacheLayout(tmp_path / "cache")
    base = prepare_base(SPEC, ModuleText(), cache, 3, told.append)  # type: ignore[arg-type]
    assert any("loss" in line for line in told)
    model = load_base(base["path"], "fp32")
    assert (base["layers"], base["vocabulary"], base["type"]) == (2, 384, "embedded")
    assert base["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(base["path"])
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == (END, END, 384)
    assert tokenizer.decode(tokenizer("naïve: 世界 \U0001f98b").input_ids) == "naïve: 世界 \U0001f98b"
    again = prepare_base(SPEC, ModuleText(), cache, 3, pytest.fail)  # type: ignore[arg-type]
    assert again == base
    elsewhere = prepare_base(SPEC, ModuleText(), CacheLayout(tmp_path / "other"), 3, silent)  # type: ignore[arg-type]
    assert elsewhere["sha256"] == base["sha256"]
    other = prepare_base(SPEC, ModuleText(), cache, 4, silent)  # type: ignore[arg-type]
    assert other["sha256"] != base["sha256"]


def test_pre_training_teaches_it_something(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    losses = {}
    for tokens in (0, 16_384):
        spec = SPEC.model_copy(update={"pretrain_tokens": tokens})
        folder = prepare_base(spec, ModuleText(), CacheLayout(tmp_path), 0, silent)["path"]  # type: ignore[arg-type]
        ids = AutoTokenizer.from_pretrained(folder)(inspect.getsource(inspect.getdoc), return_tensors="pt").input_ids
        with torch.no_grad():
            losses[tokens] = load_base(folder, "fp32")(input_ids=ids, labels=ids).loss.item()
    assert losses[16_384] < losses[0] - 0.5


def test_a_damaged_cache_entry_is_grown_again(tmp_path: Path) -> None:
    cache = CacheLayout(tmp_path)
    base = prepare_base(SPEC, ModuleText(), cache, 3, silent)  # type: ignore[arg-type]
    (Path(base["path"]) / "model.safetensors").write_bytes(b"torn")
    assert prepare_base(SPEC, ModuleText(), cache, 3, silent) == base  # type: ignore[arg-type]
    load_base(base["path"], "fp32")


def test_a_local_folder_is_described_without_being_copied(tiny_base: Path, tmp_path: Path) -> None:
    spec = PretrainedBase(type="pretrained", model=str(tiny_base))
    base = prepare_base(spec, ModuleText(), CacheLayout(tmp_path), 0, silent)  # type: ignore[arg-type]
    assert (base["path"], base["vocabulary"], base["revision"]) == (str(tiny_base), 512, None)
    assert prepare_base(spec, ModuleText(), CacheLayout(tmp_path), 0, pytest.fail) == base  # type: ignore[arg-type]


def damage(base: Path, folder: Path, kind: str) -> None:
    """A copy of the base with one fault."""
    shutil.copytree(base, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "broken tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif kind == "remote code":
        config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoModel": "evil.Model"}}))
    elif kind == "broken config":
        config.write_text("{")
    elif kind == "foreign tokenizer":
        config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 300}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", "no safetensors weights .*pytorch_model.bin"),
        ("truncated", "no whole safetensors file"),
        ("no tokenizer", "has no tokenizer.json"),
        ("broken tokenizer", "is no tokenizer"),
        ("remote code", "Python code of its own"),
        ("broken config", "config.json cannot be read"),
        ("foreign tokenizer", "has 512 tokens, the model 300"),
    ],
)
def test_a_faulty_folder_is_refused_with_a_reason(kind: str, message: str, tiny_base: Path, tmp_path: Path) -> None:
    damage(tiny_base, tmp_path / "base", kind)
    spec = PretrainedBase(type="pretrained", model=str(tmp_path / "base"))
    with pytest.raises(ModelError, match=message):
        prepare_base(spec, ModuleText(), CacheLayout(tmp_path / "cache"), 0, silent)  # type: ignore[arg-type]


def test_weights_that_do_not_fill_the_model_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((tiny_base / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config["layer_types"] = ["full_attention"] * 3
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="leave 11 tensors of the model empty"):
        load_base(tmp_path / "base", "fp32")


def test_a_name_that_is_neither_folder_nor_model_is_refused(tmp_path: Path) -> None:
    spec = PretrainedBase(type="pretrained", model="./no/such/folder")
    with pytest.raises(ModelError, match="neither a folder here nor the name of a hub model"):
        prepare_base(spec, ModuleText(), CacheLayout(tmp_path), 0, silent)  # type: ignore[arg-type]


def test_without_network_the_remedy_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec = PretrainedBase(type="pretrained", model="owner/a-model-that-is-not-cached-here")
    with pytest.raises(ModelError, match="without network copy the model folder here"):
        prepare_base(spec, ModuleText(), CacheLayout(tmp_path), 0, silent)  # type: ignore[arg-type]


def test_muon_is_torchs_muon_without_its_rounding() -> None:
    """torch's rounds to bf16 while it orthogonalises; ours must stay as near to it as that lets it be."""
    generator = torch.Generator().manual_seed(3)
    for shape in ((24, 40), (40, 24), (32, 32)):
        mine, theirs = (torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for _ in range(2))
        ours = Muon([mine], lr=0.02)
        reference = torch.optim.Muon(
            [theirs], lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        start = mine.detach().clone()
        for _ in range(4):
            mine.grad = torch.randn(shape, generator=generator)
            theirs.grad = mine.grad.clone()
            ours.step()
            reference.step()
        moved = (theirs - start).norm()
        assert (mine - theirs).norm() <= 0.02 * moved
        spread = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=generator)))
        assert 0.5 < spread.min() <= spread.max() < 1.3
