"""Records of healing hubs: how complete they are, what consent allows, and that no split holds what was not consented to."""

import json
from hashlib import sha256

import pytest
from typer.testing import CliRunner

from chrysalis_ray.cli.main import app
from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.config.records import WANTED, HubRecord
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.genome.build import build_genome, open_genome, refresh_genome, verify_genome
from chrysalis_ray.genome.documents import PARTS
from chrysalis_ray.genome.sealing import place_shards, write_shard
from chrysalis_ray.genome.sources.hub_records import as_prose

PLANTS = ["larch", "beech", "alder", "rowan", "maple", "birch", "hazel", "cedar", "olive", "peach", "plum", "quince"]


def record(number, **changes):
    """A whole record, of words of its own."""
    name = PLANTS[number % len(PLANTS)]
    own = " ".join(f"{name}{number}word{word}" for word in range(30))
    whole = {
        "kind": "food",
        "activity": f"{name} garden",
        "context": f"a yard, {own}",
        "place": "u33db8xq",
        "start": "2026-01-02",
        "end": "2026-03-04",
        "action": f"planted {name}, {own[::-1]}",
        "measures": [
            {"name": "harvest", "unit": "kg", "before": 0.0, "after": 1.5 + number, "method": "weighed", "instrument": "scale",
             "uncertainty": 0.1}
        ],
        "outcome": f"people ate {name}",
        "consent": {"training": True},
        "licence": "CC-BY-4.0",
        "provenance": f"notebook {number}",
    }  # fmt: skip
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}


def spec(**more):
    source = {"type": "records", "path": "hub.jsonl", "domain": "hubs", "licence": "CC0-1.0"}
    return GenomeSpec.model_validate({"sources": [{**source, **more.pop("source", {})}], **more}, strict=False)


def written(folder, records):
    (folder / "hub.jsonl").write_text("\n".join(json.dumps(entry) for entry in records))
    return folder


def parts_of(genome):
    return {row["path"]: row["split"] for row in genome.manifest["content"]["documents"]}


def test_a_record_is_told_as_prose_and_the_place_is_as_coarse_as_consent_says():
    whole = HubRecord.model_validate_json(json.dumps(record(0, context="a yard", action="planted")))
    assert as_prose(whole) == (
        "Food hub: larch garden\nPlace: u33db\nTime: 2026-01-02 to 2026-03-04\nContext: a yard\nAction: planted\n"
        "Measured: harvest, before 0 kg, after 1.5 kg, within 0.1 kg, by weighed, with scale\n"
        "Outcome: people ate larch\nSource: notebook 0\n"
    )
    for characters in range(13):
        told = as_prose(HubRecord.model_validate(record(0, consent={"training": True, "place_characters": characters})))
        kept = "u33db8xq"[:characters]
        assert ("Place: " in told) == bool(kept)
        assert not kept or f"Place: {kept}\n" in told
    assert "u33" not in as_prose(HubRecord.model_validate(record(0, consent=None)))
    assert HubRecord.model_validate(record(0)).missing == ()


def test_completeness_is_counted(tmp_path):
    """Each of the twelve parts taken away once from a whole record: one missing each time."""
    records = [record(number, **{WANTED[number]: None}) for number in range(len(WANTED))]
    records += [record(40 + number) for number in range(4)]
    records += [{"outcome": "only an outcome " + record(50)["context"], "consent": {"training": True}}]
    genome = build_genome(spec(), written(tmp_path, records) / "g", tmp_path)
    (line,) = genome.manifest["content"]["sources"]
    wanted = len(WANTED) * len(records)
    assert line["records"] == {
        "records": 17,
        "wanted": wanted,
        "filled": wanted - 12 - 10,
        "missing": {name: 2 if name not in ("outcome", "consent") else 1 for name in WANTED},
        "incomplete": 1,
        "denied": 1,
    }
    marks = {row["path"]: row.get("marks", {}) for row in genome.manifest["content"]["documents"]}
    assert marks["hub.jsonl#17"] == {
        "incomplete": f"2 of 12; no {', '.join(n for n in WANTED if n not in ('outcome', 'consent'))}"
    }
    shown = CliRunner().invoke(app, ["genome", "show", str(tmp_path / "g")])
    assert "complete to 89% (missing: action 2 times" in shown.stdout
    assert "1 incomplete, 1 without consent to training" in shown.stdout


