"""A genome in the making, its texts in memory or in a file: the same genome, and little memory."""

import os
import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.genome import batch, text_store
from chrysalis_ray.genome.build import build_genome, refresh_genome, verify_genome
from chrysalis_ray.genome.documents import Document, decoded, make_document
from chrysalis_ray.genome.forgetting import forget
from chrysalis_ray.genome.text_store import RECORD, StoredDocument, TextStore
from tests.genome.test_genome_scanning import TWO, write_notes

CONTENTS = st.one_of(st.text(max_size=60).map(str.encode), st.binary(max_size=60), st.just(b"\xef\xbb\xbfbegins with a mark"))


@given(st.lists(CONTENTS.filter(lambda content: b"\0" not in content), min_size=1, max_size=6))
def test_a_stored_document_is_the_document(tmp_path_factory, contents):
    store = TextStore(tmp_path_factory.getbasetemp(), in_memory=0)
    documents = []
    for number, content in enumerate(contents):
        text, encoding = decoded(content)
        documents.append(make_document(text, f"{number}", f"k{number}", "d", "MIT", encoding, "tag", content))
    stored = [store.keep(document) for document in documents]
    for document, kept, content in zip(documents, stored, contents, strict=True):
        assert isinstance(kept, StoredDocument) == bool(content)
        assert [getattr(kept, name) for name in RECORD] == [getattr(document, name) for name in RECORD]
        assert (kept.text, kept.content, kept.size, kept.characters) == (
            document.text,
            content,
            len(content),
            len(document.text),
        )
        assert kept.in_memory() == document
        made, values = (
            kept.__reduce__()[:2] if content else (Document, tuple(getattr(document, field.name) for field in fields(Document)))
        )
        assert made(*values) == document
        changed = kept.changed(path="elsewhere", marks={"pii": "1"})
        assert changed.in_memory() == document.changed(path="elsewhere", marks={"pii": "1"})
        assert type(changed) is type(kept)
        assert kept.marks == {}
        assert store.keep(kept) is kept or not content


def test_a_size_that_is_remembered_goes_with_the_text_and_with_nothing_else():
    document = make_document("déjà vu", "p", "k", "d", "MIT")
    assert document.size == document.changed(marks={"pii": "1"}).changed(path="q").size == 9
    assert document.changed(encoding="latin-1").size == 7
    assert document.changed(encoding="utf-8-sig").size == 12
    assert document.changed(text="ë").size == 2
    assert Document("", "p", "k", "d", "déjà", "MIT").changed(path="q").size == 6


def test_what_fits_stays_in_memory(tmp_path):
    store = TextStore(tmp_path / "not there yet", in_memory=10)
    kept = [store.keep(make_document(text, "p", "k", "d", "MIT")) for text in ("sixsix", "sixsix", "four", "x")]
    assert [type(document) for document in kept] == [Document, StoredDocument, Document, StoredDocument]
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_a_full_disk_is_told(tmp_path):
    store = TextStore(tmp_path, in_memory=0)
    with open("/dev/full", "wb", buffering=0) as full:
        store.scratch._file = full
        with pytest.raises(GenomeError, match="No space left on device"):
            store.keep(make_document("text", "p", "k", "d", "MIT"))


def test_a_disk_that_gives_other_bytes_is_not_believed(tmp_path):
    store = TextStore(tmp_path, in_memory=0)
    kept = [store.keep(make_document(text, "p", "k", "d", "MIT")) for text in ("one", "two")]
    os.pwrite(store.scratch._file.fileno(), b"x", 4)
    assert kept[0].text == "one"
    with pytest.raises(GenomeCorrupt, match="comes back changed"):
        kept[1].in_memory()


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("shards/*")}


def test_in_a_file_or_in_memory_it_is_the_same_genome(tmp_path, monkeypatch):
    import json

    write_notes(tmp_path / "notes")
    write_notes(tmp_path / "essays", start=100)
    (tmp_path / "essays" / "twin.txt").write_bytes(b"\xef\xbb\xbf" + b"the same in all of them " * 9)
    rows = ["\ufeff" + "the same in all of them " * 9, *(" ".join(f"row{n}w{i}" for i in range(60)) for n in range(9))]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    whole = build_genome(TWO, tmp_path / "memory", tmp_path)
    monkeypatch.setattr(batch, "BATCH_CHARACTERS", 20_000)
    stored = []
    original = StoredDocument.__init__
    monkeypatch.setattr(StoredDocument, "__init__", lambda self, *rest: stored.append(1) or original(self, *rest))
    for in_memory, processes in ((0, 1), (30_000, 2)):
        stored.clear()
        monkeypatch.setattr(text_store, "IN_MEMORY", in_memory)
        folder = tmp_path / f"file {in_memory}"
        assert build_genome(TWO, folder, tmp_path, processes).genome_id == whole.genome_id
        assert files(folder) == files(tmp_path / "memory")
        assert len(stored) > 50
    monkeypatch.setattr(text_store, "IN_MEMORY", 0)
    assert refresh_genome(TWO, tmp_path / "kept", tmp_path).genome_id == whole.genome_id
    (tmp_path / "notes" / "7.txt").write_text("another text " * 40)
    (tmp_path / "essays" / "twin.txt").unlink()  # from now on its bytes are read as a row, with its mark in the text
    again = refresh_genome(TWO, tmp_path / "kept", tmp_path)
    gone = again.manifest["content"]["documents"][3]
    less = forget(again, [gone], tmp_path / "less", "asked by its author", "2026-01-02")
    monkeypatch.setattr(text_store, "IN_MEMORY", 10**9)
    fresh = build_genome(TWO, tmp_path / "fresh", tmp_path)
    assert again.genome_id == fresh.genome_id
    assert verify_genome(tmp_path / "kept").genome_id == fresh.genome_id
    assert forget(fresh, [gone], tmp_path / "less too", "asked by its author", "2026-01-02").genome_id == less.genome_id


MEASURE = """
import sys
from pathlib import Path
from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.genome import text_store
from chrysalis_ray.genome.build import build_genome

def build(name):
    spec = GenomeSpec.model_validate({"sources": [{"type": "folder", "path": name, "domain": "d"}]})
    genome = build_genome(spec, folder / f"genome {name} {sys.argv[2]}", folder, 1)
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return genome.genome_id, int(peak) * 1024  # ru_maxrss would count what the process was before it became this program

folder, text_store.IN_MEMORY = Path(sys.argv[1]), int(sys.argv[2])
_, before = build("little")
genome_id, after = build("much")
print(genome_id, after - before)
"""


def test_the_memory_of_a_build_does_not_grow_with_its_text(tmp_path):
    """The peak beyond that of a small genome: most of the text where it stays in memory, a fraction where it does not."""

    def write(name, megabytes):
        (tmp_path / name).mkdir()
        for number in range(megabytes):
            text = os.urandom(500_000).hex()
            lines = "\n".join(text[begin : begin + 80] for begin in range(0, len(text), 80))
            (tmp_path / name / f"{number}.txt").write_text(lines)

    write("little", 12)
    write("much", 80)
    size = sum(path.stat().st_size for path in (tmp_path / "much").iterdir())
    found = []
    for in_memory in (10**9, 4_000_000):
        command = [sys.executable, "-c", MEASURE, str(tmp_path), str(in_memory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found[0][0] == found[1][0]
    assert int(found[0][1]) > 0.7 * size
    assert int(found[1][1]) < 0.4 * size
