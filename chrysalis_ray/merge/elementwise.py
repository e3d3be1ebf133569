"""Rules on single coefficients (TIES, DARE, DELLA, consensus masks), in the canonical core or on the rows of the dense deltas.

A rule sees a block of rows of all members, x [N, b, l], with the members' thresholds where it trims, and a generator per member
where it draws. In the core the block is the whole module in the canonical basis, where coefficients do not depend on how an
adapter is factored and the rank stays low (compare KnOTS, arXiv 2410.19735, and Core Space, arXiv 2509.17786). Dense, blocks of
rows are made, ruled upon and dropped again, so that no more than `BLOCK_ENTRIES` are held at a time; `row_fit` fits an adapter
to what comes out, and its residual says how much of it an adapter of that rank can hold.

The core and small modules are ruled upon in fp64, the entries of larger ones in fp32, as the papers' own code does: that can
turn an entry which lies within rounding of a threshold, or of a vote that is a draw, and costs half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chrysalis_ray.config.merges import Agreeing
from chrysalis_ray.merge.core_space import Factors, canonical_basis, double

BLOCK_ENTRIES = 3 << 17  # of all members together, 1.5 MiB in fp32: larger ones leave a core's cache
DRAWN_ENTRIES = 1 << 18  # the same for rules that draw: other blocks would be other numbers
COUNTED_ENTRIES = 1 << 17  # of one member
EXACT_ENTRIES = 1 << 18  # deltas up to here are ruled upon in fp64, and sorted for their thresholds
EQUAL = 1e-9  # members that differ by less, relative to the largest, are one and the same
SAMPLED = 512, 256  # rows and columns of a delta that say about where its threshold lies
BRACKET = 0.004  # the share of entries on either side of it that are looked at one by one
FAR = 1e15  # a delta that is no more than that many thresholds long can be had in units of its threshold
ROUNDING = 1e-9  # in fp64: a coefficient that falls short of a threshold by less than this share reaches it
ROUNDING_FP32 = 1e-6


@dataclass(frozen=True)
class Block:
    """A block of rows of one module, of all members, with a threshold and a generator for each of them.

    With `units_N`, a member's entries and its threshold are given in that unit.
    """

    entries_Nbl: Tensor
    weights_N: Tensor
    thresholds_N: Tensor
    generators: Sequence[torch.Generator]
    units_N: Tensor | None = None
    ceilings_N: Tensor | None = None  # from there on, entries are outliers

    @property
    def rounding(self) -> float:
        """The share by which rounding can have changed an entry."""
        return ROUNDING if self.entries_Nbl.dtype == torch.float64 else ROUNDING_FP32


Rule = Callable[[Any, Block], Tensor]


def ruled_core(rule: Rule, config: Any, weights_N: Tensor, increments_NPQ: Tensor, draw: int) -> Tensor:
    """The rule in the canonical core, back in the coordinates of the core: [P, Q]. `draw` is the module's own random number."""
    left_Pk, right_Ql = canonical_basis(increments_NPQ)
    c_Nkl = left_Pk.T @ increments_NPQ @ right_Ql
    places = places_of(torch.linalg.matrix_norm(increments_NPQ))
    block = whole_block(config, c_Nkl, weights_N, [generator_of(draw, place, 0) for place in places])
    return left_Pk @ rule(config, block) @ right_Ql.T


def whole_block(config: Any, entries_Nbl: Tensor, weights_N: Tensor, generators: Sequence[torch.Generator]) -> Block:
    """A block that is a whole module, with thresholds and ceilings where the rule has any."""
    if getattr(config, "densities", None):
        return _block_of_own_densities(config, entries_Nbl, weights_N, generators)
    above, kept = window(config, entries_Nbl[0].numel())
    sizes_NL = entries_Nbl.abs().flatten(1)
    thresholds_N = _of_place(sizes_NL, kept) if kept else torch.zeros(len(entries_Nbl), dtype=torch.float64)
    return Block(entries_Nbl, weights_N, thresholds_N, generators, None, _of_place(sizes_NL, above) if above else None)


