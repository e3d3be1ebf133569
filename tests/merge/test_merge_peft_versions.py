"""Adapters that peft 0.17 to 0.21 wrote, kept as they did (`write_peft_folders.py`): read, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from write_peft_folders import KINDS, READ, base

from chrysalis_ray.config.merges import EnsembleMerge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.evaluate.folders import merge_folders
from chrysalis_ray.seed.adapter import CONFIG, WEIGHTS, read_adapter
from chrysalis_ray.seed.streamed import open_adapter

FOLDERS = Path(__file__).parent / "peft_folders"
CONFIGS = json.loads((FOLDERS / "configs.json").read_text())
REFUSED = {
    "dora": "use_dora",
    "lora_bias": "lora_bias",
    "biases": "trained biases",
    "modules_to_save": "modules_to_save",
    "pissa": "altered the base weights",
    "tokens": "trainable_token_indices",
}
every_version = pytest.mark.parametrize("version", CONFIGS)


def written(version: str, kind: str, folder: Path) -> Path:
    """The folder that this version wrote."""
    folder.mkdir(parents=True)
    config = {**CONFIGS[version]["plain"], **(CONFIGS[version][kind] if kind != "plain" else {})}
    (folder / CONFIG).write_text(json.dumps(config))
    own = FOLDERS / f"{kind}-{version}.safetensors"
    shutil.copy(own if own.exists() else FOLDERS / f"{kind}.safetensors", folder / WEIGHTS)
    return folder


def test_the_versions_and_the_kinds_are_those_that_were_promised():
    assert [version.rpartition(".")[0] for version in CONFIGS] == ["0.17", "0.18", "0.19", "0.20", "0.21"]
    assert set(READ) | set(REFUSED) == set(KINDS)
    assert all(set(own) == set(KINDS) for own in CONFIGS.values())
    assert len({tuple(sorted(own["plain"])) for own in CONFIGS.values()}) > 1  # they do differ


@every_version
@pytest.mark.parametrize("kind", READ)
def test_the_deltas_are_those_that_peft_computed_when_it_wrote_them(tmp_path, version, kind):
    folder = written(version, kind, tmp_path / "a")
    expected = load_file(FOLDERS / f"{kind}.deltas.safetensors")
    for adapter in (read_adapter(folder), open_adapter(folder)):
        assert adapter.base_model == "org/base"
        assert set(adapter.factors) == set(expected)
        for module, delta in expected.items():
            torch.testing.assert_close(adapter.delta(module), delta, atol=1e-6, rtol=1e-5)


@every_version
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_lora_is_refused_by_its_name(tmp_path, version, kind):
    folder = written(version, kind, tmp_path / "a")
    for read in (read_adapter, open_adapter):
        with pytest.raises(MergeError) as refused:
            read(folder)
        assert REFUSED[kind] in str(refused.value)
        assert "remedy:" in str(refused.value)


@pytest.mark.parametrize("kind", READ)
def test_one_of_every_version_merge_into_what_all_of_them_are(tmp_path, kind):
    names = [str(written(version, kind, tmp_path / version)) for version in CONFIGS]
    merge_folders(names, EnsembleMerge(method="ensemble"), tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        one = PeftModel.from_pretrained(base(), names[0]).eval()(ids).logits
        merged = PeftModel.from_pretrained(base(), str(tmp_path / "out")).eval()(ids).logits
        torch.testing.assert_close(merged, one, atol=1e-5, rtol=1e-4)
        assert float((one - base().eval()(ids).logits).abs().max()) > 1e-3
