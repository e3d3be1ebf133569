"""The compiled kernel does what arrays do, equal to the bit, whatever bytes it is given, and refuses what does not fit.

It is compiled here, from the source as it is; whether the installation has one says nothing about these tests."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_genome_large import alike

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.records import read_json
from chrysalis_ray.genome import native, splits
from chrysalis_ray.genome.build import build_genome
from chrysalis_ray.genome.shingles import HASH_BITS, MOST_AT_ONCE, kept_shingles, shingles_in_arrays
from chrysalis_ray.genome.similarity import BINS, jaccard_of, signatures_of, sketch

ROOT = Path(__file__).parents[2]
COMPILE = """
import sys, setuptools
sys.argv = ["setup.py", "-q", "build_ext", "--force", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1] + "/objects"]
setuptools.setup()
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The kernel of this source; no test without a compiler."""
    folder = tmp_path_factory.mktemp("kernel")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = [*folder.rglob("_sketching*.so"), *folder.rglob("_sketching*.pyd")]
    if not found:
        pytest.skip(f"nothing was compiled: {done.stderr[-300:]}")
    spec = importlib.util.spec_from_file_location("_sketching", found[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.VERSION == native.VERSION
    return module


@contextmanager
def using(kernel: ModuleType | None) -> Iterator[None]:
    """Inside this block sketches are made by `kernel`; by None in arrays."""
    before, native.kernel = native.kernel, kernel
    try:
        yield
    finally:
        native.kernel = before


# texts

# What words are made of, and what parts them, at and around every limit: 8, 16 and 24 bytes of a word, 64 and 1024 of a text.
BYTES = [b"a", b"Z", b"_", b"0", b" ", b"\n", b"\0", b"@", b"[", b"`", b"{", b"/", b":", b"\x7f", b"\x80", b"\xff", b"\xc3\x89"]
WORDS = [b"AbC dEf ", b"eightttt", b"nineninen", b"Q" * 16, b"R" * 17, b"S" * 24, b"T" * 25, b"u" * 64, b"v " * 32, b" " * 63]
PIECES = [*BYTES, *WORDS, b"w1 " * 341, b"same words stand here again and again. "]
hostile = st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join))


def equal(kernel: ModuleType, texts: list[bytes], one_in: int) -> bool:
    """Whether the kernel finds in `texts` what arrays do."""
    expected, sizes = shingles_in_arrays(texts, one_in)
    with using(kernel):
        found, found_sizes = kept_shingles(texts, one_in)
    assert found.dtype == expected.dtype
    assert found_sizes.dtype == sizes.dtype
    return np.array_equal(found, expected) and np.array_equal(found_sizes, sizes)


@settings(deadline=None, max_examples=300)
@given(st.lists(hostile, max_size=6), st.sampled_from([1, 2, 8]))
def test_of_any_bytes_the_same_shingles_are_kept(kernel, texts, one_in):
    assert equal(kernel, texts, one_in)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 17, 63, 64, 65, 1023, 1024, 1025, 2048, 5000])
@pytest.mark.parametrize("piece", [b"x", b" ", b"x ", b"xyz ", b"\xff", b"one two "])
def test_at_every_limit_of_a_text_the_same_shingles_are_kept(kernel, piece, size):
    text = (piece * size)[:size]
    assert equal(kernel, [text, b"", text + b" and then some words more", text], 1)


def test_every_byte_is_of_a_word_for_both_or_for_none(kernel):
    texts = [b"one two %c three four five" % byte for byte in range(256)] + [b"a%cb c d e f" % byte for byte in range(256)]
    assert equal(kernel, texts, 1)


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec=None), max_size=60), max_size=5))
def test_texts_and_their_bytes_are_alike(kernel, texts):
    with using(kernel):
        found = kept_shingles(texts, 1)
        assert all(map(np.array_equal, found, kept_shingles([text.encode("utf-8", "surrogatepass") for text in texts], 1)))
    with using(None):
        assert all(map(np.array_equal, found, kept_shingles(texts, 1)))


def test_texts_of_another_class_are_texts(kernel):
    class Text(str):
        pass

    class Content(bytes):
        pass

    words = "one two three four five six seven"
    with using(kernel):
        found = kept_shingles([Text(words), words, Content(words.encode()), Text("é " + words)], 1)
    assert np.array_equal(found[0], shingles_in_arrays([words.encode()] * 3 + [("é " + words).encode()], 1)[0])


def test_as_many_texts_as_there_may_be_at_once(kernel):
    texts = [b"a b c d %d" % (number % 100) for number in range(MOST_AT_ONCE)]
    assert equal(kernel, texts, 1)


def test_threads_do_not_meet(kernel):
    texts = [[b"%d words of %d's own, " % (word, number) for word in range(400)] for number in range(16)]
    with using(kernel), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(kept_shingles, texts))
    assert all(np.array_equal(each[0], shingles_in_arrays(text)[0]) for each, text in zip(found, texts, strict=True))


# sketches

ascending = st.lists(
    st.one_of(st.integers(0, 2**HASH_BITS - 1), st.integers(0, 2**16 - 1).map(lambda high: high << 32 | 0xFFFFFFFF)),
    max_size=40, unique=True,
).map(sorted)  # fmt: skip


def laid(found: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Shingles of texts, one after the other, and where each text's begin."""
    return np.array([each for of in found for each in of], np.uint64), np.r_[0, np.cumsum([*map(len, found)])].astype(np.int64)


