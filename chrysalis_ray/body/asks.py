"""What trials ask, and what they are told: one future for each who waits, one answer for each position, whoever asks again."""

from __future__ import annotations

import asyncio

from chrysalis_ray.body.turn import Answer, Ask, Outcome, next_position
from chrysalis_ray.core.records import Variant


class Asks:
    """The asks of all trials. An ask is open until it is `taken`, and known by its target until it is answered."""

    def __init__(self) -> None:
        self.open: dict[str, Ask] = {}  # variant -> its ask
        self.taken: set[str] = set()  # targets that a turn works on, or that are about to be answered
        self.delivered: dict[str, Answer] = {}
        self.standing: dict[str, tuple[Ask, Outcome]] = {}  # variant -> where its trial knows it to stand
        self.serving: dict[str, str] = {}  # variant -> the process that last asked for it
        self.waiting: dict[str, list[asyncio.Future[Answer]]] = {}

    def hear(self, variant: Variant, position: str, chunk: int, who: str) -> Answer | asyncio.Future[Answer]:
        """Note an ask; returns the answer, or the future of it."""
        self.serving[variant.variant_id] = who
        target = next_position(position, variant)
        if target in self.delivered:
            return self.delivered[target]
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(target, []).append(answer)
        if target not in self.taken:
            self.open[variant.variant_id] = Ask(variant, position, target, chunk, who)
        return answer

    def is_served_by_another(self, variant_id: str, who: str) -> bool:
        """Whether another process has followed `who` already."""
        return self.serving.get(variant_id, who) != who

    def withdraw(self, variant_id: str) -> None:
        self.open.pop(variant_id, None)

    def take(self, most: int) -> list[Ask]:
        """The asks of the first variants, in their order; they are open no more."""
        chosen = sorted(self.open.values(), key=lambda ask: ask.variant.index)[:most]
        for ask in chosen:
            del self.open[ask.variant.variant_id]
            self.taken.add(ask.target)
        return chosen

    def answer(self, ask: Ask, outcome: Outcome) -> None:
        """Tell everybody who waits for this position."""
        told = Answer(ask.target, ask.chunk + 1, outcome.metrics)
        self.delivered[ask.target] = told
        self.standing[ask.variant.variant_id] = (ask, outcome)
        self.taken.discard(ask.target)
        for future in self.waiting.pop(ask.target, []):
            if not future.done():
                future.set_result(told)

    def refuse(self, ask: Ask, error: Exception) -> None:
        """Raise `error` at everybody who waits for this position."""
        self.taken.discard(ask.target)
        for future in self.waiting.pop(ask.target, []):
            if not future.done():
                future.set_exception(error)

    def refuse_all(self, error: Exception) -> None:
        """Raise `error` at everybody who waits."""
        for future in (future for futures in self.waiting.values() for future in futures):
            if not future.done():
                future.set_exception(error)

    def told(self) -> dict[str, str]:
        """The position that each variant's trial heard of last."""
        return {variant_id: ask.target for variant_id, (ask, _) in self.standing.items()}

    def kept_seeds(self) -> set[str]:
        """The seeds of where the variants stand: they are harvested from there."""
        return {outcome.seed for _, outcome in self.standing.values() if outcome.seed}
