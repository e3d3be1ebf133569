"""The whole story: from one YAML to one adapter, and an honest word on whether the population was worth it.

    probe     where it is asked for: short populations decide between blueprints, before the run is claimed
    genome    read, hashed, split, sealed
    base      pinned (or, for the embedded default, made here from the genome)
    seed      adapter zero, written once
    branch    N self-contained variants
    train     one body, N slots; Tune steers, the body trains, every turn is a cut on disk
    judge     held-out loss of every variant on *select*
    merge     winner, ensemble, consensus: each judged on the same rows
    verdict   chosen on *select*, told on *report*
    imago     the chosen adapter with its card and its lineage
    compare   metrics, W&B runs, one HTML page

Every stage goes from files to files and writes its manifest last. What has a manifest is done: the same command after a
Ctrl-C, a kill or a power cut goes on where the last one stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.config.claim import another_body, claim_run, run_directory
from chrysalis_ray.config.loading import LoadedExperiment
from chrysalis_ray.config.population_checks import rows_at_once
from chrysalis_ray.core.layout import CACHE, CacheLayout, RunLayout
from chrysalis_ray.core.lock import sole_owner
from chrysalis_ray.core.records import Variant, read_json, write_json
from chrysalis_ray.core.weave import Weave
from chrysalis_ray.training.planning.forecast import settle_plan

if TYPE_CHECKING:
    from chrysalis_ray.body.manifest import Bodies
    from chrysalis_ray.genome.build import Genome
    from chrysalis_ray.population.branch import Branching
    from chrysalis_ray.training.planning.heats import Heat


class Story(Protocol):
    """Who listens while a population grows: a terminal, a tracker, a test."""

    def stage(self, name: str, sentence: str) -> None:
        """A stage was reached (or skipped: the sentence says so)."""

    def population(self, variants: Sequence[Variant]) -> None:
        """Training begins."""

    def row(self, row: dict[str, Any]) -> None:
        """A variant reports."""

    def conclusion(self, variant_id: str, state: str, reason: str | None) -> None:
        """A variant is done for good."""


@dataclass
class Run:
    """One run under way: what was asked, where it lies, who listens."""

    loaded: LoadedExperiment
    layout: RunLayout
    cache: CacheLayout
    run_id: str
    story: Story

    @property
    def experiment(self) -> Any:
        return self.loaded.experiment

    def record(self, kind: str, body: dict[str, Any]) -> None:
        Weave(self.layout.weave).append(kind, body)


def grow(
    loaded: LoadedExperiment, runs: Path, story: Story, name: str | None = None, address: str | None = None
) -> dict[str, Any]:
    """Grow a population from an experiment and return the verdict. Writes `runs/<name>`; safe to call again after any end.

    `address` joins a running Ray cluster (``auto`` finds it); None starts one on this machine. Raises ChrysalisError.
    """
    layout = run_directory(loaded, runs, name)
    check_outside(loaded, address)
    with sole_owner(layout.lock), library_output(layout.driver_log):
        loaded = decide_blueprint(loaded, layout, story, address)
        run = open_run(loaded, layout, story, address)
        genome = seal_genome(run)
        base = pin_base(run, genome)
        tokenise(run, genome, base)
        branching = branching_of(run, genome, base, write_seed(run, base))
        variants = branch(run, branching)
        if not layout.report_scores.exists():
            with bodies_for(run, base, variants, address) as bodies:
                train(run, branching, variants, bodies)
                judge(run, bodies)
        verdict = reach_verdict(run)
        emerge(run, verdict)
        compare(run)
    return verdict


@contextmanager
def library_output(path: Path) -> Iterator[None]:
    """What libraries print and warn goes to a file of the run; the story has a stream of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


# what is asked ------------------------------------------------------------------------------------------------------


def check_outside(loaded: LoadedExperiment, address: str | None) -> None:
    """What lies outside this process and would fail only after the work: a package, a W&B key, a Ray cluster."""
    from chrysalis_ray.body.cluster import check_address
    from chrysalis_ray.population.search import check_installed
    from chrysalis_ray.report.tracking import check_tracking
    from chrysalis_ray.training.planning.hardware import check_machine

    check_installed(loaded.experiment.population)
    for each in (loaded, *(candidate for _, candidate in loaded.candidates)):
        check_machine(each.body)
    check_tracking(loaded.experiment.tracking.wandb)
    check_address(address)


