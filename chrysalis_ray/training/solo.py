"""A pack of one: a variant whose adapter cannot share a base with others, worn by the base through plain peft.

What peft trains of it stands in one row, A and saved matrices first, so that all else is what it is for a packed variant:
lanes, sums over workers, clip, optimizer, schedule, the guard against numbers that are not finite, scores, seeds. Only the
forward pass is peft's own. Variants of such a population take this slot one after another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from chrysalis_ray.config.adapters import PeftAdapter
from chrysalis_ray.config.blueprint import MOVED_INITS, Lora
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.patterns import PLAIN, Kind
from chrysalis_ray.core.records import Hyperparameters, Variant
from chrysalis_ray.seed.adalora import RUNNING
from chrysalis_ray.seed.kinds import CONSTANT
from chrysalis_ray.seed.solo import NAME, Moved, SoloAdapter, Wardrobe, form_of
from chrysalis_ray.training.bank import ALIGNMENT, Bank, Target, Window
from chrysalis_ray.training.engine import Engine
from chrysalis_ray.training.heads import Head, HeadArithmetic, find_head, raw_logits
from chrysalis_ray.training.lanes import MicroBatch
from chrysalis_ray.training.loss import Labelled, chunk_of
from chrysalis_ray.training.pack import Occupant, Pack
from chrysalis_ray.training.packed import find_targets
from chrysalis_ray.training.past import Past
from chrysalis_ray.training.probe import probe
from chrysalis_ray.training.shards import Shard, Shards
from chrysalis_ray.training.trunk import Trunk


class RowBank(Bank):
    """A bank of one row: whatever peft trains of one adapter. `first_b` is where that begins which LoRA+ calls B: B itself,
    vectors, biases (as peft's own LoRA+ has it)."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.targets, self.slots, self.rank, self.widest, self.live = (), 1, 1, 0, 1
        self.ranks, self.scratch = [0], None
        self.patterns, self.kinds, self.kind_of = PLAIN, (Kind(),), {}
        self.scale_KS = torch.zeros(1, 1, dtype=dtype, device=device)
        self.flat_SP = self.gflat_SP = torch.zeros(1, ALIGNMENT, dtype=dtype, device=device)
        self.row_size, self.first_b = ALIGNMENT, 0
        self._places: dict[str, tuple[slice, torch.Size]] = {}
        self._coarse: list[tuple[nn.Parameter, Tensor]] = []

    def lay(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Move parameters into the row: their values and gradients become views of it.

        One of lower precision than the row stays what it is, and follows its master in the row (`follow`).
        """
        order = sorted(parameters, key=lambda name: not _is_first(name, parameters[name]))
        self._places, self._coarse, end = {}, [], 0
        for name in order:
            self._places[name] = slice(end, end + parameters[name].numel()), parameters[name].shape
            end += parameters[name].numel()
        self.first_b = sum(p.numel() for name, p in parameters.items() if _is_first(name, p))
        self.row_size = math.ceil(end / ALIGNMENT) * ALIGNMENT
        self.flat_SP, self.gflat_SP = self.flat_SP.new_zeros(1, self.row_size), self.flat_SP.new_zeros(1, self.row_size)
        values, gradients = self.unpack(self.flat_SP[0], 0), self.unpack(self.gflat_SP[0], 0)
        for name, parameter in parameters.items():
            values[name].copy_(parameter.data)
            if parameter.dtype == self.flat_SP.dtype:
                parameter.data, parameter.grad = values[name], gradients[name]
            else:
                self._coarse.append((parameter, values[name]))
                parameter.register_post_accumulate_grad_hook(_Adding(gradients[name]))

    def follow(self) -> None:
        """Round the masters of parameters of lower precision into them."""
        for parameter, master in self._coarse:
            parameter.data.copy_(master)

    def unpack(self, row_P: Tensor, rank: int) -> dict[str, Tensor]:
        """Views of a row-shaped vector by the names of peft's files."""
        return {name: row_P[part].view(shape) for name, (part, shape) in self._places.items()}

    def pack(self, tensors: Mapping[str, Tensor], rank: int, row_P: Tensor) -> None:
        """Write tensors into a row-shaped vector. Raises ModelError unless they are exactly those of the adapter."""
        if tensors.keys() != self._places.keys():
            odd = min(tensors.keys() ^ self._places.keys())
            raise ModelError(f"an adapter and the blueprint's lora differ in {odd!r}", "use an adapter made by this blueprint")
        for name, view in self.unpack(row_P, rank).items():
            if tensors[name].shape != view.shape:
                raise ModelError(
                    f"{name} has shape {list(tensors[name].shape)}, this variant needs {list(view.shape)}",
                    "use an adapter made for this base, of the same rank",
                )
            view.copy_(tensors[name])


def _is_first(name: str, parameter: nn.Parameter) -> bool:
    return ".lora_A." in name or (parameter.ndim > 1 and ".lora_" not in name)


class _Adding:
    """Adds the gradient of a parameter to its place in the row."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradient.add_(parameter.grad)
        parameter.grad = None


class LaneDropout(nn.Module):
    """peft's lora_dropout with the masks that a packed variant has: functions of variant, step, sequence and module."""

    def __init__(self, name: str, window: Window) -> None:
        super().__init__()
        self.name = name
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        lane = self.window.passage.lanes[0] if self.window.passage is not None else None
        return x if lane is None else x * lane.noise(self.name, x.reshape(-1, x.shape[-1])).view(x.shape)


class SoloShard(Shard):
    """The base with what it wears at the moment, or bare."""

    adapter: SoloAdapter | None = None

    def hidden(self, batch: MicroBatch, past: Past | None = None) -> Tensor:
        bank = self.window.bank
        assert isinstance(bank, RowBank)
        bank.follow()
        if self.adapter is not None:
            for layer in self.adapter.layers.values():  # peft's DoRA drops x in training mode only
                layer.training = batch.passage is not None
        return super().hidden(batch, past)

    def summed(self) -> None:
        if self.adapter is not None and self.adapter.allocation is not None:
            self.adapter.allocation.penalty().backward()

    def moved(self, step: int) -> None:
        if self.adapter is not None and self.adapter.allocation is not None:
            self.adapter.allocation.allocate(step)

    def loss(self, hidden_ND: Tensor, labelled: Labelled) -> tuple[Tensor, Tensor]:
        """As for a frozen head; one that is trained needs its own gradient."""
        if not any(parameter.requires_grad for parameter in self.head.parameters):
            return super().loss(hidden_ND, labelled)
        losses = [hidden_ND.new_zeros(0, dtype=self.window.bank.flat_SP.dtype)]
        for part in labelled.chunks(chunk_of(self.head.weight)):
            rows, labels = hidden_ND[labelled.index_K[part]], labelled.labels_K[part]
            losses.append(checkpoint(_dense_losses, rows, labels, self.head, use_reentrant=False))
        losses_K = torch.cat(losses)
        return (losses_K * labelled.weights_K.to(losses_K.dtype)).sum(), losses_K.detach()


def _dense_losses(hidden_cd: Tensor, labels_c: Tensor, head: Head) -> Tensor:
    arithmetic: HeadArithmetic = head.arithmetic
    logits_cv = raw_logits(hidden_cd, head.weight, head.bias) * arithmetic.scale
    if arithmetic.cap is not None:
        logits_cv = arithmetic.cap * torch.tanh(logits_cv / arithmetic.cap)
    return nn.functional.cross_entropy(logits_cv, labels_c, reduction="none")


class SoloPack(Pack):
    """One slot on a base, for variants of the kind of `worn`. `threads` stay inside the operations.

    Raises ModelError for a base or targets that do not suit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        worn: Lora | PeftAdapter,
        engine: Engine,
        lanes: Literal["compacted", "fixed"] = "compacted",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not engine.copyable:
            raise ModelError("a sharded base cannot wear an adapter of peft's own", "set zero_stage: 0")
        self.engine, self.lanes, self.worn = engine, lanes, worn
        self.targets: list[Target] = []
        if isinstance(worn, Lora) or worn.linear:
            self.targets = find_targets(model, worn.targets or (), "lora" if isinstance(worn, Lora) else "adapter")
        self.bank = RowBank(dtype, engine.device)
        self.bank.patterns = worn.patterns if isinstance(worn, Lora) else PLAIN
        window, head = Window(self.bank), find_head(model)
        self._wardrobe = Wardrobe(model)
        trunk = engine.prepare(Trunk(model))
        probe(trunk, model, head, window, engine)
        self._bare = head
        self._shard = SoloShard(trunk, head, window, engine, buckets=False)
        self.shards = Shards(trunk, head, window, engine, 1, lanes)
        self.shards.all = self.shards.live = [self._shard]
        self._row_of = [0]
        self._occupants: dict[int, Occupant] = {}
        self._own_gradients = {}

    def place(self, slot: int, variant: Variant, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Put on a variant's adapter, from the tensors of its seed, or as peft begins it with the A of adapter zero.

        An init that moves the base begins with factors of its own, a kind other than LoRA with what peft draws from a number
        that adapter zero gives: the same for all variants. Raises ModelError for what does not fit.
        """
        moved = None
        if "solo" in meta:
            if meta["solo"] != form_of(self.worn):
                raise ModelError(f"a seed of the kind {meta['solo']} is not of this blueprint's", "use a seed of this run")
            moved = moved_in(tensors, meta)
        self._put_on(self.worn, variant.hyperparameters, moved, int(variant.seed_sha256[:15], 16), variant.steps)
        if "solo" in meta:
            self._recall(_part(tensors, CONSTANT), _part(tensors, RUNNING))
        else:
            tensors = self._begun(tensors, variant.hyperparameters.rank)
        super().place(slot, variant, tensors, meta)

    def _recall(self, constants: Mapping[str, Tensor], running: Mapping[str, Tensor]) -> None:
        """Have the constants of a seed or a folder in the place of those that peft drew, and what a seed remembers of steps.
        Raises ModelError for others."""
        assert self._shard.adapter is not None
        if self._shard.adapter.allocation is not None:
            self._shard.adapter.allocation.recall(running)
        own = self._shard.adapter.constants
        if own.keys() != constants.keys() or any(own[name].shape != value.shape for name, value in constants.items()):
            raise ModelError("a seed and the blueprint's adapter differ in what is not trained", "use a seed of this run")
        for name, value in constants.items():
            own[name].copy_(value)

    def _begun(self, zero: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """The fresh adapter: as peft made it, with the first rows of adapter zero's A where the base was not moved."""
        begun = {f"weight/{name}": tensor.clone() for name, tensor in self.bank.unpack(self.bank.flat_SP[0], rank).items()}
        if isinstance(self.worn, Lora) and self.worn.init not in MOVED_INITS:
            for name in [name for name in begun if name.endswith(".lora_A.weight")]:
                begun[name] = zero[name.removesuffix(".weight")][: len(begun[name])]
        return begun

    def load_adapter(self, slot: int, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> None:
        """Put on a plain LoRA for evaluation only. A scale of 0 gives the bare base."""
        if scale == 0.0:
            return self.clear(slot)
        rank = next(a_ri.shape[0] for a_ri, _ in factors.values())
        plain = Lora(targets=tuple(sorted(factors)))
        tensors = {}
        for module, (a_ri, b_or) in factors.items():
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a_ri, b_or
        return self._show(slot, plain, Hyperparameters(rank=rank, alpha=scale * rank), tensors)

    def load_solo(self, slot: int, geometry: Hyperparameters, tensors: Mapping[str, Tensor]) -> None:
        """Put on an adapter of the kind of `worn`, as its folder has it, for evaluation only."""
        self._show(slot, self.worn, geometry, tensors)

    def clear(self, slot: int) -> None:
        """Bare the base."""
        self._take_off()
        self._occupants.pop(slot, None)

    def _show(self, slot: int, worn: Lora | PeftAdapter, geometry: Hyperparameters, tensors: Mapping[str, Tensor]) -> None:
        self._put_on(worn, geometry)
        assert self._shard.adapter is not None
        constants = self._shard.adapter.constants
        self._recall({name: tensor for name, tensor in tensors.items() if name in constants}, {})
        trained = {name: tensor for name, tensor in tensors.items() if name not in constants}
        self.bank.pack(trained, geometry.rank, self.bank.flat_SP[0])
        self._occupants.pop(slot, None)

    def _put_on(
        self,
        worn: Lora | PeftAdapter,
        hyperparameters: Hyperparameters,
        moved: Moved | None = None,
        draw: int = 0,
        steps: int | None = None,
    ) -> None:
        self._take_off()
        adapter = self._wardrobe.wear(worn, hyperparameters, moved, draw, steps)
        for name, layer in adapter.layers.items():
            layer.lora_dropout[NAME] = LaneDropout(name, self._shard.window)
        assert isinstance(self.bank, RowBank)
        self.bank.lay(adapter.parameters)
        head = adapter.head
        assert isinstance(head, nn.Linear)
        self._shard.adapter, self._shard.head = adapter, Head(head, self._bare.arithmetic)

    def _take_off(self) -> None:
        self._wardrobe.undress()
        self._shard.adapter, self._shard.head = None, self._bare
        assert isinstance(self.bank, RowBank)
        self.bank.lay({})

    def _occupy(self, slot: int, variant: Variant) -> None:
        super()._occupy(slot, variant)
        if self._shard.adapter is not None:
            self._shard.adapter.rescale(variant.hyperparameters)

    def _snapshot(self, slot: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = super()._snapshot(slot)
        meta["solo"] = form_of(self.worn)
        adapter = self._shard.adapter
        if adapter is not None:
            tensors |= {f"{CONSTANT}{name}": tensor for name, tensor in adapter.constants.items()}
            if adapter.allocation is not None:
                tensors |= {f"{RUNNING}{name}": tensor for name, tensor in adapter.allocation.running().items()}
        if adapter is not None and adapter.moved is not None:
            meta["initial_scale"] = adapter.moved.scale
            for module, (a_ri, b_or) in adapter.moved.factors.items():
                tensors[f"initial/{module}.lora_A.weight"], tensors[f"initial/{module}.lora_B.weight"] = a_ri, b_or
        return tensors, meta


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def moved_in(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Moved | None:
    """What a seed says was moved out of the base, None where nothing was."""
    if "initial_scale" not in meta:
        return None
    ending = ".lora_A.weight"
    modules = [name.removesuffix(ending) for name in tensors if name.startswith("initial/") and name.endswith(ending)]
    factors = {
        module.removeprefix("initial/"): (tensors[f"{module}{ending}"], tensors[f"{module}.lora_B.weight"])
        for module in modules
    }
    return Moved(factors, float(meta["initial_scale"]))
