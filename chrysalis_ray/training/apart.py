"""The shards of a pack in processes of their own (`limbs.py`): what is sent with every chunk, and what comes back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from chrysalis_ray.core.records import MOMENTS, Variant
from chrysalis_ray.training.limbs import Limb, Order, shared_zeros
from chrysalis_ray.training.optimizer import SlotOptimizer
from chrysalis_ray.training.pack import Occupant, Pack
from chrysalis_ray.training.shards import Shard
from chrysalis_ray.training.tally import Seat, Tally

if TYPE_CHECKING:
    from chrysalis_ray.genome.tokens import TokenStore

Seats = Sequence[Seat | None]
MOST_MOMENTS = max(len(names) for names in MOMENTS.values())


class TrainRows(Protocol):
    """`step.train_rows`: the steps of one shard."""

    def __call__(
        self, shard: Shard, seats: Seats, tokens: TokenStore, rows_per_microstep: int, lanes: Any
    ) -> list[Tally | None]: ...


class Apart:
    """A limb for every shard of a pack but the first, which stays in this process. Made once; `train` runs a chunk on all."""

    def __init__(self, pack: Pack, tokens: TokenStore, train_rows: TrainRows) -> None:
        self.tokens = tokens
        self._pack, self._train_rows = pack, train_rows
        bank = pack.bank
        self._moments_SKP = shared_zeros((bank.slots, MOST_MOMENTS, bank.row_size), bank.flat_SP.dtype)
        self._limbs: list[Limb] = []
        weakref.finalize(self, _close, self._limbs)  # before the first: there may be no more processes for the second
        for shard in pack.shards.all[1:]:
            self._limbs.append(Limb(partial(self._obey, shard)))

    def train(self, parts: Sequence[Seats], rows_per_microstep: int) -> list[list[Tally | None]]:
        """`train_rows` for every live shard and its seats, side by side. What one of them raises is raised here."""
        live, lanes = self._pack.shards.live, self._pack.lanes
        others = list(zip(self._limbs, live[1:], parts[1:], strict=False))
        for limb, shard, seats in others:
            limb.order(self._order(shard, seats, rows_per_microstep))
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
        try:
            told = [self._train_rows(live[0], parts[0], self.tokens, rows_per_microstep, lanes)]
        finally:  # before anything is raised: nobody may still write into the bank
            answers = [_outcome(limb.answer) for limb, _, _ in others]
        for answer, (_, shard, seats) in zip(answers, others, strict=True):
            told.append(self._learn(shard, seats, answer()))
        return told

    # there

    def _order(self, shard: Shard, seats: Seats, rows_per_microstep: int) -> Order:
        """What a limb has to know; moments go to the shared memory."""
        rows = shard.window.rows
        people = [
            {"variant": seat.occupant.variant.to_json(), "meta": self._put(row, seat.occupant), "steps": seat.steps}
            if seat
            else None
            for row, seat in zip(range(rows.start, rows.stop), seats, strict=True)
        ]
        ranks = self._pack.bank.ranks
        return {"rows": [rows.start, rows.stop], "ranks": ranks, "seats": people, "rows_per_microstep": rows_per_microstep}

    def _obey(self, shard: Shard, order: Order) -> Order:
        """In the limb: seat the variants, train them, and say what came of them."""
        bank, rows = self._pack.bank, slice(*order["rows"])
        bank.ranks[:] = order["ranks"]
        shard.show(rows)
        seats = [
            Seat(self._occupant(row, told), told["steps"]) if told else None
            for row, told in zip(range(rows.start, rows.stop), order["seats"], strict=True)
        ]
        tallies = self._train_rows(shard, seats, self.tokens, order["rows_per_microstep"], self._pack.lanes)
        placed = zip(range(rows.start, rows.stop), seats, strict=True)
        return {
            "tallies": [tally.to_json() if tally else None for tally in tallies],
            "metas": [self._put(row, seat.occupant) if seat else None for row, seat in placed],
        }

    def _occupant(self, row: int, told: dict[str, Any]) -> Occupant:
        variant, bank = Variant.from_json(told["variant"]), self._pack.bank
        optimizer = SlotOptimizer(variant.hyperparameters, bank.flat_SP[row], bank.gflat_SP[row], bank.first_b)
        occupant = Occupant(variant, optimizer)
        self._become(occupant, row, told["meta"])
        return occupant

    # and back

    def _learn(self, shard: Shard, seats: Seats, answer: Order) -> list[Tally | None]:
        rows = shard.window.rows
        for row, seat, meta in zip(range(rows.start, rows.stop), seats, answer["metas"], strict=True):
            if seat is not None:
                self._become(seat.occupant, row, meta)
        return [Tally.from_json(tally) if tally else None for tally in answer["tallies"]]

    def _become(self, occupant: Occupant, row: int, meta: dict[str, Any]) -> None:
        """Come as far as `meta` says, with the moments that lie in shared memory."""
        moments = {name: self._moments_SKP[row, index].clone() for index, name in enumerate(meta["moments"])}
        occupant.optimizer.restore(moments, meta.get("scalars", {}), meta["updates"])
        occupant.optimizer_step = meta["optimizer_step"]
        occupant.skipped, occupant.skipped_in_a_row = meta["skipped"], meta["skipped_in_a_row"]
        occupant.domain_tokens = dict(meta["domain_tokens"])

    def _put(self, row: int, occupant: Occupant) -> dict[str, Any]:
        """How far a variant has come; its moments go to shared memory."""
        moments = occupant.optimizer.moments()
        for index, moment_P in enumerate(moments.values()):
            self._moments_SKP[row, index] = moment_P
        return {**occupant.to_json(), "moments": list(moments)}


def _outcome(answer: Callable[[], Order]) -> Callable[[], Order]:
    """Wait for an answer now; what it is, or what it raised, is asked later."""
    try:
        came = answer()
    except RuntimeError as error:
        failure = error

        def fail() -> Order:
            raise failure

        return fail
    return lambda: came


def _close(limbs: Sequence[Limb]) -> None:
    for limb in limbs:
        limb.close()