def _of_place(sizes_NL: Tensor, count: int) -> Tensor:
    """The `count`-th largest of every row, [N]. By numpy, which parts a row ten times as quickly as torch finds its largest."""
    place = sizes_NL.shape[1] - count
    return torch.from_numpy(np.partition(sizes_NL.numpy(), place, axis=1)[:, place].copy())


def _block_of_own_densities(
    config: Any, entries_Nbl: Tensor, weights_N: Tensor, generators: Sequence[torch.Generator]
) -> Block:
    """`whole_block` where members differ in their density."""
    own = config.for_each(len(entries_Nbl))
    each = [whole_block(one, entries_Nbl[n : n + 1], weights_N, []) for n, one in enumerate(own)]
    ceilings = [entries_Nbl.new_tensor([torch.inf]) if one.ceilings_N is None else one.ceilings_N for one in each]
    return Block(entries_Nbl, weights_N, torch.cat([one.thresholds_N for one in each]), generators, None, torch.cat(ceilings))


class RuledRows:
    """The rule on the rows of the dense changes of one module, anchor added, made anew whenever they are asked for."""

    def __init__(
        self, rule: Rule, config: Any, weights_N: Tensor, changes: Sequence[Factors | None], anchor: Factors | None,
        norms_N: Tensor, draw: int,
    ) -> None:  # fmt: skip
        """`changes` have the anchor stacked in and their scale folded in, see `changes_from`; `norms_N` are their lengths.

        A change of length 0 is none: what its factors leave of a member minus an equal anchor is rounding, and has no vote.
        """
        self.rule, self.config, self.draw, self.draws = rule, config, draw, hasattr(config, "rng_seed")
        a_ri, b_or = next(block for block in (*changes, anchor) if block is not None)
        self.out_size, self.in_size = len(b_or), a_ri.shape[1]
        self.dtype = torch.float64 if self.out_size * self.in_size <= EXACT_ENTRIES else torch.float32
        self.weights_N = weights_N.to(self.dtype)
        changes = [change if norm > 0.0 else None for change, norm in zip(changes, norms_N.tolist(), strict=True)]
        rank = max((len(change[0]) for change in changes if change is not None), default=1)
        self.b_NOR = torch.zeros(len(changes), self.out_size, rank, dtype=self.dtype)
        self.a_NRI = torch.zeros(len(changes), rank, self.in_size, dtype=self.dtype)
        for number, change in enumerate(changes):
            if change is not None:
                self.a_NRI[number, : len(change[0])], self.b_NOR[number, :, : len(change[0])] = change
        self.changes = [None if change is None else (self.a_NRI[n], self.b_NOR[n]) for n, change in enumerate(changes)]
        self.anchor = None if anchor is None else tuple(side.to(self.dtype) for side in anchor)
        self.norms_N, self.places = norms_N, places_of(norms_N)
        self.rows = max(1, (DRAWN_ENTRIES if self.draws else BLOCK_ENTRIES) // (self.in_size * len(changes)))
        own = config.for_each(len(changes)) if getattr(config, "densities", None) else [config] * len(changes)
        windows = [window(one, self.out_size * self.in_size) for one in own]
        self.thresholds_N = torch.stack([self._threshold(number, kept) for number, (_, kept) in enumerate(windows)])
        self.ceilings_N = None
        if any(above for above, _ in windows):
            highest = [self._threshold(number, above) if above else torch.inf for number, (above, _) in enumerate(windows)]
            self.ceilings_N = torch.tensor(highest, dtype=self.dtype)
        self.units_N = None
        moved_N = norms_N > 0.0
        if config.method == "ties" and bool(
            (self.thresholds_N * FAR > norms_N)[moved_N].all()
        ):  # in units of thresholds, all are trimmed at once
            self.units_N = torch.where(moved_N, self.thresholds_N, 1.0)
            self.b_NOR = self.b_NOR / self.units_N[:, None, None]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, merged rows [b, I]), top to bottom."""
        for rows, block in self.entries():
            merged_bI = self.rule(self.config, block)
            if self.anchor is not None:
                merged_bI = torch.addmm(merged_bI, self.anchor[1][rows], self.anchor[0])
            yield rows, merged_bI

    def entries(self) -> Iterator[tuple[slice, Block]]:
        """(rows, what the rule sees of them), top to bottom; their memory is used again for the next."""
        held = torch.empty(len(self.changes) * min(self.rows, self.out_size) * self.in_size, dtype=self.dtype)
        own_N = self.thresholds_N if self.units_N is None else torch.ones_like(self.thresholds_N)
        for number, rows in enumerate(self._slices(self.rows)):
            entries_NbI = held[: len(self.changes) * (rows.stop - rows.start) * self.in_size].view(
                len(self.changes), -1, self.in_size
            )
            torch.bmm(self.b_NOR[:, rows], self.a_NRI, out=entries_NbI)
            generators = [generator_of(self.draw, place, number) for place in self.places] if self.draws else []
            yield rows, Block(entries_NbI, self.weights_N, own_N, generators, self.units_N, self.ceilings_N)

    def _slices(self, count: int) -> list[slice]:
        return [slice(start, min(start + count, self.out_size)) for start in range(0, self.out_size, count)]

    def _threshold(self, number: int, kept: int) -> Tensor:
        """The magnitude of the last entry kept, exactly: the `kept`-th largest.

        Of a large delta, a sample says between which two magnitudes it lies; one pass counts what is above them and picks out
        what is between, and so finds out whether the sample was right. If not, the two are moved apart.
        """
        change = self.changes[number]
        if change is None or not kept:
            return torch.zeros((), dtype=self.dtype)
        if self.out_size * self.in_size <= EXACT_ENTRIES:
            return _of_place((change[1] @ change[0]).abs().view(1, -1), kept)[0]
        share, apart = kept / (self.out_size * self.in_size), BRACKET
        a_RI, b_OR = change
        rows = _evenly((b_OR @ (a_RI @ a_RI.T) * b_OR).sum(1), SAMPLED[0])
        columns = _evenly((b_OR.T @ b_OR @ a_RI * a_RI).sum(0), SAMPLED[1])
        sample = (b_OR[rows] @ a_RI[:, columns]).abs().flatten().numpy()
        while True:
            upper, lower = (int((share + side) * len(sample)) for side in (-apart, apart))
            high = _largest(sample, upper) if upper > 0 else float("inf")
            low = _largest(sample, lower) if lower < len(sample) else 0.0
            above, between = self._count(change, low, high)
            place = above + len(between) - kept
            if above < kept and place >= 0:
                return torch.tensor(float(np.partition(between, place)[place]), dtype=self.dtype)
            apart *= 4.0

    def _count(self, change: tuple[Tensor, ...], low: float, high: float) -> tuple[int, Any]:
        """How many magnitudes are `high` at least, and those from `low` to below `high`."""
        count = max(1, COUNTED_ENTRIES // self.in_size)
        held = torch.empty(min(count, self.out_size), self.in_size, dtype=self.dtype)
        reached_L, inside_L = np.empty(held.numel(), dtype=bool), np.empty(held.numel(), dtype=bool)
        above, between = 0, []
        for rows in self._slices(count):
            sizes_bI = torch.mm(change[1][rows], change[0], out=held[: rows.stop - rows.start])
            sizes_L = sizes_bI.view(-1).numpy()  # numpy compares, counts and picks out several times as fast as torch
            np.abs(sizes_L, out=sizes_L)
            reached, inside = reached_L[: len(sizes_L)], inside_L[: len(sizes_L)]
            np.greater_equal(sizes_L, low, out=inside)
            above += int(np.count_nonzero(np.greater_equal(sizes_L, high, out=reached)))
            between.append(np.compress(np.logical_xor(reached, inside, out=inside), sizes_L))
        return above, np.concatenate(between)


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


def _largest(values_L: Any, place: int) -> float:
    """The value at `place` from the largest on, of what need not be in order."""
    from_below = len(values_L) - 1 - place
    return float(np.partition(values_L, from_below)[from_below])


def _evenly(squares_L: Tensor, count: int) -> Tensor:
    """Places of `count` rows, or all, of which there are as many long ones and short ones as among all."""
    step = max(1.0, len(squares_L) / count)
    places = ((torch.arange(min(count, len(squares_L))) + 0.5) * step).long()
    return torch.from_numpy(np.argsort(squares_L.numpy()))[places]


def window(config: Any, entries: int) -> tuple[int, int]:
    """How many of the largest entries a rule drops, and up to which place by magnitude it keeps them, from that on; 0 and 0 for
    rules that go by no place. As mergekit counts them: what is kept comes before what is dropped."""
    if config.method not in ("ties", "breadcrumbs") or config.density >= 1.0 or not entries:
        return 0, 0
    kept = kept_entries(config.density, entries)
    above = min(int(config.outliers * entries), entries - kept) if config.method == "breadcrumbs" else 0
    return above, above + kept


def kept_entries(density: float, entries: int) -> int:
    """How many entries a density keeps: at least one, rounded down like mergekit and PEFT."""
    return min(entries, max(1, int(density * entries)))


def trimmed(block: Block) -> Tensor:
    """The entries with 0 for those below their member's threshold; takes the place of `entries_Nbl`."""
    entries_Nbl, keep = block.entries_Nbl, 1.0 - block.rounding
    shrunk = torch.ops.aten.hardshrink.out  # 0 up to there, entries as they are beyond
    if block.units_N is not None:
        return shrunk(entries_Nbl, keep, out=entries_Nbl)
    for entries_bl, threshold in zip(entries_Nbl, block.thresholds_N.tolist(), strict=True):
        shrunk(entries_bl, threshold * keep, out=entries_bl)
    return entries_Nbl


