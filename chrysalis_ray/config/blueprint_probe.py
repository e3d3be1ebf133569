"""`probe:` of an experiment: a short population decides between blueprints before the run begins."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from chrysalis_ray.config.blueprint import Count, Positive, Written

TENTH = 10  # of a variant's tokens are trained by each candidate where the probe does not say how many


class BlueprintProbe(Written):
    """Every candidate trains `tokens` tokens on the same rows and is judged on the same documents of *select*.

    The experiment's own `blueprint` is always a candidate, and stays unless another is better beyond doubt. The others are
    those of `candidates`: shipped blueprints or paths. Where none is written they are its own alternatives: every one of
    `learning_rates` with every one of `ranks`, as multiples of what it says.
    """

    candidates: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    learning_rates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.3, 1.0, 3.0)
    ranks: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0, 2.0)
    tokens: Count | None = None  # a tenth of population.tokens_per_variant if not given
    rows_per_domain: Count | None = None  # that judge; those of `evaluate` if not given

    @field_validator("candidates", "learning_rates", "ranks")
    @classmethod
    def _no_twins(cls, values: tuple[object, ...]) -> tuple[object, ...]:
        twins = [value for place, value in enumerate(values) if value in values[:place]]
        if twins:
            raise ValueError(f"{twins[0]} stands there twice; leave one of them out")
        return values
