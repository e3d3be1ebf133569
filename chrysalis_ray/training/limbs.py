"""Processes of one worker that share its base and its bank, for small bases on CPUs.

Two threads of Python take turns at every operation; on a base of a few million parameters, where an operation takes less time
than the turn, a step with one variant per thread takes half as long again as it takes alone. So a shard gets a process: a fork
of the worker, made once. The frozen base is in its memory already and stays shared because nobody writes it. The bank lies in
shared memory; the moments of a variant's optimizer travel there and back with every chunk, the rest as a line of JSON.

A limb calls nothing but torch and numpy on one thread, keeps no file of the worker open but its pipes, and ends with it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import Tensor

PR_SET_PDEATHSIG = 1

Order = dict[str, Any]


class Missed(RuntimeError):
    """Another process of this worker failed or died; why is for it to tell."""


def shared_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU that a fork of this process goes on sharing."""
    count = torch.Size(shape).numel()
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize))
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)


def give_back_freed_memory() -> None:
    """Give the system what this process has freed and the C library keeps. A fork would keep it, too, as a copy of its own as
    soon as this process uses it again. Nothing where the C library is not glibc."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Limb:
    """A fork of this process that answers orders by `work`, one after the other; it keeps the files `kept` open."""

    def __init__(self, work: Callable[[Order], Order], kept: Sequence[int] = ()) -> None:
        ordered, self._orders = os.pipe()
        self._answers, answered = os.pipe()
        try:
            self.process = os.fork()
        except OSError:
            for end in (ordered, self._orders, self._answers, answered):
                os.close(end)
            raise
        if self.process == 0:
            _live(work, ordered, answered, kept)
        os.close(ordered)
        os.close(answered)
        self._told = os.fdopen(self._answers, "r", encoding="utf-8")

    def order(self, order: Order) -> None:
        """Give it something to do. Raises RuntimeError where the process is gone."""
        content = json.dumps(order).encode() + b"\n"
        try:
            while content:
                content = content[os.write(self._orders, content) :]
        except BrokenPipeError as error:
            raise RuntimeError(f"process {self.process} of this worker is gone") from error

    def answer(self) -> Order:
        """Wait for what came of the order. Raises RuntimeError where it failed, or the process is gone; Missed where
        another one is why."""
        line = self._told.readline()
        answer: Order = (
            json.loads(line) if line.endswith("\n") else {"failed": f"process {self.process} of this worker is gone"}
        )
        if "failed" in answer:
            raise (Missed if answer.get("missed") else RuntimeError)(answer["failed"])
        return answer

    def fileno(self) -> int:
        """The file that can be read when there is an answer, or no process any more."""
        return self._answers

    def close(self) -> None:
        """End it, and wait until it has ended."""
        os.close(self._orders)
        self._told.close()
        os.waitpid(self.process, 0)


def _live(work: Callable[[Order], Order], ordered: int, answered: int, kept: Sequence[int]) -> NoReturn:
    """What a limb does until its worker lets go of the pipe, or dies."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        _close_but(ordered, answered, *kept)
        torch.set_num_threads(1)
        with os.fdopen(ordered, "r", encoding="utf-8") as orders, os.fdopen(answered, "w", encoding="utf-8") as answers:
            for line in orders:
                try:
                    answer = work(json.loads(line))
                except Exception as error:  # told to the worker, which raises it
                    answer = {"failed": traceback.format_exc(), "missed": isinstance(error, Missed)}
                answers.write(json.dumps(answer) + "\n")
                answers.flush()
    finally:
        os._exit(0)  # nothing of the worker is to be cleaned up here


def _close_but(*kept: int) -> None:
    """Close every file but these and the standard streams: a socket held here would hide the worker's death from Ray."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                continue  # it was that of the listing itself
