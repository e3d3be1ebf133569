"""Sketches of a genome in the making: in memory while they are small, beyond that in a file, so that a large genome needs no
memory for what is remembered of its texts.

Of a text that does not fit the file (`scratch.py`) holds the kept shingles, and of its signature one number per band: what
candidates are found by. Bands stand one after the other, so that each is read in one go.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.genome.scratch import Scratch
from chrysalis_ray.genome.similarity import BANDS, BINS, Hashes, Sketches, keys_of_band, signatures_of, sketches_of

IN_MEMORY = 256_000_000  # bytes of shingles and signatures
ROOM_FOR_ONE = 8  # characters a kept shingle: real text has twenty; room that is not used takes no memory
OF_A_SHINGLE, OF_A_SIGNATURE = 8, 4 * BINS  # bytes


class SketchStore:
    """Takes the kept shingles of `texts` texts, of so many `characters` together, one batch after the other; what does not fit
    into `in_memory` bytes goes to a file in `folder`, or in the nearest folder above it that is there. Without a folder all
    stays in memory."""

    def __init__(self, folder: Path | None, texts: int, characters: int, in_memory: int | None = None) -> None:
        room = IN_MEMORY if in_memory is None else in_memory
        self._most = room // OF_A_SHINGLE if folder is not None else np.iinfo(np.int64).max
        self._bands = None if folder is None else Scratch(folder)
        self._shingles = None if folder is None else Scratch(folder)
        self._sizes = np.zeros(texts, np.int64)
        self._hashes = np.empty(min(characters // ROOM_FOR_ONE, self._most) + 1, np.uint64)
        self._filled = self._texts = self._written = 0  # shingles in memory, texts that came, texts in the file

    def add(self, hashes: Hashes, sizes: NDArray[np.int64]) -> None:
        """The shingles of the next texts, and how many each has. Raises GenomeError when the disk is full."""
        signed = (self._texts - self._written + len(sizes)) * OF_A_SIGNATURE // OF_A_SHINGLE
        if self._filled and self._filled + len(hashes) + signed > self._most:
            self._write()
        begin, self._filled = self._filled, self._filled + len(hashes)
        if self._filled > len(self._hashes):
            self._hashes.resize(2 * self._filled, refcheck=False)
        self._hashes[begin : self._filled] = hashes
        self._sizes[self._texts : self._texts + len(sizes)] = sizes
        self._texts += len(sizes)

    def sketches(self) -> Sketches:
        """The sketches of all texts, which have come by now."""
        assert self._texts == len(self._sizes)
        if not self._written:
            return sketches_of(self._hashes[: self._filled], self._sizes)
        self._write()
        assert self._shingles is not None
        assert self._bands is not None
        return StoredSketches(self._sizes, self._shingles, self._bands)

    def _write(self) -> None:
        """Move what is in memory to the file."""
        assert self._shingles is not None
        assert self._bands is not None
        hashes, sizes = self._hashes[: self._filled], self._sizes[self._written : self._texts]
        self._shingles.append(hashes.data)
        signatures = signatures_of(hashes, np.r_[0, np.cumsum(sizes)].astype(np.int64))
        for band in range(BANDS):
            self._bands.put(8 * (band * len(self._sizes) + self._written), keys_of_band(signatures, band).data)
        self._filled, self._written = 0, self._texts


class StoredSketches(Sketches):
    """Sketches that are read when they are asked for; all else is as if they were at hand."""

    def __init__(self, sizes: NDArray[np.int64], shingles: Scratch, bands: Scratch) -> None:
        object.__setattr__(self, "offsets", np.r_[0, np.cumsum(sizes)].astype(np.int64))
        object.__setattr__(self, "_files", (shingles, bands))

    def stretch(self, begin: int, end: int) -> Hashes:
        shingles: Scratch = self.__dict__["_files"][0]
        return np.frombuffer(shingles.read(8 * begin, 8 * (end - begin)), np.uint64)

    def band(self, number: int) -> Hashes:
        bands: Scratch = self.__dict__["_files"][1]
        return np.frombuffer(bands.read(8 * number * len(self), 8 * len(self)), np.uint64)

    def aside(self, numbers: NDArray[np.int64]) -> Callable[[int, int], NDArray[np.int64]]:
        bands: Scratch = self.__dict__["_files"][1]
        place = bands.append(numbers.data)
        return lambda begin, end: np.frombuffer(bands.read(place + 8 * begin, 8 * (end - begin)), np.int64)