@pytest.mark.parametrize("exclude", [[], ["secret"], None])
def test_without_consent_no_split_whatever_exclude_says(tmp_path, exclude):
    denied = {3: None, 5: {"training": False}, 7: {"training": False, "by": "the gardener"}}
    records = [record(number, **({"consent": denied[number]} if number in denied else {})) for number in range(12)]
    for number in denied:
        records[number] = {key: value for key, value in records[number].items() if value is not None}
    more = {} if exclude is None else {"exclude": exclude}
    genome = build_genome(spec(**more), written(tmp_path, records) / "g", tmp_path)
    verify_genome(tmp_path / "g")
    parts = parts_of(genome)
    assert {path for path, part in parts.items() if part == "excluded"} == {f"hub.jsonl#{number + 1}" for number in denied}
    sealed = {document.path: document for part in PARTS for document in genome.documents("hubs", part)}
    assert sealed["hub.jsonl#4"].marks == {"use_denied": "no consent is noted"}
    assert sealed["hub.jsonl#6"].marks == {"use_denied": "consent to training was not given"}
    assert sealed["hub.jsonl#1"].marks == {}
    assert sealed["hub.jsonl#1"].licence == "CC-BY-4.0"
    assert sealed["hub.jsonl#1"].evidence == "record"


def test_other_marks_do_not_wash_a_denial_away(tmp_path):
    """`scan` finds an address in a record without consent: it bears both marks."""
    records = [record(number) for number in range(8)]
    records.append({**record(9, consent=None), "provenance": "told by larva@garden-of-larvae.org"})
    genome = build_genome(spec(), written(tmp_path, records) / "g", tmp_path)
    row = next(row for row in genome.manifest["content"]["documents"] if row["path"] == "hub.jsonl#9")
    assert set(row["marks"]) == {"use_denied", "pii"}
    assert row["split"] == "excluded"


def test_incomplete_records_train_unless_excluded(tmp_path):
    records = [record(number) for number in range(8)] + [{"action": record(9)["action"], "consent": {"training": True}}]
    kept = build_genome(spec(), written(tmp_path, records) / "g", tmp_path)
    assert parts_of(kept)["hub.jsonl#9"] != "excluded"
    strict = build_genome(spec(exclude=["incomplete"]), tmp_path / "g2", tmp_path)
    assert parts_of(strict)["hub.jsonl#9"] == "excluded"
    lenient = build_genome(spec(source={"complete_from": 0.1}, exclude=["incomplete"]), tmp_path / "g3", tmp_path)
    assert parts_of(lenient)["hub.jsonl#9"] != "excluded"


