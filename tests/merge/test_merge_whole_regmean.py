"""RegMean on whole inputs against its own closed form, dense and in fp64, and against the laws that a merge keeps."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from chrysalis_ray.config.merges import RegmeanMerge, make_merge
from chrysalis_ray.core.errors import ConfigError, MergeError
from chrysalis_ray.merge.run import merge_modules
from chrysalis_ray.merge.whole_regmean import largest_eigenvalue

OUT, IN, RANK = 11, 13, 2
WEIGHTS = [0.5, 0.2, 0.3]
both_regimes = pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def population(shared: bool, rng_seed: int = 0, rows: int = 200):
    """Three members, and for each of them input rows of its own, all features of which go together."""
    generator = torch.Generator().manual_seed(rng_seed)
    common = normal(generator, RANK, IN)
    members, inputs = [], []
    for _ in range(3):
        a_ri = common + 0.3 * normal(generator, RANK, IN) if shared else normal(generator, RANK, IN)
        members.append({"q": (a_ri, normal(generator, OUT, RANK))})
        inputs.append(normal(generator, rows, IN) @ normal(generator, IN, IN))
    return members, inputs


def moments_of(inputs):
    moments = [x_TI.T @ x_TI / len(x_TI) for x_TI in inputs]
    return [{"q": (moment + moment.T) / 2} for moment in moments]


def merged(members, moments, given=None, rank="exact", **settings):
    spec = make_merge({"method": "regmean", "space": "dense", "rank": rank, **settings})
    result = merge_modules(
        spec, members, [1.0] * len(members), None, 1.0, None, RANK, given or WEIGHTS[: len(members)], moments
    )
    a_ri, b_or = result.factors["q"]
    return b_or.double() @ a_ri.double(), result


def delta(member):
    return member["q"][1] @ member["q"][0]


def error(change, members, inputs, weights=WEIGHTS):
    """sum_i w_i E |(C - C_i) x|^2, over the very rows."""
    rows = zip(weights, members, inputs, strict=True)
    return sum(w * float((x_TI @ (change - delta(m)).T).square().sum(1).mean()) for w, m, x_TI in rows)


def closed_form(members, moments, shrink, ridge=0.0, weights=WEIGHTS):
    """W = (sum W_i G_i) (sum G_i)^-1 of the paper's algorithm 1, with shrunk Gram matrices, inverted as it stands there."""
    shrunk = [shrink * m["q"] + (1 - shrink) * m["q"].diagonal().diag() for m in moments]
    total = sum(w * g for w, g in zip(weights, shrunk, strict=True))
    penalty = ridge * float(torch.linalg.eigvalsh(total)[-1])
    mean = sum(w * delta(m) for w, m in zip(weights, members, strict=True))
    wanted = sum(w * delta(m) @ g for w, m, g in zip(weights, members, shrunk, strict=True)) + penalty * mean
    return wanted @ torch.linalg.inv(total + penalty * torch.eye(IN, dtype=torch.float64))


@both_regimes
@pytest.mark.parametrize("shrink", [0.1, 0.9])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 3.0])
def test_it_is_the_papers_closed_form(shared, shrink, ridge):
    members, inputs = population(shared)
    moments = moments_of(inputs)
    found, result = merged(members, moments, off_diagonal=shrink, ridge=ridge)
    expected = closed_form(members, moments, shrink, ridge)
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())  # stored in fp32
    mean = sum(w * delta(m) for w, m in zip(WEIGHTS, members, strict=True))
    told = error(expected, members, inputs) / error(mean, members, inputs)
    assert result.notes["error_to_mean"] == pytest.approx(told, rel=1e-9)


@both_regimes
def test_no_matrix_at_all_is_nearer_on_the_members_inputs(shared):
    """Least squares over all rows at once, of any matrix whatever: what the method promises where nothing is shrunk."""
    members, inputs = population(shared, 2)
    found, result = merged(members, moments_of(inputs), off_diagonal=1.0, ridge=1e-6)
    x = torch.cat([(w / len(x_TI)) ** 0.5 * x_TI for w, x_TI in zip(WEIGHTS, inputs, strict=True)])
    y = torch.cat([(w / len(x_TI)) ** 0.5 * x_TI @ delta(m).T for w, x_TI, m in zip(WEIGHTS, inputs, members, strict=True)])
    best = torch.linalg.lstsq(x, y).solution.T
    assert error(found, members, inputs) == pytest.approx(error(best, members, inputs), rel=1e-4)
    assert error(found, members, inputs) >= error(best, members, inputs) * (1 - 1e-6)
    assert 0.0 < result.notes["error_to_mean"] < 0.9


