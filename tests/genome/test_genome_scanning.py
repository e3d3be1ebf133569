"""Looking through text fast, once, and by any engine: the same marks, sketches and genome as one document at a time."""

import hashlib
import json
import random
import re
import resource
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.genome import batch, scan_cache, scanning, sketch_store, splits
from chrysalis_ray.genome.build import build_genome, open_genome, refresh_genome, verify_genome
from chrysalis_ray.genome.documents import PARTS, SPLITS, Document, decoded, make_document
from chrysalis_ray.genome.marks import SECRETS, addressed, addresses_in, marks_of, secrets_in, suspicious
from chrysalis_ray.genome.scanning import scan
from chrysalis_ray.genome.similarity import BINS, sketch
from chrysalis_ray.genome.sources import readings
from tests.genome.test_genome_marks import TOKENS

ALL_BITS = 2**64 - 1
GOLDEN, MIXER, TAIL, BASE = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93


def stdlib(megabytes):
    """Documents of the standard library, with what is no UTF-8 and no ASCII among them."""
    found, size = [], 0
    paths = sorted(
        Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda path: hashlib.sha256(path.name.encode()).digest()
    )
    for path in paths:
        content = path.read_bytes()
        kind = len(found) % 7
        content = b"caf\xe9 " + content if kind == 3 else "Été ÀB ".encode() + content if kind == 5 else content
        text, encoding = decoded(content)
        found.append(make_document(text, path.name, path.name, "code", "PSF-2.0", encoding))
        size += len(content)
        if size > megabytes * 1e6:
            break
    return found


# against the definitions, word by word


def word_hash(word):
    """`shingles._word_hashes` of one word, in plain integers."""
    mixed = int.from_bytes(word[:8], "little")
    if len(word) > 8:
        tail = int.from_bytes(word[-8:], "little") + len(word) * MIXER
        tail += int.from_bytes(word[8:16], "little") * GOLDEN if len(word) > 16 else 0
        tail &= ALL_BITS
        mixed ^= (tail ^ tail >> 29) * TAIL & ALL_BITS
    mixed = mixed * GOLDEN & ALL_BITS
    return mixed ^ mixed >> 32


def kept(text):
    """The kept shingles of a text, from the definition."""
    folded = re.sub(rb"[A-Z]", lambda letter: letter[0].lower(), text.encode("utf-8", "surrogatepass"))
    words = [word_hash(word) for word in re.findall(rb"[0-9a-z_\x80-\xff]+", folded)]
    found = set()
    for start in range(len(words) - 4):
        mixed = 0
        for word in words[start : start + 5]:
            mixed = (mixed * BASE + word) & ALL_BITS
        mixed ^= mixed >> 32
        mixed = mixed * MIXER & ALL_BITS
        mixed = (mixed ^ mixed >> 29) >> 16
        found |= {mixed} if mixed % 2 == 0 else set()
    return sorted(found)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(alphabet="abZ_9é€\n. -", max_size=120), min_size=1, max_size=6))
def test_kept_shingles_are_those_of_the_definition(texts):
    sketches = sketch(texts)
    assert [sketches.of(number).tolist() for number in range(len(texts))] == [kept(text) for text in texts]


def test_kept_shingles_of_real_text_are_those_of_the_definition():
    documents = stdlib(0.15)
    sketches = sketch([document.text for document in documents])
    assert sketches.sizes.sum() > 1000
    for number, document in enumerate(documents):
        assert sketches.of(number).tolist() == kept(document.text)


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=24), min_size=2, max_size=40, unique=True))
def test_every_byte_of_a_word_counts(words):
    """Words of up to 24 bytes, all bytes beyond ASCII so that none is a gap: different words, different hashes."""
    words = [bytes(byte | 0x80 for byte in word) for word in words]
    assert len({word_hash(word) for word in words}) == len(set(words))


