"""Populations of other shapes on a real Ray: more variants than slots, variants that diverge, a kill while judging."""

import json
import os
import signal
import subprocess

import psutil
import pytest
import torch
from garden import adapters, cuts, end, population
from safetensors.torch import load

from chrysalis_ray.core.store import Store
from chrysalis_ray.core.weave import Weave

pytestmark = pytest.mark.ray


def test_four_variants_in_two_slots_take_turns(garden):
    soup = "merge=[{method: winner}, {method: ensemble, name: soup, weights: greedy, best_share: 1.0}]"
    run = garden.run("waves", "body={slots: 2}", "population.scheduler={type: fifo}", "population.reports=3", soup)
    rows = population(run)
    assert {row["state"] for row in rows.values()} == {"finished"}
    assert {row["chunks"] for row in rows.values()} == {3}
    turns = [{entry["variant_id"] for entry in body["results"].values()} for _, body in Store(run / "store").cuts()]
    assert max(len(turn) for turn in turns) == 2
    assert set().union(*turns) == set(rows)
    select = json.loads((run / "verdict.json").read_text())["select"]["loss"]
    members = json.loads((run / "merges" / "merges.json").read_text())["candidates"]["soup"]["weights"]
    assert min(select, key=lambda name: select[name] if name in rows else 99.0) in members
    assert select["soup"] <= min(select[name] for name in rows) + 1e-5  # it begins with the best, and never gets worse


def test_variants_that_diverge_are_evicted_with_their_reason_and_the_others_emerge(garden):
    wild = "population.search.learning_rate={type: grid, values: [1e-3, 1e30]}"
    run = garden.run("wild", wild, "population.scheduler={type: fifo}")
    states = {name: row["state"] for name, row in population(run).items()}
    assert sorted(states.values()) == ["evicted", "evicted", "finished", "finished"]
    for name, state in states.items():
        rate = json.loads((run / "variants" / name / "variant.json").read_text())["hyperparameters"]["learning_rate"]
        assert (state == "evicted") == (rate == 1e30)
        if state == "evicted":
            assert json.loads((run / "failed" / f"{name}.json").read_text())["reason"]
    candidates = json.loads((run / "evaluation" / "select.json").read_text())["candidates"]
    assert not [name for name, state in states.items() if state == "evicted" and name in candidates]
    assert states[json.loads((run / "verdict.json").read_text())["winner"]] == "finished"


def test_a_kill_while_judging_costs_no_training_and_ends_with_the_same_verdict(garden, undisturbed):
    process = garden.start("judged")
    try:
        garden.wait_for("judged", lambda run: (run / "population.json").exists(), process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end(process)
    run = garden.runs / "judged"
    trained = len(cuts(run))
    command = [*garden.command("judged"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)  # nothing but JSON on stdout, whatever libraries print
    assert told["verdict"] == json.loads((undisturbed / "verdict.json").read_text())
    assert len(cuts(run)) == trained == len(cuts(undisturbed))
    assert adapters(run) == adapters(undisturbed)
    kinds = [turn["kind"] for turn in Weave(run / "weave.jsonl").turns()]
    assert kinds.count("imago") == 1


def test_two_bodies_share_the_population_and_a_dead_worker_costs_one_of_them_its_part(garden, undisturbed):
    process = garden.start("twins", "body={count: 2, slots: 2, cpus_per_worker: 0.5}", "population.run_ahead=true")
    try:
        garden.wait_for("twins", lambda run: len(cuts(run)) >= 1, process)
        workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "BodyWorker" in p.name()]
        assert len(workers) == 2
        workers[0].kill()
        assert process.wait(timeout=300) == 0, garden.log("twins")
    finally:
        end(process)
    run = garden.runs / "twins"
    assert {name: row["state"] for name, row in population(run).items()} == {
        name: row["state"] for name, row in population(undisturbed).items()
    }
    mine, theirs = ({name: load(content) for name, content in adapters(folder).items()} for folder in (run, undisturbed))
    for name, tensors in theirs.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(mine[name][key], tensor, rtol=0, atol=1e-5)
    lives = [turn["body"]["body"] for turn in Weave(run / "weave.jsonl").turns() if turn["kind"] == "body.manifest"]
    assert sorted(lives) in ([0, 0, 1], [0, 1, 1])
