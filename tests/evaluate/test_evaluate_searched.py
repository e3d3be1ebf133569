"""The search for weights: CMA-ES on known functions, then over real merges, killed and gone on with."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from chrysalis_ray.config.merges import EnsembleMerge, TiesMerge, read_merge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import write_json
from chrysalis_ray.evaluate.candidates import merge_candidates
from chrysalis_ray.evaluate.cma_es import SearchState, ask, candidates_of_a_generation, start_state, tell
from chrysalis_ray.evaluate.searched import layer_groups, onto_simplex, searched_weights, shares_at
from chrysalis_ray.merge.per_layer import by_name
from chrysalis_ray.seed.adapter import AdapterWeights, read_adapter, write_adapter


def minimum(function, mean, step, generations, rng_seed=0):
    state = start_state(mean, step)
    for _ in range(generations):
        points = ask(state, rng_seed)
        state = tell(state, points, [function(np.asarray(point)) for point in points])
    return state


def sphere(x):
    return float(x @ x)


def cigar(x):
    return float(x[0] ** 2 + 1e4 * x[1:] @ x[1:])


def rosenbrock(x):
    return float(sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2))


@pytest.mark.parametrize(
    ("function", "mean", "generations", "least"),
    [
        (sphere, [1.0] * 5, 120, 1e-9),
        (cigar, [1.0] * 4, 220, 1e-9),
        (rosenbrock, [0.0] * 4, 350, 1e-9),
        (sphere, [3.0], 60, 1e-9),
    ],
    ids=["sphere", "cigar", "rosenbrock", "one dimension"],
)
def test_cma_es_finds_the_minimum(function, mean, generations, least):
    for rng_seed in (0, 1):
        assert function(np.asarray(minimum(function, mean, 0.5, generations, rng_seed).mean)) < least


def test_cma_es_goes_by_ranks_and_turns_with_the_axes():
    """Any growing function of the losses gives the same search; a rotated ellipse is as easy as a straight one, in the end."""
    one, two = minimum(sphere, [1.0, 2.0], 0.3, 15), minimum(lambda x: math.exp(sphere(x)) - 7, [1.0, 2.0], 0.3, 15)
    assert one == two
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    assert cigar(turn @ np.asarray(minimum(lambda x: cigar(turn @ x), [1.0] * 4, 0.5, 240).mean)) < 1e-8


def test_a_state_is_json_and_asks_the_same_again():
    state = minimum(rosenbrock, [0.0] * 3, 0.5, 7)
    again = SearchState.from_json(json.loads(json.dumps(state.to_json())))
    assert again == state
    assert ask(again, 3) == ask(state, 3)
    assert ask(state, 4) != ask(state, 3)
    assert len(ask(state, 3)) == candidates_of_a_generation(3) == 7


def test_a_loss_that_is_no_number_ranks_last():
    points = ask(start_state([0.0, 0.0], 1.0), 0)
    losses = [float(n) for n in range(len(points))]
    broken = [*losses[:-1], math.inf]
    assert tell(start_state([0.0, 0.0], 1.0), points, broken) == tell(start_state([0.0, 0.0], 1.0), points, losses)


def test_shares_are_shares():
    rng = np.random.default_rng(0)
    assert onto_simplex([0.2, 0.3, 0.5]) == pytest.approx((0.2, 0.3, 0.5))
    assert onto_simplex([2.0, 0.0, 0.0]) == (1.0, 0.0, 0.0)
    for _ in range(50):
        point = rng.normal(0.3, 1.0, 4)
        found = np.asarray(onto_simplex(point.tolist()))
        assert found.min() >= 0.0
        assert found.sum() == pytest.approx(1.0)
        others = rng.dirichlet(np.ones(4), 30)
        assert np.linalg.norm(point - found) <= np.linalg.norm(point - others, axis=1).min() + 1e-12
    assert shares_at([0.0] * 6, 4) == [pytest.approx((0.25,) * 4)] * 2
    assert shares_at([], 1) == [(1.0,)]


def test_layers_are_grouped_by_their_numbers():
    modules = [f"model.layers.{n}.{part}" for n in (0, 1, 2, 9, 10) for part in ("q", "down")] + ["lm_head"]
    groups = layer_groups(modules, 2)
    assert [sorted({m.split(".")[2] for m in part if "." in m}) for part in groups] == [["0", "1"], ["10", "2", "9"]]
    assert groups[-1][-1] == "lm_head"
    assert sorted(m for part in layer_groups(modules, 99) for m in part) == sorted(modules)
    assert len(layer_groups(modules, 99)) == 5
    assert layer_groups(["head"], 3) == [["head"]]


# over real merges ---------------------------------------------------------------------------------------------------

MODULES = ("layers.0.q", "layers.1.q")


class Garden:
    """Variants in a run directory; a merge's loss is how far its deltas lie from a target, a mix of its own in each layer."""

    def __init__(self, folder, mixes):
        self.layout = RunLayout(folder)
        generator = torch.Generator().manual_seed(3)
        self.names = [f"v{number:03d}-code" for number in range(len(mixes[0]))]
        a_ri = {m: torch.randn(3, 8, generator=generator) for m in MODULES}
        zero = {m: (a_ri[m], torch.zeros(7, 3)) for m in MODULES}
        write_adapter(self.layout.seed, AdapterWeights("base", None, 3, 3.0, False, ("q",), zero))
        factors = [{m: (a_ri[m], torch.randn(7, 3, generator=generator)) for m in MODULES} for _ in self.names]
        for name, own in zip(self.names, factors, strict=True):
            write_adapter(self.layout.adapter(name), AdapterWeights("base", None, 3, 3.0, False, ("q",), own))
        self.target = {
            m: sum(w * own[m][1] @ own[m][0] for w, own in zip(mix, factors, strict=True))
            for m, mix in zip(MODULES, mixes, strict=True)
        }
        self.asked = 0
        losses = {name: self.judge(self.layout.adapter(name)) for name in self.names}
        scores = {name: [["code", 0, loss, 1]] for name, loss in {"seed": 99.0, **losses}.items()}
        write_json(self.layout.select_scores, {"split": "select", "candidates": scores})
        self.best = min(losses.values())
        self.asked = 0

    def judge(self, folder, dies_at=math.inf):
        self.asked += 1
        if self.asked > dies_at:
            raise KeyboardInterrupt
        adapter = read_adapter(folder)
        return float(sum((adapter.delta(m) - self.target[m]).norm() for m in MODULES))

    def on_select(self, judge, candidates):
        """What a body answers: every candidate's scores, blends without a folder."""
        rows = {}
        for candidate in candidates:
            folder = self.layout.root / "blend"
            if candidate.made == "blend":
                parts = [(read_adapter(Path(member)), weight) for member, weight in candidate.members]
                factors = {
                    m: (
                        torch.cat([own.factors[m][0] for own, _ in parts]),
                        torch.cat([weight * own.scale * own.factors[m][1] for own, weight in parts], 1),
                    )
                    for m in MODULES
                }
                rank = 3 * len(parts)
                write_adapter(folder, AdapterWeights("base", None, rank, float(rank), False, ("q",), factors))
            rows[candidate.name] = [("code", 0, judge(Path(candidate.folder or folder)), 1, None, None)]
        return rows

    def merge(self, settings, judge=None):
        everybody = [] if any(setting.startswith("best_share=") for setting in settings) else ["best_share=1"]
        spec = read_merge("ensemble", [*everybody, *settings])
        own = partial(self.on_select, judge or self.judge)
        (entry,) = merge_candidates(self.layout, [spec], self.names, own)["candidates"].values()
        return entry, self.judge(self.layout.merge("ensemble"))


