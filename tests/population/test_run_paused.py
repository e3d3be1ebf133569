"""Schedulers that pause variants or write over them, on a packed population, through unmodified Ray Tune."""

import json
import os
import signal

import pytest
from garden import adapters, cuts, end, population

from chrysalis_ray.core.store import Store

pytestmark = pytest.mark.ray

HYPERBAND = (
    "population.scheduler={type: hyperband, reduction_factor: 2}",
    "population.variants=8",
    "population.reports=4",
    "body={slots: 8}",
)
PBT = (
    "population.scheduler={type: pbt, perturb_every_reports: 1, quantile: 0.5}",
    "population.search={learning_rate: {type: log_uniform, low: 1e-5, high: 1e-2}}",
)
PB2 = (
    "population.scheduler={type: pb2, perturb_every_reports: 1, quantile: 0.5, mutate: [learning_rate, levels]}",
    "population.search={learning_rate: {type: log_uniform, low: 1e-5, high: 3e-2}}",
    "population.epigenomes={type: levels, levels: {code: {type: log_uniform, low: 0.1, high: 10}}}",
)


@pytest.fixture(scope="module")
def banded(garden):
    return garden.run("banded", *HYPERBAND)


@pytest.fixture(scope="module")
def copied(garden):
    return garden.run("copied", *PBT)


@pytest.fixture(scope="module")
def bandits(garden):
    pytest.importorskip("sklearn")
    return garden.run("bandits", *PB2)


def turns(run):
    """(variant, chunk) of every turn."""
    return [
        sorted((entry["variant_id"], entry["chunk"]) for entry in body["results"].values())
        for _, body in Store(run / "store").cuts()
    ]


def killed_and_resumed(garden, name, settings, after):
    process = garden.start(name, *settings)
    try:
        garden.wait_for(name, lambda run: len(cuts(run)) >= after, process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end(process)
    assert not (garden.runs / name / "population.json").exists()
    return garden.run(name, *settings)


def test_hyperband_halves_its_brackets_and_who_was_paused_goes_on(banded):
    """Three variants train the whole budget, three are halved after two reports, two after one: by its own arithmetic."""
    rows = list(population(banded).values())
    assert [row["chunks"] for row in rows[:3]] == [4, 4, 4]
    assert sorted(row["chunks"] for row in rows[3:6]) == [2, 4, 4]
    assert max(row["chunks"] for row in rows[6:]) > 1
    assert {row["state"] for row in rows} == {"finished", "stopped"}
    for name in population(banded):
        own = [chunk for turn in turns(banded) for variant, chunk in turn if variant == name]
        assert own == list(range(len(own)))  # nothing was trained twice
    best = min(rows[3:6], key=lambda row: row["metrics"]["select_loss"])
    assert best["state"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_under_hyperband_changes_no_byte(garden, banded):
    run = killed_and_resumed(garden, "banded-killed", HYPERBAND, after=2)
    assert turns(run) == turns(banded)
    assert adapters(run) == adapters(banded)


def test_pb2_proposes_rates_and_levels_within_their_ranges_while_variants_train(bandits):
    assert {row["state"] for row in population(bandits).values()} == {"finished"}
    metrics = [json.loads(line) for line in (bandits / "metrics.jsonl").read_text().splitlines()]
    recipes = {path.parent.name: json.loads(path.read_text()) for path in bandits.glob("variants/*/variant.json")}
    changed = [
        row
        for row in metrics
        if row["hyperparameters"]["learning_rate"] != recipes[row["variant"]]["hyperparameters"]["learning_rate"]
    ]
    assert changed
    started = {(r["hyperparameters"]["learning_rate"], r["epigenome"]["express"]["code"]) for r in recipes.values()}
    pairs = {(row["hyperparameters"]["learning_rate"], row["epigenome"]["express"]["code"]) for row in changed}
    assert pairs - started  # proposed, not only copied
    assert all(9.9e-6 <= rate <= 3.01e-2 and 0.099 <= level <= 10.01 for rate, level in pairs)
    assert all(row["epigenome"]["express"]["reference"] == 1 for row in metrics)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_under_pbt_changes_no_byte(garden, copied):
    """Tune draws from the generators that PBT draws from, as often as it polls: no two runs poll alike."""
    run = killed_and_resumed(garden, "bred-killed", PBT, after=4)
    assert turns(run) == turns(copied)
    assert adapters(run) == adapters(copied)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_under_pb2_changes_no_byte(garden, bandits):
    run = killed_and_resumed(garden, "bandits-killed", PB2, after=4)
    assert turns(run) == turns(bandits)
    assert adapters(run) == adapters(bandits)
