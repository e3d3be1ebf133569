"""Domain by domain: a merge that is better on the whole may still have lost one of the things its members knew.

A merge is refused where it loses more than `most` nats per token on a domain against the best variant, which would be released
in its place; `most` is one number for all domains, or one for each (`config/domain_loss.py`). The rule reads *select* and
chooses; what came of it on *report* is told with intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chrysalis_ray.config.domain_loss import Limits, limit_of
from chrysalis_ray.evaluate.bootstrap import Floats, interval


@dataclass(frozen=True)
class DomainDifference:
    """Loss of what is released minus loss of `against` on one domain, in nats per token, paired over its documents."""

    domain: str
    against: str
    difference: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        return {"domain": self.domain, "against": self.against, "mean": self.difference, "low": self.low, "high": self.high}


def refusals(by_domain: Mapping[str, Mapping[str, float]], merges: Sequence[str], winner: str, most: Limits) -> dict[str, str]:
    """Why merges must not be released, by name: the domain where each loses most beyond what it may lose against `winner`.

    `by_domain` holds losses by candidate and domain; where the limit is None nothing is refused.
    """
    reasons = {}
    for name in merges:
        lost = {domain: loss - by_domain[winner][domain] for domain, loss in by_domain[name].items()}
        beyond = _beyond(lost, most)
        if beyond:
            worst = max(beyond, key=lambda domain: beyond[domain])
            reasons[name] = (
                f"on {worst} it loses {lost[worst]:.4f} nats per token against {winner}, more than the "
                f"{limit_of(most, worst):g} that evaluate.max_domain_loss allows"
            )
    return reasons


def _beyond(lost: Mapping[str, float], most: Limits) -> dict[str, float]:
    """By how much each domain that loses too much does so."""
    limits = {domain: limit_of(most, domain) for domain in lost}
    return {domain: lost[domain] - limit for domain, limit in limits.items() if limit is not None and lost[domain] > limit}


def domain_differences(
    domains: Sequence[str], drawn_SD: Floats, against_SD: Floats, told: Floats, against: str, confidence: float
) -> tuple[DomainDifference, ...]:
    """A difference for each of `domains`, worst first; `told` [D] are the differences themselves, `drawn_SD` and `against_SD`
    the same bootstrap samples of both losses."""
    found = [
        DomainDifference(domain, against, float(told[place]), *interval(drawn_SD[:, place] - against_SD[:, place], confidence))
        for place, domain in enumerate(domains)
    ]
    return tuple(sorted(found, key=lambda each: (-each.difference, each.domain)))


def domain_sentence(chosen: str, differences: Sequence[DomainDifference], most: Limits) -> str:
    """Where what is released does worst on report, and where it does worse than was allowed on select (`most`, None where
    nothing was ruled out)."""
    worst = differences[0]
    more = "more" if worst.difference > 0 else "less"
    allowed = "more than evaluate.max_domain_loss allows ({:g}), and select did not show it"
    too_much = {
        each.domain: f"on {each.domain} it is {each.difference:.4f} more, "
        for each in differences
        if _beyond({each.domain: each.difference}, most)
    }
    if worst.domain in too_much:
        too_much[worst.domain] = "that is "
    beyond = "".join(f"; {what}{allowed.format(limit_of(most, domain))}" for domain, what in too_much.items())
    return (
        f"Domain by domain against {worst.against}, {chosen} does worst on {worst.domain}: {abs(worst.difference):.4f} {more} "
        f"(interval {worst.low:+.4f} to {worst.high:+.4f}){beyond}."
    )
