"""Which run directory an experiment gets, and whether it is still its own: a directory belongs to exactly one experiment."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chrysalis_ray import __version__
from chrysalis_ray.config.resolve import MOVABLE, LoadedExperiment, essence
from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout, is_run_name
from chrysalis_ray.core.records import is_draft, read_json, sha256_of, write_bytes, write_json

MOST_TOLD, MOST_SHOWN = 3, 60  # differences, and characters of a value, in an error


def run_directory(loaded: LoadedExperiment, runs: Path, name: str | None) -> RunLayout:
    """Where this run lies; nothing is written. Raises RunError for a name that leads elsewhere, or a folder of another kind."""
    name = loaded.experiment.name if name is None else name
    if not is_run_name(name):
        raise RunError(
            f"{name!r} cannot name a run directory",
            "write one word of at most 64 letters, digits, dots and dashes; --runs says in which folder it lies",
        )
    layout = RunLayout((runs / name).resolve())
    if layout.root.is_dir() and not layout.run_manifest.exists():
        ours = [layout.lock, layout.driver_log, layout.experiment_yaml]  # all that a kill can leave before there is a manifest
        if layout.probe().question.exists():
            ours += [layout.probe().root, layout.genome]
        strangers = sorted(path.name for path in layout.root.iterdir() if path not in ours and not is_draft(path))
        if strangers:
            raise RunError(
                f"{layout.root} exists and is no run directory: it holds {strangers[0]}", "give this run another --name"
            )
    return layout


def claim_run(loaded: LoadedExperiment, layout: RunLayout) -> str:
    """Make the directory this experiment's, or see that it is; returns the id of the run. The caller holds its lock.

    Raises RunError if another experiment lives there, or if nobody can say which.
    """
    resolved = loaded.resolved()
    if layout.run_manifest.exists():
        experiment_sha256, run_id = _claimed(layout)
        if experiment_sha256 != resolved["sha256"]:
            raise RunError(
                f"{layout.root} holds another experiment ({experiment_sha256[:12]}, not {resolved['sha256'][:12]})"
                f"{_what_differs(layout, resolved)}",
                "give this one another --name, or move that folder away; nothing in it was touched",
            )
        return run_id
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run_id = sha256_of([resolved["sha256"], layout.root.name, created])[:8]
    manifest = {
        "name": layout.root.name,
        "created": created,
        "version": __version__,
        "experiment": resolved,
        "experiment_sha256": resolved["sha256"],
        "run_id": run_id,
        **({"chosen": loaded.chosen.to_json()} if loaded.chosen else {}),
    }
    write_bytes(layout.experiment_yaml, loaded.text.encode())
    write_json(layout.run_manifest, manifest)
    return run_id


def _what_differs(layout: RunLayout, resolved: dict[str, Any]) -> str:
    """``: population.variants is 8 there, 4 here``, as far as the manifest tells."""
    try:
        told = read_json(layout.run_manifest)
        then = essence(told["experiment"]["experiment"], told["experiment"]["blueprint"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    found = list(differences(then, essence(resolved["experiment"], resolved["blueprint"])))
    if not found:  # fields that a version has and another has not
        return f": it was begun by version {told.get('version')}, this is {__version__}"
    more = f" and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
    return f": {', '.join(found[:MOST_TOLD])}{more}"


def differences(then: Any, now: Any, path: str = "") -> Iterator[str]:
    """``population.variants is 8 there, 4 here`` for every value that is not the same in both."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from differences(then.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, (before, after) in enumerate(zip(then, now, strict=True)):
            yield from differences(before, after, f"{path}.{number}")
    elif then != now:
        yield f"{path.removeprefix('experiment.')} is {_short(then)} there, {_short(now)} here"


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 4]} ..."


def another_body(loaded: LoadedExperiment, layout: RunLayout) -> str | None:
    """What differs between the body that this run began with and the one it is given now; None if nothing does.

    Raises RunError where nobody can say with which it began.
    """
    try:
        then = read_json(layout.run_manifest)["experiment"]["experiment"]["body"]
        now = loaded.resolved()["experiment"]["body"]
        changes = [f"{name} {then[name]} -> {now[name]}" for name in MOVABLE if name in then and then[name] != now[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{layout.run_manifest} is damaged ({type(error).__name__}: {error}): nobody can say what body this run began with",
            "restore it, or give this run another --name; nothing was touched",
        ) from error
    if not changes:
        return None
    exact = "to the bit" if loaded.body.virtual_workers else "within rounding; to the bit with body.virtual_workers"
    return f"{', '.join(changes)}: what is trained from here on is the same {exact}"


def _claimed(layout: RunLayout) -> tuple[str, str]:
    try:
        manifest = read_json(layout.run_manifest)
        return str(manifest["experiment_sha256"]), str(manifest["run_id"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{layout.run_manifest} is damaged ({type(error).__name__}: {error}): nobody can say whose run this is",
            "restore it, or give this run another --name; nothing was touched",
        ) from error
