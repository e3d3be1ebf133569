"""The store: content-addressed blobs and immutable numbered cuts. Standard library only.

    blobs/ab/abcdef…           named by the sha256 of their bytes, never changed
    cuts/0000000042.json       {"sha256": of body, "body": …}, created only if absent: THE commit point

A *cut* is a consistent cut of the population: the result of one turn of a body,

    body = {"turn": n, "results": {position: {"variant_id", "seed": blob sha256, "chunk", "metrics"}}}

There is no mutable head: the head is the newest cut whose record and blobs verify. A pointer is the file that tears.
Every step is temporary file → fsync → link or rename → fsync of the folder, so a kill, a full disk or a torn write at any
step leaves the previous cut or the next one, and never a wrong byte that is accepted.

An exclusive create is `os.link`, which is atomic on local file systems and on NFS; a reply lost on the way shows as "exists
already with the same body" and counts as success.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import StoreConflict, StoreCorrupt, StoreError
from chrysalis_ray.core.records import canonical_json, sha256_of, sha256_of_file, sync_folder, write_bytes

_SHA256 = re.compile(r"[0-9a-f]{64}")
_CUT_NAME = re.compile(r"(\d{10})\.json")
_COPY_CHUNK_BYTES = 1 << 20
_ABANDONED_AFTER_SECONDS = 3600.0  # a temporary file this old was left by a process that died


class Store:
    """Blobs and cuts under `root`, which is created when first written. Safe for several processes on one file system."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._blobs = self.root / "blobs"
        self._cuts = self.root / "cuts"
        # Records that this store's `cuts` skipped, by file identity: a run that goes on from the cut before puts the same
        # seeds again, which would make a skipped record whole, with metrics of a time that no longer exists.
        self._skipped: dict[int, tuple[int, int]] = {}

    # blobs ------------------------------------------------------------------------------------------------------------

    def put(self, content: bytes) -> str:
        """Keep `content`; returns its hex sha256. The same content twice is one blob. StoreError if it cannot be written."""
        sha256 = hashlib.sha256(content).hexdigest()
        with _as_store_error(f"cannot write blob {sha256[:12]} ({len(content)} bytes) under {self._blobs}"):
            if not self._is_there(sha256):
                write_bytes(self._blob(sha256), content)
        return sha256

    def put_file(self, path: Path) -> str:
        """Like `put` for a file, without holding it in memory."""
        with _as_store_error(f"cannot keep {path} under {self._blobs}"):
            self._blobs.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as source, tempfile.NamedTemporaryFile(dir=self._blobs, prefix=".put.") as copy:
                digest = hashlib.sha256()
                while chunk := source.read(_COPY_CHUNK_BYTES):
                    digest.update(chunk)
                    copy.write(chunk)
                copy.flush()
                os.fsync(copy.fileno())
                sha256 = digest.hexdigest()
                if not self._is_there(sha256):
                    target = self._blob(sha256)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.unlink(missing_ok=True)  # only a damaged one can stand there
                    _link_if_absent(Path(copy.name), target)
        return sha256

    def get(self, sha256: str) -> bytes:
        """The bytes of a blob. Raises StoreError if there is none of that name, StoreCorrupt if its bytes do not match it."""
        if not _SHA256.fullmatch(sha256):
            raise StoreError(f"{sha256!r} is not a sha256")
        path = self._blob(sha256)
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(
                f"no blob {sha256} under {self._blobs}", "it was deleted, or the store is another run's"
            ) from error
        except OSError as error:
            raise StoreError(f"cannot read blob {path}: {error}") from error
        if (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise StoreCorrupt(
                f"blob {path} holds {len(content)} bytes with sha256 {found}, not what its name says",
                "the disk changed it; run the same command again: the newest cut whose blobs verify is used",
            )
        return content

    def holds(self, sha256: str) -> bool:
        """Whether a blob of that name is there; its bytes are not looked at."""
        return bool(_SHA256.fullmatch(sha256)) and self._blob(sha256).is_file()

    # cuts -------------------------------------------------------------------------------------------------------------

    def commit_cut(self, number: int, body: Mapping[str, Any]) -> None:
        """Make `body` cut `number`, for good. The blobs it names must have been put before.

        The same body again changes nothing. Raises StoreConflict if that number holds another body, StoreError if a blob
        is missing or the record cannot be written. A record that `cuts` skips (torn, or its blobs are gone) gives way.
        """
        if not 0 <= number < 10**10:
            raise StoreError(f"cut number {number} is not between 0 and 9999999999")
        try:
            record = canonical_json({"sha256": sha256_of(body), "body": body}) + b"\n"
        except (TypeError, ValueError) as error:
            raise StoreError(f"cut {number} holds a value that JSON cannot carry: {error}") from error
        if missing := [sha256 for sha256 in _seeds(body) if not self.holds(sha256)]:
            raise StoreError(f"cut {number} names {len(missing)} blobs that the store does not hold, first {missing[0]!r}")
        path = self._cut(number)
        with _as_store_error(f"cannot commit cut {number} under {self._cuts}"):
            self._cuts.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._cuts, prefix=".cut.") as draft:
                draft.write(record)
                draft.flush()
                os.fsync(draft.fileno())
                if _link_if_absent(Path(draft.name), path) or self._replace_void(number, Path(draft.name)):
                    return
        standing = _read_cut(path)
        if standing is None or canonical_json(standing) != canonical_json(body):
            raise StoreConflict(
                f"cut {number} was committed before with another body ({path})",
                "another process works on this run; stop one of them",
            )

    def cuts(self) -> list[tuple[int, dict[str, Any]]]:
        """Every committed cut as (number, body), ascending.

        Records at the end that are damaged, or whose blobs are missing or damaged, are skipped: the last pair returned can
        be resumed from. Blobs of earlier cuts may have been collected. Raises StoreCorrupt if an earlier record is damaged.
        """
        numbers = self._numbers()
        while numbers and not self._stands(numbers[-1]):
            void = numbers.pop()
            self._skipped[void] = _identity(self._cut(void))
        found: list[tuple[int, dict[str, Any]]] = []
        for number in numbers:
            body = _read_cut(self._cut(number))
            if body is None:
                raise StoreCorrupt(
                    f"cut {number} ({self._cut(number)}) is damaged but later cuts are not",
                    f"restore it from a backup, or move it and all later ones away to go on from the cut before {number}",
                )
            found.append((number, body))
        return found

    def collect(self, keep: set[str]) -> int:
        """Delete blobs that are not in `keep`; returns the bytes freed.

        The blobs of the newest cut are kept whatever `keep` says, and so is every blob put since that cut was committed: it
        may belong to the next one. One process at a time may collect, the one that commits.
        """
        number = next((number for number in reversed(self._numbers()) if self._stands(number)), None)
        newest = _read_cut(self._cut(number)) if number is not None else None
        if number is None or newest is None:
            return 0
        kept = keep | set(_seeds(newest))
        freed = 0
        with _as_store_error(f"cannot collect blobs under {self._blobs}"):
            newest_time = self._cut(number).stat().st_mtime_ns
            for path in sorted([*self._blobs.rglob("*"), *self._cuts.glob(".cut.*")]):
                if not path.is_file() or path.name in kept:
                    continue
                status = path.stat()
                if path.name.startswith("."):
                    removable = time.time() - status.st_mtime > _ABANDONED_AFTER_SECONDS
                else:
                    removable = status.st_mtime_ns < newest_time
                if removable:
                    path.unlink()
                    freed += status.st_size
        return freed

    # inside -----------------------------------------------------------------------------------------------------------

    def _blob(self, sha256: str) -> Path:
        return self._blobs / sha256[:2] / sha256

    def _cut(self, number: int) -> Path:
        return self._cuts / f"{number:010d}.json"

    def _is_there(self, sha256: str) -> bool:
        """Whether the blob stands intact; if so it is made young again, so that `collect` does not take it before its cut."""
        path = self._blob(sha256)
        if not path.is_file() or sha256_of_file(path) != sha256:
            return False
        os.utime(path)
        return True

    def _numbers(self) -> list[int]:
        if not self._cuts.is_dir():
            return []
        return sorted(int(match[1]) for path in self._cuts.iterdir() if (match := _CUT_NAME.fullmatch(path.name)))

    def _stands(self, number: int) -> bool:
        """Whether a record and all blobs that it names are intact."""
        body = _read_cut(self._cut(number))
        return body is not None and all(self.holds(seed) and sha256_of_file(self._blob(seed)) == seed for seed in _seeds(body))

    def _replace_void(self, number: int, draft: Path) -> bool:
        """Put `draft` in the place of cut `number` if that one is void, as `cuts` judges it. The old file is kept aside.

        Only the holder of the lock removes a record, so between the check and the rename nobody puts a good one there.
        """
        with _locked(self.root / ".lock"):
            path = self._cut(number)
            skipped = path.exists() and self._skipped.get(number) == _identity(path)
            if not skipped and any(self._stands(later) for later in self._numbers() if later >= number):
                return False
            if path.exists():
                os.replace(path, path.with_suffix(f".void-{time.time_ns()}"))
            return _link_if_absent(draft, path)


def _seeds(body: Mapping[str, Any]) -> list[str]:
    """The blobs that a cut names."""
    return [result["seed"] for result in body.get("results", {}).values() if result.get("seed")]


def _read_cut(path: Path) -> dict[str, Any] | None:
    """The body of a cut file, or None if the file is torn, altered or not there."""
    try:
        record = json.loads(path.read_bytes())
        body = record["body"]
        return body if isinstance(body, dict) and sha256_of(body) == record["sha256"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _link_if_absent(draft: Path, target: Path) -> bool:
    """Give the finished file `draft` the name `target` unless that name is taken; says whether it did."""
    try:
        os.link(draft, target)
    except FileExistsError:
        return False
    os.chmod(target, 0o644)
    sync_folder(target.parent)
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def _as_store_error(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what}: {error}", "free disk space or repair the volume, then run the same command again") from error
