"""`dare`: drop entries at random and make the rest larger (arXiv 2311.03099)."""

from __future__ import annotations

import torch
from torch import Tensor

from chrysalis_ray.config.merges import DareMerge
from chrysalis_ray.merge.elementwise import Block, elected_mean, uniform_draws


def dare(config: DareMerge, block: Block) -> Tensor:
    """x_i m_i / density with m_i of Bernoulli(density): the same in expectation, with 1/density - 1 times its square as noise.

    `signs: all` averages them, `elected` fuses them as TIES does. A member can have a density of its own. The numbers drawn
    depend on `rng_seed`, the module and a member's place by length, not on the order of members.
    """
    density: float | Tensor = config.density
    if config.densities:
        own = [one.density for one in config.for_each(len(block.entries_Nbl))]
        density = block.entries_Nbl.new_tensor(own)[:, None, None]
    kept_Nbl = torch.where(uniform_draws(block) < density, block.entries_Nbl / density, 0.0)
    if config.signs == "elected":
        return elected_mean(block, kept_Nbl, config.scale, config.agreeing)
    return config.scale * torch.einsum("n,nbl->bl", block.weights_N, kept_Nbl)
