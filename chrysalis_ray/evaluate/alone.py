"""Judging adapters from anywhere in this one process: PEFT folders in, what each loses on held-out text out. No Ray.

The text is a genome's: its select or report split, tokenised for the base at hand. The base itself is judged beside the
adapters, and where there are several, what they say together (the mean of their probabilities).
"""

from __future__ import annotations

import importlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from chrysalis_ray.config.probes import Probe
from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json
from chrysalis_ray.evaluate.agreement import ReportAgreements, SelectAgreements
from chrysalis_ray.evaluate.bootstrap import draws_for, interval, resampled_losses
from chrysalis_ray.evaluate.folders import Source, open_sources
from chrysalis_ray.evaluate.judging import judge_candidates
from chrysalis_ray.evaluate.probes import judge_probes
from chrysalis_ray.evaluate.questions import Reader
from chrysalis_ray.evaluate.scores import DocumentScore, ReportScores, Scores, SelectScores
from chrysalis_ray.evaluate.subjects import Candidate, Comparing, mixture_of
from chrysalis_ray.genome.build import open_genome
from chrysalis_ray.genome.tokenizer import load_tokenizer
from chrysalis_ray.genome.tokens import TokenStore, open_tokens, tokenize_genome
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.trunk import longest_row

if TYPE_CHECKING:
    from chrysalis_ray.genome.build import Genome

BASE, TOGETHER = "base", "together"  # the candidates beside the adapters, which are named by their folders
MOST_SLOTS = 8
ROW_LENGTH, ROWS_PER_DOMAIN = 512, 64  # of a genome that no run says otherwise of
SAMPLES, CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class Text:
    """Held-out text and how it is read: a genome, and what the run that it is of says about rows."""

    genome: Genome
    tokens: Path | None
    row_length: int
    rows_per_domain: int
    base: Path | None


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval by name, a folder with more of them in YAML, and how many items of each (None: all)."""

    names: tuple[str, ...] = ()
    folder: Path | None = None
    limit: int | None = None


def evaluate_folders(
    names: Sequence[str],
    genome: Path | None,
    base: Path | None = None,
    split: Literal["select", "report"] = "select",
    probes: Sequence[Probe] = (),
    tasks: Tasks = Tasks(),
) -> dict[str, Any]:
    """Scores of the adapters `names` (PEFT folders or hub ids) on a split of `genome`, the folder of a genome or of a run, on
    probe tasks, and on `tasks` of lm-eval.

    `base` is the folder of their base; that of the run by default. Without a genome no text is judged. Nothing is written.
    Raises EvaluationError where there is no such text, base or task, MergeError and ModelError for adapters that are no plain
    LoRA, or not of this base.
    """
    if split not in ("select", "report"):
        raise EvaluationError(f"{split!r} is not a held-out split", "judge on select or report")
    twins = sorted({name for name in [*names, BASE, TOGETHER] if [*names, BASE, TOGETHER].count(name) > 1})
    if twins:
        raise EvaluationError(
            f"two candidates would be called {twins[0]!r}", "give each adapter once; ./base is a name as well"
        )
    if genome is None and not probes and not tasks.names:
        raise EvaluationError("there is nothing to judge by", "give --genome, --probe or --lm-eval")
    harness = open_harness() if tasks.names else None  # before anything is loaded
    text = None if genome is None else find_text(genome)
    folder = base or (text.base if text else None)
    if folder is None:
        raise EvaluationError(f"{genome or 'nothing'} does not say which base the adapters are of", "give --base FOLDER")
    sources = open_sources(names)
    pack, longest = pack_for(sources, folder)
    adapters = [Candidate(BASE), *(Candidate(source.name, str(source.folder)) for source in sources)]
    told = {"base": str(folder)}
    found = told | (judged_text(pack, longest, adapters, text, folder, split) if text else {})
    found["probes"] = judge_probes(pack, Reader(folder), longest, probes, adapters, Path, BASE) if probes else {}
    if harness is not None:
        found["lm_eval"] = harness.evaluate_tasks(pack, folder, longest, adapters, tasks.names, tasks.folder, tasks.limit)
    return found


def judged_text(
    pack: Pack, longest: int | None, adapters: Sequence[Candidate], text: Text, folder: Path, split: Literal["select", "report"]
) -> dict[str, Any]:
    """Scores of the adapters, the first of which is the base, on held-out text, and of what several say together; and how far
    each predicts from what the others do."""
    folders = [each.folder for each in adapters if each.folder is not None]
    with (
        tempfile.TemporaryDirectory(prefix="chrysalis-agreement-") as beside,
        tokens_for(text, folder, min(text.row_length, longest or text.row_length)) as tokens,
    ):
        compare = _with_each_other(adapters, Path(beside) / "agreement.json")
        candidates = [*adapters, *([mixture_of(TOGETHER, folders, compare)] if len(folders) > 1 else [])]
        rows = judge_candidates(pack, tokens, candidates, split, text.rows_per_domain)
        agreement = _agreement(Path(compare.file), split) if len(folders) > 1 else {}
    kind = SelectScores if split == "select" else ReportScores
    finite = {name: own for name, own in rows.items() if all(math.isfinite(row[2]) for row in own)}
    if BASE not in finite:
        raise EvaluationError(f"the base at {folder} has losses that are no numbers on {split}", "look at the base")
    scores = kind({name: [DocumentScore(*row) for row in own] for name, own in finite.items()})
    return {
        "genome_id": text.genome.genome_id,
        "split": split,
        "documents": len(scores.documents),
        "tokens": sum(score.tokens for score in scores.documents),
        "diverged": [name for name in rows if name not in finite],
        "candidates": {name: _told(scores, name) for name in finite},
        "against_base": against_base(scores),
        "agreement": agreement,
    }


def _with_each_other(adapters: Sequence[Candidate], file: Path) -> Comparing:
    """Every adapter is compared with all others, the base with all of them."""
    names = [each.name for each in adapters if each.folder is not None]
    return Comparing(str(file), {each.name: tuple(name for name in names if name != each.name) for each in adapters})


def _agreement(file: Path, split: Literal["select", "report"]) -> dict[str, Any]:
    found = (SelectAgreements if split == "select" else ReportAgreements).load(file)
    return {name: found.tell(name, SAMPLES, CONFIDENCE, 0) for name in found.documents}


def open_harness() -> Any:
    """The room's door to lm-eval. Raises EvaluationError where that extra is not installed, or not all that it needs."""
    try:
        return importlib.import_module("chrysalis_ray.evaluate.harness")
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "chrysalis_ray":
            raise
        whole = "is not installed" if missing == "lm_eval" else f"cannot be imported: {error}"
        raise EvaluationError(f"lm-eval {whole}", "pip install -c constraints.txt -e '.[lm-eval]'") from error


