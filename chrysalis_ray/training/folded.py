"""A frozen matrix with a candidate's change added to it, for passes that nothing is learned from.

    y = (W + B A) x        instead of        y = W x + B (A x)

To add the change costs out x in x rank products, whatever the number of tokens; to carry it beside W costs (in + out) x rank
for each token, and two more passes over y. In long passes the sum is the cheaper one, and one product is left of three. It is
made where it is needed and thrown away: no second copy of a base is ever held. In fp32 and fp64 alone: a lower precision would
round small changes away.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEWEST = 256  # tokens of a candidate below which a product of its own is slower than one for all


def folds(weight_oi: Tensor, x: Tensor, tokens: int) -> bool:
    """Whether to add the change to the frozen weight, for so many tokens of one candidate."""
    if torch.is_grad_enabled() or weight_oi.dtype != x.dtype or x.dtype not in (torch.float32, torch.float64):
        return False
    out, width = weight_oi.shape
    return tokens >= FEWEST and tokens * (width + out) > out * width and x.device.type == "cpu"


def folded(weight_oi: Tensor, a_ri: Tensor, b_or: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """The weight with a change added to it."""
    return torch.addmm(weight_oi, b_or * scale, a_ri)


def fold_into(y_ko: Tensor, base: nn.Linear, x_ki: Tensor, a_ri: Tensor, b_or: Tensor, scale: Tensor | float = 1.0) -> None:
    """Write the outputs of one candidate's tokens into `y_ko`."""
    weight_oi = folded(base.weight, a_ri, b_or, scale)
    if base.bias is None:
        torch.mm(x_ki, weight_oi.mT, out=y_ko)
    else:
        torch.addmm(base.bias, x_ki, weight_oi.mT, out=y_ko)
