"""Configs of mergekit: the same numbers as its arithmetic on dense weights, or a refusal that names the key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from chrysalis_ray.config.mergekit import KNOWN, OTHERWISE, read_mergekit
from chrysalis_ray.core.errors import ConfigError, MergeError
from chrysalis_ray.evaluate.folders import merge_folders
from chrysalis_ray.seed.adapter import AdapterWeights, read_adapter, write_adapter

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
OUT, IN = 9, 11


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Adapters a0, a1, a2 and a seed, in the working folder, as a config names them."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    common = {m: torch.randn(2, IN, generator=generator) for m in MODULES}
    for name in ("a0", "a1", "a2", "seed"):
        factors = {
            m: (common[m] + 0.3 * torch.randn(2, IN, generator=generator), torch.randn(OUT, 2, generator=generator))
            for m in MODULES
        }
        write_adapter(tmp_path / name, AdapterWeights("org/base", None, 2, 4.0, False, ("q_proj", "down_proj"), factors))
    return tmp_path


def merged(folder: Path, text: str, rank: str | None = "exact"):
    (folder / "config.yaml").write_text(text)
    recipe = read_mergekit(folder / "config.yaml", rank)
    out = folder / "out"
    merge_folders(recipe.adapters, recipe.spec, out, recipe.seed_adapter, recipe.given, base_model=recipe.base_model)
    found = read_adapter(out)
    return {m: found.delta(m).double() for m in MODULES}, recipe


def deltas(folder: Path, names=("a0", "a1", "a2"), anchor=None):
    """[N, out, in] of every module, from the anchor if there is one."""
    adapters = [read_adapter(folder / name) for name in names]
    seed = read_adapter(folder / anchor) if anchor else None
    return {
        m: torch.stack([a.delta(m).double() - (seed.delta(m).double() if seed else 0.0) for a in adapters]) for m in MODULES
    }


def assert_same(found, expected):
    for m in MODULES:
        torch.testing.assert_close(found[m], expected[m], atol=2e-5, rtol=1e-4)


# mergekit 0.1.5, merge_methods/generalized_task_arithmetic.py and sparsify.py, written out on dense deltas
def generalized(delta, weight, density=1.0, elect=False, normalize=False, reach=1.0, gamma=None):
    kept = torch.zeros_like(delta)
    for n in range(len(delta)):
        size, own = delta[n].numel(), density[n] if isinstance(density, list) else density
        k = max(1, int(own * size))
        places = delta[n].abs().reshape(-1).argsort(descending=True)[:k]
        if gamma is not None and own < 1:
            least = max(0, size - k - int(gamma * size))
            places = delta[n].abs().reshape(-1).sort().indices[least : least + k]
        kept[n].view(-1)[places] = delta[n].reshape(-1)[places]
    w = torch.tensor(weight, dtype=torch.float64)[:, None, None]
    weighted = kept * w
    mask = torch.ones_like(weighted)
    if elect:
        mask = (weighted.sign() == (weighted.sum(0) >= 0).double() * 2 - 1).double()
    mixed, divisor = (weighted * mask).sum(0), (w * mask).sum(0)
    divisor[divisor == 0] = 1
    return reach * (mixed / divisor if normalize else mixed)


def stock(delta):
    unit = delta.flatten(1) / delta.flatten(1).norm(dim=1, keepdim=True)
    count = len(delta)
    cosine = ((unit @ unit.T).sum() - count) / (count * (count - 1))
    return count * cosine / (1 + (count - 1) * cosine) * delta.mean(0)


# mergekit 0.1.5, merge_methods/sce.py
def sce(delta, share=1.0):
    variance = delta.var(0, unbiased=False)
    mask = torch.ones_like(variance)
    if share < 1:
        mask = torch.zeros_like(variance)
        mask.view(-1)[variance.view(-1).topk(int(variance.count_nonzero() * share)).indices] = 1
    delta = delta * mask
    weight = delta.square().flatten(1).mean(1)[:, None, None]
    agrees = delta.sign() == (delta.sum(0) >= 0).double() * 2 - 1
    return (delta * weight / weight.sum() * agrees).sum(0) / (weight / weight.sum() * agrees).sum(0).clamp(min=1e-6)


# mergekit, merge_methods/nuslerp.py and multislerp.py, around a base
def nuslerp(delta, weight):
    t = weight[1] / sum(weight)
    v0, v1 = delta[0].flatten(), delta[1].flatten()
    theta = torch.acos((v0 / v0.norm() * (v1 / v1.norm())).sum().clamp(-1, 1))
    return ((torch.sin((1 - t) * theta) * v0 + torch.sin(t * theta) * v1) / torch.sin(theta)).view(delta.shape[1:])


def multislerp(delta, weight, eps=1e-8):
    w = torch.tensor(weight, dtype=torch.float64) / sum(weight)
    norms = delta.flatten(1).norm(dim=1, keepdim=True)
    unit = delta.flatten(1) / (norms + eps)
    mean = (unit * w[:, None]).sum(0)
    mean = mean / mean.norm()
    tangent = ((unit - (unit * mean).sum(-1, keepdim=True) * mean) * w[:, None]).sum(0)
    length = tangent.norm() + eps
    point = mean * torch.cos(length) + tangent * (torch.sin(length) / length)
    return (point * (norms.squeeze(-1) * w).sum()).view(delta.shape[1:])


def config(method, weights=(2.0, 1.0, 0.5), base="org/base", per_model="", **parameters):
    lines = [f"merge_method: {method}", *([f"base_model: {base}"] if base else []), "models:"]
    for n, weight in enumerate(weights):
        lines += [f"  - model: a{n}", f"    parameters: {{weight: {weight}{per_model}}}"]
    written = ", ".join(f"{key.rstrip('_')}: {value}" for key, value in parameters.items())
    return "\n".join([*lines, f"parameters: {{{written}}}", "dtype: bfloat16"]) + "\n"


WEIGHTS = [2.0, 1.0, 0.5]


def test_linear_is_the_weighted_mean(three):
    found, recipe = merged(three, config("linear", base=None))
    assert_same(found, {m: generalized(d, WEIGHTS, normalize=True) for m, d in deltas(three).items()})
    assert recipe.adapters == ("a0", "a1", "a2")
    assert any("bfloat16" in remark for remark in recipe.remarks)


def test_weights_that_sum_to_one_need_no_normalising(three):
    found, _ = merged(three, config("linear", (0.5, 0.25, 0.25), normalize="false"))
    assert_same(found, {m: generalized(d, [0.5, 0.25, 0.25]) for m, d in deltas(three).items()})


@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic_is_lambda_times_the_weighted_sum(three, normalize):
    found, _ = merged(three, config("task_arithmetic", normalize=str(normalize).lower(), lambda_=0.7))
    assert_same(found, {m: generalized(d, WEIGHTS, normalize=normalize, reach=0.7) for m, d in deltas(three).items()})


def test_a_model_of_weight_zero_and_the_base_among_the_models_change_nothing(three):
    text = config("task_arithmetic", (2.0, 0.0, 0.5)).replace("models:\n", "models:\n  - model: org/base\n")
    found, recipe = merged(three, text)
    assert_same(found, {m: generalized(d, [2.0, 0.0, 0.5]) for m, d in deltas(three).items()})
    assert recipe.adapters == ("a0", "a1", "a2")


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_is_mergekits(three, density):
    found, _ = merged(three, config("ties", per_model=f", density: {density}", lambda_=1.5, int8_mask="true"), rank="9")
    expected = {m: generalized(d, WEIGHTS, density, True, True, 1.5) for m, d in deltas(three).items()}
    assert_same(found, expected)


def test_dare_that_drops_nothing_is_the_sum_or_the_elected_mean(three):
    found, recipe = merged(three, config("dare_linear", lambda_=0.4), rank="9")
    assert_same(found, {m: generalized(d, WEIGHTS, reach=0.4) for m, d in deltas(three).items()})
    assert any("L1" in remark for remark in recipe.remarks)
    (three / "out").rename(three / "before")
    found, _ = merged(three, config("dare_ties", normalize="true"), rank="9")
    assert_same(found, {m: generalized(d, WEIGHTS, elect=True, normalize=True) for m, d in deltas(three).items()})


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_those_that_agree_are_added_up_where_nothing_is_normalised(three, method):
    """What `dare_ties` does as it comes: no weight of those that disagree goes to the others."""
    density = {"ties": 0.4, "dare_ties": 1.0}[method]
    found, _ = merged(three, config(method, per_model=f", density: {density}", lambda_=0.7, normalize="false"), rank="9")
    assert_same(found, {m: generalized(d, WEIGHTS, density, True, False, 0.7) for m, d in deltas(three).items()})


@pytest.mark.parametrize(("method", "gamma"), [("ties", None), ("breadcrumbs", 0.1), ("breadcrumbs_ties", 0.1)])
@pytest.mark.parametrize("live", [3, 2])
def test_every_model_has_its_own_density(three, method, gamma, live):
    """Also where one of them counts for nothing, or has no density of its own."""
    own, weights = [0.2, 0.7, 1.0], [2.0 if live == 3 else 0.0, 1.0, 0.5]
    models = "".join(
        f"  - {{model: a{n}, parameters: {{weight: {weights[n]}{f', density: {density}' if n < 2 else ''}}}}}\n"
        for n, density in enumerate(own)
    )
    told = "" if gamma is None else f"parameters: {{gamma: {gamma}, normalize: true}}\n"
    found, recipe = merged(three, f"merge_method: {method}\nbase_model: org/base\nmodels:\n{models}{told}", rank="9")
    assert recipe.spec.densities == {"0": 0.2, "1": 0.7, "2": 1.0}
    elect, first = method != "breadcrumbs", 3 - live
    names = ("a0", "a1", "a2")[first:]
    expected = {
        m: generalized(d, weights[first:], own[first:], elect, True, gamma=gamma) for m, d in deltas(three, names).items()
    }
    assert_same(found, expected)


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.3), (0.2, 0.0), (1.0, 0.1)])
@pytest.mark.parametrize("normalize", [False, True])
def test_breadcrumbs_are_mergekits(three, density, gamma, normalize):
    for method, elect in (("breadcrumbs", False), ("breadcrumbs_ties", True)):
        per_model, flag = f", density: {density}, gamma: {gamma}", str(normalize).lower()
        found, _ = merged(three, config(method, per_model=per_model, lambda_=1.2, normalize=flag), rank="9")
        assert_same(
            found, {m: generalized(d, WEIGHTS, density, elect, normalize, 1.2, gamma) for m, d in deltas(three).items()}
        )
        shutil.rmtree(three / "out")


def test_breadcrumbs_as_they_come_drop_a_hundredth(three):
    found, _ = merged(three, config("breadcrumbs", per_model=", density: 0.6"), rank="9")
    assert_same(found, {m: generalized(d, WEIGHTS, 0.6, gamma=0.01) for m, d in deltas(three).items()})


@pytest.mark.parametrize("share", [None, 1.0, 0.6, 0.1])
def test_sce_is_mergekits(three, share):
    """Also around a seed; nobody has a weight of his own there."""
    for base, seed in (("org/base", None), ("org/base+seed", "seed")):
        found, recipe = merged(three, sce_config(share, base), rank="9")
        anchor = read_adapter(three / "seed") if seed else None
        expected = {m: sce(d, share or 1.0) for m, d in deltas(three, anchor=seed).items()}
        assert_same(found, {m: d + (anchor.delta(m).double() if anchor else 0.0) for m, d in expected.items()})
        assert any("1e-6" in remark for remark in recipe.remarks)
        shutil.rmtree(three / "out")


def sce_config(share, base="org/base"):
    told = "" if share is None else f"parameters: {{select_topk: {share}}}\n"
    return f"merge_method: sce\nbase_model: {base}\nmodels: [{{model: a0}}, {{model: a1}}, {{model: a2}}]\n{told}"


def test_model_stock_around_a_seed_is_mergekits(three):
    text = "merge_method: model_stock\nbase_model: org/base+seed\nmodels:\n" + "".join(
        f"  - model: org/base+a{n}\n" for n in range(3)
    )
    found, recipe = merged(three, text)
    seed = read_adapter(three / "seed")
    assert_same(found, {m: stock(d) + seed.delta(m).double() for m, d in deltas(three, anchor="seed").items()})
    assert (recipe.seed_adapter, recipe.base_model) == ("seed", "org/base")
    (three / "out").rename(three / "before")
    plain, again = merged(three, text.replace("org/base+", ""))
    assert_same(plain, found)
    assert (again.seed_adapter, again.base_model) == ("seed", None)


@pytest.mark.parametrize("rank", ["exact", "4"])
def test_nuslerp_and_multislerp_turn_the_deltas_as_mergekit_does(three, rank):
    for method, weights, formula in (
        ("nuslerp", (2.0, 0.5), nuslerp), ("multislerp", (2.0, 1.0, 0.5), multislerp), ("multislerp", (1.0, 3.0), multislerp),
    ):  # fmt: skip
        found, _ = merged(three, config(method, weights), rank)
        names = ("a0", "a1", "a2")[: len(weights)]
        expected = {m: formula(d, weights) for m, d in deltas(three, names).items()}
        if rank == "4":
            assert all(torch.linalg.matrix_rank(found[m], rtol=1e-5) <= 4 for m in MODULES)
            expected = {m: best_of(d, 4) for m, d in expected.items()}
        assert_same(found, expected)
        shutil.rmtree(three / "out")


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rank", ["exact", "3"])
def test_nuslerp_turns_rows_and_columns_each_by_its_own_angle(three, columns, rank):
    """And around a seed the changes from it; exactly, at the sum of the ranks."""
    for seed_name in (None, "seed"):
        base = "org/base+seed" if seed_name else "org/base"
        text = config("nuslerp", (2.0, 0.5), base, nuslerp_flatten="false", nuslerp_row_wise=str(columns).lower())
        found, _ = merged(three, text, rank)
        seed = read_adapter(three / "seed") if seed_name else None
        expected = {}
        for m, d in deltas(three, ("a0", "a1"), seed_name).items():
            lines = d.transpose(1, 2) if columns else d
            turned = torch.stack([nuslerp(lines[:, n], (2.0, 0.5)) for n in range(lines.shape[1])])
            whole = (turned.T if columns else turned) + (seed.delta(m).double() if seed else 0.0)
            expected[m] = whole if rank == "exact" else best_of(whole, 3)
        assert_same(found, expected)
        shutil.rmtree(three / "out")


def best_of(matrix, rank):
    left, values, right_t = torch.linalg.svd(matrix)
    return left[:, :rank] * values[:rank] @ right_t[:rank]


def test_nuslerp_around_a_seed_turns_the_changes_from_it(three):
    text = config("nuslerp", (1.0, 1.0), base="org/base+seed")
    found, _ = merged(three, text)
    seed = read_adapter(three / "seed")
    changes = deltas(three, ("a0", "a1"), anchor="seed")
    assert_same(found, {m: nuslerp(d, (1.0, 1.0)) + seed.delta(m).double() for m, d in changes.items()})


def test_filters_weigh_layers(three):
    text = """
