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
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.records import Variant
from chrysalis_ray.training.apart import Apart
from chrysalis_ray.training.lanes import Feed, LaneStep, MicroBatch, Take, microbatch, microsteps, sequences, takes
from chrysalis_ray.training.loss import Labelled
from chrysalis_ray.training.optimizer import clip_slots, drop_frozen, slot_norms
from chrysalis_ray.training.owners import share
from chrysalis_ray.training.pack import Occupant, Pack
from chrysalis_ray.training.relay import Leg, relay
from chrysalis_ray.training.schedules import learning_rate_at
from chrysalis_ray.training.shards import Shard
from chrysalis_ray.training.sums import Member, runs
from chrysalis_ray.training.tally import Seat, Tally

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
    pack: Pack, slots: Sequence[int], tokens: TokenStore, steps: int | Sequence[int], rows_per_microstep: int | None = None
) -> list[SlotMetrics]:
    """Train the variants in `slots` for `steps` optimizer steps (of each, or of all), together; metrics in their order.

    Each pass takes `rows_per_microstep` rows of every variant; all rows of a step by default, where they agree in how many
    that are. Raises ModelError where variants, tokens and micro-steps do not fit together.
    """
    counts = [steps] * len(slots) if isinstance(steps, int) else list(steps)
    variants = [pack.occupant(slot).variant for slot in slots]
    _check_lengths(variants, tokens)
    at_once = rows_per_microstep or _rows_of_all(variants)
    passes = [count * microsteps(variant.rows_per_step, at_once) for count, variant in zip(counts, variants, strict=True)]
    tallies = {slot: Tally() for slot in slots}
    with strided_gradients():
        for seats in _legs(pack, slots, counts, passes):
            rows = pack.arrange(sorted(seats, key=lambda slot: -passes[slots.index(slot)]))  # who is done first stands last
            seated = [seats[slot] if slot is not None else None for slot in rows]
            parts = _train_parts(pack, [seated[part] for part in pack.shards.rows], tokens, at_once)
            for slot, tally in zip(rows, (tally for part in parts for tally in part), strict=True):
                if slot is not None and tally is not None:
                    tallies[slot].add(tally)
    return [metrics_of(pack.occupant(slot), tallies[slot]) for slot in slots]


def _train_parts(
    pack: Pack, seats: Sequence[Sequence[Seat | None]], tokens: TokenStore, rows_per_microstep: int
) -> list[list[Tally | None]]:
    """Every live shard its seats: in a process each where the base is small enough for that to pay, else in a thread each.

    Processes that would have none share the rows of a variant with another.
    """
    shards = pack.shards
    shared = shards.may_share and rows_per_microstep > 1 and len(seats) < len(shards.all)
    if (len(seats) > 1 or shared) and (apart := _apart(pack, tokens)) is not None:
        return apart.train(seats, rows_per_microstep)
    work = partial(train_rows, tokens=tokens, rows_per_microstep=rows_per_microstep, lanes=pack.lanes)
    return shards.each(work, seats, rows_per_microstep * tokens.sequence_length)


def _apart(pack: Pack, tokens: TokenStore) -> Apart | None:
    """The pack's shards in processes of their own; None where that would not pay, or the system gives no more processes."""
    shards = pack.shards
    if isinstance(shards.apart, Apart) and shards.apart.tokens is tokens:
        return shards.apart
    if not shards.may_fork:
        return None
    try:
        shards.apart = Apart(pack, tokens, train_rows)
    except OSError:  # threads do as well, more slowly and with the same bits
        shards.may_fork, shards.apart = False, None
        return None
    return shards.apart


def _legs(pack: Pack, slots: Sequence[int], counts: Sequence[int], passes: Sequence[int]) -> Iterator[dict[int, Seat]]:
    """Who sits where, one leg after the other. Those who have as much to do each share the threads as a relay."""
    legs = [Leg(tuple(range(len(slots))), tuple(counts))]
    if len(set(counts)) == len(set(passes)) == 1 and pack.is_even(slots):
        legs = relay(pack.shards.sizes(len(slots)), counts[0])
    for leg in legs:
        yield {slots[i]: Seat(pack.occupant(slots[i]), steps) for i, steps in zip(leg.order, leg.steps, strict=True)}


