"""The shards of a pack in processes of their own (`limbs.py`): what is sent with every chunk, and what comes back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from chrysalis_ray.core.records import MOMENTS, Variant
from chrysalis_ray.training.limbs import Limb, Missed, Order, give_back_freed_memory, shared_zeros
from chrysalis_ray.training.optimizer import SlotOptimizer
from chrysalis_ray.training.pack import Occupant, Pack
from chrysalis_ray.training.partners import Meeting, Partners, groups
from chrysalis_ray.training.shards import Shard
from chrysalis_ray.training.signs import Signs
from chrysalis_ray.training.tally import Seat, Tally

if TYPE_CHECKING:
    from chrysalis_ray.genome.tokens import TokenStore

Seats = Sequence[Seat | None]
Ordered = tuple[Limb, Shard | None, Seats]  # the shard that it leads, if it leads one
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
        bank, shards = pack.bank, pack.shards.all
        dtype = bank.flat_SP.dtype
        self._moments_SKP = shared_zeros((len(bank.flat_SP), MOST_MOMENTS, bank.row_size), dtype)
        self._meeting = Meeting(len(shards), bank.row_size, dtype)
        self._signs = Signs(len(shards))
        self._limbs: list[Limb] = []
        self._part = weakref.finalize(
            self, _close, self._limbs, self._meeting
        )  # before the first: there may be no more processes for the second
        give_back_freed_memory()
        for number, shard in enumerate(shards[1:], start=1):
            self._limbs.append(Limb(partial(self._obey, number, shard), self._meeting.files(number)))
        self._meeting.enter(0)

    def train(self, parts: Sequence[Seats], rows_per_microstep: int) -> list[list[Tally | None]]:
        """`train_rows` for every live shard and its seats, side by side. What one of them raises is raised here,
        and ends them all: what they had not told each other yet would be taken for what belongs to the next chunk.

        Where fewer variants live than there are processes, and lanes need not keep their shape, several share a variant.
        """
        live = self._pack.shards.live
        most = rows_per_microstep if self._pack.shards.may_share else 1
        teams = groups(len(live), len(self._pack.shards.all), most)
        others: list[Ordered] = []
        progress = self._pack.shards.all[0].progress
        try:
            with self._meeting.candid(tuple(self._meeting.peers)):  # some are at work when another turns out to be gone
                for ordered in self._give_orders(teams, parts, rows_per_microstep):
                    others.append(ordered)  # those before one that fails, too
            if torch.get_num_threads() != 1:
                torch.set_num_threads(1)
            own = live[0].under(live[0].engine)
            own.progress = partial(self._signs.tell, self._at_work(others), progress)
            told = [self._train(own, teams[0], parts[0], rows_per_microstep)]
        except BaseException as error:
            _, failures = self._answers(others, progress)
            raise self._end([error, *failures])  # noqa: B904  # the cause may be another process's
        answers, failures = self._answers(others, progress)
        if failures:
            raise self._end(failures)
        for answer, (_, shard_of, seats) in zip(answers, others, strict=True):
            if shard_of is not None:
                told.append(self._learn(shard_of, seats, answer))
        return told

    def _at_work(self, others: Sequence[Ordered]) -> dict[int, Limb]:
        """Those that were given orders, by their numbers."""
        return {self._limbs.index(limb) + 1: limb for limb, _, _ in others}

    def _answers(self, others: Sequence[Ordered], progress: Callable[[], None]) -> tuple[list[Order], list[RuntimeError]]:
        """What came of the orders, and what failed. Before anything is raised: nobody may still write into the bank."""
        answers, failures, waiting = dict[int, Order](), list[RuntimeError](), self._at_work(others)
        numbers = list(waiting)
        while waiting:
            for number in self._signs.await_one(waiting, progress):
                try:
                    answers[number] = waiting.pop(number).answer()
                except RuntimeError as error:
                    failures.append(error)
        return [answers[number] for number in numbers if number in answers], failures

    def _end(self, failures: Sequence[BaseException]) -> BaseException:
        """End all limbs. Which of these failures is the cause: whoever was missed says more than those who missed it."""
        self._pack.shards.apart = None
        self._part()
        return min(failures, key=lambda failure: isinstance(failure, Missed))

    def _give_orders(
        self, teams: Sequence[Sequence[int]], parts: Sequence[Seats], rows_per_microstep: int
    ) -> Iterator[Ordered]:
        """Every limb of a team its order, one after the other, with whom it leads and who sits there."""
        bank = self._pack.bank
        for team, shard, seats in zip(teams, self._pack.shards.live, parts, strict=True):
            for number in team:
                rows = shard.window.rows if number == team[0] else self._spare_row(number)
                if number != team[0]:
                    bank.copy(shard.window.rows.start, rows.start)
                if number:
                    limb = self._limbs[number - 1]
                    limb.order(self._order(team, rows, seats, rows_per_microstep))
                    yield limb, shard if number == team[0] else None, seats

    def _train(self, shard: Shard, team: Sequence[int], seats: Seats, rows_per_microstep: int) -> list[Tally | None]:
        """The steps of a shard, or this process's part of them."""
        lanes = self._pack.lanes
        if len(team) == 1:
            return self._train_rows(shard, seats, self.tokens, rows_per_microstep, lanes)
        partners = Partners(self._meeting, team)
        with self._meeting.candid(partners.others):
            return self._train_rows(shard.under(partners), seats, self.tokens, rows_per_microstep, lanes)

    def _spare_row(self, number: int) -> slice:
        """Where a process keeps its copy of a variant that another leads."""
        row = self._pack.bank.slots + number - 1
        return slice(row, row + 1)

    # there

    def _order(self, team: Sequence[int], rows: slice, seats: Seats, rows_per_microstep: int) -> Order:
        """What a limb has to know; moments go to the shared memory."""
        people = [
            {"variant": seat.occupant.variant.to_json(), "meta": self._put(row, seat.occupant), "steps": seat.steps}
            if seat
            else None
            for row, seat in zip(range(rows.start, rows.stop), seats, strict=True)
        ]
        told = {"rows": [rows.start, rows.stop], "ranks": self._pack.bank.ranks, "seats": people}
        return {"team": list(team), **told, "rows_per_microstep": rows_per_microstep}

    def _obey(self, number: int, shard: Shard, order: Order) -> Order:
        """In the limb: seat the variants, train them, and say what came of them."""
        if self._meeting.me is None:
            self._meeting.enter(number)
            shard.progress = partial(self._signs.count, number)
        bank, rows = self._pack.bank, slice(*order["rows"])
        bank.ranks[:] = order["ranks"]
        shard.show(rows)
        seats = [
            Seat(self._occupant(row, told), told["steps"]) if told else None
            for row, told in zip(range(rows.start, rows.stop), order["seats"], strict=True)
        ]
        tallies = self._train(shard, order["team"], seats, order["rows_per_microstep"])
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


def _close(limbs: Sequence[Limb], meeting: Meeting) -> None:
    meeting.close()  # first: whoever waits there for this process must not wait for ever
    for limb in limbs:
        limb.close()
