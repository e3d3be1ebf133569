"""The stage of a run that asks the probes, and what the verdict tells of them.

    evaluation/probes.json    what was asked (by hash), and which items the seed, every variant and every merge got right

Asked once, before anything is chosen: with `evaluate.max_probe_drop` half of the items guard the choice, and only the others
are told. Without it nobody reads them before the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chrysalis_ray.config.questions import Probe, is_generated
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, sha256_of, write_json
from chrysalis_ray.evaluate.answers import ReportAnswers, SelectAnswers, dealt, drops
from chrysalis_ray.evaluate.probes import Marks, marked
from chrysalis_ray.evaluate.proportions import paired_difference, share
from chrysalis_ray.evaluate.questions import Questions, Reader, Replies, questions_of, room_of
from chrysalis_ray.evaluate.subjects import Candidate
from chrysalis_ray.evaluate.verdict import Choice

Ask = Callable[[Sequence[Candidate], Questions], dict[str, Replies]]
SEED = "seed"
MOST_SAID = 400  # characters of a written answer that are kept


def check_probes(probes: Sequence[Probe], base: Path, template: Path | None) -> None:
    """Raises EvaluationError, ModelError or GenomeError for a question that this base cannot be asked: before any training."""
    questions_of(Reader(base, template), probes, room_of(base))


def ask_population(
    layout: RunLayout, evaluate: Any, candidates: Sequence[Candidate], ask: Ask, template: Path | None
) -> str | None:
    """Ask every probe of the experiment; returns a sentence about it, None where there was nothing to ask any more."""
    probes: Sequence[Probe] = evaluate.probes
    if not probes or layout.probes.exists():
        return None
    base = Path(read_json(layout.base_manifest)["path"])
    reader = Reader(base, template)
    questions = questions_of(reader, probes, room_of(base))
    marks = {name: marked(reader, probes, questions, replies) for name, replies in ask(candidates, questions).items()}
    guarded = evaluate.max_probe_drop is not None
    write_json(
        layout.probes,
        {
            "probes_sha256": sha256_of([probe.model_dump(mode="json") for probe in probes]),
            **{
                split: {probe.name: _written(probe, split, guarded, marks) for probe in probes}
                for split in ("select", "report")
            },
        },
    )
    items = sum(len(probe.items) for probe in probes)
    return f"{items} items of {len(probes)} probes, asked of {len(marks)} candidates"


def _written(probe: Probe, split: str, guarded: bool, marks: dict[str, dict[str, Marks]]) -> dict[str, Any]:
    """The items of one split of a probe, and every candidate's marks on them."""
    items = dealt(probe, guarded)[split]
    own = {name: told[probe.name].of(items) for name, told in marks.items()}
    found: dict[str, Any] = {"items": items, "right": {name: [int(mark) for mark in each.right] for name, each in own.items()}}
    if any(each.per_byte is not None for each in own.values()):
        found["right_per_byte"] = {name: [int(mark) for mark in each.per_byte or ()] for name, each in own.items()}
    if is_generated(probe):
        found["said"] = {name: [text[:MOST_SAID] for text in each.said or ()] for name, each in own.items()}
    return found


def refused_by_probes(layout: RunLayout, evaluate: Any, merges: Sequence[str], winner: str) -> dict[str, str]:
    """Why merges must not be released, by name, as far as the probes that guard say so."""
    if evaluate.max_probe_drop is None:
        return {}
    return drops(SelectAnswers.load(layout.probes), merges, winner, evaluate.max_probe_drop)


def told_probes(layout: RunLayout, evaluate: Any, choice: Choice) -> tuple[dict[str, Any], list[str]]:
    """What the verdict tells of the probes, by name, and a sentence each.

    Intervals of accuracies hold at `evaluate.confidence` each; those of the differences, paired over the items, are corrected
    (Bonferroni) for the number of merges, as the losses' are, and for the number of probes.
    """
    if not evaluate.probes:
        return {}, []
    answers, written = ReportAnswers.load(layout.probes), read_json(layout.probes)["report"]
    corrected = 1.0 - (1.0 - evaluate.confidence) / (max(1, len(choice.merges)) * len(evaluate.probes))
    told, sentences = {}, []
    for probe in evaluate.probes:
        right = answers.right[probe.name]
        others = [name for name in (choice.winner, SEED) if name != choice.chosen]
        differences = [
            {"of": choice.chosen, "against": other}
            | dict(zip(("mean", "low", "high"), paired_difference(right[choice.chosen], right[other], corrected), strict=True))
            for other in others
        ]
        found: dict[str, Any] = {
            "kind": probe.kind,
            "by": "generation" if is_generated(probe) else "likelihood",
            "items": len(right[choice.chosen]),
            "candidates": {name: share(marks, evaluate.confidence) for name, marks in right.items()},
            "differences": differences,
            "confidence": evaluate.confidence,
            "difference_confidence": corrected,
        }
        for name, marks in written[probe.name].get("right_per_byte", {}).items():
            found["candidates"][name]["accuracy_per_byte"] = sum(marks) / len(marks)
        told[probe.name] = found
        sentences.append(_sentence(probe.name, choice.chosen, found))
    return told, sentences


def _sentence(probe: str, chosen: str, found: dict[str, Any]) -> str:
    own = found["candidates"][chosen]
    compared = "; ".join(
        f"against {each['against']} {each['mean']:+.1%} (interval {each['low']:+.1%} to {each['high']:+.1%})"
        for each in found["differences"]
    )
    return (
        f"Probe {probe}: {chosen} answers {own['accuracy']:.1%} of {found['items']} items right "
        f"({own['low']:.1%} to {own['high']:.1%}); {compared}."
    )
