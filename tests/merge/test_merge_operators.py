"""Operators on weights: laws on dense deltas, whatever the parents are and however they are factored."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.merge.operators import Parent, SwarmPull, combine, crossover, interpolate, mutate, swarm_step

SHAPES = {"layers.0.q": (9, 12), "layers.0.down": (12, 7), "layers.1.q": (9, 12)}
law = settings(max_examples=8, deadline=None, derandomize=True)
any_seed = st.integers(0, 10**6)


def parents(rng_seed, count, shared=False, ranks=(2, 3, 1, 2, 3)):
    generator = torch.Generator().manual_seed(rng_seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = {m: normal(3, i) for m, (_, i) in SHAPES.items()}
    made = []
    for number in range(count):
        factors = {
            m: ((common[m][: ranks[number]] if shared else normal(ranks[number], i)), normal(o, ranks[number]))
            for m, (o, i) in SHAPES.items()
        }
        made.append(Parent(f"p{number}", factors, (0.5, 2.0, 1.0)[number % 3]))
    return made


def dense(parent, scale=None):
    scale = getattr(parent, "scale", 1.0) if scale is None else scale
    return {m: scale * (b.double() @ a.double()) for m, (a, b) in parent.factors.items()}


def distance(one, two):
    return math.sqrt(sum(float((one[m] - two[m]).square().sum()) for m in one))


def close(one, two, tolerance=2e-6):
    assert one.keys() == two.keys()
    assert distance(one, two) <= tolerance * max(distance(two, {m: 0 * x for m, x in two.items()}), 1e-9)


def gauged(parent, rng_seed):
    generator = torch.Generator().manual_seed(rng_seed)
    factors = {}
    for m, (a, b) in parent.factors.items():
        g = torch.eye(len(a), dtype=torch.float64) + 0.4 * torch.rand(len(a), len(a), generator=generator, dtype=torch.float64)
        factors[m] = (torch.linalg.inv(g) @ a, b @ g)
    return parent._replace(factors=factors)


@law
@given(rng_seed=any_seed, shared=st.booleans(), c=st.lists(st.floats(-2, 2), min_size=3, max_size=3), rank=st.integers(1, 8))
def test_a_sum_is_the_dense_sum_and_its_cut_the_best(rng_seed, shared, c, rank):
    some = parents(rng_seed, 3, shared)
    deltas = [dense(parent) for parent in some]
    expected = {m: sum(w * d[m] for w, d in zip(c, deltas, strict=True)) for m in SHAPES}
    whole = combine(some, c, None)
    size = max(distance(d, {m: 0 * x for m, x in d.items()}) for d in deltas)
    assert distance(dense(whole), expected) < 1e-6 * size
    assert whole.residual < 1e-9
    cut = combine(some, c, rank)
    assert {a.shape[0] for a, _ in cut.factors.values()} == {rank}
    best = sum(float((torch.linalg.svdvals(d)[rank:] ** 2).sum()) for d in expected.values())
    assert distance(dense(cut), expected) == pytest.approx(math.sqrt(best), abs=2e-6 * size)


@law
@given(rng_seed=any_seed, share=st.floats(0, 1), gauge=any_seed)
def test_interpolation_has_its_ends_its_mirror_and_its_fixed_points(rng_seed, share, gauge):
    one, two = parents(rng_seed, 2)
    close(dense(interpolate(one, two, 0.0, None)), dense(one))
    close(dense(interpolate(one, two, 1.0, None)), dense(two))
    close(dense(interpolate(one, two, share, None)), dense(interpolate(two, one, 1.0 - share, None)))
    close(dense(interpolate(one, one, share, None)), dense(one))
    close(dense(interpolate(gauged(one, gauge), two, share, None)), dense(interpolate(one, two, share, None)))
    assert interpolate(one, two, 0.25, 2).provenance == {
        "operator": "interpolate", "parents": ["p0", "p1"], "coefficients": [0.75, 0.25], "share": 0.25, "rank": 2,
    }  # fmt: skip


@law
@given(rng_seed=any_seed, draw=any_seed, gauge=any_seed)
def test_a_crossover_has_every_module_of_one_parent_whole(rng_seed, draw, gauge):
    some = parents(rng_seed, 3)
    child = crossover(some, [0.5, 0.3, 0.2], draw)
    by_name = {parent.name: dense(parent) for parent in some}
    for module, name in child.provenance["modules"].items():
        close({module: dense(child)[module]}, {module: by_name[name][module]})
    assert child.residual < 1e-9
    assert child.rank <= 3
    close(dense(crossover([gauged(parent, gauge) for parent in some], [0.5, 0.3, 0.2], draw)), dense(child))
    close(dense(crossover([some[0]] * 2, [0.4, 0.6], draw)), dense(some[0]))
    close(dense(crossover(some, [0.0, 1.0, 0.0], draw)), dense(some[1]))
    fewer = [parent._replace(factors={m: parent.factors[m] for m in list(SHAPES)[:2]}) for parent in some]
    assert crossover(fewer, [0.5, 0.3, 0.2], draw).provenance["modules"].items() <= child.provenance["modules"].items()


def test_chances_are_kept_over_many_modules():
    many = {f"layers.{n}.q": (torch.ones(1, 2), torch.ones(2, 1)) for n in range(150)}
    child = crossover([Parent("a", many, 1.0), Parent("b", many, 2.0), Parent("c", many, 3.0)], [0.6, 0.0, 0.4], 1)
    drawn = list(child.provenance["modules"].values())
    assert drawn.count("b") == 0
    assert drawn.count("a") / 150 == pytest.approx(0.6, abs=0.1)


@law
@given(rng_seed=any_seed, draw=any_seed, size=st.floats(0, 2), fresh=st.sampled_from([0, 0, 2]), anchored=st.booleans())
def test_a_mutation_goes_as_far_as_it_says_in_every_module(rng_seed, draw, size, fresh, anchored):
    parent, seed = parents(rng_seed, 2)
    anchor = seed if anchored else None
    child = mutate(parent, size, draw, fresh=fresh, anchor=anchor)
    before, after = dense(parent), dense(child)
    for m in SHAPES:
        change = before[m] - (dense(seed)[m] if anchored else 0.0)
        assert float((after[m] - before[m]).norm()) == pytest.approx(size * float(change.norm()), rel=1e-5, abs=2e-5)
    grown = 2 + (3 if anchored else 0)
    assert child.rank <= grown + fresh
    close(dense(mutate(parent, size, draw, fresh=fresh, anchor=anchor)), after)
    close(dense(mutate(parent, 0.0, draw, fresh=fresh, anchor=anchor)), before)
    if size > 0.01:
        assert distance(dense(mutate(parent, size, draw + 1, fresh=fresh, anchor=anchor)), after) > 1e-3 * size
    if not fresh:
        close(dense(mutate(gauged(parent, draw), size, draw, anchor=anchor)), after, tolerance=1e-5)


def test_what_did_not_change_does_not_mutate():
    (parent,) = parents(0, 1)
    still = parent._replace(factors={m: (a, 0 * b) for m, (a, b) in parent.factors.items()})
    for fresh in (0, 2):
        assert all(not bool(b.any()) for _, b in mutate(still, 1.0, 0, fresh=fresh).factors.values())
        close(dense(mutate(parent, 1.0, 0, fresh=fresh, anchor=parent)), dense(parent))


@law
@given(rng_seed=any_seed, draw=any_seed)
def test_a_swarm_steps_by_the_papers_formula(rng_seed, draw):
    x, v, p, g, w = parents(rng_seed, 5)
    pull = SwarmPull(0.2, 0.4, 0.6, 0.3, step=0.7)
    moved, velocity = swarm_step(x, v, p, g, w, draw, None, pull)
    coefficients = dict(zip(velocity.provenance["parents"], velocity.provenance["coefficients"], strict=True))
    a, b, c, d = (coefficients[name] for name in ("p1", "p2", "p3", "p4"))
    assert a + b + c - d == pytest.approx(1.0)
    assert min(a, b, c, -d) > 0.0
    dx, dv, dp, dg, dw = (dense(parent) for parent in (x, v, p, g, w))
    expected = {m: a * dv[m] + b * (dp[m] - dx[m]) + c * (dg[m] - dx[m]) + d * (dw[m] - dx[m]) for m in SHAPES}
    close(dense(velocity), expected)
    close(dense(moved), {m: dx[m] + 0.7 * expected[m] for m in SHAPES})
    again, onward = swarm_step(x, None, x, x, x, draw, None)
    close(dense(again), dense(x))  # all in one place, and nothing moves: it stays
    assert all(float((b_or @ a_ri).norm()) < 1e-6 for a_ri, b_or in onward.factors.values())
    assert swarm_step(x, v, p, g, w, draw, 2, pull)[0].rank == 2
    assert swarm_step(x, v, p, g, w, draw + 1, None, pull)[1].provenance != velocity.provenance


@pytest.mark.parametrize(
    "wrong",
    [
        lambda some: combine(some, [1.0], None),
        lambda some: combine(some, [1.0, math.nan], None),
        lambda some: combine([some[0], Parent("odd", {"layers.0.q": (torch.ones(1, 5), torch.ones(9, 1))}, 1.0)], [1, 1], 1),
        lambda some: crossover(some, [0.5, 0.6], 0),
        lambda some: crossover(some, [1.5, -0.5], 0),
        lambda some: mutate(some[0], -1.0, 0),
        lambda some: swarm_step(some[0], None, *[some[1]] * 3, 0, None, SwarmPull(0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_what_makes_no_child_is_refused(wrong):
    with pytest.raises(MergeError):
        wrong(parents(0, 2))
