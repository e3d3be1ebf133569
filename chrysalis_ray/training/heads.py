"""The frozen output head: a matrix, and what some families do to its logits.

    logits = cap tanh(scale (W h + b) / cap)        Gemma 2 and 3 cap, Cohere and Granite scale, most do neither

That a model's own logits are these, and nothing more, is checked by numbers when it is loaded (`probe.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from chrysalis_ray.core.errors import ModelError


@dataclass(frozen=True)
class HeadArithmetic:
    """What happens to the products of a head before the softmax."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, logits_cv: Tensor) -> Tensor:
        """Logits from the raw products of the head; may write into them."""
        if self.scale != 1.0:
            logits_cv = logits_cv.mul_(self.scale)
        return logits_cv if self.cap is None else logits_cv.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits_cv: Tensor) -> Tensor | float:
        """Derivative of each logit with respect to its raw product: scale (1 - (logit / cap)^2)."""
        return self.scale if self.cap is None else (logits_cv / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


PLAIN = HeadArithmetic()


class Head:
    """The output matrix of a causal language model, which stays where the engine keeps it, and its arithmetic."""

    def __init__(self, linear: nn.Linear, arithmetic: HeadArithmetic) -> None:
        self.linear = linear
        self.arithmetic = arithmetic

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What an engine has to gather before the head is used."""
        return list(self.linear.parameters())

    def logits(self, hidden_cd: Tensor) -> Tensor:
        return self.arithmetic.apply(raw_logits(hidden_cd, self.weight, self.bias))


def find_head(model: PreTrainedModel) -> Head:
    """The head of a causal language model. Raises ModelError where it is not one linear module."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no linear output head", "choose a causal language model")
    return Head(linear, arithmetic_of(model.config))


def arithmetic_of(config: PretrainedConfig) -> HeadArithmetic:
    """As the config says: `logit_scale` multiplies, `logits_scaling` divides, `final_logit_softcapping` caps."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return HeadArithmetic(float(scale), getattr(config, "final_logit_softcapping", None))


def raw_logits(hidden_cd: Tensor, head_vd: Tensor, bias_v: Tensor | None) -> Tensor:
    """Products of the head in fp32 (fp64 stays fp64)."""
    logits_cv = hidden_cd @ head_vd.mT
    if bias_v is not None:
        logits_cv = logits_cv + bias_v
    return logits_cv.to(torch.float64 if hidden_cd.dtype == torch.float64 else torch.float32)
