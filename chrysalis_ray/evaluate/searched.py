"""Weights found by judging merges on *select*: a search over the simplex, one simplex for every group of layers.

`searched` is CMA-ES (mergekit-evolve and Sakana's model merging, arXiv 2403.13187, search like that), which here goes on after
a kill where it stood: its state is a JSON file, written after every generation. `greedy_layers` walks over the groups and in
each takes members in as a greedy soup does (arXiv 2203.05482), best first, as long as the merge gets no worse.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from chrysalis_ray.config.merges import SeveralMerge
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.evaluate.cma_es import SearchState, ask, start_state, tell

BUDGET = 40  # judgements of a search that names no number
GROUPS = 4  # groups of layers of `greedy_layers` that names no number
FIRST_STEP = 0.5  # of an equal share
SETTLED = 1e-3  # of an equal share: a search whose steps are that short has ended

Shares = tuple[float, ...]  # one weight per member, summing to one
ByModule = dict[str, Shares]
Taste = Callable[[Sequence[ByModule]], Sequence[float]]  # weights -> losses of such merges on select; not finite if diverged
Told = Callable[[str], None]


def layer_groups(modules: Sequence[str], groups: int) -> list[list[str]]:
    """The modules in at most `groups` groups of neighbouring layers of about the same number; those of no layer go last."""
    numbered = {module: int(found[1]) for module in modules if (found := re.search(r"\.(\d+)\.", module))}
    layers = sorted(set(numbered.values()))
    count = max(1, min(groups, len(layers)))
    edges = [round(len(layers) * n / count) for n in range(count + 1)]
    parts = [[m for m in modules if numbered.get(m) in layers[start:end]] for start, end in pairwise(edges)]
    parts[-1] += [module for module in modules if module not in numbered]
    return parts


def onto_simplex(point: Sequence[float]) -> Shares:
    """The nearest point with no negative number and sum one (Duchi et al. 2008, Efficient projections onto the l1-ball)."""
    down = sorted(point, reverse=True)
    sums = np.cumsum(down)
    last = max(k for k, value in enumerate(down) if value * (k + 1) > sums[k] - 1.0)
    excess = (float(sums[last]) - 1.0) / (last + 1)
    raw = [max(value - excess, 0.0) for value in point]
    return tuple(value / math.fsum(raw) for value in raw)


def shares_at(point: Sequence[float], members: int) -> list[Shares]:
    """Weights of every group at a point of the search, which is free of the direction that shares cannot move in."""
    if members == 1:
        return [(1.0,)]
    plane = _sum_zero(members)
    parts = np.asarray(point).reshape(-1, members - 1) @ plane + 1.0 / members
    return [onto_simplex(part.tolist()) for part in parts]


def searched_weights(
    spec: SeveralMerge,
    members: Sequence[str],
    losses: Mapping[str, float],
    modules: Sequence[str],
    request: Mapping[str, Any],
    state_file: Path,
    taste: Taste,
    told: Told = lambda line: None,
) -> tuple[ByModule, dict[str, Any]]:
    """The best weights per module that CMA-ES came across within `budget` judgements, and how the search went.

    It starts from equal shares, which are judged first, and from the best member alone, whose loss is known. `request` names
    what it depends on: a state file of another request is begun anew. A candidate whose loss is not finite ranks last.
    """
    groups = layer_groups(modules, spec.layer_groups or 1)
    budget, count = spec.budget or BUDGET, len(members)

    def tasted(trials: Sequence[Sequence[Shares]]) -> list[float]:
        return _losses(taste, [_spread(groups, shares) for shares in trials])

    found = _known(state_file, request)
    if found is None:
        alone = min(range(count), key=lambda n: losses[members[n]])
        best = [tuple(float(n == alone) for n in range(count))] * len(groups)
        found = {"request": dict(request), "history": [], "judged": 0, "best": best, "loss": losses[members[alone]]}
        if count > 1:
            equal = [(1.0 / count,) * count] * len(groups)
            found = _better(found, [equal], tasted([equal]))
        found["state"] = start_state([0.0] * (count - 1) * len(groups), FIRST_STEP / count).to_json()
        write_json(state_file, found)
    while count > 1:
        state = SearchState.from_json(found["state"])
        points = ask(state, spec.search_seed)
        if found["judged"] + len(points) > budget or _is_settled(state, count):
            break
        shares = [shares_at(point, count) for point in points]
        results = tasted(shares)
        found = _better(found, shares, results)
        after = tell(state, points, results)
        line = {"judged": found["judged"], "best": found["loss"], "step": after.step}
        found |= {"state": after.to_json(), "history": [*found["history"], line]}
        write_json(state_file, found)
        told(f"search of {len(groups)} x {count} weights: {found['loss']:.4f} after {found['judged']} of {budget} merges")
    return _spread(groups, found["best"]), {"judged": found["judged"], "loss": found["loss"], "groups": len(groups)}


def greedy_layer_weights(
    spec: SeveralMerge,
    members: Sequence[str],
    losses: Mapping[str, float],
    modules: Sequence[str],
    taste: Taste,
    told: Told = lambda line: None,
) -> tuple[ByModule, dict[str, Any]]:
    """Weights per module: each group of layers a soup of its own, begun with the best member alone, ties add a member."""
    groups = layer_groups(modules, spec.layer_groups or GROUPS)
    order = sorted(range(len(members)), key=lambda n: (losses[members[n]], n))
    soups = [[order[0]] for _ in groups]
    loss, trials = losses[members[order[0]]], 0
    for place in range(len(groups)):
        for other in order[1:]:
            trial = [[*soup, other] if number == place else soup for number, soup in enumerate(soups)]
            (found,) = _losses(taste, [_shares_of(groups, trial, len(members))])
            trials += 1
            told(f"layers {place + 1} of {len(groups)} with {members[other]}: {found:.4f} against {loss:.4f}")
            if found <= loss:
                soups, loss = trial, found
    return _shares_of(groups, soups, len(members)), {"judged": trials, "loss": loss, "groups": len(groups)}


def _spread(groups: Sequence[Sequence[str]], shares: Sequence[Sequence[float]]) -> ByModule:
    return {module: tuple(own) for part, own in zip(groups, shares, strict=True) for module in part}


def _shares_of(groups: Sequence[Sequence[str]], soups: Sequence[Sequence[int]], count: int) -> ByModule:
    return _spread(groups, [[float(n in soup) / len(soup) for n in range(count)] for soup in soups])


def _losses(taste: Taste, trials: Sequence[ByModule]) -> list[float]:
    return [loss if math.isfinite(loss) else math.inf for loss in taste(trials)]


def _better(found: dict[str, Any], shares: Sequence[Sequence[Shares]], results: Sequence[float]) -> dict[str, Any]:
    """The record with these judgements counted in."""
    least = min(range(len(results)), key=results.__getitem__)
    better = {"best": list(shares[least]), "loss": results[least]} if results[least] <= found["loss"] else {}
    return {**found, **better, "judged": found["judged"] + len(results)}


def _known(state_file: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    if not state_file.exists():
        return None
    found = read_json(state_file)
    return found if isinstance(found, dict) and found.get("request") == dict(request) else None


def _is_settled(state: SearchState, members: int) -> bool:
    longest = max(state.covariance[n][n] for n in range(len(state.mean))) ** 0.5
    return state.step * longest < SETTLED / members


def _sum_zero(members: int) -> np.ndarray:
    """Orthonormal rows [members - 1, members] that sum to zero each (Helmert)."""
    rows = []
    for size in range(1, members):
        row = [1.0] * size + [-float(size)] + [0.0] * (members - 1 - size)
        rows.append(np.asarray(row) / math.sqrt(size * (size + 1)))
    return np.stack(rows)
