"""Omega: the actor between light trials and a heavy body.

Trials ask `advance`; the body asks `next_turn` and hands in `commit`. Between them omega keeps three promises:

* **barrier**: a turn starts when every live variant has asked (`barrier.py`), so that the pack is the same in every run;
* **order**: answers leave one by one in an order that the results alone give (`order.py`), each after the decision on the one
  before, so that an asynchronous scheduler takes the same decisions in every run;
* **cut**: the results of a turn are on disk before anyone hears of them.

Several bodies share a turn (`roster.py`); what one of them loses by dying is its part of one turn.

With `run_ahead` the bodies do not wait for Tune: while the answers leave, the next chunk of everyone who may go on is trained
already. Who asks for something else (an exploit, another learning rate) is trained after it, and a chunk that nobody asks for
rests in its cut. What trains together then still depends on nothing but the turn before.

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

from chrysalis_ray.body.asks import Asks
from chrysalis_ray.body.barrier import Barrier
from chrysalis_ray.body.ledger import Ledger, standing_row
from chrysalis_ray.body.order import AnswerOrder
from chrysalis_ray.body.roster import Roster
from chrysalis_ray.body.turn import Answer, Ask, Candidate, Judged, Judgement, Outcome, Questions, Turn, Work, next_ask
from chrysalis_ray.body.watch import Watch
from chrysalis_ray.core.errors import BodyError, StoreError, VariantLost
from chrysalis_ray.core.records import Variant
from chrysalis_ray.core.store import Store
from chrysalis_ray.core.weave import Weave

# A turn waits this long for a variant whose trial is silent. Long on purpose: a turn without it would have another pack.
LINGER_SECONDS = 600.0
VAIN_LIVES = 6  # a spot machine may die any number of times, but not always before it has done anything


class Omega:
    """One per run; lives on the driver's node. All methods run on one event loop, so that none needs a lock.

    `slots` are those of all `bodies` together.
    """

    def __init__(
        self,
        store: str,
        weave: str,
        variants: Sequence[Variant],
        slots: int,
        linger_seconds: float = LINGER_SECONDS,
        barrier: Barrier | None = None,
        bodies: int = 1,
        run_ahead: bool = False,
        order: AnswerOrder | None = None,
        hang_seconds: float | None = None,
    ) -> None:
        self.store = Store(Path(store))
        self.weave = Weave(Path(weave))
        self.variants = {variant.variant_id: variant for variant in variants}
        self.slots = slots
        self.barrier = barrier or Barrier(slots, len(variants))
        self.linger_seconds = linger_seconds
        self.run_ahead = run_ahead
        self.order = order or AnswerOrder()
        self.ledger = Ledger(self.store)
        self.known = self.ledger.known  # target position -> what it came to, from the cuts
        self.asks = Asks()
        self.roster = Roster(bodies)
        self.watch = Watch(bodies, hang_seconds)
        self.concluded: dict[str, tuple[str, str | None]] = {}
        self.identities: dict[str, str] = {}
        self.judgements: list[Judgement] = []
        self.turn_number = 0
        self.turn_done: asyncio.Future[None] | None = None
        self.ahead: asyncio.Task[list[Ask]] | None = None
        self.lost: str | None = None
        self.dissolving = False
        self.changed = asyncio.Condition()
        self.last_change = time.monotonic()
        self.trained = {"turns": 0, "variant_chunks": 0, "train_seconds": 0.0}
        self.steering: asyncio.Task[None] | None = None
        self.watching: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Begin to steer; returns the number of chunks that are known already."""
        self.steering = asyncio.get_running_loop().create_task(self._steer_or_tell())
        self.watching = asyncio.get_running_loop().create_task(self.watch.keep(self.roster, self._journal))
        return len(self.known)

    async def _notify(self) -> None:
        async with self.changed:
            self.last_change = time.monotonic()
            self.changed.notify_all()

    async def _changes(self) -> None:
        """Wait for a change, or a second; called and left with `changed` held."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):  # not wait_for: before Python 3.12 it can lose a cancellation
                await self.changed.wait()

    # the trials' side -----------------------------------------------------------------------------------------------

    async def advance(self, variant: Variant, position: str, chunk: int, who: str = "") -> Answer:
        """Train one chunk of `variant` from `position`, or look it up. `who` names the process that asks.

        Raises BodyError when a body is lost for good, VariantLost when the store has no seed to start from.
        """
        self._check_alive()
        heard = self.asks.hear(variant, position, chunk, who)
        if isinstance(heard, Answer):
            return heard
        self.concluded.pop(variant.variant_id, None)
        await self._notify()
        return await heard

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
        if self.asks.is_served_by_another(variant_id, who):
            return
        self.asks.withdraw(variant_id)
        await self._notify()

    async def conclude(self, variant_id: str, state: str, reason: str | None) -> None:
        """Tune is done with this variant for good: its lane is free."""
        self.asks.withdraw(variant_id)
        self.concluded[variant_id] = (state, reason)
        self.weave.append(f"variant.{state}", {"variant": variant_id, "reason": reason})
        await self._notify()

    # the bodies' side -----------------------------------------------------------------------------------------------

    async def hello(self, world: int, pid: int, node: str, body: int = 0) -> int:
        """Rank 0 of a worker group that just came to life; everything older of this body is stale from now on.

        Raises BodyError when the run was given up, so that a group that is restarted in vain ends.
        """
        self._check_alive()
        life = self.roster.begin(body)
        if self.roster.in_vain[body] > VAIN_LIVES:
            await self.body_lost(f"{VAIN_LIVES} lives in a row ended before they finished a turn")
            self._check_alive()
        self.weave.append("body.manifest", {"epoch": life, "body": body, "workers": world, "pid": pid, "node": node})
        await self._notify()
        return life

    async def present(self, life: int, rank: int, pid: int, node: str, born: str) -> None:
        """A worker tells where it runs, and since when."""
        if self.roster.is_current(life):
            self.roster.life(life).workers[rank] = (pid, node, born)

    async def progress(self, life: int) -> None:
        """A body gets on (`watch.py`)."""
        if self.roster.is_current(life):
            self.watch.sign(self.roster.life(life))

    async def next_turn(self, life: int, after: int) -> Turn:
        """This body's part of the turn that follows number `after`. Raises BodyError to a worker of an older life."""
        await self.progress(life)
        async with self.changed:
            while (part := self.roster.part(life, after)) is None:
                await self.changed.wait()
        return part

    async def commit(self, life: int, number: int, outcomes: Sequence[Outcome], seconds: float) -> None:
        """A body's part of a train turn is done. With the last part the cut is written; only then the trials hear of it."""
        if not self.roster.hand_in(life, number, (tuple(outcomes), seconds)):
            return
        turn, results = self.roster.turn, self.roster.collected()
        assert turn is not None
        together = [outcome for outcomes, _ in results for outcome in outcomes]
        cut = self.ledger.commit(turn, together)
        self.weave.append("turn.committed", {"cut": cut, "variants": sorted(w.variant.variant_id for w in turn.work)})
        self.trained["turns"] += 1
        self.trained["variant_chunks"] += len(together)
        self.trained["train_seconds"] += max(seconds for _, seconds in results)
        self.ledger.collect(self.asks.kept_seeds())
        self._finish_turn()

    async def judged(self, life: int, number: int, scores: Judged) -> None:
        """Hand in a body's part of what a judge turn came to."""
        if not self.roster.hand_in(life, number, scores):
            return
        answer = self.judgements.pop(0).answer
        together = {name: rows for part in self.roster.collected() for name, rows in part.items()}
        if not answer.done():  # who asked may be gone
            answer.set_result(together)
        self._finish_turn()

    def _finish_turn(self) -> None:
        if self.turn_done is not None:
            self.turn_done.set_result(None)
            self.turn_done = None

    async def give_up(self, life: int, reason: str) -> None:
        """A worker met an error that another life would meet again; a worker of an older life has no say."""
        if self.roster.is_current(life) and self.lost is None:
            await self.body_lost(reason)

    async def ended(self, reason: str | None) -> None:
        """A worker group is gone, by an error or (`reason` None) by itself; after `dissolve` that is as it should be."""
        if self.dissolving:
            self._journal("body.dissolved", {"reason": reason})
        elif self.lost is None:
            await self.body_lost(reason or "its workers went home before they were asked to")

    async def body_lost(self, reason: str) -> None:
        """A body will not come back: whoever waits gets BodyError instead of waiting for ever."""
        self.lost = reason
        error = BodyError(f"the body was lost: {reason}", "see errors.log under bodies/; run the same command to go on")
        for judgement in self.judgements:
            if not judgement.answer.done():
                judgement.answer.set_exception(error)
        self.asks.refuse_all(error)
        await self._notify()
        self._journal("body.lost", {"reason": reason})

    def _journal(self, kind: str, body: dict[str, Any]) -> None:
        """Note the end of a body if that is still possible: a full disk may be what ended it."""
        with contextlib.suppress(StoreError):
            self.weave.append(kind, body)

    # the lifecycle's side -------------------------------------------------------------------------------------------

    async def judge(
        self, candidates: Sequence[Candidate], split: str, rows_per_domain: int, questions: Questions | None = None
    ) -> Judged:
        """Score adapters on held-out rows in packed passes (`evaluate/subjects.py` has the format), or ask them `questions`."""
        self._check_alive()
        answer: asyncio.Future[Judged] = asyncio.get_running_loop().create_future()
        self.judgements.append(Judgement(tuple(candidates), split, rows_per_domain, answer, questions))
        await self._notify()
        return await answer

    async def dissolve(self) -> None:
        """The bodies may go home."""
        self.dissolving = True
        await self._notify()

    async def lost_because(self) -> str | None:
        """Why a body is lost for good, or None."""
        return self.lost

    async def describe(self) -> dict[str, Any]:
        """A snapshot for tables, tests and the curious."""
        turn = self.roster.turn
        return {
            "turn": turn.number if turn else None,
            "asks": sorted(self.asks.open),
            "live": sorted(item.variant.variant_id for item in turn.work) if turn else [],
            "bodies": [{"life": life.number, "workers": dict(life.workers)} for life in self.roster.lives],
            "cuts": self.ledger.next_cut,
            "concluded": {key: state for key, (state, _) in self.concluded.items()},
            **self.trained,
        }

    async def summary(self) -> dict[str, dict[str, Any]]:
        """Where every variant stands: state, reason, position, seed blob, chunk, hyperparameters and last metrics."""
        return {
            variant_id: standing_row(variant, self.concluded.get(variant_id), self.asks.standing.get(variant_id))
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
        """For ever: gather asks, train what is not known, answer one by one."""
        while True:
            asks = await self._gather()
            if self.ahead is not None:
                await self.ahead
                self.ahead = None
            if self.judgements:
                await self._publish_judgement(self.judgements[0])
            elif self.dissolving:
                await self._publish(Turn(self.turn_number, "dissolve"))
                return
            elif asks:
                answerable = await self._train_unknown(asks)
                if self.run_ahead:
                    self.ahead = asyncio.create_task(self._train_unknown(self._foreseen(answerable)))
                await self._answer(answerable)

    async def _gather(self) -> list[Ask]:
        """Wait until every live variant has asked, something is to be judged, or the bodies may go."""
        while True:
            async with self.changed:
                full = self.barrier.may_start(self.asks.open, len(self.concluded), self.asks.told())
                lingered = time.monotonic() - self.last_change > self.linger_seconds
                if self.judgements or self.dissolving or full or (self.asks.open and lingered):
                    break
                await self._changes()
        return [] if self.judgements or self.dissolving else self.asks.take(self.slots)

    def _foreseen(self, asks: Sequence[Ask]) -> list[Ask]:
        """What those who are about to be answered will ask next, if Tune lets them go on as they are.

        Nothing while one of them ends here: whoever takes its place would train alone, out of step with the others.
        """
        following = [next_ask(ask, self.known[ask.target]) for ask in asks]
        return [ask for ask in following if ask is not None] if None not in following else []

    async def _train_unknown(self, asks: Sequence[Ask]) -> list[Ask]:
        """Train what no cut knows yet; returns the asks that can be answered now."""
        startable = [ask for ask in asks if ask.target in self.known or self._origin_known(ask)]
        for ask in asks:
            if ask not in startable:
                lost = f"{ask.variant.variant_id}: the store holds no seed for position {ask.origin}"
                self.asks.refuse(ask, VariantLost(lost))
        work = tuple(self._work(ask) for ask in startable if ask.target not in self.known)
        if work:
            await self._publish(Turn(self.turn_number, "train", work=work))
        return startable

    def _origin_known(self, ask: Ask) -> bool:
        """Whether there is something to start from: the shared seed, or a blob that the store still holds."""
        return self.ledger.can_start(ask.origin) or ask.starts(self.variants[ask.variant.variant_id])

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
                questions=judgement.questions,
            )
        )

    async def _publish(self, turn: Turn) -> None:
        """Show a turn to the workers and wait until it is done (a dissolve never is)."""
        self.roster.publish(turn)
        self.turn_number += 1
        self.turn_done = asyncio.get_running_loop().create_future()
        done = self.turn_done
        await self._notify()
        if turn.kind != "dissolve":
            await done

    async def _answer(self, asks: Sequence[Ask]) -> None:
        """Release the answers one by one, each when the decision on the one before has shown."""
        for ask in self.order.sort(asks, lambda ask: self.known[ask.target].metrics.get("select_loss")):
            self.asks.answer(ask, self.known[ask.target])
            await self._decision(ask.variant.variant_id)

    async def _decision(self, variant_id: str) -> None:
        """Wait until this variant asks again or is concluded (or its trial is slow beyond reason)."""
        started = time.monotonic()
        async with self.changed:
            while not self._decided(variant_id) and time.monotonic() - started < self.linger_seconds:
                await self._changes()

    def _decided(self, variant_id: str) -> bool:
        asks, over = variant_id in self.asks.open, variant_id in self.concluded
        return self.barrier.is_decided(asks, over, len(self.variants), len(self.concluded), self.asks.told())
