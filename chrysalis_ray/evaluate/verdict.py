"""The verdict: did merging help? Chosen on *select*, told on *report*, with intervals over documents.

`choose` sees only select scores. `make_verdict` sees only report scores and cannot change the choice any more; a merge that
won on select and loses on report is told as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from chrysalis_ray.config.domain_loss import Limits
from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.core.records import MIXTURE
from chrysalis_ray.evaluate.bootstrap import Floats, draws_for, interval, resampled_by_domain
from chrysalis_ray.evaluate.domains import DomainDifference, domain_differences, domain_sentence, refusals
from chrysalis_ray.evaluate.scores import DocumentScore, ReportScores, SelectScores, mean_of_known, read_report, read_select

__all__ = [
    "Choice", "Difference", "DocumentScore", "ReportScores", "SelectScores", "Told", "Verdict", "choose", "make_verdict",
    "read_report", "read_select",
]  # fmt: skip

TIE = 1e-6  # nats per token: losses closer than this are equal, and a merge that only ties is not better
MEAN_VARIANT = "mean variant"
FEW_DOCUMENTS = 5  # a domain with fewer says little about its own spread


@dataclass(frozen=True)
class Choice:
    """What select chose. `winner` is the best variant; `chosen`, what is released, the best merge where it beats the winner.

    `losses` and `by_domain` hold every candidate scored on select, in nats per token. `refused` says of merges why they were
    not to choose from: each lost more than `most_lost` on a domain, or a guard spoke against it.
    """

    winner: str
    best_merge: str | None
    chosen: str
    kind: str  # merge | winner
    reason: str
    losses: Mapping[str, float]
    by_domain: Mapping[str, Mapping[str, float]]
    merges: tuple[str, ...]
    variants: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    most_lost: Limits = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "merges": list(self.merges), "variants": list(self.variants)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Choice:
        return cls(**{**value, "merges": tuple(value["merges"]), "variants": tuple(value["variants"])})


@dataclass(frozen=True)
class Told:
    """One candidate on report: macro loss in nats per token with its interval."""

    candidate: str
    role: str  # seed | mean variant | best variant | merge | bound
    loss: float
    low: float
    high: float
    by_domain: Mapping[str, float]
    bits_per_byte: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Difference:
    """Loss of `candidate` minus loss of `against`, paired over documents; below zero, `candidate` is better."""

    candidate: str
    against: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class MergeTold:
    """A merge on report, whatever was chosen: its loss and how that differs from the best variant's, each with its interval."""

    candidate: str
    loss: float
    low: float
    high: float
    against_winner: Difference

    def to_json(self) -> dict[str, Any]:
        told = {"mean": self.loss, "low": self.low, "high": self.high}
        return told | {"against_winner": _difference_json(self.against_winner)}


@dataclass(frozen=True)
class Verdict:
    """Did merging help? `merging_helped` is yes, no or unclear; `sentences` say it in words.

    `confidence` holds for the losses, `difference_confidence` (Bonferroni over the merge candidates) for the differences; those
    by domain are corrected for the number of domains as well.
    """

    merging_helped: str
    winner: str
    chosen: str
    kind: str
    sentences: tuple[str, ...]
    told: tuple[Told, ...]
    differences: tuple[Difference, ...]
    domain_differences: tuple[DomainDifference, ...]  # against the winner, or the seed where the winner itself is released
    confidence: float
    difference_confidence: float
    bootstrap_samples: int
    documents: int
    tokens: int
    choice: Choice
    merges: tuple[MergeTold, ...] = ()  # every merge that report has scores of, the best first

    def to_json(self) -> dict[str, Any]:
        """For people and for the comparison: what was chosen, every loss on select, what is told on report."""
        against_winner = next((d for d in self.differences if d.against == self.winner), None)
        return {
            "winner": self.winner,
            "chosen": self.chosen,
            "kind": self.kind,
            "merging_helped": self.merging_helped,
            "sentences": list(self.sentences),
            "select": {
                "loss": self.choice.losses,
                "domains": self.choice.by_domain,
                "reason": self.choice.reason,
                "refused": dict(self.choice.refused),
            },
            "report": {
                "loss": {t.candidate: {"mean": t.loss, "low": t.low, "high": t.high} for t in self.told},
                "domains": {t.candidate: t.by_domain for t in self.told},
                "roles": {t.candidate: t.role for t in self.told},
                "bits_per_byte": {t.candidate: t.bits_per_byte for t in self.told if t.bits_per_byte is not None},
                "accuracy": {t.candidate: t.accuracy for t in self.told if t.accuracy is not None},
                "merges": {merge.candidate: merge.to_json() for merge in self.merges},
                "difference": _difference_json(against_winner) if against_winner else None,
                "differences": [_difference_json(d) for d in self.differences],
                "domain_differences": [d.to_json() for d in self.domain_differences],
                "confidence": self.confidence,
                "difference_confidence": self.difference_confidence,
                "bootstrap_samples": self.bootstrap_samples,
                "documents": self.documents,
                "tokens": self.tokens,
            },
            "choice": self.choice.to_json(),
        }


