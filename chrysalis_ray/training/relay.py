"""Who trains beside whom in a chunk whose variants do not divide evenly among the threads of a worker.

Three variants on two threads: one thread has two of them, the other waits for it half of the time. So a chunk is run as a relay
of legs. In each another variant is the one that has a thread to itself, where it gets ahead; after all legs everybody has made
the same number of steps, and no thread has waited for long. It is the wrap-around rule of preemptive scheduling (McNaughton,
Management Science 6, 1959) for machines that do two jobs together faster than one after the other.

What runs together is a function of numbers known beforehand, never of a clock: a run that is resumed packs the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

OVERHEAD = 1 / 3  # what a pass costs beside its variants, in passes of one variant; measured on a base of 2.5 million
FEWEST_STEPS = 4  # a leg of fewer steps is not worth its start


class Leg(NamedTuple):
    """Variants by their number, in the order in which they are dealt to threads, and how many steps each makes."""

    order: tuple[int, ...]
    steps: tuple[int, ...]


def relay(sizes: Sequence[int], steps: int) -> list[Leg]:
    """The legs in which variants make `steps` steps each, on threads that take `sizes` of them at a time.

    One leg where all sizes are alike, or where there are too few steps to share.
    """
    count, visits = sum(sizes), [size for size in sizes for _ in range(size)]  # a variant takes every place once
    paces = [1.0 / (size + OVERHEAD) for size in visits]
    if len(set(sizes)) == 1 or steps < FEWEST_STEPS * count:
        return [Leg(tuple(range(count)), (steps,) * count)]
    marks = [round(steps * sum(paces[:place]) / sum(paces)) for place in range(count + 1)]
    made = tuple(end - start for start, end in pairwise(marks))  # in each place
    return [Leg(tuple((place + leg) % count for place in range(count)), made) for leg in range(count)]
