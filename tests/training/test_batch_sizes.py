"""Variants of one pack may differ in rows per step: each accumulates over its own step and moves when that is complete."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training_against_peft import largest_difference, train_alone
from training_texts import LENGTH, TextTokens, new_pack, place_fresh, same, variant, weights

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.records import Variant
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.step import runs, train_chunk

SIZES = (1, 2, 3, 8)
ROWS = 48  # of every variant in all; two reports of 24


def sized(member: Variant, rows_per_step: int) -> Variant:
    """The same number of rows in steps of `rows_per_step`."""
    steps = ROWS // rows_per_step
    return replace(member, rows_per_step=rows_per_step, steps=steps, chunk_steps=steps // 2)


MEMBERS = (
    sized(variant(0, rank=8, learning_rate=1e-3, clip=1.0, warmup_fraction=0.1), 1),
    sized(variant(1, rank=4, learning_rate=3e-3, weight_decay=0.1, clip=0.5, decay="linear", warmup_fraction=0.25), 2),
    sized(variant(2, rank=2, alpha=32.0, learning_rate=5e-4, clip=0.0, decay="constant", optimizer="adamw"), 3),
    sized(variant(3, rank=6, use_rslora=True, learning_rate=2e-3, clip=0.05, beta2=0.95, warmup_fraction=0.5), 8),
)


def planted(base: Path, members: tuple[Variant, ...] = MEMBERS, **options: object) -> Pack:
    pack = new_pack(base, len(members), **options)  # type: ignore[arg-type]
    for slot, member in enumerate(members):
        place_fresh(pack, slot, member)
    return pack


def train_report(pack: Pack, tokens: TextTokens, rows_per_microstep: int) -> list[object]:
    slots = range(pack.bank.slots)
    steps = [pack.occupant(slot).variant.chunk_steps for slot in slots]
    return train_chunk(pack, slots, tokens, steps, rows_per_microstep)  # type: ignore[arg-type,return-value]


@pytest.fixture(scope="module")
def alone(tiny_base: Path, tokens: TextTokens) -> list[dict[str, torch.Tensor]]:
    """Every member trained for itself by PEFT and torch, a whole step in one pass, in fp64."""
    pack = new_pack(tiny_base, 1, dtype=torch.float64)
    return [train_alone(tiny_base, pack, member, tokens, torch.float64) for member in MEMBERS]


@pytest.mark.parametrize("rows_per_microstep", [1, 2, 8])
@pytest.mark.parametrize("lanes", ["compacted", "fixed"])
def test_batch_sizes_of_one_pack_equal_separate_peft(
    lanes: str, rows_per_microstep: int, tiny_base: Path, tokens: TextTokens, alone: list[dict[str, torch.Tensor]]
) -> None:
    pack = planted(tiny_base, dtype=torch.float64, lanes=lanes)
    first, last = (train_report(pack, tokens, rows_per_microstep) for _ in range(2))
    for slot, member in enumerate(MEMBERS):
        assert largest_difference(weights(pack, slot), alone[slot]) <= 1e-12
        assert (first[slot].tokens, last[slot].tokens) == (ROWS // 2 * LENGTH, ROWS * LENGTH)  # type: ignore[attr-defined]
        assert last[slot].step == member.steps  # type: ignore[attr-defined]
        feed = Feed(member, tokens)  # type: ignore[arg-type]
        labels = sum(step.labels for step in feed.steps(0, member.steps))
        assert sum(last[slot].domain_tokens.values()) == labels  # type: ignore[attr-defined]


def test_batches_and_ranks_that_differ_much_equal_separate_peft(tiny_base: Path, tokens: TextTokens) -> None:
    """Buckets of like ranks stay buckets while variants that are done fall out of the passes."""
    members = tuple(
        sized(variant(index, rank=rank, learning_rate=1e-3), size)
        for index, (rank, size) in enumerate([(2, 8), (40, 3), (4, 1), (16, 2)])
    )
    pack = planted(tiny_base, members, dtype=torch.float64, rank=40)
    window, narrow = pack.shards.all[0].window, []
    pack.shards.all[0].trunk.register_forward_pre_hook(lambda *_: narrow.append([bucket.rank for bucket in window.buckets]))
    train_report(pack, tokens, 2)
    assert narrow[0] == [40, 16, 8]
    assert {len(buckets) for buckets in narrow} == {3}  # the last one to be done has the lowest rank
    train_report(pack, tokens, 2)
    for slot, member in enumerate(members):
        alone = train_alone(tiny_base, pack, member, tokens, torch.float64)
        assert largest_difference(weights(pack, slot), alone) <= 1e-12


@pytest.mark.parametrize("lanes", ["compacted", "fixed"])
def test_a_neighbour_of_nan_with_another_batch_changes_no_bit(lanes: str, tiny_base: Path, tokens: TextTokens) -> None:
    healthy, poisoned = (planted(tiny_base, lanes=lanes) for _ in range(2))
    poisoned.bank.flat_SP[1].fill_(float("nan"))
    expected, found = (train_report(pack, tokens, 2) for pack in (healthy, poisoned))
    for slot in (0, 2, 3):
        assert same(healthy.harvest(slot)[0], poisoned.harvest(slot)[0])
        assert found[slot] == expected[slot]
    assert found[1].state == "evicted"  # type: ignore[attr-defined]


def test_in_fixed_lanes_the_batches_of_neighbours_are_not_felt(tiny_base: Path, tokens: TextTokens) -> None:
    """Nor whether they share a thread, or are there at all."""
    others = tuple(sized(member, size) for member, size in zip(MEMBERS, (1, 8, 3, 1), strict=True))
    packs = [planted(tiny_base, members, lanes="fixed", threads=2) for members in (MEMBERS, others)]
    for pack in packs:
        train_report(pack, tokens, 2)
    lonely = new_pack(tiny_base, 4, lanes="fixed", threads=2)
    place_fresh(lonely, 1, MEMBERS[2])
    train_chunk(lonely, [1], tokens, MEMBERS[2].chunk_steps, 2)  # type: ignore[arg-type]
    for slot in (0, 2):
        assert same(packs[0].harvest(slot)[0], packs[1].harvest(slot)[0])
    assert same(packs[0].harvest(2)[0], lonely.harvest(1)[0])


def test_who_is_done_costs_no_pass_in_compacted_lanes(tiny_base: Path, tokens: TextTokens) -> None:
    """Two rows at a time: 24 passes for steps of one row, 12 for two, 16 for three, 12 for eight."""

    def sequences(lanes: str) -> list[int]:
        pack = planted(tiny_base, lanes=lanes)
        seen: list[int] = []
        trunk = pack.shards.all[0].trunk
        trunk.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[0]))
        train_report(pack, tokens, 2)
        return seen

    assert sequences("compacted") == [8] * 12 + [4] * 4 + [2] * 8
    assert sequences("fixed") == [8] * 24


def test_a_seed_goes_on_with_another_batch_where_its_rows_end(tiny_base: Path, tokens: TextTokens) -> None:
    """As population based training copies one: the weights and moments of the donor, the steps of the heir."""
    pack = planted(tiny_base)
    donor, heir = MEMBERS[1], sized(variant(9, rank=4, learning_rate=5e-3), 8)
    train_chunk(pack, [1], tokens, donor.chunk_steps)  # type: ignore[arg-type]
    tensors, meta = pack.harvest(1)
    pack.place(3, heir, tensors, meta)
    assert pack.occupant(3).optimizer_step == heir.chunk_steps
    assert pack.occupant(3).optimizer.updates == donor.chunk_steps
    pack.reconfigure(3, replace(heir, rows_per_step=2))
    assert pack.occupant(3).optimizer_step == donor.chunk_steps
    pack.place(3, heir, tensors, {"optimizer_step": 5})  # a seed from before batches could differ
    assert pack.occupant(3).optimizer_step == 5


def test_how_many_rows_at_a_time_must_be_said_where_batches_differ(tiny_base: Path, tokens: TextTokens) -> None:
    pack = planted(tiny_base)
    with pytest.raises(ModelError, match=r"steps of \[1, 2, 3, 8\] rows\n.*rows_per_microstep"):
        train_chunk(pack, range(4), tokens, 2)  # type: ignore[arg-type]
    place_fresh(pack, 0, replace(MEMBERS[0], sequence_length=2 * LENGTH))
    with pytest.raises(ModelError, match=f"rows of {2 * LENGTH} tokens"):
        train_chunk(pack, range(4), tokens, 2, 1)  # type: ignore[arg-type]


def test_rows_are_told_as_runs_of_neighbours() -> None:
    assert [(run.start, run.stop) for run in runs([0, 1, 4, 6, 7])] == [(0, 2), (4, 5), (6, 8)]
    assert not list(runs([]))
