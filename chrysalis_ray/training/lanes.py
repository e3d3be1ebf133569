"""From the variants' data mixes to micro-batches.

Every row of the bank that takes part in the forward pass has a lane of `b` sequences of T tokens in each micro-batch, and
lanes stand variant-major: N = lanes x b sequences in all. Step s of a variant uses the positions
[s x rows_per_step, (s + 1) x rows_per_step) of its MixPlan, whoever trains beside it and on however many workers. Worker r
of W takes every W-th sequence of each micro-step, starting with its r-th.

Variants need not agree in rows per step. Each takes as many rows at a time as the others, out of its own step; the last
micro-step of a step that does not divide is shorter and filled up with sequences without labels.

A token's weight in the loss is w / Z, w the loss weight of its domain (1 where the epigenome gives none) and Z the sum of w
over the labelled tokens of its variant in the whole step over all workers: known from the token store's counts, so workers
need not ask each other. Summed over micro-steps and workers, that is the weighted mean loss, as torch's cross entropy with
class weights: only the ratios of loss weights matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from chrysalis_ray.core.records import Variant
from chrysalis_ray.genome.mix import plan_of
from chrysalis_ray.training.dropout import Dropout, LaneMask, Passage, passage_of
from chrysalis_ray.training.loss import Labelled

if TYPE_CHECKING:
    from chrysalis_ray.genome.tokens import RowBatch, TokenStore

Row = tuple[str, int]  # domain, row of the token store


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass: ids and positions [N, T], and the labelled tokens as positions in N x T."""

    input_ids_NT: Tensor
    position_ids_NT: Tensor
    labelled: Labelled
    passage: Passage | None = None  # what its lanes drop, in training