def train_rows(
    shard: Shard,
    seats: Sequence[Seat | None],
    tokens: TokenStore,
    rows_per_microstep: int,
    lanes: Literal["compacted", "fixed"],
) -> list[Tally | None]:
    """The steps of one shard; `seats` says who sits in each of its rows, None for a row that only keeps the shape.

    Every variant accumulates over its own step: the one whose step is complete is summed, clipped and moved alone. "fixed"
    `lanes` compute all rows until the last variant is done, "compacted" ones leave out those at the end that are; a pass in
    which nobody is left is not made.
    """
    if not any(seats):
        return [None for _ in seats]
    engine, rows, sums = shard.engine, shard.window.rows, shard.sums()
    ledger = Ledger(len(seats), engine.device, len(engine.parts))
    members = [_member(row, seat) for row, seat in enumerate(seats)]

    for takes_N in _together(seats, tokens, rows_per_microstep):
        computed = len(seats) if lanes == "fixed" else 1 + max(row for row, take in enumerate(takes_N) if take)
        passes = shard.passes(computed, sequences(rows_per_microstep, engine.whole) * tokens.sequence_length)
        taking = [(member, take) for member, take in zip(members, takes_N, strict=True) if member and take]
        sums.open([member for member, take in taking if take.opens])
        for place, rank in enumerate(engine.parts):
            for part in [part for part in passes if any(takes_N[part])]:
                sums.expect([member for member, _ in taking if part.start <= member.row < part.stop])
                shard.show(slice(rows.start + part.start, rows.start + part.stop))
                batch = microbatch(takes_N[part], tokens, rows_per_microstep, rank, engine.whole, engine.device)
                ledger.add(forward_backward(shard, batch), batch.labelled, place, part)
                sums.keep(place)
        complete = [take.step if take and take.closes else None for take in takes_N]
        if any(complete):
            shard.show(rows)
            sums.close([member for member, take in taking if take.closes])
            ledger.close(move(shard, seats, members, complete), complete)

    shard.show(rows)
    return ledger.read(seats, engine.total(ledger.loss_VN))


def _together(seats: Sequence[Seat | None], tokens: TokenStore, rows_per_microstep: int) -> Iterator[list[Take | None]]:
    """What every row brings to each pass, None where nobody sits or all steps are done, until nobody brings anything."""
    queues: list[Iterator[Take]] = []
    for seat in seats:
        feed = Feed(seat.occupant.variant, tokens) if seat else None
        queues.append(
            takes(feed.steps(seat.occupant.optimizer_step, seat.steps), rows_per_microstep) if seat and feed else iter(())
        )
    while any(takes_N := [next(queue, None) for queue in queues]):
        yield takes_N


def _member(row: int, seat: Seat | None) -> Member | None:
    return Member(row, seat.occupant.owner, seat.occupant.optimizer.gradient_P) if seat else None


def move(
    shard: Shard, seats: Sequence[Seat | None], members: Sequence[Member | None], complete: Sequence[LaneStep | None]
) -> Tensor:
    """Move the variants whose steps are `complete` and summed: clip, step. Returns the gradient norms [N] of all rows.

    Where slots have owners each clips and steps its own, tells the norms, by which all know who moves, and sends the rows.
    """
    engine, bank, first = shard.engine, shard.window.bank, shard.window.rows.start
    due = [member for member, step in zip(members, complete, strict=True) if member and step]
    owned = any(member.owner is not None for member in due)
    for member in due:
        if member.owner in (None, engine.rank):
            shard.summed()
    if owned or engine.in_order:  # each by itself, so that neither place nor company can touch the bits
        norms = torch.zeros(len(seats), dtype=torch.float64, device=engine.device)
        for row, owner, gradient_P in due:
            if owner in (None, engine.rank) and gradient_P is not None:
                norms[row] = _clip(gradient_P[None], [seats[row]], bank.first_b)[0]
        if owned:
            engine.reduce(norms)
    else:
        moving = [seat if step is not None else None for seat, step in zip(seats, complete, strict=True)]
        norms = _clip(bank.gflat_SP[first : first + len(seats)], moving, bank.first_b)
    moved: dict[int, int] = {}  # rows that one of several workers moved, and which
    for row, (seat, step, finite) in enumerate(zip(seats, complete, torch.isfinite(norms).tolist(), strict=True)):
        moves = seat is not None and step is not None and step_variant(seat.occupant, step, finite, engine.rank)
        if seat is None or not moves:
            continue
        if seat.occupant.owner in (None, engine.rank):
            shard.moved(seat.occupant.optimizer_step - 1)
        if seat.occupant.owner is not None:
            moved[row] = seat.occupant.owner
    if moved:
        share([bank.flat_SP[first + row] for row in moved], list(moved.values()))
    return norms


def _clip(gradients_NP: Tensor, seats: Sequence[Seat | None], first_b: int) -> Tensor:
    """Clip the gradients of those who sit in these rows, each to its own norm; returns the norms [N] before."""
    owns = [seat.occupant.variant.hyperparameters if seat else None for seat in seats]
    drop_frozen(gradients_NP, first_b, [own is not None and own.freeze_a for own in owns])
    norms = slot_norms(gradients_NP)
    clip_slots(gradients_NP, norms, [own.clip if own is not None else 0 for own in owns])
    return norms


