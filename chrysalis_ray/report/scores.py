"""Losses of every candidate, as the evaluation left them in a run directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.report.reading import mapping, number, numbers, public_manifest


@dataclass(frozen=True)
class Interval:
    """A mean with its interval over documents."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Losses by candidate, from the verdict where there is one, else from the document scores on *select*. `metrics` holds what
    the verdict tells by candidate and domain: loss, perplexity, bits_per_byte, accuracy, as far as they are known."""

    loss: Mapping[str, float]
    domains: Mapping[str, Mapping[str, float]]
    intervals: Mapping[str, Interval]
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]]
    verdict: Mapping[str, Any] | None

    @classmethod
    def read(cls, layout: RunLayout) -> Scores:
        """The scores of a run; empty where it was not judged yet."""
        verdict = public_manifest(layout.verdict)
        select = public_manifest(layout.select_scores)
        loss, domains = _losses_of_documents(mapping(select.get("candidates")) if select else {})
        told = mapping(verdict.get("select")) if verdict else {}
        loss |= numbers(told.get("loss"))
        domains |= {name: numbers(value) for name, value in mapping(told.get("domains")).items()}
        on_report = mapping(verdict.get("report")) if verdict else {}
        report = {**mapping(on_report.get("merges")), **mapping(on_report.get("loss"))}
        intervals = {name: interval for name, value in report.items() if (interval := _interval(value))}
        metrics = {
            name: {domain: numbers(values) for domain, values in mapping(by_domain).items()}
            for name, by_domain in mapping(told.get("metrics")).items()
        }
        return cls(loss, domains, intervals, metrics, verdict)


def _losses_of_documents(candidates: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Mean loss per token, by candidate and by candidate and domain; a candidate counts every domain alike."""
    loss: dict[str, float] = {}
    domains: dict[str, dict[str, float]] = {}
    for name, documents in candidates.items():
        sums: dict[str, list[float]] = {}
        for domain, _, loss_sum, tokens, *_ in documents:
            total = sums.setdefault(domain, [0.0, 0.0])
            total[0] += loss_sum
            total[1] += tokens
        domains[name] = {domain: total[0] / total[1] for domain, total in sums.items() if total[1]}
        if domains[name]:
            loss[name] = sum(domains[name].values()) / len(domains[name])
    return loss, domains


def _interval(value: Any) -> Interval | None:
    mean, low, high = (number(mapping(value).get(key)) for key in ("mean", "low", "high"))
    return Interval(mean, low, high) if mean is not None and low is not None and high is not None else None
