"""`breadcrumbs`: what is left of a delta without its outliers and its small entries (arXiv 2312.06795)."""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.config.merges import BreadcrumbsMerge
from chrysalis_ray.merge.elementwise import Block, elected_mean


def breadcrumbs(config: BreadcrumbsMerge, block: Block) -> Tensor:
    """Entries below a member's threshold, and from its ceiling on, become 0; the weighted mean, or with `signs: elected` what
    TIES makes of them. Threshold and ceiling are those of the whole module."""
    sizes_Nbl, keep = block.entries_Nbl.abs(), 1.0 - block.rounding
    kept = sizes_Nbl >= block.thresholds_N[:, None, None] * keep
    if block.ceilings_N is not None:
        kept &= sizes_Nbl < block.ceilings_N[:, None, None] * keep
    kept_Nbl = torch.where(kept, block.entries_Nbl, 0.0)
    if config.signs == "elected":
        return elected_mean(block, kept_Nbl, config.scale, config.agreeing)
    return config.scale * torch.einsum("n,nbl->bl", block.weights_N, kept_Nbl)
