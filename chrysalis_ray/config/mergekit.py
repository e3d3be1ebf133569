"""Configs as mergekit reads them (github.com/arcee-ai/mergekit, 0.1), where they mean the same for LoRA adapters of one base.

mergekit merges whole models, and an adapter as the model that it makes of its base: `model: org/base+folder`. What adds deltas
from a base, or turns them around it (`nuslerp` and `multislerp` with a `base_model`), does alike for adapters, which is exact
and needs no base. What looks at whole weights (its `slerp`, `karcher`),
stacks layers (`slices`, `passthrough`), or works by a formula of its own (`della`, `ram`, ...) means something else, and is
refused by the name of its key. Weights can be `filter`ed: `filter: self_attn` is `*self_attn*` of `layer_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chrysalis_ray.config.merges import METHOD_NAMES, Merge, make_merge
from chrysalis_ray.config.problems import Location, problem_at, suggestion
from chrysalis_ray.config.yaml_tree import Node, YamlRefused, read_tree
from chrysalis_ray.core.errors import ConfigError

OTHERWISE = {  # merge_method -> why it is not the same here
    "slerp": "it turns whole weights, base included, so that two adapters of one base lie at an angle of about 0; `--strategy "
             "slerp` turns their deltas",
    "karcher": "it turns whole weights, base included; `--strategy slerp` is the Karcher mean of the deltas",
    "della": "it rescales what it kept by the norm of the whole tensor, the paper and `--strategy della` each entry by its own "
             "chance",
    "della_linear": "it elects no sign and rescales by the norm of the whole tensor; `--strategy della` is the paper's",
    "passthrough": "it stacks layers of models, and the base of an adapter stays as it is",
    "nearswap": "it moves whole weights near each other",
    "arcee_fusion": "it selects entries of whole weights",
    "ram": "it averages entries by how many models changed them at all, and of a LoRA delta every entry is changed",
    "ramplus_tl": "it averages entries by how many models changed them at all, and of a LoRA delta every entry is changed",
}  # fmt: skip
KNOWN = (
    "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "model_stock",
    "nuslerp", "multislerp", "sce",
)  # fmt: skip
ENTRIES = ("ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties")  # rules on entries
ELECTED = ("ties", "dare_ties", "breadcrumbs_ties")
SPHERICAL = {"nuslerp": "pair", "multislerp": "chord"}  # `mean` of our slerp
# parameters that a method has, and those of them that hold for one model
SHARED = {
    "linear": ("normalize",),
    "task_arithmetic": ("normalize", "lambda", "int8_mask"),
    "ties": ("normalize", "lambda", "int8_mask", "density", "rescale"),
    "dare_linear": ("normalize", "lambda", "int8_mask", "density", "rescale"),
    "dare_ties": ("normalize", "lambda", "int8_mask", "density", "rescale"),
    "breadcrumbs": ("normalize", "lambda", "int8_mask", "density", "gamma", "rescale"),
    "breadcrumbs_ties": ("normalize", "lambda", "int8_mask", "density", "gamma", "rescale"),
    "model_stock": ("filter_wise",),
    "nuslerp": ("nuslerp_row_wise", "nuslerp_flatten"),
    "multislerp": ("normalize_weights", "eps"),
    "sce": ("select_topk", "int8_mask"),
}
WEIGHTLESS = ("model_stock", "sce")  # where a model has no weight that a person could write
NORMALIZED = {
    "linear": True, "task_arithmetic": False, "ties": True, "dare_linear": False, "dare_ties": False,
    "breadcrumbs": False, "breadcrumbs_ties": False, "nuslerp": True, "multislerp": True,
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16", "float64")
TOP = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
ELSEWHERE = {
    "slices": "layers are not taken apart here: list the adapters under `models`",
    "modules": "an adapter has one set of modules: list the adapters under `models`",
    "tokenizer": "an adapter has no tokenizer of its own; leave it out",
    "chat_template": "an adapter has no chat template of its own; leave it out",
}
Settings = dict[str, Any]  # of a merge of ours
Rule = tuple[str, float]  # a pattern of module names, and the weight of the modules that it fits
WEIGHT_END = ".weight"  # mergekit filters tensors, `layer_weights` modules


@dataclass(frozen=True)
class Recipe:
    """A mergekit config as a merge of ours. `given` are weights of the adapters, None where all count alike or by layer.

    `base_model` is what the adapters must be of, None if the file does not say. `remarks` tell what was left aside.
    """

    adapters: tuple[str, ...]
    seed_adapter: str | None
    base_model: str | None
    spec: Merge
    given: tuple[float, ...] | None
    remarks: tuple[str, ...]


class _Refused(Exception):
    def __init__(self, path: Location, what: str) -> None:
        super().__init__(what)
        self.path, self.what = path, what


def read_mergekit(path: Path, rank: str | None = None) -> Recipe:
    """The merge that a mergekit config asks for, cut to `rank`. Raises ConfigError with line and key for any other meaning."""
    try:
        _, tree = read_tree(path, str(path))
    except YamlRefused as refused:
        raise ConfigError(f"1 problem in {path}:\n  {refused.where}: {refused.what}", problems=(refused.what,)) from refused
    problems = list(tree.problems)
    if not problems:
        try:
            return _recipe(tree.root, rank)
        except _Refused as refused:
            problems.append(problem_at(tree.root, refused.path, refused.what))
    raise ConfigError("\n  ".join((f"{path} cannot be merged like that:", *problems)), problems=tuple(problems))


def _recipe(root: Node, rank: str | None) -> Recipe:
    data = root.data()
    for key in data:
        if key in ELSEWHERE:
            raise _Refused((key,), ELSEWHERE[key])
        if key not in TOP:
            raise _Refused((key,), f"unknown key; {suggestion(key, TOP)}")
    method = _method(data)
    remarks = _remarks(data, method)
    base = data.get("base_model")
    if method != "linear" and not isinstance(base, str):
        raise _Refused(
            ("base_model",), f"`{method}` adds to a base: write the base of the adapters, or base+adapter for a seed"
        )
    adapters, base_name, seed = _adapters(data, base)
    settings, given = _settings(data, method, [position for position, _ in adapters])
    ours = {
        "linear": "ensemble", "dare_linear": "dare", "dare_ties": "dare", "breadcrumbs_ties": "breadcrumbs",
        "nuslerp": "slerp", "multislerp": "slerp",
    }.get(method, method)  # fmt: skip
    if rank is not None:
        settings["rank"] = int(rank) if rank.isascii() and rank.isdecimal() else rank
    return Recipe(
        tuple(name for _, name in adapters), seed, base_name, make_merge({"method": ours, **settings}), given, tuple(remarks)
    )


def _method(data: Mapping[str, Any]) -> str:
    method = data.get("merge_method")
    if method in OTHERWISE:
        raise _Refused(("merge_method",), f"mergekit's {method} means something else than any merge here: {OTHERWISE[method]}")
    if method not in KNOWN:
        known = (*KNOWN, *OTHERWISE)
        own = f" (`--strategy {method}` is no config's)" if method in METHOD_NAMES else ""
        raise _Refused(("merge_method",), f"{method!r} is not known{own}; {suggestion(str(method), known)}")
    return str(method)


def _remarks(data: Mapping[str, Any], method: str) -> list[str]:
    remarks = []
    for key in ("dtype", "out_dtype"):
        if key in data and str(data[key]).removeprefix("torch.") not in DTYPES:
            raise _Refused((key,), f"{data[key]!r} is none of {', '.join(DTYPES)}")
        if key in data:
            remarks.append(f"{key}: {data[key]} is left aside: sums are made in fp64, and the adapter is written in fp32")
    source = data.get("tokenizer_source")
    if source not in (None, "base"):
        raise _Refused(("tokenizer_source",), f"{source!r} would change the vocabulary, which an adapter cannot; write base")
    if method == "model_stock":
        remarks.append("where adapters point away from each other, mergekit goes against their mean, and this merge returns to "
                       "the seed")  # fmt: skip
    if method.startswith("dare"):
        remarks.append("mergekit draws other numbers, and rescales by the L1 norm that is left instead of 1/density")
    if method == "sce":
        remarks.append("mergekit counts all models alike where their mean squares sum to less than 1e-6, this merge never")
    return remarks


def _adapters(data: Mapping[str, Any], base: object) -> tuple[list[tuple[int, str]], str | None, str | None]:
    """(place under `models`, folder) of every adapter, the base's name, and the seed adapter."""
    models = data.get("models")
    if not isinstance(models, tuple) or not models:
        raise _Refused(("models",), "a list of `- model: ADAPTER` is missing")
    base_name, seed = _parted(base) if isinstance(base, str) else (None, None)
    if base_name is not None and seed is None and (Path(base_name) / "adapter_config.json").is_file():
        base_name, seed = None, base_name
    adapters = []
    for place, entry in enumerate(models):
        at: Location = ("models", place)
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise _Refused(at, "write `model: ADAPTER`, a PEFT folder or a hub id, or base+adapter")
        strangers = [key for key in entry if key not in ("model", "parameters")]
        if strangers:
            raise _Refused((*at, strangers[0]), f"unknown key; {suggestion(strangers[0], ('model', 'parameters'))}")
        if entry["model"] == base:
            continue  # mergekit lists the base among the models, and leaves it out again
        own_base, adapter = _parted(entry["model"])
        if adapter is None:
            adapters.append((place, entry["model"]))
            continue
        if base_name is not None and own_base != base_name:
            raise _Refused((*at, "model"), f"its base {own_base!r} is not {base_name!r}, that of the others")
        base_name = own_base
        adapters.append((place, adapter))
    if not adapters:
        raise _Refused(("models",), "there is no adapter beside the base")
    return adapters, base_name, seed


