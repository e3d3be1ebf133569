"""Joining Ray: a local cluster of our own, or one that runs already."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from chrysalis_ray.body.environment import ENVIRONMENT
from chrysalis_ray.body.morphology import Morphology
from chrysalis_ray.core.errors import BodyError

# A node that stops answering is declared dead after about two seconds instead of fifteen.
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}

# A raylet that comes a moment too early for its object store tries again after a tenth of a second instead of a whole one.
CONNECTING = {"raylet_client_connect_timeout_milliseconds": 100, "raylet_client_num_connect_attempts": 100}

PATIENCE_SECONDS = 5.0


def check_address(address: str | None) -> None:
    """Raises BodyError if nobody answers at ``host:port`` (or ``ray://host:port``): Ray itself would try for minutes.

    ``auto`` and ``local`` name no host; Ray answers those at once.
    """
    if address is None or address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise BodyError(f"--address {address!r} is no address", "write host:port, such as 10.0.0.1:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE_SECONDS).close()
    except OSError as error:
        raise BodyError(
            f"nobody answers at {address}: {error}",
            "check that the cluster is up (`ray status`) and that this machine may reach that port",
        ) from error


@contextmanager
def joined(address: str | None) -> Iterator[None]:
    """Inside this block the process is a Ray driver; `address` None starts a cluster on this machine and ends it after.

    Raises BodyError when the cluster cannot be reached.
    """
    for name, value in ENVIRONMENT.items():  # first: Ray reads some of them when it is imported
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    from chrysalis_ray.body.head import own_sigterm, quiet_head

    try:
        with own_sigterm():
            if address is None:
                with quiet_head():
                    ray.init(address="local", include_dashboard=False, _system_config={**HEALTH, **CONNECTING}, **quiet)
            else:
                ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BodyError(
            f"cannot join Ray at {address or 'this machine'}: {error}",
            "check the address and, if the cluster asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def check_room(morphology: Morphology, address: str | None) -> str | None:
    """Raises BodyError if a body of this shape can never start on our own cluster.

    A cluster at an address may grow when work waits for it: what it lacks now comes back as a sentence, None if nothing.
    """
    import ray

    have = ray.cluster_resources()
    for name, each in (("CPU", morphology.cpus_per_worker), ("GPU", morphology.gpus_per_worker)):
        wanted, there = morphology.count * morphology.workers * each, have.get(name, 0.0)
        if wanted <= there:
            continue
        who = "the body wants" if morphology.count == 1 else f"{morphology.count} bodies want {morphology.count} x"
        lack = f"{who} {morphology.workers} worker(s) x {each:g} {name} = {wanted:g}"
        if address is not None:
            return f"{lack}; the cluster has {there:g}: waiting until it grows (Ctrl-C ends the waiting)"
        raise BodyError(
            f"{lack}; this machine has {there:g}",
            f"lower body.count, body.workers or body.{name.lower()}s_per_worker, or join a larger cluster with --address",
        )
    return None


def room_per_node() -> list[float]:
    """Bytes of memory that Ray may give away on each node that is alive."""
    import ray

    return [node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]]


def processes_at_once() -> int:
    """How many light processes may start side by side: one for each CPU of the cluster, at least two.

    Eight on two CPUs take as long as four pairs one after the other, and a body's worker that starts beside them gets a ninth.
    """
    import ray

    return max(2, int(ray.cluster_resources().get("CPU", 0)))
