"""Dropout is exact: which numbers of x a variant loses depends on nothing but itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_texts import LENGTH, PROJECTIONS, TextTokens, distance, new_pack, place_fresh, same, variant

from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.dropout import GRAIN, Dropout, LaneMask
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.lanes import Feed, microbatch, takes
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.packed import PackedLinear
from chrysalis_ray.training.shards import Shard
from chrysalis_ray.training.step import forward_backward, strided_gradients, train_chunk
from chrysalis_ray.training.trunk import checkpoint_activations

SHARES = (0.1, 0.0, 0.5, 0.1)
CPU = torch.device("cpu")


def full_pack(base: Path, shares: tuple[float, ...] = SHARES, **options: object) -> Pack:
    pack = new_pack(base, len(shares), **options)  # type: ignore[arg-type]
    for slot, share in enumerate(shares):
        place_fresh(pack, slot, variant(slot, dropout=share))
    return pack


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_the_share_that_is_dropped(share: float) -> None:
    mask = LaneMask(Dropout(share, 7, 3), (0, 1, 2), 4)
    like = torch.empty(4 * 500, 250, dtype=torch.float64)
    noise = mask.noise("q_proj", like).view(4, -1)
    assert torch.equal(noise[3], torch.ones_like(noise[3]))
    count = noise[:3].numel()
    dropped = (noise[:3] == 0).double()
    assert abs(dropped.mean().item() - share) < 5 * (share * (1 - share) / count) ** 0.5
    assert dropped.view(3, 500, 250).mean(0).std().item() == pytest.approx((share * (1 - share) / 3) ** 0.5, rel=0.02)
    assert noise.unique().tolist() == pytest.approx([0.0, 1.0, 1 / (1 - share)], abs=4 / GRAIN / (1 - share) ** 2)
    others = [LaneMask(Dropout(share, *key), (place,), 1) for key, place in (((8, 3), 0), ((7, 4), 0), ((7, 3), 1))]
    others_drop = [(other.noise("q_proj", like[:500]) == 0).double().flatten() for other in others]
    others_drop.append((mask.noise("k_proj", like).view(4, -1)[0] == 0).double())
    for other in others_drop:
        assert abs(torch.corrcoef(torch.stack([dropped[0], other]))[0, 1].item()) < 0.02


@pytest.mark.parametrize("threads", [1, 2])
def test_neither_neighbours_nor_slots_nor_churn_are_felt(threads: int, tiny_base: Path, tokens: TextTokens) -> None:
    """Bit for bit: variants with and without dropout beside each other, and each alone in another slot."""
    busy = full_pack(tiny_base, lanes="fixed", threads=threads)
    train_chunk(busy, range(4), tokens, 2)
    busy.clear(3)
    train_chunk(busy, range(3), tokens, 2)
    for slot, share in enumerate(SHARES[:3]):
        alone = new_pack(tiny_base, 4, lanes="fixed", threads=threads)
        place_fresh(alone, 3 - slot, variant(slot, dropout=share))
        train_chunk(alone, [3 - slot], tokens, 4)
        assert same(alone.harvest(3 - slot)[0], busy.harvest(slot)[0])
    plain = full_pack(tiny_base, (0.0,) * 4, lanes="fixed", threads=threads)
    train_chunk(plain, range(4), tokens, 4)
    assert same(plain.harvest(1)[0], busy.harvest(1)[0])
    assert not same(plain.harvest(0)[0], busy.harvest(0)[0])


def test_recomputed_activations_drop_the_same(tiny_base: Path, tokens: TextTokens) -> None:
    kept = full_pack(tiny_base)
    model = load_base(tiny_base, "fp32")
    checkpoint_activations(model)
    recomputed = Pack(model, PROJECTIONS, 4, 8, make_engine(0, "none", "fp32", "cpu"))
    for slot, share in enumerate(SHARES):
        place_fresh(recomputed, slot, variant(slot, dropout=share))
    for pack in (kept, recomputed):
        train_chunk(pack, range(4), tokens, 3)
    assert all(same(kept.harvest(slot)[0], recomputed.harvest(slot)[0]) for slot in range(4))


def test_other_micro_steps_and_modules_called_one_by_one_drop_the_same(tiny_base: Path, tokens: TextTokens) -> None:
    whole, parts, single = (full_pack(tiny_base, dtype=torch.float64) for _ in range(3))
    packed = [module for module in single.shards.all[0].trunk.modules() if isinstance(module, PackedLinear)]
    for module in packed:
        assert module.group is not None
        module.group = None  # as under ZeRO-3
    train_chunk(whole, range(4), tokens, 4)
    train_chunk(parts, range(4), tokens, 4, rows_per_microstep=1)
    train_chunk(single, range(4), tokens, 4)
    for slot in range(4):
        assert distance(whole.harvest(slot)[0], parts.harvest(slot)[0]) <= 1e-12
        assert distance(whole.harvest(slot)[0], single.harvest(slot)[0]) <= 1e-12


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_row_drops_the_same_on_whatever_worker(world: int, tokens: TextTokens) -> None:
    lane = Feed(variant(0, dropout=0.2), tokens).step(5)
    seen = {}
    for rank in range(world):
        for take in takes([lane], 2):
            batch = microbatch([None, take], tokens, 2, rank, world, CPU)  # type: ignore[arg-type]
            if batch.passage is None:
                continue
            ((row, mask),) = batch.passage.dropping()
            assert row == 1
            noise = mask.noise("q_proj", torch.empty(mask.sequences * LENGTH, 48)).view(mask.sequences, -1)
            seen |= {place: noise[index] for index, place in enumerate(mask.places)}
    expected = LaneMask(Dropout(0.2, 100, 5), (0, 1), 2).noise("q_proj", torch.empty(2 * LENGTH, 48)).view(2, -1)
    assert sorted(seen) == [0, 1]
    assert all(torch.equal(expected[place], noise) for place, noise in seen.items())


def test_evaluation_drops_nothing(tiny_base: Path, tokens: TextTokens) -> None:
    rows = tokens.batch([("code", 0), ("prose", 1)], "select")
    dropping, plain = full_pack(tiny_base), full_pack(tiny_base, (0.0,) * 4)
    train_chunk(dropping, range(4), tokens, 1)
    for slot in range(4):
        tensors, meta = dropping.harvest(slot)
        plain.place(slot, variant(slot), tensors, meta)
    assert torch.equal(dropping.score(range(4), rows), plain.score(range(4), rows))


def test_no_mask_is_kept_for_the_backward_pass(tiny_base: Path, tokens: TextTokens) -> None:
    def saved_bytes(share: float) -> int:
        pack = full_pack(tiny_base, (share,))
        pack.arrange([0])
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        lane = Feed(pack.occupant(0).variant, tokens).step(0)
        batches = [microbatch([take], tokens, 2, 0, 1, CPU) for take in takes([lane], 2)]  # type: ignore[arg-type]
        with strided_gradients(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            pack.shards.each(forward_backward, batches)
        assert isinstance(pack.shards.all[0], Shard)
        return sum(sizes.values())

    assert saved_bytes(0.5) == saved_bytes(0.0)