def test_a_changed_record_is_seen_and_records_that_tell_nothing_are_counted(tmp_path):
    records = [record(number) for number in range(8)] + [{"kind": "food", "consent": {"training": True}}]
    first = refresh_genome(spec(), written(tmp_path, records) / "g", tmp_path)
    assert first.manifest["content"]["skipped"] == {"empty": 1}
    records[0]["consent"] = {"training": False}
    second = refresh_genome(spec(), written(tmp_path, records) / "g", tmp_path)
    assert parts_of(second)["hub.jsonl#1"] == "excluded"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Invalid JSON"),
        ("[1]", "valid dictionary or object|be an object|valid dictionary"),
        ('{"kind": "bank"}', "kind: Input should be 'food'"),
        ('{"colour": "red"}', "colour: Extra inputs"),
        ('{"consent": true}', "consent: Input should be an object"),
        ('{"consent": {"training": "yes"}}', "consent.training: Input should be a valid boolean"),
        ('{"consent": {"training": true, "place_characters": 13}}', "place_characters: Input should be less"),
        ('{"place": "Berlin"}', "place: String should match"),
        ('{"start": "soon"}', "start: .*is no date"),
        ('{"start": "2026-01-05", "end": "20260101"}', "end: .*is no date"),
        ('{"start": "2026-W01-1"}', "start: .*is no date"),
        ('{"start": "2026-02-01", "end": "2026-01-01"}', "ends .* before it starts"),
        ('{"measures": [{"name": "x", "before": NaN}]}', "measures.0.before"),
        ('{"measures": [{"name": "x", "before": "1 kg"}]}', "measures.0.before"),
        ('{"action": "\\ud800"}', "Invalid JSON"),
        ('{"media": [{"sha256": "12"}]}', "media.0.sha256"),
        ("[" * 5000, "Invalid JSON"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_named_by_file_and_line(tmp_path, line, words):
    (tmp_path / "hub.jsonl").write_text(json.dumps(record(0)) + "\n\n" + line + "\n")
    with pytest.raises(GenomeError, match=rf"hub\.jsonl:3: no hub record: .*({words})"):
        build_genome(spec(), tmp_path / "g", tmp_path)
    assert not (tmp_path / "g").exists()


def test_bytes_that_are_no_utf8_and_a_missing_file(tmp_path):
    with pytest.raises(GenomeError, match="is no file"):
        build_genome(spec(), tmp_path / "g", tmp_path)
    (tmp_path / "hub.jsonl").write_bytes(b'{"action": "caf\xe9"}\n')
    with pytest.raises(GenomeError, match=r"hub\.jsonl:1: no hub record"):
        build_genome(spec(), tmp_path / "g", tmp_path)


def test_a_refusal_stands_when_another_source_changed_and_the_records_were_not_read_again(tmp_path):
    folder = written(tmp_path, [record(n, consent={"training": n != 3}) for n in range(12)])
    (folder / "notes.txt").write_text("\n".join(f"a note of its own number {n}" for n in range(40)))
    extra = {"type": "folder", "path": ".", "glob": "*.txt", "domain": "hubs", "licence": "CC0-1.0"}
    sources = [spec().sources[0].model_dump(mode="json"), extra]
    both = GenomeSpec.model_validate({"sources": sources, "split": {"select": 0.2, "report": 0.2}}, strict=False)
    first = refresh_genome(both, tmp_path / "genome", folder)
    (folder / "notes.txt").write_text("another note altogether, which has not been here before")
    second = refresh_genome(both, tmp_path / "genome", folder)
    assert first.genome_id != second.genome_id
    for genome in (first, second):
        denied = [row for row in genome.manifest["content"]["documents"] if "use_denied" in row.get("marks", {})]
        assert [row["split"] for row in denied] == ["excluded"]


def test_media_are_sealed_by_their_hashes_and_of_a_known_modality(tmp_path):
    """What cannot be read here is evidence all the same: whose it is, what kind of thing, and its hash."""
    media = [{"sha256": "a" * 64, "kind": "photograph", "modality": "visual"}, {"sha256": "b" * 64}]
    written(tmp_path, [record(number, **({"media": media} if number == 2 else {})) for number in range(9)])
    genome = build_genome(spec(), tmp_path / "g", tmp_path)
    (source,) = genome.manifest["content"]["sources"]
    assert source["records"]["media"] == [{"of": "hub.jsonl#3", **media[0]}, {"of": "hub.jsonl#3", **media[1]}]
    shown = CliRunner().invoke(app, ["genome", "show", str(tmp_path / "g")]).stdout
    assert "2 media kept elsewhere, named by their hashes" in shown
    written(tmp_path, [record(number) for number in range(9)])
    assert "media" not in build_genome(spec(), tmp_path / "h", tmp_path).manifest["content"]["sources"][0]["records"]
    written(tmp_path, [record(0, media=[{"sha256": "a" * 64, "modality": "smell"}])])
    with pytest.raises(GenomeError, match=r"hub.jsonl:1: no hub record: media\.0\.modality"):
        build_genome(spec(), tmp_path / "i", tmp_path)


def test_a_records_own_json_is_sealed_beside_its_prose_and_trained_on_never(tmp_path):
    """Byte for byte where consent allows all of it; otherwise with the place cut, and no hash that would tell it."""
    allowed = {"training": True, "place_characters": 12}
    records = [record(number, consent=allowed) for number in range(10)]
    lines = [json.dumps(entry, indent=None, separators=(" ,", ": ")) + " " for entry in records]
    lines[1] = lines[1].replace('"kg"', '"\\u006bg"')  # written otherwise than any writer would again
    lines += [json.dumps(record(10)), json.dumps(record(11, consent=None)), json.dumps(record(12, place=None))]
    (tmp_path / "hub.jsonl").write_bytes("\r\n".join(lines).encode())
    genome = refresh_genome(spec(), tmp_path / "g", tmp_path)
    verify_genome(tmp_path / "g")
    rows = {row["path"]: row for row in genome.manifest["content"]["documents"]}
    sealed = {document.path: document for part in PARTS for document in genome.documents("hubs", part)}
    for number in (*range(10), 12):
        kept = sealed[f"hub.jsonl#{number + 1}"].record.encode()
        assert kept == lines[number].encode()
        assert rows[f"hub.jsonl#{number + 1}"]["record"] == {"sha256": sha256(kept).hexdigest(), "bytes": len(kept)}
    assert json.loads(sealed["hub.jsonl#11"].record) == {**record(10), "place": "u33db"}
    assert json.loads(sealed["hub.jsonl#12"].record) == {k: v for k, v in record(11, consent=None).items() if k != "place"}
    manifest, fine = (tmp_path / "g" / "manifest.json").read_text(), sha256(lines[10].encode()).hexdigest()
    assert fine not in manifest
    assert not any("{" in document.text for document in sealed.values())
    told = CliRunner().invoke(app, ["genome", "show", str(tmp_path / "g"), "hub.jsonl#2", "--json"])
    assert json.loads(told.stdout)["record"]["json"] == lines[1]

    again = refresh_genome(spec(), tmp_path / "h", tmp_path)
    (tmp_path / "h" / "state.json").unlink()
    assert refresh_genome(spec(), tmp_path / "h", tmp_path).genome_id == again.genome_id == genome.genome_id


def test_one_changed_character_of_a_record_is_found(tmp_path):
    """Also where the shard's own hash was changed with it."""
    genome = build_genome(spec(), written(tmp_path, [record(number) for number in range(9)]) / "g", tmp_path)
    name = "shards/hubs-train.parquet"
    documents = list(genome.documents("hubs", "train"))
    other = [document.changed(record=document.record.replace("food", "mood")) for document in documents]
    shards = {**genome.manifest["shards"], name: write_shard(tmp_path / "g" / name, other)}
    place_shards(tmp_path / "g", shards)
    manifest = {**genome.manifest, "shards": shards}
    (tmp_path / "g" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(GenomeCorrupt, match="is not as sealed"):
        verify_genome(tmp_path / "g")


def test_two_records_that_are_told_alike_keep_the_json_of_both(tmp_path):
    records = [record(number) for number in range(8)]
    records += [record(3, consent={"training": True, "by": "the gardener"})]
    genome = build_genome(spec(), written(tmp_path, records) / "g", tmp_path)
    kept = {document.path: document.record for part in PARTS for document in genome.documents("hubs", part)}
    assert "hub.jsonl#9" not in kept
    assert sorted(json.loads(line)["consent"].get("by", "") for line in kept["hub.jsonl#4"].split("\n")) == ["", "the gardener"]


def test_a_forgotten_record_leaves_no_json(tmp_path):
    genome = build_genome(spec(), written(tmp_path, [record(number) for number in range(12)]) / "g", tmp_path)
    row = next(row for row in genome.manifest["content"]["documents"] if row["split"] == "train")
    asked = ["genome", "forget", str(tmp_path / "g"), row["doc_id"], "--reason", "asked", "--out", str(tmp_path / "f")]
    told = CliRunner().invoke(app, [*asked, "--runs", str(tmp_path)])
    assert told.exit_code == 0, told.output
    left = open_genome(tmp_path / "f")
    assert len(left.manifest["content"]["documents"]) == 11
    records = [document.record for part in PARTS for document in left.documents("hubs", part)]
    assert len(records) == 11
    assert all(records)
    assert row["record"]["sha256"] not in {sha256(kept.encode()).hexdigest() for kept in records}
    verify_genome(tmp_path / "f")


@pytest.mark.parametrize("line", ['{"action": "a", "action": "b"}', '{"consent": {"training": false, "training": true}}'])
def test_a_key_said_twice_is_refused(tmp_path, line):
    (tmp_path / "hub.jsonl").write_text(json.dumps(record(0)) + "\n" + line + "\n")
    with pytest.raises(GenomeError, match=r"hub\.jsonl:2: no hub record: it says '(action|training)' twice"):
        build_genome(spec(), tmp_path / "g", tmp_path)
