"""Sobol points against torch's engine, and what scrambling must keep."""

import pytest
import torch

from chrysalis_ray.population.sobol import AXES, sobol_point


def test_unscrambled_points_are_those_of_torch() -> None:
    theirs = torch.quasirandom.SobolEngine(AXES, scramble=False).draw(257, dtype=torch.float64)
    ours = torch.tensor([sobol_point(index, AXES, None) for index in range(257)], dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-9)  # torch has 30 bits and no half cell


@pytest.mark.parametrize("rng_seed", [0, 5, 2**32 - 1])
def test_every_block_of_a_power_of_two_has_one_point_in_each_part_of_every_axis(rng_seed: int) -> None:
    points = [sobol_point(index, 12, rng_seed) for index in range(64)]
    for start, size in ((0, 64), (0, 16), (16, 16), (32, 32), (8, 8)):
        for axis in range(12):
            assert sorted(int(point[axis] * size) for point in points[start : start + size]) == list(range(size))


def test_pairs_of_the_first_axes_are_stratified_too() -> None:
    points = [sobol_point(index, 2, 17) for index in range(64)]
    assert len({(int(x * 8), int(y * 8)) for x, y in points}) == 64


def test_another_rng_seed_gives_other_points_and_more_axes_leave_the_first_as_they_are() -> None:
    assert sobol_point(3, 4, 1) != sobol_point(3, 4, 2)
    assert sobol_point(3, 9, 1)[:4] == sobol_point(3, 4, 1)
    with pytest.raises(ValueError, match="at most"):
        sobol_point(0, AXES + 1, 0)
