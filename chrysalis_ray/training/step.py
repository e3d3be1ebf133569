"""One chunk of training for every variant of a turn, together.

    lanes -> forward -> loss -> backward -> sum over workers -> clip -> step -> metrics

Nothing here knows who launched it, or how many variants the population has.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.records import Variant
from chrysalis_ray.training.lanes import Feed, LaneStep, MicroBatch, microbatches
from chrysalis_ray.training.loss import Labelled
from chrysalis_ray.training.optimizer import clip_slots, drop_frozen, slot_norms
from chrysalis_ray.training.pack import Occupant, Pack
from chrysalis_ray.training.schedules import learning_rate_at
from chrysalis_ray.training.shards import Shard

if TYPE_CHECKING:
    from chrysalis_ray.genome.tokens import TokenStore


@dataclass(frozen=True)
class SlotMetrics:
    """How one variant fared in a chunk.

    `step` and `tokens` count from its first step; tokens are rows x sequence length, `domain_tokens` the labelled ones by
    domain. `train_loss` is the mean over the chunk's labelled tokens, in nats; `gradient_norm` (before clipping) and
    `learning_rate` are those of the last step. Numbers that were not finite are None. `state` is "evicted" after three
    steps in a row whose gradient was not finite.
    """

    step: int
    tokens: int
    train_loss: float | None
    gradient_norm: float | None
    learning_rate: float
    skipped: int
    state: str
    domain_tokens: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def train_chunk(
    pack: Pack, slots: Sequence[int], tokens: TokenStore, steps: int, rows_per_microstep: int | None = None
) -> list[SlotMetrics]:
    """Train the variants in `slots` for `steps` optimizer steps, all in the same passes; metrics in the order of `slots`.

    They must agree in rows per step and sequence length. A step takes `rows_per_microstep` rows of each variant at a time,
    all by default. Raises ModelError where variants, tokens and micro-steps do not fit together.
    """
    occupants = {slot: pack.occupant(slot) for slot in slots}
    rows_per_step = _common_shape([occupant.variant for occupant in occupants.values()], tokens)
    rows = pack.arrange(slots)
    seats = [occupants[slot] if slot is not None else None for slot in rows]
    train = partial(train_rows, tokens=tokens, steps=steps, rows_per_microstep=rows_per_microstep or rows_per_step)
    with strided_gradients():
        parts = pack.shards.each(train, [seats[part] for part in pack.shards.rows])
    metrics = dict(zip(rows, (metric for part in parts for metric in part), strict=True))
    return [told for slot in slots if (told := metrics[slot]) is not None]


def train_rows(
    shard: Shard, seats: Sequence[Occupant | None], tokens: TokenStore, steps: int, rows_per_microstep: int
) -> list[SlotMetrics | None]:
    """The steps of one shard; `seats` says who sits in each of its rows, None for a row that only keeps the shape."""
    if not any(seats):
        return [None for _ in seats]
    feeds = [Feed(occupant.variant, tokens) if occupant else None for occupant in seats]
    engine, gradients = shard.engine, shard.gradients
    ledger = Ledger(len(seats), gradients)

    for _ in range(steps):
        lanes = [feed.step(seat.optimizer_step) if feed and seat else None for feed, seat in zip(feeds, seats, strict=True)]
        gradients.zero_()
        for batch in microbatches(lanes, tokens, rows_per_microstep, engine.rank, engine.world, engine.device):
            ledger.add(forward_backward(shard, batch), batch.labelled)
        engine.reduce(gradients)

        settings = [seat.variant.hyperparameters if seat else None for seat in seats]
        drop_frozen(gradients, shard.window.bank.first_b, [own is not None and own.freeze_a for own in settings])
        norms = slot_norms(gradients)
        clip_slots(gradients, norms, [own.clip if own is not None else 0 for own in settings])
        for seat, lane, finite in zip(seats, lanes, torch.isfinite(norms).tolist(), strict=True):
            if seat and lane:
                step_variant(seat, lane, finite)
        ledger.close(norms, lanes)

    engine.reduce(ledger.loss_N)
    return ledger.read(seats)


def forward_backward(shard: Shard, batch: MicroBatch) -> Tensor:
    """One pass: the gradients of a shard's variants are added to the bank, their token losses [K] returned."""
    hidden = shard.hidden(batch)
    loss, token_losses = shard.loss(hidden, batch.labelled)
    loss.backward()
    return token_losses


