"""Genomes larger than memory: what does not fit lies on disk, what is handed to others comes in blocks; the same genome."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome import batch, ray_scan, scan_cache, similarity, sketch_store, splits, text_store
from chrysalis_ray.genome.batch import scan_batch
from chrysalis_ray.genome.build import build_genome, refresh_genome, verify_genome
from chrysalis_ray.genome.documents import decoded, make_document
from chrysalis_ray.genome.scan_cache import ScanCache, Seen
from chrysalis_ray.genome.scratch import Scratch
from chrysalis_ray.genome.similarity import candidate_pairs, keys_of_band, sketch, sketches_of
from chrysalis_ray.genome.sketch_store import SketchStore, StoredSketches
from chrysalis_ray.genome.text_store import TextStore
from tests.genome.test_genome_scanning import spec, write_notes


def stored(found, folder, in_memory=0, at_once=2):
    """Sketches of texts with these shingles, by way of a store with little room."""
    store = SketchStore(folder, len(found), 0, in_memory)
    for begin in range(0, len(found), at_once):
        some = found[begin : begin + at_once]
        store.add(np.array([each for of_one in some for each in of_one], np.uint64), np.array([len(of_one) for of_one in some]))
    return store.sketches()


SHINGLES = st.lists(st.integers(0, 2**47 - 1).map(lambda number: 2 * number), max_size=40, unique=True).map(sorted)


@settings(deadline=None, max_examples=40)
@given(st.lists(SHINGLES, min_size=1, max_size=9), st.integers(1, 4), st.sampled_from([0, 300, 3000]))
def test_sketches_on_disk_are_the_sketches(tmp_path_factory, found, at_once, in_memory):
    whole = sketches_of(np.array([each for of_one in found for each in of_one], np.uint64), np.array([*map(len, found)]))
    parts = stored(found, tmp_path_factory.getbasetemp(), in_memory, at_once)
    assert (len(parts), parts.sizes.tolist()) == (len(whole), whole.sizes.tolist())
    assert [parts.of(number).tolist() for number in range(len(found))] == found
    for band in range(similarity.BANDS):
        assert parts.band(band).tolist() == whole.band(band).tolist() == keys_of_band(whole.signatures, band).tolist()
    assert parts.jaccard(0, len(found) - 1) == whole.jaccard(0, len(found) - 1)


def alike(count):
    """Documents of which many share much: kin of all degrees."""
    documents = []
    for number in range(count):
        words = [f"w{number % 9}x{index}" for index in range(120)]
        words[number % 60 :: 45] = [f"own{number}y{index}" for index in range(len(words[number % 60 :: 45]))]
        documents.append(make_document(" ".join(words), f"{number}", f"s{number // 2}", "d", "MIT"))
    return sorted(documents, key=lambda document: document.doc_id)


@pytest.mark.parametrize("most_hashes", [splits.MOST_HASHES, 900])
def test_kin_are_the_same_from_disk_and_in_small_pieces(tmp_path, monkeypatch, most_hashes):
    """Also where only a sample of the shingles is compared."""
    documents = alike(80)
    monkeypatch.setattr(splits, "MOST_HASHES", most_hashes)
    whole = sketch([document.text for document in documents])
    assert int(whole.offsets[-1]) > 2000
    expected, pairs = splits.kinship(documents, whole), list(candidate_pairs(whole))
    assert len(pairs) > 100
    assert pairs == sorted(set(pairs))
    assert len(set(expected.groups.values())) < len(expected.groups)
    assert expected.near_duplicates
    for module, name, value in (
        (similarity, "LEFT_AT_ONCE", 7),
        (splits, "MEETINGS_AT_ONCE", 50),
        (splits, "AT_ONCE", 31),
    ):
        monkeypatch.setattr(module, name, value)
    parts = stored([whole.of(number).tolist() for number in range(len(whole))], tmp_path)
    assert isinstance(parts, StoredSketches)
    assert list(candidate_pairs(parts)) == list(candidate_pairs(whole)) == pairs
    assert splits.kinship(documents, parts) == splits.kinship(documents, whole) == expected
    assert list(tmp_path.iterdir()) == []  # files without a name


def tiny(monkeypatch):
    """Room for next to nothing."""
    for module, name, value in (
        (sketch_store, "IN_MEMORY", 20_000),
        (text_store, "IN_MEMORY", 20_000),
        (batch, "BATCH_CHARACTERS", 5_000),
        (similarity, "LEFT_AT_ONCE", 5),
        (splits, "MEETINGS_AT_ONCE", 100),
        (scan_cache, "SHINGLES_AT_ONCE", 700),
    ):
        monkeypatch.setattr(module, name, value)


def test_with_room_for_next_to_nothing_the_same_genome_comes_out(tmp_path, monkeypatch):
    write_notes(tmp_path / "notes")
    whole = build_genome(spec(), tmp_path / "whole", tmp_path)
    spilled = []
    original = StoredSketches.__init__
    monkeypatch.setattr(StoredSketches, "__init__", lambda self, *rest: spilled.append(1) or original(self, *rest))
    tiny(monkeypatch)
    assert build_genome(spec(), tmp_path / "one", tmp_path).genome_id == whole.genome_id
    assert build_genome(spec(processes=2), tmp_path / "two", tmp_path).genome_id == whole.genome_id
    assert refresh_genome(spec(), tmp_path / "kept", tmp_path).genome_id == whole.genome_id
    (tmp_path / "notes" / "7.txt").write_text("another text " * 40)
    again = refresh_genome(spec(), tmp_path / "kept", tmp_path)
    assert again.genome_id == build_genome(spec(), tmp_path / "fresh", tmp_path).genome_id != whole.genome_id
    assert len(spilled) == 5
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["manifest.json", "shards"]
    assert verify_genome(tmp_path / "kept").genome_id == again.genome_id


def test_a_full_disk_is_told(tmp_path):
    for content in (b"text", np.arange(3).data):
        scratch = Scratch(tmp_path)
        with open("/dev/full", "wb", buffering=0) as full:
            scratch._file = full
            with pytest.raises(GenomeError, match="No space left on device") as told:
                scratch.append(content)
    assert "free twice as much space" in told.value.remedy


def test_a_shared_file_has_a_name_while_the_build_lasts_and_what_a_kill_left_is_removed(tmp_path):
    folder = tmp_path / "genome"
    folder.mkdir()
    (folder / ".texts.abcd1234").write_text("of a build that was killed")
    store = TextStore(folder, shared=True)
    kept = [store.keep(make_document(text, "p", "k", "d", "MIT")) for text in ("one", "two")]
    (file,) = folder.iterdir()
    assert [document.piece for document in kept] == [(str(file), 0, 3), (str(file), 3, 3)]
    assert file.read_bytes() == b"onetwo"
    assert kept[1].text == "two"
    del store, kept
    assert list(folder.iterdir()) == []


# the cache


def test_a_cache_that_is_not_read_to_its_end_keeps_what_it_was(tmp_path):
    def seen(number):
        return Seen({"pii": str(number)}, np.arange(number, dtype=np.uint64))

    keys = [hashlib.sha256(bytes([number])).digest() for number in range(9)]
    cache = ScanCache(tmp_path / "scan")
    assert [told.marks for told in cache.renewed(keys[:6], iter(map(seen, range(6))))] == [seen(n).marks for n in range(6)]
    (segment,) = (tmp_path / "scan").iterdir()
    half = ScanCache(tmp_path / "scan").renewed(keys, iter(map(seen, range(6, 9))))
    for _ in range(8):
        next(half)
    half.close()
    assert list((tmp_path / "scan").iterdir()) == [segment]
    whole = list(ScanCache(tmp_path / "scan").renewed(keys, iter(map(seen, range(6, 9)))))
    assert [(told.marks, told.hashes.tolist()) for told in whole] == [({"pii": str(n)}, [*range(n)]) for n in range(9)]
    assert len(list((tmp_path / "scan").iterdir())) == 2


# what tasks of Ray Data do, without Ray


def pieces(documents, number=0):
    return ray_scan._pieces(number, documents)


def test_a_task_finds_in_pieces_what_it_finds_in_texts_and_tells_what_it_does_not_reach(tmp_path):
    contents = [b"a file of five words and more", b"caf\xe9 larva@pupa.org", "\ufeffÉté, twice".encode(), b"x " * 99]
    texts = [decoded(content) for content in contents]
    documents = [make_document(text, f"{n}.txt", "k", "d", "MIT", encoding) for n, (text, encoding) in enumerate(texts)]
    store = TextStore(tmp_path, shared=True)
    kept = [store.keep(document) for document in documents]
    found = ray_scan.scan_pieces(pa.concat_tables([pieces(kept[:3], 7), pieces(kept[3:], 8)]))
    assert found == ray_scan.scan_texts(
        pa.concat_tables([ray_scan._texts(7, documents[:3]), ray_scan._texts(8, documents[3:])])
    )
    (first, one), (second, other) = ((number, ray_scan._of_rows(rows)) for number, rows in ray_scan._groups(found))
    for scanned, part in ((one, documents[:3]), (other, documents[3:])):
        alone = scan_batch(part)
        assert (scanned.marks, scanned.hashes.tolist(), scanned.sizes.tolist()) == (
            alone.marks,
            alone.hashes.tolist(),
            alone.sizes.tolist(),
        )
    assert (first, second, one.marks[1].keys()) == (7, 8, {"not_utf8", "pii"})
    with open(kept[3].piece.file, "r+b") as stream:
        stream.seek(kept[3].piece.begin)
        stream.write(b"y")
    damaged = ray_scan.scan_pieces(pa.concat_tables([pieces(kept[:3], 7), pieces(kept[3:], 8)]))
    assert [ray_scan._of_rows(rows) is None for _, rows in ray_scan._groups(damaged)] == [False, True]
    told = pieces(kept)
    elsewhere = told.set_column(4, "file", pa.array(["/not/there"] * len(told), pa.string()))
    assert ray_scan._of_rows(ray_scan.scan_pieces(elsewhere)) is None


def test_windows_hold_no_more_than_they_may_and_everything_once():
    parts = [list(range(size)) for size in (3, 4, 9, 1, 1, 1, 2)]
    found = list(ray_scan._windows(parts, 7, len))
    assert [[len(part) for part in window] for window in found] == [[3, 4], [9], [1, 1, 1, 2]]
    assert list(ray_scan._windows([], 7, len)) == []


SCRIPT = """
import sys
from pathlib import Path
import ray
from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.genome import batch, ray_scan, sketch_store
from chrysalis_ray.genome.build import build_genome, refresh_genome
from chrysalis_ray.genome.text_store import Piece, StoredDocument, TextStore

