"""Denials: text that somebody does not want trained on, told by path, by licence, or by a file in the manner of robots.txt.

A denial is the mark ``use_denied``. No split holds a document that bears it, whatever `genome.exclude` says; and where the same
text was found in two places, one denial is enough.

A robots-like file is read as RFC 9309 says: groups of user agents, the longest rule that matches a path decides, ``*`` and
``$`` in it. A no to everybody, to this program or to a crawler that gathers text to train on is a no. So is ``train-ai=n`` in a
line ``Content-Usage: [PATH] ...`` (IETF aipref). Absence of a no is no consent: it marks nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from chrysalis_ray.config.genome import Denial
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.written_paths import written_path
from chrysalis_ray.genome.documents import Document
from chrysalis_ray.genome.globs import matches

MARK = "use_denied"
LARGEST = 4 * 2**20
AGENTS = frozenset(
    {"*", "chrysalis", "chrysalis_ray", "gptbot", "ccbot", "claudebot", "anthropic-ai", "google-extended", "applebot-extended",
     "bytespider", "meta-externalagent", "cohere-training-data-crawler", "ai2bot", "amazonbot", "diffbot"}
)  # fmt: skip

Why = Callable[[Document], str | None]


def denier(denials: Sequence[Denial], relative_to: Path) -> Callable[[Iterable[Document]], Iterable[Document]]:
    """What marks those of some documents that a denial speaks of. Raises GenomeError for a robots file that cannot be read."""
    rules = [_rule(denial, relative_to) for denial in denials]
    if not rules:
        return iter

    def marked(documents: Iterable[Document]) -> Iterable[Document]:
        for document in documents:
            reasons = sorted({why for rule in rules if (why := rule(document)) is not None})
            yield document.changed(marks={MARK: "; ".join(reasons), **document.marks}) if reasons else document

    return marked


def kept_denials(first: Document, other: Document) -> Document:
    """`first`, denied if `other`, the same text from another place, is; and told from the records of both."""
    if other.record and other.record != first.record:
        lines = {*first.record.split("\n"), *other.record.split("\n")} - {""}
        first = first.changed(record="\n".join(sorted(lines)))
    if MARK in first.marks or MARK not in other.marks:
        return first
    return first.changed(marks={**first.marks, MARK: other.marks[MARK]})


def joined_marks(documents: Sequence[Document], marked: Sequence[Document]) -> list[Document]:
    """`marked` with the marks that `documents`, the same ones, had before."""
    return [
        after.changed(marks={**after.marks, **before.marks}) if before.marks else after
        for before, after in zip(documents, marked, strict=True)
    ]


def _rule(denial: Denial, relative_to: Path) -> Why:
    """document -> why it is denied, None where it is not."""
    if denial.licence is not None:
        pattern = denial.licence
        why = denial.reason or f"licence {pattern}"
        return lambda document: why if fnmatchcase(document.licence, pattern) else None
    if denial.paths is not None:
        parts = PurePosixPath(denial.paths).parts
        reason = denial.reason or f"path {denial.paths}"
        return lambda document: reason if matches(tuple(document.path.split("/")), parts) else None
    assert denial.robots is not None
    robots, below = read_robots(relative_to / written_path(denial.robots)), denial.below.strip("/")

    def asked(document: Document) -> str | None:
        if below and not document.path.startswith(f"{below}/"):
            return None
        said = robots(document.path[len(below) :] if below else f"/{document.path}")
        return None if said is None else denial.reason or f"{denial.robots}: {said}"

    return asked


# robots -------------------------------------------------------------------------------------------------------------


def read_robots(path: Path) -> Callable[[str], str | None]:
    """A function from a path (which begins with a slash) to the line that denies it, None where none does."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise GenomeError(f"{path} cannot be read: {error.strerror}", "paths are relative to the experiment file") from error
    if len(content) > LARGEST:
        raise GenomeError(f"{path} has {len(content):,} bytes: no file of rules is so long", "name the right file")
    return rules_of(content.decode("utf-8-sig", "replace"))


def rules_of(text: str) -> Callable[[str], str | None]:
    """`read_robots` of the file's text."""
    groups: list[list[tuple[str, bool, str]]] = []  # per group that concerns us: (pattern, may, line)
    rules: list[tuple[str, bool, str]] = []
    usage: list[tuple[str, bool, str]] = []  # Content-Usage, of our groups and of none
    ours, naming, in_group = False, False, False
    for line in text.splitlines():
        field, _, value = line.partition("#")[0].partition(":")
        name, value = field.strip().lower(), value.strip()
        if name == "user-agent":
            if not naming:
                ours, rules = False, []
            if value.lower() in AGENTS and not ours:
                ours = True
                groups.append(rules)
            naming, in_group = True, True
        elif name in ("allow", "disallow"):
            naming = False
            if value and in_group:
                rules.append((value, name == "allow", f"{field.strip()}: {value}"))
        elif name == "content-usage":
            naming = False
            if (said := _usage(value)) and (ours or not in_group):
                usage.append((*said, f"{field.strip()}: {value}"))

    def denied(path: str) -> str | None:
        for group in [*groups, usage]:
            found = [(len(pattern), may, line) for pattern, may, line in group if _fits(pattern, path)]
            if found:
                _, may, line = max(found)  # the longest; of two as long the one that allows
                if not may:
                    return line
        return None

    return denied


def _usage(value: str) -> tuple[str, bool] | None:
    """(path, may train) of ``[PATH] train-ai=n, ...``; None where it says nothing of training."""
    path, space, rest = value.partition(" ")
    if not path.startswith("/"):
        path, rest = "/", value
    said = re.search(r"(?:^|[,\s])train-ai\s*=\s*([yn])\b", rest if space or path == "/" else "")
    return None if said is None else (path, said[1] == "y")


def _fits(pattern: str, path: str) -> bool:
    """Whether a rule's pattern matches a path from its beginning; ``*`` is anything, a ``$`` at the end the end."""
    end = "$" if pattern.endswith("$") else ""
    body = ".*".join(re.escape(part) for part in re.sub(r"\*+", "*", pattern.removesuffix("$")).split("*"))
    return re.match(body + end, path, re.DOTALL) is not None
