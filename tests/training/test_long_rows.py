"""Rows of some hundred tokens, whose attention goes block by block, become what PEFT makes of them, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from test_training_against_peft import VARIANTS, largest_difference, train_alone
from training_texts import new_pack, place_fresh, text_tokens, weights

from chrysalis_ray.training.blocks import BLOCK
from chrysalis_ray.training.quick import AT_ONCE
from chrysalis_ray.training.step import train_chunk

LONG, STEPS = 5 * BLOCK + 3, 12


def test_packed_long_rows_equal_separate_peft_in_fp32(tiny_base: Path) -> None:
    """The oracle of short rows: within 1e-5 of PEFT, or no further from fp64 than PEFT itself is."""
    assert LONG > AT_ONCE
    tokens = text_tokens(tiny_base, LONG)
    members = [replace(member, sequence_length=LONG, steps=STEPS) for member in VARIANTS[:2]]
    pack = new_pack(tiny_base, len(members))
    for slot, member in enumerate(members):
        place_fresh(pack, slot, member)
    train_chunk(pack, range(len(members)), tokens, STEPS)
    for slot, member in enumerate(members):
        alone, exact = (train_alone(tiny_base, pack, member, tokens, dtype) for dtype in (torch.float32, torch.float64))
        packed = weights(pack, slot)
        as_exact = largest_difference(packed, exact) <= largest_difference(alone, exact)
        assert largest_difference(packed, alone) <= 1e-5 or as_exact
