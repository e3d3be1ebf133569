"""An experiment: one YAML that grows a population (`experiments/*.yaml`)."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from chrysalis_ray.config.blueprint import Base, Count, OpenBody, Positive, Written
from chrysalis_ray.config.blueprint_probe import BlueprintProbe
from chrysalis_ray.config.domain_loss import MOST_LOST, DomainLoss
from chrysalis_ray.config.genome import (
    EXCLUDED_BY_DEFAULT,
    ArchiveSource,
    Denial,
    GenomeBuild,
    GitSource,
    HistorySource,
    Mark,
    PackagesSource,
    RecordsSource,
)
from chrysalis_ray.config.lm_eval import LmEval
from chrysalis_ray.config.merges import ConsensusMerge, EnsembleMerge, Merge, SlerpMerge, WinnerMerge, WudiMerge
from chrysalis_ray.config.population import Name, Population
from chrysalis_ray.config.questions import WrittenProbe

_TAKEN_NAMES = ("seed", "merges.json")  # a merge is a candidate beside the seed, and a folder beside merges.json

PythonDomain = Literal["code", "docstrings", "comments", "reference", "api_docs", "unicode", "codecs", "bytecode"]
PYTHON_DOMAINS: tuple[PythonDomain, ...] = get_args(PythonDomain)


# genome -------------------------------------------------------------------------------------------------------------


class PythonSource(Written):
    """Text that every Python carries: its standard library, seen as eight domains."""

    type: Literal["python"]
    domains: Annotated[tuple[PythonDomain, ...], Field(min_length=1)] = PYTHON_DOMAINS[:6]
    max_megabytes: Positive = 0.5  # per domain


class FolderSource(Written):
    """Every text file of a folder that matches `glob`, as one domain."""

    type: Literal["folder"]
    path: str
    domain: Name
    glob: str = "**/*"
    licence: str = "NOASSERTION"
    max_megabytes: Positive | None = None


class Records(Written):
    """Records of text under `text_key`, or of conversations under `messages_key`: lists of {role, content}, of which what the
    assistant says is learned."""

    text_key: str = "text"
    messages_key: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Records:
        if self.messages_key is not None and "text_key" in self.model_fields_set:
            raise ValueError("text_key and messages_key: a source is text or conversations; leave one of them out")
        return self


class JsonlSource(Records):
    """One document per line."""

    type: Literal["jsonl"]
    path: str
    domain: Name
    licence: str = "NOASSERTION"
    max_megabytes: Positive | None = None


class DatasetSource(Records):
    """A Hugging Face data set, from the hub or from a local folder."""

    type: Literal["dataset"]
    path: str
    domain: Name
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    licence: str = "NOASSERTION"
    max_megabytes: Positive | None = None


Source = Annotated[
    PythonSource
    | FolderSource
    | JsonlSource
    | DatasetSource
    | GitSource
    | HistorySource
    | ArchiveSource
    | PackagesSource
    | RecordsSource,
    Field(discriminator="type"),
]


class Split(Written):
    """Shares of the source files held out. `select` chooses, `report` tells; training sees neither."""

    select: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.06
    report: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.06


class GenomeSpec(Written):
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    split: Split = Split()
    exclude: tuple[Mark, ...] = EXCLUDED_BY_DEFAULT  # documents with these marks are sealed, but neither train nor judge
    use_denied: tuple[Denial, ...] = ()  # documents that somebody does not want trained on
    forget: str | None = None  # a list of tombstones: forgotten.jsonl, as `chrysalis genome forget` writes it
    build: GenomeBuild = GenomeBuild()


# judging, tracking --------------------------------------------------------------------------------------------------


class Evaluate(Written):
    """How much held-out text judges a variant: rows of `sequence_length` tokens per domain. A merge that loses more than
    `max_domain_loss` nats per token on any domain against the best variant is refused; null allows it anything, a mapping says
    it by domain, `*` for all others. With `max_divergence` so is one that its members are more nats per token away from, by the
    mean of KL(member || merge).

    `probes` are asked of the seed, every variant and every merge, and told. They choose nothing, unless `max_probe_drop` is
    set: then half of each guards (a merge that gets so much less of it right than the best variant is refused), half tells.
    `lm_eval` names tasks that are asked when all is chosen.
    """

    rows_per_domain: Count = 8
    rows_per_report: Count = 2
    bootstrap_samples: Annotated[int, Field(ge=100, le=100_000)] = 2000
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    max_domain_loss: DomainLoss = MOST_LOST
    max_divergence: Annotated[float, Field(ge=0.0)] | None = None
    probes: tuple[WrittenProbe, ...] = ()
    max_probe_drop: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    lm_eval: LmEval | None = None

    @model_validator(mode="after")
    def _something_to_guard_by(self) -> Evaluate:
        if self.max_probe_drop is not None and not self.probes:
            raise ValueError("max_probe_drop guards by probes, and there are none; add some, or leave it out")
        return self


class Tracking(Written):
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: Name = "chrysalis"
    entity: str | None = None
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()


class Experiment(Written):
    name: Name
    description: str = ""
    use_policy: str = ""  # what the adapter is for and what not; stands on its card
    rng_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    blueprint: str
    probe: BlueprintProbe | None = None
    base: Base | None = None
    genome: GenomeSpec
    population: Population
    body: OpenBody = OpenBody()
    evaluate: Evaluate = Evaluate()
    # What is safe, and the two that beat the best variant by most over five populations (benchmarks/methods.py).
    merge: Annotated[tuple[Merge, ...], Field(min_length=1)] = (
        WinnerMerge(method="winner"), EnsembleMerge(method="ensemble"), SlerpMerge(method="slerp"),
        WudiMerge(method="wudi"), ConsensusMerge(method="consensus"),
    )  # fmt: skip
    tracking: Tracking = Tracking()

    @field_validator("merge")
    @classmethod
    def _winner_and_no_twins(cls, merges: tuple[Merge, ...]) -> tuple[Merge, ...]:
        names = [merge.name for merge in merges]
        twins = sorted({name for name in names if names.count(name) > 1})
        if twins:
            raise ValueError(f"merge name {twins[0]!r} is used twice; give one of them another `name`")
        for name in names:
            if name in _TAKEN_NAMES or re.match(r"v\d{3,}-", name):
                raise ValueError(f"merge name {name!r} is taken: the seed, the variants (v000-...) and files of a run bear it")
        if not any(merge.method == "winner" for merge in merges):
            raise ValueError("add `- method: winner`: it is what the verdict falls back to")
        return merges
