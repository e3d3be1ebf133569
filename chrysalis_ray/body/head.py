"""The head of a cluster that starts and ends with its driver: what the bodies need, and nothing that waits for visitors.

Ray's own starts a server for jobs and the dashboard (even where no dashboard is asked for) and an agent of it, an autoscaler
and a reader of logs, and the driver waits for the first to begin and to end. Nobody needs them: the cluster is gone with the
driver, cannot grow, and its logs stay in their files. Who wants to look into a cluster starts one with `ray start --head` and
joins it.

This file leans on how Ray 2.60 is built inside, which is why `pyproject.toml` pins it.
"""

from __future__ import annotations

import importlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private import node, ray_constants, services, utils

from chrysalis_ray.body import agent
from chrysalis_ray.core.collecting import no_garbage
from chrysalis_ray.core.instead import instead
from chrysalis_ray.core.postponed import postponed

PATIENCE_SECONDS = 5.0  # for the raylet to register
START_PYTHON = services._build_python_executable_command_memory_profileable


class Head(node.Node):
    """A head node of the control store, the object store and the raylet."""

    def start_api_server(self, **_: Any) -> None:
        """No dashboard, no jobs."""

    def start_monitor(self) -> None:
        """No autoscaler."""

    def start_log_monitor(self) -> None:
        """Nobody prints what workers print."""

    def start_raylet(self, *arguments: Any, **settings: Any) -> None:
        """The raylet takes as long to come up as the driver takes to import Ray Train, which it needs next."""
        super().start_raylet(*arguments, **settings)
        with no_garbage(), postponed():
            importlib.import_module("chrysalis_ray.body.trainer")
        deadline = time.monotonic() + PATIENCE_SECONDS  # Ray waits longer, but looks once a second only
        while not self.get_gcs_client().get_all_node_info() and time.monotonic() < deadline:
            time.sleep(0.02)


def start_python(component: str, *arguments: Any, **settings: Any) -> list[str]:
    """How Ray starts one of its own scripts, whose path and options follow; `agent.py` is put before that of the agent."""
    command = START_PYTHON(component, *arguments, **settings)
    return [*command, agent.__file__] if component == ray_constants.PROCESS_TYPE_DASHBOARD_AGENT else command


def no_dashboard() -> ImportError:
    """What Ray is told when it looks whether there could be a dashboard, for which it imports all that one would need."""
    return ImportError("this cluster has no dashboard")


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Inside this block `ray.init` leaves SIGTERM to whoever heeds it here: Ray's own handlers end a driver by exit code 1 or
    15 and leave nobody time to tidy up. Where nobody heeds it they stay Ray's."""
    heeded = signal.getsignal(signal.SIGTERM)
    if not callable(heeded) or threading.current_thread() is not threading.main_thread():
        yield
        return
    with instead(utils, "set_sigterm_handler", lambda handler: None):
        yield
    signal.signal(signal.SIGTERM, heeded)  # once more: below Python, too, something has come before it that prints a trace


@contextmanager
def quiet_head() -> Iterator[None]:
    """Inside this block `ray.init` starts a `Head`."""
    with (
        instead(node, "Node", Head),
        instead(services, "_build_python_executable_command_memory_profileable", start_python),
        instead(utils, "get_dashboard_dependency_error", no_dashboard),
    ):
        yield
