"""Rules that keep another share of every member's entries."""

from __future__ import annotations

import pytest
import torch

from chrysalis_ray.config.merges import DareMerge, TiesMerge, make_merge
from chrysalis_ray.core.errors import ConfigError, MergeError
from chrysalis_ray.merge import elementwise
from chrysalis_ray.merge.per_layer import check_names, merge_adapters

OUT, IN = 21, 17
NAMES = ["alice", "bob", "carol"]


def members():
    generator = torch.Generator().manual_seed(0)
    return [
        {"q": (torch.randn(2, IN, generator=generator).double(), torch.randn(OUT, 2, generator=generator).double())}
        for _ in NAMES
    ]


def deltas(adapters):
    return [b @ a for adapter in adapters for a, b in adapter.values()]


def merged(config, adapters, names=NAMES, given=None):
    result = merge_adapters(config, names, adapters, [1.0] * len(adapters), None, 1.0, None, IN, given)
    a_ri, b_or = result.factors["q"]
    return b_or.double() @ a_ri.double()


@pytest.mark.parametrize("entries", [elementwise.EXACT_ENTRIES, 0], ids=["fp64", "fp32"])
def test_ties_trims_every_member_by_its_own_density(monkeypatch, entries):
    """By name, and by number; who is not named has the density of all."""
    monkeypatch.setattr(elementwise, "EXACT_ENTRIES", entries)
    kept = []
    for delta, density in zip(deltas(members()), (0.1, 0.8, 0.4), strict=True):
        threshold = delta.abs().flatten().sort(descending=True).values[int(density * delta.numel()) - 1]
        kept.append(torch.where(delta.abs() >= threshold, delta, 0.0))
    stacked = torch.stack(kept)
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    expected = (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    for densities in ({"alice": 0.1, "bob": 0.8}, {"0": 0.1, "bob": 0.8, "carol": 0.4}):
        got = merged(TiesMerge(method="ties", density=0.4, space="dense", densities=densities), members())
        assert float((got - expected).norm()) <= (1e-6 if entries else 1e-5) * float(expected.norm())


def test_dare_draws_from_every_member_by_its_own_density():
    one, two, _ = deltas(members())
    config = DareMerge(method="dare", density=0.25, space="dense", densities={"alice": 1.0})
    drawn = 2.0 * merged(config, members()[:2], NAMES[:2]) - one  # bob's part: entries times 4, or nothing
    kept = drawn.abs() > 1e-4
    torch.testing.assert_close(drawn, torch.where(kept, 4.0 * two, 0.0), atol=1e-4, rtol=0)
    assert 0.15 < float(kept.double().mean()) < 0.35


def test_who_does_not_count_takes_his_density_with_him():
    config = TiesMerge(method="ties", density=0.4, space="dense", densities={"alice": 0.1, "bob": 0.8})
    with_nobody = merged(config, members(), given=[0.0, 1.0, 1.0])
    assert torch.equal(with_nobody, merged(config, members()[1:], NAMES[1:]))


def test_densities_of_strangers_or_out_of_reach_are_refused():
    with pytest.raises(MergeError, match="densities name 'dave', which is none of the 3"):
        check_names(TiesMerge(method="ties", densities={"dave": 0.1}), NAMES)
    check_names(TiesMerge(method="ties", densities={"2": 0.1, "bob": 0.3}), NAMES)
    with pytest.raises(ConfigError, match="densities"):
        make_merge({"method": "ties", "densities": {"0": 1.5}})
