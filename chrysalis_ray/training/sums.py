"""Gradients between a backward pass and the step: summed where they lie, or kept apart until all parts can be added in order.

Floating-point sums depend on their order. Where a slot has an owner among several workers, that one alone adds up what all of
them have of its row, in their order (`owners.py`). With virtual workers a micro-step has a fixed number of parts, whoever
computes them; each is a pass of its own shape, its gradients are kept apart, and the parts are added one after the other. Any
number of workers then comes to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from chrysalis_ray.training.engine import Engine
from chrysalis_ray.training.owners import sum_to_owners

EXCHANGED = 1 << 22  # numbers that go to their owners at once: as many are in a buffer to be sent, and in one that comes


class Member(NamedTuple):
    """Who sits in a row of a shard: the worker that owns its slot, if one of several does, and where its gradient is summed,
    if that is here."""

    row: int
    owner: int | None
    gradient_P: Tensor | None


class Gradients(Protocol):
    """What becomes of gradients between backward passes and steps."""

    def open(self, members: Sequence[Member]) -> None:
        """Steps of these begin: nothing counts that was added to their rows before."""

    def expect(self, members: Sequence[Member]) -> None:
        """A pass comes that adds to these rows, and to no others anything that counts."""

    def keep(self, place: int) -> None:
        """A pass for the part in this place of the engine's is done."""

    def close(self, members: Sequence[Member]) -> None:
        """Steps of these are complete: the sum over all parts and all workers is wanted in their `gradient_P`."""


class Sums:
    """The gradients [N, P] of a shard, into which every backward pass adds, and what of them must be kept apart."""

    def __init__(self, engine: Engine, gradients_NP: Tensor) -> None:
        self.engine = engine
        self.gradients_NP = gradients_NP
        shape = (len(engine.parts), *gradients_NP.shape)
        self._parts_VNP = torch.zeros(shape, dtype=gradients_NP.dtype, device=gradients_NP.device) if engine.in_order else None
        gradients_NP.zero_()

    def open(self, members: Sequence[Member]) -> None:
        for part in runs([member.row for member in members]):
            self.gradients_NP[part].zero_()

    def expect(self, members: Sequence[Member]) -> None:
        """All rows have a place of their own here."""

    def keep(self, place: int) -> None:
        if self._parts_VNP is not None:
            self._parts_VNP[place] += self.gradients_NP
            self.gradients_NP.zero_()

    def close(self, members: Sequence[Member]) -> None:
        """Rows are summed where they lie: on their owner alone where they have one, else on every worker."""
        rows = [member.row for member in members]
        if owned := sorted((member.owner, member.row) for member in members if member.owner is not None):
            self._to_owners(owned)
        else:
            for part in runs(rows):
                if self._parts_VNP is None:
                    self.engine.reduce(self.gradients_NP[part])
                else:
                    self.gradients_NP[part] = self.engine.total(self._parts_VNP[:, part])
        if self._parts_VNP is not None:
            self._parts_VNP[:, rows] = 0.0

    def _to_owners(self, owned: Sequence[tuple[int, int]]) -> None:
        """Rows [(owner, row)], piece by piece, so that the buffers stay small."""
        engine, parts_VNP = self.engine, self.gradients_NP[None] if self._parts_VNP is None else self._parts_VNP
        owners, rows = [owner for owner, _ in owned], [row for _, row in owned]
        mine = [row for owner, row in owned if owner == engine.rank]
        width = max(1, EXCHANGED // (len(rows) * len(parts_VNP)))
        for start in range(0, parts_VNP.shape[-1], width):
            piece = slice(start, start + width)
            sent_NVW = parts_VNP[:, rows, piece].transpose(0, 1).contiguous()
            total_MW = sum_to_owners(sent_NVW, owners, engine.rank, engine.world)
            for row, total_W in zip(mine, total_MW, strict=True):
                self.gradients_NP[row, piece] = total_W


def runs(rows: Sequence[int]) -> Iterator[slice]:
    """Ascending rows as slices of neighbours."""
    starts = [row for row in rows if row - 1 not in rows]
    ends = [row + 1 for row in rows if row + 1 not in rows]
    return (slice(start, end) for start, end in zip(starts, ends, strict=True))
