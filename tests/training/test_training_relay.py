"""The relay: everybody makes the same steps, no thread waits for long, and what comes out is what came out without it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_texts import TextTokens, distance, new_pack, place_fresh, variant

from chrysalis_ray.training.relay import OVERHEAD, relay
from chrysalis_ray.training.step import train_chunk


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), steps=st.integers(1, 500))
def test_all_make_their_steps_and_take_every_place_once(sizes, steps):
    count = sum(sizes)
    legs = relay(sizes, steps)
    assert all(sorted(leg.order) == list(range(count)) for leg in legs)
    for who in range(count):
        assert sum(leg.steps[leg.order.index(who)] for leg in legs) == steps
    if len(legs) > 1:
        assert sorted(leg.order.index(0) for leg in legs) == list(range(count))


@pytest.mark.parametrize(("sizes", "steps"), [((1, 2), 48), ((2, 3), 60), ((1, 1, 2), 100), ((3, 4), 300)])
def test_threads_that_share_unevenly_are_busy_alike(sizes, steps):
    """Time in passes: a pass of n variants takes n + OVERHEAD."""

    def time_of(leg):
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return [max(leg.steps[start : start + size]) * (size + OVERHEAD) for start, size in zip(starts, sizes, strict=True)]

    taken = sum(max(time_of(leg)) for leg in relay(sizes, steps))
    without = steps * (max(sizes) + OVERHEAD)
    best = sum(sum(time_of(leg)) for leg in relay(sizes, steps)) / len(sizes)
    assert taken < without
    assert taken <= 1.12 * best


@pytest.mark.parametrize("count", [3, 5])
def test_variants_that_share_threads_unevenly_end_where_each_ends_alone(
    count: int, tiny_base: Path, tokens: TextTokens
) -> None:
    steps = 4 * count + 2
    pack = new_pack(tiny_base, count, dtype=torch.float64, threads=2)
    for slot in range(count):
        place_fresh(pack, slot, variant(slot))
    assert len(relay(pack.shards.sizes(count), steps)) == count
    together = train_chunk(pack, range(count), tokens, steps)
    for slot in range(count):
        alone = new_pack(tiny_base, 1, dtype=torch.float64)
        place_fresh(alone, 0, variant(slot))
        (told,) = train_chunk(alone, [0], tokens, steps)
        assert distance(pack.harvest(slot)[0], alone.harvest(0)[0]) <= 1e-12
        assert together[slot].step == told.step == steps
        assert together[slot].train_loss == pytest.approx(told.train_loss, abs=1e-12)
        assert together[slot].gradient_norm == pytest.approx(told.gradient_norm, abs=1e-10)
        assert together[slot].domain_tokens == told.domain_tokens
