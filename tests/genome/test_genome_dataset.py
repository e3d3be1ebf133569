"""Data sets from local folders, through `datasets` itself."""

import pytest

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.build import build_genome
from chrysalis_ray.genome.documents import SPLITS


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def texts(count=20):
    return [" ".join(f"w{number}x{i}" for i in range(30)) for number in range(count)]


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path):
    """Reading local files must leave nothing in the user's cache."""
    yield
    assert not (tmp_path / "cache").exists()


def build(tmp_path, path, **more):
    source = {"type": "dataset", "path": path, "domain": "rows", "licence": "CC0-1.0", **more}
    return build_genome(GenomeSpec.model_validate({"sources": [source]}), tmp_path / "g", tmp_path)


def found(genome):
    return {document.text for split in SPLITS for document in genome.documents("rows", split)}


def test_a_folder_of_parquet(tmp_path):
    import datasets

    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"body": [*texts(), None, ""]}).to_parquet(tmp_path / "set" / "data.parquet")
    genome = build(tmp_path, "set", text_key="body")
    assert found(genome) == set(texts())
    assert genome.manifest["content"]["skipped"] == {"empty": 2}
    assert genome.licences() == {"rows": "CC0-1.0"}
    with pytest.raises(GenomeError, match=r"no column 'text'; it has \['body'\]"):
        build(tmp_path, "set")


def test_a_folder_written_by_save_to_disk(tmp_path):
    import datasets

    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts()})})
    saved.save_to_disk(tmp_path / "set")
    assert found(build(tmp_path, "set")) == set(texts())
    with pytest.raises(GenomeError, match=r"no split 'test'; it has \['train'\]"):
        build(tmp_path, "set", split="test")


def test_a_data_set_that_is_nowhere(tmp_path):
    with pytest.raises(GenomeError, match="'nobody/nothing'") as error:
        build(tmp_path, "nobody/nothing")
    assert "revision" in error.value.remedy
    with pytest.raises(GenomeError, match="nowhere is no folder and no file"):
        build(tmp_path, "./nowhere")


def test_data_files_that_are_broken(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "data.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(GenomeError, match="'set'"):
        build(tmp_path, "set")


def test_a_cap_holds_for_data_sets(tmp_path):
    import datasets

    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"text": texts(40)}).to_json(tmp_path / "set" / "data.jsonl")
    size = max(len(text) for text in texts(40))
    genome = build(tmp_path, "set", max_megabytes=size * 12 / 1e6)
    assert 10 <= len(found(genome)) <= 13
    assert found(genome) < set(texts(40))
