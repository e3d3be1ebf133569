"""Sealing: ids, splits, corruption, sources."""

import hashlib
import json
import os
import random
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.genome.build import build_genome, open_genome, verify_genome
from chrysalis_ray.genome.documents import SPLITS, make_document
from chrysalis_ray.genome.sealing import leaf_hash, merkle_root
from chrysalis_ray.genome.splits import assign_splits, kin_groups


def prose(number: int, length: int = 60) -> str:
    """Text that shares no word with another number's."""
    return " ".join(f"word{random.Random(number * 1000 + i).randrange(40)}of{number}" for i in range(length)) + "\n"


def write_files(folder, count=12, suffix=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"file{number}{suffix}").write_text(prose(number + 1000 * len(suffix)))
    return folder


def spec(*sources, **more):
    return GenomeSpec.model_validate({"sources": list(sources), **more})


def folder_source(path="notes", domain="notes", **more):
    return {"type": "folder", "path": str(path), "domain": domain, **more}


# Merkle tree


def reference_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word by word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\1" + reference_root(leaves[:k]) + reference_root(leaves[k:])).digest()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 100])
def test_merkle_root_is_that_of_the_definition(count):
    rows = [(f"p{i}", hashlib.sha256(bytes([i])).hexdigest(), i) for i in range(count)]
    expected = reference_root([f"{path}\0{sha}\0{size}".encode() for path, sha, size in rows])
    assert merkle_root([leaf_hash(*row) for row in rows]) == expected.hex()