folder, spec = Path(sys.argv[1]), GenomeSpec.model_validate_json(sys.argv[2])
batch.BATCH_CHARACTERS, ray_scan.BATCHES_PER_BLOCK, ray_scan.TOLD_AT_ONCE, ray_scan.HANDED_AT_ONCE = 4000, 3, 20, 30_000
sketch_store.IN_MEMORY = 20_000
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
given, original = [], ray_scan._scanned
ray_scan._scanned = lambda parts, told, *rest: given.append((told.__name__, len(parts))) or original(parts, told, *rest)


def built(name, build=build_genome):
    given.clear()
    genome_id = build(spec, folder / name, folder).genome_id
    print(genome_id, *sorted({told for told, _ in given}), max(count for _, count in given), len(given), flush=True)
    assert not list((folder / name).glob(".*")), name


built("told")
built("kept", refresh_genome)
whole = StoredDocument.piece
StoredDocument.piece = property(lambda self: whole.fget(self)._replace(file="/not/there"))
built("not reached")
last = sorted(path.name for path in (folder / "notes").iterdir())[-1]
StoredDocument.piece = property(lambda self: whole.fget(self)._replace(begin=1) if last in self.path else whole.fget(self))
built("not reached in the end")
StoredDocument.piece = property(lambda self: None)
built("nameless")
"""


@pytest.mark.ray
def test_ray_data_reads_what_it_reaches_and_is_handed_the_rest_in_blocks(tmp_path):
    """Told where texts lie, handed them from the first or from some batch on: one genome, and never much at once."""
    write_notes(tmp_path / "notes")
    one = build_genome(spec(), tmp_path / "one", tmp_path)
    asked = json.dumps(spec(engine="ray", processes=2).model_dump(mode="json"))
    # in a process of its own: Ray remembers the token of the first cluster that a process starts
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(one.genome_id[:8])]
    assert [line[0] for line in lines] == [one.genome_id] * 5
    assert [line[1:-2] for line in lines] == [
        ["_pieces"], ["_pieces"], ["_pieces", "_texts"], ["_pieces", "_texts"], ["_texts"]
    ]  # fmt: skip
    assert all(int(line[-2]) <= 20 and int(line[-1]) >= 3 for line in lines)
    assert "streaming_executor" not in done.stderr
    assert "Warning" not in done.stderr


MEASURE = """
import sys
from pathlib import Path
from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.genome import sketch_store, splits, text_store
from chrysalis_ray.genome.build import build_genome

