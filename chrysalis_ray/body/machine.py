"""The machine that a run gets: this one, or the cluster it joins. Whatever is `auto` is chosen for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from chrysalis_ray.body.cluster import check_address, joined
from chrysalis_ray.core.errors import BodyError
from chrysalis_ray.training.planning.hardware import Hardware

PATIENCE_SECONDS = 60.0  # for a process to start on every node and look around
LOOKING: dict[str, Any] = {"num_cpus": 0, "max_retries": 1}


def machine_at(address: str | None) -> Hardware:
    """What stands at `address`: the nodes of the cluster that are up when it is first asked. None is this machine.

    Raises BodyError where the cluster cannot be reached, or a node of it does not answer.
    """
    return Hardware.local() if address is None else _cluster_at(address)


@cache
def _cluster_at(address: str) -> Hardware:
    check_address(address)
    with joined(address):
        return together(_nodes())


def together(nodes: Sequence[tuple[Mapping[str, float], Hardware]]) -> Hardware:
    """Nodes as one machine: what Ray gives away on each, and what was found there.

    With GPUs only the nodes that have some count, with the memory of the smallest GPU. Without, the node with the most cores
    counts alone: a worker's threads do not reach to the next. Raises BodyError where there is no node.
    """
    if not nodes:
        raise BodyError("the cluster has no node that is up", "wait for it (`ray status`), or leave --address out")
    with_gpus = [(gives, found) for gives, found in nodes if gives.get("GPU", 0) >= 1 and found.gpus]
    if not with_gpus:
        gives, found = max(nodes, key=lambda node: (node[0].get("CPU", 0), node[1].memory))
        return Hardware(max(int(gives.get("CPU", 0)), 1), found.memory, processor=found.processor)
    smallest = min((found for _, found in with_gpus), key=lambda found: found.gpu_memory)
    return Hardware(
        cpus=max(sum(int(gives.get("CPU", 0)) for gives, _ in with_gpus), 1),
        memory=sum(found.memory for _, found in with_gpus),
        gpus=sum(int(gives["GPU"]) for gives, _ in with_gpus),
        gpu_memory=smallest.gpu_memory,
        gpu_name=smallest.gpu_name,
        nodes=len(with_gpus),
        processor=smallest.processor,
    )


def _nodes() -> list[tuple[Mapping[str, float], Hardware]]:
    """What Ray gives away on every node that is up, and what a process there finds."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    look = ray.remote(_found)
    there = [NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False) for node in alive]
    asked = [look.options(**LOOKING, scheduling_strategy=node).remote() for node in there]
    try:
        found: list[Hardware] = ray.get(asked, timeout=PATIENCE_SECONDS)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise BodyError(
            f"of the cluster's {len(alive)} nodes not all tell what they have: {error}",
            "see that this package is installed on every node, or write body and blueprint instead of auto",
        ) from error
    return [(node["Resources"], hardware) for node, hardware in zip(alive, found, strict=True)]


def _found() -> Hardware:
    """What a process finds where it runs."""
    return Hardware.local()
