"""The heats of a probe: who can race in one body, on what, and what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.errors import ConfigError
from chrysalis_ray.population.branch import Branching, bank_rank, blueprint_hyperparameters, branch_population
from chrysalis_ray.training.planning.choice import chooser
from chrysalis_ray.training.planning.hardware import GIB, Hardware
from chrysalis_ray.training.planning.heats import heats_of, question_of, with_probe
from chrysalis_ray.training.planning.planner import plan

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
LAPTOP = Hardware(cpus=2, memory=16 * GIB)
GPU = Hardware(cpus=16, memory=128 * GIB, gpus=1, gpu_memory=80 * GIB, gpu_name="NVIDIA H100 80GB HBM3")


@pytest.fixture(autouse=True)
def no_models_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def load(name: str, *settings: str, hardware: Hardware = LAPTOP):
    return load_experiment(EXPERIMENTS / f"{name}.yaml", settings, chooser(hardware=hardware))


def test_auto_races_its_own_alternatives_in_one_body() -> None:
    loaded = load("quickstart", "blueprint=auto", "base={type: embedded}", "probe={learning_rates: [1, 3], ranks: [1, 2]}")
    assert loaded.chosen is not None
    own = loaded.blueprint
    rate, rank = own.optimizer.learning_rate, own.lora.rank
    names = [name for name, _ in loaded.candidates]
    assert names == [
        "auto",
        f"rank {2 * rank}",
        f"learning rate {3 * rate:g}",
        f"learning rate {3 * rate:g} and rank {2 * rank}",
    ]
    (heat,) = heats_of(loaded)
    assert heat.names == tuple(names)
    made = [(b.optimizer.learning_rate, b.lora.rank) for b in heat.blueprints]
    assert made == [(rate, rank), (rate, 2 * rank), (pytest.approx(3 * rate), rank), (pytest.approx(3 * rate), 2 * rank)]
    assert bank_rank(heat.loaded) == 2 * rank
    population = heat.loaded.experiment.population
    assert population.tokens_per_variant == loaded.experiment.population.tokens_per_variant // 10
    assert (population.variants, population.paired, population.scheduler.type) == (4, True, "fifo")
    assert [merge.method for merge in heat.loaded.experiment.merge] == ["winner"]
    assert heat.loaded.experiment.tracking.wandb == "disabled"
    assert heat.loaded.experiment.genome == loaded.experiment.genome


def test_each_variant_of_a_heat_is_one_blueprint_and_all_see_the_same_rows_and_tokens(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        "extends: tiny\nname: other\noptimizer: {type: rmsprop, learning_rate: 5e-4, beta2: 0.9}\n"
        "lora: {rank: 4, use_rslora: true}\nlanes: {rows_per_step: 4}\nschedule: {decay: wsd, decay_fraction: 0.3}\n"
    )
    loaded = load("quickstart", f"probe={{candidates: [{other}], tokens: 5000}}")
    (heat,) = heats_of(loaded)
    branching = Branching(
        heat.loaded.experiment, heat.loaded.blueprint, ("code", "docstrings"), "s", "g", "b", listed=heat.blueprints
    )
    first, second = branch_population(branching)
    assert [first.hyperparameters, second.hyperparameters] == list(map(blueprint_hyperparameters, heat.blueprints))
    assert second.hyperparameters.optimizer == "rmsprop"
    assert second.hyperparameters.decay_fraction == 0.3
    assert (first.rows_per_step, second.rows_per_step) == (2, 4)
    assert first.steps * 2 == second.steps * 4
    assert first.tokens_per_step * first.steps <= 5000
    assert (first.rng_seed, first.epigenome) == (second.rng_seed, second.epigenome)


def test_what_cannot_share_a_body_races_in_a_heat_of_its_own() -> None:
    loaded = load("three_mixes", "probe={candidates: [qwen3-1.7b, smollm2-360m], tokens: 400000}", hardware=GPU)
    heats = heats_of(loaded)
    assert [heat.names for heat in heats] == [("qwen3-0.6b",), ("qwen3-1.7b",), ("smollm2-360m",)]
    assert len({heat.loaded.base.model for heat in heats}) == 3
    assert all(heat.loaded.experiment.genome == loaded.experiment.genome for heat in heats)
    assert [heat.loaded.body.slots for heat in heats] == [8, "auto", "auto"]
    for heat in heats:  # shares 3/5 + 1/3 + 1/5 of web and of mathematics, 1/5 + 1/3 + 1/5 of encyclopedia: the mean of three
        express = heat.loaded.experiment.population.epigenomes.mixes[0].express
        assert express == pytest.approx({"encyclopedia": 11 / 17, "mathematics": 1.0, "web": 1.0})
    one_base = load("three_mixes", "base={type: pretrained, model: Qwen/Qwen3-0.6B}", "probe={candidates: [qwen3-1.7b]}")
    assert [heat.names for heat in heats_of(one_base)] == [("qwen3-0.6b", "qwen3-1.7b")]  # two recipes for one base


@pytest.mark.parametrize(
    "change",
    [
        "lora.init=eva",
        "lanes.sequence_length=64",
        "body.precision=bf16",
        "body.quantization=int8",
        "lora.targets=[q_proj]",
        "lora.exclude=[q_proj]",
        "lora.layers=[0]",
    ],
)
def test_other_arithmetic_is_another_body(change: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("extends: tiny\nname: other\n")
    same = load("quickstart", f"probe={{candidates: [{tmp_path / 'other.yaml'}]}}")
    assert len(heats_of(same)) == 1
    section, _, rest = change.partition(".")
    key, _, value = rest.partition("=")
    (tmp_path / "other.yaml").write_text(f"extends: tiny\nname: other\n{section}: {{{key}: {value}}}\n")
    other = load("quickstart", f"probe={{candidates: [{tmp_path / 'other.yaml'}]}}")
    sizes = [len(heat.names) for heat in heats_of(other)]
    assert sizes == ([2] if change == "lanes.sequence_length=64" else [1, 1])  # 64 is what tiny has
    assert len({heat.base for heat in heats_of(other)}) == (2 if section == "body" else 1)  # their bare bases differ


SOLO = ("merge=[{method: winner}]", "body.slots=1", "population.search={learning_rate: {type: choice, values: [1e-3]}}")


def test_another_kind_of_adapter_is_another_body(tmp_path: Path) -> None:
    """Whatever the blueprint says of LoRA: a LoHa must not race as the LoRA in whose place it stands."""
    (tmp_path / "kind.yaml").write_text("extends: tiny\nname: kind\nadapter: {type: loha, rank: 4}\n")
    heats = heats_of(load("quickstart", *SOLO, f"probe={{candidates: [{tmp_path / 'kind.yaml'}]}}"))
    assert [heat.loaded.blueprint.adapter_type for heat in heats] == ["lora", "loha"]
    asked = question_of(heats)
    (tmp_path / "kind.yaml").write_text("extends: tiny\nname: kind\nadapter: {type: loha, rank: 2}\n")
    assert question_of(heats_of(load("quickstart", *SOLO, f"probe={{candidates: [{tmp_path / 'kind.yaml'}]}}"))) != asked


@pytest.mark.parametrize(
    ("adapter", "ranks"),
    [
        ("{type: loha, rank: 8}", [[8, 8], [16, 16], [3, 3]]),
        ("{type: hra, rank: 8}", [[8, 8], [16, 16]]),  # an even number of reflections
        ("{type: ia3}", [[1, 1]]),  # of no rank
    ],
)
def test_alternatives_of_another_kind_have_its_own_ranks(adapter: str, ranks: list[list[int]], tmp_path: Path) -> None:
    (tmp_path / "kind.yaml").write_text(f"extends: tiny\nname: kind\nadapter: {adapter}\n")
    probe = "probe={learning_rates: [1, 3], ranks: [1, 2, 0.4]}"
    heats = heats_of(load("quickstart", *SOLO, f"blueprint={tmp_path / 'kind.yaml'}", probe))
    assert [[blueprint.rank for blueprint in heat.blueprints] for heat in heats] == ranks
    assert [bank_rank(heat.loaded) for heat in heats] == [own[0] for own in ranks]


def test_the_question_is_of_all_that_the_outcome_depends_on(tmp_path: Path) -> None:
    def asked(*settings: str) -> str:
        return question_of(heats_of(load("quickstart", "probe={ranks: [1, 2], tokens: 4096}", *settings)))

    first = asked()
    assert asked("description=other words", "tracking.tags=[x]") == first
    for change in ("probe.tokens=8192", "probe.ranks=[1, 0.5]", "rng_seed=18", "blueprint.optimizer.clip=2.0",
                   "probe.rows_per_domain=9", "blueprint.lora.layers=[0]", "genome.sources.0.max_megabytes=0.4"):  # fmt: skip
        assert asked(change) != first, change


def test_the_plan_says_what_the_probe_costs() -> None:
    loaded = load("quickstart", "probe={tokens: 4096, learning_rates: [1, 2], ranks: [1]}")
    planned = with_probe(plan(loaded, LAPTOP), loaded, LAPTOP)
    note, vain = (note for note in planned.notes if note.startswith("probe: "))
    assert vain == "probe: population.search draws learning_rate for each variant, whatever the probe decides"
    assert (
        "first 2 blueprints (tiny, learning rate 0.004) train 4,096 tokens each in 1 short population: 8,192 tokens, about"
        in note
    )
    assert planned.lines() != plan(loaded, LAPTOP).lines()
    without = load("quickstart")
    assert with_probe(plan(without, LAPTOP), without, LAPTOP) == plan(without, LAPTOP)
    beyond = load("three_mixes", "probe={candidates: [qwen3-8b-zero3]}", hardware=GPU)
    notes = with_probe(plan(beyond, GPU), beyond, GPU).notes
    assert any(note.startswith("probe: qwen3-8b-zero3 cannot be tried here: a body needs") for note in notes)


def test_steps_that_never_meet_within_the_budget_are_one_typed_error(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("extends: tiny\nname: other\nlanes: {rows_per_step: 7}\n")
    loaded = load("quickstart", f"probe={{candidates: [{tmp_path / 'other.yaml'}], tokens: 500}}")
    with pytest.raises(ConfigError, match=r"probe.tokens: 500 are not one step of tiny, .*meet every 896 tokens"):
        heats_of(loaded)
