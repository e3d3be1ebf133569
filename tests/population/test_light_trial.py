"""A trial's process answers as `ray.tune.Trainable` does, without being one."""

import inspect
from types import SimpleNamespace

import pytest
from ray import tune
from ray.tune.execution.tune_controller import TuneController
from ray.tune.result import STDERR_FILE, STDOUT_FILE, TRIAL_INFO
from ray.tune.trainable import trainable

from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant
from chrysalis_ray.population.trial import VariantTrial
from chrysalis_ray.population.tuned import light_trials
from chrysalis_ray.population.words import TRIAL, TUNES

# What Ray 2.60's controller calls in a trial's process.
CALLED = ("train", "save", "restore", "reset", "stop", "get_auto_filled_metrics", "get_current_ip_pid")


@pytest.mark.parametrize("method", CALLED)
def test_what_tune_calls_takes_what_rays_own_takes(method):
    rays, ours = (inspect.signature(getattr(owner, method)).parameters for owner in (tune.Trainable, VariantTrial))
    assert method == "restore" or {"self", *ours} <= {"self", *rays}
    assert [name for name in ours if ours[name].default is inspect.Parameter.empty] == [
        name for name in rays if rays[name].default is inspect.Parameter.empty and name != "checkpoint_path"
    ] + (["checkpoint"] if method == "restore" else [])


def test_the_names_under_which_tune_adds_to_a_config():
    assert TRIAL == TRIAL_INFO
    assert all(name.startswith(TUNES) for name in (TRIAL_INFO, STDOUT_FILE, STDERR_FILE))


class Stock(tune.Trainable):
    def step(self):
        return {"done": False}


class Step(VariantTrial):
    """Without omega: told what a step comes to."""

    def __init__(self):
        hyper = Hyperparameters()
        self.variant = Variant("v000", 0, 1, "seed", "genome", "base", hyper, Epigenome({"code": 1.0}), 4, 2, 2, 32)
        self.trial_id, self.config = "default", {}
        self.iterations, self.restored_at, self.seconds, self.seconds_restored = 0, 0, 0.0, 0.0

    def step(self):
        return {"done": False}


def test_a_report_has_the_fields_of_rays_own(monkeypatch, tmp_path):
    monkeypatch.setattr(trainable, "DEFAULT_STORAGE_PATH", str(tmp_path))
    ours, stock = Step(), Stock()
    for _ in range(2):
        mine, rays = ours.train(), stock.train()
    assert mine.keys() == rays.keys()
    assert {name: type(value) for name, value in mine.items()} == {name: type(value) for name, value in rays.items()}
    counted = ("training_iteration", "iterations_since_restore", "pid", "hostname", "trial_id")
    assert {name: mine[name] for name in counted} == {name: rays[name] for name in counted}
    before = stock.get_auto_filled_metrics(debug_metrics_only=True)
    assert ours.get_auto_filled_metrics(debug_metrics_only=True).keys() == before.keys()


def test_tune_hears_every_report_as_it_comes():
    """Buffered, as a variable of Tune's may ask for, they would be asked for by a method that a light trial has not."""
    controller, trial = TuneController.__new__(TuneController), SimpleNamespace(checkpoint_freq=0, checkpoint_at_end=False)
    controller._buffer_length, controller._buffer_min_time_s, controller._buffer_max_time_s = 4, 0.0, 100.0
    controller._actor_manager = SimpleNamespace(num_actor_tasks=1)
    assert controller._maybe_buffer_training(trial)[0] == 4
    with light_trials():
        assert controller._maybe_buffer_training(trial) == (1, 0.0)
    assert controller._maybe_buffer_training(trial)[0] == 4
