"""Candidates that are weighted sums of adapters, judged in one pass, equal each of them made and judged alone."""

from __future__ import annotations

import pytest
import torch
from training_texts import PROJECTIONS, fresh_adapter, new_pack

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.loss import Labelled, token_scores

RANKS = (3, 8, 5)
SCALES = (2.0, 0.5, 1.25)
WEIGHTS = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.0, 1.5, -0.5], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 0.0]]).double()


def members(pack):
    """Adapters of unlike ranks; the second lacks every second module."""
    found = []
    for index, (rank, scale) in enumerate(zip(RANKS, SCALES, strict=True)):
        tensors = fresh_adapter(pack, index)
        factors = {
            target.name: (
                tensors[f"weight/{target.name}.lora_A"][:rank],
                10 * tensors[f"weight/{target.name}.lora_B"][:, :rank],
            )
            for place, target in enumerate(pack.bank.targets)
            if index != 1 or place % 2
        }
        found.append((factors, scale))
    return found


def made(pack, adapters, weights):
    """The weighted sum as one adapter of the sum of all ranks, in fp64."""
    factors = {}
    for target in pack.bank.targets:
        a, b = [], []
        for (own, scale), weight in zip(adapters, weights, strict=True):
            zero = (torch.zeros(1, target.in_features), torch.zeros(target.out_features, 1))
            a_ri, b_or = own.get(target.name, zero)
            a.append(a_ri.double())
            b.append(b_or.double() * scale * weight)
        rest = sum(RANKS) - sum(map(len, a))
        a.append(torch.zeros(rest, target.in_features).double())
        b.append(torch.zeros(target.out_features, rest).double())
        factors[target.name] = (torch.cat(a), torch.cat(b, 1))
    return factors


@pytest.mark.parametrize(
    ("dtype", "threads", "tolerance"), [(torch.float64, 1, 1e-12), (torch.float32, 1, 1e-5), (torch.float32, 2, 1e-5)]
)
def test_a_blend_judges_every_candidate_as_if_it_were_made_and_judged_alone(tiny_base, tokens, dtype, threads, tolerance):
    batch = tokens.batch([("code", 0), ("prose", 1)], "select")
    pack = new_pack(tiny_base, 2, rank=sum(RANKS), dtype=dtype, threads=threads)
    adapters = members(pack)
    packed = pack.judge_blend(pack.blend(adapters, WEIGHTS), batch)
    for candidate, weights in enumerate(WEIGHTS.tolist()):
        pack.load_adapter(1, made(pack, adapters, weights), 1.0)
        alone = pack.judge([1], batch)
        assert (packed.losses[candidate] - alone.losses[0]).abs().max() <= tolerance * alone.losses.abs().max()
        assert torch.equal(packed.hits[candidate], alone.hits[0])
    different = (packed.losses[0] - packed.losses[1]).abs().max()
    assert different > 1e-3  # the candidates are not all the base


def test_a_blend_leaves_the_bank_as_it_is(tiny_base, tokens):
    batch = tokens.batch([("code", 2)], "select")
    pack = new_pack(tiny_base, 2)
    adapters = members(pack)
    pack.load_adapter(0, adapters[0][0], 2.0)
    before, bank = pack.score([0], batch), pack.bank.flat_SP.clone()
    blended = pack.judge_blend(pack.blend(adapters, WEIGHTS), batch)
    assert torch.equal(pack.bank.flat_SP, bank)
    assert torch.equal(pack.score([0], batch), before)
    assert (blended.losses[1] - before[0]).abs().max() <= 1e-5 * before.abs().max()


def test_of_tokens_equally_likely_the_one_that_is_written_is_a_hit():
    """As `argmax` has it, which greedy decoding goes by: a tie, frequent in bf16, is no hit for both."""
    head_vd = torch.eye(6)[[0, 1, 1, 2, 1, 0]].bfloat16()
    hidden_nd = torch.eye(6)[[1, 1, 1, 0, 0, 2]].bfloat16()
    labels = torch.tensor([1, 2, 4, 0, 5, 3])
    found = token_scores(hidden_nd, head_vd, None, Labelled(torch.arange(6), labels, torch.ones(6), (6,)))
    assert found.hits.tolist() == [True, False, False, True, False, True]
    assert torch.equal(found.hits, (hidden_nd @ head_vd.mT).argmax(-1) == labels)
    assert torch.equal(found.losses[0], found.losses[1])


def test_a_hit_is_a_label_that_no_token_is_likelier_than(tiny_base, tokens):
    from chrysalis_ray.training.base import load_base

    batch = tokens.batch([("code", 0)], "select")
    pack = new_pack(tiny_base, 1, targets=PROJECTIONS[:1])
    pack.clear(0)
    hits = pack.judge([0], batch).hits[0, 0]
    model = load_base(tiny_base, "fp32", "none")
    seen = 0
    for document in {number for number in batch.document[0].tolist() if number >= 0}:
        inside = batch.document[0] == document
        ids, labels = torch.from_numpy(batch.input_ids[0, inside])[None], torch.from_numpy(batch.labels[0, inside])
        with torch.no_grad():
            best = model(input_ids=ids).logits[0].argmax(-1)
        expected = (best == labels) & (labels != -100)
        assert torch.equal(hits[torch.from_numpy(inside)], expected)
        seen += int((labels != -100).sum())
    assert seen > 10
    assert not hits[torch.from_numpy(batch.labels[0] == -100)].any()


def test_what_cannot_be_blended_is_refused(tiny_base):
    pack = new_pack(tiny_base, 1, targets=("q_proj",))
    name = pack.bank.targets[0].name
    a_ri, b_or = torch.zeros(2, 48), torch.zeros(64, 2)
    with pytest.raises(ModelError, match="no target"):
        pack.blend([({"model.layers.0.mlp.up_proj": (a_ri, b_or)}, 1.0)], torch.ones(1, 1))
    with pytest.raises(ModelError, match="do not fit"):
        pack.blend([({name: (a_ri, b_or[:60])}, 1.0)], torch.ones(1, 1))
    with pytest.raises(ModelError, match="do not blend 1"):
        pack.blend([({name: (a_ri, b_or)}, 1.0)], torch.ones(1, 2))
