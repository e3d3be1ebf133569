"""When a turn may start and when the next answer may leave, without Ray."""

from chrysalis_ray.body.barrier import Barrier


def test_by_count_a_turn_waits_for_as_many_as_there_are_places():
    barrier = Barrier(slots=2, expected=5)
    assert not barrier.may_start(["a"], 0, {})
    assert barrier.may_start(["a", "b"], 0, {})
    assert barrier.may_start(["e"], 4, {})  # the last one has nobody to wait for
    assert not barrier.may_start([], 5, {})


def test_by_count_an_end_is_decided_when_its_place_is_taken():
    barrier = Barrier(slots=2, expected=5)
    ended = {"asks": False, "concluded": True, "ended": 1, "told": {}}
    assert not barrier.is_decided(joined=2, **ended)
    assert barrier.is_decided(joined=3, **ended)
    assert barrier.is_decided(joined=5, **{**ended, "ended": 4})  # nobody is left to propose
    assert barrier.is_decided(asks=True, concluded=False, joined=2, ended=0, told={})
    assert not barrier.is_decided(asks=False, concluded=False, joined=2, ended=0, told={})


def test_by_rest_a_turn_waits_for_those_who_run_once_tune_has_heard_what_was_told():
    barrier = Barrier(slots=4, expected=4, by_rest=True)
    assert not barrier.may_start(["a", "b", "c"], 0, {})  # Tune has not rested yet
    barrier.rest({}, ["a", "b", "c"])
    assert not barrier.may_start(["a", "b"], 0, {})
    assert barrier.may_start(["a", "b", "c"], 0, {})
    told = {"a": "a1", "b": "b1", "c": "c1"}
    assert not barrier.may_start(["a"], 0, told)  # what it knows is older than what was answered
    barrier.rest({"a": "a1", "b": "b1"}, ["a"])
    assert not barrier.may_start(["a"], 0, told)
    barrier.rest(told, ["a"])  # b and c pause
    assert barrier.may_start(["a"], 0, told)


def test_by_rest_a_trial_that_went_away_is_no_decision_yet():
    barrier = Barrier(slots=4, expected=4, by_rest=True)
    gone = {"asks": False, "concluded": False, "joined": 4, "ended": 0}
    assert not barrier.is_decided(told={"a": "a1"}, **gone)
    barrier.rest({"a": "a1"}, [])
    assert barrier.is_decided(told={"a": "a1"}, **gone)
    assert not barrier.is_decided(told={"a": "a2"}, **gone)