def open_run(
    loaded: LoadedExperiment, layout: RunLayout, story: Story, address: str | None = None, cache: CacheLayout | None = None
) -> Run:
    """The run in this directory, new or found again. Raises RunError if another experiment lives there."""
    from chrysalis_ray.body.machine import machine_at

    found, cache = layout.run_manifest.exists(), cache or CacheLayout(layout.root.parent / CACHE)
    run_id = claim_run(loaded, layout)
    story.stage("run", f"found {layout.root}, going on" if found else f"new in {layout.root}")
    if said := another_body(loaded, layout):
        story.stage("body", said)
    is_open = loaded.open or loaded.body.slots == "auto"  # else nothing is chosen by what a cluster has
    settled = settle_plan(loaded, layout, cache, story.stage, partial(machine_at, address if is_open else None))
    return Run(settled, layout, cache, run_id, story)


def decide_blueprint(loaded: LoadedExperiment, layout: RunLayout, story: Story, address: str | None) -> LoadedExperiment:
    """`loaded` with the blueprint that its probe chose, as it is where it has none. What was decided is not tried again."""
    if not loaded.candidates:
        return loaded
    from chrysalis_ray.body.cluster import joined
    from chrysalis_ray.body.machine import machine_at
    from chrysalis_ray.population.probing import hold_probe

    def one(heat: Heat, place: RunLayout) -> None:
        rehearse(heat, place, layout, story, address)

    look = partial(machine_at, None) if address is None else None
    return hold_probe(loaded, layout, story.stage, partial(joined, address), one, look)


def rehearse(heat: Heat, layout: RunLayout, home: RunLayout, story: Story, address: str | None) -> None:
    """As much of the story as scores the candidates of a heat on *select*; what reports tell is not looked at. The genome is
    the one of the run at `home`, and the cache too."""
    from chrysalis_ray.evaluate.stages import Judging, judge_variants
    from chrysalis_ray.genome.linking import link_genome
    from chrysalis_ray.population.harvest import emerged

    run = open_run(heat.loaded, layout, story, address, CacheLayout(home.root.parent / CACHE))
    genome = seal_genome(replace(run, layout=home))
    link_genome(genome, layout.genome)  # so that who learned from a document can be told of the heats, too
    base = pin_base(run, genome)
    tokenise(run, genome, base)
    branching = replace(branching_of(run, genome, base, write_seed(run, base)), listed=heat.blueprints)
    variants = branch(run, branching)
    with bodies_for(run, base, variants, address) as bodies:
        train(run, branching, variants, bodies)
        names = emerged(layout)
        judge_variants(Judging(layout, run.experiment, names, bodies.judge, story.stage, run.record))


def seal_genome(run: Run) -> Genome:
    from chrysalis_ray.genome.build import build_genome, open_genome

    if run.layout.branch_manifest.exists():  # variants stand on it: from now on it is opened and never built again
        genome = open_genome(run.layout.genome)
    else:
        genome = build_genome(run.experiment.genome, run.layout.genome, run.loaded.folder)
    parts = [part for splits in genome.manifest["content"]["totals"].values() for part in splits.values()]
    documents, megabytes = sum(part["documents"] for part in parts), sum(part["bytes"] for part in parts) / 1e6
    domains = ", ".join(genome.domains)
    run.story.stage("genome", f"{documents} documents, {megabytes:.1f} MB in {domains}; id {genome.genome_id[:12]}")
    return genome


def pin_base(run: Run, genome: Genome) -> dict[str, Any]:
    from chrysalis_ray.training.base import prepare_base

    base = prepare_base(run.loaded.base, genome, run.cache, run.experiment.rng_seed, lambda line: run.story.stage("base", line))
    if not run.layout.branch_manifest.exists():
        write_json(run.layout.base_manifest, base)
    run.story.stage("base", f"{base['name']}: {base['parameters'] / 1e6:.1f} M parameters, sha256 {base['sha256'][:12]}")
    return base


def tokenise(run: Run, genome: Genome, base: dict[str, Any]) -> None:
    from chrysalis_ray.genome.token_cache import shared_tokens

    length, tell = run.loaded.blueprint.lanes.sequence_length, partial(run.story.stage, "tokens")
    place, template = run.layout.tokens, run.loaded.chat_template
    tokens = shared_tokens(genome, Path(base["path"]), run.cache, place, length, template, tell)
    if run.experiment.evaluate.probes:  # before anything is trained: can this base be asked them?
        from chrysalis_ray.evaluate.probing import check_probes

        check_probes(run.experiment.evaluate.probes, Path(base["path"]), template)
    if run.experiment.evaluate.lm_eval is not None and not run.layout.tasks.exists():
        from chrysalis_ray.evaluate.tasks import check_tasks

        check_tasks(run.experiment.evaluate.lm_eval)
    total = sum(tokens.token_count(domain, "train") for domain in tokens.domains)
    run.story.stage("tokens", f"{total:,} training tokens in rows of {length}")


