"""The function check within a run: who is compared with whom, what refuses, what is told.

    evaluation/agreement-select.json    merges and their members on select, only where `evaluate.max_divergence` refuses by it
    evaluation/agreement-report.json    seed, variants and merges, each with its members, on report: this tells

A merge is compared with the variants that it was made of; the seed and a variant with all variants (itself among them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json
from chrysalis_ray.evaluate.agreement import UNKNOWN, ReportAgreements, SelectAgreements, agreement_sentence, too_far
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


def told_agreements(layout: RunLayout, evaluate: Any, choice: Choice, rng_seed: int) -> tuple[dict[str, Any], list[str]]:
    """What the verdict tells of every candidate, by name, and a sentence about what is released. Nothing where nobody compared:
    a solo body wears one candidate at a time, and one variant has nobody to agree with."""
    if not layout.agreement("report").is_file():
        return {}, []
    found = ReportAgreements.load(layout.agreement("report"))
    told = {
        name: found.tell(name, evaluate.bootstrap_samples, evaluate.confidence, rng_seed) for name in sorted(found.documents)
    }
    chosen = choice.chosen
    return told, [agreement_sentence(chosen, told[chosen])] if chosen in told else []
