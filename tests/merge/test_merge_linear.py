"""Weighted sums from Gram matrices: as exact as the core where they answer, and no answer where they would not be."""

from __future__ import annotations

import math

import pytest
import torch

from chrysalis_ray.config.merges import EnsembleMerge, ModelStockMerge, SlerpMerge, TaskArithmeticMerge
from chrysalis_ray.merge import run
from chrysalis_ray.merge.core_space import core_space
from chrysalis_ray.merge.gram import stack
from chrysalis_ray.merge.linear import CLEAR, ROUNDING, best_of_rank, sum_cut_to_rank
from chrysalis_ray.merge.run import merge_modules
from chrysalis_ray.merge.table import AS_A_SUM

OUT, IN, RANK, COUNT = 90, 70, 4, 6
WEIGHTS = [0.3, 0.2, 0.2, 0.1, 0.1, 0.1]
CONFIGS = {
    "ensemble": EnsembleMerge(method="ensemble"),
    "task_arithmetic": TaskArithmeticMerge(method="task_arithmetic", coefficient=0.3),
    "slerp": SlerpMerge(method="slerp"),
    "model_stock": ModelStockMerge(method="model_stock"),
}


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def members(regime: str, rng_seed: int = 0):
    """Members with nothing in common; of one A with a small change; of one A that hardly moved, by a low learning rate."""
    generator = torch.Generator().manual_seed(rng_seed)
    moved = {"independent": math.inf, "shared": 0.1, "collapsed": 1e-3}[regime]
    common_a, common_b = normal(generator, RANK, IN), normal(generator, OUT, RANK)
    sizes = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)

    def own():
        a_ri, b_or = normal(generator, RANK, IN), normal(generator, OUT, RANK)
        return (a_ri, b_or * sizes) if moved == math.inf else (common_a + moved * a_ri, (common_b + b_or) * sizes)

    return [own() for _ in range(COUNT)]


every_regime = pytest.mark.parametrize("regime", ["independent", "shared", "collapsed"])


@every_regime
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_best_of_a_rank_is_the_dense_one(regime, rank):
    blocks = members(regime)
    counts = torch.tensor(WEIGHTS, dtype=torch.float64) - 0.15  # some count negatively
    dense = sum(c * b @ a for c, (a, b) in zip(counts, blocks, strict=True))
    left, values, right_t = torch.linalg.svd(dense)
    stacked = stack(blocks)
    best = best_of_rank(stacked, stacked.per_column(counts), rank)
    got = best.b_OR @ best.a_RI
    nearest = left[:, :rank] * values[:rank] @ right_t[:rank]
    assert float((got - nearest).norm() / dense.norm()) < 1e-12
    energy, lost = float((values**2).sum()), float((values[rank:] ** 2).sum())
    assert best.energy == pytest.approx(energy, rel=1e-12)
    assert abs(best.lost - lost) < 1e-12 * energy
    assert float((got - dense).norm() ** 2) == pytest.approx(best.lost, rel=1e-6)
    even = best.b_OR.T @ best.b_OR, best.a_RI @ best.a_RI.T
    torch.testing.assert_close(even[0], even[1], atol=1e-10 * float(values[0]), rtol=0)


@every_regime
def test_with_a_rank_for_every_column_the_columns_are_the_result(regime):
    blocks = members(regime)
    stacked = stack(blocks)
    best = best_of_rank(stacked, stacked.per_column(WEIGHTS), RANK * COUNT)
    dense = sum(w * b @ a for w, (a, b) in zip(WEIGHTS, blocks, strict=True))
    assert float((best.b_OR @ best.a_RI - dense).norm() / dense.norm()) < 1e-14
    assert best.lost == 0.0
    assert best.available_rank == RANK * COUNT


