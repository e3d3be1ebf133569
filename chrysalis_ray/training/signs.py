"""Signs of life of a worker that computes in several processes: it gets on when all of them do that have something to do.

A worker that only told of its own passes would hide a fork that hangs for as long as its own work lasts, and would seem to hang
itself while a fork of more work is still at it. So every process counts its passes in memory that they share. The worker looks
at the counts after each pass of its own, and once a second while it waits for the others; who has answered, or is dead (which
is seen where its answer is awaited), counts no more.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Collection, Mapping

import torch

from chrysalis_ray.training.limbs import Limb, shared_zeros

LOOK_SECONDS = 1.0


class Signs:
    """How many passes each of so many processes has made. Made before they part."""

    def __init__(self, processes: int) -> None:
        self.passes_W = shared_zeros((processes,), torch.int64)
        self._seen = [0] * processes

    def count(self, process: int) -> None:
        """This process has made a pass."""
        self.passes_W[process] += 1

    def all_get_on(self, processes: Collection[int]) -> bool:
        """Whether each of these has made a pass since this was last true."""
        made = self.passes_W.tolist()
        if any(made[process] == self._seen[process] for process in processes):
            return False
        self._seen = made
        return True

    def tell(self, at_work: Mapping[int, Limb], progress: Callable[[], None]) -> None:
        """After a pass of the worker, which is process 0: give a sign if all those at work get on, too."""
        self.count(0)
        answered = answering(list(at_work.values()), 0.0)
        if self.all_get_on([0, *(number for number, limb in at_work.items() if limb not in answered)]):
            progress()

    def await_one(self, at_work: Mapping[int, Limb], progress: Callable[[], None]) -> list[int]:
        """Wait until some of these have answered, and say which; meanwhile give a sign whenever all of them have got on."""
        while not (answered := answering(list(at_work.values()), LOOK_SECONDS)):
            if self.all_get_on(at_work):
                progress()
        return [number for number, limb in at_work.items() if limb in answered]


def answering(limbs: Collection[Limb], seconds: float) -> list[Limb]:
    """Those that have answered or are gone, after at most so many seconds of waiting for the first."""
    ready, _, _ = select.select(limbs, [], [], seconds)
    return ready
