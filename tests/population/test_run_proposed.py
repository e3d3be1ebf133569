"""Optuna on a packed population, through unmodified Ray Tune: proposed while others train, and a kill changes nothing."""

import json
import os
import signal

import pytest
from garden import adapters, cuts, end, population

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant
from chrysalis_ray.core.store import Store
from chrysalis_ray.population.branch import write_branch

pytest.importorskip("optuna")
pytestmark = pytest.mark.ray

SETTINGS = (
    "population.searcher={type: optuna, random_variants: 3}",
    "population.variants=9",
    "population.reports=3",
    "population.search={learning_rate: {type: log_uniform, low: 1e-5, high: 3e-2}, rank: {type: choice, values: [2, 4]}}",
    "population.epigenomes={type: levels, levels: {code: {type: log_uniform, low: 0.1, high: 10}}}",
    "population.scheduler={type: asha, grace_reports: 1, reduction_factor: 2}",
    "body={slots: 3}",
)


@pytest.fixture(scope="module")
def proposed(garden):
    return garden.run("proposed", *SETTINGS)


def recipes(run):
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(run.glob("variants/*/variant.json"))}


def test_every_variant_is_proposed_trained_and_ended_and_asha_prunes(proposed):
    rows = population(proposed)
    assert sorted(recipe["index"] for recipe in recipes(proposed).values()) == list(range(9))
    assert set(rows) == set(recipes(proposed)) == set(json.loads((proposed / "branch.json").read_text())["variants"])
    states = [row["state"] for row in rows.values()]
    assert set(states) == {"finished", "stopped"}
    assert states.count("stopped") >= 2
    for recipe in recipes(proposed).values():
        assert 1e-5 <= recipe["hyperparameters"]["learning_rate"] <= 3e-2
        assert recipe["hyperparameters"]["rank"] in (2, 4)
        assert 0.1 <= recipe["epigenome"]["express"]["code"] <= 10
    assert len({recipe["hyperparameters"]["learning_rate"] for recipe in recipes(proposed).values()}) == 9


def test_freed_slots_go_to_the_next_proposal_and_the_pack_stays_full(proposed):
    seen: set[str] = set()
    for _, body in Store(proposed / "store").cuts():
        turn = {entry["variant_id"] for entry in body["results"].values()}
        seen |= turn
        assert len(turn) == 3 or len(seen) == 9


def test_optuna_alone_proposes_the_same_when_it_hears_the_same(proposed):
    """Its own sampler, fed by hand with the ends in the order in which omega told them."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {
        "learning_rate": optuna.distributions.FloatDistribution(1e-5, 3e-2, log=True),
        "rank": optuna.distributions.CategoricalDistribution((2, 4)),
        "level.code": optuna.distributions.FloatDistribution(0.1, 10, log=True),
    }
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=5, n_startup_trials=3))
    by_index = sorted(recipes(proposed).values(), key=lambda recipe: recipe["index"])
    ends = {name: row["metrics"]["select_loss"] for name, row in population(proposed).items()}
    story = [turn["body"] for turn in map(json.loads, (proposed / "weave.jsonl").read_text().splitlines())]
    order = [body["variant"] for body in story if set(body) == {"variant", "reason"}]
    asked = [study.ask(fixed_distributions=space) for _ in range(3)]
    for ended in order[:6]:
        index = next(recipe["index"] for recipe in by_index if recipe["variant_id"] == ended)
        study.tell(asked[index], ends[ended])
        asked.append(study.ask(fixed_distributions=space))
    for recipe, trial in zip(by_index, asked, strict=True):
        assert recipe["hyperparameters"]["learning_rate"] == trial.params["learning_rate"]
        assert recipe["hyperparameters"]["rank"] == trial.params["rank"]
        assert recipe["epigenome"]["express"]["code"] == trial.params["level.code"]


def test_a_kill_changes_neither_a_proposal_nor_a_byte(garden, proposed):
    process = garden.start("proposed-killed", *SETTINGS)
    try:
        garden.wait_for("proposed-killed", lambda run: len(list(run.glob("variants/*/variant.json"))) > 3, process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end(process)
    before = recipes(garden.runs / "proposed-killed")
    assert 3 < len(before) < 9  # in the middle of it: Optuna had already learned
    run = garden.run("proposed-killed", *SETTINGS)
    assert before.items() <= recipes(run).items()
    assert recipes(run) == recipes(proposed)
    assert adapters(run) == adapters(proposed)
    assert len(cuts(run)) == len(cuts(proposed))
    assert {name: row["state"] for name, row in population(run).items()} == {
        name: row["state"] for name, row in population(proposed).items()
    }


def test_another_proposal_than_before_the_kill_is_refused(tmp_path):
    from chrysalis_ray.population.propose import keep_proposal

    layout = RunLayout(tmp_path)
    write_branch(layout, [])
    variant = Variant("v000-code", 0, 1, "s", "g", "b", Hyperparameters(), Epigenome({"code": 1.0}), 4, 2, 2, 16)
    keep_proposal(layout, variant)
    keep_proposal(layout, variant)
    assert json.loads(layout.branch_manifest.read_text())["variants"] == ["v000-code"]
    other = Variant("v000-notes", 0, 1, "s", "g", "b", Hyperparameters(), Epigenome({"notes": 1.0}), 4, 2, 2, 16)
    with pytest.raises(RunError, match="proposed v000-code before"):
        keep_proposal(layout, other)
