"""Laws of the mix: exact, exactly once, anywhere, for any shares."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import Epigenome
from chrysalis_ray.genome.mix import BLOCK, MixPlan, permutation, shares_of

levels = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
mixes = st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(levels, st.integers(0, 300)), min_size=1).filter(
    lambda mix: any(share > 0 and rows > 0 for share, rows in mix.values())
)


def plan_of(mix, rng_seed=0):
    return MixPlan({k: share for k, (share, _) in mix.items()}, {k: rows for k, (_, rows) in mix.items()}, rng_seed)


@given(mixes, st.integers(0, 2**32 - 1), st.integers(0, 10**9))
@settings(max_examples=40, deadline=None)
def test_any_block_holds_exact_shares_and_any_window_nearly(mix, rng_seed, start):
    plan = plan_of(mix, rng_seed)
    drawn = {k: v for k, v in mix.items() if v[0] > 0 and v[1] > 0}
    total = sum(share for share, _ in drawn.values())
    domain, _, _ = plan.arrays(start, BLOCK + 512)
    found = np.bincount(domain[:BLOCK], minlength=len(plan.domains))
    assert found.tolist() == plan.counts.tolist()
    assert set(plan.domains) <= set(drawn)
    for k, (share, _) in drawn.items():
        count = dict(zip(plan.domains, found.tolist(), strict=True)).get(k, 0)
        assert abs(count - share / total * BLOCK) < 1.0
    for index, count in enumerate(plan.counts.tolist()):
        seen = np.concatenate([[0], np.cumsum(domain == index)])
        for window in (8, 32, 100):
            held = seen[window:] - seen[:-window]
            assert np.abs(held - count / BLOCK * window).max() < 2.0


@given(mixes, st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_every_epoch_of_every_domain_holds_every_row_once(mix, rng_seed):
    plan = plan_of(mix, rng_seed)
    seen: dict[tuple[str, int], list[int]] = {}
    for domain, epoch, row in plan.draw(0, 2 * BLOCK + 77):
        seen.setdefault((domain, epoch), []).append(row)
    for (domain, epoch), rows in seen.items():
        assert len(set(rows)) == len(rows)
        assert max(rows) < mix[domain][1]
        if (domain, epoch + 1) in seen:
            assert len(rows) == mix[domain][1]
        assert epoch == 0 or (domain, epoch - 1) in seen


@given(mixes, st.integers(0, 10**10), st.lists(st.integers(0, 50), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_draws_of_parts_are_parts_of_the_draw(mix, start, parts):
    plan = plan_of(mix, 3)
    joined, at = [], start
    for part in parts:
        joined += plan.draw(at, part)
        at += part
    assert joined == plan_of(mix, 3).draw(start, sum(parts))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 4096, 34_527])
def test_permutations_are_permutations(size):
    one, two = permutation(size, "test", 1), permutation(size, "test", 2)
    assert sorted(one.tolist()) == list(range(size))
    if size > 16:
        assert one.tolist() != two.tolist()
        assert one.tolist() != list(range(size))


def test_the_order_of_rows_is_fair():
    """Chi-square of (row, place in epoch) over many epochs of a small domain: 144 degrees of freedom."""
    plan = MixPlan({"a": 1.0}, {"a": 13}, 5)
    _, _, row = plan.arrays(0, 13 * 2000)
    table = np.zeros((13, 13))
    np.add.at(table, (row, np.arange(len(row)) % 13), 1)
    statistic = ((table - 2000 / 13) ** 2 / (2000 / 13)).sum()
    assert 90 < statistic < 210


def test_another_seed_is_another_order_and_names_not_places_key_it():
    shares, rows = {"a": 1.0, "b": 2.0}, {"a": 50, "b": 70}
    first = MixPlan(shares, rows, 1).draw(0, 500)
    assert first == MixPlan(dict(reversed(shares.items())), {**rows, "c": 9}, 1).draw(0, 500)
    assert first == MixPlan({**shares, "c": 0.0}, {**rows, "c": 9}, 1).draw(0, 500)
    assert first != MixPlan(shares, rows, 2).draw(0, 500)


def test_known_answer():
    """Pins the function itself: a change of it would silently change every resumed run."""
    plan = MixPlan({"code": 0.5, "docs": 0.3, "talk": 0.2}, {"code": 100, "docs": 40, "talk": 7}, 42)
    assert plan.draw(10**9, 6) == [
        ("code", 5000000, 87), ("docs", 7501220, 27), ("code", 5000000, 52),
        ("talk", 28564453, 1), ("code", 5000000, 37), ("docs", 7501220, 26),
    ]  # fmt: skip


def test_silent_and_empty_domains_are_never_drawn():
    plan = MixPlan({"a": 1.0, "b": 0.0, "c": 5.0}, {"a": 3, "b": 10, "c": 0}, 0)
    assert {domain for domain, _, _ in plan.draw(0, 5000)} == {"a"}


@pytest.mark.parametrize(
    ("shares", "rows", "message"),
    [
        ({"a": 0.0}, {"a": 5}, "nothing to draw"),
        ({"a": 1.0}, {"a": 0}, "nothing to draw"),
        ({}, {}, "nothing to draw"),
        ({"a": -1.0}, {"a": 5}, "share -1.0"),
        ({"a": float("nan")}, {"a": 5}, "share nan"),
        ({"b": 1.0}, {"a": 5}, "'b' has a share but no rows"),
    ],
)
def test_shares_that_make_no_mix(shares, rows, message):
    with pytest.raises(GenomeError, match=message):
        MixPlan(shares, rows, 0)


def test_positions_below_zero_are_refused():
    with pytest.raises(ValueError, match="-1"):
        MixPlan({"a": 1.0}, {"a": 5}, 0).draw(-1, 3)


def test_shares_are_levels_times_prior():
    tokens = {"a": 100, "b": 300, "c": 0}
    assert shares_of(Epigenome({"a": 1, "b": 1, "c": 1}), tokens) == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert shares_of(Epigenome({"a": 1, "b": 1}, "size"), tokens) == {"a": 0.25, "b": 0.75, "c": 0.0}
    assert shares_of(Epigenome({"a": 3, "b": 1}, "size"), tokens) == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert shares_of(Epigenome({"b": 0.1}), tokens) == {"a": 0.0, "b": 1.0, "c": 0.0}


@pytest.mark.parametrize(
    ("epigenome", "message"),
    [
        (Epigenome({"cod": 1.0}), "did you mean 'code'"),
        (Epigenome({"code": 0.0}), "expresses nothing"),
        (Epigenome({"void": 1.0}), "expresses nothing"),
        (Epigenome({"code": -1.0}), "level -1.0"),
        (Epigenome({"code": float("inf")}), "level inf"),
        (Epigenome({"code": 1.0}, "sizes"), "unknown prior 'sizes'"),
    ],
)
def test_epigenomes_that_express_nothing_sensible(epigenome, message):
    with pytest.raises(GenomeError, match=message):
        shares_of(epigenome, {"code": 10, "void": 0})


def test_mix_needs_neither_torch_nor_ray_nor_arrow():
    program = (
        "import sys, chrysalis_ray.genome.mix;"
        "print(sorted({'torch', 'ray', 'pyarrow', 'datasets', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout.strip() == "[]"


def test_a_domain_of_one_row_counts_its_epochs():
    drawn = MixPlan({"a": 1.0, "b": 1.0}, {"a": 1, "b": 2}, 0).draw(0, 400)
    assert [epoch for domain, epoch, _ in drawn if domain == "a"] == list(range(200))
    assert Counter(row for domain, _, row in drawn if domain == "b") == {0: 100, 1: 100}
