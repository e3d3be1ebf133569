"""Merge adapters into one, module by module: the base model is never loaded, no dense delta is ever formed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chrysalis_ray.config.experiment import ConsensusMerge, EnsembleMerge, WinnerMerge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.merge.core_space import CoreSpace, Cut, Factors, core_space, cut_to_rank
from chrysalis_ray.merge.table import METHODS

Adapter = Mapping[str, Factors]


@dataclass(frozen=True)
class MergeResult:
    """One adapter: `factors` maps a module to (A [rank, in], B [out, rank]) with scale 1, that is alpha = rank.

    `residual` is the relative Frobenius error of the cut to `rank` over the whole adapter, sqrt(sum |full - cut|^2 /
    sum |full|^2); `captured_energy` is 1 - residual^2. `weights` has one entry per member given. `notes` holds what the method
    has to tell, the cosines between the members' changes, and members that lack modules.
    """

    factors: dict[str, Factors]
    rank: int
    weights: list[float]
    residual: float
    captured_energy: float
    per_module: dict[str, dict[str, float]]
    notes: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors."""
        return {
            "rank": self.rank,
            "weights": self.weights,
            "residual": self.residual,
            "captured_energy": self.captured_energy,
            "per_module": self.per_module,
            "notes": self.notes,
        }


def merge_modules(
    config: WinnerMerge | EnsembleMerge | ConsensusMerge,
    members: Sequence[Adapter],
    scales: Sequence[float],
    anchor: Adapter | None,
    anchor_scale: float,
    scores: Sequence[float],
    rank: int,
) -> MergeResult:
    """Merge `members`, whose deltas are scale x B A, around `anchor` (the seed; None is the base itself).

    `scores` are held-out losses in nats per token, lower is better. The result is cut to `config.rank`, else to `rank`; from
    the sum of all ranks on it is exact. Members of weight zero are removed before anything is counted. A module that an
    adapter lacks is a delta of zero there. Raises MergeError for shapes that differ, values that are not finite and losses
    that are not numbers.
    """
    if not members or not len(members) == len(scales) == len(scores):
        raise MergeError(f"{len(members)} adapters, {len(scales)} scales and {len(scores)} scores do not make a merge")
    method = METHODS[config.method]
    rank = getattr(config, "rank", None) or rank
    weights = method.weigh(config, scores)
    live = [index for index, weight in enumerate(weights) if weight > 0.0]
    weights_N = torch.tensor([weights[index] for index in live], dtype=torch.float64)
    modules = sorted({module for index in live for module in members[index]} | set(anchor or {}))
    tallies: Counter[str] = Counter()
    gram_NN = torch.zeros(len(live), len(live), dtype=torch.float64)
    cuts: dict[str, Cut] = {}
    for module in modules:
        blocks = [members[index].get(module) for index in live]
        seed = anchor.get(module) if anchor else None
        _check_module(module, [*blocks, seed])
        if len(live) == 1 and blocks[0] is not None and blocks[0][0].shape[0] <= rank:
            cuts[module] = _as_it_is(blocks[0], scales[live[0]], rank)
            continue
        space = core_space(blocks, [scales[index] for index in live], seed, anchor_scale)
        change_PQ, counted = method.combine(config, weights_N, space.increments_NPQ)
        tallies.update(counted)  # a Counter adds up floats as well
        gram_NN += _gram(space)
        cuts[module] = cut_to_rank(space, space.anchor_PQ + change_PQ, rank)
    notes: dict[str, Any] = {"method": config.method, "members": len(live), **method.summarise(len(live), tallies)}
    if len(live) > 1:
        notes["cosines"] = _cosines(gram_NN)
    missing = {str(index): len(modules) - len(members[index]) for index in live if len(members[index]) < len(modules)}
    if missing:
        notes["modules_missing_as_zero"] = missing
    return _result(cuts, rank, weights, notes)


def _result(cuts: Mapping[str, Cut], rank: int, weights: list[float], notes: dict[str, Any]) -> MergeResult:
    energy = math.fsum(cut.energy for cut in cuts.values())
    lost = math.fsum(cut.lost for cut in cuts.values())
    share = lost / energy if energy else 0.0
    per_module = {
        module: {
            "norm": math.sqrt(cut.energy),
            "residual": math.sqrt(cut.lost / cut.energy) if cut.energy else 0.0,
            "available_rank": float(cut.available_rank),
        }
        for module, cut in cuts.items()
    }
    factors = {module: cut.factors for module, cut in cuts.items()}
    return MergeResult(factors, rank, weights, math.sqrt(share), 1.0 - share, per_module, notes)


def _as_it_is(block: Factors, scale: float, rank: int) -> Cut:
    """A single adapter that fits into the rank: its own A, and B times its scale."""
    a_ri, b_or = block[0].detach().to("cpu", torch.float32), block[1].detach().to("cpu", torch.float32)
    short = rank - a_ri.shape[0]
    pad = torch.nn.functional.pad
    gram = (b_or.double().T @ b_or.double()) @ (a_ri.double() @ a_ri.double().T)
    energy = max(scale**2 * float(gram.trace()), 0.0)
    return Cut((pad(a_ri, (0, 0, 0, short)), pad(b_or * scale, (0, short))), energy, 0.0, a_ri.shape[0])


def _check_module(module: str, blocks: Sequence[Factors | None]) -> None:
    shapes = {(block[1].shape[0], block[0].shape[1]) for block in blocks if block is not None}
    if len(shapes) > 1:
        raise MergeError(f"module {module} has the shapes {sorted(shapes)}", "merge adapters of one and the same base")
    for block in blocks:
        if block is None:
            continue
        if block[0].shape[0] != block[1].shape[1]:
            raise MergeError(f"module {module}: A has rank {block[0].shape[0]}, B has rank {block[1].shape[1]}")
        if not all(math.isfinite(torch.linalg.vector_norm(side, math.inf)) for side in block if side.numel()):
            raise MergeError(f"module {module} holds values that are not finite", "leave out the variant that diverged")


def _gram(space: CoreSpace) -> Tensor:
    flat = space.increments_NPQ.flatten(1)
    return flat @ flat.T


def _cosines(gram_NN: Tensor) -> list[list[float]]:
    """Cosines between the members' changes from the anchor, over the whole adapter; a member without change has 0."""
    norms = gram_NN.diagonal().sqrt()
    norms = torch.where(norms > 0, norms, torch.inf)
    return [[round(float(value), 6) for value in row] for row in gram_NN / norms[:, None] / norms]
