"""What stands at an address: the nodes of a cluster as one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from chrysalis_ray.body.machine import machine_at, together
from chrysalis_ray.core.errors import BodyError
from chrysalis_ray.training.planning.hardware import GIB, Hardware

CPU_NODE = ({"CPU": 8.0, "memory": 1e9}, Hardware(cpus=16, memory=64 * GIB, processor="x"))
BIG_CPU_NODE = ({"CPU": 32.0}, Hardware(cpus=32, memory=256 * GIB, processor="y"))
GPU_NODE = ({"CPU": 64.0, "GPU": 8.0}, Hardware(64, 512 * GIB, 8, 80 * GIB, "H100"))
OLD_GPU_NODE = ({"CPU": 16.0, "GPU": 2.0}, Hardware(32, 128 * GIB, 4, 24 * GIB, "A10"))


def test_only_nodes_with_gpus_count_where_there_are_any_and_the_smallest_gpu_bounds_all() -> None:
    machine = together([CPU_NODE, GPU_NODE, OLD_GPU_NODE])
    assert (machine.cpus, machine.memory, machine.nodes) == (80, 640 * GIB, 2)
    assert (machine.gpus, machine.gpu_memory, machine.gpu_name) == (10, 24 * GIB, "A10")  # Ray was given 2 of the old ones


def test_without_gpus_the_largest_node_counts_since_threads_do_not_reach_further() -> None:
    machine = together([CPU_NODE, BIG_CPU_NODE, CPU_NODE])
    assert (machine.cpus, machine.memory, machine.gpus, machine.nodes) == (32, 256 * GIB, 0, 1)
    assert together([({"CPU": 4.0}, Hardware(64, GIB))]).cpus == 4  # what Ray gives away, not what is there
    assert together([({"CPU": 4.0, "GPU": 1.0}, Hardware(4, GIB))]).gpus == 0  # a GPU that no driver answers for
    with pytest.raises(BodyError, match="no node that is up"):
        together([])


def test_no_address_is_this_machine() -> None:
    assert machine_at(None) == Hardware.local()
    with pytest.raises(BodyError, match="is no address"):
        machine_at("nowhere")


@pytest.mark.ray
def test_auto_is_chosen_for_the_cluster_that_is_joined(tmp_path) -> None:
    """One node that gives away three CPUs and one that gives six: the plan is made for six, whatever this machine has."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    try:
        cluster.add_node(num_cpus=6)
        command = [sys.executable, "-m", "chrysalis_ray", "run", "experiments/auto.yaml", "--dry-run", "--json",
                   "--runs", str(tmp_path), "--address", cluster.address]  # fmt: skip
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        cluster.shutdown()
    planned = json.loads(done.stdout)
    assert planned["hardware"]["cpus"] == 6
    assert planned["body"]["threads"] == 6
    assert "body: one worker that computes with 6 threads: there is no GPU" in planned["chosen"]