@settings(deadline=None)
@given(st.lists(ascending, max_size=6))
def test_signatures_are_the_same(kernel, found):
    with using(kernel):
        signed = signatures_of(*laid(found))
    with using(None):
        assert np.array_equal(signed, signatures_of(*laid(found)))
    assert signed.shape == (len(found), BINS)


@given(ascending, ascending)
def test_likeness_is_the_same(kernel, one, other):
    other = sorted({*other, *one[::2]})
    arrays = [np.array(each, np.uint64) for each in (one, other)]
    with using(kernel):
        found = jaccard_of(*arrays)
    with using(None):
        assert found == jaccard_of(*arrays)


few = st.lists(st.integers(0, 40).map(lambda place: place * (2**HASH_BITS // 41)), max_size=30, unique=True).map(sorted)


@settings(deadline=None, max_examples=200)
@given(st.lists(few, min_size=1, max_size=30), st.sampled_from([0, 1, 3]), st.sampled_from([16, 17, 24]), st.integers(1, 40))
def test_who_meets_whom_is_the_same(kernel, found, coarse, owner_bits, at_once):
    hashes, offsets = laid(found)
    sources = np.arange(len(found), dtype=np.int64) // 2
    told = []
    before, splits.AT_ONCE = splits.AT_ONCE, at_once
    try:
        for each in (kernel, None):
            with using(each):
                packed, sizes = splits._packed(lambda begin, end: hashes[begin:end], offsets, coarse, owner_bits)
                packed.sort()
                told.append((packed.tolist(), sizes.tolist(), sorted(splits._meetings(packed, owner_bits, sources).tolist())))
    finally:
        splits.AT_ONCE = before
    assert told[0] == told[1]


def test_kin_are_the_same(kernel, monkeypatch):
    documents = alike(60)
    found = []
    for most_hashes in (splits.MOST_HASHES, 900):
        monkeypatch.setattr(splits, "MOST_HASHES", most_hashes)
        for each in (kernel, None):
            with using(each):
                found.append(splits.kinship(documents, sketch([document.text for document in documents])))
        assert found[-1] == found[-2]
    assert found[0].near_duplicates


def test_with_it_and_without_the_same_genome_is_sealed(kernel, tmp_path):
    (tmp_path / "notes").mkdir()
    for document in alike(40):
        for number in range(2):
            (tmp_path / "notes" / f"{document.path}-{number}.txt").write_text(f"{document.text} Été {number}")
    spec = GenomeSpec.model_validate({"sources": [{"type": "folder", "path": "notes", "domain": "notes"}]})
    with using(kernel):
        one = build_genome(spec, tmp_path / "one", tmp_path)
    with using(None):
        other = build_genome(spec, tmp_path / "other", tmp_path)
    assert one.genome_id == other.genome_id
    assert read_json(tmp_path / "one" / "manifest.json")["content"]["marks"]["notes"]["near_duplicate"] > 0


# what it refuses


def test_what_does_not_fit_is_refused(kernel):
    numbers, room = np.arange(8, dtype=np.uint64), np.zeros(64, np.uint64)
    places, frozen = np.array([0, 4, 8], np.int64), np.zeros(8, np.uint64)
    frozen.flags.writeable = False
    cells = np.zeros((2, BINS), np.uint32)
    refused = {
        "room": (kernel.shingles, (b"a b c d e f g h",), 2, room[:3]),
        "texts": (kernel.shingles, (b"",) * (MOST_AT_ONCE + 1), 2, np.zeros(MOST_AT_ONCE * 2, np.uint64)),
        "a number that is cut": (kernel.shingles, (b"",), 2, np.zeros(65, np.uint8)),
        "numbers that lie askew": (kernel.settle, np.zeros(65, np.uint8)[1:], np.zeros(1, np.int64)),
        "a text that is not there": (kernel.settle, np.array([3 << HASH_BITS], np.uint64), np.zeros(3, np.int64)),
        "what does not ascend": (kernel.settle, np.array([1 << HASH_BITS, 0], np.uint64), np.zeros(3, np.int64)),
        "offsets beyond the end": (kernel.sign, numbers, places + 1, cells),
        "offsets before the begin": (kernel.sign, numbers, places - 1, cells),
        "offsets that go back": (kernel.sign, numbers, places[[0, 2, 1]], cells),
        "too many offsets": (kernel.sign, numbers, np.r_[places, 8], cells),
        "no offsets": (kernel.sign, numbers, places[:0], cells[:0]),
        "room for a piece": (kernel.own, numbers, places, 0, 0, 16, room[:8], places[:2]),
        "texts of a piece": (kernel.own, numbers, places, 0, 0, 16, room, places.copy()),
        "pieces that overlap": (kernel.own, numbers, np.array([0, 8, 0, 8]), 0, 0, 16, room, np.zeros(3, np.int64)),
        "few bits": (kernel.own, numbers, places, 0, 0, 15, room, places[:2].copy()),
        "many bits": (kernel.own, numbers, places, 0, 0, 64, room, places[:2].copy()),
        "a document that is not there": (kernel.meetings, np.array([0, 3], np.uint64), 16, 24, places, room.view(np.int64)),
        "room for pairs": (kernel.meetings, numbers, 16, 24, places, room.view(np.int64)),
        "bits of an owner": (kernel.meetings, numbers, 64, 24, np.zeros(9, np.int64), np.zeros(999, np.int64)),
    }  # fmt: skip
    for why, (function, *given_) in refused.items():
        with pytest.raises(ValueError):
            print(why, function(*given_))
    for texts in (("é",), (1,), (bytearray(b"a"),), (None,)):
        with pytest.raises(TypeError):
            kernel.shingles(texts, 2, room)
    for function, *given_ in (
        (kernel.shingles, [b"a"], 2, room),
        (kernel.settle, frozen, np.zeros(1, np.int64)),
        (kernel.common, 1, 2),
    ):
        with pytest.raises((TypeError, BufferError, ValueError)):
            function(*given_)
    assert not room.any()


def test_what_was_refused_is_let_go(kernel):
    """A buffer that is held cannot grow."""
    held = bytearray(64)
    for function, *given_ in (
        (kernel.shingles, (1,), 2, held), (kernel.shingles, (b"a" * 99,), 2, held), (kernel.settle, held, 1),
        (kernel.sign, held, held, 1), (kernel.sign, held, held, held), (kernel.meetings, held, 64, 24, held, held),
        (kernel.own, held, held, 0, 0, 16, held, "text"), (kernel.common, held, held[1:]), (kernel.common, held, b"1"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            print(function(*given_))
        held += bytes(8)
    assert kernel.common(held, held) == len(held) // 8
    held += bytes(8)