def write_seed(run: Run, base: dict[str, Any]) -> str:
    from chrysalis_ray.population.branch import bank_rank
    from chrysalis_ray.seed.adapter import WEIGHTS, adapter_sha256
    from chrysalis_ray.seed.zero import target_names, write_adapter_zero

    if (run.layout.seed / WEIGHTS).exists():
        return adapter_sha256(run.layout.seed)
    folder, worn, rng_seed = Path(base["path"]), run.loaded.blueprint.worn, run.experiment.rng_seed
    rank = run.loaded.blueprint.patterns.largest(bank_rank(run.loaded))
    directions, is_eva = None, isinstance(worn, Lora) and worn.init == "eva"
    if isinstance(worn, Lora) and is_eva:
        from chrysalis_ray.training.eva import read_directions

        directions = read_directions(folder, run.loaded.body, run.layout.tokens, target_names(folder, worn), rank, rng_seed)
    sha256 = write_adapter_zero(folder, base["name"], worn, rank, rng_seed, run.layout.seed, directions=directions)
    from_data = ", its A from the train split" if is_eva else ""
    if not isinstance(worn, Lora):
        from_data = f", the base as it is; it gives the number from which every {worn.type} begins"
    run.story.stage("seed", f"adapter zero of rank {rank}{from_data}, sha256 {sha256[:12]}")
    return sha256


def branching_of(run: Run, genome: Genome, base: dict[str, Any], seed_sha256: str) -> Branching:
    from chrysalis_ray.population.branch import Branching, trained_rows, trained_tokens
    from chrysalis_ray.population.mixes import heard_domains

    domains = heard_domains(run.experiment, genome.domains, base["parameters"], run.story.stage)
    known = (domains, seed_sha256, genome.genome_id, base["sha256"], trained_tokens(run.layout), trained_rows(run.layout))
    return Branching(run.experiment, run.loaded.blueprint, *known)


def branch(run: Run, branching: Branching) -> list[Variant]:
    """The variants that are there before training: all of them, or those that a searcher had proposed before a kill."""
    from chrysalis_ray.population.branch import branch_population, check_origins, drawn_values, read_branch, write_branch
    from chrysalis_ray.population.mixes import never_drawn

    if run.layout.branch_manifest.exists():
        variants = read_branch(run.layout)
        check_origins(variants, branching.seed_sha256, branching.genome_id, branching.base_sha256)
        return variants
    population, first = run.experiment.population, branching.variant(0, drawn_values(run.experiment, 0))
    variants = [] if population.proposes else branch_population(branching)
    write_branch(run.layout, variants)
    run.record("population.branch", {"variants": [variant.variant_id for variant in variants], "seed": branching.seed_sha256})
    proposed = "" if variants else f", proposed by {population.searcher.type} as slots fall free"
    length = f"{first.steps * first.tokens_per_step:,} tokens each at the most"
    run.story.stage("branch", f"{population.variants} variants, {length}{proposed}")
    for sentence in never_drawn(variants, branching.tokens):
        run.story.stage("mixes", sentence)
    return variants


# body, training, judging --------------------------------------------------------------------------------------------


def bodies_for(
    run: Run, base: dict[str, Any], variants: Sequence[Variant], address: str | None
) -> AbstractContextManager[Bodies]:
    """Bodies that host these variants, on a cluster of our own or on the one at `address`."""
    from chrysalis_ray.body.manifest import awakened
    from chrysalis_ray.body.morphology import Morphology
    from chrysalis_ray.body.worker import BodyPlan
    from chrysalis_ray.population.branch import bank_rank

    layout, loaded = run.layout, run.loaded
    plan = BodyPlan(
        morphology=(Morphology() >> loaded.body).hosting(loaded.experiment.population.variants),
        base_folder=base["path"],
        tokens_folder=str(layout.tokens),
        seed_folder=str(layout.seed),
        store_folder=str(layout.store),
        targets=loaded.blueprint.worn.targets or (),
        rank=bank_rank(loaded),
        rows_per_microstep=rows_at_once(loaded),
        rows_per_report=loaded.experiment.evaluate.rows_per_report,
        omega_name=f"omega-{run.run_id}",
        namespace="",
        solo=loaded.blueprint.worn if loaded.blueprint.worn.solo else None,
        patterns=loaded.blueprint.patterns,
    )
    tell = partial(run.story.stage, "body")
    return awakened(plan, layout, loaded.experiment.population, variants, address, tell)


