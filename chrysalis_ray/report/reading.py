"""Reading what other rooms wrote: JSON from a folder that a person may have touched, never trusted to have a shape."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.records import read_json
from chrysalis_ray.core.redaction import redact


def manifest(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is no such file."""
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not JSON: {error}", "delete it; the stage that writes it runs again") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} is not a JSON object", "delete it; the stage that writes it runs again")
    return value


def public_manifest(path: Path) -> dict[str, Any] | None:
    """`manifest` without secrets, for everything that is shown or sent."""
    value = manifest(path)
    return None if value is None else redact(value)


def mapping(value: Any) -> dict[str, Any]:
    """`value` as a dict, empty where it is none."""
    return dict(value) if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """`value` as a finite float, None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a mapping, by key."""
    return {str(key): checked for key, item in mapping(value).items() if (checked := number(item)) is not None}


@dataclass(frozen=True)
class DomainSummary:
    """One domain of the genome: documents and bytes in all, bytes to train on, licence as an SPDX expression."""

    documents: int
    bytes: int
    train_bytes: int
    licence: str


@dataclass(frozen=True)
class SourceSummary:
    """A source of the genome: what a person wrote to name it, what it was pinned to, how many documents it gave."""

    name: str
    pinned: str
    documents: int


@dataclass(frozen=True)
class GenomeSummary:
    """What a reader of a report needs to know of the genome."""

    genome_id: str
    merkle_root: str
    domains: Mapping[str, DomainSummary]
    sources: tuple[SourceSummary, ...] = ()


def genome_summary(folder: Path) -> GenomeSummary | None:
    """The sealed genome of a run in short, None while there is none."""
    sealed = public_manifest(folder / "manifest.json")
    if sealed is None:
        return None
    content = mapping(sealed.get("content"))
    licences = mapping(content.get("licences"))
    domains = {}
    for domain, splits in sorted(mapping(content.get("totals")).items()):
        parts = {split: numbers(value) for split, value in mapping(splits).items()}
        domains[domain] = DomainSummary(
            documents=int(sum(part.get("documents", 0) for part in parts.values())),
            bytes=int(sum(part.get("bytes", 0) for part in parts.values())),
            train_bytes=int(parts.get("train", {}).get("bytes", 0)),
            licence=str(licences.get(domain, "NOASSERTION")),
        )
    lines = content.get("sources")
    sources = tuple(_source(mapping(line)) for line in lines) if isinstance(lines, list) else ()
    return GenomeSummary(str(sealed.get("genome_id", "")), str(content.get("merkle_root", "")), domains, sources)


def _source(line: Mapping[str, Any]) -> SourceSummary:
    written = mapping(line.get("recipe"))
    named = [written.get(key) for key in ("url", "path", "domains", "names") if written.get(key)]
    name = ", ".join(map(str, named[0])) if named and isinstance(named[0], list) else str(named[0]) if named else ""
    pinned = [f"{key} {line[key]}" for key in ("commit", "sha256") if key in line]
    shots = line.get("snapshots")
    pinned += [f"commit {mapping(shot).get('commit')}" for shot in shots] if isinstance(shots, list) else []
    documents = int(number(line.get("documents")) or 0)
    return SourceSummary(f"{written.get('type', '')} {name}".strip(), "; ".join(pinned) or "what lay there", documents)
