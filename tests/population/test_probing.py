"""A probe's files: what is done is not done again, what cannot be tried is told, and nobody takes over another's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from chrysalis_ray.config.claim import claim_run, run_directory
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.errors import EvaluationError, RunError, VariantLost
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.population.branch import Branching, branch_population, write_branch
from chrysalis_ray.population.probing import decided, hold_probe
from chrysalis_ray.training.planning.choice import chooser
from chrysalis_ray.training.planning.hardware import GIB, Hardware
from chrysalis_ray.training.planning.heats import Heat

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
LAPTOP = Hardware(cpus=2, memory=16 * GIB)
AUTO = ["blueprint=auto", "base={type: embedded}", "probe={learning_rates: [1, 3], ranks: [1], tokens: 4096}"]


class Track:
    """Heats that end with losses written down beforehand: below the first by what is told of each candidate."""

    def __init__(self, below: dict[str, float]) -> None:
        self.below = below
        self.run: list[tuple[str, ...]] = []

    def __call__(self, heat: Heat, layout: RunLayout) -> None:
        self.run.append(heat.names)
        if all(name not in self.below for name in heat.names):
            raise VariantLost("no variant emerged", "look into failed/")
        branching = Branching(heat.loaded.experiment, heat.loaded.blueprint, ("code",), "s", "g", "b", listed=heat.blueprints)
        variants = branch_population(branching)
        write_branch(layout, variants)
        rows = {"seed": 0.0} | {
            variant.variant_id: self.below[name]
            for name, variant in zip(heat.names, variants, strict=True)
            if name in self.below
        }
        states = {variant.variant_id: {"state": "evicted", "reason": "its loss is no number"} for variant in variants}
        write_json(layout.population_manifest, {"variants": states})
        told = {name: [["code", place, 100.0 - 10 * by + place, 10, 40] for place in range(20)] for name, by in rows.items()}
        write_json(layout.select_scores, {"split": "select", "candidates": told})


def hold(loaded, layout: RunLayout, track: Track, hardware: Hardware | None = LAPTOP):
    said: list[str] = []
    look = None if hardware is None else lambda: hardware
    return hold_probe(loaded, layout, lambda _, line: said.append(line), nullcontext, track, look), said


def load(runs: Path, *settings: str, hardware: Hardware = LAPTOP):
    return load_experiment(EXPERIMENTS / "quickstart.yaml", settings, chooser(runs, hardware=hardware))


def test_the_winner_becomes_the_run_and_stays_it_whatever_the_machine(tmp_path: Path) -> None:
    loaded = load(tmp_path, *AUTO)
    names = [name for name, _ in loaded.candidates]
    layout = run_directory(loaded, tmp_path, None)
    chosen, said = hold(loaded, layout, Track({names[0]: 0.1, names[1]: 0.3}))
    assert said[-1].startswith(f"{names[1]}: better than auto by 0.2000")
    assert chosen.blueprint == dict(loaded.candidates)[names[1]].blueprint
    run_directory(loaded, tmp_path, None)  # what a probe leaves is no stranger
    claim_run(chosen, layout)
    assert read_json(layout.run_manifest)["chosen"]["probed"] is True
    again = load(tmp_path, *AUTO, hardware=Hardware(cpus=64, memory=256 * GIB, gpus=8, gpu_memory=80 * GIB))
    assert again.candidates == ()
    assert again.resolved() == chosen.resolved()
    assert claim_run(again, layout)


def test_what_a_probe_began_with_holds_on_another_machine_too(tmp_path: Path) -> None:
    loaded = load(tmp_path, *AUTO)
    layout = run_directory(loaded, tmp_path, None)
    with pytest.raises(EvaluationError, match="none of 2 blueprints could be tried"):
        hold(loaded, layout, Track({}))
    elsewhere = load(tmp_path, *AUTO, hardware=Hardware(cpus=64, memory=256 * GIB))
    assert [candidate.blueprint for _, candidate in elsewhere.candidates] == [c.blueprint for _, c in loaded.candidates]
    other = load(tmp_path, *AUTO, "probe.tokens=8192")
    with pytest.raises(RunError, match="holds a probe of other candidates"):
        hold(other, layout, Track({}))


def test_heats_that_are_judged_are_not_run_again_and_named_blueprints_stay_chosen(tmp_path: Path) -> None:
    (tmp_path / "longer.yaml").write_text("extends: tiny\nname: longer\nlanes: {sequence_length: 128}\n")
    loaded = load(tmp_path, f"probe={{candidates: [{tmp_path / 'longer.yaml'}], tokens: 8192}}")
    own, longer = (name for name, _ in loaded.candidates)
    layout = run_directory(loaded, tmp_path, None)
    assert decided(loaded, layout) is loaded
    track = Track({own: 0.1})
    chosen, said = hold(loaded, layout, track)
    assert track.run == [(own,), (longer,)]
    assert chosen.blueprint == loaded.blueprint
    assert any("no variant emerged" in line for line in said)
    layout.probe().outcome.unlink()
    again = Track({longer: 0.5})
    chosen, _ = hold(loaded, layout, again)
    assert again.run == [(longer,)]
    assert chosen.blueprint.name == "longer"
    assert chosen.experiment.probe == loaded.experiment.probe
    assert decided(loaded, layout).resolved() == chosen.resolved()
    third = Track({})
    assert hold(loaded, layout, third)[0].resolved() == chosen.resolved()
    assert third.run == []


def test_one_that_was_lost_is_told_and_the_others_decide(tmp_path: Path) -> None:
    loaded = load(tmp_path, *AUTO)
    names = [name for name, _ in loaded.candidates]
    chosen, said = hold(loaded, run_directory(loaded, tmp_path, None), Track({names[1]: 0.3}))
    assert chosen.blueprint == dict(loaded.candidates)[names[1]].blueprint
    assert "auto was not judged (its loss is no number)" in said[-1]


def test_what_has_no_room_here_is_not_tried_but_waits_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load(tmp_path, "probe={candidates: [smollm2-360m], tokens: 40000}", "population.tokens_per_variant=300000")
    track = Track({"tiny": 0.1, "smollm2-360m": 0.2})
    chosen, said = hold(loaded, RunLayout(tmp_path / "here"), track)
    assert track.run == [("tiny",)]
    assert chosen.blueprint.name == "tiny"
    assert any(line.startswith("smollm2-360m cannot be tried here: a body needs 4 CPU cores") for line in said)
    waits = Track({"tiny": 0.1, "smollm2-360m": 0.2})
    hold(loaded, RunLayout(tmp_path / "there"), waits, None)
    assert waits.run == [("tiny",), ("smollm2-360m",)]


def test_a_run_that_no_probe_decided_is_not_touched(tmp_path: Path) -> None:
    loaded, probed = load(tmp_path), load(tmp_path, "probe={ranks: [0.5], learning_rates: [1]}")
    layout = run_directory(loaded, tmp_path, None)
    claim_run(loaded, layout)
    before = sorted(tmp_path.rglob("*"))
    track = Track({"tiny": 0.1, "rank 4": 0.1})
    with pytest.raises(RunError, match="holds a run that no probe decided"):
        hold(probed, layout, track)
    assert track.run == []
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["question", "outcome"])
def test_a_damaged_file_is_one_typed_error(name: str, tmp_path: Path) -> None:
    loaded = load(tmp_path, "probe={ranks: [0.5], learning_rates: [1]}")
    layout = RunLayout(tmp_path / "run")
    hold(loaded, layout, Track({"tiny": 0.1, "rank 4": 0.1}))
    for text in ("{", "[]", '{"question": 1}'):
        getattr(layout.probe(), name).write_text(text)
        with pytest.raises(RunError, match=r"is damaged|other candidates"):
            decided(loaded, layout)
