"""Turns of a solo body as its worker takes them, without Ray: in turn, from the store, judged, harvested, the winner kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_solo_kinds import adapter_of
from test_training_solo import PROJECTIONS, member, zero_of
from training_texts import TextTokens

from chrysalis_ray.body.morphology import Morphology
from chrysalis_ray.body.turn import Candidate, Outcome, Turn, Work, first_position, next_position
from chrysalis_ray.body.worker import BodyPlan, Flesh, judge_turn, train_turn
from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.config.merges import EnsembleMerge, WinnerMerge
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Variant, read_json, write_json
from chrysalis_ray.core.store import Store
from chrysalis_ray.evaluate.candidates import merge_candidates
from chrysalis_ray.population.harvest import harvest_population
from chrysalis_ray.seed.adapter import AdapterWeights, adapter_sha256, read_adapter, write_adapter
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import ReplicatedEngine
from chrysalis_ray.training.solo import SoloPack


def grown(base: Path, layout: RunLayout, tokens: TextTokens, **kind: Any) -> Flesh:
    """A worker of a body with one slot, as `grow` would build it."""
    zero = zero_of(base)
    factors = {name[7:-7]: (a_ri, zero[f"{name[:-1]}B"]) for name, a_ri in zero.items() if name.endswith("A")}
    write_adapter(layout.seed, AdapterWeights(str(base), None, 8, 8.0, False, PROJECTIONS, factors))
    worn = adapter_of(kind["adapter"]) if "adapter" in kind else Lora(targets=PROJECTIONS, **kind)
    plan = BodyPlan(
        morphology=Morphology(slots=1), base_folder=str(base), tokens_folder="", seed_folder=str(layout.seed),
        store_folder=str(layout.store), targets=PROJECTIONS, rank=8, rows_per_microstep=2, rows_per_report=1,
        omega_name="", namespace="", solo=worn,
    )  # fmt: skip
    pack = SoloPack(load_base(base, "fp32"), worn, ReplicatedEngine(torch.device("cpu")))
    return Flesh(plan, pack, tokens, Store(layout.store), read_adapter(layout.seed))


class Line:
    """Where one variant stands, as omega would know it."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.position, self.chunk, self.seed = first_position(variant), 0, None
        self.metrics: dict[str, Any] = {}

    def advance(self, flesh: Flesh, number: int) -> None:
        target = next_position(self.position, self.variant)
        work = Work(self.variant, self.position, target, self.chunk, self.seed)
        (outcome,) = train_turn(flesh, Turn(number, "train", work=(work,)), rank=0)
        assert isinstance(outcome, Outcome)
        self.position, self.chunk, self.seed, self.metrics = target, self.chunk + 1, outcome.seed, outcome.metrics


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"init": "pissa"}, {"adapter": "lokr"}], ids=["dora", "pissa", "lokr"])
def test_variants_take_turns_and_the_winner_is_kept(
    kind: dict[str, Any], tiny_base: Path, tokens: TextTokens, tmp_path: Path
) -> None:
    layout = RunLayout(tmp_path / "run")
    flesh = grown(tiny_base, layout, tokens, **kind)
    first, second = (
        Line(replace(member(index, learning_rate=(1e-2, 1e-5)[index]), steps=15, chunk_steps=5)) for index in (0, 1)
    )
    for number, line in enumerate((first, first, second, first, second, second)):
        line.advance(flesh, number)
    undisturbed = Line(first.variant)
    other = grown(tiny_base, RunLayout(tmp_path / "other"), tokens, **kind)
    for number in range(3):
        undisturbed.advance(other, number)
    assert first.seed == undisturbed.seed  # the sha256 of weights, moments, meta
    assert {k: v for k, v in first.metrics.items() if "second" not in k and k != "peak_memory"} == {
        k: v for k, v in undisturbed.metrics.items() if "second" not in k and k != "peak_memory"
    }

    rows = {
        line.variant.variant_id: {"state": "finished", "reason": None, "variant": line.variant.to_json(), "seed": line.seed}
        for line in (first, second)
    }
    harvest_population(layout, rows, {})
    folders = {name: str(layout.adapter(name)) for name in rows}
    candidates = (Candidate("seed"), *(Candidate(name, folder) for name, folder in folders.items()))
    scores = judge_turn(flesh, Turn(9, "judge", candidates=candidates, rows_per_domain=9))
    losses = {name: sum(row[2] for row in told) / sum(row[3] for row in told) for name, told in scores.items()}
    assert losses["v00"] < min(losses["v01"], losses["seed"])

    write_json(layout.select_scores, {"split": "select", "candidates": scores})
    wanted = [WinnerMerge(method="winner"), EnsembleMerge(method="ensemble")]
    merges = merge_candidates(layout, wanted, ["v00", "v01"], judge=lambda candidates: {})
    assert merges["candidates"]["winner"]["weights"] == {"v00": 1.0, "v01": 0.0}
    if "init" not in kind:
        assert (
            adapter_sha256(layout.merge("winner")) == read_json(layout.population_manifest)["variants"]["v00"]["adapter_sha256"]
        )
        assert ("use_dora" if "use_dora" in kind else "LOKR") in merges["failed"]["ensemble"]
    else:
        (mixed,) = judge_turn(
            flesh, Turn(10, "judge", candidates=(Candidate("mix", str(layout.merge("ensemble"))),), rows_per_domain=9)
        ).values()
        assert sum(row[2] for row in mixed) < sum(row[2] for row in scores["seed"])