@every_regime
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("seeded", [False, True], ids=["fresh", "around-a-trained-seed"])
def test_without_the_core_a_merge_is_what_it_is_in_the_core(regime, method, seeded, monkeypatch):
    adapters = [{"q": block} for block in members(regime)]
    anchor = {"q": members("independent", rng_seed=7)[0]} if seeded else None
    if seeded:
        adapters = [
            {"q": (torch.cat([a, anchor["q"][0]]), torch.cat([b, anchor["q"][1]], 1))} for x in adapters for a, b in x.values()
        ]

    def merged():
        return merge_modules(CONFIGS[method], adapters, [2.0] * COUNT, anchor, 2.0, None, 5, WEIGHTS)

    calls = []
    monkeypatch.setattr(run, "core_space", lambda *arguments: calls.append(arguments) or core_space(*arguments))
    quick = merged()
    assert not calls
    monkeypatch.setattr(run, "sum_cut_to_rank", lambda *arguments: None)
    slow = merged()
    assert calls
    one, two = (b.double() @ a.double() for result in (quick, slow) for a, b in result.factors.values())
    assert float((one - two).norm() / two.norm()) < 3e-7  # both are stored in fp32
    assert quick.residual == pytest.approx(slow.residual, rel=1e-7)
    assert quick.per_module["q"] == pytest.approx(slow.per_module["q"], rel=1e-7)
    assert quick.notes["cosines"] == slow.notes["cosines"]
    assert set(CONFIGS) | {"winner"} == set(AS_A_SUM)


def test_what_drowns_in_rounding_is_left_to_the_core():
    blocks = members("independent")
    stacked = stack(blocks)
    counts_K = stacked.per_column(WEIGHTS)
    assert best_of_rank(stacked, counts_K, 8) is not None
    assert best_of_rank(stacked, 0.0 * counts_K, 8) is None
    twins = stack([blocks[0]] * 3)
    assert best_of_rank(twins, twins.per_column([0.5, 0.3, 0.2]), RANK) is None  # nothing is lost: less than rounding shows
    opposite = stack([blocks[0], (blocks[0][0], -(1.0 + 1e-9) * blocks[0][1]), blocks[1]])
    assert best_of_rank(opposite, opposite.per_column([0.5, 0.5, 1e-9]), 99) is None
    broken = stack([(blocks[0][0], blocks[0][1] * math.inf)])
    assert best_of_rank(broken, broken.per_column([1.0]), 2) is None
    huge = stack([(blocks[0][0] * 1e160, blocks[0][1])])
    assert best_of_rank(huge, huge.per_column([1.0]), 2) is None


@pytest.mark.parametrize("faintest", [1e-2, 1e-4, 1e-6, 1e-8])
def test_faint_directions_are_exact_or_not_answered(faintest):
    """However the spectrum falls: what is answered is within 1e-12 of the best possible, and its error is told exactly."""
    generator = torch.Generator().manual_seed(1)
    left, right = torch.linalg.qr(normal(generator, OUT, 12)).Q, torch.linalg.qr(normal(generator, IN, 12)).Q
    values = torch.logspace(0, math.log10(faintest), 12, dtype=torch.float64)
    turn = normal(generator, 12, 12)  # an ill-conditioned way to write the factors
    stacked = stack([(torch.linalg.inv(turn) @ right.T, left * values @ turn), members("independent")[0]])
    counts_K = stacked.per_column([1.0, 1e-12])
    answered = 0
    for rank in range(1, 12):
        best = best_of_rank(stacked, counts_K, rank)
        if best is None:
            continue
        answered += 1
        dense = left * values @ right.T + 1e-12 * members("independent")[0][1] @ members("independent")[0][0]
        least = float((torch.linalg.svdvals(dense)[rank:] ** 2).sum())
        error = float((dense - best.b_OR @ best.a_RI).norm()) ** 2
        assert error == pytest.approx(least, rel=1e-5)
        assert best.lost == pytest.approx(error, rel=1e-5)
    assert answered >= {1e-2: 11, 1e-4: 9, 1e-6: 5, 1e-8: 4}[faintest]
    assert CLEAR * ROUNDING < 1e-8


def test_columns_of_zeros_and_negative_counts_are_no_columns():
    blocks = members("independent")[:2]
    pad = torch.nn.functional.pad
    padded = [(pad(a, (0, 0, 0, 3)), pad(b, (0, 3))) for a, b in blocks]
    plain, wide = stack(blocks), stack(padded)
    one = sum_cut_to_rank(plain, plain.per_column([0.7, -0.3]), 3)
    two = sum_cut_to_rank(stack(padded), wide.per_column([0.7, -0.3]), 3)
    for x, y in zip(one.factors, two.factors, strict=True):
        torch.testing.assert_close(x.abs(), y.abs())
    assert (one.available_rank, two.available_rank) == (2 * RANK, 2 * RANK)
