"""The merges an experiment can ask for: one class per method, told apart by `method`. `chrysalis merge` takes the same keys.

Deltas are changes from the seed. Weights are positive and sum to one, for every method, so that N equal adapters give that
adapter back whatever the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from chrysalis_ray.config.blueprint import Count, Fraction, Positive, Written
from chrysalis_ray.config.overrides import apply_overrides
from chrysalis_ray.config.population import Name
from chrysalis_ray.config.problems import nearest, problems_of
from chrysalis_ray.config.synonyms import EXPERIMENT
from chrysalis_ray.config.yaml_tree import Node
from chrysalis_ray.core.errors import ConfigError

Weights = Literal["uniform", "softmax", "geometric_median", "robust", "greedy", "greedy_layers", "searched"]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Rank = Annotated[int, Field(ge=1, le=65536)]  # what is read again, see seed/adapter.py
Agreeing = Literal["mean", "sum"]
JUDGED = ("greedy", "greedy_layers", "searched")  # weights that are found by judging merges on select


class WinnerMerge(Written):
    method: Literal["winner"]
    name: Name = "winner"


class LayerWeights(Written):
    """How much each variant counts in the modules whose whole names `modules` fits, * standing for any part of a name.

    `weights` go by variant, or by the number of an adapter as it was given, from 0; who is not named counts nothing there.
    """

    modules: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.*]+$", max_length=200)]
    weights: Annotated[dict[str, Annotated[float, Field(ge=0.0)]], Field(min_length=1)]

    @field_validator("weights")
    @classmethod
    def _somebody_counts(cls, weights: dict[str, float]) -> dict[str, float]:
        if not any(weights.values()):
            raise ValueError("every weight is 0; give at least one above")
        return weights


class SeveralMerge(Written):
    """What every merge of several variants has.

    `best_share` of the variants that emerged take part, the best by select loss, at least two. `weights`: `uniform`; `softmax`
    of the select losses at `temperature` nats; `geometric_median` of the deltas; `robust`, the same of those that neither loss
    nor distance sets apart, in each module on its own with `per: module`; `greedy`, alike for those that a greedy soup takes
    in, each trial judged on select; `greedy_layers`, a greedy soup for each of `layer_groups` groups of layers in turn;
    `searched`, what CMA-ES finds for every group in `budget` judgements from `search_seed`. `layer_weights` come before all of
    these where they fit, the first that does. The result is cut to `rank` (Eckart-Young), the largest rank of a variant if not
    given; `exact` cuts nothing.
    """

    weights: Weights = "uniform"
    per: Literal["adapter", "module"] = "adapter"
    temperature: Positive = 0.02
    layer_weights: tuple[LayerWeights, ...] = ()
    layer_groups: Annotated[int, Field(ge=1, le=64)] | None = None
    budget: Annotated[int, Field(ge=4, le=100_000)] | None = None
    search_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    best_share: Share = 0.5
    rank: Rank | Literal["exact"] | None = None

    @model_validator(mode="after")
    def _settings_have_a_use(self) -> SeveralMerge:
        if self.per == "module" and self.weights not in ("geometric_median", "robust"):
            raise ValueError(
                "`per: module` is for `weights: geometric_median` and `robust`, which look at the deltas themselves"
            )
        if self.layer_groups is not None and self.weights not in ("greedy_layers", "searched"):
            raise ValueError("`layer_groups` is for `weights: greedy_layers` and `searched`")
        if self.budget is not None and self.weights != "searched":
            raise ValueError("`budget` is for `weights: searched`: how many merges it may judge")
        if self.layer_weights and self.weights in JUDGED:
            raise ValueError(f"`weights: {self.weights}` finds the weights of every layer; leave `layer_weights` out")
        return self


class EnsembleMerge(SeveralMerge):
    """Weighted average of the deltas, exact in delta space."""

    method: Literal["ensemble"]
    name: Name = "ensemble"


class ConsensusMerge(SeveralMerge):
    """What `support` of the variants agree on, with `coherence`, as change from the seed; the rest stays the seed's."""

    method: Literal["consensus"]
    name: Name = "consensus"
    weights: Weights = "robust"
    support: Fraction = 0.5
    coherence: Fraction = 0.5


class TaskArithmeticMerge(SeveralMerge):
    """`coefficient` times the sum of the deltas, the lambda of the paper; 1/N, the mean, if not given."""

    method: Literal["task_arithmetic"]
    name: Name = "task_arithmetic"
    coefficient: Positive | None = None


