"""Inclusion proofs, and rebuilding only what changed."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.build import build_genome, refresh_genome, verify_genome
from chrysalis_ray.genome.proofs import audit_path, is_proof, prove, root_of_path
from chrysalis_ray.genome.sealing import merkle_root


def reference_path(leaves, index):
    """RFC 6962, section 2.1.1, word by word, over hashed leaves."""
    if len(leaves) == 1:
        return []
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    if index < k:
        return [*reference_path(leaves[:k], index), merkle_root(leaves[k:])]
    return [*reference_path(leaves[k:], index - k), merkle_root(leaves[:k])]


@pytest.mark.parametrize("size", [*range(1, 34), 64, 65, 100])
def test_paths_are_those_of_the_definition_and_lead_to_the_root(size):
    leaves = [hashlib.sha256(bytes([number])).digest() for number in range(size)]
    for index in range(size):
        path = audit_path(leaves, index)
        assert path == reference_path(leaves, index)
        assert root_of_path(leaves[index], index, size, path) == merkle_root(leaves)


@given(st.integers(1, 60), st.data())
def test_a_proof_of_anything_else_fails(size, data):
    leaves = [hashlib.sha256(bytes([number])).digest() for number in range(size)]
    root = merkle_root(leaves)
    index, other = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    path = audit_path(leaves, index)
    assert root_of_path(hashlib.sha256(b"x").digest(), index, size, path) != root
    if other != index:
        assert root_of_path(leaves[other], index, size, path) != root
    if path:
        step = data.draw(st.integers(0, len(path) - 1))
        changed = [*path[:step], hashlib.sha256(b"y").hexdigest(), *path[step + 1 :]]
        assert root_of_path(leaves[index], index, size, changed) != root
        assert root_of_path(leaves[index], index, size, path[:-1]) != root
    assert root_of_path(leaves[index], index, size, [*path, "00" * 32]) != root
    assert root_of_path(leaves[index], size, size, path) is None


def prose(number, length=60):
    return " ".join(hashlib.sha256(f"{number} {i}".encode()).hexdigest()[:7] for i in range(length)) + "\n"


@pytest.fixture
def sources(tmp_path):
    for name, start in (("notes", 0), ("essays", 100)):
        (tmp_path / name).mkdir()
        for number in range(start, start + 20):
            (tmp_path / name / f"{number}.txt").write_text(prose(number))
    with zipfile.ZipFile(tmp_path / "box.zip", "w") as archive:
        for number in range(200, 210):
            archive.writestr(f"{number}.txt", prose(number))
    return tmp_path


SPEC = GenomeSpec.model_validate(
    {
        "sources": [
            {"type": "folder", "path": "notes", "domain": "notes"},
            {"type": "folder", "path": "essays", "domain": "essays"},
            {"type": "archive", "path": "box.zip", "domain": "box"},
        ]
    }
)


def test_a_document_is_proven_to_be_in_the_genome(sources):
    genome = build_genome(SPEC, sources / "g", sources)
    content = genome.manifest["content"]
    row = content["documents"][17]
    proof = json.loads(json.dumps(prove(content["documents"], row["doc_id"])))
    assert proof["doc_id"] == hashlib.sha256((sources / row["path"]).read_bytes()).hexdigest()
    assert is_proof(proof, content["merkle_root"])
    assert not is_proof({**proof, "path": "notes/other.txt"}, content["merkle_root"])
    assert not is_proof({**proof, "bytes": proof["bytes"] + 1}, content["merkle_root"])
    with pytest.raises(GenomeError, match="no document 00"):
        prove(content["documents"], "00")


def read_paths(monkeypatch):
    """Files that are opened from now on through pathlib, the way sources are read."""
    from pathlib import Path

    opened = []
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or original(path))
    return opened


def test_nothing_is_read_or_written_where_nothing_changed(sources, monkeypatch):
    first = refresh_genome(SPEC, sources / "g", sources)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (sources / "g").rglob("*")}
    opened = read_paths(monkeypatch)
    assert refresh_genome(SPEC, sources / "g", sources).genome_id == first.genome_id
    assert [name for name in opened if name.endswith((".txt", ".zip"))] == []
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (sources / "g").rglob("*")} == before


def test_a_changed_file_rewrites_the_shards_it_is_in_and_no_other(sources):
    first = refresh_genome(SPEC, sources / "g", sources)
    before = {path.name: path.stat().st_mtime_ns for path in (sources / "g" / "shards").iterdir()}
    row = next(row for row in first.manifest["content"]["documents"] if row["domain"] == "notes" and row["split"] == "train")
    (sources / row["path"]).write_text(prose(999))
    second = refresh_genome(SPEC, sources / "g", sources)
    assert second.genome_id != first.genome_id
    after = {path.name: path.stat().st_mtime_ns for path in (sources / "g" / "shards").iterdir()}
    assert {name for name in after if after[name] != before.get(name)} <= {
        f"notes-{p}.parquet" for p in ("train", "select", "report")
    }
    assert "notes-train.parquet" in {name for name in after if after[name] != before.get(name)}
    assert verify_genome(sources / "g").genome_id == build_genome(SPEC, sources / "fresh", sources).genome_id


@pytest.mark.parametrize("change", ["add", "remove", "same size and time", "archive", "shard lost", "state lost", "touch"])
def test_every_change_is_seen_and_a_rebuild_equals_a_fresh_build(sources, change):
    first = refresh_genome(SPEC, sources / "g", sources)
    target = sources / "notes" / "3.txt"
    if change == "add":
        (sources / "essays" / "new.txt").write_text(prose(500))
    elif change == "remove":
        target.unlink()
    elif change == "same size and time":
        seen = target.stat()
        target.write_text(prose(501)[: seen.st_size - 1] + "\n")
        os.utime(target, ns=(seen.st_atime_ns, seen.st_mtime_ns))
        assert (target.stat().st_size, target.stat().st_mtime_ns) == (seen.st_size, seen.st_mtime_ns)
    elif change == "archive":
        with zipfile.ZipFile(sources / "box.zip", "a") as archive:
            archive.writestr("more.txt", prose(502))
    elif change == "shard lost":
        (sources / "g" / "shards" / "box-train.parquet").unlink()
    elif change == "state lost":
        (sources / "g" / "state.json").write_text("{")
    else:
        target.touch()
    again = refresh_genome(SPEC, sources / "g", sources)
    assert (again.genome_id == first.genome_id) == (change in ("shard lost", "state lost", "touch"))
    assert verify_genome(sources / "g").genome_id == build_genome(SPEC, sources / "fresh", sources).genome_id


def test_a_kill_while_shards_are_written_leaves_the_old_genome_and_is_made_good(sources):
    first = refresh_genome(SPEC, sources / "g", sources)
    (sources / "notes" / "3.txt").write_text(prose(77))
    script = (
        "import os, sys, pathlib\n"
        "from chrysalis_ray.genome import build\n"
        "from tests.genome.test_genome_rebuild import SPEC\n"
        "original = build.write_shard\n"
        "def write(path, *rest):\n"
        "    done = original(path, *rest)\n"
        "    if path.name.startswith('notes-train'): os._exit(9)\n"
        "    return done\n"
        "build.write_shard = write\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "build.refresh_genome(SPEC, folder / 'g', folder)\n"
    )
    from pathlib import Path

    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(sources)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False
    )
    assert done.returncode == 9
    assert verify_genome(sources / "g").genome_id == first.genome_id
    again = refresh_genome(SPEC, sources / "g", sources)
    assert again.genome_id != first.genome_id
    assert verify_genome(sources / "g").genome_id == build_genome(SPEC, sources / "fresh", sources).genome_id