def _parted(name: str) -> tuple[str, str | None]:
    """base and adapter of ``base+adapter``; a plain name has no adapter."""
    base, plus, adapter = name.partition("+")
    return (base, adapter) if plus else (name, None)


def _settings(data: Mapping[str, Any], method: str, places: Sequence[int]) -> tuple[Settings, tuple[float, ...] | None]:
    """The settings of our method, and the adapters' weights where they are the same in all layers."""
    shared = data.get("parameters") or {}
    allowed = SHARED[method]
    per_model = {"weight", "density", "gamma"} & {*allowed, *(() if method in WEIGHTLESS else ("weight",))}
    _known(("parameters",), shared, {*allowed, *per_model})
    own = {place: data["models"][place].get("parameters") or {} for place in places}
    for place, values in own.items():
        _known(("models", place, "parameters"), values, per_model)
    if method == "model_stock":
        if shared.get("filter_wise", False):
            raise _Refused(
                ("parameters", "filter_wise"), "rows of deltas point away from each other as often as not, where mergekit goes "
                "against their mean and `model_stock` here returns to the seed; leave it out",
            )  # fmt: skip
        return {}, None
    if method == "sce":
        selected = _number(("parameters", "select_topk"), shared.get("select_topk", 1.0), least=0.0, most=1.0)
        return {"density": selected, "space": "dense"}, None
    if method in SPHERICAL:
        _refuse_other_spheres(shared, method, len(places))
    normalize = _flag(shared, "normalize", NORMALIZED[method])
    reach = _number(("parameters", "lambda"), shared.get("lambda", 1.0), least=0.0)
    settings = _rule_settings(shared, own, method, normalize)
    rules = {place: _weight_rules(shared, values, place) for place, values in own.items()}
    given, layers = _weights(rules, list(places))
    total = math.fsum(given) if given is not None else 1.0
    if not normalize and layers:
        raise _Refused(("parameters", "normalize"), "filtered weights that are not normalised sum to another length in every "
                       "layer; write normalize: true")  # fmt: skip
    if method == "linear" and not normalize and not math.isclose(total, 1.0, rel_tol=1e-6):
        raise _Refused(("parameters", "normalize"), f"the weights sum to {total:g}, which would scale the base as well; write "
                       "normalize: true")  # fmt: skip
    length = reach if normalize else reach * total
    if method == "task_arithmetic":
        live = sum(weight > 0.0 for weight in given) if given is not None else len(places)
        settings["coefficient"] = length / live
    elif method in SPHERICAL:
        settings |= {"mean": SPHERICAL[method], **_along(shared, method)}
    elif method != "linear":
        settings["scale"] = length
    return {**settings, **({"layer_weights": layers} if layers else {})}, given


