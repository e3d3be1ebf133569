"""Threads of one worker, each with variants of its own, and linear modules computed together."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_texts import TextTokens, distance, new_pack, place_fresh, same, text_tokens, variant

from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.packed import PackedLinear
from chrysalis_ray.training.passes import LONG, WIDE
from chrysalis_ray.training.shards import Shard
from chrysalis_ray.training.step import train_chunk

RANKS = (8, 4, 2, 6, 8)


def filled(base: Path, count: int = 5, **options: object) -> Pack:
    pack = new_pack(base, count, **options)  # type: ignore[arg-type]
    for slot in range(count):
        place_fresh(pack, slot, variant(slot, rank=RANKS[slot], learning_rate=1e-3 * (slot + 1)))
    return pack


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_however_many_threads_a_variant_becomes_the_same(threads: int, tiny_base: Path, tokens: TextTokens) -> None:
    one, many = (filled(tiny_base, dtype=torch.float64, lanes="compacted", threads=count) for count in (1, threads))
    for pack in (one, many):
        train_chunk(pack, range(5), tokens, 3)
        train_chunk(pack, (3, 0), tokens, 2)
        train_chunk(pack, (2,), tokens, 2)
    assert len(many.shards.all) == min(threads, 4)
    assert all(distance(one.harvest(slot)[0], many.harvest(slot)[0]) <= 1e-12 for slot in range(5))
    rows = tokens.batch([("code", 0), ("prose", 1)], "select")
    assert (one.score([4, 1, 0], rows) - many.score([4, 1, 0], rows)).abs().max() <= 1e-12


def test_fixed_lanes_keep_their_bits_beside_a_thread_of_nan(tiny_base: Path, tokens: TextTokens) -> None:
    """Two shards of two rows each: a neighbour in the same shard and one in the other, and slots that change shards."""
    calm, wild = (filled(tiny_base, 4, lanes="fixed", threads=3) for _ in range(2))
    assert [shard.window.rows for shard in calm.shards.all] == [slice(0, 4)] * 2
    wild.bank.flat_SP[1].fill_(float("nan"))
    for pack in (calm, wild):
        train_chunk(pack, range(4), tokens, 4)
    assert calm.shards.rows == [slice(0, 2), slice(2, 4)]
    assert all(same(calm.harvest(slot)[0], wild.harvest(slot)[0]) for slot in (0, 2, 3))
    moved = new_pack(tiny_base, 4, lanes="fixed", threads=3)
    place_fresh(moved, 1, variant(2, rank=RANKS[2], learning_rate=3e-3))
    train_chunk(moved, [1], tokens, 4)
    assert same(moved.harvest(1)[0], calm.harvest(2)[0])


def test_shards_share_the_base_and_nothing_else(tiny_base: Path) -> None:
    pack = new_pack(tiny_base, 4, threads=2)
    first, second = (shard.trunk for shard in pack.shards.all)
    assert [p.data_ptr() for p in first.parameters()] == [p.data_ptr() for p in second.parameters()]
    mine, others = ({id(module) for module in trunk.modules()} for trunk in (first, second))
    assert mine.isdisjoint(others)
    windows = [{module.window for module in t.modules() if isinstance(module, PackedLinear)} for t in (first, second)]
    assert [len(seen) for seen in windows] == [1, 1]
    assert windows[0].isdisjoint(windows[1])
    assert {window.bank for seen in windows for window in seen} == {pack.bank}


def test_an_error_in_one_thread_is_raised_when_the_others_have_ended(tiny_base: Path) -> None:
    pack = new_pack(tiny_base, 4, threads=2)
    pack.arrange([0, 1, 2, 3])
    ended, failed = threading.Event(), threading.Event()

    def work(shard: Shard, item: str) -> None:
        if item == "fails":
            failed.set()
            raise ValueError("no such row")
        assert failed.wait(10)
        ended.set()

    with pytest.raises(ValueError, match="no such row"):
        pack.shards.each(work, ["fails", "works"])
    assert ended.is_set()


@pytest.mark.parametrize(("live", "lane", "inside"), [(1, LONG, 4), (1, LONG - 1, 1), (2, LONG, 2), (3, LONG, 1), (4, LONG, 1)])
def test_threads_without_a_variant_go_into_the_operations_of_long_lanes(
    live: int, lane: int, inside: int, tiny_base: Path
) -> None:
    pack = new_pack(tiny_base, 4, threads=4)
    assert pack.bank.widest < WIDE
    pack.arrange(list(range(live)))
    assert pack.shards.each(lambda shard, item: torch.get_num_threads(), [None] * live, lane) == [inside] * live
    pack.shards.may_split = False  # as where a step is measured that is shared with nobody
    assert pack.shards.each(lambda shard, item: torch.get_num_threads(), [None] * live, lane) == [1] * live


def test_a_lone_variant_of_one_long_row_is_the_same_on_two_threads(tiny_base: Path) -> None:
    tokens = text_tokens(tiny_base, LONG)
    packs = [new_pack(tiny_base, 1, threads=2, dtype=torch.float64) for _ in range(2)]
    packs[1].shards.may_split = False
    told = []
    for pack in packs:
        place_fresh(pack, 0, replace(variant(0), rows_per_step=1, sequence_length=LONG))
        told.append(train_chunk(pack, [0], tokens, 4)[0])
        assert pack.shards.apart is None
    assert told[0].train_loss == pytest.approx(told[1].train_loss, rel=1e-12)
    assert distance(packs[0].harvest(0)[0], packs[1].harvest(0)[0]) <= 1e-10


@pytest.mark.parametrize("threads", [1, 2])
def test_modules_computed_together_equal_each_by_itself(threads: int, tiny_base: Path, tokens: TextTokens) -> None:
    together, alone = (filled(tiny_base, dtype=torch.float64, threads=threads) for _ in range(2))
    groups = set()
    for shard in alone.shards.all:
        for module in shard.trunk.modules():
            if isinstance(module, PackedLinear):
                assert module.group is not None
                groups.add(tuple(name.rpartition(".")[2] for name in module.group.names))
                module.group = None
    assert groups == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
    for pack in (together, alone):
        train_chunk(pack, range(5), tokens, 4, rows_per_microstep=1)
    assert all(distance(together.harvest(slot)[0], alone.harvest(slot)[0]) <= 1e-12 for slot in range(5))


def test_recomputed_layers_and_threads_go_together(tiny_base: Path, tokens: TextTokens) -> None:
    """Every shard recomputes its own layers: the results are those of layers that keep their activations, bit for bit."""
    kept, recomputed = (filled(tiny_base, 4, lanes="fixed", threads=2, recompute=again) for again in (False, True))
    for pack in (kept, recomputed):
        train_chunk(pack, range(4), tokens, 4)
    assert all(same(kept.harvest(slot)[0], recomputed.harvest(slot)[0]) for slot in range(4))


def test_targets_that_are_no_neighbours_are_computed_alone(tiny_base: Path, tokens: TextTokens) -> None:
    pack = new_pack(tiny_base, 2, targets=("q_proj", "v_proj", "gate_proj", "up_proj", "o_proj"))
    names = {
        module.name.rpartition(".")[2]: [name.rpartition(".")[2] for name in module.group.names]
        for module in pack.shards.all[0].trunk.modules()
        if isinstance(module, PackedLinear) and module.group is not None
    }
    assert names["q_proj"] == ["q_proj"]
    assert names["up_proj"] == ["gate_proj", "up_proj"]
    place_fresh(pack, 0, variant(0))
    before = pack.harvest(0)[0]
    train_chunk(pack, [0], tokens, 1)
    assert not same(before, pack.harvest(0)[0])
