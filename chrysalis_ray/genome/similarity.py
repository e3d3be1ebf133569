"""How much texts share: shingles, MinHash signatures, near-duplicates.

A text is the set of its five-word shingles, of which every second is kept, chosen by its own hash: the same shingle is kept
everywhere. Near-duplicates are found by MinHash (Broder 1997) with `PERMUTATIONS` permutations in `BANDS` bands (Leskovec,
Rajaraman, Ullman, *Mining of Massive Datasets*, 3.4): two texts of Jaccard similarity s become a candidate pair with
probability 1 - (1 - s^8)^14, that is 0.05 at s = 0.5, 0.65 at 0.72, 0.92 at 0.8 and 1.00 at 0.95. Every candidate is then
verified by the Jaccard similarity of the kept shingles. Nothing here draws a random number at run time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 5
SAMPLED_ONE_IN = 2
BANDS, ROWS_PER_BAND = 14, 8
PERMUTATIONS = BANDS * ROWS_PER_BAND
FEWEST_SHINGLES = 5  # a shorter text says nothing about kinship
SPLIT_APART_BELOW = 0.5  # texts at least this similar belong into one split
NEAR_DUPLICATE = 0.8

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXER = np.uint64(0xBF58476D1CE4E5B9)
_LONGEST_POWER = 64

Hashes = NDArray[np.uint64]


def _multipliers() -> tuple[Hashes, Hashes]:
    generator = np.random.Generator(np.random.PCG64(20261128))
    odd = generator.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return odd, generator.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64)


_FACTORS, _SUMMANDS = _multipliers()
_POWERS = np.cumprod(np.full(_LONGEST_POWER, 0x100000001B3, np.uint64))
_IS_WORD = np.zeros(256, bool)
_IS_WORD[[*range(48, 58), *range(97, 123), 95, *range(128, 256)]] = True


@dataclass(frozen=True)
class Sketches:
    """What is remembered of a list of texts. `hashes` holds the kept shingles of text i, ascending and distinct, at
    offsets[i] .. offsets[i + 1]; `signatures` is uint32 [texts, PERMUTATIONS], all ones for a text without shingles."""

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
        return self.hashes[self.offsets[text] : self.offsets[text + 1]]

    def jaccard(self, left: int, right: int) -> float:
        """Jaccard similarity of the kept shingles of two texts; 0 where both have none."""
        a, b = self.of(left), self.of(right)
        both = len(np.intersect1d(a, b, assume_unique=True))
        return both / max(1, len(a) + len(b) - both)


def sketch(texts: Sequence[str]) -> Sketches:
    """Sketches of `texts`, all at once. Words are runs of letters, digits and ``_`` in lower case; any character beyond ASCII
    counts as a letter."""
    contents = [text.lower().encode("utf-8", "surrogatepass") for text in texts]
    ends = np.cumsum([len(content) + 1 for content in contents], dtype=np.int64)
    data = np.frombuffer(b"\n".join([*contents, b""]), np.uint8)
    words, begins = _word_hashes(data)
    owners = np.searchsorted(ends, begins, side="right")
    shingles, owners = _shingles(words, owners)
    order = np.lexsort((shingles, owners))
    shingles, owners = shingles[order], owners[order]
    if len(shingles):
        fresh = np.r_[True, (shingles[1:] != shingles[:-1]) | (owners[1:] != owners[:-1])]
        shingles, owners = shingles[fresh], owners[fresh]
    offsets = np.r_[0, np.cumsum(np.bincount(owners, minlength=len(texts)))].astype(np.int64)
    return Sketches(offsets, shingles, _signatures(shingles, offsets))


def _word_hashes(data: NDArray[np.uint8]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash and first byte of every word. A word's hash is a polynomial in its bytes, mixed."""
    is_word = _IS_WORD[data]
    edges = np.flatnonzero(np.diff(np.r_[False, is_word, False].view(np.int8)))
    begins, ends = edges[::2], edges[1::2]
    if not len(begins):
        return np.empty(0, np.uint64), begins
    lengths = ends - begins
    firsts = np.cumsum(lengths) - lengths
    inside = np.arange(int(lengths.sum())) - np.repeat(firsts, lengths)
    terms = (data[is_word].astype(np.uint64) + np.uint64(1)) * _POWERS[inside % _LONGEST_POWER]
    hashes = np.add.reduceat(terms, firsts) + lengths.astype(np.uint64)
    hashes = (hashes ^ (hashes >> np.uint64(31))) * _MIXER
    return hashes ^ (hashes >> np.uint64(29)), begins