def _difference_json(d: Difference) -> dict[str, Any]:
    return {"of": d.candidate, "against": d.against, "mean": d.difference, "low": d.low, "high": d.high}


Guard = Callable[[Sequence[str], str], Mapping[str, str]]  # merges, best variant -> why some must not be released


def choose(
    select: SelectScores,
    merges: Sequence[str],
    variants: Sequence[str],
    most_lost: Limits = None,
    guard: Guard = lambda merges, winner: {},
) -> Choice:
    """The best variant, the best merge and what is released, on select alone; among equals the first given.

    `merges` are the candidates beside the plain winner (which is the best variant once more), and may be none. One that loses
    more than `most_lost` nats per token on any domain against the best variant is refused, and so is what `guard` refuses.
    Raises TypeError for report scores.
    """
    if not isinstance(select, SelectScores):
        raise TypeError(f"only SelectScores choose, these are {type(select).__name__}")
    if not variants:
        raise EvaluationError("there is no variant to choose", "see failed/ for what became of them")
    losses = select.losses()
    winner = _lowest(select, losses, variants)
    by_domain = {name: select.loss_by_domain(name) for name in select.candidates}
    for name in merges:
        select.of(name)
    refused = {**guard(merges, winner), **refusals(by_domain, merges, winner, most_lost)}
    allowed = [name for name in merges if name not in refused]
    best_merge = _lowest(select, losses, allowed) if allowed else None
    at_best = f"the best variant {winner} ({losses[winner]:.4f} nats per token on select)"
    if best_merge is not None and losses[best_merge] < losses[winner] - TIE:
        chosen, kind, reason = best_merge, "merge", f"{best_merge} ({losses[best_merge]:.4f}) beat {at_best}"
    elif best_merge is not None:
        chosen, kind = winner, "winner"
        reason = f"no merge beat {at_best}; the best of them, {best_merge}, had {losses[best_merge]:.4f}"
    else:
        chosen, kind = winner, "winner"
        reason = f"no merge was {'left' if refused else 'tried'} beside {at_best}"
    for name, why in refused.items():
        if losses[name] < losses[chosen] - TIE:
            reason += f"; {name} ({losses[name]:.4f}) is refused: {why}"
    return Choice(
        winner, best_merge, chosen, kind, reason, losses, by_domain, tuple(merges), tuple(variants), refused, most_lost
    )


def _lowest(select: SelectScores, losses: Mapping[str, float], names: Sequence[str]) -> str:
    for name in names:
        select.of(name)
    best = min(losses[name] for name in names)
    return next(name for name in names if losses[name] <= best + TIE)


