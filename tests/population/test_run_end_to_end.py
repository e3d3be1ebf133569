"""The main job on a real Ray, as a user runs it, and what it leaves on disk."""

import json
import subprocess
import sys

import pytest
from garden import adapters, cuts, population

from chrysalis_ray.core.store import Store
from chrysalis_ray.core.weave import Weave

pytestmark = pytest.mark.ray


def test_the_scheduler_stops_weak_variants_and_their_lanes_are_free(undisturbed):
    rows = population(undisturbed)
    assert [row["state"] for row in rows.values()].count("finished") >= 1
    stopped = [name for name, row in rows.items() if row["state"] == "stopped"]
    assert stopped
    turns = [len(body["results"]) for _, body in Store(undisturbed / "store").cuts()]
    assert turns[0] == 4
    assert turns[-1] == 4 - len(stopped)
    assert turns == sorted(turns, reverse=True)
    for name in stopped:
        assert rows[name]["chunks"] < 6
        assert "scheduler" in rows[name]["reason"]


def test_every_variant_reports_its_own_metrics_by_its_own_tokens(undisturbed):
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    for name, row in population(undisturbed).items():
        own = [line for line in lines if line["variant"] == name]
        assert [line["report"] for line in own] == list(range(1, row["chunks"] + 1))
        assert [line["tokens"] for line in own] == [1024 * report for report in range(1, row["chunks"] + 1)]
        assert len({line["train_loss"] for line in own}) == len(own)
        assert all(0 < line["select_loss"] < 10 for line in own)


def test_the_run_tells_what_the_plan_said_and_what_came(garden, undisturbed):
    plan = json.loads((undisturbed / "plan.json").read_text())
    assert plan["said"]["fits"]
    assert plan["came"]["wall_seconds"] > 1
    assert 100 << 20 < plan["came"]["peak_memory"] < 4 << 30
    lines = [line for line in (garden.runs / "undisturbed.log").read_text().splitlines() if " s  plan " in line]
    before, after = lines[:2]
    assert "4 variants in 4 slots, " in before
    assert "memory of a worker: plan said" in after
    assert "; time: plan said" in after


def test_the_imago_loads_in_plain_peft_with_the_loss_that_was_told(undisturbed):
    script = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
import numpy as np
run = Path(sys.argv[1])
base = json.loads((run / "base.json").read_text())
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base["path"]), run / "imago").eval()
assert not [name for name in sys.modules if name.startswith("chrysalis")]
from chrysalis_ray.genome.tokens import open_tokens
from chrysalis_ray.evaluate.heldout import heldout_rows
tokens = open_tokens(run / "tokens")
losses = {}
for domain, row in heldout_rows(tokens, "report", 3):
    batch = tokens.batch([(domain, row)], "report")
    ids, labels, documents = (torch.from_numpy(np.array(x[0])) for x in (batch.input_ids, batch.labels, batch.document))
    positions = torch.from_numpy(np.array(batch.position_ids[0]))
    starts = [i for i in range(len(ids)) if positions[i] == 0] + [len(ids)]
    for start, end in zip(starts, starts[1:]):   # each document alone: no packing at all
        if not (labels[start:end] != -100).any():
            continue
        with torch.no_grad():
            logits = model(input_ids=ids[None, start:end]).logits[0].double()
        keep = labels[start:end] != -100
        loss = torch.nn.functional.cross_entropy(logits[keep], labels[start:end][keep], reduction="sum")
        key = f"{domain}/{int(documents[start])}"
        losses[key] = losses.get(key, 0.0) + float(loss)
print(json.dumps(losses))
"""
    done = subprocess.run([sys.executable, "-c", script, str(undisturbed)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    alone = json.loads(done.stdout.splitlines()[-1])
    verdict = json.loads((undisturbed / "verdict.json").read_text())
    told = json.loads((undisturbed / "evaluation" / "report.json").read_text())["candidates"][verdict["chosen"]]
    assert {f"{domain}/{document}" for domain, document, *_ in told} == set(alone)
    for domain, document, loss_sum, *_ in told:
        assert alone[f"{domain}/{document}"] == pytest.approx(loss_sum, rel=2e-5)


def test_the_weave_tells_the_whole_story_and_verifies(undisturbed):
    kinds = [turn["kind"] for turn in Weave(undisturbed / "weave.jsonl").turns()]
    assert kinds.count("body.manifest") == 1
    assert kinds.count("turn.committed") == len(cuts(undisturbed))
    for kind in ("population.branch", "variant.finished", "variant.stopped", "population.merge", "imago"):
        assert kind in kinds


def test_the_same_command_again_trains_nothing_and_changes_nothing(garden, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.safetensors")}
    turns = len(Weave(undisturbed / "weave.jsonl").turns())
    garden.run("undisturbed")
    kinds = [turn["kind"] for turn in Weave(undisturbed / "weave.jsonl").turns()[turns:]]
    assert "turn.committed" not in kinds
    assert "body.manifest" not in kinds
    unchanged = {path: path.stat().st_mtime_ns for path in before if "imago" not in path.parts}
    assert unchanged == {path: time for path, time in before.items() if "imago" not in path.parts}


def test_another_experiment_in_the_same_folder_is_refused_and_touches_nothing(garden, undisturbed):
    before = sorted(undisturbed.rglob("*"))
    command = garden.command("undisturbed", "population.variants=5")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "another experiment" in done.stderr
    assert "--name" in done.stderr
    assert sorted(undisturbed.rglob("*")) == before


def test_adapters_differ_and_have_their_own_ranks(undisturbed):
    weights = adapters(undisturbed)
    assert len(set(weights.values())) == 4
    ranks = [json.loads(path.read_text())["r"] for path in sorted(undisturbed.glob("variants/*/adapter/adapter_config.json"))]
    assert ranks == [2, 4, 2, 4]


@pytest.mark.slow
def test_slots_that_the_planner_chose_stand_in_the_manifest(garden):
    run = garden.run("auto", "body.slots=auto")
    slots = json.loads((run / "run.json").read_text())["slots"]
    assert max(len(body["results"]) for _, body in Store(run / "store").cuts()) == slots
    assert json.loads((run / "run.json").read_text())["experiment"]["experiment"]["body"]["slots"] == "auto"
    garden.run("auto", "body.slots=auto")  # taken up again: the same experiment, the same shape
    assert json.loads((run / "run.json").read_text())["slots"] == slots
