"""Laws of the operators on mixes."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import Epigenome
from chrysalis_ray.genome.epigenome import brighten, crossover, dim, mutate, normalise, silence, swap
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
        (lambda: mutate(Epigenome({"a": 1.0}), np.random.default_rng(0), -1.0), "strength -1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(GenomeError, match=message):
        call()
