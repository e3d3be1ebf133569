"""What counts as a linear module that can carry an adapter: torch's, and GPT-2's Conv1D, the same with its weight [in, out]."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear module, None for any other."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return (module.nf, module.nx) if isinstance(module, Conv1D) else None


def stored_transposed(module: nn.Module) -> bool:
    """Whether the weight is kept [in, out]; peft calls that fan_in_fan_out."""
    return isinstance(module, Conv1D)
