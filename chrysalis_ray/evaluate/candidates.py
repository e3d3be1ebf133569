"""Candidates: every merge that the experiment asks for, made of variants that are good enough, and the choice among them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from chrysalis_ray.config.merges import EnsembleMerge, Merge, SeveralMerge
from chrysalis_ray.core.errors import EvaluationError, MergeError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.evaluate.function_check import refused_by_divergence
from chrysalis_ray.evaluate.greedy import Trial, greedy_members, is_greedy
from chrysalis_ray.evaluate.making import Making, write_merge
from chrysalis_ray.evaluate.probing import refused_by_probes
from chrysalis_ray.evaluate.scores import DocumentScore, SelectScores
from chrysalis_ray.evaluate.searched import greedy_layer_weights, searched_weights
from chrysalis_ray.evaluate.subjects import Candidate, Rows, blend_of
from chrysalis_ray.evaluate.verdict import Choice, choose, read_select
from chrysalis_ray.merge.per_layer import ModuleWeights, by_name, check_names
from chrysalis_ray.seed.adapter import adapter_sha256, read_adapter

OnSelect = Callable[[Sequence[Candidate]], Rows]  # candidates -> their scores on select
AHEAD = 2  # decisions of a greedy soup whose trials share a pass: three of them fill two cores where one leaves one idle


def sound_scores(layout: RunLayout, scores: Rows, split: str, needed: Sequence[str]) -> dict[str, Any]:
    """The scores of the candidates whose losses are numbers; one that diverged rests in `failed/` with its reason.

    Raises EvaluationError if one of `needed` diverged.
    """
    diverged = {
        name: f"its loss on {row[0]} ({split}) is {row[2]}"
        for name, rows in scores.items()
        for row in rows
        if not math.isfinite(row[2])
    }
    for name, reason in diverged.items():
        if name in needed:
            raise EvaluationError(f"{name} cannot be judged: {reason}", "look at the base, or lower the learning rates")
        write_json(layout.failed / f"{name}-{split}.json", {"candidate": name, "reason": reason})
    return {name: rows for name, rows in scores.items() if name not in diverged}


def judged(layout: RunLayout, variants: Sequence[str]) -> list[str]:
    """Those of `variants` that have select scores. Raises EvaluationError if none has."""
    scored = read_select(layout.select_scores).candidates
    names = [name for name in variants if name in scored]
    if not names:
        raise EvaluationError(
            f"none of {len(variants)} variants has a loss that is a number: {', '.join(variants[:4])} ...",
            f"look into {layout.failed}; lower the learning rates, or set a clip",
        )
    return names


def select_losses(rows: Rows) -> dict[str, float]:
    """The macro loss of every candidate on select; infinite for one that diverged."""
    finite = {name: own for name, own in rows.items() if all(math.isfinite(row[2]) for row in own)}
    return {name: _select_loss(finite[name]) if name in finite else math.inf for name in rows}


def _select_loss(rows: Sequence[Sequence[Any]]) -> float:
    return SelectScores({"": [DocumentScore(*row) for row in rows]}).loss("")


def merge_candidates(
    layout: RunLayout,
    specs: Sequence[Merge],
    variants: Sequence[str],
    judge: OnSelect,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make every merge as a PEFT folder, then `merges.json`; returns its content. `judge` is asked only where the weights are
    found by judging.

    A merge that cannot be made rests in `failed/` with its reason. What a killed run had made, found or merged of one is not
    made again (`making.py`). Raises MergeError if none can.
    """
    losses = read_select(layout.select_scores).losses()
    sha256s = {name: adapter_sha256(layout.adapter(name)) for name in variants}
    made: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for spec in specs:
        try:
            members = members_of(spec, variants, losses)
            making = Making(layout, _with_names(spec, variants), members, losses, sha256s)
            made[spec.name] = making.done_before() or making.finish(*_found(making, judge, tell))
        except MergeError as error:
            failed[spec.name] = str(error)
            write_json(layout.failed / f"merge-{spec.name}.json", {"merge": spec.name, "reason": str(error)})
    if not made:
        raise MergeError(f"no merge could be made: {failed}", "look at the adapters under variants/")
    manifest = {"candidates": made, "failed": failed}
    write_json(layout.merges_manifest, manifest)
    return manifest


def _with_names(spec: Merge, variants: Sequence[str]) -> Merge:
    """The spec with whatever it says of single variants by name. Raises MergeError for strangers."""
    if not isinstance(spec, SeveralMerge):
        return spec
    check_names(spec, variants)
    return by_name(spec, variants)


def _found(
    making: Making, judge: OnSelect, tell: Callable[[str], None]
) -> tuple[list[str], ModuleWeights | None, dict[str, Any]]:
    """The members of a merge, their weights per module and how these were found, where judging finds them; found once."""
    layout, spec, losses = making.layout, making.spec, making.losses
    before = making.found_before()
    if before is not None:
        return before
    members = soup_of(layout, spec, making.members, losses, judge, tell) if is_greedy(spec) else list(making.members)
    by_module, search = found_weights(layout, spec, members, losses, judge, tell)
    return making.remember(members, by_module, search)


