"""A folder that was built beside its place takes it, in one rename."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.records import sync_folder


def put_in_place(building: Path, folder: Path) -> None:
    """Rename `building` to `folder`. A folder cannot be replaced by rename, so that an older one first steps aside."""
    if folder.exists() or folder.is_symlink():
        if folder.is_symlink() or not folder.is_dir():
            raise MergeError(f"{folder} exists and is not a folder", "move it away")
        for old in folder.iterdir():
            if not (building / old.name).exists():
                (shutil.copytree if old.is_dir() else shutil.copy2)(old, building / old.name)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
        folder.rename(aside / "folder")
        building.rename(folder)
        shutil.rmtree(aside)
    else:
        building.rename(folder)
    sync_folder(folder.parent)
