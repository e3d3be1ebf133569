"""Levels of proof: each kind of damage is found at its own level, and every level below it still holds."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from chrysalis_ray.cli.main import app
from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.errors import GenomeCorrupt
from chrysalis_ray.core.records import sha256_of, sha256_of_file
from chrysalis_ray.genome.build import build_genome, verify_genome
from chrysalis_ray.genome.levels import DOCUMENTS, MANIFEST, ROOT, SHARDS

SPEC = GenomeSpec.model_validate(
    {"sources": [{"type": "folder", "path": "notes", "domain": "notes", "licence": "MIT"}]}, strict=False
)


@pytest.fixture
def genome(tmp_path):
    (tmp_path / "notes").mkdir()
    for number in range(9):
        (tmp_path / "notes" / f"{number}.txt").write_text(" ".join(f"n{number}w{word}" for word in range(50)))
    return build_genome(SPEC, tmp_path / "g", tmp_path)


def rewritten(genome, change):
    """The manifest changed and sealed again by somebody who knows how ids are made."""
    manifest = json.loads((genome.folder / "manifest.json").read_text())
    change(manifest)
    manifest["genome_id"] = sha256_of(manifest["content"])
    (genome.folder / "manifest.json").write_text(json.dumps(manifest))


def in_the_manifest(genome):
    path = genome.folder / "manifest.json"
    path.write_text(path.read_text().replace("notes/3.txt", "notes/4.txt", 1))


def in_a_shard(genome):
    path = genome.folder / "shards" / "notes-train.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def in_a_line(genome):
    rewritten(genome, lambda manifest: manifest["content"]["documents"][0].update(bytes=7))


def in_a_grave(genome):
    def dig(manifest):
        row = manifest["content"]["documents"][0]
        manifest["content"]["forgotten"] = [{"doc_id": row["doc_id"], "path": row["path"], "reason": "r", "date": "2026-01-02"}]

    rewritten(genome, dig)


def in_a_text(genome):
    shards = genome.folder / "shards"
    shutil.copy(shards / "notes-select.parquet", shards / "notes-train.parquet")
    told = {"sha256": sha256_of_file(shards / "notes-train.parquet")}
    rewritten(genome, lambda manifest: manifest["shards"]["shards/notes-train.parquet"].update(told))


@pytest.mark.parametrize(
    ("damage", "level", "words"),
    [
        (in_the_manifest, MANIFEST, "does not match its genome_id"),
        (in_a_shard, SHARDS, "level 1 does not hold: .*notes-train.parquet"),
        (in_a_line, ROOT, "level 2 does not hold: .*Merkle root"),
        (in_a_grave, ROOT, "level 2 does not hold: .*was forgotten"),
        (in_a_text, DOCUMENTS, "level 4 does not hold: .*notes-train.parquet: document"),
    ],
)
def test_damage_is_found_at_its_own_level(genome, damage, level, words):
    damage(genome)
    for deepest in range(level):
        verify_genome(genome.folder, deepest)
    for deepest in range(level, DOCUMENTS + 1):
        with pytest.raises(GenomeCorrupt, match=words):
            verify_genome(genome.folder, deepest)


def test_levels_are_told_one_by_one_and_level_stops_at_one(genome, tmp_path):
    def verify(*arguments):
        return CliRunner().invoke(app, ["genome", "verify", str(genome.folder), *map(str, arguments)])

    told = verify().stdout
    assert re.findall(r"^level (\d): .*\(\d+\.\d\d s\)$", told, re.MULTILINE) == ["0", "1", "2", "4"]
    assert "level 1: 3 shards, " in told
    assert "level 4: 9 documents, " in told
    assert f"genome {genome.genome_id} is intact: 1 domain (notes)" in told
    without = verify("--level", 3).stdout  # which is not looked at without the sources
    assert re.findall(r"^level (\d): ", without, re.MULTILINE) == ["0", "1", "2"]
    assert f"genome {genome.genome_id} holds as far as level 2: " in without
    in_a_shard(genome)
    stopped = verify("--level", 0)
    assert (stopped.exit_code, stopped.stdout.count("level")) == (0, 2)
    assert f"genome {genome.genome_id} holds as far as level 0: " in stopped.stdout
    for more in ((), ("--level", 1), ("--level", 3), ("--level", 4)):
        failed = verify(*more)
        assert (failed.exit_code, failed.stdout) == (1, "")
        assert failed.stderr.startswith("error: level 1 does not hold: ")
    assert verify("--level", 5).exit_code == 2
    both = verify("--level", 2, "--rebuild", tmp_path / "any.yaml")
    assert (both.exit_code, both.stdout) == (2, "")
    assert "leave --level out" in both.stderr