def test_signatures_are_the_least_of_every_bin_and_empty_bins_borrow():
    texts = [" ".join(str(random.Random(number).random()) for _ in range(400)) for number in (1,)]
    texts += [" ".join(f"w{n}" for n in range(30)), ""]
    sketches = sketch(texts)
    for number in range(len(texts)):
        least = {}
        for value in sketches.of(number).tolist():
            place = (value >> 16) * BINS >> 32
            least[place] = min(value, least.get(place, value))
        signature = sketches.signatures[number].tolist()
        assert all(signature[place] == value & 0xFFFFFFFF for place, value in least.items())
        assert set(signature) == ({value & 0xFFFFFFFF for value in least.values()} or {2**32 - 1})


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(alphabet="ab .", max_size=60), min_size=2, max_size=5))
def test_jaccard_is_that_of_sets(texts):
    sketches = sketch(texts)
    for left in range(len(texts)):
        for right in range(len(texts)):
            a, b = set(kept(texts[left])), set(kept(texts[right]))
            assert sketches.jaccard(left, right) == len(a & b) / max(1, len(a | b))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 2**48 - 1), max_size=30), min_size=1, max_size=8), st.sampled_from([1, 3, 7]))
def test_a_coarser_sample_is_what_every_document_alone_keeps(found, coarse):
    hashes = np.array([each for of_one in found for each in of_one], np.uint64)
    offsets = np.r_[0, np.cumsum([len(of_one) for of_one in found])].astype(np.int64)
    expected = [[each for each in of_one if each & coarse == 0] for of_one in found]
    at_once, splits.AT_ONCE = splits.AT_ONCE, 7
    try:
        sample, sizes = splits._packed(lambda begin, end: hashes[begin:end], offsets, coarse, 16)
    finally:
        splits.AT_ONCE = at_once
    assert sample.tolist() == [each << 16 | number for number, of_one in enumerate(expected) for each in of_one]
    assert sizes.tolist() == [len(of_one) for of_one in expected]


# secrets and people, at first look


@pytest.mark.parametrize("kind", TOKENS)
def test_no_secret_escapes_the_first_look(kind):
    for text in (f"é{TOKENS[kind]}", TOKENS[kind], f"key='{TOKENS[kind]}'\nmore", f"{TOKENS[kind]}\ud800"):
        assert suspicious(text)
    assert not suspicious("nothing here, nor hf_hub_download, é")


def slow_marks(text):
    """What `marks_of` says of secrets and people, without looking first whether there may be any."""
    kinds, addresses = sorted(set(secrets_in(text))), len(set(addresses_in(text)))
    found = {"secret": ", ".join(kinds)} if kinds else {}
    return found | ({"pii": f"{addresses} e-mail address{'es' if addresses > 1 else ''}"} if addresses else {})


PARTS_OF_TEXT = st.one_of(
    st.text(alphabet="aZ9@._-é\n ", max_size=12),
    st.sampled_from(list(TOKENS.values())),
    st.builds(lambda token, cut: token[:cut], st.sampled_from(list(TOKENS.values())), st.integers(1, 60)),
    st.sampled_from(["larva@pupa.org", "a@b.co", "\ud800", "gh", "eyJ", "sk-ant-", "AKIA", "-----BEGIN "]),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(PARTS_OF_TEXT, max_size=8))
def test_the_first_look_passes_over_nothing(parts):
    """Where the quick look says no, the patterns find nothing; RE2, with the same patterns, says the same of what is UTF-8."""
    text = "".join(parts)
    found = marks_of(Document("", "a.txt", "", "", text, ""))
    assert {mark: found[mark] for mark in found if mark in ("secret", "pii")} == slow_marks(text)
    if "\ud800" not in text:
        first = "|".join(first for first, _ in SECRETS.values())
        assert suspicious(text) == pc.match_substring_regex(pa.array([text], pa.string()), first)[0].as_py()
        assert addressed(text) == pc.match_substring_regex(pa.array([text], pa.string()), "[A-Za-z0-9]@[A-Za-z0-9]")[0].as_py()


