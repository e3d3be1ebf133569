"""A cohort of adapters as a map: where their changes lie, seen from the seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def population_map(gram_NN: Tensor) -> dict[str, Any]:
    """Points [N] in the plane that shows most of the changes with this Gram matrix, the seed at (0, 0), and the share of their
    energy that it shows. Lengths are those of the changes (Frobenius); signs make the largest of each axis positive.
    """
    values, vectors_NN = torch.linalg.eigh(gram_NN.double())
    axes = []
    for place in (-1, -2):
        if len(values) >= -place:
            axis_N = vectors_NN[:, place] * values[place].clamp(min=0.0).sqrt()
            axes.append(axis_N * torch.sign(axis_N[axis_N.abs().argmax()]))
        else:
            axes.append(torch.zeros(len(values), dtype=torch.float64))
    energy = float(values.clamp(min=0.0).sum())
    shown = float(values[-2:].clamp(min=0.0).sum())
    return {
        "x": [round(float(value), 6) for value in axes[0]],
        "y": [round(float(value), 6) for value in axes[1]],
        "share": shown / energy if energy else 1.0,
    }
