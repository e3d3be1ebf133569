"""Stands where Ray has an agent of its dashboard on a node: says that nothing is served, and ends with the raylet.

Run as a script, with the arguments of Ray's own. It imports nothing of Ray, whose agent takes a second to do so, in which the
raylet waits for it and starts nothing.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")  # the raylet waits for these files
NOT_SERVED = "-1"


def serve_nothing(session: Path, node: str) -> None:
    """Tell the raylet of this node that no port is served, as Ray's minimal installation does."""
    for port in PORTS:
        written = session / f".{port}_{node}"
        written.write_text(NOT_SERVED)
        written.rename(session / f"{port}_{node}")


def option(name: str, arguments: Sequence[str]) -> str:
    """The value of ``--name=value``. Raises StopIteration where it is not there."""
    return next(argument.partition("=")[2] for argument in arguments if argument.startswith(f"--{name}="))


if __name__ == "__main__":
    raylet = int(os.environ.get("RAY_RAYLET_PID", os.getppid()))  # not whoever is the parent by now: the raylet may be gone
    serve_nothing(Path(option("session-dir", sys.argv)), option("node-id", sys.argv))
    while os.getppid() == raylet:
        time.sleep(0.5)