MIX = [0.6, 0.0, 0.3, 0.1]


def test_the_search_finds_the_mix_and_keeps_to_its_budget(tmp_path):
    garden = Garden(tmp_path, [MIX, MIX])
    entry, loss = garden.merge(["weights=searched", "budget=80"])
    assert garden.asked <= 81
    assert entry["search"]["judged"] <= 80
    assert entry["search"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert loss < 0.1 * garden.best
    assert list(entry["weights"].values()) == pytest.approx(MIX, abs=0.06)
    assert [path.name for path in garden.layout.merges.iterdir() if path.name.startswith(".")] == []


def test_a_search_that_was_killed_ends_as_if_it_had_not_been(tmp_path):
    mixes = [MIX, [0.1, 0.7, 0.2, 0.0]]
    settings = ["weights=searched", "budget=60", "layer_groups=2", "search_seed=5"]
    whole = Garden(tmp_path / "whole", mixes)
    expected, loss = whole.merge(settings)
    assert loss < 0.5 * whole.best
    killed = Garden(tmp_path / "killed", mixes)
    for dies_at in (0, 1, 15, 40):
        killed.asked = 0
        with pytest.raises(KeyboardInterrupt):
            killed.merge(settings, lambda folder, at=dies_at: killed.judge(folder, at))
    before = json.loads(killed.layout.search("ensemble").read_text())["judged"]
    assert before > 20
    killed.asked = 0
    entry, _ = killed.merge(settings)
    assert entry == expected
    assert killed.asked - 1 == expected["search"]["judged"] - before
    assert killed.layout.search("ensemble").read_bytes() == whole.layout.search("ensemble").read_bytes()
    killed.asked = 0
    assert killed.merge(["weights=searched", "budget=20"])[0]["search"]["judged"] > 0  # another search does not go on with it
    assert killed.asked > 1


def test_every_group_of_layers_has_a_soup_of_its_own(tmp_path):
    garden = Garden(tmp_path, [[0.5, 0.5, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]])
    entry, loss = garden.merge(["weights=greedy_layers", "layer_groups=2"])
    _, flat = garden.merge(["weights=greedy"])
    assert loss <= flat
    assert loss <= garden.best
    assert garden.asked > 6
    layers = [layer["weights"] for layer in entry["notes"]["layers"]]
    assert all(set(own) <= {0.0, 1.0, 0.5, 1 / 3, 0.25} for own in layers)
    assert len(layers) == 2


def test_a_single_member_needs_no_search(tmp_path):
    garden = Garden(tmp_path, [[1.0], [1.0]])
    entry, loss = garden.merge(["weights=searched"], judge=None)
    assert loss == pytest.approx(garden.best, abs=1e-5)
    assert list(entry["weights"].values()) == [1.0]
    assert entry["search"]["judged"] == 0


def test_a_search_among_merges_that_diverge_ends_with_the_best_variant(tmp_path):
    losses = {"a": 2.0, "b": 1.0}
    spec = EnsembleMerge(method="ensemble", weights="searched", budget=12)
    by_module, told = searched_weights(
        spec, ["a", "b"], losses, ["q"], {"of": "this test"}, tmp_path / "state.json",
        lambda trials: [math.nan] * len(trials),
    )  # fmt: skip
    assert by_module == {"q": (0.0, 1.0)}
    assert told["loss"] == 1.0


def test_layer_weights_of_a_run_go_by_variant_and_strangers_are_refused(tmp_path):
    garden = Garden(tmp_path, [MIX, MIX])
    layers = "layer_weights=[{modules: '*.0.q', weights: {v001-code: 3, v002-code: 1}}]"
    entry, _ = garden.merge([layers])
    assert entry["notes"]["layers"][0]["weights"] == [0.0, 0.75, 0.25, 0.0]
    assert entry["notes"]["layers"][1]["weights"] == [0.25] * 4
    with pytest.raises(MergeError, match="v009"):
        garden.merge(["layer_weights=[{modules: '*', weights: {v009-code: 1}}]"])


def test_numbers_in_a_run_are_those_of_all_variants_whoever_takes_part(tmp_path):
    """With half of them, number 3 is the last variant, not the fourth of those who are left, of whom there are two."""
    garden = Garden(tmp_path, [[0.0, 0.5, 0.0, 0.5]] * 2)
    layers = "layer_weights=[{modules: '*', weights: {%s: 3, %s: 1}}]"
    numbered, _ = garden.merge(["best_share=0.5", layers % ("'3'", "'1'")])
    assert list(numbered["weights"]) == [garden.names[1], garden.names[3]]
    assert numbered["notes"]["layers"][0]["weights"] == [0.25, 0.75]
    named, _ = garden.merge(["best_share=0.5", layers % ("v003-code", "v001-code")])
    assert named["sha256"] == numbered["sha256"]


def test_densities_by_number_are_those_of_all_variants_whoever_takes_part():
    config = TiesMerge(method="ties", densities={"3": 0.1, "bob": 0.2, "1": 0.9})
    assert by_name(config, ["alice", "bob", "carol", "dave"]).densities == {"dave": 0.1, "bob": 0.2}
    plain = TiesMerge(method="ties")
    assert by_name(plain, ["alice"]) is plain
