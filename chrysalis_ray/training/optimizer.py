"""Every variant its own optimizer, schedule and clip, over its own row of the bank.

Nothing here looks at two rows at once: a global norm, a loss scaler or a shared overflow flag would couple variants.

Any class of torch.optim will do that treats every number of a row alike; the row is then one parameter, or two where A and B
learn at different rates. Muon and Adafactor see matrices, LBFGS needs the loss again, and Rprop's steps know no schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from chrysalis_ray.core.records import MOMENTS, Hyperparameters
from chrysalis_ray.training.adam import FUSED
from chrysalis_ray.training.bank import ALIGNMENT

EVICT_AFTER = 3  # non-finite steps in a row


class Recipe(NamedTuple):
    """A stock optimizer, its settings beside learning rate and weight decay, and what it counts beside its steps."""

    make: Callable[..., torch.optim.Optimizer]
    settings: Callable[[Hyperparameters], dict[str, Any]]
    scalars: tuple[str, ...] = ()


def _averages(of: Hyperparameters) -> dict[str, Any]:
    return {"betas": (of.beta1, of.beta2), "eps": of.epsilon}


RECIPES: dict[str, Recipe] = {
    "adamw": Recipe(torch.optim.AdamW, _averages),  # arXiv 1711.05101
    "adam": Recipe(torch.optim.Adam, _averages),  # arXiv 1412.6980
    "nadam": Recipe(torch.optim.NAdam, _averages, ("mu_product",)),
    "radam": Recipe(torch.optim.RAdam, _averages),  # arXiv 1908.03265
    "adamax": Recipe(torch.optim.Adamax, _averages),  # arXiv 1412.6980
    "adagrad": Recipe(torch.optim.Adagrad, lambda of: {"eps": of.epsilon}),
    "adadelta": Recipe(torch.optim.Adadelta, lambda of: {"rho": of.beta2, "eps": of.epsilon}),  # arXiv 1212.5701
    "rmsprop": Recipe(torch.optim.RMSprop, lambda of: {"alpha": of.beta2, "eps": of.epsilon}),
    "sgd": Recipe(torch.optim.SGD, lambda of: {"momentum": of.momentum}),
}


class SlotOptimizer:
    """A stock torch optimizer over one row of the bank: one parameter, or one for A and one for B, which begins at `first_b`.
    Without a gradient it only counts the steps that another worker makes.

    B learns `plus_ratio` times as fast as A (LoRA+, arXiv 2402.12354). With `freeze_a` only B is a parameter, and neither
    the gradient nor weight decay moves A (LoRA-FA, arXiv 2308.03303).
    """

    def __init__(self, hyperparameters: Hyperparameters, row_P: Tensor, gradient_P: Tensor | None, first_b: int) -> None:
        self.updates = 0  # optimizer steps less the skipped ones; it sets the bias correction of moments
        self.gradient_P = gradient_P
        self._row_P, self._first_b = row_P, first_b
        self._build(hyperparameters)

    def _build(self, hyperparameters: Hyperparameters) -> None:
        self.kind = hyperparameters.optimizer
        self._segments = segments(hyperparameters, self._first_b, len(self._row_P))
        self._parameters = [nn.Parameter(self._row_P[part]) for part in self._segments]
        for parameter, part in zip(self._parameters, self._segments, strict=True):
            parameter.grad = None if self.gradient_P is None else self.gradient_P[part]
        groups = [{"params": [parameter]} for parameter in self._parameters]
        make = FUSED.get(self.kind, RECIPES[self.kind].make)
        self._torch: Any = make(groups, lr=hyperparameters.learning_rate)
        self._set(hyperparameters)

    def _set(self, hyperparameters: Hyperparameters) -> None:
        settings = RECIPES[self.kind].settings(hyperparameters)
        for group in self._torch.param_groups:
            group.update(weight_decay=hyperparameters.weight_decay, **settings)
        ratio = hyperparameters.plus_ratio
        self._factors = [ratio if part.start == self._first_b else 1.0 for part in self._segments]

    def configure(self, hyperparameters: Hyperparameters) -> None:
        """Take other hyperparameters from the next step on; the moments stay, if they are of the same class."""
        known = segments(hyperparameters, self._first_b, len(self._row_P)) == self._segments
        if hyperparameters.optimizer == self.kind and known:
            return self._set(hyperparameters)
        kind, moments, scalars, updates = self.kind, self.moments(), self.scalars(), self.updates
        self.updates = 0
        self._build(hyperparameters)
        if kind == self.kind:
            self.restore(moments, scalars, updates)
        return None

    def move(self, row_P: Tensor, gradient_P: Tensor | None) -> None:
        """Go on with another row, into which the caller has put the weights."""
        self._row_P, self.gradient_P = row_P, gradient_P
        for parameter, part in zip(self._parameters, self._segments, strict=True):
            parameter.data, parameter.grad = row_P[part], None if gradient_P is None else gradient_P[part]

    def step(self, learning_rate: float) -> None:
        for group, factor in zip(self._torch.param_groups, self._factors, strict=True):
            group["lr"] = learning_rate * factor
        self._torch.step()
        self.updates += 1

    def follow(self) -> None:
        """A step that another worker makes: it sends the moved row, and keeps the moments."""
        self.updates += 1

    def moments(self) -> dict[str, Tensor]:
        """What the class remembers of every number (`MOMENTS`), row-shaped; empty before the first update.

        Those of a frozen A are zero.
        """
        if not self.updates:
            return {}
        states = [self._torch.state[parameter] for parameter in self._parameters]
        names = [name for name in MOMENTS[self.kind] if all(state.get(name) is not None for state in states)]
        if len(states) == 1 and len(self._parameters[0]) == len(self._row_P):
            return {name: states[0][name] for name in names}
        rows = {name: torch.zeros_like(self._row_P) for name in names}
        for name, row_P in rows.items():
            for state, part in zip(states, self._segments, strict=True):
                row_P[part] = state[name]
        return rows

    def scalars(self) -> dict[str, float]:
        """What the class counts beside its updates; the same for A and B."""
        state = self._torch.state[self._parameters[-1]] if self.updates else {}
        return {name: float(state[name]) for name in RECIPES[self.kind].scalars if name in state}

    def restore(self, moments: Mapping[str, Tensor], scalars: Mapping[str, float], updates: int) -> None:
        """Take over what an optimizer of the same class remembered after `updates` updates. The tensors become its own."""
        if not updates:
            return
        device = self._row_P.device if self.kind in FUSED else torch.device("cpu")
        counts = {"step": float(updates), **scalars}
        for parameter, part in zip(self._parameters, self._segments, strict=True):
            counted = {name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in counts.items()}
            self._torch.state[parameter] = {**counted, **{name: row_P[part] for name, row_P in moments.items()}}
        self.updates = updates


def segments(hyperparameters: Hyperparameters, first_b: int, size: int) -> list[slice]:
    """The parts of a row that are parameters of their own."""
    if hyperparameters.freeze_a:
        return [slice(first_b, size)]
    if hyperparameters.plus_ratio != 1.0:
        return [slice(0, first_b), slice(first_b, size)]
    return [slice(0, size)]


def drop_frozen(gradient_NP: Tensor, first_b: int, frozen: Sequence[bool]) -> None:
    """Forget the gradients of every A that is frozen, so that neither its norm nor its clip counts them."""
    for row, is_frozen in enumerate(frozen):
        if is_frozen:
            gradient_NP[row, :first_b] = 0.0


def slot_norms(gradient_NP: Tensor) -> Tensor:
    """Gradient norm of every row, fp64 [N]: norms of short pieces, then the norm of those, so that fp32 rows lose nothing.

    Each row is reduced by itself; what stands beside it does not touch its bits.
    """
    pieces = torch.linalg.vector_norm(gradient_NP.unflatten(1, (-1, ALIGNMENT)), dim=2)
    return torch.linalg.vector_norm(pieces.to(torch.float64), dim=1)


def clip_slots(gradient_NP: Tensor, norms_N: Tensor, clips: Sequence[float]) -> None:
    """Scale every row to its own maximum norm (0: no maximum), as `clip_grad_norm_` does for a model trained alone."""
    limit_N = torch.tensor([clip or math.inf for clip in clips], dtype=norms_N.dtype, device=norms_N.device)
    factor_N = (limit_N / (norms_N + 1e-6)).clamp(max=1.0)
    gradient_NP.mul_(factor_N.to(gradient_NP.dtype)[:, None])
