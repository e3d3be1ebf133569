"""Each method against its formula, written out on dense deltas."""

from __future__ import annotations

import math

import pytest
import torch

from chrysalis_ray.config.merges import (
    DareMerge,
    DellaMerge,
    EnsembleMerge,
    IsotropicMerge,
    ModelStockMerge,
    SlerpMerge,
    TallMerge,
    TaskArithmeticMerge,
    TiesMerge,
    TsvMerge,
    WudiMerge,
    make_merge,
)
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.merge import elementwise, row_fit
from chrysalis_ray.merge.elementwise import Block, RuledRows, changes_from, module_draw
from chrysalis_ray.merge.geometric_median import distances, geometric_median, robust_weights
from chrysalis_ray.merge.gram import cosines, gram_of_changes
from chrysalis_ray.merge.row_fit import fit_rows
from chrysalis_ray.merge.run import merge_modules
from chrysalis_ray.merge.slerp import spherical_counts
from chrysalis_ray.merge.table import BY_ENTRY

OUT, IN = 21, 17
WEIGHTS = [0.5, 0.2, 0.3]


def members(shared: bool, count: int = 3, rank: int = 2, rng_seed: int = 0):
    """Adapters of one module in fp64, of one A or each of its own."""
    generator = torch.Generator().manual_seed(rng_seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = normal(rank, IN)
    return [{"q": (common + 0.1 * normal(rank, IN) if shared else normal(rank, IN), normal(OUT, rank))} for _ in range(count)]


def deltas(adapters):
    return torch.stack([b @ a for adapter in adapters for a, b in adapter.values()])


def merged(config, adapters, given=None, rank=IN, anchor=None):
    result = merge_modules(config, adapters, [1.0] * len(adapters), anchor, 1.0, None, rank, given)
    (a_ri, b_or) = result.factors["q"]
    return b_or.double() @ a_ri.double(), result


def close(got, expected, tolerance=1e-6):
    assert float((got - expected).norm()) <= tolerance * float(expected.norm())


both_regimes = pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])


@both_regimes
def test_task_arithmetic_is_lambda_times_the_sum(shared):
    adapters = members(shared)
    close(merged(TaskArithmeticMerge(method="task_arithmetic", coefficient=0.4), adapters)[0], 0.4 * deltas(adapters).sum(0))


@both_regimes
def test_slerp_of_two_is_the_formula(shared):
    one, two = members(shared, count=2)
    two = {"q": (two["q"][0], two["q"][1] * float(deltas([one]).norm() / deltas([two]).norm()))}
    x, y = deltas([one, two])
    angle = math.acos(float((x * y).sum() / x.norm() / y.norm()))
    for t in (0.3, 0.5):
        expected = math.sin((1 - t) * angle) / math.sin(angle) * x + math.sin(t * angle) / math.sin(angle) * y
        close(merged(SlerpMerge(method="slerp"), [one, two], [1 - t, t])[0], expected)


@both_regimes
def test_slerp_of_a_pair_turns_them_as_long_as_they_are(shared):
    one, two = members(shared, count=2)
    x, y = deltas([one, two])
    angle = math.acos(float((x * y).sum() / x.norm() / y.norm()))
    pair = SlerpMerge(method="slerp", mean="pair")
    expected = (math.sin(0.7 * angle) * x + math.sin(0.3 * angle) * y) / math.sin(angle)
    close(merged(pair, [one, two], [0.7, 0.3])[0], expected)
    close(merged(pair, [two, one], [0.3, 0.7])[0], expected)
    close(merged(pair, [one, two], [1.0, 0.0])[0], x)
    close(merged(pair, [one, one], [0.2, 0.8])[0], x)
    half = {"q": (one["q"][0], -0.5 * one["q"][1])}
    for mean in ("pair", "chord"):  # opposite directions have no angle between them: what is left of their mean
        config = SlerpMerge(method="slerp", mean=mean)
        close(merged(config, [one, half], [0.5, 0.5])[0], 0.25 * x)
    with pytest.raises(MergeError, match="for two adapters"):
        merged(pair, members(shared, count=3), WEIGHTS)