def find_text(folder: Path) -> Text:
    """The genome in `folder`, or of the run in `folder`."""
    layout = RunLayout(folder.absolute())
    if not layout.run_manifest.is_file():
        return Text(open_genome(folder), None, ROW_LENGTH, ROWS_PER_DOMAIN, None)
    resolved = read_json(layout.run_manifest).get("experiment", {})
    told = resolved.get("experiment", {}).get("evaluate", {})
    tokens = layout.tokens if (layout.tokens / "manifest.json").is_file() else None
    length = open_tokens(tokens).sequence_length if tokens else ROW_LENGTH
    base = Path(read_json(layout.base_manifest)["path"]) if layout.base_manifest.is_file() else None
    return Text(open_genome(layout.genome), tokens, length, int(told.get("rows_per_domain", ROWS_PER_DOMAIN)), base)


@contextmanager
def tokens_for(text: Text, base: Path, length: int) -> Iterator[TokenStore]:
    """The text in tokens of this base: those of the run where they are, else made for as long as they are needed."""
    if text.tokens is not None:
        tokens = open_tokens(text.tokens)
        same = tokens.manifest["key"]["tokenizer_sha256"] == load_tokenizer(base).sha256
        if same and tokens.sequence_length == length and tokens.genome_id == text.genome.genome_id:
            yield tokens
            return
    with tempfile.TemporaryDirectory(prefix="chrysalis-tokens-") as folder:
        yield tokenize_genome(text.genome, base, Path(folder), length)


def pack_for(sources: Sequence[Source], base: Path) -> tuple[Pack, int | None]:
    """The base with slots for adapters of these modules and ranks, on the GPU if there is one; and the longest row it takes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bf16" if device.type == "cuda" else "fp32"
    modules = sorted({module for source in sources for module in source.weights.factors})
    rank = max(source.weights.rank for source in sources)
    engine = make_engine(0, "none", precision, device)
    slots = min(len(sources) + 1, MOST_SLOTS)
    model = load_base(base, precision)
    return Pack(model, modules, slots, rank, engine, threads=torch.get_num_threads()), longest_row(model)


def against_base(scores: Scores) -> dict[str, dict[str, float]]:
    """How much less or more than the base each candidate loses, paired over documents, with intervals that are corrected
    (Bonferroni) for the number of candidates that are compared with it: the adapters, and what they say together."""
    tokens_D = np.array([score.tokens for score in scores.documents], dtype=np.float64)
    numbers = {domain: number for number, domain in enumerate(scores.domains)}
    domains_D = np.array([numbers[score.domain] for score in scores.documents], dtype=np.int64)
    losses_CD = np.array([[score.loss_sum for score in scores.of(name)] for name in scores.candidates])
    confidence = 1.0 - (1.0 - CONFIDENCE) / max(1, len(scores.candidates) - 1)
    drawn_SC = resampled_losses(losses_CD, tokens_D, domains_D, draws_for(confidence, SAMPLES), 0)
    zero = list(scores.candidates).index(BASE)
    found = {}
    for place, name in enumerate(scores.candidates):
        if place != zero:
            low, high = interval(drawn_SC[:, place] - drawn_SC[:, zero], confidence)
            found[name] = {"mean": scores.loss(name) - scores.loss(BASE), "low": low, "high": high}
    return found


def _told(scores: Scores, name: str) -> dict[str, Any]:
    loss = scores.loss(name)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": scores.bits_per_byte(name),
        "accuracy": scores.accuracy(name),
        "domains": scores.metrics(name),
    }
