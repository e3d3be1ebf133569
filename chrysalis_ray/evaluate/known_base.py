"""Whose base a folder is: what says that an adapter was trained on this model, and what says that it was not."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.records import read_json, sha256_of, sha256_of_file
from chrysalis_ray.evaluate.base_files import CONFIG, FOLDED, BaseFiles, open_base
from chrysalis_ray.evaluate.folders import Source
from chrysalis_ray.evaluate.vocabulary import TOKENIZER
from chrysalis_ray.seed.adapter import CONFIG as ADAPTER_CONFIG

BASE_MANIFEST = "base.json"  # beside a base that this program grew
COMMIT = re.compile(r"[0-9a-f]{40}")
PATH = re.compile(r"([/.~\\]|[A-Za-z]:).*|.*[/\\].*[/\\].*")  # what cannot be a name: those have one slash at most
OTHER_BASE = "give the base that this adapter was trained on"
OTHER_NAME = (
    f"{OTHER_BASE}; if it is the same model under another name, write this one into {ADAPTER_CONFIG} as base_model_name_or_path"
)


def known_base(source: Source, files: BaseFiles, hashes: Mapping[str, str]) -> str:
    """What says that this is the adapter's base: "name", "revision", "weights", or only "shapes".

    If the adapter names this folder, or another one of this machine, the weights there must be these. A base that this program
    grew, or that lies in the hub's cache, knows its name. A copy of a hub model elsewhere has none, a path of another machine
    and a folder of quantised weights say nothing: such a base is taken by its shapes. Raises MergeError for another base, and
    for one that an adapter was folded into already. `hashes` are those of the base's files by name.
    """
    _refuse_folded(source, files)
    name, commit = _name_of(files)
    wanted, revision = source.weights.base_model, source.weights.revision
    if not wanted:
        return "shapes"
    if os.path.isdir(wanted) and os.path.samefile(wanted, files.folder):
        return "weights"
    if (theirs := _weights_at(wanted)) is not None:
        if theirs != {file.path.name: hashes[file.path.name] for file in files.weights}:
            raise MergeError(
                f"{source.name} is an adapter of {wanted}, whose weights are not those of {files.folder}",
                "give that folder as --base",
            )
        return "weights"
    if name is None or PATH.fullmatch(wanted):
        return "shapes"
    if wanted != name:
        raise MergeError(f"{source.name} is an adapter of {wanted!r}, and {files.folder} is {name!r}", OTHER_NAME)
    if revision and commit and COMMIT.fullmatch(revision) and revision != commit:
        raise MergeError(
            f"{source.name} is an adapter of revision {revision[:12]}, and {files.folder} is {commit[:12]}", OTHER_BASE
        )
    return "revision" if revision and revision == commit else "name"


def _refuse_folded(source: Source, files: BaseFiles) -> None:
    """Raises MergeError for a base that has this adapter in it, or another one of the same base: it is that base no more."""
    manifest = files.folder / FOLDED
    if not manifest.is_file():
        return
    try:
        told = read_json(manifest)
        within, base_model = told["request"]["adapter"], told["base_model"]
    except (ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{manifest} cannot be read: {error!r}", "give a model folder") from error
    if within == source.sha256:
        raise MergeError(f"{source.name} was folded into {files.folder} already", "take that model as it is")
    if base_model and base_model == source.weights.base_model:
        raise MergeError(
            f"{source.name} is an adapter of {base_model!r}, and {files.folder} is that with another adapter folded in",
            "give the base itself; `chrysalis merge` makes one adapter of several",
        )


def _weights_at(wanted: str) -> dict[str, str] | None:
    """The hashes of the weights files in the folder of this machine that an adapter names; None if there is no such model."""
    if not os.path.isabs(wanted) or not os.path.isdir(wanted):
        return None
    try:
        return {file.path.name: sha256_of_file(file.path) for file in open_base(Path(wanted)).weights}
    except MergeError:  # as of a folder of 4-bit weights, whose base of more bits is what an adapter is folded into
        return None


def _name_of(files: BaseFiles) -> tuple[str | None, str | None]:
    """Name and revision of a base that knows them. Raises MergeError if its own manifest says that it was changed."""
    manifest = files.folder / BASE_MANIFEST
    if manifest.is_file():
        named = [*(file.path for file in files.weights), files.folder / CONFIG, files.folder / TOKENIZER]
        try:
            told: Any = read_json(manifest)["base"]
            name, sha256 = told["name"], told["sha256"]
            changed = sha256_of({path.name: sha256_of_file(path) for path in named}) != sha256
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MergeError(f"{manifest} and its folder cannot be read: {error!r}", "give a model folder") from error
        if changed:
            raise MergeError(f"the files of {files.folder} are not those that {BASE_MANIFEST} tells of", "grow the base again")
        return str(name), None
    if files.folder.parent.name == "snapshots" and files.folder.parent.parent.name.startswith("models--"):
        return "/".join(files.folder.parent.parent.name.split("--")[1:]), files.folder.name
    return None, None
