"""Every slot's trial must fit into the cluster's memory: a turn waits for all of them."""

import pytest

from chrysalis_ray.population.tune_run import TRIAL_MEMORY, trial_memory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("room", "slots"), [([64 * GIB], 8), ([1 * GIB], 8), ([0.3 * GIB], 64), ([GIB, GIB, 5 * GIB], 40), ([0.0], 4)]
)
def test_as_many_trials_fit_as_there_are_slots(room: list[float], slots: int) -> None:
    each = trial_memory(room, slots)
    assert 1 <= each <= TRIAL_MEMORY
    assert sum(room) == 0 or sum(int(node // each) for node in room) >= slots


def test_where_there_is_room_a_trial_reserves_what_it_takes() -> None:
    assert trial_memory([64 * GIB], 8) == TRIAL_MEMORY
