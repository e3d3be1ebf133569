"""SIGTERM, by which supervisors end a process (Slurm, systemd, Kubernetes, `kill`): a verb ends as after a Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

AT_ONCE = 5.0  # seconds


@contextmanager
def ended_by_sigterm() -> Iterator[Callable[[], bool]]:
    """Inside this block a SIGTERM raises KeyboardInterrupt; what is given tells whether one came.

    One that comes `AT_ONCE` after another is the same: `timeout` sends two, to a process and to its group, and the second would
    end the tidying up that the first began.

    Where somebody heeds or ignores it already, and in a thread, which may not ask for signals, nothing changes.
    """
    came: list[float] = []

    def heed(number: int, frame: Any) -> None:
        came.append(time.monotonic())
        if len(came) == 1 or came[-1] - came[-2] > AT_ONCE:
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