class SlerpMerge(SeveralMerge):
    """The mean along the sphere, of two or more deltas: their weighted mean length, in the direction between them.

    That direction is the Karcher mean of theirs, or with `mean: chord` their weighted sum, as mergekit's multislerp has it.
    `mean: pair` is the formula for two, on deltas of whatever length, as mergekit's nuslerp has it; with `along: rows` or
    `columns` every one of these is turned by an angle of its own.
    """

    method: Literal["slerp"]
    name: Name = "slerp"
    mean: Literal["karcher", "chord", "pair"] = "karcher"
    along: Literal["module", "rows", "columns"] = "module"

    @model_validator(mode="after")
    def _rows_are_turned_in_pairs(self) -> SlerpMerge:
        if self.along != "module" and self.mean != "pair":
            raise ValueError(f"`along: {self.along}` is for `mean: pair`, two adapters")
        return self


class ModelStockMerge(SeveralMerge):
    """The mean, drawn back towards the seed as far as the deltas differ in direction."""

    method: Literal["model_stock"]
    name: Name = "model_stock"


class TsvMerge(SeveralMerge):
    """Sum of the deltas' singular directions, made orthogonal first; `floor` keeps near twins from counting twice."""

    method: Literal["tsv"]
    name: Name = "tsv"
    floor: Share = 0.1
    scale: Positive = 1.0


class IsotropicMerge(SeveralMerge):
    """The mean with its singular values evened out as far as the deltas differ."""

    method: Literal["isotropic"]
    name: Name = "isotropic"
    scale: Positive = 1.0


class WudiMerge(SeveralMerge):
    """The delta that interferes least with every member on that member's own inputs; a large `ridge` gives the mean."""

    method: Literal["wudi"]
    name: Name = "wudi"
    ridge: Annotated[float, Field(ge=1e-9)] = 1.0  # of the largest eigenvalue; members of one seed need about 1


class RegmeanMerge(SeveralMerge):
    """The delta whose outputs are nearest to each member's on that member's own inputs; a large `ridge` gives the mean.

    `space: core` looks at the input directions that the members read. `dense` looks at whole inputs, each member's on text of
    its own mix, as the paper does: inputs of different features count as less alike by `off_diagonal`. With `ridge: 0` that is
    the paper's formula.
    """

    method: Literal["regmean"]
    name: Name = "regmean"
    space: Literal["core", "dense"] = "core"
    ridge: Annotated[float, Field(ge=0.0)] = 0.01  # of the largest eigenvalue
    off_diagonal: Share = 0.9  # the paper's alpha; of `space: dense` alone

    @model_validator(mode="after")
    def _has_one_answer(self) -> RegmeanMerge:
        if self.space == "core":
            if "off_diagonal" in self.model_fields_set:
                raise ValueError("`off_diagonal` is for `space: dense`: in the core there is no feature of its own")
            if self.ridge < 1e-9:
                raise ValueError("in the core the ridge is 1e-9 at least; `ridge: 0` is for `space: dense`")
        elif self.off_diagonal > 0.99 and self.ridge < 1e-6:
            raise ValueError(
                "inputs alone leave directions open: write a ridge of 1e-6 at least, or an `off_diagonal` up to 0.99"
            )
        return self


class ElementwiseMerge(SeveralMerge):
    """What every rule on single coefficients has.

    `space: core` applies the rule in the canonical core, where the rank stays low; `knots` where the deltas are aligned on the
    side of the outputs alone (KnOTS), where it stays low as well; `dense` to the entries of the whole deltas, as the papers do,
    and then fits the best adapter of `rank` to the result. `scale` multiplies the merged change.
    """

    space: Literal["core", "knots", "dense"] = "core"
    scale: Positive = 1.0

    @model_validator(mode="after")
    def _dense_is_never_of_low_rank(self) -> ElementwiseMerge:
        if self.space == "dense" and self.rank == "exact":
            raise ValueError("`space: dense` has full rank; write the rank of the adapter that is to be fitted to it, e.g. 32")
        return self


class DensityMerge(ElementwiseMerge):
    """Rules that keep a `density` of every delta. `densities` are those of single variants that differ, by variant, or by the
    number of an adapter as it was given, from 0."""

    density: Share
    densities: Annotated[dict[str, Share], Field(default_factory=dict)]

    def for_each(self, members: int) -> list[Self]:
        """The rule as each of so many members has it, whose `densities` go by number."""
        own = [self.densities.get(str(n), self.density) for n in range(members)]
        return [self.model_copy(update={"density": density, "densities": {}}) for density in own]

    def numbered(self, names: Sequence[str]) -> Self:
        """The same with `densities` by number alone, of members called `names`."""
        own = {str(n): self.densities.get(name, self.densities.get(str(n), self.density)) for n, name in enumerate(names)}
        return self.model_copy(update={"densities": own if self.densities else {}})

    def taken(self, places: Sequence[int]) -> Self:
        """The same of some members alone, by their numbers."""
        own = {str(n): self.densities.get(str(place), self.density) for n, place in enumerate(places)}
        return self.model_copy(update={"densities": own if self.densities else {}})


class TiesMerge(DensityMerge):
    """The largest `density` of every delta, the sign with more weight, the mean of those that have it, or their `sum`: each
    with its share of the weights, those of the other sign as nothing."""

    method: Literal["ties"]
    name: Name = "ties"
    density: Share = 0.2
    agreeing: Agreeing = "mean"


class _SignsMerge(DensityMerge):
    signs: Literal["all", "elected"] = "all"
    agreeing: Agreeing = "mean"

    @model_validator(mode="after")
    def _somebody_is_elected(self) -> _SignsMerge:
        if self.signs == "all" and "agreeing" in self.model_fields_set:
            raise ValueError("`agreeing` is for `signs: elected`; all are averaged otherwise")
        return self


class DareMerge(_SignsMerge):
    """A random `density` of every delta, made larger by 1/density; averaged, or with `signs: elected` as TIES does."""

    method: Literal["dare"]
    name: Name = "dare"
    density: Share = 0.5
    rng_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class BreadcrumbsMerge(_SignsMerge):
    """Every delta without its largest `outliers`, of the rest the largest, `density` of all; averaged, or with `signs: elected`
    as TIES does."""

    method: Literal["breadcrumbs"]
    name: Name = "breadcrumbs"
    density: Share = 0.9
    outliers: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01


class DellaMerge(ElementwiseMerge):
    """DARE that keeps the large entries of a row with `density` + `spread`, the small ones with `density` - `spread`."""

    method: Literal["della"]
    name: Name = "della"
    density: Share = 0.5
    spread: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1
    rng_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _chances_are_chances(self) -> DellaMerge:
        least, most = self.density - self.spread, self.density + self.spread
        if least <= 0.0 or most > 1.0:
            raise ValueError(
                f"entries would be kept with the chances {least:g} to {most:g}; density - spread must be above 0 and "
                "density + spread at most 1"
            )
        return self


class TallMerge(ElementwiseMerge):
    """The mean where at least `votes` variants need it: where their delta is at least `threshold` times what the rest adds."""

    method: Literal["tall"]
    name: Name = "tall"
    votes: Count = 2
    threshold: Positive = 0.4


class SceMerge(ElementwiseMerge):
    """Where the deltas differ most, `density` of the entries that differ, or everywhere; every delta counts by how long it is
    there; the sign with more weight is elected, and those that have it are averaged.

    Below a density of 1, what all deltas agree on is left out: variants of one seed that hardly differ lose what they have in
    common.
    """

    method: Literal["sce"]
    name: Name = "sce"
    density: Share = 1.0


Merge = Annotated[
    WinnerMerge | EnsembleMerge | ConsensusMerge | TaskArithmeticMerge | SlerpMerge | ModelStockMerge | TsvMerge
    | IsotropicMerge | WudiMerge | RegmeanMerge | TiesMerge | DareMerge | DellaMerge | BreadcrumbsMerge | TallMerge
    | SceMerge,
    Field(discriminator="method"),
]  # fmt: skip
METHOD_NAMES = (
    "winner", "ensemble", "consensus", "task_arithmetic", "slerp", "model_stock", "tsv", "isotropic", "wudi", "regmean",
    "ties", "dare", "della", "breadcrumbs", "tall", "sce",
)  # fmt: skip


class _OneMerge(Written):
    merge: tuple[Merge]


def make_merge(settings: Mapping[str, Any]) -> Merge:
    """The merge of settings that a program made. Raises ConfigError."""
    try:
        return _OneMerge.model_validate({"merge": (dict(settings),)}).merge[0]
    except ValidationError as error:
        problems = tuple(f"{'.'.join(map(str, found['loc'][3:]))}: {found['msg']}" for found in error.errors())
        raise ConfigError("\n  ".join(("no such merge:", *problems)), problems=problems) from error


def read_merge(method: str, settings: Sequence[str]) -> Merge:
    """The merge `method` with `settings`, each ``key=value`` as under `merge:` in an experiment. Raises ConfigError."""
    if method not in METHOD_NAMES:
        guess = nearest(method, METHOD_NAMES)
        meant = f"did you mean {guess!r}? " if guess else ""
        raise ConfigError(f"--strategy: {method!r} is not known; {meant}known: {', '.join(METHOD_NAMES)}")
    plain = Node("map", "--set", entries={"method": ("--strategy", Node("scalar", "--strategy", value=method))})
    node, problems = apply_overrides(plain, settings)
    root = Node("map", "--set", entries={"merge": ("--set", Node("list", "--set", items=[node]))})
    try:
        read = _OneMerge.model_validate(root.data(), strict=True).merge[0]
    except ValidationError as error:
        problems += [problem.replace("merge.0.", "") for problem in problems_of(error, root, _OneMerge, EXPERIMENT)]
    if problems:
        raise ConfigError("\n  ".join((f"{method} cannot be merged like that:", *problems)), problems=tuple(problems))
    return read
