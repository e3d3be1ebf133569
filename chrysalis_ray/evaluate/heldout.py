"""Held-out loss of many adapters in one pass: the same rows, repeated for every slot, through one frozen base.

With W workers, worker r scores every W-th row of each batch; all of them go through the same number of passes (a sharded base
needs them together) and end with the same scores in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.evaluate.scores import DocumentScore
from chrysalis_ray.training.loss import TokenScores
from chrysalis_ray.training.pack import Pack

if TYPE_CHECKING:
    from chrysalis_ray.genome.tokens import RowBatch, TokenStore
    from chrysalis_ray.training.engine import Engine

Place = tuple[str, int]  # domain, row of the token store
# domain, document, row, tokens, bytes (below zero: not known), loss of each candidate in nats, hits of each (none: not known)
Piece = tuple[str, int, int, int, int, tuple[float, ...], tuple[int, ...]]
Scorer = Callable[["RowBatch"], TokenScores]  # rows -> losses and hits of every candidate, [candidates, rows, T]
Keep = Callable[[Place, Tensor], None]  # a row, and what the head is given of it by every candidate, [candidates, T, D]

__all__ = ["DocumentScore", "Mixture", "by_candidate", "heldout_rows", "judge_pieces", "judge_rows", "score_rows"]


def score_rows(
    pack: Pack, slots: Sequence[int], tokens: TokenStore, split: str, rows_per_domain: int, batch_rows: int = 8
) -> dict[int, list[DocumentScore]]:
    """Loss of every held-out document under the adapter of every slot, sorted by domain and document."""
    scores = judge_rows(pack.engine, partial(pack.judge, slots), tokens, split, rows_per_domain, batch_rows)
    return dict(zip(slots, scores, strict=True))


def judge_rows(
    engine: Engine, score: Scorer, tokens: TokenStore, split: str, rows_per_domain: int, batch_rows: int = 8
) -> list[list[DocumentScore]]:
    """Scores of every held-out document under each of the candidates that `score` knows, sorted by domain and document.

    `split` is "select" or "report". At most `rows_per_domain` rows of each domain are read, the same whoever asks;
    `batch_rows` of them make one pass per worker, times the number of candidates. A document is what of it lies in those rows.
    Collective: every worker of a body calls it alike. Raises EvaluationError where the split holds nothing.
    """
    rows = heldout_rows(tokens, split, rows_per_domain)
    return by_candidate(judge_pieces(engine, score, tokens, split, rows, batch_rows))


def judge_pieces(
    engine: Engine,
    score: Scorer,
    tokens: TokenStore,
    split: str,
    rows: Sequence[Place],
    batch_rows: int = 8,
    hear: Sequence[tuple[Mixture, Sequence[int]]] = (),
    keep: Keep | None = None,
) -> list[Piece]:
    """What every document in some rows comes to, of all workers, in order.

    `hear` names mixtures and which candidates are members of each; `keep` takes what the head is given, where `score` tells it.
    """
    own: list[Piece] = []
    for group, spare in rows_of_worker(rows, batch_rows, engine.parts, engine.whole):
        batch = tokens.batch(group, split)
        scores = score(batch)
        if spare:
            continue
        losses_CNT, hits_CNT = scores.losses.double().numpy(), scores.hits.numpy()
        for place, row in enumerate(group):
            own += _pieces(batch, place, row, losses_CNT[:, place], hits_CNT[:, place])
            for mixture, members in hear:
                mixture.add(row, losses_CNT[list(members), place])
            if keep is not None and scores.hidden is not None:
                keep(row, scores.hidden[:, place])
    return gathered(own, engine.world)


class Mixture:
    """The mean of several adapters' probabilities, row by row of this worker: what a merge of them can hope for.

    The likelihood of a token under it is the mean of its likelihoods, so that nothing but the members' losses is needed. Which
    token it finds likeliest is not known from them: `hits` tells it, where somebody compared the members (`listener.py`).
    """

    def __init__(self) -> None:
        self.members: dict[Place, int] = {}
        self.hits: dict[Place, NDArray[np.bool_]] = {}  # whether the label is the likeliest token, [T]
        self.log_sums: dict[Place, NDArray[np.float64]] = {}  # log of the sum of the members' likelihoods, [T]

    def add(self, row: Place, losses_MT: NDArray[np.float64]) -> None:
        """Hear the token losses of some members on a row."""
        heard_T = np.logaddexp.reduce(-losses_MT, axis=0)
        self.log_sums[row] = np.logaddexp(self.log_sums[row], heard_T) if row in self.log_sums else heard_T
        self.members[row] = self.members.get(row, 0) + len(losses_MT)

    def scores(self, tokens: TokenStore, split: str, world: int) -> list[DocumentScore]:
        """The scores of the mixture on the rows heard, over all workers."""
        own: list[Piece] = []
        for row, log_sum_T in self.log_sums.items():
            loss_T = math.log(self.members[row]) - log_sum_T
            hits_1T = self.hits[row][None] if row in self.hits else None
            own += _pieces(tokens.batch([row], split), 0, row, loss_T[None], hits_1T)
        (scores,) = by_candidate(gathered(own, world))
        return scores


def heldout_rows(tokens: TokenStore, split: str, rows_per_domain: int) -> list[Place]:
    """Rows spread evenly over each domain, domain by domain: how rows are packed orders them, the first are not typical."""
    if split not in ("select", "report"):
        raise EvaluationError(f"{split!r} is not a held-out split", "judge on select or report")
    rows = []
    for domain in tokens.domains:
        available = tokens.rows(domain, split)
        count = min(rows_per_domain, available)
        rows += [(domain, place * available // count) for place in range(count)]
    if not rows:
        raise EvaluationError(f"the genome has no rows on {split}", f"raise genome.split.{split}, or add sources")
    return rows


def rows_of_worker(
    rows: Sequence[Place], batch_rows: int, parts: Sequence[int], whole: int
) -> Iterator[tuple[Sequence[Place], bool]]:
    """This worker's rows of every pass, and whether they are spare: computed only to keep step with the others."""
    for start in range(0, len(rows), batch_rows * whole):
        together = rows[start : start + batch_rows * whole]
        for part in parts:
            own = together[part::whole]
            yield (own, False) if own else (together[:1], True)


