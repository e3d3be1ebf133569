"""`della`: DARE that drops the small entries of a row more often than the large ones (arXiv 2406.11617)."""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.config.merges import DellaMerge
from chrysalis_ray.merge.elementwise import Block, elected_mean, uniform_draws


def della(config: DellaMerge, block: Block) -> Tensor:
    """The chance of an entry to be kept grows with its rank by magnitude in its row, evenly from density - spread to
    density + spread; what is kept is divided by its chance, and fused by elected signs as in TIES."""
    ranks_Nbl = block.entries_Nbl.abs().argsort(dim=-1, stable=True).argsort(dim=-1).to(block.entries_Nbl.dtype)
    steps = max(block.entries_Nbl.shape[-1] - 1, 1)
    chance_Nbl = config.density - config.spread + 2.0 * config.spread * ranks_Nbl / steps
    kept_Nbl = torch.where(uniform_draws(block) < chance_Nbl, block.entries_Nbl / chance_Nbl, 0.0)
    return elected_mean(block, kept_Nbl, config.scale)
