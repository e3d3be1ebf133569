"""The probe of an experiment, from its heats to the blueprint that a run uses.

    probe/question.json    what is to be decided, written first
    probe/heat-00/ ...     short populations, laid out like runs up to their select scores
    probe/probe.json       who was chosen and why, written last

A killed probe goes on where it stopped, heat by heat and turn by turn; one that is finished is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from chrysalis_ray.config.resolve import Chosen, LoadedExperiment
from chrysalis_ray.config.writing import blueprint_text
from chrysalis_ray.core.errors import RunError, VariantLost
from chrysalis_ray.core.layout import CACHE, CacheLayout, ProbeLayout, RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.evaluate.contest import BARE, Contest, Judged, decide
from chrysalis_ray.evaluate.scores import SelectScores, read_select
from chrysalis_ray.population.branch import read_branch
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.heats import Heat, heats_of, in_vain, question_of
from chrysalis_ray.training.planning.planner import plan

Tell = Callable[[str, str], None]  # stage, sentence
Rehearse = Callable[[Heat, RunLayout], None]


def decided(loaded: LoadedExperiment, layout: RunLayout) -> LoadedExperiment:
    """`loaded` with the blueprint that was chosen in this run directory; as it is where there is nothing to choose, or nothing
    chosen yet. Raises RunError where the probe there is one of other candidates."""
    if not loaded.candidates or not layout.probe().question.exists():
        return loaded
    question = question_of(heats_of(loaded))
    _check_question(layout.probe(), question)
    if not layout.probe().outcome.exists():
        return loaded
    return with_chosen(loaded, _read_outcome(layout.probe()), question)


def hold_probe(
    loaded: LoadedExperiment,
    layout: RunLayout,
    tell: Tell,
    joined: Callable[[], AbstractContextManager[None]],
    rehearse: Rehearse,
    look: Callable[[], Hardware] | None = None,
) -> LoadedExperiment:
    """`loaded` with the blueprint that its probe chooses, or chose before.

    `joined` is Ray for as long as heats run, and `rehearse` runs one. With `look` a heat that has no room on what it finds is
    not run; without, as on a cluster that may grow, it waits for room. Raises RunError where the directory is one of another
    experiment, EvaluationError where nothing could be tried.
    """
    heats = heats_of(loaded)
    question, probe = question_of(heats), layout.probe()
    if layout.run_manifest.exists() and not probe.question.exists():
        raise RunError(
            f"{layout.root} holds a run that no probe decided",
            "give this one another --name, or leave the probe out; nothing in it was touched",
        )
    if not probe.question.exists():
        chosen = {"chosen": loaded.chosen.to_json()} if loaded.chosen else {}
        write_json(probe.question, {"question": question, "candidates": [list(heat.names) for heat in heats], **chosen})
    _check_question(probe, question)
    if not probe.outcome.exists():
        for line in (_what(heats), *in_vain(loaded)):
            tell("probe", line)
        contest = _race(loaded, heats, probe, tell, joined, rehearse, look)
        write_json(probe.outcome, {"question": question, **contest.to_json()})
    contest = _read_outcome(probe)
    for line in contest.lines():
        tell("probe", line)
    return with_chosen(loaded, contest, question)


def with_chosen(loaded: LoadedExperiment, contest: Contest, question: str) -> LoadedExperiment:
    """The experiment as the chosen candidate has it; its text and the reasons are kept with the run."""
    winner = dict(loaded.candidates)[contest.winner]
    reasons = (*(winner.chosen.reasons if winner.chosen else ()), f"probe: {contest.sentence}")
    text = blueprint_text(winner.blueprint, reasons)
    asked = loaded.chosen.question if loaded.chosen else question
    chosen = Chosen(text, reasons, winner.experiment.population.tokens_per_variant, asked, probed=True)
    experiment = winner.experiment.model_copy(update={"probe": loaded.experiment.probe})
    return replace(winner, experiment=experiment, chosen=chosen, overrides=loaded.overrides, blueprint_text=text, candidates=())


# heats --------------------------------------------------------------------------------------------------------------


def _race(
    loaded: LoadedExperiment,
    heats: Sequence[Heat],
    probe: ProbeLayout,
    tell: Tell,
    joined: Callable[[], AbstractContextManager[None]],
    rehearse: Rehearse,
    look: Callable[[], Hardware] | None,
) -> Contest:
    """Run what has not been run, and choose."""
    judged: list[Judged] = []
    failed: dict[str, str] = {}
    with joined():
        for heat in heats:
            lack = _obstacle(heat, probe, look)
            if lack is not None:
                tell("probe", f"{', '.join(heat.names)} cannot be tried here: {lack}")
                failed |= dict.fromkeys(heat.names, f"cannot be tried here: {lack}")
                continue
            scores, lost = _scores(heat, probe.heat(heat.name), rehearse)
            failed |= lost
            judged += [Judged(heat.base, scores)] if scores else []
    told = loaded.experiment.evaluate
    return decide(
        judged,
        loaded.candidates[0][0],
        failed,
        bootstrap_samples=told.bootstrap_samples,
        confidence=told.confidence,
        rng_seed=loaded.experiment.rng_seed,
    )


def _obstacle(heat: Heat, probe: ProbeLayout, look: Callable[[], Hardware] | None) -> str | None:
    if look is None:
        return None
    cache = CacheLayout(probe.root.parent.parent / CACHE)
    return next(iter(plan(heat.loaded, look(), cache).obstacles), None)


def _scores(heat: Heat, layout: RunLayout, rehearse: Rehearse) -> tuple[SelectScores | None, dict[str, str]]:
    """The select scores of a heat's candidates, by their names, and of the bare base; and what became of those without."""
    if not layout.select_scores.exists():
        try:
            rehearse(heat, layout)
        except VariantLost as error:  # none of them emerged
            return None, dict.fromkeys(heat.names, error.message)
    told = read_select(layout.select_scores).candidates
    ids = {variant.variant_id: heat.names[variant.index] for variant in read_branch(layout)}
    rows = {name: told[variant_id] for variant_id, name in ids.items() if variant_id in told}
    lost = {name: _became(layout, variant_id) for variant_id, name in ids.items() if variant_id not in told}
    return (SelectScores({**rows, BARE: told["seed"]}) if rows else None), lost