merge_method: linear
models:
  - model: a0
    parameters:
      weight:
        - {filter: self_attn.q_proj.weight, value: 3}
        - {filter: layers.0, value: 0}
        - value: 1
  - model: a1
    parameters: {weight: 1}
  - model: a2
    parameters:
      weight: [{filter: self_attn.q_proj.weight, value: 0}, {filter: layers.0, value: 1}, {value: 0.5}]
"""
    found, _ = merged(three, text)
    d = deltas(three)
    expected = {m: generalized(d[m], [3, 1, 0], normalize=True) for m in MODULES if "q_proj" in m}
    expected[MODULES[1]] = generalized(d[MODULES[1]], [0, 1, 1], normalize=True)
    assert_same(found, expected)


REFUSED = {
    "a method of its own": (config("slerp"), "merge_method", "turns whole weights"),
    "a typo": (config("tise"), "merge_method", "did you mean 'ties'"),
    "no method": ("models: [{model: a0}]\n", "merge_method", "None is not known"),
    "our word": (config("consensus"), "merge_method", "--strategy consensus"),
    "nuslerp of whole weights": (config("nuslerp", (1.0, 1.0), base=None), "base_model", "adds to a base"),
    "nuslerp of three": (config("nuslerp"), "models", "for two models"),
    "nuslerp by word": (config("nuslerp", (1.0, 1.0), nuslerp_flatten="rows"), "nuslerp_flatten", "neither true nor false"),
    "multislerp of no shares": (config("multislerp", normalize_weights="false"), "normalize_weights", "shares of a whole"),
    "no base": (config("ties", base=None), "base_model", "adds to a base"),
    "slices": ("slices: []\nmerge_method: linear\n", "slices", "under `models`"),
    "an unknown key": (config("linear") + "weigth: 1\n", "weigth", "unknown key"),
    "a tokenizer": (config("linear") + "tokenizer_source: union\n", "tokenizer_source", "vocabulary"),
    "an odd dtype": (config("linear").replace("bfloat16", "int3"), "dtype", "int3"),
    "no models": ("merge_method: linear\nmodels: []\n", "models", "missing"),
    "a model without a name": ("merge_method: linear\nmodels: [{modle: a}]\n", "models.0", "write `model: ADAPTER`"),
    "no weight": ("merge_method: linear\nmodels: [{model: a0}]\n", "models.0", "weight is missing"),
    "a negative weight": (config("linear", (1.0, -1.0)), "models.1.parameters.weight", "out of reach"),
    "weights of nothing": (config("linear", (0.0, 0.0)), "models", "are 0"),
    "a text for a weight": (config("linear", ("x", 1.0)), "models.0.parameters.weight", "'x' is no number"),
    "a gradient": (config("linear", ([0, 1], 1.0)), "models.0.parameters.weight", "gradient"),
    "a gradient of densities": (config("ties", per_model=", density: [0.1, 1]"), "density", "gradient"),
    "sums that scale the base": (config("linear", normalize="false"), "parameters.normalize", "scale the base"),
    "breadcrumbs rescaled": (config("breadcrumbs", rescale="true"), "parameters.rescale", "as they are"),
    "two gammas": (
        "merge_method: breadcrumbs\nbase_model: b\nmodels: [{model: a0, parameters: {weight: 1, gamma: 0.1}},"
        " {model: a1, parameters: {weight: 1}}]\n", "models.1.parameters.gamma", "gammas differ",
    ),
    "a gamma of all": (config("breadcrumbs", gamma=2), "parameters.gamma", "out of reach"),
    "ties rescaled": (config("ties", rescale="true"), "parameters.rescale", "as they are"),
    "dare not rescaled": (config("dare_linear", rescale="false"), "parameters.rescale", "rescales"),
    "a density of nothing": (config("ties", density=0), "parameters.density", "above 0"),
    "a lambda below": (config("ties", lambda_=-1), "parameters.lambda", "out of reach"),
    "no flag": (config("ties", normalize=1), "parameters.normalize", "neither true nor false"),
    "another method's parameter": (config("linear", density=0.5), "parameters.density", "unknown here"),
    "sce of nothing": (sce_config(0), "parameters.select_topk", "above 0"),
    "sce with weights": (config("sce"), "models.0.parameters.weight", "unknown here"),
    "sce with a density": (sce_config(1).replace("select_topk", "density"), "parameters.density", "unknown here"),
    "filter-wise": (
        "merge_method: model_stock\nbase_model: b\nmodels: [{model: a0}]\nparameters: {filter_wise: true}\n",
        "filter_wise", "away from each other",
    ),
    "a density of too much": (
        "merge_method: ties\nbase_model: b\nmodels: [{model: a0, parameters: {weight: 1, density: 0.5}},"
        " {model: a1, parameters: {weight: 1, density: 1.5}}]\n", "models.1.parameters.density", "at most 1",
    ),
    "filters that end nowhere": (
        "merge_method: linear\nmodels: [{model: a0, parameters: {weight: [{filter: mlp, value: 1}]}}]\n",
        "models.0.parameters.weight", "without a filter",
    ),
    "filters that differ": (
        "merge_method: linear\nmodels: [{model: a0, parameters: {weight: [{filter: mlp, value: 1}, {value: 2}]}},"
        " {model: a1, parameters: {weight: [{filter: attn, value: 1}, {value: 2}]}}]\n",
        "models.1.parameters.weight", "filters differ",
    ),
    "a filter that is a pattern": (
        "merge_method: linear\nmodels: [{model: a0, parameters: {weight: [{filter: 'a*[b]', value: 1}, {value: 2}]}}]\n",
        "filter", "no part of a tensor",
    ),
    "two bases": ("merge_method: linear\nmodels: [{model: x+a0}, {model: y+a1}]\n", "models.1.model", "not 'x'"),
    "filtered sums": (
        "merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a0, parameters: {weight: [{filter: mlp, value: 1},"
        " {value: 2}]}}]\n", "parameters.normalize", "normalize: true",
    ),
    "no YAML": ("merge_method: [", "config.yaml:", "not YAML"),
    "a list": ("- a\n", "config.yaml:1", "mapping"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_means_something_else_is_refused_by_its_key(tmp_path, wrong):
    text, key, word = REFUSED[wrong]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_mergekit(tmp_path / "config.yaml")
    assert key in str(refused.value)
    assert word in str(refused.value)


def test_every_other_method_has_its_reason(tmp_path):
    assert not set(KNOWN) & set(OTHERWISE)
    for method in OTHERWISE:
        (tmp_path / "config.yaml").write_text(config(method))
        with pytest.raises(ConfigError, match="means something else"):
            read_mergekit(tmp_path / "config.yaml")


def test_dense_rules_have_a_rank_and_adapters_of_another_base_are_refused(three):
    with pytest.raises(ConfigError, match="has full rank"):
        merged(three, config("ties"))
    with pytest.raises(ConfigError, match="rank"):
        merged(three, config("linear"), rank="many")
    with pytest.raises(MergeError, match="not of 'org/other'"):
        merged(three, config("ties", base="org/other"), rank="9")
    with pytest.raises(ConfigError, match="no such file"):
        read_mergekit(three / "absent.yaml")
    assert not (three / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "model_stock",
     "multislerp", "nuslerp rows", "nuslerp columns", "sce", "sce selected"],
)  # fmt: skip
def test_mergekit_itself_gives_the_same_on_dense_weights(three, method):
    """Its own operators, fed with base + delta; mergekit is no dependency of ours, and this says so where it is absent."""
    pytest.importorskip("mergekit", reason="mergekit is not installed: pip install mergekit into an environment of its own")
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.registry import get

    base = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weights = {} if method in ("model_stock", "sce", "sce selected") else {"weight": dict(enumerate(WEIGHTS))}
    settings = {
        "ties": {"density": dict.fromkeys(range(3), 0.4), "lambda": 1.3}, "task_arithmetic": {"lambda": 0.6},
        "breadcrumbs": {"density": dict.fromkeys(range(3), 0.6), "gamma": dict.fromkeys(range(3), 0.1)},
        "breadcrumbs_ties": {"density": dict.fromkeys(range(3), 0.6), "gamma": dict.fromkeys(range(3), 0.1)},
        "nuslerp rows": {"nuslerp_flatten": False},
        "nuslerp columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        "sce selected": {"select_topk": 0.4},
    }.get(method, {})  # fmt: skip
    expected, own = {}, method.split()[0]
    names = ("a0", "a1") if own == "nuslerp" else ("a0", "a1", "a2")
    weights = {key: dict(list(value.items())[: len(names)]) for key, value in weights.items()}
    for m, d in deltas(three, names).items():
        if method == "linear":
            group = TensorGroup.from_tensors([base + x for x in d])
        else:
            group = TensorGroup.from_tensors([base, *(base + x for x in d)], ids=["base", *range(len(d))], base_index=0)
        (whole,) = get(own)([group], parameters={**weights, **settings})
        expected[m] = whole - base
    text = {
        "ties": config("ties", per_model=", density: 0.4", lambda_=1.3),
        "task_arithmetic": config("task_arithmetic", lambda_=0.6),
        "breadcrumbs": config("breadcrumbs", per_model=", density: 0.6, gamma: 0.1"),
        "breadcrumbs_ties": config("breadcrumbs_ties", per_model=", density: 0.6, gamma: 0.1"),
        "nuslerp rows": config("nuslerp", (2.0, 1.0), nuslerp_flatten="false"),
        "nuslerp columns": config("nuslerp", (2.0, 1.0), nuslerp_flatten="false", nuslerp_row_wise="true"),
        "sce": sce_config(None),
        "sce selected": sce_config(0.4),
        "model_stock": "merge_method: model_stock\nbase_model: org/base\nmodels: [{model: a0}, {model: a1}, {model: a2}]\n",
    }.get(method) or config(method)
    assert_same(merged(three, text, rank="9")[0], expected)