def forward_backward(shard: Shard, batch: MicroBatch) -> Tensor:
    """One pass: the gradients of a shard's variants are added to the bank, their token losses [K] returned."""
    hidden = shard.hidden(batch)
    loss, token_losses = shard.loss(hidden, batch.labelled)
    loss.backward()
    shard.progress()
    return token_losses


@contextmanager
def strided_gradients() -> Iterator[None]:
    """Torch notes once that strided gradients are unusual; here they are what is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        yield


def step_variant(occupant: Occupant, step: LaneStep, finite: bool, rank: int = 0) -> bool:
    """Move one variant by its own optimizer, or skip a step whose gradient is not finite; either way its data moves on.

    On a worker of another `rank` than the owner's the row stands still until it comes from there. Says whether it moves.
    """
    moves = finite and not occupant.evicted
    if moves:
        if occupant.owner in (None, rank):
            occupant.optimizer.step(current_learning_rate(occupant))
        else:
            occupant.optimizer.follow()
        occupant.skipped_in_a_row = 0
    else:
        occupant.skipped += 1
        occupant.skipped_in_a_row += 1
    occupant.optimizer_step += 1
    for domain, labels in step.labels_by_domain().items():
        occupant.domain_tokens[domain] = occupant.domain_tokens.get(domain, 0) + labels
    return moves


def current_learning_rate(occupant: Occupant) -> float:
    return learning_rate_at(occupant.variant.hyperparameters, occupant.optimizer_step, occupant.variant.steps)


class Ledger:
    """Losses and norms of a chunk, kept on the device and read once."""

    def __init__(self, live: int, device: torch.device, parts: int) -> None:
        self.loss_VN = torch.zeros(parts, live, dtype=torch.float64, device=device)
        self.norm_N = torch.zeros(live, dtype=torch.float64, device=device)
        self.labels = [0] * live

    def add(self, losses_K: Tensor, labelled: Labelled, part: int, rows: slice) -> None:
        """Sum the losses of a part of a micro-batch lane by lane; its lanes are these rows."""
        lanes = losses_K.detach().to(torch.float64).split(labelled.counts)
        self.loss_VN[part, rows] += torch.stack([lane.sum() for lane in lanes])

    def close(self, norms_N: Tensor, complete: Sequence[LaneStep | None]) -> None:
        """End the steps that are complete."""
        for part in runs([row for row, step in enumerate(complete) if step is not None]):
            self.norm_N[part] = norms_N[part]
        for row, step in enumerate(complete):
            self.labels[row] += step.labels if step is not None else 0

    def read(self, seats: Sequence[Seat | None], loss_N: Tensor) -> list[Tally | None]:
        """What came of whoever sits in each row; `loss_N` sums over all workers."""
        losses, norms = torch.stack([loss_N, self.norm_N]).tolist()
        told = zip(seats, losses, self.labels, norms, strict=True)
        return [Tally(loss, labels, norm) if seat else None for seat, loss, labels, norm in told]


def metrics_of(occupant: Occupant, tally: Tally) -> SlotMetrics:
    variant, step = occupant.variant, occupant.optimizer_step
    return SlotMetrics(
        step=step,
        tokens=step * variant.tokens_per_step,
        train_loss=_finite(tally.loss / max(1, tally.labels)),
        gradient_norm=_finite(tally.norm),
        learning_rate=learning_rate_at(variant.hyperparameters, max(0, step - 1), variant.steps),
        skipped=occupant.skipped,
        state="evicted" if occupant.evicted else "training",
        domain_tokens=dict(occupant.domain_tokens),
    )


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _check_lengths(variants: Sequence[Variant], tokens: TokenStore) -> None:
    """Raises ModelError unless all variants train on rows as long as those of the token store."""
    for length in sorted({variant.sequence_length for variant in variants} - {tokens.sequence_length}):
        raise ModelError(
            f"variants train on rows of {length} tokens, the token store has rows of {tokens.sequence_length}",
            "tokenise the genome for this sequence length",
        )


def _rows_of_all(variants: Sequence[Variant]) -> int:
    """Rows per step, where all variants have the same: how many are taken at a time must not depend on who is there."""
    sizes = sorted({variant.rows_per_step for variant in variants})
    if len(sizes) != 1:
        raise ModelError(f"variants of one pack have steps of {sizes} rows", "say rows_per_microstep: how many go at a time")
    return sizes[0]
