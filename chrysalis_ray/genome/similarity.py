"""How much texts share: shingles, MinHash signatures, near-duplicates.

A text is the set of its five-word shingles, of which every second is kept, chosen by its own hash: the same shingle is kept
everywhere. Near-duplicates are found by MinHash (Broder 1997) with one permutation, whose range is cut into `BINS` bins that
each give one minimum (Li, Owen, Zhang 2012); a bin that holds no shingle borrows from another one, drawn alike for all texts
(Shrivastava 2017). `BANDS` bands (Leskovec, Rajaraman, Ullman, *Mining of Massive Datasets*, 3.4) make a candidate pair of
two texts of Jaccard similarity s with probability 1 - (1 - s^8)^14, that is 0.05 at s = 0.5, 0.65 at 0.72, 0.92 at 0.8 and
1.00 at 0.95. Every candidate is then verified by the Jaccard similarity of the kept shingles, and where chance could have kept
the wrong ones, by that of all shingles of the two texts. Nothing here draws a random number at run time.

Everything is done for a batch of texts at once, by the compiled kernel (`native.py`) or in arrays that should fit into a
processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.genome import native
from chrysalis_ray.genome.shingles import HASH_BITS, MOST_AT_ONCE, SAMPLED_ONE_IN, Hashes, kept_shingles

VERSION = 2  # of the rules below: texts that were sketched by others are sketched again
BANDS, ROWS_PER_BAND = 14, 8
BINS = BANDS * ROWS_PER_BAND
NEIGHBOURS = 16  # of one bucket
FEWEST_SHINGLES = 5  # a shorter text says nothing about kinship
SPLIT_APART_BELOW = 0.5  # texts at least this similar belong into one split
NEAR_DUPLICATE = 0.8
DOUBTFUL = 3.0  # standard deviations from a threshold within which the kept shingles do not decide
REMEMBERED = 512  # texts whose shingles are all remembered
LEFT_AT_ONCE = 65_536  # texts whose candidates are put together at once

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXER = np.uint64(0xBF58476D1CE4E5B9)
_TAIL = np.uint64(0x94D049BB133111EB)
SIGNED_AT_ONCE = 256  # texts
_EMPTY = np.iinfo(np.uint32).max
_DRAWS = 64  # of a bin to borrow from, before its neighbours are asked in turn


@dataclass(frozen=True)
class Sketches:
    """What is remembered of a list of texts. `hashes` holds the kept shingles of text i, ascending and distinct, at
    offsets[i] .. offsets[i + 1]; `signatures` is uint32 [texts, BINS], all ones for a text without shingles."""

    offsets: NDArray[np.int64]
    hashes: Hashes
    signatures: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def of(self, text: int) -> Hashes:
        """Kept shingles of one text."""
        return self.stretch(int(self.offsets[text]), int(self.offsets[text + 1]))

    def stretch(self, begin: int, end: int) -> Hashes:
        """Some of all kept shingles."""
        return self.hashes[begin:end]

    def band(self, number: int) -> Hashes:
        """uint64 [texts]: equal where two texts agree in all rows of the band."""
        return keys_of_band(self.signatures, number)

    def aside(self, numbers: NDArray[np.int64]) -> Callable[[int, int], NDArray[np.int64]]:
        """A way back to any stretch of `numbers`, which wait where the shingles do."""
        return lambda begin, end: numbers[begin:end]

    def jaccard(self, left: int, right: int) -> float:
        """Jaccard similarity of the kept shingles of two texts; 0 where both have none."""
        return jaccard_of(self.of(left), self.of(right))


def jaccard_of(one: Hashes, other: Hashes) -> float:
    """Jaccard similarity of two ascending, distinct lists; 0 where both are empty."""
    if native.kernel is not None:
        both = native.kernel.common(one, other)
    else:
        together = np.concatenate([one, other])
        together.sort()
        both = int(np.count_nonzero(together[1:] == together[:-1]))  # distinct in each, so that a pair is one of both
    return both / max(1, len(one) + len(other) - both)


class WholeTexts:
    """The Jaccard similarity of all shingles of two texts, which `text_of` gives by their numbers; those of the last
    `REMEMBERED` texts are remembered."""

    def __init__(self, text_of: Callable[[int], str]) -> None:
        self._shingles = lru_cache(REMEMBERED)(lambda number: all_shingles(text_of(number)))

    def jaccard(self, left: int, right: int) -> float:
        return jaccard_of(self._shingles(left), self._shingles(right))


def all_shingles(text: str) -> Hashes:
    """Every shingle of a text, ascending and distinct."""
    return kept_shingles([text], one_in=1)[0]


def sketch(texts: Sequence[str | bytes]) -> Sketches:
    """Sketches of `texts`, all at once."""
    if len(texts) > MOST_AT_ONCE:
        starts = range(0, len(texts), MOST_AT_ONCE)
        return joined([sketch(texts[start : start + MOST_AT_ONCE]) for start in starts])
    return sketches_of(*kept_shingles(texts))


def sketches_of(hashes: Hashes, sizes: NDArray[np.int64]) -> Sketches:
    """Sketches from the kept shingles of all texts, one after the other, and how many each has; each text's ascending and
    distinct."""
    offsets = np.r_[0, np.cumsum(sizes)].astype(np.int64)
    return Sketches(offsets, hashes, signatures_of(hashes, offsets))


# signatures ---------------------------------------------------------------------------------------------------------


def signatures_of(hashes: Hashes, offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
    """uint32 [texts, BINS]: of each text's shingles the least one of every bin, empty bins filled."""
    if native.kernel is not None:
        signatures = np.empty((len(offsets) - 1, BINS), np.uint32)
        native.kernel.sign(hashes, offsets, signatures)
        return signatures
    signatures = np.full((len(offsets) - 1, BINS), _EMPTY, np.uint32)
    for start in range(0, len(signatures), SIGNED_AT_ONCE):
        own = offsets[start : start + SIGNED_AT_ONCE + 1]
        _sign(hashes[own[0] : own[-1]], np.diff(own), signatures[start : start + SIGNED_AT_ONCE])
    return signatures


