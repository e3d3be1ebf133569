"""Processes that work beside this one: they end with it, whatever ends it, and a Ctrl-C is its matter, not theirs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from chrysalis_ray.core.errors import GenomeError


@contextmanager
def process_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes as long as the block lasts; what is not begun by its end is left out.

    Raises GenomeError where one of them was killed.
    """
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise GenomeError(
            "a process that read or tokenised documents was killed, perhaps for want of memory",
            "run the same command again: it goes on where it was; `genome.build.processes` says how many there are",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that are started inside this block do not hear a Ctrl-C, which a terminal sends to all at once. This one hears
    it, and a SIGTERM that it heeds, after the block: no process is left half started."""
    came: list[int] = []
    heeded = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(number)):
                heeded[number] = handler
                signal.signal(number, lambda number, frame: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is started inherits that
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in heeded.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _begin() -> None:
    """What a process of the pool does first: one thread for tokenizers, and an end with whoever started it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
