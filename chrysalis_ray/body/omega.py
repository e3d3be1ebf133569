"""Omega: the actor between light trials and a heavy body.

Trials ask `advance`; the body asks `next_turn` and hands in `commit`. Between them omega keeps three promises:

* **barrier**: a turn starts when every live variant has asked (`barrier.py`), so that the pack is the same in every run;
* **order**: answers leave one by one in the order of the variants, each after the decision on the one before, so that an
  asynchronous scheduler takes the same decisions in every run;
* **cut**: the results of a turn are on disk before anyone hears of them.

After a kill the same asks come again and are answered from the cuts on disk without any training, until the first one that
is not there. Nothing else has to be restored: neither Tune's state nor the scheduler's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chrysalis_ray.body.barrier import Barrier
from chrysalis_ray.body.ledger import Ledger, standing_row
from chrysalis_ray.body.turn import Answer, Ask, Candidate, Judgement, Outcome, Scores, Turn, Work, next_position
from chrysalis_ray.core.errors import BodyError, StoreError, VariantLost
from chrysalis_ray.core.records import Variant
from chrysalis_ray.core.store import Store
from chrysalis_ray.core.weave import Weave

# A turn waits this long for a variant whose trial is silent. Long on purpose: a turn without it would have another pack.
LINGER_SECONDS = 600.0
VAIN_LIVES = 6  # a spot machine may die any number of times, but not always before it has done anything


class Omega:
    """One per run; lives on the driver's node. All methods run on one event loop, so that none needs a lock."""

    def __init__(
        self,
        store: str,
        weave: str,
        variants: Sequence[Variant],
        slots: int,
        linger_seconds: float = LINGER_SECONDS,
        barrier: Barrier | None = None,
    ) -> None:
        self.store = Store(Path(store))
        self.weave = Weave(Path(weave))
        self.variants = {variant.variant_id: variant for variant in variants}
        self.slots = slots
        self.barrier = barrier or Barrier(slots, len(variants))
        self.linger_seconds = linger_seconds
        self.ledger = Ledger(self.store)
        self.known = self.ledger.known  # target position -> what it came to, from the cuts
        self.asks: dict[str, Ask] = {}
        self.flight: set[str] = set()
        self.waiting: dict[str, list[asyncio.Future[Answer]]] = {}
        self.delivered: dict[str, Answer] = {}
        self.standing: dict[str, tuple[Ask, Outcome]] = {}  # variant -> where its trial knows it to stand
        self.concluded: dict[str, tuple[str, str | None]] = {}
        self.detached: dict[str, float] = {}  # variant -> when its trial last went away
        self.serving: dict[str, str] = {}  # variant -> the process that last asked for it
        self.identities: dict[str, str] = {}
        self.judgements: list[Judgement] = []
        self.turn: Turn | None = None
        self.turn_done: asyncio.Future[None] | None = None
        self.turn_number = 0
        self.epoch = 0
        self.lives_without_work = 0
        self.workers: dict[int, tuple[int, str]] = {}
        self.lost: str | None = None
        self.dissolving = False
        self.changed = asyncio.Condition()
        self.last_change = time.monotonic()
        self.trained = {"turns": 0, "variant_chunks": 0, "train_seconds": 0.0}
        self.steering: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Begin to steer; returns the number of chunks that are known already."""
        self.steering = asyncio.get_running_loop().create_task(self._steer_or_tell())
        return len(self.known)

    async def _notify(self) -> None:
        async with self.changed:
            self.last_change = time.monotonic()
            self.changed.notify_all()

    # the trials' side -----------------------------------------------------------------------------------------------

    async def advance(self, variant: Variant, position: str, chunk: int, who: str = "") -> Answer:
        """Train one chunk of `variant` from `position`, or look it up. `who` names the process that asks.

        Raises BodyError when the body is lost for good, VariantLost when the store has no seed to start from.
        """
        self._check_alive()
        self.serving[variant.variant_id] = who
        target = next_position(position, variant)
        if target in self.delivered:
            return self.delivered[target]
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(target, []).append(answer)
        if target not in self.flight:
            self.asks[variant.variant_id] = Ask(variant, position, target, chunk, who)
        self.concluded.pop(variant.variant_id, None)
        await self._notify()
        return await answer

    async def identify(self, trial_id: str, variant_id: str) -> str:
        """Which variant a trial is: settled at its first start, whatever config it is given later."""
        return self.identities.setdefault(trial_id, variant_id)

    async def join(self, variant: Variant) -> None:
        """A variant that was proposed while others train; its trial is about to start."""
        self.variants[variant.variant_id] = variant
        await self._notify()

    async def rest(self, heard: dict[str, str], running: list[str]) -> None:
        """Tune has nothing to do but to wait for the trials of the `running` variants (`barrier.py`)."""
        self.barrier.rest(heard, running)
        await self._notify()

    async def hold(self, variant_id: str, position: str) -> None:
        """A trial wrote `position` into a checkpoint: its seed stays until the variant has held four newer ones."""
        self.ledger.hold(variant_id, position)

    async def detach(self, variant_id: str, who: str = "") -> None:
        """The trial of this variant went away (stopped, paused or restarted): nobody waits for its ask any more.

        What a process says that another has followed already comes late and changes nothing.
        """
        if self.serving.get(variant_id, who) != who:
            return
        self.asks.pop(variant_id, None)
        self.detached[variant_id] = time.monotonic()
        await self._notify()

    async def conclude(self, variant_id: str, state: str, reason: str | None) -> None:
        """Tune is done with this variant for good: its lane is free."""
        self.asks.pop(variant_id, None)
        self.concluded[variant_id] = (state, reason)
        self.weave.append(f"variant.{state}", {"variant": variant_id, "reason": reason})
        await self._notify()

    # the body's side ------------------------------------------------------------------------------------------------

    async def hello(self, world: int, pid: int, node: str) -> int:
        """Rank 0 of a worker group that just came to life; everything older is stale from now on.

        Raises BodyError when the body was given up, so that a group that is restarted in vain ends.
        """
        self._check_alive()
        self.epoch += 1
        self.lives_without_work += 1
        self.workers = {}
        if self.lives_without_work > VAIN_LIVES:
            await self.body_lost(f"{VAIN_LIVES} lives in a row ended before they finished a turn")
            self._check_alive()
        self.weave.append("body.manifest", {"epoch": self.epoch, "workers": world, "pid": pid, "node": node})
        await self._notify()
        return self.epoch

    async def present(self, epoch: int, rank: int, pid: int, node: str) -> None:
        """A worker tells where it runs, for `describe`."""
        if epoch == self.epoch:
            self.workers[rank] = (pid, node)

    async def next_turn(self, epoch: int, after: int) -> Turn:
        """The turn that follows number `after`. Raises BodyError to a worker of an older life."""
        async with self.changed:
            while epoch == self.epoch and (self.turn is None or self.turn.number <= after):
                await self.changed.wait()
        if epoch != self.epoch or self.turn is None:
            raise BodyError(f"this worker belongs to life {epoch} of the body; it is in life {self.epoch} now")
        return self.turn

    async def commit(self, epoch: int, number: int, outcomes: Sequence[Outcome], seconds: float) -> None:
        """Write the cut of a train turn; only then the trials hear of it."""
        turn = self._turn_of(epoch, number)
        cut = self.ledger.commit(turn, outcomes)
        self.weave.append("turn.committed", {"cut": cut, "variants": sorted(w.variant.variant_id for w in turn.work)})
        self.trained["turns"] += 1
        self.trained["variant_chunks"] += len(outcomes)
        self.trained["train_seconds"] += seconds
        self.ledger.collect()
        self._finish_turn()

    async def judged(self, epoch: int, number: int, scores: Scores) -> None:
        """Hand in the scores of a judge turn."""
        self._turn_of(epoch, number)
        answer = self.judgements.pop(0).answer
        if not answer.done():  # who asked may be gone
            answer.set_result(scores)
        self._finish_turn()

    def _turn_of(self, epoch: int, number: int) -> Turn:
        if epoch != self.epoch or self.turn is None or self.turn.number != number:
            raise BodyError(f"turn {number} of life {epoch} is over: the body is in life {self.epoch}")
        return self.turn

    def _finish_turn(self) -> None:
        self.turn = None
        self.lives_without_work = 0
        if self.turn_done is not None:
            self.turn_done.set_result(None)
            self.turn_done = None

    # the lifecycle's side -------------------------------------------------------------------------------------------

    async def judge(self, candidates: Sequence[Candidate], split: str, rows_per_domain: int) -> Scores:
        """Score adapters on held-out rows in one packed pass; domain, document, loss sum in nats, tokens."""
        self._check_alive()
        answer: asyncio.Future[Scores] = asyncio.get_running_loop().create_future()
        self.judgements.append(Judgement(tuple(candidates), split, rows_per_domain, answer))
        await self._notify()
        return await answer

    async def dissolve(self) -> None:
        """The body may go home."""
        self.dissolving = True
        await self._notify()

    async def give_up(self, epoch: int, reason: str) -> None:
        """A worker met an error that another life would meet again; a worker of an older life has no say."""
        if epoch == self.epoch and self.lost is None:
            await self.body_lost(reason)

    async def ended(self, reason: str | None) -> None:
        """The worker group is gone, by an error or (`reason` None) by itself; after `dissolve` that is as it should be."""
        if self.dissolving:
            self._journal("body.dissolved", {"reason": reason})
        elif self.lost is None:
            await self.body_lost(reason or "its workers went home before they were asked to")

    async def body_lost(self, reason: str) -> None:
        """The body will not come back: whoever waits gets BodyError instead of waiting for ever."""
        self.lost = reason
        error = BodyError(f"the body was lost: {reason}", "see the worker's log under bodies/; run the same command to go on")
        futures: list[asyncio.Future[Any]] = [judgement.answer for judgement in self.judgements]
        futures += [answer for answers in self.waiting.values() for answer in answers]
        for answer in futures:
            if not answer.done():
                answer.set_exception(error)
        await self._notify()
        self._journal("body.lost", {"reason": reason})

    def _journal(self, kind: str, body: dict[str, Any]) -> None:
        """Note the end of a body if that is still possible: a full disk may be what ended it."""
        with contextlib.suppress(StoreError):
            self.weave.append(kind, body)

    async def lost_because(self) -> str | None:
        """Why the body is lost for good, or None."""
        return self.lost

    async def describe(self) -> dict[str, Any]:
        """A snapshot for tables, tests and the curious."""
        return {
            "epoch": self.epoch,
            "turn": self.turn.number if self.turn else None,
            "asks": sorted(self.asks),
            "live": sorted(item.variant.variant_id for item in self.turn.work) if self.turn else [],
            "workers": {rank: {"pid": pid, "node": node} for rank, (pid, node) in self.workers.items()},
            "cuts": self.ledger.next_cut,
            "concluded": {key: state for key, (state, _) in self.concluded.items()},
            **self.trained,
        }

    async def summary(self) -> dict[str, dict[str, Any]]:
        """Where every variant stands: state, reason, position, seed blob, chunk, hyperparameters and last metrics."""
        return {
            variant_id: standing_row(variant, self.concluded.get(variant_id), self.standing.get(variant_id))
            for variant_id, variant in self.variants.items()
        }

    def _check_alive(self) -> None:
        if self.lost is not None:
            raise BodyError(f"the body was lost: {self.lost}", "run the same command again to go on")

    # steering -------------------------------------------------------------------------------------------------------

    async def _steer_or_tell(self) -> None:
        """Steer; if that ends by an error, nobody else would ever be answered: say so, then raise it."""
        try:
            await self._steer()
        except Exception as error:
            await self.body_lost(f"omega failed: {type(error).__name__}: {error}")
            raise

    async def _steer(self) -> None:
        """For ever: gather asks, train what is not known, answer in order."""
        while True:
            asks = await self._gather()
            if self.judgements:
                await self._publish_judgement(self.judgements[0])
            elif self.dissolving:
                await self._publish(Turn(self.turn_number, "dissolve"))
                return
            elif asks:
                await self._answer(await self._train_unknown(asks))

    async def _gather(self) -> list[Ask]:
        """Wait until every live variant has asked, something is to be judged, or the body may go."""
        while True:
            async with self.changed:
                full = self.barrier.may_start(self.asks, len(self.concluded), self._told())
                lingered = time.monotonic() - self.last_change > self.linger_seconds
                if self.judgements or self.dissolving or full or (self.asks and lingered):
                    break
                try:
                    await asyncio.wait_for(self.changed.wait(), timeout=1.0)
                except TimeoutError:
                    continue
        if self.judgements or self.dissolving:
            return []
        chosen = sorted(self.asks.values(), key=lambda ask: ask.variant.index)[: self.slots]
        for ask in chosen:
            del self.asks[ask.variant.variant_id]
            self.flight.add(ask.target)
        return chosen

    async def _train_unknown(self, asks: Sequence[Ask]) -> list[Ask]:
        """Train what no cut knows yet; returns the asks that can be answered now."""
        startable = [ask for ask in asks if ask.target in self.known or self._origin_known(ask)]
        for ask in asks:
            if ask not in startable:
                self._refuse(ask)
        work = tuple(self._work(ask) for ask in startable if ask.target not in self.known)
        if work:
            await self._publish(Turn(self.turn_number, "train", work=work))
        return startable

    def _origin_known(self, ask: Ask) -> bool:
        """Whether there is something to start from: the shared seed, or a blob that the store still holds."""
        return self.ledger.can_start(ask.origin) or ask.starts(self.variants[ask.variant.variant_id])

    def _refuse(self, ask: Ask) -> None:
        self.flight.discard(ask.target)
        error = VariantLost(f"{ask.variant.variant_id}: the store holds no seed for position {ask.origin}")
        for future in self.waiting.pop(ask.target, []):
            if not future.done():
                future.set_exception(error)

    def _work(self, ask: Ask) -> Work:
        seed = self.known[ask.origin].seed if ask.origin in self.known else None
        return Work(ask.variant, ask.origin, ask.target, ask.chunk, seed)

    async def _publish_judgement(self, judgement: Judgement) -> None:
        await self._publish(
            Turn(
                self.turn_number,
                "judge",
                candidates=judgement.candidates,
                split=judgement.split,
                rows_per_domain=judgement.rows_per_domain,
            )
        )

    async def _publish(self, turn: Turn) -> None:
        """Show a turn to the workers and wait until it is done (a dissolve never is)."""
        self.turn = turn
        self.turn_number += 1
        self.turn_done = asyncio.get_running_loop().create_future()
        done = self.turn_done
        await self._notify()
        if turn.kind != "dissolve":
            await done

    async def _answer(self, asks: Sequence[Ask]) -> None:
        """Release the answers one by one, each when the decision on the one before has shown."""
        for ask in asks:
            outcome = self.known[ask.target]
            answer = Answer(ask.target, ask.chunk + 1, outcome.metrics)
            self.delivered[ask.target] = answer
            self.standing[ask.variant.variant_id] = (ask, outcome)
            self.flight.discard(ask.target)
            for future in self.waiting.pop(ask.target, []):
                if not future.done():
                    future.set_result(answer)
            await self._decision(ask.variant.variant_id)

    async def _decision(self, variant_id: str) -> None:
        """Wait until this variant asks again, detaches or is concluded (or its trial is slow beyond reason)."""
        started = time.monotonic()
        async with self.changed:
            while not self._decided(variant_id, started) and time.monotonic() - started < self.linger_seconds:
                try:
                    await asyncio.wait_for(self.changed.wait(), timeout=1.0)
                except TimeoutError:
                    continue

    def _decided(self, variant_id: str, since: float) -> bool:
        left, over = self.detached.get(variant_id, 0.0) >= since, variant_id in self.concluded
        joined, ended = len(self.variants), len(self.concluded)
        return self.barrier.is_decided(variant_id in self.asks, over, left, joined, ended, self._told())

    def _told(self) -> dict[str, str]:
        return {variant_id: ask.target for variant_id, (ask, _) in self.standing.items()}
