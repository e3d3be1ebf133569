"""A pack: one frozen base, and slots that hold variants.

A slot is a name; where its weights stand in the bank is the pack's own business. With "compacted" lanes `arrange` moves the
slots that train into the first rows, like ranks together, and the others are not computed. With "fixed" lanes slot k stays in
row k and all rows are always computed in their whole width, those that do not train with labels of weight zero: a variant's
arithmetic then has the same shapes whatever happens beside it, and its bits are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.patterns import PLAIN, Patterns
from chrysalis_ray.core.records import MOMENTS, Variant
from chrysalis_ray.training.bank import Bank, Window, bucket_rank
from chrysalis_ray.training.blend import Blend, Factors
from chrysalis_ray.training.engine import Engine
from chrysalis_ray.training.folded import FEWEST
from chrysalis_ray.training.heads import find_head
from chrysalis_ray.training.lanes import repeated
from chrysalis_ray.training.layered import LayerSums, layer_names
from chrysalis_ray.training.loss import TokenScores
from chrysalis_ray.training.optimizer import EVICT_AFTER, SlotOptimizer
from chrysalis_ray.training.owners import optimizer_state, owner_of
from chrysalis_ray.training.packed import find_targets, fuse, inject
from chrysalis_ray.training.passes import CACHED, MOST_SHARDS, SCORED_TOKENS, WORN, variants_per_pass
from chrysalis_ray.training.probe import probe
from chrysalis_ray.training.quick import quicken
from chrysalis_ray.training.shards import Shard, Shards
from chrysalis_ray.training.trunk import Trunk
from chrysalis_ray.training.worn import wear

if TYPE_CHECKING:
    from chrysalis_ray.genome.tokens import RowBatch


@dataclass
class Occupant:
    """A variant in a slot, and how far it has come."""

    variant: Variant
    optimizer: SlotOptimizer
    owner: int | None = None  # the one of several workers that keeps its moments and makes its steps
    optimizer_step: int = 0  # also the position in its data
    skipped: int = 0
    skipped_in_a_row: int = 0
    domain_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def evicted(self) -> bool:
        return self.skipped_in_a_row >= EVICT_AFTER

    def to_json(self) -> dict[str, Any]:
        scalars = self.optimizer.scalars()
        return {
            "optimizer": self.optimizer.kind,
            **({"scalars": scalars} if scalars else {}),
            "optimizer_step": self.optimizer_step,
            "rows": self.optimizer_step * self.variant.rows_per_step,
            "updates": self.optimizer.updates,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "domain_tokens": dict(self.domain_tokens),
        }


class Pack:
    """The frozen base of this worker with `slots` adapters of at most `rank` beside it.

    `targets` are leaf names ("q_proj") or dotted endings. `dtype` is that of the adapters and moments, `threads` how many
    of them this worker may compute with on a CPU, `tokens_per_pass` how many tokens of several variants one pass may hold
    (None: those of all), `patterns` which targets have ranks and alphas of their own. Every worker of a body calls the same
    methods in the same order. Raises ModelError for a base or targets that do not suit.
    """

    _wears = False  # layers put candidates on (`worn.py`)

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Sequence[str],
        slots: int,
        rank: int,
        engine: Engine,
        lanes: Literal["compacted", "fixed"] = "compacted",
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        gradients: Literal["whole", "sharded"] = "whole",
        tokens_per_pass: int | None = None,
        patterns: Patterns = PLAIN,
    ) -> None:
        self.engine = engine
        self.lanes = lanes
        layers = layer_names(model) if gradients == "sharded" and engine.world > 1 else []
        shared = engine.device.type == "cpu" and threads > 1
        spare = min(threads, MOST_SHARDS) - 1 if shared and lanes == "compacted" else 0
        self.bank = Bank(find_targets(model, targets), slots, rank, dtype, engine.device, shared, spare, layers, patterns)
        window = Window(self.bank)
        if engine.copyable and engine.device.type == "cpu":
            quicken(model)
            self._wears = wear(model)
        inject(model, window)
        head = find_head(model)
        trunk = engine.prepare(Trunk(model))
        if engine.copyable:
            fuse(trunk, window)
        probe(trunk, model, head, window, engine)
        self.shards = Shards(trunk, head, window, engine, threads, lanes, tokens_per_pass)
        self._own_gradients: dict[int, Tensor] = {}  # slot -> [P], of those that this worker owns
        if layers:
            self.shards.all[0].layered = LayerSums(engine, self.bank, [model.get_submodule(name) for name in layers])
            owned = [slot for slot in range(slots) if owner_of(slot, engine.world) == engine.rank]
            self._own_gradients = {slot: torch.zeros_like(self.bank.flat_SP[0]) for slot in owned}
        self._row_of = list(range(slots))
        self._occupants: dict[int, Occupant] = {}

    # who is where

    def place(self, slot: int, variant: Variant, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Put a variant into a slot, from the tensors of a seed.

        `tensors`: ``weight/<module>.lora_A`` [r, in], ``weight/<module>.lora_B`` [out, r] and, unless it is fresh, the moments
        of its optimizer (``exp_avg/...``), which are taken if the variant's is of the same class. Of an adapter of higher
        rank than the variant's the first rows and columns are taken. `meta` gives ``optimizer_step`` and what else `harvest`
        returned. Raises ModelError for what does not fit.
        """
        row, rank = self._row_of[slot], variant.hyperparameters.rank
        self._check_patterns(meta)
        self.bank.pack(_part(tensors, "weight"), rank, self.bank.flat_SP[row])
        optimizer = SlotOptimizer(variant.hyperparameters, self.bank.flat_SP[row], self._gradient(slot), self.bank.first_b)
        owner = owner_of(slot, self.engine.world)
        if meta.get("optimizer", "adamw") == optimizer.kind:
            self._remember(optimizer, tensors, meta, rank, owner)
        self._occupy(slot, variant)
        self._occupants[slot] = Occupant(
            variant=variant,
            optimizer=optimizer,
            owner=owner,
            optimizer_step=steps_of(variant, meta),
            skipped=int(meta.get("skipped", 0)),
            skipped_in_a_row=int(meta.get("skipped_in_a_row", 0)),
            domain_tokens=dict(meta.get("domain_tokens", {})),
        )

    def _check_patterns(self, meta: Mapping[str, Any]) -> None:
        """A seed that was trained has the ranks of its own patterns."""
        if "optimizer" in meta and meta.get("patterns", {}) != self.bank.patterns.to_json():
            raise ModelError(
                f"a seed of {meta.get('patterns') or 'no patterns'} does not fit {self.bank.patterns.to_json() or 'none'}",
                "write the rank_pattern and alpha_pattern that it was trained with",
            )

    def _remember(
        self, optimizer: SlotOptimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], rank: int, owner: int | None
    ) -> None:
        """Give an optimizer the moments of a seed. One that has updates but no moments is that of sgd without momentum."""
        moments, updates = {}, int(meta.get("updates", meta["optimizer_step"]))
        if owner not in (None, self.engine.rank):
            optimizer.updates = updates
            return
        for name in MOMENTS[optimizer.kind]:
            if part := _part(tensors, name):
                moments[name] = torch.empty(self.bank.row_size, dtype=self.bank.flat_SP.dtype, device=self.bank.flat_SP.device)
                self.bank.pack(part, rank, moments[name])
        if moments or optimizer.kind == "sgd":
            optimizer.restore(moments, meta.get("scalars", {}), updates)

    def clone(self, source: int, target: int, variant: Variant) -> None:
        """Make `variant` in slot `target` a full copy of what slot `source` holds: weights, moments, position."""
        if source == target:
            raise ValueError(f"slot {source} cannot be cloned into itself: reconfigure it")
        self.place(target, variant, *self._snapshot(source))

    def reconfigure(self, slot: int, variant: Variant) -> None:
        """Go on with other hyperparameters or another epigenome. Raises ModelError for another rank."""
        occupant = self.occupant(slot)
        old, new = occupant.variant.hyperparameters, variant.hyperparameters
        if old.rank != new.rank:
            raise ModelError(
                f"{variant.variant_id} cannot go from rank {old.rank} to {new.rank} in its slot",
                "place it anew from a seed of at least that rank",
            )
        occupant.optimizer.configure(new)
        occupant.optimizer_step = steps_of(variant, occupant.to_json())
        occupant.variant = variant
        self._occupy(slot, variant)

    def harvest(self, slot: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The seed a slot holds: logical tensors on the CPU, copied, and the meta that `place` takes."""
        tensors, meta = self._snapshot(slot)
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}, meta

    def load_adapter(self, slot: int, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> None:
        """Put factors A [r, in], B [out, r] per module into a slot, for evaluation only. A scale of 0 gives the bare base."""
        rank = next((a_ri.shape[0] for a_ri, _ in factors.values()), 0)
        if self.bank.patterns:
            factors, rank = self.bank.fitted(factors), min(rank, self.bank.rank)
        tensors = {}
        for module, (a_ri, b_or) in factors.items():
            tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = a_ri, b_or
        row = self._row_of[slot]
        self.bank.pack(tensors, rank, self.bank.flat_SP[row])
        self.bank.ranks[row] = rank
        self.bank.scale_KS[:, row] = scale
        self._occupants.pop(slot, None)

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.bank.clear(self._row_of[slot])
        self._occupants.pop(slot, None)

    def occupant(self, slot: int) -> Occupant:
        if slot not in self._occupants:
            raise ModelError(f"slot {slot} holds no variant that can train", "place one first")
        return self._occupants[slot]

    def is_even(self, slots: Sequence[int]) -> bool:
        """Whether it makes no difference to the time of a step which of these variants sits in which of the first rows."""
        widths = {bucket_rank(self.occupant(slot).variant.hyperparameters.rank, self.bank.rank) for slot in slots}
        return self.lanes == "compacted" and len(widths) == 1

    def arrange(self, slots: Sequence[int]) -> list[int | None]:
        """Make ready to compute `slots`; returns the slot of every live row, None where a row only keeps the shape."""
        if len(set(slots)) != len(slots) or not slots:
            raise ValueError(f"slots to arrange must be distinct and at least one, got {list(slots)}")
        if self.lanes == "fixed":
            self.bank.live = self.bank.slots
            rows = [slot if slot in slots else None for slot in range(self.bank.slots)]
        else:
            order = self.shards.order([self.bank.ranks[self._row_of[slot]] for slot in slots], self.bank.rank)
            for row, index in enumerate(order):
                self._move(slots[index], row)
            self.bank.live = len(order)
            rows = [slots[index] for index in order]
        self.shards.spread(self.bank)
        return rows

    # arithmetic

    def zero_gradients(self) -> None:
        for gradients in (self.bank.gflat_SP, *self._own_gradients.values()):
            gradients.zero_()

    def score(self, slots: Sequence[int], batch: RowBatch) -> Tensor:
        """Losses of the same rows under every slot's adapter: fp32 (fp64) [slots, rows, T] on the CPU, 0 without a label."""
        return self.judge(slots, batch).losses

    def judge(self, slots: Sequence[int], batch: RowBatch, keep: bool = False) -> TokenScores:
        """`score`, and hits: whether a label was the likeliest token, bool [slots, rows, T] on the CPU. With `keep` what the
        head was given as well, [slots, rows, T, D]."""
        order = self.arrange(slots)
        return self._judged(self.shards.rows, batch, [order.index(slot) for slot in slots], None, keep)

    def judge_blend(self, blend: Blend, batch: RowBatch, keep: bool = False) -> TokenScores:
        """The same for every candidate of `blend`, [candidates, rows, T]; the bank is neither read nor changed."""
        with self.shards.blended(blend) as parts:
            return self._judged(parts, batch, list(range(len(blend))), blend, keep)

    def blend(self, members: Sequence[tuple[Factors, float]], weights_CM: Tensor) -> Blend:
        """Candidates that are weighted sums of `members` (factors and scale), ready to be judged. Raises ModelError for a
        module that is no target of this pack."""
        known = {target.name: (target.out_features, target.in_features) for target in self.bank.targets}
        return Blend(members, weights_CM, known, self.bank.flat_SP.dtype, self.engine.device)

    def _judged(
        self, parts: Sequence[slice], batch: RowBatch, lanes: Sequence[int], blend: Blend | None, keep: bool
    ) -> TokenScores:
        """The scores of these lanes, in this order; `parts` are the lanes that each live shard computes. What comes of a turn
        goes where it stays: kept hidden states may be a good part of the memory, and are never there twice."""
        total, found = parts[-1].stop, list[Tensor]()
        for pieces in self.shards.in_turns(parts, self._lanes_at_once(batch, parts, blend), blend):
            micro = [repeated(batch, piece.stop - piece.start, self.engine.device) for piece in pieces]
            scores = self.shards.each(partial(Shard.token_scores, keep=keep), micro)
            for piece, own in zip(pieces, scores, strict=True):
                told = [part.view(-1, *batch.labels.shape, *part.shape[1:]) for part in own if part is not None]
                found = found or [part.new_empty(total, *part.shape[1:]) for part in told]
                for whole, part in zip(found, told, strict=True):
                    whole[piece] = part
        in_order = list(lanes) == list(range(total))
        return TokenScores(*(whole.cpu() if in_order else whole[list(lanes)].cpu() for whole in found))

    def _lanes_at_once(self, batch: RowBatch, parts: Sequence[slice], blend: Blend | None) -> int:
        """As many lanes as a core's cache is good for; on a GPU, and where shapes must stay as they are, as a pass may hold."""
        most, lane = max(part.stop - part.start for part in parts), batch.labels.size
        trained = self.shards.all[0].tokens_per_pass
        held = trained and trained * SCORED_TOKENS
        if self.engine.device.type == "cpu" and self.lanes != "fixed" and self.engine.copyable:
            near = WORN if self._wears and lane >= FEWEST else CACHED
            return variants_per_pass(most, lane, min(near, held or near))
        return variants_per_pass(most, lane, held, even=self.lanes == "fixed" and blend is None)

    def _occupy(self, slot: int, variant: Variant) -> None:
        row = self._row_of[slot]
        self.bank.ranks[row] = variant.hyperparameters.rank
        self.bank.weigh(row, variant.hyperparameters)

    def _snapshot(self, slot: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Logical views of a slot's weights and moments, and its meta."""
        occupant = self.occupant(slot)
        row = self._row_of[slot]
        moments, scalars = optimizer_state(occupant.optimizer, self.bank.flat_SP[row], occupant.owner)
        parts = {"weight": self.bank.flat_SP[row], **moments}
        tensors = {
            f"{part}/{name}": tensor
            for part, row_P in parts.items()
            for name, tensor in self.bank.unpack(row_P, self.bank.ranks[row]).items()
        }
        beside = {"scalars": scalars, "patterns": self.bank.patterns.to_json()}
        return tensors, {**occupant.to_json(), **{name: value for name, value in beside.items() if value}}

    def _move(self, slot: int, row: int) -> None:
        """Bring a slot into a row; what stood there takes the row it leaves."""
        source = self._row_of[slot]
        if source == row:
            return
        other = self._row_of.index(row)
        self.bank.swap(source, row)
        self._row_of[slot], self._row_of[other] = row, source
        for moved in (slot, other):
            if moved in self._occupants:
                place = self._row_of[moved]
                self._occupants[moved].optimizer.move(self.bank.flat_SP[place], self._gradient(moved))

    def _gradient(self, slot: int) -> Tensor | None:
        """Where a slot's gradient is summed; None where that is on another worker alone."""
        return self.bank.gflat_SP[self._row_of[slot]] if self.bank.scratch is None else self._own_gradients.get(slot)


def steps_of(variant: Variant, meta: Mapping[str, Any]) -> int:
    """Steps of `variant` that the rows of a seed make: schedule and data go on there, whatever the batch was before."""
    return int(meta["rows"]) // variant.rows_per_step if "rows" in meta else int(meta["optimizer_step"])


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}
