"""A variant that diverged hands in what JSON, Tune and the store can carry: the body and its neighbours go on."""

import math
from types import SimpleNamespace

import torch

from chrysalis_ray.body.worker import keep_seed, mean_loss
from chrysalis_ray.core.records import canonical_json
from chrysalis_ray.core.store import Store
from chrysalis_ray.evaluate.heldout import DocumentScore
from chrysalis_ray.population.listener import PopulationListener
from chrysalis_ray.population.words import DIVERGED


def tensors(value):
    return {"weight/m.lora_A": torch.full((2, 4), value), "weight/m.lora_B": torch.zeros(4, 2)}


def test_a_loss_that_is_no_number_is_none():
    assert mean_loss([DocumentScore("code", 0, 4.0, 2), DocumentScore("text", 1, 8.0, 2)]) == 3.0
    for wrong in (math.nan, math.inf):
        assert mean_loss([DocumentScore("code", 0, 4.0, 2), DocumentScore("text", 1, wrong, 2)]) is None


def test_weights_that_are_no_numbers_evict_their_variant_with_a_reason(tmp_path):
    store = Store(tmp_path)
    seed, ending = keep_seed(store, tensors(1.0), {"position": "p"})
    assert store.holds(seed)
    assert ending == {}
    seed, ending = keep_seed(store, tensors(math.nan), {"position": "p"})
    assert (seed, ending["state"]) == ("", "evicted")
    assert "cannot be kept" in ending["reason"]
    canonical_json(ending)


def test_the_listener_tells_none_where_the_scheduler_heard_the_worst():
    rows = []
    listener = PopulationListener(None, rows.append, lambda *told: None)
    for loss in (DIVERGED, 2.5):
        listener.on_trial_result(0, [], SimpleNamespace(trial_id="t"), {"variant": "v0", "select_loss": loss, "pid": 1})
    assert rows == [{"variant": "v0", "select_loss": None}, {"variant": "v0", "select_loss": 2.5}]


def test_an_evicted_variant_is_concluded_with_the_reason_of_the_body():
    told = []
    listener = PopulationListener(None, lambda row: None, lambda *words: None)
    listener._conclude = lambda *words: told.append(words)
    trial = SimpleNamespace(trial_id="t", config={"variant": "v0"})
    row = {"variant": "v0", "select_loss": DIVERGED, "state": "evicted", "complete": False, "skipped": 3, "report": 2}
    for extra in ({}, {"reason": "v0 cannot be kept: NaN"}):
        listener.on_trial_result(0, [], trial, row | extra)
        listener.on_trial_complete(0, [], trial)
    assert "3 steps skipped" in told[0][2]
    assert told[1] == ("v0", "evicted", "v0 cannot be kept: NaN")