@both_regimes
def test_the_karcher_mean_has_no_pull_left(shared):
    adapters = members(shared, count=4)
    given = [0.4, 0.3, 0.2, 0.1]
    got, _ = merged(SlerpMerge(method="slerp"), adapters, given)
    mean = got / got.norm()
    pull = torch.zeros_like(mean)
    for weight, delta in zip(given, deltas(adapters), strict=True):
        unit = delta / delta.norm()
        cosine = float((unit * mean).sum())
        pull += weight * math.acos(cosine) / math.sin(math.acos(cosine)) * (unit - cosine * mean)
    assert float(pull.norm()) < 1e-6
    length = sum(weight * float(delta.norm()) for weight, delta in zip(given, deltas(adapters), strict=True))
    assert float(got.norm()) == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("apart", [0.0, 1e-17, 1e-12, 1e-9, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("others", [[], [[0.3, 1.0, 0.2]]], ids=["two", "three"])
@pytest.mark.parametrize("shorter", [1.0, 0.7])
@pytest.mark.parametrize("share", [0.5, 0.6, 0.9])
def test_the_mean_on_the_sphere_of_what_is_nearly_opposite_is_as_long_as_any(apart, others, shorter, share):
    """Or zero, where they cancel. The way to a vector on the other side of the sphere is nowhere, not anywhere and far."""
    vectors = torch.tensor([[1.0, 0.0, 0.0], [-shorter, apart, apart], *others], dtype=torch.float64)
    weights = torch.tensor([share, 1.0 - share, *([0.2] * len(others))], dtype=torch.float64)
    weights /= weights.sum()
    counts = spherical_counts(SlerpMerge(method="slerp"), weights, vectors @ vectors.T)
    mean, length = counts @ vectors, float(weights @ vectors.norm(dim=1))
    assert not mean.any() or abs(float(mean.norm()) - length) <= 1e-6 * length
    if apart < 1e-5 and not others:
        torch.testing.assert_close(mean, vectors[0] * (length if share > 0.5 else 0.0), atol=1e-4, rtol=0)


@both_regimes
def test_model_stock_is_the_formula(shared):
    ((common_a, common_b),) = members(False, count=1, rng_seed=8)[0].values()
    adapters = [
        {"q": (torch.cat([a, common_a]), torch.cat([b, common_b], 1))} for m in members(shared, 4) for a, b in m.values()
    ]
    d = deltas(adapters)
    cosine = sum(float((d[i] * d[j]).sum() / d[i].norm() / d[j].norm()) for i in range(4) for j in range(i)) / 6
    assert 0.2 < cosine < 0.9
    close(merged(ModelStockMerge(method="model_stock"), adapters)[0], 4 * cosine / (1 + 3 * cosine) * d.mean(0))


@both_regimes
def test_tsv_without_a_floor_is_the_papers(shared):
    adapters = members(shared)
    lefts, sizes, rights = zip(*(torch.linalg.svd(delta, full_matrices=False) for delta in deltas(adapters)), strict=True)
    u, v = torch.cat([x[:, :2] for x in lefts], 1), torch.cat([x[:2].T for x in rights], 1)

    def orthogonal(x):
        p, _, q = torch.linalg.svd(x, full_matrices=False)
        return p @ q

    expected = orthogonal(u) * torch.cat([x[:2] for x in sizes]) @ orthogonal(v).T
    close(merged(TsvMerge(method="tsv", floor=1e-9), adapters)[0], expected)


def orthogonal_members(count=3, rank=2):
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(OUT, OUT, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(IN, IN, generator=generator, dtype=torch.float64)).Q
    sizes = torch.arange(1.0, count * rank + 1, dtype=torch.float64)
    own = [slice(n * rank, (n + 1) * rank) for n in range(count)]
    return [{"q": (right[:, one].T.contiguous(), left[:, one] * sizes[one])} for one in own], left, right, sizes


def test_of_orthogonal_members_tsv_is_the_sum_and_isotropic_the_papers():
    adapters, left, right, sizes = orthogonal_members()
    close(merged(TsvMerge(method="tsv"), adapters)[0], deltas(adapters).sum(0))
    close(merged(IsotropicMerge(method="isotropic"), adapters)[0], sizes.mean() / 3 * left[:, :6] @ right[:, :6].T)
    assert merged(ModelStockMerge(method="model_stock"), adapters)[0].norm() < 1e-6


@both_regimes
def test_wudi_is_where_its_objective_is_flat(shared):
    adapters = members(shared)
    d, weights = deltas(adapters), torch.tensor(WEIGHTS, dtype=torch.float64)
    h = d.transpose(1, 2) @ d / (d**2).sum((1, 2))[:, None, None]
    ridge = 0.3 * float(torch.linalg.matrix_norm(torch.einsum("n,nij->ij", weights, h), 2))
    got, _ = merged(WudiMerge(method="wudi", ridge=0.3), adapters, WEIGHTS)
    slope = torch.einsum("n,nij->ij", weights, (got - d) @ h) + ridge * (got - torch.einsum("n,nij->ij", weights, d))
    assert float(slope.norm()) < 1e-6 * ridge * float(d[0].norm())
    mean = torch.einsum("n,nij->ij", weights, d)
    close(merged(WudiMerge(method="wudi", ridge=1e6), adapters, WEIGHTS)[0], mean, tolerance=1e-5)
    orthogonal = orthogonal_members()[0]
    close(merged(WudiMerge(method="wudi", ridge=1e-9), orthogonal)[0], deltas(orthogonal).sum(0))


def test_a_solve_that_comes_out_too_long_is_refused():
    """Members of one A but for a thousandth: without a ridge, what differs is solved for as if it mattered."""
    (one,) = members(False, count=1)
    generator = torch.Generator().manual_seed(3)
    noise = [1e-3 * torch.randn(2, IN, generator=generator, dtype=torch.float64) for _ in range(3)]
    others = [torch.randn(OUT, 2, generator=generator, dtype=torch.float64) for _ in range(3)]
    cohort = [{"q": (one["q"][0] + extra, b_or)} for extra, b_or in zip(noise, others, strict=True)]
    with pytest.raises(MergeError, match=r"wudi.* of module q comes out .* times as long .*(?s:.*)larger ridge"):
        merged(WudiMerge(method="wudi", ridge=1e-9), cohort)
    longest = float(deltas(cohort).flatten(1).norm(dim=1).sum())
    assert float(merged(WudiMerge(method="wudi"), cohort)[0].norm()) < longest


def test_near_twins_count_once_in_tsv():
    (one,) = members(False, count=1)
    noise = 1e-4 * torch.randn(3, OUT, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    twins = [{"q": (one["q"][0], one["q"][1] + extra)} for extra in noise]
    close(merged(TsvMerge(method="tsv"), twins)[0], deltas([one])[0], tolerance=5e-3)


# rules on entries ---------------------------------------------------------------------------------------------------


def dense_ties(d, weights, density):
    kept = torch.zeros_like(d)
    for n in range(len(d)):
        places = d[n].abs().flatten().argsort(descending=True)[: int(density * d[n].numel())]
        kept[n].view(-1)[places] = d[n].reshape(-1)[places]
    weighted = torch.tensor(weights, dtype=torch.float64)[:, None, None] * kept
    agrees = (kept.sign() == weighted.sum(0).sign()) & (kept != 0)
    voters = (torch.tensor(weights, dtype=torch.float64)[:, None, None] * agrees).sum(0)
    return torch.where(voters > 0, (weighted * agrees).sum(0) / voters.clamp(min=1e-300), 0.0)


@both_regimes
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_dense_ties_is_the_papers_and_its_best_fit(shared, density):
    adapters = members(shared)
    expected = dense_ties(deltas(adapters), WEIGHTS, density)
    config = TiesMerge(method="ties", density=density, space="dense")
    got, result = merged(config, adapters, WEIGHTS)
    close(got, expected)
    assert result.residual < 1e-6
    cut, result = merged(config, adapters, WEIGHTS, rank=5)
    tail = torch.linalg.svdvals(expected)[5:]
    assert float((cut - expected).norm()) == pytest.approx(float(tail.norm()), rel=1e-5)
    assert result.residual == pytest.approx(float(tail.norm() / expected.norm()), rel=1e-5)


@both_regimes
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_in_the_space_of_knots_is_the_papers(shared, density):
    """[dW_1 | .. | dW_N] = U S [V_1^T | .. | V_N^T] of the dense deltas, TIES on the V_i^T, U S back in front."""
    adapters = members(shared)
    u, s, vt = torch.linalg.svd(torch.cat(list(deltas(adapters)), 1), full_matrices=False)
    parts = torch.stack((vt[:6]).split(IN, 1))
    expected = (u[:, :6] * s[:6]) @ dense_ties(parts, WEIGHTS, density)
    got, result = merged(TiesMerge(method="ties", density=density, space="knots"), adapters, WEIGHTS)
    close(got, expected)
    assert result.residual < 1e-6
    assert 0.0 < result.notes["length_to_mean"] < 10.0
    anchor = members(False, count=1, rng_seed=9)[0]
    around = [
        {"q": (torch.cat([a, anchor["q"][0]]), torch.cat([b, anchor["q"][1]], 1))} for m in adapters for a, b in m.values()
    ]
    config = TiesMerge(method="ties", density=density, space="knots")
    close(merged(config, around, WEIGHTS, anchor=anchor)[0], expected + deltas([anchor])[0])


@both_regimes
def test_dense_ties_around_a_seed_trims_the_changes_from_it(shared):
    anchor = members(False, count=1, rng_seed=9)[0]
    adapters = [
        {"q": (torch.cat([a, anchor["q"][0]]), torch.cat([b, anchor["q"][1]], 1))}
        for m in members(shared)
        for a, b in m.values()
    ]
    changes = deltas(adapters) - deltas([anchor])
    expected = deltas([anchor])[0] + dense_ties(changes, WEIGHTS, 0.4)
    close(merged(TiesMerge(method="ties", density=0.4, space="dense"), adapters, WEIGHTS, anchor=anchor)[0], expected)


def test_the_dense_consensus_mask_is_the_papers():
    adapters = members(True, count=4)
    d = deltas(adapters)
    for votes, threshold in ((1, 0.4), (2, 0.6), (3, 0.2)):
        needs = (d.abs() >= threshold * (d.sum(0) - d).abs()).sum(0) >= votes
        config = TallMerge(method="tall", votes=votes, threshold=threshold, space="dense", scale=4.0)
        close(merged(config, adapters)[0], d.sum(0) * needs)


@pytest.mark.parametrize("space", ["core", "dense"])
def test_dare_keeps_the_mean_in_expectation(space):
    adapters = members(False)
    mean = deltas(adapters).mean(0)
    draws = [
        merged(DareMerge(method="dare", density=0.5, space=space, rng_seed=rng_seed), adapters)[0] for rng_seed in range(60)
    ]
    assert not torch.equal(draws[0], draws[1])
    noise = float((torch.stack(draws).mean(0) - mean).norm() / mean.norm())
    assert noise < 3.0 * math.sqrt(1.0 / 60 * (1 / 0.5 - 1) * 3)  # 3 members: their squares sum to about 3 times the mean's x 3
    close(merged(DareMerge(method="dare", density=1.0, space=space), adapters)[0], mean)


def one_block(entries):
    draw = module_draw(0, "q")
    generators = [torch.Generator().manual_seed(draw + n) for n in range(len(entries))]
    return Block(
        entries, torch.full((len(entries),), 1 / len(entries), dtype=torch.float64), torch.zeros(len(entries)), generators
    )


def test_della_keeps_large_entries_more_often_and_divides_by_their_chance():
    row = torch.linspace(1.0, 2.0, 101, dtype=torch.float64)[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    entries = row.expand(1, 4000, 101)
    kept = BY_ENTRY["della"](DellaMerge(method="della", density=0.5, spread=0.3), one_block(entries))[:, :]
    chance = 0.2 + 0.6 * (row - 1.0)
    assert float(((kept != 0).double().mean(0) - chance).abs().max()) < 0.04
    where = kept != 0
    torch.testing.assert_close(kept[where], (row / chance).expand(4000, 101)[where])


def ruled(adapters, config):
    changes, anchor = changes_from([adapter["q"] for adapter in adapters], [1.0] * len(adapters), None, 1.0)
    weights_N = torch.tensor(WEIGHTS, dtype=torch.float64)
    return RuledRows(BY_ENTRY[config.method], config, weights_N, changes, anchor, deltas(adapters).flatten(1).norm(dim=1), 0)


def test_blocks_of_rows_are_the_whole():
    adapters = members(False, count=3)
    rows = ruled(adapters, TiesMerge(method="ties", density=0.3, space="dense"))
    rows.rows = 4
    parts = list(rows.blocks())
    assert [(part.start, part.stop) for part, _ in parts] == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 21)]
    torch.testing.assert_close(torch.cat([block for _, block in parts]), dense_ties(deltas(adapters), WEIGHTS, 0.3))


@pytest.mark.parametrize("method", sorted(BY_ENTRY))
@pytest.mark.parametrize("held", [0, row_fit.HELD_ENTRIES], ids=["made-for-every-pass", "held"])
def test_large_deltas_around_a_seed_are_ruled_in_fp32_by_every_rule(monkeypatch, method, held):
    monkeypatch.setattr(row_fit, "HELD_ENTRIES", held)
    adapters, seed = members(False), members(False, count=1, rng_seed=5)[0]
    config = make_merge({"method": method, "space": "dense"})
    exact, _ = merged(config, adapters, anchor=seed)
    monkeypatch.setattr(elementwise, "EXACT_ENTRIES", 0)
    got, _ = merged(config, adapters, anchor=seed)
    if hasattr(config, "rng_seed"):  # in fp32 other numbers are drawn
        assert float(got.norm()) < 3.0 * float(exact.norm())
    else:
        close(got, exact, tolerance=1e-4)


@both_regimes
@pytest.mark.parametrize("density", [0.05, 0.3, 0.99])
@pytest.mark.parametrize("bracket", [1e-4, 0.02], ids=["a-sample-that-misses", "a-sample-that-hits"])
def test_thresholds_of_large_deltas_are_exact(monkeypatch, shared, density, bracket):
    monkeypatch.setattr(elementwise, "EXACT_ENTRIES", 0)
    monkeypatch.setattr(elementwise, "SAMPLED", (7, 5))
    monkeypatch.setattr(elementwise, "BRACKET", bracket)
    adapters = members(shared, count=3)
    rows = ruled(adapters, TiesMerge(method="ties", density=density, space="dense"))
    rows.rows = 4
    assert rows.dtype == torch.float32
    kept = int(density * OUT * IN)
    for number, delta in enumerate(deltas(adapters)):
        kth = float(delta.abs().flatten().sort(descending=True).values[kept - 1])
        assert float(rows.thresholds_N[number]) == pytest.approx(kth, abs=1e-6 * float(delta.abs().max()))
        merged_entries = torch.cat(
            [part.abs().flatten() for part in (rows.changes[number][1] @ rows.changes[number][0]).split(4)]
        )
        assert int((merged_entries >= rows.thresholds_N[number] * (1 - 1e-6)).sum()) in (kept, kept + 1)
    still = RuledRows(
        BY_ENTRY["ties"], TiesMerge(method="ties", density=density, space="dense"), torch.ones(1, dtype=torch.float64),
        [(torch.zeros(1, IN), torch.ones(OUT, 1))], None, torch.zeros(1), 0,
    )  # fmt: skip
    assert float(still.thresholds_N) == 0.0


@both_regimes
@pytest.mark.parametrize("config", [
    TiesMerge(method="ties", density=0.3, space="dense"), TallMerge(method="tall", space="dense"),
], ids=["ties", "tall"])  # fmt: skip
def test_large_deltas_in_fp32_are_ruled_as_in_fp64(monkeypatch, shared, config):
    adapters = [
        {"q": (torch.randn(3, 60, generator=g, dtype=torch.float64), torch.randn(50, 3, generator=g, dtype=torch.float64))}
        for g in (torch.Generator().manual_seed(n + 10 * shared) for n in range(3))
    ]
    exact, exact_result = merged(config, adapters, WEIGHTS, rank=8)
    monkeypatch.setattr(elementwise, "EXACT_ENTRIES", 0)
    quick, result = merged(config, adapters, WEIGHTS, rank=8)
    close(quick, exact, tolerance=2e-5)
    assert result.residual == pytest.approx(exact_result.residual, rel=1e-5)
    rows = list(ruled(adapters, config).blocks())
    full = torch.cat([block for _, block in rows])
    assert full.dtype == torch.float32
    error = float((quick - full.double()).norm() / full.double().norm())
    assert result.residual == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("held", [0, 1 << 20], ids=["made-for-every-pass", "held"])
def test_the_fit_of_rows_is_near_the_best_and_tells_its_error(monkeypatch, held):
    monkeypatch.setattr(row_fit, "HELD_ENTRIES", held)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 200, generator=generator, dtype=torch.float64)
    matrix += (
        4 * torch.randn(300, 4, generator=generator, dtype=torch.float64) @ torch.randn(4, 200, generator=generator).double()
    )
    cut = fit_rows(lambda: iter([(slice(0, 120), matrix[:120]), (slice(120, 300), matrix[120:])]), 300, 200, 8)
    a_ri, b_or = cut.factors
    error = float((b_or.double() @ a_ri.double() - matrix).norm())
    assert math.sqrt(cut.lost) == pytest.approx(error, rel=1e-6)
    assert error < 1.01 * float(torch.linalg.svdvals(matrix)[8:].norm())
    assert cut.energy == pytest.approx(float((matrix**2).sum()))


@pytest.mark.parametrize("columns", ["even", "nearly-one-direction"])
def test_bases_are_orthonormal_however_they_are_made(columns):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 12, generator=generator, dtype=torch.float64)
    if columns == "nearly-one-direction":  # too few digits in the Gram matrix
        matrix = matrix[:, :1] + 1e-9 * matrix
    basis = row_fit._orthonormal(matrix)
    assert float((basis.T @ basis - torch.eye(12, dtype=torch.float64)).abs().max()) < 1e-13
    assert float((basis @ (basis.T @ matrix) - matrix).norm()) < 1e-12 * float(matrix.norm())


