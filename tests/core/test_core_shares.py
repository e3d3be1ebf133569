"""Laws of shares: priors, replay, floors, caps, rounding and schedules, each against its definition."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import Change, Epigenome, canonical_json, sha256_of
from chrysalis_ray.core.shares import (
    BLOCK,
    bounded,
    check_bounds,
    in_block,
    levels_at,
    mean_shares,
    parse_prior,
    prior_weights,
    schedule,
    shares_of,
    unimax,
)

DOMAINS = "abcde"
TOKENS = {"a": 100, "b": 2000, "c": 700, "d": 30_000, "e": 6000}
sizes = st.dictionaries(st.sampled_from(DOMAINS), st.integers(1, 10**6), min_size=1)
levels = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
express = st.fixed_dictionaries(dict.fromkeys(DOMAINS, levels)).filter(lambda levels: any(levels.values()))
priors = st.one_of(
    st.sampled_from(["uniform", "size"]),
    st.floats(0.3, 20).map(lambda t: f"temperature({t:.4g})"),
    st.floats(0.1, 20).map(lambda n: f"unimax({n:.4g})"),
)


def ratios(weights):
    total = sum(weights.values())
    return {domain: weight / total for domain, weight in weights.items()}


# priors -------------------------------------------------------------------------------------------------------------


@given(sizes, st.floats(0.2, 50), st.floats(0.2, 50))
def test_a_temperature_lies_between_size_and_uniform(tokens, one, other):
    cool, warm = (ratios(prior_weights(f"temperature({t!r})", tokens, 0)) for t in sorted((one, other)))
    assert ratios(prior_weights("temperature(1)", tokens, 0)) == pytest.approx(ratios(prior_weights("size", tokens, 0)))
    assert ratios(prior_weights("temperature(1e12)", tokens, 0)) == pytest.approx(ratios(prior_weights("uniform", tokens, 0)))
    biggest, smallest = max(tokens, key=tokens.__getitem__), min(tokens, key=tokens.__getitem__)
    assert warm[biggest] <= cool[biggest] * (1 + 1e-9)  # warmer is flatter
    assert warm[smallest] >= cool[smallest] * (1 - 1e-9)


def test_a_silent_domain_on_its_floor_has_no_room_for_what_caps_refuse_others():
    """It gets its floor and no more: all caps together were passed 16 times, and it was said to fit."""
    tokens = {"a": 900, "c": 1400}
    mix = Epigenome({"c": 1.0}, floors={"a": 0.05}, caps={"c": 1.0}, budget_rows=9000, row_tokens=16)
    assert shares_of(mix, tokens)["c"] > 16 * schedule(mix, tokens)[0].most["c"]
    with pytest.raises(GenomeError, match=r"the caps allow 0\.05972 of the rows"):
        check_bounds(mix, tokens, "v000")


@pytest.mark.parametrize("temperature", ["0.001", "1e-320", "1e300"])
def test_shares_of_any_temperature_are_numbers(temperature):
    shares = shares_of(Epigenome(dict.fromkeys("ad", 1.0), f"temperature({temperature})"), TOKENS)
    assert math.fsum(shares.values()) == pytest.approx(1.0)
    assert shares["d"] == pytest.approx(0.5 if temperature == "1e300" else 1.0)


def test_a_level_that_no_sum_can_hold_is_refused():
    with pytest.raises(GenomeError, match=r"'d' at level 1e\+308"):
        shares_of(Epigenome({"a": 1.0, "d": 1e308}, "size"), TOKENS)


@given(sizes, st.floats(0.05, 30), st.floats(1, 1e7))
def test_unimax_gives_equal_tokens_as_far_as_epochs_reach(tokens, epochs, budget):
    given_ = unimax(tokens, epochs, budget)
    assert sum(given_.values()) == pytest.approx(min(budget, epochs * sum(tokens.values())))
    assert all(given_[domain] <= epochs * size * (1 + 1e-12) for domain, size in tokens.items())
    highest = max(given_.values())
    for domain, size in tokens.items():  # who gets less than the most stands at its cap
        assert given_[domain] >= highest * (1 - 1e-9) or given_[domain] == pytest.approx(epochs * size)


def test_unimax_by_hand():
    """300 tokens for domains of 10, 60 and 1000, two epochs at the most: 20, then 120 of 140, then the 160 that are left."""
    assert unimax({"x": 60, "s": 10, "l": 1000, "none": 0}, 2, 300) == {"x": 120, "s": 20, "l": 160, "none": 0}


@pytest.mark.parametrize(
    "prior", ["sizes", "temperature", "temperature()", "temperature(0)", "unimax(-1)", "unimax(nan)", "Size"]
)
def test_priors_that_are_none(prior):
    with pytest.raises(GenomeError, match="unknown prior"):
        parse_prior(prior)


# floors and caps ----------------------------------------------------------------------------------------------------

shares = st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 1.0)), min_size=1, max_size=6).filter(any)


@st.composite
def boxes(draw):
    """Asked shares with floors that sum to less than 1 and caps that sum to more, where something was asked for."""
    raw = draw(shares)
    asked = {f"d{k}": share / sum(raw) for k, share in enumerate(raw)}
    least = {d: draw(st.floats(0, 0.9 / len(asked))) for d in asked if draw(st.booleans())}
    most = {d: draw(st.floats(least.get(d, 0.0), 1.0)) for d in asked if draw(st.booleans())}
    assume(sum(most.get(d, 1.0) for d in asked if asked[d] > 0) + sum(f for d, f in least.items() if not asked[d]) > 1.001)
    return asked, least, most


@given(boxes(), st.data())
@settings(max_examples=150)
def test_bounded_shares_keep_both_bounds_and_are_the_nearest_that_do(box, data):
    asked, least, most = box
    found = bounded(asked, least, most)
    assert sum(found.values()) == pytest.approx(1.0)
    for domain, share in found.items():
        assert least.get(domain, 0.0) - 1e-9 <= share <= most.get(domain, 1.0) + 1e-9
        assert share == 0.0 or asked[domain] > 0.0 or share == pytest.approx(least[domain])
    assert bounded(found, least, most) == pytest.approx(found)
    heard = [domain for domain in asked if asked[domain] > 0.0]

    def divergence(s):
        return sum(s[d] * math.log(s[d] / asked[d]) for d in heard if s[d] > 0)

    if len(heard) > 1:  # moving a little from one to another, as far as the bounds allow, never comes nearer
        one, other = data.draw(st.sampled_from(heard)), data.draw(st.sampled_from(heard))
        step = min(found[one] - least.get(one, 0.0), most.get(other, 1.0) - found[other]) * data.draw(st.floats(0, 1))
        if step > 0 and one != other:
            moved = found | {one: found[one] - step, other: found[other] + step}
            assert divergence(moved) >= divergence(found) - 1e-9


def test_bounded_by_hand():
    asked = {"a": 0.7, "b": 0.2, "c": 0.1}
    assert bounded(asked, {}, {}) == asked
    assert bounded(asked, {"c": 0.1}, {"a": 0.7}) == asked  # bounds that it keeps already
    assert bounded(asked, {}, {"a": 0.4}) == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2})
    assert bounded(asked, {"c": 0.55}, {}) == pytest.approx({"a": 0.35, "b": 0.1, "c": 0.55})
    assert bounded({"a": 1.0, "b": 0.0}, {"b": 0.2}, {}) == pytest.approx({"a": 0.8, "b": 0.2})  # lifts what is silent
    assert bounded(asked, {}, {"a": 0.1, "b": 0.1, "c": 0.3}) == pytest.approx({"a": 0.2, "b": 0.2, "c": 0.6})  # no room


@given(st.dictionaries(st.sampled_from(DOMAINS), levels, min_size=1).filter(lambda m: any(m.values())), st.data())
def test_a_block_is_whole_draws_near_the_shares_and_below_the_caps(weights, data):
    wanted = ratios(weights)
    most = {d: data.draw(st.floats(wanted[d], 1.0)) for d in wanted if data.draw(st.booleans())}
    counts = in_block(wanted, most)
    assert sum(counts.values()) == BLOCK
    assert all(wanted[domain] > 0 for domain in counts)
    if set(counts) - set(most):  # some domain without a cap can take what the others must not
        assert all(counts[d] <= most[d] * BLOCK + 1e-6 for d in counts if d in most)
    assert all(abs(counts[d] - wanted[d] * BLOCK) < len(counts) for d in counts)


# epigenomes ---------------------------------------------------------------------------------------------------------


@st.composite
def epigenomes(draw):
    rows = draw(st.integers(50, 4000))
    marks = st.lists(st.integers(1, rows - 1), unique=True, max_size=3).map(sorted)
    changes = st.dictionaries(st.sampled_from(DOMAINS), st.floats(0.1, 9.0), min_size=1)
    return Epigenome(
        express=draw(express),
        prior=draw(priors),
        floors=draw(st.dictionaries(st.sampled_from(DOMAINS), st.floats(0.01, 0.15), max_size=3)),
        replay_share=draw(st.sampled_from([0.0, 0.3])),
        replay=dict.fromkeys(DOMAINS, 1.0),
        kept=draw(st.sampled_from([1.0, 0.25])),
        budget_rows=rows,
        row_tokens=16,
        stages=tuple(Change(row, draw(changes)) for row in draw(marks)),
        changes=tuple(Change(row, draw(changes)) for row in draw(marks)),
    )


@given(epigenomes())
@settings(max_examples=60)
def test_every_segment_is_shares_within_floors_and_survives_a_file(mix):
    segments = schedule(mix, TOKENS)
    for segment in segments:
        assert sum(segment.shares.values()) == pytest.approx(1.0)
        assert all(segment.shares[d] >= floor - 1e-9 for d, floor in mix.floors.items())
    assert [segment.start for segment in segments] == sorted({0, *(c.row for c in (*mix.stages, *mix.changes))})
    again = Epigenome.from_json(mix.to_json())
    assert again == mix
    assert canonical_json(again.to_json()) == canonical_json(mix.to_json())
    assert mean_shares(segments, segments[-1].start or 1) == pytest.approx(
        {
            d: sum(
                one.shares[d] * (stop - one.start)
                for one, stop in zip(segments, [s.start for s in segments[1:]] or [1], strict=False)
            )
            / (segments[-1].start or 1)
            for d in TOKENS
        }
    )


@given(epigenomes(), st.integers(1, 3999), st.dictionaries(st.sampled_from(DOMAINS), st.floats(0.1, 9.0), min_size=1))
@settings(max_examples=60)
def test_what_is_appended_leaves_the_shares_before_it(mix, row, changed):
    capped = Epigenome(**{**vars(mix), "caps": {"a": 3.0, "b": 1.0}, "changes": ()})
    for before in (mix, capped):
        past = tuple(change for change in before.changes if change.row < row)
        old = Epigenome(**{**vars(before), "changes": past})
        new = Epigenome(**{**vars(before), "changes": (*past, Change(row, changed))})
        assert [s for s in schedule(old, TOKENS) if s.start < row] == [s for s in schedule(new, TOKENS) if s.start < row]


def test_replay_is_a_part_of_all_rows():
    mix = Epigenome({"a": 1.0}, replay_share=0.5, replay={"a": 1.0, "b": 3.0})
    assert shares_of(mix, {"a": 5, "b": 5, "c": 5}) == {"a": 0.625, "b": 0.375, "c": 0.0}


def test_stages_change_what_they_name_and_changes_come_after_them():
    mix = Epigenome(
        {"a": 1.0, "b": 1.0}, stages=(Change(10, {"a": 3.0}),), changes=(Change(10, {"a": 7.0}), Change(20, {"b": 0.0}))
    )
    assert levels_at(mix, 9) == {"a": 1.0, "b": 1.0}
    assert levels_at(mix, 10) == {"a": 7.0, "b": 1.0}
    assert levels_at(mix, 20) == {"a": 7.0, "b": 0.0}
    starts = [(s.start, dict(s.shares)) for s in schedule(mix, {"a": 5, "b": 5})]
    assert starts == [(0, {"a": 0.5, "b": 0.5}), (10, {"a": 7 / 8, "b": 1 / 8}), (20, {"a": 1.0, "b": 0.0})]


def test_a_mix_without_the_new_keys_is_what_it_was():
    """Records, their hash, and shares of before there were other keys."""
    mix = Epigenome({"b": 1.5, "a": 0.5}, "size")
    assert mix.to_json() == {"express": {"b": 1.5, "a": 0.5}, "prior": "size"}
    assert sha256_of(mix.to_json()) == "7f3a244062316961c3692871a86ab98780d19dae7481a05614a9cd2979c489e5"
    assert shares_of(mix, {"a": 300, "b": 100, "c": 9}) == {"a": 0.5, "b": 0.5, "c": 0.0}


def test_a_genome_that_is_too_small_for_the_caps_is_told_before_training():
    tokens = {"a": 100, "b": 100}
    mix = Epigenome({"a": 1.0, "b": 1.0}, caps={"a": 1.0, "b": 2.0}, budget_rows=50, row_tokens=16)
    with pytest.raises(GenomeError, match=r"v0: the caps allow 0\.375 of the rows from row 0 on"):
        check_bounds(mix, tokens, "v0")
    mix = Epigenome({"a": 1.0, "b": 1.0}, caps={"a": 1.0}, floors={"a": 0.5}, budget_rows=50, row_tokens=16)
    with pytest.raises(GenomeError, match=r"the floor of 'a' is 0\.5 of the rows, but its cap of 1 epochs is 0\.125"):
        check_bounds(mix, tokens, "v0")
    check_bounds(Epigenome({"a": 1.0, "b": 1.0}, caps={"a": 1.0}, budget_rows=50, row_tokens=16), tokens, "v0")
    with pytest.raises(GenomeError, match="count epochs of a budget"):
        shares_of(Epigenome({"a": 1.0}, "unimax(2)"), tokens)