def test_more_shingles_than_there_was_room_for():
    """Words of one letter have five times as many shingles as those of real text; with and without a cache."""
    draw = random.Random(3)
    texts = [" ".join(draw.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=4000)) for _ in range(3)]
    documents = [make_document(text, f"{number}", f"{number}", "d", "MIT") for number, text in enumerate(texts)]
    marked, sketches = scan(documents)
    alone = sketch(texts)
    assert len(sketches.hashes) > sum(map(len, texts)) / sketch_store.ROOM_FOR_ONE
    assert marked == documents
    assert sketches.hashes.tolist() == alone.hashes.tolist()
    assert sketches.offsets.tolist() == alone.offsets.tolist()
    assert sketches.signatures.tolist() == alone.signatures.tolist()


def test_a_batch_gets_the_marks_that_each_of_its_documents_gets_alone():
    documents = stdlib(1.0)
    hidden = [(number, kind) for number, kind in enumerate(TOKENS) if number < len(documents)]
    for number, kind in hidden:
        text = documents[number].text + TOKENS[kind]
        documents[number] = make_document(text, documents[number].path, "k", "code", "MIT", documents[number].encoding)
    marked, _ = scan(documents)
    assert [dict(document.marks) for document in marked] == [marks_of(document) for document in documents]
    assert all(kind in marked[number].marks["secret"] for number, kind in hidden)


# engines


def write_notes(folder, count=60, start=0):
    folder.mkdir(exist_ok=True)
    for number in range(start, start + count):
        words = [hashlib.sha256(f"{number} {index}".encode()).hexdigest()[:7] for index in range(300)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    for number in range(start, start + 4):
        (folder / f"copy{number}.txt").write_text((folder / f"{number}.txt").read_text() + " the end")
    (folder / "mail.txt").write_text("larva@pupa.org")


def spec(**build):
    return GenomeSpec.model_validate({"sources": [{"type": "folder", "path": "notes", "domain": "notes"}], "build": build})


def test_one_process_or_two_build_the_same_genome_and_how_is_no_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "BATCH_CHARACTERS", 20_000)
    write_notes(tmp_path / "notes")
    one = build_genome(spec(), tmp_path / "one", tmp_path)
    two = build_genome(spec(engine="processes", processes=2), tmp_path / "two", tmp_path)
    assert one.genome_id == two.genome_id
    assert one.manifest["content"]["marks"] == {"notes": {"near_duplicate": 4, "pii": 1}}
    assert open_genome(tmp_path / "two").genome_id == build_genome(spec(processes=2), tmp_path / "one", tmp_path).genome_id


@pytest.mark.ray
def test_ray_data_builds_the_same_genome(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "BATCH_CHARACTERS", 20_000)
    write_notes(tmp_path / "notes")
    one = build_genome(spec(), tmp_path / "one", tmp_path)
    # in a process of its own: Ray remembers the token of the first cluster that a process starts
    script = """
import signal, sys
from pathlib import Path
from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.genome import batch
from chrysalis_ray.genome.build import build_genome
batch.BATCH_CHARACTERS = 20_000
folder = Path(sys.argv[1])
def heed(number, frame): pass
signal.signal(signal.SIGTERM, heed)
print(build_genome(GenomeSpec.model_validate_json(sys.argv[2]), folder / "ray", folder).genome_id)
import ray
assert not ray.is_initialized()
assert signal.getsignal(signal.SIGTERM) is heed
"""
    asked = spec(engine="ray", processes=2).model_dump_json()
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == one.genome_id
    for shard in (tmp_path / "one" / "shards").iterdir():
        assert shard.read_bytes() == (tmp_path / "ray" / "shards" / shard.name).read_bytes()


# the cache


@pytest.fixture
def scanned(monkeypatch):
    """Paths of the documents that are scanned from now on, by the function that scans them."""
    seen = []
    original = scanning.scan_batch
    monkeypatch.setattr(scanning, "scan_batch", lambda batch: seen.extend(d.path for d in batch) or original(batch))
    return seen


def fresh_id(folder):
    return build_genome(spec(), folder / "fresh", folder).genome_id


def test_one_changed_file_is_all_that_is_scanned_again(tmp_path, scanned):
    write_notes(tmp_path / "notes")
    refresh_genome(spec(), tmp_path / "g", tmp_path)
    assert len(scanned) == 65
    scanned.clear()
    (tmp_path / "notes" / "7.txt").write_text("another text " * 40)
    second = refresh_genome(spec(), tmp_path / "g", tmp_path)
    assert scanned == ["notes/7.txt"]
    assert second.genome_id == fresh_id(tmp_path)


