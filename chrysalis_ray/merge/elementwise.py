"""Rules on single coefficients (TIES, DARE, DELLA, consensus masks), in the canonical core or on the rows of the dense deltas.

A rule sees a block of rows of all members, x [N, b, l], with the members' thresholds where it trims, and a generator per member
where it draws. In the core the block is the whole module in the canonical basis, where coefficients do not depend on how an
adapter is factored and the rank stays low (compare KnOTS, arXiv 2410.19735, and Core Space, arXiv 2509.17786). Dense, blocks of
rows are made, ruled upon and dropped again, so that no more than `BLOCK_ENTRIES` are held at a time; `row_fit` fits an adapter
to what comes out, and its residual says how much of it an adapter of that rank can hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chrysalis_ray.merge.core_space import Factors, canonical_basis, double

BLOCK_ENTRIES = 1 << 22  # 32 MiB in fp64
SORTED_ENTRIES = 1 << 18  # up to here sorting is quicker than counting
EQUAL = 1e-9  # members that differ by less, relative to the largest, are one and the same
ROUNDING = 1e-9  # a coefficient that falls short of a threshold by less than this share reaches it
HALF = 1 << 16  # what the upper, or the lower, 16 bits of an fp32 number can be


@dataclass(frozen=True)
class Block:
    """A block of rows of one module, of all members, with a threshold and a generator for each of them."""

    entries_Nbl: Tensor
    weights_N: Tensor
    thresholds_N: Tensor
    generators: Sequence[torch.Generator]


Rule = Callable[[Any, Block], Tensor]


def ruled_core(rule: Rule, config: Any, weights_N: Tensor, increments_NPQ: Tensor, draw: int) -> Tensor:
    """The rule in the canonical core, back in the coordinates of the core: [P, Q]. `draw` is the module's own random number."""
    left_Pk, right_Ql = canonical_basis(increments_NPQ)
    c_Nkl = left_Pk.T @ increments_NPQ @ right_Ql
    density = trim_density(config)
    thresholds_N = torch.zeros(len(c_Nkl), dtype=torch.float64)
    if density < 1.0 and c_Nkl[0].numel():
        kept = kept_entries(density, c_Nkl[0].numel())
        thresholds_N = c_Nkl.abs().flatten(1).topk(kept, dim=1).values[:, -1]
    places = _places(torch.linalg.matrix_norm(increments_NPQ))
    block = Block(c_Nkl, weights_N, thresholds_N, [_generator(draw, place, 0) for place in places])
    return left_Pk @ rule(config, block) @ right_Ql.T


