"""Many adapters that are weighted sums of a few, judged at once and never made.

    y_c = W x_c + sum_m w_cm s_m B_m A_m x_c          c: candidates     m: members

The A of all members stand one below the other, as do their B side by side: one product projects the tokens of all candidates
down, a row of weights tells the candidates apart, one product brings them up again. It is the exact sum, of whatever rank,
where a merge that is written has to be cut to one. The bank is not involved: members may be of any rank.

    A_KI   ranks of all members x in        B_OK   out x ranks, times its member's scale        w_CK   candidates x ranks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.folded import fold_into, folds

Factors = Mapping[str, tuple[Tensor, Tensor]]  # module -> A [rank, in], B [out, rank]


class Stack(NamedTuple):
    """The members' factors of one module, and every candidate's weight for each of their directions."""

    a_KI: Tensor
    b_OK: Tensor
    weights_CK: Tensor


class Blend:
    """`weights_CM` of the `members` (factors, scale) for every candidate. `shapes` gives (out, in) of every module that can
    carry an adapter. A module that a member lacks is a change of zero there.

    Raises ModelError for a module that is not in `shapes`, and for factors of other shapes.
    """

    def __init__(
        self,
        members: Sequence[tuple[Factors, float]],
        weights_CM: Tensor,
        shapes: Mapping[str, tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if weights_CM.ndim != 2 or weights_CM.shape[1] != len(members) or not len(weights_CM):
            raise ModelError(f"weights of shape {list(weights_CM.shape)} do not blend {len(members)} adapters")
        self.candidates = len(weights_CM)
        self.stacks: dict[str, Stack] = {}
        for module in sorted({module for factors, _ in members for module in factors}):
            if module not in shapes:
                raise ModelError(
                    f"an adapter changes {module!r}, which the base has no target for",
                    "use an adapter made for this base and these lora.targets",
                )
            self.stacks[module] = _stacked(module, members, weights_CM, shapes[module], dtype, device)

    def __len__(self) -> int:
        return self.candidates

    def part(self, candidates: slice) -> Blend:
        """Some of the candidates; the members' factors are shared."""
        part = object.__new__(Blend)
        part.stacks = {name: stack._replace(weights_CK=stack.weights_CK[candidates]) for name, stack in self.stacks.items()}
        part.candidates = len(range(self.candidates)[candidates])
        return part

    def output(self, name: str, x: Tensor, base: nn.Module) -> Tensor:
        """What the frozen module `base` makes of `x`, with every candidate's change. Tokens arrive candidate-major."""
        if name not in self.stacks:
            return base(x)
        a_KI, b_OK, weights_CK = self.stacks[name]
        if type(base) is nn.Linear and folds(base.weight, x, x.numel() // x.shape[-1] // self.candidates):
            x_CNI = x.reshape(self.candidates, -1, x.shape[-1])
            y_CNO = x.new_empty(*x_CNI.shape[:2], base.out_features)
            for y_NO, x_NI, weights_K in zip(y_CNO, x_CNI, weights_CK, strict=True):
                fold_into(y_NO, base, x_NI, a_KI, b_OK, weights_K)
            return y_CNO.view(*x.shape[:-1], -1)
        y = base(x)
        h_CNK = (x.reshape(-1, x.shape[-1]) @ a_KI.to(x.dtype).mT).view(self.candidates, -1, len(a_KI))
        h_NK = (h_CNK * weights_CK[:, None]).to(x.dtype).flatten(0, 1)  # a weight is never rounded to a lower precision first
        return torch.addmm(y.reshape(-1, y.shape[-1]), h_NK, b_OK.to(x.dtype).mT).view(y.shape)

    def change(self, name: str, candidate: int) -> tuple[Tensor, Tensor] | None:
        """A [ranks, in] and B [out, ranks], times its weights, of one candidate; None where nothing is changed."""
        if name not in self.stacks:
            return None
        a_KI, b_OK, weights_CK = self.stacks[name]
        return a_KI, b_OK * weights_CK[candidate]


def _stacked(
    module: str,
    members: Sequence[tuple[Factors, float]],
    weights_CM: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Stack:
    rows, columns, weights = [], [], []
    for index, (factors, scale) in enumerate(members):
        if module not in factors:
            continue
        a_ri, b_or = (factor.to(dtype) for factor in factors[module])
        if (b_or.shape[0], a_ri.shape[1]) != shape or a_ri.shape[0] != b_or.shape[1]:
            raise ModelError(
                f"{module}: A {list(a_ri.shape)} and B {list(b_or.shape)} do not fit the base's {list(shape)}",
                "use an adapter made for this base",
            )
        rows.append(a_ri)
        columns.append(b_or * scale)
        weights.append(weights_CM[:, index : index + 1].to(dtype).expand(-1, len(a_ri)))
    return Stack(*(torch.cat(parts, axis).to(device) for parts, axis in ((rows, 0), (columns, 1), (weights, 1))))
