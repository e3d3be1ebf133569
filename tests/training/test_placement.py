"""What a body leaves open is chosen by memory and time, with the reason, once; and what was written stands."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from measurements import LAPTOP, measurement

from chrysalis_ray.body.morphology import Morphology
from chrysalis_ray.config.claim import claim_run, run_directory
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.errors import ConfigError, RunError
from chrysalis_ray.core.layout import CACHE, CacheLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.training.planning.forecast import settle_plan
from chrysalis_ray.training.planning.hardware import GIB, Hardware
from chrysalis_ray.training.planning.measured import keep_measurement
from chrysalis_ray.training.planning.pace import Pace
from chrysalis_ray.training.planning.plan import Plan
from chrysalis_ray.training.planning.planner import plan

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
QUICKSTART = EXPERIMENTS / "quickstart.yaml"
OPEN = ("count", "workers", "zero_stage", "offload", "activation_checkpointing")
EVERYTHING = [f"body.{name}=auto" for name in OPEN]


def gpus(count: int, gibibytes: int = 80, name: str = "NVIDIA H100 80GB HBM3") -> Hardware:
    return Hardware(cpus=16 * count, memory=128 * count * GIB, gpus=count, gpu_memory=gibibytes * GIB, gpu_name=name)


def mixes(blueprint: str, variants: int, *more: str) -> LoadedExperiment:
    settings = [f"blueprint={blueprint}", f"population.variants={variants}", "population.epigenomes={type: brightened}", *more]
    return load_experiment(EXPERIMENTS / "three_mixes.yaml", settings)


def shape_of_body(planned: Plan) -> tuple[object, ...]:
    return tuple(getattr(planned.body, name) for name in OPEN)


def reasons(planned: Plan) -> str:
    return "\n".join(planned.chosen)


def test_eight_variants_on_eight_gpus_are_eight_bodies() -> None:
    planned = plan(mixes("qwen3-1.7b", 8), gpus(8))
    assert (planned.body.count, planned.body.workers, planned.bodies_at_once) == (8, 1, 8)
    assert planned.fits
    assert "body.count: auto: 8 bodies of 1 worker, on 8 of 8 GPUs; 8.0 times as fast as 1 body of 1 worker" in reasons(planned)
    assert "chosen: body.count" in "\n".join(planned.lines())
    assert list(planned.chosen) == planned.to_json()["chosen"]


def test_one_variant_on_eight_gpus_is_one_body_of_several_workers() -> None:
    planned = plan(mixes("qwen3-8b", 1, "body.workers=auto", "blueprint.lanes.rows_per_microstep=16"), gpus(8))
    assert (planned.body.count, planned.body.workers) == (1, 8)
    assert "body.count and body.workers: auto: 1 body of 8 workers" in reasons(planned)


def test_short_lanes_share_one_gpu_and_leave_the_others_free() -> None:
    """Below the ridge eight variants on one GPU are nearly as fast as one on each of eight."""
    short = ["blueprint.lanes={sequence_length: 64, rows_per_step: 1}", "evaluate.rows_per_report=1"]
    planned = plan(mixes("qwen3-0.6b", 8, *short, "body.count=auto", "body.slots=auto"), gpus(8))
    assert (planned.body.count, planned.body.workers, planned.body.slots) == (1, 1, 8)
    assert "more would save less than a tenth of the time" in reasons(planned)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (gpus(8), (1, 8, 0, "none", True)),  # 61 GiB of weights beside what a variant needs
        (gpus(8, 24, "NVIDIA GeForce RTX 4090"), (1, 8, 3, "none", True)),
        (gpus(1), (1, 1, 3, "cpu", True)),
    ],
    ids=["large", "small", "one"],
)
def test_sharding_offload_and_recomputing_come_where_memory_says_so(machine: Hardware, expected: tuple[object, ...]) -> None:
    planned = plan(mixes("qwen3-32b", 3), machine)
    assert planned.fits, planned.obstacles
    assert shape_of_body(planned) == expected
    assert "body.activation_checkpointing: auto means true: with false a worker would need" in reasons(planned)
    stage = "auto means 3: with 0 a worker would need" if expected[2] else "auto means 0: a worker needs"
    assert f"body.zero_stage: {stage}" in reasons(planned)


def test_what_has_room_is_neither_sharded_nor_recomputed() -> None:
    planned = plan(mixes("qwen3-0.6b", 2, *EVERYTHING), gpus(2))
    assert shape_of_body(planned)[2:] == (0, "none", False)


def test_where_nothing_fits_it_is_said_and_the_exit_code_is_3() -> None:
    planned = plan(mixes("qwen3-32b", 3), gpus(1, 24, "NVIDIA GeForce RTX 4090"))
    assert planned.exit_code == 3
    assert "nothing has room here, and this needs the least" in reasons(planned)
    assert any("a worker needs" in obstacle for obstacle in planned.obstacles)


def test_where_only_one_body_has_room_it_is_said() -> None:
    tight = Hardware(cpus=2, memory=int(1.2 * GIB), processor="Test")
    told = reasons(plan(load_experiment(QUICKSTART, ["body.count=auto", "body.threads=1"]), tight))
    assert "body.count: auto: 1 body of 1 worker, on 1 of 2 workers that the cores allow; more have no room" in told


def test_without_gpus_or_sizes_the_careful_choice_is_taken() -> None:
    blind = plan(mixes("qwen3-32b", 3), LAPTOP)
    assert shape_of_body(blind) == (1, 1, 0, "none", True)
    assert "there is no GPU here to plan for" in reasons(blind)
    unknown = plan(load_experiment(QUICKSTART, ["base={type: pretrained, model: a/b}", "body.count=auto"]), LAPTOP)
    assert unknown.body.count == 1
    assert "sizes of the base are not known" in reasons(unknown)


@pytest.mark.parametrize(("blueprint", "variants", "machine"), [("qwen3-1.7b", 5, gpus(4)), ("gemma-2-9b", 3, gpus(4, 40))])
def test_no_hand_written_body_is_more_than_a_tenth_faster(blueprint: str, variants: int, machine: Hardware) -> None:
    """Oracle: every body that could have been written by hand, planned as such."""
    rows = "blueprint.lanes.rows_per_microstep=4"
    chosen = plan(mixes(blueprint, variants, *EVERYTHING, rows), machine)
    assert chosen.fits
    assert chosen.time is not None
    best = chosen.time.train_expected + chosen.time.judge
    for count, workers, zero, again in itertools.product((1, 2, 3, 4), (1, 2, 4), (0, 3), (False, True)):
        if zero == 3 and workers == 1:
            continue
        written = [f"body.count={count}", f"body.workers={workers}", f"body.zero_stage={zero}"]
        other = plan(mixes(blueprint, variants, *written, f"body.activation_checkpointing={str(again).lower()}", rows), machine)
        if other.fits and other.bodies_at_once == min(count, variants):
            assert other.time is not None
            assert other.time.train_expected + other.time.judge >= best / 1.1 - 1e-9


def test_what_was_written_stands_and_what_goes_with_it_follows() -> None:
    planned = plan(mixes("qwen3-1.7b", 8, "body.count=2", "body.activation_checkpointing=true"), gpus(8))
    assert (planned.body.count, planned.body.activation_checkpointing) == (2, True)
    assert "body." not in reasons(planned)
    offloaded = plan(mixes("qwen3-32b", 3, "body.offload=cpu"), gpus(2))
    assert (offloaded.body.zero_stage, offloaded.body.offload) == (3, "cpu")
    quantised = plan(mixes("qwen3-32b", 3, "body.quantization=int8", "body.zero_stage=auto"), gpus(4))
    assert quantised.body.zero_stage == 0
    strict = mixes("qwen3-8b", 1, "body.workers=auto", "blueprint.lanes.rows_per_microstep=16")
    strict = strict.with_body(virtual_workers=4, lanes="fixed")
    assert plan(strict, gpus(8)).body.workers == 4


@pytest.mark.parametrize("slots", ["auto", "2"])
def test_a_searcher_that_learns_gets_fewer_places_than_variants(slots: str) -> None:
    told = ["body.count=auto", f"body.slots={slots}", "body.gpus_per_worker=1", "population.variants=32"]
    planned = plan(load_experiment(EXPERIMENTS / "search_mixes.yaml", told), gpus(32))
    assert 1 <= planned.slots_used * planned.bodies <= 8


def test_schedulers_that_compare_all_at_once_get_a_place_for_each() -> None:
    planned = plan(load_experiment(EXPERIMENTS / "pbt.yaml", ["body.count=auto", "body.slots=auto"]), LAPTOP)
    assert planned.slots_used * planned.bodies >= planned.variants


@pytest.mark.parametrize(
    "wrong", ["count=automatic", "count=0", "workers=some", "zero_stage=1", "offload=disk", "activation_checkpointing=perhaps"]
)
def test_a_field_is_a_value_or_auto(wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"body\.{wrong.partition('=')[0]}"):
        load_experiment(QUICKSTART, [f"body.{wrong}"])


def test_measurements_decide_only_where_every_kind_was_measured(tmp_path: Path) -> None:
    loaded, cache = load_experiment(QUICKSTART, ["body.activation_checkpointing=auto"]), CacheLayout(tmp_path)
    slow = Pace("sum", launch=0.1, per_token=1e-2)
    plain = load_experiment(QUICKSTART)
    keep_measurement(cache, measurement(plain, pace=slow))
    assert plan(loaded, LAPTOP, cache).body.activation_checkpointing is False  # the other kind is only guessed
    again = load_experiment(QUICKSTART, ["body.activation_checkpointing=true"])
    keep_measurement(cache, measurement(again, pace=replace(slow, per_token=1e-4)))
    assert plan(loaded, LAPTOP, cache).body.activation_checkpointing is True


def test_it_is_settled_once_and_a_resume_keeps_the_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_experiment(QUICKSTART, [*EVERYTHING, "body.slots=auto"])
    layout, cache, told = run_directory(loaded, tmp_path, None), CacheLayout(tmp_path / CACHE), []
    claim_run(loaded, layout)
    machine = Hardware(cpus=8, memory=32 * GIB, processor="Test")
    monkeypatch.setattr(Hardware, "local", classmethod(lambda cls: machine))
    settled = settle_plan(loaded, layout, cache, lambda name, line: told.append(name))
    assert (settled.open, settled.body.slots) == ((), read_json(layout.run_manifest)["slots"])
    assert told[-1] == "plan"
    assert told.count("chosen") >= 2
    kept = read_json(layout.run_manifest)["body"]
    assert kept == {name: getattr(Morphology() >> settled.body, name) for name in OPEN}
    write_json(layout.run_manifest, {**read_json(layout.run_manifest), "body": {**kept, "count": 3}})
    layout.plan.unlink()
    monkeypatch.setattr(Hardware, "local", classmethod(lambda cls: replace(machine, cpus=1)))
    assert settle_plan(loaded, layout, cache).body.count == 3
    assert claim_run(loaded, layout) == read_json(layout.run_manifest)["run_id"]
    for damaged in ({**kept, "count": "many"}, {"count": 3}, "three"):
        write_json(layout.run_manifest, {**read_json(layout.run_manifest), "body": damaged})
        with pytest.raises(RunError, match="holds no body"):
            settle_plan(loaded, layout, cache)
