"""`ties`: trim, elect a sign, merge what has it (arXiv 2306.01708)."""

from __future__ import annotations

from torch import Tensor

from chrysalis_ray.config.merges import TiesMerge
from chrysalis_ray.merge.elementwise import Block, elected_mean, trimmed


def ties(config: TiesMerge, block: Block) -> Tensor:
    """Entries below a member's threshold become 0; the sign of sum_i w_i x_i is elected; the weighted mean of those that agree.

    Members vote with their weights, and the mean divides by the weights of those that agree, so that a member without weight
    neither votes nor counts. The threshold is that of the whole module.
    """
    return elected_mean(block, trimmed(block), config.scale, config.agreeing)
