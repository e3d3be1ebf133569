"""The function check within a run: who is compared with whom, what refuses, what is told.

    evaluation/agreement-select.json    merges and their members on select, only where `evaluate.max_divergence` refuses by it
    evaluation/agreement-report.json    seed, variants and merges, each with its members, on report: this tells

A merge is compared with the variants that it was made of; the seed and a variant with all variants (itself among them). On
report their losses are compared as well, each with each member's, paired over documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json
from chrysalis_ray.evaluate.agreement import UNKNOWN, ReportAgreements, SelectAgreements, agreement_sentence, too_far
from chrysalis_ray.evaluate.bootstrap import draws_for, interval, resampled_losses
from chrysalis_ray.evaluate.scores import ReportScores
from chrysalis_ray.evaluate.subjects import Comparing
from chrysalis_ray.evaluate.verdict import Choice


def compare_population(layout: RunLayout, split: str, variants: Sequence[str], merges: Sequence[str]) -> Comparing:
    """Everybody and whom they are compared with. On select, where only merges can be refused, they alone are compared."""
    members = {name: members_of_merge(layout, name, variants) for name in merges}
    everybody = {} if split == "select" else dict.fromkeys(("seed", *variants), tuple(variants))
    return Comparing(str(layout.agreement(split)), {**everybody, **members})


def members_of_merge(layout: RunLayout, merge: str, variants: Sequence[str]) -> tuple[str, ...]:
    """The variants that a merge was made of: those with a weight, all where none is told."""
    weights = read_json(layout.merges_manifest)["candidates"][merge].get("weights") or {}
    return tuple(name for name in variants if weights.get(name)) or tuple(variants)


def refused_by_divergence(layout: RunLayout, evaluate: Any, merges: Sequence[str], winner: str) -> Mapping[str, str]:
    """Why merges must not be released, by name, as far as they are too far from their members on select."""
    if evaluate.max_divergence is None or not merges:
        return {}
    path = layout.agreement("select")
    if not path.is_file():  # a body that wears one adapter at a time
        return dict.fromkeys(merges, UNKNOWN)
    return too_far(SelectAgreements.load(path), merges, evaluate.max_divergence)


def told_agreements(
    layout: RunLayout, evaluate: Any, choice: Choice, report: ReportScores, rng_seed: int
) -> tuple[dict[str, Any], list[str]]:
    """What the verdict tells of every candidate, by name, and a sentence about what is released. Nothing where nobody compared:
    a solo body wears one candidate at a time, and one variant has nobody to agree with."""
    if not layout.agreement("report").is_file():
        return {}, []
    found = ReportAgreements.load(layout.agreement("report"))
    told = {
        name: found.tell(name, evaluate.bootstrap_samples, evaluate.confidence, rng_seed) for name in sorted(found.documents)
    }
    for name, own in losses_against_members(report, found.members, evaluate, rng_seed).items():
        for member, apart in own.items():
            told[name]["by_member"][member]["loss"] = apart
    chosen = choice.chosen
    return told, [agreement_sentence(chosen, told[chosen])] if chosen in told else []


def losses_against_members(
    report: ReportScores, members: Mapping[str, Sequence[str]], evaluate: Any, rng_seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Loss of every candidate minus that of each of its members, in nats per token, paired over the documents of report, with
    intervals that are corrected (Bonferroni) for the number of its members; itself left out."""
    names = list(report.candidates)
    pairs = {
        name: [member for member in own if member != name and member in names] for name, own in members.items() if name in names
    }
    confidence = {name: 1.0 - (1.0 - evaluate.confidence) / max(1, len(own)) for name, own in pairs.items()}
    losses_CD = np.array([[score.loss_sum for score in report.of(name)] for name in names])
    tokens_D = np.array([score.tokens for score in report.documents], dtype=np.float64)
    domains_D = np.array([report.domains.index(score.domain) for score in report.documents], dtype=np.int64)
    samples = draws_for(max(confidence.values(), default=0.0), evaluate.bootstrap_samples)
    drawn_SC = resampled_losses(losses_CD, tokens_D, domains_D, samples, rng_seed)
    drawn, losses = dict(zip(names, drawn_SC.T, strict=True)), report.losses()
    told: dict[str, dict[str, dict[str, float]]] = {}
    for name, own in pairs.items():
        told[name] = {}
        for member in own:
            low, high = interval(drawn[name] - drawn[member], confidence[name])
            told[name][member] = {"mean": losses[name] - losses[member], "low": low, "high": high}
    return told
