"""The learning rate of every optimizer step, as transformers' ``get_*_schedule`` give it: one pure function.

    constant   the peak               (get_constant_schedule_with_warmup)
    linear     down to the floor      (get_linear_schedule_with_warmup, get_polynomial_decay_schedule_with_warmup)
    cosine     down to the floor      (get_cosine_schedule_with_warmup, get_cosine_with_min_lr_schedule_with_warmup)
    wsd        warmup, then the peak, then a cosine down to the floor over the last `decay_fraction` of all steps
               (get_wsd_schedule; MiniCPM, arXiv 2404.06395)

The floor is `final_fraction` of the peak. One thing differs: the warmup of transformers starts at zero, so that its first
step moves nothing; here step s warms up as step s + 1 there.
"""

from __future__ import annotations

import math

from chrysalis_ray.core.records import Hyperparameters


def learning_rate_at(hyperparameters: Hyperparameters, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`: linear warmup, then what `decay` says.

    Warmup reaches the peak at its last step; decay would reach the floor at step `total_steps`, and stays there.
    """
    peak, floor = hyperparameters.learning_rate, hyperparameters.final_fraction
    warmup = round(hyperparameters.warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if hyperparameters.decay == "constant":
        return peak
    start = warmup
    if hyperparameters.decay == "wsd":
        start = max(warmup, total_steps - round(hyperparameters.decay_fraction * total_steps))
    progress = min(1.0, max(0, step - start) / max(1, total_steps - start))
    if hyperparameters.decay == "linear":
        return peak * (floor + (1.0 - floor) * (1.0 - progress))
    if hyperparameters.decay in ("cosine", "wsd"):
        return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"decay {hyperparameters.decay!r} is none of constant, linear, cosine, wsd")
