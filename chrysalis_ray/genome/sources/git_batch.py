"""Objects of a bare store by git itself, one `git cat-file --batch` for many of them, and a hash over each."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.genome.sources.git_program import NEUTRAL, PATIENCE, binary, environment, last_words

PIECE = 1 << 20


@dataclass(frozen=True)
class GitObject:
    """An object whose hash is its name. `content` is None where it is longer than the caller wanted."""

    name: str
    kind: str
    size: int
    content: bytes | None


class CatFile:
    """One `git cat-file --batch` on a bare store, started when it is first asked; and a hash over everything. There are packs
    over which git thinks forever (one with a delta on itself): it is ended when it says nothing for `PATIENCE` seconds."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting_since: float | None = None
        self._over = threading.Event()

    def close(self) -> None:
        """End git."""
        self._over.set()
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._stderr.close()

    def ask(self, names: Sequence[str]) -> None:
        """Let git look for objects, whose answers are then to be read in this order."""
        if not names:
            return
        stdin = self._started().stdin
        assert stdin is not None
        try:
            stdin.write(("\n".join(names) + "\n").encode())
            stdin.flush()
        except BrokenPipeError:
            raise self._ended(names[0]) from None

    def answer(self, name: str, keep_bytes: int) -> GitObject:
        """The next of the objects that were asked for. Raises GenomeCorrupt."""
        self._waiting_since = time.monotonic()
        try:
            return self._answer(name, keep_bytes)
        finally:
            self._waiting_since = None

    def _answer(self, name: str, keep_bytes: int) -> GitObject:
        stdout = self._started().stdout
        assert stdout is not None
        header = stdout.readline().decode("ascii", "replace").split()
        if len(header) != 3 or header[0] != name or not header[2].isdigit():
            if len(header) == 2 and header[1] == "missing":
                raise GenomeCorrupt(
                    f"git object {name} is missing",
                    "fetch it again, whole (--filter leaves objects out); name a commit that it has",
                )
            raise self._ended(name)
        kind, size = header[1], int(header[2])
        digest = hashlib.new(algorithm(name), f"{kind} {size}\0".encode(), usedforsecurity=False)
        pieces: list[bytes] = []
        unread = size
        while unread:
            piece = stdout.read(min(unread, PIECE))
            self._waiting_since = time.monotonic()
            if not piece:
                raise self._ended(name)
            unread -= len(piece)
            digest.update(piece)
            if size <= keep_bytes:
                pieces.append(piece)
        if stdout.read(1) != b"\n":
            raise self._ended(name)
        if digest.hexdigest() != name:
            raise GenomeCorrupt(
                f"git object {name} ({kind}, {size} bytes) hashes to {digest.hexdigest()}",
                "the repository is damaged; fetch again",
            )
        return GitObject(name, kind, size, b"".join(pieces) if size <= keep_bytes else None)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
            self._process = subprocess.Popen(
                [binary(), *NEUTRAL, f"--git-dir={self._store}", "cat-file", "--batch"],
                env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
            )  # fmt: skip
            threading.Thread(target=self._watch, args=[self._process], daemon=True).start()
        return self._process

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """End git when an answer does not come."""
        while not self._over.wait(PATIENCE / 8):
            since = self._waiting_since
            if since is not None and time.monotonic() - since > PATIENCE:
                self._over.set()
                process.kill()

    def _ended(self, name: str) -> GenomeCorrupt:
        """What to say when git stopped in the middle of an object."""
        process, late = self._started(), self._over.is_set()
        process.kill()
        process.wait()
        self._stderr.seek(0)
        said = f"git says nothing for {PATIENCE:g} seconds" if late else last_words(self._stderr.read())
        return GenomeCorrupt(f"git object {name} cannot be read: {said}", "fetch the repository again")


def algorithm(name: str) -> str:
    """What git calls the hash that gave `name`."""
    return "sha1" if len(name) == 40 else "sha256"
