"""Greedy soup: members are added best first, as long as the merge of them gets no worse (Wortsman et al., arXiv 2203.05482).

Every trial is a merge by the method that was asked for, judged on *select* by whoever can judge: a body of the run. The mean
of deltas is judged without being made, and several decisions ahead at once: with what the next members would come to if the
one before joins, and if it stays out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from chrysalis_ray.config.merges import SeveralMerge

Trial = tuple[str, ...]  # members of a soup, in the order of all members
Taste = Callable[[Sequence[Trial]], Sequence[float]]  # their macro losses on select, in nats per token; not finite if diverged


def greedy_members(
    members: Sequence[str],
    losses: Mapping[str, float],
    taste: Taste,
    tell: Callable[[str], None] = lambda line: None,
    ahead: int = 1,
) -> list[str]:
    """Those of `members` that a greedy soup is made of, in the order given; the best one always is.

    A trial that is worse than the soup so far stays out: ties add a member, as in the paper. `taste` is asked for all that the
    next `ahead` decisions may come to, 2^ahead - 1 trials at once.
    """
    best, *others = sorted(members, key=lambda name: (losses[name], members.index(name)))
    soup: Trial = (best,)
    loss, tasted = losses[best], dict[Trial, float]()
    for place, name in enumerate(others):
        trial = _with(soup, name, members)
        if trial not in tasted:
            asked = outcomes(soup, others[place : place + ahead], members)
            tasted |= dict(zip(asked, taste(asked), strict=True))
        found = tasted[trial]
        verdict = "joins" if found <= loss else "stays out"
        tell(f"greedy soup of {len(soup)} with {name}: {found:.4f} against {loss:.4f}, it {verdict}")
        if found <= loss:
            soup, loss = trial, found
    return list(soup)


def outcomes(soup: Trial, names: Sequence[str], members: Sequence[str]) -> list[Trial]:
    """Every trial that deciding on `names`, one after the other, may come to."""
    if not names:
        return []
    joined = _with(soup, names[0], members)
    return [joined, *outcomes(joined, names[1:], members), *outcomes(soup, names[1:], members)]


def _with(soup: Trial, name: str, members: Sequence[str]) -> Trial:
    return tuple(sorted([*soup, name], key=members.index))


def is_greedy(spec: object) -> bool:
    return isinstance(spec, SeveralMerge) and spec.weights == "greedy"
