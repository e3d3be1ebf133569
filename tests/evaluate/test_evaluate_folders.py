"""Adapters from anywhere: found, checked, merged into a new folder, and nothing that was there is touched."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from chrysalis_ray.config.merges import EnsembleMerge, TiesMerge, read_merge
from chrysalis_ray.core.errors import ConfigError, MergeError
from chrysalis_ray.evaluate.destination import MANIFEST
from chrysalis_ray.evaluate.folders import audit_folders, merge_folders
from chrysalis_ray.seed.adapter import CONFIG, WEIGHTS, AdapterWeights, read_adapter, write_adapter

ENSEMBLE = EnsembleMerge(method="ensemble")
EXACT = EnsembleMerge(method="ensemble", rank="exact")
IDS = torch.arange(12)[None]


def adapter(rng_seed: int = 0, rank: int = 3, modules=("q", "v"), **changes) -> AdapterWeights:
    generator = torch.Generator().manual_seed(rng_seed)
    factors = {
        f"layers.0.{m}": (torch.randn(rank, 8, generator=generator), torch.randn(6, rank, generator=generator)) for m in modules
    }
    return replace(AdapterWeights("base", None, rank, 2.0 * rank, False, tuple(modules), factors), **changes)


def write(folder, *adapters):
    for number, weights in enumerate(adapters):
        write_adapter(folder / f"a{number}", weights)
    return [str(folder / f"a{number}") for number in range(len(adapters))]


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, tiny_base):
    """Adapters as peft writes them: of different ranks, alphas, targets, with a pattern, one of them rsLoRA."""
    folder = tmp_path_factory.mktemp("foreign")
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    patterns = {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"layers.1.self_attn.v_proj": 2}}
    for number, settings in enumerate((
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "use_rslora": True},
        {"r": 3, "lora_alpha": 6, "target_modules": ["v_proj", "down_proj"], **patterns},
    )):  # fmt: skip
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        torch.manual_seed(number)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(str(folder / str(number)))
    return base.eval(), [str(folder / str(number)) for number in range(3)]


def test_what_peft_wrote_is_merged_and_peft_gives_the_logits_of_the_weighted_sum(tmp_path, foreign):
    base, names = foreign
    manifest = merge_folders(names, EXACT, tmp_path / "out", given=[2, 1, 1])
    assert manifest["weights"] == [0.5, 0.25, 0.25]
    assert manifest["notes"]["modules_missing_as_zero"] == {names[0]: 2, names[1]: 4, names[2]: 2}
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for weight, name in zip(manifest["weights"], names, strict=True):
            layers = PeftModel.from_pretrained(copy.deepcopy(base), name).base_model.model
            for module, layer in layers.named_modules():
                if hasattr(layer, "get_delta_weight"):
                    dense.get_submodule(module).weight += weight * layer.get_delta_weight("default")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out"))
        torch.testing.assert_close(loaded(IDS).logits, dense(IDS).logits, atol=2e-5, rtol=1e-4)
        assert float((loaded(IDS).logits - base(IDS).logits).abs().max()) > 1e-2
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["task_type"] == "CAUSAL_LM"


def test_the_manifest_names_what_went_in_and_the_same_request_is_done_already(tmp_path):
    names = write(tmp_path, adapter(0), adapter(1, rank=2))
    manifest = merge_folders(names, ENSEMBLE, tmp_path / "out")
    written = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert written == manifest
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CONFIG, WEIGHTS, MANIFEST]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a0", "a1", "out"]
    before = everything(tmp_path)
    again = merge_folders(names, ENSEMBLE, tmp_path / "out")
    assert again == {**manifest, "done_before": True}
    assert everything(tmp_path) == before
    assert merge_folders(names, ENSEMBLE, tmp_path / "twin")["sha256"] == manifest["sha256"]
    assert read_adapter(tmp_path / "out").rank == 3


@pytest.mark.parametrize("there", ["a file", "other files", "another merge", "a changed merge", "an input", "a dangling link"])
def test_an_out_that_holds_anything_else_is_left_as_it_is(tmp_path, there):
    names = write(tmp_path, adapter(0), adapter(1))
    out = tmp_path / "out"
    if there == "a file":
        out.write_text("mine")
    elif there == "other files":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    elif there == "another merge":
        merge_folders(names[:1], ENSEMBLE, out)
    elif there == "a changed merge":
        merge_folders(names, ENSEMBLE, out)
        (out / WEIGHTS).write_bytes(b"")
    elif there == "an input":
        out = tmp_path / "a0"
    elif there == "a dangling link":
        out.symlink_to(tmp_path / "nowhere")
    before = everything(tmp_path)
    with pytest.raises(MergeError):
        merge_folders(names, ENSEMBLE, out)
    assert everything(tmp_path) == before


def test_an_empty_out_and_one_that_points_upwards_are_folders_like_any(tmp_path):
    names = write(tmp_path, adapter(0), adapter(1))
    (tmp_path / "empty").mkdir()
    merge_folders(names, ENSEMBLE, tmp_path / "empty")
    merge_folders(names, ENSEMBLE, tmp_path / "absent" / ".." / "beside")
    assert (tmp_path / "beside" / MANIFEST).is_file()
    assert not (tmp_path / "absent").exists()


WRONG_CONFIGS = {
    "dora": {"use_dora": True},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
    "a path for a base": {"base_model_name_or_path": "../../etc/passwd"},
}


def wrong_inputs(folder, wrong):
    one, two = adapter(0), adapter(1)
    if wrong == "another base":
        two = replace(two, base_model="other")
    elif wrong == "another revision":
        one, two = replace(one, revision="a"), replace(two, revision="b")
    elif wrong == "fan in fan out":
        two = replace(two, fan_in_fan_out=True)
    elif wrong == "other shapes":
        two = replace(two, factors={m: (a, torch.cat([b, b])) for m, (a, b) in two.factors.items()})
    names = write(folder, one, two)
    target = folder / "a1"
    if wrong == "nan":
        tensors = {
            f"base_model.model.{m}.lora_{s}.weight": t for m, ab in two.factors.items() for s, t in zip("AB", ab, strict=True)
        }
        tensors["base_model.model.layers.0.v.lora_B.weight"][0, 0] = float("nan")
        save_file(tensors, target / WEIGHTS)
    elif wrong == "cut":
        (target / WEIGHTS).write_bytes((target / WEIGHTS).read_bytes()[:-1])
    elif wrong == "pickle":
        (target / WEIGHTS).rename(target / "adapter_model.bin")
    elif wrong in WRONG_CONFIGS:
        config = json.loads((target / CONFIG).read_text())
        (target / CONFIG).write_text(json.dumps({**config, **WRONG_CONFIGS[wrong]}))
    elif wrong == "a file":
        names[1] = str(target / CONFIG)
    elif wrong == "nothing there":
        names[1] = str(folder / "absent")
    elif wrong == "no name at all":
        names[1] = "no folder; rm -rf"
    return names


@pytest.mark.parametrize("wrong", ["another base", "another revision", "fan in fan out", "other shapes", "nan", "cut", "pickle",
                                   "dora", "modules to save", "pissa", "a path for a base", "a file", "nothing there",
                                   "no name at all"])  # fmt: skip
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(tmp_path, wrong):
    names = wrong_inputs(tmp_path, wrong)
    before = everything(tmp_path)
    for spec in (
        ENSEMBLE,
        EnsembleMerge(method="ensemble", weights="geometric_median"),
        TiesMerge(method="ties", space="dense"),
    ):
        with pytest.raises(MergeError):
            merge_folders(names, spec, tmp_path / "out")
    with pytest.raises(MergeError):
        audit_folders(names)
    assert everything(tmp_path) == before


def test_what_needs_a_judge_is_refused(tmp_path):
    names = write(tmp_path, adapter(0), adapter(1))
    for method, settings, given in (
        ("winner", [], None),
        ("ensemble", ["weights=softmax"], None),
        ("ensemble", ["best_share=0.5"], None),
        ("ensemble", ["weights=uniform"], [1, 1]),
        ("ensemble", [], [1, 1, 1]),
    ):
        with pytest.raises(MergeError):
            merge_folders(names, read_merge(method, settings), tmp_path / "out", given=given)
    assert not (tmp_path / "out").exists()


def test_around_a_seed_changes_that_cancel_return_to_it(tmp_path):
    seed, change = adapter(7), adapter(0)
    there = {
        m: (torch.cat([seed.factors[m][0], a]), torch.cat([seed.factors[m][1], b], 1)) for m, (a, b) in change.factors.items()
    }
    back = {
        m: (torch.cat([seed.factors[m][0], a]), torch.cat([seed.factors[m][1], -b], 1)) for m, (a, b) in change.factors.items()
    }
    members = [replace(seed, rank=6, alpha=12.0, factors=factors) for factors in (there, back)]
    names = write(tmp_path, *members, seed)
    consensus = read_merge("consensus", [])
    around = merge_folders(names[:2], consensus, tmp_path / "around", names[2])
    assert around["seed_adapter"] == names[2]
    merge_folders(names[:2], consensus, tmp_path / "base")
    for module in seed.factors:
        expected = seed.delta(module)
        torch.testing.assert_close(read_adapter(tmp_path / "around").delta(module), expected, atol=1e-5, rtol=1e-5)
        assert float((read_adapter(tmp_path / "base").delta(module) - expected).norm()) > 0.05 * float(expected.norm())


def test_a_hub_id_is_found_in_the_cache_and_told_if_it_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--owner--adapter" / "snapshots" / ("0" * 40)
    write_adapter(snapshot, adapter(0))
    (tmp_path / "hub" / "models--owner--adapter" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--adapter" / "refs" / "main").write_text("0" * 40)
    manifest = merge_folders(["owner/adapter", *write(tmp_path, adapter(1))], ENSEMBLE, tmp_path / "out")
    assert manifest["adapters"][0] == "owner/adapter"
    with pytest.raises(MergeError, match="the hub gives no adapter of that name"):
        merge_folders(["owner/adaptre"], ENSEMBLE, tmp_path / "other")


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("teis", [], "did you mean 'ties'"),
        ("ties", ["density=2"], "density: must be <= 1"),
        ("ties", ["desnity=0.2"], "did you mean 'density'"),
        ("ties", ["density"], "not `dotted.path=value`"),
        ("ties", ["space=dense", "rank=exact"], "has full rank"),
        ("ensemble", ["rank=0"], "rank"),
        ("ensemble", ["method=ties"], ""),
    ],
)
def test_settings_are_checked_like_those_of_an_experiment(method, settings, words):
    if not words:
        assert read_merge(method, settings).method == "ties"
        return
    with pytest.raises(ConfigError) as caught:
        read_merge(method, settings)
    assert words in str(caught.value)


def test_weights_per_layer_go_by_name_or_number_and_strangers_are_refused(tmp_path):
    names = write(tmp_path, adapter(0, modules=("q", "v")), adapter(1, modules=("q", "v")))

    def spec(weights):
        return EnsembleMerge(method="ensemble", rank="exact", layer_weights=[{"modules": "*.q", "weights": weights}])

    manifest = merge_folders(names, spec({"1": 1.0, names[0]: 3.0}), tmp_path / "out")
    found, one, two = (read_adapter(tmp_path / name) for name in ("out", "a0", "a1"))
    for module, share in (("layers.0.q", 0.75), ("layers.0.v", 0.5)):
        expected = share * one.delta(module) + (1 - share) * two.delta(module)
        torch.testing.assert_close(found.delta(module), expected, atol=1e-5, rtol=1e-5)
    assert manifest["weights"] == pytest.approx([0.625, 0.375])
    assert merge_folders(names, spec({"1": 1.0, names[0]: 3.0}), tmp_path / "out")["done_before"]
    (tmp_path / "a0").rename(tmp_path / "moved")
    with pytest.raises(MergeError, match=r"none of the 2 adapters"):
        merge_folders([str(tmp_path / "moved"), names[1]], spec({names[0]: 1.0}), tmp_path / "other")
    with pytest.raises(MergeError, match="'2'"):
        merge_folders([str(tmp_path / "moved"), names[1]], spec({"2": 1.0}), tmp_path / "other")
    assert not (tmp_path / "other").exists()
