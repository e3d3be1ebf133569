"""Laws of the operators on mixes."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import Change, Epigenome
from chrysalis_ray.core.shares import levels_at, schedule
from chrysalis_ray.genome.epigenome import appended, brighten, crossover, dim, mutate, normalise, silence, swap
from chrysalis_ray.genome.mix import shares_of

DOMAINS = "abcd"
levels = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
mixes = st.builds(
    Epigenome,
    st.fixed_dictionaries({domain: levels for domain in DOMAINS}).filter(lambda express: any(express.values())),
    st.sampled_from(["uniform", "size"]),
)
domains = st.sampled_from(DOMAINS)
factors = st.floats(1e-2, 1e2)
TOKENS = {"a": 100, "b": 2000, "c": 7, "d": 1}


STAGED = Epigenome({"a": 1.0, "b": 3.0, "c": 0.0}, stages=(Change(40, {"b": 0.5, "d": 2.0}),))


def same(one, other):
    """Whether two mixes are one and the same to a variant."""
    a, b = shares_of(one, TOKENS), shares_of(other, TOKENS)
    return all(math.isclose(a[domain], b[domain], rel_tol=1e-9, abs_tol=1e-12) for domain in DOMAINS)


@given(mixes, domains, factors, factors)
def test_brighten_and_dim(mix, domain, a, b):
    assert brighten(mix, domain, 1.0) == mix
    assert same(brighten(brighten(mix, domain, a), domain, b), brighten(mix, domain, a * b))
    assert same(dim(brighten(mix, domain, a), domain, a), mix)
    before, after = shares_of(mix, TOKENS), shares_of(brighten(mix, domain, 2.0), TOKENS)
    assert after[domain] >= before[domain]
    assert all(brighten(mix, domain, a).express[other] == mix.express[other] for other in DOMAINS if other != domain)


@given(mixes, domains, domains, factors)
def test_silence(mix, one, other, factor):
    assume(any(level for domain, level in mix.express.items() if domain not in (one, other)))
    quiet = silence(mix, one)
    assert shares_of(quiet, TOKENS)[one] == 0.0
    assert silence(quiet, one) == quiet
    assert silence(silence(mix, other), one) == silence(silence(mix, one), other)
    if one != other:
        assert brighten(silence(mix, one), other, factor) == silence(brighten(mix, other, factor), one)


@given(mixes, domains, domains)
def test_swap(mix, one, other):
    assert swap(swap(mix, one, other), one, other) == mix
    assert swap(mix, one, other) == swap(mix, other, one)
    assert swap(mix, one, one) == mix


@given(mixes)
def test_normalise(mix):
    even = normalise(mix)
    heard = [level for level in even.express.values() if level > 0]
    assert math.isclose(sum(heard), len(heard))
    assert same(even, mix)
    assert all(math.isclose(normalise(even).express[domain], even.express[domain]) for domain in DOMAINS)


@given(mixes, mixes, st.floats(0.0, 1.0))
def test_crossover(one, other, weight):
    other = Epigenome(other.express, one.prior)
    assert same(crossover(one, one, weight), one)
    assert same(crossover(one, other, 0.0), one)
    assert same(crossover(one, other, 1.0), other)
    assert same(crossover(one, other), crossover(other, one))
    assert same(crossover(one, other, weight), crossover(other, one, 1.0 - weight))
    child = crossover(one, other).express
    assert all((child[d] > 0) == (one.express[d] > 0 or other.express[d] > 0) for d in DOMAINS)


def test_crossover_is_the_hellinger_midpoint():
    child = crossover(Epigenome({"a": 0.81, "b": 0.19}), Epigenome({"a": 0.01, "b": 0.99}))
    roots = {"a": (0.9 + 0.1) / 2, "b": (math.sqrt(0.19) + math.sqrt(0.99)) / 2}
    total = sum(root**2 for root in roots.values())
    assert shares_of(child, {"a": 1, "b": 1}) == pytest.approx({domain: root**2 / total for domain, root in roots.items()})
    apart = crossover(Epigenome({"a": 1.0, "b": 0.0}), Epigenome({"a": 1.0, "b": 1.0}))  # shares (1, 0) and (1/2, 1/2)
    roots = {"a": (1 + math.sqrt(0.5)) / 2, "b": math.sqrt(0.5) / 2}
    total = sum(root**2 for root in roots.values())
    assert shares_of(apart, {"a": 1, "b": 1}) == pytest.approx({domain: root**2 / total for domain, root in roots.items()})


@given(mixes, st.integers(0, 2**32), st.floats(0.0, 2.0))
def test_mutate(mix, rng_seed, strength):
    child = mutate(mix, np.random.default_rng(rng_seed), strength)
    assert child == mutate(mix, np.random.default_rng(rng_seed), strength)
    assert mutate(mix, np.random.default_rng(rng_seed), 0.0) == mix
    assert {d for d in DOMAINS if child.express[d] > 0} == {d for d in DOMAINS if mix.express[d] > 0}
    turned = Epigenome(dict(reversed(mix.express.items())), mix.prior)
    assert mutate(turned, np.random.default_rng(rng_seed), strength) == child


@given(mixes, domains, domains, factors)
def test_no_operator_changes_its_input(mix, one, other, factor):
    before = dict(mix.express)
    for call in (
        lambda: brighten(mix, one, factor), lambda: dim(mix, one, factor), lambda: silence(mix, one),
        lambda: swap(mix, one, other), lambda: normalise(mix), lambda: crossover(mix, mix),
        lambda: mutate(mix, np.random.default_rng(0), 1.0),
    ):  # fmt: skip
        try:
            call()
        except GenomeError:
            assert sum(level > 0 for level in before.values()) == 1  # silence of the only voice
    assert mix.express == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: brighten(Epigenome({"a": 1.0}), "b", 2.0), "no domain 'b'"),
        (lambda: brighten(Epigenome({"a": 1.0}), "a", 0.0), "cannot be made 0.0 times"),
        (lambda: brighten(Epigenome({"a": 1.0}), "a", math.nan), "cannot be made nan times"),
        (lambda: brighten(Epigenome({"a": 1e300}), "a", 1e300), "a level is a number"),
        (lambda: dim(Epigenome({"a": 1.0}), "a", 0.0), "0 times as quiet"),
        (lambda: silence(Epigenome({"a": 1.0, "b": 0.0}), "a"), "expresses nothing"),
        (lambda: normalise(Epigenome({"a": 0.0})), "expresses nothing"),
        (lambda: crossover(Epigenome({"a": 1.0}), Epigenome({"a": 1.0}, "size")), "cannot be crossed"),
        (lambda: crossover(Epigenome({"a": 1.0}), Epigenome({"a": 1.0}), 1.5), "cannot weigh 1.5"),
        (lambda: crossover(Epigenome({"a": 1.0}), Epigenome({"a": 1.0}, caps={"a": 2.0})), "differ in more than their levels"),
        (lambda: crossover(STAGED, STAGED), "with a schedule cannot be crossed"),
        (lambda: appended(Epigenome({"a": 1.0}), 4, {"a": 0.0}), "expresses nothing"),
        (lambda: appended(Epigenome({"a": 1.0}), 0, {"a": -1.0}), "expresses nothing"),
        (lambda: appended(appended(Epigenome({"a": 1.0}), 9, {"b": 2.0}), 8, {"b": 1.0}), "row 8 is past"),
        (lambda: mutate(Epigenome({"a": 1.0}), np.random.default_rng(0), -1.0), "strength -1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(GenomeError, match=message):
        call()


@given(mixes, st.integers(1, 90), st.dictionaries(domains, factors, min_size=1), st.dictionaries(domains, factors, min_size=1))
def test_appending(mix, row, first, second):
    once = appended(mix, row, first)
    before, after = schedule(mix, TOKENS), schedule(once, TOKENS)
    assert after[0] == before[0]
    assert appended(once, row, first) == once
    assert levels_at(once, row) == {**mix.express, **first}
    twice = appended(once, row, second)
    assert levels_at(twice, row) == {**mix.express, **first, **second}
    assert levels_at(twice, row - 1) == mix.express
    assert len(schedule(twice, TOKENS)) <= 2
    assert same(appended(mix, 0, first), Epigenome({**mix.express, **first}, mix.prior))


def test_normalising_a_schedule_leaves_all_its_shares():
    whole, tokens = appended(STAGED, 60, {"c": 4.0}), {"a": 5, "b": 5, "c": 5, "d": 5}
    scaled = normalise(whole)
    assert sum(scaled.express.values()) == 2.0
    for one, other in zip(schedule(whole, tokens), schedule(scaled, tokens), strict=True):
        assert one.start == other.start
        assert dict(one.shares) == pytest.approx(dict(other.shares))