def build(name):
    spec = GenomeSpec.model_validate({"sources": [{"type": "folder", "path": name, "domain": "d"}]})
    genome = build_genome(spec, folder / f"genome {name} {sys.argv[2]}", folder, 1)
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return genome.genome_id, int(peak) * 1024

folder, sketch_store.IN_MEMORY = Path(sys.argv[1]), int(sys.argv[2])
text_store.IN_MEMORY, splits.MOST_HASHES = 2_000_000, 100_000
_, before = build("little")
genome_id, after = build("much")
print(genome_id, after - before)
"""


def test_the_memory_of_a_build_does_not_grow_with_its_sketches(tmp_path):
    """The peak beyond that of a small genome: all the shingles where they stay in memory, a fraction where they do not."""
    letters = bytes(b"abcdefghijklmnopqrstuvwxyz    \n"[number % 31] for number in range(256))

    def write(name, count):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.txt").write_bytes(os.urandom(500_000).translate(letters))

    write("little", 40)
    write("much", 120)
    found = []
    for in_memory in (10**9, 2_000_000):
        command = [sys.executable, "-c", MEASURE, str(tmp_path), str(in_memory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found[0][0] == found[1][0]
    kept = 80 * 500_000 * 5 / 31 * 0.8 / 2 * 8  # bytes of kept shingles, about: words, less those of no letters, every second
    assert int(found[0][1]) > 0.8 * kept
    assert int(found[1][1]) < 0.4 * kept
