"""`sce` against its formula on dense deltas, and what it promises beside the laws of every method."""

from __future__ import annotations

import pytest
import torch

from chrysalis_ray.config.merges import SceMerge
from chrysalis_ray.merge import elementwise
from chrysalis_ray.merge.run import merge_modules
from chrysalis_ray.merge.sce import largest_at

OUT, IN = 21, 17
WEIGHTS = [0.5, 0.2, 0.3]
both_regimes = pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])


def members(shared, count=3, rank=2):
    generator = torch.Generator().manual_seed(int(shared))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = normal(rank, IN)
    return [{"q": (common + 0.1 * normal(rank, IN) if shared else normal(rank, IN), normal(OUT, rank))} for _ in range(count)]


def deltas(adapters):
    return torch.stack([b @ a for adapter in adapters for a, b in adapter.values()])


def merged(config, adapters, given=None):
    result = merge_modules(config, adapters, [1.0] * len(adapters), None, 1.0, None, IN, given)
    a_ri, b_or = result.factors["q"]
    return b_or.double() @ a_ri.double()


def formula(d, weights, density):
    w = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    variance = (w * (d - (w * d).sum(0)) ** 2).sum(0)
    if density < 1.0:
        d = d * (variance >= variance.flatten().sort(descending=True).values[int(density * variance.numel()) - 1])
    counts = w * d.square().sum((1, 2), keepdim=True)
    agrees = (d.sign() == (w * d).sum(0).sign()) & (d != 0)
    return (counts * d * agrees).sum(0) / (counts * agrees).sum(0).clamp(min=1e-300)


def close(got, expected, tolerance=1e-6):
    assert float((got - expected).norm()) <= tolerance * float(expected.norm())


@both_regimes
@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("entries", [elementwise.EXACT_ENTRIES, 0], ids=["fp64", "fp32 in blocks"])
def test_dense_sce_is_the_formula(monkeypatch, shared, density, entries):
    monkeypatch.setattr(elementwise, "EXACT_ENTRIES", entries)
    monkeypatch.setattr(elementwise, "BLOCK_ENTRIES", 4 * IN * 3)
    adapters = members(shared)
    got = merged(SceMerge(method="sce", density=density, space="dense"), adapters, WEIGHTS)
    close(got, formula(deltas(adapters), WEIGHTS, density), tolerance=1e-6 if entries else 1e-5)


@both_regimes
def test_a_member_of_twice_the_weight_counts_like_two(shared):
    """On dense entries; the basis of the core is made of all members alike, whatever they weigh."""
    one, two = members(shared, count=2)
    config = SceMerge(method="sce", density=0.5, space="dense")
    close(merged(config, [one, two], [2.0, 1.0]), merged(config, [one, one, two]))


def test_what_all_agree_on_is_selected_at_density_one_alone():
    """The law that this rule cannot have: below 1, members that hardly differ do not come out near each other."""
    (one,) = members(False, count=1)
    a_ri, b_or = one["q"]
    near = {"q": (a_ri, b_or + 1e-4 * torch.randn(b_or.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))}
    close(merged(SceMerge(method="sce", space="dense"), [one, near]), deltas([one])[0], tolerance=1e-3)
    selected = merged(SceMerge(method="sce", density=0.3, space="dense"), [one, near])
    assert float(selected.norm()) < 0.9 * float(deltas([one])[0].norm())
    close(merged(SceMerge(method="sce", density=0.3, space="dense"), [one, one]), deltas([one])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1e-9, 0.01, 0.37, 0.999, 1.0])
def test_the_value_at_a_density_is_exact_whatever_lies_around_it(dtype, density):
    """Zeros count for nothing, equal values are one value, and sizes may differ by any power of ten."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(3000, generator=generator, dtype=dtype) * 10.0 ** torch.randint(-18, 9, (3000,), generator=generator)
    values = torch.cat([spread, torch.full((500,), 0.25, dtype=dtype), torch.zeros(700, dtype=dtype)])
    values = values[torch.randperm(len(values), generator=generator)].to(dtype)
    kept = max(1, int(density * int(values.count_nonzero())))
    expected = float(values.sort(descending=True).values[kept - 1])
    assert largest_at(density, lambda: iter(values.split(333))) == expected
    assert largest_at(density, lambda: iter([torch.zeros(9, dtype=dtype)])) == 0.0