def make_verdict(
    choice: Choice,
    report: ReportScores,
    seed: str = "seed",
    bootstrap_samples: int = 2000,
    confidence: float = 0.95,
    rng_seed: int = 0,
) -> Verdict:
    """Tell the choice on report, beside the seed, the best variant and, where all variants were scored, their mean. There are
    at least `bootstrap_samples` draws, and as many as the widest interval needs.

    Raises TypeError for select scores, EvaluationError where one of those was not scored.
    """
    if not isinstance(report, ReportScores):
        raise TypeError(f"only ReportScores tell, these are {type(report).__name__}")
    roles, rows = _who_is_told(choice, report, seed)
    corrected = 1.0 - (1.0 - confidence) / max(1, len(choice.merges))
    surely = 1.0 - (1.0 - corrected) / len(report.domains)
    samples = draws_for(surely, bootstrap_samples)
    by_domain = _draw(report, rows, samples, rng_seed)
    drawn = {name: drawn_SD.mean(1) for name, drawn_SD in by_domain.items()}
    told = tuple(_tell(report, choice, name, role, drawn[name], confidence) for name, role in roles.items())
    losses = {line.candidate: line.loss for line in told}
    ours = choice.chosen
    differences = tuple(
        Difference(ours, other, losses[ours] - losses[other], *interval(drawn[ours] - drawn[other], corrected))
        for other in roles
        if other != ours
    )
    other = choice.winner if choice.kind == "merge" else seed
    apart = np.array([report.loss_by_domain(ours)[d] - report.loss_by_domain(other)[d] for d in report.domains])
    by_domains = domain_differences(report.domains, by_domain[ours], by_domain[other], apart, other, surely)
    helped = _helped(choice, differences)
    return Verdict(
        merging_helped=helped,
        winner=choice.winner,
        chosen=ours,
        kind=choice.kind,
        sentences=(
            *_sentences(choice, helped, losses, differences, corrected, seed),
            domain_sentence(ours, by_domains, choice.most_lost if choice.kind == "merge" else None),  # no rule for a variant
            *_thin(report),
        ),
        told=told,
        differences=differences,
        domain_differences=by_domains,
        confidence=confidence,
        difference_confidence=corrected,
        bootstrap_samples=samples,
        documents=len(report.documents),
        tokens=sum(score.tokens for score in report.documents),
        choice=choice,
        merges=_every_merge(report, choice, samples, confidence, corrected, rng_seed),
    )


def _who_is_told(choice: Choice, report: ReportScores, seed: str) -> tuple[dict[str, str], dict[str, Floats]]:
    """The candidates told in the first place, with their roles, and the loss of each on every document."""
    roles = {seed: "seed", choice.winner: "best variant"}
    if choice.kind == "merge":
        roles[choice.chosen] = "merge"
    if MIXTURE in report.candidates:
        roles[MIXTURE] = "bound"
    rows = {name: _losses(report, name) for name in roles}
    if len(choice.variants) > 1 and all(name in report.candidates for name in choice.variants):
        roles[MEAN_VARIANT] = MEAN_VARIANT
        rows[MEAN_VARIANT] = np.mean([_losses(report, name) for name in choice.variants], axis=0)
    return roles, rows


def _every_merge(
    report: ReportScores, choice: Choice, samples: int, confidence: float, corrected: float, rng_seed: int
) -> tuple[MergeTold, ...]:
    """What came of every merge on report, by the draws that the verdict goes by."""
    names = [name for name in choice.merges if name in report.candidates]
    rows = {name: _losses(report, name) for name in (choice.winner, *names)}
    drawn = {name: drawn_SD.mean(1) for name, drawn_SD in _draw(report, rows, samples, rng_seed).items()}
    at_best = report.loss(choice.winner)
    told = []
    for name in names:
        apart = interval(drawn[name] - drawn[choice.winner], corrected)
        against = Difference(name, choice.winner, report.loss(name) - at_best, *apart)
        told.append(MergeTold(name, report.loss(name), *interval(drawn[name], confidence), against))
    return tuple(sorted(told, key=lambda merge: (merge.loss, merge.candidate)))


def _draw(report: ReportScores, rows: Mapping[str, Floats], samples: int, rng_seed: int) -> dict[str, Floats]:
    """Bootstrap samples [S, D] of the loss of every row by domain, all from the same draws."""
    tokens_D = np.array([score.tokens for score in report.documents], dtype=np.float64)
    numbers = {domain: number for number, domain in enumerate(report.domains)}
    domains_D = np.array([numbers[score.domain] for score in report.documents], dtype=np.int64)
    drawn_SDC = resampled_by_domain(np.stack(list(rows.values())), tokens_D, domains_D, samples, rng_seed)
    return dict(zip(rows, np.moveaxis(drawn_SDC, 2, 0), strict=True))


