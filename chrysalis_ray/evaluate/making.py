"""Making the merges of a run: a PEFT folder each, `merge.json` last. Whatever kills a run, what was done of a merge stays done.

    merges/<name>/merge.json          the record of a merge that is whole
    merges/.found-<name>.json         whom judging found for it, and with which weights
    merges/.modules-<name>/           the modules that are merged (`merge/finished.py`)

Each of the three names the request: the method and its settings, the adapters of everybody who may take part, their losses and
what they feed the base. What was left of another request is made anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from chrysalis_ray import __version__
from chrysalis_ray.config.merges import JUDGED, Merge, RegmeanMerge, SeveralMerge, WinnerMerge
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, sha256_of, sha256_of_file, write_json
from chrysalis_ray.evaluate.folders import named_result
from chrysalis_ray.merge.finished import FinishedModules, finished_modules
from chrysalis_ray.merge.inputs import Inputs
from chrysalis_ray.merge.per_layer import ModuleWeights, merge_adapters
from chrysalis_ray.merge.whole_regmean import looks_at_whole_inputs
from chrysalis_ray.merge.winner import winner_weights
from chrysalis_ray.seed.adapter import AdapterWeights, adapter_sha256, read_adapter, read_config, write_adapter
from chrysalis_ray.seed.solo import is_plain, release_adapter

Found = tuple[list[str], ModuleWeights | None, dict[str, Any]]  # members, weights per module, how they were found


@dataclass(frozen=True)
class Making:
    """One merge of a run under way. `members` may take part in it; `losses` on select and `sha256s` are those of all variants'
    adapters."""

    layout: RunLayout
    spec: Merge
    members: Sequence[str]
    losses: Mapping[str, float]
    sha256s: Mapping[str, str]

    @cached_property
    def request_sha256(self) -> str:
        """Of all that the merge depends on."""
        layout = self.layout
        inputs = [inputs_file(layout, self.spec, name) for name in self.members] if needs_inputs(self.spec) else []
        request = {
            "spec": self.spec.model_dump(mode="json"),
            "members": {name: [self.sha256s[name], self.losses[name]] for name in self.members},
            "seed": adapter_sha256(layout.seed),
            "inputs": [sha256_of_file(path) if path.is_file() else None for path in inputs],
            "version": __version__,
        }
        return sha256_of(request)

    def done_before(self) -> dict[str, Any] | None:
        """The record of this very merge, if it lies whole in its folder."""
        record = self._told(self.layout.merge_manifest(self.spec.name))
        whole = record is not None and adapter_sha256(self.layout.merge(self.spec.name)) == record["sha256"]
        return record if whole else None

    def found_before(self) -> Found | None:
        """Whom judging found, in a run that was killed before the merge was made."""
        told = self._told(self.layout.merge_found(self.spec.name))
        return None if told is None else (told["members"], told["by_module"], told["search"])

    def remember(self, members: list[str], by_module: ModuleWeights | None, search: dict[str, Any]) -> Found:
        """Keep what was found, if it took any judging; returns it."""
        if isinstance(self.spec, SeveralMerge) and self.spec.weights in JUDGED:
            told = {"members": members, "by_module": by_module, "search": search}
            self._write("merge_found", told)
        return members, by_module, search

    def finish(self, members: Sequence[str], by_module: ModuleWeights | None, search: dict[str, Any]) -> dict[str, Any]:
        """Make the merge, or the rest of it; returns its record."""
        layout, name = self.layout, self.spec.name
        layout.merge_manifest(name).unlink(missing_ok=True)  # of another request
        request = sha256_of([self.request_sha256, list(members), by_module])
        with finished_modules(layout.merge_modules(name), request) as finished:
            record = write_merge(layout, self.spec, members, self.losses, by_module, finished) | search
        self._write("merge_manifest", record)
        layout.merge_found(name).unlink(missing_ok=True)
        return record

    def _write(self, place: str, told: Mapping[str, Any]) -> None:
        write_json(getattr(self.layout, place)(self.spec.name), {"request_sha256": self.request_sha256, "told": dict(told)})

    def _told(self, path: Any) -> dict[str, Any] | None:
        """What a file tells of this request, None where it is absent, damaged or of another one."""
        try:
            written = read_json(path)
            return dict(written["told"]) if written["request_sha256"] == self.request_sha256 else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def write_merge(
    layout: RunLayout,
    spec: Merge,
    members: Sequence[str],
    losses: Mapping[str, float],
    by_module: ModuleWeights | None = None,
    finished: FinishedModules | None = None,
) -> dict[str, Any]:
    """One merge around the seed, cut to the largest rank among its members unless the spec names one; returns its record.

    Modules that are `finished` are not merged again.
    """
    if isinstance(spec, WinnerMerge) and not all(is_plain(layout.adapter(name)) for name in members):
        return _winner_as_it_is(layout, spec, members, losses)
    found = isinstance(spec, SeveralMerge) and spec.weights in JUDGED
    alike = spec.model_copy(update={"weights": "uniform"}) if found else spec
    adapters = [read_adapter(layout.adapter(name)) for name in members]
    zero = read_adapter(layout.seed)
    merged = merge_adapters(
        alike,
        members,
        [adapter.factors for adapter in adapters],
        [adapter.scale for adapter in adapters],
        zero.factors,
        zero.scale,
        [losses[name] for name in members],
        max(adapter.rank for adapter in adapters),
        by_module=by_module,
        inputs=_inputs(layout, spec, members) if needs_inputs(spec) else None,
        finished=finished,
    )
    result = AdapterWeights(
        base_model=zero.base_model,
        revision=zero.revision,
        rank=merged.rank,
        alpha=float(merged.rank),
        use_rslora=False,
        targets=zero.targets,
        factors=merged.factors,
        fan_in_fan_out=zero.fan_in_fan_out,
    )
    return {
        **named_result(merged, members),
        "method": spec.method,
        "spec": spec.model_dump(mode="json"),
        "weights": dict(zip(members, merged.weights, strict=True)),
        "sha256": write_adapter(layout.merge(spec.name), result),
    }


def _winner_as_it_is(
    layout: RunLayout, spec: WinnerMerge, members: Sequence[str], losses: Mapping[str, float]
) -> dict[str, Any]:
    """The record of a winner that is more than low-rank deltas: its folder is copied."""
    weights = dict(zip(members, winner_weights([losses[name] for name in members]), strict=True))
    folder = layout.adapter(max(members, key=lambda name: weights[name]))
    return {
        "rank": read_config(folder).get("r"),
        "residual": 0.0,
        "captured_energy": 1.0,
        "per_module": {},
        "notes": {"method": spec.method, "members": 1},
        "method": spec.method,
        "spec": spec.model_dump(mode="json"),
        "weights": weights,
        "sha256": release_adapter(folder, layout.merge(spec.name)),
    }


def needs_inputs(spec: Merge) -> bool:
    """Whether a merge goes by what its members feed the modules of the base."""
    return isinstance(spec, RegmeanMerge)


def inputs_file(layout: RunLayout, spec: Merge, variant_id: str) -> Path:
    """Where the inputs lie that a merge goes by."""
    return layout.whole_inputs(variant_id) if looks_at_whole_inputs(spec) else layout.inputs(variant_id)


def _inputs(layout: RunLayout, spec: Merge, members: Sequence[str]) -> Inputs:
    from chrysalis_ray.evaluate.inputs import read_inputs
    from chrysalis_ray.evaluate.whole_inputs import open_moments

    read = open_moments if looks_at_whole_inputs(spec) else read_inputs
    return [read(inputs_file(layout, spec, name)) for name in members]
