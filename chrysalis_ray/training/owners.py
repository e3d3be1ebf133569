"""Data-parallel workers share the slots of a pack out among them: each clips, steps and remembers for its own alone.

    gradients   of every row go to the worker that owns its slot, which adds them up
    step        made there; the moved row goes back to the others
    moments     only there, until a seed is taken: then all of them are told, one slot after the other

It is ZeRO (arXiv 1910.02054) cut along variants: a row is never split, so that an optimizer sees what it would see alone.
Whoever owns a row adds up what came from all workers in their order, first to last. An all-reduce adds up in an order that
depends on where in a message a number stands; here it depends on nothing, and two thirds of the numbers are sent.
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


def sum_to_owners(parts_NVW: Tensor, owners: Sequence[int], rank: int, world: int) -> Tensor:
    """The sums [M, W] of the rows that this worker owns over all parts, of all workers; parts are added in their order.

    `parts_NVW` are the V parts that this worker has of N rows, contiguous; `owners` are those of the rows, ascending. All
    workers call it together, with equally many parts of the same rows.
    """
    counts = [owners.count(worker) for worker in range(world)]
    here, width = parts_NVW.shape[1:]
    came = parts_NVW.new_empty(world * counts[rank], here, width)
    dist.all_to_all_single(came, parts_NVW, [counts[rank]] * world, counts)
    first, *others = came.view(world, counts[rank], here, width).transpose(1, 2).flatten(0, 1)
    total_MW = first.clone()
    for part_MW in others:
        total_MW += part_MW
    return total_MW


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