@pytest.mark.parametrize("entries", [0, 1 << 18], ids=["fp32", "fp64"])
def test_a_sparse_delta_keeps_all_that_it_has(monkeypatch, entries):
    """Most of its entries are exactly 0, and so is its threshold: members side by side with it are trimmed as ever."""
    monkeypatch.setattr(elementwise, "EXACT_ENTRIES", entries)
    adapters = members(False)
    adapters[1]["q"][1][2:] = 0.0
    got, _ = merged(TiesMerge(method="ties", density=0.2, space="dense"), adapters, WEIGHTS)
    close(got, dense_ties(deltas(adapters), WEIGHTS, 0.2), tolerance=1e-6 if entries else 1e-5)


def test_a_sample_has_as_many_long_rows_as_there_are():
    sizes = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).double()
    chosen = sizes[elementwise._evenly(sizes, 100)]
    assert torch.equal(chosen, torch.arange(5, 1000, 10).double())
    assert sorted(elementwise._evenly(sizes[:7], 100).tolist()) == list(range(7))


# weights ------------------------------------------------------------------------------------------------------------


@both_regimes
def test_the_gram_matrix_is_that_of_the_dense_changes(shared):
    adapters = members(shared, count=4)
    anchor = members(shared, count=1, rng_seed=5)[0]
    del adapters[2]["q"]
    adapters[2]["other"] = (torch.ones(1, 3), torch.ones(5, 1))
    changes = torch.stack([deltas([a])[0] if "q" in a else torch.zeros(OUT, IN).double() for a in adapters])
    changes = (torch.tensor([2.0, 1.0, 1.0, 0.5])[:, None, None] * changes - 3.0 * deltas([anchor])).flatten(1)
    extra = torch.zeros(4, 4, dtype=torch.float64)
    extra[2, 2] = 15.0
    gram = gram_of_changes(adapters, [2.0, 1.0, 1.0, 0.5], anchor, 3.0)
    torch.testing.assert_close(gram, changes @ changes.T + extra)
    assert torch.allclose(cosines(gram).diagonal(), torch.ones(4, dtype=torch.float64))


