"""What counts as a linear module that can carry an adapter: torch's, GPT-2's Conv1D, the same with its weight [in, out], and
frozen ones that keep their weight in a form of their own.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D


class CompressedLinear(nn.Module):
    """A frozen linear module whose weight is not kept as a matrix of numbers; it is called, and never looked into."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear module, None for any other."""
    if isinstance(module, nn.Linear | CompressedLinear):
        return module.out_features, module.in_features
    return (module.nf, module.nx) if isinstance(module, Conv1D) else None


def stored_transposed(module: nn.Module) -> bool:
    """Whether the weight is kept [in, out]; peft calls that fan_in_fan_out."""
    return isinstance(module, Conv1D)
