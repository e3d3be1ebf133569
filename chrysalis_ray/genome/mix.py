"""The mix: which row of which domain stands at which position, as a pure function of (shares, rows, rng_seed, position).

No state, no buffer: a resumed, moved or re-sized training asks for its next positions and gets what it would have got. Needs
numpy only.

* Positions come in blocks of `BLOCK` = 4096. A block holds domain k exactly q_k times: its share, by largest remainder.
* Inside the block the domains follow Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980):
  after every prefix of length n, domain k was drawn n q_k / 4096 times to within 1 - 1/(2K - 2) < 1. The pattern is cyclic and
  turned by a keyed amount, so any window of positions, across blocks too, keeps each quota to within less than 2 draws.
* Where floors and caps must be kept, or a share is too small for a block, draws are whole quotas of the rows up to a horizon
  instead, in an order of their own (`apportioned`).
* Shares change by appending: a segment begins at any position, with blocks of its own, and draws count on from before.
* The j-th draw of a domain with n rows is row pi_e(j mod n) of epoch e = j // n, where pi_e is a keyed permutation of range(n):
  a generalised Feistel network over the next rectangle a x b >= n, walked until it falls inside (Black and Rogaway, "Ciphers
  with arbitrary finite domains", 2002). So every epoch holds every row exactly once.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import Epigenome
from chrysalis_ray.core.shares import BLOCK, Segment, in_block, schedule
from chrysalis_ray.core.shares import shares_of as shares_of
from chrysalis_ray.genome.apportioned import ApportionedStretch

ROUNDS = 6

Integers = NDArray[np.int64]


class MixPlan:
    """Position -> (domain, epoch, row). Two plans with equal arguments are equal functions, on any machine.

    `shares` need not sum to 1; `rows` says how many rows each domain has. A domain with share 0, without rows, or whose share
    rounds to none of 4096 is never drawn. From the `start` of each of `later` on its shares hold instead; what was drawn before
    counts on, so that an epoch goes through all rows exactly once across a change too, and no position before it is touched.
    With `kept` below 1 a keyed subset of every domain is all that is drawn of it: that part of its rows, rounded up. `quotas`
    are those of the first segment.

    Raises GenomeError for negative or non-finite shares, for a domain without an entry in `rows` or with a quota and no rows,
    when nothing is left to draw, and for starts that do not ascend.
    """

    def __init__(
        self,
        shares: Mapping[str, float],
        rows: Mapping[str, int],
        rng_seed: int,
        later: Sequence[Segment] = (),
        kept: float = 1.0,
        quotas: Mapping[str, int] | None = None,
    ) -> None:
        segments = [Segment(0, shares, quotas=quotas or {}), *later]
        if any(one.start >= other.start for one, other in pairwise(segments)):
            raise GenomeError(f"the segments of a mix start at {[segment.start for segment in segments]}", "let them ascend")
        drawn = [_counts(segment, rows) for segment in segments]
        self.rng_seed, self.kept = rng_seed, kept
        self.domains = tuple(sorted({domain for counts in drawn for domain in counts}))
        whole = [rows[domain] for domain in self.domains]
        self.all_rows = np.array(whole, dtype=np.int64)
        self.rows = (
            self.all_rows if kept == 1.0 else np.array([max(1, math.ceil(kept * size)) for size in whole], dtype=np.int64)
        )
        self._segments: list[_Stretch | ApportionedStretch] = []
        for segment, counts in zip(segments, drawn, strict=True):
            before = self._before(segment.start) if self._segments else np.zeros(len(self.domains), np.int64)
            counted = tuple(counts.get(domain, 0) for domain in self.domains)
            if segment.quotas:
                self._segments.append(ApportionedStretch(segment.start, counted, before))
                continue
            name = ("turn", segment.start) if self._segments else ("turn",)
            self._segments.append(_Stretch(segment.start, counted, int(_keys(rng_seed, *name)[0] % np.uint64(BLOCK)), before))
        self._starts = np.array([segment.start for segment in self._segments], dtype=np.int64)
        self.counts = self._segments[0].counts

    def draw(self, start: int, count: int) -> list[tuple[str, int, int]]:
        """What stands at positions start .. start + count - 1, as (domain, epoch, row). Raises ValueError below position 0."""
        domain, epoch, row = self.arrays(start, count)
        return [(self.domains[d], e, r) for d, e, r in zip(domain.tolist(), epoch.tolist(), row.tolist(), strict=True)]

    def arrays(self, start: int, count: int) -> tuple[Integers, Integers, Integers]:
        """`draw` as three int64 arrays of length `count`: index into `domains`, epoch, row."""
        if start < 0 or count < 0:
            raise ValueError(f"positions start at 0 and counts are not negative, not {start} and {count}")
        parts = [segment.draws(first, stop) for segment, first, stop in self._touched(start, start + count)]
        domain, drawn = (np.concatenate(part) for part in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
        epoch, inside = np.divmod(drawn, self.rows[domain])
        row = self._shuffled(domain, epoch, inside)
        return domain, epoch, row if self.kept == 1.0 else self._of_subset(domain, row)

    def positions_of(self, domain: str, row: int, start: int, stop: int) -> list[int]:
        """Every position from `start` to `stop` - 1 at which `row` of `domain` stands, ascending: `draw` inverted, without a
        search. Costs one step per epoch of the domain between the two and one per segment, wherever they are."""
        if domain not in self.domains:
            return []
        index = self.domains.index(domain)
        if not 0 <= row < int(self.all_rows[index]):
            raise GenomeError(f"domain {domain!r} has rows 0 to {self.all_rows[index] - 1}, not {row}")
        size = int(self.rows[index])
        if self.kept != 1.0:
            keys = self._subset_keys(domain)[None]
            row = int(unpermuted(np.array([row]), self.all_rows[index : index + 1], keys)[0])
            if row >= size:  # not in the subset
                return []
        found: list[int] = []
        for segment, first_row, stop_row in self._touched(start, stop) if stop > start else ():
            first, end = segment.before(first_row)[index], segment.before(stop_row)[index]
            epochs = np.arange(first // size, -(-end // size), dtype=np.int64)
            keys = np.array([_keys(self.rng_seed, "rows", domain, epoch) for epoch in epochs.tolist()], dtype=np.uint64)
            inside = unpermuted(np.full(len(epochs), row), np.full(len(epochs), size), keys.reshape(-1, ROUNDS))
            drawn = epochs * size + inside
            found += segment.places_of(index, drawn[(drawn >= first) & (drawn < end)])
        return found

    def _before(self, position: int) -> Integers:
        """How often each domain was drawn before a position of the last segment there is."""
        return self._segments[-1].before(position)

    def _touched(self, start: int, stop: int) -> list[tuple[_Stretch | ApportionedStretch, int, int]]:
        """(segment, first position, stop) of the segments that positions start .. stop - 1 lie in."""
        first, last = (int(np.searchsorted(self._starts, at, "right")) - 1 for at in (start, max(start, stop - 1)))
        ends = [*self._starts[first + 1 : last + 1].tolist(), stop]
        touched = self._segments[first : last + 1]
        return [(segment, max(start, segment.start), end) for segment, end in zip(touched, ends, strict=True)]

    def _shuffled(self, domain: Integers, epoch: Integers, inside: Integers) -> Integers:
        """The place of each draw in the order of its domain and epoch."""
        named, which = np.unique(epoch * len(self.domains) + domain, return_inverse=True)
        pairs = [divmod(name, len(self.domains)) for name in named.tolist()]
        keys = np.array([_keys(self.rng_seed, "rows", self.domains[d], e) for e, d in pairs], dtype=np.uint64)
        return permuted(inside, self.rows[domain], keys.reshape(-1, ROUNDS)[which])

    def _of_subset(self, domain: Integers, row: Integers) -> Integers:
        """The row of the domain that is number `row` of its subset."""
        keys = np.array([self._subset_keys(name) for name in self.domains], dtype=np.uint64)
        return permuted(row, self.all_rows[domain], keys[domain])

    def _subset_keys(self, domain: str) -> NDArray[np.uint64]:
        return _keys(self.rng_seed, "subset", domain)


class _Stretch:
    """A segment of a plan: blocks that begin at `start`, each with `counts` draws, after `drawn` of the segments before."""

    def __init__(self, start: int, counts: tuple[int, ...], turn: int, drawn: Integers) -> None:
        self.start, self.drawn = start, drawn
        self.counts = np.array(counts, dtype=np.int64)
        self._domain_at, self._draw_at = _turned(counts, turn)

    def draws(self, first: int, stop: int) -> tuple[Integers, Integers]:
        """Of positions first .. stop - 1: index of the domain, and how often that domain was drawn before."""
        at = np.arange(first - self.start, stop - self.start, dtype=np.int64)
        place = at % BLOCK
        domain = self._domain_at[place]
        return domain, self.drawn[domain] + at // BLOCK * self.counts[domain] + self._draw_at[place]

    def before(self, position: int) -> Integers:
        """How often each domain was drawn before a position."""
        block, place = divmod(position - self.start, BLOCK)
        inside = np.bincount(self._domain_at[:place], minlength=len(self.counts)).astype(np.int64)
        return self.drawn + block * self.counts + inside

    def places_of(self, index: int, drawn: Integers) -> list[int]:
        """The positions of these draws of a domain, ascending."""
        if not len(drawn):
            return []
        places = np.flatnonzero(self._domain_at == index)
        block, nth = np.divmod(drawn - self.drawn[index], self.counts[index])
        return np.sort(self.start + block * BLOCK + places[nth]).tolist()


def plan_of(epigenome: Epigenome, tokens: Mapping[str, int], rows: Mapping[str, int], rng_seed: int) -> MixPlan:
    """The plan of a variant: its epigenome over domains of so many `tokens` in so many `rows`. Raises GenomeError."""
    first, *later = schedule(epigenome, tokens)
    return MixPlan(first.shares, rows, rng_seed, later, epigenome.kept, first.quotas)


def permuted(values: Integers, sizes: Integers, keys: NDArray[np.uint64]) -> Integers:
    """Image of each value under the permutation of range(size) that its keys name; values, sizes [n], keys [n, ROUNDS].

    Costs no memory of order `sizes`.
    """
    wide = np.ceil(np.sqrt(sizes)).astype(np.int64)
    high = -(-sizes // wide)
    image = values.copy()
    current, pending = values, np.arange(len(values))
    while len(pending):
        current = _feistel(current, wide.astype(np.uint64), high.astype(np.uint64), keys)
        image[pending] = current
        again = current >= sizes
        if not again.any():
            break
        pending, current, sizes = pending[again], current[again], sizes[again]
        wide, high, keys = wide[again], high[again], keys[again]
    return image


def _feistel(values: Integers, wide: NDArray[np.uint64], high: NDArray[np.uint64], keys: NDArray[np.uint64]) -> Integers:
    """A permutation of range(wide x high): value = left x high + right, each half moved by a keyed hash of the other."""
    left, right = np.divmod(values.astype(np.uint64), high)
    for turn in range(0, ROUNDS, 2):
        left = (left + (_scrambled(right ^ keys[:, turn]) >> np.uint64(2))) % wide
        right = (right + (_scrambled(left ^ keys[:, turn + 1]) >> np.uint64(2))) % high
    return (left * high + right).astype(np.int64)


def unpermuted(images: Integers, sizes: Integers, keys: NDArray[np.uint64]) -> Integers:
    """The inverse of `permuted`: what each image came from. The walk is taken backwards, until it is inside again."""
    wide = np.ceil(np.sqrt(sizes)).astype(np.int64)
    high = -(-sizes // wide)
    values = images.copy()
    current, pending = images, np.arange(len(images))
    while len(pending):
        current = _unfeistel(current, wide.astype(np.uint64), high.astype(np.uint64), keys)
        values[pending] = current
        again = current >= sizes
        if not again.any():
            break
        pending, current, sizes = pending[again], current[again], sizes[again]
        wide, high, keys = wide[again], high[again], keys[again]
    return values


def _unfeistel(values: Integers, wide: NDArray[np.uint64], high: NDArray[np.uint64], keys: NDArray[np.uint64]) -> Integers:
    """The inverse of `_feistel`: its rounds in reverse, each taken back."""
    left, right = np.divmod(values.astype(np.uint64), high)
    for turn in range(ROUNDS - 2, -1, -2):
        right = (right + high - (_scrambled(left ^ keys[:, turn + 1]) >> np.uint64(2)) % high) % high
        left = (left + wide - (_scrambled(right ^ keys[:, turn]) >> np.uint64(2)) % wide) % wide
    return (left * high + right).astype(np.int64)


def permutation(size: int, *name: object) -> Integers:
    """The permutation of range(size) that `name` names."""
    return permuted(np.arange(size, dtype=np.int64), np.full(size, size), np.broadcast_to(_keys(*name), (size, ROUNDS)))


def _scrambled(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@lru_cache(maxsize=4096)
def _keys(*name: object) -> NDArray[np.uint64]:
    """ROUNDS 64-bit keys derived from `name`, the same on every machine."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _counts(segment: Segment, rows: Mapping[str, int]) -> dict[str, int]:
    """Draws of every drawn domain in a block, or up to the horizon."""
    shares = segment.shares
    for domain, share in shares.items():
        if domain not in rows:
            raise GenomeError(f"domain {domain!r} has a share but no rows are known", f"known: {', '.join(sorted(rows))}")
        if not (math.isfinite(share) and share >= 0.0):
            raise GenomeError(f"domain {domain!r} has share {share!r}", "a share is a number of at least 0")
    drawn = {domain: shares[domain] for domain in sorted(shares) if shares[domain] > 0.0 and rows[domain] > 0}
    if not math.fsum(drawn.values()) > 0.0:
        raise GenomeError(
            f"nothing to draw: no domain of {sorted(shares)} has both a share and rows",
            "give a share to a domain with text, or lower `sequence_length`",
        )
    if silent := [domain for domain, quota in segment.quotas.items() if quota and not rows.get(domain)]:
        raise GenomeError(f"domain {silent[0]!r} has a quota of {segment.quotas[silent[0]]} rows, but holds none")
    counts = segment.quotas or in_block(drawn, segment.most)
    return {domain: count for domain, count in counts.items() if count}


