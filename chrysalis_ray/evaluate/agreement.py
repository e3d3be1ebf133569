"""The function check of a merge: does it still do what its members do? Two numbers, beside the losses.

    divergence   mean over members of KL(member || candidate), in nats per token: what the candidate would lose more than the
                 member itself on text that the member wrote. Of it the `spread` of the members, how far they are from their
                 mixture, is what no merge can avoid; the rest is KL(mixture || candidate).
    agreement    the share of tokens where the candidate finds the same token likeliest as a member does (the mean over
                 members), as the mixture of its members does, and as most of its members do, where more than half agree.

Each is token-weighted inside a domain, then the plain mean over domains, with intervals over documents, as a loss is. Both
directions of KL agree to second order; this one is large where a candidate has forgotten something that a member says.

What chooses and what tells are two types on purpose. Without `evaluate.max_divergence` nothing here chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.core.records import read_json
from chrysalis_ray.evaluate.bootstrap import Floats, draws_for, interval, resampled_losses

# Of every document, summed over its tokens. `majorities` counts the tokens where more than half of the members agree.
MEASURES = ("divergence", "spread", "agreed", "as_mixture", "as_majority", "majorities")
UNKNOWN = "it could not be compared with its members, as evaluate.max_divergence asks"
Row = tuple[str, int, int, float, float, float, float, float, float]  # domain, document, tokens, then MEASURES


@dataclass(frozen=True)
class Agreements:
    """Candidates compared with their members on the same documents. Use `SelectAgreements` or `ReportAgreements`, not this."""

    split: ClassVar[str] = ""

    members: Mapping[str, tuple[str, ...]]
    documents: Mapping[str, Sequence[Row]]
    by_member: Mapping[str, Mapping[str, Mapping[str, float]]]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises EvaluationError for a file that holds none, or those of the other split."""
        try:
            written = read_json(path)
            if written["split"] != cls.split:
                raise EvaluationError(f"{path} was compared on {written['split']!r}, not on {cls.split!r}")
            members = {name: tuple(own) for name, own in written["members"].items()}
            documents = {name: tuple(_row(row) for row in rows) for name, rows in written["documents"].items()}
            return cls(members, documents, written["by_member"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{path} holds no agreements on {cls.split}: {error}"
            raise EvaluationError(what, "delete it; it is made again") from error

    def divergence(self, candidate: str) -> float:
        """Mean KL(member || candidate) in nats per token."""
        return _macro(self.documents[candidate], self._sums(candidate)[:1])[0]

    def tell(self, candidate: str, samples: int, confidence: float, rng_seed: int) -> dict[str, Any]:
        """Everything about one candidate, with bootstrap intervals over documents that hold at `confidence` each, of `samples`
        draws at the least."""
        rows, sums_XD = self.documents[candidate], self._sums(candidate)
        divergence_D, spread_D, agreed_D, as_mixture_D, as_majority_D, majorities_D = sums_XD
        told = {
            "divergence": divergence_D,
            "beyond_spread": divergence_D - spread_D,
            "agreement": agreed_D,
            "with_mixture": as_mixture_D,
        }
        values_XD = np.stack(list(told.values()))
        tokens_D, domains_D = _sizes(rows)
        drawn_SX = resampled_losses(values_XD, tokens_D, domains_D, draws_for(confidence, samples), rng_seed)
        means = _macro(rows, values_XD)
        found: dict[str, Any] = {"members": list(self.members[candidate])}
        for place, name in enumerate(told):
            low, high = interval(drawn_SX[:, place], confidence)
            found[name] = {"mean": means[place], "low": low, "high": high}
        found["spread"], found["majorities"] = _macro(rows, np.stack([spread_D, majorities_D]))
        found["with_majority"] = _share(as_majority_D, majorities_D, domains_D)
        return found | {"by_member": {name: dict(own) for name, own in self.by_member[candidate].items()}}

    def _sums(self, candidate: str) -> Floats:
        return np.array([row[3:] for row in self.documents[candidate]], dtype=np.float64).T


@dataclass(frozen=True)
class SelectAgreements(Agreements):
    """Compared on *select*: these may refuse a merge."""

    split: ClassVar[str] = "select"


@dataclass(frozen=True)
class ReportAgreements(Agreements):
    """Compared on *report*: these tell."""

    split: ClassVar[str] = "report"


def too_far(agreements: SelectAgreements, merges: Sequence[str], most: float) -> dict[str, str]:
    """Why merges must not be released, by name: each is more than `most` nats per token from its members, or nobody knows how
    far. Raises TypeError for what tells."""
    if not isinstance(agreements, SelectAgreements):
        raise TypeError(f"only SelectAgreements refuse, these are {type(agreements).__name__}")
    reasons = {}
    for name in merges:
        if name not in agreements.documents:
            reasons[name] = UNKNOWN
        elif (apart := agreements.divergence(name)) > most:
            reasons[name] = (
                f"its members' KL divergence from it is {apart:.4f} nats per token, more than the {most:g} that "
                "evaluate.max_divergence allows"
            )
    return reasons


def agreement_sentence(chosen: str, told: Mapping[str, Any]) -> str:
    """What the function check says of what is released."""
    apart, spread, majority = told["divergence"], told["spread"], told["with_majority"]
    among = ", itself among them," if chosen in told["members"] else ","
    most = "" if majority is None else f", as most of them do at {majority:.1%} of those where more than half agree"
    return (
        f"Compared with {len(told['members'])} variants{among} KL(variant || {chosen}) is {apart['mean']:.4f} nats per token "
        f"on average (interval {apart['low']:.4f} to {apart['high']:.4f}), {spread:.4f} of it how far they are from their own "
        f"mixture. {chosen} finds the same token likeliest as a variant at {told['agreement']['mean']:.1%} of the tokens, as "
        f"their mixture at {told['with_mixture']['mean']:.1%}{most}."
    )


def _row(row: Sequence[Any]) -> Row:
    domain, document, tokens, *sums = row
    if len(sums) != len(MEASURES):
        raise ValueError(f"a document has {len(sums)} measures, not {len(MEASURES)}")
    divergence, spread, agreed, as_mixture, as_majority, majorities = (float(value) for value in sums)
    return str(domain), int(document), int(tokens), divergence, spread, agreed, as_mixture, as_majority, majorities


def _sizes(rows: Sequence[Row]) -> tuple[Floats, np.ndarray[Any, np.dtype[np.int64]]]:
    """Tokens of every document, and the number of its domain."""
    numbers = {domain: number for number, domain in enumerate(sorted({row[0] for row in rows}))}
    return np.array([row[2] for row in rows], dtype=np.float64), np.array([numbers[row[0]] for row in rows], dtype=np.int64)


def _macro(rows: Sequence[Row], sums_XD: Floats) -> list[float]:
    """Of each of some sums: by tokens inside a domain, then the mean over domains."""
    tokens_D, domains_D = _sizes(rows)
    means = [sums_XD[:, domains_D == domain].sum(1) / tokens_D[domains_D == domain].sum() for domain in np.unique(domains_D)]
    return [float(value) for value in np.mean(means, axis=0)]


def _share(parts_D: Floats, wholes_D: Floats, domains_D: np.ndarray[Any, np.dtype[np.int64]]) -> float | None:
    """The mean over domains of a share; domains without a whole do not count, and None where there is no other."""
    shares = []
    for domain in np.unique(domains_D):
        whole = wholes_D[domains_D == domain].sum()
        if whole > 0:
            shares.append(parts_D[domains_D == domain].sum() / whole)
    return float(np.mean(shares)) if shares else None
