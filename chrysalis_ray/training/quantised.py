"""A frozen base that keeps the weights of its linear modules in 4 or 8 bits.

    nf4    blocks of 64 weights, each a 4-bit normal float and one fp32 scale a block (arXiv 2305.14314); by bitsandbytes
    int8   rows of weights, each a whole number from -127 to 127 and one fp32 scale a row (the weights of arXiv 2208.07339)

Only what is stored is rounded. A weight is made whole where it is used, forward and backward, in the precision of the
activations, and let go again. These stay as they are: to quantise them too, as LLM.int8 does with outliers that it looks for in
the whole batch, would let a variant feel its neighbours. The output head and embeddings keep their precision.

It is quantised in main memory when it is loaded, and moves to its device afterwards. The only door to bitsandbytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.seed.linear import CompressedLinear
from chrysalis_ray.training.planning.hardware import check_quantisation

BLOCK = 64  # weights that share a scale in nf4


class QuantisedLinear(CompressedLinear, ABC):
    """A linear module without its weight, but with what makes one: frozen parameters, that copies of a trunk may share."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.bias = linear.bias

    @abstractmethod
    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as it is after quantisation."""

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias


class Int8Linear(QuantisedLinear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight_oi = linear.weight.detach().to(torch.float32)
        scale_o1 = weight_oi.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127.0
        self.stored = _frozen((weight_oi / scale_o1).round().to(torch.int8))
        self.scale = _frozen(scale_o1)

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        return (self.stored * self.scale).to(dtype)


class Nf4Linear(QuantisedLinear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight_oi = linear.weight.detach().to(torch.float32).contiguous()
        stored, state = _functional().quantize_4bit(weight_oi, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
        self.stored, self.scale = _frozen(stored), _frozen(state.absmax)

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        direct = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
        # As one long row: on CPUs bitsandbytes 0.50 mistakes the scales of rows that are no whole number of blocks.
        shape = torch.Size((1, self.out_features * self.in_features))
        state = _functional().QuantState(self.scale, shape, blocksize=BLOCK, quant_type="nf4", dtype=direct)
        return _functional().dequantize_4bit(self.stored, state).to(dtype).view(self.out_features, self.in_features)


class _Product(torch.autograd.Function):
    """x W^T, keeping neither x nor W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantisedLinear) -> Tensor:
        ctx.linear = linear
        return nn.functional.linear(x, linear.weight_as(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        (grad_y,) = grad_outputs
        return grad_y @ ctx.linear.weight_as(grad_y.dtype), None


KINDS: dict[str, type[QuantisedLinear]] = {"nf4": Nf4Linear, "int8": Int8Linear}


def quantise(model: PreTrainedModel, kind: str) -> None:
    """Put a quantised module of `kind` ("nf4" or "int8") in the place of every linear one but the output head.

    Raises ModelError where there is none, or where bitsandbytes is needed and absent.
    """
    check_quantisation(kind)
    head = model.get_output_embeddings()
    found = [
        (parent, leaf, part)
        for parent in model.modules()
        for leaf, part in parent.named_children()
        if type(part) is nn.Linear and part is not head
    ]
    if not found:
        raise ModelError(
            f"{model.config.model_type} keeps its weights in no linear modules of torch: there is nothing to quantise",
            "set body.quantization: none",
        )
    for parent, leaf, part in found:
        setattr(parent, leaf, KINDS[kind](part))


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _functional() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional
