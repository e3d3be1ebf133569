"""A packed object told as the difference to another one (gitformat-pack, "Deltified representation").

A delta is the size of its base, the size of its result, then instructions one after another: copy so many bytes of the base
from a place on, or insert the bytes that follow. Whoever wrote it may have written anything: what does not fit raises Misfit,
and nothing larger than wanted is made.
"""

from __future__ import annotations

COPY = 0x80
COPIED_WHERE_NONE_IS_SAID = 0x10000
SHIFTS = [tuple(8 * bit for bit in range(4) if told >> bit & 1) for told in range(16)]  # of the bytes that are there
MOST_BITS = 60  # of a size; what claims more is no size


class Misfit(Exception):
    """What was read is not what its format allows, or more than wanted. It stays inside `git_packs`, which leaves it to git."""


def patched(base: bytes, delta: bytes, most: int) -> bytes:
    """The result of `delta` on `base`. Raises Misfit where the two do not belong together, where an instruction is cut off or
    leads out of the base, where the result has another size than it should or more than `most` bytes."""
    try:
        return _patched(base, delta, most)
    except IndexError:
        raise Misfit("the delta is cut off") from None


def _patched(base: bytes, delta: bytes, most: int) -> bytes:
    base_size, at = size_at(delta, 0)
    size, at = size_at(delta, at)
    if base_size != len(base) or size > most:
        raise Misfit(f"a delta from {base_size} to {size} bytes, on {len(base)}")
    pieces: list[bytes] = []
    left, end = size, len(delta)
    while at < end:
        told = delta[at]
        at += 1
        if told & COPY:
            begin = length = 0
            for shift in SHIFTS[told & 0xF]:
                begin |= delta[at] << shift
                at += 1
            for shift in SHIFTS[told >> 4 & 0x7]:
                length |= delta[at] << shift
                at += 1
            length = length or COPIED_WHERE_NONE_IS_SAID
            piece = base[begin : begin + length]
            if len(piece) != length:
                raise Misfit(f"a delta copies beyond the {len(base)} bytes of its base")
        else:
            piece = delta[at : at + told]
            at += told
            if at > end or not piece:
                raise Misfit("a delta inserts what is not there")
        left -= len(piece)
        if left < 0:
            raise Misfit(f"a delta gives more than its {size} bytes")
        pieces.append(piece)
    if left:
        raise Misfit(f"a delta lacks {left} of its {size} bytes")
    return b"".join(pieces)


def size_at(content: bytes, at: int, bits: int = 7) -> tuple[int, int]:
    """(size, place behind it) of a size in 7 bits a byte, the lowest first, the last byte without its highest bit; only `bits`
    of the first byte are the size's. Raises Misfit for a number that is none, IndexError where the bytes end."""
    byte = content[at]
    size, shift = byte & (1 << bits) - 1, bits
    while byte & 0x80:
        at += 1
        byte = content[at]
        size |= (byte & 0x7F) << shift
        shift += 7
        if shift > MOST_BITS:
            raise Misfit("a size of more than 60 bits")
    return size, at + 1
