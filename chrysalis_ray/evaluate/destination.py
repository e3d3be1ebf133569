"""Where a merge goes: a folder that is absent, empty, or holds this very merge already. Nothing is ever overwritten."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
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


def done_before(out: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the same request, if it lies whole in `out`; None if there is nothing. Raises MergeError otherwise."""
    if not out.exists() and not out.is_symlink():
        return None
    elsewhere = "give another --out: nothing is ever overwritten"
    if not out.is_dir():
        raise MergeError(f"{out} exists and is not a folder", elsewhere)
    if not any(out.iterdir()):
        return None
    try:
        manifest = read_json(out / MANIFEST)
        told = (manifest["request_sha256"], manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{out} is not empty and holds no {MANIFEST} of a merge", elsewhere) from error
    if told[0] != sha256_of(request):
        raise MergeError(f"{out} holds another merge ({manifest.get('request', {}).get('spec')})", elsewhere)
    if not (out / CONFIG).is_file() or not (out / WEIGHTS).is_file() or adapter_sha256(out) != told[1]:
        raise MergeError(f"{out} holds this merge, but its files were changed since", "move the folder away and merge again")
    return {**manifest, "done_before": True}


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
        try:
            (building / out.name).rename(out)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise MergeError(f"{out} was made by somebody else meanwhile", "give another --out") from error
        sync_folder(out.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return complete
