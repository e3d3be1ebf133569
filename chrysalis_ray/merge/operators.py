"""Operators of a population that evolves by its weights: interpolation, crossover, mutation, and a step of a swarm.

All act on deltas, never on A and B apart: Model Swarms (arXiv 2410.11163) and GENOME (arXiv 2503.01155) add factors, whose
product then is quadratic in the coefficients and depends on how each adapter happens to be factored. Each is a pure function
of its parents, its settings and an `rng_seed`, cuts to `rank` once at the end (None: not at all), and says what is from where.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.merge.core_space import NULL, CoreSpace, Cut, Factors, check_module, core_space, cut_to_rank
from chrysalis_ray.merge.gram import Adapter
from chrysalis_ray.merge.per_layer import wider


class Parent(NamedTuple):
    """An adapter of delta scale x B A, and what it is called: a variant's id, or the sha256 of its folder."""

    name: str
    factors: Adapter
    scale: float


@dataclass(frozen=True)
class Offspring:
    """A new adapter of scale 1, `residual` of it lost by the cut to `rank`, and `provenance`: operator, parents, settings."""

    factors: dict[str, Factors]
    rank: int
    residual: float
    provenance: dict[str, Any]

    def parent(self, name: str) -> Parent:
        """Itself as a parent of the next generation."""
        return Parent(name, self.factors, 1.0)


@dataclass(frozen=True)
class SwarmPull:
    """How strongly a particle follows its velocity, its own best, the best of all, and flees the worst; and how far it goes."""

    inertia: float = 0.4
    own_best: float = 0.3
    best: float = 0.3
    worst: float = 0.3
    step: float = 1.0


def combine(parents: Sequence[Parent], coefficients: Sequence[float], rank: int | None) -> Offspring:
    """sum_i c_i dW_i, exact before the cut; coefficients of any sign and sum. Raises MergeError for shapes that differ."""
    if not parents or len(parents) != len(coefficients) or not all(map(math.isfinite, coefficients)):
        raise MergeError(f"{len(parents)} adapters and the coefficients {list(coefficients)} make no sum")
    c_N = torch.tensor(list(coefficients), dtype=torch.float64)
    cuts = {}
    for module in _modules(parents):
        space = _space(parents, module)
        total_PQ = torch.einsum("n,npq->pq", c_N, space.increments_NPQ)
        cuts[module] = _cut(space, total_PQ, rank)
    provenance = {
        "operator": "combine", "parents": [parent.name for parent in parents], "coefficients": list(map(float, coefficients))
    }  # fmt: skip
    return _offspring(cuts, rank, provenance)


def interpolate(one: Parent, two: Parent, share: float, rank: int | None) -> Offspring:
    """(1 - share) dW_one + share dW_two; a share outside [0, 1] extrapolates (LITI of WARP, arXiv 2406.16768)."""
    child = combine([one, two], [1.0 - share, share], rank)
    return _told(child, operator="interpolate", share=share)


def crossover(parents: Sequence[Parent], shares: Sequence[float], rng_seed: int, rank: int | None = None) -> Offspring:
    """Every module whole from one of the parents, drawn with chances `shares` from `rng_seed` and the module's name alone.

    A module that the drawn parent lacks is a delta of zero. Raises MergeError for shares that are no chances.
    """
    if not parents or len(parents) != len(shares) or min(shares) < 0.0 or not math.isclose(math.fsum(shares), 1.0):
        raise MergeError(f"{len(parents)} parents cannot be drawn with the chances {list(shares)}", "give shares that sum to 1")
    cuts, origin = {}, {}
    edges = torch.tensor(list(shares), dtype=torch.float64).cumsum(0)
    live = [number for number, share in enumerate(shares) if share > 0.0]
    for module in _modules(parents):
        drawn = int((edges <= _Draws(rng_seed, module).random()).sum())
        chosen = drawn if drawn in live else live[-1]  # a draw at the very end of the last edge's rounding
        origin[module] = parents[chosen].name
        space = _space(parents, module)
        cuts[module] = _cut(space, space.increments_NPQ[chosen], rank)
    names = [parent.name for parent in parents]
    return _offspring(
        cuts, rank, {"operator": "crossover", "parents": names, "shares": list(shares), "rng_seed": rng_seed, "modules": origin}
    )


def mutate(
    parent: Parent, size: float, rng_seed: int, rank: int | None = None, fresh: int = 0, anchor: Parent | None = None
) -> Offspring:
    """dW + E with |E| = size |dW - anchor| in every module, E random.

    With `fresh` 0, E = U Z V^T lies within the singular directions U, V of the change from the anchor, Z normal: the rank
    stays, as in the singular value mutation of CycleQD (arXiv 2410.14735), which scales values only. Else E = G H is normal of
    rank `fresh` in directions of its own, and the rank grows by as much. A module that did not change is left alone. The signs
    of U and V are fixed, so that the child does not depend on how the parent is factored where its singular values differ.
    """
    if not (math.isfinite(size) and size >= 0.0 and fresh >= 0):
        raise MergeError(f"a mutation of relative size {size} with {fresh} fresh directions is none", "give a size from 0 on")
    cuts = {}
    for module in _modules([parent, *([anchor] if anchor else [])]):
        generator = torch.Generator().manual_seed(_Draws(rng_seed, module).whole())
        cuts[module] = (_mutate_beyond if fresh else _mutate_within)(parent, module, size, generator, rank, fresh, anchor)
    provenance = {
        "operator": "mutate", "parents": [parent.name], "anchor": anchor.name if anchor else None, "size": size, "fresh": fresh,
        "rng_seed": rng_seed,
    }  # fmt: skip
    return _offspring(cuts, rank, provenance)