@contextmanager
def strided_gradients() -> Iterator[None]:
    """Torch notes once that strided gradients are unusual; here they are what is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        yield


def step_variant(occupant: Occupant, lane: LaneStep, finite: bool) -> None:
    """Move one variant by its own optimizer, or skip a step whose gradient is not finite; either way its data moves on."""
    if finite and not occupant.evicted:
        occupant.optimizer.step(current_learning_rate(occupant))
        occupant.skipped_in_a_row = 0
    else:
        occupant.skipped += 1
        occupant.skipped_in_a_row += 1
    occupant.optimizer_step += 1
    for domain, labels in lane.labels_by_domain().items():
        occupant.domain_tokens[domain] = occupant.domain_tokens.get(domain, 0) + labels


def current_learning_rate(occupant: Occupant) -> float:
    return learning_rate_at(occupant.variant.hyperparameters, occupant.optimizer_step, occupant.variant.steps)


class Ledger:
    """Losses and norms of a chunk, kept on the device and read once."""

    def __init__(self, live: int, like: Tensor) -> None:
        self.loss_N = torch.zeros(live, dtype=torch.float64, device=like.device)
        self.norm_N = torch.zeros(live, dtype=torch.float64, device=like.device)
        self.labels = [0] * live

    def add(self, losses_K: Tensor, labelled: Labelled) -> None:
        """Sum a micro-batch's losses lane by lane."""
        parts = losses_K.detach().to(torch.float64).split(labelled.counts)
        self.loss_N += torch.stack([part.sum() for part in parts])

    def close(self, norms_N: Tensor, lanes: Sequence[LaneStep | None]) -> None:
        """End a step."""
        self.norm_N = norms_N
        for row, lane in enumerate(lanes):
            self.labels[row] += lane.labels if lane is not None else 0

    def read(self, seats: Sequence[Occupant | None]) -> list[SlotMetrics | None]:
        """The metrics of whoever sits in each row."""
        losses, norms = torch.stack([self.loss_N, self.norm_N]).tolist()
        told = zip(seats, losses, self.labels, norms, strict=True)
        return [metrics_of(seat, loss / max(1, labels), norm) if seat else None for seat, loss, labels, norm in told]


def metrics_of(occupant: Occupant, loss: float, norm: float) -> SlotMetrics:
    variant, step = occupant.variant, occupant.optimizer_step
    return SlotMetrics(
        step=step,
        tokens=step * variant.tokens_per_step,
        train_loss=_finite(loss),
        gradient_norm=_finite(norm),
        learning_rate=learning_rate_at(variant.hyperparameters, max(0, step - 1), variant.steps),
        skipped=occupant.skipped,
        state="evicted" if occupant.evicted else "training",
        domain_tokens=dict(occupant.domain_tokens),
    )


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _common_shape(variants: Sequence[Variant], tokens: TokenStore) -> int:
    """Rows per step that all variants share. Raises ModelError where they differ."""
    shapes = {(variant.rows_per_step, variant.sequence_length) for variant in variants}
    if len(shapes) != 1:
        raise ModelError(f"variants of one pack differ in rows per step and length: {sorted(shapes)}", "pack equals together")
    rows_per_step, length = shapes.pop()
    if length != tokens.sequence_length:
        raise ModelError(
            f"variants train on rows of {length} tokens, the token store has rows of {tokens.sequence_length}",
            "tokenise the genome for this sequence length",
        )
    return rows_per_step
