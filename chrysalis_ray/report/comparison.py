"""The comparison of a population: one record read from the files of a run directory, however far the run came.

A stage that was not reached is None here (or an empty tuple), never an error; a file that is there and makes no sense is
one. Everything that shows a run (terminal table, HTML page, W&B, model card) starts from this record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import MIXTURE, Epigenome, Variant
from chrysalis_ray.report.metrics import read_metrics
from chrysalis_ray.report.mixes import ResolvedMix, asked_shares, resolved_mix
from chrysalis_ray.report.planned import plan_and_run
from chrysalis_ray.report.reading import GenomeSummary, genome_summary, mapping, number, numbers, public_manifest
from chrysalis_ray.report.scores import Interval, Scores

SEED = "seed"
WAITING = "waiting"
Metrics = Mapping[str, Mapping[str, float]]  # on select, by domain: loss, perplexity, bits_per_byte, accuracy, where known


@dataclass(frozen=True)
class Point:
    """One report of a variant: losses in nats per token, `tokens` since the seed."""

    tokens: int
    train_loss: float | None
    select_loss: float | None
    learning_rate: float | None


@dataclass(frozen=True)
class VariantRow:
    """One variant as it stands. `asked` and `realised` are shares of tokens by domain, each summing to 1."""

    variant_id: str
    state: str  # waiting | training | finished | stopped | evicted | failed
    reason: str | None
    step: int
    steps: int
    tokens: int
    train_loss: float | None
    select_loss: float | None
    domain_losses: Mapping[str, float]
    report_loss: Interval | None
    tokens_per_second: float | None
    seconds: float
    hyperparameters: Mapping[str, Any]
    asked: Mapping[str, float]
    realised: Mapping[str, float]
    parents: tuple[str, ...]
    sha256: str | None  # of the trained adapter
    curve: tuple[Point, ...]
    mix: ResolvedMix
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class MergeRow:
    """One merge candidate. `residual` is the relative Frobenius error of the rank cut, `weights` by variant."""

    name: str
    method: str
    weights: Mapping[str, float]
    rank: int | None
    residual: float | None
    captured_energy: float | None
    select_loss: float | None
    domain_losses: Mapping[str, float]
    report_loss: Interval | None
    sha256: str | None
    notes: Mapping[str, Any]
    failure: str | None
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class VerdictRow:
    """What was decided: the best variant, the candidate released, whether merging helped, and the sentences that say it."""

    winner: str
    chosen: str
    kind: str  # merge | winner: what `chosen` names, a merge candidate or the best variant itself
    merging_helped: str  # yes | no | unclear
    sentences: tuple[str, ...]
    difference: Mapping[str, Any]
    confidence: float | None


@dataclass(frozen=True)
class Comparison:
    """A run, compared. `variants` and `merges` stand best first by select loss, those without one last."""

    root: str
    name: str
    run_id: str
    created: str | None
    version: str | None
    experiment_sha256: str | None
    experiment: Mapping[str, Any]
    genome: GenomeSummary | None
    base: Mapping[str, Any] | None
    domains: tuple[str, ...]
    seed_loss: float | None
    seed_domain_losses: Mapping[str, float]
    seed_report: Interval | None
    variants: tuple[VariantRow, ...]
    merges: tuple[MergeRow, ...]
    verdict: VerdictRow | None
    wall_seconds: float | None
    turns: int | None
    planned: Mapping[str, float]
    measured: Mapping[str, float]
    has_imago: bool
    seed_metrics: Metrics = field(default_factory=dict)
    bound: Interval | None = None  # the mixture of all variants, on report
    audit: Mapping[str, Any] = field(default_factory=dict)
    probes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # what the verdict tells of each
    lm_eval: Mapping[str, Any] = field(default_factory=dict)  # and of tasks of lm-eval
    agreement: Mapping[str, Any] = field(default_factory=dict)  # and of how far candidates are from their members, on report

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for ``chrysalis report --json``."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The comparison as plain text, for a terminal that is none."""
        head = f"{self.name} ({self.run_id}), {self.stage}"
        rows = [
            f"{row.variant_id}: {row.state}, step {row.step}/{row.steps}, train {loss_text(row.train_loss)}, "
            f"select {loss_text(row.select_loss)}"
            for row in self.variants
        ]
        seed = [f"seed: select {loss_text(self.seed_loss)}"] if self.seed_loss is not None else []
        merges = [
            f"{row.name}: not merged, {row.failure}"
            if row.failure
            else f"{row.name}: {row.method}, residual {loss_text(row.residual)}, select {loss_text(row.select_loss)}"
            for row in self.merges
        ]
        return [head, *rows, *seed, *merges, *(self.verdict.sentences if self.verdict else ())]

    @property
    def stage(self) -> str:
        """How far the run came, in one word."""
        reached = {
            "released": self.has_imago,
            "judged": self.verdict is not None,
            "merged": bool(self.merges),
            "trained": self.wall_seconds is not None,
            "training": any(row.curve for row in self.variants),
            "branched": bool(self.variants),
        }
        return next((word for word, there in reached.items() if there), "started")

    @property
    def released(self) -> VariantRow | MergeRow | None:
        """The candidate that the verdict chose: a merge, or the best variant itself."""
        if self.verdict is None:
            return None
        if self.verdict.kind == "merge":
            return next((row for row in self.merges if row.name == self.verdict.chosen), None)
        return next((row for row in self.variants if row.variant_id == self.verdict.chosen), None)

    @property
    def best_variant(self) -> VariantRow | None:
        """The variant with the lowest select loss, if any has one."""
        first = self.variants[0] if self.variants else None
        return first if first is not None and first.select_loss is not None else None


