"""EVA: the A of adapter zero from the data it will see, B zero (arXiv 2410.07170).

    A = the leading principal directions of what a target reads on rows of the train split

Of all projections to so few numbers it keeps most of the variance of x; a variant of smaller rank takes the first rows, which
are the best of that rank. Every target has the same rank: moving ranks between targets, as peft can, would make rows of the
bank that differ in shape. The activations are those of the frozen base, document by document as in training, at labelled
tokens. They are folded in batch by batch (Ross et al. 2008, "Incremental learning for robust visual tracking"), and a few
times as many directions as are wanted are kept in between.

    x_KI   labelled tokens x in      values_D, directions_DI   singular values and right singular directions, largest first
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chrysalis_ray.config.blueprint import BodyPatch
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.records import sha256_of
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.packed import find_targets
from chrysalis_ray.training.trunk import Trunk

if TYPE_CHECKING:
    from chrysalis_ray.genome.tokens import TokenStore

TOKENS = 16_384  # as many are read, or all there are; from all domains alike
TOKENS_PER_PASS = 2_048
BETWEEN = (4, 32)  # times the rank, and more: directions kept from batch to batch; weak in one they may be strong in all
SPARE = 8  # directions that are sought beyond those kept
ITERATIONS = 3

Row = tuple[str, int]  # domain, row of the token store


class Principal:
    """The leading principal directions of vectors that come in batches."""

    def __init__(self, width: int, keep: int) -> None:
        self.keep = min(width, keep)
        self.count = 0
        self.mean_I = torch.zeros(width)
        self.values_D = torch.zeros(0)
        self.directions_DI = torch.zeros(0, width)

    def fold(self, x_KI: Tensor, generator: torch.Generator) -> None:
        """Take in a batch of at least one vector."""
        before, new = self.count, len(x_KI)
        mean_I = x_KI.mean(0)
        apart = (before * new / (before + new)) ** 0.5  # what the means differ by is variance, too
        rows = [self.values_D[:, None] * self.directions_DI, x_KI - mean_I, apart * (self.mean_I - mean_I)[None]]
        self.values_D, self.directions_DI = leading(torch.cat(rows), self.keep, generator)
        self.mean_I = (before * self.mean_I + new * mean_I) / (before + new)
        self.count = before + new

    def leaders(self, rank: int) -> Tensor:
        """The first `rank` directions [rank, in], orthonormal, each with the sign that makes its largest entry positive."""
        directions_RI = self.directions_DI[:rank]
        largest_R1 = directions_RI.gather(1, directions_RI.abs().argmax(1, keepdim=True))
        return directions_RI * largest_R1.sign()


def leading(matrix_KI: Tensor, keep: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The `keep` largest singular values and their right singular directions, or as many as there are: subspace iteration
    from random directions (Halko et al., arXiv 0909.4061)."""
    size = min(*matrix_KI.shape, keep + SPARE)
    basis_IS = torch.randn(matrix_KI.shape[1], size, generator=generator)
    for _ in range(ITERATIONS):
        basis_IS = torch.linalg.qr(matrix_KI.mT @ (matrix_KI @ basis_IS)).Q
    triangle_SS = torch.linalg.qr(matrix_KI @ basis_IS, mode="r").R  # has the singular values of the tall matrix
    _, values_S, turned_SS = torch.linalg.svd(triangle_SS)
    return values_S[:keep], (turned_SS @ basis_IS.mT)[:keep]


class Readers:
    """What the targets of a model read, folded in as it comes. Targets that are given the same tensor share it."""

    def __init__(self, keep: int, generator: torch.Generator) -> None:
        self.keep = keep
        self.generator = generator
        self.labelled_K = torch.zeros(0, dtype=torch.bool)  # of the pass at work
        self.first: dict[str, str] = {}  # target -> who among those that read the same comes first
        self.principal: dict[str, Principal] = {}
        self._last: tuple[str, Tensor] | None = None

    def look(self, name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """A hook before the forward pass of target `name`."""
        x = arguments[0]
        if name not in self.first:
            shared = self._last is not None and self._last[1] is x
            self.first[name] = self._last[0] if shared and self._last else name
        if self.first[name] != name:
            return
        self._last = name, x
        x_KI = x.detach().flatten(0, -2)[self.labelled_K].to(torch.float32)
        principal = self.principal.setdefault(name, Principal(x.shape[-1], self.keep))
        principal.fold(x_KI, self.generator)


def read_directions(
    base_folder: Path, body: BodyPatch, tokens_folder: Path, targets: Sequence[str], rank: int, rng_seed: int
) -> dict[str, Tensor]:
    """`leading_directions` of a base and tokens on disk. The base is loaded into this process in the precision of the body, in
    main memory and not quantised, and let go again."""
    from chrysalis_ray.genome.tokens import open_tokens

    model = load_base(base_folder, body.precision or "fp32")
    return leading_directions(model, targets, open_tokens(tokens_folder), rank, rng_seed)


@torch.no_grad()
def leading_directions(
    model: PreTrainedModel, targets: Sequence[str], tokens: TokenStore, rank: int, rng_seed: int
) -> dict[str, Tensor]:
    """The A [rank, in] of every target of `model`, fp32; the same for the same arguments on machines that round alike.

    Raises ModelError for targets that `find_targets` refuses, for one that reads fewer than `rank` numbers, for too few tokens.
    """
    found = find_targets(model, targets)
    narrowest = min(found, key=lambda target: target.in_features)
    if narrowest.in_features < rank:
        raise ModelError(
            f"{narrowest.name} reads {narrowest.in_features} numbers: they have no {rank} directions",
            "lower the rank of the variants (and of the merges), or leave lora.init out",
        )
    trunk = Trunk(model)
    readers = Readers(BETWEEN[0] * rank + BETWEEN[1], torch.Generator().manual_seed(_number(rng_seed, "directions")))
    handles = [model.get_submodule(t.name).register_forward_pre_hook(partial(readers.look, t.name)) for t in found]
    try:
        for rows in sampled_rows(tokens, rng_seed):
            batch = tokens.batch(rows, "train")
            readers.labelled_K = torch.from_numpy(batch.labels != -100).flatten()
            trunk(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids))
    finally:
        for handle in handles:
            handle.remove()
    directions = {target.name: readers.principal[readers.first[target.name]].leaders(rank) for target in found}
    fewest = min(len(directions_RI) for directions_RI in directions.values())
    if fewest < rank:
        raise ModelError(
            f"the labelled tokens of the train split span {fewest} directions, lora.init: eva was asked for {rank}",
            "add sources, lower the rank, or leave lora.init out",
        )
    return directions


def sampled_rows(tokens: TokenStore, rng_seed: int) -> Iterator[list[Row]]:
    """Rows of the train split, as many of every domain where there are so many, in batches that hold all domains."""
    draw = random.Random(_number(rng_seed, "rows"))
    length, domains = tokens.sequence_length, [domain for domain in tokens.domains if tokens.rows(domain, "train")]
    each = max(1, TOKENS // length // len(domains))
    rows = []
    for domain in domains:
        available = tokens.rows(domain, "train")
        rows += [(domain, row) for row in draw.sample(range(available), min(each, available))]
    draw.shuffle(rows)
    size = max(1, TOKENS_PER_PASS // length)
    yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _number(rng_seed: int, what: str) -> int:
    return int(sha256_of(["eva", rng_seed, what])[:15], 16)
