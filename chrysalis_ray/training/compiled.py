"""`torch.compile` for what lies between the packed modules of a base: norms, rotary positions, activations, attention.

Packed modules are called as they are: they keep gradients in the bank by hand, and look at its rows anew in every pass. Lanes
are fixed and shapes static, so that there are only as many versions of a layer as there are loads: a micro-step, and the passes
that score. All layers share them. What cannot be compiled is an error; nothing goes back to eager execution silently.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.packed import PackedLinear
from chrysalis_ray.training.worn import undress

MOST_VERSIONS = 64  # of one layer; a run has a handful


class Opaque(PackedLinear):
    """A packed module that the compiler calls and does not look into."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def compile_layers(pack: Pack, backend: str = "inductor") -> None:
    """Compile every layer of a pack's trunk, each version when its shapes first come.

    Raises ModelError for lanes that change their shape, and for a model whose layers transformers does not mark.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if pack.lanes != "fixed" or len(pack.shards.all) > 1 or not pack.engine.copyable:
        raise ModelError("only fixed lanes on a whole base, in one shard, can be compiled", "set lanes: fixed, zero_stage: 0")
    torch._dynamo.config.recompile_limit = MOST_VERSIONS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    modules = list(pack.shards.all[0].trunk.modules())
    for module in modules:
        undress(module)
    layers: list[Any] = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError("this base has no layers that transformers marks, to be compiled one by one", "set compile: false")
    for module in modules:
        if type(module) is PackedLinear:
            module.__class__ = Opaque
    for layer in layers:
        inner = layer.forward
        recomputed = isinstance(inner, partial) and inner.func is checkpoint
        forward = torch.compile(inner.args[0] if recomputed else inner, backend=backend, dynamic=False)
        layer.forward = partial(checkpoint, forward, use_reentrant=False) if recomputed else forward
