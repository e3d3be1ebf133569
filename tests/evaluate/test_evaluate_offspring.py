"""Children of adapters that peft wrote: plain peft loads them, and they tell who their parents are."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.evaluate.offspring import PROVENANCE, read_parents, write_offspring
from chrysalis_ray.merge.operators import crossover, interpolate, mutate, swarm_step
from chrysalis_ray.seed.adapter import adapter_sha256, read_adapter

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def family(tmp_path_factory, tiny_base):
    """Three adapters of one base: of several ranks, different targets, one of them rsLoRA."""
    folder = tmp_path_factory.mktemp("family")
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    for number, settings in enumerate((
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}},
        {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "use_rslora": True},
        {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]},
    )):  # fmt: skip
        torch.manual_seed(number)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        get_peft_model(copy.deepcopy(base), config).save_pretrained(str(folder / str(number)))
    return base.eval(), [folder / str(number) for number in range(3)]


def logits(base, folder):
    with torch.no_grad():
        return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()(IDS).logits


def test_a_child_is_what_its_operator_says_in_plain_peft_and_names_its_parents(tmp_path, family):
    base, folders = family
    parents = read_parents([str(folder) for folder in folders])
    children = {
        "between": interpolate(parents[0], parents[1], 0.25, None),
        "crossed": crossover(parents, [0.4, 0.3, 0.3], rng_seed=1),
        "mutated": mutate(parents[1], 0.1, rng_seed=2, rank=4),
        "moved": swarm_step(parents[0], None, parents[1], parents[2], parents[1], 3, None)[0],
    }
    for name, child in children.items():
        sha256 = write_offspring(tmp_path / name, child, folders[0])
        assert write_offspring(tmp_path / f"{name}-again", child, folders[0]) == sha256 == adapter_sha256(tmp_path / name)
        dense = copy.deepcopy(base)
        with torch.no_grad():
            for module, (a_ri, b_or) in child.factors.items():
                dense.get_submodule(module).weight += b_or @ a_ri
            torch.testing.assert_close(logits(base, tmp_path / name), dense(IDS).logits, atol=3e-5, rtol=1e-4)
        told = json.loads((tmp_path / name / PROVENANCE).read_text())
        assert set(told["parents"]) <= {adapter_sha256(folder) for folder in folders}
        assert told["rank"] == read_adapter(tmp_path / name).rank
    told = json.loads((tmp_path / "crossed" / PROVENANCE).read_text())
    assert set(told["modules"]) == {m for folder in folders for m in read_adapter(folder).factors}
    mutated = read_adapter(tmp_path / "mutated")
    assert float((logits(base, tmp_path / "mutated") - logits(base, folders[1])).abs().max()) > 1e-5
    (parent,) = read_parents([str(tmp_path / "mutated")])  # a child is a parent like any
    assert interpolate(parent, parent, 0.5, None).provenance["parents"] == [adapter_sha256(tmp_path / "mutated")] * 2
    assert mutated.base_model == read_adapter(folders[1]).base_model


def test_parents_of_two_bases_have_no_child(tmp_path, family):
    _, folders = family
    for name in ("a", "b"):
        write_offspring(tmp_path / name, interpolate(*read_parents([str(folders[0])] * 2), 0.5, None), folders[0])
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other/base"}))
    with pytest.raises(MergeError, match="differ in the base"):
        read_parents([str(tmp_path / "a"), str(tmp_path / "b")])
