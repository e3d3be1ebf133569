"""The head of a cluster that starts and ends with its driver: what the bodies need, and nothing that waits for visitors.

Ray's own starts a server for jobs and the dashboard (even where no dashboard is asked for), an autoscaler and a reader of logs,
and the driver waits for the first to begin and to end. Nobody needs them: the cluster is gone with the driver, cannot grow, and
its logs stay in their files. Who wants to look into a cluster starts one with `ray start --head` and joins it.

This file leans on how Ray 2.60 is built inside, which is why `pyproject.toml` pins it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private import node


class Head(node.Node):
    """A head node of the control store, the object store and the raylet."""

    def start_api_server(self, **_: Any) -> None:
        """No dashboard, no jobs."""

    def start_monitor(self) -> None:
        """No autoscaler."""

    def start_log_monitor(self) -> None:
        """Nobody prints what workers print."""


@contextmanager
def quiet_head() -> Iterator[None]:
    """Inside this block `ray.init` starts a `Head`."""
    rays = node.Node
    node.Node = Head  # type: ignore[misc]
    try:
        yield
    finally:
        node.Node = rays  # type: ignore[misc]