def train(run: Run, branching: Branching, variants: Sequence[Variant], bodies: Bodies) -> None:
    from chrysalis_ray.population.harvest import harvest_population
    from chrysalis_ray.population.listener import PopulationListener
    from chrysalis_ray.population.tune_run import run_population
    from chrysalis_ray.report.metrics import append_metrics, read_metrics, told_positions

    if run.layout.population_manifest.exists():
        return
    read_metrics(run.layout.metrics)  # refuses a damaged line, with its number
    told = told_positions(run.layout.metrics)

    def on_row(row: dict[str, Any]) -> None:
        if (row["variant"], row["position"]) not in told:  # a restarted trial or run tells again what it told before
            append_metrics(run.layout.metrics, row)
            told.add((row["variant"], row["position"]))
        run.story.row(row)

    run.story.population(variants)
    started = time.monotonic()
    shutil.rmtree(run.layout.tune, ignore_errors=True)  # Tune's files are transport: the cuts are the truth
    listener = PopulationListener(bodies.omega, on_row, run.story.conclusion, tell_rest=run.experiment.population.pauses)
    run_population(branching, variants, run.layout, bodies, listener)
    bodies.check()
    facts = bodies.describe()
    harvest_population(
        run.layout,
        bodies.summary(),
        {"wall_seconds": time.monotonic() - started, "train_seconds": facts["train_seconds"], "turns": facts["turns"]},
    )


def judge(run: Run, bodies: Bodies) -> None:
    """Scores, merges, scores of the merges: `evaluate/stages.py`, with the bodies as judges."""
    from chrysalis_ray.evaluate.stages import Judging, judge_and_merge
    from chrysalis_ray.population.harvest import emerged

    names = emerged(run.layout)
    heard = (run.story.stage, run.record, bodies.ask, run.loaded.chat_template)
    beside = run.loaded.blueprint.worn.solo is None
    judge_and_merge(Judging(run.layout, run.experiment, names, bodies.judge, *heard, beside))


# verdict, imago, comparison -----------------------------------------------------------------------------------------


def reach_verdict(run: Run) -> dict[str, Any]:
    from chrysalis_ray.evaluate import stages
    from chrysalis_ray.population.harvest import emerged

    verdict = stages.reach_verdict(run.layout, run.experiment, emerged(run.layout))
    for sentence in verdict["sentences"]:
        run.story.stage("verdict", sentence)
    return verdict


def emerge(run: Run, verdict: dict[str, Any]) -> None:
    """The chosen adapter with its card and its lineage: a PEFT folder that needs nothing of this package."""
    from chrysalis_ray.report.card import imago_card
    from chrysalis_ray.report.lineage import lineage
    from chrysalis_ray.seed.adapter import adapter_sha256
    from chrysalis_ray.seed.solo import release_adapter

    chosen, merged = verdict["chosen"], verdict["kind"] == "merge"
    if run.layout.lineage.exists() and read_json(run.layout.lineage)["imago"]["sha256"] == adapter_sha256(run.layout.imago):
        return run.story.stage("imago", f"{chosen} in {run.layout.imago}")
    source = run.layout.merge(chosen) if merged else run.layout.adapter(chosen)
    release_adapter(source, run.layout.imago, card=imago_card(run.layout.root))
    write_json(run.layout.lineage, lineage(run.layout.root))
    run.record("imago", {"chosen": chosen, "kind": verdict["kind"]})
    return run.story.stage("imago", f"{chosen} in {run.layout.imago}")


def compare(run: Run) -> None:
    """One HTML page, and W&B runs inside the run directory."""
    from chrysalis_ray.report.html import write_report
    from chrysalis_ray.report.tracking import track_run

    page = write_report(run.layout.root)  # first: it needs no network
    tracking = run.experiment.tracking
    if tracking.wandb != "disabled":
        track_run(run.layout.root, tracking.wandb, tracking.project, tracking.entity, tracking.tags)
    run.story.stage("compare", f"{page}")
