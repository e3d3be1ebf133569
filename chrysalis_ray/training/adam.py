"""Adam and AdamW over whole rows, as `torch.optim` computes them: by its fused kernel, without what torch puts around it.

The stock classes load torch's compiler, to tell it what to leave alone, when the first of them is made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch


class FusedAdam:
    """As much of a `torch.optim.Optimizer` as a `SlotOptimizer` uses, over parameters that need no more than the kernel."""

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, decoupled: bool) -> None:
        self.param_groups = [{**group, "lr": lr} for group in groups]
        # As in the stock classes, a parameter that another worker steps has an empty state.
        self.state: defaultdict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict)
        self._kernel: Callable[..., None] = torch._fused_adamw_ if decoupled else torch._fused_adam_

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter] or self._begin(parameter)
                state["step"].add_(1)
                self._kernel(
                    [parameter], [parameter.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
                    lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                    amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
                )  # fmt: skip

    def _begin(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the stock classes remember before the first step."""
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


FUSED: dict[str, Callable[..., FusedAdam]] = {
    "adamw": partial(FusedAdam, decoupled=True),
    "adam": partial(FusedAdam, decoupled=False),
}
