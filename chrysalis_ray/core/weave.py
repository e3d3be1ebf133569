"""The weave: an append-only, hash-chained journal of what happened to a population. Standard library only.

One *turn* per line, canonical JSON:

    {"n": 7, "prev": sha256 of turn 6, "sha256": of this turn without this key, "time": "2026-…Z", "kind": "cut", "body": {…}}

The weave is evidence, the cuts of the store are the truth: if they disagree the cuts win. A line is written by a single
`write` on an O_APPEND descriptor and fsynced; a crash can tear only the last line, which readers drop and the next writer
removes. Anything earlier that does not chain raises StoreCorrupt.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import StoreCorrupt, StoreError
from chrysalis_ray.core.records import canonical_json, sha256_of, sync_folder
from chrysalis_ray.core.redaction import redact

ORIGIN = "0" * 64  # `prev` of the first turn


class Weave:
    """The journal at `path`. Several processes of one machine may append; each append takes a lock."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._end = 0  # bytes of the file known to chain, and the last turn in them
        self._last: dict[str, Any] | None = None

    def append(self, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Write one turn and return it as written: secrets redacted, non-finite floats as words.

        Raises StoreCorrupt if the journal is broken before its last line, StoreError if it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            created = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(f"cannot open the journal {self.path}: {error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._catch_up(descriptor)
            turn = self._next(kind, body)
            line = canonical_json(turn) + b"\n"
            try:
                self._write(descriptor, line)
            except OSError as error:
                raise StoreError(
                    f"cannot write turn {turn['n']} to {self.path}: {error}", "free disk space, then go on"
                ) from error
        finally:
            os.close(descriptor)
        if created:
            sync_folder(self.path.parent)
        self._end += len(line)
        self._last = turn
        return turn

    def turns(self) -> list[dict[str, Any]]:
        """Every turn, verified, oldest first; an empty list if there is no journal yet. A torn last line is left out.

        Raises StoreCorrupt if an earlier line is damaged, missing or out of order.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot read the journal {self.path}: {error}") from error
        return self._verified(content, None)[0]

    def _catch_up(self, descriptor: int) -> None:
        """Verify what others appended since the last look, and cut a torn last line off."""
        if os.fstat(descriptor).st_size < self._end:
            raise StoreCorrupt(f"{self.path} became shorter than it was", "something else rewrote the journal; restore it")
        fresh = _read_from(descriptor, self._end)
        turns, intact_bytes = self._verified(fresh, self._last)
        if intact_bytes < len(fresh):
            os.ftruncate(descriptor, self._end + intact_bytes)
            os.fsync(descriptor)
        self._end += intact_bytes
        self._last = turns[-1] if turns else self._last

    def _next(self, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
        turn: dict[str, Any] = {
            "n": self._last["n"] + 1 if self._last else 0,
            "prev": self._last["sha256"] if self._last else ORIGIN,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "kind": kind,
            "body": redact(body),
        }
        return {**turn, "sha256": sha256_of(turn)}

    def _write(self, descriptor: int, line: bytes) -> None:
        """All of `line` or nothing: a short write (a full disk) is taken back."""
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError("the disk took only a part of the line")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, self._end)
            raise

    def _verified(self, content: bytes, last: dict[str, Any] | None) -> tuple[list[dict[str, Any]], int]:
        """The turns in `content`, which follow turn `last`, and how many bytes of it are intact."""
        turns: list[dict[str, Any]] = []
        intact_bytes = 0
        lines = io.BytesIO(content).readlines()  # at line feeds only: a torn line may hold any other byte
        for index, line in enumerate(lines):
            turn = _parse(line)
            if turn is None and index == len(lines) - 1:
                break  # torn: its writer died before it was told that the line is safe
            expected = (last["n"] + 1, last["sha256"]) if last else (0, ORIGIN)
            if turn is None or (turn["n"], turn["prev"]) != expected:
                raise StoreCorrupt(
                    f"{self.path}: the chain breaks at turn {expected[0]}",
                    "a line was altered, removed or added by hand; restore the journal or move it away to start a new one",
                )
            turns.append(turn)
            last = turn
            intact_bytes += len(line)
        return turns, intact_bytes


def _parse(line: bytes) -> dict[str, Any] | None:
    """The turn on a line, or None if the line is torn or altered, even where it still says the same (a digit too many)."""
    if not line.endswith(b"\n"):
        return None
    try:
        turn = json.loads(line)
        claimed = turn["sha256"]
        unsigned = {key: value for key, value in turn.items() if key != "sha256"}
        intact = sha256_of(unsigned) == claimed and canonical_json(turn) + b"\n" == line
        return turn if intact and {"n", "prev", "kind", "body", "time"} <= turn.keys() else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _read_from(descriptor: int, offset: int) -> bytes:
    parts = []
    while part := os.pread(descriptor, 1 << 20, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)
