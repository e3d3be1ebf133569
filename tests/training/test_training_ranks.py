"""Variants of very different ranks: each is computed as wide as its own rank needs, and becomes what it would have become."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_training_against_peft import largest_difference, train_alone
from training_texts import STEPS, TextTokens, distance, new_pack, place_fresh, same, variant, weights

from chrysalis_ray.core.records import Variant
from chrysalis_ray.training.bank import bucket_rank
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.packed import PackedLinear
from chrysalis_ray.training.step import train_chunk

BANK = 40
RANKS = (4, 33, 8, 2, 16, 40)
DROPOUT = (0.0, 0.2, 0.0, 0.3, 0.0, 0.0)


def mixed(base: Path, order: tuple[int, ...] = tuple(range(len(RANKS))), **options: object) -> Pack:
    """Slot k holds variant order[k]."""
    pack = new_pack(base, len(RANKS), rank=BANK, **options)  # type: ignore[arg-type]
    for slot, index in enumerate(order):
        place_fresh(pack, slot, varied(index))
    return pack


def varied(index: int, dropout: bool = True) -> Variant:
    rate, decay = 1e-3 * (1 + index), 0.05 * index
    share = DROPOUT[index] if dropout else 0.0
    return variant(index, rank=RANKS[index], learning_rate=rate, weight_decay=decay, dropout=share)


def as_wide_as_the_bank(pack: Pack) -> Pack:
    """Computed as if every variant had the rank of the bank."""
    pack.shards.buckets = False
    for shard in pack.shards.all:
        shard.buckets = False
    return pack


def widths(pack: Pack) -> list[list[tuple[int, int]]]:
    """Rows and rank of every bucket of every shard."""
    windows = [shard.window for shard in pack.shards.live]
    return [[(bucket.rows.stop - bucket.rows.start, bucket.rank) for bucket in window.buckets] for window in windows]


def test_buckets_are_powers_of_two_within_the_bank() -> None:
    assert [bucket_rank(rank, 64) for rank in (0, 1, 8, 9, 16, 17, 33, 64)] == [8, 8, 8, 16, 16, 32, 64, 64]
    assert [bucket_rank(rank, 40) for rank in (8, 33, 40)] == [8, 40, 40]
    assert [bucket_rank(rank, 6) for rank in (0, 2, 6)] == [6, 6, 6]


def test_like_ranks_stand_together_and_every_shard_has_its_share(tiny_base: Path) -> None:
    one, two = mixed(tiny_base), mixed(tiny_base, threads=2)
    for pack in (one, two):
        assert sorted(pack.arrange(range(6))) == list(range(6))
    assert widths(one) == [[(2, 40), (1, 16), (3, 8)]]
    assert widths(two) == [[(1, 40), (1, 16), (1, 8)], [(1, 40), (2, 8)]]
    two.arrange([0, 2, 3])
    assert widths(two) == [[(1, 8)], [(2, 8)]]
    fixed = mixed(tiny_base, lanes="fixed", threads=2)
    assert fixed.arrange([1, 0]) == [0, 1, None, None, None, None]
    assert widths(fixed) == [[(3, 40)], [(3, 40)]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_very_different_ranks_equal_separate_peft(
    dtype: torch.dtype, tolerance: float, tiny_base: Path, tokens: TextTokens
) -> None:
    members = [varied(index, dropout=False) for index in (0, 1, 4)]
    pack = new_pack(tiny_base, len(members), rank=BANK, dtype=dtype)
    for slot, member in enumerate(members):
        place_fresh(pack, slot, member)
    train_chunk(pack, range(len(members)), tokens, STEPS)
    assert len(widths(pack)[0]) == 3
    for slot, member in enumerate(members):
        packed, alone = weights(pack, slot), train_alone(tiny_base, pack, member, tokens, dtype)
        # as in the test of like ranks: peft in fp32 may be further from fp64 than the tolerance itself
        exact = alone if dtype == torch.float64 else train_alone(tiny_base, pack, member, tokens, torch.float64)
        as_exact = dtype == torch.float32 and largest_difference(packed, exact) <= largest_difference(alone, exact)
        assert largest_difference(packed, alone) <= tolerance or as_exact


@pytest.mark.parametrize("path", ["together", "module by module"])
@pytest.mark.parametrize("threads", [1, 2])
def test_buckets_change_nothing_but_the_work(threads: int, path: str, tiny_base: Path, tokens: TextTokens) -> None:
    """Weights, moments, metrics and scores, with dropout, of fused and of general packed layers; padding is never touched."""
    narrow, wide = (mixed(tiny_base, dtype=torch.float64, threads=threads) for _ in range(2))
    as_wide_as_the_bank(wide)
    for shard in narrow.shards.all:
        for module in shard.trunk.modules():
            if isinstance(module, PackedLinear) and path == "module by module":
                module.group = None
    told, expected = (train_chunk(pack, range(6), tokens, 4, rows_per_microstep=1) for pack in (narrow, wide))
    assert len(widths(narrow)[0]) == 3
    assert widths(wide)[0] == [(6 // threads, BANK)]
    for slot in range(6):
        assert distance(narrow.harvest(slot)[0], wide.harvest(slot)[0]) <= 1e-12
        assert told[slot].train_loss == pytest.approx(expected[slot].train_loss, abs=1e-12)
        assert told[slot].gradient_norm == pytest.approx(expected[slot].gradient_norm, rel=1e-11)
    rows = tokens.batch([("code", 0), ("prose", 1)], "select")
    assert (narrow.score([5, 0, 3], rows) - wide.score([5, 0, 3], rows)).abs().max() <= 1e-12
    for slot, rank in enumerate(RANKS):
        row = narrow.bank.flat_SP[narrow._row_of[slot]]
        for name, side in narrow.bank.offsets:
            block = narrow.bank.block(row, name, side)
            assert not (block[rank:] if side == "lora_A" else block[:, rank:]).any()


@pytest.mark.parametrize("threads", [1, 2])
def test_ranks_of_one_bucket_as_wide_as_the_bank_keep_every_bit(threads: int, tiny_base: Path, tokens: TextTokens) -> None:
    packs = []
    for _ in range(2):
        packs.append(new_pack(tiny_base, 4, rank=16, threads=threads))
        for slot, rank in enumerate((16, 9, 12, 10)):
            place_fresh(packs[-1], slot, variant(slot, rank=rank, dropout=0.1 * (slot == 2)))
    as_wide_as_the_bank(packs[1])
    for pack in packs:
        assert pack.arrange((2, 0, 3, 1)) == [2, 0, 3, 1]
        train_chunk(pack, (2, 0, 3, 1), tokens, 3)
    assert all(same(packs[0].harvest(slot)[0], packs[1].harvest(slot)[0]) for slot in range(4))


@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_of_any_rank_are_not_felt(threads: int, tiny_base: Path, tokens: TextTokens) -> None:
    """Bit for bit: a neighbour of NaN in one's own bucket and in another, and a wild one."""
    calm, poisoned, wild = (mixed(tiny_base, threads=threads) for _ in range(3))
    poisoned.bank.flat_SP[1].fill_(float("nan"))
    place_fresh(wild, 1, variant(9, rank=RANKS[1], learning_rate=0.5, clip=0.0, alpha=256.0))
    place_fresh(wild, 3, variant(8, rank=RANKS[3], learning_rate=0.5, clip=0.0, dropout=0.5))
    for pack in (calm, poisoned, wild):
        train_chunk(pack, range(6), tokens, 4)
    assert all(same(calm.harvest(slot)[0], poisoned.harvest(slot)[0]) for slot in (0, 2, 3, 4, 5))
    assert all(same(calm.harvest(slot)[0], wild.harvest(slot)[0]) for slot in (0, 2, 4, 5))


