"""A run directory at each of its stages."""

from pathlib import Path

import pytest
from example_run import write_branch, write_judgement, write_training

from chrysalis_ray.core.layout import RunLayout


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    return RunLayout(tmp_path / "run")


@pytest.fixture
def branched(layout: RunLayout) -> RunLayout:
    write_branch(layout)
    return layout


@pytest.fixture
def trained(layout: RunLayout) -> RunLayout:
    write_training(layout, write_branch(layout))
    return layout


@pytest.fixture
def judged(layout: RunLayout) -> RunLayout:
    variants = write_branch(layout)
    write_training(layout, variants)
    write_judgement(layout, variants)
    return layout
