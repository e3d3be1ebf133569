"""Where a merge goes: a folder that is absent, empty, or holds this very merge already. Nothing is ever overwritten."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.records import read_json, sha256_of, sync_folder, write_json
from chrysalis_ray.seed.adapter import CONFIG, WEIGHTS, AdapterWeights, adapter_sha256, write_adapter

MANIFEST = "merge.json"
LONGEST_NAME = 200  # bytes of the 255 that a file name may have: what is unfinished lies beside it under a longer one
# What peft reads of a plain LoRA; whatever else its config can hold is at its default.
PLAIN_CONFIG = {
    "peft_type": "LORA", "bias": "none", "inference_mode": True, "init_lora_weights": True,
    "lora_bias": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None,
}  # fmt: skip


def destination(out: Path) -> Path:
    """`out` from the root; a link to a folder is that folder. Raises MergeError where no folder can be made or filled."""
    place = Path(os.path.abspath(out))
    longest = max(len(os.fsencode(part)) for part in place.parts)
    if not place.name or longest > 255 or len(os.fsencode(place.name)) > LONGEST_NAME:
        raise MergeError(f"--out cannot be called {str(place)[:80]!r}", f"give a name of 1 to {LONGEST_NAME} bytes")
    if place.is_symlink() and os.path.isdir(place):
        place = place.resolve()
    beside = next(parent for parent in place.parents if os.path.lexists(parent))
    if not os.path.isdir(beside):
        raise MergeError(f"{beside} is no folder, so that there can be no {place.name} in it", "give another --out")
    if not os.access(beside, os.W_OK | os.X_OK):
        raise MergeError(
            f"nothing can be written into {beside}", "give an --out on a volume and in a folder that you may change"
        )
    return place


def manifest_before(out: Path, name: str, request: Mapping[str, Any], what: str) -> dict[str, Any] | None:
    """What the manifest `name` in `out` says, if it tells of the same request; None if there is nothing in `out`.

    Raises MergeError for anything else that is there. Whether the other files are still whole is for the caller to see.
    """
    if not os.path.lexists(out):
        return None
    elsewhere = "give another --out: nothing is ever overwritten"
    if not out.is_dir():
        raise MergeError(f"{out} exists and is not a folder", elsewhere)
    if not any(out.iterdir()):
        return None
    try:
        manifest = read_json(out / name)
        told, asked = manifest["request_sha256"], manifest["request"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{out} is not empty and holds no {name} of a {what}", elsewhere) from error
    if told != sha256_of(request):
        spec = asked.get("spec") if isinstance(asked, dict) else None
        raise MergeError(f"{out} holds another {what}{f' ({spec})' if spec else ''}", elsewhere)
    return dict(manifest)


def done_before(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the same request, if it lies whole in `out`; None if there is nothing. Raises MergeError otherwise."""
    manifest = manifest_before(out, MANIFEST, request, "merge")
    if manifest is None:
        return None
    if not (out / CONFIG).is_file() or not (out / WEIGHTS).is_file() or adapter_sha256(out) != manifest.get("sha256"):
        raise MergeError(f"{out} holds this merge, but its files were changed since", "move the folder away and merge again")
    return {**manifest, "done_before": True}


def rename_into(building: Path, out: Path) -> None:
    """Give a finished folder its name; on the disk for good when it returns. Raises MergeError if there is one by now."""
    try:
        building.rename(out)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise MergeError(f"{out} was made by somebody else meanwhile", "give another --out") from error
    sync_folder(out.parent)


def put_in_place(
    beside: Path,
    out: Path,
    adapter: AdapterWeights,
    task: str | None,
    manifest: dict[str, Any],
    ready: tuple[Path, str | None] | None,
) -> dict[str, Any]:
    """Build the folder in `beside`, manifest last, and rename it: `out` is absent or whole. Returns the manifest.

    `ready` is a file with the adapter's weights, if there is one already, and its sha256, if that is known.
    """
    building = Path(tempfile.mkdtemp(dir=beside))
    try:
        like = {**PLAIN_CONFIG, "task_type": task}
        complete = {**manifest, "sha256": write_adapter(building / out.name, adapter, like=like, ready=ready)}
        write_json(building / out.name / MANIFEST, complete)
        rename_into(building / out.name, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return complete
