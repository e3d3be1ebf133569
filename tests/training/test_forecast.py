"""What the plan said and what came: written once, compared at the end; and `body.slots: auto`, settled once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from measurements import measurement

from chrysalis_ray.config.claim import claim_run, run_directory
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import CACHE, CacheLayout, RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.training.memory import descendants, peak_memory, resident_memory
from chrysalis_ray.training.planning.forecast import came, expected, said_and_came, settle_plan
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.measured import keep_measurement
from chrysalis_ray.training.planning.pace import Pace
from chrysalis_ray.training.planning.planner import plan

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.yaml"


def claimed(runs: Path, *overrides: str) -> tuple[RunLayout, CacheLayout]:
    loaded = load_experiment(QUICKSTART, overrides)
    layout = run_directory(loaded, runs, None)
    claim_run(loaded, layout)
    return layout, CacheLayout(runs / CACHE)


def test_auto_is_settled_once_and_a_resume_keeps_the_shape(tmp_path: Path) -> None:
    layout, cache = claimed(tmp_path, "body.slots=auto")
    loaded, here = load_experiment(QUICKSTART, ["body.slots=auto"]), Hardware.local()
    keep_measurement(cache, measurement(loaded, here, pace=Pace("sum", launch=0.05, per_token=1e-5)))
    assert settle_plan(loaded, layout, cache).body.slots == 8
    assert read_json(layout.run_manifest)["slots"] == read_json(layout.plan)["said"]["body"]["slots"] == 8
    keep_measurement(cache, measurement(loaded, here, pace=Pace("sum", launch=1e-4, per_token=1e-2)))
    assert plan(loaded, here, cache).body.slots == 1
    assert settle_plan(loaded, layout, cache).body.slots == 8
    layout.plan.unlink()  # lost: what was settled still stands
    assert settle_plan(loaded, layout, cache).body.slots == 8
    assert read_json(layout.plan)["said"]["slots_used"] == 8
    assert claim_run(loaded, layout) == read_json(layout.run_manifest)["run_id"]
    write_json(layout.run_manifest, {**read_json(layout.run_manifest), "slots": "many"})
    with pytest.raises(RunError, match="holds 'many' slots"):
        settle_plan(loaded, layout, cache)


def test_a_number_that_was_written_stands(tmp_path: Path) -> None:
    layout, cache = claimed(tmp_path, "body.slots=3")
    loaded = load_experiment(QUICKSTART, ["body.slots=3"])
    assert settle_plan(loaded, layout, cache) is loaded
    assert "slots" not in read_json(layout.run_manifest)
    written = layout.plan.read_bytes()
    assert settle_plan(loaded, layout, cache) is loaded
    assert layout.plan.read_bytes() == written


def test_what_came_stands_beside_what_was_said(tmp_path: Path) -> None:
    layout, cache = claimed(tmp_path)
    assert came(layout, 60.0) is None
    settle_plan(load_experiment(QUICKSTART), layout, cache)
    rows = {f"v{index}": {"metrics": {"peak_memory": (700 + index) << 20}} for index in range(3)}
    write_json(layout.population_manifest, {"variants": {**rows, "v3": {"state": "failed"}}})
    assert expected(layout).startswith("8 variants in 8 slots, ")
    assert expected(layout).endswith(" (a guess; `chrysalis plan --measure` measures)")
    told = came(layout, 60.0)
    assert told is not None
    assert told.startswith("memory of a worker: plan said ")
    assert ", 702 MiB came; time: plan said " in told
    assert ", 60 s came (a guess; `chrysalis plan --measure` measures)" in told
    kept = read_json(layout.plan)
    assert kept["came"] == {"peak_memory": 702 << 20, "wall_seconds": 60.0}
    assert kept["said"]["memory"]["total"] > 0
    again = came(layout, None)  # taken up again: its wall time says nothing
    assert again is not None
    assert "time:" not in again
    assert read_json(layout.plan) == kept


def test_on_a_gpu_the_context_is_not_what_torch_counts() -> None:
    said = {"memory": {"total": 10 << 30, "process": 1 << 30}, "body": {"gpus_per_worker": 1}, "measured": "2026-11-28"}
    assert said_and_came(said, {"peak_memory": 8 << 30}) == (
        "memory of a worker: plan said 9.0 GiB, 8.0 GiB came (measured 2026-11-28)"
    )
    assert said_and_came({**said, "memory": None}, {"peak_memory": 8 << 30}) is None


def test_forks_are_counted_by_what_they_hold_alone() -> None:
    """A fork that fills memory of its own counts with it, one that looks at what its parent filled does not."""
    import torch

    cpu, ours = torch.device("cpu"), torch.ones(64 << 20, dtype=torch.uint8)
    before = peak_memory(cpu)
    for own, least, most in ((0, 0, 24 << 20), (96 << 20, 96 << 20, 130 << 20)):
        told, tell = os.pipe()
        hold, release = os.pipe()
        process = os.fork()
        if process == 0:
            held = bytearray(own)
            os.write(tell, bytes([int(ours[0]) + len(held[:1])]))
            os.read(hold, 1)
            os._exit(0)
        os.read(told, 1)
        assert process in descendants()
        counted = peak_memory(cpu) - before
        os.write(release, b".")
        os.waitpid(process, 0)
        assert least <= counted <= most
    assert process not in descendants()


def test_a_peak_is_never_below_what_is_held() -> None:
    import torch

    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    block = torch.ones(40 << 20, dtype=torch.uint8)
    assert peak_memory(cpu) >= resident_memory(cpu) > 10 << 20
    assert peak_memory(cpu) >= before
    del block
