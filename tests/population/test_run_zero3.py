"""The same YAML on two workers with ZeRO-3 shards of the base, and on two plain workers: the same population."""

import json

import pytest
import torch
from garden import population
from safetensors.torch import load_file

pytestmark = pytest.mark.ray

ALIKE = (
    "population.variants=2",
    "population.scheduler={type: fifo}",
    "population.search.learning_rate={type: grid, values: [1e-3]}",
    "blueprint.optimizer.epsilon=1e-4",  # AdamW divides by near-zero moments; a larger epsilon keeps rounding from growing
)


def weights(run):
    return {path.parent.parent.name: load_file(path) for path in sorted(run.glob("variants/*/adapter/*.safetensors"))}


@pytest.fixture(scope="module")
def alone(garden):
    return garden.run("alone", *ALIKE)


@pytest.mark.parametrize(
    "shape",
    [
        "{workers: 2, cpus_per_worker: 0.5, zero_stage: 3}",
        "{workers: 2, cpus_per_worker: 0.5}",
        pytest.param("{workers: 2, cpus_per_worker: 0.5, gradients: sharded}", marks=pytest.mark.slow),
    ],
)
def test_two_workers_end_where_one_does(garden, alone, shape):
    name = "sharded" if "zero" in shape else "layered" if "gradients" in shape else "doubled"
    run = garden.run(name, *ALIKE, f"body={shape}")
    assert {row["state"] for row in population(run).values()} == {"finished"}
    assert len(list((run / "store" / "cuts").iterdir())) >= 6
    mine, theirs = weights(run), weights(alone)
    assert set(mine) == set(theirs)
    for variant, tensors in theirs.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(mine[variant][key], tensor, rtol=0, atol=1e-6)
    mine_said, theirs_said = (json.loads((folder / "verdict.json").read_text())["select"]["loss"] for folder in (run, alone))
    for candidate, loss in theirs_said.items():
        assert mine_said[candidate] == pytest.approx(loss, abs=1e-5)
