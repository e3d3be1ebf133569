"""What one genome has that another has not, from their manifests alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = ("added", "removed", "forgotten", "changed", "moved", "marked")


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """domain -> kind -> paths, sorted; from the contents of two manifests. Domains and kinds without a difference are left out.

    ``added``, ``removed``: a path that only one of the two has. ``forgotten``: removed, and the other has its tombstone.
    ``changed``: other bytes under the same path. ``moved``: the same bytes in another split (or now ``excluded``). ``marked``:
    the same bytes in the same split under other marks or another licence.
    """
    old, new = _by_path(before["documents"]), _by_path(after["documents"])
    forgotten = {stone["doc_id"] for stone in after.get("forgotten", ())}
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for place in sorted(old.keys() | new.keys()):
        kind = _kind(old.get(place, []), new.get(place, []))
        if kind == "removed" and all(row["doc_id"] in forgotten for row in old[place]):
            kind = "forgotten"
        if kind is not None:
            found[place[0]][kind].append(place[1])
    return {domain: {kind: kinds[kind] for kind in KINDS if kind in kinds} for domain, kinds in found.items()}


def _by_path(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """(domain, path) -> rows; rarely more than one (a file of two snapshots of one repository)."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["domain"], row["path"]].append(row)
    return found


def _kind(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> str | None:
    if not old or not new:
        return "added" if new else "removed"
    if {row["doc_id"] for row in old} != {row["doc_id"] for row in new}:
        return "changed"
    if {(row["doc_id"], row["split"]) for row in old} != {(row["doc_id"], row["split"]) for row in new}:
        return "moved"
    told = [sorted((row["doc_id"], row["licence"], sorted(row.get("marks", {}))) for row in rows) for rows in (old, new)]
    return "marked" if told[0] != told[1] else None
