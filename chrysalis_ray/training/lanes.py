"""From the variants' data mixes to micro-batches.

Every row of the bank that takes part in the forward pass has a lane of `b` sequences of T tokens in each micro-batch, and
lanes stand variant-major: N = lanes x b sequences in all. Step s of a variant uses the positions
[s x rows_per_step, (s + 1) x rows_per_step) of its MixPlan, whoever trains beside it and on however many workers. Worker r
of W takes every W-th sequence of each micro-step, starting with its r-th.

Variants need not agree in rows per step. Each takes as many rows at a time as the others, out of its own step; the last
micro-step of a step that does not divide is shorter and filled up with sequences without labels.

A token's weight in the loss is 1 / Z, Z the labelled tokens of its variant in the whole step over all workers: known from
the token store's counts, so workers need not ask each other. Summed over micro-steps and workers, that is the mean loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from chrysalis_ray.core.records import Variant
from chrysalis_ray.genome.mix import MixPlan, shares_of
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
    """What one variant consumes in one optimizer step, on all workers together."""

    rows: tuple[Row, ...]
    label_counts: tuple[int, ...]
    dropout: Dropout | None = None

    @property
    def labels(self) -> int:
        return sum(self.label_counts)

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
        shares = shares_of(variant.epigenome, sizes)
        self.plan = MixPlan(shares, {domain: tokens.rows(domain, "train") for domain in shares}, variant.rng_seed)
        self.counts = {domain: tokens.label_counts(domain, "train") for domain in shares}

    def step(self, number: int) -> LaneStep:
        drawn = self.plan.draw(number * self.rows_per_step, self.rows_per_step)
        rows = tuple((domain, row) for domain, _, row in drawn)
        dropout = Dropout(self.dropout, self.rng_seed, number) if self.dropout > 0.0 else None
        return LaneStep(rows, tuple(int(self.counts[domain][row]) for domain, row in rows), dropout)

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


def microbatch(
    lanes: Sequence[Take | None], tokens: TokenStore, rows_per_microstep: int, rank: int, world: int, device: torch.device
) -> MicroBatch:
    """This worker's part of one micro-step; a lane that is None is filled with tokens that carry no label."""
    share = -(-rows_per_microstep // world)  # every worker computes as many sequences, the last of some without labels
    return _collate([_lane(take, rank, world, share, tokens) for take in lanes], device)


@dataclass(frozen=True)
class _Lane:
    input_ids_bT: np.ndarray
    position_ids_bT: np.ndarray
    labels_bT: np.ndarray
    weight: float
    mask: LaneMask | None = None


def _lane(take: Take | None, rank: int, world: int, share: int, tokens: TokenStore) -> _Lane:
    """The sequences of one variant in one micro-step on this worker, filled up to `share` with unlabelled ones."""
    shape = (share, tokens.sequence_length)
    input_ids = np.zeros(shape, dtype=np.int64)
    position_ids = np.tile(np.arange(tokens.sequence_length), (share, 1))
    labels = np.full(shape, -100, dtype=np.int64)
    own = range(take.start + rank, take.stop, world) if take is not None else range(0)
    if take is None or not own:
        return _Lane(input_ids, position_ids, labels, 0.0)
    lane = take.step
    batch = tokens.batch([lane.rows[index] for index in own], "train")
    input_ids[: len(own)], position_ids[: len(own)], labels[: len(own)] = batch.input_ids, batch.position_ids, batch.labels
    mask = LaneMask(lane.dropout, tuple(own), share) if lane.dropout is not None else None
    return _Lane(input_ids, position_ids, labels, 1.0 / max(1, lane.labels), mask)


def _collate(lanes: Sequence[_Lane], device: torch.device) -> MicroBatch:
    labelled = label(np.stack([lane.labels_bT for lane in lanes]), [lane.weight for lane in lanes], device)
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


def label(labels_lbt: np.ndarray, weights: Sequence[float], device: torch.device) -> Labelled:
    """The labelled tokens of lanes x b x T labels (-100: none), found on the host so that the device need not wait."""
    flat = labels_lbt.reshape(len(labels_lbt), -1)
    counts = (flat != -100).sum(1)
    index = np.flatnonzero(flat != -100)
    weight_K = np.repeat(np.asarray(weights, dtype=np.float64), counts)
    return Labelled(
        index_K=_to(index, device),
        labels_K=_to(flat.reshape(-1)[index], device),
        weights_K=_to(weight_K, device),
        counts=tuple(int(count) for count in counts),
    )


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