@lru_cache(maxsize=256)
def _turned(counts: tuple[int, ...], turn: int) -> tuple[Integers, Integers]:
    """The pattern of a block, turned: place -> index, and how often that index stands before the place."""
    heard = np.flatnonzero(np.array(counts))
    domain_at = np.roll(heard[_pattern(tuple(counts[index] for index in heard.tolist()))], turn)
    draw_at = np.zeros(BLOCK, np.int64)
    for index in heard.tolist():
        places = domain_at == index
        draw_at[places] = np.arange(places.sum())
    return domain_at, draw_at


@lru_cache(maxsize=256)
def _pattern(counts: tuple[int, ...]) -> Integers:
    """Tijdeman's sequence: place -> index, each index k exactly counts[k] times in sum(counts) places, every prefix of n places
    within 1 - 1/(2K - 2) of n counts[k] / sum(counts). Each place goes to the most urgent of those whose quota has come due:
    to the earliest deadline of those released, ties to the lowest index."""
    kinds, size = len(counts), sum(counts)
    if kinds == 1:
        return np.zeros(size, np.int64)
    scale = 2 * kinds - 2
    drawn = [0] * kinds
    released: dict[int, list[int]] = {}  # place -> those whose next draw comes due there
    due: list[tuple[float, int]] = []  # deadline, index

    def put(index: int, place: int) -> None:
        """Let the next draw of `index` wait for its release, or for its turn."""
        release = -(-size * (1 + scale * drawn[index]) // (scale * counts[index]))
        if release > place:
            released.setdefault(release, []).append(index)
        else:
            heapq.heappush(due, (size * (scale - 1 + scale * drawn[index]) / counts[index], index))

    for index in range(kinds):
        put(index, 0)
    pattern = np.empty(size, np.int64)
    for place in range(size):
        for index in released.pop(place + 1, ()):
            put(index, place + 1)
        _, chosen = heapq.heappop(due)
        pattern[place] = chosen
        drawn[chosen] += 1
        put(chosen, place + 1)
    return pattern
