"""Best-fit-decreasing packing: whole documents into rows of a fixed length (Ding et al., arXiv 2404.10830)."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Where every piece goes; all arrays have one entry per piece. A piece is a document, or part of one that is too long."""

    document: Integers  # ordinal of the document it is of
    start: Integers  # its first token, in that document
    length: Integers  # its tokens
    labels: Integers  # those of them that are predicted
    row: Integers  # the row it lies in
    column: Integers  # its first column there
    rows: int


def cut(lengths: Integers, row_length: int) -> tuple[Integers, Integers, Integers]:
    """(document, start, length) of the pieces of documents of `lengths` tokens, none longer than `row_length`.

    A long document is cut every `row_length` tokens. Where that would leave a tail of one token, which has nothing to predict,
    the piece before gives it one of its own. A document of fewer than two tokens gives no piece.
    """
    pieces_of = np.where(lengths < 2, 0, -(-lengths // row_length))
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), pieces_of)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of)
    start = nth * row_length
    last = nth == pieces_of[document] - 1
    lonely = last & (lengths[document] - start == 1)
    start = start - lonely
    end = np.where(last, lengths[document], start + row_length)
    end[:-1] -= lonely[1:]
    return document, start, end - start


def pack(lengths: Integers, row_length: int, learned: NDArray[np.bool_] | None = None) -> Packing:
    """Place documents of `lengths` tokens in rows of `row_length`: the longest piece first, each into the fullest row that has
    room for it. Equal lengths go in the order of the documents. O(n log n) in pieces.

    `learned` says of every token of all documents, end to end, whether it is to be predicted (all, by default). The first
    token of a piece never is. A piece in which nothing is predicted is left out.
    """
    document, start, length = cut(lengths, row_length)
    labels = length - 1
    if learned is not None:
        before = np.concatenate([[0], np.cumsum(learned, dtype=np.int64)])
        begin = (np.cumsum(lengths) - lengths)[document] + start
        labels = before[begin + length] - before[begin + 1]
        told = labels > 0
        document, start, length, labels = document[told], start[told], length[told], labels[told]
    row = np.empty(len(document), np.int64)
    column = np.empty(len(document), np.int64)
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows with exactly that many
    rooms: list[int] = []  # keys of open_rows, ascending
    rows = 0
    for piece in np.argsort(-length, kind="stable").tolist():
        size = int(length[piece])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            chosen, room = rows, row_length
            rows += 1
        else:
            room = rooms[at]
            chosen = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        row[piece], column[piece] = chosen, row_length - room
        if room > size:
            if room - size not in open_rows:
                insort(rooms, room - size)
                open_rows[room - size] = []
            open_rows[room - size].append(chosen)
    return Packing(document, start, length, labels, row, column, rows)
