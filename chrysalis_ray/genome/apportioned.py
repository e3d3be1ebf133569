"""A stretch of a mix whose draws are whole quotas of the rows up to a horizon, in the order of `core.apportioned`.

Any run of positions is what lies between two prefixes of that order, sorted by key; a draw's position is the number of draws
with lower keys. So both directions cost nothing that grows with the position, and no more than the domains for each draw. Keys
are quotients of whole numbers below 2^53, rounded as IEEE 754 says: the same order on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.core.apportioned import first_draws

Integers = NDArray[np.int64]


class ApportionedStretch:
    """From `start` on, `quotas` draws of each domain in sum(quotas) rows, after `drawn` of the segments before. What lies
    beyond the horizon begins the same order anew."""

    def __init__(self, start: int, quotas: tuple[int, ...], drawn: Integers) -> None:
        self.start, self.drawn = start, drawn
        self.counts = np.array(quotas, dtype=np.int64)
        self._quotas, self._length = quotas, sum(quotas)

    def draws(self, first: int, stop: int) -> tuple[Integers, Integers]:
        """Of positions first .. stop - 1: index of the domain, and how often that domain was drawn before."""
        at, end = first - self.start, stop - self.start
        parts = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        while at < end:
            upto = min(end, (at // self._length + 1) * self._length)
            parts.append(self._in_one_round(at, upto))
            at = upto
        domain, nth = (np.concatenate(part) for part in zip(*parts, strict=True))
        return domain, self.drawn[domain] + nth

    def before(self, position: int) -> Integers:
        """How often each domain was drawn before a position."""
        return self.drawn + np.array(first_draws(self._quotas, position - self.start), dtype=np.int64)

    def places_of(self, index: int, drawn: Integers) -> list[int]:
        """The positions of these draws of a domain, ascending."""
        if not len(drawn):
            return []
        rounds, nth = np.divmod(drawn - self.drawn[index], self._quotas[index])
        key = (2 * nth + 1) / self._quotas[index]
        place = nth.copy()
        for other, quota in enumerate(self._quotas):
            if quota and other != index:
                place += _earlier(key, quota, ties=other < index)
        return np.sort(self.start + rounds * self._length + place).tolist()

    def _in_one_round(self, at: int, upto: int) -> tuple[Integers, Integers]:
        """Index of the domain, and its draws since `start`, of places that no horizon lies between."""
        low, high = (np.array(first_draws(self._quotas, place), dtype=np.int64) for place in (at, upto))
        domain = np.repeat(np.arange(len(low)), high - low)
        nth = np.arange(len(domain)) - np.repeat(np.cumsum(high - low) - high, high - low)
        rounds = at // self._length
        key = (2 * (nth - rounds * self.counts[domain]) + 1) / self.counts[domain]
        order = np.lexsort((domain, key))
        return domain[order], nth[order]


def _earlier(key: NDArray[np.float64], quota: int, ties: bool) -> Integers:
    """How many of `quota` draws have lower keys than each of `key`; with `ties`, equal ones too."""
    found = np.clip(((key * quota + 1) / 2).astype(np.int64) - 2, 0, quota)
    while True:
        own = (2 * found + 1) / quota
        more = (found < quota) & ((own <= key) if ties else (own < key))
        if not more.any():
            return found
        found += more
