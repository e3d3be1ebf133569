"""A population that no pack can hold, on a real Ray: its variants take turns, a kill costs nothing, and the winner is DoRA."""

import json
import os
import signal

import pytest
import torch
from garden import cuts, end, population
from safetensors.torch import load_file

pytestmark = pytest.mark.ray

ALONE = (
    "body={slots: 1}",
    "merge=[{method: winner}]",
    "population.variants=2",
    "population.search={learning_rate: {type: grid, values: [1e-2, 1e-5]}}",
    "population.reports=2",
    "population.scheduler={type: fifo}",
)
SOLO = ("blueprint.lora.use_dora=true", "blueprint.lora.modules_to_save=[model.norm]", *ALONE)
KIND = ("blueprint.adapter={type: vera, rank: 16, targets: [q_proj, v_proj]}", *ALONE)


def test_dora_variants_train_one_after_another_and_the_winner_loads_in_peft(garden):
    process = garden.start("solo", *SOLO)
    try:
        garden.wait_for("solo", lambda run: len(cuts(run)) >= 3, process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end(process)
    run = garden.run("solo", *SOLO)
    assert {row["state"] for row in population(run).values()} == {"finished"}
    assert len(cuts(run)) == 4
    said = json.loads((run / "plan.json").read_text())["said"]
    assert any("train one after another" in note for note in said["notes"])
    verdict = json.loads((run / "verdict.json").read_text())
    winner = run / "variants" / verdict["winner"] / "adapter" / "adapter_model.safetensors"
    assert (run / "imago" / "adapter_model.safetensors").read_bytes() == winner.read_bytes()

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(json.loads((run / "base.json").read_text())["path"])
    before = base.model.norm.weight.clone()
    model = PeftModel.from_pretrained(base, run / "imago")
    tensors = load_file(run / "imago" / "adapter_model.safetensors")
    norm = model.base_model.model.model.norm.weight
    assert torch.equal(norm, tensors["base_model.model.model.norm.weight"])
    assert not torch.equal(norm, before)
    assert sum(name.endswith("lora_magnitude_vector") for name in tensors) == 14


@pytest.mark.slow
def test_variants_of_another_kind_train_are_killed_and_leave_a_folder_of_that_kind(garden):
    process = garden.start("kind", *KIND)
    try:
        garden.wait_for("kind", lambda run: len(cuts(run)) >= 3, process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end(process)
    killed, whole = garden.run("kind", *KIND), garden.run("whole", *KIND)
    for run in (killed, whole):
        assert {row["state"] for row in population(run).values()} == {"finished"}
    assert {name: row["adapter_sha256"] for name, row in population(killed).items()} == {
        name: row["adapter_sha256"] for name, row in population(whole).items()
    }
    config = json.loads((killed / "imago" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("VERA", 16)
    assert "vera" in (killed / "imago" / "README.md").read_text().split("---")[1]
    assert json.loads((killed / "imago" / "lineage.json").read_text())["adapter"]["type"] == "vera"

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(json.loads((killed / "base.json").read_text())["path"])
    model = PeftModel.from_pretrained(base, killed / "imago")
    tensors = load_file(killed / "imago" / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            assert torch.equal(parameter, tensors[name.replace(".default", "")])
