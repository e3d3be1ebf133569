"""Quick parts of a base against what they stand for: the formula's gradient in fp64, and the modules of transformers."""

from pathlib import Path

import pytest
import torch
from families import SUPPORTED
from torch import nn
from training_texts import TextTokens, new_pack, place_fresh, variant
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from chrysalis_ray.training.blocks import BLOCK, BlockAttention, blocks, see_by_blocks
from chrysalis_ray.training.quick import AT_ONCE, SHORT, SHORT_ROW, QuickNorm, RmsNorm, ShortAttention, quicken, short_rows
from chrysalis_ray.training.step import train_chunk
from chrysalis_ray.training.trunk import document_mask


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def test_the_gradient_of_the_norm_is_that_of_its_formula() -> None:
    weight = drawn(6).detach()
    assert torch.autograd.gradcheck(lambda x: RmsNorm.apply(x, weight, 1e-5), (drawn(2, 3, 6),))
    x = drawn(2, 3, 6)
    usual = weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert (RmsNorm.apply(x, weight, 1e-5) - usual).abs().max() <= 1e-14


def mask_of(rows: int, length: int) -> torch.Tensor:
    """Documents of 3 tokens, so that they share a row."""
    return document_mask((torch.arange(length) % 3).expand(rows, length))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_short_attention_and_its_gradient_are_those_of_sdpa(heads: int, groups: int) -> None:
    rows, length, size = 2, 7, 4
    parts = drawn(rows, heads, length, size), drawn(rows, groups, length, size), drawn(rows, groups, length, size)
    mask = mask_of(rows, length)
    assert torch.autograd.gradcheck(lambda q, k, v: ShortAttention.apply(q, k, v, mask, 0.3), parts)
    mine = ShortAttention.apply(*parts, mask, 0.3)
    module = nn.Module()
    module.num_key_value_groups = heads // groups  # type: ignore[assignment]
    usual, _ = sdpa_attention_forward(module, *parts, mask, scaling=0.3)
    assert (mine - usual).abs().max() <= 1e-14


@pytest.mark.parametrize(("heads", "groups", "length"), [(4, 2, BLOCK + 5), (2, 2, 2 * BLOCK), (3, 1, BLOCK - 1)])
def test_attention_by_blocks_and_its_gradient_are_those_of_attention_at_once(heads: int, groups: int, length: int) -> None:
    rows, size = 2, 3
    parts = drawn(rows, heads, length, size), drawn(rows, groups, length, size), drawn(rows, groups, length, 4)
    mask = torch.zeros(rows, 1, length, length, dtype=torch.float64).masked_fill(~mask_of(rows, length), -torch.inf)
    upstream = drawn(rows, length, heads, 4).detach()
    told = []
    for attention in (BlockAttention, ShortAttention):
        seen = attention.apply(*parts, mask, 0.3)
        told.append((seen, *torch.autograd.grad(seen, parts, upstream)))
    for mine, usual in zip(*told, strict=True):
        assert (mine - usual).abs().max() <= 1e-14
    assert [end for _, end in blocks(length)] == [*range(BLOCK, length, BLOCK), length]


@pytest.mark.parametrize(("heads", "groups", "length"), [(4, 2, BLOCK + 5), (2, 2, 2 * BLOCK), (3, 1, BLOCK - 1)])
def test_attention_whose_scores_become_shares_in_place_is_attention_at_once(heads: int, groups: int, length: int) -> None:
    rows, size = 2, 3
    parts = drawn(rows, heads, length, size), drawn(rows, groups, length, size), drawn(rows, groups, length, 4)
    mask = torch.zeros(rows, 1, length, length, dtype=torch.float64).masked_fill(~mask_of(rows, length), -torch.inf)
    usual = ShortAttention.apply(*parts, mask, 0.3)
    query, key, value = (part.detach() for part in parts)
    given = [each.clone() for each in (query.unflatten(1, (groups, -1)).transpose(2, 3).contiguous() * 0.3, key, value)]
    seen = see_by_blocks(*given, mask)
    assert (seen.flatten(2, 3) - usual).abs().max() <= 1e-14
    others = [each.clone() for each in given]
    for other in others:
        other[1] = torch.nan
    assert torch.equal(see_by_blocks(*others, mask)[0], seen[0])


