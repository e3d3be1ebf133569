"""`sce`: select where the members differ, calculate how much each counts there, erase who is of the other sign.

FuseChat (arXiv 2408.07990), as mergekit's `sce` works it out. With x_i the changes of one module and w_i the members' weights:

    v = sum_i w_i (x_i - m)^2,  m = sum_i w_i x_i        select the `density` of largest v among those that are not 0; at 1, all
    c_i = w_i |selected x_i|^2 / sum_j ...               calculate, once for the whole module
    e = sign(sum_i w_i x_i)                              erase the others: sum of c_i x_i / sum of c_i over sign x_i = e

In the papers w_i = 1/N. Here a member of weight two counts like two members, and one of weight zero was removed before. Where
both signs weigh the same, zero. Members that are all the same differ nowhere, and come back as they are without being asked.
But the rule is not continuous there, and cannot be: below a density of 1, what near twins agree on is what is not selected.

The floor of v and the lengths are those of a whole module: its rows are looked at several times, and never held together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from chrysalis_ray.config.merges import SceMerge
from chrysalis_ray.merge.elementwise import Block, Rule, RuledRows, kept_entries

DIGIT = 16  # bits of a number that are counted in one pass
BITS = {torch.float32: np.uint32, torch.float64: np.uint64}
FLOATS = {torch.float32: np.float32, torch.float64: np.float64}

Blocks = Callable[[], Iterator[Block]]


@dataclass(frozen=True)
class Selection:
    """Entries from the variance `floor` on, or all; and what each member counts there, together 1."""

    floor: float | None
    quiet: float  # a variance up to here is rounding
    counts_N: Tensor


def select_calculate_erase(config: SceMerge, block: Block) -> Tensor:
    """The rule on a block that is a whole module."""
    return agreeing_mean(config, selection(config, lambda: iter([block]), float((block.entries_Nbl**2).mean())), block)


def rule_of_rows(config: SceMerge, rows: RuledRows) -> Rule:
    """The rule for the rows of one dense module, all of which are looked at first."""
    mean_square = float((rows.norms_N**2).mean()) / (rows.out_size * rows.in_size)
    found = selection(config, lambda: (block for _, block in rows.entries()), mean_square)
    return lambda config, block: agreeing_mean(config, found, block)


def selection(config: SceMerge, blocks: Blocks, mean_square: float) -> Selection:
    """What is selected of a module. `mean_square` of its entries says what of a variance is rounding.

    Where no entry differs by more than that, all are selected: the members are the same.
    """
    first = next(blocks())
    quiet, floor = first.rounding**2 * mean_square, None
    if config.density < 1.0:
        found = largest_at(config.density, lambda: (variance(block, quiet) for block in blocks()))
        floor = found * (1.0 - first.rounding) if found else None
    energy_N = torch.zeros(len(first.weights_N), dtype=torch.float64)
    for block in blocks():
        squares_Nbl = block.entries_Nbl.square()
        if floor is not None:
            squares_Nbl *= variance(block, quiet) >= floor
        energy_N += squares_Nbl.flatten(1).sum(1)
    counts_N = first.weights_N.double() * energy_N
    return Selection(floor, quiet, counts_N / counts_N.sum().clamp(min=torch.finfo(torch.float64).tiny))


def variance(block: Block, quiet: float) -> Tensor:
    """The weighted variance of every entry between the members, [b, l]; 0 where it is no more than `quiet`."""
    weights_N = block.weights_N.to(block.entries_Nbl.dtype)
    mean_bl = torch.einsum("n,nbl->bl", weights_N, block.entries_Nbl)
    return torch.hardshrink(torch.einsum("n,nbl->bl", weights_N, (block.entries_Nbl - mean_bl).square_()), quiet)


def agreeing_mean(config: SceMerge, found: Selection, block: Block) -> Tensor:
    """Of selected entries the sign with more weight, and `scale` times the mean of those that have it, each by its count."""
    entries_Nbl = block.entries_Nbl
    if found.floor is not None:
        entries_Nbl = entries_Nbl * (variance(block, found.quiet) >= found.floor)
    weights_N, counts_N = block.weights_N.to(entries_Nbl.dtype), found.counts_N.to(entries_Nbl.dtype)
    tiny = torch.finfo(entries_Nbl.dtype).tiny
    sum_bl = torch.einsum("n,nbl->bl", weights_N, entries_Nbl)
    size_bl = torch.einsum("n,nbl->bl", weights_N, entries_Nbl.abs())
    elected_bl = torch.hardshrink(sum_bl / size_bl.clamp(min=tiny), block.rounding).sign_()
    agrees_Nbl = (entries_Nbl * elected_bl > 0.0).to(entries_Nbl.dtype)
    total_bl = torch.einsum("n,nbl->bl", counts_N, entries_Nbl * agrees_Nbl)
    return config.scale * total_bl / torch.einsum("n,nbl->bl", counts_N, agrees_Nbl).clamp(min=tiny)


def largest_at(density: float, parts: Callable[[], Iterator[Tensor]]) -> float:
    """The value down to which `density` of all that are above 0 are kept, exactly; 0 where none is above. None may be below.

    Such numbers are in the order of their bits. So the highest `DIGIT` bits of all are counted, which tells those of the value;
    then the next ones of the numbers that begin so: two passes for fp32, four for fp64, whatever is in between, and nothing is
    held (a radix selection).
    """
    dtype = next(parts()).dtype
    begins, kept = 0, None
    for shift in range(np.dtype(BITS[dtype]).itemsize * 8 - DIGIT, -1, -DIGIT):
        counts = np.zeros(1 << DIGIT, dtype=np.int64)
        for part in parts():
            bits = part.contiguous().view(-1).numpy().view(BITS[dtype])
            counts += _digits(bits, shift, None if kept is None else begins)
        if kept is None:
            kept = kept_entries(density, int(counts[1:].sum()))
            if not kept:
                return 0.0
        from_above = counts[::-1].cumsum()
        place = int(np.searchsorted(from_above, kept))
        kept -= int(from_above[place] - counts[::-1][place])
        begins = (begins << DIGIT) | (len(counts) - 1 - place)
    return float(np.array([begins], dtype=BITS[dtype]).view(FLOATS[dtype])[0])


def _digits(bits: np.ndarray, shift: int, begins: int | None) -> np.ndarray:
    """How often each digit occurs above the last `shift` bits, among numbers whose bits before it are `begins`."""
    shifted = bits >> bits.dtype.type(shift)
    if begins is not None:
        shifted = shifted[(shifted >> bits.dtype.type(DIGIT)) == bits.dtype.type(begins)]
    return np.bincount((shifted & bits.dtype.type((1 << DIGIT) - 1)).astype(np.int64), minlength=1 << DIGIT)