@both_regimes
def test_the_geometric_median_is_nearest_to_all(shared):
    d = deltas(members(shared, count=5)).flatten(1)
    gram = d @ d.T
    weights = geometric_median(gram)
    assert float(weights.sum()) == pytest.approx(1.0)
    least = float(distances(gram, weights).sum())
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = weights + 0.02 * torch.randn(5, generator=generator, dtype=torch.float64)
        assert float(distances(gram, other).sum()) > least


def test_a_gross_outlier_hardly_counts_and_robust_weights_hold_it_out():
    adapters = members(True, count=7)
    a_ri, b_or = adapters[3]["q"]
    adapters[3] = {"q": (a_ri, -1000.0 * b_or)}
    d = deltas(adapters).flatten(1)
    assert float(geometric_median(d @ d.T)[3]) < 2e-3
    weights, reasons = robust_weights(d @ d.T, None)
    assert weights[3] == 0.0
    assert list(reasons) == [3]
    assert "times as far" in reasons[3]
    _, result = merged(EnsembleMerge(method="ensemble", weights="robust"), adapters)
    assert result.notes["members"] == 6
    assert list(result.notes["held_out"]) == ["3"]


def test_a_loss_far_above_the_others_is_held_out_and_small_differences_are_not():
    d = deltas(members(False, count=5)).flatten(1)
    gram = d @ d.T
    weights, reasons = robust_weights(gram, [2.0, 2.05, 2.02, 4.0, 2.01])
    assert (float(weights[3]), list(reasons)) == (0.0, [3])
    assert "4.0000 is above" in reasons[3]
    assert robust_weights(gram, [2.0, 2.0, 2.0, 2.0, 2.01])[1] == {}
    assert robust_weights(gram, [1.0, 2.0, 3.0, 4.0, 5.0])[1] == {}


