"""What was measured, and what is made of it: the law, the record, the probe itself in real processes, the choice of slots."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from measurements import LAPTOP, measurement

from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.errors import ConfigError, ModelError
from chrysalis_ray.core.layout import CacheLayout
from chrysalis_ray.training.planning.duration import survivors, turns_of
from chrysalis_ray.training.planning.fitting import Scored, fit
from chrysalis_ray.training.planning.footprint import RAY_IN_A_WORKER, worker_memory
from chrysalis_ray.training.planning.hardware import GIB, Hardware, check_compiler
from chrysalis_ray.training.planning.measure import measure
from chrysalis_ray.training.planning.measured import Holding, Lane, Point, find_measurement, keep_measurement
from chrysalis_ray.training.planning.pace import Pace
from chrysalis_ray.training.planning.planner import allowed_slots, plan
from chrysalis_ray.training.planning.shapes import KNOWN, ModelShape, read_shape, shape_of

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
QUICKSTART = EXPERIMENTS / "quickstart.yaml"
TINY = [
    "blueprint.base.hidden_size=64", "blueprint.base.layers=2", "blueprint.base.heads=4", "blueprint.base.head_size=16",
    "blueprint.base.vocabulary=512", "blueprint.base.intermediate_size=128", "population.variants=4", "body.slots=4",
]  # fmt: skip
# A quarter of a MiB of activations per token: two variants need at once far more than one.
HUNGRY = [*TINY, "blueprint.base.hidden_size=32", "blueprint.base.heads=2", "blueprint.base.intermediate_size=8192",
          "blueprint.lanes={sequence_length: 256, rows_per_step: 4}", "population.variants=2", "body.slots=2"]  # fmt: skip
ROOM = 750 << 20  # beyond what is imported: enough for one of them


def points_of(law: Pace, loads: list[tuple[int, int, int, int]]) -> list[Point]:
    return [Point(n, rows, length, micro, law.step(n, rows * length, length, micro)) for n, rows, length, micro in loads]


LOADS = [(1, 2, 64, 1), (2, 2, 64, 1), (4, 2, 64, 1), (8, 2, 64, 1), (8, 2, 64, 2), (1, 2, 32, 1), (8, 2, 32, 1)]


@given(
    st.sampled_from(["sum", "roofline"]), st.floats(1e-4, 1e-1), st.floats(1e-6, 1e-3), st.floats(0, 1e-6),
    st.sampled_from([1, 2, 4]), st.floats(1.0, 2.0),
)  # fmt: skip
def test_the_law_is_found_in_steps_that_follow_it(
    kind: str, launch: float, per_token: float, per_token_length: float, shards: int, crowding: float
) -> None:
    crowding = crowding if shards > 1 else 1.0
    law = Pace(kind, launch, per_token, per_token_length, per_variant=1e-4, shards=shards, crowding=crowding)  # type: ignore[arg-type]
    points = points_of(law, LOADS)
    found = fit(points, workers=1, shards=shards, per_variant=1e-4, scored=Scored(8, 512, 1.0), keep=0.0)
    assert found.residual <= found.rejected
    assert found.residual < (1e-6 if kind == "sum" else 0.2)
    for point in points:
        told = found.pace.step(point.variants, point.rows * point.length, point.length, point.microsteps)
        assert told == pytest.approx(point.seconds, rel=1e-5 if kind == "sum" else 0.4)
    assert min(found.pace.launch, found.pace.per_token, found.pace.per_token_length) >= 0.0


def test_a_clear_roofline_is_called_one() -> None:
    law = Pace("roofline", launch=0.04, per_token=8e-6)
    points = points_of(law, [(n, 1, 1024, 1) for n in (1, 2, 4, 8, 16, 32)])
    found = fit(points, workers=1, shards=1, per_variant=0.0, scored=Scored(8, 512, 1.0), keep=0.0)
    assert found.pace.kind == "roofline"
    assert (found.pace.launch, found.pace.ridge(1024)) == (pytest.approx(0.04), 5000)
    assert found.pace.gain(4, 1024, 1024) == pytest.approx(4.0)
    assert found.pace.gain(16, 8192, 1024) == pytest.approx(1.0)


def test_no_point_with_one_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="one variant"):
        fit([Point(2, 1, 64, 1, 0.1)], 1, 2, 0.0, Scored(1, 1, 1.0), 0.0)


@pytest.mark.parametrize(("arrivals", "factor"), [(8, 2.0), (8, 4.0), (12, 3.0), (1, 2.0)])
def test_survivors_of_a_rung_are_those_of_ray_tunes_rule(arrivals: int, factor: float) -> None:
    """Oracle: the rule of `ASHAScheduler`, a percentile of those that came before, on random orders."""
    generator, kept = np.random.default_rng(0), []
    for _ in range(2500):
        recorded: list[float] = []
        alive = 0
        for score in generator.random(arrivals):
            cutoff = np.nanpercentile(recorded, (1 - 1 / factor) * 100) if recorded else -math.inf
            alive += score >= cutoff
            recorded.append(score)
        kept.append(alive)
    assert survivors(arrivals, factor) == pytest.approx(float(np.mean(kept)), rel=0.04)


# the record ---------------------------------------------------------------------------------------------------------


def test_a_record_is_found_again_by_its_question_and_the_nearest_lanes(tmp_path: Path) -> None:
    loaded, cache = load_experiment(QUICKSTART), CacheLayout(tmp_path)
    shape = shape_of(loaded.base)
    assert find_measurement(loaded, shape, LAPTOP, cache) is None
    near, far = measurement(loaded), measurement(loaded, lane=Lane(8, 1024))
    keep_measurement(cache, far)
    assert find_measurement(loaded, shape, LAPTOP, cache) == far
    path = keep_measurement(cache, near)
    assert find_measurement(loaded, shape, LAPTOP, cache) == near
    path.write_text(path.read_text()[:200])  # a kill, a full disk: it counts as not measured
    assert find_measurement(loaded, shape, LAPTOP, cache) == far
    for other in ("blueprint.lora.targets=[q_proj]", "body.threads=1", "blueprint.base.layers=2", "body.lanes=fixed"):
        fresh = load_experiment(QUICKSTART, [other])
        assert find_measurement(fresh, shape_of(fresh.base), LAPTOP, cache) is None
    assert find_measurement(loaded, shape, replace(LAPTOP, processor="Another"), cache) is None


def test_a_plan_from_a_record_says_so_and_uses_its_figures(tmp_path: Path) -> None:
    loaded, cache = load_experiment(QUICKSTART), CacheLayout(tmp_path)
    keep_measurement(cache, measurement(loaded))
    planned = plan(loaded, LAPTOP, cache)
    assert planned.memory is not None
    assert planned.time is not None
    assert planned.memory.activations == round(8 * 128 * 1e5)
    beside = (400 << 20) + RAY_IN_A_WORKER + (50 << 20) + 8 * 1_523_712
    assert planned.memory.total == beside + max(planned.memory.activations, planned.memory.judging)
    turns = turns_of(loaded, measurement(loaded).pace, 8, 48)
    assert planned.time.train_most == pytest.approx(8 * turns.turn(8))
    assert planned.time.least < planned.time.expected < planned.time.most
    text = "\n".join(planned.lines())
    assert text.count("measured on this machine, 2026-11-28") == 2
    assert "a guess" not in text
    assert json.loads(json.dumps(planned.to_json(), allow_nan=False))["measured"] == "2026-11-28"
    other = plan(load_experiment(QUICKSTART, ["blueprint.lanes.sequence_length=128"]), LAPTOP, cache)
    assert any("measured at 2 rows of 64 tokens, not at 2 of 128" in note for note in other.notes)
    assert "a guess" in "\n".join(plan(loaded, LAPTOP).lines())


# slots --------------------------------------------------------------------------------------------------------------


def auto(*overrides: str) -> LoadedExperiment:
    return load_experiment(QUICKSTART, ["body.slots=auto", *overrides])


def test_auto_packs_only_where_it_helps(tmp_path: Path) -> None:
    cache = CacheLayout(tmp_path)
    loaded = auto("evaluate.rows_per_report=1")
    keep_measurement(cache, measurement(loaded, pace=Pace("sum", launch=0.05, per_token=1e-5)))
    packed = plan(loaded, LAPTOP, cache)
    assert (packed.body.slots, packed.slots_used) == (8, 8)
    assert any(note.startswith("body.slots: auto means 8: a report of a variant costs") for note in packed.notes)
    keep_measurement(cache, measurement(loaded, pace=Pace("sum", launch=1e-4, per_token=1e-3)))
    alone = plan(loaded, LAPTOP, cache)
    assert alone.body.slots == 1
    assert any("auto means 1: packing would save less than a tenth" in note for note in alone.notes)
    assert any(note.startswith("packing will not make the steps themselves faster") for note in alone.notes)


def test_fixed_lanes_cost_all_slots_however_few_train() -> None:
    pace = Pace("sum", launch=0.01, per_token=1e-4, score_per_token=3e-5)
    compacted, fixed = (
        turns_of(load_experiment(QUICKSTART, [f"body.lanes={lanes}"]), pace, 8, 48) for lanes in ("compacted", "fixed")
    )
    assert fixed.turn(8) == compacted.turn(8) > compacted.turn(2)
    assert fixed.turn(2) == fixed.turn(8)
    assert compacted.seconds(20) == pytest.approx(2 * compacted.turn(8) + compacted.turn(4))
    assert compacted.seconds(2.5) == pytest.approx((compacted.turn(2) + compacted.turn(3)) / 2)


@pytest.mark.parametrize("wrong", ["automatic", "0", "-1", "1.5", "5000"])
def test_slots_are_a_number_or_auto(wrong: str) -> None:
    assert auto().body.slots == "auto"
    with pytest.raises(ConfigError, match=r"body\.slots"):
        load_experiment(QUICKSTART, [f"body.slots={wrong}"])


def test_auto_keeps_to_what_fits_and_to_what_was_seen_to_fit(tmp_path: Path) -> None:
    cache, eager = CacheLayout(tmp_path), Pace("sum", launch=0.05, per_token=1e-5)
    held = Holding(process=400 << 20, base=50 << 20, per_slot=1 << 30, per_token=0.0)
    keep_measurement(cache, measurement(auto(), pace=eager, holding=held))
    small = plan(auto(), replace(LAPTOP, memory=6 * GIB), cache)
    assert small.body.slots == 4
    assert small.fits
    assert any("no more than 4 fit" in note for note in small.notes)
    keep_measurement(cache, measurement(auto(), pace=eager, slots=2, asked=8))
    seen = plan(auto(), LAPTOP, cache)
    assert seen.body.slots == 2
    assert any("8 slots ran out of memory when measured; 2 did not" in note for note in seen.notes)


def test_auto_heeds_schedulers_and_searchers() -> None:
    asha = auto("population.variants=24")
    assert allowed_slots(asha.experiment.population) == [1, 2, 4, 8, 16, 24]
    assert allowed_slots(load_experiment(EXPERIMENTS / "pbt.yaml").experiment.population) == [8]
    assert allowed_slots(load_experiment(EXPERIMENTS / "search_mixes.yaml").experiment.population) == [1, 2, 4, 8]
    unknown = plan(auto("base={type: pretrained, model: someone/unheard-of}"), LAPTOP)
    assert unknown.body.slots == 8


# the probe ----------------------------------------------------------------------------------------------------------

WATCHED = """
import atexit, sys
atexit.register(lambda: print("HEAVY", sorted({"torch", "ray", "transformers", "numpy"} & set(sys.modules)), file=sys.stderr))
from chrysalis_ray.cli.main import main
main()
"""


def chrysalis(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WATCHED, *arguments], capture_output=True, text=True, env=os.environ)


def test_plan_measures_and_later_reads_what_was_measured(tmp_path: Path) -> None:
    arguments = ["plan", str(QUICKSTART), "--runs", str(tmp_path), *(word for patch in TINY for word in ("--set", patch))]
    done = chrysalis(*arguments, "--measure")
    assert (done.returncode, done.stderr) == (0, "measuring 4 slots on this machine\nHEAVY []\n")
    assert done.stdout.count("measured on this machine") == 2
    again = chrysalis(*arguments)
    assert (again.stdout, again.stderr) == (done.stdout, "HEAVY []\n")
    loaded, cache = load_experiment(QUICKSTART, TINY), CacheLayout(tmp_path / ".cache")
    found = find_measurement(loaded, shape_of(loaded.base), Hardware.local(), cache)
    assert found is not None
    assert [(point.variants, point.microsteps) for point in found.points] == [(1, 1), (2, 1), (4, 1), (4, 2), (1, 1), (4, 1)]
    assert all(point.seconds > 0 for point in found.points)
    peaks = [point.peak for point in found.points[:3]]
    assert peaks == sorted(peaks)
    assert found.holding.total(4, 4 * 128) == pytest.approx(peaks[-1], rel=0.02)
    assert 50 << 20 < found.holding.process < 2 * GIB
    shape = shape_of(loaded.base)
    assert shape is not None
    assert found.holding.per_slot == shape.lora_parameters(8, loaded.blueprint.lora.targets) * 16
    assert min(found.pace.keep, found.pace.score_per_token, found.start, found.pretrain) > 0


def test_a_solo_body_is_measured_with_the_adapter_that_it_wears(tmp_path: Path) -> None:
    kind = ["blueprint.adapter={type: loha, rank: 4, targets: [q_proj]}", "merge=[{method: winner}]", "body.slots=1"]
    loaded, cache = load_experiment(QUICKSTART, [*TINY, *kind]), CacheLayout(tmp_path)
    found = measure(loaded, Hardware.local(), cache, look=0.05)
    assert found.question["solo"]["type"] == "loha"
    assert [(point.variants, point.microsteps) for point in found.points] == [(1, 1), (1, 2), (1, 1)]
    layers, rank, sides = 2, 8, 64 + 64  # the largest rank that is searched
    assert 0 <= found.holding.per_slot - layers * 2 * rank * sides * 16 < 64 * 16  # padded
    assert min(found.pace.keep, found.pace.launch + found.pace.per_token, found.pace.score_per_token) > 0
    planned = plan(loaded, Hardware.local(), cache)
    assert planned.measured == found.date
    assert planned.memory is not None
    assert planned.memory.bank == found.holding.per_slot
    packed = load_experiment(QUICKSTART, [*TINY, "body.slots=1"])
    assert find_measurement(packed, shape_of(packed.base), Hardware.local(), cache) is None


def test_out_of_memory_halves_the_slots_and_does_not_end_the_measurement(tmp_path: Path) -> None:
    loaded, cache, said = load_experiment(QUICKSTART, HUNGRY), CacheLayout(tmp_path), []
    found = measure(loaded, Hardware.local(), cache, room=ROOM, look=0.1, progress=said.append)
    assert (found.asked, found.slots) == (2, 1), said
    assert said[1:] == ["2 slots ran out of memory", "measuring 1 slots on this machine"]
    planned = plan(loaded, Hardware.local(), cache)
    assert any("2 slots ran out of memory when measured; 1 did not" in note for note in planned.notes)
    shape = shape_of(loaded.base)
    assert shape is not None
    assert 200 << 20 < worker_memory(shape, loaded, 1, found).activations < ROOM


def test_an_error_about_memory_is_told_from_others() -> None:
    from chrysalis_ray.training.measuring import is_out_of_memory

    wrapped = ModelError("the base cannot be loaded", "give a complete model")
    wrapped.__cause__ = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
    for error in (MemoryError(), RuntimeError("std::bad_alloc"), OSError(errno.ENOMEM, "no"), wrapped):
        assert is_out_of_memory(error)
    for error in (
        RuntimeError("shapes [2] and [3] differ"),
        ModelError("no weights"),
        OSError(errno.ENOSPC, "disk full"),
        None,
    ):
        assert not is_out_of_memory(error)


def test_what_cannot_be_measured_is_one_typed_error(tmp_path: Path) -> None:
    cache, here = CacheLayout(tmp_path), Hardware.local()
    with pytest.raises(ModelError, match="not even one slot"):
        measure(load_experiment(QUICKSTART, [*HUNGRY, "body.slots=1"]), here, cache, room=100 << 20, look=0.1)
    with pytest.raises(ModelError, match="16 workers with a GPU each, this machine has 0"):
        measure(load_experiment(EXPERIMENTS / "two_nodes.yaml"), replace(LAPTOP, gpus=0), cache)
    with pytest.raises(ModelError, match="not known on this machine"):
        measure(load_experiment(QUICKSTART, ["base={type: pretrained, model: someone/unheard-of}"]), here, cache)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("shape", KNOWN.values(), ids=KNOWN)
def test_a_config_of_the_table_describes_the_model_it_came_from(shape: ModelShape, tmp_path: Path) -> None:
    """Oracle: transformers' own model of that config, counted without memory for it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape.to_config())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == shape.to_config()["architectures"][0]
    assert model.num_parameters() == shape.parameters
    (tmp_path / "config.json").write_text(json.dumps(shape.to_config()))
    assert read_shape(tmp_path / "config.json", shape.name) == shape


