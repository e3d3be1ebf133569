"""The judging and merging of a run, stage after stage: scores of the variants, merges, scores of those, what is told.

    evaluation/select.json    seed, variants, then merges: these choose
    evaluation/audit.json     what the variants look like beside each other, before anything is merged
    merges/                   the merges, `merges.json` last
    evaluation/probes.json    what all of them answer to questions, where the experiment has any
    evaluation/report.json    seed, variants, merges, and the mixture of all variants: these tell
    evaluation/agreement-*    how far candidates predict from what their members do (`function_check.py`)
    evaluation/lm_eval.json   what seed, best variant and the chosen one make of tasks of lm-eval, where any are named

Who judges is a function from candidates to scores: the bodies of a run, or one process. What has its file is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import MIXTURE, read_json, write_json
from chrysalis_ray.evaluate.candidates import (
    choice_on_select,
    judged,
    merge_candidates,
    merges_to_choose,
    sound_scores,
)
from chrysalis_ray.evaluate.folders import Source, audit_sources
from chrysalis_ray.evaluate.function_check import compare_population, told_agreements
from chrysalis_ray.evaluate.making import needs_inputs
from chrysalis_ray.evaluate.probing import Ask, ask_population, told_probes
from chrysalis_ray.evaluate.scores import read_report, read_select
from chrysalis_ray.evaluate.subjects import Candidate, Judge, Rows, mixture_of, with_inputs, with_own_rows
from chrysalis_ray.evaluate.tasks import ask_tasks, told_tasks
from chrysalis_ray.evaluate.verdict import make_verdict
from chrysalis_ray.evaluate.whole_inputs import input_sizes, refuse_too_little_room, throw_away
from chrysalis_ray.merge.whole_regmean import looks_at_whole_inputs
from chrysalis_ray.seed.adapter import adapter_sha256, read_config
from chrysalis_ray.seed.solo import is_plain
from chrysalis_ray.seed.streamed import open_adapter


@dataclass(frozen=True)
class Judging:
    """A trained population about to be judged. `variants` emerged from training; `tell` hears (stage, sentence), `record`
    an entry for the journal."""

    layout: RunLayout
    experiment: Any
    variants: Sequence[str]
    judge: Judge
    tell: Callable[[str, str], None]
    record: Callable[[str, dict[str, Any]], None]
    ask: Ask | None = None  # whoever can be asked probes
    chat_template: Path | None = None  # a file that stands in for the base's own
    compares: bool = True  # whether a body carries candidates side by side, so that they can be compared token by token

    def scores(self, candidates: Sequence[Candidate], split: str) -> Rows:
        return self.judge(candidates, split, self.experiment.evaluate.rows_per_domain)

    def of_variants(self, names: Sequence[str]) -> list[Candidate]:
        return [Candidate("seed"), *(Candidate(name, str(self.layout.adapter(name))) for name in names)]


def judge_and_merge(judging: Judging) -> None:
    """All of it, or what is left of it."""
    judge_variants(judging)
    audit_population(judging)
    merge_population(judging)
    judge_merges(judging)
    ask_probes(judging)
    ask_named_tasks(judging)
    tell_report(judging)  # the last: whoever has it is judged


def judge_variants(judging: Judging) -> None:
    """Scores of the seed and every variant on select; one that diverged is left out."""
    layout, names = judging.layout, judging.variants
    if layout.select_scores.exists():
        return
    candidates = judging.of_variants(names)
    asking = [spec for spec in judging.experiment.merge if needs_inputs(spec)]
    if any(not looks_at_whole_inputs(spec) for spec in asking):
        candidates = with_inputs(candidates, layout)
    if any(looks_at_whole_inputs(spec) for spec in asking):
        candidates = _with_room(judging, with_own_rows(candidates, layout)) or candidates
    scores = judging.scores(candidates, "select")
    sound = sound_scores(layout, scores, "select", needed=["seed"])
    write_json(layout.select_scores, {"split": "select", "candidates": sound})
    diverged = [name for name in scores if name not in sound]
    left_out = f"; {', '.join(diverged)} diverged and cannot be judged" if diverged else ""
    judging.tell("judge", f"{len(names)} variants and the seed on the select split{left_out}")


def _with_room(judging: Judging, candidates: Sequence[Candidate]) -> list[Candidate] | None:
    """The candidates, if there is room on the disk for what they feed the modules."""
    layout = judging.layout
    sizes = [input_sizes([open_adapter(Path(each.folder)).factors]) for each in candidates if each.own and each.folder]
    try:
        written = refuse_too_little_room(layout.root, sizes)
    except MergeError as error:
        judging.tell("judge", f"what the variants feed the modules is not measured: {error}")
        return None
    judging.tell("judge", f"what {len(sizes)} variants feed the modules, {written / 1e6:.0f} MB, is kept for the merges")
    return list(candidates)


def audit_population(judging: Judging) -> None:
    """Look at the variants before they are merged."""
    layout = judging.layout
    if layout.audit.exists():
        return
    folders = {"seed": layout.seed, **{name: layout.adapter(name) for name in judged(layout, judging.variants)}}
    if other := [name for name, folder in folders.items() if not is_plain(folder)]:
        kind = read_config(folders[other[0]]).get("peft_type")
        judging.tell(
            "audit", f"{kind} adapters that are no plain low-rank deltas cannot be compared: the winner alone comes of them"
        )
        return
    seed, *variants = [Source(name, path, open_adapter(path), adapter_sha256(path)) for name, path in folders.items()]
    found = audit_sources(variants, seed)
    write_json(layout.audit, found)
    judging.tell("audit", found["findings"][0])


def merge_population(judging: Judging) -> None:
    """Every merge that the experiment asks for, of the variants that were judged; what they alone went by is thrown away."""
    layout = judging.layout
    if not layout.merges_manifest.exists():
        _make_merges(judging)
    throw_away(layout)


def _make_merges(judging: Judging) -> None:
    layout = judging.layout
    made = merge_candidates(
        layout,
        judging.experiment.merge,
        judged(layout, judging.variants),
        lambda candidates: judging.scores(candidates, "select"),
        lambda line: judging.tell("merge", line),
    )["candidates"]
    for name, entry in made.items():
        judging.record("population.merge", {"name": name, "weights": entry["weights"], "sha256": entry["sha256"]})
    judging.tell("merge", ", ".join(f"{name} of {len(entry['weights'])}" for name, entry in made.items()))


def judge_merges(judging: Judging) -> None:
    """Add the merges to the select scores: the same rows, the same pass."""
    layout = judging.layout
    written = read_json(layout.select_scores)
    made = {name: Candidate(name, str(layout.merge(name))) for name in read_json(layout.merges_manifest)["candidates"]}
    names = [name for name in made if name not in written["candidates"]]
    if names:
        guarded = judging.experiment.evaluate.max_divergence is not None
        candidates = _beside_their_members(judging, list(made.values())) if guarded else [made[name] for name in names]
        scores = judging.scores(candidates, "select")
        written["candidates"] |= sound_scores(layout, {name: scores[name] for name in names}, "select", needed=[])
        write_json(layout.select_scores, written)
        judging.tell("judge", f"{len(names)} merges on the select split")


def _beside_their_members(judging: Judging, merges: Sequence[Candidate]) -> list[Candidate]:
    """The merges with all variants, so that they can be compared with those they were made of."""
    layout, names = judging.layout, judged(judging.layout, judging.variants)
    compare = compare_population(layout, "select", names, [merge.name for merge in merges])
    mixture = mixture_of(MIXTURE, [str(layout.adapter(name)) for name in names], compare)
    return [*merges, *judging.of_variants(names), mixture]


def ask_probes(judging: Judging) -> None:
    """What the seed, every variant and every merge that was judged answer to the probes. A winner is a variant once more."""
    layout, told = judging.layout, judging.experiment.evaluate
    if not told.probes or judging.ask is None:
        return
    merges = [name for name in merges_to_choose(layout) if name in read_select(layout.select_scores).candidates]
    candidates = [
        *judging.of_variants(judged(layout, judging.variants)),
        *(Candidate(name, str(layout.merge(name))) for name in merges),
    ]
    sentence = ask_population(layout, told, candidates, judging.ask, judging.chat_template)
    if sentence:
        judging.tell("probe", sentence)


def tell_report(judging: Judging) -> None:
    """Score what will be told on the report split: the seed, every variant, every merge that select has scores of, and what the
    variants say together."""
    layout = judging.layout
    names = judged(layout, judging.variants)
    choice = choice_on_select(layout, names, judging.experiment.evaluate)
    candidates = judging.of_variants(names)
    candidates += [Candidate(name, str(layout.merge(name))) for name in choice.merges]
    compare = compare_population(layout, "report", names, choice.merges) if judging.compares else None
    together = [mixture_of(MIXTURE, [str(layout.adapter(name)) for name in names], compare)] if len(names) > 1 else []
    scores = judging.scores([*candidates, *together], "report")
    sound = sound_scores(layout, scores, "report", needed=["seed", choice.winner, choice.chosen])
    write_json(layout.report_scores, {"split": "report", "candidates": sound})
    judging.tell("report", f"{len(candidates)} candidates told on the report split")


def ask_named_tasks(judging: Judging) -> None:
    """Ask tasks of lm-eval, where the experiment names any, of those that were chosen between. They change nothing any more."""
    layout, told = judging.layout, judging.experiment.evaluate
    if told.lm_eval is None or judging.ask is None:
        return
    choice = choice_on_select(layout, judged(layout, judging.variants), told)
    sentence = ask_tasks(layout, told.lm_eval, choice, judging.ask)
    if sentence:
        judging.tell("lm-eval", sentence)


def reach_verdict(layout: RunLayout, experiment: Any, variants: Sequence[str]) -> dict[str, Any]:
    """The verdict on a run that was judged, written to its file. Needs nobody who judges."""
    told, select, report = experiment.evaluate, read_select(layout.select_scores), read_report(layout.report_scores)
    choice = choice_on_select(layout, judged(layout, variants), told)
    verdict = make_verdict(
        choice,
        report,
        bootstrap_samples=told.bootstrap_samples,
        confidence=told.confidence,
        rng_seed=experiment.rng_seed,
    ).to_json()
    verdict["select"]["metrics"] = {name: select.metrics(name) for name in select.candidates}
    verdict["report"]["metrics"] = {name: report.metrics(name) for name in report.candidates}
    verdict["report"]["agreement"], agreeing = told_agreements(layout, told, choice, report, experiment.rng_seed)
    verdict["probes"], sentences = told_probes(layout, told, choice)
    verdict["lm_eval"], of_tasks = told_tasks(layout, told, choice)
    verdict["sentences"] += [*agreeing, *sentences, *of_tasks]
    write_json(layout.verdict, verdict)
    return verdict
