"""The epigenome as a person writes it: how strongly each domain of the genome is expressed, and when.

Everything is optional. What stands under `population.epigenomes` holds for all variants; a listed mix may say otherwise for
itself, key by key. `core.shares` says how shares come of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator
from pydantic_core.core_schema import SerializerFunctionWrapHandler

from chrysalis_ray.config.blueprint import Count, Positive, Written
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.shares import MOST_LEVEL, parse_prior

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Level = Annotated[float, Field(ge=0.0, le=MOST_LEVEL)]
Weight = Annotated[float, Field(gt=0.0, le=MOST_LEVEL)]
Selector = Annotated[str, Field(min_length=1)]  # a domain; in `silence` a pattern of them, elsewhere * for all others
Between = Annotated[float, Field(gt=0.0, lt=1.0)]
OTHERS = "*"


class Replay(Written):
    """A part of all rows is drawn by other levels: those of `express`, or of every domain alike (before its prior)."""

    share: Between
    express: Annotated[dict[Name, Level], Field(min_length=1)] | None = None

    @field_validator("express")
    @classmethod
    def _sums_to_something(cls, express: dict[str, float] | None) -> dict[str, float] | None:
        return expressing(express, "the replay") if express is not None else None


class Stage(Written):
    """Levels that hold from a share of the steps on, or from so many tokens on; domains not named keep theirs."""

    at: Between | None = None
    at_tokens: Count | None = None
    express: Annotated[dict[Name, Level], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_place(self) -> Stage:
        if (self.at is None) == (self.at_tokens is None):
            raise ValueError("a stage begins `at` a share of the steps (0.5) or `at_tokens` (1000000): write one of them")
        return self


class Match(Written):
    """Train on that part of every domain with which this variant repeats it as often as a run of `repetition` tokens would."""

    repetition: Count


class Expression(Written):
    """What may be said of a mix beside its levels."""

    silence: tuple[Selector, ...] = ()
    floors: dict[Selector, Between] = Field(default_factory=dict)
    caps: dict[Selector, Positive] = Field(default_factory=dict)
    replay: Replay | None = None
    loss_weights: dict[Selector, Weight] = Field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    match: Match | None = None

    @model_serializer(mode="wrap")
    def _without_what_was_not_said(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A mix of levels and prior alone is written as it was before there were other keys: it names the same run."""
        told: dict[str, Any] = serialise(self)
        return {key: value for key, value in told.items() if value or key not in Expression.model_fields}


def checked_prior(prior: str) -> str:
    """Raises ValueError for a prior that is not known."""
    try:
        parse_prior(prior)
    except GenomeError as error:
        raise ValueError(f"{error.message}; {error.remedy}") from error
    return prior


def expressing(express: dict[str, float], what: str) -> dict[str, float]:
    """Raises ValueError where every level is 0."""
    if sum(express.values()) <= 0.0:
        raise ValueError(f"every level is 0: {what} expresses nothing")
    return express


class Mix(Expression):
    """Levels of its own, those of a mix above (`like`), or a `cross` of two; then what the operators make of them, in the order
    that they stand in here. What a mix says beside levels goes to those that are like it, key by key.

    A cross is the Hellinger midpoint of its parents, or nearer to the second for a `weight` above 1/2 (`genome.epigenome`).
    """

    name: Name
    express: Annotated[dict[Name, Level], Field(min_length=1)] = Field(default_factory=dict)
    like: Name | None = None
    cross: tuple[Name, Name] | None = None
    weight: Between | None = None  # of the second of a cross; 1/2 where it is not written
    brighten: dict[Name, Weight] = Field(default_factory=dict)  # so many times as loud
    dim: dict[Name, Weight] = Field(default_factory=dict)  # so many times as quiet
    swap: tuple[tuple[Name, Name], ...] = ()  # the levels of two domains, exchanged
    mutate: Annotated[float, Field(gt=0.0, le=4.0)] | None = None  # every level times exp(so much x a normal number)
    prior: str | None = None

    @field_validator("express")
    @classmethod
    def _sums_to_something(cls, express: dict[str, float]) -> dict[str, float]:
        return expressing(express, "the mix")

    @field_validator("prior")
    @classmethod
    def _known(cls, prior: str | None) -> str | None:
        return checked_prior(prior) if prior is not None else None

    @model_validator(mode="after")
    def _one_origin(self) -> Mix:
        if (bool(self.express), self.like is not None, self.cross is not None).count(True) != 1:
            raise ValueError("a mix says its levels (`express`), or is `like` another, or a `cross` of two: write one of them")
        if self.weight is not None and self.cross is None:
            raise ValueError("a `weight` is that of the second mix of a `cross`: leave it out, or write the cross")
        return self

    @model_serializer(mode="wrap")
    def _without_what_was_not_said(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What it did say, `stages: []` too, stands in for what holds for all."""
        told: dict[str, Any] = serialise(self)
        optional = set(type(self).model_fields) - self.model_fields_set
        return {key: value for key, value in told.items() if value or key not in optional}


class Mixes(Expression):
    """What all kinds of mixes have in common."""

    prior: str = "uniform"

    @field_validator("prior")
    @classmethod
    def _known(cls, prior: str) -> str:
        return checked_prior(prior)


class ListedMixes(Mixes):
    """The mixes written here, dealt to the variants in turn."""

    type: Literal["listed"]
    mixes: Annotated[tuple[Mix, ...], Field(min_length=1)]

    @field_validator("mixes")
    @classmethod
    def _no_twins(cls, mixes: tuple[Mix, ...]) -> tuple[Mix, ...]:
        names = [mix.name for mix in mixes]
        twins = sorted({name for name in names if names.count(name) > 1})
        if twins:
            raise ValueError(f"mix name {twins[0]!r} is used twice")
        return mixes


class DirichletMixes(Mixes):
    """A random mix per variant; small `concentration` gives specialists, large gives equal shares.

    `concentrations` sets it for single domains: the mean share of a domain is its own over the sum of all.
    """

    type: Literal["dirichlet"]
    concentration: Positive = 1.0
    concentrations: dict[Name, Positive] = Field(default_factory=dict)


class BrightenedMixes(Mixes):
    """Variant k brightens domain k (in turn) to `level`, all others stay at 1: specialists that still see everything."""

    type: Literal["brightened"]
    level: Positive = 4.0


class SimplexGridMixes(Mixes):
    """Every mix whose shares are multiples of 1/`steps`, in a fixed order, crossed with the grids of `search`."""

    type: Literal["simplex_grid"]
    steps: Annotated[int, Field(ge=1, le=64)] = 4


def spread(written: Mapping[str, float], domains: list[str]) -> dict[str, float]:
    """Values of domains where ``*`` speaks for all that are not named."""
    others = {domain: written[OTHERS] for domain in domains if OTHERS in written}
    return others | {domain: value for domain, value in written.items() if domain in domains}
