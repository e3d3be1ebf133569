"""The population of an experiment: how many variants, how they differ, who proposes them and who stops them early."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from chrysalis_ray.config.blueprint import Count, Fraction, Positive, Written

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Level = Annotated[float, Field(ge=0.0)]

# ranges -------------------------------------------------------------------------------------------------------------


class LogUniform(Written):
    type: Literal["log_uniform"]
    low: Positive
    high: Positive

    @model_validator(mode="after")
    def _ordered(self) -> LogUniform:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class Uniform(Written):
    type: Literal["uniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class Choice(Written):
    """Drawn at random from `values`."""

    type: Literal["choice"]
    values: Annotated[tuple[float | int | str | bool, ...], Field(min_length=1)]


class Grid(Written):
    """Every value in turn; several grids are crossed."""

    type: Literal["grid"]
    values: Annotated[tuple[float | int | str | bool, ...], Field(min_length=1)]


Range = Annotated[LogUniform | Uniform | Choice | Grid, Field(discriminator="type")]


class SearchSpace(Written):
    """Hyperparameters that differ between variants; what is absent comes from the blueprint."""

    learning_rate: Range | None = None
    rank: Range | None = None
    alpha: Range | None = None
    weight_decay: Range | None = None
    clip: Range | None = None
    warmup_fraction: Range | None = None
    decay: Range | None = None
    final_fraction: Range | None = None
    optimizer: Range | None = None
    plus_ratio: Range | None = None
    freeze_a: Range | None = None
    dropout: Range | None = None
    rows_per_step: Range | None = None  # batch size; a report is equally many tokens for all


# epigenomes ---------------------------------------------------------------------------------------------------------


class Mix(Written):
    name: Name
    express: Annotated[dict[str, Level], Field(min_length=1)]

    @field_validator("express")
    @classmethod
    def _sums_to_something(cls, express: dict[str, float]) -> dict[str, float]:
        if sum(express.values()) <= 0.0:
            raise ValueError("every level is 0: the mix expresses nothing")
        return express


class ListedMixes(Written):
    """The mixes written here, dealt to the variants in turn."""

    type: Literal["listed"]
    mixes: Annotated[tuple[Mix, ...], Field(min_length=1)]
    prior: Literal["uniform", "size"] = "uniform"

    @field_validator("mixes")
    @classmethod
    def _no_twins(cls, mixes: tuple[Mix, ...]) -> tuple[Mix, ...]:
        names = [mix.name for mix in mixes]
        twins = sorted({name for name in names if names.count(name) > 1})
        if twins:
            raise ValueError(f"mix name {twins[0]!r} is used twice")
        return mixes


class DirichletMixes(Written):
    """A random mix per variant; small `concentration` gives specialists, large gives equal shares.

    `concentrations` sets it for single domains: the mean share of a domain is its own over the sum of all.
    """

    type: Literal["dirichlet"]
    concentration: Positive = 1.0
    concentrations: dict[Name, Positive] = Field(default_factory=dict)
    prior: Literal["uniform", "size"] = "uniform"


class BrightenedMixes(Written):
    """Variant k brightens domain k (in turn) to `level`, all others stay at 1: specialists that still see everything."""

    type: Literal["brightened"]
    level: Positive = 4.0
    prior: Literal["uniform", "size"] = "uniform"


class SimplexGridMixes(Written):
    """Every mix whose shares are multiples of 1/`steps`, in a fixed order, crossed with the grids of `search`."""

    type: Literal["simplex_grid"]
    steps: Annotated[int, Field(ge=1, le=64)] = 4
    prior: Literal["uniform", "size"] = "uniform"


class LevelMixes(Written):
    """A range of levels for each domain named here, drawn per variant like a hyperparameter; all other domains stay at 1."""

    type: Literal["levels"]
    levels: Annotated[dict[Name, Range], Field(min_length=1)]
    prior: Literal["uniform", "size"] = "uniform"


Epigenomes = Annotated[
    ListedMixes | DirichletMixes | BrightenedMixes | SimplexGridMixes | LevelMixes, Field(discriminator="type")
]


# searchers: who proposes variants -----------------------------------------------------------------------------------


class BranchSearch(Written):
    """All variants are drawn before the first one trains, each from a generator of its own."""

    type: Literal["branch"]


class SobolSearch(Written):
    """As `branch`, but the draws of all ranges are one scrambled Sobol point per variant: they fill the space evenly."""

    type: Literal["sobol"]


class OptunaSearch(Written):
    """Optuna's tree-structured Parzen estimator (arXiv 2304.11127): a variant is proposed when a slot falls free.

    The first `random_variants` are drawn at random; the others follow what has ended by then.
    """

    type: Literal["optuna"]
    random_variants: Count = 8


class BohbSearch(Written):
    """BOHB's kernel density estimator (arXiv 1807.01774), with the scheduler of the same name."""

    type: Literal["bohb"]