@pytest.mark.slow
def test_two_workers_with_a_sharded_base_are_measured_together(tmp_path: Path) -> None:
    sharded = [*TINY, "body.workers=2", "body.zero_stage=3", "body.threads=1"]
    found = measure(load_experiment(QUICKSTART, sharded), Hardware.local(), CacheLayout(tmp_path), look=0.3)
    assert found.gather > 0
    assert found.pace.launch > 0
    assert found.pace.shards == 1


@pytest.mark.slow
def test_compiled_layers_are_measured(tmp_path: Path) -> None:
    check_compiler(on_gpu=False)
    compiled = [*TINY, "body.compile=true", "body.lanes=fixed", "body.slots=2", "population.variants=2"]
    loaded, cache = load_experiment(QUICKSTART, compiled), CacheLayout(tmp_path)
    found = measure(loaded, Hardware.local(), cache, look=0.3)
    assert [(point.variants, point.length) for point in found.points] == [(1, 64), (2, 64), (2, 64), (1, 32), (2, 32)]
    assert found.pace.shards == 1
    assert find_measurement(loaded, shape_of(loaded.base), Hardware.local(), cache) == found
    eager = load_experiment(QUICKSTART, [*compiled, "body.compile=false"])
    assert find_measurement(eager, shape_of(eager.base), Hardware.local(), cache) is None