def _refuse_other_spheres(shared: Mapping[str, Any], method: str, count: int) -> None:
    """What nuslerp and multislerp can be told that would be another merge."""
    if method == "nuslerp" and count != 2:
        raise _Refused(
            ("models",), f"nuslerp is for two models beside the base, here are {count}; `multislerp` takes any number"
        )
    if method == "multislerp" and not _flag(shared, "normalize_weights", True):
        raise _Refused(("parameters", "normalize_weights"), "weights are shares of a whole here; write normalize_weights: true")


def _along(shared: Mapping[str, Any], method: str) -> Settings:
    """Whether nuslerp turns a module as one, or each of its rows or columns: what it calls row-wise goes along dimension 0."""
    if method != "nuslerp":
        return {}
    columns = _flag(shared, "nuslerp_row_wise", False)
    return {} if _flag(shared, "nuslerp_flatten", True) else {"along": "columns" if columns else "rows"}


def _rule_settings(shared: Mapping[str, Any], own: Mapping[int, Mapping[str, Any]], method: str, normalize: bool) -> Settings:
    """What rules on entries have beside weights: shares of entries, how kept entries are rescaled, and what is made of those
    that agree."""
    if method not in ENTRIES:
        return {}
    random = method.startswith("dare")
    if _flag(shared, "rescale", random) != random:
        meant = "rescales what it keeps; write true" if random else "keeps entries as they are; leave it out"
        raise _Refused(("parameters", "rescale"), f"`{method}` here {meant}")
    densities = list(_shares(shared, own, "density", 1.0).values())
    settings: Settings = {"density": densities[0], "space": "dense"}
    if len(set(densities)) > 1:
        settings["densities"] = {str(n): density for n, density in enumerate(densities)}
    if method.startswith("breadcrumbs"):
        settings["outliers"] = _one_for_all(shared, own, "gamma", 0.01)
    if method in ELECTED:
        settings |= {"agreeing": "mean" if normalize else "sum", **({} if method == "ties" else {"signs": "elected"})}
    return settings


