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
* **best first**, for PBT, PB2 and median stopping, which compare with what the others have: who is to be stopped, or to copy,
  comes when all others are known;
* **by variant**, for those that wait for everybody themselves, or stop nobody.

All are functions of the results, and the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf
from typing import Literal

from chrysalis_ray.body.turn import Ask


@dataclass(frozen=True)
class AnswerOrder:
    by: Literal["by_variant", "best_first", "halving"] = "by_variant"
    reduction_factor: float = 2.0

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

        ranked = sorted(asks, key=rank)
        if self.by == "best_first":
            return ranked
        kept = max(1, int(len(ranked) / self.reduction_factor))
        return [*ranked[kept - 1 :], *reversed(ranked[: kept - 1])]
