"""BOHB on a packed population, through unmodified Ray Tune: brackets that pause, and variants proposed meanwhile."""

import json
import os
import signal

import pytest
from garden import adapters, cuts, end, population

from chrysalis_ray.core.store import Store

pytest.importorskip("hpbandster")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = (
    "population.searcher={type: bohb}",
    "population.scheduler={type: bohb, reduction_factor: 2}",
    "population.variants=10",
    "population.reports=4",
    "population.search={learning_rate: {type: log_uniform, low: 1e-5, high: 3e-2}, rank: {type: choice, values: [2, 4]}}",
    "population.epigenomes={type: levels, levels: {code: {type: log_uniform, low: 0.1, high: 10}}}",
    "body={slots: 3}",
)


def recipes(run):
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(run.glob("variants/*/variant.json"))}


def test_brackets_pause_variants_are_proposed_meanwhile_and_a_kill_changes_no_byte(garden):
    run = garden.run("bohb", *SETTINGS)
    rows = population(run)
    assert sorted(recipe["index"] for recipe in recipes(run).values()) == list(range(10))
    assert {row["state"] for row in rows.values()} == {"finished", "stopped"}
    turns = [
        {entry["variant_id"]: entry["chunk"] for entry in body["results"].values()} for _, body in Store(run / "store").cuts()
    ]
    assert max(len(turn) for turn in turns) == 3
    first = next(name for name in rows if name.startswith("v003-"))
    assert [first in turn for turn in turns[:2]] == [False, True]  # proposed while v000 to v002 pause after one report
    process = garden.start("bohb-killed", *SETTINGS)
    try:
        garden.wait_for("bohb-killed", lambda other: len(cuts(other)) >= 5, process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end(process)
    assert 3 < len(recipes(garden.runs / "bohb-killed")) < 10
    again = garden.run("bohb-killed", *SETTINGS)
    assert recipes(again) == recipes(run)
    assert adapters(again) == adapters(run)
