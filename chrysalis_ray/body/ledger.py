"""What is known: every result that a cut of the store holds, and which seeds somebody may still ask for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set
from typing import Any

from chrysalis_ray.body.turn import Ask, Outcome, Turn, first_position
from chrysalis_ray.core.records import Variant
from chrysalis_ray.core.store import Store

HOLDS = 4  # checkpoints that Tune keeps per trial, and so seeds that an exploit may still ask for


class Ledger:
    """The cuts of a store as a table of positions. One process at a time writes it: omega."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.known: dict[str, Outcome] = {}  # target position -> what it came to
        self.newest: dict[str, str] = {}  # variant -> target of its newest cut, whose seed must be kept
        self.recent: list[set[str]] = []  # seeds of the newest two cuts
        self.held: dict[str, deque[str]] = {}  # variant -> positions that Tune's checkpoints name
        self.next_cut = 0
        for number, body in store.cuts():
            self.next_cut = number + 1
            seeds = set()
            for target, entry in body["results"].items():
                self.known[target] = Outcome(target, entry["seed"], entry["metrics"])
                self.newest[entry["variant_id"]] = target
                seeds.add(entry["seed"])
            self.recent = [*self.recent[-1:], seeds]

    def commit(self, turn: Turn, outcomes: Sequence[Outcome]) -> int:
        """Write the outcomes of a train turn as one cut, all or nothing; returns its number."""
        work = {item.target: item for item in turn.work}
        results = {
            outcome.target: {
                "variant_id": work[outcome.target].variant.variant_id,
                "seed": outcome.seed,
                "chunk": work[outcome.target].chunk,
                "origin": work[outcome.target].origin,
                "metrics": outcome.metrics,
            }
            for outcome in outcomes
        }
        number = self.next_cut
        self.store.commit_cut(number, {"turn": turn.number, "results": results})
        self.next_cut += 1
        for outcome in outcomes:
            self.known[outcome.target] = outcome
            self.newest[work[outcome.target].variant.variant_id] = outcome.target
        self.recent = [*self.recent[-1:], {outcome.seed for outcome in outcomes}]
        return number

    def hold(self, variant_id: str, position: str) -> None:
        """Keep the seed of `position` until the variant has held four newer ones."""
        self.held.setdefault(variant_id, deque(maxlen=HOLDS)).append(position)

    def collect(self, keep: Set[str] = frozenset()) -> int:
        """Delete the seeds that nobody can ask for any more, but for those to `keep`; returns the bytes freed."""
        positions = [*self.newest.values(), *(position for held in self.held.values() for position in held)]
        seeds = {self.known[position].seed for position in positions if position in self.known}
        return self.store.collect(set().union(*self.recent) | seeds | keep)

    def can_start(self, position: str) -> bool:
        """Whether the seed of a known position is still there to start from."""
        return position in self.known and self.store.holds(self.known[position].seed)


def standing_row(variant: Variant, end: tuple[str, str | None] | None, standing: tuple[Ask, Outcome] | None) -> dict[str, Any]:
    """Where a variant stands, for `population.json`: its end (state, reason) if it has one, and what it was answered last."""
    state, reason = end or ("waiting", None)
    row: dict[str, Any] = {"state": state, "reason": reason, "position": first_position(variant), "chunks": 0}
    if standing is not None:
        ask, outcome = standing
        row |= {"position": ask.target, "chunks": ask.chunk + 1, "metrics": outcome.metrics}
        row |= {"variant": ask.variant.to_json()} | ({"seed": outcome.seed} if outcome.seed else {})
    return row