def _became(layout: RunLayout, variant_id: str) -> str:
    """What became of a variant that was not judged."""
    row: Mapping[str, object] = read_json(layout.population_manifest)["variants"].get(variant_id, {})
    return str(row.get("reason") or "its loss on select is no number")


def _what(heats: Sequence[Heat]) -> str:
    candidates = sum(len(heat.names) for heat in heats)
    tokens = heats[0].loaded.experiment.population.tokens_per_variant
    where = "in one body" if len(heats) == 1 else f"in {len(heats)} heats, one after another"
    return f"{candidates} blueprints, {tokens:,} tokens each, {where}; judged on select"


# files --------------------------------------------------------------------------------------------------------------


def _check_question(probe: ProbeLayout, question: str) -> None:
    """Raises RunError if the probe that lies there is one of other candidates, or damaged."""
    try:
        asked = read_json(probe.question)["question"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{probe.question} is damaged: {error}", f"delete {probe.root} to probe again") from error
    if asked != question:
        raise RunError(
            f"{probe.root} holds a probe of other candidates, text or budget than this experiment asks for",
            f"put the experiment back, give this run another --name, or delete {probe.root} to probe again",
        )


def _read_outcome(probe: ProbeLayout) -> Contest:
    try:
        content = read_json(probe.outcome)
        return Contest.from_json({key: value for key, value in content.items() if key != "question"})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{probe.outcome} is damaged: {error}", "delete it; it is made again from the heats") from error
