"""Whole draws of a stretch of rows: how many each domain gets, and in which order. Pure functions, without numpy.

Quotas are whole numbers that sum to the length of the stretch (`apportioned`). They are drawn in the order of Sainte-Laguë's
divisor method (Balinski and Young, *Fair Representation*, 1982): draw j, from 0 on, of a domain with quota q has the key
(2j + 1) / q, and the lowest key comes first; of equal ones the domain that sorts first. After n of H rows every domain was
drawn round(x q) times, with one x for all; of K domains that is n q / H to within 1/2 + (K - 2) q / 2H, and after all rows q.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction


def apportioned(shares: Mapping[str, float], rows: int, room: Mapping[str, float]) -> dict[str, int]:
    """Draws of every domain that has a share, of so many rows, by largest remainder; ties go to the name that sorts first.

    `shares` need not sum to 1. No domain is rounded up beyond its `room` (in draws) while another that has a share has room.
    """
    total = math.fsum(shares.values())
    quotas = {domain: share / total * rows for domain, share in shares.items() if share > 0.0}
    counts = {domain: math.floor(quota) for domain, quota in quotas.items()}
    order = sorted(quotas, key=lambda domain: (counts[domain] - quotas[domain], domain))
    for _ in range(rows - sum(counts.values())):
        roomy = [domain for domain in order if domain not in room or counts[domain] + 1 <= room[domain]]
        chosen = (roomy or order)[0]
        counts[chosen] += 1
        order = [*(domain for domain in order if domain != chosen), chosen]
    return counts


def rows_of_epochs(epochs: float, rows: int) -> int:
    """The most whole rows in so many epochs of a domain that holds `rows`: of 0.29 epochs of 100, as it is written, 29."""
    return math.floor(Fraction(repr(float(epochs))) * rows)


def first_draws(quotas: Sequence[int], rows: int) -> list[int]:
    """How often each domain, in the order of their names, was drawn in the first `rows` rows; the order begins anew after its
    end. Costs a step for each domain, however many the rows are."""
    length, kinds = sum(quotas), sum(quota > 0 for quota in quotas)
    rounds, left = divmod(rows, length)
    # Not more than was drawn: the bound in the head of this file, and one for keys that rounding makes equal. The rest are
    # taken one after the other.
    counts = [max(0, math.floor(left * quota / length - 2.0 - kinds * quota / (2 * length))) for quota in quotas]
    waiting = [
        ((2 * count + 1) / quota, place) for place, (quota, count) in enumerate(zip(quotas, counts, strict=True)) if quota
    ]
    heapq.heapify(waiting)
    for _ in range(left - sum(counts)):
        _, place = waiting[0]
        counts[place] += 1
        heapq.heapreplace(waiting, ((2 * counts[place] + 1) / quotas[place], place))
    return [rounds * quota + count for quota, count in zip(quotas, counts, strict=True)]
