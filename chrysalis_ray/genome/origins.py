"""Where the text of a genome came from, in words: from the lines that its manifest keeps of every source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def name_of_source(line: Mapping[str, Any]) -> str:
    """What a person wrote to name the source: its kind, and its address, path, domains or packages."""
    written = line["recipe"]
    name = written.get("url") or written.get("path") or ", ".join(written.get("domains") or written.get("names") or [])
    return f"{written['type']} {name}"


def pins_of_source(line: Mapping[str, Any]) -> list[str]:
    """What the source was pinned to, and what its kind has to say of itself."""
    pinned = [f"commit {line['commit']}"] if "commit" in line else []
    pinned += [f"sha256 {line['sha256']}"] if "sha256" in line else []
    pinned += [f"{len(line['packages'])} packages"] if "packages" in line else []
    if "followed" in line:
        pinned += [f"{len(line['followed'])} submodules followed"]
    elif "submodules" in line:
        pinned += [f"{len(line['submodules'])} submodules not followed"]
    pinned += [f"{shot['domain']} is {shot['snapshot']} ({shot['commit'][:12]})" for shot in line.get("snapshots", [])]
    return pinned + (completeness(line["records"]) if "records" in line else [])


def completeness(told: Mapping[str, Any]) -> list[str]:
    """How much of what hub records should say they say."""
    missing = sorted(told["missing"].items(), key=lambda entry: (-entry[1], entry[0]))
    lacking = ", ".join(f"{name} {count} times" for name, count in missing)
    share = told["filled"] / told["wanted"] if told["wanted"] else 0.0
    lines = [
        f"complete to {share:.0%}" + (f" (missing: {lacking})" if lacking else ""),
        f"{told['incomplete']} incomplete, {told['denied']} without consent to training",
    ]
    return lines + ([f"{len(told['media'])} media kept elsewhere, named by their hashes"] if told.get("media") else [])