def test_merkle_root_of_the_published_vectors():
    """The test vectors of the certificate-transparency project: eight inputs and the roots of their prefixes."""
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    roots = {
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    leaves = [hashlib.sha256(b"\0" + bytes.fromhex(text)).digest() for text in inputs]
    assert {count: merkle_root(leaves[:count]) for count in roots} == roots


# building


def test_same_genome_for_any_order_of_sources_and_files(tmp_path):
    write_files(tmp_path / "notes")
    write_files(tmp_path / "code", suffix=".py")
    one, two = folder_source(), folder_source("code", "code")
    first = build_genome(spec(one, two), tmp_path / "g1", tmp_path)
    for path in sorted((tmp_path / "notes").iterdir(), reverse=True):
        path.write_bytes(path.read_bytes())
    second = build_genome(spec(two, one), tmp_path / "g2", tmp_path)
    assert first.genome_id == second.genome_id
    assert first.domains == ("code", "notes")
    for shard in (tmp_path / "g1" / "shards").iterdir():
        assert shard.read_bytes() == (tmp_path / "g2" / "shards" / shard.name).read_bytes()


def test_a_sealed_genome_is_reused_and_another_recipe_replaces_it(tmp_path):
    write_files(tmp_path / "notes")
    first = build_genome(spec(folder_source()), tmp_path / "g", tmp_path)
    written = (tmp_path / "g" / "manifest.json").stat().st_mtime_ns
    again = build_genome(spec(folder_source()), tmp_path / "g", tmp_path)
    assert again.genome_id == first.genome_id
    assert (tmp_path / "g" / "manifest.json").stat().st_mtime_ns == written
    other = build_genome(spec(folder_source(domain="essays")), tmp_path / "g", tmp_path)
    assert other.domains == ("essays",)
    assert {path.name for path in (tmp_path / "g" / "shards").iterdir()} == {f"essays-{split}.parquet" for split in SPLITS}


def test_documents_come_back_as_they_went_in(tmp_path):
    write_files(tmp_path / "notes")
    (tmp_path / "notes" / "windows.txt").write_bytes("one\r\ntwo\rthree\u2028\n".encode())
    genome = build_genome(spec(folder_source(licence="MIT")), tmp_path / "g", tmp_path)
    found = {d.path: d for split in SPLITS for d in genome.documents("notes", split)}
    assert len(found) == 13
    for path, document in found.items():
        content = (tmp_path / path).read_bytes()
        assert document.text.encode() == content
        assert document.doc_id == hashlib.sha256(content).hexdigest()
    assert genome.licences() == {"notes": "MIT"}
    assert sum(of_split["documents"] for of_split in genome.totals()["notes"].values()) == 13
    manifest = json.loads((tmp_path / "g" / "manifest.json").read_text())
    assert {row["doc_id"] for row in manifest["content"]["documents"]} == {d.doc_id for d in found.values()}


def test_one_changed_byte_anywhere_is_found(tmp_path):
    write_files(tmp_path / "notes")
    build_genome(spec(folder_source()), tmp_path / "good", tmp_path)
    for name in ["manifest.json", *(f"shards/notes-{split}.parquet" for split in SPLITS)]:
        bad = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", bad)
        content = bytearray((bad / name).read_bytes())
        where = content.index(b'"doc_id": "') + 12 if name == "manifest.json" else len(content) // 2
        content[where] ^= 1
        (bad / name).write_bytes(bytes(content))
        with pytest.raises(GenomeCorrupt, match=name.split("/")[-1]):
            open_genome(bad)
        with pytest.raises(GenomeCorrupt):
            verify_genome(bad)
        shutil.rmtree(bad)
    assert verify_genome(tmp_path / "good").domains == ("notes",)


def test_a_shard_swapped_together_with_its_hash_is_found_by_verify(tmp_path):
    write_files(tmp_path / "notes")
    build_genome(spec(folder_source()), tmp_path / "g", tmp_path)
    manifest = json.loads((tmp_path / "g" / "manifest.json").read_text())
    shards = tmp_path / "g" / "shards"
    shutil.copy(shards / "notes-select.parquet", shards / "notes-train.parquet")
    manifest["shards"]["shards/notes-train.parquet"] = manifest["shards"]["shards/notes-select.parquet"]
    (tmp_path / "g" / "manifest.json").write_text(json.dumps(manifest))
    open_genome(tmp_path / "g")
    with pytest.raises(GenomeCorrupt, match=r"notes-train\.parquet: document"):
        verify_genome(tmp_path / "g")


def test_a_build_that_died_before_its_manifest_is_built_again(tmp_path):
    write_files(tmp_path / "notes")
    first = build_genome(spec(folder_source()), tmp_path / "g", tmp_path)
    (tmp_path / "g" / "manifest.json").unlink()
    (tmp_path / "g" / "shards" / "notes-train.parquet").write_bytes(b"half a shard")
    (tmp_path / "g" / "shards" / "other-train.parquet").write_bytes(b"of another recipe")
    assert build_genome(spec(folder_source()), tmp_path / "g", tmp_path).genome_id == first.genome_id
    assert verify_genome(tmp_path / "g").genome_id == first.genome_id
    assert len(list((tmp_path / "g" / "shards").iterdir())) == 3


def test_missing_genome_and_unknown_domain(tmp_path):
    with pytest.raises(GenomeError, match=r"no manifest\.json"):
        open_genome(tmp_path)
    write_files(tmp_path / "notes")
    genome = build_genome(spec(folder_source()), tmp_path / "g", tmp_path)
    with pytest.raises(GenomeError, match="notes"):
        next(genome.documents("note", "train"))


# splits


def test_code_and_docstrings_of_one_file_share_a_split(tmp_path):
    genome = build_genome(
        spec({"type": "python", "domains": ["code", "docstrings", "comments", "bytecode"], "max_megabytes": 0.08}),
        tmp_path / "g", tmp_path,
    )  # fmt: skip
    split_of: dict[str, str] = {}
    shared = set()
    for domain in genome.domains:
        for split in SPLITS:
            documents = list(genome.documents(domain, split))
            assert documents
            for document in documents:
                shared |= {document.source_key} if document.source_key in split_of else set()
                assert split_of.setdefault(document.source_key, split) == split
    assert shared


def test_near_duplicates_never_straddle_a_split():
    documents = []
    for number in range(40):
        text = prose(number, 200)
        documents.append(make_document(text, f"{number}", f"{number}", "d", "MIT"))
        documents.append(make_document(text[: len(text) * 3 // 4] + "the end", f"{number}copy", f"{number}copy", "d", "MIT"))
    groups = kin_groups(documents)
    assert all(groups[f"{number}"] == groups[f"{number}copy"] for number in range(40))
    assert len(set(groups.values())) == 40
    assert kin_groups(documents[::-1]) == groups


@given(st.integers(3, 30), st.integers(1, 3), st.integers(0, 10**9))
def test_every_domain_with_three_independent_sources_has_every_split(count, domains, salt):
    documents = [
        make_document(f"{domain} {key}", "p", f"{salt}/{domain}/{key}", f"d{domain}", "MIT")
        for domain in range(domains)
        for key in range(count)
    ]
    groups = {document.source_key: document.source_key for document in documents}
    splits = assign_splits(documents, groups, 0.06, 0.06)
    for domain in range(domains):
        assert {splits[f"{salt}/{domain}/{key}"] for key in range(count)} == set(SPLITS)
    assert assign_splits(documents[::-1], groups, 0.06, 0.06) == splits


def test_two_sources_are_too_few_to_split(tmp_path):
    write_files(tmp_path / "notes", count=2)
    with pytest.raises(GenomeError, match="2 independent sources"):
        build_genome(spec(folder_source()), tmp_path / "g", tmp_path)
    assert not (tmp_path / "g" / "manifest.json").exists()


def test_large_domains_get_the_shares_that_were_asked_for():
    documents = [make_document(f"text {i}", "p", f"k{i}", "d", "MIT") for i in range(4000)]
    groups = {document.source_key: document.source_key for document in documents}
    splits = list(assign_splits(documents, groups, 0.1, 0.2).values())
    assert abs(splits.count("select") / 4000 - 0.1) < 0.02
    assert abs(splits.count("report") / 4000 - 0.2) < 0.02


# folder


def test_what_is_no_text_is_left_out_and_counted_and_what_is_no_utf8_is_kept_apart(tmp_path):
    notes = write_files(tmp_path / "notes")
    (notes / "image.bin").write_bytes(b"\x89PNG\0\0")
    (notes / "latin.txt").write_bytes("café".encode("latin-1"))
    (notes / "blank.txt").write_text(" \n")
    (notes / "twin.txt").write_bytes((notes / "file1.txt").read_bytes())
    (notes / ".git").mkdir()
    (notes / ".git" / "config").write_text("private")
    (tmp_path / "secret.txt").write_text("outside the folder")
    (notes / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "more.txt").write_text("outside too")
    (notes / "linked").symlink_to(tmp_path / "elsewhere")
    (notes / "loop").symlink_to(notes)
    (notes / "broken").symlink_to(notes / "nowhere")
    os.mkfifo(notes / "pipe")
    genome = build_genome(spec(folder_source()), tmp_path / "g", tmp_path)
    assert genome.manifest["content"]["skipped"] == {"duplicate": 1, "empty": 1, "not_text": 1, "outside": 1}
    assert len(genome.manifest["content"]["documents"]) == 13
    (latin,) = genome.documents("notes", "excluded")
    assert (latin.path, latin.content, set(latin.marks)) == ("notes/latin.txt", "café".encode("latin-1"), {"not_utf8"})


def test_glob_chooses_files(tmp_path):
    write_files(tmp_path / "notes" / "deep" / "er", suffix=".md")
    write_files(tmp_path / "notes", suffix=".txt")

    def paths(glob):
        genome = build_genome(spec(folder_source(glob=glob)), tmp_path / "g", tmp_path)
        return {row["path"].split("/")[-1].split(".")[-1] for row in genome.manifest["content"]["documents"]}

    assert paths("**/*.md") == {"md"}
    assert paths("*.txt") == {"txt"}
    assert paths("deep/**/*.md") == {"md"}
    assert paths("**/*") == {"md", "txt"}
    with pytest.raises(GenomeError, match="no document in 'notes'"):
        paths("*.md")


def test_a_cap_takes_a_spread_and_is_kept(tmp_path):
    write_files(tmp_path / "notes", count=60)
    size = (tmp_path / "notes" / "file7.txt").stat().st_size
    genome = build_genome(spec(folder_source(max_megabytes=size * 20 / 1e6)), tmp_path / "g", tmp_path)
    rows = genome.manifest["content"]["documents"]
    assert 15 <= len(rows) <= 22
    assert sum(row["bytes"] for row in rows) <= size * 20
    assert genome.manifest["content"]["skipped"]["over_cap"] > 0


def test_empty_and_missing_folders_are_errors_with_a_remedy(tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(GenomeError, match="no document in 'notes'") as error:
        build_genome(spec(folder_source()), tmp_path / "g", tmp_path)
    assert "glob" in error.value.remedy
    with pytest.raises(GenomeError, match="is no folder"):
        build_genome(spec(folder_source("nowhere")), tmp_path / "g", tmp_path)


# JSON lines


def jsonl_source(**more):
    return {"type": "jsonl", "path": "rows.jsonl", "domain": "rows", **more}


def test_jsonl_rows_are_documents(tmp_path):
    lines = [json.dumps({"text": prose(number), "other": number}) for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, "", json.dumps({"text": ""})]))
    genome = build_genome(spec(jsonl_source()), tmp_path / "g", tmp_path)
    texts = {document.text for split in SPLITS for document in genome.documents("rows", split)}
    assert texts == {prose(number) for number in range(20)}
    assert genome.manifest["content"]["skipped"] == {"empty": 1}
    assert genome.manifest["content"]["documents"][0]["path"].startswith("rows.jsonl#")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"rows\.jsonl:3: not JSON"),
        (b'{"body": "x"}', r"rows\.jsonl:3: no key 'text'; it has \['body'\]"),
        (b'["x"]', r"rows\.jsonl:3: a JSON object is wanted, this is list"),
        (b'{"text": 7}', r"rows\.jsonl:3: 'text' is int, not text"),
        (b'{"text": "\\ud800"}', r"rows\.jsonl:3: a lone surrogate at character 0"),
        (b'{"text": "\xff"}', r"rows\.jsonl:3: not UTF-8"),
        (b"[" * 100_000, r"rows\.jsonl:3: JSON nested too deeply"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(tmp_path, line, message):
    good = json.dumps({"text": prose(1)}).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good, good, line, good]))
    with pytest.raises(GenomeError, match=message):
        build_genome(spec(jsonl_source()), tmp_path / "g", tmp_path)


def test_missing_jsonl(tmp_path):
    with pytest.raises(GenomeError, match="is no file"):
        build_genome(spec(jsonl_source()), tmp_path / "g", tmp_path)
