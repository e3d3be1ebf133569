"""Searchers that propose one variant after the other: Tune's own, and the step from what they propose to a variant.

Nothing of theirs is kept: a seeded searcher that hears the same ends in the same order proposes the same again, and omega sees
to the order. After a kill every proposal is made anew and must be the one whose `variant.json` is there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray
from ray import tune
from ray.tune.search import ConcurrencyLimiter, Searcher

from chrysalis_ray.config.experiment import Experiment
from chrysalis_ray.config.population import OptunaSearch, Range
from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Variant, read_json, write_json
from chrysalis_ray.population.branch import Branching, ranges_of
from chrysalis_ray.population.mixes import mix_count
from chrysalis_ray.population.words import METRIC, MIX, MODE


def make_proposer(branching: Branching, layout: RunLayout, omega: Any, slots: int) -> Any:
    """The searcher that an experiment names, limited to `slots` variants at a time."""
    return ConcurrencyLimiter(Proposals(tune_searcher(branching), branching, layout, omega), max_concurrent=slots)


def tune_searcher(branching: Branching) -> Any:
    """Ray Tune's OptunaSearch or TuneBOHB over the search space, seeded."""
    spec, experiment = branching.experiment.population.searcher, branching.experiment
    space = tune_space(experiment, branching.domains)
    if isinstance(spec, OptunaSearch):
        return _optuna(space, experiment.rng_seed, spec.random_variants)
    from ray.tune.search.bohb import TuneBOHB

    # it draws from numpy's global generator as well, which `run_population` seeds
    return TuneBOHB(TuneBOHB.convert_search_space(space), metric=METRIC, mode=MODE, seed=experiment.rng_seed)


def _optuna(space: dict[str, Any], rng_seed: int, random_variants: int) -> Any:
    import optuna
    from ray.tune.search import optuna as tune_optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=rng_seed, n_startup_trials=random_variants)
    distributions = tune_optuna.OptunaSearch.convert_search_space(space)
    return tune_optuna.OptunaSearch(distributions, metric=METRIC, mode=MODE, sampler=sampler)


def tune_space(experiment: Experiment, domains: tuple[str, ...]) -> dict[str, Any]:
    """The search space in Tune's terms: every range, and which mix where the epigenomes are a list of mixes."""
    space = {name: _tune_domain(drawn) for name, drawn in ranges_of(experiment.population).items()}
    mixes = mix_count(experiment.population.epigenomes, domains)
    return space | ({MIX: tune.choice(list(range(mixes)))} if mixes is not None and mixes > 1 else {})


def _tune_domain(drawn: Range) -> Any:
    if drawn.type == "log_uniform":
        return tune.loguniform(drawn.low, drawn.high)
    if drawn.type == "uniform":
        return tune.uniform(drawn.low, drawn.high)
    return tune.choice(list(drawn.values))


class Proposals(Searcher):
    """Makes a variant of whatever `searcher` proposes: writes its `variant.json`, tells omega, and gives Tune its name."""

    def __init__(self, searcher: Any, branching: Branching, layout: RunLayout, omega: Any) -> None:
        super().__init__(metric=METRIC, mode=MODE)
        self.searcher = searcher
        self.branching = branching
        self.layout = layout
        self.omega = omega
        self.count = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next variant's name for Tune's config. Raises RunError if a kill came between and it is another one now."""
        values = self.searcher.suggest(trial_id)
        if not isinstance(values, dict):  # none now, or none any more
            return values
        variant = self.branching.variant(self.count, {name: plain(value) for name, value in values.items()})
        variant = keep_proposal(self.layout, variant)
        ray.get(self.omega.join.remote(variant))
        self.count += 1
        return {"variant": variant.variant_id}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.searcher.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.searcher.on_trial_complete(trial_id, result=result, error=error)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True  # the space is known already

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        return self.searcher.set_max_concurrency(max_concurrent)

    def on_pause(self, trial_id: str) -> None:
        self.searcher.on_pause(trial_id)

    def on_unpause(self, trial_id: str) -> None:
        self.searcher.on_unpause(trial_id)

    def get_state(self) -> dict[str, Any]:
        return {}  # Tune saves its searchers; nothing is ever restored from there

    def set_state(self, state: dict[str, Any]) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        self.searcher.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        self.searcher.restore(checkpoint_path)


def plain(value: Any) -> Any:
    """A proposed value as Python's own number: numpy's are none that JSON knows."""
    return value.item() if hasattr(value, "item") else value


def keep_proposal(layout: RunLayout, variant: Variant) -> Variant:
    """`variant.json`, then its name in the branch's manifest; or, after a kill, the proof that both are the same again. A mix
    that was proposed before rows were counted stays as it was."""
    before = sorted(layout.variants.glob(f"v{variant.index:03d}-*/variant.json"))
    if before:
        kept = Variant.from_json(read_json(before[0]))
        if not kept.epigenome.rows:
            then = kept.epigenome
            mix = replace(variant.epigenome, rows={}, budget_rows=then.budget_rows, row_tokens=then.row_tokens)
            variant = replace(variant, epigenome=mix)
        if kept != variant:
            raise RunError(
                f"the searcher proposed {kept.variant_id} before and proposes {variant.variant_id} with other values now",
                "install the versions of ray, optuna and numpy that this run began with, or start it anew with --name",
            )
    write_json(layout.variant(variant.variant_id), variant.to_json())
    manifest = read_json(layout.branch_manifest)
    if variant.variant_id not in manifest["variants"]:
        write_json(layout.branch_manifest, {**manifest, "variants": [*manifest["variants"], variant.variant_id]})
    return variant
