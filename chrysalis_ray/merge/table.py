"""The merge methods: one line each. A new method is a file, a config class in `config/merges.py` and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from chrysalis_ray.merge.breadcrumbs import breadcrumbs
from chrysalis_ray.merge.consensus import agreed_mean, consensus_summary
from chrysalis_ray.merge.dare import dare
from chrysalis_ray.merge.della import della
from chrysalis_ray.merge.elementwise import Rule, RuledRows, rule_summary
from chrysalis_ray.merge.ensemble import weighted_mean
from chrysalis_ray.merge.isotropic import evened_mean
from chrysalis_ray.merge.linear import Count, summed
from chrysalis_ray.merge.model_stock import stock_counts
from chrysalis_ray.merge.regmean import nearest_outputs, regmean_summary
from chrysalis_ray.merge.sce import rule_of_rows, select_calculate_erase
from chrysalis_ray.merge.slerp import spherical_counts
from chrysalis_ray.merge.tall import consensus_mask
from chrysalis_ray.merge.task_arithmetic import scaled_counts
from chrysalis_ray.merge.ties import ties
from chrysalis_ray.merge.tsv import orthogonalised_sum
from chrysalis_ray.merge.wudi import least_interference

# (config, weights [N], increments of one module's core [N, P, Q]) -> one core [P, Q], and tallies that add up over modules
Combine = Callable[[Any, Tensor, Tensor], tuple[Tensor, Mapping[str, float]]]

# Weighted sums of the deltas, which need no core: see `linear`.
AS_A_SUM: dict[str, Count] = {
    "winner": weighted_mean,
    "ensemble": weighted_mean,
    "task_arithmetic": scaled_counts,
    "slerp": spherical_counts,
    "model_stock": stock_counts,
}

IN_THE_CORE: dict[str, Combine] = {
    **{method: summed(count) for method, count in AS_A_SUM.items()},
    "consensus": agreed_mean,
    "tsv": orthogonalised_sum,
    "isotropic": evened_mean,
    "wudi": least_interference,
}

BY_ENTRY: dict[str, Rule] = {
    "ties": ties,
    "dare": dare,
    "della": della,
    "breadcrumbs": breadcrumbs,
    "tall": consensus_mask,
    "sce": select_calculate_erase,
}

# rules that look at all rows of a dense module before they rule on any
AFTER_A_LOOK: dict[str, Callable[[Any, RuledRows], Rule]] = {"sce": rule_of_rows}

# like Combine, and with every member's E[x x^T] of the module's inputs in the core [N, Q, Q]
BY_INPUTS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Mapping[str, float]]]] = {
    "regmean": nearest_outputs,
}

SOLVED = ("wudi", "regmean")  # solve for the merge, which can come out tens of times too long

# (members, tallies of all modules) -> what a method has to tell beyond weights and residual
SUMMARIES: dict[str, Callable[[int, Mapping[str, float]], dict[str, float]]] = {
    "consensus": consensus_summary,
    "regmean": regmean_summary,
    "ties": rule_summary,
    "dare": rule_summary,
    "della": rule_summary,
    "breadcrumbs": rule_summary,
    "tall": rule_summary,
    "sce": rule_summary,
}
