from pathlib import Path

import pytest
from malformed import BLUEPRINT, EXPERIMENT


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A folder with a good experiment, its blueprint, and the sources it names."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("A note.")
    (tmp_path / "chats.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "blueprint.yaml").write_text(BLUEPRINT)
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT)
    return path