def members_of(spec: Merge, variants: Sequence[str], losses: Mapping[str, float]) -> list[str]:
    """Who takes part in a merge: `best_share` of the variants by select loss, at least two; for the winner all compete."""
    share = spec.best_share if isinstance(spec, SeveralMerge) else 1.0
    count = max(min(2, len(variants)), round(share * len(variants)))
    best = sorted(variants, key=lambda name: (losses[name], variants.index(name)))[:count]
    return sorted(best, key=variants.index)


def soup_of(
    layout: RunLayout,
    spec: Merge,
    members: Sequence[str],
    losses: Mapping[str, float],
    judge: OnSelect,
    tell: Callable[[str], None],
) -> list[str]:
    """The members of a greedy soup. A mean of deltas is judged as it is before the cut to its rank, and nothing is written;
    what another method makes of a trial is written, judged and thrown away."""
    shutil.rmtree(layout.merge(f".{spec.name}"), ignore_errors=True)  # of a run that was killed while it tasted
    if isinstance(spec, EnsembleMerge):
        return greedy_members(members, losses, partial(_taste_blends, layout, judge), tell, AHEAD)
    return greedy_members(members, losses, partial(_taste_merges, layout, spec, losses, judge), tell)


def _taste_blends(layout: RunLayout, judge: OnSelect, trials: Sequence[Trial]) -> list[float]:
    folders = [[str(layout.adapter(name)) for name in trial] for trial in trials]
    found = select_losses(judge([blend_of(str(number), own) for number, own in enumerate(folders)]))
    return [found[str(number)] for number in range(len(trials))]


def _taste_merges(
    layout: RunLayout, spec: Merge, losses: Mapping[str, float], judge: OnSelect, trials: Sequence[Trial]
) -> list[float]:
    found: list[float] = []
    for trial in trials:
        named = spec.model_copy(update={"name": f".{spec.name}"})
        write_merge(layout, named, trial, losses)
        folder = layout.merge(named.name)
        found += select_losses(judge([Candidate(named.name, str(folder))])).values()
        shutil.rmtree(folder)
    return found


def found_weights(
    layout: RunLayout,
    spec: Merge,
    members: Sequence[str],
    losses: Mapping[str, float],
    judge: OnSelect,
    tell: Callable[[str], None],
) -> tuple[ModuleWeights | None, dict[str, Any]]:
    """The weights per module that `searched` and `greedy_layers` find, and how they went; nothing for other weights.

    A search depends on its members' adapters, the method and its settings; its state file names them, and goes on only there.
    """
    if not isinstance(spec, SeveralMerge) or spec.weights not in ("searched", "greedy_layers"):
        return None, {}
    modules = sorted(read_adapter(layout.seed).factors)

    taste = partial(_taste_layers, layout, spec, losses, members, judge)
    if spec.weights == "greedy_layers":
        by_module, search = greedy_layer_weights(spec, members, losses, modules, taste, tell)
    else:
        request = {
            "spec": spec.model_dump(mode="json"),
            "members": {name: adapter_sha256(layout.adapter(name)) for name in members},
        }
        state = layout.search(spec.name)
        by_module, search = searched_weights(spec, members, losses, modules, request, state, taste, tell)
    return by_module, {"search": search}


def _taste_layers(
    layout: RunLayout,
    spec: Merge,
    losses: Mapping[str, float],
    members: Sequence[str],
    judge: OnSelect,
    trials: Sequence[ModuleWeights],
) -> list[float]:
    """Merges of the members by other weights, each in a folder of its own, judged in one pass and thrown away."""
    for left in layout.merges.glob(f".{spec.name}.*"):  # of a run that was killed while it searched
        shutil.rmtree(left)
    named = [spec.model_copy(update={"name": f".{spec.name}.{number}"}) for number in range(len(trials))]
    for trial, by_module in zip(named, trials, strict=True):
        write_merge(layout, trial, members, losses, by_module)
    found = select_losses(judge([Candidate(trial.name, str(layout.merge(trial.name))) for trial in named]))
    for trial in named:
        shutil.rmtree(layout.merge(trial.name))
    return [found[trial.name] for trial in named]


def merges_to_choose(layout: RunLayout) -> list[str]:
    """The merges that were made, beside the plain winner: that one is a variant once more."""
    entries = read_json(layout.merges_manifest)["candidates"]
    return [name for name, entry in entries.items() if entry["method"] != "winner"]


def choice_on_select(layout: RunLayout, variants: Sequence[str], told: Any = None) -> Choice:
    """What the select split chooses: the best merge if it beats the best variant and loses no domain, else the variant.

    `told` is the experiment's `evaluate`: its `max_domain_loss` and, where probes or the distance to the members guard the
    choice, its `max_probe_drop` and `max_divergence`.
    """
    scores = read_select(layout.select_scores)
    merges = [name for name in merges_to_choose(layout) if name in scores.candidates]
    if told is None:
        return choose(scores, merges, variants)

    def guard(merges: Sequence[str], winner: str) -> Mapping[str, str]:
        found = refused_by_divergence(layout, told, merges, winner)
        return {**found, **refused_by_probes(layout, told, merges, winner)}

    return choose(scores, merges, variants, told.max_domain_loss, guard)