def _sign(hashes: Hashes, sizes: NDArray[np.int64], signatures: NDArray[np.uint32]) -> None:
    """Write the signatures of texts that have `sizes` of `hashes`."""
    bins = hashes >> np.uint64(HASH_BITS - 32)
    bins *= np.uint64(BINS)
    bins >>= np.uint64(32)
    bins += np.repeat(np.arange(len(sizes), dtype=np.uint64) * np.uint64(BINS), sizes)
    begins = np.ones(len(bins), np.bool_)  # hashes ascend, and so do their bins
    np.not_equal(bins[1:], bins[:-1], out=begins[1:])
    first = np.flatnonzero(begins)
    cells = signatures.reshape(-1)
    cells[bins.view(np.int64).take(first)] = hashes.take(first) & np.uint64(_EMPTY)
    full = cells != _EMPTY
    empty = np.flatnonzero(~full & np.repeat(sizes > 0, BINS))
    column = empty % BINS
    for draw in range(_DRAWS + BINS):
        if not len(empty):
            return
        asked = empty - column + (_DONORS[draw].take(column) if draw < _DRAWS else (column + draw) % BINS)
        has = full.take(asked)
        cells[empty[has]] = cells.take(asked[has])
        empty, column = empty[~has], column[~has]


def _donors() -> NDArray[np.int64]:
    """[_DRAWS, BINS] bins to borrow from. Which ones an empty bin asks, and in which order, depends on it alone, so that two
    texts agree in it as often as in a full one."""
    drawn = np.arange(1, _DRAWS * BINS + 1, dtype=np.uint64) * _GOLDEN
    drawn = (drawn ^ (drawn >> np.uint64(30))) * _MIXER
    drawn = (drawn ^ (drawn >> np.uint64(27))) * _TAIL
    return ((drawn >> np.uint64(33)) % np.uint64(BINS)).astype(np.int64).reshape(_DRAWS, BINS)


_DONORS = _donors()


def joined(parts: Sequence[Sketches]) -> Sketches:
    """Sketches of the texts of all `parts`, in order."""
    sizes = np.concatenate([part.sizes for part in parts]) if parts else np.empty(0, np.int64)
    hashes = np.concatenate([part.hashes for part in parts]) if parts else np.empty(0, np.uint64)
    signatures = np.concatenate([part.signatures for part in parts]) if parts else np.empty((0, BINS), np.uint32)
    return Sketches(np.r_[0, np.cumsum(sizes)].astype(np.int64), hashes, signatures)


# near-duplicates ----------------------------------------------------------------------------------------------------


def keys_of_band(signatures: NDArray[np.uint32], band: int) -> Hashes:
    """uint64 [texts]: one number for the rows of a band in each of `signatures`."""
    rows = signatures[:, band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND].astype(np.uint64)
    keys = np.zeros(len(rows), np.uint64)
    for column in range(ROWS_PER_BAND):
        keys = (keys ^ rows[:, column]) * _GOLDEN
        keys ^= keys >> np.uint64(29)
    return keys


