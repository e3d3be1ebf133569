"""Gradients layer by layer, for bodies of several workers where the gradients of all slots would take too much memory.

    backward of a layer   adds to a scratch [slots, W], which all layers use one after the other
    when it is done       every row of the scratch goes to the worker that owns its slot, and is added to the row's gradient
    step                  the owner has all of its rows, and nobody anything of the others

It is stage 2 of ZeRO (arXiv 1910.02054), cut along variants. A worker holds the gradients of its own slots and those of one
layer of all slots, instead of those of all layers of all. Sums over workers are made in every pass: where a step is one pass,
as many numbers are sent as with whole gradients, and the bits are the same; where it is k passes, k times as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.bank import Bank, Scratch
from chrysalis_ray.training.engine import Engine
from chrysalis_ray.training.owners import sum_to_owners
from chrysalis_ray.training.sums import Member


def layer_names(model: nn.Module) -> list[str]:
    """The layers of a base, as transformers marks them, in the order in which they are called.

    Raises ModelError for a model without marks.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    names = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    if not names:
        raise ModelError(
            "this base has no layers that transformers marks, whose gradients could go to their owners one by one",
            "set body.gradients: whole",
        )
    return names


class LayerSums:
    """The gradients of a shard's rows, summed on their owners while the backward pass runs."""

    def __init__(self, engine: Engine, bank: Bank, layers: Sequence[nn.Module]) -> None:
        if engine.in_order or bank.scratch is None:
            raise ValueError("gradients that are summed layer by layer need a scratch, and no parts that are kept apart")
        self.engine = engine
        self._scratch: Scratch = bank.scratch
        self._members: list[Member] = []
        self._pending: list[int] = []
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._entered, number), with_kwargs=True)

    def open(self, members: Sequence[Member]) -> None:
        for member in members:
            if member.gradient_P is not None:
                member.gradient_P.zero_()

    def expect(self, members: Sequence[Member]) -> None:
        self._members = sorted(members, key=lambda member: (member.owner or 0, member.row))
        self._pending = list(range(len(self._scratch.spans)))
        self._scratch.numbers_SW.zero_()

    def keep(self, place: int) -> None:
        """The first layer's input has no gradient to wait for: it is sent at the end, and it alone may be left.

        Raises ModelError where others are: they have written over each other.
        """
        if len(self._pending) > 1:
            raise ModelError("the layers of this base do not run one after the other", "set body.gradients: whole")
        for number in list(self._pending):
            self._send(number)

    def close(self, members: Sequence[Member]) -> None:
        """They are summed already."""

    def _entered(self, number: int, layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """The gradient of a layer's input is complete when everything in the layer has had its backward pass."""
        hidden = arguments[0] if arguments else named["hidden_states"]
        if torch.is_grad_enabled() and hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._send(number))

    def _send(self, number: int) -> None:
        span, engine, members = self._scratch.spans[number], self.engine, self._members
        self._pending.remove(number)
        if span.width and members:
            rows, owners = [member.row for member in members], [member.owner or 0 for member in members]
            sent_NVW = self._scratch.numbers_SW[rows, : span.width][:, None]
            total_MW = sum_to_owners(sent_NVW, owners, engine.rank, engine.world)
            for member, total_W in zip([m for m in members if m.owner == engine.rank], total_MW, strict=True):
                assert member.gradient_P is not None
                for part, told in zip(span.parts, total_W.split(span.sizes), strict=True):
                    member.gradient_P[part] += told
        self._scratch.numbers_SW[:, : span.width].zero_()
