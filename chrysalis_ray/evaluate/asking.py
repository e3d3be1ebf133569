"""Questions put to many candidates at once, through one frozen base: `judging.py` says how they share a pass.

Answers are listened to in rows of like length, each with its prompt. Prompts are gone on with greedily, a token of all
candidates per pass. With W workers each takes every W-th of a batch; all go through the same number of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from chrysalis_ray.evaluate.heldout import Scorer
from chrysalis_ray.evaluate.judging import Find, Writer, passes
from chrysalis_ray.evaluate.questions import Answered, Prompt, Questions, Replies, cut_at
from chrysalis_ray.evaluate.subjects import Candidate
from chrysalis_ray.genome.tokens import NO_LABEL, RowBatch
from chrysalis_ray.training.engine import Engine
from chrysalis_ray.training.generation import end_tokens
from chrysalis_ray.training.pack import Pack

Decode = Callable[[Sequence[int]], str]
Replied = dict[int, list[Any]]  # question -> what every candidate of a pass replied


def ask_candidates(
    pack: Pack, questions: Questions, candidates: Sequence[Candidate], find: Find, decode: Decode
) -> dict[str, Replies]:
    """What every candidate replies; `decode` makes text of ids, for the words that end a text. A mixture cannot be asked.

    Collective: every worker of a body calls it alike. What the slots of `pack` held is lost.
    """
    ends = end_tokens(pack) if questions.prompts else frozenset()
    told: dict[str, Replies] = {}
    for group, score, write, batch_rows in passes(pack, candidates, find):
        heard = _hear(pack.engine, score, questions.answered, batch_rows)
        said = _let_write(pack.engine, write, questions.prompts, batch_rows, ends, decode)
        for place, candidate in enumerate(group):
            told[candidate.name] = (
                [heard[number][place] for number in range(len(questions.answered))],
                [said[number][place] for number in range(len(questions.prompts))],
            )
    return told


def _hear(engine: Engine, score: Scorer, rows: Sequence[Answered], batch_rows: int) -> Replied:
    """What every candidate of a pass makes of every row: its loss in nats, and whether greedy decoding would write it."""
    own: Replied = {}
    for places, spare, _ in _batches(engine, [len(row.ids) for row in rows], batch_rows):
        scores = score(_batch([rows[place] for place in places]))
        losses_CN, hits_CN = scores.losses.double().sum(-1).tolist(), scores.hits.sum(-1).tolist()
        for column, place in enumerate([] if spare else places):
            size = len(rows[place].ids) - rows[place].start
            pairs = zip(losses_CN, hits_CN, strict=True)
            own[place] = [(losses[column], hits[column] == size) for losses, hits in pairs]
    return _gathered(engine, own)


def _let_write(
    engine: Engine, write: Writer, prompts: Sequence[Prompt], batch_rows: int, ends: frozenset[int], decode: Decode
) -> Replied:
    """What every candidate of a pass writes to every prompt, as token ids."""
    own: Replied = {}
    for places, spare, tokens in _batches(engine, [len(prompt.ids) for prompt in prompts], batch_rows):
        asked = [prompts[place] for place in places]

        def over(number: int, ids: Sequence[int], asked: Sequence[Prompt] = asked) -> bool:
            prompt = asked[number]
            if len(ids) >= prompt.most or ids[-1] in ends:
                return True
            return bool(prompt.stop) and cut_at(text := decode(ids), prompt.stop) != text

        written = write([prompt.ids for prompt in asked], over, tokens)
        for column, place in enumerate([] if spare else places):
            own[place] = [texts[column] for texts in written]
    return _gathered(engine, own)


def _batches(engine: Engine, lengths: Sequence[int], batch_rows: int) -> Iterator[tuple[list[int], bool, int]]:
    """Questions of like length, this worker's of every batch; whether they are spare, computed only to keep step; and how many
    tokens they are, filled up, on the worker that has most: a number that all agree in, and that however many they are."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    for start in range(0, len(order), batch_rows * engine.whole):
        together = order[start : start + batch_rows * engine.whole]
        tokens = -(-len(together) // engine.whole) * lengths[together[-1]]
        for part in engine.parts:
            own = together[part :: engine.whole]
            yield (own or together[:1], not own, tokens)


def _gathered(engine: Engine, own: Replied) -> Replied:
    """The replies that all workers got."""
    if engine.world == 1:
        return own
    everyone: list[Replied] = [{} for _ in range(engine.world)]
    dist.all_gather_object(everyone, own)
    return {place: replies for part in everyone for place, replies in part.items()}


def _batch(rows: Sequence[Answered]) -> RowBatch:
    """Rows without their last token, which nothing follows, filled up to the longest with tokens that are a segment of their
    own."""
    shape = (len(rows), max(len(row.ids) for row in rows) - 1)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels, document = np.full(shape, NO_LABEL, np.int64), np.full(shape, -1, np.int32)
    for place, row in enumerate(rows):
        length = len(row.ids) - 1
        ids[place, :length], positions[place, :length] = row.ids[:-1], range(length)
        positions[place, length:] = range(shape[1] - length)
        labels[place, row.start - 1 : length] = row.ids[row.start :]
        document[place, :length] = 0
    return RowBatch(ids, positions, labels, document)