def _shingles(words: Hashes, owners: NDArray[np.int64]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash and owner of every kept run of `SHINGLE_WORDS` words of one text."""
    count = len(words) - SHINGLE_WORDS + 1
    if count <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    mixed = np.zeros(count, np.uint64)
    for offset in range(SHINGLE_WORDS):
        mixed = (mixed ^ words[offset : count + offset]) * _GOLDEN
        mixed ^= mixed >> np.uint64(29)
    kept = (owners[:count] == owners[SHINGLE_WORDS - 1 :]) & (mixed % np.uint64(SAMPLED_ONE_IN) == 0)
    return mixed[kept], owners[:count][kept]


def _signatures(shingles: Hashes, offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
    """uint32 [texts, PERMUTATIONS]: the least value of every permutation (multiply-shift) over a text's shingles."""
    sizes = np.diff(offsets)
    signatures = np.full((len(sizes), PERMUTATIONS), np.iinfo(np.uint32).max, np.uint32)
    filled = np.flatnonzero(sizes)
    if len(filled):
        starts = offsets[:-1][filled]
        for number in range(PERMUTATIONS):
            values = ((shingles * _FACTORS[number] + _SUMMANDS[number]) >> np.uint64(32)).astype(np.uint32)
            signatures[filled, number] = np.minimum.reduceat(values, starts)
    return signatures


def joined(parts: Sequence[Sketches]) -> Sketches:
    """Sketches of the texts of all `parts`, in order."""
    sizes = np.concatenate([part.sizes for part in parts]) if parts else np.empty(0, np.int64)
    hashes = np.concatenate([part.hashes for part in parts]) if parts else np.empty(0, np.uint64)
    signatures = np.concatenate([part.signatures for part in parts]) if parts else np.empty((0, PERMUTATIONS), np.uint32)
    return Sketches(np.r_[0, np.cumsum(sizes)].astype(np.int64), hashes, signatures)


# near-duplicates ----------------------------------------------------------------------------------------------------


def candidate_pairs(sketches: Sketches) -> Iterator[tuple[int, int]]:
    """Pairs (left < right) that agree in all rows of some band. Of a bucket of m texts come 2 m - 3 pairs at most, each text
    with the first and with the one before it: enough to join what belongs together."""
    long_enough = np.flatnonzero(sketches.sizes >= FEWEST_SHINGLES)
    found = [np.empty(0, np.int64)]
    for band in range(BANDS):
        rows = sketches.signatures[long_enough, band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND].astype(np.uint64)
        keys = np.zeros(len(long_enough), np.uint64)
        for column in range(ROWS_PER_BAND):
            keys = (keys ^ rows[:, column]) * _GOLDEN
            keys ^= keys >> np.uint64(29)
        order = np.argsort(keys, kind="stable")  # stable: members of a bucket stay in order
        same = keys[order][1:] == keys[order][:-1]
        run_starts = np.flatnonzero(np.r_[True, ~same])
        firsts = np.repeat(run_starts, np.diff(np.r_[run_starts, len(order)])) if len(order) else run_starts
        members = long_enough[order]
        after = np.flatnonzero(same) + 1
        found.append(members[after - 1] * len(sketches) + members[after])
        found.append(members[firsts[after]] * len(sketches) + members[after])
    for pair in np.unique(np.concatenate(found)).tolist():
        yield divmod(pair, len(sketches))


def similar_pairs(sketches: Sketches, at_least: float) -> Iterator[tuple[int, int, float]]:
    """(left, right, Jaccard similarity) of candidate pairs that are at least so similar."""
    for left, right in candidate_pairs(sketches):
        smaller, larger = sorted((int(sketches.sizes[left]), int(sketches.sizes[right])))
        if smaller >= at_least * larger:
            similarity = sketches.jaccard(left, right)
            if similarity >= at_least:
                yield left, right, similarity


class Groups:
    """Union-find over range(size). A group is named by its smallest member."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def name(self, member: int) -> int:
        while self._parent[member] != member:
            self._parent[member] = self._parent[self._parent[member]]
            member = self._parent[member]
        return member

    def join(self, left: int, right: int) -> None:
        a, b = self.name(left), self.name(right)
        self._parent[max(a, b)] = min(a, b)
