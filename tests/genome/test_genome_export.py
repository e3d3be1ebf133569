"""One text and back, its metadata, and the difference of two genomes."""

import hashlib
import json
import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.core.records import write_json
from chrysalis_ray.genome.build import build_genome
from chrysalis_ray.genome.croissant import croissant
from chrysalis_ray.genome.differences import differences
from chrysalis_ray.genome.documents import PARTS, SPLITS
from chrysalis_ray.genome.framing import FRAME, escaped, read_text, unescaped, write_text

FRAMES = [f"<|{what}_{when}|>" for what in ("genome", "repo", "file") for when in ("start", "end", "silent")]
ODD = [
    "\n".join([*FRAMES, *("\\" + frame for frame in FRAMES), *("\\\\\\" + frame for frame in FRAMES)]),
    "<|file_end|>\n<|repo_end|>\n<|genome_end|>\n",
    "\\<|file_end|>",
    "one\r\ntwo\rthree\u2028four\u0085five\x0b\x0c\n\n\n",
    "no line break at the end <|file_end|>",
    " <|file_end|> in the middle\n\t<|file_start|>",
    "\n\n  \n leading blanks",
]
TOKEN = "ghp_" + "".join(random.Random(3).choices(string.ascii_letters + string.digits, k=36))


def words(number, count=40):
    return " ".join(hashlib.sha256(f"{number} {i}".encode()).hexdigest()[:7] for i in range(count))


@given(st.lists(st.sampled_from([*FRAMES, "\\", "\n", "\r", "a", "<|", "|>", " ", "é"]), max_size=30).map("".join))
def test_escaping_can_be_undone_and_leaves_no_frame(text):
    content = text.encode()
    assert unescaped(escaped(content)) == content
    assert all(line.startswith(b"\\") for line in FRAME.findall(escaped(content)))


