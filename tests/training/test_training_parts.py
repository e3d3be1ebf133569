"""Loss, lanes, attention, schedule, clip and targets, each against the plain way to do it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from training_texts import LENGTH, PROJECTIONS, TextTokens, distance, new_pack, place_fresh, same, variant, weights

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.records import Hyperparameters
from chrysalis_ray.training.bank import Bank, Window
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.lanes import Feed, label, microbatch, takes
from chrysalis_ray.training.loss import chunks_within, head_cross_entropy, token_scores
from chrysalis_ray.training.optimizer import clip_slots, slot_norms
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.packed import find_targets
from chrysalis_ray.training.schedules import learning_rate_at
from chrysalis_ray.training.step import train_chunk
from chrysalis_ray.training.trunk import checkpoint_activations, document_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunked_loss_equals_cross_entropy_over_whole_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lanes, rows, length, width, words = 3, 2, 11, 16, 37
    hidden = torch.randn(lanes * rows * length, width, dtype=dtype, requires_grad=True)
    head, bias = torch.randn(words, width, dtype=dtype), torch.randn(words, dtype=dtype)
    labels = np.random.default_rng(0).integers(0, words, (lanes, rows, length))
    labels[0, :, ::2] = -100
    labels[2] = -100
    counts = (labels != -100).sum((1, 2))
    labelled = label(labels, [1 / max(1, count) for count in counts], CPU)
    total, losses = head_cross_entropy(hidden, head, bias, labelled, chunk=5)
    (3.0 * total).backward()
    assert hidden.grad is not None
    chunked, hidden.grad = hidden.grad, None
    logits = (hidden @ head.T + bias).view(lanes, rows * length, words)
    plain = [torch.nn.functional.cross_entropy(logits[lane], torch.from_numpy(labels[lane].reshape(-1))) for lane in range(2)]
    (3.0 * sum(plain)).backward()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-5
    assert abs(total.item() - sum(plain).item()) <= tolerance
    assert (chunked - hidden.grad).abs().max() <= tolerance
    assert torch.equal(token_scores(hidden, head, bias, labelled, chunk=5).losses, losses)
    assert losses.dtype == dtype
    assert losses.shape == (counts.sum(),)


def test_chunks_do_not_cross_lanes() -> None:
    assert list(chunks_within((5, 0, 2, 4), 3)) == [slice(0, 3), slice(3, 5), slice(5, 7), slice(7, 10), slice(10, 11)]


def test_documents_in_a_row_do_not_see_each_other(tiny_base: Path, tokens: TextTokens) -> None:
    """Losses of packed documents equal those of each document alone, under the adapter, and the plain base under scale 0."""
    pack = new_pack(tiny_base, 2, dtype=torch.float64)
    place_fresh(pack, 0, variant(0))
    ones = {t.name: (torch.ones(1, t.in_features), torch.ones(t.out_features, 1)) for t in pack.bank.targets}
    pack.load_adapter(1, ones, 0.0)
    batch = tokens.batch([("prose", row) for row in range(6)] + [("code", row) for row in range(6)], "select")
    packed = pack.score([0, 1], batch)
    base = load_base(tiny_base, "fp64")
    seen = 0
    for row in range(12):
        for document in np.unique(batch.document[row][batch.document[row] >= 0]):
            inside = batch.document[row] == document
            alone = type(batch)(*(getattr(batch, name)[row : row + 1, inside] for name in vars(batch)))
            assert (pack.score([0], alone)[0, 0] - packed[0, row, inside]).abs().max() <= 1e-12
            with torch.no_grad():
                logits = base(input_ids=torch.from_numpy(alone.input_ids)).logits[0]
            plain = torch.nn.functional.cross_entropy(logits, torch.from_numpy(alone.labels[0]), reduction="none")
            assert (plain - packed[1, row, inside]).abs().max() <= 1e-12
            seen += 1
    assert seen > 15


def test_the_mask_keeps_documents_apart() -> None:
    mask = document_mask(torch.tensor([[0, 1, 0, 1, 2, 0, 0]]))[0, 0]
    documents = torch.tensor([0, 0, 1, 1, 1, 2, 3])
    expected = (documents[:, None] == documents[None, :]) & (torch.arange(7)[:, None] >= torch.arange(7)[None, :])
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(("world", "rows_per_microstep"), [(1, 4), (2, 4), (3, 4), (2, 2), (2, 3), (3, 8)])
def test_workers_divide_a_step_between_them(world: int, rows_per_microstep: int, tokens: TextTokens) -> None:
    """Together they see every row of the step once, and their weights sum to one per variant."""
    step = Feed(variant(0), tokens).step(3)
    lane = type(step)(step.rows * 2, step.label_counts * 2)
    expected = tokens.batch(lane.rows, "train")
    seen, weight = [], 0.0
    for rank in range(world):
        for take in takes([lane], rows_per_microstep):
            batch = microbatch([None, take], tokens, rows_per_microstep, rank, world, CPU)  # type: ignore[arg-type]
            assert batch.labelled.counts[0] == 0
            weight += batch.labelled.weights_K.sum().item()
            seen += batch.input_ids_NT[len(batch.input_ids_NT) // 2 :].tolist()
    assert weight == pytest.approx(1.0)
    filler = [0] * LENGTH
    assert sorted(row for row in seen if row != filler) == sorted(expected.input_ids.tolist())


def test_a_variant_moves_through_its_own_data_whatever_the_chunks(tokens: TextTokens) -> None:
    feed = Feed(variant(0), tokens)
    drawn = feed.plan.draw(0, 20)
    assert [row for step in range(10) for row in feed.step(step).rows] == [(domain, row) for domain, _, row in drawn]


def test_the_schedule() -> None:
    def rates(decay: str, warmup: float) -> list[float]:
        hyper = Hyperparameters(learning_rate=1.0, decay=decay, warmup_fraction=warmup)
        return [learning_rate_at(hyper, step, 8) for step in range(9)]

    assert rates("constant", 0.5) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates("linear", 0.0) == [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
    assert rates("cosine", 0.0)[4] == pytest.approx(0.5)
    assert rates("cosine", 0.25)[1:3] == [1.0, 1.0]
    with pytest.raises(ValueError, match="'stairs'"):
        rates("stairs", 0.0)


def test_every_slot_is_clipped_to_its_own_norm() -> None:
    torch.manual_seed(1)
    rows = torch.randn(4, 640, dtype=torch.float64) * torch.tensor([[1.0], [1e-3], [1e3], [1.0]])
    rows[3, 5] = float("inf")
    parts = [[torch.nn.Parameter(piece.clone()) for piece in row.split([100, 200, 340])] for row in rows]
    for pieces, row in zip(parts, rows, strict=True):
        for piece, gradient in zip(pieces, row.split([100, 200, 340]), strict=True):
            piece.grad = gradient.clone()
    norms = slot_norms(rows)
    clip_slots(rows, norms, [1.0, 1.0, 0.0, 1.0])
    for slot, limit in enumerate((1.0, 1.0, math.inf)):
        norm = torch.nn.utils.clip_grad_norm_(parts[slot], limit)
        assert norms[slot].item() == pytest.approx(norm.item(), rel=1e-14)
        assert torch.allclose(torch.cat([piece.grad for piece in parts[slot]]), rows[slot], rtol=1e-14, atol=0.0)
    assert not math.isfinite(norms[3])


def test_a_bank_keeps_a_before_b_and_neighbours_together(tiny_base: Path) -> None:
    targets = find_targets(load_base(tiny_base, "fp32"), PROJECTIONS)
    bank = Bank(targets, 3, 4)
    order = [f"{name.rpartition('.')[2]}.{side}" for name, side in bank.offsets]
    assert order[:3] == ["q_proj.lora_A", "k_proj.lora_A", "v_proj.lora_A"]
    assert order[4:6] == ["gate_proj.lora_A", "up_proj.lora_A"]
    assert all(name.endswith("lora_A") for name in order[:14])
    assert bank.row_size % 64 == 0
    window = Window(bank)
    window.show(slice(1, 3))
    ((a_sri, b_sor),) = window.factors(targets[0].name)
    assert (a_sri.shape, b_sor.shape) == ((2, 4, 48), (2, 64, 4))
    a_sri.data[1].fill_(3.0)
    assert a_sri.grad is not None
    a_sri.grad[1].fill_(5.0)
    assert (bank.flat_SP[2, : 4 * 48] == 3.0).all()
    assert (bank.gflat_SP[2, : 4 * 48] == 5.0).all()
    assert window.factors(targets[0].name)[0][0] is a_sri


def test_targets_are_found_by_name_and_faults_list_what_there_is(tiny_base: Path) -> None:
    model = load_base(tiny_base, "fp32")
    assert [target.name for target in find_targets(model, ["layers.1.mlp.up_proj"])] == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(ModelError, match=r"'qproj'.*\n.*down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"):
        find_targets(model, ["q_proj", "qproj"])
    with pytest.raises(ModelError, match=r"'mlp'.*is a Qwen3MLP"):
        find_targets(model, ["mlp"])
    with pytest.raises(ModelError, match="lm_head"):
        find_targets(model, ["lm_head"])


def test_recomputed_activations_change_no_bit(tiny_base: Path, tokens: TextTokens) -> None:
    kept = new_pack(tiny_base, 2)
    model = load_base(tiny_base, "fp32")
    checkpoint_activations(model)
    recomputed = Pack(model, PROJECTIONS, 2, 8, make_engine(0, "none", "fp32", "cpu"))
    for pack in (kept, recomputed):
        for slot in range(2):
            place_fresh(pack, slot, variant(slot))
        train_chunk(pack, [0, 1], tokens, 3)  # type: ignore[arg-type]
    assert all(same(kept.harvest(slot)[0], recomputed.harvest(slot)[0]) for slot in range(2))


def test_a_base_in_bf16_trains_masters_in_fp32(tiny_base: Path, tokens: TextTokens) -> None:
    exact = new_pack(tiny_base, 2)
    rounded = Pack(load_base(tiny_base, "bf16"), PROJECTIONS, 2, 8, make_engine(0, "none", "bf16", "cpu"))
    for pack in (exact, rounded):
        for slot in range(2):
            place_fresh(pack, slot, variant(slot))
    expected, found = (train_chunk(pack, [0, 1], tokens, 5) for pack in (exact, rounded))  # type: ignore[arg-type]
    assert all(tensor.dtype == torch.float32 for tensor in weights(rounded, 0).values())
    for slot in range(2):
        assert found[slot].train_loss == pytest.approx(expected[slot].train_loss, abs=0.02)
        assert distance(weights(rounded, slot), weights(exact, slot)) < 0.1


def test_engines_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ModelError, match="zero_stage 2"):
        make_engine(2, "none", "fp32", "cpu")
    with pytest.raises(ModelError, match="fp64"):
        make_engine(3, "none", "fp64", "cpu")
