"""The verbs of `chrysalis genome` on a small genome: what they print, what they write, and how they say no."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chrysalis_ray.cli.main import app
from chrysalis_ray.genome.framing import read_text

EXPERIMENT = """\
name: small
blueprint: tiny
genome:
  sources:
    - {type: folder, path: notes, domain: notes, licence: CC0-1.0}
population:
  variants: 2
  tokens_per_variant: 4096
  epigenomes: {type: listed, mixes: [{name: even, express: {notes: 1}}]}
"""


def chrysalis(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    (tmp_path / "notes").mkdir()
    for number in range(9):
        (tmp_path / "notes" / f"{number}.txt").write_text(" ".join(f"n{number}w{word}" for word in range(50)))
    return tmp_path


@pytest.fixture
def built(place: Path) -> Path:
    done = chrysalis("genome", "build", place / "small.yaml", "--out", place / "g")
    assert done.exit_code == 0, done.output
    return place / "g"


def test_build_show_verify_export(place: Path, built: Path) -> None:
    identity = json.loads((built / "manifest.json").read_text())["genome_id"]
    shown = chrysalis("genome", "show", built)
    assert shown.exit_code == 0
    assert identity in shown.stdout
    assert "notes: 0.00 MB, 7 train, 1 select, 1 report; CC0-1.0" in shown.stdout
    told = json.loads(chrysalis("genome", "show", built, "--json").stdout)
    assert (told["genome_id"], told["licences"]) == (identity, {"notes": "CC0-1.0"})
    assert f"genome {identity} is intact" in chrysalis("genome", "verify", built).stdout
    exported = chrysalis("genome", "export", built, "--out", place / "genome.txt")
    assert exported.exit_code == 0, exported.output
    assert len(list(read_text(place / "genome.txt"))) == 9
    assert json.loads((place / "genome.txt.croissant.json").read_text())["license"] == "CC0-1.0"


def test_a_document_is_shown_with_its_proof(place: Path, built: Path) -> None:
    told = json.loads(chrysalis("genome", "show", built, "notes/3.txt", "--json").stdout)
    assert told["proof"]["size"] == 9
    assert told["proof"]["audit_path"]
    by_start = chrysalis("genome", "show", built, told["doc_id"][:10])
    assert told["doc_id"] in by_start.stdout
    assert "hashes to the root" in by_start.stdout


def test_a_second_build_of_the_same_is_the_same_and_a_change_shows_in_diff(place: Path, built: Path) -> None:
    written = (built / "manifest.json").stat().st_mtime_ns
    assert chrysalis("genome", "build", place / "small.yaml", "--out", built).exit_code == 0
    assert (built / "manifest.json").stat().st_mtime_ns == written
    (place / "notes" / "3.txt").write_text("all other words than before " * 4)
    assert chrysalis("genome", "build", place / "small.yaml", "--out", place / "g2").exit_code == 0
    told = json.loads(chrysalis("genome", "diff", built, place / "g2", "--json").stdout)
    assert told["domains"]["notes"]["changed"] == ["notes/3.txt"]
    assert "1 changed" in chrysalis("genome", "diff", built, place / "g2").stdout
    assert "the same documents" in chrysalis("genome", "diff", built, built).stdout


def refused(*arguments: object) -> str:
    done = chrysalis("genome", *arguments)
    assert done.exit_code in (1, 2), done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(("error: ", "Usage: "))
    return done.stderr


def test_wrong_input_is_one_message_and_nothing_is_written(place: Path, built: Path) -> None:
    before = sorted(place.rglob("*"))
    (place / "notes" / "other.md").write_text("x")
    assert "holds 0.txt" in refused("build", place / "small.yaml", "--out", place / "notes")
    assert "is a file" in refused("build", place / "small.yaml", "--out", place / "small.yaml")
    assert "no such file" in refused("build", place / "nowhere.yaml", "--out", place / "new")
    assert "no manifest.json" in refused("show", place / "notes")
    assert "no document 'zzz'" in refused("show", built, "zzz")
    assert "there is notes/1.txt" in refused("show", built, "1.txt")
    assert "there is notes/3.txt" in refused("show", built, "other/3.md#code-9")  # of that name, at least
    assert "is not overwritten" in refused("export", built, "--out", place / "small.yaml")
    assert "no folder" in refused("export", built, "--out", place / "new" / "genome.txt")
    assert "does not exist" in refused("verify", place / "nowhere")
    assert "Missing option" in refused("export", built)
    (place / "notes" / "other.md").unlink()
    assert sorted(place.rglob("*")) == before


def test_damage_is_told_by_every_verb(place: Path, built: Path) -> None:
    shard = next((built / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    for arguments in (("verify", built), ("show", built), ("diff", built, built), ("export", built, "--out", place / "x.txt")):
        assert shard.name in refused(*arguments)
    assert not (place / "x.txt").exists()


def test_the_genome_of_a_run_is_found_and_not_rebuilt(place: Path, built: Path) -> None:
    run = place / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    built.rename(run / "genome")
    assert chrysalis("genome", "verify", run).exit_code == 0
    assert "its variants stand on" in refused("build", place / "small.yaml", "--out", run / "genome")
