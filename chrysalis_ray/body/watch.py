"""Who hangs without dying: a worker that makes no progress although it has something to do is taken for dead.

A body gives a sign after every pass of training, scoring or writing (`Pulse`; at most one a second). A worker that computes in
several processes gives it when all of them get on (`training/signs.py`). Omega counts for how long a body that works on a part
of a turn has given none. What is too long follows from what has been seen: many times the longest
silence that ended by itself, and never less than minutes, unless `body.hang_seconds` says. Seconds count only while omega
itself gets to run: a machine that is slow to do anything is slow to count, too.

A worker that is taken for dead is killed, which Ray notices as any death: the body is manifested anew and finds its part of
the turn. SIGKILL ends a process that was stopped, and one that waits for a partner that hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from chrysalis_ray.body.roster import Life, Roster

LOOK_SECONDS = 1.0
UNKNOWN_SECONDS = 3600.0  # what a life may take to load the base, and to its first sign where none was ever given
LEAST_SECONDS, TIMES = 300.0, 20.0
KILL_SECONDS = 60.0  # to start a process on the node of the one that is to be ended


class Watch:
    """For how long each body has been silent. `hang_seconds` None derives what is too long from what was seen."""

    def __init__(self, bodies: int, hang_seconds: float | None = None) -> None:
        self.hang_seconds = hang_seconds
        self.silent = [0.0] * bodies
        self.longest: float | None = None  # the longest silence of a body at work that ended by itself
        self.ended: set[int] = set()  # lives that were taken for dead
        self.grown: set[int] = set()  # lives that have loaded their base and asked for work

    def sign(self, life: Life) -> None:
        """A body is getting on."""
        if life.number in self.grown:
            self.longest = max(self.longest or 0.0, self.silent[life.body])
        self.grown.add(life.number)
        self.silent[life.body] = 0.0

    def limit(self, life: Life) -> float:
        """How long this life may be silent, in seconds."""
        if life.number not in self.grown:
            return max(UNKNOWN_SECONDS, self.hang_seconds or 0.0)
        if self.hang_seconds is not None:
            return self.hang_seconds
        return UNKNOWN_SECONDS if self.longest is None else max(LEAST_SECONDS, TIMES * self.longest)

    def hanging(self, busy: Collection[Life], passed: float) -> list[Life]:
        """Those of the lives that have something to do which have been silent for too long, after `passed` seconds more."""
        at_work = {life.body for life in busy}
        for body in range(len(self.silent)):
            self.silent[body] = self.silent[body] + min(passed, 2 * LOOK_SECONDS) if body in at_work else 0.0
        return [life for life in busy if life.number not in self.ended and self.silent[life.body] > self.limit(life)]

    async def keep(self, roster: Roster, tell: Callable[[str, dict[str, Any]], None]) -> None:
        """Look about once a second, for ever, and end who hangs. `tell` journals it."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            for life in self.hanging(roster.busy(), now - looked):
                self.ended.add(life.number)
                silent, limit = self.silent[life.body], self.limit(life)
                killed = await end_workers(life)
                if killed:  # else they are dead already, and wait for room to live again
                    reason = f"no progress for {silent:.0f} s, where {limit:.0f} are allowed: its workers were killed"
                    tell("body.hung", {"epoch": life.number, "body": life.body, "pids": killed, "reason": reason})
            looked = now


class Pulse:
    """Called as often as there is progress; sends a sign at most every second."""

    def __init__(self, send: Callable[[], Any], seconds: float = 1.0) -> None:
        self._send, self._seconds, self._sent = send, seconds, -seconds

    def __call__(self) -> None:
        if (now := time.monotonic()) - self._sent >= self._seconds:
            self._sent = now
            self._send()


async def end_workers(life: Life) -> list[int]:
    """SIGKILL the workers of a life, each by a task on its node; returns the processes that were still there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    end = ray.remote(num_cpus=0, max_retries=0)(end_process)
    tasks = [
        end.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)).remote(pid, born)
        for pid, node, born in life.workers.values()
    ]
    killed = []
    for task, (pid, _, _) in zip(tasks, life.workers.values(), strict=True):
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):  # its node is gone, and it with it
            if await asyncio.wait_for(asyncio.wrap_future(task.future()), KILL_SECONDS):
                killed.append(pid)
    return killed


def end_process(pid: int, born: str) -> bool:
    """SIGKILL a process of this machine if it is the one that was born then; says whether it was there."""
    if birth(pid) != born:
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def birth(pid: int) -> str:
    """When a process of this machine began, in ticks since the machine did; nothing where there is none. Numbers of processes
    come again, those of two that lived at different times do not agree in this."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *others = told.rpartition(")")[2].split()
    return "" if state == "Z" else others[18]
