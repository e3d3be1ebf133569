"""Every path of a run directory, and of the cache beside it. No other file spells one of these names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CACHE = ".cache"  # beside the run directories

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_run_name(name: str) -> bool:
    """Whether `name` can name a run directory: one plain word, no path, nothing hidden (``.cache`` lies beside the runs)."""
    return bool(_RUN_NAME.fullmatch(name))


@dataclass(frozen=True)
class RunLayout:
    """A run directory. `root` is absolute; nothing a run writes lies outside it, but for the cache beside it."""

    root: Path

    # what was asked
    @property
    def experiment_yaml(self) -> Path:
        """The experiment file, byte for byte as it was given."""
        return self.root / "experiment.yaml"

    @property
    def driver_log(self) -> Path:
        """What Ray, transformers and other libraries printed in the driver."""
        return self.root / "libraries.log"

    @property
    def lock(self) -> Path:
        """Held by the process that works here."""
        return self.root / ".lock"

    @property
    def run_manifest(self) -> Path:
        """The resolved experiment with its sha256: a run directory belongs to exactly one."""
        return self.root / "run.json"

    @property
    def weave(self) -> Path:
        return self.root / "weave.jsonl"

    @property
    def plan(self) -> Path:
        """What `plan` said before the run, and what came."""
        return self.root / "plan.json"

    def probe(self) -> ProbeLayout:
        """What decided between blueprints before the run was claimed, where the experiment asked for that."""
        return ProbeLayout(self.root / "probe")

    # genome
    @property
    def genome(self) -> Path:
        return self.root / "genome"

    @property
    def tokens(self) -> Path:
        """The genome tokenised for this base; memory-mapped by every worker."""
        return self.root / "tokens"

    # base and seed
    @property
    def base_manifest(self) -> Path:
        return self.root / "base.json"

    @property
    def seed(self) -> Path:
        """Adapter zero, a PEFT folder."""
        return self.root / "seed"

    # population
    @property
    def variants(self) -> Path:
        return self.root / "variants"

    def variant(self, variant_id: str) -> Path:
        return self.variants / variant_id / "variant.json"

    def adapter(self, variant_id: str) -> Path:
        """The trained adapter of a variant, a PEFT folder."""
        return self.variants / variant_id / "adapter"

    @property
    def branch_manifest(self) -> Path:
        return self.root / "branch.json"

    @property
    def population_manifest(self) -> Path:
        """Written last by the training stage: every variant's final position and state."""
        return self.root / "population.json"

    @property
    def failed(self) -> Path:
        """Variants and merges that did not emerge, each with its reason."""
        return self.root / "failed"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tune(self) -> Path:
        return self.root / "tune"

    @property
    def bodies(self) -> Path:
        return self.root / "bodies"

    # judging, merging, imago
    @property
    def select_scores(self) -> Path:
        return self.root / "evaluation" / "select.json"

    @property
    def report_scores(self) -> Path:
        return self.root / "evaluation" / "report.json"

    def agreement(self, split: str) -> Path:
        """How far candidates predict from what their members do, on select or on report."""
        return self.root / "evaluation" / f"agreement-{split}.json"

    def inputs(self, variant_id: str) -> Path:
        """What a variant feeds the modules of the base, where a merge goes by it."""
        return self.root / "evaluation" / "inputs" / f"{variant_id}.safetensors"

    def whole_inputs(self, variant_id: str) -> Path:
        """What it feeds them on rows of its own mix, all of it."""
        return self.root / "evaluation" / "inputs" / f"{variant_id}.whole.safetensors"

    def search(self, name: str) -> Path:
        """How far the search for the weights of a merge has come."""
        return self.root / "evaluation" / f"search-{name}.json"

    @property
    def audit(self) -> Path:
        """What the variants look like beside each other, before anything is merged."""
        return self.root / "evaluation" / "audit.json"

    @property
    def probes(self) -> Path:
        """Which items of the probes every candidate got right."""
        return self.root / "evaluation" / "probes.json"

    @property
    def tasks(self) -> Path:
        """What the seed, the best variant and the chosen one make of tasks of lm-eval."""
        return self.root / "evaluation" / "lm_eval.json"

    @property
    def verdict(self) -> Path:
        return self.root / "verdict.json"

    @property
    def merges(self) -> Path:
        return self.root / "merges"

    @property
    def merges_manifest(self) -> Path:
        return self.merges / "merges.json"

    def merge(self, name: str) -> Path:
        """One merge candidate, a PEFT folder with ``merge.json`` beside the weights."""
        return self.merges / name

    def merge_manifest(self, name: str) -> Path:
        """Written last into the folder of a merge."""
        return self.merge(name) / "merge.json"

    def merge_found(self, name: str) -> Path:
        """Whom judging found for a merge that is not made yet."""
        return self.merges / f".found-{name}.json"

    def merge_modules(self, name: str) -> Path:
        """The modules of a merge that is being made."""
        return self.merges / f".modules-{name}"

    @property
    def imago(self) -> Path:
        return self.root / "imago"

    @property
    def lineage(self) -> Path:
        return self.imago / "lineage.json"

    # comparison
    @property
    def wandb(self) -> Path:
        """Folder given to W&B as ``dir``; it makes its own ``wandb/`` inside."""
        return self.root / "tracking"

    @property
    def html(self) -> Path:
        return self.root / "report.html"

    @property
    def report_manifest(self) -> Path:
        return self.root / "report.json"


@dataclass(frozen=True)
class ProbeLayout:
    """The short populations that decide between blueprints, and what came of them."""

    root: Path

    @property
    def question(self) -> Path:
        """What is to be decided; written first."""
        return self.root / "question.json"

    @property
    def outcome(self) -> Path:
        """Who was chosen, and why; written last."""
        return self.root / "probe.json"

    def heat(self, name: str) -> RunLayout:
        """One short population, laid out like a run as far as it goes."""
        return RunLayout(self.root / name)


@dataclass(frozen=True)
class CacheLayout:
    """What several runs of one `runs` folder share, each entry named by the hash of its recipe."""

    root: Path

    def base(self, recipe_sha256: str) -> Path:
        return self.root / "bases" / recipe_sha256[:16]

    def tokens(self, key_sha256: str) -> Path:
        """A genome in the tokens of one tokenizer, in rows of one length."""
        return self.root / "tokens" / key_sha256[:16]

    def token_stores(self) -> list[Path]:
        return sorted(path for path in (self.root / "tokens").glob("*") if path.is_dir())

    def measurement(self, question_sha256: str, lanes: str) -> Path:
        """What was measured on this machine for one kind of body, at lanes of one shape."""
        return self.root / "measured" / f"{question_sha256[:16]}-{lanes}.json"

    def measurements(self, question_sha256: str) -> list[Path]:
        return sorted((self.root / "measured").glob(f"{question_sha256[:16]}-*.json"))
