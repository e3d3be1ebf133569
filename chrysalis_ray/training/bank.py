"""The bank: the LoRA weights of all variants, one contiguous row per slot.

    flat_SP   [slots, P]  master weights          A_SRI  slots x rank x in
    gflat_SP  [slots, P]  gradients               B_SOR  slots x out x rank

A row holds first the A of every target, then the B of every target, in module order: q, k, v and gate, up stand side by
side. Every per-variant operation is then one vector operation on a row: an optimizer step, a copy, an all-reduce, a
snapshot. Per-target views are strided and share the storage, and so do their gradients: autograd adds in place.

A slot of smaller rank than the bank leaves the other rows of A and columns of B at zero. Their gradients are products with
those zeros, and no optimizer here moves what has no gradient, no moments and no value: they stay exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.dropout import Passage

ALIGNMENT = 64  # elements; rows stay aligned for vector loads, and norms are summed in groups of this many


@dataclass(frozen=True)
class Target:
    """A linear module that carries an adapter, by its name in the base."""

    name: str
    in_features: int
    out_features: int


class Bank:
    """`slots` rows of P parameters. `live` rows from the top take part in the forward pass, as windows show them."""

    def __init__(
        self,
        targets: Sequence[Target],
        slots: int,
        rank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.targets = tuple(targets)
        self.slots = slots
        self.rank = rank
        self.widest = max(target.in_features for target in self.targets)
        self.offsets: dict[tuple[str, str], tuple[int, tuple[int, int]]] = {}
        end = 0
        for target in self.targets:
            self.offsets[target.name, "lora_A"] = (end, (rank, target.in_features))
            end += rank * target.in_features
        self.first_b = end  # in a row everything before it is A, everything from it on is B
        for target in self.targets:
            self.offsets[target.name, "lora_B"] = (end, (target.out_features, rank))
            end += rank * target.out_features
        self.row_size = math.ceil(end / ALIGNMENT) * ALIGNMENT
        self.flat_SP = torch.zeros(slots, self.row_size, dtype=dtype, device=device)
        self.gflat_SP = torch.zeros_like(self.flat_SP)
        self.scale_S = torch.zeros(slots, dtype=dtype, device=device)
        self.ranks = [0] * slots
        self.live = slots

    def block(self, rows: Tensor, name: str, side: str) -> Tensor:
        """The part of row-shaped vectors that holds one factor of one target, as a matrix each."""
        start, (height, width) = self.offsets[name, side]
        return rows[..., start : start + height * width].unflatten(-1, (height, width))

    def neighbours(self, names: Sequence[str]) -> bool:
        """Whether the A of these targets stand side by side in a row and have the same width."""
        starts = [self.offsets[name, "lora_A"] for name in names if (name, "lora_A") in self.offsets]
        ends = [start + height * width for start, (height, width) in starts]
        together = all(end == start for end, (start, _) in zip(ends, starts[1:], strict=False))
        return len(starts) == len(names) and together and len({shape for _, shape in starts}) == 1

    def unpack(self, row_P: Tensor, rank: int) -> dict[str, Tensor]:
        """Logical views of a row-shaped vector (weights, a moment): ``<module>.lora_A`` [rank, in], ``lora_B`` [out, rank]."""
        tensors = {}
        for name, side in self.offsets:
            block = self.block(row_P, name, side)
            tensors[f"{name}.{side}"] = block[:rank] if side == "lora_A" else block[:, :rank]
        return tensors

    def pack(self, tensors: Mapping[str, Tensor], rank: int, row_P: Tensor) -> None:
        """Write logical tensors into a row-shaped vector, padding with zeros.

        Of tensors of a higher rank than `rank` the first `rank` rows of A and columns of B are taken. Raises ModelError for
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
            value = _cut(tensors.get(f"{name}.{side}"), f"{name}.{side}", side, rank)
            block = self.block(row_P, name, side)
            block = block[:rank] if side == "lora_A" else block[:, :rank]
            if value.shape != block.shape:
                raise ModelError(
                    f"{name}.{side} has shape {list(value.shape)}, the base needs {list(block.shape)}",
                    "use an adapter made for this base and of at least this rank",
                )
            block.copy_(value)

    def swap(self, first: int, second: int) -> None:
        """Exchange two rows with their ranks and scales; gradients are scratch and stay where they are."""
        self.flat_SP[[first, second]] = self.flat_SP[[second, first]]
        self.scale_S[[first, second]] = self.scale_S[[second, first]]
        self.ranks[first], self.ranks[second] = self.ranks[second], self.ranks[first]

    def clear(self, row: int) -> None:
        """Make a row the adapter that changes nothing."""
        self.flat_SP[row].zero_()
        self.scale_S[row] = 0.0
        self.ranks[row] = 0