@pytest.fixture
def genome(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for number, text in enumerate(ODD):
        (folder / f"odd{number}.txt").write_bytes(text.encode())
    for number in range(12):
        (folder / f"{number}.txt").write_text(words(number))
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbf" + words(50).encode())
    (folder / "latin.txt").write_bytes(b"\xe9 <|file_end|>\n<|file_end|>\n" + words(51).encode())
    (folder / "secret.txt").write_text(f"{words(52)} {TOKEN}")
    (tmp_path / "essays").mkdir()
    for number in range(100, 106):
        (tmp_path / "essays" / f"{number}.txt").write_text(words(number))
    return build_genome(spec(), tmp_path / "g", tmp_path)


def spec(**more):
    sources = [{"type": "folder", "path": name, "domain": name, "licence": "MIT"} for name in ("notes", "essays")]
    return GenomeSpec.model_validate({"sources": sources, "exclude": ["secret"], **more})


def test_a_genome_comes_back_from_its_text_byte_for_byte(tmp_path, genome):
    sha256 = write_text(genome, tmp_path / "genome.txt")
    assert hashlib.sha256((tmp_path / "genome.txt").read_bytes()).hexdigest() == sha256
    found = {(document.domain, document.head["path"]): document for document in read_text(tmp_path / "genome.txt")}
    assert len(found) == len(ODD) + 12 + 3 + 6
    for (domain, path), document in found.items():
        content = (tmp_path / path).read_bytes()
        assert document.head["sha256"] == hashlib.sha256(content).hexdigest()
        assert domain == path.split("/")[0]
        assert document.content == (None if path == "notes/secret.txt" else content)
    assert TOKEN not in (tmp_path / "genome.txt").read_text()
    assert write_text(genome, tmp_path / "again.txt") == sha256


def test_one_changed_byte_of_the_text_is_found(tmp_path, genome):
    write_text(genome, tmp_path / "genome.txt")
    good = (tmp_path / "genome.txt").read_bytes()
    expected = [(d.domain, d.content) for d in read_text(tmp_path / "genome.txt")]
    bad = tmp_path / "bad.txt"
    for position in range(0, len(good), 41):
        bad.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        try:
            documents = [(d.domain, d.content) for d in read_text(bad)]
        except GenomeCorrupt:
            continue
        else:  # a licence or a split in a head: nothing that a hash covers, and no text
            assert [content for _, content in documents] == [content for _, content in expected]
    for length in range(0, len(good), len(good) // 30):
        bad.write_bytes(good[:length])
        with pytest.raises(GenomeCorrupt):
            list(read_text(bad))
    bad.write_bytes(good + b"x")
    with pytest.raises(GenomeCorrupt, match="Merkle root"):
        list(read_text(bad))


def test_a_document_taken_out_of_the_text_is_missed(tmp_path, genome):
    write_text(genome, tmp_path / "genome.txt")
    lines = (tmp_path / "genome.txt").read_bytes().split(b"\n")
    start = next(number for number, line in enumerate(lines) if line.startswith(b"<|file_start|>"))
    end = lines.index(b"<|file_end|>")
    (tmp_path / "bad.txt").write_bytes(b"\n".join(lines[:start] + lines[end + 1 :]))
    with pytest.raises(GenomeCorrupt, match="Merkle root"):
        list(read_text(tmp_path / "bad.txt"))


def test_croissant_names_files_that_are_there_with_their_hashes(tmp_path, genome):
    write_text(genome, tmp_path / "out.txt")
    told = json.loads(json.dumps(croissant(genome, tmp_path / "out.txt", tmp_path)))
    assert {"@context", "@type", "conformsTo", "name", "description", "license", "url", "datePublished"} <= set(told)
    assert told["license"] == "MIT"
    files = [entry for entry in told["distribution"] if entry["@type"] == "cr:FileObject"]
    for file in files:
        content = (tmp_path / file["contentUrl"]).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
        assert file["contentSize"] == f"{len(content)} B"
    assert {file["@id"] for file in files} == {
        "genome.txt",
        *(f"shards/{d}-{s}.parquet" for d in ("notes", "essays") for s in SPLITS),
    }
    (shards,) = [entry for entry in told["distribution"] if entry["@type"] == "cr:FileSet"]
    assert set(shards["includes"]) == {file["contentUrl"] for file in files} - {"out.txt"}
    (records,) = told["recordSet"]
    import pyarrow.parquet as pq

    columns = set(pq.read_schema(tmp_path / "g" / "shards" / "notes-train.parquet").names)
    assert {field["source"]["extract"]["column"] for field in records["field"]} <= columns


CONTEXT_OF_THE_SPECIFICATION = (  # 1.1, Appendix 1, the terms of Croissant's own
    "annotation arrayShape citeAs column containedIn equivalentProperty excludes extract field fileProperty fileObject fileSet "
    "format includes isArray isLiveDataset jsonPath key md5 parentField recordSet references regex readLines sdVersion "
    "separator source subField transform unArchive value"
)


def test_croissant_has_what_version_1_1_requires(tmp_path, genome):
    write_text(genome, tmp_path / "out.txt")
    told = croissant(genome, tmp_path / "out.txt", tmp_path)
    assert told["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    required = {"@context", "@type", "conformsTo", "description", "license", "name", "url", "creator", "datePublished"}
    assert required | {"distribution", "recordSet", "citeAs"} <= set(told)
    assert {told["@context"][term] for term in CONTEXT_OF_THE_SPECIFICATION.split()} == {
        f"cr:{term}" for term in CONTEXT_OF_THE_SPECIFICATION.split()
    }
    parts = [*told["distribution"], *told["recordSet"], *told["recordSet"][0]["field"]]
    assert len({part["@id"] for part in parts}) == len(parts)
    (shards,) = [part for part in told["distribution"] if part["@type"] == "cr:FileSet"]
    assert set(shards["includes"]) == {part["contentUrl"] for part in told["distribution"] if ".parquet" in part["@id"]}


def test_croissants_own_loader_reads_every_document_that_is_heard(tmp_path, genome):
    """Where it is installed, which nothing here needs it to be."""
    mlcroissant = pytest.importorskip("mlcroissant")
    write_text(genome, tmp_path / "out.txt")
    write_json(tmp_path / "out.json", croissant(genome, tmp_path / "out.txt", tmp_path))
    loaded = mlcroissant.Dataset(jsonld=str(tmp_path / "out.json"))
    assert loaded.metadata.ctx.issues.report() == ""
    read = {record["documents/doc_id"].decode(): record["documents/text"].decode() for record in loaded.records("documents")}
    texts = {document.doc_id: document.text for domain in genome.domains for split in SPLITS
             for document in genome.documents(domain, split)}  # fmt: skip
    assert read == texts


def test_differences_by_kind(tmp_path, genome):
    before = genome.manifest["content"]
    assert differences(before, before) == {}
    (tmp_path / "notes" / "0.txt").write_text(words(900))
    (tmp_path / "notes" / "1.txt").unlink()
    (tmp_path / "essays" / "new.txt").write_text(words(901))
    after = build_genome(spec(exclude=[]), tmp_path / "g2", tmp_path).manifest["content"]
    found = differences(before, after)
    moved = {domain: set(kinds.pop("moved", ())) for domain, kinds in found.items()}
    assert found == {
        "essays": {"added": ["essays/new.txt"]},
        "notes": {"removed": ["notes/1.txt"], "changed": ["notes/0.txt"]},
    }
    splits = [{row["path"]: row["split"] for row in content["documents"]} for content in (before, after)]
    assert set().union(*moved.values()) == {
        path for path in splits[0] if path in splits[1] and splits[0][path] != splits[1][path]
    } - {"notes/0.txt"}
    assert "notes/secret.txt" in moved["notes"]
    backwards = differences(after, before)
    assert backwards["essays"]["removed"] == ["essays/new.txt"]
    relicensed = json.loads(json.dumps(before))
    relicensed["documents"][0]["licence"] = "ISC"
    assert differences(before, relicensed) == {"essays": {"marked": [before["documents"][0]["path"]]}}


def test_every_part_is_sealed_and_only_splits_are_heard(genome):
    assert {part for part in PARTS if list(genome.documents("notes", part))} == set(PARTS)
    assert list(genome.documents("essays", "excluded")) == []
