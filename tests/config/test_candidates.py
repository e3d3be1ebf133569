"""What may be written under `probe:`, and that an experiment without one is the run it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from chrysalis_ray.config.loading import experiment_schema, load_experiment
from chrysalis_ray.core.errors import ConfigError
from chrysalis_ray.training.planning.choice import chooser
from chrysalis_ray.training.planning.hardware import GIB, Hardware

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.yaml"
LAPTOP = Hardware(cpus=2, memory=16 * GIB)


def load(*settings: str):
    return load_experiment(QUICKSTART, settings, chooser(hardware=LAPTOP))


def test_an_experiment_without_a_probe_names_the_same_run_as_before() -> None:
    loaded = load()
    assert loaded.candidates == ()
    assert "probe" not in loaded.resolved()["experiment"]
    probed = load("probe={}")
    assert probed.resolved()["experiment"]["probe"]["candidates"] == []
    assert probed.resolved()["sha256"] != loaded.resolved()["sha256"]
    assert probed.candidates[0][1].resolved()["sha256"] == loaded.resolved()["sha256"]


def test_candidates_are_read_as_if_each_stood_there_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: tiny\nname: mine\nlora: {rank: 2}\n")
    loaded = load(f"probe={{candidates: [{tmp_path / 'mine.yaml'}]}}", "blueprint.lora.alpha=3")
    assert [name for name, _ in loaded.candidates] == ["tiny", str(tmp_path / "mine.yaml")]
    own, mine = (candidate for _, candidate in loaded.candidates)
    assert own.blueprint == loaded.blueprint
    assert (mine.blueprint.name, mine.blueprint.lora.rank) == ("mine", 2)
    assert mine.blueprint.lora.alpha == own.blueprint.lora.alpha == 3  # --set reaches into each
    assert mine.experiment.probe is own.experiment.probe is None


def test_open_tokens_are_those_of_the_rules_for_all(tmp_path: Path) -> None:
    told = ["blueprint=auto", "base={type: embedded}", "population.tokens_per_variant=auto", "probe={candidates: [tiny]}"]
    loaded = load(*told)
    tokens = {candidate.experiment.population.tokens_per_variant for _, candidate in loaded.candidates}
    assert tokens == {loaded.experiment.population.tokens_per_variant}


def test_ranks_that_the_base_has_no_room_for_are_not_tried() -> None:
    names = [name for name, _ in load("probe={learning_rates: [1], ranks: [1, 2, 1000]}").candidates]
    assert names == ["tiny", "rank 16"]


def test_factors_that_leave_no_number_are_not_tried() -> None:
    names = [name for name, _ in load("probe={learning_rates: [1, 1.0e-322], ranks: [1, 2, 1.0e+308]}").candidates]
    assert names == ["tiny", "rank 16"]


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        ("{candidates: [qwen3-0.6]}", "probe.candidates.0: 'qwen3-0.6' is no candidate: --set: blueprint: no blueprint"),
        ("{candidates: [tiny]}", "'tiny' is the experiment's own blueprint"),
        ("{candidates: [gemma-3-1b, gemma-3-1b]}", "gemma-3-1b stands there twice"),
        ("{candidates: [smollm3-3b], ranks: [1]}", "probe.ranks: makes alternatives where no candidates are written"),
        ("{learning_rates: [1], ranks: [1]}", "there is nothing to decide"),
        ("{learning_rates: [0]}", "probe.learning_rates.0: must be > 0"),
        ("{tokens: 100}", "100 tokens are less than one step of tiny; write at least 128"),
        ("{token: 100}", "did you mean 'tokens'"),
        ("{candidates: [auto]}", "'auto' is no candidate: --set: blueprint: auto is chosen for a base"),
    ],
)
def test_what_cannot_be_tried_is_told_with_its_place(probe: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"probe={probe}")
    assert words in str(caught.value)


def test_the_schema_knows_the_probe() -> None:
    assert "tokens" in experiment_schema()["$defs"]["BlueprintProbe"]["properties"]
