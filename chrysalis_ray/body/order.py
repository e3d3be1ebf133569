"""In which order the answers of a turn leave.

Schedulers that are asynchronous decide on a result by those that came before it. In a turn all results are there at once, so
the order in which Tune hears of them can be chosen, and with it what such a scheduler comes to:

* **halving**, for ASHA (arXiv 1810.05934): of n results first the one of rank floor(n / reduction factor), then those that are
  worse, each worse than all before, then those that are better, each better than all before. Every worse one lies below
  ASHA's cut-off when it comes and every better one above, so that exactly the best floor(n / factor), at least one, go on:
  what synchronous successive halving (arXiv 1502.07943) does. In the order of their names the first would always go on. With
  several brackets, which are drawn inside Tune and compare among themselves alone, the best floor(n / factor) of all go on too,
  and at most one more of each other bracket, the best of its rest: ASHA never stops the first that it hears of in a bracket, so
  that no order could keep exactly the best;
* **median**, for median stopping (Golovin et al., "Google Vizier", 2017), which stops whose best loss is worse than the median
  of the others' running means: first those whom it lets go on when it knows all, the one of the worst mean first, then the
  others. Whoever goes on is no worse than all whom it has heard of by then; whoever does not is compared with all who go on,
  and with rivals worse than the median missing, it is no higher than among all. So that exactly those are stopped whom it
  would stop if all had come at once, but for the first `min_variants` that it hears of, which it never judges. Best first it
  would keep those alone at its first judgement;
* **best first**, for PBT and PB2, which compare with what the others have: who is to copy comes when all others are known;
* **by variant**, for those that wait for everybody themselves, or stop nobody.

All are functions of the results, and the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import inf
from statistics import fmean, median
from typing import Literal

from chrysalis_ray.body.turn import Ask, first_position, next_position


@dataclass(frozen=True)
class AnswerOrder:
    by: Literal["by_variant", "best_first", "halving", "median"] = "by_variant"
    reduction_factor: float = 2.0  # of halving
    grace_reports: int = 1  # of median stopping: before them it judges nobody, and counts nothing
    min_variants: int = 1  # of median stopping: whose means it must know

    def sort(self, asks: Sequence[Ask], loss: Callable[[Ask], float | None]) -> list[Ask]:
        """The asks in the order of their answers. Those at other chunks are no rivals; who is further comes first.

        `loss` gives what a variant came to, None where that is no number: worse than any.
        """
        by_variant = sorted(asks, key=lambda ask: ask.variant.index)
        if self.by == "by_variant":
            return by_variant
        rivals = groupby(sorted(by_variant, key=lambda ask: -ask.chunk), key=lambda ask: ask.chunk)
        return [ask for _, group in rivals for ask in self._among_rivals(list(group), loss)]

    def _among_rivals(self, asks: list[Ask], loss: Callable[[Ask], float | None]) -> list[Ask]:
        def rank(ask: Ask) -> float:
            value = loss(ask)
            return inf if value is None or value != value else value

        if self.by == "median":
            return self._by_median(asks, rank)
        ranked = sorted(asks, key=rank)
        if self.by == "best_first":
            return ranked
        kept = max(1, int(len(ranked) / self.reduction_factor))
        return [*ranked[kept - 1 :], *reversed(ranked[: kept - 1])]

    def _by_median(self, asks: list[Ask], loss: Callable[[Ask], float]) -> list[Ask]:
        """Those whom the rule lets go on, then those whom it stops; rivals have come equally far."""
        if asks[0].chunk + 1 < self.grace_reports:
            return asks
        pasts = [[loss(then) for then in _until(ask)] for ask in asks]
        means = [fmean(past[max(self.grace_reports - 1, 0) :]) for past in pasts]
        go_on, stop = list[int](), list[int]()
        for index, past in enumerate(pasts):
            others = means[:index] + means[index + 1 :]
            (stop if len(others) >= self.min_variants and median(others) < min(past) else go_on).append(index)
        heard = [*sorted(go_on, key=lambda index: -means[index]), *sorted(stop, key=lambda index: means[index])]
        return [asks[index] for index in heard]


def _until(ask: Ask) -> list[Ask]:
    """The asks of a variant up to this one, for schedulers under which its hyperparameters never change."""
    before, position = list[Ask](), first_position(ask.variant)
    for chunk in range(ask.chunk):
        position = next_position(position, ask.variant)
        before.append(replace(ask, target=position, chunk=chunk))
    return [*before, ask]
