"""FlashAttention: when it is chosen, and that what it is told keeps documents apart as the mask does.

The kernel itself needs a GPU. What its varlen interface promises is written down here in ten lines of torch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_texts import TextTokens, new_pack, place_fresh, variant, weights
from transformers import AutoConfig, Gemma2Config, GPT2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.flash import KERNEL, chosen_kernel, document_bounds, is_supported
from chrysalis_ray.training.step import train_chunk


def test_it_is_chosen_only_where_it_can_be() -> None:
    assert chosen_kernel("sdpa", "fp32", cuda=False, installed=False, supported=False) is None
    assert chosen_kernel("sdpa", "bf16", cuda=True, installed=True, supported=True) is None
    assert chosen_kernel("flash", "bf16", cuda=True, installed=True, supported=True) == KERNEL
    for lack, words in (
        ({"cuda": False}, "there is no GPU"),
        ({"precision": "fp32"}, "precision is fp32"),
        ({"installed": False}, "flash_attn is not installed"),
        ({"supported": False}, "does not know it"),
    ):
        asked = {"precision": "bf16", "cuda": True, "installed": True, "supported": True, **lack}
        with pytest.raises(ModelError, match=f"(?s){words}.*attention: sdpa"):
            chosen_kernel("flash", **asked)  # type: ignore[arg-type]
    assert is_supported(GPT2Config())
    assert is_supported(Gemma2Config())


def test_a_base_on_a_cpu_is_refused(tiny_base: Path) -> None:
    assert is_supported(AutoConfig.from_pretrained(tiny_base))
    with pytest.raises(ModelError, match="there is no GPU"):
        load_base(tiny_base, "bf16", attention="flash")


def test_bounds_are_those_of_the_documents_of_all_rows() -> None:
    told = document_bounds(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]), heads=80)
    assert told["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 10]
    assert told["cu_seq_lens_k"].dtype == torch.int32
    assert (told["max_length_q"], told["deterministic"]) == (5, True)
    many = document_bounds(torch.zeros(2, 3, dtype=torch.int64), heads=16)["cu_seq_lens_q"].tolist()
    assert many == [0, 1, 2, 3, 4, 5, *[6] * 5]  # ten sequences of 16 heads keep 160 multiprocessors busy


def varlen(module, query, key, value, mask, scaling, cu_seq_lens_q, max_length_q, deterministic, **_):  # type: ignore[no-untyped-def]
    """All rows end to end, [N, heads, T, size] -> [N, T, heads, size]; each sequence looks at itself, causally."""
    assert mask is None
    assert deterministic
    assert max_length_q == query.shape[2]
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
    pieces = []
    for start, stop in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * scaling
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        pieces.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v[start:stop]))
    return torch.cat(pieces).view(query.shape[0], query.shape[2], query.shape[1], -1), None


@pytest.mark.parametrize("recompute", [False, True])
def test_training_is_that_of_the_mask(
    recompute: bool, tiny_base: Path, tokens: TextTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real layers of transformers, several documents in every row, one base by bounds and one by mask."""
    masked, told = (new_pack(tiny_base, 2, dtype=torch.float64, recompute=recompute) for _ in range(2))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, KERNEL, varlen)
    trunk = told.shards.all[0].trunk
    trunk.model.config._attn_implementation = KERNEL  # type: ignore[union-attr]
    for pack in (masked, told):
        for slot in range(2):
            place_fresh(pack, slot, variant(slot))
        train_chunk(pack, [0, 1], tokens, 3)  # type: ignore[arg-type]
    for slot in range(2):
        found, expected = weights(told, slot), weights(masked, slot)
        assert max((found[name] - expected[name]).abs().max().item() for name in found) <= 1e-12
    batch = tokens.batch([("prose", 0), ("code", 1)], "select")
    assert (masked.score([0, 1], batch) - told.score([0, 1], batch)).abs().max() <= 1e-12
