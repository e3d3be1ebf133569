"""What the inputs of a module look like, as far as a merge needs it: the second moment E[x x^T] of every member's own inputs.

It is kept as a root F with F F^T = E[x x^T], [in, columns]: never negative, and as narrow as what it was seen through. Where it
was measured through an orthonormal V only, F = V (V^T E[x x^T] V)^(1/2), it says the truth within the span of V and nothing
beyond it, which is all that the merge of adapters whose A lie in that span asks for. For a merge that looks at whole inputs
E[x x^T] itself is kept, [in, in].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.merge.core_space import CoreSpace

Roots = Mapping[str, Tensor]  # module -> F [in, columns]
Inputs = Sequence[Roots]  # one per member


def moments_in_core(space: CoreSpace, module: str, inputs: Inputs) -> Tensor:
    """Every member's E[x x^T] in the coordinates of the core, [N, Q, Q]. Raises MergeError where none was measured."""
    size = space.increments_NPQ.shape[-1]
    right_IQ = space.right.apply(torch.eye(size, dtype=torch.float64))
    moments = []
    for number, roots in enumerate(inputs):
        root_Ik = roots.get(module)
        if root_Ik is None:
            raise MergeError(
                f"nobody measured what adapter {number} feeds module {module}",
                "measure the inputs of the very adapters to merge",
            )
        if root_Ik.ndim != 2 or root_Ik.shape[0] != right_IQ.shape[0] or not bool(torch.isfinite(root_Ik).all()):
            raise MergeError(
                f"the inputs of module {module} were measured as {tuple(root_Ik.shape)}, the module takes {right_IQ.shape[0]}",
                "measure the inputs with the base of these adapters",
            )
        narrow_Qk = right_IQ.T @ root_Ik.to(torch.float64)
        moments.append(narrow_Qk @ narrow_Qk.T)
    return torch.stack(moments)


def whole_moment(module: str, size: int, inputs: Inputs, number: int) -> Tensor:
    """E[x x^T] of one member as it was kept, [in, in] in fp64. Raises MergeError where none was, or it is none."""
    moment_II = inputs[number].get(module)
    if moment_II is None:
        raise MergeError(
            f"nobody measured what adapter {number} feeds module {module}", "measure the inputs of the very adapters to merge"
        )
    if tuple(moment_II.shape) != (size, size) or not bool(torch.isfinite(moment_II).all()):
        raise MergeError(
            f"the inputs of module {module} were measured as {tuple(moment_II.shape)}, the module takes {size}",
            "measure the inputs with the base of these adapters",
        )
    if not torch.equal(moment_II, moment_II.T) or bool((moment_II.diagonal() < 0.0).any()):
        raise MergeError(f"what was measured of module {module} is no second moment", "measure the inputs again")
    return moment_II.to(torch.float64)


def root_of_moment(basis_IQ: Tensor, moment_QQ: Tensor) -> Tensor:
    """V H^(1/2) of an orthonormal basis and the moment measured through it; eigenvalues below zero are rounding."""
    values_Q, vectors_QQ = torch.linalg.eigh((moment_QQ + moment_QQ.T) / 2)
    return basis_IQ @ (vectors_QQ * values_Q.clamp(min=0.0).sqrt())
