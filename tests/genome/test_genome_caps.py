"""Caps, floors and small shares of a mix that knows its rows: exact, whatever is staged or appended; and mixes of before."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chrysalis_ray.core.apportioned import rows_of_epochs
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import Change, Epigenome
from chrysalis_ray.core.shares import check_bounds, held_rows, schedule, shares_of, unheard
from chrysalis_ray.genome.epigenome import appended
from chrysalis_ray.genome.mix import MixPlan, plan_of

TOKENS = {"a": 320, "b": 1600, "c": 16_000}
ROWS = {"a": 27, "b": 100, "c": 1003}  # rows of 16 tokens: those of a are padded to a third
BUDGET = 900
levels = st.fixed_dictionaries(dict.fromkeys("abc", st.floats(0.001, 9)))


def counted(express, **more):
    return Epigenome(express, budget_rows=BUDGET, row_tokens=16, rows=ROWS, **more)


def drawn(mix, start=0, stop=BUDGET, rng_seed=3):
    return plan_of(mix, TOKENS, ROWS, rng_seed).draw(start, stop - start)


@st.composite
def capped(draw):
    """A mix with caps on a and b, and stages or bred levels; c always has room."""
    caps = draw(st.fixed_dictionaries({}, optional={"a": st.floats(0.01, 6), "b": st.floats(0.01, 6)}))
    later = draw(st.lists(st.tuples(st.integers(1, BUDGET - 1), levels), max_size=4))
    changes = tuple(Change(row, to) for row, to in sorted(dict(later).items()))
    floors = draw(st.sampled_from([{}, {"c": 0.2}]))
    mix = counted(draw(levels), caps=caps, kept=draw(st.sampled_from([1.0, 0.3])), floors=floors)
    return replace(mix, stages=changes) if draw(st.booleans()) else replace(mix, changes=changes)


@given(capped())
@settings(deadline=None, max_examples=60)
def test_no_cap_is_ever_passed_whatever_is_staged_or_appended(mix):
    found = Counter(domain for domain, _, _ in drawn(mix))
    for domain, epochs in mix.caps.items():
        assert found[domain] <= rows_of_epochs(epochs, held_rows(mix, domain))
    assert sum(found.values()) == BUDGET


@given(
    levels,
    st.fixed_dictionaries(dict.fromkeys("abc", st.floats(0.2, 9))),
    st.dictionaries(st.integers(1, BUDGET - 1), levels, max_size=5),
)
@settings(deadline=None, max_examples=40)
def test_where_all_are_capped_and_there_is_room_at_first_there_is_room_to_the_end(express, caps, bred):
    """However levels are bred: what one cap has lost of its room, another has not."""
    room = {domain: rows_of_epochs(epochs, ROWS[domain]) for domain, epochs in caps.items()}
    assume(sum(room.values()) >= BUDGET)
    mix = counted(express, caps=caps, changes=tuple(Change(row, to) for row, to in sorted(bred.items())))
    found = Counter(domain for domain, _, _ in drawn(mix))
    assert all(found[domain] <= room[domain] for domain in room)
    check_bounds(mix, TOKENS, "v0")


@given(levels, st.floats(0.05, 6))
@settings(deadline=None, max_examples=40)
def test_a_cap_that_binds_is_used_to_its_last_row(express, epochs):
    free = Counter(domain for domain, _, _ in drawn(counted(express, floors={"c": 0.001})))
    found = Counter(domain for domain, _, _ in drawn(counted(express, caps={"a": epochs})))
    most = rows_of_epochs(epochs, ROWS["a"])
    assert found["a"] == most if free["a"] > most else abs(found["a"] - free["a"]) <= 1


@given(capped(), st.integers(0, BUDGET + 50), st.integers(0, 200), st.data())
@settings(deadline=None, max_examples=60)
def test_reading_anywhere_and_the_inverse_agree_with_the_whole_order(mix, start, length, data):
    plan = plan_of(mix, TOKENS, ROWS, 3)
    whole = plan.draw(0, BUDGET + 250)
    assert plan.draw(start, length) == whole[start : start + length]
    domain = data.draw(st.sampled_from(plan.domains))
    row = data.draw(st.integers(0, ROWS[domain] - 1))
    expected = [at for at in range(start, start + length) if whole[at][0] == domain and whole[at][2] == row]
    assert plan.positions_of(domain, row, start, start + length) == expected
    seen = Counter(whole)
    assert max(seen.values()) == 1  # in an epoch every row stands once
    for name in plan.domains:
        epochs = [epoch for held, epoch, _ in whole if held == name]
        assert epochs == sorted(epochs)


@given(capped(), st.integers(1, BUDGET - 1), levels)
@settings(deadline=None, max_examples=40)
def test_what_is_appended_leaves_every_draw_before_it(mix, row, to):
    past = replace(mix, changes=tuple(change for change in mix.changes if change.row < row))
    assert drawn(appended(past, row, to), 0, row) == drawn(past, 0, row)


@given(levels, st.integers(1, 8))
@settings(deadline=None, max_examples=20)
def test_shares_hold_in_every_prefix_and_for_every_number_of_workers(express, world):
    mix = counted(express, floors={"a": 0.01})
    order, shares = drawn(mix), shares_of(mix, TOKENS)
    for rows in (1, 50, 333, BUDGET):
        found = Counter(domain for domain, _, _ in order[:rows])
        assert all(abs(found[domain] - shares[domain] * rows) <= 0.5 + shares[domain] / 2 + 1e-9 for domain in ROWS)
    plan = plan_of(mix, TOKENS, ROWS, 3)
    assert [plan.draw(at, 1)[0] for rank in range(world) for at in range(rank, 64, world)] == [
        order[at] for rank in range(world) for at in range(rank, 64, world)
    ]


def test_an_epoch_is_of_the_rows_there_are_padding_too():
    """27 rows hold 320 tokens, which is 20 rows full: by tokens, 20 draws were called an epoch."""
    found = [row for domain, _, row in drawn(counted({"a": 5.0, "c": 1.0}, caps={"a": 1.0})) if domain == "a"]
    assert sorted(found) == list(range(27))
    mix = counted(dict.fromkeys("abc", 1.0), prior="unimax(1)")
    assert shares_of(mix, TOKENS) == pytest.approx({"a": 27 / 900, "b": 100 / 900, "c": 773 / 900})


def test_a_share_that_is_too_small_for_a_block_is_drawn_all_the_same():
    quiet = Epigenome({"a": 1.0, "c": 1e-4}, budget_rows=50_000, row_tokens=16, rows=ROWS)
    before = replace(quiet, rows={})
    assert "c" not in plan_of(before, TOKENS, ROWS, 3).domains
    assert Counter(d for d, _, _ in drawn(quiet, 0, 50_000)) == {"a": 49_995, "c": 5}
    assert unheard(quiet, TOKENS) == {}


def test_what_comes_to_less_than_a_row_is_named_with_its_reason():
    mix = counted({"a": 1.0, "b": 1e-5, "c": 1.0}, caps={"a": 0.03})
    assert unheard(mix, TOKENS) == {
        "a": "its cap of 0.03 epochs of 27 rows is less than a row",
        "b": "its part of 900 rows is 0.0045 of a row",
    }
    assert {domain for domain, _, _ in drawn(mix)} == {"c"}
    late = replace(mix, caps={}, stages=(Change(400, {"b": 1.0}),))
    assert unheard(late, TOKENS) == {}
    assert unheard(replace(mix, rows={}), TOKENS) == {}


def test_a_mix_whose_shares_fit_blocks_is_drawn_as_ever():
    mix = Epigenome({"a": 1.0, "b": 2.0, "c": 4.0})
    assert drawn(counted(mix.express)) == drawn(mix)
    assert not schedule(counted(mix.express), TOKENS)[0].quotas


def test_caps_that_hold_less_than_the_training_are_refused_in_rows():
    mix = counted({"a": 1.0, "b": 1.0}, caps={"a": 2.0, "b": 3.0})
    with pytest.raises(GenomeError, match=r"v0: the caps allow 0\.3933 of the rows from row 0 on"):
        check_bounds(mix, TOKENS, "v0")
    check_bounds(replace(mix, caps={"a": 2.0, "b": 8.46}), TOKENS, "v0")
    with pytest.raises(GenomeError, match="count epochs of a budget"):
        schedule(Epigenome({"a": 1.0}, rows=ROWS), TOKENS)
    with pytest.raises(GenomeError, match="'b' has a quota of 450 rows, but holds none"):
        plan_of(counted({"a": 1.0, "b": 1.0}, floors={"a": 0.1}), TOKENS, {**ROWS, "b": 0}, 3)


KNOWN = [
    ("b", 0, 65), ("c", 0, 240), ("b", 0, 64), ("b", 1, 50), ("c", 0, 898), ("c", 0, 49), ("c", 0, 80), ("c", 0, 590),
    ("c", 0, 731), ("c", 0, 987), ("c", 0, 909),
]  # fmt: skip


def test_known_answer_of_whole_draws():
    """Pins the order: a change of it would silently change every resumed run that has floors or caps."""
    mix = counted(dict.fromkeys("abc", 1.0), caps={"a": 1.5, "b": 2.0}, floors={"b": 0.05}, stages=(Change(300, {"a": 0.2}),))
    assert drawn(mix, 0, 3) + drawn(mix, 298, 303) + drawn(mix, 897, 900) == KNOWN


def test_a_schedule_of_long_quotas_is_read_far_out():
    plan = MixPlan({"a": 1.0, "b": 2.0}, {"a": 5, "b": 70_001}, 7, quotas={"a": 10**9, "b": 2 * 10**9})
    assert [domain for domain, _, _ in plan.draw(10**9, 6)] == ["a", "b", "b", "a", "b", "b"]
    ((domain, epoch, row),) = plan.draw(10**9, 1)
    assert (domain, epoch) == ("a", 10**9 // 3 // 5)
    assert plan.positions_of("a", row, 10**9, 10**9 + 1) == [10**9]


WRITTEN_BEFORE = {
    "619b407ad1ac3c33": {
        "express": {"a": 1.0, "b": 1.0, "c": 1.0},
        "prior": "uniform",
        "floors": {"b": 0.02},
        "caps": {"a": 2.5, "b": 1.0},
        "budget_rows": 900,
        "row_tokens": 16,
        "stages": [{"row": 300, "express": {"a": 4.0}}],
        "changes": [{"row": 500, "express": {"c": 0.5}}],
    },
    "e0e8eed271edee3c": {
        "express": {"a": 1.0, "b": 1.0, "c": 1.0},
        "prior": "unimax(2)",
        "kept": 0.5,
        "budget_rows": 900,
        "row_tokens": 16,
    },
    "f7670b9232351158": {"express": {"a": 1.0, "d": 0.0001}, "prior": "uniform"},
}


@pytest.mark.parametrize("known", WRITTEN_BEFORE)
def test_mixes_written_before_rows_were_counted_draw_what_they_drew(known):
    """sha256 of 1200 draws as the program made them then, from the epigenome as it wrote it."""
    mix = Epigenome.from_json(WRITTEN_BEFORE[known])
    assert mix.to_json() == WRITTEN_BEFORE[known]
    plan = plan_of(mix, {**TOKENS, "d": 7}, {"a": 22, "b": 110, "c": 1003, "d": 1}, 3)
    assert hashlib.sha256(json.dumps(plan.draw(0, 1200)).encode()).hexdigest()[:16] == known