def read_run(root: Path) -> Comparison:
    """Read a run directory. Raises RunError if it is none, or if one of its files cannot be read."""
    layout = RunLayout(Path(root).absolute())
    run = public_manifest(layout.run_manifest)
    if run is None:
        raise RunError(
            f"{layout.root} is not a run directory: it holds no {layout.run_manifest.name}", "give the folder of a run"
        )
    scores = Scores.read(layout)
    genome = genome_summary(layout.genome)
    population = public_manifest(layout.population_manifest) or {}
    variants = _variants(layout, population, scores, tokens_by_domain(layout))
    planned, measured = plan_and_run(layout, population)
    return Comparison(
        root=str(layout.root),
        name=str(run.get("name", layout.root.name)),
        run_id=str(run.get("run_id", "")),
        created=run.get("created"),
        version=run.get("version"),
        experiment_sha256=run.get("experiment_sha256"),
        experiment=mapping(run.get("experiment")),
        genome=genome,
        base=public_manifest(layout.base_manifest),
        domains=_domains(genome, variants, scores),
        seed_loss=scores.loss.get(SEED),
        seed_domain_losses=scores.domains.get(SEED, {}),
        seed_report=scores.intervals.get(SEED),
        variants=variants,
        merges=_merges(layout, scores),
        verdict=_verdict(scores.verdict),
        wall_seconds=number(population.get("wall_seconds")),
        turns=population.get("turns"),
        planned=planned,
        measured=measured,
        has_imago=layout.imago.is_dir() and layout.lineage.is_file(),
        seed_metrics=scores.metrics.get(SEED, {}),
        bound=scores.intervals.get(MIXTURE),
        audit=public_manifest(layout.audit) or {},
        probes={str(name): mapping(told) for name, told in mapping(mapping(scores.verdict).get("probes")).items()},
        lm_eval=mapping(mapping(scores.verdict).get("lm_eval")),
        agreement=mapping(mapping(mapping(scores.verdict).get("report")).get("agreement")),
    )


# variants -----------------------------------------------------------------------------------------------------------


def _variants(
    layout: RunLayout, population: Mapping[str, Any], scores: Scores, tokens: Mapping[str, float]
) -> tuple[VariantRow, ...]:
    branch = public_manifest(layout.branch_manifest) or {}
    reports: dict[str, list[dict[str, Any]]] = {}
    for row in read_metrics(layout.metrics):
        reports.setdefault(row["variant"], []).append(row)
    ends = mapping(population.get("variants"))
    rows = []
    for variant_id in branch.get("variants", []):
        record = public_manifest(layout.variant(variant_id))
        if record is None:
            raise RunError(
                f"{layout.variant(variant_id)} is missing, though the branch names it", "branch again in a new folder"
            )
        variant = Variant.from_json(record)
        rows.append(_variant_row(variant, reports.get(variant_id, []), mapping(ends.get(variant_id)), scores, tokens))
    return tuple(sorted(rows, key=lambda row: _best_first(row.select_loss, row.variant_id)))


