"""Two runs that share a cache grow the same base at once: the second finds the first's and goes on."""

import pytest

from chrysalis_ray.core.records import write_json
from chrysalis_ray.training import base


def made(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_json(folder / base.MANIFEST, {"recipe_sha256": "r", "files": base._stamps(folder), "base": {}})
    return folder


def test_the_second_to_finish_finds_the_first(tmp_path, monkeypatch):
    growing, folder = made(tmp_path / "growing"), made(tmp_path / "ready")
    monkeypatch.setattr(base.Path, "exists", lambda self: False)  # it was not there yet when the second looked
    base._put_in_place(growing, folder, "r")
    assert (folder / "config.json").read_text() == "{}"
    with pytest.raises(OSError, match="not empty"):
        base._put_in_place(growing, folder, "another recipe")
