"""`metrics.jsonl`: one line per report of a variant, appended by the driver while the population trains.

The file survives a crash by its form: a line is one write, so that only the last one can be torn, and a torn line has no
newline. After a resume the driver may report again what it had reported before; the later line is the true one, and what
the variant had reported *beyond* it belongs to a future that did not happen.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.records import canonical_json

_TAIL_BYTES = 1 << 20


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
    """Append `row` as one line, in one write. Numbers that JSON cannot carry (NaN, infinities) become null.

    `row` needs ``variant`` (text) and ``report`` (whole number). A torn line left by a crash is cut off first.
    Several processes of one machine may append; each append takes a lock.
    """
    _key(row, path)
    line = canonical_json(_finite(row)) + b"\n"
    try:
        written = _appended(path, line)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}", "mend that, then run the same command again") from error
    if written != len(line):
        raise RunError(f"{path}: wrote {written} of {len(line)} bytes", "free some disk space and run the same command again")


def _appended(path: Path, line: bytes) -> int:
    """Bytes of `line` that were added to the file, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # a line that another process is still writing is not a torn one
        _cut_torn_tail(descriptor)
        return os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All reports, in the order of the file, one per (variant, report). A missing file has none.

    Raises RunError, with the line number, for a line inside the file that is no report.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows: dict[str, dict[int, tuple[int, dict[str, Any]]]] = {}
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn, or nothing
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except ValueError as error:
            raise RunError(f"{path}:{number}: not a line of JSON", "delete this line; the others stay valid") from error
        variant, report = _key(row, path, number)
        of_variant = rows.setdefault(variant, {})
        for later in [r for r in of_variant if r >= report]:
            del of_variant[later]
        of_variant[report] = (number, row)
    kept = sorted((entry for of_variant in rows.values() for entry in of_variant.values()), key=lambda entry: entry[0])
    return [row for _, row in kept]


def told_positions(path: Path) -> set[tuple[str, str]]:
    """(variant, position) of every report ever appended, those included that a later one replaced.

    A resumed run reports everything again from the start. What stands in the file must not be appended again: a replaced
    report would then come after the one that replaced it.
    """
    if not path.exists():
        return set()
    told = set()
    for line in path.read_bytes().split(b"\n")[:-1]:
        if line.strip():
            row = json.loads(line, parse_constant=lambda _: None)
            told.add((row.get("variant"), row.get("position")))
    return told


def _key(row: Any, path: Path, number: int | None = None) -> tuple[str, int]:
    where = f"{path}:{number}" if number else str(path)
    if not isinstance(row, Mapping):
        raise RunError(f"{where}: a report is a JSON object")
    variant, report = row.get("variant"), row.get("report")
    if not isinstance(variant, str) or not isinstance(report, int) or isinstance(report, bool):
        raise RunError(f"{where}: a report needs `variant` (text) and `report` (whole number), not {variant!r} and {report!r}")
    return variant, report


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _cut_torn_tail(descriptor: int) -> None:
    """Drop the bytes after the last newline: half a line of a process that died while writing it."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    start = max(0, size - _TAIL_BYTES)
    newline = os.pread(descriptor, size - start, start).rfind(b"\n")
    os.ftruncate(descriptor, start + newline + 1)