@dataclass(frozen=True)
class Stacked:
    """The factors of targets that read the same x, and where their gradients are added. All are views of the bank."""

    rank: int
    a_sci: Tensor  # rows x (members x rank) x in
    b_sor: tuple[Tensor, ...]  # of each member: rows x out x rank
    grad_a_sci: Tensor
    grad_b_sor: tuple[Tensor, ...]


class Window:
    """Some neighbouring rows of a bank, as the packed layers of one copy of the trunk see them."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.rows = slice(0, bank.slots)
        self.passage: Passage | None = None  # of the forward pass at work; whoever calls the trunk sets it
        self._views: dict[tuple[int, int], dict[str, tuple[nn.Parameter, nn.Parameter]]] = {}
        self._stacked: dict[tuple[int, int, str], Stacked] = {}

    def show(self, rows: slice) -> None:
        """Look at these rows from now on."""
        self.rows = rows

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [rows, rank, in] and B [rows, out, rank] of one target, as leaves whose gradients lie in the bank's `gflat_SP`."""
        key = (self.rows.start, self.rows.stop)
        views = self._views.get(key)
        if views is None:
            targets = self.bank.targets
            views = self._views[key] = {t.name: (self._leaf(t.name, "lora_A"), self._leaf(t.name, "lora_B")) for t in targets}
        return views[name]

    def stacked(self, names: Sequence[str]) -> Stacked:
        """The factors of neighbouring targets of one input width; `Bank.neighbours` says which are."""
        key = (self.rows.start, self.rows.stop, names[0])
        views = self._stacked.get(key)
        if views is None:
            bank = self.bank
            start, (rank, width) = bank.offsets[names[0], "lora_A"]
            shape = (len(names) * rank, width)
            a_sci, grad_a_sci = (
                flat_SP[self.rows, start : start + shape[0] * shape[1]].unflatten(-1, shape)
                for flat_SP in (bank.flat_SP, bank.gflat_SP)
            )
            b_sor, grad_b_sor = (
                tuple(bank.block(flat_SP[self.rows], name, "lora_B") for name in names)
                for flat_SP in (bank.flat_SP, bank.gflat_SP)
            )
            views = self._stacked[key] = Stacked(rank, a_sci, b_sor, grad_a_sci, grad_b_sor)
        return views

    @property
    def scale_S(self) -> Tensor:
        """The scale of every row in sight."""
        return self.bank.scale_S[self.rows]

    def _leaf(self, name: str, side: str) -> nn.Parameter:
        leaf = nn.Parameter(self.bank.block(self.bank.flat_SP[self.rows], name, side))
        leaf.grad = self.bank.block(self.bank.gflat_SP[self.rows], name, side)
        return leaf


def _cut(value: Tensor | None, name: str, side: str, rank: int) -> Tensor:
    if value is None:
        raise ModelError(f"an adapter has no tensor {name!r}", "use an adapter made for this base and these lora.targets")
    return value[:rank] if side == "lora_A" else value[:, :rank]
