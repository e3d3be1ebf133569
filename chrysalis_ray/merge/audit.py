"""What a cohort of adapters looks like before it is merged, and what that means for each kind of merge.

All of it is read off the core of every module, one at a time: the angles between the changes, how many directions each really
uses, whether signs agree more often than coins would, how much of the mean fits into a rank. The regimes are those of
"Initialisation Sets the Conditioning of LoRA Merging" (2026): adapters that were branched from one A share their input
directions and average well, but methods that solve for the merge (RegMean, WUDI) are ill-conditioned there.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chrysalis_ray.config.merges import ConsensusMerge
from chrysalis_ray.merge.consensus import agreed_mean, consensus_summary
from chrysalis_ray.merge.core_space import NULL, check_module, core_space
from chrysalis_ray.merge.geometric_median import robust_weights
from chrysalis_ray.merge.gram import Adapter, cosines

COLLAPSED, SEPARATED = 0.9, 0.5  # median principal cosine of the input directions
ILL = 1e4  # a condition number from which a solve loses what an adapter's own noise is worth
SAME = 1e-5  # of their length: two changes nearer than that are one
UNEVEN = 3.0
ALIKE = 0.9
LITTLE = 0.9
CHANCE = 1.25  # times the agreement of independent members: below, there is none to speak of


@dataclass(frozen=True)
class Cohort:
    """`gram_NN` of the changes; per member effective rank (energy-weighted mean of exp(entropy) over modules), modules, rank.

    `principal_cosine` is the median over modules, pairs and directions; `condition` the median over modules of that of
    sum_i C_i^T C_i / |C_i|^2; `kept` the energy of the exact mean that the largest rank holds; `agreement` what `consensus`
    tells.
    """

    gram_NN: Tensor
    effective_ranks: list[float]
    ranks: list[int]
    modules: list[int]
    all_modules: int
    principal_cosine: float
    condition: float
    kept: float
    agreement: dict[str, float]


def look_at(members: Sequence[Adapter], scales: Sequence[float], anchor: Adapter | None, anchor_scale: float) -> Cohort:
    """Every module's core once. Raises MergeError for adapters that do not fit together."""
    names = sorted({module for member in members for module in member} | set(anchor or {}))
    count = len(members)
    ranks = [0] * count
    gram_NN = torch.zeros(count, count, dtype=torch.float64)
    used_N = torch.zeros(count, dtype=torch.float64)
    angles: list[float] = []
    conditions: list[float] = []
    tallies: Counter[str] = Counter()
    mean_spectra: list[Tensor] = []
    for module in names:
        blocks, seed = [member.get(module) for member in members], anchor.get(module) if anchor else None
        check_module(module, [*blocks, seed])
        space = core_space(blocks, scales, seed, anchor_scale)
        flat = space.increments_NPQ.flatten(1)
        gram_NN += flat @ flat.T
        spectra_Nk = torch.linalg.svdvals(space.increments_NPQ)
        used_N += (spectra_Nk**2).sum(1) * effective_rank(spectra_Nk)
        ranks = [max(rank, len(block[0]) if block else 0) for rank, block in zip(ranks, blocks, strict=True)]
        angles += principal_cosines(space.increments_NPQ)
        conditions += [condition] if (condition := condition_of(space.increments_NPQ)) else []
        even_N = torch.full((count,), 1.0 / count, dtype=torch.float64)
        tallies.update(agreed_mean(ConsensusMerge(method="consensus"), even_N, space.increments_NPQ)[1])
        mean_spectra.append(torch.linalg.svdvals(space.anchor_PQ + space.increments_NPQ.mean(0)) ** 2)
    energy = math.fsum(float(spectrum.sum()) for spectrum in mean_spectra)
    held = math.fsum(float(spectrum[: max(ranks)].sum()) for spectrum in mean_spectra)
    effective_N = used_N / gram_NN.diagonal().clamp(min=torch.finfo(torch.float64).tiny)
    return Cohort(
        gram_NN, effective_N.tolist(), ranks, [len(member) for member in members], len(names),
        statistics.median(angles) if angles else 0.0, statistics.median(conditions) if conditions else 1.0,
        held / energy if energy else 1.0, consensus_summary(count, tallies),
    )  # fmt: skip


def effective_rank(spectra_Nk: Tensor) -> Tensor:
    """exp of the entropy of the squared singular values' shares, [N]: r for r equal directions, 0 where nothing changed."""
    power_Nk = spectra_Nk**2
    total_N = power_Nk.sum(1, keepdim=True)
    shares_Nk = power_Nk / total_N.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(total_N[:, 0] > 0, torch.exp(torch.special.entr(shares_Nk).sum(1)), 0.0)


def principal_cosines(increments_NPQ: Tensor) -> list[float]:
    """Cosines of the principal angles between the row spaces (input directions) of every two members' changes."""
    spaces = []
    for increment_PQ in increments_NPQ:
        _, values, right_t = torch.linalg.svd(increment_PQ, full_matrices=False)
        spaces.append(right_t[values > 1e-6 * values[:1].sum()])
    found: list[float] = []
    for one in range(len(spaces)):
        for two in range(one):
            if len(spaces[one]) and len(spaces[two]):
                found += torch.linalg.svdvals(spaces[one] @ spaces[two].T).clamp(max=1.0).tolist()
    return found


