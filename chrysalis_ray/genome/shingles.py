"""Shingles: runs of five words, by which texts are compared. Of a text every second one is kept, chosen by its own hash: the
same shingle is kept everywhere.

Words are runs of letters, digits and ``_``, those of ASCII in lower case; any character beyond ASCII counts as a letter. All is
done for a batch of texts at once, by the compiled kernel (`native.py`) or in arrays that should fit into a processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.genome import native

SHINGLE_WORDS = 5
SAMPLED_ONE_IN = 2
HASH_BITS = 48  # of a shingle: among ten million, two different ones are alike with a probability of a fifth
MOST_AT_ONCE = 2 ** (64 - HASH_BITS)  # texts

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXER = np.uint64(0xBF58476D1CE4E5B9)
_TAIL = np.uint64(0x94D049BB133111EB)
_BASE = 0xD6E8FEB86659FD93
_BYTES_AT_ONCE = 8

Hashes = NDArray[np.uint64]


def kept_shingles(texts: Sequence[str | bytes], one_in: int = SAMPLED_ONE_IN) -> tuple[Hashes, NDArray[np.int64]]:
    """The kept shingles of `texts`, of which bytes are UTF-8, one text after the other, ascending and distinct; how many each
    has. Of `one_in` (a power of two) one is kept."""
    plain = [text if isinstance(text, bytes) or text.isascii() else text.encode("utf-8", "surrogatepass") for text in texts]
    if native.kernel is None:
        return shingles_in_arrays([text.encode() if isinstance(text, str) else text for text in plain], one_in)
    room = np.empty(1 + sum(len(text) // 2 + 1 for text in plain), np.uint64)  # there are no more words
    owned = room[: native.kernel.shingles(tuple(plain), one_in, room)]
    owned.sort()
    sizes = np.zeros(len(plain), np.int64)
    return owned[: native.kernel.settle(owned, sizes)].copy(), sizes


# in arrays ----------------------------------------------------------------------------------------------------------


def _folding() -> bytes:
    """What becomes of every byte: letters of ASCII in lower case, digits, ``_`` and all bytes beyond ASCII stay, the rest is
    0."""
    table = bytearray(256)
    for byte in (*range(48, 58), *range(97, 123), 95, *range(128, 256)):
        table[byte] = byte
    table[65:91] = range(97, 123)
    return bytes(table)


_FOLDING = _folding()
_FIRST_BYTES = np.array([(1 << 8 * count) - 1 for count in range(_BYTES_AT_ONCE + 1)], np.uint64)


def shingles_in_arrays(contents: Sequence[bytes], one_in: int = SAMPLED_ONE_IN) -> tuple[Hashes, NDArray[np.int64]]:
    """`kept_shingles` without the kernel."""
    together, ends = _in_one(contents)
    words, begins = _word_hashes(together)
    owned = _shingles(words, np.searchsorted(begins, ends), one_in)
    firsts = owned.searchsorted(np.arange(len(ends), dtype=np.uint64) << np.uint64(HASH_BITS))
    return owned & np.uint64(2**HASH_BITS - 1), np.diff(firsts, append=len(owned))


def _in_one(contents: Sequence[bytes]) -> tuple[bytes, NDArray[np.int64]]:
    """`contents` behind one another, each with a line break after it, and where each ends; then so many zero bytes that eight
    may be loaded from anywhere, up to a multiple of eight."""
    ends = np.cumsum([len(content) + 1 for content in contents], dtype=np.int64)
    size = int(ends[-1]) if len(ends) else 0
    return b"\n".join([*contents, bytes(2 * _BYTES_AT_ONCE + -size % _BYTES_AT_ONCE)]), ends


def _word_hashes(text: bytes) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash and first byte of every word. Up to 24 bytes a hash depends on all of them, beyond that on the first 16, the last 8
    and the length. Steps are made in place where they can be: memory that is in the cache is used again."""
    data = np.frombuffer(text.translate(_FOLDING), np.uint8)
    inside = np.zeros(len(data) + 1, np.bool_)  # before the text there is no word
    np.not_equal(data, 0, out=inside[1:])
    edges = np.flatnonzero(inside[1:] != inside[:-1])  # the zeros at its end close the last word
    loaded = data.view("<u8")
    begins = edges[0::2].copy()
    lengths = edges[1::2] - begins
    hashes = _eight_bytes(loaded, begins)
    spare = _FIRST_BYTES.take(lengths, mode="clip")
    hashes &= spare
    long = np.flatnonzero(lengths > _BYTES_AT_ONCE)
    if len(long):
        hashes[long] ^= _tails(loaded, begins.take(long), lengths.take(long))
    hashes *= _GOLDEN
    np.right_shift(hashes, np.uint64(32), out=spare)
    hashes ^= spare
    return hashes, begins


