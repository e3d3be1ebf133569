"""Probes of an experiment: files and inline alike; what is asked is part of the experiment's hash."""

from __future__ import annotations

from pathlib import Path

import pytest

from chrysalis_ray.config.loading import experiment_schema, load_experiment
from chrysalis_ray.config.questions import ChoiceProbe, ContainsProbe, is_generated
from chrysalis_ray.core.errors import ConfigError

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.yaml"
FILE = 'name: plurals\nkind: multiple_choice\nitems:\n  - {prompt: "two", choices: [" mice", " mouses"], answer: 0}\n'
INLINE = "{name: sums, kind: contains, max_new_tokens: 4, items: [{messages: [{role: user, content: 2+2}], answer: '4'}]}"


def loaded(folder, probes, more=""):
    text = QUICKSTART.read_text(encoding="utf-8").replace("evaluate:\n", f"evaluate:\n  probes: [{probes}]\n{more}")
    (folder / "e.yaml").write_text(text, encoding="utf-8")
    return load_experiment(folder / "e.yaml")


def test_a_probe_stands_in_a_file_or_in_the_experiment(tmp_path):
    (tmp_path / "plurals.yaml").write_text(FILE)
    asked = loaded(tmp_path, f"plurals.yaml, {INLINE}")
    first, second = asked.experiment.evaluate.probes
    assert isinstance(first, ChoiceProbe)
    assert isinstance(second, ContainsProbe)
    assert [is_generated(first), is_generated(second)] == [False, True]
    before = asked.resolved()
    assert before["experiment"]["evaluate"]["probes"][0]["items"][0]["choices"] == [" mice", " mouses"]
    (tmp_path / "plurals.yaml").write_text(FILE.replace("mouses", "mouse"))
    assert loaded(tmp_path, f"plurals.yaml, {INLINE}").resolved()["sha256"] != before["sha256"]
    (tmp_path / "plurals.yaml").rename(tmp_path / "moved.yaml")
    (tmp_path / "moved.yaml").write_text(FILE + "# a comment\n")
    assert loaded(tmp_path, f"moved.yaml, {INLINE}").resolved()["sha256"] == before["sha256"]


@pytest.mark.parametrize(
    ("probes", "more", "words"),
    [
        ("absent.yaml", "", ("evaluate.probes.0", "absent.yaml", "no such file")),
        ("plurals.yaml, plurals.yaml", "", ("evaluate.probes.1", "two probes are called 'plurals'")),
        ("broken.yaml", "", ("e.yaml", "evaluate.probes.0", "broken.yaml:2", "kind")),
        ("plurals.yaml", "  max_probe_drop: 0.1\n", ("plurals has one item", "half")),
        ("", "  max_probe_drop: 0.1\n", ("there are none",)),
        (INLINE.replace("contains", "contain"), "", ("did you mean 'contains'",)),
        (INLINE.replace("answer", "anser"), "", ("did you mean 'answer'",)),
        (INLINE.replace("role: user", "role: assistant"), "", ("the user speaks last",)),
        (INLINE.replace("answer: '4'", "answer: '4', prompt: x"), "", ("one of the two",)),
        ("{name: r, kind: regex, items: [{prompt: x, pattern: '('}]}", "", ("no regular expression",)),
        ("{name: m, kind: exact_match, stop: [x], items: [{prompt: x, answer: y}]}", "", ("by: generation",)),
        ("{name: m, items: []}", "", ("kind", "exact_match")),
    ],
)  # fmt: skip
def test_a_probe_that_is_written_wrong_is_told_before_anything_starts(tmp_path, probes, more, words):
    (tmp_path / "plurals.yaml").write_text(FILE)
    (tmp_path / "broken.yaml").write_text(FILE.replace("multiple_choice", "guess"))
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, probes, more)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_editors_are_told_that_a_probe_may_be_a_file():
    items = experiment_schema()["$defs"]["Evaluate"]["properties"]["probes"]["items"]
    assert {"type": "string"} in items["anyOf"]


def with_tasks(folder, lm_eval):
    text = QUICKSTART.read_text(encoding="utf-8").replace("evaluate:\n", f"evaluate:\n  lm_eval: {lm_eval}\n")
    (folder / "e.yaml").write_text(text, encoding="utf-8")
    return load_experiment(folder / "e.yaml")


def test_tasks_of_lm_eval_lie_beside_the_experiment_and_are_part_of_its_hash(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sums.yaml").write_text("task: sums\n")
    asked = with_tasks(tmp_path, "{tasks: [sums, arc_easy], folder: mine, limit: 200}")
    told = asked.experiment.evaluate.lm_eval
    assert (told.tasks, told.folder, told.limit) == (("sums", "arc_easy"), str(tmp_path / "mine"), 200)
    assert with_tasks(tmp_path, "{tasks: [sums], folder: mine}").resolved()["sha256"] != asked.resolved()["sha256"]


@pytest.mark.parametrize(
    ("lm_eval", "words"),
    [
        ("{tasks: [x], folder: absent}", ("evaluate.lm_eval.folder", "no folder with the YAML of tasks")),
        ("{tasks: []}", ("evaluate.lm_eval.tasks",)),
        ("{tasks: [x, x]}", ("'x' is named twice",)),
        ("{tasks: ['../x']}", ("evaluate.lm_eval.tasks.0",)),
        ("{task: [x]}", ("did you mean 'tasks'",)),
        ("{tasks: [x], limit: 0}", ("evaluate.lm_eval.limit",)),
    ],
)
def test_tasks_that_are_written_wrong_are_told_before_anything_starts(tmp_path, lm_eval, words):
    with pytest.raises(ConfigError) as caught:
        with_tasks(tmp_path, lm_eval)
    assert all(word in str(caught.value) for word in words), str(caught.value)
