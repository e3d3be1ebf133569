"""All that adapters feed the modules of their base: what a plain model sees on the very rows, a pass for what memory holds."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_evaluate_heldout import TARGETS, Rows, adapters, base_model
from test_evaluate_inputs import outputs_apart
from transformers import AutoModelForCausalLM

from chrysalis_ray.config.merges import EnsembleMerge, RegmeanMerge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant, read_json, write_json
from chrysalis_ray.evaluate import whole_inputs
from chrysalis_ray.evaluate.folders import Texts, merge_folders
from chrysalis_ray.evaluate.inputs import read_rows
from chrysalis_ray.evaluate.stages import Judging, merge_population
from chrysalis_ray.evaluate.subjects import Candidate, OwnRows
from chrysalis_ray.evaluate.whole_inputs import (
    groups,
    keep_whole_inputs,
    open_moments,
    refuse_too_little_room,
    rows_of,
    write_moments,
)
from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.pack import Pack

WHOLE = RegmeanMerge(method="regmean", space="dense", rank="exact")


class TrainRows(Rows):
    """The same rows, to train on."""

    def rows(self, domain, split):
        return super().rows(domain, "select")

    def token_count(self, domain, split):
        return sum(len(ids) for (own, _), parts in self.texts.items() if own == domain for ids in parts)

    def label_counts(self, domain, split):
        return np.array([(self._rows[domain, row].labels != -100).sum() for row in range(self.rows(domain, split))])


def variant(levels) -> Variant:
    return Variant("v0", 0, 7, "", "", "", Hyperparameters(), Epigenome(levels), 8, 2, 2, 16)


@pytest.mark.parametrize("at_once", [8, 1 << 30], ids=["module by module", "in one pass"])
def test_a_variant_is_heard_on_rows_of_its_own_mix(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(whole_inputs, "AT_ONCE", at_once)
    pack = Pack(base_model(), TARGETS, 3, 3, make_engine(0, "none", "fp32", "cpu"))
    store, asked = TrainRows(), []
    for slot, factors in enumerate(adapters()[:2]):
        rank = next(iter(factors.values()))[0].shape[0]
        write_adapter(tmp_path / f"v{slot}", AdapterWeights("b", None, rank, 2.0 * rank, False, TARGETS, factors))
        mix = variant({"a": 1.0, "b": 3.0} if slot else {"a": 3.0, "b": 1.0}).to_json()
        asked.append(Candidate(f"v{slot}", str(tmp_path / f"v{slot}"), own=OwnRows(str(tmp_path / f"{slot}.st"), mix, 16)))
    keep_whole_inputs(pack, store, [Candidate("seed"), *asked], 6, Path)
    taken = [rows_of(each.own, store, 6) for each in asked]
    assert taken[0] != taken[1]
    for number, factors in enumerate(adapters()[:2]):
        dense = copy.deepcopy(base_model())
        with torch.no_grad():
            for module, (a_ri, b_or) in factors.items():
                dense.get_submodule(module).weight += 2.0 * (b_or @ a_ri)
        found = open_moments(tmp_path / f"{number}.st")
        assert sorted(found) == sorted(factors)
        for module in factors:
            torch.testing.assert_close(found[module], plain_moment(dense, module, store, taken[number]), atol=1e-4, rtol=1e-4)
            assert torch.equal(found[module], found[module].T)


def plain_moment(model, module, store, rows):
    """E[x x^T] over the tokens of documents in these rows, each document fed alone to an ordinary model."""
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda linear, args: seen.append(args[0][0]))
    batch = store.batch(rows, "train")
    with torch.no_grad():
        for ids, document in zip(batch.input_ids, batch.document, strict=True):
            for own in [own for own in dict.fromkeys(document.tolist()) if own >= 0]:
                model(torch.from_numpy(ids[document == own])[None])
    handle.remove()
    x_TI = torch.cat(seen)
    return x_TI.T @ x_TI / len(x_TI)


def test_rows_are_those_the_variant_was_trained_on():
    own = OwnRows("", variant({"a": 1.0, "b": 0.0}).to_json(), 12)
    assert {domain for domain, _ in rows_of(own, TrainRows(), 5)} == {"a"}
    assert len(rows_of(own, TrainRows(), 5)) == 5
    assert len(rows_of(own, TrainRows(), 99)) == 12
    assert rows_of(dataclasses.replace(own, rows=0), TrainRows(), 5) == []


def test_no_pass_holds_more_than_it_may(monkeypatch):
    sizes = {"a": 10, "b": 20, "c": 10, "d": 100, "e": 10}
    monkeypatch.setattr(whole_inputs, "AT_ONCE", 8 * 500)
    assert groups(sizes) == [{"a": 10, "b": 20}, {"c": 10}, {"d": 100}, {"e": 10}]
    assert groups({}) == []


def test_a_disk_without_room_is_said_in_numbers(tmp_path, monkeypatch):
    sizes = {"down": 12288}
    monkeypatch.setattr(whole_inputs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    with pytest.raises(MergeError, match=r"4\.83 GB.* 1\.00 GB left"):
        refuse_too_little_room(tmp_path, [sizes] * 8)
    assert refuse_too_little_room(tmp_path, [sizes]) == 4 * 12288**2


def test_files_that_are_none_are_refused(tmp_path):
    for name, content in (("cut", b"\xff" * 7), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MergeError, match="measure the inputs again"):
            open_moments(tmp_path / name)
    with pytest.raises(MergeError, match="was not measured"):
        open_moments(tmp_path / "absent")


@pytest.fixture(scope="module")
def three(tmp_path_factory, tiny_base):
    """Adapters of peft, one of them with fewer modules, and two texts."""
    folder = tmp_path_factory.mktemp("three")
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    for number, targets in enumerate((["q_proj", "down_proj"], ["q_proj"])):
        torch.manual_seed(number)
        settings = {"r": 2 + number, "lora_alpha": 8, "target_modules": targets}
        model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings))
        model.save_pretrained(str(folder / f"a{number}"))
    (folder / "code.txt").write_text(Path(__file__).read_text()[:6000])
    (folder / "text.txt").write_text("Butterflies rest while their wings dry. " * 60)
    return tiny_base, [str(folder / "a0"), str(folder / "a1")], (folder / "code.txt", folder / "text.txt")


def test_adapters_from_anywhere_are_merged_by_all_that_comes_in(tmp_path, three, monkeypatch):
    base, names, files = three
    manifest = merge_folders(names, WHOLE, tmp_path / "whole", texts=Texts(base, files))
    core = RegmeanMerge(method="regmean", rank="exact", ridge=1e-9)
    merge_folders(names, core, tmp_path / "core", texts=Texts(base, files))
    merge_folders(names, EnsembleMerge(method="ensemble", rank="exact"), tmp_path / "mean")
    apart = {name: outputs_apart(base, names, files, tmp_path / name) for name in ("whole", "core", "mean")}
    assert manifest["notes"]["error_to_mean"] == pytest.approx(apart["whole"] / apart["mean"], rel=1e-3)
    assert apart["whole"] < 0.98 * apart["mean"]
    free = RegmeanMerge(method="regmean", space="dense", rank="exact", ridge=1e-6, off_diagonal=1.0)
    merge_folders(names, free, tmp_path / "free", texts=Texts(base, files))
    assert outputs_apart(base, names, files, tmp_path / "free") < apart["core"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["core", "free", "mean", "whole"]  # and no moments
    monkeypatch.setattr(whole_inputs, "AT_ONCE", 8)
    merge_folders(names, WHOLE, tmp_path / "again", texts=Texts(base, files))
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_what_was_measured_before_a_kill_is_not_measured_again(tmp_path, three, monkeypatch):
    base, names, files = three
    writes, write = [], whole_inputs.write_moments

    def killed(path, *rest):
        if len(writes) == 1:
            raise KeyboardInterrupt
        writes.append(path)
        write(path, *rest)

    monkeypatch.setattr(whole_inputs, "write_moments", killed)
    with pytest.raises(KeyboardInterrupt):
        merge_folders(names, WHOLE, tmp_path / "out", texts=Texts(base, files))
    monkeypatch.setattr(whole_inputs, "write_moments", lambda path, *rest: (writes.append(path), write(path, *rest)))
    merge_folders(names, WHOLE, tmp_path / "out", texts=Texts(base, files))
    assert [path.name for path in writes] == ["inputs-0.safetensors", "inputs-1.safetensors"]
    assert read_rows(files[0], base)
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")


@pytest.fixture
def merging(tmp_path):
    """A run whose variants are judged and heard, and nothing is merged yet."""
    layout, sizes = RunLayout(tmp_path / "run"), dict.fromkeys(TARGETS, 16)
    moments = [(name, torch.eye(16)) for name in sorted(TARGETS)]
    for number, name in enumerate(("v0", "v1")):
        generator = torch.Generator().manual_seed(number)
        factors = {
            module: (torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator)) for module in TARGETS
        }
        write_adapter(layout.adapter(name), AdapterWeights("b", None, 2, 4.0, False, TARGETS, factors))
        write_moments(layout.whole_inputs(name), sizes, iter(moments))
        layout.inputs(name).write_bytes(b"small")
    layout.seed.parent.mkdir(exist_ok=True)
    zero = {module: (torch.ones(2, 16), torch.zeros(16, 2)) for module in TARGETS}
    write_adapter(layout.seed, AdapterWeights("b", None, 2, 4.0, False, TARGETS, zero))
    layout.whole_inputs("v1").with_name(".v1.whole.safetensors.part").write_bytes(b"half")  # of a life that was killed
    scores = {name: [["code", 0, 30.0, 10]] for name in ("seed", "v0", "v1")}
    write_json(layout.select_scores, {"split": "select", "candidates": scores})

    def of(*specs):
        return Judging(layout, SimpleNamespace(merge=specs), ("v0", "v1"), None, lambda *line: None, lambda *entry: None)

    return layout, of


def left(layout):
    return sorted(path.name for path in layout.inputs("v0").parent.iterdir())


def test_whole_inputs_are_thrown_away_when_the_merges_are_made_and_not_before(merging):
    layout, of = merging
    aside = layout.inputs("v0").replace(layout.root / "aside")
    whole = layout.whole_inputs("v0").replace(layout.inputs("v0"))  # so that v0 was not heard
    with pytest.raises(MergeError, match="no merge could be made"):
        merge_population(of(WHOLE))
    assert "v1.whole.safetensors" in left(layout)
    whole.replace(layout.whole_inputs("v0"))
    aside.replace(layout.inputs("v0"))
    merge_population(of(WHOLE))
    assert read_json(layout.merges_manifest)["failed"] == {}
    assert left(layout) == ["v0.safetensors", "v1.safetensors"]


def test_whole_inputs_that_a_kill_spared_go_with_the_next_start(merging):
    layout, of = merging
    write_json(layout.merges_manifest, {"candidates": {}, "failed": {}})
    merge_population(of(WHOLE))
    assert left(layout) == ["v0.safetensors", "v1.safetensors"]