def _tails(loaded: Hashes, begins: NDArray[np.int64], lengths: NDArray[np.int64]) -> Hashes:
    """What the bytes of words beyond the eighth bring to their hashes."""
    tails = _eight_bytes(loaded, begins + lengths - _BYTES_AT_ONCE)
    very = np.flatnonzero(lengths > 2 * _BYTES_AT_ONCE)
    tails[very] += _eight_bytes(loaded, begins.take(very) + _BYTES_AT_ONCE) * _GOLDEN
    told = lengths.view(np.uint64)
    told *= _MIXER
    tails += told
    np.right_shift(tails, np.uint64(29), out=told)
    tails ^= told
    tails *= _TAIL
    return tails


def _eight_bytes(loaded: Hashes, begins: NDArray[np.int64]) -> Hashes:
    """The eight bytes from each of `begins` on, the first lowest, put together from two aligned words of `loaded`."""
    place = begins >> 3
    shift = begins << 3
    shift &= 56
    bits = shift.view(np.uint64)
    low = loaded.take(place, mode="clip")
    low >>= bits
    high = loaded[1:].take(place, mode="clip")
    np.subtract(np.uint64(64), bits, out=bits)
    high <<= bits  # numpy's shift by 64 leaves nothing
    low |= high
    return low


def _shingles(words: Hashes, word_ends: NDArray[np.int64], one_in: int) -> Hashes:
    """Every kept run of `SHINGLE_WORDS` words of one text, the text's number above the `HASH_BITS` of the run's hash: ascending
    and distinct. A run's hash is a polynomial in those of its words, mixed."""
    count = len(words) - SHINGLE_WORDS + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    twos = words[:-1] * np.uint64(_BASE)
    twos += words[1:]
    mixed = twos[:count] * np.uint64(_BASE * _BASE % 2**64)
    mixed += twos[2 : count + 2]
    mixed *= np.uint64(_BASE)
    mixed += words[SHINGLE_WORDS - 1 :]
    spare = twos[:count]
    np.right_shift(mixed, np.uint64(32), out=spare)
    mixed ^= spare
    mixed *= _MIXER
    np.right_shift(mixed, np.uint64(29), out=spare)
    mixed ^= spare
    mixed >>= np.uint64(64 - HASH_BITS)
    np.bitwise_and(mixed, np.uint64(one_in - 1), out=spare)
    kept = spare == 0
    for back in range(1, SHINGLE_WORDS):  # runs that begin in one text and end in the next
        across = word_ends[:-1] - back
        kept[across[(across >= 0) & (across < count)]] = False
    where = np.flatnonzero(kept)
    numbers = np.arange(len(word_ends), dtype=np.uint64) << np.uint64(HASH_BITS)
    owned = np.repeat(numbers, np.diff(np.r_[0, np.searchsorted(where, word_ends)]))
    owned |= mixed.take(where)
    owned.sort()
    distinct = np.ones(len(owned), np.bool_)
    np.not_equal(owned[1:], owned[:-1], out=distinct[1:])
    return owned[distinct]
