"""Room on disk for what a genome in the making does not hold in memory."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import IO

from chrysalis_ray.core.errors import GenomeError


class Scratch:
    """A file beside a genome, opened at the first write. It has no name, and is gone with the process, however that ends.

    With a `name` it has one, in the genome's own folder, where other processes and machines may find it; then it is gone when
    the build is, and where a kill leaves it behind, the next build into that folder removes it.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder, self.end = folder, 0
        self.path: Path | None = None
        self._name = name
        self._file: IO[bytes] | None = None

    def append(self, content: bytes | memoryview) -> int:
        """Write `content` at the end, and tell where that was. Raises GenomeError when the disk is full."""
        begin = self.end
        self.put(begin, content)
        return begin

    def put(self, begin: int, content: bytes | memoryview) -> None:
        """Write `content` from byte `begin` on. Raises GenomeError when the disk is full."""
        if not memoryview(content).nbytes:
            return
        left = memoryview(content).cast("B")
        try:
            if self._file is None:
                self._file = self._opened()
            while left:
                written = os.pwrite(self._file.fileno(), left, begin)
                begin, left = begin + written, left[written:]
        except OSError as error:
            raise GenomeError(
                f"{self.folder}: after {self.end:,} bytes of a genome in the making no more can be stored there: "
                f"{error.strerror}",
                "free twice as much space there as the sources have text",
            ) from error
        self.end = max(self.end, begin)

    def read(self, begin: int, size: int) -> bytes:
        """So many bytes from `begin` on. Raises GenomeError when the disk does not give them."""
        if not size:
            return b""
        assert self._file is not None
        try:
            found = os.pread(self._file.fileno(), size, begin)
        except OSError as error:
            raise GenomeError(f"what is stored near {self.folder} cannot be read: {error.strerror}", "build again") from error
        while len(found) < size:  # one read gives 2 GiB at most
            more = os.pread(self._file.fileno(), size - len(found), begin + len(found))
            if not more:
                raise GenomeError(f"what is stored near {self.folder} is cut off at byte {begin + len(found):,}", "build again")
            found += more
        return found

    def settle(self) -> None:
        """Let other machines see what was written so far."""
        if self._file is not None and self.path is not None:
            os.fsync(self._file.fileno())

    def _opened(self) -> IO[bytes]:
        if self._name is None:
            return tempfile.TemporaryFile(dir=_there(self.folder), buffering=0)  # as long as this object
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_behind in self.folder.glob(f".{self._name}.{'?' * 8}"):  # by a build that was killed
            left_behind.unlink()
        descriptor, path = tempfile.mkstemp(dir=self.folder, prefix=f".{self._name}.")
        self.path = Path(path)
        weakref.finalize(self, self.path.unlink, missing_ok=True)
        return os.fdopen(descriptor, "r+b", buffering=0)


def _there(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
