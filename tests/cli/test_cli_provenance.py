"""What a genome tells of where its text comes from: by names that archives know, by a card, and by being made again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from chrysalis_ray.genome.build import open_genome
from chrysalis_ray.genome.data_card import data_card
from chrysalis_ray.genome.documents import PARTS
from chrysalis_ray.genome.swhid import swhid_of
from tests.cli.test_cli_genome import built, chrysalis, place

__all__ = ["built", "place"]  # fixtures


def test_names_of_software_heritage_are_those_of_git(place: Path, built: Path) -> None:
    (place / "bytes").write_bytes(b"\xef\xbb\xbfcaf\xe9\r\n")
    for file in (place / "bytes", place / "notes" / "3.txt"):
        told = subprocess.run(["git", "hash-object", "--no-filters", str(file)], capture_output=True, text=True, check=True)
        assert swhid_of(file.read_bytes()) == f"swh:1:cnt:{told.stdout.strip()}"
    assert swhid_of(b"") == "swh:1:cnt:e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # the empty blob, in every repository
    shown = chrysalis("genome", "show", built, "notes/3.txt", "--json")
    assert json.loads(shown.stdout)["swhid"] == swhid_of((place / "notes" / "3.txt").read_bytes())


def test_a_genome_comes_out_of_its_sources_again_or_it_is_told_what_differs(place: Path, built: Path) -> None:
    again = ("genome", "verify", built, "--rebuild", place / "small.yaml")
    done = chrysalis(*again)
    assert done.exit_code == 0, done.output
    assert "is intact: 1 domain (notes)" in done.stdout
    assert done.stdout.endswith("it comes out of its sources again\n")
    before = {path: path.read_bytes() for path in built.rglob("*") if path.is_file()}
    (place / "notes" / "3.txt").write_text("another text")
    (place / "notes" / "new.txt").write_text(" ".join(f"new{word}" for word in range(50)))
    changed = chrysalis(*again)
    assert changed.exit_code == 1
    assert "notes has 1 added, 1 changed" in changed.stderr
    assert "is intact" in changed.stdout  # which is another question
    (place / "small.yaml").write_text((place / "small.yaml").read_text().replace("genome:\n", "genome:\n  exclude: [pii]\n"))
    assert "it is another recipe" in chrysalis(*again).stderr
    assert {path: path.read_bytes() for path in built.rglob("*") if path.is_file()} == before
    assert chrysalis("genome", "verify", built).exit_code == 0  # it is what it was, whatever its sources say


def test_what_was_forgotten_stays_forgotten_when_it_is_made_again(place: Path, built: Path) -> None:
    rows = open_genome(built).manifest["content"]["documents"]
    gone, out = next(row["path"] for row in rows if row["split"] == "train"), place / "less"
    (place / "runs").mkdir()
    done = chrysalis("genome", "forget", built, gone, "--reason", "asked", "--out", out, "--runs", place / "runs")
    assert done.exit_code == 0, done.output
    assert chrysalis("genome", "verify", out, "--rebuild", place / "small.yaml").exit_code == 0
    (out / "forgotten.jsonl").unlink()  # it is among what is proven, too
    assert chrysalis("genome", "verify", out, "--rebuild", place / "small.yaml").exit_code == 0


def test_what_was_forgotten_beyond_the_list_of_the_experiment_stays_forgotten(place: Path, built: Path) -> None:
    rows = [row for row in open_genome(built).manifest["content"]["documents"] if row["split"] == "train"]
    listed = {"doc_id": rows[0]["doc_id"], "reason": "asked", "date": "2026-01-02"}
    (place / "list.jsonl").write_text(json.dumps(listed))
    (place / "small.yaml").write_text(
        (place / "small.yaml").read_text().replace("genome:\n", "genome:\n  forget: list.jsonl\n")
    )
    (place / "runs").mkdir()
    assert chrysalis("genome", "build", place / "small.yaml", "--out", place / "one").exit_code == 0
    forget = ("genome", "forget", place / "one", rows[1]["path"], "--reason", "asked", "--runs", place / "runs")
    assert chrysalis(*forget, "--out", place / "two").exit_code == 0
    for genome in ("one", "two"):
        again = chrysalis("genome", "verify", place / genome, "--rebuild", place / "small.yaml")
        assert again.exit_code == 0, again.stderr


def test_a_genome_is_not_exported_into_itself(place: Path, built: Path) -> None:
    """A stranger in its folder would keep it from being built again."""
    (place / "linked").symlink_to(built / "shards")
    before = sorted(built.rglob("*"))
    for out in (built / "text", built / "shards" / "text", place / "linked" / "text"):
        refused = chrysalis("genome", "export", built, "--out", out)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert "in the genome itself" in refused.stderr
    assert sorted(built.rglob("*")) == before


def test_a_data_card_tells_what_is_in_a_genome_and_what_is_not(place: Path, built: Path) -> None:
    (place / "notes" / "mail.txt").write_text("larva@pupa.org " + " ".join(f"mail{word}" for word in range(50)))
    (place / "notes" / "binary").write_bytes(b"\0")
    text = (place / "small.yaml").read_text().replace("CC0-1.0", "CC0-1.0, glob: '**/*'")
    (place / "small.yaml").write_text(text.replace("genome:\n", "genome:\n  exclude: [pii]\n"))
    assert chrysalis("genome", "build", place / "small.yaml", "--out", place / "h").exit_code == 0
    out = ("genome", "export", place / "h", "--out", place / "text")
    assert chrysalis(*out).exit_code == 0
    card, genome = (place / "text.md").read_text(), open_genome(place / "h")
    totals = genome.totals()["notes"]
    counts = " | ".join(str(totals[part]["documents"]) for part in PARTS)
    assert f"| notes | {counts} | {sum(part['bytes'] for part in totals.values()):,} | CC0-1.0 |" in card
    assert totals["excluded"]["documents"] == 1
    assert "| folder notes | what lay there | 10 | 1 not_text |" in card
    for line in ("- notes: 1 pii", "- kept from training and judging: documents marked pii", genome.genome_id):
        assert line in card
    (place / "text").unlink()
    (place / "text.croissant.json").unlink()
    refused = chrysalis(*out)
    assert (refused.exit_code, "text.md exists" in refused.stderr) == (1, True)


@pytest.mark.parametrize("hostile", ["<script>|`x`\n# forged", "\u202etxt\x1b[2J"])
def test_nothing_in_a_data_card_is_markup_of_its_sources(built: Path, hostile: str) -> None:
    genome = open_genome(built)
    genome.manifest["content"]["sources"][0]["recipe"]["path"] = hostile
    card = data_card(genome, "0" * 64)
    for word in ("<script>", "\n# forged", "\u202e", "\x1b"):
        assert word not in card
