"""Which licence a text is under, as an SPDX expression, and why that is thought.

A tag in the file decides (`SPDX-License-Identifier`, SPDX 2.3 annex E), then the licence file of the nearest folder above it,
known by phrases that no other licence has, then what the source declares. No guess beyond that: ``NOASSERTION``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UNKNOWN = "NOASSERTION"
TAG_CHARACTERS = 4096
TAG_BEGINS = "SPDX-License-Identifier:"
TAG = re.compile(rf"{TAG_BEGINS}[ \t]*([A-Za-z0-9.+() -]+)")
LICENCE_FILE = re.compile(r"(un)?licen[cs]es?([-_.][\w.-]+)?|copying([-_.][\w.-]+)?", re.IGNORECASE)
LICENCE_BYTES = 200_000

# The first entry whose phrases all stand in the text (lower case, runs of white space as one space) names it.
PHRASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Apache-2.0", ("apache license", "version 2.0, january 2004")),
    ("AGPL-3.0-only", ("gnu affero general public license", "version 3, 19 november 2007")),
    ("LGPL-3.0-only", ("gnu lesser general public license", "version 3, 29 june 2007")),
    ("GPL-3.0-only", ("gnu general public license", "version 3, 29 june 2007")),
    ("LGPL-2.1-only", ("gnu lesser general public license", "version 2.1, february 1999")),
    ("GPL-2.0-only", ("gnu general public license", "version 2, june 1991")),
    ("MPL-2.0", ("mozilla public license version 2.0",)),
    ("EPL-2.0", ("eclipse public license - v 2.0",)),
    ("CC0-1.0", ("cc0 1.0 universal",)),
    ("CC-BY-SA-4.0", ("attribution-sharealike 4.0 international",)),
    ("CC-BY-4.0", ("attribution 4.0 international",)),
    ("BSL-1.0", ("boost software license - version 1.0",)),
    ("PSF-2.0", ("python software foundation license version 2",)),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",)),
    ("BSD-3-Clause", ("redistribution and use in source and binary forms", "endorse or promote products derived")),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms",
                      "this list of conditions and the following disclaimer")),
    ("ISC", ("permission to use, copy, modify, and/or distribute this software for any purpose with or without fee",
             "copyright notice and this permission notice appear in all copies")),
    ("0BSD", ("permission to use, copy, modify, and/or distribute this software for any purpose with or without fee",)),
    ("Zlib", ("the origin of this software must not be misrepresented", "altered source versions must be plainly marked")),
    ("MIT", ("permission is hereby granted, free of charge, to any person obtaining a copy",
             "the above copyright notice and this permission notice shall be included")),
    ("MIT-0", ("permission is hereby granted, free of charge, to any person obtaining a copy",)),
)  # fmt: skip


def tagged(text: str) -> str | None:
    """The SPDX expression that stands in the first characters of `text`, None where there is none that reads as one."""
    begin = text.find(TAG_BEGINS, 0, TAG_CHARACTERS)  # ten times as fast as the pattern
    found = None if begin < 0 else TAG.search(text, begin, TAG_CHARACTERS)
    if found is None:
        return None
    words = [re.sub(r"^[.-]+|[.-]+$", "", word) for word in found[1].strip().split()]
    for end in range(1, len(words)):  # "MIT -->", "Apache-2.0 and more prose": the expression ends where no operator joins
        if words[end - 1] not in ("AND", "OR", "WITH") and words[end] not in ("AND", "OR", "WITH"):
            words = words[:end]
            break
    expression = " ".join(words)
    balanced = expression.count("(") == expression.count(")")
    return expression if expression and balanced and words[-1] not in ("AND", "OR", "WITH") else None


def identified(text: str) -> str | None:
    """The SPDX identifier of a licence text, None for one that is not known here."""
    plain = " ".join(text.lower().split())
    return next((name for name, phrases in PHRASES if all(phrase in plain for phrase in phrases)), None)


def is_licence_file(name: str) -> bool:
    """Whether the last part of a path is one under which licences are kept (``LICENSE``, ``COPYING.txt``, ``UNLICENSE``)."""
    return bool(LICENCE_FILE.fullmatch(name.rpartition("/")[2]))


@dataclass(frozen=True)
class Licensing:
    """The licence files of one source: folder -> (SPDX identifier, path of the file), and what the source declares."""

    by_folder: Mapping[str, tuple[str, str]]
    declared: str
    why_declared: str = "declared"

    def of(self, path: str, text: str) -> tuple[str, str]:
        """(licence, evidence) of the text at `path`."""
        if tag := tagged(text):
            return tag, "tag"
        folder = path
        while folder:
            folder = folder.rpartition("/")[0]
            if folder in self.by_folder:
                licence, file = self.by_folder[folder]
                return licence, f"file {file}"
        return self.declared, self.why_declared


def licensing(files: Iterable[tuple[str, str]], declared: str) -> Licensing:
    """Licensing from the (path, text) of a source's licence files; of several known ones in a folder the first by name."""
    by_folder: dict[str, tuple[str, str]] = {}
    for path, text in sorted(files):
        if name := identified(text):
            by_folder.setdefault(path.rpartition("/")[0], (name, path))
    return Licensing(by_folder, declared)


def joined(names: Iterable[str]) -> str:
    """One expression that says all of `names` apply, each to its part."""
    return " AND ".join(f"({name})" if re.search(r" OR | AND | WITH ", name) else name for name in sorted(set(names)))
