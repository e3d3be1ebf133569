"""Dropout before A (peft's ``lora_dropout``), each variant with a probability of its own, exact wherever it trains.

    y = W x + B (s A (m x))      m: 0 with the probability p, else 1 / (1 - p)

A mask is a pure function of (rng_seed of the variant, optimizer step, place of the sequence in the step, name of the module).
It does not depend on slot, pack, neighbours, threads, micro-steps, the number of workers or an interruption, and nothing of
it is kept: the backward pass, and activations that are recomputed, draw it again. Masks are equal on all CPUs; those of a
GPU are others, and the same on GPUs of one kind.

The rows that drop are computed one by one beside the operations that serve all rows. What the others go through has the same
shapes and values whether or not somebody beside them drops.

    x_ski   variants x tokens x in      h_skc   variants x tokens x members * rank      a_smri   variants x members x rank x in
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GRAIN = 2**16  # a probability is kept to so many parts: four draws out of one 64-bit number


@dataclass(frozen=True)
class Dropout:
    """The dropout of one variant in one optimizer step."""

    probability: float
    rng_seed: int
    step: int


@dataclass(frozen=True)
class LaneMask:
    """The masks of one lane in one forward pass: `sequences` of equal length, the first of which have these places in the
    step. The others are there for their shape and drop nothing."""

    dropout: Dropout
    places: tuple[int, ...]
    sequences: int

    def noise(self, module: str, like_ki: Tensor) -> Tensor:
        """What multiplies x before the A of `module`: 0 or 1 / (1 - p), shaped as `like_ki` [sequences x T, in]."""
        tokens, width = like_ki.shape
        noise_bti = like_ki.new_ones(self.sequences, tokens // self.sequences, width)
        dropped = round(self.dropout.probability * GRAIN)
        for index, place in enumerate(self.places):
            kept_ti = drawn(self._key(module, place), noise_bti[index].numel(), like_ki.device) >= dropped - GRAIN // 2
            noise_bti[index] = kept_ti.view(noise_bti.shape[1:]).to(like_ki.dtype).div_(1.0 - dropped / GRAIN)
        return noise_bti.view(like_ki.shape)

    def _key(self, module: str, place: int) -> int:
        name = f"dropout/{self.dropout.rng_seed}/{self.dropout.step}/{place}/{module}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def drawn(key: int, count: int, device: torch.device) -> Tensor:
    """`count` numbers, each from -GRAIN / 2 to GRAIN / 2 - 1 with equal probability, the same for the same key."""
    generator = torch.Generator(device=device).manual_seed(key)
    numbers = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return numbers.view(torch.int16)[:count]


@dataclass(frozen=True)
class Passage:
    """What one forward pass of a shard must know beside its tokens: the masks of every lane, None where nothing is dropped."""

    lanes: tuple[LaneMask | None, ...]

    def dropping(self) -> Iterator[tuple[int, LaneMask]]:
        return ((row, lane) for row, lane in enumerate(self.lanes) if lane is not None)

    def part(self, rows: slice) -> Passage | None:
        """The passage of these rows alone."""
        return passage_of(self.lanes[rows])


def passage_of(lanes: Sequence[LaneMask | None]) -> Passage | None:
    """The passage of these lanes; None, which costs nothing, where no variant drops."""
    return Passage(tuple(lanes)) if any(lane is not None for lane in lanes) else None


def project_down(passage: Passage, names: Sequence[str], x_ski: Tensor, a_smri: Tensor, h_skc: Tensor) -> None:
    """Put A (m x) in the place of A x in `h_skc`, where a lane drops. `names` are the members that share x."""
    for row, lane in passage.dropping():
        for name, a_ri, part in _members(names, a_smri[row]):
            h_skc[row, :, part] = (x_ski[row] * lane.noise(name, x_ski[row])) @ a_ri.to(x_ski.dtype).mT


def take_out(passage: Passage, grad_h_skc: Tensor) -> dict[int, Tensor]:
    """The gradients of h of the rows that drop, by row. They are zero in `grad_h_skc` from now on, and move nothing there."""
    taken = {row: grad_h_skc[row].clone() for row, _ in passage.dropping()}
    for row in taken:
        grad_h_skc[row] = 0.0
    return taken


def project_back(
    passage: Passage,
    names: Sequence[str],
    taken: Mapping[int, Tensor],
    x_ski: Tensor,
    a_smri: Tensor,
    grad_a_smri: Tensor,
    grad_x_ski: Tensor | None,
) -> None:
    """Add the gradients of A and x, if that is wanted, of the rows that were taken out."""
    for row, lane in passage.dropping():
        x_ki = x_ski[row]
        for index, (name, a_ri, part) in enumerate(_members(names, a_smri[row])):
            noise_ki, grad_h_kr = lane.noise(name, x_ki), taken[row][:, part]
            grad_a_smri[row, index] += product(grad_h_kr.mT[None], (x_ki * noise_ki)[None], grad_a_smri.dtype)[0]
            if grad_x_ski is not None:
                grad_x_ski[row] += (grad_h_kr @ a_ri.to(x_ki.dtype)).mul_(noise_ki)


def _members(names: Sequence[str], a_mri: Tensor) -> Iterator[tuple[str, Tensor, slice]]:
    """Every member's name, its A, and where it stands in h."""
    rank = a_mri.shape[1]
    stacked = enumerate(zip(names, a_mri, strict=True))
    return ((name, a_ri, slice(index * rank, (index + 1) * rank)) for index, (name, a_ri) in stacked)


def product(left_sij: Tensor, right_sjk: Tensor, dtype: torch.dtype) -> Tensor:
    """left right per variant in `dtype`; on CUDA the product of bf16 leaves the GEMM in fp32, unrounded."""
    if left_sij.is_cuda and left_sij.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.bmm(left_sij, right_sjk, out_dtype=torch.float32)
    return torch.bmm(left_sij, right_sjk).to(dtype)
