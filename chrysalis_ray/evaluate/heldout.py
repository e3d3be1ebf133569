"""Held-out loss of many adapters in one pass: the same rows, repeated for every slot, through one frozen base.

With W workers, worker r scores every W-th row of each batch; all of them go through the same number of passes (a sharded base
needs them together) and end with the same scores in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch.distributed as dist

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.evaluate.scores import DocumentScore
from chrysalis_ray.training.pack import Pack

if TYPE_CHECKING:
    from chrysalis_ray.genome.tokens import TokenStore

Row = tuple[str, int]  # domain, row of the token store
Piece = tuple[str, int, int, int, tuple[float, ...]]  # domain, document, row, tokens, loss of each slot in nats

__all__ = ["DocumentScore", "heldout_rows", "score_rows"]


def score_rows(
    pack: Pack, slots: Sequence[int], tokens: TokenStore, split: str, rows_per_domain: int, batch_rows: int = 8
) -> dict[int, list[DocumentScore]]:
    """Loss of every held-out document under the adapter of every slot, sorted by domain and document.

    `split` is "select" or "report". At most `rows_per_domain` rows of each domain are read, the same whoever asks;
    `batch_rows` of them make one pass per worker, times the number of slots. A document is what of it lies in those rows.
    Collective: every worker of a body calls it alike. Raises EvaluationError where the split holds nothing.
    """
    rows = heldout_rows(tokens, split, rows_per_domain)
    own: list[Piece] = []
    for group, spare in _shares(rows, batch_rows, pack.engine.parts, pack.engine.whole):
        pieces = _score(pack, slots, tokens, split, group)
        own += [] if spare else pieces
    return _by_slot(slots, _gathered(own, pack.engine.world))


def heldout_rows(tokens: TokenStore, split: str, rows_per_domain: int) -> list[Row]:
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


def _shares(rows: Sequence[Row], batch_rows: int, parts: Sequence[int], whole: int) -> Iterator[tuple[Sequence[Row], bool]]:
    """This worker's rows of every pass, and whether they are spare: computed only to keep step with the others."""
    for start in range(0, len(rows), batch_rows * whole):
        together = rows[start : start + batch_rows * whole]
        for part in parts:
            own = together[part::whole]
            yield (own, False) if own else (together[:1], True)


def _score(pack: Pack, slots: Sequence[int], tokens: TokenStore, split: str, rows: Sequence[Row]) -> list[Piece]:
    batch = tokens.batch(rows, split)
    losses_SNT = pack.score(slots, batch).double().numpy()
    pieces: list[Piece] = []
    for place, (domain, row) in enumerate(rows):
        labelled_T = batch.labels[place] != -100
        for document in np.unique(batch.document[place][labelled_T]):
            inside_T = labelled_T & (batch.document[place] == document)
            sums_S = losses_SNT[:, place, inside_T].sum(axis=1)
            pieces.append((domain, int(document), row, int(inside_T.sum()), tuple(float(value) for value in sums_S)))
    return pieces


def _gathered(own: list[Piece], world: int) -> list[Piece]:
    """The pieces of all workers in one order, whatever their number."""
    if world == 1:
        return sorted(own)
    everyone: list[list[Piece]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, own)
    return sorted(piece for pieces in everyone for piece in pieces)


def _by_slot(slots: Sequence[int], pieces: Sequence[Piece]) -> dict[int, list[DocumentScore]]:
    """Documents put together again: one longer than a row has a piece in each of several."""
    losses: dict[tuple[str, int], list[float]] = {}
    counts: dict[tuple[str, int], int] = {}
    for domain, document, _, tokens, sums in pieces:
        total = losses.setdefault((domain, document), [0.0] * len(slots))
        counts[domain, document] = counts.get((domain, document), 0) + tokens
        for place, value in enumerate(sums):
            total[place] += value
    return {
        slot: [
            DocumentScore(domain, document, total[place], counts[domain, document])
            for (domain, document), total in losses.items()
        ]
        for place, slot in enumerate(slots)
    }
