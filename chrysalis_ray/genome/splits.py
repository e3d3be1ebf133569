"""Which split a document belongs to: by hash of its source, kin together, no domain left without a split.

Training must not have read what judges it. So the split is drawn for *sources*, not documents, and sources that share text
(a licence header's worth does not count, half a document does) are drawn as one.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.documents import SPLITS, Document

SHINGLE_WORDS = 5
SAMPLED_ONE_IN = 2
COMMONPLACE = 24  # a shingle that more documents than this hold says nothing about kinship
SHARED_AT_LEAST = 5
CONTAINED_AT_LEAST = 0.5
WORD = re.compile(r"\w+")

# kinship ------------------------------------------------------------------------------------------------------------


def kin_groups(documents: Sequence[Document]) -> dict[str, str]:
    """source_key -> name of its group. Two sources are kin when at least half of the sampled five-word shingles of a document
    of one stand in a document of the other (containment, Broder 1997, over a hash sample of the shingles), and so on
    transitively. A group is named by its smallest source_key; the order of `documents` does not matter.
    """
    keys = sorted({document.source_key for document in documents})
    ordinal = {key: index for index, key in enumerate(keys)}
    sources = np.array([ordinal[document.source_key] for document in documents], dtype=np.int64)
    parent = list(range(len(keys)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for left, right in _kin_documents(documents, sources):
        a, b = root(int(sources[left])), root(int(sources[right]))
        parent[max(a, b)] = min(a, b)
    return {key: keys[root(index)] for index, key in enumerate(keys)}


def _kin_documents(documents: Sequence[Document], sources: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Pairs of documents of different sources that share enough sampled shingles."""
    samples = [_sampled_shingles(document.text) for document in documents]
    sizes = np.array([len(sample) for sample in samples], dtype=np.int64)
    hashes = np.concatenate([*samples, np.empty(0, np.uint64)])
    owners = np.repeat(np.arange(len(documents)), sizes)
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    first = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]])[: len(hashes)]
    crowd = np.repeat(np.diff(np.r_[first, len(hashes)]), np.diff(np.r_[first, len(hashes)]))
    hashes, owners = hashes[crowd <= COMMONPLACE], owners[crowd <= COMMONPLACE]
    found = []
    for distance in range(1, min(COMMONPLACE, len(hashes))):
        same = hashes[distance:] == hashes[:-distance]
        left, right = owners[:-distance][same], owners[distance:][same]
        apart = sources[left] != sources[right]
        found.append(left[apart] * len(documents) + right[apart])
    pairs, shared = np.unique(np.concatenate([*found, np.empty(0, np.int64)]), return_counts=True)
    left, right = pairs // max(1, len(documents)), pairs % max(1, len(documents))
    kin = (shared >= SHARED_AT_LEAST) & (shared >= CONTAINED_AT_LEAST * np.minimum(sizes[left], sizes[right]))
    yield from zip(left[kin].tolist(), right[kin].tolist(), strict=True)


def _sampled_shingles(text: str) -> NDArray[np.uint64]:
    """Sorted distinct hashes of the shingles of `text` that fall into the sample: the same shingle is sampled everywhere."""
    words = np.array([zlib.crc32(word.encode()) for word in WORD.findall(text.lower())], dtype=np.uint64)
    if len(words) < SHINGLE_WORDS:
        return np.empty(0, np.uint64)
    mixed = np.zeros(len(words) - SHINGLE_WORDS + 1, np.uint64)
    for offset in range(SHINGLE_WORDS):
        mixed = (mixed ^ words[offset : len(words) - SHINGLE_WORDS + 1 + offset]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed[mixed % np.uint64(SAMPLED_ONE_IN) == 0])


# drawing ------------------------------------------------------------------------------------------------------------


@dataclass
class _Draw:
    """The draw in progress: bytes of every group in every domain, and where each group stands."""

    sizes: dict[str, dict[str, int]]  # domain -> group -> bytes
    totals: dict[str, int]  # domain -> bytes
    shares: dict[str, float]  # split -> wanted share
    splits: dict[str, str]  # group -> split

    def held(self, domain: str, split: str) -> int:
        return sum(size for group, size in self.sizes[domain].items() if self.splits[group] == split)

    def wanted(self, domain: str, split: str) -> float:
        return self.shares[split] * self.totals[domain]

    def count(self, domain: str, split: str) -> int:
        return sum(self.splits[group] == split for group in self.sizes[domain])

    def movable(self, group: str) -> bool:
        """Whether no domain that holds `group` has it as its only group of its split."""
        return all(self.count(domain, self.splits[group]) > 1 for domain, members in self.sizes.items() if group in members)


def assign_splits(documents: Sequence[Document], groups: Mapping[str, str], select: float, report: float) -> dict[str, str]:
    """group -> split. A group's sha256, read as a fraction in [0, 1), decides: below `select`, below `select + report`, above.

    Groups are lumpy and domains may be small, so corrections follow, all deterministic. A group of more bytes than a held-out
    split should have in some domain stays in train. A domain whose held-out split has less than half the wanted bytes takes
    groups from train, in hash order, that fit. A domain that still has an empty split
    takes one group from its fullest split, so three groups suffice. Raises GenomeError for a domain where that is impossible.
    """
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for document in documents:
        sizes[document.domain][groups[document.source_key]] += document.size
    fractions = {group: _fraction(group) for group in groups.values()}
    first = {
        group: "select" if fraction < select else "report" if fraction < select + report else "train"
        for group, fraction in fractions.items()
    }
    totals = {domain: sum(members.values()) for domain, members in sizes.items()}
    draw = _Draw(sizes, totals, {"train": 1.0 - select - report, "select": select, "report": report}, first)
    for domain, members in sizes.items():
        for group, size in members.items():
            if draw.splits[group] != "train" and size > draw.wanted(domain, draw.splits[group]):
                draw.splits[group] = "train"
    for domain in sorted(sizes):
        order = sorted(sizes[domain], key=lambda group: (fractions[group], group))
        for split in ("select", "report"):
            _top_up(draw, domain, split, order)
        for split in SPLITS:
            if not draw.count(domain, split):
                draw.splits[_donor(draw, domain, order)] = split
    return draw.splits


def _top_up(draw: _Draw, domain: str, split: str, order: Sequence[str]) -> None:
    """Move groups of `domain` from train to `split` until it has half of what it should have; no domain is overfilled."""
    held = draw.held(domain, split)
    for group in order:
        if held >= draw.wanted(domain, split) / 2:
            return
        fits = all(members[group] <= draw.wanted(name, split) for name, members in draw.sizes.items() if group in members)
        if draw.splits[group] == "train" and fits and draw.movable(group):
            draw.splits[group] = split
            held += draw.sizes[domain][group]


def _donor(draw: _Draw, domain: str, order: Sequence[str]) -> str:
    """The first group, in hash order, that the fullest split of `domain` can give away."""
    movable = [group for group in order if draw.movable(group)]
    if not movable:
        raise GenomeError(
            f"domain {domain!r} has {len(order)} independent sources: too few for train, select and report",
            "give the domain at least three files (or rows) that do not repeat one another",
        )
    return max(movable, key=lambda group: draw.count(domain, draw.splits[group]))


def _fraction(group: str) -> float:
    digest = hashlib.sha256(b"split\0" + group.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