@both_regimes
def test_equal_members_and_equal_inputs_give_the_mean(shared):
    members, inputs = population(shared, 3)
    moments = moments_of(inputs)
    for settings in ({"ridge": 0.0}, {"ridge": 0.01}, {"ridge": 1e-6, "off_diagonal": 1.0}):
        found, _ = merged([members[0]] * 3, moments, **settings)
        torch.testing.assert_close(found, delta(members[0]), atol=1e-6, rtol=1e-6)
        mean = sum(w * delta(m) for w, m in zip(WEIGHTS, members, strict=True))
        torch.testing.assert_close(merged(members, [moments[1]] * 3, **settings)[0], mean, atol=1e-6, rtol=1e-6)
        one_hot, _ = merged(members, moments, [0.0, 1.0, 0.0], **settings)
        torch.testing.assert_close(one_hot, delta(members[1]), atol=1e-6, rtol=1e-6)


def test_members_of_no_common_input_add_up():
    """Each of them is alone where its inputs lie: nothing is averaged away."""
    generator = torch.Generator().manual_seed(7)
    axes = torch.linalg.qr(normal(generator, IN, IN)).Q
    members = [{"q": (axes[:, 2 * n : 2 * n + 2].T.contiguous(), normal(generator, OUT, 2))} for n in range(3)]
    moments = moments_of([normal(generator, 50, 2) @ m["q"][0] for m in members])
    found, _ = merged(members, moments, off_diagonal=1.0, ridge=1e-6)
    torch.testing.assert_close(found, sum(delta(m) for m in members), atol=1e-4, rtol=1e-4)


def test_features_that_nothing_comes_in_at_keep_the_mean():
    members, inputs = population(False, 4)
    for x_TI in inputs:
        x_TI[:, [0, 5]] = 0.0
    found, _ = merged(members, moments_of(inputs), ridge=0.0)
    mean = sum(w * delta(m) for w, m in zip(WEIGHTS, members, strict=True))
    torch.testing.assert_close(found[:, [0, 5]], mean[:, [0, 5]], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found, mean, rtol=0.01)
    silent = [{"q": torch.zeros(IN, IN)} for _ in members]
    torch.testing.assert_close(merged(members, silent)[0], mean, atol=1e-6, rtol=1e-6)


def test_fewer_rows_than_features_have_one_answer():
    members, inputs = population(True, 5, rows=4)
    moments = moments_of(inputs)
    found, _ = merged(members, moments, ridge=0.0)
    expected = closed_form(members, moments, 0.9)
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())


def test_the_cut_is_the_best_of_its_rank_and_the_residual_the_measured_one():
    members, inputs = population(False, 6)
    whole, full = merged(members, moments_of(inputs))
    assert (full.residual, full.rank) == (0.0, 3 * RANK)
    for rank in (1, 2, 4):
        found, result = merged(members, moments_of(inputs), rank=rank)
        best = float((torch.linalg.svdvals(whole)[rank:] ** 2).sum()) ** 0.5
        assert float((found - whole).norm()) == pytest.approx(best, rel=1e-5)
        assert result.residual == pytest.approx(best / float(whole.norm()), rel=1e-5)
        assert result.captured_energy == pytest.approx(1 - result.residual**2)


def test_the_largest_eigenvalue_is_that_of_the_solver():
    x = normal(torch.Generator().manual_seed(0), 40, 30)
    matrix = x.T @ x
    assert largest_eigenvalue(matrix) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-6)


@pytest.mark.parametrize(
    "wrong", ["nobody measured", "a module is missing", "another size", "not finite", "a root", "below zero"]
)
def test_moments_that_are_none_are_refused(wrong):
    members, inputs = population(False)
    moments = moments_of(inputs)
    if wrong == "nobody measured":
        moments = None
    elif wrong == "a module is missing":
        moments[1] = {}
    elif wrong == "another size":
        moments[2] = {"q": torch.eye(IN + 1)}
    elif wrong == "not finite":
        moments[0]["q"][0, 0] = torch.nan
    elif wrong == "a root":
        moments[0]["q"] = torch.linalg.cholesky(moments[0]["q"])
    elif wrong == "below zero":
        moments[0]["q"][3, 3] = -1.0
    with pytest.raises(MergeError):
        merged(members, moments)


@pytest.mark.parametrize(
    "settings",
    [{"off_diagonal": 0.5}, {"ridge": 0.0}, {"space": "dense", "off_diagonal": 1.0, "ridge": 0.0}, {"space": "knots"},
     {"space": "dense", "off_diagonal": 0.0}],
)  # fmt: skip
def test_settings_without_a_meaning_or_an_answer_are_refused(settings):
    with pytest.raises((ConfigError, ValidationError)):
        make_merge({"method": "regmean", **settings})
    assert RegmeanMerge(method="regmean", space="dense", ridge=0.0).off_diagonal == 0.9
