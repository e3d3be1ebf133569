"""A pack computed by several threads of one worker, each with variants of its own.

On CPUs the operations of a small base are too short to be split: with two threads inside each, as torch does it, a step of
a variant costs about 1.5 times the core time that it costs with one. So the live variants are split instead. A shard is a
copy of the trunk's modules that shares every frozen tensor and looks at its own rows of the bank. Shards meet nowhere before
a chunk ends: they need neither locks nor sums, and none waits for another at every step. Threads that are left over when
few variants live go into the operations, if the base is wide enough for that to pay.

What a shard computes it computes in passes of so many variants as `tokens_per_pass` hold (`passes.py`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from chrysalis_ray.training.bank import Bank, Window, bucket_rank
from chrysalis_ray.training.blend import Blend
from chrysalis_ray.training.engine import Engine
from chrysalis_ray.training.heads import Head
from chrysalis_ray.training.lanes import MicroBatch
from chrysalis_ray.training.loss import Labelled, TokenScores, head_cross_entropy, token_scores
from chrysalis_ray.training.passes import MOST_SHARDS, WIDE, passes_of, splits, variants_per_pass
from chrysalis_ray.training.past import Past
from chrysalis_ray.training.sums import Gradients, Sums

Item = TypeVar("Item")
Result = TypeVar("Result")


def no_progress() -> None:
    """Nobody asks whether this process gets on."""


class Shard:
    """Some of the live variants on the frozen base: a trunk to call, and the head. Its window says which rows they are.

    With `buckets` each is computed as wide as its rank needs and passes may differ in length; else all are as wide as the bank
    is, and all passes alike.
    """

    def __init__(
        self, trunk: nn.Module, head: Head, window: Window, engine: Engine, buckets: bool, tokens_per_pass: int | None = None
    ) -> None:
        self.trunk = trunk
        self.head = head
        self.window = window
        self.engine = engine
        self.buckets = buckets
        self.tokens_per_pass = tokens_per_pass
        self.layered: Gradients | None = None  # where gradients go to their owners layer by layer
        self.progress: Callable[[], None] = no_progress  # called after every pass

    def sums(self) -> Gradients:
        """What takes the gradients of a chunk, all of them zero."""
        return self.layered or Sums(self.engine, self.window.bank.gflat_SP[self.window.rows])

    def under(self, engine: Engine) -> Shard:
        """This shard with another engine."""
        other = Shard(self.trunk, self.head, self.window, engine, self.buckets, self.tokens_per_pass)
        other.progress = self.progress
        return other

    def passes(self, variants: int, lane: int) -> list[slice]:
        """Which of so many variants of `lane` tokens each go through the base together, one pass after the other."""
        return passes_of(variants, variants_per_pass(variants, lane, self.tokens_per_pass, even=not self.buckets))

    def show(self, rows: slice) -> None:
        """Compute these rows of the bank from now on."""
        self.window.show(rows, self.window.bank.ranks[rows] if self.buckets else None)

    def hidden(self, batch: MicroBatch, past: Past | None = None) -> Tensor:
        """Hidden states [N x T, D] of a batch that has a lane for every row of the window; it goes on after `past`."""
        self.window.passage = batch.passage
        return self.trunk(batch.input_ids_NT, batch.position_ids_NT, past=past).flatten(0, 1)

    def loss(self, hidden_ND: Tensor, labelled: Labelled) -> tuple[Tensor, Tensor]:
        """Weighted sum of the token losses, to be differentiated, and the losses [K], in nats."""
        with self.engine.gather(self.head.parameters):
            return head_cross_entropy(hidden_ND, self.head.weight, self.head.bias, labelled, arithmetic=self.head.arithmetic)

    def summed(self) -> None:
        """A variant's gradient is complete, here where its step is made; a kind may add what no token brings."""

    def moved(self, step: int) -> None:
        """Optimizer step number `step` of a variant was made here; its gradient is still there."""

    @torch.no_grad()
    def token_scores(self, batch: MicroBatch, keep: bool = False) -> TokenScores:
        """Losses [N x T] in nats of every token, 0 where there is no label, and hits; for evaluation. With `keep` the hidden
        states [N x T, D] as well."""
        hidden_ND = self.hidden(batch)
        with self.engine.gather(self.head.parameters):
            scores_K = token_scores(
                hidden_ND, self.head.weight, self.head.bias, batch.labelled, arithmetic=self.head.arithmetic
            )
        losses_N = scores_K.losses.new_zeros(hidden_ND.shape[0])
        hits_N = scores_K.hits.new_zeros(hidden_ND.shape[0])
        losses_N[batch.labelled.index_K], hits_N[batch.labelled.index_K] = scores_K[:2]
        self.progress()
        return TokenScores(losses_N, hits_N, hidden_ND.cpu() if keep else None)


