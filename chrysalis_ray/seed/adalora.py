"""AdaLoRA (arXiv 2303.10512) by peft's own allocator: singular values are taken away where they matter least.

    delta = alpha / (rank + 1e-5) * B diag(E) A

What it remembers of gradients is part of a seed, under ``running/``: averages of every number's importance and of how uncertain
that is, and which singular values of a module were kept. What is left of a variant is a plain LoRA of the ranks that are left,
module by module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.patterns import Patterns
from chrysalis_ray.core.records import Hyperparameters
from chrysalis_ray.seed.adapter import AdapterWeights

RUNNING = "running/"
PEFTS_EPSILON = 1e-5  # peft divides by the rank and this
END = ".default"  # of the names that peft's allocator knows parameters by


class Allocation:
    """The budget of one adapter that is worn; `tuner` is peft's AdaLoraModel."""

    def __init__(self, tuner: Any) -> None:
        self._tuner = tuner
        self._config: Any = tuner.peft_config[END.removeprefix(".")]
        for name, number in tuner.model.named_parameters():
            if name.endswith(f".ranknum{END}"):  # peft means to keep it, but trains it on a base that is not fp32
                number.requires_grad_(False)

    def penalty(self) -> Tensor:
        """What peft adds to the loss of a step: how far A and B are from orthogonal rows and columns, on average."""
        apart = []
        for name, matrix in self._tuner.model.named_parameters():
            if name.endswith((f".lora_A{END}", f".lora_B{END}")):
                product = matrix @ matrix.T if ".lora_A" in name else matrix.T @ matrix
                apart.append(torch.linalg.matrix_norm(product - torch.eye(len(product), out=torch.empty_like(product))))
        return self._config.orth_reg_weight * torch.stack(apart).mean()

    def allocate(self, step: int) -> None:
        """After optimizer step number `step`, counted from 0, while its gradient is there.

        Where the step that settles the ranks was skipped, since its gradient was not finite, the next one settles them.
        """
        last = self._config.total_step - self._config.tfinal
        if step > last and self._tuner.rankallocator.exp_avg_ipt:
            step = last
        self._tuner.update_and_allocate(step)

    def running(self) -> dict[str, Tensor]:
        """All that the next step will ask for, by name."""
        allocator = self._tuner.rankallocator
        told = {f"importance.{name.removesuffix(END)}": tensor for name, tensor in allocator.exp_avg_ipt.items()}
        told |= {f"uncertainty.{name.removesuffix(END)}": tensor for name, tensor in allocator.exp_avg_unc.items()}
        kept = self._config.rank_pattern or {}
        return told | {f"kept.{name.removesuffix(END)}": torch.tensor(values).float() for name, values in kept.items()}

    def recall(self, running: Mapping[str, Tensor]) -> None:
        """Go on from what `running` gave. Raises ModelError for what is not of this adapter."""
        known = {name.removesuffix(END): (name, p) for name, p in self._tuner.model.named_parameters() if ".lora_" in name}
        allocator, kept = self._tuner.rankallocator, {}
        for key, tensor in running.items():
            what, _, short = key.partition(".")
            name, like = known.get(short, ("", torch.empty(0)))
            if what == "kept" and tensor.shape == like.shape[:1] and ".lora_E" in name:
                kept[name] = tensor.bool().tolist()
            elif what in ("importance", "uncertainty") and tensor.shape == like.shape:
                average = allocator.exp_avg_ipt if what == "importance" else allocator.exp_avg_unc
                average[name] = tensor.to(like).clone()
                allocator.ipt[name] = torch.zeros_like(average[name])
            else:
                raise ModelError(f"a seed remembers {key!r}, which this adapter does not have", "use a seed of this run")
        self._config.rank_pattern = kept or None


def plain_adapter(tensors: Mapping[str, Tensor], own: Hyperparameters, zero: AdapterWeights) -> AdapterWeights:
    """The adapter in the tensors of a seed as a plain LoRA: E goes into A, and what it makes zero is left out. A module of
    which nothing is left has one row of zeros."""
    scale = own.alpha / (own.rank + PEFTS_EPSILON)
    factors, ranks = {}, {}
    ends = [name for name in tensors if name.startswith("weight/") and name.endswith(".lora_E")]
    for module in (name.removeprefix("weight/").removesuffix(".lora_E") for name in ends):
        a_ri, e_r1, b_or = (tensors[f"weight/{module}.lora_{part}"].float() for part in "AEB")
        left = e_r1[:, 0] != 0.0
        left[0] |= not left.any()
        factors[module] = ((a_ri * e_r1)[left].contiguous(), b_or[:, left].contiguous())
        ranks[module] = int(left.sum())
    largest = max(ranks.values())
    apart = {module: rank for module, rank in ranks.items() if rank != largest}
    patterns = Patterns(apart, {module: scale * rank for module, rank in apart.items()})
    return replace(zero, rank=largest, alpha=scale * largest, use_rslora=False, factors=factors, patterns=patterns)
