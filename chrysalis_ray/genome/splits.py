"""Which split a document belongs to: by hash of its source, kin together, no domain left without a split.

Training must not have read what judges it. So the split is drawn for *sources*, not documents, and sources that share text
(a licence header's worth does not count, half a document does) are drawn as one.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.documents import SPLITS, Document
from chrysalis_ray.genome.similarity import (
    FEWEST_SHINGLES,
    HASH_BITS,
    NEAR_DUPLICATE,
    SAMPLED_ONE_IN,
    SPLIT_APART_BELOW,
    Groups,
    Hashes,
    Sketches,
    WholeTexts,
    similar_pairs,
    sketch,
)

VERSION = 2  # of who is kin: by version 1 the kept shingles alone said who are near-duplicates
COMMONPLACE = 24  # a shingle that more documents than this hold says nothing about kinship
CONTAINED_AT_LEAST = 0.5
AT_ONCE, DOCUMENTS_AT_ONCE = 100_000, 256  # shingles; so many fit into a cache
MEETINGS_AT_ONCE = 1_000_000  # shingles, of those that are compared
MOST_HASHES = 8_000_000  # of all documents together; a larger genome is looked at through a coarser sample

# kinship ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kinship:
    """Who belongs together. `groups` maps every source_key to the name of its group, its smallest source_key;
    `near_duplicates` lists clusters of documents, by ordinal, each at least `NEAR_DUPLICATE` like another of its cluster."""

    groups: Mapping[str, str]
    near_duplicates: Sequence[Sequence[int]]


def kin_groups(documents: Sequence[Document]) -> dict[str, str]:
    """source_key -> name of its group, whatever the order of `documents`."""
    ordered = sorted(documents, key=lambda document: (document.doc_id, document.source_key, document.path))
    return dict(kinship(ordered, sketch([document.text for document in ordered])).groups)


def kinship(documents: Sequence[Document], sketches: Sketches) -> Kinship:
    """Kin of `documents`, which stand in an order of their own, with their sketches.

    Two sources are kin when at least half of the kept shingles of a document of one stand in a document of the other
    (containment, Broder 1997), which finds what was quoted or cut, or when two of their documents have Jaccard similarity of
    at least `SPLIT_APART_BELOW` (MinHash), which finds what exists in dozens of copies; and so on transitively.
    """
    keys = sorted({document.source_key for document in documents})
    ordinal = {key: index for index, key in enumerate(keys)}
    sources = np.array([ordinal[document.source_key] for document in documents], dtype=np.int64)
    groups, clusters = Groups(len(keys)), Groups(len(documents))
    for left, right in _containing(sources, sketches):
        groups.join(int(sources[left]), int(sources[right]))
    whole = WholeTexts(lambda index: documents[index].text)
    for left, right, similarity in similar_pairs(sketches, SPLIT_APART_BELOW, clusters.together, whole):
        groups.join(int(sources[left]), int(sources[right]))
        if similarity >= NEAR_DUPLICATE:
            clusters.join(left, right)
    members: dict[int, list[int]] = defaultdict(list)
    for index in range(len(documents)):
        members[clusters.name(index)].append(index)
    near = [cluster for cluster in members.values() if len(cluster) > 1]
    return Kinship({key: keys[groups.name(index)] for index, key in enumerate(keys)}, near)


def _containing(sources: NDArray[np.int64], sketches: Sketches) -> Iterator[tuple[int, int]]:
    """Pairs of documents of different sources, of which one holds enough shingles of the other. A shingle and its document are
    packed into one number: sorted, equal shingles stand together."""
    count, sizes = int(sketches.offsets[-1]), sketches.sizes
    spare = None
    if count < MOST_HASHES:
        hashes = sketches.stretch(0, count)
    else:
        coarse = np.uint64(SAMPLED_ONE_IN * 2 ** (count // MOST_HASHES).bit_length() - 1)
        hashes, sizes = _coarser(sketches.stretch, sketches.offsets, coarse)
        spare = hashes  # of a sample the memory is used again
    owner_bits = np.uint64(max(16, len(sketches).bit_length()))
    packed = np.right_shift(hashes, owner_bits - np.uint64(64 - HASH_BITS), out=spare)
    packed <<= owner_bits
    ends = np.cumsum(sizes)
    for begin in range(0, len(sizes), DOCUMENTS_AT_ONCE):
        some = np.arange(begin, min(begin + DOCUMENTS_AT_ONCE, len(sizes)))
        packed[ends[some[0]] - sizes[some[0]] : ends[some[-1]]] |= np.repeat(some.astype(np.uint64), sizes[some])
    packed.sort()
    pairs, shared = _shared(packed, owner_bits, sources)
    left, right = pairs // max(1, len(sketches)), pairs % max(1, len(sketches))
    kin = (shared >= FEWEST_SHINGLES) & (shared >= CONTAINED_AT_LEAST * np.minimum(sizes[left], sizes[right]))
    yield from zip(left[kin].tolist(), right[kin].tolist(), strict=True)


def _coarser(
    stretch: Callable[[int, int], Hashes], offsets: NDArray[np.int64], coarse: np.uint64
) -> tuple[Hashes, NDArray[np.int64]]:
    """Of all hashes, which `stretch` gives, those that have no bit of `coarse`, and how many every document keeps; in pieces
    that fit a cache."""
    sample, filled = [np.empty(0, np.uint64)], 0
    before = np.zeros(len(offsets), np.int64)  # how many are kept before each document
    for begin in range(0, int(offsets[-1]), AT_ONCE):
        piece = stretch(begin, min(begin + AT_ONCE, int(offsets[-1])))
        where = np.flatnonzero(piece & coarse == 0)
        first, last = np.searchsorted(offsets, (begin, begin + len(piece)), side="right")
        before[first:last] = filled + np.searchsorted(where, offsets[first:last] - begin)
        sample.append(piece[where])
        filled += len(where)
    return np.concatenate(sample), np.diff(before)


def _shared(packed: Hashes, owner_bits: np.uint64, sources: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of documents of different `sources`, as left x documents + right, ascending, and how many shingles both hold. Where
    many documents are alike, their meetings are many more than their pairs: they are counted a piece at a time."""
    found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    begin = 0
    while begin < len(packed):
        last = packed[min(begin + MEETINGS_AT_ONCE, len(packed)) - 1]
        end = int(np.searchsorted(packed, last | ((np.uint64(1) << owner_bits) - np.uint64(1)), side="right"))
        left, right = _meetings(packed[begin:end], owner_bits)
        apart = sources[left] != sources[right]
        found.append(np.unique(left[apart] * len(sources) + right[apart], return_counts=True))
        if sum(len(pairs) for pairs, _ in found[1:]) > max(MEETINGS_AT_ONCE, len(found[0][0])):
            found = [_added(found)]
        begin = end
    return _added(found)


