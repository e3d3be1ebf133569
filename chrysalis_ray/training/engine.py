"""Where the frozen base lives: whole on every worker, or sharded by DeepSpeed ZeRO-3. The only door to DeepSpeed.

    prepare(trunk)      the module to call in its place
    gather(parameters)  a context in which sharded parameters are whole
    reduce(rows)        sum over workers, in place

Only the base is given to DeepSpeed, without an optimizer: ZeRO-3 then shards parameters and nothing else
(arXiv 1910.02054). The bank stays outside. Its gradients are summed here, one all-reduce for exactly the rows that train;
DeepSpeed's own gradient clipping is one norm over everything and would couple the variants.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.seed.linear import CompressedLinear
from chrysalis_ray.training.disk import DiskFolder

NVME_BUFFERS = 5  # shards of a parameter in main memory at once, DeepSpeed's own default


class Engine(Protocol):
    rank: int
    world: int
    device: torch.device
    copyable: bool  # whether a prepared trunk may be copied, and the copies be called by several threads at once
    parts: tuple[int, ...]  # which parts of every micro-step this worker computes, each in a pass of its own
    whole: int  # of how many
    in_order: bool  # whether those parts are summed in their order, whoever computed them

    def prepare(self, trunk: nn.Module) -> nn.Module:
        """Put the frozen trunk where it lives and return the module to call."""

    def gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """A context in which `parameters` are whole on this worker; all workers enter it together."""

    def reduce(self, rows: Tensor) -> None:
        """Sum a contiguous tensor over all workers, in place."""

    def total(self, parts_V: Tensor) -> Tensor:
        """The sum of a tensor that every part of a micro-step has, over all workers. `parts_V` may be written to."""


def make_engine(
    zero_stage: int,
    offload: str,
    precision: str,
    device: torch.device | str,
    virtual_workers: int | None = None,
    nvme_path: str | None = None,
) -> Engine:
    """The engine of this worker. World and rank come from torch.distributed where it is initialised, else it is alone.

    `zero_stage` 0 replicates the base, 3 shards it; `offload` "cpu" keeps the shards in host memory, "nvme" in files
    below `nvme_path`. With `virtual_workers`
    the arithmetic is that of so many workers, to the bit, however many there are. Raises ModelError for what DeepSpeed cannot
    do: other stages (the base has no gradients and no optimizer to shard) and fp64.
    """
    if zero_stage == 0:
        return ReplicatedEngine(torch.device(device), virtual_workers)
    if zero_stage != 3:
        raise ModelError(f"zero_stage {zero_stage} shards nothing of a frozen base", "use 0 (replicate) or 3 (shard)")
    if precision not in ("fp32", "bf16"):
        raise ModelError(f"ZeRO-3 does not run in {precision}", "use precision fp32 or bf16, or zero_stage 0")
    return ShardedEngine(torch.device(device), offload, precision, virtual_workers=virtual_workers, nvme_path=nvme_path)


class ReplicatedEngine:
    """The whole base on every worker."""

    copyable = True

    def __init__(self, device: torch.device, virtual_workers: int | None = None) -> None:
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.in_order, self.whole = virtual_workers is not None, virtual_workers or self.world
        if self.whole % self.world:
            raise ModelError(
                f"{self.whole} virtual workers cannot be shared evenly by {self.world} workers",
                "set body.virtual_workers to a multiple of body.workers",
            )
        each = self.whole // self.world
        self.parts = tuple(range(self.rank * each, (self.rank + 1) * each))

    def prepare(self, trunk: nn.Module) -> nn.Module:
        return trunk.to(self.device)

    def gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def reduce(self, rows: Tensor) -> None:
        if self.world > 1:
            dist.all_reduce(rows)

    def total(self, parts_V: Tensor) -> Tensor:
        if not self.in_order:
            self.reduce(parts_V[0])
            return parts_V[0]
        everyone = [torch.empty_like(parts_V) for _ in range(self.world)] if self.world > 1 else [parts_V]
        if self.world > 1:
            dist.all_gather(everyone, parts_V.contiguous())
        first, *others = (part for parts in everyone for part in parts)
        total = first.clone()
        for part in others:
            total += part
        return total


class ShardedEngine(ReplicatedEngine):
    """The base cut over all workers by ZeRO-3; each layer is gathered just before it is used, once for all variants.

    Tensors of fewer than `persist` elements (norms, biases) stay whole: to gather them costs more than it saves.
    """

    copyable = False  # its hooks follow one forward pass at a time

    def __init__(
        self,
        device: torch.device,
        offload: str,
        precision: str,
        persist: int = 100_000,
        virtual_workers: int | None = None,
        nvme_path: str | None = None,
    ) -> None:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        super().__init__(device, virtual_workers)
        self.offload = offload
        self.precision = precision
        self.persist = persist
        self.nvme_path = nvme_path
        self._disk: DiskFolder | None = None

    def prepare(self, trunk: nn.Module) -> nn.Module:
        if any(isinstance(module, CompressedLinear) for module in trunk.modules()):
            raise ModelError("ZeRO-3 does not shard a quantised base", "set zero_stage: 0, or quantization: none")
        deepspeed = _deepspeed(self.device)
        if self.offload == "nvme":
            check_nvme(self.device)
            needed = sum(parameter.numel() * parameter.element_size() for parameter in trunk.parameters()) // self.world
            self._disk = DiskFolder(Path(self.nvme_path or ""), needed)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        engine, *_ = deepspeed.initialize(model=trunk, config=self._settings(trunk), dist_init_required=False)
        self._engine = engine  # it owns the hooks
        # not the engine itself: its output hook forbids loss.backward(), and it would expect an optimizer
        return engine.module

    def gather(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return _deepspeed(self.device).zero.GatheredParameters(list(parameters))

    def _settings(self, trunk: nn.Module) -> dict[str, object]:
        zero: dict[str, object] = {"stage": 3, "stage3_param_persistence_threshold": self.persist}
        if self.offload == "cpu":
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self._disk is not None:
            # A parameter that was read ahead, or is kept for its next use, keeps its buffer: soon none is left to read into.
            zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
            zero["offload_param"] = {
                "device": "nvme",
                "nvme_path": str(self._disk.path),
                "pin_memory": self.device.type == "cuda",
                "buffer_count": NVME_BUFFERS,
                "buffer_size": max(-(-parameter.numel() // self.world) for parameter in trunk.parameters()),
            }
        return {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": self.precision == "bf16"},
            "zero_optimization": zero,
        }


def check_nvme(device: torch.device | None = None) -> None:
    """Raise ModelError, in DeepSpeed's own words, where it cannot read and write parameters on a disk. Nothing is built."""
    _deepspeed(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if shutil.which("ninja") is None:  # it comes with DeepSpeed, into a folder that is on no path unless someone put it there
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    builder, said = AsyncIOBuilder(), list[str]()
    builder.warning = said.append
    if not builder.is_compatible(verbose=True):
        raise ModelError(
            f"DeepSpeed cannot offload to a disk here: {' '.join(said) or 'its async_io is not compatible with this machine'}",
            "install libaio with its headers (libaio-dev) on every node, or set offload: cpu",
        )


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told before its import what it would otherwise guess from the machine."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it refuses to start without
    import deepspeed
    import deepspeed.ops

    # On CPU it would compile a shared-memory collective for minutes; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
