"""The one door to Weights & Biases: runs written from the files of a run directory, live or afterwards.

One W&B run per variant (group ``<experiment>-<run id>``, job type ``variant``), one per merge candidate (``merge``) and one
for the verdict (``report``). Ids are made from the run id and the name, so that a resumed experiment continues its W&B runs;
losses are plotted by tokens, so that variants of unlike batch size overlay. All that W&B writes lies under the run's
``tracking/`` folder. ``tracked.json`` there says what was sent: whatever stands in it is not sent again.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Variant, sha256_of, write_json
from chrysalis_ray.core.redaction import redact
from chrysalis_ray.report.comparison import Comparison, MergeRow, VariantRow, read_run, tokens_by_domain
from chrysalis_ray.report.kinds import adapter_of
from chrysalis_ray.report.lineage import adapter_name
from chrysalis_ray.report.metrics import read_metrics
from chrysalis_ray.report.mixes import asked_shares
from chrysalis_ray.report.probes import probe_metrics
from chrysalis_ray.report.reading import manifest, mapping, numbers
from chrysalis_ray.report.tasks import task_metrics

MODES = ("offline", "online", "disabled")
MANIFEST = "tracked.json"

_LONGEST_ID, _LONGEST_TAG = 100, 64
_LORA = ("rank", "alpha", "use_rslora")
_FOLDERS = {"WANDB_DIR": "", "WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache", "WANDB_CONFIG_DIR": "config",
            "WANDB_ARTIFACT_DIR": "artifacts"}  # fmt: skip


def check_tracking(mode: str) -> None:
    """Raise RunError before anything starts if `mode` cannot work: ``online`` needs a key."""
    if mode not in MODES:
        raise RunError(f"tracking.wandb is {mode!r}", f"use one of {', '.join(MODES)}")
    if mode != "online":
        return
    import wandb

    if not wandb.api.api_key:
        raise RunError(
            "tracking.wandb is online, and this machine has no W&B key",
            "run `wandb login`, set WANDB_API_KEY, or use `tracking: {wandb: offline}` and `wandb sync` later",
        )


def run_identity(run_id: str, name: str) -> str:
    """The W&B id of a run: deterministic, without the characters W&B forbids in ids. Unlike names have unlike ids."""
    wanted = f"{run_id}-{name}"
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", wanted)
    if plain == wanted and len(plain) <= _LONGEST_ID:
        return plain
    return f"{plain[: _LONGEST_ID - 9]}-{sha256_of(wanted)[:8]}"


def track_run(
    root: Path, mode: str, project: str = "chrysalis", entity: str | None = None, tags: tuple[str, ...] = ()
) -> list[str]:
    """Bring W&B up to what the run directory holds: reports, end states, scores, merges, verdict. Returns the ids of the W&B
    runs that were touched; a second call without news touches none. Raises RunError if `mode` cannot work."""
    check_tracking(mode)
    if mode == "disabled":
        return []
    import wandb

    comparison = read_run(root)
    try:
        with Tracker(root, mode, project, entity, tags) as tracker:
            for row in read_metrics(tracker.layout.metrics):
                tracker.report(row)
            for variant in comparison.variants:
                if variant.curve:
                    tracker.judge(variant, comparison)
            for merge in comparison.merges:
                tracker.merge(merge, comparison)
            tracker.verdict(comparison)
    except wandb.Error as error:
        raise RunError(
            f"W&B took not all of this run: {error}",
            "check key, entity and network and run the same command again; or set `tracking: {wandb: offline}`",
        ) from error
    return sorted(tracker.touched)


class Tracker:
    """W&B runs of one run directory, one open per variant while it reports. In mode ``disabled`` it does nothing.

    Use as a context manager; leaving it finishes what is open, so that no wandb process outlives it.
    """

    def __init__(
        self, root: Path, mode: str, project: str = "chrysalis", entity: str | None = None, tags: tuple[str, ...] = ()
    ) -> None:
        self.layout = RunLayout(Path(root).absolute())
        self.mode, self.project, self.entity, self.tags = mode, project, entity, tags
        self.touched: set[str] = set()
        self._open: dict[str, Any] = {}
        run = manifest(self.layout.run_manifest) or {}
        self._run: dict[str, str] = redact({key: str(run.get(key, "")) for key in ("name", "run_id", "experiment_sha256")})
        self._tracked = mapping((manifest(self.layout.wandb / MANIFEST) or {}).get("runs"))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def report(self, row: Mapping[str, Any]) -> None:
        """Log one line of ``metrics.jsonl``, unless that report was logged before."""
        identity = run_identity(self._run["run_id"], row["variant"])
        seen = self._seen(identity)
        if self.mode == "disabled" or row["report"] <= seen.get("report", -1):
            return
        self._variant_run(identity, row["variant"]).log(_history(row), step=row["report"])
        self._note(identity, report=row["report"], rows=seen.get("rows", 0) + 1)

    def finish(self, variant: str, state: str) -> None:
        """Say how a variant ended, and close its W&B run."""
        identity = run_identity(self._run["run_id"], variant)
        if self.mode == "disabled" or self._seen(identity).get("state") == state:
            return
        run = self._variant_run(identity, variant)
        run.config.update({"state": state}, allow_val_change=True)
        run.summary["state"] = state
        self._note(identity, state=state)
        self._finish(identity)

    def judge(self, row: VariantRow, comparison: Comparison) -> None:
        """The end of a variant with its scores: loss on select, by domain, and on report."""
        identity = run_identity(self._run["run_id"], row.variant_id)
        scores = redact(_scores(row) | probe_metrics(comparison.probes, row.variant_id))
        if self.mode != "disabled" and self._seen(identity).get("scores") != sha256_of(scores):
            winner = comparison.verdict is not None and comparison.verdict.winner == row.variant_id
            run = self._variant_run(identity, row.variant_id)
            run.summary.update(scores)
            if winner:
                run.tags = (*run.tags, "winner")
            self._note(identity, scores=sha256_of(scores))
        self.finish(row.variant_id, row.state)

    def merge(self, row: MergeRow, comparison: Comparison) -> None:
        """One W&B run for one merge candidate: weights and parents in its config, one row of results."""
        config = {
            "merge": row.name,
            "method": row.method,
            "rank": row.rank,
            "weights": dict(row.weights),
            "parents": {name: adapter_name(self.layout.adapter(name)) for name in row.weights},
            "sha256": row.sha256,
            "notes": dict(row.notes),
            "failure": row.failure,
        }
        results = _scores(row) | {"merge/residual": row.residual, "merge/captured_energy": row.captured_energy}
        results |= probe_metrics(comparison.probes, row.name)
        tags = [f"merge:{row.method}"]
        if comparison.verdict is not None and comparison.verdict.chosen == row.name:
            tags.append("chosen")
        self._once(f"merge-{row.name}", row.name, "merge", config, results, tags)

    def verdict(self, comparison: Comparison) -> None:
        """One W&B run that says what was decided."""
        verdict = comparison.verdict
        if verdict is None:
            return
        config = {"winner": verdict.winner, "chosen": verdict.chosen, "sentences": list(verdict.sentences)}
        results: dict[str, Any] = {"verdict/merging_helped": verdict.merging_helped, "seed/eval/loss": comparison.seed_loss}
        results |= {f"difference/{key}": value for key, value in numbers(verdict.difference).items()}
        results |= {f"{row.name}/eval/loss": row.select_loss for row in comparison.merges}
        for who in ("seed", verdict.chosen):
            told = probe_metrics(comparison.probes, who) | task_metrics(comparison.lm_eval, who)
            results |= {f"{who}/{key}": value for key, value in told.items()}
        self._once("verdict", "verdict", "report", config, results, ["verdict"])

    def close(self) -> None:
        """Finish every open W&B run; the wandb service stops too, unless somebody else in this process uses it."""
        for identity in list(self._open):
            self._finish(identity)
        if self.touched:
            import wandb

            if wandb.run is None:
                wandb.teardown()

    # inside -------------------------------------------------------------------------------------------------------------

    def _once(
        self, key: str, name: str, job_type: str, config: Mapping[str, Any], results: Mapping[str, Any], tags: list[str]
    ) -> None:
        """A run of a single row, written again only when its content changed."""
        identity = run_identity(self._run["run_id"], key)
        content = sha256_of(redact([config, results, tags]))
        if self.mode == "disabled" or self._seen(identity).get("scores") == content:
            return
        run = self._start(identity, name, job_type, config, tags)
        told = {key: value for key, value in results.items() if value is not None}
        run.log(redact(told))
        self._note(identity, scores=content, rows=1)
        self._finish(identity)

    def _variant_run(self, identity: str, variant_id: str) -> Any:
        if identity not in self._open:
            record = manifest(self.layout.variant(variant_id))
            if record is None:
                raise RunError(
                    f"{self.layout.variant(variant_id)} is missing: a report names a variant that was never branched"
                )
            config = self._variant_config(Variant.from_json(record))
            run = self._start(identity, variant_id, "variant", config, [])
            run.define_metric("train/tokens")
            for glob in ("train/*", "eval/*"):
                run.define_metric(glob, step_metric="train/tokens", summary="min" if glob == "eval/*" else "last")
            run.define_metric("train/loss", step_metric="train/tokens", summary="min")
            for glob in ("perf/*", "mix/*"):
                run.define_metric(glob, step_metric="train/tokens")
        return self._open[identity]

    def _variant_config(self, variant: Variant) -> dict[str, Any]:
        base = manifest(self.layout.base_manifest) or {}
        settings = variant.hyperparameters.to_json()
        return {
            "variant": variant.variant_id,
            "index": variant.index,
            "rng_seed": variant.rng_seed,
            "adapter": adapter_of(mapping((manifest(self.layout.run_manifest) or {}).get("experiment"))),
            "lora": {name: settings[name] for name in _LORA},
            "optim": {name: value for name, value in settings.items() if name not in _LORA},
            "mix": asked_shares(variant.epigenome, tokens_by_domain(self.layout)),
            "steps": variant.steps,
            "tokens_per_step": variant.tokens_per_step,
            "seed": {"sha256": variant.seed_sha256},
            "genome": {"id": variant.genome_id},
            "base": {"name": base.get("name", ""), "sha256": variant.base_sha256},
            "parents": list(variant.parents),
        }

    def _start(self, identity: str, name: str, job_type: str, config: Mapping[str, Any], tags: list[str]) -> Any:
        import wandb

        experiment = {"name": self._run["name"], "sha256": self._run["experiment_sha256"], "run_id": self._run["run_id"]}
        base = (manifest(self.layout.base_manifest) or {}).get("name")
        everywhere = [*self.tags, f"brood:{self._run['run_id']}", *([f"base:{base}"] if base else [])]
        self.layout.wandb.mkdir(parents=True, exist_ok=True)
        with _own_folders(self.layout.wandb):
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                group=f"{self._run['name']}-{self._run['run_id']}"[:_LONGEST_ID],
                job_type=job_type,
                id=identity,
                name=redact(name),
                tags=sorted({redact(tag)[:_LONGEST_TAG] for tag in (*everywhere, *tags)}),
                config=redact({**config, "experiment": experiment}),
                dir=str(self.layout.wandb),
                mode=self.mode,  # type: ignore[arg-type]
                resume="allow",
                reinit="create_new",
                save_code=False,
                settings=_settings(wandb),
            )
        self._open[identity] = run
        self.touched.add(identity)
        return run

    def _seen(self, identity: str) -> dict[str, Any]:
        return mapping(self._tracked.get(identity))

    def _note(self, identity: str, **news: Any) -> None:
        self._tracked[identity] = {**self._seen(identity), **news}

    def _finish(self, identity: str) -> None:
        """Close a W&B run and only then remember what was sent with it."""
        self._open.pop(identity).finish()
        closed = {key: value for key, value in self._tracked.items() if key not in self._open}
        write_json(self.layout.wandb / MANIFEST, {"runs": closed})


def _history(row: Mapping[str, Any]) -> dict[str, Any]:
    """One line of ``metrics.jsonl`` under W&B's names; what is absent or null is left out."""
    names = {"train/loss": "train_loss", "train/learning_rate": "learning_rate", "train/gradient_norm": "gradient_norm",
             "train/tokens": "tokens", "train/step": "step", "eval/loss": "select_loss",
             "perf/tokens_per_second": "tokens_per_second", "perf/seconds": "seconds"}  # fmt: skip
    history = {name: row[key] for name, key in names.items() if row.get(key) is not None}
    tokens = numbers(row.get("domain_tokens"))
    total = sum(tokens.values())
    return history | {f"mix/{domain}/share": count / total for domain, count in tokens.items() if total > 0}


