"""Passes: a part of the variants at a time, in the memory of one, and nobody can tell."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measurements import LAPTOP, measurement
from test_batch_sizes import planted, train_report
from test_training_isolation import full_pack
from training_texts import LENGTH, TextTokens, distance, fresh_adapter, new_pack, place_fresh, same, variant

from chrysalis_ray.config.claim import claim_run, run_directory
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.errors import ConfigError, RunError
from chrysalis_ray.core.layout import CACHE, CacheLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.passes import LONG_ENOUGH, logits_chunk, passes_of, tokens_at_once, variants_per_pass
from chrysalis_ray.training.planning.fitting import Scored, fit
from chrysalis_ray.training.planning.forecast import settle_plan
from chrysalis_ray.training.planning.hardware import GIB
from chrysalis_ray.training.planning.measured import Point, keep_measurement
from chrysalis_ray.training.planning.pace import Pace
from chrysalis_ray.training.planning.planner import plan
from chrysalis_ray.training.step import train_chunk

QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.yaml"
LANE = 2 * LENGTH  # tokens of a variant in a micro-step of two rows
LONG = ["blueprint.lanes={sequence_length: 1024, rows_per_step: 1}"]


@given(st.integers(1, 40), st.floats(1, 5000), st.none() | st.integers(1, 10_000), st.booleans(), st.integers(1, 4))
def test_every_variant_is_in_one_pass_and_no_pass_holds_too_many(
    variants: int, lane: float, held: int | None, even: bool, shards: int
) -> None:
    at_once = variants_per_pass(variants, lane, held, even)
    parts = passes_of(variants, at_once)
    assert [row for part in parts for row in range(variants)[part]] == list(range(variants))
    sizes = {part.stop - part.start for part in parts}
    assert max(sizes) <= at_once
    assert max(sizes) == 1 or held is None or max(sizes) * lane <= held
    assert max(sizes) - min(sizes) <= (0 if even else 1)
    tokens = tokens_at_once(variants, lane, held, shards, fixed=even)
    assert lane <= tokens <= variants * lane
    assert held is not None or tokens == variants * lane


def test_a_chunk_of_logits_follows_the_vocabulary() -> None:
    assert [logits_chunk(size, on_gpu=False) for size in (512, 3072, 151_936)] == [1024, 341, 128]
    assert [logits_chunk(size, on_gpu=True) for size in (3072, 151_936)] == [1024, 883]


def seen(pack: Pack) -> list[int]:
    """The sequences of every pass from now on."""
    told: list[int] = []
    for shard in pack.shards.all:
        shard.trunk.register_forward_pre_hook(lambda _, arguments: told.append(len(arguments[0])))
    return told


@pytest.mark.parametrize("lanes", ["compacted", "fixed"])
@pytest.mark.parametrize("rows_per_microstep", [1, 2, 8])
def test_shorter_passes_train_the_same_variants(
    lanes: str, rows_per_microstep: int, tiny_base: Path, tokens: TextTokens
) -> None:
    """Of unlike ranks and batches, so that some have done when others have not."""
    whole, cut = (planted(tiny_base, lanes=lanes, dtype=torch.float64, tokens_per_pass=held) for held in (None, 2 * LANE))
    told = seen(cut)
    expected, found = (train_report(pack, tokens, rows_per_microstep) for pack in (whole, cut))
    assert max(told) == {1: 4, 2: 4, 8: 8}[rows_per_microstep]  # four, two variants; one, however long its lane
    for slot in range(4):
        assert distance(whole.harvest(slot)[0], cut.harvest(slot)[0]) <= 1e-12
        assert found[slot].train_loss == pytest.approx(expected[slot].train_loss, rel=1e-12)  # type: ignore[attr-defined]
        assert found[slot].domain_tokens == expected[slot].domain_tokens  # type: ignore[attr-defined]


def test_dropout_threads_and_recomputed_layers_go_with_passes(tiny_base: Path, tokens: TextTokens) -> None:
    packs = [
        new_pack(tiny_base, 4, dtype=torch.float64, threads=threads, recompute=again, tokens_per_pass=held)
        for threads, again, held in ((1, False, None), (2, False, LANE), (1, True, 3 * LANE))
    ]
    for pack in packs:
        for slot in range(4):
            place_fresh(pack, slot, variant(slot, rank=(8, 4, 2, 6)[slot], dropout=0.1 * (slot % 2)))
        train_chunk(pack, range(4), tokens, 3)
        train_chunk(pack, (3, 1, 0), tokens, 2)
    for pack in packs[1:]:
        assert all(distance(packs[0].harvest(slot)[0], pack.harvest(slot)[0]) <= 1e-12 for slot in range(4))


@pytest.mark.parametrize("held", [LANE, 2 * LANE, 3 * LANE])
def test_in_fixed_lanes_no_bit_depends_on_who_shares_a_pass_or_trains_at_all(
    held: int, tiny_base: Path, tokens: TextTokens
) -> None:
    calm, wild = (full_pack(tiny_base, lanes="fixed", tokens_per_pass=held) for _ in range(2))
    shuffled = full_pack(tiny_base, (2, 0, 3, 1), lanes="fixed", tokens_per_pass=held)
    wild.bank.flat_SP[1].fill_(float("nan"))
    for pack in (calm, wild, shuffled):
        train_chunk(pack, range(4), tokens, 4)
    told = seen(calm)
    train_chunk(calm, (0, 3), tokens, 2)
    assert told == [{LANE: 2}.get(held, 4)] * 2 * 2  # two passes of one variant, or of two, of which the others rest
    train_chunk(wild, (3,), tokens, 2)
    for slot, index in enumerate((2, 0, 3, 1)):
        train_chunk(shuffled, (slot,), tokens, 2 if index in (0, 3) else 0)
        assert same(shuffled.harvest(slot)[0], calm.harvest(index)[0])
    assert same(wild.harvest(3)[0], calm.harvest(3)[0])


def test_a_pass_in_which_nobody_trains_is_not_made(tiny_base: Path, tokens: TextTokens) -> None:
    """Steps of 1, 2, 3 and 8 rows, two at a time: 24, 12, 16 and 12 passes, where each variant has its own."""
    pack = planted(tiny_base, lanes="fixed", tokens_per_pass=1)
    told = seen(pack)
    train_report(pack, tokens, 2)
    assert told == [2] * (24 + 12 + 16 + 12)


@pytest.mark.parametrize("lanes", ["compacted", "fixed"])
def test_judging_in_passes_gives_the_same_scores(lanes: str, tiny_base: Path, tokens: TextTokens) -> None:
    whole, cut = (full_pack(tiny_base, lanes=lanes, dtype=torch.float64, tokens_per_pass=held) for held in (None, 48))
    batch = tokens.batch([("code", 0), ("prose", 1)], "select")
    told = seen(cut)
    expected, found = (pack.judge([3, 0, 1], batch) for pack in (whole, cut))
    assert max(told) == 4  # four passes' worth of tokens: two candidates of two rows
    assert (expected.losses - found.losses).abs().max() <= 1e-12
    assert torch.equal(expected.hits, found.hits)
    tensors = fresh_adapter(whole, 3)
    factors = {
        target.name: (tensors[f"weight/{target.name}.lora_A"], tensors[f"weight/{target.name}.lora_B"])
        for target in whole.bank.targets
    }
    weights_CM = torch.linspace(0, 1, 5)[:, None]
    expected, found = (pack.judge_blend(pack.blend([(factors, 2.0)], weights_CM), batch) for pack in (whole, cut))
    assert len(told) == 2 + 3
    assert (expected.losses - found.losses).abs().max() <= 1e-12
    assert cut.shards.all[0].window.blend is None
    assert cut.shards.rows == whole.shards.rows


# what the planner makes of it ---------------------------------------------------------------------------------------


def test_long_lanes_are_planned_in_passes_and_need_the_memory_of_one() -> None:
    planned, whole = (
        plan(load_experiment(QUICKSTART, [*LONG, *more]), LAPTOP) for more in ([], ["body.tokens_per_pass=99999"])
    )
    assert planned.body.tokens_per_pass == LONG_ENOUGH
    assert planned.memory is not None
    assert whole.memory is not None
    assert planned.memory.activations == whole.memory.activations // 4  # of eight variants one on each of two threads
    assert any(note.startswith("of 8 variants as many compute at once as 2,048 tokens hold") for note in planned.notes)
    short = plan(load_experiment(QUICKSTART), LAPTOP)
    assert short.body.tokens_per_pass is None
    assert not any("tokens_per_pass" in note for note in short.notes)
    assert plan(load_experiment(QUICKSTART, [*LONG, "body.virtual_workers=1", "body.lanes=fixed"]), LAPTOP).body.tokens_per_pass


def test_a_law_with_a_long_launch_asks_for_long_passes_and_memory_for_short_ones(tmp_path: Path) -> None:
    cache, loaded = CacheLayout(tmp_path), load_experiment(QUICKSTART, LONG)
    keep_measurement(cache, measurement(loaded, pace=Pace("sum", launch=0.05, per_token=1e-4, shards=2)))
    assert plan(loaded, LAPTOP, cache).body.tokens_per_pass is None  # ridge 500: four lanes of a thread are no longer than pays
    keep_measurement(cache, measurement(loaded, pace=Pace("sum", launch=0.02, per_token=1e-4, shards=2)))
    assert plan(loaded, LAPTOP, cache).body.tokens_per_pass == 2048
    small = plan(loaded, replace(LAPTOP, memory=GIB), cache)
    assert small.body.tokens_per_pass == 1024
    written = plan(load_experiment(QUICKSTART, [*LONG, "body.tokens_per_pass=2000"]), replace(LAPTOP, memory=GIB), cache)
    assert written.body.tokens_per_pass == 2000


def test_the_law_counts_a_launch_for_every_pass() -> None:
    law = Pace("sum", launch=0.01, per_token=1e-4, shards=2, crowding=1.5, tokens_per_pass=256)
    assert law.step(8, 128, 128) == pytest.approx((2 * 0.01 + 512e-4) * 1.5)
    assert replace(law, tokens_per_pass=1).step(8, 128, 128) == pytest.approx((4 * 0.01 + 512e-4) * 1.5)
    assert replace(law, kind="roofline").step(8, 128, 128) == pytest.approx(512e-4 * 1.5)
    loads = [(1, 2, 64, 1), (2, 2, 64, 1), (4, 2, 64, 1), (8, 2, 64, 1), (8, 2, 64, 2), (1, 2, 32, 1), (8, 2, 32, 1)]
    points = [Point(n, rows, length, micro, law.step(n, rows * length, length, micro)) for n, rows, length, micro in loads]
    found = fit(points, 1, 2, 0.0, Scored(8, 512, 1.0), 0.0, tokens_per_pass=256)
    assert found.residual < 1e-6
    assert (found.pace.launch, found.pace.per_token) == (pytest.approx(0.01), pytest.approx(1e-4))


def test_the_length_of_passes_is_settled_once(tmp_path: Path) -> None:
    loaded = load_experiment(QUICKSTART, LONG)
    layout, cache = run_directory(loaded, tmp_path, None), CacheLayout(tmp_path / CACHE)
    claim_run(loaded, layout)
    assert settle_plan(loaded, layout, cache).body.tokens_per_pass == LONG_ENOUGH
    assert read_json(layout.run_manifest)["tokens_per_pass"] == LONG_ENOUGH
    layout.plan.unlink()
    assert settle_plan(loaded, layout, cache).body.tokens_per_pass == LONG_ENOUGH
    for wrong in ("many", 0, True, math.pi):
        write_json(layout.run_manifest, {**read_json(layout.run_manifest), "tokens_per_pass": wrong})
        with pytest.raises(RunError, match="holds passes of"):
            settle_plan(loaded, layout, cache)


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "all"])
def test_the_length_of_passes_is_a_number(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"body\.tokens_per_pass"):
        load_experiment(QUICKSTART, [f"body.tokens_per_pass={wrong}"])
