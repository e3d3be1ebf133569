"""Adapters whose modules have different ranks, on a real Ray: given by a pattern in a pack, or found by AdaLoRA alone."""

import json
import os
import signal

import pytest
from garden import cuts, end, population
from safetensors.torch import load_file

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FEW = ("population.reports=2", "population.scheduler={type: fifo}")
RANKS = {"layers.1.mlp.down_proj": 16, "down_proj": 1, "v_proj": 2}
PATTERNS = (
    f"blueprint.lora.rank_pattern={json.dumps(RANKS)}",
    "blueprint.lora.alpha_pattern={q_proj: 32}",
    "merge=[{method: winner}, {method: ensemble, rank: 12}, {method: regmean}, {method: consensus}]",
    *FEW,
)
ADALORA = (
    "blueprint.adapter={type: adalora, rank: 6, alpha: 12, target_r: 2, tinit: 4, tfinal: 16, deltaT: 4}",
    "population.search={learning_rate: {type: grid, values: [1e-2, 1e-3]}}",
    "population.variants=2",
    "body={slots: 1}",
    "merge=[{method: winner}, {method: ensemble}, {method: consensus}]",
    *FEW,
)


def killed_and_whole(garden, name, settings):
    """A run whose driver was killed after three cuts and that went on, and the same run undisturbed."""
    process = garden.start(name, *settings)
    try:
        garden.wait_for(name, lambda run: len(cuts(run)) >= 1, process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end(process)
    killed, whole = garden.run(name, *settings), garden.run(f"{name}-whole", *settings)
    names = [{variant: row["adapter_sha256"] for variant, row in population(run).items()} for run in (killed, whole)]
    assert names[0] == names[1]
    assert {row["state"] for row in population(killed).values()} == {"finished"}
    return whole


def configs(run):
    return [json.loads(path.read_text()) for path in sorted(run.glob("variants/*/adapter/adapter_config.json"))]


def loads_in_peft(run):
    """Whether plain peft holds exactly the tensors of the imago."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(json.loads((run / "base.json").read_text())["path"])
    model = PeftModel.from_pretrained(base, run / "imago")
    tensors = load_file(run / "imago" / "adapter_model.safetensors")
    held = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    return held.keys() == tensors.keys() and all((held[name] == tensor).all() for name, tensor in tensors.items())


def test_a_pack_of_patterns_is_killed_goes_on_and_is_merged(garden):
    run = killed_and_whole(garden, "patterns", PATTERNS)
    for config in configs(run):
        assert config["alpha_pattern"] == {"q_proj": 32}
        assert {rank for name, rank in config["rank_pattern"].items() if name.endswith("layers.1.mlp.down_proj")} == {16}
        assert {rank for name, rank in config["rank_pattern"].items() if name.endswith("layers.0.mlp.down_proj")} == {1}
    verdict = json.loads((run / "verdict.json").read_text())
    assert {"ensemble", "regmean", "consensus"} <= {name.split("-")[0] for name in verdict["select"]["loss"]}
    assert "LoRA with rank_pattern and alpha_pattern" in (run / "imago" / "README.md").read_text()
    assert loads_in_peft(run)


def test_adalora_is_killed_goes_on_and_what_is_left_is_merged_as_plain_lora(garden):
    run = killed_and_whole(garden, "adalora", ADALORA)
    for path, config in zip(sorted(run.glob("variants/*/adapter/*.safetensors")), configs(run), strict=True):
        ranks = [len(tensor) for name, tensor in load_file(path).items() if "lora_A" in name]
        assert config["peft_type"] == "LORA"
        assert sum(ranks) in range(2 * len(ranks), 3 * len(ranks))  # two on average; one of zeros where none is left
        assert len(set(ranks)) > 1
    verdict = json.loads((run / "verdict.json").read_text())
    assert {"ensemble", "consensus"} <= {name.split("-")[0] for name in verdict["select"]["loss"]}
    assert loads_in_peft(run)