def _scores(row: VariantRow | MergeRow) -> dict[str, Any]:
    scores: dict[str, Any] = {f"eval/domain/{domain}": loss for domain, loss in row.domain_losses.items()}
    for metric in ("perplexity", "bits_per_byte", "accuracy"):
        known = {domain: values[metric] for domain, values in row.metrics.items() if metric in values}
        scores |= {f"eval/domain/{domain}/{metric}": value for domain, value in known.items()}
        if known and len(known) == len(row.metrics) and metric != "perplexity":
            scores[f"eval/{metric}"] = sum(known.values()) / len(known)
    if row.select_loss is not None:
        scores["eval/loss"] = row.select_loss
        scores["eval/perplexity"] = math.exp(min(row.select_loss, 700.0))
    if row.report_loss is not None:
        interval = row.report_loss
        scores |= {"report/loss": interval.mean, "report/low": interval.low, "report/high": interval.high}
    return scores


def _settings(wandb: Any) -> Any:
    """Nothing of this machine leaves it: no console, code, git remote, host name, package list or system metrics."""
    return wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        host="undisclosed",
        program="chrysalis",
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )


@contextmanager
def _own_folders(folder: Path) -> Iterator[None]:
    """wandb takes these folders from the environment alone; they are set while a run starts, and put back."""
    before = {name: os.environ.get(name) for name in _FOLDERS}
    os.environ.update({name: str(folder / part) for name, part in _FOLDERS.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