def candidate_pairs(sketches: Sketches) -> Iterator[tuple[int, int]]:
    """Pairs (left < right) that agree in all rows of some band, ascending. Of a bucket of texts each comes with the
    `NEIGHBOURS` before it and with the first: all pairs of a small one, enough to join what belongs together of a large one.
    Bands are looked at one after the other; what each finds is laid aside, and put together for some texts at once."""
    long_enough = np.flatnonzero(sketches.sizes >= FEWEST_SHINGLES)
    starts = np.arange(0, len(sketches) + LEFT_AT_ONCE, LEFT_AT_ONCE) * len(sketches)
    runs = []
    for band in range(BANDS):
        pairs = _pairs_of_band(sketches.band(band)[long_enough], long_enough, len(sketches))
        runs.append((sketches.aside(pairs), np.searchsorted(pairs, starts).tolist()))
    for number in range(len(starts) - 1):
        found = [stretch(bounds[number], bounds[number + 1]) for stretch, bounds in runs]
        for pair in np.unique(np.concatenate(found)).tolist():
            yield divmod(pair, len(sketches))


def _pairs_of_band(keys: Hashes, members: NDArray[np.int64], texts: int) -> NDArray[np.int64]:
    """left x texts + right, ascending and distinct, of the `members` that have equal `keys`."""
    order = np.argsort(keys)
    same = keys[order[1:]] == keys[order[:-1]]
    shared = (np.r_[same, False] | np.r_[False, same])[: len(keys)]
    some = np.sort(order[shared])  # most are alone in their bucket
    order = some[np.argsort(keys[some], kind="stable")]  # stable: members of a bucket stay in order
    keys, members = keys[order], members[order]
    begins = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])[: len(keys)]
    firsts = np.repeat(begins, np.diff(np.r_[begins, len(keys)]))
    after = np.flatnonzero(firsts < np.arange(len(keys)))
    found = [members[firsts[after]] * texts + members[after]]
    for distance in range(1, NEIGHBOURS + 1):
        after = after[after - distance >= firsts[after]]
        found.append(members[after - distance] * texts + members[after])
    return np.unique(np.concatenate(found))


def similar_pairs(
    sketches: Sketches,
    at_least: float,
    settled: Callable[[int, int], bool] = lambda left, right: False,
    whole: WholeTexts | None = None,
) -> Iterator[tuple[int, int, float]]:
    """(left, right, Jaccard similarity) of candidate pairs that are at least so similar, without those that are `settled` when
    their turn comes: known to belong together by then.

    The similarity is that of the kept shingles. With the `whole` texts it is that of all their shingles wherever the kept ones
    leave it in doubt whether the two are near-duplicates (`in_doubt`).
    """
    sizes = sketches.sizes.tolist()
    for left, right in candidate_pairs(sketches):
        if settled(left, right):
            continue
        smaller, larger = sorted((sizes[left], sizes[right]))
        doubt = in_doubt(smaller + larger) if whole is not None else 0.0
        if smaller < (at_least - doubt) * larger:
            continue
        similarity = sketches.jaccard(left, right)
        if whole is not None and abs(similarity - NEAR_DUPLICATE) <= doubt:
            similarity = whole.jaccard(left, right)
        if similarity >= at_least:
            yield left, right, similarity


def in_doubt(kept: int) -> float:
    """How far the similarity of two texts that keep so many shingles together may be from that of all of theirs: `DOUBTFUL`
    standard deviations at a similarity s of `NEAR_DUPLICATE`. Of the U shingles that either has, chance keeps n = U / 2, which
    leaves a variance of s (1 - s) / n x (1 - n / U); of two texts that keep k, n is k / (1 + s)."""
    either = max(1.0, kept / (1.0 + NEAR_DUPLICATE))
    return DOUBTFUL * math.sqrt(NEAR_DUPLICATE * (1.0 - NEAR_DUPLICATE) / either * (1.0 - 1.0 / SAMPLED_ONE_IN))


class Groups:
    """Union-find over range(size). A group is named by its smallest member."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def name(self, member: int) -> int:
        while self._parent[member] != member:
            self._parent[member] = self._parent[self._parent[member]]
            member = self._parent[member]
        return member

    def together(self, left: int, right: int) -> bool:
        return self.name(left) == self.name(right)

    def join(self, left: int, right: int) -> None:
        a, b = self.name(left), self.name(right)
        self._parent[max(a, b)] = min(a, b)
