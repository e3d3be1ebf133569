"""Weights per layer: every module has the merge of its own weights, and the whole keeps its promises."""

from __future__ import annotations

import math

import pytest
import torch

from chrysalis_ray.config.merges import ConsensusMerge, EnsembleMerge, TiesMerge, read_merge
from chrysalis_ray.core.errors import ConfigError, MergeError
from chrysalis_ray.merge.geometric_median import geometric_median
from chrysalis_ray.merge.per_layer import SomeModules, check_names, merge_adapters
from chrysalis_ray.merge.run import merge_modules

MODULES = {"layers.0.q": (9, 12), "layers.0.down": (12, 7), "layers.1.q": (9, 12), "layers.10.q": (9, 12)}
NAMES = ["v000-code", "v001-text", "v002-chat"]


def members(count: int = 3, rank: int = 2, rng_seed: int = 0):
    generator = torch.Generator().manual_seed(rng_seed)
    return [
        {
            m: (torch.randn(rank, i, generator=generator), torch.randn(o, rank, generator=generator))
            for m, (o, i) in MODULES.items()
        }
        for _ in range(count)
    ]


def merged(config, adapters=None, names=NAMES, rank=99, **how):
    adapters = adapters or members()
    return merge_adapters(
        config, names, adapters, [1.0] * len(adapters), None, 1.0, [1.0, 1.1, 1.2][: len(adapters)], rank, **how
    )


def dense(factors):
    return factors[1].double() @ factors[0].double()


def mean(adapters, module, weights):
    return sum(w * dense(adapter[module]) for w, adapter in zip(weights, adapters, strict=True)) / sum(weights)


def layered(*layers, **changes):
    return EnsembleMerge(method="ensemble", layer_weights=[{"modules": m, "weights": w} for m, w in layers], **changes)


def test_the_first_pattern_that_fits_weighs_a_module_and_the_rest_have_the_weights_of_the_whole():
    config = layered(("*.1.q", {"v000-code": 3, "2": 1}), ("layers.0.*", {"v001-text": 2.0}), ("*.0.q", {"0": 1}))
    result = merged(config)
    adapters = members()
    for module, weights in (
        ("layers.1.q", [3, 0, 1]), ("layers.0.q", [0, 1, 0]), ("layers.0.down", [0, 1, 0]), ("layers.10.q", [1, 1, 1])
    ):  # fmt: skip
        torch.testing.assert_close(dense(result.factors[module]), mean(adapters, module, weights), atol=1e-5, rtol=1e-5)
    assert list(result.factors) == sorted(MODULES)
    assert result.weights == pytest.approx([(0.75 + 1 / 3) / 4, (2 + 1 / 3) / 4, (0.25 + 1 / 3) / 4])
    assert math.fsum(result.weights) == pytest.approx(1.0)
    told = {layer["first_module"]: layer["weights"] for layer in result.notes["layers"]}
    assert told["layers.1.q"] == [0.75, 0.0, 0.25]
    assert told["layers.0.down"] == [0.0, 1.0, 0.0]


