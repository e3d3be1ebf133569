"""Kills of every kind, on a real Ray: whatever dies, the adapters end up the same, bit for bit."""

import json
import os
import signal

import psutil
import pytest
from garden import adapters, cuts, end, population
from ray.cluster_utils import Cluster

from chrysalis_ray.core.weave import Weave

pytestmark = pytest.mark.ray


def processes_named(driver, words):
    """Processes below the driver whose title holds `words`."""
    below = psutil.Process(driver.pid).children(recursive=True)
    found = []
    for process in below:
        try:
            if words in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_the_driver_is_killed_in_training_and_the_resumed_run_ends_with_the_same_bytes(garden, undisturbed):
    process = garden.start("killed")
    try:
        garden.wait_for("killed", lambda run: len(cuts(run)) >= 3, process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end(process)
    killed_at = len(cuts(garden.runs / "killed"))
    assert not (garden.runs / "killed" / "population.json").exists()
    run = garden.run("killed")
    assert adapters(run) == adapters(undisturbed)
    lives = [turn["body"] for turn in Weave(run / "weave.jsonl").turns() if turn["kind"] == "body.manifest"]
    assert len(lives) == 2
    assert len(cuts(run)) == len(cuts(undisturbed)) >= killed_at


def test_a_killed_trial_and_a_killed_worker_disturb_nobody(garden, undisturbed):
    process = garden.start("wounded")
    try:
        garden.wait_for("wounded", lambda run: len(cuts(run)) >= 1, process)
        trials = [*processes_named(process, "ray::VariantTrial"), *processes_named(process, "ray::ResourceTrainable")]
        trials[0].kill()
        garden.wait_for("wounded", lambda run: len(cuts(run)) >= 2, process)
        processes_named(process, "BodyWorker")[0].kill()
        assert process.wait(timeout=300) == 0, garden.log("wounded")
    finally:
        end(process)
    run = garden.runs / "wounded"
    assert adapters(run) == adapters(undisturbed)
    assert {name: row["state"] for name, row in population(run).items()} == {
        name: row["state"] for name, row in population(undisturbed).items()
    }
    lives = [turn for turn in Weave(run / "weave.jsonl").turns() if turn["kind"] == "body.manifest"]
    assert len(lives) == 2


@pytest.mark.slow
def test_a_worker_that_hangs_is_taken_for_dead_and_the_adapters_are_the_same(garden, undisturbed):
    """It is stopped, not ended: its sockets stay open, and Ray alone would wait for ten minutes."""
    process = garden.start("hung", "body.hang_seconds=20")
    try:
        garden.wait_for("hung", lambda run: len(cuts(run)) >= 2, process)
        stopped = processes_named(process, "BodyWorker")[0]
        stopped.send_signal(signal.SIGSTOP)
        assert process.wait(timeout=300) == 0, garden.log("hung")
        assert not stopped.is_running()
    finally:
        end(process)
    run = garden.runs / "hung"
    assert adapters(run) == adapters(undisturbed)
    assert len(cuts(run)) == len(cuts(undisturbed))
    told = [(turn["kind"], turn["body"]) for turn in Weave(run / "weave.jsonl").turns() if turn["kind"].startswith("body.")]
    assert [kind for kind, _ in told] == ["body.manifest", "body.hung", "body.manifest", "body.dissolved"]
    assert told[1][1]["pids"] == [stopped.pid] == [told[0][1]["pid"]]
    assert told[1][1]["reason"].startswith("no progress for 2")


def test_a_node_is_lost_on_a_cluster_of_two_and_the_adapters_are_the_same(garden, undisturbed):
    fast = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": fast})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        process = garden.start("clustered", address=cluster.address)
        try:
            garden.wait_for("clustered", lambda run: len(cuts(run)) >= 2, process)
            before = len(cuts(garden.runs / "clustered"))
            lives = [
                turn["body"] for turn in Weave(garden.runs / "clustered" / "weave.jsonl").turns() if "node" in turn["body"]
            ]
            host = next(node for node in nodes if node.node_id == lives[-1]["node"])
            cluster.remove_node(host, allow_graceful=False)
            assert process.wait(timeout=300) == 0, garden.log("clustered")
        finally:
            end(process)
    finally:
        cluster.shutdown()
    run = garden.runs / "clustered"
    lives = [turn["body"]["node"] for turn in Weave(run / "weave.jsonl").turns() if turn["kind"] == "body.manifest"]
    assert len(set(lives)) == 2
    assert adapters(run) == adapters(undisturbed)
    assert len(cuts(run)) == len(cuts(undisturbed)) >= before  # no turn was committed twice, none is missing


@pytest.mark.parametrize(
    ("sent", "to", "code", "name"),
    [
        (signal.SIGINT, os.kill, 130, "interrupted"),
        pytest.param(signal.SIGTERM, os.killpg, 143, "terminated", marks=pytest.mark.slow),  # as a supervisor does, to a group
    ],
)
def test_ctrl_c_and_sigterm_leave_a_run_that_goes_on(sent, to, code, name, garden, undisturbed):
    process = garden.start(name)
    try:
        garden.wait_for(name, lambda run: len(cuts(run)) >= 2, process)
        started = psutil.Process(process.pid).children(recursive=True)
        to(process.pid, sent)
        assert process.wait(timeout=60) == code, garden.log(name)
        _, left = psutil.wait_procs(started, timeout=20)
        assert left == []
    finally:
        end(process)
    assert garden.log(name).splitlines()[-1] == f"{name}: run the same command again to go on"
    assert not any(trace in garden.log(name) for trace in ("Traceback", "***", "SIGTERM"))
    run = garden.run(name)
    assert adapters(run) == adapters(undisturbed)
    assert json.loads((run / "verdict.json").read_text())["winner"] in population(run)


@pytest.mark.slow
def test_omega_is_killed_the_run_says_so_and_goes_on(garden, undisturbed):
    process = garden.start("orphaned")
    try:
        garden.wait_for("orphaned", lambda run: len(cuts(run)) >= 2, process)
        processes_named(process, "ray::Omega")[0].kill()
        assert process.wait(timeout=120) == 1, garden.log("orphaned")
    finally:
        end(process)
    assert "error: the process that gives bodies their turns has died" in garden.log("orphaned")
    assert "Traceback" not in garden.log("orphaned")
    assert adapters(garden.run("orphaned")) == adapters(undisturbed)
