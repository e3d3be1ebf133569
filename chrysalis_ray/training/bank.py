"""The bank: the LoRA weights of all variants, one contiguous row per slot.

    flat_SP   [slots, P]  master weights          A_SRI  slots x rank x in
    gflat_SP  [slots, P]  gradients               B_SOR  slots x out x rank

A row holds first the A of every target, then the B of every target, in module order: q, k, v and gate, up stand side by
side. Every per-variant operation is then one vector operation on a row: an optimizer step, a copy, an all-reduce, a
snapshot. Per-target views are strided and share the storage, and so do their gradients: autograd adds in place.

A slot of smaller rank than the bank leaves the other rows of A and columns of B at zero. Their gradients are products with
those zeros, and no optimizer here moves what has no gradient, no moments and no value: they stay exactly zero. Where ranks
differ much a window leaves those zeros out: neighbouring rows of like rank are a bucket, computed as wide as that rank needs.

Targets that a pattern gives a rank of their own are so wide in every row, and no wider. Targets of one pattern are a kind, and
a slot has one scale for each kind (`scale_KS`, kinds x slots; kind 0 are those without a pattern).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.patterns import PLAIN, Geometry, Kind, Patterns
from chrysalis_ray.training.blend import Blend
from chrysalis_ray.training.dropout import Passage
from chrysalis_ray.training.limbs import shared_zeros

ALIGNMENT = 64  # elements; rows stay aligned for vector loads, and norms are summed in groups of this many
NARROWEST = 8  # ranks below this one are computed as it is: a narrower product takes no less time


@dataclass(frozen=True)
class Span:
    """Where the A and the B of one layer's targets lie in a row."""

    parts: tuple[slice, slice]

    @property
    def sizes(self) -> list[int]:
        return [part.stop - part.start for part in self.parts]

    @property
    def width(self) -> int:
        return sum(self.sizes)