@pytest.mark.slow
def test_a_base_on_a_disk_is_measured(tmp_path: Path) -> None:
    from chrysalis_ray.training.engine import check_nvme

    try:
        check_nvme()
    except ModelError as error:
        pytest.skip(str(error))
    disk = tmp_path / "disk"
    disk.mkdir()
    wide = ["blueprint.base.hidden_size=512", "blueprint.base.intermediate_size=512", "body.slots=2", "population.variants=2"]
    on_disk = [*TINY, *wide, f"body={{zero_stage: 3, offload: nvme, nvme_path: {disk}}}"]
    found = measure(load_experiment(QUICKSTART, on_disk), Hardware.local(), CacheLayout(tmp_path), look=0.3)
    assert found.gather > 0
    assert found.pace.launch > 0
    assert not any(disk.iterdir())


def test_shards_without_a_variant_take_rows_of_anothers() -> None:
    law = Pace("sum", launch=0.01, per_token=1e-4, shards=4, crowding=1.5)
    shared = replace(law, shares=True)
    assert shared.step(1, 256, 64) == pytest.approx((0.01 + 64 * 1e-4) * 1.5)  # four rows on four shards
    assert shared.step(1, 128, 64) == pytest.approx((0.01 + 64 * 1e-4) * (1 + 0.5 / 3))  # two rows on two
    assert shared.step(2, 256, 64) == pytest.approx((0.01 + 128 * 1e-4) * 1.5)  # two of each on four
    for variants in (3, 4, 9):
        assert shared.step(variants, 256, 64) == law.step(variants, 256, 64)
