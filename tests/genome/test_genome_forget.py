"""Forgetting: the text is gone everywhere, what stays is proven as before, and a rebuild does not bring it back."""

import json

import pytest

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.genome.build import build_genome, open_genome, refresh_genome, verify_genome
from chrysalis_ray.genome.differences import differences
from chrysalis_ray.genome.documents import PARTS
from chrysalis_ray.genome.forgetting import forget, near_duplicates, of_licence, of_source
from chrysalis_ray.genome.framing import write_text
from chrysalis_ray.genome.proofs import is_proof, prove
from chrysalis_ray.genome.tombstones import check_gone, read_tombstones, united

DAY = "2026-02-03"


def words(name, count=60):
    return " ".join(f"{name}w{number}" for number in range(count))


@pytest.fixture
def place(tmp_path):
    """Notes and essays as folders, letters as JSON lines; one essay a near-duplicate of another, one under another licence."""
    for folder in ("notes", "essays"):
        (tmp_path / folder).mkdir()
        for number in range(12):
            (tmp_path / folder / f"{number}.txt").write_text(words(f"{folder}{number}x"))
    (tmp_path / "essays" / "twin.txt").write_text(words("essays3x") + " and an end of its own")
    (tmp_path / "essays" / "other.txt").write_text("SPDX-License-Identifier: GPL-3.0-only\n" + words("other"))
    lines = [json.dumps({"text": words(f"letter{number}x")}) for number in range(12)]
    (tmp_path / "letters.jsonl").write_text("\n".join(lines))
    return tmp_path


def spec(**more):
    sources = [
        {"type": "folder", "path": "notes", "domain": "notes", "licence": "CC0-1.0"},
        {"type": "folder", "path": "essays", "domain": "essays", "licence": "MIT"},
        {"type": "jsonl", "path": "letters.jsonl", "domain": "letters", "licence": "MIT"},
    ]
    return GenomeSpec.model_validate({"sources": sources, "split": {"select": 0.2, "report": 0.2}, **more}, strict=False)


@pytest.fixture
def genome(place):
    return build_genome(spec(), place / "g", place)


def rows_of(genome, *paths):
    return [row for row in genome.manifest["content"]["documents"] if row["path"] in paths]


def trained(genome, domain):
    return [
        row["path"] for row in genome.manifest["content"]["documents"] if (row["domain"], row["split"]) == (domain, "train")
    ]


