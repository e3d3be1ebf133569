"""`blueprint: auto`: a blueprint for a base, a machine and a budget, by the rules of `rules.py`. No torch.

What comes out is YAML with the reasons as comments. A run keeps that text in its `run.json`: taken up again it reads the text
there, whatever the rules say by then.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from chrysalis_ray.config.blueprint import Base, Blueprint, PretrainedBase
from chrysalis_ray.config.experiment import Experiment
from chrysalis_ray.config.loading import load_blueprint, shipped_blueprints
from chrysalis_ray.config.resolve import Chosen
from chrysalis_ray.config.writing import blueprint_text
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.layout import RunLayout, is_run_name
from chrysalis_ray.core.records import read_json, sha256_of
from chrysalis_ray.core.written_paths import written_path
from chrysalis_ray.training.planning.duration import megabytes_of
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.rules import RULES, SHORTEST_ROW, Facts, Recipe
from chrysalis_ray.training.planning.shapes import ModelShape, read_shape, shape_of

LOOK_SECONDS = 5  # for the hub to say what it knows of a file


def chooser(
    runs: Path | None = None,
    name: str | None = None,
    hardware: Hardware | None = None,
    look: Callable[[], Hardware] = Hardware.local,
) -> Callable[[Experiment, Base, int | None], Chosen]:
    """What `load_experiment` asks where it reads `blueprint: auto`: what the run `name` below `runs` was begun with, if there
    is such a run of the same base, genome and population, else a blueprint for `hardware`, or for what `look` finds."""

    def choose_for(experiment: Experiment, base: Base, tokens: int | None) -> Chosen:
        asked = {"base", "genome", "population", *(("probe",) if experiment.probe else ())}
        question = sha256_of([experiment.model_dump(mode="json", include=asked), tokens])
        begun = None if runs is None else _begun_with(runs, name or experiment.name)
        if begun is not None and begun.question == question:
            return begun
        population = experiment.population
        chosen = choose(
            base,
            hardware or look(),
            variants=population.variants,
            reports=population.reports,
            tokens=tokens,
            megabytes=megabytes_of(experiment.genome),
            rows_searched=population.search.rows_per_step is not None,
        )
        return replace(chosen, question=question)

    return choose_for


def choose(
    base: Base,
    hardware: Hardware,
    *,
    variants: int,
    reports: int = 8,
    tokens: int | None = None,
    megabytes: float | None = None,
    rows_searched: bool = False,
) -> Chosen:
    """A blueprint for `base` on `hardware`; `tokens` are those of each variant, None to have them chosen as well.

    Raises ModelError where the sizes of the base are not known and cannot be fetched.
    """
    facts = Facts(_shape(base), hardware, variants, reports, tokens, megabytes, _recipes(), rows_searched)
    reasons = []
    for rule in RULES:
        if rule.sets not in facts.made and rule.when(facts):
            facts.made[rule.sets] = value = rule.value(facts)
            if rule.why:
                reasons.append(f"{_subject(rule.sets)}: {rule.why.format(f=facts, value=value)}")
    return Chosen(blueprint_text(_blueprint(base, facts), reasons), tuple(reasons), facts.made["tokens"])


def _subject(sets: str) -> str:
    return {"recipe": "blueprint", "tokens": "population.tokens_per_variant"}.get(sets, sets)


def _blueprint(base: Base, facts: Facts) -> Blueprint:
    """The recipe with all that was made over it."""
    content = facts.recipe.blueprint.model_dump(include={"lora", "optimizer", "schedule"})
    content |= {
        "name": f"auto-{_word(facts.shape.name)}",
        "description": f"Chosen for {facts.shape.name}.",
        "base": base.model_dump(),
    }
    for path, value in facts.made.items():
        section, _, key = path.partition(".")
        if key:
            content.setdefault(section, {})[key] = tuple(value) if isinstance(value, list) else value
        elif isinstance(value, dict):
            content.setdefault(section, {}).update(value)
    return Blueprint.model_validate(content)


def _word(name: str) -> str:
    """A base's name as one small word: its last part, without what names may not hold."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.rstrip("/").rpartition("/")[2].lower()) or "base"


@cache
def _recipes() -> tuple[Recipe, ...]:
    """The shipped blueprints, those that hold a whole base on one GPU before those that shard it."""
    found = [load_blueprint(path) for path in shipped_blueprints().values()]
    shaped = [Recipe(blueprint, shape) for blueprint in found if (shape := shape_of(blueprint.base)) is not None]
    return tuple(sorted(shaped, key=lambda recipe: recipe.blueprint.body.zero_stage == 3))


# what is known of a base ----------------------------------------------------------------------------------------------


def _shape(base: Base) -> ModelShape:
    shape = shape_of(base)
    if shape is None:
        assert isinstance(base, PretrainedBase)  # the sizes of an embedded one are written
        shape = read_shape(_fetched_config(base), base.model)
    if shape.longest_row is not None and shape.longest_row < SHORTEST_ROW:
        raise ModelError(
            f"{shape.name} attends to {shape.longest_row} tokens; rows of at least {SHORTEST_ROW} were meant",
            "take another base",
        )
    return shape


def _fetched_config(base: PretrainedBase) -> Path:
    """The config.json of a hub model, fetched into the hub's cache. Raises ModelError: at once where the hub cannot be reached
    at all; one that is slow or busy is asked again, as its client does."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        refuse_unreachable(base.model, base.revision)
        return Path(hf_hub_download(base.model, "config.json", revision=base.revision, etag_timeout=LOOK_SECONDS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"blueprint: auto needs the sizes of {base.model}, and its config.json cannot be fetched: {error}",
            "check name and network (HF_TOKEN for gated models), give a folder that holds its config.json, or name a "
            f"blueprint: {', '.join(shipped_blueprints())}",
        ) from error


def refuse_unreachable(model: str, revision: str | None) -> None:
    """Look at the hub once. Raises OSError where no connection comes about: its client would try that for half a minute.
    Whatever else it answers, or if it is slow to, is for `hf_hub_download` to ask again and to tell."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json", revision=revision), timeout=LOOK_SECONDS)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return
    except Exception as error:
        if type(error).__name__.startswith("Connect"):  # so are they called by all clients of HTTP that the hub's is made with
            raise OSError(f"the Hugging Face hub cannot be reached ({error})") from error


def _begun_with(runs: Path, name: str) -> Chosen | None:
    """What a run, or the probe before it, was begun with, None where there is none; a damaged `run.json` is for `claim` to
    refuse."""
    layout = RunLayout((runs / name).absolute())
    begun = layout.run_manifest if layout.run_manifest.is_file() else layout.probe().question
    if not is_run_name(name) or not begun.is_file():
        return None
    try:
        content: Any = read_json(begun)["chosen"]
        return Chosen.from_json(content)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def named_base(model: str) -> PretrainedBase:
    """The base that `model` names on a command line: a folder if there is one, else an id of the hub."""
    if written_path(model).is_dir():
        return PretrainedBase(type="pretrained", model=str(written_path(model).resolve()))
    return PretrainedBase(type="pretrained", model=model)