def test_equal_weights_everywhere_are_the_plain_merge_bit_for_bit_and_given_ones_come_last():
    config = layered(("*", {name: 1.0 for name in NAMES}))
    plain = merge_modules(EnsembleMerge(method="ensemble"), members(), [1.0] * 3, None, 1.0, None, 3)
    result = merged(config, rank=3)
    assert all(torch.equal(x, y) for m in MODULES for x, y in zip(result.factors[m], plain.factors[m], strict=True))
    assert result.residual == pytest.approx(plain.residual, rel=1e-12)
    partly = merged(layered(("layers.0.q", {"0": 1.0})), given=[0.0, 1.0, 1.0])
    torch.testing.assert_close(
        dense(partly.factors["layers.1.q"]), mean(members(), "layers.1.q", [0, 1, 1]), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(dense(partly.factors["layers.0.q"]), dense(members()[0]["layers.0.q"]), atol=1e-5, rtol=1e-5)


def test_the_residual_is_the_measured_one_and_exact_pads_to_the_widest_part():
    config = layered(("layers.0.*", {"0": 2.0, "1": 1.0}))
    full, cut = merged(config), merged(config, rank=2)
    lost = sum(float((dense(full.factors[m]) - dense(cut.factors[m])).norm()) ** 2 for m in MODULES)
    whole = sum(float(dense(full.factors[m]).norm()) ** 2 for m in MODULES)
    assert cut.residual == pytest.approx(math.sqrt(lost / whole), rel=1e-5)
    exact = merged(layered(("layers.0.*", {"0": 1.0}), rank="exact"))
    assert exact.rank == 6
    assert {a.shape[0] for a, _ in exact.factors.values()} == {6}
    assert exact.residual < 1e-9


def test_equal_members_are_the_member_whatever_the_layers_weigh():
    (one,) = members(1)
    for method in (TiesMerge, ConsensusMerge):
        config = method(method=method.__name__[:-5].lower(), layer_weights=[{"modules": "layers.0.*", "weights": {"1": 1}}])
        result = merged(config, [one] * 3)
        for module in MODULES:
            torch.testing.assert_close(dense(result.factors[module]), dense(one[module]), atol=1e-5, rtol=1e-5)


def test_per_module_a_member_is_far_only_where_it_is_far():
    adapters = members(5, rng_seed=4)
    a_ri, b_or = adapters[4]["layers.1.q"]
    adapters[4]["layers.1.q"] = (a_ri, 300 * b_or)
    result = merge_adapters(
        EnsembleMerge(method="ensemble", weights="geometric_median", per="module"), [str(n) for n in range(5)], adapters,
        [1.0] * 5, None, 1.0, None, 99,
    )  # fmt: skip
    told = {layer["first_module"]: layer["weights"] for layer in result.notes["layers"]}
    assert told["layers.1.q"][4] < 0.01
    assert min(weight for module in MODULES if module != "layers.1.q" for weight in told[module]) > 0.05
    flat = torch.stack([dense(adapter["layers.0.q"]).flatten() for adapter in adapters])
    assert told["layers.0.q"] == pytest.approx(geometric_median(flat @ flat.T).tolist(), rel=1e-6)


def test_a_module_that_nobody_who_counts_has_is_no_part_of_the_merge():
    adapters = members()
    del adapters[1]["layers.10.q"]
    result = merged(layered(("layers.10.q", {"1": 1.0})), adapters)
    assert sorted(result.factors) == sorted(set(MODULES) - {"layers.10.q"})
    assert result.notes["modules_missing_as_zero"] == {"1": 1}
    view = SomeModules(adapters[0], ["layers.0.q", "absent"])
    assert (list(view), len(view), "layers.1.q" in view) == (["layers.0.q"], 1, False)


def test_names_of_nobody_are_refused():
    config = layered(("layers.0.*", {"v009-chat": 1.0}))
    with pytest.raises(MergeError, match="none of them takes part"):
        merged(config)
    with pytest.raises(MergeError, match="none of the 3 adapters"):
        check_names(config, NAMES)
    check_names(layered(("*", {"2": 1.0, "v000-code": 0.5})), NAMES)
    with pytest.raises(MergeError, match="'3'"):
        check_names(layered(("*", {"3": 1.0})), NAMES)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["layer_weights=[{modules: 'a/b', weights: {'0': 1}}]"], "modules"),
        (["layer_weights=[{modules: '*', weights: {'0': 0}}]"], "every weight is 0"),
        (["layer_weights=[{modules: '*', weights: {'0': -1}}]"], ">= 0"),
        (["layer_weights=[{modules: '*', weights: {}}]"], "weights"),
        (["layer_weights=[{module: '*', weights: {'0': 1}}]"], "modules"),
        (["per=module"], "geometric_median"),
        (["layer_groups=3"], "greedy_layers"),
        (["budget=30"], "searched"),
        (["weights=searched", "layer_weights=[{modules: '*', weights: {'0': 1}}]"], "leave `layer_weights` out"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ConfigError) as refused:
        read_merge("ensemble", settings)
    assert words in str(refused.value)
