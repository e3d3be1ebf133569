"""Globs over whole paths, and which domain a path belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import PurePosixPath


def matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Glob over whole paths: ``**`` stands for any number of folders, the rest is matched name by name."""
    if not pattern:
        return not parts
    if pattern in (("**",), ("**", "*")):
        return bool(parts)
    if pattern[0] == "**" and len(pattern) == 2 and pattern[1] != "**":
        return bool(parts) and fnmatchcase(parts[-1], pattern[1])
    if pattern[0] == "**":
        return any(matches(parts[index:], pattern[1:] or ("*",)) for index in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def domain_of(path: str, patterns: Sequence[tuple[str, str]]) -> str | None:
    """The domain of the first (glob, domain) whose glob matches `path`, None where none does."""
    parts = tuple(path.split("/"))
    return next((domain for glob, domain in patterns if matches(parts, _parts(glob))), None)


@cache
def _parts(glob: str) -> tuple[str, ...]:
    return PurePosixPath(glob).parts