class Scratch:
    """Gradients [slots, W] of one layer at a time: W is as wide as the widest layer is in a row."""

    def __init__(self, spans: Sequence[Span], slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.spans = tuple(spans)
        self.numbers_SW = torch.zeros(slots, max(span.width for span in spans), dtype=dtype, device=device)

    def part(self, rows: slice, start: int, end: int) -> Tensor:
        """Where the gradients of the numbers from `start` to `end` of these rows are added, while their layer is at work."""
        for span in self.spans:
            before = 0
            for part in span.parts:
                if part.start <= start and end <= part.stop:
                    return self.numbers_SW[rows, before + start - part.start : before + end - part.start]
                before += part.stop - part.start
        raise ValueError(f"the numbers {start} to {end} of a row are not those of one layer")


@dataclass(frozen=True)
class Target:
    """A linear module that carries an adapter, by its name in the base."""

    name: str
    in_features: int
    out_features: int


class Bank:
    """`slots` rows of P parameters. `live` rows from the top take part in the forward pass, as windows show them.

    With `shared` they lie in memory that a fork of this process goes on sharing. `spare` rows more, after the others, are for
    copies that forks work on. With `layers`, the names of the base's, the gradients of one of them at a time have room.
    Targets that `patterns` mean have ranks or alphas of their own.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        slots: int,
        rank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shared: bool = False,
        spare: int = 0,
        layers: Sequence[str] = (),
        patterns: Patterns = PLAIN,
    ) -> None:
        self.patterns = patterns
        self.targets = tuple(targets)
        self.slots = slots
        self.rank = rank
        self.widest = max(target.in_features for target in self.targets)
        self.offsets: dict[tuple[str, str], tuple[int, tuple[int, int]]] = {}
        end = 0
        for target in self.targets:
            width = self.reach(target.name, rank)
            self.offsets[target.name, "lora_A"] = (end, (width, target.in_features))
            end += width * target.in_features
        self.first_b = end  # in a row everything before it is A, everything from it on is B
        for target in self.targets:
            width = self.reach(target.name, rank)
            self.offsets[target.name, "lora_B"] = (end, (target.out_features, width))
            end += width * target.out_features
        self.row_size = math.ceil(end / ALIGNMENT) * ALIGNMENT
        make = shared_zeros if shared else partial(torch.zeros, device=device)
        rows = slots + spare
        self.flat_SP = make((rows, self.row_size), dtype=dtype)
        self.scratch = Scratch(self.spans(layers), slots, dtype, device) if layers else None
        self.gflat_SP = make((0 if layers else rows, self.row_size), dtype=dtype)
        self.kinds = tuple(dict.fromkeys([Kind(), *(patterns.kind_of(target.name) for target in self.targets)]))
        self.kind_of = {target.name: self.kinds.index(patterns.kind_of(target.name)) for target in self.targets}
        self.scale_KS = make((len(self.kinds), rows), dtype=dtype)
        self.ranks = [0] * rows
        self.live = slots

    def reach(self, name: str, rank: int) -> int:
        """The rank of a target in an adapter of `rank`."""
        return self.patterns.rank_of(name, rank)

    @property
    def room(self) -> int:
        """The largest rank of an adapter, the same for all targets, that a slot has room for."""
        return min(height for (_, side), (_, (height, _)) in self.offsets.items() if side == "lora_A")

    def weigh(self, row: int, own: Geometry) -> None:
        """Count a row's B A as often as a variant's rank and alpha say, target by target."""
        for kind, of in enumerate(self.kinds):
            self.scale_KS[kind, row] = of.scale(own)

    def block(self, rows: Tensor, name: str, side: str) -> Tensor:
        """The part of row-shaped vectors that holds one factor of one target, as a matrix each."""
        start, (height, width) = self.offsets[name, side]
        return rows[..., start : start + height * width].unflatten(-1, (height, width))

    def gradient_part(self, rows: slice, start: int, end: int) -> Tensor:
        """Where the gradients of the numbers from `start` to `end` of these rows are added."""
        return self.gflat_SP[rows, start:end] if self.scratch is None else self.scratch.part(rows, start, end)

    def gradient_block(self, rows: slice, name: str, side: str) -> Tensor:
        """Where the gradients of one factor of one target are added, as a matrix of each of these rows."""
        start, (height, width) = self.offsets[name, side]
        return self.gradient_part(rows, start, start + height * width).unflatten(-1, (height, width))

    def spans(self, layers: Sequence[str]) -> list[Span]:
        """The part that each of these layers has in a row. Raises ModelError for a target that is in none of them."""
        spans, held = [], set[str]()
        for layer in layers:
            names = [target.name for target in self.targets if target.name.startswith(f"{layer}.")]
            held.update(names)
            a, b = (self._stretch(names, side) for side in ("lora_A", "lora_B"))
            spans.append(Span((a, b)))
        if lone := [target.name for target in self.targets if target.name not in held]:
            raise ModelError(f"{lone[0]} is in no layer whose gradients could go to their owners", "set body.gradients: whole")
        return spans

    def _stretch(self, names: Sequence[str], side: str) -> slice:
        if not names:
            return slice(0, 0)
        start, _ = self.offsets[names[0], side]
        last, (height, width) = self.offsets[names[-1], side]
        return slice(start, last + height * width)

    def neighbours(self, names: Sequence[str]) -> bool:
        """Whether the A of these targets stand side by side in a row, have the same width and are of one kind."""
        starts = [self.offsets[name, "lora_A"] for name in names if (name, "lora_A") in self.offsets]
        ends = [start + height * width for start, (height, width) in starts]
        together = all(end == start for end, (start, _) in zip(ends, starts[1:], strict=False))
        alike = len({shape for _, shape in starts}) == 1 and len({self.kind_of[name] for name in names}) == 1
        return len(starts) == len(names) and together and alike

    def unpack(self, row_P: Tensor, rank: int) -> dict[str, Tensor]:
        """Logical views of a row-shaped vector (weights, a moment): ``<module>.lora_A`` [rank, in], ``lora_B`` [out, rank]."""
        tensors = {}
        for name, side in self.offsets:
            tensors[f"{name}.{side}"] = _narrow(self.block(row_P, name, side), side, self.reach(name, rank))
        return tensors

    def pack(self, tensors: Mapping[str, Tensor], rank: int, row_P: Tensor) -> None:
        """Write logical tensors into a row-shaped vector, padding with zeros.

        Of tensors of a higher rank than the target's the first rows of A and columns of B are taken. Raises ModelError for
        missing modules, wrong shapes and a rank that is too small or does not fit the bank.
        """
        if rank > self.rank:
            raise ModelError(
                f"a variant of rank {rank} does not fit a bank of rank {self.rank}", "raise the rank of the body's bank"
            )
        unknown = tensors.keys() - {f"{name}.{side}" for name, side in self.offsets}
        if unknown:
            raise ModelError(
                f"an adapter holds {len(unknown)} tensors the base has no target for, such as {min(unknown)!r}",
                "use an adapter made for this base and these lora.targets",
            )
        row_P.zero_()
        for name, side in self.offsets:
            own = self.reach(name, rank)
            value = _cut(tensors.get(f"{name}.{side}"), f"{name}.{side}", side, own)
            block = _narrow(self.block(row_P, name, side), side, own)
            if value.shape != block.shape:
                raise ModelError(
                    f"{name}.{side} has shape {list(value.shape)}, the base needs {list(block.shape)}",
                    "use an adapter made for this base and of at least this rank",
                )
            block.copy_(value)

    def fitted(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """An adapter of one rank for all targets, with as many rows of A and columns of B as each has room for here. Raises
        ModelError where more than zeros would be cut off."""
        fitted = {}
        for name, (a_ri, b_or) in factors.items():
            width, rank = self.offsets[name, "lora_A"][1][0] if name in self.kind_of else len(a_ri), len(a_ri)
            if not _ends_at(width, a_ri, b_or):
                raise ModelError(
                    f"{name}: rank {rank} does not fit this target's {width}", "judge it as a blend of itself alone"
                )
            more = max(width - rank, 0)
            fitted[name] = nn.functional.pad(a_ri[:width], (0, 0, 0, more)), nn.functional.pad(b_or[:, :width], (0, more))
        return fitted

    def holds(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
        """Whether an adapter fits a slot to the last number."""
        wide = ((self.offsets[name, "lora_A"][1][0], *pair) for name, pair in factors.items() if name in self.kind_of)
        return all(_ends_at(*each) for each in wide)

    def swap(self, first: int, second: int) -> None:
        """Exchange two rows with their ranks and scales; gradients are scratch and stay where they are."""
        self.flat_SP[[first, second]] = self.flat_SP[[second, first]]
        self.scale_KS[:, [first, second]] = self.scale_KS[:, [second, first]]
        self.ranks[first], self.ranks[second] = self.ranks[second], self.ranks[first]

    def copy(self, source: int, target: int) -> None:
        """Make row `target` what row `source` is, with its rank and its scale."""
        self.flat_SP[target] = self.flat_SP[source]
        self.scale_KS[:, target] = self.scale_KS[:, source]
        self.ranks[target] = self.ranks[source]

    def clear(self, row: int) -> None:
        """Make a row the adapter that changes nothing."""
        self.flat_SP[row].zero_()
        self.scale_KS[:, row] = 0.0
        self.ranks[row] = 0


@dataclass(frozen=True)
class Bucket:
    """Neighbouring rows of a window whose A is computed to its first `rank` rows, B to as many columns: the rest is zero.
    Targets with a rank of their own are computed to that."""

    rows: slice
    rank: int


def bucket_rank(rank: int, most: int) -> int:
    """The rank of the bucket that an adapter of `rank` falls into: the next power of two, in a bank of rank `most`."""
    return min(max(NARROWEST, 1 << (rank - 1).bit_length()), most)


@dataclass(frozen=True)
class Stacked:
    """A bucket's factors of targets that read the same x, and where their gradients are added. All are views of the bank."""

    rows: slice  # of the window
    rank: int
    a_smri: Tensor  # rows x members x rank x in
    b_sor: tuple[Tensor, ...]  # of each member: rows x out x rank
    grad_a_smri: Tensor
    grad_b_sor: tuple[Tensor, ...]

    def a_sci(self, dtype: torch.dtype) -> Tensor:
        """The A of all members, one below the other; a view where rank and `dtype` are the bank's."""
        return self.a_smri.to(dtype).flatten(1, 2)


class Window:
    """Some neighbouring rows of a bank, as the packed layers of one copy of the trunk see them."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.passage: Passage | None = None  # of the forward pass at work; whoever calls the trunk sets it
        self.blend: Blend | None = None  # what is computed instead of the bank's rows; `Shards.blended` sets it
        self._leaves: dict[tuple[int, int, int, str], tuple[nn.Parameter, nn.Parameter]] = {}
        self._stacked: dict[tuple[int, int, int, int, str], Stacked] = {}
        self.show(slice(0, bank.slots))

    def show(self, rows: slice, ranks: Sequence[int] | None = None) -> None:
        """Look at these rows from now on: as far as adapters of these ranks reach, or at the whole width of the bank."""
        self.rows = rows
        most, count = self.bank.rank, rows.stop - rows.start
        widths = [most] * count if ranks is None else [bucket_rank(rank, most) for rank in ranks]
        buckets, start = [], 0
        for width, members in groupby(widths):
            end = start + len(list(members))
            buckets.append(Bucket(slice(start, end), width))
            start = end
        self.buckets = tuple(buckets)

    def factors(self, name: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """A [rows, rank, in] and B [rows, out, rank] of one target for every bucket, as leaves whose gradients lie in the
        bank's `gflat_SP`."""
        return [self._leaves_of(bucket, name) for bucket in self.buckets]

    def factors_of(self, name: str, lane: int) -> tuple[Bucket, tuple[nn.Parameter, nn.Parameter]]:
        """The bucket of one row in sight, and its factors of a target."""
        bucket = next(bucket for bucket in self.buckets if lane < bucket.rows.stop)
        return bucket, self._leaves_of(bucket, name)

    @property
    def lanes(self) -> int:
        """How many adapters a pass computes: candidates of a blend, or rows in sight."""
        return len(self.blend) if self.blend is not None else self.rows.stop - self.rows.start

    def stacked(self, names: Sequence[str]) -> list[Stacked]:
        """The factors of neighbouring targets of one input width for every bucket; `Bank.neighbours` says which are."""
        return [self._stacked_of(bucket, names) for bucket in self.buckets]

    @property
    def variants(self) -> int:
        """How many rows are in sight."""
        return self.rows.stop - self.rows.start

    def scale_S(self, name: str) -> Tensor:
        """How many times B A of a target counts, in every row in sight."""
        return self.bank.scale_KS[self.bank.kind_of[name], self.rows]

    def _place(self, bucket: Bucket) -> slice:
        """The rows of the bank that a bucket means."""
        return slice(self.rows.start + bucket.rows.start, self.rows.start + bucket.rows.stop)

    def _leaves_of(self, bucket: Bucket, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        place, rank = self._place(bucket), bucket.rank
        key = (place.start, place.stop, rank, name)
        if key not in self._leaves:
            self._leaves[key] = self._leaf(name, "lora_A", place, rank), self._leaf(name, "lora_B", place, rank)
        return self._leaves[key]

    def _leaf(self, name: str, side: str, place: slice, rank: int) -> nn.Parameter:
        bank, own = self.bank, self.bank.reach(name, rank)
        leaf = nn.Parameter(_narrow(bank.block(bank.flat_SP[place], name, side), side, own))
        leaf.grad = _narrow(bank.gradient_block(place, name, side), side, own)
        return leaf

    def _stacked_of(self, bucket: Bucket, names: Sequence[str]) -> Stacked:
        place, rank = self._place(bucket), bucket.rank
        key = (place.start, place.stop, self.rows.start, rank, names[0])
        if key not in self._stacked:
            bank, own = self.bank, self.bank.reach(names[0], rank)
            start, (height, width) = bank.offsets[names[0], "lora_A"]
            end = start + len(names) * height * width
            a_smri, grad_a_smri = (
                part.unflatten(-1, (len(names), height, width))[:, :, :own]
                for part in (bank.flat_SP[place, start:end], bank.gradient_part(place, start, end))
            )
            b_sor = tuple(_narrow(bank.block(bank.flat_SP[place], name, "lora_B"), "lora_B", own) for name in names)
            grad_b_sor = tuple(_narrow(bank.gradient_block(place, name, "lora_B"), "lora_B", own) for name in names)
            self._stacked[key] = Stacked(bucket.rows, own, a_smri, b_sor, grad_a_smri, grad_b_sor)
        return self._stacked[key]


def _narrow(block_shw: Tensor, side: str, rank: int) -> Tensor:
    """The first `rank` rows of every A, or columns of every B."""
    return block_shw[..., :rank, :] if side == "lora_A" else block_shw[..., :rank]


def _ends_at(width: int, a_ri: Tensor, b_or: Tensor) -> bool:
    """Whether nothing of B A lies beyond the first `width` rows of A and columns of B."""
    return not (a_ri[width:].any() and b_or[:, width:].any())


def _cut(value: Tensor | None, name: str, side: str, rank: int) -> Tensor:
    if value is None:
        raise ModelError(f"an adapter has no tensor {name!r}", "use an adapter made for this base and these lora.targets")
    return _narrow(value, side, rank)
