"""Data-parallel workers share the optimizers of a pack out among them: each keeps the moments of its own slots alone.

    gradients   summed over all workers where they lie, as before
    step        made by the worker that owns the slot; the moved row goes from it to the others
    moments     only on that worker, until a seed is taken: then all of them are told, one slot after the other

It is stage 1 of ZeRO (arXiv 1910.02054), cut along variants: a row is never split, so that an optimizer sees what it would see
alone and every bit is what it is without sharing out. Gradients stay whole on every worker: each adds to all rows of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from chrysalis_ray.core.records import MOMENTS
from chrysalis_ray.training.optimizer import RECIPES, SlotOptimizer


def owner_of(slot: int, world: int) -> int | None:
    """The worker that keeps the optimizer of a slot; None where there is but one."""
    return slot % world if world > 1 else None


def share(tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
    """Give every worker what the owner of each contiguous tensor has in it, in place; side by side."""
    sent = [dist.broadcast(tensor, src=owner, async_op=True) for tensor, owner in zip(tensors, owners, strict=True)]
    for work in sent:
        if work is not None:
            work.wait()


def optimizer_state(optimizer: SlotOptimizer, like_P: Tensor, owner: int | None) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Moments, row-shaped as `like_P`, and scalars of an optimizer, on every worker alike. All workers call it together."""
    moments, scalars = optimizer.moments(), optimizer.scalars()
    if owner is None or not optimizer.updates:
        return moments, scalars
    names, counted = MOMENTS[optimizer.kind], RECIPES[optimizer.kind].scalars
    told = [float(name in moments) for name in names] + [scalars.get(name, 0.0) for name in counted]
    told_K = torch.tensor(told, dtype=torch.float64, device=like_P.device)
    share([told_K], [owner])
    kept = [name for name, is_there in zip(names, told_K.tolist(), strict=False) if is_there]
    rows = {name: moments[name] if name in moments else torch.empty_like(like_P) for name in kept}
    share(list(rows.values()), [owner] * len(rows))
    return rows, dict(zip(counted, told_K[len(names) :].tolist(), strict=True))