def swarm_step(
    particle: Parent, velocity: Parent | None, own_best: Parent, best: Parent, worst: Parent, rng_seed: int, rank: int | None,
    pull: SwarmPull = SwarmPull(),
) -> tuple[Offspring, Offspring]:  # fmt: skip
    """Where a particle x of a swarm goes, and its new velocity v, both as deltas (Model Swarms, arXiv 2410.11163):

        v' = (a v + b (p - x) + c (g - x) - d (w - x)) / (a + b + c + d),      x' = x + step v'

    with p its own best, g the best and w the worst of all, and a, b, c, d the pulls times a uniform random number each. `rank`
    cuts x'; v' is kept whole, so that nothing that a step was is lost for the next.
    """
    draws = _Draws(rng_seed, "swarm")
    raw = [weight * draws.random() for weight in (pull.inertia, pull.own_best, pull.best, pull.worst)]
    total = math.fsum(raw)
    if not total > 0.0:
        raise MergeError(f"the pulls {pull} move nothing", "give at least one above 0")
    a, b, c, d = (value / total for value in raw)
    others = [own_best, best, worst, *([velocity] if velocity else [])]
    speed = [b, c, -d, *([a] if velocity else [])]
    back = d - b - c
    moved = combine([particle, *others], [1.0 + pull.step * back, *(pull.step * value for value in speed)], rank)
    onward = combine([particle, *others], [back, *speed], None)
    return _told(moved, operator="swarm", rng_seed=rng_seed), _told(onward, operator="swarm velocity", rng_seed=rng_seed)


# parts --------------------------------------------------------------------------------------------------------------


def _mutate_within(
    parent: Parent, module: str, size: float, generator: torch.Generator, rank: int | None, fresh: int, anchor: Parent | None
) -> Cut:
    space = _space([parent], module, anchor)
    change_PQ = space.increments_NPQ[0]
    left, values, right_t = torch.linalg.svd(change_PQ, full_matrices=False)
    heard = int((values > max(NULL, 1e-7) * values[0]).sum()) if len(values) and float(values[0]) > 0.0 else 0
    left, right = left[:, :heard], right_t[:heard].T
    probe_Ok = space.left.apply(left)
    signs_k = probe_Ok.gather(0, probe_Ok.abs().argmax(0, keepdim=True)).sign()[0] if heard else left.new_zeros(0)
    z_kk = torch.randn(heard, heard, generator=generator, dtype=torch.float64)
    step_PQ = (left * signs_k) @ z_kk @ (right * signs_k).T
    length = float(step_PQ.norm())
    if length > 0.0:
        change_PQ = change_PQ + size * float(change_PQ.norm()) / length * step_PQ
    return _cut(space, space.anchor_PQ + change_PQ, rank)


def _mutate_beyond(
    parent: Parent, module: str, size: float, generator: torch.Generator, rank: int | None, fresh: int, anchor: Parent | None
) -> Cut:
    block = parent.factors.get(module) or (anchor.factors[module] if anchor else None)
    assert block is not None
    h_RI = torch.randn(fresh, block[0].shape[1], generator=generator, dtype=torch.float64)
    g_OR = torch.randn(block[1].shape[0], fresh, generator=generator, dtype=torch.float64)
    space = _space([parent, Parent("noise", {module: (h_RI, g_OR)}, 1.0)], module, anchor)
    change_PQ = space.increments_NPQ[0]
    noise_PQ = space.increments_NPQ[1] + space.anchor_PQ  # the anchor is no part of it
    changed, length = float(change_PQ.norm()), float(noise_PQ.norm())
    if changed > 0.0:
        change_PQ = change_PQ + size * changed / length * noise_PQ
    return _cut(space, space.anchor_PQ + change_PQ, rank)


def _modules(parents: Sequence[Parent]) -> list[str]:
    return sorted({module for parent in parents for module in parent.factors})


def _space(parents: Sequence[Parent], module: str, anchor: Parent | None = None) -> CoreSpace:
    blocks = [parent.factors.get(module) for parent in parents]
    seed = anchor.factors.get(module) if anchor else None
    check_module(module, [*blocks, seed])
    return core_space(blocks, [parent.scale for parent in parents], seed, anchor.scale if anchor else 1.0)


def _cut(space: CoreSpace, total_PQ: Tensor, rank: int | None) -> Cut:
    return cut_to_rank(space, total_PQ, min(total_PQ.shape) if rank is None else rank)


def _offspring(cuts: dict[str, Cut], rank: int | None, provenance: dict[str, Any]) -> Offspring:
    """All modules at one rank: `rank`, or the least that holds all of them whole."""
    energy = math.fsum(cut.energy for cut in cuts.values())
    lost = math.fsum(cut.lost for cut in cuts.values())
    even = rank or max([1, *(cut.available_rank for cut in cuts.values())])
    factors = {}
    for module, cut in cuts.items():
        a_ri, b_or = cut.factors
        factors[module] = wider((a_ri[:even].contiguous(), b_or[:, :even].contiguous()), even)
    return Offspring(factors, even, math.sqrt(lost / energy) if energy else 0.0, {**provenance, "rank": even})


def _told(child: Offspring, **more: Any) -> Offspring:
    return Offspring(child.factors, child.rank, child.residual, {**child.provenance, **more})


class _Draws:
    """Random numbers of a seed and a name: the same in any order of modules, on any machine."""

    def __init__(self, rng_seed: int, name: str) -> None:
        self._digest = hashlib.sha256(f"{rng_seed}/{name}".encode()).digest()
        self._used = 0

    def whole(self) -> int:
        """48 bits."""
        if self._used:
            self._digest = hashlib.sha256(self._digest).digest()
        self._used += 1
        return int.from_bytes(self._digest[:6], "big")

    def random(self) -> float:
        """From [0, 1)."""
        return self.whole() / 2**48
