"""Modules side by side: as many threads as torch may use, each of them computing with one.

Modules are small and many, so that a thread for each module keeps the cores busier than many threads inside of it; and what a
module comes out as does not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

Given = TypeVar("Given")
Made = TypeVar("Made")


def in_order(work: Callable[[Given], Made], items: Sequence[Given]) -> Iterator[Made]:
    """`work(item)` of every item, in the order of the items. What an item raises is raised here, and the rest is not begun."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(min(threads, max(len(items), 1)), initializer=partial(torch.set_num_threads, 1))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the number is this thread's own, but new threads would begin with a worker's
