from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_texts import TextTokens, text_tokens


@pytest.fixture(scope="session")
def tokens(tiny_base: Path) -> TextTokens:
    return text_tokens(tiny_base)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