def test_given_weights_are_shares_or_refused():
    adapters = members(False)
    got, result = merged(EnsembleMerge(method="ensemble"), adapters, [5, 2, 3])
    assert result.weights == WEIGHTS
    close(got, torch.einsum("n,nij->ij", torch.tensor(WEIGHTS, dtype=torch.float64), deltas(adapters)))
    for wrong in ([1, 1], [0, 0, 0], [1, -1, 1], [1, math.nan, 1], [1, math.inf, 1]):
        with pytest.raises(MergeError):
            merged(EnsembleMerge(method="ensemble"), adapters, wrong)


def test_losses_that_nobody_measured_are_asked_for():
    with pytest.raises(MergeError, match="nothing has judged"):
        merged(EnsembleMerge(method="ensemble", weights="softmax"), members(False))


def test_exact_keeps_everything_in_the_smallest_rank_that_does():
    adapters = members(False)
    got, result = merged(EnsembleMerge(method="ensemble", rank="exact"), adapters)
    assert (result.rank, result.residual) == (6, 0.0)
    close(got, deltas(adapters).mean(0))
    same = [adapters[0], {"q": (adapters[0]["q"][0] * 2, adapters[0]["q"][1])}]
    assert merged(EnsembleMerge(method="ensemble", rank="exact"), same)[1].rank == 2


@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("rank", [4, "exact"])
def test_pairs_turned_by_rows_leave_alone_what_only_a_fresh_seed_has(along, rank):
    """A module of a seed that adds nothing there, and of none of the members: a delta of zero."""
    generator = torch.Generator().manual_seed(0)
    fresh = {"k": (torch.randn(2, IN, generator=generator), torch.zeros(OUT, 2))}
    config = SlerpMerge(method="slerp", mean="pair", along=along, rank=rank)
    result = merge_modules(config, members(False, count=2), [1.0, 1.0], fresh, 1.0, None, 4)
    assert not result.factors["k"][1].any()
    assert result.factors["q"][1].any()