def bytes_below(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_the_text_is_gone_and_the_rest_is_as_it_was(place, genome):
    path = trained(genome, "notes")[0]
    (row,) = rows_of(genome, path)
    before = bytes_below(genome.folder)
    made = forget(genome, [row], place / "g2", "asked by its author", DAY)
    assert bytes_below(genome.folder) == before, "a genome never changes"
    assert made.genome_id != genome.genome_id
    verify_genome(place / "g2")
    documents = [document for domain in made.domains for part in PARTS for document in made.documents(domain, part)]
    old = {row["doc_id"]: row for row in genome.manifest["content"]["documents"]}
    new = {row["doc_id"]: row for row in made.manifest["content"]["documents"]}
    assert new == {doc_id: kept for doc_id, kept in old.items() if doc_id != row["doc_id"]}
    assert {document.doc_id for document in documents} == set(new)
    write_text(made, place / "genome.txt")
    secret = (place / path).read_text()
    assert secret not in (place / "genome.txt").read_text()
    assert secret not in "".join(document.text for document in documents)
    (stone,) = made.manifest["content"]["forgotten"]
    assert (stone["doc_id"], stone["path"], stone["reason"], stone["date"]) == (
        row["doc_id"],
        path,
        "asked by its author",
        DAY,
    )
    assert secret.encode() not in (place / "g2" / "manifest.json").read_bytes()
    assert made.totals()["notes"]["train"]["documents"] == genome.totals()["notes"]["train"]["documents"] - 1


def test_proofs_verify_before_and_after_and_none_is_left_of_what_went(place, genome):
    gone, kept = trained(genome, "notes")[:2]
    made = forget(genome, rows_of(genome, gone), place / "g2", "why", DAY)
    (old_row,), (row,) = rows_of(genome, gone), rows_of(genome, kept)
    old_proof = prove(genome.manifest["content"]["documents"], old_row["doc_id"])
    assert is_proof(old_proof, genome.manifest["content"]["merkle_root"]), "what was proven of the old genome stays proven"
    new_root = made.manifest["content"]["merkle_root"]
    assert not is_proof(old_proof, new_root)
    assert is_proof(prove(made.manifest["content"]["documents"], row["doc_id"]), new_root)
    with pytest.raises(GenomeError, match="has no document"):
        prove(made.manifest["content"]["documents"], old_row["doc_id"])


def test_a_build_with_the_list_is_the_genome_that_forgot(place, genome):
    """Without sources and from sources: the same id, whatever way and in whatever steps it was forgotten."""
    first, second = rows_of(genome, trained(genome, "notes")[0]), rows_of(genome, trained(genome, "letters")[1])
    once = forget(genome, [*first, *second], place / "once", "why", DAY)
    rebuilt = build_genome(spec(forget="once/forgotten.jsonl"), place / "rebuilt", place)
    assert rebuilt.genome_id == once.genome_id
    verify_genome(place / "rebuilt")
    twice = forget(forget(genome, first, place / "a", "why", DAY), second, place / "b", "why", DAY)
    named = {stone["doc_id"] for stone in twice.manifest["content"]["forgotten"]}
    assert named == {row["doc_id"] for row in (*first, *second)}
    assert twice.manifest["content"]["documents"] == once.manifest["content"]["documents"]


def test_a_rebuild_into_its_folder_honours_what_was_forgotten(place, genome):
    row = rows_of(genome, trained(genome, "essays")[0])[0]
    made = forget(genome, [row], place / "g2", "why", DAY)
    assert refresh_genome(spec(), place / "g2", place).genome_id == made.genome_id
    (place / "notes" / "new.txt").write_text(words("new"))
    again = refresh_genome(spec(), place / "g2", place)
    paths = [kept["path"] for kept in again.manifest["content"]["documents"]]
    assert "notes/new.txt" in paths
    assert row["path"] not in paths
    (place / "g2" / "manifest.json").unlink()  # lost: the tombstones beside it still stand
    assert build_genome(spec(), place / "g2", place).genome_id == again.genome_id
    with_list = build_genome(spec(), place / "g", place)
    assert with_list.genome_id == genome.genome_id, "a genome that forgot nothing is found as it is"
    assert build_genome(spec(forget="g2/forgotten.jsonl"), place / "g", place).genome_id == again.genome_id


def test_what_was_forgotten_is_told_apart_from_what_is_only_gone(place, genome):
    path = trained(genome, "notes")[0]
    made = forget(genome, rows_of(genome, path), place / "g2", "why", DAY)
    before, after = genome.manifest["content"], made.manifest["content"]
    assert differences(before, after) == {"notes": {"forgotten": [path]}}
    assert differences(after, before) == {"notes": {"added": [path]}}
    (place / path).unlink()
    gone = build_genome(spec(), place / "g3", place)
    assert differences(before, gone.manifest["content"])["notes"]["removed"] == [path]


def test_sources_and_licences(place, genome):
    assert [row["path"] for row in of_licence(genome, "GPL-*")] == ["essays/other.txt"]
    letters = of_source(genome, "letters.jsonl")
    assert [row["domain"] for row in letters] == ["letters"] * 12
    assert {row["path"] for row in of_source(genome, "essays")} == {
        row["path"] for row in genome.manifest["content"]["documents"] if row["domain"] == "essays"
    }
    made = forget(genome, [*letters, *of_licence(genome, "GPL-*")], place / "g2", "why", DAY)
    assert made.domains == ("essays", "notes"), "a domain can go altogether"
    verify_genome(place / "g2")
    assert build_genome(spec(forget="g2/forgotten.jsonl"), place / "g3", place).genome_id == made.genome_id
    with pytest.raises(GenomeError, match="no document of the source"):
        of_source(made, "letters.jsonl")
    with pytest.raises(GenomeError, match="no document has the licence") as error:
        of_licence(genome, "AGPL-*")
    assert "GPL-3.0-only" in error.value.remedy
    with pytest.raises(GenomeError, match="has no source 'letter'") as error:
        of_source(genome, "letter")
    assert "letters.jsonl" in error.value.remedy


def test_near_duplicates_that_stay_are_told(genome):
    rows = genome.manifest["content"]["documents"]
    (twin,), (other,) = rows_of(genome, "essays/twin.txt"), rows_of(genome, "essays/3.txt")
    assert [row["path"] for row in near_duplicates(rows, {other["doc_id"]})] == ["essays/twin.txt"]
    assert [row["path"] for row in near_duplicates(rows, {twin["doc_id"]})] == ["essays/3.txt"]
    assert near_duplicates(rows, {twin["doc_id"], other["doc_id"]}) == []


def test_what_cannot_be_forgotten_is_refused_and_nothing_is_written(place, genome):
    rows = genome.manifest["content"]["documents"]
    judges = [row for row in rows if (row["domain"], row["split"]) == ("notes", "select")]
    cases = [
        (judges, "why", DAY, "domain 'notes' would have no 'select' document left"),
        (rows, "why", DAY, "every document would be forgotten"),
        ([], "why", DAY, "nothing to forget"),
        (rows[:1], " ", DAY, "needs a reason"),
        (rows[:1], "why", "yesterday", "is no date"),
        (rows[:1], "why", "20260131", "is no date"),
    ]
    for chosen, reason, day, words_of_it in cases:
        with pytest.raises(GenomeError, match=words_of_it):
            forget(genome, chosen, place / "g2", reason, day)
    assert not (place / "g2").exists()
    with pytest.raises(GenomeError, match=r"a genome in .* already"):
        forget(genome, rows_of(genome, trained(genome, "notes")[0]), genome.folder, "why", DAY)
    assert open_genome(genome.folder).genome_id == genome.genome_id


@pytest.mark.parametrize(
    ("line", "words_of_it"),
    [
        ("no json", "not a line of JSON"),
        ("[1]", "its doc_id is no sha256"),
        ('{"doc_id": "12"}', "its doc_id is no sha256"),
        (json.dumps({"doc_id": "a" * 64, "date": DAY}), "gives no reason"),
        (json.dumps({"doc_id": "a" * 64, "reason": "x", "date": "soon"}), "is no date"),
        (json.dumps({"doc_id": "a" * 64, "reason": "x", "date": "20260131"}), "is no date"),
        (json.dumps({"doc_id": "a" * 64, "reason": "x", "date": DAY, "text": "y"}), "holds no text"),
        ("[" * 100_000, "not a line of JSON"),
    ],
)
def test_a_list_that_is_none_is_named_by_file_and_line(place, line, words_of_it):
    good = json.dumps({"doc_id": "b" * 64, "reason": "x", "date": DAY})
    (place / "list.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(GenomeError, match=rf"list\.jsonl:3: .*{words_of_it}"):
        build_genome(spec(forget="list.jsonl"), place / "g", place)
    assert not (place / "g").exists()


def test_a_missing_list_and_one_of_documents_never_seen(place):
    with pytest.raises(GenomeError, match=r"forget list .*absent\.jsonl cannot be read"):
        build_genome(spec(forget="absent.jsonl"), place / "g", place)
    (place / "list.jsonl").write_text(json.dumps({"doc_id": "b" * 64, "reason": "x", "date": DAY}))
    made = build_genome(spec(forget="list.jsonl"), place / "g", place)
    assert made.manifest["content"]["forgotten"] == read_tombstones(place / "list.jsonl"), "it must never come in"


def test_the_earliest_tombstone_stands():
    early, late = ({"doc_id": "a" * 64, "reason": "r", "date": f"2026-01-0{day}"} for day in (1, 2))
    assert united([late], [early]) == united([early], [late]) == [early]


def test_a_manifest_that_holds_what_it_forgot_is_corrupt(genome):
    row = genome.manifest["content"]["documents"][0]
    content = {**genome.manifest["content"], "forgotten": [{"doc_id": row["doc_id"]}]}
    with pytest.raises(GenomeCorrupt, match="was forgotten and is among"):
        check_gone(content)
