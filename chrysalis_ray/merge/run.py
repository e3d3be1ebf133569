"""Merge adapters into one, module by module: the base model is never loaded, no dense delta is ever formed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chrysalis_ray.config.merges import DensityMerge, ElementwiseMerge, Merge, RegmeanMerge, SlerpMerge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.merge.core_space import Cut, Factors, check_finite, check_shapes, core_space, cut_to_rank
from chrysalis_ray.merge.elementwise import (
    RuledRows,
    all_equal,
    changes_from,
    module_draw,
    rule_tallies,
    ruled_core,
)
from chrysalis_ray.merge.finished import FinishedModules, MergedModule
from chrysalis_ray.merge.gram import Adapter, Stack, cosines, gram_of_changes, minus_the_last, stack
from chrysalis_ray.merge.inputs import Inputs, moments_in_core, whole_moment
from chrysalis_ray.merge.knots import cut_rows, ruled_knots
from chrysalis_ray.merge.linear import sum_cut_to_rank
from chrysalis_ray.merge.row_fit import fit_rows
from chrysalis_ray.merge.side_by_side import in_order
from chrysalis_ray.merge.slerp import turned_rows
from chrysalis_ray.merge.table import AFTER_A_LOOK, AS_A_SUM, BY_ENTRY, BY_INPUTS, IN_THE_CORE, SOLVED, SUMMARIES
from chrysalis_ray.merge.weights import given_weights, weigh
from chrysalis_ray.merge.whole_regmean import looks_at_whole_inputs, nearest_outputs_of_whole_inputs

CHANGED = 1e-6  # of the squared lengths of member and anchor: a change below that is computed from the cores, not from theirs
TOO_LONG = 3.0  # times the lengths of all members together
MEASURE = "give `chrysalis merge` the --base and a --text for each adapter, or use `wudi`, which needs no data"


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
    config: Merge,
    members: Sequence[Adapter],
    scales: Sequence[float],
    anchor: Adapter | None,
    anchor_scale: float,
    scores: Sequence[float] | None,
    rank: int,
    given: Sequence[float] | None = None,
    inputs: Inputs | None = None,
    finished: FinishedModules | None = None,
) -> MergeResult:
    """Merge `members`, whose deltas are scale x B A, around `anchor` (the seed; None is the base itself).

    `scores` are held-out losses in nats per token, lower is better; None where nothing was judged. The result is cut to
    `config.rank`, else to `rank`; from the sum of all ranks on, and with `exact`, nothing is lost. `given` weights come before
    those that `config` asks for. `inputs` are what each member feeds its modules; only `regmean` asks for them. Members of
    weight zero are removed before anything is counted. A module that an adapter lacks is a delta of zero there. With
    `finished`, modules found there are not merged again, and those that are merged are kept there instead of in memory. Raises
    MergeError for shapes that differ, values that are not finite and losses that are not numbers.
    """
    if not members or len(members) != len(scales) or (scores is not None and len(scores) != len(members)):
        told = "no" if scores is None else len(scores)
        raise MergeError(f"{len(members)} adapters, {len(scales)} scales and {told} scores do not make a merge")
    if given is not None:
        weights, held_out = given_weights(given, len(members)), dict[int, str]()
    else:
        gram = partial(gram_of_changes, members, scales, anchor, anchor_scale)
        weights, held_out = weigh(config, len(members), scores, gram)
    live = [index for index, weight in enumerate(weights) if weight > 0.0]
    if isinstance(config, DensityMerge):
        config = config.taken(live)
    population = _Population(
        [members[index] for index in live], [scales[index] for index in live], anchor, anchor_scale,
        torch.tensor([weights[index] for index in live], dtype=torch.float64),
        None if inputs is None else [inputs[index] for index in live],
    )  # fmt: skip
    wanted = getattr(config, "rank", None) or rank
    tallies: Counter[str] = Counter()
    gram_NN = torch.zeros(len(live), len(live), dtype=torch.float64)
    cuts: dict[str, Cut] = {}
    for module, merged in _each_module(config, population, None if wanted == "exact" else wanted, finished):
        cuts[module] = merged.cut
        tallies.update(merged.counted)  # a Counter adds up floats as well
        gram_NN += merged.gram_NN
    if wanted == "exact":
        wanted = max(1, *(cut.available_rank for cut in cuts.values()))
        cuts = {module: _resized(cut, wanted) for module, cut in cuts.items()}
    notes: dict[str, Any] = {"method": config.method, "members": len(live)}
    if config.method in SUMMARIES:
        notes |= SUMMARIES[config.method](len(live), tallies)
    if len(live) > 1:
        notes["cosines"] = [[round(float(value), 6) for value in row] for row in cosines(gram_NN)]
    if held_out:
        notes["held_out"] = {str(index): reason for index, reason in held_out.items()}
    missing = {str(index): len(cuts) - len(members[index]) for index in live if len(members[index]) < len(cuts)}
    if missing:
        notes["modules_missing_as_zero"] = missing
    return _result(cuts, wanted, weights, notes)


class _Population(NamedTuple):
    """Those who take part: members of positive weight, and the seed."""

    members: list[Adapter]
    scales: list[float]
    anchor: Adapter | None
    anchor_scale: float
    weights_N: Tensor
    inputs: Inputs | None

    def modules(self) -> list[str]:
        return sorted({module for member in self.members for module in member} | set(self.anchor or {}))

    def seed(self, module: str) -> Factors | None:
        return self.anchor.get(module) if self.anchor else None


def _each_module(
    config: Merge, population: _Population, rank: int | None, finished: FinishedModules | None
) -> Iterator[tuple[str, MergedModule]]:
    """Every module with its merge, in order: as it was finished before, or merged now and kept."""

    def merged_or_found(module: str) -> MergedModule:
        before = finished.find(module) if finished else None
        if before is not None:
            return before
        merged = _merge_module(config, population, rank, module)
        return finished.add(module, merged) if finished else merged

    modules = population.modules()
    walk = map if looks_at_whole_inputs(config) else in_order  # whole inputs are large: those of one module at a time
    for module, merged in zip(modules, walk(merged_or_found, modules), strict=True):
        if finished:
            finished.hash_along(module, merged)
        yield module, merged


def _merge_module(config: Merge, population: _Population, rank: int | None, module: str) -> MergedModule:
    """One module merged and cut to `rank` (None: not cut), what its method counted, and the Gram matrix of the changes."""
    blocks = [member.get(module) for member in population.members]
    seed = population.seed(module)
    check_shapes(module, [*blocks, seed])
    heard = any(block is not None for block in blocks)
    if isinstance(config, SlerpMerge) and config.along != "module" and len(blocks) > 1 and heard:
        check_finite(module, [*blocks, seed])
        return turned_rows(config, population.weights_N, blocks, population.scales, seed, population.anchor_scale, rank)
    alone = blocks[0] if len(blocks) == 1 and blocks[0] is not None and (rank is None or len(blocks[0][0]) <= rank) else None
    if rank is not None and alone is None and config.method in AS_A_SUM:
        summed = _summed_module(config, population, blocks, seed, rank)
        if summed is not None:
            return summed  # so that its Gram matrix, and with it every value, is finite
    check_finite(module, [*blocks, seed])
    if alone is not None:
        return MergedModule(_as_it_is(alone, population.scales[0], rank), {}, torch.zeros(1, 1, dtype=torch.float64))
    if rank is not None and config.method in BY_ENTRY and getattr(config, "space", "core") == "dense":
        gram_NN = _clear_gram(population, blocks, seed)[1]
        if gram_NN is not None and _differ(gram_NN):
            return _dense_module(config, population, blocks, seed, gram_NN, rank, module)
    space = core_space(blocks, population.scales, seed, population.anchor_scale)
    weights_N, increments_NPQ = population.weights_N, space.increments_NPQ
    flat = increments_NPQ.flatten(1)
    gram_NN = flat @ flat.T
    limit = min(increments_NPQ.shape[1:]) if rank is None else rank
    if config.method in IN_THE_CORE:
        change_PQ, counted = IN_THE_CORE[config.method](config, weights_N, increments_NPQ)
        if config.method in SOLVED:
            refuse_too_long(config, module, change_PQ, increments_NPQ)
        return MergedModule(cut_to_rank(space, space.anchor_PQ + change_PQ, limit), counted, gram_NN)
    if config.method in BY_INPUTS:
        if population.inputs is None:
            raise MergeError(f"`{config.method}` weighs every member by its own inputs, and nobody measured them", MEASURE)
        if isinstance(config, RegmeanMerge) and looks_at_whole_inputs(config):
            size = next(block[0].shape[1] for block in (*blocks, seed) if block is not None)
            moment_of = partial(whole_moment, module, size, population.inputs)
            change_PI, counted = nearest_outputs_of_whole_inputs(config, weights_N, space, moment_of)
            refuse_too_long(config, module, change_PI, increments_NPQ)
            merged_PI = space.right.apply(space.anchor_PQ.T).T + change_PI
            return MergedModule(cut_rows(space, merged_PI, min(merged_PI.shape) if rank is None else rank), counted, gram_NN)
        moments_NQQ = moments_in_core(space, module, population.inputs)
        change_PQ, counted = BY_INPUTS[config.method](config, weights_N, increments_NPQ, moments_NQQ)
        refuse_too_long(config, module, change_PQ, increments_NPQ)
        return MergedModule(cut_to_rank(space, space.anchor_PQ + change_PQ, limit), counted, gram_NN)
    assert isinstance(config, ElementwiseMerge)
    mean_PQ = torch.einsum("n,npq->pq", weights_N, increments_NPQ)
    if all_equal(increments_NPQ):
        change_PQ = mean_PQ
    elif config.space == "knots":
        draw = module_draw(getattr(config, "rng_seed", 0), module)
        return MergedModule(*ruled_knots(BY_ENTRY[config.method], config, weights_N, space, draw, limit), gram_NN)
    elif config.space == "core":
        draw = module_draw(getattr(config, "rng_seed", 0), module)
        change_PQ = ruled_core(BY_ENTRY[config.method], config, weights_N, increments_NPQ, draw)
    else:
        return _dense_module(config, population, blocks, seed, gram_NN, limit, module)
    cut = cut_to_rank(space, space.anchor_PQ + change_PQ, limit)
    return MergedModule(cut, rule_tallies(change_PQ, mean_PQ), gram_NN)


def _summed_module(
    config: Merge, population: _Population, blocks: Sequence[Factors | None], seed: Factors | None, rank: int
) -> MergedModule | None:
    """A weighted sum without the core; None where its Gram matrices have too few digits for it."""
    stacked, gram_NN = _clear_gram(population, blocks, seed)
    if stacked is None or gram_NN is None:
        return None
    counts_N = AS_A_SUM[config.method](config, population.weights_N, gram_NN)
    counts = counts_N.tolist()
    counts.append(1.0 - math.fsum(counts))  # the anchor's
    scales = [*population.scales, population.anchor_scale]
    cut = sum_cut_to_rank(stacked, stacked.per_column([c * s for c, s in zip(counts, scales, strict=True)]), rank)
    return None if cut is None else MergedModule(cut, {}, gram_NN)


def _dense_module(
    config: Merge, population: _Population, blocks: Sequence[Factors | None], seed: Factors | None, gram_NN: Tensor, rank: int,
    module: str,
) -> MergedModule:  # fmt: skip
    """A rule on the entries of the dense changes, and the best adapter of a rank for what comes out."""
    changes, anchor = changes_from(blocks, population.scales, seed, population.anchor_scale)
    draw = module_draw(getattr(config, "rng_seed", 0), module)
    norms_N = gram_NN.diagonal().clamp(min=0.0).sqrt()
    rows = RuledRows(BY_ENTRY[config.method], config, population.weights_N, changes, anchor, norms_N, draw)
    if config.method in AFTER_A_LOOK:
        rows.rule = AFTER_A_LOOK[config.method](config, rows)
    return MergedModule(fit_rows(rows.blocks, rows.out_size, rows.in_size, rank, rows.dtype), {}, gram_NN)


def _clear_gram(
    population: _Population, blocks: Sequence[Factors | None], seed: Factors | None
) -> tuple[Stack | None, Tensor | None]:
    """The blocks stacked, a seed that adds something last, and the Gram matrix of the changes from it, where it has digits."""
    stacked = stack([*blocks, seed if seed is not None and bool(seed[1].any()) else None])
    if stacked is None:
        return None, None
    gram_MM = stacked.gram([*population.scales, population.anchor_scale])
    *own, anchors = gram_MM.diagonal().tolist()
    if not all(map(math.isfinite, [*own, anchors])):
        return None, None
    gram_NN = minus_the_last(gram_MM)
    changed = gram_NN.diagonal().tolist()
    drowns = any(change < CHANGED * (size + anchors) for change, size in zip(changed, own, strict=True))
    return stacked, None if drowns else gram_NN


def refuse_too_long(config: Merge, module: str, change_PQ: Tensor, increments_NPQ: Tensor) -> None:
    """Raises MergeError for a change that is so much longer than all of its members one after the other that it is neither a
    mean nor a sum, but what a solve makes of noise."""
    most = float(torch.linalg.matrix_norm(increments_NPQ).sum())
    length = float(torch.linalg.vector_norm(change_PQ))
    if length > TOO_LONG * most:
        raise MergeError(
            f"`{config.method}` of module {module} comes out {length / most:.1f} times as long as all members together: what "
            "they read is nearly the same, and where they differ it is solved for noise",
            "give a larger ridge",
        )


def _differ(gram_NN: Tensor) -> bool:
    """Whether the members are certainly not all the same: half the digits of their distances are enough to see it."""
    size_N = gram_NN.diagonal()
    return float((size_N + size_N[0] - 2.0 * gram_NN[0]).max()) > CHANGED * float(size_N.max())


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


def _resized(cut: Cut, rank: int) -> Cut:
    """The same factors with `rank` rows and columns: zeros are added, or taken off."""
    a_ri, b_or = cut.factors
    short = rank - a_ri.shape[0]
    pad = torch.nn.functional.pad
    return replace(cut, factors=(pad(a_ri, (0, 0, 0, short)).contiguous(), pad(b_or, (0, short)).contiguous()))


def _as_it_is(block: Factors, scale: float, rank: int | None) -> Cut:
    """A single adapter that fits into the rank: its own A, and B times its scale."""
    a_ri, b_or = block[0].detach().to("cpu", torch.float32), block[1].detach().to("cpu", torch.float32)
    gram = (b_or.double().T @ b_or.double()) @ (a_ri.double() @ a_ri.double().T)
    energy = max(scale**2 * float(gram.trace()), 0.0)
    cut = Cut((a_ri, b_or * scale), energy, 0.0, a_ri.shape[0])
    return cut if rank is None else _resized(cut, rank)
