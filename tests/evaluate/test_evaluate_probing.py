"""Probes within a run: asked once, told with paired intervals, and a guard only where the experiment says so."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chrysalis_ray.config.experiment import Evaluate
from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import write_json
from chrysalis_ray.evaluate.answers import ReportAnswers, SelectAnswers, dealt, drops
from chrysalis_ray.evaluate.asking import ask_candidates
from chrysalis_ray.evaluate.candidates import choice_on_select
from chrysalis_ray.evaluate.probes import judge_probes
from chrysalis_ray.evaluate.probing import check_probes
from chrysalis_ray.evaluate.proportions import paired_difference, share, wilson
from chrysalis_ray.evaluate.questions import Reader
from chrysalis_ray.evaluate.stages import Judging, ask_probes, reach_verdict
from chrysalis_ray.evaluate.subjects import Candidate
from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.pack import Pack

NAME = "model.layers.0.self_attn.q_proj"
WORDS = ("self", "import", "return", "def", "args", "for", "print", "class")
CHOICES = {
    "name": "words",
    "kind": "multiple_choice",
    "items": [{"prompt": word, "choices": [" a", " self", " x"], "answer": n % 3} for n, word in enumerate(WORDS)],
}
WRITTEN = {
    "name": "written",
    "kind": "regex",
    "max_new_tokens": 6,
    "items": [{"prompt": word, "pattern": "[a-m]"} for word in WORDS],
}
VARIANTS = ("v000-a", "v001-b")
LOSSES = {"seed": 4.0, "v000-a": 3.0, "v001-b": 3.2, "mean": 2.9, "tilted": 2.8}


@pytest.fixture
def layout(tmp_path, tiny_base):
    """A run whose variants and merges are there and judged."""
    layout = RunLayout(tmp_path / "run")
    generator = torch.Generator().manual_seed(1)
    folders = [layout.adapter(name) for name in VARIANTS] + [layout.merge(name) for name in ("mean", "tilted")]
    for folder in folders:
        factors = {NAME: (torch.randn(3, 48, generator=generator), torch.randn(64, 3, generator=generator))}
        write_adapter(folder, AdapterWeights("tiny", None, 3, 6.0, False, (NAME,), factors))
    write_json(layout.base_manifest, {"path": str(tiny_base)})
    for path, split in ((layout.select_scores, "select"), (layout.report_scores, "report")):
        scores = {name: [["code", document, loss * 10, 10] for document in range(6)] for name, loss in LOSSES.items()}
        write_json(path, {"split": split, "candidates": scores})
    methods = {"winner": "winner", "mean": "ensemble", "tilted": "ensemble"}
    write_json(layout.merges_manifest, {"candidates": {name: {"method": method} for name, method in methods.items()}})
    return layout


class Told:
    """An experiment as far as judging looks at it."""

    rng_seed = 0

    def __init__(self, **settings):
        self.evaluate = Evaluate.model_validate({"probes": [CHOICES, WRITTEN], "bootstrap_samples": 100, **settings})


def judging(layout, base, experiment):
    pack = Pack(load_base(base, "fp32"), (NAME,), 2, 3, make_engine(0, "none", "fp32", "cpu"))
    asked: list[list[str]] = []

    def ask(candidates, questions):
        asked.append([each.name for each in candidates])
        return ask_candidates(pack, questions, candidates, Path, Reader(base).decode)

    def nobody(*given):
        raise AssertionError("no loss is judged here")

    told: list[tuple[str, str]] = []
    return Judging(layout, experiment, VARIANTS, nobody, lambda *line: told.append(line), nobody, ask), asked, told


def test_everybody_is_asked_once_and_the_verdict_tells_what_each_would_have_got_alone(layout, tiny_base):
    experiment = Told()
    stage, asked, told = judging(layout, tiny_base, experiment)
    ask_probes(stage)
    ask_probes(stage)  # done is done
    assert asked == [["seed", *VARIANTS, "mean", "tilted"]]
    assert told == [("probe", "16 items of 2 probes, asked of 5 candidates")]
    verdict = reach_verdict(layout, experiment, VARIANTS)
    pack = Pack(load_base(tiny_base, "fp32"), (NAME,), 1, 3, make_engine(0, "none", "fp32", "cpu"))
    alone = [Candidate("seed"), Candidate("tilted", str(layout.merge("tilted")))]
    expected = judge_probes(pack, Reader(tiny_base), 256, experiment.evaluate.probes, alone, Path)
    for probe, by_candidate in expected.items():
        for name, found in by_candidate.items():
            assert verdict["probes"][probe]["candidates"][name] == found
    assert verdict["chosen"] == "tilted"  # by its loss, whatever it answers
    for difference in verdict["probes"]["words"]["differences"]:
        own = verdict["probes"]["words"]["candidates"]
        assert difference["mean"] == pytest.approx(own["tilted"]["accuracy"] - own[difference["against"]]["accuracy"])
        assert difference["low"] <= difference["mean"] <= difference["high"]
    assert [each["against"] for each in verdict["probes"]["words"]["differences"]] == ["v000-a", "seed"]
    assert [line.split(":")[0] for line in verdict["sentences"] if line.startswith("Probe")] == ["Probe words", "Probe written"]


def marks_in(layout):
    return json.loads(layout.probes.read_text())


def test_a_guard_refuses_what_answers_less_and_no_item_both_guards_and_tells(layout, tiny_base):
    experiment = Told(max_probe_drop=0.2)
    stage, _, _ = judging(layout, tiny_base, experiment)
    ask_probes(stage)
    written = marks_in(layout)
    for probe in ("words", "written"):
        guards, tells = (written[split][probe]["items"] for split in ("select", "report"))
        assert sorted([*guards, *tells]) == list(range(len(WORDS)))
        assert len(guards) == len(tells)
    right = written["select"]["words"]["right"]
    right["v000-a"], right["mean"], right["tilted"] = [1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 0, 1]
    for name in ("v000-a", "mean", "tilted"):
        written["select"]["written"]["right"][name] = [1, 1, 1, 1]
    write_json(layout.probes, written)
    choice = choice_on_select(layout, VARIANTS, experiment.evaluate)
    assert choice.chosen == "mean"
    assert "on words it answers 50.0% right, v000-a 75.0%" in choice.refused["tilted"]
    assert choice_on_select(layout, VARIANTS, Told().evaluate).chosen == "tilted"
    verdict = reach_verdict(layout, experiment, VARIANTS)
    assert verdict["probes"]["words"]["items"] == 4
    assert verdict["choice"]["refused"] == verdict["select"]["refused"] == choice.refused


def test_what_tells_does_not_choose(layout):
    answers = ReportAnswers({"words": {"v000-a": (True,), "mean": (False,)}})
    with pytest.raises(TypeError, match="only SelectAnswers"):
        drops(answers, ["mean"], "v000-a", 0.1)
    write_json(layout.probes, {"select": {}})
    assert SelectAnswers.load(layout.probes).probes == ()
    with pytest.raises(EvaluationError, match="no answers that tell"):
        ReportAnswers.load(layout.probes)


def test_halves_depend_on_the_items_and_not_on_their_order():
    (probe, _) = Told().evaluate.probes
    turned = probe.model_copy(update={"items": probe.items[::-1]})
    guards = {probe.items[n].prompt for n in dealt(probe, guarded=True)["select"]}
    assert guards == {turned.items[n].prompt for n in dealt(turned, guarded=True)["select"]}
    assert dealt(probe, guarded=False) == {"select": [], "report": list(range(len(WORDS)))}


def test_a_question_that_the_base_cannot_be_asked_is_told_before_the_training(tiny_base):
    long = {**WRITTEN, "max_new_tokens": 300}
    with pytest.raises(
        EvaluationError, match="written: 'self' has 1 tokens and is answered with up to 300; the base takes 256"
    ):
        check_probes(Told(probes=[long]).evaluate.probes, tiny_base, None)


# intervals ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
@settings(max_examples=60)
def test_a_paired_interval_holds_its_difference_and_turns_round_with_it(pairs):
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    mean, low, high = paired_difference(ours, theirs)
    assert -1 <= low <= mean <= high <= 1
    assert mean == pytest.approx((sum(ours) - sum(theirs)) / len(pairs))
    turned = paired_difference(theirs, ours)
    assert turned == pytest.approx((-mean, -high, -low))
    assert share(ours)["accuracy"] == sum(ours) / len(ours)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Every outcome of 20 pairs, weighed by its likelihood: the interval covers the true difference about 95 % of the time."""
    total = 20
    for truth in ((0.4, 0.2, 0.1, 0.3), (0.7, 0.1, 0.1, 0.1), (0.25, 0.25, 0.25, 0.25)):
        true, covered = truth[1] - truth[2], 0.0
        for both, ours, theirs in itertools.product(range(total + 1), repeat=3):
            neither = total - both - ours - theirs
            if neither < 0:
                continue
            counts = (both, ours, theirs, neither)
            ways = math.factorial(total) // math.prod(math.factorial(count) for count in counts)
            likelihood = ways * math.prod(p**count for p, count in zip(truth, counts, strict=True))
            cells = ((True, True), (True, False), (False, True), (False, False))
            pairs = [cell for cell, count in zip(cells, counts, strict=True) for _ in range(count)]
            _, low, high = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
            covered += likelihood * (low <= true <= high)
        assert 0.93 < covered < 0.99


def test_an_interval_of_a_share_is_wilsons():
    low, high = wilson(81, 263)  # Newcombe (1998a), table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
