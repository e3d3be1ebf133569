"""Paths as people write them."""

from __future__ import annotations

import os.path
from pathlib import Path


def written_path(written: str) -> Path:
    """`written` with the home of whoever runs this for ``~``, and of a user for ``~user``. Where there is no such user it stays
    as it is: then there is no such file, and whoever looks for it says so."""
    return Path(os.path.expanduser(written))
