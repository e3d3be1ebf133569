"""The audit: its numbers on cohorts whose geometry is known, and the sentences that follow from them."""

from __future__ import annotations

import math

import pytest
import torch

from chrysalis_ray.merge.audit import effective_rank, findings, look_at, unanimous_by_chance

NAMES = ["one", "two", "three", "four"]


def cohort(drift: float, common: float = 0.0, count: int = 4, rank: int = 4, rng_seed: int = 0):
    """Members with A = A_0 + drift x noise (drift 0: the same A) and B with a common part."""
    generator = torch.Generator().manual_seed(rng_seed)
    shared_a, shared_b = torch.randn(rank, 90, generator=generator), torch.randn(70, rank, generator=generator)
    return [
        {"q": (shared_a + drift * torch.randn(rank, 90, generator=generator),
               common * shared_b + torch.randn(70, rank, generator=generator))}
        for _ in range(count)
    ]  # fmt: skip


def audit(members, anchor=None, anchored=False):
    looked = look_at(members, [1.0] * len(members), anchor, 1.0)
    return looked, findings(looked, NAMES[: len(members)], anchored)


def test_members_of_one_a_are_one_cohort():
    looked, told = audit(cohort(drift=0.0, common=2.0))
    assert looked.principal_cosine == pytest.approx(1.0)
    assert told[0].startswith("one cohort")
    assert looked.kept > 0.99
    assert looked.agreement["sign_agreement_energy"] > 1.5 * unanimous_by_chance(4)
    assert "coins" not in told[1]
    assert not any("outlier" in sentence or "look alike" in sentence for sentence in told)


def test_almost_one_a_is_ill_conditioned_and_it_is_said():
    looked, told = audit(cohort(drift=1e-3, common=1.0))
    assert looked.condition > 1e4
    assert "RegMean, WUDI" in told[0]


def test_independent_members_are_told_apart():
    looked, told = audit(cohort(drift=100.0))
    assert looked.principal_cosine < 0.4
    assert told[0].startswith("separate adapters")
    assert "hardly more agreement than coins have" in told[1]
    assert looked.agreement["sign_agreement_energy"] == pytest.approx(unanimous_by_chance(4), rel=0.1)
    assert any("--rank exact" in sentence for sentence in told)
    assert looked.kept < 0.6


def test_effective_rank_counts_directions():
    spectra = torch.tensor([[1.0, 1.0, 1.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    assert effective_rank(spectra).tolist() == pytest.approx([3.0, 1.0, 0.0])
    looked, _ = audit(cohort(drift=0.0))
    assert all(2.5 < value <= 4.0 for value in looked.effective_ranks)


def test_outliers_twins_idlers_giants_and_gaps_are_named():
    members = cohort(drift=0.0, common=2.0)
    members[2] = {"q": (members[2]["q"][0], -40.0 * members[2]["q"][1])}
    told = audit(members)[1]
    assert any(sentence.startswith("outlier: three") for sentence in told)
    assert any("(three) is" in sentence and "times as long" in sentence for sentence in told)
    twins = cohort(drift=0.0)
    twins[3] = {"q": (2.0 * twins[1]["q"][0], 0.5 * twins[1]["q"][1])}
    assert any(sentence.startswith("two and four are the same change") for sentence in audit(twins)[1])
    idle = cohort(drift=0.0)
    idle[0] = {"q": (idle[0]["q"][0], 0.0 * idle[0]["q"][1])}
    idle[1]["k"] = (torch.ones(1, 5), torch.ones(5, 1))
    told = audit(idle)[1]
    assert any(sentence.startswith("one did not change") for sentence in told)
    assert "three lacks 1 of 2 modules; they count as zero" in told


def test_without_its_seed_a_branched_cohort_is_suspected():
    (seed,) = cohort(drift=0.0, count=1, rng_seed=5)
    seed = {"q": (seed["q"][0], 90.0 * seed["q"][1])}
    members = [
        {"q": (torch.cat([seed["q"][0], m["q"][0]]), torch.cat([seed["q"][1], m["q"][1]], 1))} for m in cohort(drift=9.0)
    ]
    assert any("--seed-adapter" in sentence for sentence in audit(members)[1])
    looked, told = audit(members, seed, anchored=True)
    assert not any("--seed-adapter" in sentence for sentence in told)
    norms = [float((m["q"][1] @ m["q"][0]).norm()) for m in cohort(drift=9.0)]
    assert looked.gram_NN.diagonal().sqrt().tolist() == pytest.approx(norms, rel=1e-4)


def test_one_adapter_and_none_that_moved():
    assert audit(cohort(drift=0.0, count=1))[1] == ["one adapter: every merge returns it as it is"]
    (seed,) = cohort(drift=0.0, count=1)
    looked, told = audit([seed, seed], seed, anchored=True)
    assert "nothing changed from the seed: there is nothing to merge" in told
    assert math.isfinite(looked.condition)
