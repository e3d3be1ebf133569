"""Laws of a mix whose shares change by appending: the past stays, every epoch is whole, and the inverse finds every draw."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import Change, Epigenome
from chrysalis_ray.core.shares import BLOCK, Segment
from chrysalis_ray.genome.epigenome import appended
from chrysalis_ray.genome.mix import MixPlan, plan_of

DOMAINS = "abcd"
levels = st.one_of(st.just(0.0), st.floats(0.05, 5))
mixes = st.fixed_dictionaries(dict.fromkeys(DOMAINS, levels)).filter(lambda mix: any(mix.values()))


@st.composite
def plans(draw):
    rows = {domain: draw(st.integers(1, 300)) for domain in DOMAINS}
    starts = draw(st.lists(st.integers(1, 2 * BLOCK), unique=True, max_size=3).map(sorted))
    later = [Segment(start, draw(mixes)) for start in starts]
    return MixPlan(draw(mixes), rows, draw(st.integers(0, 99)), later, draw(st.sampled_from([1.0, 0.4, 0.01]))), rows, starts


@given(plans())
@settings(deadline=None, max_examples=30)
def test_every_epoch_holds_every_row_once_across_changes(made):
    plan, rows, _ = made
    seen: dict[tuple[str, int], list[int]] = {}
    for domain, epoch, row in plan.draw(0, 3 * BLOCK):
        seen.setdefault((domain, epoch), []).append(row)
    for domain in plan.domains:
        size = max(1, math.ceil(plan.kept * rows[domain]))
        epochs = sorted(epoch for name, epoch in seen if name == domain)
        assert epochs == list(range(len(epochs)))
        first = sorted(seen[domain, 0]) if len(epochs) > 1 else None
        for epoch in epochs:
            drawn = seen[domain, epoch]
            assert len(set(drawn)) == len(drawn) <= size
            assert max(drawn) < rows[domain]
            if epoch < epochs[-1]:  # the same rows in every epoch, whichever subset is kept
                assert sorted(drawn) == first
                assert len(drawn) == size


@given(plans(), st.integers(1, 2 * BLOCK), mixes)
@settings(deadline=None, max_examples=30)
def test_appending_leaves_the_past_and_gives_the_future_its_shares(made, after, shares):
    plan, rows, starts = made
    start = max([0, *starts]) + after
    segments = [Segment(s.start, dict(zip(plan.domains, s.counts.tolist(), strict=True))) for s in plan._segments]
    now = MixPlan(segments[0].shares, rows, plan.rng_seed, [*segments[1:], Segment(start, shares)], plan.kept)
    assert now.draw(0, start) == plan.draw(0, start)
    domain, _, _ = now.arrays(start, BLOCK)
    found = Counter(now.domains[index] for index in domain.tolist())
    total = sum(shares.values())
    for name in DOMAINS:
        assert abs(found[name] - shares[name] / total * BLOCK) < 1.0
    prefix = Counter(now.domains[index] for index in domain[:100].tolist())
    assert all(abs(prefix[name] - found[name] / BLOCK * 100) < 2.0 for name in DOMAINS)


@given(plans(), st.integers(0, 3 * BLOCK), st.integers(0, BLOCK), st.data())
@settings(deadline=None, max_examples=40)
def test_the_inverse_finds_every_draw_of_every_segment(made, start, length, data):
    plan, rows, _ = made
    domain = data.draw(st.sampled_from(DOMAINS))
    row = data.draw(st.integers(0, rows[domain] - 1))
    drawn = plan.draw(start, length)
    expected = [start + at for at, (name, _, number) in enumerate(drawn) if (name, number) == (domain, row)]
    assert plan.positions_of(domain, row, start, start + length) == expected


FAR = 10**9
ROWS = {"code": 70_001, "docs": 4096, "talk": 17}
SCHEDULED = (
    {"code": 0.5, "docs": 0.3, "talk": 0.2},
    ROWS,
    42,
    [Segment(1000, {"code": 1.0, "talk": 1.0}), Segment(FAR + 500, {"docs": 1.0, "code": 2.0})],
)


@pytest.mark.parametrize("start", [0, 900, FAR, FAR + 450])
def test_the_global_order_is_the_same_for_one_to_96_workers(start):
    """Each worker has a plan of its own and reads its own positions only."""
    steps, batch = 1, 96
    whole = MixPlan(*SCHEDULED).draw(start, steps * batch)
    for world in range(1, 97):
        plan = MixPlan(*SCHEDULED)
        joined: dict[int, tuple[str, int, int]] = {}
        for rank in range(world):
            for step in range(steps):
                for at in range(step * batch + rank, (step + 1) * batch, world):
                    joined[at] = plan.draw(start + at, 1)[0]
        assert [joined[at] for at in range(steps * batch)] == whole


def test_known_answer_of_a_schedule():
    """Pins the function: a change of it would silently change every resumed run that has stages or bred levels."""
    plan = MixPlan(*SCHEDULED)
    assert plan.draw(998, 4) + plan.draw(FAR + 498, 4) == [
        ("code", 0, 43302),
        ("docs", 0, 3361),
        ("code", 0, 57738),
        ("talk", 11, 1),
        ("code", 7142, 30409),
        ("talk", 29411761, 13),
        ("code", 7142, 44973),
        ("docs", 0, 1402),
    ]


def test_the_order_of_rows_is_fair_across_a_change_and_in_a_subset():
    """Chi-square of (row, place in its epoch): 13 rows, half the epochs before the change; 144 degrees of freedom."""
    plan = MixPlan({"a": 1.0}, {"a": 13, "b": 5}, 5, [Segment(13_007, {"a": 2.0, "b": 1.0})])
    domain, _, row = plan.arrays(0, 13_007 + 19_500)
    row = row[domain == 0]
    table = np.zeros((13, 13))
    np.add.at(table, (row, np.arange(len(row)) % 13), 1)
    expected = len(row) / 169
    assert 90 < ((table - expected) ** 2 / expected).sum() < 210
    held = Counter()  # which of 13 rows are kept when 4 are: alike over seeds; 12 degrees of freedom
    for rng_seed in range(600):
        held.update({r for _, _, r in MixPlan({"a": 1.0}, {"a": 13}, rng_seed, kept=4 / 13).draw(0, 4)})
    assert sum(held.values()) == 2400
    assert sum((held[r] - 2400 / 13) ** 2 / (2400 / 13) for r in range(13)) < 35


def test_domains_follow_their_shares_by_chi_square():
    """Shares over 200 blocks against what was asked for: exact but for rounding, far below chance."""
    shares = {"a": 0.123, "b": 0.456, "c": 0.421}
    domain, _, _ = MixPlan(shares, dict.fromkeys(shares, 50), 9).arrays(12_345, 200 * BLOCK)
    found = np.bincount(domain)
    expected = np.array([shares[name] for name in "abc"]) * len(domain)
    assert ((found - expected) ** 2 / expected).sum() < 3 * 200 * 200 / expected.min()


TOKENS = {"a": 320, "b": 1600, "c": 16_000}
SIZES = {"a": 20, "b": 100, "c": 1000}  # rows of 16 tokens


@given(
    st.fixed_dictionaries(dict.fromkeys("abc", st.floats(0.05, 9))),
    st.fixed_dictionaries({"a": st.floats(0.5, 6), "b": st.floats(0.5, 6)}),
    st.lists(st.tuples(st.integers(1, 899), st.fixed_dictionaries(dict.fromkeys("abc", st.floats(0.05, 9)))), max_size=3),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_no_domain_is_drawn_beyond_its_cap_whatever_is_staged_or_appended(express, caps, later, planned):
    changes = tuple(Change(row, levels) for row, levels in sorted(dict(later).items()))
    mix = Epigenome(express, caps=caps, budget_rows=900, row_tokens=16)
    mix = replace(mix, stages=changes) if planned else replace(mix, changes=changes)
    plan = plan_of(mix, TOKENS, SIZES, 3)
    found = Counter(domain for domain, _, _ in plan.draw(0, 900))
    for domain, epochs in caps.items():
        assert found[domain] <= epochs * SIZES[domain] + 2 * (len(changes) + 1)


def test_a_small_variant_repeats_as_often_as_the_large_run():
    """`kept` 1/16: a sixteenth of the rows, so that a sixteenth of the budget goes through them as often."""
    sizes, budget = {"a": 160, "b": 1600, "c": 16_000}, 8192
    tokens = {domain: 16 * rows for domain, rows in sizes.items()}
    express = {"a": 1.0, "b": 1.0, "c": 2.0}
    small = plan_of(Epigenome(express, kept=1 / 16), tokens, sizes, 1)
    large = plan_of(Epigenome(express), tokens, sizes, 1)
    for domain in "abc":
        last = [
            max(epoch + 1 for name, epoch, _ in plan.draw(0, rows) if name == domain)
            for plan, rows in ((small, budget), (large, 16 * budget))
        ]
        assert last[0] == last[1]
    assert len({row for name, _, row in small.draw(0, budget) if name == "b"}) == 100


def test_levels_appended_to_an_epigenome_become_a_segment():
    mix = Epigenome({"a": 1.0, "b": 1.0})
    later = appended(appended(mix, 40, {"a": 3.0}), 41, {"b": 0.0})
    assert plan_of(later, TOKENS, SIZES, 7).draw(0, 40) == plan_of(mix, TOKENS, SIZES, 7).draw(0, 40)
    assert {domain for domain, _, _ in plan_of(later, TOKENS, SIZES, 7).draw(41, 200)} == {"a"}
    assert plan_of(appended(mix, 0, {"b": 0.0}), TOKENS, SIZES, 7).domains == ("a",)


def test_segments_that_do_not_ascend():
    with pytest.raises(GenomeError, match=r"start at \[0, 9, 9\]"):
        MixPlan({"a": 1.0}, {"a": 5}, 0, [Segment(9, {"a": 1.0}), Segment(9, {"a": 1.0})])
