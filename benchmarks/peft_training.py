"""The baseline's training of one variant, as anyone would write it: transformers, PEFT, one model per process.

It reads the same files as the population does (base, adapter zero, token store, `variant.json`), draws the same rows through
the same mix and follows the same schedule, so that both sides do the same work and must come to the same losses. It knows
neither Ray nor the packed bank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from setting import Setting
from torch import Tensor

from chrysalis_ray.core.records import Variant
from chrysalis_ray.evaluate.heldout import heldout_rows
from chrysalis_ray.genome.mix import plan_of
from chrysalis_ray.genome.tokens import TokenStore, open_tokens
from chrysalis_ray.training.schedules import learning_rate_at

EVALUATION_ROWS = 8  # in one pass


@dataclass
class Clock:
    """Seconds of one variant: optimizer steps alone, held-out passes alone, and when the first step began (Unix time)."""

    training_began: float = 0.0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    steps: int = 0


def train_variant(variant: Variant, setting: Setting, on_report: Callable[[dict[str, Any], Any], None]) -> Clock:
    """Train one variant to its end, calling `on_report(metrics, model)` after each chunk. Returns what it took."""
    torch.set_num_threads(setting.threads)
    tokens = open_tokens(Path(setting.tokens_folder))
    model = adapted_model(variant, setting)
    return train_model(model, variant, tokens, setting, on_report)


def train_model(
    model: Any, variant: Variant, tokens: TokenStore, setting: Setting, on_report: Callable[[dict[str, Any], Any], None]
) -> Clock:
    """The loop itself, on a model that carries the variant's adapter already."""
    step_of = Step(model, variant, tokens)
    clock = Clock(training_began=time.time())
    for chunk in range(variant.steps // variant.chunk_steps):
        began = time.perf_counter()
        for step in range(chunk * variant.chunk_steps, (chunk + 1) * variant.chunk_steps):
            step_of(step)
        trained = time.perf_counter()
        select_loss = heldout_loss(model, tokens, setting.rows_per_report)
        clock.train_seconds += trained - began
        clock.evaluate_seconds += time.perf_counter() - trained
        clock.steps += variant.chunk_steps
        metrics = {
            "variant": variant.variant_id,
            "report": chunk + 1,
            "select_loss": select_loss,
            "training_began": clock.training_began,
            "train_seconds": clock.train_seconds,
            "evaluate_seconds": clock.evaluate_seconds,
            "steps": clock.steps,
        }
        on_report(metrics, model)
    return clock


def adapted_model(variant: Variant, setting: Setting) -> Any:
    """The base with a fresh LoRA adapter from PEFT that starts where the population starts: adapter zero."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    settings = variant.hyperparameters
    base = AutoModelForCausalLM.from_pretrained(
        setting.base_folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    model = get_peft_model(
        base,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            use_rslora=settings.use_rslora,
            target_modules=list(setting.targets),
            task_type="CAUSAL_LM",
        ),
    )
    zero = load_file(Path(setting.seed_folder) / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(zero[name.replace(".default", "")][: settings.rank])
    return model


class Step:
    """One optimizer step: AdamW, the variant's schedule, its clip, its rows."""

    def __init__(self, model: Any, variant: Variant, tokens: TokenStore) -> None:
        settings = variant.hyperparameters
        self.model, self.variant, self.tokens = model, variant, tokens
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        sizes = {domain: tokens.token_count(domain, "train") for domain in tokens.domains}
        rows = {domain: tokens.rows(domain, "train") for domain in sizes}
        self.mix = plan_of(variant.epigenome, sizes, rows, variant.rng_seed)

    def __call__(self, step: int) -> None:
        settings, rows = self.variant.hyperparameters, self.variant.rows_per_step
        drawn = self.mix.draw(step * rows, rows)
        loss = token_losses(self.model, self.tokens, [(domain, row) for domain, _, row in drawn], "train")[0].mean()
        self.optimizer.zero_grad()
        loss.backward()
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(settings, step, self.variant.steps)
        self.optimizer.step()


def token_losses(model: Any, tokens: TokenStore, rows: list[tuple[str, int]], split: str) -> tuple[Tensor, Tensor]:
    """Losses [K] of the labelled tokens, and the row each stands in [K].

    Positions restart with every document; transformers keeps the documents of a row apart by them.
    """
    batch = tokens.batch(rows, split)
    labels = torch.from_numpy(batch.labels)
    logits = model(
        input_ids=torch.from_numpy(batch.input_ids), position_ids=torch.from_numpy(batch.position_ids), use_cache=False
    ).logits
    labelled = labels != -100
    losses = torch.nn.functional.cross_entropy(logits[labelled], labels[labelled], reduction="none")
    return losses, labelled.nonzero()[:, 0]


@torch.no_grad()
def heldout_loss(model: Any, tokens: TokenStore, rows_per_domain: int) -> float:
    """Mean over domains of the token-weighted loss on the rows of *select* that the population is scored on too."""
    rows = heldout_rows(tokens, "select", rows_per_domain)
    sums: dict[str, list[float]] = {}
    for start in range(0, len(rows), EVALUATION_ROWS):
        group = rows[start : start + EVALUATION_ROWS]
        losses, places = token_losses(model, tokens, group, "select")
        for place, (domain, _) in enumerate(group):
            entry = sums.setdefault(domain, [0.0, 0.0])
            entry[0] += losses[places == place].sum().item()
            entry[1] += int((places == place).sum())
    return sum(loss / count for loss, count in sums.values()) / len(sums)