def _losses(report: ReportScores, candidate: str) -> Floats:
    return np.array([score.loss_sum for score in report.of(candidate)], dtype=np.float64)


def _tell(report: ReportScores, choice: Choice, name: str, role: str, drawn_S: Floats, confidence: float) -> Told:
    sources = choice.variants if name == MEAN_VARIANT else (name,)
    rows = [report.loss_by_domain(source) for source in sources]
    by_domain = {domain: float(np.mean([row[domain] for row in rows])) for domain in report.domains}
    bits = mean_of_known([report.bits_per_byte(source) for source in sources])
    accuracy = mean_of_known([report.accuracy(source) for source in sources])
    low, high = interval(drawn_S, confidence)
    return Told(name, role, float(np.mean(list(by_domain.values()))), low, high, by_domain, bits, accuracy)


def _helped(choice: Choice, differences: Sequence[Difference]) -> str:
    if choice.kind == "winner":
        return "no"
    against_winner = next(d for d in differences if d.against == choice.winner)
    if against_winner.high < 0.0:
        return "yes"
    return "no" if against_winner.low > 0.0 else "unclear"


def _sentences(
    choice: Choice,
    helped: str,
    losses: Mapping[str, float],
    differences: Sequence[Difference],
    confidence: float,
    seed: str,
) -> tuple[str, ...]:
    by_other = {difference.against: difference for difference in differences}

    def compared(other: str) -> str:
        d = by_other[other]
        word = "less" if d.difference < 0 else "more"
        return f"{abs(d.difference):.4f} {word} ({confidence:.1%} interval of the difference {d.low:+.4f} to {d.high:+.4f})"

    lines = []
    if choice.kind == "winner":
        lines.append(f"Merging did not help: {choice.reason}. The imago is {choice.chosen} itself.")
    else:
        verdicts = {"yes": "Merging helped", "no": "Merging did not help", "unclear": "Whether merging helped is unclear"}
        lines.append(
            f"{verdicts[helped]}: on report, {choice.chosen} has {losses[choice.chosen]:.4f} nats per token,"
            f" against the best variant {choice.winner} {compared(choice.winner)}."
        )
    lines.append(f"Against the seed ({losses[seed]:.4f}), {choice.chosen} has {compared(seed)}.")
    if MEAN_VARIANT in by_other:
        lines.append(f"Against the mean of {len(choice.variants)} variants, {choice.chosen} has {compared(MEAN_VARIANT)}.")
    if MIXTURE in by_other:
        better = losses[MIXTURE] < losses[choice.winner]
        hope = "what a merge can hope for" if better else "no better than the best of them alone"
        lines.append(
            f"All {len(choice.variants)} variants asked together (the mean of their probabilities, as many passes for each "
            f"token) have {losses[MIXTURE]:.4f}, {hope}; {choice.chosen} has {compared(MIXTURE)}"
            f"{_share_of_the_way(choice, losses)}."
        )
    return tuple(lines)


def _share_of_the_way(choice: Choice, losses: Mapping[str, float]) -> str:
    """How far a merge came from the best variant to the mixture, where that is a way at all."""
    way = losses[choice.winner] - losses[MIXTURE]
    if choice.kind != "merge" or way <= TIE:
        return ""
    return f": {(losses[choice.winner] - losses[choice.chosen]) / way:.0%} of the way there from the best variant"


def _thin(report: ReportScores) -> list[str]:
    counts = {domain: sum(score.domain == domain for score in report.documents) for domain in report.domains}
    thin = [f"{domain} ({count})" for domain, count in counts.items() if count < FEW_DOCUMENTS]
    if not thin:
        return []
    return [f"Few documents stand behind {', '.join(thin)}: the intervals are wider in truth than they are told."]
