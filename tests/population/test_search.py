"""From YAML to Ray Tune's own classes, and what a missing package says."""

from pathlib import Path

import pytest

from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.errors import RunError
from chrysalis_ray.population import search

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def population_of(*settings, name="search_mixes"):
    return load_experiment(EXPERIMENTS / f"{name}.yaml", settings).experiment.population


ALL_AT_ONCE = ("population.searcher={type: sobol}", "body={slots: 32}")


@pytest.mark.parametrize(
    ("scheduler", "module", "name"),
    [
        ("{type: fifo}", "ray.tune.schedulers.trial_scheduler", "FIFOScheduler"),
        ("{type: asha}", "ray.tune.schedulers.async_hyperband", "AsyncHyperBandScheduler"),
        ("{type: hyperband}", "ray.tune.schedulers.hyperband", "HyperBandScheduler"),
        ("{type: pbt, mutate: [learning_rate, levels]}", "ray.tune.schedulers.pbt", "PopulationBasedTraining"),
        ("{type: median}", "ray.tune.schedulers.median_stopping_rule", "MedianStoppingRule"),
    ],
)
def test_schedulers_are_those_of_ray_tune(scheduler, module, name):
    population = population_of(*ALL_AT_ONCE, f"population.scheduler={scheduler}")
    made = type(search.make_scheduler(population))
    assert (made.__module__, made.__qualname__) == (module, name)


def test_pb2_is_ray_tunes_and_knows_the_ends_of_every_range():
    pytest.importorskip("sklearn")
    levels = "{type: levels, levels: {code: {type: uniform, low: 0, high: 4}}}"
    population = population_of(
        *ALL_AT_ONCE, f"population.epigenomes={levels}", "population.scheduler={type: pb2, mutate: [learning_rate, levels]}"
    )
    made = search.make_scheduler(population)
    assert type(made).__module__ == "ray.tune.schedulers.pb2"
    assert search.bounds(population) == {"learning_rate": [1e-3, 2e-2], "level.code": [0, 4]}


def test_what_a_scheduler_may_change_are_hyperparameters_and_levels_by_name():
    population = population_of(*ALL_AT_ONCE, "population.scheduler={type: pbt, mutate: [levels]}")
    assert search.mutable_fields(population, ()) == ("level.code", "level.docstrings", "level.reference", "level.unicode")
    assert search.mutations(population)["level.unicode"] == [0, 1]
    assert search.mutable_fields(population_of(), ()) == ()


def test_optuna_gets_every_range_and_the_mixes_that_are_dealt():
    pytest.importorskip("optuna")
    from chrysalis_ray.population.propose import tune_space

    loaded = load_experiment(EXPERIMENTS / "search_mixes.yaml", ["population.epigenomes={type: simplex_grid, steps: 2}"])
    space = tune_space(loaded.experiment, ("a", "b", "c"))
    assert set(space) == {"learning_rate", "rank", "mix"}
    assert space["mix"].categories == [0, 1, 2, 3, 4, 5]


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(search.NEEDS, "optuna", ("a_package_that_is_not_there", "optuna"))
    with pytest.raises(RunError) as caught:
        search.check_installed(population_of())
    assert "searcher is optuna, which needs the package a_package_that_is_not_there" in caught.value.message
    assert "'.[optuna]'" in (caught.value.remedy or "")
    search.check_installed(population_of(*ALL_AT_ONCE))
