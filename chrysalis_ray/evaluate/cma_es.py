"""CMA-ES: a search that learns from ranks alone in which directions to look.

Hansen 2016, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772, with weights of the better half only.

A state is plain numbers; what a generation asks for is a function of the state and a random seed, so that a search that was
killed goes on as if nothing had been. n dimensions, L candidates of a generation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SearchState:
    """Between two generations: the mean [n] and step size of the normal that candidates are drawn from, its covariance [n, n],
    and the two evolution paths [n]."""

    generation: int
    mean: tuple[float, ...]
    step: float
    covariance: tuple[tuple[float, ...], ...]
    step_path: tuple[float, ...]
    covariance_path: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> SearchState:
        return SearchState(
            int(value["generation"]), _numbers(value["mean"]), float(value["step"]),
            tuple(_numbers(row) for row in value["covariance"]), _numbers(value["step_path"]),
            _numbers(value["covariance_path"]),
        )  # fmt: skip


def start_state(mean: Sequence[float], step: float) -> SearchState:
    """Before the first generation: the same in all directions."""
    size = len(mean)
    unit = tuple(tuple(float(row == column) for column in range(size)) for row in range(size))
    return SearchState(0, _numbers(mean), float(step), unit, (0.0,) * size, (0.0,) * size)


def candidates_of_a_generation(dimensions: int) -> int:
    """L = 4 + floor(3 ln n)."""
    return 4 + math.floor(3.0 * math.log(dimensions))


def ask(state: SearchState, rng_seed: int) -> list[list[float]]:
    """The candidates of the state's generation, L points of n numbers: mean + step C^(1/2) z."""
    size = len(state.mean)
    rng = np.random.default_rng([rng_seed, state.generation])
    z_Ln = rng.standard_normal((candidates_of_a_generation(size), size))
    root_nn, _ = _roots(state)
    return (np.asarray(state.mean) + state.step * z_Ln @ root_nn.T).tolist()


def tell(state: SearchState, points: Sequence[Sequence[float]], losses: Sequence[float]) -> SearchState:
    """The next state, by the ranks of the candidates' losses, lower is better; equations (5) to (34) of the tutorial."""
    size, count = len(state.mean), len(points)
    raw = math.log((count + 1) / 2) - np.log(np.arange(1, count // 2 + 1))
    weights = raw / raw.sum()
    effective = 1.0 / float((weights**2).sum())
    step_rate = (effective + 2) / (size + effective + 5)
    damping = 1 + 2 * max(0.0, math.sqrt((effective - 1) / (size + 1)) - 1) + step_rate
    path_rate = (4 + effective / size) / (size + 4 + 2 * effective / size)
    one_rate = 2 / ((size + 1.3) ** 2 + effective)
    many_rate = min(1 - one_rate, 2 * (0.25 + effective + 1 / effective - 2) / ((size + 2) ** 2 + effective))
    expected_length = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))

    best = np.argsort(np.asarray(losses), kind="stable")[: len(weights)]
    steps = (np.asarray(points)[best] - np.asarray(state.mean)) / state.step
    move = weights @ steps
    _, inverse_root = _roots(state)
    step_path = (1 - step_rate) * np.asarray(state.step_path)
    step_path = step_path + math.sqrt(step_rate * (2 - step_rate) * effective) * (inverse_root @ move)
    length = float(np.linalg.norm(step_path))
    settled = 1 - (1 - step_rate) ** (2 * (state.generation + 1))
    goes_on = length / math.sqrt(settled) < (1.4 + 2 / (size + 1)) * expected_length
    path = (1 - path_rate) * np.asarray(state.covariance_path)
    path = path + goes_on * math.sqrt(path_rate * (2 - path_rate) * effective) * move
    kept = 1 - one_rate - many_rate + (0.0 if goes_on else one_rate * path_rate * (2 - path_rate))
    covariance = (
        kept * np.asarray(state.covariance)
        + one_rate * np.outer(path, path)
        + many_rate * np.einsum("k,ki,kj->ij", weights, steps, steps)
    )
    covariance = (covariance + covariance.T) / 2
    step = state.step * math.exp(min(1.0, step_rate / damping * (length / expected_length - 1)))
    return SearchState(
        state.generation + 1, _numbers(np.asarray(state.mean) + state.step * move), step,
        tuple(_numbers(row) for row in covariance), _numbers(step_path), _numbers(path),
    )  # fmt: skip


def _roots(state: SearchState) -> tuple[Array, Array]:
    """C^(1/2) and C^(-1/2); eigenvalues that rounding made negative are taken for the smallest that counts."""
    values, vectors = np.linalg.eigh(np.asarray(state.covariance))
    lengths = np.sqrt(np.maximum(values, 1e-14 * values[-1]))
    return (vectors * lengths) @ vectors.T, (vectors / lengths) @ vectors.T


def _numbers(row: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in row)