def test_a_neighbour_changes_no_bit_of_a_long_row() -> None:
    """Whatever stands in the other rows of the batch, and in the other document of the row."""
    length = 3 * BLOCK + 7
    parts = [drawn(2, 4, length, 8, dtype=torch.float32) for _ in range(3)]
    positions = torch.arange(length).expand(2, -1).clone()
    positions[0, 50:] -= 50
    others = [part.detach().clone() for part in parts]
    for other in others:
        other[1] = torch.nan
        other[0, :, :50] = 7.0
    mask = document_mask(positions)
    module, seen = nn.Module(), []
    for given in (parts, [other.requires_grad_() for other in others]):
        out, _ = short_rows(module, *given, mask, scaling=0.5)
        seen.append((out, *torch.autograd.grad(out[0, 50:].sum(), given)))
    assert length > AT_ONCE
    assert torch.equal(seen[0][0][0, 50:], seen[1][0][0, 50:])
    for mine, other in zip(seen[0][1:], seen[1][1:], strict=True):
        assert torch.equal(mine[0, :, 50:], other[0, :, 50:])


@pytest.mark.parametrize("length", [AT_ONCE + 1, SHORT_ROW])
def test_long_rows_go_block_by_block(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr("chrysalis_ray.training.quick.BlockAttention.apply", lambda *given: taken.append(given[3].dtype))
    short_rows(nn.Module(), *(drawn(1, 2, length, 4, dtype=torch.float32) for _ in range(3)), mask_of(1, length))
    assert taken == [torch.float32]


@pytest.mark.parametrize("odd", ["no mask", "long rows", "fp64", "a sink"])
def test_what_it_is_not_made_for_goes_the_usual_way(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("chrysalis_ray.training.quick.sdpa_attention_forward", lambda *a, **k: called.append(k) or (None, None))
    length = 300 if odd == "long rows" else 6
    dtype = torch.float64 if odd == "fp64" else torch.float32
    query, key, value = (drawn(1, 2, length, 4, dtype=dtype) for _ in range(3))
    settings = {"s_aux": torch.zeros(2)} if odd == "a sink" else {}
    short_rows(nn.Module(), query, key, value, None if odd == "no mask" else mask_of(1, length), scaling=0.5, **settings)
    assert len(called) == 1


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma", "gemma2", "gpt2"])
def test_a_quickened_base_gives_the_same_hidden_states(family: str) -> None:
    """Gemma's norms scale by 1 + w, which is another formula; GPT-2 has other norms, Gemma 2 another attention: all stay."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SUPPORTED[family].config()).eval().requires_grad_(False)
    ids = torch.arange(24).reshape(2, 12) % 50
    positions = torch.arange(12).expand(2, 12)
    given = {"input_ids": ids, "position_ids": positions, "attention_mask": document_mask(positions), "use_cache": False}
    eager = model.config._attn_implementation == "eager"
    if eager:
        given["attention_mask"] = torch.zeros(2, 1, 12, 12).masked_fill(
            ~given["attention_mask"], torch.finfo(torch.float32).min
        )
    usual = model.base_model(**given).last_hidden_state
    quicken(model)
    quick = model.base_model(**given).last_hidden_state
    assert (quick - usual).abs().max() <= 1e-5 * usual.abs().max()
    assert (model.config._attn_implementation == SHORT) == (not eager)
    assert any(isinstance(module, QuickNorm) for module in model.modules()) == (family in ("qwen3", "llama"))


def test_training_on_it_equals_training_in_fp64(tiny_base: Path, tokens: TextTokens) -> None:
    """fp64 is computed the usual way."""
    seeds = {}
    for dtype in (torch.float32, torch.float64):
        pack = new_pack(tiny_base, 2, dtype=dtype)
        for slot in range(2):
            place_fresh(pack, slot, variant(slot, epsilon=1e-4))
        train_chunk(pack, range(2), tokens, 10)
        seeds[dtype] = {name: tensor.double() for name, tensor in pack.harvest(0)[0].items() if name.startswith("weight")}
        assert any(isinstance(m, QuickNorm) for m in pack.shards.all[0].trunk.modules()) == (dtype == torch.float32)
    left, right = seeds.values()
    assert max((left[name] - right[name]).abs().max() for name in left) <= 1e-5
