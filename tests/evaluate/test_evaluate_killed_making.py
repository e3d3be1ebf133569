"""A run that is killed while it writes its merges goes on with what it had made, found and merged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from chrysalis_ray.config.merges import read_merge
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.evaluate.candidates import merge_candidates
from chrysalis_ray.merge import run
from chrysalis_ray.seed.adapter import AdapterWeights, adapter_sha256, write_adapter

SHAPES = {f"layers.{layer}.{name}": shape for layer in range(3) for name, shape in (("q", (14, 12)), ("up", (18, 12)))}
NAMES = [f"v{number:03d}-code" for number in range(4)]
SPECS = [
    read_merge("winner", []),
    read_merge("ensemble", ["best_share=1", "weights=greedy"]),
    read_merge("consensus", ["best_share=1"]),
    read_merge("ties", ["best_share=1"]),
]

# Merges in a process that kills itself once it has kept `count` modules of the merges after the winner.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_evaluate_killed_making import NAMES, SPECS, judge
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.evaluate.candidates import merge_candidates
from chrysalis_ray.merge.finished import FinishedModules
from pathlib import Path
import torch
torch.set_num_threads(1)
add, kept = FinishedModules.add, []
def add_or_die(self, module, merged):
    if len(kept) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    kept.append(module)
    return add(self, module, merged)
FinishedModules.add = add_or_die
merge_candidates(RunLayout(Path(sys.argv[2])), SPECS, NAMES, judge)
"""


def judge(candidates):
    """A judge who likes the blends of the first three."""
    liked = {each.name: sum("v003" in folder for folder, _ in each.members) for each in candidates}
    return {name: [("code", 0, 20.0 + bad, 10, None, None)] for name, bad in liked.items()}


def nobody(candidates):
    raise AssertionError("whom judging found is known")


def population(folder):
    layout = RunLayout(folder)
    generator = torch.Generator().manual_seed(0)
    for name in ("seed", *NAMES):
        factors = {
            m: (torch.randn(2, inn, generator=generator), torch.randn(out, 2, generator=generator))
            for m, (out, inn) in SHAPES.items()
        }
        where = layout.seed if name == "seed" else layout.adapter(name)
        write_adapter(where, AdapterWeights("base", None, 2, 4.0, False, ("q", "up"), factors))
    scores = {name: [["code", 0, 20.0 + number, 10]] for number, name in enumerate(["seed", *NAMES])}
    write_json(layout.select_scores, {"split": "select", "candidates": scores})
    return layout


def spied(monkeypatch):
    """The (method, module) that are really merged from now on."""
    merged, real = [], run._merge_module
    monkeypatch.setattr(run, "_merge_module", lambda *asked: merged.append((asked[0].method, asked[-1])) or real(*asked))
    return merged


def killed(layout, count):
    asked = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(layout.root), str(count)]
    done = subprocess.run(asked, env={**os.environ}, stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_same_command_goes_on_where_a_kill_ended_it(tmp_path, monkeypatch):
    whole = merge_candidates(population(tmp_path / "whole"), SPECS, NAMES, judge)
    layout = population(tmp_path / "killed")
    count = 2 * len(SHAPES) + 4  # the winner, the ensemble, and four modules of the consensus
    killed(layout, count)
    assert not layout.merges_manifest.exists()
    assert layout.merge_manifest("ensemble").exists()
    assert layout.merge_modules("consensus").is_dir()
    merged = spied(monkeypatch)
    resumed = merge_candidates(layout, SPECS, NAMES, nobody)
    assert sorted(merged) == [("consensus", m) for m in sorted(SHAPES)[4:]] + [("ties", m) for m in sorted(SHAPES)]
    assert resumed == whole
    assert [path.name for path in sorted(layout.merges.iterdir())] == ["consensus", "ensemble", "merges.json", "ties", "winner"]


def test_whom_judging_found_is_not_judged_again(tmp_path):
    whole = merge_candidates(population(tmp_path / "whole"), SPECS[:2], NAMES, judge)
    layout = population(tmp_path / "killed")
    killed(layout, len(SHAPES) + 2)  # within the modules of the soup
    assert read_json(layout.merge_found("ensemble"))["told"]["members"] == NAMES[:3]
    assert merge_candidates(layout, SPECS[:2], NAMES, nobody) == whole
    assert not layout.merge_found("ensemble").exists()


def test_what_was_made_of_other_adapters_or_changed_since_is_made_again(tmp_path, monkeypatch):
    layout = population(tmp_path / "run")
    before = merge_candidates(layout, SPECS, NAMES, judge)["candidates"]
    layout.merges_manifest.unlink()
    merged = spied(monkeypatch)
    assert merge_candidates(layout, SPECS, NAMES, nobody)["candidates"] == before
    assert merged == []
    (layout.merge("ties") / "adapter_model.safetensors").write_bytes(
        (layout.merge("consensus") / "adapter_model.safetensors").read_bytes()
    )
    layout.merges_manifest.unlink()
    assert merge_candidates(layout, SPECS, NAMES, nobody)["candidates"] == before
    assert {method for method, _ in merged} == {"ties"}
    factors = {m: (torch.ones(2, inn), torch.ones(out, 2)) for m, (out, inn) in SHAPES.items()}
    write_adapter(layout.adapter(NAMES[1]), AdapterWeights("base", None, 2, 4.0, False, ("q", "up"), factors))
    layout.merges_manifest.unlink()
    after = merge_candidates(layout, SPECS, NAMES, judge)["candidates"]
    assert after["winner"]["sha256"] == before["winner"]["sha256"] == adapter_sha256(layout.merge("winner"))
    assert all(after[name]["sha256"] != before[name]["sha256"] for name in ("ensemble", "consensus", "ties"))


@pytest.mark.parametrize("damage", [b"", b"{", b'{"told": 3}', b"[]"])
def test_a_damaged_record_is_no_record(tmp_path, damage, monkeypatch):
    layout = population(tmp_path / "run")
    before = merge_candidates(layout, SPECS[:1], NAMES, nobody)["candidates"]
    layout.merge_manifest("winner").write_bytes(damage)
    layout.merges_manifest.unlink()
    assert merge_candidates(layout, SPECS[:1], NAMES, nobody)["candidates"] == before
