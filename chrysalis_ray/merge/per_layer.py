"""Weights that differ from module to module: written for patterns of names, or taken from every module's own geometry.

Learned soups and LoRA soups (arXiv 2203.05482, 2410.13025) weigh every layer on its own, mergekit by filters on names. Modules
of equal weights are merged together by `merge_modules`, as an adapter of their own, and put side by side again: a merge is
separable over modules, so that nothing is lost by it, and every method can be had per layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TypeVar

import torch

from chrysalis_ray.config.merges import DensityMerge, LayerWeights, Merge, SeveralMerge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.merge.core_space import Factors, check_module
from chrysalis_ray.merge.finished import FinishedModules
from chrysalis_ray.merge.gram import Adapter, gram_of_changes, gram_of_module
from chrysalis_ray.merge.inputs import Inputs
from chrysalis_ray.merge.run import MergeResult, merge_modules
from chrysalis_ray.merge.weights import given_weights, weigh

Several = TypeVar("Several", bound=SeveralMerge)
ModuleWeights = Mapping[str, Sequence[float]]  # module -> one weight per member


class SomeModules(Mapping[str, Factors]):
    """An adapter as if it had no other modules than some; nothing is read before it is asked for."""

    def __init__(self, adapter: Adapter, modules: Sequence[str]) -> None:
        self._adapter, self._modules = adapter, [module for module in modules if module in adapter]

    def __getitem__(self, module: str) -> Factors:
        if module not in self._modules:
            raise KeyError(module)
        return self._adapter[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def merge_adapters(
    config: Merge,
    names: Sequence[str],
    members: Sequence[Adapter],
    scales: Sequence[float],
    anchor: Adapter | None,
    anchor_scale: float,
    scores: Sequence[float] | None,
    rank: int,
    given: Sequence[float] | None = None,
    by_module: ModuleWeights | None = None,
    inputs: Inputs | None = None,
    finished: FinishedModules | None = None,
) -> MergeResult:
    """`merge_modules` of members called `names`, with weights per module where there are any.

    `by_module` comes before what `config` says: its `layer_weights`, and `per: module`, the weights from the Gram matrix of
    each module alone. Modules that none of them names have the weights of the whole adapter. Raises MergeError as
    `merge_modules` does, and for `layer_weights` that weigh none of the members.
    """
    if isinstance(config, DensityMerge):
        config = config.numbered(names)
    own: dict[str, Sequence[float]] = dict(by_module or {})
    if not own and isinstance(config, SeveralMerge) and (config.layer_weights or config.per == "module"):
        own |= weights_by_module(config, names, members, scales, anchor, anchor_scale, scores)
    if not own:
        return merge_modules(config, members, scales, anchor, anchor_scale, scores, rank, given, inputs, finished)
    modules = sorted({module for member in members for module in member} | set(anchor or {}))
    if given is None and any(module not in own for module in modules):
        given, _ = weigh(config, len(members), scores, lambda: gram_of_changes(members, scales, anchor, anchor_scale))
    groups: dict[tuple[float, ...], list[str]] = {}
    for module in modules:
        weights = own.get(module, given)
        assert weights is not None
        groups.setdefault(tuple(given_weights(weights, len(members))), []).append(module)
    parts = {}
    for weights, some in groups.items():
        heard = [module for module in some if _is_there(module, weights, members, anchor)]
        if heard:
            own_members = [SomeModules(member, heard) for member in members]
            own_anchor = None if anchor is None else SomeModules(anchor, heard)
            parts[weights] = merge_modules(
                config, own_members, scales, own_anchor, anchor_scale, scores, rank, weights, inputs, finished
            )  # fmt: skip
    if not parts:
        raise MergeError("the adapters of positive weight have no module", "give other weights")
    return side_by_side(parts, [sum(bool(module in member) for module in modules) for member in members], len(modules))


def weights_by_module(
    config: Merge, names: Sequence[str], members: Sequence[Adapter], scales: Sequence[float], anchor: Adapter | None,
    anchor_scale: float, scores: Sequence[float] | None,
) -> dict[str, list[float]]:  # fmt: skip
    """The weights that `layer_weights` write and `per: module` finds; modules of neither are absent."""
    assert isinstance(config, SeveralMerge)
    found: dict[str, list[float]] = {}
    for module in sorted({module for member in members for module in member} | set(anchor or {})):
        written = written_weights(config.layer_weights, module, names)
        if written is not None:
            found[module] = written
        elif config.per == "module":
            blocks, seed = [member.get(module) for member in members], anchor.get(module) if anchor else None
            check_module(module, [*blocks, seed])
            gram = partial(gram_of_module, blocks, scales, seed, anchor_scale)
            found[module], _ = weigh(config, len(members), scores, gram)
    return found


def written_weights(layers: Sequence[LayerWeights], module: str, names: Sequence[str]) -> list[float] | None:
    """The weights of the first pattern that fits, one per member; None if none does. Members go by name or by number.

    Raises MergeError if it weighs no member of this merge.
    """
    for layer in layers:
        if fnmatchcase(module, layer.modules):
            weights = [layer.weights.get(name, layer.weights.get(str(n), 0.0)) for n, name in enumerate(names)]
            if not any(weights):
                raise MergeError(
                    f"layer_weights of {layer.modules!r} weigh {', '.join(layer.weights)}, and none of them takes part",
                    f"name some of those that do: {', '.join(names)}; best_share: 1 lets all of them",
                )
            return weights
    return None


def check_names(config: SeveralMerge, known: Sequence[str]) -> None:
    """Raises MergeError for a name in `layer_weights` or `densities` that is neither one of `known` nor the number of one."""
    places = [(f"layer_weights of {layer.modules!r}", list(layer.weights)) for layer in config.layer_weights]
    if isinstance(config, DensityMerge):
        places.append(("densities", list(config.densities)))
    for place, names in places:
        strangers = [name for name in names if name not in known and not _is_number_below(name, len(known))]
        if strangers:
            raise MergeError(
                f"{place} name {strangers[0]!r}, which is none of the {len(known)} adapters",
                f"they are {', '.join(known)}; numbers count from 0",
            )


def by_name(config: Several, known: Sequence[str]) -> Several:
    """The same with `layer_weights` and `densities` by name alone, where some of `known` take part and some do not: a number
    is a place among all of them. Names are those that `check_names` let pass, each of one adapter."""

    def named(own: Mapping[str, float]) -> dict[str, float]:
        numbered = {known[int(key)]: value for key, value in own.items() if key not in known}
        return numbered | {key: value for key, value in own.items() if key in known}

    update: dict[str, object] = {}
    if config.layer_weights:
        update["layer_weights"] = tuple(
            layer.model_copy(update={"weights": named(layer.weights)}) for layer in config.layer_weights
        )
    if isinstance(config, DensityMerge) and config.densities:
        update["densities"] = named(config.densities)
    return config.model_copy(update=update) if update else config


def _is_number_below(name: str, count: int) -> bool:
    return name.isascii() and name.isdecimal() and int(name) < count


def _is_there(module: str, weights: Sequence[float], members: Sequence[Adapter], anchor: Adapter | None) -> bool:
    """Whether anybody who counts has the module: else it is a delta of zero, which needs no tensor."""
    heard = any(weight > 0.0 and module in member for weight, member in zip(weights, members, strict=True))
    return heard or (anchor is not None and module in anchor)


def side_by_side(parts: Mapping[tuple[float, ...], MergeResult], has: Sequence[int], modules: int) -> MergeResult:
    """Merges of disjoint modules as one, at the largest of their ranks. Weights are the mean over modules.

    The residual is over the whole adapter; what each part has to tell stands in `notes` under `layers`, in order of modules.
    """
    rank = max(result.rank for result in parts.values())
    per_module = {module: facts for result in parts.values() for module, facts in result.per_module.items()}
    energy = math.fsum(facts["norm"] ** 2 for facts in per_module.values())
    lost = math.fsum((facts["norm"] * facts["residual"]) ** 2 for facts in per_module.values())
    share = lost / energy if energy else 0.0
    count = sum(len(result.factors) for result in parts.values())
    weights = [
        math.fsum(own[n] * len(result.factors) for own, result in parts.items()) / count for n in range(len(next(iter(parts))))
    ]
    layers = [
        {"first_module": min(result.factors), "modules": len(result.factors), "weights": list(own), **_told(result)}
        for own, result in sorted(parts.items(), key=lambda part: min(part[1].factors))
    ]
    live = [n for n, weight in enumerate(weights) if weight > 0.0]
    notes = {"method": next(iter(parts.values())).notes["method"], "members": len(live), "layers": layers}
    missing = {str(n): modules - has[n] for n in live if has[n] < modules}
    if missing:
        notes["modules_missing_as_zero"] = missing
    factors = {module: wider(pair, rank) for result in parts.values() for module, pair in result.factors.items()}
    ordered = {module: factors[module] for module in sorted(factors)}
    return MergeResult(
        ordered, rank, weights, math.sqrt(share), 1.0 - share, {module: per_module[module] for module in ordered}, notes
    )


def _told(result: MergeResult) -> dict[str, object]:
    return {key: value for key, value in result.notes.items() if key not in ("method", "modules_missing_as_zero")}


def wider(factors: Factors, rank: int) -> Factors:
    """The same delta with zero rows and columns up to `rank`."""
    a_ri, b_or = factors
    short = rank - a_ri.shape[0]
    pad = torch.nn.functional.pad
    return (pad(a_ri, (0, 0, 0, short)), pad(b_or, (0, short))) if short else factors
