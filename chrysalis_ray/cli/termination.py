"""SIGTERM, by which supervisors end a process (Slurm, systemd, Kubernetes, `kill`): a verb ends as after a Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ended_by_sigterm() -> Iterator[Callable[[], bool]]:
    """Inside this block a SIGTERM raises KeyboardInterrupt; what is given tells whether one came.

    Where somebody heeds or ignores it already, and in a thread, which may not ask for signals, nothing changes.
    """
    came: list[int] = []

    def heed(number: int, frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def has_come() -> bool:
        return bool(came)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, heed)
    try:
        yield has_come
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