def _variant_row(
    variant: Variant,
    reports: list[dict[str, Any]],
    end: Mapping[str, Any],
    scores: Scores,
    tokens: Mapping[str, float],
) -> VariantRow:
    last = reports[-1] if reports else {}
    curve = tuple(
        Point(
            int(row.get("tokens") or 0),
            number(row.get("train_loss")),
            number(row.get("select_loss")),
            number(row.get("learning_rate")),
        )
        for row in reports
    )
    live_losses = [point.select_loss for point in curve if point.select_loss is not None]
    speeds = sorted(speed for row in reports if (speed := number(row.get("tokens_per_second"))) is not None)
    epigenome = Epigenome.from_json(last["epigenome"]) if mapping(last.get("epigenome")).get("express") else variant.epigenome
    name = variant.variant_id
    return VariantRow(
        variant_id=name,
        state=str(end.get("state") or last.get("state") or WAITING),
        reason=end.get("reason"),
        step=int(end.get("step") or last.get("step") or 0),
        steps=variant.steps,
        tokens=int(end.get("tokens") or last.get("tokens") or 0),
        train_loss=curve[-1].train_loss if curve else None,
        select_loss=scores.loss.get(name, live_losses[-1] if live_losses else None),
        domain_losses=scores.domains.get(name, {}),
        report_loss=scores.intervals.get(name),
        tokens_per_second=speeds[len(speeds) // 2] if speeds else None,
        seconds=sum(number(row.get("seconds")) or 0.0 for row in reports),
        hyperparameters={
            **variant.hyperparameters.to_json(),
            **mapping(last.get("hyperparameters")),
            "rows_per_step": variant.rows_per_step,
        },
        asked=asked_shares(epigenome, tokens, int(last.get("tokens") or 0) // variant.sequence_length),
        realised=_shares(numbers(last.get("domain_tokens"))),
        parents=variant.parents,
        sha256=end.get("adapter_sha256"),
        curve=curve,
        mix=resolved_mix(variant, epigenome, tokens),
        metrics=scores.metrics.get(name, {}),
    )


def _shares(levels: Mapping[str, float]) -> dict[str, float]:
    total = sum(levels.values())
    return {domain: level / total for domain, level in sorted(levels.items()) if level > 0} if total > 0 else {}


def tokens_by_domain(layout: RunLayout) -> dict[str, float]:
    """Training tokens by domain; bytes where the genome was not tokenised yet: their ratios are alike, but caps seem wider."""
    parts = mapping((public_manifest(layout.tokens / "manifest.json") or {}).get("parts"))
    counts = {domain: number(mapping(mapping(splits).get("train")).get("tokens")) for domain, splits in parts.items()}
    if counts and all(counts.values()):
        return {domain: count for domain, count in counts.items() if count}
    genome = genome_summary(layout.genome)
    return {domain: float(value.train_bytes) for domain, value in (genome.domains if genome else {}).items()}


# merges and verdict -------------------------------------------------------------------------------------------------


def _merges(layout: RunLayout, scores: Scores) -> tuple[MergeRow, ...]:
    merges = public_manifest(layout.merges_manifest) or {}
    rows = []
    for name, value in mapping(merges.get("candidates")).items():
        rows.append(
            MergeRow(
                name=name,
                method=str(value.get("method", name)),
                weights=numbers(value.get("weights")),
                rank=value.get("rank"),
                residual=number(value.get("residual")),
                captured_energy=number(value.get("captured_energy")),
                select_loss=scores.loss.get(name),
                domain_losses=scores.domains.get(name, {}),
                report_loss=scores.intervals.get(name),
                sha256=value.get("sha256"),
                notes=mapping(value.get("notes")),
                failure=None,
                metrics=scores.metrics.get(name, {}),
            )
        )
    for name, reason in mapping(merges.get("failed")).items():
        rows.append(MergeRow(name, name, {}, None, None, None, None, {}, None, None, {}, str(reason)))
    return tuple(sorted(rows, key=lambda row: _best_first(row.select_loss, row.name)))


def _verdict(value: Mapping[str, Any] | None) -> VerdictRow | None:
    if value is None:
        return None
    report = mapping(value.get("report"))
    return VerdictRow(
        winner=str(value.get("winner", "")),
        chosen=str(value.get("chosen", "")),
        kind=str(value.get("kind") or ("winner" if value.get("chosen") == value.get("winner") else "merge")),
        merging_helped=str(value.get("merging_helped", "unclear")),
        sentences=tuple(str(sentence) for sentence in value.get("sentences", ())),
        difference=mapping(report.get("difference")),
        confidence=number(report.get("confidence")),
    )


def _domains(genome: GenomeSummary | None, variants: Iterable[VariantRow], scores: Scores) -> tuple[str, ...]:
    names = set(genome.domains) if genome else set()
    for row in variants:
        names |= set(row.asked) | set(row.realised)
    for losses in scores.domains.values():
        names |= set(losses)
    return tuple(sorted(names))


def loss_text(value: float | None) -> str:
    """A loss with four decimals, a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"


def _best_first(loss: float | None, name: str) -> tuple[bool, float, str]:
    return (loss is None, loss if loss is not None else 0.0, name)