def condition_of(increments_NPQ: Tensor) -> float | None:
    """Largest over smallest eigenvalue (of those that are not null) of sum_i C_i^T C_i / |C_i|^2: what a solve divides by."""
    norms_N = torch.linalg.matrix_norm(increments_NPQ)
    stacked = (increments_NPQ[norms_N > 0] / norms_N[norms_N > 0, None, None]).flatten(0, 1)
    values = torch.linalg.svdvals(stacked) if stacked.numel() else stacked.new_zeros(0)
    heard = values[values > math.sqrt(NULL) * values[:1].sum()]
    return float((heard[0] / heard[-1]) ** 2) if len(heard) else None


def findings(cohort: Cohort, names: Sequence[str], anchored: bool) -> list[str]:
    """What a person should know before merging, each in a sentence with its numbers."""
    count = len(names)
    if count < 2:
        return ["one adapter: every merge returns it as it is"]
    cosine_NN = cosines(cohort.gram_NN)
    pairs = [(float(cosine_NN[i, j]), i, j) for i in range(count) for j in range(i)]
    mean_cosine = math.fsum(pair[0] for pair in pairs) / len(pairs)
    norms = cohort.gram_NN.diagonal().clamp(min=0.0).sqrt().tolist()
    told = [_regime(cohort), *_agreement(cohort, mean_cosine)]
    for _, i, j in pairs:
        apart = float((cohort.gram_NN[i, i] + cohort.gram_NN[j, j] - 2 * cohort.gram_NN[i, j]).clamp(min=0.0).sqrt())
        if norms[i] and apart <= SAME * norms[i]:
            told.append(f"{names[j]} and {names[i]} are the same change: together they count twice in every merge")
    told += [f"{names[n]} did not change: it draws every mean towards the seed" for n in range(count) if not norms[n]]
    if not anchored and mean_cosine > ALIKE:
        told.append(
            f"seen from the base the adapters look alike (mean cosine {mean_cosine:.2f}): if they were branched from a trained "
            "adapter, give it as --seed-adapter, or agreement and outliers say nothing"
        )
    told += [f"outlier: {names[n]}: {reason}; use consensus, or --set weights=robust"
             for n, reason in robust_weights(cohort.gram_NN, None)[1].items()]  # fmt: skip
    moved = [norm for norm in norms if norm]
    if moved and max(moved) > UNEVEN * min(moved):
        told.append(
            f"the largest change ({names[norms.index(max(moved))]}) is {max(moved) / min(moved):.1f} times as long as the "
            "smallest: a mean is mostly its; give --weights, or --set weights=geometric_median"
        )
    told += [f"{name} lacks {cohort.all_modules - own} of {cohort.all_modules} modules; they count as zero"
             for name, own in zip(names, cohort.modules, strict=True) if own < cohort.all_modules]  # fmt: skip
    if cohort.kept < LITTLE:
        told.append(
            f"an adapter of rank {max(cohort.ranks)} holds only {cohort.kept:.0%} of the exact mean: use a larger --rank, or "
            "`--rank exact`"
        )
    return told


def _regime(cohort: Cohort) -> str:
    seen = f"median principal cosine of the input directions {cohort.principal_cosine:.2f}"
    if cohort.principal_cosine > COLLAPSED:
        ill = f"; methods that solve for the merge (RegMean, WUDI) would need a strong ridge, condition {cohort.condition:.1e}"
        return f"one cohort ({seen}): averages lose little to the rank{ill if cohort.condition > ILL else ''}"
    if cohort.principal_cosine < SEPARATED:
        return f"separate adapters ({seen}): a mean makes each of them weaker; tsv or task_arithmetic keep their lengths"
    return f"partly shared directions ({seen})"


def unanimous_by_chance(members: int) -> float:
    """The share of the mean's energy that lies where all signs agree, if members are independent normal numbers.

    2^(1-N) of the coefficients, each with E (sum_i |x_i|)^2 = N + N (N-1) 2/pi against E (sum_i x_i)^2 = N.
    """
    return 2.0 ** (1 - members) * (1.0 + (members - 1) * 2.0 / math.pi)


def _agreement(cohort: Cohort, mean_cosine: float) -> list[str]:
    if "sign_agreement_energy" not in cohort.agreement:
        return ["nothing changed from the seed: there is nothing to merge"]
    seen, chance = cohort.agreement["sign_agreement_energy"], unanimous_by_chance(len(cohort.ranks))
    survived = cohort.agreement["survived_energy"]
    told = f"{seen:.0%} of the mean's energy lies where all signs agree, {chance:.0%} by chance; mean cosine {mean_cosine:+.2f}"
    if seen < CHANCE * chance:
        return [
            f"{told}: hardly more agreement than coins have; what consensus keeps ({survived:.0%}) is then no consensus, and "
            "model_stock returns nearly to the seed"
        ]
    return [f"{told}; consensus would keep {survived:.0%}"]