def test_slots_of_different_ranks_may_be_permuted(tiny_base: Path, tokens: TextTokens) -> None:
    order = (5, 2, 0, 4, 1, 3)
    straight, shuffled = mixed(tiny_base), mixed(tiny_base, order)
    train_chunk(straight, range(6), tokens, 4)
    train_chunk(shuffled, (3, 1, 0, 2, 5, 4), tokens, 4)
    assert all(same(straight.harvest(index)[0], shuffled.harvest(slot)[0]) for slot, index in enumerate(order))


def test_ranks_that_come_and_go_are_felt_by_rounding_alone(tiny_base: Path, tokens: TextTokens) -> None:
    """The wide ones end, another rank comes into a slot: who stays moves to other rows, shards and buckets."""
    quiet, busy = (mixed(tiny_base, dtype=torch.float64, threads=2) for _ in range(2))
    train_chunk(quiet, range(6), tokens, 6)
    train_chunk(busy, range(6), tokens, 2)
    busy.clear(1)
    train_chunk(busy, (3, 0, 2, 4), tokens, 2)
    place_fresh(busy, 1, variant(7, rank=24))
    train_chunk(busy, (0, 1, 2, 3, 4), tokens, 2)
    assert all(distance(busy.harvest(slot)[0], quiet.harvest(slot)[0]) <= 1e-12 for slot in (0, 2, 3, 4))


def test_recomputed_layers_of_different_ranks_change_no_bit(tiny_base: Path, tokens: TextTokens) -> None:
    kept, recomputed = (mixed(tiny_base, recompute=again) for again in (False, True))
    for pack in (kept, recomputed):
        train_chunk(pack, range(6), tokens, 2)
    assert all(same(kept.harvest(slot)[0], recomputed.harvest(slot)[0]) for slot in range(6))
