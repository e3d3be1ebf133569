"""A candidate whose loss is no number is left out and told; it does not end the run of the others."""

import json
import math

import pytest

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import write_json
from chrysalis_ray.evaluate.candidates import choice_on_select, judged, sound_scores

SCORES = {
    "seed": [["code", 0, 4.0, 2], ["text", 1, 6.0, 2]],
    "v000-code": [["code", 0, 3.0, 2], ["text", 1, math.nan, 2]],
    "v001-text": [["code", 0, 3.5, 2], ["text", 1, 5.0, 2]],
    "ensemble": [["code", 0, math.inf, 2], ["text", 1, 5.0, 2]],
}


def test_diverged_candidates_are_left_out_with_their_reason(tmp_path):
    layout = RunLayout(tmp_path)
    sound = sound_scores(layout, SCORES, "select", needed=["seed"])
    assert list(sound) == ["seed", "v001-text"]
    assert "text (select) is nan" in json.loads((layout.failed / "v000-code-select.json").read_text())["reason"]
    write_json(layout.select_scores, {"split": "select", "candidates": sound})
    write_json(layout.merges_manifest, {"candidates": {"winner": {"method": "winner"}, "ensemble": {"method": "ensemble"}}})
    names = judged(layout, ["v000-code", "v001-text"])
    assert names == ["v001-text"]
    assert choice_on_select(layout, names).chosen == "v001-text"


def test_without_the_seed_or_without_any_variant_there_is_no_judgement(tmp_path):
    layout = RunLayout(tmp_path)
    with pytest.raises(EvaluationError, match="v000-code cannot be judged"):
        sound_scores(layout, SCORES, "report", needed=["seed", "v000-code"])
    write_json(layout.select_scores, {"split": "select", "candidates": {"seed": SCORES["seed"]}})
    with pytest.raises(EvaluationError, match="none of 1 variants"):
        judged(layout, ["v000-code"])
