"""A candidate whose loss is no number is left out and told; it does not end the run of the others."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chrysalis_ray.config.merges import read_merge
from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import write_json
from chrysalis_ray.evaluate.candidates import choice_on_select, judged, merge_candidates, select_losses, sound_scores
from chrysalis_ray.evaluate.greedy import greedy_members
from chrysalis_ray.seed.adapter import AdapterWeights, read_adapter, write_adapter

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


def nobody(candidates):
    raise AssertionError("only a greedy soup asks a judge")


def test_every_method_of_an_experiment_is_made_and_what_it_left_out_is_told_by_name(tmp_path):
    layout = RunLayout(tmp_path)
    generator = torch.Generator().manual_seed(0)
    names = [f"v{number:03d}-code" for number in range(5)]
    a_ri = torch.randn(2, 9, generator=generator)
    write_adapter(layout.seed, AdapterWeights("base", None, 2, 4.0, False, ("q",), {"layers.0.q": (a_ri, torch.zeros(7, 2))}))
    for name in names:
        factors = {"layers.0.q": (a_ri + 0.1 * torch.randn(2, 9, generator=generator), torch.randn(7, 2, generator=generator))}
        write_adapter(layout.adapter(name), AdapterWeights("base", None, 2, 4.0, False, ("q",), factors))
    losses = {name: 5.0 if name == names[3] else 2.0 + 0.01 * number for number, name in enumerate(names)}
    scores = {name: [["code", 0, 2 * loss, 2]] for name, loss in {"seed": 3.0, **losses}.items()}
    write_json(layout.select_scores, {"split": "select", "candidates": scores})
    settings = {"tall": ["space=dense"], "ensemble": ["weights=softmax"], "slerp": ["rank=exact"]}
    methods = ("winner", "ensemble", "consensus", "slerp", "ties", "dare", "tall", "tsv")
    specs = [
        read_merge(method, ["best_share=1", *settings.get(method, [])] if method != "winner" else []) for method in methods
    ]
    made = merge_candidates(layout, specs, names, judge=nobody)
    assert list(made["candidates"]) == list(methods)
    assert made["failed"] == {}
    assert list(made["candidates"]["consensus"]["notes"]["held_out"]) == [names[3]]
    assert made["candidates"]["consensus"]["weights"][names[3]] == 0.0
    assert made["candidates"]["winner"]["weights"][names[0]] == 1.0
    assert read_adapter(layout.merge("slerp")).rank > 2
    assert read_adapter(layout.merge("tall")).rank == 2


@pytest.mark.parametrize("method", ["ensemble", "slerp"])
def test_a_greedy_soup_takes_in_whom_the_judge_finds_no_worse(tmp_path, method):
    """The judge measures how far a merge's delta is from a target; the same greedy walk by hand comes to the same members."""
    layout = RunLayout(tmp_path)
    generator = torch.Generator().manual_seed(3)
    names = [f"v{number:03d}-code" for number in range(6)]
    a_ri, target_or = torch.randn(3, 8, generator=generator), torch.randn(7, 3, generator=generator)
    write_adapter(layout.seed, AdapterWeights("base", None, 3, 3.0, False, ("q",), {"layers.0.q": (a_ri, torch.zeros(7, 3))}))
    deltas = {}
    for number, name in enumerate(names):
        noise = 2.0 if number == 4 else 0.7
        b_or = target_or + noise * torch.randn(7, 3, generator=generator)
        write_adapter(layout.adapter(name), AdapterWeights("base", None, 3, 3.0, False, ("q",), {"layers.0.q": (a_ri, b_or)}))
        deltas[name] = b_or @ a_ri

    def distance(delta):
        return float((delta - target_or @ a_ri).norm())

    def delta_of(folder):
        adapter = read_adapter(Path(folder))
        a, b = adapter.factors["layers.0.q"]
        return adapter.scale * b @ a

    asked = []

    def judge(candidates):
        """Adapters by what was written, blends by the deltas of their members."""
        asked.append([candidate.made for candidate in candidates])
        made = {
            each.name: sum((weight * delta_of(folder) for folder, weight in each.members), torch.zeros(7, 8))
            if each.made == "blend"
            else delta_of(each.folder)
            for each in candidates
        }
        return {name: [("code", 0, distance(delta), 1, None, None)] for name, delta in made.items()}

    losses = {name: distance(delta) for name, delta in deltas.items()}
    scores = {name: [["code", 0, loss, 1]] for name, loss in {"seed": 99.0, **losses}.items()}
    write_json(layout.select_scores, {"split": "select", "candidates": scores})
    left_by_a_kill = layout.merge(f".{method}")
    left_by_a_kill.mkdir(parents=True)
    (left_by_a_kill / "adapter_model.safetensors").write_bytes(b"half of one")
    heard = []
    spec = read_merge(method, ["best_share=1", "weights=greedy"])
    (entry,) = merge_candidates(layout, [spec], names, judge, heard.append)["candidates"].values()
    assert len(heard) == len(names) - 1
    assert len(set(entry["weights"].values())) == 1
    assert distance(delta_of(layout.merge(method))) <= min(losses.values()) + 1e-5
    assert {kind for kinds in asked for kind in kinds} == {"blend" if method == "ensemble" else "adapter"}
    assert len(asked) <= 5
    assert [path.name for path in layout.merges.iterdir() if path.name.startswith(".")] == []
    if method == "ensemble":
        soup = [min(losses, key=losses.get)]
        for name in sorted(losses, key=losses.get)[1:]:
            trial = [*soup, name]
            if distance(sum(deltas[n] for n in trial) / len(trial)) <= distance(sum(deltas[n] for n in soup) / len(soup)):
                soup = trial
        assert sorted(entry["weights"]) == sorted(soup)
        assert 1 < len(soup) < 6
        assert names[4] not in soup


def test_a_soup_that_diverges_stays_out():
    rows = {"a": [("code", 0, math.nan, 2), ("text", 1, 2.0, 2)], "b": [("code", 0, 4.0, 2), ("text", 1, 2.0, 2)]}
    assert select_losses(rows) == {"a": math.inf, "b": 1.5}
    assert greedy_members(["a", "b"], {"a": 1.0, "b": 2.0}, lambda trials: [math.inf] * len(trials)) == ["a"]


@given(st.lists(st.floats(0.0, 4.0), min_size=1, max_size=7), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_looking_ahead_changes_nothing_but_how_often_it_is_asked(alone, ahead, chance):
    names = [f"v{number}" for number in range(len(alone))]
    losses = dict(zip(names, alone, strict=True))
    drawn = {}
    calls = []

    def taste(trials):
        calls.append(len(trials))
        return [drawn.setdefault(trial, chance.choice([0.5, 1.0, 2.0, 3.0])) for trial in trials]

    soup = greedy_members(names, losses, taste, ahead=ahead)
    assert soup == greedy_members(names, losses, lambda trials: [drawn[trial] for trial in trials])
    assert len(calls) <= -(-(len(names) - 1) // ahead)
    assert all(count <= 2**ahead - 1 for count in calls)