def _one_for_all(shared: Mapping[str, Any], own: Mapping[int, Mapping[str, Any]], key: str, default: float) -> float:
    """A share of the entries, which may be written for every model but is one and the same here."""
    found = _shares(shared, own, key, default)
    first = next(iter(found.values()))
    other = next((place for place, value in found.items() if value != first), None)
    if other is not None:
        different = sorted(set(found.values()))
        raise _Refused(("models", other, "parameters", key), f"{key}s differ ({different}); here all adapters have the same")
    return first


def _shares(shared: Mapping[str, Any], own: Mapping[int, Mapping[str, Any]], key: str, default: float) -> dict[int, float]:
    """A share of the entries by the place of every model."""
    found = {}
    for place, values in own.items():
        at: Location = ("models", place, "parameters", key) if key in values else ("parameters", key)
        found[place] = _number(at, values.get(key, shared.get(key, default)), least=0.0, most=1.0)
    return found


def _weight_rules(shared: Mapping[str, Any], values: Mapping[str, Any], place: int) -> list[Rule]:
    """(filter, weight) in the order in which they are tried; a plain number is one filter that fits all."""
    at: Location = ("models", place, "parameters", "weight") if "weight" in values else ("parameters", "weight")
    value = values.get("weight", shared.get("weight"))
    if value is None:
        raise _Refused(("models", place), "its weight is missing: parameters: {weight: 1.0}")
    if isinstance(value, dict):
        value = (value,)
    if not isinstance(value, tuple):
        return [("*", _number(at, value, least=0.0))]
    rules = []
    for number, rule in enumerate(value):
        if not isinstance(rule, dict):
            raise _Refused(at, "a list of numbers is a gradient over all layers of the base, which is not loaded; write a "
                           "`filter` for each layer")  # fmt: skip
        _known((*at, number), rule, {"filter", "value"})
        if "value" not in rule:
            raise _Refused((*at, number), "`value` is missing")
        rules.append((_pattern((*at, number, "filter"), rule.get("filter")), _number((*at, number), rule["value"], least=0.0)))
    if not rules or rules[-1][0] != "*":
        raise _Refused(at, "modules that no filter fits would have no weight; end with `- value: ...`, without a filter")
    return rules