Searcher = Annotated[BranchSearch | SobolSearch | OptunaSearch | BohbSearch, Field(discriminator="type")]


# schedulers: who stops early ----------------------------------------------------------------------------------------


Mutable = Literal["learning_rate", "weight_decay", "clip", "levels"]  # levels: those of the epigenomes, while they train


class Fifo(Written):
    """Every variant trains its whole budget."""

    type: Literal["fifo"]


class Asha(Written):
    """Asynchronous successive halving (arXiv 1810.05934), by reports: the first rung after `grace_reports`."""

    type: Literal["asha"]
    grace_reports: Count = 1
    reduction_factor: Annotated[float, Field(gt=1.0)] = 2.0
    brackets: Count = 1


class Pbt(Written):
    """Population based training (arXiv 1711.09846): the worst copy the best and perturb."""

    type: Literal["pbt"]
    perturb_every_reports: Count = 2
    quantile: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25
    resample_probability: Fraction = 0.25
    mutate: Annotated[tuple[Mutable, ...], Field(min_length=1)] = ("learning_rate",)


class Pb2(Written):
    """Population based bandits (arXiv 2002.02518): as `pbt`, but a Gaussian process proposes what the copy goes on with.

    It works inside the ranges of `search`, in their own units also where they are drawn by logarithm.
    """

    type: Literal["pb2"]
    perturb_every_reports: Count = 2
    quantile: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25
    mutate: Annotated[tuple[Mutable, ...], Field(min_length=1)] = ("learning_rate",)


class HyperBand(Written):
    """HyperBand (arXiv 1603.06560), by reports: brackets of variants, halved together; who waits for its bracket pauses."""

    type: Literal["hyperband"]
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0


class Bohb(Written):
    """HyperBand for the searcher `bohb`: variants pause until their bracket is full, and new ones are proposed meanwhile."""

    type: Literal["bohb"]
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0


class MedianStopping(Written):
    """Stop a variant whose best loss is worse than the median of the running averages (Vizier)."""

    type: Literal["median"]
    grace_reports: Count = 2
    min_variants: Count = 3


Scheduler = Annotated[Fifo | Asha | HyperBand | Pbt | Pb2 | MedianStopping | Bohb, Field(discriminator="type")]


# population ---------------------------------------------------------------------------------------------------------


class Population(Written):
    """With `run_ahead` the next chunk is trained while the scheduler still decides on this one; what it stops has then trained
    a chunk in vain. By default so under fifo, which stops nothing."""

    variants: Annotated[int, Field(ge=1, le=4096)]
    tokens_per_variant: Annotated[int, Field(ge=1)]
    reports: Annotated[int, Field(ge=1, le=100_000)] = 8
    search: SearchSpace = SearchSpace()
    epigenomes: Epigenomes
    paired: bool = False  # all variants draw their rows with one rng_seed: equal mixes see equal rows in equal order
    searcher: Searcher = BranchSearch(type="branch")
    scheduler: Scheduler = Fifo(type="fifo")
    max_failures: Annotated[int, Field(ge=0, le=1000)] = 3
    run_ahead: bool | None = None

    @property
    def runs_ahead(self) -> bool:
        return isinstance(self.scheduler, Fifo) if self.run_ahead is None else self.run_ahead

    @property
    def proposes(self) -> bool:
        """Whether the searcher proposes one variant after the other, in the light of those that have ended."""
        return isinstance(self.searcher, (OptunaSearch, BohbSearch))

    @property
    def pauses(self) -> bool:
        """Whether the scheduler pauses trials and wakes them later: then only Tune knows who will ask for the next turn."""
        return isinstance(self.scheduler, (HyperBand, Bohb))
