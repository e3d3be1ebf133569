"""The mix: which row of which domain stands at which position, as a pure function of (shares, rows, rng_seed, position).

No state, no buffer: a resumed, moved or re-sized training asks for its next positions and gets what it would have got. Needs
numpy only.

* Positions come in blocks of `BLOCK` = 4096. A block holds domain k exactly q_k times: its share, by largest remainder.
* Inside the block the domains follow Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980):
  after every prefix of length n, domain k was drawn n q_k / 4096 times to within 1 - 1/(2K - 2) < 1. The pattern is cyclic and
  turned by a keyed amount, so any window of positions, across blocks too, keeps each quota to within less than 2 draws.
* The j-th draw of a domain with n rows is row pi_e(j mod n) of epoch e = j // n, where pi_e is a keyed permutation of range(n):
  a generalised Feistel network over the next rectangle a x b >= n, walked until it falls inside (Black and Rogaway, "Ciphers
  with arbitrary finite domains", 2002). So every epoch holds every row exactly once.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import Epigenome

BLOCK = 4096
ROUNDS = 6

Integers = NDArray[np.int64]


def shares_of(epigenome: Epigenome, tokens_by_domain: Mapping[str, int]) -> dict[str, float]:
    """Share of every domain of the genome under `epigenome`: level x prior, normalised to sum 1.

    A domain that `express` does not name is silent (level 0), as is one without tokens. `prior` is ``uniform`` or ``size``.
    Raises GenomeError for a domain that the genome lacks, a level that is negative or no number, and a mix of nothing.
    """
    for domain, level in epigenome.express.items():
        if domain not in tokens_by_domain:
            near = difflib.get_close_matches(domain, tokens_by_domain, n=1)
            raise GenomeError(
                f"the mix expresses {domain!r}, which the genome lacks" + (f"; did you mean {near[0]!r}?" if near else ""),
                f"domains of this genome: {', '.join(sorted(tokens_by_domain))}",
            )
        if not (math.isfinite(level) and level >= 0.0):
            raise GenomeError(f"the mix expresses {domain!r} at level {level!r}", "a level is a number of at least 0")
    if epigenome.prior not in ("uniform", "size"):
        raise GenomeError(f"unknown prior {epigenome.prior!r}", "use `uniform` or `size`")
    weights = {}
    for domain in sorted(tokens_by_domain):
        tokens = tokens_by_domain[domain]
        prior = float(tokens) if epigenome.prior == "size" else float(tokens > 0)
        weights[domain] = epigenome.express.get(domain, 0.0) * prior
    total = math.fsum(weights.values())
    if not total > 0.0:
        raise GenomeError(
            f"the mix {dict(epigenome.express)} expresses nothing: every level is 0 or stands at a domain without tokens",
            f"raise the level of one of {', '.join(sorted(tokens_by_domain))}",
        )
    return {domain: weight / total for domain, weight in weights.items()}


class MixPlan:
    """Position -> (domain, epoch, row). Two plans with equal arguments are equal functions, on any machine.

    `shares` need not sum to 1; `rows` says how many rows each domain has. A domain with share 0, without rows, or whose share
    rounds to none of 4096 is never drawn. Raises GenomeError for negative or non-finite shares, for a domain without
    an entry in `rows`, and when nothing is left to draw.
    """

    def __init__(self, shares: Mapping[str, float], rows: Mapping[str, int], rng_seed: int) -> None:
        counts = _counts(shares, rows)
        self.rng_seed = rng_seed
        self.domains = tuple(counts)
        self.counts = np.array(list(counts.values()), dtype=np.int64)
        self.rows = np.array([rows[domain] for domain in self.domains], dtype=np.int64)
        turn = int(_keys(rng_seed, "turn")[0] % np.uint64(BLOCK))
        self._domain_at = np.roll(_pattern(tuple(counts.values())), turn)
        self._draw_at = np.zeros(BLOCK, np.int64)  # how often the domain of a place was drawn before it, in its block
        for index in range(len(self.domains)):
            places = self._domain_at == index
            self._draw_at[places] = np.arange(places.sum())

    def draw(self, start: int, count: int) -> list[tuple[str, int, int]]:
        """What stands at positions start .. start + count - 1, as (domain, epoch, row). Raises ValueError below position 0."""
        domain, epoch, row = self.arrays(start, count)
        return [(self.domains[d], e, r) for d, e, r in zip(domain.tolist(), epoch.tolist(), row.tolist(), strict=True)]

    def arrays(self, start: int, count: int) -> tuple[Integers, Integers, Integers]:
        """`draw` as three int64 arrays of length `count`: index into `domains`, epoch, row."""
        if start < 0 or count < 0:
            raise ValueError(f"positions start at 0 and counts are not negative, not {start} and {count}")
        block, place = np.divmod(np.arange(start, start + count, dtype=np.int64), BLOCK)
        domain = self._domain_at[place]
        epoch, inside = np.divmod(block * self.counts[domain] + self._draw_at[place], self.rows[domain])
        named, which = np.unique(epoch * len(self.domains) + domain, return_inverse=True)
        pairs = [divmod(name, len(self.domains)) for name in named.tolist()]
        keys = np.array([_keys(self.rng_seed, "rows", self.domains[d], e) for e, d in pairs], dtype=np.uint64)
        return domain, epoch, permuted(inside, self.rows[domain], keys.reshape(-1, ROUNDS)[which])

    def positions_of(self, domain: str, row: int, start: int, stop: int) -> list[int]:
        """Every position from `start` to `stop` - 1 at which `row` of `domain` stands, ascending: `draw` inverted, without a
        search. Costs one step per epoch of the domain between the two, wherever they are."""
        if domain not in self.domains:
            return []
        index = self.domains.index(domain)
        size, quota = int(self.rows[index]), int(self.counts[index])
        if not 0 <= row < size:
            raise GenomeError(f"domain {domain!r} has rows 0 to {size - 1}, not {row}")
        places = np.flatnonzero(self._domain_at == index)
        first, end = (at // BLOCK * quota + int(np.searchsorted(places, at % BLOCK)) for at in (start, stop))  # draws before
        epochs = np.arange(first // size, -(-end // size), dtype=np.int64)
        keys = np.array([_keys(self.rng_seed, "rows", domain, epoch) for epoch in epochs.tolist()], dtype=np.uint64)
        inside = unpermuted(np.full(len(epochs), row), np.full(len(epochs), size), keys.reshape(-1, ROUNDS))
        drawn = epochs * size + inside
        block, nth = np.divmod(drawn[(drawn >= first) & (drawn < end)], quota)
        return np.sort(block * BLOCK + places[nth]).tolist()


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


def _counts(shares: Mapping[str, float], rows: Mapping[str, int]) -> dict[str, int]:
    """Draws of every drawn domain in a block, by largest remainder; ties go to the name that sorts first."""
    for domain, share in shares.items():
        if domain not in rows:
            raise GenomeError(f"domain {domain!r} has a share but no rows are known", f"known: {', '.join(sorted(rows))}")
        if not (math.isfinite(share) and share >= 0.0):
            raise GenomeError(f"domain {domain!r} has share {share!r}", "a share is a number of at least 0")
    drawn = {domain: shares[domain] for domain in sorted(shares) if shares[domain] > 0.0 and rows[domain] > 0}
    total = math.fsum(drawn.values())
    if not total > 0.0:
        raise GenomeError(
            f"nothing to draw: no domain of {sorted(shares)} has both a share and rows",
            "give a share to a domain with text, or lower `sequence_length`",
        )
    quotas = {domain: share / total * BLOCK for domain, share in drawn.items()}
    counts = {domain: math.floor(quota) for domain, quota in quotas.items()}
    left = BLOCK - sum(counts.values())
    for domain in sorted(quotas, key=lambda domain: (counts[domain] - quotas[domain], domain))[:left]:
        counts[domain] += 1
    return {domain: count for domain, count in counts.items() if count}


@lru_cache(maxsize=256)
def _pattern(counts: tuple[int, ...]) -> Integers:
    """Tijdeman's sequence: place -> index, each index k exactly counts[k] times in sum(counts) places, every prefix of n places
    within 1 - 1/(2K - 2) of n counts[k] / sum(counts). Each place goes to the most urgent of those whose quota has come due."""
    kinds, size = len(counts), sum(counts)
    if kinds == 1:
        return np.zeros(size, np.int64)
    quota = np.array(counts, dtype=np.int64)
    scale = 2 * kinds - 2
    due = np.zeros(kinds, np.int64)  # scale x size x (n quota/size - drawn), in whole numbers
    pattern = np.empty(size, np.int64)
    for place in range(size):
        due += scale * quota
        haste = np.where(due >= size, ((scale - 1) * size - due) / quota, np.inf)
        pattern[place] = chosen = int(haste.argmin())
        due[chosen] -= scale * size
    return pattern