class RuledRows:
    """The rule on the rows of the dense changes of one module, anchor added, made anew whenever they are asked for."""

    def __init__(
        self, rule: Rule, config: Any, weights_N: Tensor, changes: Sequence[Factors | None], anchor: Factors | None,
        norms_N: Tensor, draw: int,
    ) -> None:  # fmt: skip
        """`changes` have the anchor stacked in and their scale folded in, see `changes_from`; `norms_N` are their lengths."""
        self.rule, self.config, self.weights_N, self.draw = rule, config, weights_N, draw
        self.changes, self.anchor = changes, anchor
        a_ri, b_or = next(block for block in (*changes, anchor) if block is not None)
        self.out_size, self.in_size = len(b_or), a_ri.shape[1]
        self.places = _places(norms_N)
        self.rows = max(1, BLOCK_ENTRIES // (self.in_size * len(changes)))
        density = trim_density(config)
        self.thresholds_N = torch.zeros(len(changes), dtype=torch.float64)
        if density < 1.0:
            self.thresholds_N = torch.stack([self._threshold(number, density) for number in range(len(changes))])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, merged rows [b, I] in fp64), top to bottom."""
        for number, start in enumerate(range(0, self.out_size, self.rows)):
            rows = slice(start, min(start + self.rows, self.out_size))
            entries_NbI = torch.stack([self._rows(change, rows) for change in self.changes])
            generators = [_generator(self.draw, place, number) for place in self.places]
            merged_bI = self.rule(self.config, Block(entries_NbI, self.weights_N, self.thresholds_N, generators))
            yield rows, merged_bI + self._rows(self.anchor, rows)

    def _rows(self, factors: Factors | None, rows: slice) -> Tensor:
        if factors is None:
            return torch.zeros(rows.stop - rows.start, self.in_size, dtype=torch.float64)
        return factors[1][rows] @ factors[0]

    def _threshold(self, number: int, density: float) -> Tensor:
        """The magnitude of the last entry kept: the k-th largest.

        Of a large delta it is found by its bits, in two passes that only count.

        The order of positive fp32 numbers is that of their bits as integers: the first pass counts the upper 16 bits of every
        magnitude, the second the lower 16 of those that share the k-th one's upper bits.
        """
        missing = kept_entries(density, self.out_size * self.in_size)
        if self.out_size * self.in_size <= SORTED_ENTRIES:
            return self._rows(self.changes[number], slice(0, self.out_size)).abs().flatten().topk(missing).values[-1]
        upper: int | None = None
        for _ in range(2):
            counts = torch.zeros(HALF, dtype=torch.int64)
            for start in range(0, self.out_size, self.rows):
                block = self._rows(self.changes[number], slice(start, min(start + self.rows, self.out_size)))
                bits = block.abs().float().flatten().view(torch.int32)
                bits = bits >> 16 if upper is None else bits[bits >> 16 == upper] & (HALF - 1)
                counts += torch.bincount(bits, minlength=HALF)
            larger = counts.flip(0).cumsum(0)
            place = int(torch.searchsorted(larger, missing))
            digit = HALF - 1 - place
            if upper is not None:
                found = torch.tensor([(upper << 16) | digit], dtype=torch.int32).view(torch.float32)
                return found.double()[0] * (1.0 - 2.0**-23)  # fp32 rounded it, perhaps upwards
            missing -= int(larger[place - 1]) if place else 0
            upper = digit
        raise AssertionError("two passes find a number of 32 bits")


def changes_from(
    members: Sequence[Factors | None], scales: Sequence[float], anchor: Factors | None, anchor_scale: float
) -> tuple[list[Factors | None], Factors | None]:
    """Every member minus the anchor as one pair of fp64 factors (A [R, I], B [O, R], scales folded into B), and the anchor."""
    seed = None
    if anchor is not None:
        a_ri, b_or = double(anchor)
        seed = (a_ri, anchor_scale * b_or) if bool(b_or.any()) else None
    changes: list[Factors | None] = []
    for member, scale in zip(members, scales, strict=True):
        parts = [] if seed is None else [(seed[0], -seed[1])]
        if member is not None:
            a_ri, b_or = double(member)
            parts.append((a_ri, scale * b_or))
        changes.append((torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)) if parts else None)
    return changes, seed


def all_equal(increments_NPQ: Tensor) -> bool:
    """Whether the members are one and the same here: there is nothing to trim, mask or elect, and every rule returns it."""
    size = float(torch.linalg.matrix_norm(increments_NPQ).max())
    return float(torch.linalg.matrix_norm(increments_NPQ - increments_NPQ[0]).max()) <= EQUAL * size


def trim_density(config: Any) -> float:
    """The share of a delta that `ties` keeps by magnitude; the other rules need no threshold."""
    return float(config.density) if config.method == "ties" else 1.0


def kept_entries(density: float, entries: int) -> int:
    """How many entries a density keeps: at least one, rounded down like mergekit and PEFT."""
    return min(entries, max(1, int(density * entries)))


def elected_mean(block: Block, kept_Nbl: Tensor) -> Tensor:
    """TIES after its trimming: the sign with more weight, and the weighted mean of the kept entries that have it.

    Where both signs weigh the same, or nothing was kept, zero. Members without weight were removed before.
    """
    weighted_Nbl = block.weights_N[:, None, None] * kept_Nbl
    sum_bl = weighted_Nbl.sum(0)
    elected_bl = torch.where(sum_bl.abs() > ROUNDING * weighted_Nbl.abs().sum(0), sum_bl.sign(), 0.0)
    agrees_Nbl = (kept_Nbl.sign() == elected_bl) & (kept_Nbl != 0)
    voters_bl = (block.weights_N[:, None, None] * agrees_Nbl).sum(0)
    return torch.where(
        voters_bl > 0, (weighted_Nbl * agrees_Nbl).sum(0) / voters_bl.clamp(min=torch.finfo(torch.float64).tiny), 0.0
    )


def uniform_draws(block: Block) -> Tensor:
    """One number from [0, 1) for every entry, from each member's own generator."""
    shape = block.entries_Nbl.shape[1:]
    return torch.stack([torch.rand(shape, generator=generator, dtype=torch.float64) for generator in block.generators])


def module_draw(rng_seed: int, module: str) -> int:
    """A module's own random number, the same on every machine and in any order of modules."""
    return int.from_bytes(hashlib.sha256(f"{rng_seed}/{module}".encode()).digest()[:6], "big")


def _places(norms_N: Tensor) -> list[int]:
    """Whose random numbers a member gets: by the length of its change, so that neither order nor factoring matters."""
    return torch.argsort(torch.argsort(norms_N, stable=True)).tolist()


def _generator(draw: int, place: int, block: int) -> torch.Generator:
    name = f"{draw}/{place}/{block}"
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big"))


def rule_tallies(change_PQ: Tensor, mean_PQ: Tensor) -> dict[str, float]:
    """Squared norms of the merged change, of the exact mean that it replaces, and of the difference."""
    return {
        "change_energy": float((change_PQ**2).sum()),
        "mean_energy": float((mean_PQ**2).sum()),
        "distance_energy": float(((change_PQ - mean_PQ) ** 2).sum()),
    }


def rule_summary(members: int, tallies: Mapping[str, float]) -> dict[str, float]:
    """How long the merged change is, and how far from the exact mean, both relative to the mean."""
    if not tallies.get("mean_energy"):
        return {}
    return {
        "length_to_mean": (tallies["change_energy"] / tallies["mean_energy"]) ** 0.5,
        "distance_from_mean": (tallies["distance_energy"] / tallies["mean_energy"]) ** 0.5,
    }