def elected_mean(block: Block, kept_Nbl: Tensor, scale: float, agreeing: Agreeing = "mean") -> Tensor:
    """TIES after its trimming: the sign with more weight, and `scale` times the weighted mean of the kept entries that have it,
    or their weighted sum.

    With S = sum_i w_i x_i and the elected sign e = sign S, y_i = max(e x_i, 0) is 0 for those that do not agree, and
    T = sum_i w_i y_i; both signs together are 2 T - |S|, and where |S| is but rounding of that, they weigh the same: zero.
    Members without weight were removed before. `kept_Nbl` is used up: every pass is made in place, so that a block stays in a
    core's cache.
    """
    weights_1N, kept_NL = block.weights_N[None].to(kept_Nbl.dtype), kept_Nbl.flatten(1)
    lengths_1N = scale * weights_1N if block.units_N is None else scale * weights_1N * block.units_N
    sum_1L = lengths_1N @ kept_NL
    elected_1L = sum_1L.sign()
    agreeing_NL = kept_NL.mul_(elected_1L).relu_()
    total_1L = lengths_1N @ agreeing_NL
    ahead_1L = sum_1L.abs_().mul_((1.0 + block.rounding) / (2.0 * block.rounding))
    elected_1L.mul_(torch.gt(ahead_1L, total_1L, out=ahead_1L))  # 1 or 0: a bool would take several times as long
    if agreeing == "mean":
        total_1L.div_((weights_1N @ agreeing_NL.sign_()).clamp_(min=torch.finfo(kept_NL.dtype).tiny))
    return total_1L.mul_(elected_1L).view(kept_Nbl.shape[1:])


def uniform_draws(block: Block) -> Tensor:
    """One number from [0, 1) for every entry, from each member's own generator."""
    shape, dtype = block.entries_Nbl.shape[1:], block.entries_Nbl.dtype
    return torch.stack([torch.rand(shape, generator=generator, dtype=dtype) for generator in block.generators])


def module_draw(rng_seed: int, module: str) -> int:
    """A module's own random number, the same on every machine and in any order of modules."""
    return int.from_bytes(hashlib.sha256(f"{rng_seed}/{module}".encode()).digest()[:6], "big")


def places_of(norms_N: Tensor) -> list[int]:
    """Whose random numbers a member gets: by the length of its change, so that neither order nor factoring matters."""
    return torch.argsort(torch.argsort(norms_N, stable=True)).tolist()


def generator_of(draw: int, place: int, block: int) -> torch.Generator:
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
