"""Folding as people come to it: names and paths of bases, folders called anything, configs that fit no model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.evaluate import fold
from chrysalis_ray.evaluate.fold import fold_adapter
from chrysalis_ray.merge.finished import finished_modules
from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter

MODULE = "model.layers.0.self_attn.q_proj"


def adapter(folder, base_model="org/base", draw=0, **more):
    """A LoRA of rank 2 on one module of `tiny_base`, or on those given as name -> out."""
    generator = torch.Generator().manual_seed(draw)
    outs = more or {MODULE: 64}
    factors = {
        name: (torch.randn(2, 48, generator=generator), torch.randn(out, 2, generator=generator)) for name, out in outs.items()
    }
    write_adapter(folder, AdapterWeights(str(base_model), None, 2, 4.0, False, tuple(outs), factors))
    return str(folder)


def copied(base, folder, **config):
    shutil.copytree(base, folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **config}))
    return folder


def in_the_cache(base, folder):
    """The base as the hub keeps it: links to blobs."""
    snapshot, blobs = folder / "models--org--model" / "snapshots" / ("a" * 40), folder / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, blobs / f"blob{number}")
        (snapshot / file.name).symlink_to(blobs / f"blob{number}")
    return snapshot


def refused(tmp_path, match, name, base, out="out"):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MergeError, match=match) as refusal:
        fold_adapter(name, base, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before
    return refusal.value


# whose base it is -----------------------------------------------------------------------------------------------------


def test_an_adapter_that_names_its_base_by_a_path_is_not_refused_for_the_name_that_the_base_knows(tmp_path, tiny_base):
    """The path of the very folder, in the hub's cache or of a base grown here; of a copy; of another machine."""
    cached = in_the_cache(tiny_base, tmp_path)
    for number, (named, known_by) in enumerate(
        [(cached, "weights"), (tiny_base, "weights"), ("/home/me/model", "shapes"), ("./model", "shapes"),
         ("C:\\models\\model", "shapes"), ("a/b\0", "refused"), ("org/other", "refused"), ("org/model", "name")]
    ):  # fmt: skip
        name = adapter(tmp_path / f"a{number}", named)
        if known_by == "refused":
            assert "adapter_config.json" in refused(tmp_path, "is 'org/model'", name, cached).remedy
        else:
            assert fold_adapter(name, cached, tmp_path / f"out{number}")["base_known_by"] == known_by


