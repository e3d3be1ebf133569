"""What a variant becomes does not depend on what stands beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_texts import TextTokens, distance, fresh_adapter, new_pack, place_fresh, same, variant, weights

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.step import train_chunk

RANKS = (8, 4, 2, 6)


def full_pack(base: Path, order: tuple[int, ...] = (0, 1, 2, 3), **options: object) -> Pack:
    """Four variants; slot k holds variant order[k]."""
    pack = new_pack(base, 4, **options)  # type: ignore[arg-type]
    for slot, index in enumerate(order):
        place_fresh(pack, slot, variant(index, rank=RANKS[index], learning_rate=1e-3 * (index + 1), weight_decay=0.1 * index))
    return pack


def test_a_neighbour_of_nan_changes_no_bit(tiny_base: Path, tokens: TextTokens) -> None:
    healthy, poisoned = full_pack(tiny_base), full_pack(tiny_base)
    poisoned.bank.flat_SP[2].fill_(float("nan"))
    expected = train_chunk(healthy, range(4), tokens, 5)
    metrics = train_chunk(poisoned, range(4), tokens, 5)
    for slot in (0, 1, 3):
        assert same(healthy.harvest(slot)[0], poisoned.harvest(slot)[0])
        assert metrics[slot] == expected[slot]
    assert metrics[2].state == "evicted"
    assert (metrics[2].skipped, metrics[2].train_loss, metrics[2].gradient_norm) == (5, None, None)
    assert metrics[2].to_json()["step"] == 5


def test_a_wild_neighbour_changes_no_bit(tiny_base: Path, tokens: TextTokens) -> None:
    """Other data, other labels, other learning rate, other scale."""
    calm, wild = full_pack(tiny_base), full_pack(tiny_base)
    place_fresh(wild, 1, variant(9, rank=8, learning_rate=0.5, clip=0.0, alpha=256.0))
    for pack in (calm, wild):
        train_chunk(pack, range(4), tokens, 5)
    assert all(same(calm.harvest(slot)[0], wild.harvest(slot)[0]) for slot in (0, 2, 3))
    assert not same(weights(calm, 1), weights(wild, 1))


def test_slots_may_be_permuted(tiny_base: Path, tokens: TextTokens) -> None:
    straight, shuffled = full_pack(tiny_base), full_pack(tiny_base, (2, 0, 3, 1))
    train_chunk(straight, range(4), tokens, 5)
    train_chunk(shuffled, (3, 1, 0, 2), tokens, 5)
    for slot, index in enumerate((2, 0, 3, 1)):
        assert same(straight.harvest(index)[0], shuffled.harvest(slot)[0])


@pytest.mark.parametrize("lanes", ["fixed", "compacted"])
def test_churn_beside_it_is_not_felt(lanes: str, tiny_base: Path, tokens: TextTokens) -> None:
    """One neighbour is pruned, another is added into its slot: the others become what they would have become."""
    quiet, busy = full_pack(tiny_base, lanes=lanes), full_pack(tiny_base, lanes=lanes)
    train_chunk(quiet, range(4), tokens, 10)
    train_chunk(busy, range(4), tokens, 4)
    busy.clear(1)
    train_chunk(busy, (3, 0, 2), tokens, 3)
    place_fresh(busy, 1, variant(7))
    train_chunk(busy, (0, 1, 2, 3), tokens, 3)
    alone = new_pack(tiny_base, 4, lanes=lanes)
    place_fresh(alone, 3, variant(7))
    train_chunk(alone, [3], tokens, 3)
    pairs = [(quiet.harvest(slot)[0], busy.harvest(slot)[0]) for slot in (0, 2, 3)]
    pairs.append((alone.harvest(3)[0], busy.harvest(1)[0]))
    for left, right in pairs:
        assert same(left, right) if lanes == "fixed" else distance(left, right) <= 1e-6


def test_a_seed_goes_on_in_another_slot_of_another_pack(tiny_base: Path, tokens: TextTokens) -> None:
    """Bit for bit the run that was never stopped, metrics too."""
    whole, first, second = (new_pack(tiny_base, 3, lanes="fixed") for _ in range(3))
    member = variant(1, warmup_fraction=0.3)
    place_fresh(whole, 0, member)
    place_fresh(first, 0, member)
    train_chunk(whole, [0], tokens, 4)
    expected = train_chunk(whole, [0], tokens, 4)
    train_chunk(first, [0], tokens, 4)
    tensors, meta = first.harvest(0)
    place_fresh(second, 0, variant(5))
    second.place(2, member, tensors, meta)
    metrics = train_chunk(second, [2, 0], tokens, 4)
    assert metrics[0] == expected[0]
    assert same(whole.harvest(0)[0], second.harvest(2)[0])
    assert whole.harvest(0)[1] == second.harvest(2)[1]


def test_padding_of_smaller_ranks_stays_zero(tiny_base: Path, tokens: TextTokens) -> None:
    pack = full_pack(tiny_base)
    train_chunk(pack, range(4), tokens, 5)
    for slot, rank in enumerate(RANKS):
        rows = {"weight": pack.bank.flat_SP[slot], **pack.occupant(slot).optimizer.moments()}
        for row in rows.values():
            outside = row.clone()
            for block in pack.bank.unpack(outside, rank).values():
                block.zero_()
            assert torch.count_nonzero(outside) == 0


def test_a_clone_is_its_source_until_it_learns_otherwise(tiny_base: Path, tokens: TextTokens) -> None:
    pack = new_pack(tiny_base, 3, lanes="fixed")
    place_fresh(pack, 0, variant(0))
    train_chunk(pack, [0], tokens, 3)
    pack.clone(0, 2, variant(0))
    pack.clone(0, 1, variant(0, learning_rate=1e-2))
    train_chunk(pack, [0, 1, 2], tokens, 3)
    assert same(pack.harvest(0)[0], pack.harvest(2)[0])
    assert not same(pack.harvest(0)[0], pack.harvest(1)[0])


def test_evicted_after_three_skips_and_no_sooner(tiny_base: Path, tokens: TextTokens) -> None:
    pack = new_pack(tiny_base, 1)
    place_fresh(pack, 0, variant(0))
    train_chunk(pack, [0], tokens, 1)
    good = pack.bank.flat_SP.clone()
    pack.bank.flat_SP[0, 0] = float("inf")
    assert train_chunk(pack, [0], tokens, 2)[0].state == "training"
    pack.bank.flat_SP.copy_(good)
    recovered = train_chunk(pack, [0], tokens, 1)[0]
    assert (recovered.state, recovered.skipped, recovered.step) == ("training", 2, 4)
    assert pack.harvest(0)[1]["updates"] == 2


def test_what_does_not_fit_is_refused_by_name(tiny_base: Path, tokens: TextTokens) -> None:
    pack = new_pack(tiny_base, 2, rank=4)
    with pytest.raises(ModelError, match="rank 8 does not fit a bank of rank 4"):
        place_fresh(pack, 0, variant(0, rank=8))
    tensors = fresh_adapter(pack, 0)
    lost = sorted(tensors)[0]
    with pytest.raises(ModelError, match=lost.removeprefix("weight/")):
        pack.place(0, variant(0), {name: tensor for name, tensor in tensors.items() if name != lost}, {"optimizer_step": 0})
    with pytest.raises(ModelError, match="no target for"):
        pack.place(0, variant(0), {**tensors, "weight/model.odd.lora_A": tensors[lost]}, {"optimizer_step": 0})
    with pytest.raises(ModelError, match="holds no variant"):
        train_chunk(pack, [1], tokens, 1)
