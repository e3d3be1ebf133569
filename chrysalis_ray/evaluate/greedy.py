"""Greedy soup: members are added best first, as long as the merge of them gets no worse (Wortsman et al., arXiv 2203.05482).

Every trial is merged by the method that was asked for and judged on *select*, by whoever can judge: a body of the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from chrysalis_ray.config.merges import SeveralMerge

Judge = Callable[[Path], float]  # a PEFT folder -> its macro loss on select, in nats per token; not finite if it diverged


def greedy_members(
    members: Sequence[str],
    losses: Mapping[str, float],
    merge: Callable[[Sequence[str]], Path],
    judge: Judge,
    tell: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Those of `members` that a greedy soup is made of, in the order given; the best one always is.

    `merge` makes a trial of some of them, in a folder of its own that is deleted once it is judged. A trial that is no
    better than the soup so far is kept out unless it is as good: ties add a member, as in the paper.
    """
    best, *others = sorted(members, key=lambda name: (losses[name], members.index(name)))
    soup, loss = [best], losses[best]
    for name in others:
        trial = sorted([*soup, name], key=members.index)
        folder = merge(trial)
        found = judge(folder)
        shutil.rmtree(folder)
        verdict = "joins" if found <= loss else "stays out"
        tell(f"greedy soup of {len(soup)} with {name}: {found:.4f} against {loss:.4f}, it {verdict}")
        if found <= loss:
            soup, loss = trial, found
    return soup


def is_greedy(spec: object) -> bool:
    return isinstance(spec, SeveralMerge) and spec.weights == "greedy"
