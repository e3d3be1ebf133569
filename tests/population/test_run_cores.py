"""Cores and workers on a real Ray: forks of a worker that are killed, and virtual workers on one worker and on two."""

import psutil
import pytest
import torch
from garden import adapters, cuts, end, population
from safetensors.torch import load

from chrysalis_ray.core.weave import Weave

pytestmark = pytest.mark.ray


def test_a_killed_fork_of_a_worker_costs_one_turn_at_most(garden, undisturbed):
    process = garden.start("forked", "body={threads: 2}")
    try:
        garden.wait_for("forked", lambda run: len(cuts(run)) >= 1, process)
        workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "BodyWorker" in p.name()]
        (limb,) = [p for p in workers if p.ppid() in {other.pid for other in workers}]
        limb.kill()
        assert process.wait(timeout=300) == 0, garden.log("forked")
    finally:
        end(process)
    run = garden.runs / "forked"
    assert {name: row["state"] for name, row in population(run).items()} == {
        name: row["state"] for name, row in population(undisturbed).items()
    }
    assert len(cuts(run)) == len(cuts(undisturbed))
    mine, theirs = ({name: load(content) for name, content in adapters(folder).items()} for folder in (run, undisturbed))
    for name, tensors in theirs.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(mine[name][key], tensor, rtol=0, atol=1e-5)
    lives = [turn for turn in Weave(run / "weave.jsonl").turns() if turn["kind"] == "body.manifest"]
    assert len(lives) == 2
    assert not psutil.pid_exists(limb.pid)


def test_virtual_workers_end_with_the_same_bytes_on_one_worker_and_on_two(garden):
    few = ("population.reports=3", "population.scheduler={type: fifo}")
    one, two = (
        garden.run(
            f"virtual-{workers}", *few, f"body={{workers: {workers}, cpus_per_worker: 0.5, lanes: fixed, virtual_workers: 2}}"
        )
        for workers in (1, 2)
    )
    assert adapters(one) == adapters(two)
    assert len(adapters(one)) == 4


@pytest.mark.slow
def test_a_run_that_was_killed_on_one_worker_goes_on_with_two_and_ends_with_the_same_bytes(garden):
    few = ("population.reports=4", "population.scheduler={type: fifo}")
    shape = "body={{workers: {}, cpus_per_worker: 0.5, lanes: fixed, virtual_workers: 2}}"
    whole = garden.run("unmoved", *few, shape.format(1))
    process = garden.start("moved", *few, shape.format(1))
    try:
        garden.wait_for("moved", lambda run: len(cuts(run)) >= 2, process)
    finally:
        end(process)
    run = garden.run("moved", *few, shape.format(2))
    assert adapters(run) == adapters(whole)
    assert "workers 1 -> 2: what is trained from here on is the same to the bit" in garden.log("moved")
    lives = [turn["body"] for turn in Weave(run / "weave.jsonl").turns() if turn["kind"] == "body.manifest"]
    assert [life["workers"] for life in lives] == [1, 2]