class Shards:
    """All shards of a worker. `spread` deals the live rows out, `each` works on all parts at once."""

    def __init__(
        self,
        trunk: nn.Module,
        head: Head,
        window: Window,
        engine: Engine,
        threads: int,
        lanes: str,
        tokens_per_pass: int | None = None,
    ) -> None:
        bank = window.bank
        lonely = engine.world == 1 and not engine.in_order  # threads would mix up collectives, and change shapes
        alone = engine.device.type == "cpu" and engine.copyable and lonely
        count = min(threads, MOST_SHARDS) if alone else 1
        if lanes == "fixed":  # every shard computes the same shapes, so that a variant's bits are those of any slot
            count = max(size for size in range(1, min(count, bank.slots) + 1) if bank.slots % size == 0)
        self.threads = threads
        self.buckets = lanes != "fixed"
        self.all = [Shard(trunk, head, window, engine, self.buckets, tokens_per_pass)]
        for _ in range(1, count):
            own = Window(bank)
            self.all.append(Shard(copy_sharing(trunk, window, own), head, own, engine, self.buckets, tokens_per_pass))
        self.live = self.all[:1]
        # on Linux, whose forks are cheap and safe for what a limb does; wide operations take so long that threads do not mind
        self.may_fork = count > 1 and bank.widest < WIDE and sys.platform == "linux" and not torch.cuda.is_initialized()
        self.may_share = self.may_fork and lanes == "compacted"  # whether several processes may compute one variant
        self.may_split = True  # whether a long lane's operations may have the threads that no other variant needs
        self.apart: object = None  # the shards in processes of their own, once they have trained
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="shard") if count > 1 else None

    def order(self, ranks: Sequence[int], most: int) -> list[int]:
        """In which order variants of these ranks should stand in a bank of rank `most`: like ranks together, and every shard
        with its share of the high ones. Where they all fall into one bucket, as they are."""
        widths = [bucket_rank(rank, most) for rank in ranks]
        if not self.buckets or len(set(widths)) < 2:
            return list(range(len(ranks)))
        room = [part.stop - part.start for part in _parts(len(ranks), len(self.all))]
        hands: list[list[int]] = [[] for _ in room]
        for index in sorted(range(len(ranks)), key=lambda index: -widths[index]):
            shard = max(range(len(room)), key=lambda shard: room[shard] - len(hands[shard]))
            hands[shard].append(index)
        return [index for hand in hands for index in hand]

    def sizes(self, live: int) -> list[int]:
        """How many of so many live rows each shard gets."""
        return [part.stop - part.start for part in _parts(live, len(self.all))]

    def spread(self, bank: Bank) -> None:
        """Deal the live rows of the bank to as many shards as there is work for, neighbours together."""
        parts = _parts(bank.live, len(self.all))
        self.live = self.all[: len(parts)]
        for shard, rows in zip(self.live, parts, strict=True):
            shard.show(rows)

    @contextmanager
    def blended(self, blend: Blend) -> Iterator[list[slice]]:
        """Compute the candidates of `blend` instead of rows of the bank, dealt out alike; yields those of every live shard."""
        parts, before = _parts(len(blend), len(self.all)), self.live
        self.live = self.all[: len(parts)]
        try:
            for shard, part in zip(self.live, parts, strict=True):
                shard.window.blend = blend.part(part)
            yield parts
        finally:
            for shard in self.all:
                shard.window.blend = None
            self.live = before

    def in_turns(self, parts: Sequence[slice], lanes: int, blend: Blend | None = None) -> Iterator[list[slice]]:
        """Show every live shard at most so many lanes of its part at a time, until all were shown; yields those of each.

        What follows is computed by `each`, an item for each of them. `parts` are rows of the bank, or candidates of `blend`.
        """
        shards = self.live
        turns = -(-max(part.stop - part.start for part in parts) // lanes)
        try:
            for turn in range(turns):
                own = [_piece(part, turn, turns) for part in parts]
                busy = [(shard, piece) for shard, piece in zip(shards, own, strict=True) if piece.stop > piece.start]
                self.live = [shard for shard, _ in busy]
                for shard, piece in busy:
                    if blend is None:
                        shard.show(piece)
                    else:
                        shard.window.blend = blend.part(piece)
                yield [piece for _, piece in busy]
        finally:
            self.live = shards
            for shard, part in zip(shards, parts, strict=True):
                if blend is None:
                    shard.show(part)

    @property
    def rows(self) -> list[slice]:
        """The rows of every live shard, in order."""
        return [shard.window.rows for shard in self.live]

    def each(self, work: Callable[[Shard, Item], Result], items: Sequence[Item], lane: int = 0) -> list[Result]:
        """`work(shard, item)` for every live shard and its item, side by side, a variant's `lane` of so many tokens at a time.
        What one of them raises is raised here."""
        if self._pool is None:
            return [work(shard, item) for shard, item in zip(self.live, items, strict=True)]
        several = splits(self.live[0].window.bank.widest, lane if self.may_split else 0)
        inside = self.threads // len(self.live) if several else 1
        futures = [self._pool.submit(_alone, work, shard, item, inside) for shard, item in zip(self.live, items, strict=True)]
        wait(futures)  # before anything is raised: nobody may still write into the bank
        return [future.result() for future in futures]


def _parts(live: int, shards: int) -> list[slice]:
    """The rows of every shard that has some."""
    count = min(shards, live)
    return [slice(index * live // count, (index + 1) * live // count) for index in range(count)]


def _piece(part: slice, turn: int, turns: int) -> slice:
    """What of a part comes in one of several turns."""
    size = part.stop - part.start
    return slice(part.start + turn * size // turns, part.start + (turn + 1) * size // turns)


def _alone(work: Callable[[Shard, Item], Result], shard: Shard, item: Item, threads: int) -> Result:
    """Work in this thread, with so many threads inside its operations (torch keeps that number for each thread)."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return work(shard, item)


def copy_sharing(trunk: nn.Module, window: Window, own: Window) -> nn.Module:
    """A copy of the trunk's modules whose packed layers look through `own`; parameters are shared, never copied."""
    shared: Iterable[Tensor] = trunk.parameters()
    return copy.deepcopy(trunk, {id(window): own, **{id(parameter): parameter for parameter in shared}})
