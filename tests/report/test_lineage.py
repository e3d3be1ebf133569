import json
from pathlib import Path

import pytest

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.report.lineage import adapter_name, lineage, mermaid, verify


@pytest.fixture
def released(judged: RunLayout) -> RunLayout:
    write_json(judged.lineage, lineage(judged.root))
    return judged


def test_the_whole_chain(judged: RunLayout) -> None:
    record = lineage(judged.root)
    assert list(record) == ["format", "run", "genome", "base", "seed", "variants", "merges", "imago"]
    assert record["imago"] == {"sha256": adapter_name(judged.imago), "chosen": "ensemble", "winner": "v000-api_docs"}
    assert record["imago"]["sha256"] == record["merges"]["ensemble"]["sha256"]
    assert {v["seed_sha256"] for v in record["variants"].values()} == {record["seed"]["sha256"]}
    assert {v["genome_id"] for v in record["variants"].values()} == {record["genome"]["genome_id"]}
    json.dumps(record, allow_nan=False)


def test_an_adapter_has_the_name_its_own_room_gives_it(judged: RunLayout) -> None:
    from chrysalis_ray.seed.adapter import adapter_sha256

    assert adapter_name(judged.imago) == adapter_sha256(judged.imago)
    assert adapter_name(judged.root) is None


def test_a_whole_run_verifies(released: RunLayout) -> None:
    assert verify(released.root) == []


def test_runs_under_way_verify_too(trained: RunLayout) -> None:
    assert verify(trained.root) == []
    assert "merges" not in lineage(trained.root)


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("genome/shards/code-train.parquet", "code-train.parquet"),
        ("genome/manifest.json", "genome"),
        ("base-files/model.safetensors", "base/files/model.safetensors"),
        ("seed/adapter_model.safetensors", "seed"),
        ("variants/v002-comments/variant.json", "v002-comments"),
        ("variants/v002-comments/adapter/adapter_model.safetensors", "variants/v002-comments/sha256"),
        ("merges/ensemble/adapter_config.json", "ensemble"),
        ("imago/adapter_model.safetensors", "imago/sha256"),
    ],
)
def test_one_flipped_byte_is_found_and_named(released: RunLayout, place: str, named: str) -> None:
    path = released.root / place
    content = bytearray(path.read_bytes())
    middle = next(k for k in range(len(content) // 2, len(content)) if path.suffix != ".json" or chr(content[k]).isalnum())
    content[middle] ^= 1
    path.write_bytes(bytes(content))
    problems = verify(released.root)
    assert problems
    assert any(named in problem for problem in problems)


@pytest.mark.parametrize("place", ["genome/shards/code-train.parquet", "seed/adapter_config.json", "imago/lineage.json"])
def test_a_missing_file_is_found(released: RunLayout, place: str) -> None:
    (released.root / place).unlink()
    assert any("missing" in problem for problem in verify(released.root))


def test_a_manifest_cannot_lead_out_of_the_genome(released: RunLayout, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    sealed = read_json(released.genome / "manifest.json")
    sealed["shards"]["../../outside"] = {"sha256": "0" * 64}
    write_json(released.genome / "manifest.json", sealed)
    assert any("../../outside" in problem and "is missing" in problem for problem in verify(released.root))


def test_a_foreign_variant_is_found(released: RunLayout) -> None:
    path = released.variant("v001-code")
    write_json(path, read_json(path) | {"seed_sha256": "0" * 64})
    assert any("seed_sha256" in problem and "v001-code" in problem for problem in verify(released.root))


def test_no_run_no_lineage(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run directory"):
        verify(tmp_path)


def test_mermaid_draws_every_node_and_no_syntax_from_names(judged: RunLayout) -> None:
    text = mermaid(lineage(judged.root))
    assert text.startswith("flowchart LR\n")
    assert "m0 ==> imago" in text or "m1 ==> imago" in text or "m2 ==> imago" in text
    assert text.count("seed --> v") == 8
    hostile = mermaid({"base": {"name": 'x"]; click A "javascript:alert(1)"<script>'}, "variants": {"a\n%%": {}}})
    assert "<script>" not in hostile
    assert '"]; click' not in hostile
    assert "a__" in hostile
