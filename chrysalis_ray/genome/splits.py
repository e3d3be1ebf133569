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
from chrysalis_ray.genome import native
from chrysalis_ray.genome.documents import SPLITS, Document
from chrysalis_ray.genome.shingles import HASH_BITS, SAMPLED_ONE_IN, Hashes
from chrysalis_ray.genome.similarity import (
    FEWEST_SHINGLES,
    NEAR_DUPLICATE,
    SPLIT_APART_BELOW,
    Groups,
    Sketches,
    WholeTexts,
    similar_pairs,
    sketch,
)

VERSION = 2  # of who is kin: by version 1 the kept shingles alone said who are near-duplicates
COMMONPLACE = 24  # a shingle that more documents than this hold says nothing about kinship
CONTAINED_AT_LEAST = 0.5
AT_ONCE = 100_000  # shingles; so many fit into a cache
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
    count = int(sketches.offsets[-1])
    coarse = 0 if count < MOST_HASHES else SAMPLED_ONE_IN * 2 ** (count // MOST_HASHES).bit_length() - 1
    owner_bits = max(16, len(sketches).bit_length())
    packed, sizes = _packed(sketches.stretch, sketches.offsets, coarse, owner_bits)
    packed.sort()
    pairs, shared = _shared(packed, owner_bits, sources)
    pairs, shared = pairs[shared >= FEWEST_SHINGLES], shared[shared >= FEWEST_SHINGLES]
    left, right = pairs // max(1, len(sketches)), pairs % max(1, len(sketches))
    kin = shared >= CONTAINED_AT_LEAST * np.minimum(sizes[left], sizes[right])
    yield from zip(left[kin].tolist(), right[kin].tolist(), strict=True)


def _packed(
    stretch: Callable[[int, int], Hashes], offsets: NDArray[np.int64], coarse: int, owner_bits: int
) -> tuple[Hashes, NDArray[np.int64]]:
    """Of all shingles, which `stretch` gives, those that have no bit of `coarse`, each with its document's number in its place
    of the lowest `owner_bits`; how many every document keeps. In pieces that fit a cache."""
    found, sizes = [np.empty(0, np.uint64)], np.zeros(len(offsets) - 1, np.int64)
    room = np.empty(AT_ONCE + 1, np.uint64)
    for begin in range(0, int(offsets[-1]), AT_ONCE):
        piece = stretch(begin, min(begin + AT_ONCE, int(offsets[-1])))
        first = int(np.searchsorted(offsets, begin, side="right")) - 1
        last = int(np.searchsorted(offsets, begin + len(piece)))
        cuts = np.clip(offsets[first : last + 1] - begin, 0, len(piece))
        if native.kernel is not None:
            filled = native.kernel.own(piece, cuts, first, coarse, owner_bits, room, sizes[first:last])
            found.append(room[:filled].copy())
            continue
        where = np.flatnonzero(piece & np.uint64(coarse) == 0)
        kept = np.diff(np.searchsorted(where, cuts))
        packed = (piece[where] >> np.uint64(owner_bits - 64 + HASH_BITS)) << np.uint64(owner_bits)
        packed |= np.repeat(np.arange(first, last, dtype=np.uint64), kept)
        found.append(packed)
        sizes[first:last] += kept
    return np.concatenate(found), sizes


def _shared(packed: Hashes, owner_bits: int, sources: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of documents of different `sources`, as left x documents + right, ascending, and how many shingles both hold. Where
    many documents are alike, their meetings are many more than their pairs: they are counted a piece at a time."""
    found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    begin = 0
    while begin < len(packed):
        last = packed[min(begin + MEETINGS_AT_ONCE, len(packed)) - 1]
        end = int(np.searchsorted(packed, last | np.uint64(2**owner_bits - 1), side="right"))
        found.append(np.unique(_meetings(packed[begin:end], owner_bits, sources), return_counts=True))
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
    pairs, counts = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(pairs)
    pairs = pairs[order]
    begins = np.flatnonzero(np.r_[True, pairs[1:] != pairs[:-1]])[: len(pairs)]
    return pairs[begins], np.add.reduceat(counts[order], begins)


def _meetings(packed: Hashes, owner_bits: int, sources: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs of documents of different `sources`, as left x documents + right, left < right, once for every shingle that both
    hold and at most `COMMONPLACE` do."""
    if native.kernel is not None:
        room = np.empty(COMMONPLACE * (len(packed) // 2 + 2), np.int64)
        return room[: native.kernel.meetings(packed, owner_bits, COMMONPLACE, sources, room)]
    packed = _met(packed, owner_bits)
    shingles = packed >> np.uint64(owner_bits)
    owners = (packed & np.uint64(2**owner_bits - 1)).astype(np.int64)
    found = [np.empty(0, np.int64)]
    for distance in range(1, min(COMMONPLACE, len(shingles))):
        same = np.flatnonzero(shingles[distance:] == shingles[:-distance])
        left, right = owners[same], owners[same + distance]
        apart = sources[left] != sources[right]
        found.append(left[apart] * len(sources) + right[apart])
    return np.concatenate(found)


def _met(packed: Hashes, owner_bits: int) -> Hashes:
    """Of `packed`, which ascends, the shingles that more than one document and at most `COMMONPLACE` hold."""
    met = np.zeros(len(packed), np.bool_)
    for begin in range(0, len(packed) - 1, AT_ONCE):
        shingles = packed[begin : begin + AT_ONCE + 1] >> np.uint64(owner_bits)
        same = shingles[1:] == shingles[:-1]
        met[begin + 1 : begin + 1 + len(same)] |= same
        met[begin : begin + len(same)] |= same
    packed = packed[met]  # most shingles are in one document only
    shingles = packed >> np.uint64(owner_bits)
    begins = np.flatnonzero(np.r_[True, shingles[1:] != shingles[:-1]])[: len(packed)]
    crowd = np.diff(np.r_[begins, len(packed)])
    return packed[np.repeat(crowd <= COMMONPLACE, crowd)]


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
