"""A folder that was built beside its place takes it, in one rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.records import sha256_of_file, sync_folder


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


def take(ready: Path, path: Path, known_sha256: str | None) -> str:
    """Give the file `ready` the name `path` as well, on disk for good; returns its sha256, `known_sha256` if it is known."""
    try:
        os.link(ready, path)
    except OSError:  # a file system without links
        shutil.copyfile(ready, path)
    with path.open("r+b") as stream:
        if known_sha256 is None:
            return sync_and_hash(stream, path)
        os.fsync(stream.fileno())
    return known_sha256


def sync_and_hash(stream: BinaryIO, path: Path) -> str:
    """fsync what was flushed to `path`, and its sha256, which is made while the disk is busy."""
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(sha256_of_file, path)
        os.fsync(stream.fileno())
    return digest.result()