def test_a_path_from_here_that_is_the_folder_says_so(tmp_path, tiny_base, monkeypatch):
    shutil.copytree(tiny_base, tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    name = adapter(tmp_path / "a", "models/mine")
    assert fold_adapter(name, tmp_path / "models" / "mine", tmp_path / "out")["base_known_by"] == "weights"


def test_what_was_trained_on_a_quantised_folder_is_folded_into_what_that_was_made_from(tmp_path, tiny_base):
    """Its own folder cannot be added to, and says nothing about the one that can."""
    packed = copied(tiny_base, tmp_path / "packed", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    name = adapter(tmp_path / "a", packed)
    refused(tmp_path, "quantised .bitsandbytes", name, packed)
    assert fold_adapter(name, tiny_base, tmp_path / "out")["base_known_by"] == "shapes"


def test_a_model_with_an_adapter_in_it_is_no_base_of_its_siblings(tmp_path, tiny_base):
    """Twice the same adapter would be twice its delta; another one of the old base was not trained on the new."""
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", draw=1)
    fold_adapter(one, tiny_base, tmp_path / "folded")
    refused(tmp_path, "was folded into .* already", one, tmp_path / "folded")
    refused(tmp_path, "with another adapter folded in", two, tmp_path / "folded")
    trained_on_it = adapter(tmp_path / "next", tmp_path / "folded", draw=2)
    assert fold_adapter(trained_on_it, tmp_path / "folded", tmp_path / "twice")["base_known_by"] == "weights"
    (tmp_path / "folded" / "fold.json").write_text("[]")
    refused(tmp_path, "cannot be read", two, tmp_path / "folded")


def test_a_grown_base_without_its_tokenizer_is_refused_and_not_a_crash(tmp_path, tiny_base):
    base = copied(tiny_base, tmp_path / "base")
    (base / "base.json").write_text(json.dumps({"base": {"name": "embedded-1", "sha256": "0"}}))
    (base / "tokenizer.json").unlink()
    refused(tmp_path, "base.json and its folder cannot be read", adapter(tmp_path / "a", "embedded-1"), base)


# where it goes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lock", "finished.json", "model", "config.json"])
def test_the_model_can_be_called_anything(tmp_path, tiny_base, name):
    told = fold_adapter(adapter(tmp_path / "a"), tiny_base, tmp_path / "models" / name)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [name]
    assert all((tmp_path / "models" / name / file).is_file() for file in told["files"])


def test_a_model_may_lie_in_the_folder_of_its_base_which_stays_as_it_was(tmp_path, tiny_base):
    base = copied(tiny_base, tmp_path / "base")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    told = fold_adapter(adapter(tmp_path / "a"), base, base / "tokenizer-of-mine")
    assert {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()} == before
    assert fold_adapter(str(tmp_path / "a"), base, base / "tokenizer-of-mine") == {**told, "done_before": True}
    refused(tmp_path, "is not empty and holds no fold.json", str(tmp_path / "a"), base, out="base")


def test_what_is_unfinished_may_be_taken_away_by_who_finds_the_model_finished(tmp_path):
    """Two of the same command end at the same moment; the same for a merge."""
    with fold._alone(tmp_path / "fold"):
        shutil.rmtree(tmp_path / "fold")
    with finished_modules(tmp_path / "merge", "0" * 64):
        shutil.rmtree(tmp_path / "merge")
    with fold._alone(tmp_path / "fold"), pytest.raises(MergeError, match="another process"), fold._alone(tmp_path / "fold"):
        pass
    assert list(tmp_path.iterdir()) == []


# what a base can be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{"hidden_size": "48"}, {"hidden_size": -4}, {"num_attention_heads": 0}, {"num_hidden_layers": None}, {"hidden_act": [1]},
     {"model_type": [1]}, {"dtype": "evil"}, {"pad_token_id": 999}, {"tie_word_embeddings": "no"}, {"rope_parameters": 5}],
    ids=lambda config: next(iter(config)),
)  # fmt: skip
def test_a_config_that_no_model_can_be_made_of_is_told(tmp_path, tiny_base, config):
    base = copied(tiny_base, tmp_path / "base", **config)
    refused(tmp_path, "no model can be made of .*config.json", adapter(tmp_path / "a"), base)


def test_attention_that_is_not_installed_here_does_not_matter(tmp_path, tiny_base):
    base = copied(tiny_base, tmp_path / "base", attn_implementation="flash_attention_2")
    assert fold_adapter(adapter(tmp_path / "a"), base, tmp_path / "out")["modules"] == 1


def named_as_the_manifest(base):
    (base / "model.safetensors").rename(base / "fold.json")
    said = dict.fromkeys(load_file(base / "fold.json"), "fold.json")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": said}))


def empty(base):
    save_file({}, base / "model.safetensors")


def fetched_by_half(base):
    (base / "vocab.json").symlink_to(base / "blob-that-never-came")


def no_config(base):
    (base / "config.json").unlink()


@pytest.mark.parametrize(
    ("harm", "word"),
    [(named_as_the_manifest, "no plain name.safetensors"), (empty, "hold no tensor"), (fetched_by_half, "has no vocab.json"),
     (no_config, "has no config.json")],
)  # fmt: skip
def test_folders_that_are_no_whole_model_are_refused(tmp_path, tiny_base, harm, word):
    base = copied(tiny_base, tmp_path / "base")
    harm(base)
    refused(tmp_path, word, adapter(tmp_path / "a"), base)


@pytest.mark.parametrize("metadata", [None, 5, {"total_size": 1, "by": "hand"}])
def test_an_index_with_any_metadata_tells_of_a_head_that_was_added(tmp_path, tiny_base, metadata):
    base = copied(tiny_base, tmp_path / "base")
    (base / "model.safetensors").rename(base / "part.safetensors")
    said = dict.fromkeys(load_file(base / "part.safetensors"), "part.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": said}))
    assert fold_adapter(adapter(tmp_path / "a", lm_head=512), base, tmp_path / "out")["untied"] == "lm_head.weight"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = load_file(tmp_path / "out" / "part.safetensors")
    assert index["weight_map"].keys() == held.keys() == {*said, "lm_head.weight"}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    assert index["metadata"].get("by") == ("hand" if isinstance(metadata, dict) else None)


def test_small_files_of_any_name_come_along(tmp_path, tiny_base):
    base = copied(tiny_base, tmp_path / "base")
    (base / "LICENSE (of the weights).txt").write_text("free")
    fold_adapter(adapter(tmp_path / "a"), base, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE (of the weights).txt").read_text() == "free"
