"""`tall`: consensus masks (TALL masks and Consensus Task Arithmetic, arXiv 2405.07813)."""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.config.merges import TallMerge
from chrysalis_ray.merge.elementwise import Block


def consensus_mask(config: TallMerge, block: Block) -> Tensor:
    """The weighted mean m where at least `votes` members need the entry, else 0: |x_i| >= threshold |N m - x_i|.

    N m is the paper's multi-task vector, the sum. Entries that no member needs are its catastrophic ones, those of a single
    member its selfish ones. With fewer members than votes all of them must need it.
    """
    members = len(block.weights_N)
    mean_bl = torch.einsum("n,nbl->bl", block.weights_N, block.entries_Nbl)
    rest_Nbl = (members * mean_bl - block.entries_Nbl).abs()
    needs_Nbl = block.entries_Nbl.abs() >= config.threshold * rest_Nbl * (1.0 - block.rounding)
    return config.scale * torch.where(needs_Nbl.sum(0) >= min(config.votes, members), mean_bl, 0.0)