def test_what_a_scan_depends_on_is_in_the_key(tmp_path, scanned):
    """The same bytes under a name that says more, or read in another encoding, are looked at again; elsewhere they are not."""
    write_notes(tmp_path / "notes")
    refresh_genome(spec(), tmp_path / "g", tmp_path)
    scanned.clear()
    (tmp_path / "notes" / "8.txt").rename(tmp_path / "notes" / "package-lock.json")
    (tmp_path / "notes" / "deep").mkdir()
    (tmp_path / "notes" / "9.txt").rename(tmp_path / "notes" / "deep" / "9.txt")
    genome = refresh_genome(spec(), tmp_path / "g", tmp_path)
    assert scanned == ["notes/package-lock.json"]
    assert genome.manifest["content"]["marks"]["notes"]["generated"] == 1
    document = make_document("caf\xe9", "a", "a", "d", "MIT")
    other = make_document("caf\xe9", "a", "a", "d", "MIT", "latin-1")
    assert len({scan_cache.key_of(document), scan_cache.key_of(other)}) == 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "of other rules", "lost"])
def test_a_cache_that_is_not_what_was_written_is_not_believed(tmp_path, scanned, damage):
    write_notes(tmp_path / "notes")
    refresh_genome(spec(), tmp_path / "g", tmp_path)
    (segment,) = (tmp_path / "g" / "scan").iterdir()
    content = bytearray(segment.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        segment.write_bytes(bytes(content))
    elif damage == "cut":
        segment.write_bytes(bytes(content[: len(content) // 2]))
    elif damage == "of other rules":
        segment.rename(segment.with_name("0.0-" + segment.name.partition("-")[2]))
    else:
        segment.unlink()
    scanned.clear()
    (tmp_path / "notes" / "7.txt").write_text("another text " * 40)
    genome = refresh_genome(spec(), tmp_path / "g", tmp_path)
    assert len(scanned) == 65
    assert genome.genome_id == fresh_id(tmp_path)
    assert len(list((tmp_path / "g" / "scan").iterdir())) == 1


def test_two_builds_into_one_folder_do_not_end_each_other(tmp_path):
    folder = tmp_path / "scan"
    seen = scan_cache.Seen({}, np.arange(40, dtype=np.uint64))
    keys = [hashlib.sha256(str(number).encode()).digest() for number in range(scan_cache.DOCUMENTS_AT_ONCE + 1)]
    one = scan_cache.ScanCache(folder).renewed(keys, iter([seen] * len(keys)))
    for _ in range(scan_cache.DOCUMENTS_AT_ONCE):
        next(one)  # its draft lies in the folder
    assert len(list(folder.iterdir())) == 1
    assert len(list(scan_cache.ScanCache(folder).renewed(keys[:2], iter([seen] * 2)))) == 2
    assert len(list(one)) == 1
    assert list(folder.iterdir()) == []  # each cleared what the other held: nothing is believed, all is looked for again
    assert keys[0] not in scan_cache.ScanCache(folder)


@pytest.mark.parametrize("room", [0, 4, 3000], ids=["none at all", "for a part of the head", "for a part"])
def test_a_disk_that_is_full_leaves_no_draft_of_the_cache(room, tmp_path):
    """A limit on files stands for the disk: writes beyond it fail as they do there, by an OSError."""
    documents = stdlib(0.3)
    cache = scan_cache.ScanCache(tmp_path / "scan")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            scan(documents, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "scan").iterdir()) == []
    assert scan(documents, cache=scan_cache.ScanCache(tmp_path / "scan"))[0] == scan(documents)[0]


def test_a_scan_that_fails_leaves_no_draft_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_cache, "DOCUMENTS_AT_ONCE", 2)
    documents = stdlib(0.3)
    cache = scan_cache.ScanCache(tmp_path / "scan")
    found = scan_cache.Seen({}, np.arange(9, dtype=np.uint64))
    keys = [scan_cache.key_of(document) for document in documents]
    with pytest.raises(RuntimeError, match="StopIteration"):  # nothing more was found
        list(cache.renewed(keys, iter([found] * 3)))
    assert list((tmp_path / "scan").iterdir()) == []


def test_the_cache_holds_what_the_genome_holds_in_few_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_cache, "MOST_SEGMENTS", 4)
    write_notes(tmp_path / "notes")
    for number in range(8):
        (tmp_path / "notes" / f"{number}.txt").write_text(f"text {number} " * 50)
        genome = refresh_genome(spec(), tmp_path / "g", tmp_path)
        assert 1 <= len(list((tmp_path / "g" / "scan").iterdir())) <= 5
    cache = scan_cache.ScanCache(tmp_path / "g" / "scan")
    assert genome.genome_id == fresh_id(tmp_path)
    for number in range(20, 60):
        (tmp_path / "notes" / f"{number}.txt").unlink()
    refresh_genome(spec(), tmp_path / "g", tmp_path)
    after = scan_cache.ScanCache(tmp_path / "g" / "scan")
    gone = make_document(
        " ".join(hashlib.sha256(f"30 {i}".encode()).hexdigest()[:7] for i in range(300)), "notes/30.txt", "", "", ""
    )
    assert cache.get(scan_cache.key_of(gone)) is not None
    assert after.get(scan_cache.key_of(gone)) is None
    assert sum(path.stat().st_size for path in (tmp_path / "g" / "scan").iterdir()) < 100_000


# sources that are not read again


TWO = GenomeSpec.model_validate(
    {
        "sources": [
            {"type": "folder", "path": "notes", "domain": "notes"},
            {"type": "folder", "path": "essays", "domain": "essays", "licence": "MIT", "max_megabytes": 0.05},
            {"type": "jsonl", "path": "rows.jsonl", "domain": "rows"},
        ]
    }
)


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two folders and rows, one text in all of them, with a byte order mark; and the domains that are read from now on."""
    write_notes(tmp_path / "notes")
    write_notes(tmp_path / "essays", start=100)
    (tmp_path / "essays" / "twin.txt").write_bytes(b"\xef\xbb\xbf" + b"the same in all of them " * 9)
    (tmp_path / "notes" / "twin.txt").write_bytes((tmp_path / "essays" / "twin.txt").read_bytes())
    rows = ["\ufeff" + "the same in all of them " * 9, *(" ".join(f"row{n}w{i}" for i in range(60)) for n in range(9))]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    seen = []
    original = readings.read_source
    monkeypatch.setattr(readings, "read_source", lambda source, *rest: seen.append(source.domain) or original(source, *rest))
    return seen


def test_only_the_source_that_changed_is_read_again(tmp_path, two):
    refresh_genome(TWO, tmp_path / "g", tmp_path)
    assert two == ["notes", "essays", "rows"]
    two.clear()
    (tmp_path / "notes" / "7.txt").write_text("another text " * 40)
    for name in ("essays", "rows"):
        again = refresh_genome(TWO, tmp_path / "g", tmp_path)
        fresh = build_genome(TWO, tmp_path / f"before {name}", tmp_path)
        assert again.manifest["content"] == fresh.manifest["content"]
        assert again.manifest["content"]["skipped"]["over_cap"] > 0
        assert two == ["notes"]
        (tmp_path / "notes" / "twin.txt").unlink(missing_ok=True)  # from now on another source has to bring it
        (tmp_path / "notes" / f"for {name}.txt").write_text(f"text for {name} " * 30)
        two.clear()
        refresh_genome(TWO, tmp_path / "g", tmp_path)
        assert two == ["notes"]
    assert len(list((tmp_path / "g" / "readings").iterdir())) == 3
    assert verify_genome(tmp_path / "g").genome_id == build_genome(TWO, tmp_path / "fresh", tmp_path).genome_id


@pytest.mark.parametrize("damage", ["a shard", "a reading", "the manifest"])
def test_where_the_genome_is_not_what_it_was_everything_is_read(tmp_path, two, damage):
    refresh_genome(TWO, tmp_path / "g", tmp_path)
    target = {
        "a shard": tmp_path / "g" / "shards" / "essays-train.parquet",
        "a reading": sorted((tmp_path / "g" / "readings").iterdir())[0],
        "the manifest": tmp_path / "g" / "manifest.json",
    }[damage]
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(bytes(content))
    two.clear()
    (tmp_path / "notes" / "7.txt").write_text("another text " * 40)
    if damage == "the manifest":
        target.unlink()
    again = refresh_genome(TWO, tmp_path / "g", tmp_path)
    assert two == ["notes", "essays", "rows"] if damage != "a reading" else len(two) in (1, 2)
    assert verify_genome(tmp_path / "g").genome_id == again.genome_id
    assert again.genome_id == build_genome(TWO, tmp_path / "fresh", tmp_path).genome_id


# shards


def test_a_large_part_lies_in_several_shards_and_a_change_rewrites_few(tmp_path, monkeypatch):
    from chrysalis_ray.genome import sealing
    from chrysalis_ray.genome.croissant import croissant
    from chrysalis_ray.genome.framing import read_text, write_text

    write_notes(tmp_path / "notes", count=200)
    whole = build_genome(spec(), tmp_path / "whole", tmp_path)
    monkeypatch.setattr(sealing, "SHARD_BYTES", 40_000)
    genome = refresh_genome(spec(), tmp_path / "g", tmp_path)
    assert genome.genome_id == whole.genome_id
    names = sorted(path.name for path in (tmp_path / "g" / "shards").glob("notes-train*"))
    assert names == [f"notes-train-{number:03}-of-016.parquet" for number in range(16)]
    for split in SPLITS:
        documents = list(genome.documents("notes", split))
        assert documents == list(whole.documents("notes", split))
        assert [d.doc_id for d in documents] == sorted(d.doc_id for d in documents)
    assert verify_genome(tmp_path / "g").genome_id == genome.genome_id
    write_text(genome, tmp_path / "text")
    assert sum(1 for _ in read_text(tmp_path / "text")) == len(genome.manifest["content"]["documents"])
    told = {entry["@id"] for entry in croissant(genome, tmp_path / "text", tmp_path)["distribution"]}
    assert {f"shards/{name}" for name in names} <= told
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "g" / "shards").iterdir()}
    row = next(row for row in genome.manifest["content"]["documents"] if row["split"] == "train")
    (tmp_path / row["path"]).write_text("another text, of another length, " * 60)
    refresh_genome(spec(), tmp_path / "g", tmp_path)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "g" / "shards").iterdir()}
    assert 1 <= sum(after[name] != before.get(name) for name in after) <= 2
    lost = tmp_path / "g" / "shards" / names[3]
    lost.unlink()
    with pytest.raises(Exception, match="notes-train-003-of-016"):
        verify_genome(tmp_path / "g")


# repositories of this machine


@pytest.mark.parametrize("kind", ["plain", "bare", "worktree", "packed", "borrowing"])
def test_a_repository_of_this_machine_is_read_in_place_and_its_configuration_is_not(tmp_path, kind):
    def git(*arguments, cwd=tmp_path / "text"):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()

    write_notes(tmp_path / "text", count=12)
    git("init", "--quiet")
    git("add", ".")
    git("commit", "-qm", "text")
    commit = git("rev-parse", "HEAD")
    url = "text"
    if kind == "bare":
        git("clone", "-q", "--bare", "text", "other", cwd=tmp_path)
        url = "other"
    elif kind == "worktree":
        git("worktree", "add", "-q", "--detach", "../other")
        url = "other"
    elif kind == "packed":
        git("gc", "-q")
    elif kind == "borrowing":
        git("clone", "-q", "--shared", "text", "other", cwd=tmp_path)
        url = "other"
    for place in tmp_path.glob("*/.git/config"):
        place.write_text("[this is no configuration")  # whoever reads it fails: no process of git's serves this repository
    source = {"type": "git", "url": url, "commit": commit, "domain": "notes"}
    genome = build_genome(GenomeSpec.model_validate({"sources": [source]}), tmp_path / "g", tmp_path)
    found = {
        document.path.rpartition("/")[2]: document.content for part in PARTS for document in genome.documents("notes", part)
    }
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "text").glob("*.txt")}
