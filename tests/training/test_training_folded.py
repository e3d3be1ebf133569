"""Long passes that nothing is learned from: changes folded into the weights, few lanes at a time. The scores are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_texts import fresh_adapter, new_pack

from chrysalis_ray.training import folded, pack
from chrysalis_ray.training.folded import fold_into, folds
from chrysalis_ray.training.quick import ShortAttention, short_rows
from chrysalis_ray.training.trunk import document_mask

RANKS = (2, 8, 1, 8, 5)


def loaded(base, dtype, threads=1):
    """A pack of adapters of unlike ranks and scales."""
    own = new_pack(base, len(RANKS), rank=8, dtype=dtype, threads=threads)
    members = []
    for slot, rank in enumerate(RANKS):
        tensors = fresh_adapter(own, slot)
        factors = {
            target.name: (
                tensors[f"weight/{target.name}.lora_A"][:rank],
                10 * tensors[f"weight/{target.name}.lora_B"][:, :rank],
            )
            for target in own.bank.targets
        }
        own.load_adapter(slot, factors, 0.5 + slot)
        members.append((factors, 0.5 + slot))
    return own, members


@pytest.mark.parametrize(
    ("dtype", "threads", "tolerance"), [(torch.float64, 1, 1e-12), (torch.float32, 1, 1e-5), (torch.float32, 2, 1e-5)]
)
def test_folded_and_in_turns_the_scores_are_the_same(tiny_base, tokens, dtype, threads, tolerance, monkeypatch):
    batch = tokens.batch([("code", 0), ("prose", 1), ("code", 1)], "select")
    own, members = loaded(tiny_base, dtype, threads)
    weights = torch.rand(7, len(members), generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    order = [3, 0, 4, 1, 2]
    found, made = {}, []
    real = torch.addmm
    monkeypatch.setattr(folded.torch, "addmm", lambda *given, **named: made.append(1) or real(*given, **named))
    for fewest, cached in ((10**9, 10**9), (1, 10**9), (10**9, 1), (1, 1)):
        monkeypatch.setattr(folded, "FEWEST", fewest)
        monkeypatch.setattr(pack, "CACHED", cached)
        before = len(made)
        found[fewest, cached] = own.judge(order, batch), own.judge_blend(own.blend(members, weights), batch)
        assert (len(made) > before + 50) or fewest > 1  # a matrix of its own for every module and candidate
    plain = found[10**9, 10**9]
    for both in found.values():
        for scores, usual in zip(both, plain, strict=True):
            assert (scores.losses - usual.losses).abs().max() <= tolerance * usual.losses.abs().max()
            assert torch.equal(scores.hits, usual.hits)
    assert (plain[0].losses[0] - plain[0].losses[1]).abs().max() > 1e-3


def test_where_a_change_is_folded():
    weight = torch.zeros(64, 48)
    with torch.no_grad():
        assert folds(weight, torch.zeros(1, 48), 400)
        assert not folds(weight, torch.zeros(1, 48), 100)  # one product for all is the faster one
        assert not folds(torch.zeros(2048, 2048), torch.zeros(1, 2048), 400)  # to add it would cost more than to carry it
        assert not folds(weight.bfloat16(), torch.zeros(1, 48).bfloat16(), 400)  # it would be rounded away
    assert not folds(weight, torch.zeros(1, 48), 400)  # something may be learned


def test_a_bias_is_added_once():
    base, generator = nn.Linear(6, 4), torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*shape, generator=generator) for shape in ((5, 6), (2, 6), (4, 2)))
    y = torch.empty(5, 4)
    with torch.no_grad():
        fold_into(y, base, x, a, b, 0.5)
        assert torch.allclose(y, base(x) + 0.5 * x @ a.T @ b.T, atol=1e-6)


def test_attention_that_keeps_nothing_is_the_attention_that_does():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 40, 8, generator=generator) for heads in (4, 2, 2))
    mask = document_mask((torch.arange(40) % 7).expand(3, 40))
    with torch.no_grad():
        seen, _ = short_rows(nn.Module(), query, key, value, mask, scaling=0.3)
    assert (seen - ShortAttention.apply(query, key, value, mask, 0.3)).abs().max() <= 1e-5
