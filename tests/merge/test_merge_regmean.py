"""RegMean against its own optimality: no other adapter of these input directions is nearer to the members on their inputs."""

from __future__ import annotations

import pytest
import torch

from chrysalis_ray.config.merges import EnsembleMerge, RegmeanMerge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.merge.inputs import root_of_moment
from chrysalis_ray.merge.run import merge_modules

OUT, IN, RANK = 11, 13, 2
WEIGHTS = [0.5, 0.2, 0.3]


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def population(shared: bool, rng_seed: int = 0):
    """Three members and, for each, 200 input rows of its own that lie where its own A reads."""
    generator = torch.Generator().manual_seed(rng_seed)
    common = normal(generator, RANK, IN)
    members, rows = [], []
    for _ in range(3):
        a_ri = common + 0.3 * normal(generator, RANK, IN) if shared else normal(generator, RANK, IN)
        members.append({"q": (a_ri, normal(generator, OUT, RANK))})
        rows.append(normal(generator, 200, IN) + 3.0 * normal(generator, 200, RANK) @ a_ri)
    return members, rows


def merged(members, roots, ridge=1e-9, given=None, rank=IN):
    result = merge_modules(
        RegmeanMerge(method="regmean", ridge=ridge),
        members,
        [1.0] * len(members),
        None,
        1.0,
        None,
        rank,
        given or WEIGHTS,
        roots,
    )
    a_ri, b_or = result.factors["q"]
    return b_or.double() @ a_ri.double(), result


def roots_of(rows):
    return [{"q": x_TI.T / len(x_TI) ** 0.5} for x_TI in rows]


def error(delta, members, rows, weights=WEIGHTS):
    return sum(
        w * float((x_TI @ (delta - m["q"][1] @ m["q"][0]).T).square().sum(1).mean())
        for w, m, x_TI in zip(weights, members, rows, strict=True)
    )


both_regimes = pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])


@both_regimes
def test_no_adapter_of_the_same_input_directions_is_nearer(shared):
    members, rows = population(shared)
    best, result = merged(members, roots_of(rows))
    least = error(best, members, rows)
    span = torch.linalg.qr(torch.cat([m["q"][0] for m in members]).T).Q
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(5):
            step = size * best.norm() * torch.nn.functional.normalize(normal(generator, OUT, 3 * RANK).flatten(), dim=0)
            assert error(best + step.view(OUT, -1) @ span.T, members, rows) > least
    mean, _ = merged(members, roots_of(rows), ridge=1e9)
    torch.testing.assert_close(mean, sum(w * m["q"][1] @ m["q"][0] for w, m in zip(WEIGHTS, members, strict=True)))
    assert result.notes["error_to_mean"] == pytest.approx(least / error(mean, members, rows), rel=1e-4)
    assert result.notes["error_to_mean"] < 0.9


@both_regimes
def test_the_normal_equations_hold(shared):
    """sum_i w_i (C - C_i) H_i V = 0 on the span of the members' inputs: the closed form, checked without inverting anything."""
    members, rows = population(shared, 3)
    best, _ = merged(members, roots_of(rows))
    span = torch.linalg.qr(torch.cat([m["q"][0] for m in members]).T).Q
    pull = sum(
        w * (best - m["q"][1] @ m["q"][0]) @ (x_TI.T @ x_TI / len(x_TI)) @ span
        for w, m, x_TI in zip(WEIGHTS, members, rows, strict=True)
    )
    scale = sum(
        float((m["q"][1] @ m["q"][0] @ (x_TI.T @ x_TI / len(x_TI))).norm()) for m, x_TI in zip(members, rows, strict=True)
    )
    assert float(pull.norm()) < 1e-6 * scale


def test_what_was_measured_through_the_input_directions_alone_is_enough():
    members, rows = population(False)
    span = torch.linalg.qr(torch.cat([m["q"][0] for m in members]).T).Q
    narrow = [{"q": root_of_moment(span, (x_TI @ span).T @ (x_TI @ span) / len(x_TI)).float()} for x_TI in rows]
    assert narrow[0]["q"].shape == (IN, 3 * RANK)
    torch.testing.assert_close(merged(members, narrow)[0], merged(members, roots_of(rows))[0], atol=1e-4, rtol=1e-4)


def test_members_of_no_common_input_add_up():
    generator = torch.Generator().manual_seed(5)
    axes = torch.linalg.qr(normal(generator, IN, IN)).Q
    members = [{"q": (axes[:, 2 * n : 2 * n + 2].T.contiguous(), normal(generator, OUT, 2))} for n in range(3)]
    rows = [normal(generator, 50, 2) @ m["q"][0] for m in members]
    torch.testing.assert_close(
        merged(members, roots_of(rows))[0], sum(m["q"][1] @ m["q"][0] for m in members), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("wrong", ["nobody measured", "a module is missing", "another size", "not finite"])
def test_inputs_that_do_not_fit_are_refused(wrong):
    members, rows = population(False)
    roots = roots_of(rows)
    if wrong == "nobody measured":
        roots = None
    elif wrong == "a module is missing":
        roots[1] = {}
    elif wrong == "another size":
        roots[2] = {"q": torch.ones(IN + 1, 3)}
    elif wrong == "not finite":
        roots[0]["q"][0, 0] = torch.nan
    with pytest.raises(MergeError):
        merged(members, roots)
    mean = merge_modules(EnsembleMerge(method="ensemble"), members, [1.0] * 3, None, 1.0, None, 6, WEIGHTS, roots)
    assert mean.residual < 1e-9  # nobody else looks at them
