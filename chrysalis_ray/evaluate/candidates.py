"""Candidates: every merge that the experiment asks for, made of variants that are good enough, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from chrysalis_ray.config.merges import Merge, SeveralMerge, WinnerMerge
from chrysalis_ray.core.errors import EvaluationError, MergeError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.evaluate.folders import named_result
from chrysalis_ray.evaluate.greedy import Judge, greedy_members, is_greedy
from chrysalis_ray.evaluate.scores import DocumentScore, SelectScores
from chrysalis_ray.evaluate.verdict import Choice, choose, read_select
from chrysalis_ray.merge.run import merge_modules
from chrysalis_ray.merge.winner import winner_weights
from chrysalis_ray.seed.adapter import AdapterWeights, read_adapter, read_config, write_adapter
from chrysalis_ray.seed.solo import is_plain, release_adapter

Rows = Mapping[str, Sequence[tuple[str, int, float, int]]]  # candidate -> (domain, document, loss sum in nats, tokens)


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


def select_loss(rows: Rows) -> float:
    """The macro loss of a single candidate on select; infinite if it diverged."""
    ((name, documents),) = rows.items()
    if not all(math.isfinite(row[2]) for row in documents):
        return math.inf
    return SelectScores({name: [DocumentScore(*row) for row in documents]}).loss(name)


def merge_candidates(
    layout: RunLayout,
    specs: Sequence[Merge],
    variants: Sequence[str],
    judge: Judge,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make every merge as a PEFT folder, then `merges.json`; returns its content. `judge` is asked by greedy soups only.

    A merge that cannot be made rests in `failed/` with its reason. Raises MergeError if none can.
    """
    losses = read_select(layout.select_scores).losses()
    made: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for spec in specs:
        try:
            members = members_of(spec, variants, losses)
            if is_greedy(spec):
                members = greedy_members(members, losses, partial(_write_trial, layout, spec, losses), judge, tell)
            made[spec.name] = write_merge(layout, spec, members, losses)
        except MergeError as error:
            failed[spec.name] = str(error)
            write_json(layout.failed / f"merge-{spec.name}.json", {"merge": spec.name, "reason": str(error)})
    if not made:
        raise MergeError(f"no merge could be made: {failed}", "look at the adapters under variants/")
    manifest = {"candidates": made, "failed": failed}
    write_json(layout.merges_manifest, manifest)
    return manifest


def members_of(spec: Merge, variants: Sequence[str], losses: Mapping[str, float]) -> list[str]:
    """Who takes part in a merge: `best_share` of the variants by select loss, at least two; for the winner all compete."""
    share = spec.best_share if isinstance(spec, SeveralMerge) else 1.0
    count = max(min(2, len(variants)), round(share * len(variants)))
    best = sorted(variants, key=lambda name: (losses[name], variants.index(name)))[:count]
    return sorted(best, key=variants.index)


def _write_trial(layout: RunLayout, spec: Merge, losses: Mapping[str, float], members: Sequence[str]) -> Path:
    """A merge of some members, to be judged and thrown away."""
    trial = spec.model_copy(update={"name": f".{spec.name}"})
    write_merge(layout, trial, members, losses)
    return layout.merge(trial.name)


def write_merge(layout: RunLayout, spec: Merge, members: Sequence[str], losses: Mapping[str, float]) -> dict[str, Any]:
    """One merge around the seed, cut to the largest rank among its members unless the spec names one; returns its record."""
    if isinstance(spec, WinnerMerge) and not all(is_plain(layout.adapter(name)) for name in members):
        return _winner_as_it_is(layout, spec, members, losses)
    alike = spec.model_copy(update={"weights": "uniform"}) if is_greedy(spec) else spec
    adapters = [read_adapter(layout.adapter(name)) for name in members]
    zero = read_adapter(layout.seed)
    merged = merge_modules(
        alike,
        [adapter.factors for adapter in adapters],
        [adapter.scale for adapter in adapters],
        zero.factors,
        zero.scale,
        [losses[name] for name in members],
        max(adapter.rank for adapter in adapters),
    )
    result = AdapterWeights(
        base_model=zero.base_model,
        revision=zero.revision,
        rank=merged.rank,
        alpha=float(merged.rank),
        use_rslora=False,
        targets=zero.targets,
        factors=merged.factors,
        fan_in_fan_out=zero.fan_in_fan_out,
    )
    return {
        **named_result(merged, members),
        "method": spec.method,
        "spec": spec.model_dump(mode="json"),
        "weights": dict(zip(members, merged.weights, strict=True)),
        "sha256": write_adapter(layout.merge(spec.name), result),
    }


def _winner_as_it_is(
    layout: RunLayout, spec: WinnerMerge, members: Sequence[str], losses: Mapping[str, float]
) -> dict[str, Any]:
    """The record of a winner that is more than low-rank deltas: its folder is copied."""
    weights = dict(zip(members, winner_weights([losses[name] for name in members]), strict=True))
    folder = layout.adapter(max(members, key=lambda name: weights[name]))
    return {
        "rank": read_config(folder)["r"],
        "residual": 0.0,
        "captured_energy": 1.0,
        "per_module": {},
        "notes": {"method": spec.method, "members": 1},
        "method": spec.method,
        "spec": spec.model_dump(mode="json"),
        "weights": weights,
        "sha256": release_adapter(folder, layout.merge(spec.name)),
    }


def choice_on_select(layout: RunLayout, variants: Sequence[str]) -> Choice:
    """What the select split chooses: the best merge if it beats the best variant, else the best variant."""
    entries = read_json(layout.merges_manifest)["candidates"]
    scores = read_select(layout.select_scores)
    merges = [name for name, entry in entries.items() if entry["method"] != "winner" and name in scores.candidates]
    return choose(scores, merges, variants)