def _pieces(
    batch: RowBatch, place: int, row: Place, losses_CT: NDArray[np.float64], hits_CT: NDArray[np.bool_] | None
) -> list[Piece]:
    """What every document in a row of the batch comes to."""
    domain, number = row
    labels_T, document_T = batch.labels[place], batch.document[place]
    bytes_T = _label_bytes(batch, place)
    pieces: list[Piece] = []
    for document in np.unique(document_T[labels_T != -100]):
        inside_T = (labels_T != -100) & (document_T == document)
        losses: list[Any] = losses_CT[:, inside_T].sum(axis=1).tolist()
        hits: list[Any] = hits_CT[:, inside_T].sum(axis=1).tolist() if hits_CT is not None else []
        size = -1 if bytes_T is None or (bytes_T[inside_T] < 0).any() else int(bytes_T[inside_T].sum())
        pieces.append((domain, int(document), number, int(inside_T.sum()), size, tuple(losses), tuple(hits)))
    return pieces


def _label_bytes(batch: RowBatch, place: int) -> NDArray[np.int32] | None:
    """Bytes of text that each label of a row stands for: those of the token after. None where they are not known."""
    return None if batch.bytes is None else np.append(batch.bytes[place, 1:], np.int32(0))


def gathered(own: list[Piece], world: int) -> list[Piece]:
    """The pieces of all workers in one order, whatever their number."""
    if world == 1:
        return sorted(own)
    everyone: list[list[Piece]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, own)
    return sorted(piece for pieces in everyone for piece in pieces)


def by_candidate(pieces: Sequence[Piece]) -> list[list[DocumentScore]]:
    """Documents put together again: one longer than a row has a piece in each of several."""
    documents: dict[tuple[str, int], list[Piece]] = {}
    for piece in pieces:
        documents.setdefault((piece[0], piece[1]), []).append(piece)
    scores: list[list[DocumentScore]] = [[] for _ in pieces[0][5]]
    for (domain, document), own in documents.items():
        tokens, sizes = sum(piece[3] for piece in own), [piece[4] for piece in own]
        size = None if min(sizes) < 0 else sum(sizes)
        for candidate, told in enumerate(scores):
            loss = 0.0
            for piece in own:
                loss += piece[5][candidate]
            hits = sum(piece[6][candidate] for piece in own) if own[0][6] else None
            told.append(DocumentScore(domain, document, loss, tokens, size, hits))
    return scores
