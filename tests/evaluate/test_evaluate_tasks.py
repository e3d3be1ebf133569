"""Tasks of lm-eval at the end of a run: asked of those that were chosen between, told with intervals, and heard by nobody."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_tasks import installed, write_tasks

from chrysalis_ray.config.experiment import Evaluate
from chrysalis_ray.config.lm_eval import LmEval
from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.evaluate.alone import Tasks, evaluate_folders
from chrysalis_ray.evaluate.asking import ask_candidates
from chrysalis_ray.evaluate.candidates import choice_on_select
from chrysalis_ray.evaluate.proportions import paired_difference, wilson
from chrysalis_ray.evaluate.questions import Reader
from chrysalis_ray.evaluate.stages import Judging, ask_named_tasks, reach_verdict
from chrysalis_ray.evaluate.tasks import check_tasks, told_tasks
from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.pack import Pack

NAME = "model.layers.0.self_attn.q_proj"
VARIANTS = ("v000-a", "v001-b")
LOSSES = {"seed": 4.0, "v000-a": 3.0, "v001-b": 3.2, "mean": 2.9}


@pytest.fixture
def layout(tmp_path, tiny_base):
    """A run whose variants and merge are there and judged."""
    layout = RunLayout(tmp_path / "run")
    generator = torch.Generator().manual_seed(1)
    for folder in [*map(layout.adapter, VARIANTS), layout.merge("mean")]:
        factors = {NAME: (torch.randn(3, 48, generator=generator), torch.randn(64, 3, generator=generator))}
        write_adapter(folder, AdapterWeights("tiny", None, 3, 6.0, False, (NAME,), factors))
    write_json(layout.base_manifest, {"path": str(tiny_base)})
    for path, split in ((layout.select_scores, "select"), (layout.report_scores, "report")):
        scores = {name: [["code", document, loss * 10, 10] for document in range(6)] for name, loss in LOSSES.items()}
        write_json(path, {"split": split, "candidates": scores})
    write_json(layout.merges_manifest, {"candidates": {"winner": {"method": "winner"}, "mean": {"method": "ensemble"}}})
    return layout


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return write_tasks(tmp_path, monkeypatch, 8)


class Told:
    """An experiment as far as judging looks at it."""

    rng_seed = 0

    def __init__(self, **lm_eval):
        self.evaluate = Evaluate.model_validate({"bootstrap_samples": 100, "lm_eval": lm_eval})


def nobody(*given):
    raise AssertionError("no loss is judged here")


@installed
@pytest.mark.slow
def test_the_chosen_the_best_variant_and_the_seed_get_what_each_gets_alone(layout, tiny_base, folder):
    experiment = Told(tasks=["tiny_choices", "tiny_rolling"], folder=str(folder))
    check_tasks(experiment.evaluate.lm_eval)
    before = choice_on_select(layout, VARIANTS, experiment.evaluate)
    pack = Pack(load_base(tiny_base, "fp32"), (NAME,), 2, 3, make_engine(0, "none", "fp32", "cpu"))
    asked, said = [], []

    def ask(candidates, questions):
        asked.append([each.name for each in candidates])
        return ask_candidates(pack, questions, candidates, Path, Reader(tiny_base).decode)

    judging = Judging(layout, experiment, VARIANTS, nobody, lambda *line: said.append(line), nobody, ask)
    ask_named_tasks(judging)
    count = len(asked)
    ask_named_tasks(judging)  # done is done
    assert len(asked) == count
    assert {tuple(names) for names in asked} == {("seed", "v000-a", "mean")}
    assert [stage for stage, _ in said] == ["lm-eval"]
    verdict = reach_verdict(layout, experiment, VARIANTS)
    assert verdict["chosen"] == before.chosen == "mean"  # by its loss, whatever it answers
    told = verdict["lm_eval"]
    folders = {"v000-a": str(layout.adapter("v000-a")), "mean": str(layout.merge("mean"))}
    alone = evaluate_folders(list(folders.values()), None, tiny_base, tasks=Tasks(("tiny_choices", "tiny_rolling"), folder))[
        "lm_eval"
    ]["tasks"]
    for name, expected in {"seed": "base", **folders}.items():
        own = told["tasks"]["tiny_choices"]["candidates"][name]["acc"]
        assert own["value"] == alone["tiny_choices"]["candidates"][expected]["acc"]
        assert (own["low"], own["high"]) == wilson(round(own["value"] * 8), 8, 0.95)
        rolling = told["tasks"]["tiny_rolling"]["candidates"][name]["bits_per_byte"]
        assert rolling["value"] == pytest.approx(alone["tiny_rolling"]["candidates"][expected]["bits_per_byte"], rel=1e-5)
    assert [each["against"] for each in told["tasks"]["tiny_choices"]["differences"]] == ["v000-a", "seed"]
    assert told["tasks"]["tiny_rolling"]["differences"] == []  # no share of right items
    assert [line.split(" of lm-eval")[0] for line in verdict["sentences"][-2:]] == ["Task tiny_choices", "Task tiny_rolling"]


@installed
@pytest.mark.slow
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(folder):
    with pytest.raises(EvaluationError, match="no task 'tiny_choises'; close to it: tiny_choices"):
        check_tasks(LmEval(tasks=("tiny_choises",), folder=str(folder)))
    with pytest.raises(EvaluationError, match=r"the data of arc_easy cannot be loaded(.|\n)*evaluate\.lm_eval\.folder"):
        check_tasks(LmEval(tasks=("arc_easy",)))


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "chrysalis_ray.evaluate.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    with pytest.raises(EvaluationError, match=r"lm-eval is not installed\n.*\[lm-eval\]"):
        check_tasks(LmEval(tasks=("arc_easy",)))


def test_an_extra_that_lacks_what_it_needs_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "chrysalis_ray.evaluate.harness", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text("import sacreblue_of_nobody")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EvaluationError, match=r"cannot be imported: No module named 'sacreblue_of_nobody'\n.*\[lm-eval\]"):
        check_tasks(LmEval(tasks=("arc_easy",)))


def test_without_tasks_nothing_is_asked_and_nothing_told(layout):
    experiment = Told(tasks=["x"])
    experiment.evaluate = Evaluate(bootstrap_samples=100)
    ask_named_tasks(Judging(layout, experiment, VARIANTS, nobody, nobody, nobody, nobody))
    assert reach_verdict(layout, experiment, VARIANTS)["lm_eval"] == {}
    assert not layout.tasks.exists()


def test_intervals_are_paired_where_items_are_right_or_wrong_and_normal_elsewhere(layout):
    experiment = Told(tasks=["sums", "words"])
    right = {"seed": [0, 0, 0, 1], "v000-a": [1, 0, 1, 1], "mean": [1, 1, 1, 1]}
    values = {"seed": 3.0, "v000-a": 2.5, "mean": 2.0}
    write_json(
        layout.tasks,
        {
            "version": "0.4.13",
            "tasks": {
                "sums": {
                    "items": 4,
                    "version": 1,
                    "candidates": {name: {"acc": sum(own) / 4, "acc_stderr": 0.1} for name, own in right.items()},
                },
                "words": {
                    "items": 9,
                    "version": 2,
                    "candidates": {
                        name: {"f1 (strict)": value, "f1_stderr (strict)": 0.25, "bleu": 7.0} for name, value in values.items()
                    },
                },
            },
            "right": {"sums": {name: {"acc": own} for name, own in right.items()}, "words": {name: {} for name in values}},
        },
    )
    told, sentences = told_tasks(layout, experiment.evaluate, choice_on_select(layout, VARIANTS, experiment.evaluate))
    assert told["difference_confidence"] == pytest.approx(0.95)  # one merge, one such metric
    sums, words = told["tasks"]["sums"], told["tasks"]["words"]
    low, high = wilson(4, 4, 0.95)
    assert sums["candidates"]["mean"]["acc"] == {"value": 1.0, "low": low, "high": high}
    mean, low, high = paired_difference(right["mean"], right["seed"], told["difference_confidence"])
    assert sums["differences"][1] == {
        "of": "mean", "against": "seed", "metric": "acc", "mean": mean, "low": low, "high": high
    }  # fmt: skip
    assert words["candidates"]["mean"]["f1 (strict)"]["low"] == pytest.approx(2.0 - 1.959964 * 0.25)
    assert words["candidates"]["mean"]["bleu"] == {"value": 7.0}
    assert words["differences"] == []
    assert sentences[0].startswith("Task sums of lm-eval 0.4.13, 4 items: acc of mean 1.0000 (0.51")
    assert "against v000-a +25.0% (interval" in sentences[0]
    assert sentences[1] == "Task words of lm-eval 0.4.13, 9 items: f1 (strict) of mean 2.0000 (1.5100 to 2.4900)."


def test_what_was_asked_is_read_again_from_its_file(layout):
    write_json(layout.tasks, {"version": "0.4.13", "tasks": {}, "right": {}})
    experiment = Told(tasks=["x"])
    ask_named_tasks(Judging(layout, experiment, VARIANTS, nobody, nobody, nobody, nobody))
    assert reach_verdict(layout, experiment, VARIANTS)["lm_eval"]["version"] == "0.4.13"
    assert read_json(layout.verdict)["lm_eval"]["tasks"] == {}


GROUP = """
group: tiny_group
task: [tiny_choices, tiny_rolling]
"""


@installed
@pytest.mark.slow
def test_a_group_of_tasks_that_has_no_metric_of_its_own_is_told_task_by_task(layout, tiny_base, folder):
    (folder / "group.yaml").write_text(GROUP)
    experiment = Told(tasks=["tiny_group"], folder=str(folder))
    pack = Pack(load_base(tiny_base, "fp32"), (NAME,), 2, 3, make_engine(0, "none", "fp32", "cpu"))

    def ask(candidates, questions):
        return ask_candidates(pack, questions, candidates, Path, Reader(tiny_base).decode)

    check_tasks(experiment.evaluate.lm_eval)
    ask_named_tasks(Judging(layout, experiment, VARIANTS, nobody, lambda *line: None, nobody, ask))
    verdict = reach_verdict(layout, experiment, VARIANTS)
    assert [line.split(" of lm-eval")[0] for line in verdict["sentences"][-2:]] == ["Task tiny_choices", "Task tiny_rolling"]
