"""Finding near-duplicates: ours against rensa (Rust) and datasketch (numpy), judged by exact Jaccard similarity.

    python -m pip install --target /tmp/dedup --no-deps rensa datasketch     # beside, not into, the environment
    PYTHONPATH=/tmp/dedup python benchmarks/dedup.py
    PYTHONPATH=/tmp/dedup python benchmarks/dedup.py --megabytes 20 --json

The text is Python files of this machine in hash order, every tenth of them once more with a sixteenth of its lines changed. All
sides look for texts whose sets of five-word shingles have a Jaccard similarity of at least 0.8, with 112 hashes in 14 bands.
Ours is `sketch` and `similar_pairs` with the whole texts, from texts to verified pairs. The others are given the shingles,
which they do not make; making them in Python, for both alike, is told apart. Their candidates count when their own estimate is
at least 0.8. A pair is found when its texts end in one cluster. What is not installed is skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
from genome import python_texts

from chrysalis_ray.core.records import write_json
from chrysalis_ray.genome.batch import BATCH_CHARACTERS
from chrysalis_ray.genome.shingles import SHINGLE_WORDS
from chrysalis_ray.genome.similarity import (
    BANDS,
    BINS,
    NEAR_DUPLICATE,
    ROWS_PER_BAND,
    Groups,
    WholeTexts,
    joined,
    similar_pairs,
    sketch,
)

RESULTS = Path(__file__).resolve().parent / "results"
WORD = re.compile(r"[0-9a-z_]+")
EXACT_ABOVE, FAR_BELOW = 0.5, 0.7
Pairs = Iterator[tuple[int, int]]


def texts_of(megabytes: float) -> list[str]:
    """Files of this machine, and near-copies of every tenth."""
    texts = [text for text in python_texts(megabytes) if len(text) >= 400]
    return texts + [changed(text) for text in texts[::10]]


def changed(text: str) -> str:
    """`text` with every sixteenth line replaced."""
    lines = text.splitlines(keepends=True)
    return "".join(f"line {number} was another one\n" if number % 16 == 5 else line for number, line in enumerate(lines))


def shingles(text: str) -> list[bytes]:
    """What a user of the other libraries writes."""
    words = WORD.findall(text.lower())
    return [" ".join(words[at : at + SHINGLE_WORDS]).encode() for at in range(len(words) - SHINGLE_WORDS + 1)]


def exact(sets: Sequence[Sequence[bytes]]) -> dict[tuple[int, int], float]:
    """Jaccard similarity of every pair that has at least `EXACT_ABOVE`, from the whole sets."""
    hashed = [np.unique(np.fromiter(map(hash, of), np.int64, len(of))) for of in sets]
    order = sorted(range(len(hashed)), key=lambda number: len(hashed[number]))
    found = {}
    for place, one in enumerate(order):
        for other in order[place + 1 :]:
            small, large = len(hashed[one]), len(hashed[other])
            if not small or small < EXACT_ABOVE * large:
                break
            places = np.minimum(np.searchsorted(hashed[other], hashed[one]), large - 1)
            both = int(np.count_nonzero(hashed[other][places] == hashed[one]))
            if both >= EXACT_ABOVE * (small + large - both):
                found[min(one, other), max(one, other)] = both / (small + large - both)
    return found


# the three sides ----------------------------------------------------------------------------------------------------


def ours(texts: Sequence[str]) -> Pairs:
    parts, batch, size = [], [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            parts.append(sketch(batch))
            batch, size = [], 0
    parts.append(sketch(batch))
    groups = Groups(len(texts))
    for left, right, _ in similar_pairs(joined(parts), NEAR_DUPLICATE, groups.together, WholeTexts(texts.__getitem__)):
        groups.join(left, right)
        yield left, right


def by_rensa(sets: Sequence[list[bytes]]) -> Pairs:
    from rensa import RMinHash, RMinHashLSH

    hashes = RMinHash.from_token_sets(sets, num_perm=BINS, seed=42)
    index = RMinHashLSH(threshold=NEAR_DUPLICATE, num_perm=BINS, num_bands=BANDS)
    index.insert_many(hashes)
    for one, candidates in enumerate(index.query_all(hashes)):
        yield from (
            (one, other) for other in candidates if one < other and hashes[one].jaccard(hashes[other]) >= NEAR_DUPLICATE
        )


def by_datasketch(sets: Sequence[list[bytes]]) -> Pairs:
    from datasketch import MinHash, MinHashLSH

    hashes = MinHash.bulk(sets, num_perm=BINS, seed=42)
    index = MinHashLSH(num_perm=BINS, params=(BANDS, ROWS_PER_BAND))
    for number, signature in enumerate(hashes):
        index.insert(number, signature, check_duplication=False)
    for one, signature in enumerate(hashes):
        yield from (
            (one, other)
            for other in index.query(signature)
            if one < other and signature.jaccard(hashes[other]) >= NEAR_DUPLICATE
        )


# judging ------------------------------------------------------------------------------------------------------------


def judged(pairs: Sequence[tuple[int, int]], truth: dict[tuple[int, int], float], count: int) -> dict[str, Any]:
    """Of the pairs that are near-duplicates, how many ended in one cluster; of the pairs that a side named, how many are far
    from it."""
    groups = Groups(count)
    for left, right in pairs:
        groups.join(left, right)
    meant = [pair for pair, similarity in truth.items() if similarity >= NEAR_DUPLICATE]
    found = sum(groups.name(left) == groups.name(right) for left, right in meant)
    wrong = sum(truth.get(pair, 0.0) < FAR_BELOW for pair in pairs)
    return {"found": round(found / max(1, len(meant)), 4), "pairs": len(pairs), "far_below": wrong}


def measured(work: Callable[[], Any], megabytes: float) -> tuple[Any, dict[str, Any]]:
    before, began = time.process_time(), time.perf_counter()
    result = work()
    wall, cpu = time.perf_counter() - began, time.process_time() - before
    return result, {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3), "mb_per_cpu_s": round(megabytes / cpu, 1)}


def compare(megabytes: float) -> dict[str, Any]:
    texts = texts_of(megabytes)
    mb = sum(len(text.encode()) for text in texts) / 1e6
    sets, made = measured(lambda: [shingles(text) for text in texts], mb)
    truth = exact(sets)
    sides: dict[str, dict[str, Any]] = {}
    pairs, sides["ours, from the text"] = measured(lambda: list(ours(texts)), mb)
    sides["ours, from the text"] |= judged(pairs, truth, len(texts))
    for name, side in (("rensa", by_rensa), ("datasketch", by_datasketch)):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not there (see the head of this file) and is skipped")
            continue
        pairs, row = measured(lambda side=side: list(side(sets)), mb)
        sides[f"{name}, from shingles"] = row | judged(pairs, truth, len(texts))
    near = sum(similarity >= NEAR_DUPLICATE for similarity in truth.values())
    return {"texts": len(texts), "megabytes": round(mb, 1), "near_duplicates": near, "shingles in Python": made, "sides": sides}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--json", action="store_true", help="keep the result in results/dedup.json")
    options = parser.parse_args(arguments)
    found = compare(options.megabytes)
    print(f"{found['texts']} texts, {found['megabytes']} MB, {found['near_duplicates']} pairs of Jaccard >= {NEAR_DUPLICATE}")
    print(f"{'':28} {'CPU s':>8} {'MB/CPU s':>9} {'found':>7} {'pairs':>7} {'below 0.7':>10}")
    made = found["shingles in Python"]
    print(f"{'shingles, in Python':28} {made['cpu_s']:8.2f} {made['mb_per_cpu_s']:9.1f}")
    for name, row in found["sides"].items():
        judgement = f"{row['found']:7.1%} {row['pairs']:7} {row['far_below']:10}"
        print(f"{name:28} {row['cpu_s']:8.2f} {row['mb_per_cpu_s']:9.1f} {judgement}")
    if options.json:
        write_json(RESULTS / "dedup.json", {"machine": machine.describe(), "load": machine.load_now(), **found})


if __name__ == "__main__":
    main()
