"""Sobol points, scrambled: a few variants fill a space of many ranges evenly. Standard library only.

Direction numbers are those of Joe and Kuo ("Constructing Sobol sequences with better two-dimensional projections", SIAM J. Sci.
Comput. 30, 2008), points come in the order of the Gray code, and the scrambling is Owen's ("Randomly permuted (t,m,s)-nets",
1995): each bit is flipped by a hash of the bits above it. So the first 2^k points have exactly one in each of the 2^k equal
parts of every axis, whatever the rng_seed, and more points leave the first ones as they are.
"""

from __future__ import annotations

import hashlib
from functools import cache

BITS = 32
# (primitive polynomial over GF(2), initial direction numbers), from the second axis on.
_JOE_KUO = (
    (3, (1,)), (7, (1, 3)), (11, (1, 3, 1)), (13, (1, 1, 1)), (19, (1, 1, 3, 3)), (25, (1, 3, 5, 13)),
    (37, (1, 1, 5, 5, 17)), (41, (1, 1, 5, 5, 5)), (47, (1, 1, 7, 11, 19)), (55, (1, 1, 5, 1, 1)), (59, (1, 1, 1, 3, 11)),
    (61, (1, 3, 5, 5, 31)), (67, (1, 3, 3, 9, 7, 49)), (91, (1, 1, 1, 15, 21, 21)), (97, (1, 3, 1, 13, 27, 49)),
    (103, (1, 1, 1, 15, 7, 5)), (109, (1, 3, 1, 15, 13, 25)), (115, (1, 1, 5, 5, 19, 61)),
    (131, (1, 3, 7, 11, 23, 15, 103)), (137, (1, 3, 7, 13, 13, 15, 69)), (143, (1, 1, 3, 13, 7, 35, 63)),
    (145, (1, 3, 5, 9, 1, 25, 53)), (157, (1, 3, 1, 13, 9, 35, 107)), (167, (1, 3, 1, 5, 27, 61, 31)),
    (171, (1, 1, 5, 11, 19, 41, 61)), (185, (1, 3, 5, 3, 3, 13, 69)), (191, (1, 1, 7, 13, 1, 19, 1)),
    (193, (1, 3, 7, 5, 13, 19, 59)), (203, (1, 1, 3, 9, 25, 29, 41)), (211, (1, 3, 5, 13, 23, 1, 55)),
    (213, (1, 3, 7, 3, 13, 59, 17)), (229, (1, 3, 1, 3, 5, 53, 69)), (239, (1, 1, 5, 5, 23, 33, 13)),
    (241, (1, 1, 7, 7, 1, 61, 123)), (247, (1, 1, 7, 9, 13, 61, 49)), (253, (1, 3, 3, 5, 3, 55, 33)),
    (285, (1, 3, 1, 15, 31, 13, 49, 245)), (299, (1, 3, 5, 15, 31, 59, 63, 97)), (301, (1, 3, 1, 11, 11, 11, 77, 249)),
)  # fmt: skip
AXES = 1 + len(_JOE_KUO)


def sobol_point(index: int, axes: int, rng_seed: int | None) -> tuple[float, ...]:
    """Point `index` (from 0) in (0, 1)^axes; `rng_seed` None leaves it unscrambled. Raises ValueError beyond `AXES` axes."""
    if not 0 <= axes <= AXES or not 0 <= index < 2**BITS:
        raise ValueError(f"point {index} on {axes} axes: indices are below 2^{BITS}, axes at most {AXES}")
    bits = [_bits(index, axis) for axis in range(axes)]
    if rng_seed is not None:
        bits = [_scrambled(value, axis, rng_seed) for axis, value in enumerate(bits)]
    return tuple((value + 0.5) / 2**BITS for value in bits)


def _bits(index: int, axis: int) -> int:
    gray, value = index ^ (index >> 1), 0
    for place, direction in enumerate(_directions(axis)):
        if gray >> place & 1:
            value ^= direction
    return value


@cache
def _directions(axis: int) -> tuple[int, ...]:
    """BITS direction numbers of an axis, the most significant bit first."""
    if axis == 0:
        return tuple(1 << (BITS - 1 - place) for place in range(BITS))
    polynomial, numbers = _JOE_KUO[axis - 1][0], list(_JOE_KUO[axis - 1][1])
    degree = polynomial.bit_length() - 1
    while len(numbers) < BITS:
        number = numbers[-degree] ^ (numbers[-degree] << degree)
        for back in range(1, degree):
            if polynomial >> (degree - back) & 1:
                number ^= numbers[-back] << back
        numbers.append(number)
    return tuple(number << (BITS - 1 - place) for place, number in enumerate(numbers))


def _scrambled(value: int, axis: int, rng_seed: int) -> int:
    """Owen's nested uniform scrambling: bit b is flipped by a fair coin that belongs to the bits above it."""
    result = value
    for place in range(BITS):
        above = value >> (BITS - place)
        digest = hashlib.blake2b(f"{rng_seed}/{axis}/{place}/{above}".encode(), digest_size=1).digest()
        result ^= (digest[0] & 1) << (BITS - 1 - place)
    return result