def _pattern(at: Location, text: object) -> str:
    """The pattern of whole module names that a filter, part of a tensor's name, means."""
    if text in (None, "*"):
        return "*"
    if not isinstance(text, str) or not text or not all(c.isascii() and (c.isalnum() or c in "_.") for c in text):
        raise _Refused(at, f"{text!r} is no part of a tensor's name")
    return f"*{text.removesuffix(WEIGHT_END)}" if text.endswith(WEIGHT_END) else f"*{text}*"


def _weights(
    rules: Mapping[int, Sequence[Rule]], places: Sequence[int]
) -> tuple[tuple[float, ...] | None, tuple[Settings, ...]]:
    """Plain weights of all adapters, or `layer_weights`. Filters must be the same for every adapter that has any."""
    filters = next(([pattern for pattern, _ in rules[place]] for place in places if len(rules[place]) > 1), ["*"])
    columns = []
    for place in places:
        own = rules[place]
        if len(own) > 1 and [pattern for pattern, _ in own] != filters:
            at: Location = ("models", place, "parameters", "weight")
            raise _Refused(at, "its filters differ from those of the adapter before; give all the same filters, in one order")
        columns.append([weight for _, weight in own] if len(own) > 1 else [own[0][1]] * len(filters))
    rows = list(zip(filters, zip(*columns, strict=True), strict=True))
    for pattern, weights in rows:
        if not any(weights):
            raise _Refused(("models",), f"all weights of {pattern!r} are 0")
    if len(rows) == 1:
        return tuple(rows[0][1]), ()
    return None, tuple(
        {"modules": pattern, "weights": {str(n): weight for n, weight in enumerate(weights)}} for pattern, weights in rows
    )


def _known(at: Location, values: object, allowed: set[str]) -> None:
    if not isinstance(values, dict):
        raise _Refused(at, "a mapping `key: value` was meant")
    for key in values:
        if key not in allowed:
            raise _Refused((*at, key), f"unknown here; {suggestion(key, sorted(allowed))}")


def _flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise _Refused(("parameters", key), f"{value!r} is neither true nor false")
    return value


def _number(at: Location, value: object, least: float, most: float = math.inf) -> float:
    if isinstance(value, tuple):
        raise _Refused(at, "a list is a gradient over all layers of the base, which is not loaded; write one number")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Refused(at, f"{value!r} is no number")
    if value < least or value > most or (at[-1] in ("lambda", "density", "select_topk") and value == 0):
        raise _Refused(at, f"{value:g} is out of reach here; deltas are neither taken away nor dropped: give a number above 0"
                       + (f" and at most {most:g}" if math.isfinite(most) else ""))  # fmt: skip
    return float(value)