def _added(
    found: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every pair of all of `found` once, with its counts added up."""
    if len(found) == 2 and not len(found[0][0]):
        return found[1]
    pairs, numbers = np.unique(np.concatenate([pairs for pairs, _ in found]), return_inverse=True)
    counts = np.zeros(len(pairs), np.int64)
    np.add.at(counts, numbers, np.concatenate([counts for _, counts in found]))
    return pairs, counts


def _meetings(packed: Hashes, owner_bits: np.uint64) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents (left, right), left < right, once for every shingle that both hold and at most `COMMONPLACE` do."""
    met = np.zeros(len(packed), np.bool_)
    for begin in range(0, len(packed) - 1, AT_ONCE):
        shingles = packed[begin : begin + AT_ONCE + 1] >> owner_bits
        same = shingles[1:] == shingles[:-1]
        met[begin + 1 : begin + 1 + len(same)] |= same
        met[begin : begin + len(same)] |= same
    packed = packed[met]  # most shingles are in one document only
    shingles = packed >> owner_bits
    begins = np.flatnonzero(np.r_[True, shingles[1:] != shingles[:-1]])[: len(packed)]
    crowd = np.diff(np.r_[begins, len(packed)])
    telling = np.repeat(crowd <= COMMONPLACE, crowd)
    shingles = shingles[telling]
    owners = (packed[telling] & ((np.uint64(1) << owner_bits) - np.uint64(1))).astype(np.int64)
    lefts, rights = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for distance in range(1, min(COMMONPLACE, len(shingles))):
        same = np.flatnonzero(shingles[distance:] == shingles[:-distance])
        lefts.append(owners[same])
        rights.append(owners[same + distance])
    return np.concatenate(lefts), np.concatenate(rights)


def near_duplicate_marks(
    documents: Sequence[Document], near: Sequence[Sequence[int]], exclude: Collection[str]
) -> dict[int, str]:
    """ordinal -> doc_id of the document it is a near-duplicate of. Of each cluster one stays unmarked: the first that no other
    mark of `exclude` keeps away."""
    marked = {}
    for cluster in near:
        kept = min(cluster, key=lambda index: (bool(set(documents[index].marks) & set(exclude)), index))
        marked.update({index: documents[kept].doc_id for index in cluster if index != kept})
    return marked


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