@dataclass(frozen=True)
class LaneStep:
    """What one variant consumes in one optimizer step, on all workers together; `loss_weights` by domain, where not 1."""

    rows: tuple[Row, ...]
    label_counts: tuple[int, ...]
    dropout: Dropout | None = None
    loss_weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def labels(self) -> int:
        return sum(self.label_counts)

    def token_weights(self) -> tuple[float, ...]:
        """What a labelled token of each row weighs in the loss of the step."""
        weights = [self.loss_weights.get(domain, 1.0) for domain, _ in self.rows]
        total = sum(weight * labels for weight, labels in zip(weights, self.label_counts, strict=True)) if self.labels else 1.0
        return tuple(weight / total for weight in weights)

    def labels_by_domain(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for (domain, _), labels in zip(self.rows, self.label_counts, strict=True):
            counts[domain] = counts.get(domain, 0) + labels
        return counts


class Feed:
    """Where one variant's rows come from."""

    def __init__(self, variant: Variant, tokens: TokenStore) -> None:
        self.rows_per_step = variant.rows_per_step
        self.dropout, self.rng_seed = variant.hyperparameters.dropout, variant.rng_seed
        sizes = {domain: tokens.token_count(domain, "train") for domain in tokens.domains}
        rows = {domain: tokens.rows(domain, "train") for domain in sizes}
        self.plan = plan_of(variant.epigenome, sizes, rows, variant.rng_seed)
        self.counts = {domain: tokens.label_counts(domain, "train") for domain in sizes}
        self.loss_weights = variant.epigenome.loss_weights

    def step(self, number: int) -> LaneStep:
        drawn = self.plan.draw(number * self.rows_per_step, self.rows_per_step)
        rows = tuple((domain, row) for domain, _, row in drawn)
        dropout = Dropout(self.dropout, self.rng_seed, number) if self.dropout > 0.0 else None
        labels = tuple(int(self.counts[domain][row]) for domain, row in rows)
        return LaneStep(rows, labels, dropout, self.loss_weights)

    def steps(self, first: int, count: int) -> Iterator[LaneStep]:
        """`count` steps from step `first` on."""
        return (self.step(number) for number in range(first, first + count))


@dataclass(frozen=True)
class Take:
    """What one variant brings to one micro-step: rows [start, stop) of its step."""

    step: LaneStep
    start: int
    stop: int

    @property
    def opens(self) -> bool:
        """Whether its step begins here."""
        return self.start == 0

    @property
    def closes(self) -> bool:
        """Whether its step is complete with these rows."""
        return self.stop == len(self.step.rows)


def takes(steps: Iterable[LaneStep], rows_per_microstep: int) -> Iterator[Take]:
    """The micro-steps of one variant, step after step."""
    for step in steps:
        for start in range(0, len(step.rows), rows_per_microstep):
            yield Take(step, start, min(start + rows_per_microstep, len(step.rows)))


def microsteps(rows_per_step: int, rows_per_microstep: int) -> int:
    """How many micro-steps make one step."""
    return -(-rows_per_step // rows_per_microstep)


def sequences(rows_per_microstep: int, world: int) -> int:
    """Sequences that every worker computes of each variant, the last of them without labels on some."""
    return -(-rows_per_microstep // world)


def microbatch(
    lanes: Sequence[Take | None], tokens: TokenStore, rows_per_microstep: int, rank: int, world: int, device: torch.device
) -> MicroBatch:
    """This worker's part of one micro-step; a lane that is None is filled with tokens that carry no label."""
    share = sequences(rows_per_microstep, world)
    return _collate([_lane(take, rank, world, share, tokens) for take in lanes], device)


@dataclass(frozen=True)
class _Lane:
    input_ids_bT: np.ndarray
    position_ids_bT: np.ndarray
    labels_bT: np.ndarray
    weights_b: np.ndarray
    mask: LaneMask | None = None


def _lane(take: Take | None, rank: int, world: int, share: int, tokens: TokenStore) -> _Lane:
    """The sequences of one variant in one micro-step on this worker, filled up to `share` with unlabelled ones."""
    shape = (share, tokens.sequence_length)
    input_ids = np.zeros(shape, dtype=np.int64)
    position_ids = np.tile(np.arange(tokens.sequence_length), (share, 1))
    labels = np.full(shape, -100, dtype=np.int64)
    own = range(take.start + rank, take.stop, world) if take is not None else range(0)
    if take is None or not own:
        return _Lane(input_ids, position_ids, labels, np.zeros(share))
    lane = take.step
    batch = tokens.batch([lane.rows[index] for index in own], "train")
    input_ids[: len(own)], position_ids[: len(own)], labels[: len(own)] = batch.input_ids, batch.position_ids, batch.labels
    mask = LaneMask(lane.dropout, tuple(own), share) if lane.dropout is not None else None
    weights, of_step = np.zeros(share), lane.token_weights()
    weights[: len(own)] = [of_step[index] for index in own]
    return _Lane(input_ids, position_ids, labels, weights, mask)


def _collate(lanes: Sequence[_Lane], device: torch.device) -> MicroBatch:
    labelled = label(np.stack([lane.labels_bT for lane in lanes]), [lane.weights_b for lane in lanes], device)
    return MicroBatch(
        input_ids_NT=_to(np.concatenate([lane.input_ids_bT for lane in lanes]), device),
        position_ids_NT=_to(np.concatenate([lane.position_ids_bT for lane in lanes]), device),
        labelled=labelled,
        passage=passage_of([lane.mask for lane in lanes]),
    )


def repeated(batch: RowBatch, lanes: int, device: torch.device) -> MicroBatch:
    """The same rows for every lane, each labelled token with weight 1; for evaluation."""
    labels = np.broadcast_to(batch.labels, (lanes, *batch.labels.shape))
    return MicroBatch(
        input_ids_NT=_to(np.tile(batch.input_ids, (lanes, 1)), device),
        position_ids_NT=_to(np.tile(batch.position_ids, (lanes, 1)), device),
        labelled=label(labels, [1.0] * lanes, device),
    )


def label(labels_lbt: np.ndarray, weights: Sequence[float | np.ndarray], device: torch.device) -> Labelled:
    """The labelled tokens of lanes x b x T labels (-100: none), found on the host so that the device need not wait.

    `weights` are those of a token: one a lane, or one for each of its sequences."""
    flat = labels_lbt.reshape(len(labels_lbt), -1)
    found = flat != -100
    counts, index = found.sum(1), np.flatnonzero(found)
    sequences = int(np.prod(labels_lbt.shape[1:-1]))
    weights_lb = [np.broadcast_to(np.asarray(weight, dtype=np.float64), (sequences,)) for weight in weights]
    weight_K = np.repeat(np.concatenate(weights_lb), found.reshape(len(weights) * sequences, -1).sum(1))
    return Labelled(
        index_K=_to(index, device),
        labels_K=_to(flat.reshape(-1)[index], device),
        weights_K=_to(weight_K, device),
        counts=tuple(int(count) for count in counts),
    )


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
